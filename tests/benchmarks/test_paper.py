import json

import paper
import pytest
import study
from compiling import Kernel, OperatorPass
from problem import Problem, load_problems

PROBLEMS = load_problems("paper")
SMALL = [
    {"map": [12], "heads": 2, "head_dim": 8, "kernel_size": [3], "dilation": [2], "batch": 2},
    {"map": [6, 5], "heads": 1, "head_dim": 8, "kernel_size": [3, 5], "dilation": [2, 1],
     "batch": 3},
    {"map": [3, 4, 4], "heads": 1, "head_dim": 8, "kernel_size": [2, 3, 3],
     "dilation": [1, 1, 1], "batch": 1},
]  # fmt: skip


@pytest.fixture
def measure(on_cpu, generations_on_cpu, monkeypatch):
    monkeypatch.setattr(
        paper, "load_problems", lambda _: [p | {"slow": False, "tf32": True} for p in SMALL]
    )
    return on_cpu(paper)


def test_there_are_some_hundred_problems_of_each_dimension():
    problems = [Problem.of(entry) for entry in PROBLEMS]
    assert len(set(problems)) == len(problems)
    for dims in (1, 2, 3):
        chosen = [e for e, p in zip(PROBLEMS, problems, strict=True) if p.dims == dims]
        assert len(chosen) >= 200
        assert sum(entry["slow"] for entry in chosen) == 10
        assert sum(entry["tf32"] for entry in chosen) >= 60
    assert all(
        k * d <= n
        for p in problems
        for n, k, d in zip(p.map, p.kernel_size, p.dilation, strict=True)
    )


def test_a_first_part_is_a_balanced_sample():
    arguments = study.parse(paper, ["r.json", "--commit", "a"])

    class Nothing:
        def find(self, _):
            return None

    work = paper.missing(arguments, Nothing())
    assert len(work) == 2 * len(PROBLEMS) + sum(entry["tf32"] for entry in PROBLEMS)
    slow = [len(item.providers) > 4 for item in work]
    assert slow == [True] * 30 + [False] * (len(work) - 30)
    first = [(item.problem.dims, item.precision) for item in work[30:300]]
    counts = [first.count((d, p)) for d in (1, 2, 3) for p in ("float16", "float32")]
    assert min(counts) >= 20
    assert sum(precision == "tf32" for _, precision in first) >= 20
    assert work == paper.missing(arguments, Nothing())


def test_all_providers_are_measured_once(measure, tmp_path):
    first = measure("--precision", "float32")
    assert len(first.records) == 3
    for record in first.records:
        assert set(record["providers"]) == {"naive", "gemm", "fused", "dense"}
        assert record["providers"]["fused"]["backward_us"] == 20
        assert record["providers"]["dense"]["forward_way"] == "flash"
        assert not record["failures"]
        assert max(record["errors"].values()) < 1e-5
        assert record["kernels"] == []  # the reference has none
    second = measure("--precision", "float32", "float16", commit="b")
    assert [r["commit"] for r in second.records] == ["a"] * 3 + ["b"] * 3


def test_nothing_starts_after_the_limit(measure):
    assert measure(seconds=1).records == []


def test_what_other_kernels_gave_is_measured_anew_in_its_order(measure):
    records = measure("--precision", "float16").records
    order = [r["map"] for r in records]
    again = measure("--precision", "float16", "--again", "a", commit="b").records
    assert [(r["map"], r["commit"]) for r in again] == [(m, "b") for m in order]
    kept = measure("--precision", "float16", "--again", "a", commit="c").records
    assert [r["commit"] for r in kept] == ["b"] * 3


def test_a_record_has_the_kernels_that_it_launches():
    forward = OperatorPass("fused", Problem.of(SMALL[0]), "float16", False, False)
    backward = forward._replace(backward=True)
    content = {}
    first, second = (Kernel("_forward", 4, 1024, registers, 0) for registers in (100, 110))
    assert paper.kernel_numbers(content, {forward: [first, first], backward: None}) == [0, 0]
    assert paper.kernel_numbers(content, {forward: [second], backward: [first]}) == [1, 0]
    one, two = content["kernels"]
    assert (one["backend"], one["dims"], one["registers"]) == ("fused", 1, 100)
    assert two == one | {"registers": 110}


def test_tables_and_pictures_come_from_the_file_alone(measure, tmp_path):
    measure("--precision", "float32", "float16")
    result = json.loads((tmp_path / "r.json").read_text())
    kernel = {"warps": 4, "shared_memory": 2048, "registers": 128, "spills": 0}
    result["kernels"] = [
        kernel | {"backend": "fused", "precision": "float32", "dims": 1, "name": "_forward"}
    ]
    for record in result["results"]:
        record["kernels"] = [0]
    text = paper.tables(result)
    assert "| forward and backward | float32 | 3-D | 1 | 0 % (0, 0) |" in text
    assert "6 problems and precisions; commit a." in text
    assert "Of the other problems fused is slower in 0 cases" in text
    assert "| fused | float32 | _forward | 128 | 2.0 | 0% | 25% | 25% |" in text
    assert "commit a. A third is of old kernels.\n" in paper.tables(
        result | {"note": "A third is of old kernels."}
    )
    files = paper.plots(result, tmp_path)
    assert all(" " in caption for caption in files)
    assert all(file.stat().st_size > 10_000 for file in files.values())
