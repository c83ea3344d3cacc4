import json

import limits
import peers
import pytest
import torch
from problem import Problem


@pytest.fixture
def measure(on_cpu, generations_on_cpu, monkeypatch):
    small = [
        *(Problem((n, n), 4, 8, (3, 3), (1, 1), 1) for n in (4, 6)),
        Problem((16,), 4, 8, (5,), (1,), 1),
    ]
    monkeypatch.setattr(limits, "problems", lambda: small)
    monkeypatch.setattr(limits, "PRECISION", "float32")
    # What only a GPU counts.
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 110)
    return on_cpu(limits)


def test_each_size_has_times_and_memory(measure, tmp_path):
    records = measure().records
    assert len(records) == 12
    for record in records:
        assert record["forward_us"] == record["backward_us"] == 20
        tensors = 4 * limits.tokens(record) * 4 * 8 * 4  # q, k, v and the output's gradient
        assert record["bytes"] == 100 + tensors
        assert not record["failures"]
    result = json.loads((tmp_path / "r.json").read_text())
    text = limits.tables(result)
    assert "| fused | 6x6 |" in text
    assert "| 16 | 2500.0 (0) |" in text
    assert "float32, 4 heads of 8 channels" in text
    (file,) = limits.plots(result, tmp_path).values()
    assert file.stat().st_size > 10_000


def test_what_takes_too_long_or_too_much_memory_is_left_out():
    large = Problem((2048, 2048), 4, 32, (7, 7), (1, 1), 1)
    sequence = Problem((2**20,), 4, 32, (8191,), (1,), 1)
    feasible = {
        name: limits.is_feasible(limits.Work(p, peers.PROVIDERS[n]))
        for name, p, n in [
            ("fused", large, "fused"), ("dense", large, "dense"), ("naive", sequence, "naive"),
            ("fused sequence", sequence, "fused"),
        ]
    }  # fmt: skip
    assert feasible == {"fused": True, "dense": False, "naive": False, "fused sequence": True}


@pytest.mark.parametrize(("size", "expected"), [((3000, 3000), [2590] * 2), ((1000,), [745_654])])
def test_the_largest_size_is_computed_from_the_bytes_a_token(size, expected):
    token = 2560 if len(size) == 2 else 23_040
    record = Problem(size, 4, 32, (7,) * len(size), (1,) * len(size), 1).record
    record |= {"bytes": token * limits.tokens(record), "provider": "fused"}
    assert limits.computed_size(record) == expected
    last = "x".join(map(str, expected))
    small = record | {"map": [16] * len(size), "bytes": 1}
    assert f"| {token} | {last} |" in limits._largest([small, record])


def test_maps_go_to_512_and_sequences_to_a_million():
    sizes = [problem.map for problem in limits.problems()]
    assert (512, 512) in sizes
    assert (2**20,) in sizes
