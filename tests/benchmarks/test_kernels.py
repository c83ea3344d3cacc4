import json

import pytest
from problem import Problem, load_problems

import kernels

ZOO = load_problems("zoo")
SMALL = [
    {"map": [6, 6], "heads": 2, "head_dim": 8, "kernel_size": [3, 3], "dilation": [2, 2],
     "batch": 2, "main": True},
    {"map": [5, 5], "heads": 1, "head_dim": 8, "kernel_size": [5, 5], "dilation": [1, 1],
     "batch": 3, "main": False},
]  # fmt: skip


@pytest.fixture
def measure(on_cpu, monkeypatch):
    monkeypatch.setattr(kernels, "load_problems", lambda _: SMALL)
    return on_cpu(kernels)


def test_the_zoo_has_44_shapes_and_7_of_them_are_main():
    names = {str(Problem.of(entry)) for entry in ZOO}
    assert len(ZOO) == len(names) == 44
    assert sum(entry["main"] for entry in ZOO) == 7
    assert all(k * d <= n for e in ZOO for k, d, n in zip(*_axes(e), strict=True))


def _axes(entry):
    return entry["kernel_size"], entry["dilation"], entry["map"]


def test_each_provider_is_checked_and_timed_in_both_passes(measure):
    words = ["--dtype", "float32", "--providers", "reference", "sdpa", "natten"]
    records = measure(*words).records
    found = {(r["map"][0], r["provider"]): r for r in records}
    assert len(records) == 6
    ours = found[6, "reference"]
    assert ours["forward_us"] == ours["backward_without_rpb_us"] == 20
    assert max(ours["relative_errors"].values()) < 1e-5
    assert set(ours["relative_errors"]) == {
        "output", "grad_query", "grad_key", "grad_value", "grad_rpb",
    }  # fmt: skip
    # q, k, v and o of 2 images, 36 tokens, 2 heads, 8 channels and 4 bytes, at 2 TB/s.
    assert ours["forward_floor_us"] == pytest.approx(4 * 2 * 36 * 2 * 8 * 4 / 2e6)
    assert found[6, "sdpa"]["ways"]["forward"] == "flash"
    assert "backward_us" not in found[6, "sdpa"]  # PyTorch's kernels for CPUs give no such gradient
    assert "forward_without_rpb_us" not in found[6, "sdpa"]
    assert "forward_us" not in found[6, "natten"]


def test_a_run_goes_on_where_the_last_one_ended(measure, tmp_path):
    words = ["--dtype", "float32", "--providers", "reference", "sdpa"]
    measure(*words, "--only", "6x6")
    before = json.loads((tmp_path / "r.json").read_text())["results"]
    after = measure(*words, commit="b").records
    assert [r["commit"] for r in after] == ["a", "a", "b", "b"]
    assert after[: len(before)] == before


def test_own_kernels_are_measured_again_for_another_commit(measure, monkeypatch):
    words = ["--dtype", "float32", "--only", "main", "--providers", "reference", "sdpa"]
    measure(*words)
    monkeypatch.setattr(kernels, "GENERATIONS", ("reference",))
    records = measure(*words, commit="b").records
    assert {r["provider"]: r["commit"] for r in records} == {"reference": "b", "sdpa": "a"}


def test_nothing_starts_after_the_limit(measure):
    assert measure("--dtype", "float32", "--providers", "reference", seconds=1).records == []


def test_a_file_of_another_device_is_refused(measure, tmp_path):
    words = ["--dtype", "float32", "--providers", "reference", "--only", "main"]
    measure(*words)
    file = tmp_path / "r.json"
    file.write_text(file.read_text().replace('"CPU"', '"another"'))
    with pytest.raises(ValueError, match="another"):
        measure(*words)


def test_wrong_results_are_named_and_have_no_time(measure, monkeypatch):
    from peers import Operator

    class Wrong(Operator):
        def prepare(self, problem, tensors):
            return super().prepare(problem, tensors._replace(qkv=tensors.qkv + 0.01))

    monkeypatch.setitem(kernels.PROVIDERS, "reference", Wrong("reference"))
    words = ["--dtype", "float32", "--providers", "reference", "--only", "main"]
    (record,) = measure(*words).records
    assert "forward_us" not in record
    assert "wrong results" in record["failures"]["reference forward"]


def test_table_and_chart_come_from_the_results_alone(measure, tmp_path):
    results = measure("--dtype", "float32", "--providers", "reference", "sdpa")
    content = results.content | {"results": results.records}
    text = kernels.tables(content)
    assert "| 6x6, 2 heads, 3x3, dilation 2 | 0 | 20 (" in text
    ((caption, file),) = kernels.plots(content, tmp_path).items()
    assert caption == "Times over the memory's floor, float32"
    assert file.stat().st_size > 10_000


def test_what_broke_the_gpu_is_left_out_of_table_and_chart(measure, tmp_path):
    results = measure("--dtype", "float32", "--providers", "reference", "--only", "5x5")
    work = kernels.Work(Problem.of(SMALL[0]), True, "float32", kernels.PROVIDERS["reference"])
    broken = work.record | {"failures": {"GPU": "an illegal memory access was encountered"}}
    content = results.content | {"results": [broken, *results.records]}
    text = kernels.tables(content)
    assert "5x5, 1 heads" in text
    assert "6x6" not in text
    assert kernels.plots(content, tmp_path)


def test_the_layers_of_nat_tiny_are_summed():
    records = [
        {"map": [side, side], "main": True, "dilation": 1, "provider": "fused",
         "forward_us": 1000, "forward_floor_us": 10 * side}
        for side in (56, 28, 14, 7)
    ]  # fmt: skip
    row = kernels.nat_tiny(records, "forward", [("fused", "forward"), ("flex", "forward")])
    # 3 layers at 56, 4 at 28, 18 at 14 and 5 at 7.
    assert row == "\n| NAT-Tiny, milliseconds | 5.67 | 30.00 | - |"
