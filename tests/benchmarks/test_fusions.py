import json
import os
import subprocess
import sys
from pathlib import Path

import fusions
import pytest
import torch

from nat_models import fused

ROOT = Path(__file__).resolve().parents[2]


def options(*words):
    return fusions.parse(["r.json", "--commit", "a", *words])


@pytest.fixture
def result():
    case = {"operation": "norm", "rows": 4, "channels": 64}
    times = {"torch_us": 20.0, "fused_us": 10.0, "floor_us": 5.0, "error": 0.001}
    records = [{"part": "operations", "case": case} | times]
    for choice, speed in {"off": 1000.0, "all": 1500.0, "mlp": None}.items():
        one = fusions.FusedCase("nat_tiny", "training", "compiled", 128, choice=choice)
        found = {"images_per_second": speed} if speed else {"status": "out of memory"}
        records.append(fusions.case_record(one) | found)
    versions = {"torch": "2", "triton": "3"}
    return {"device": "X", "versions": versions, "results": records}


def test_operations_are_verified_and_timed_and_not_measured_again(tmp_path):
    """In Triton's interpreter, which a process has for all its kernels or for none."""
    file, earlier = tmp_path / "r.json", tmp_path / "earlier.json"
    code = f"""if True:
        import fusions, shutil
        fusions.STAGES[:] = [(1, 96)]
        fusions.main()
        shutil.copy({str(file)!r}, {str(earlier)!r})
        fusions.main()"""
    words = [str(file), "--commit", "a", "--device", "cpu", "--parts", "operations"]
    paths = ROOT / "benchmarks", ROOT, ROOT / "kernels"
    settings = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", code, *words]
    subprocess.run(command, env=os.environ | settings, check=True, timeout=120)
    records = json.loads(file.read_text())["results"]
    assert len(records) == len(fusions.OPERATIONS)
    assert all(0 < r["error"] < 0.02 and r["fused_us"] > 0 for r in records)
    assert json.loads(earlier.read_text())["results"] == records


@pytest.mark.parametrize("shift", [0.0, 1.0], ids=["right", "wrong"])
def test_a_wrong_result_is_an_error(monkeypatch, shift):
    def pair(rows, channels, device):
        ones = torch.ones(rows, channels)
        return fusions.Pair(
            lambda: (ones + shift,), lambda: None, lambda: (ones[-2:].double(),), slice(-2, None), 8
        )

    monkeypatch.setitem(fusions.OPERATIONS, "norm", (pair, 1))
    work = fusions.Work("norm", 3, "cpu")
    if shift:
        with pytest.raises(ValueError, match=r"'norm'.* relative error 0\.95"):
            work.measure()
    else:
        assert work.measure()["error"] == 0


def test_models_run_what_was_chosen(tmp_path, monkeypatch, capsys):
    words = ["--device", "cpu", "--model", "test_vit", "--passes", "inference", "--rounds", "1"]
    words += ["--executions", "eager", "--round-seconds", "0.01", "--batch-size", "2"]
    words += ["--precision", "float32", "--choices", "off", "all", "--parts", "models"]
    file = tmp_path / "r.json"
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["fusions.py", str(file), "--commit", "a", *words])
        fusions.main()
    assert capsys.readouterr().out.count("2 cases in") == 1
    records = json.loads(file.read_text())["results"]
    assert [r["case"]["choice"] for r in records] == ["off", "all"]
    assert all(r["images_per_second"] > 0 for r in records)


@pytest.mark.parametrize("choice", fusions.CHOICES)
def test_a_process_runs_its_choice_fused(monkeypatch, choice):
    monkeypatch.setattr(fused.use, "_has_kernels", lambda device, generation: True)
    case = fusions.FusedCase("test_vit", "inference", "eager", 1, choice=choice)
    with fusions._chosen:
        fusions.create_model(case, torch.device("cpu"))
        x, weight = torch.empty(4, 64), torch.empty(64, 64)
        half = x.bfloat16(), weight.bfloat16(), weight.bfloat16()
        used = fused.norm_is_used(x), fused.mlp_is_used(*half)
    assert used == (choice in ("norm", "all"), choice in ("mlp", "all"))


def test_each_pass_and_execution_is_a_group():
    groups = list(fusions.model_groups(options("--executions", "eager", "compiled")))
    assert [(g[0].kind, g[0].execution, g[0].batch_size) for g in groups] == [
        ("inference", "eager", 256), ("inference", "compiled", 256),
        ("training", "eager", 128), ("training", "compiled", 128),
    ]  # fmt: skip
    assert [case.choice for case in groups[0]] == list(fusions.CHOICES)


def test_host_times_are_of_both_ways(monkeypatch):
    host_us = fusions.host_us
    monkeypatch.setattr(fusions, "host_us", lambda function: host_us(function, calls=1))
    records = list(fusions.host_times("cpu"))
    assert [r["case"]["operation"] for r in records] == ["norm", "mlp", "add, norm"]
    assert all(r["torch_us"] > 0 and r["fused_us"] > 0 for r in records)


def test_tables_tell_times_and_speeds(result):
    text = fusions.tables(result)
    assert text.startswith("X, torch 2, Triton 3")
    assert "| norm | 4 | 64 | 20.0 | 10.0 | 5.0 |" in text
    assert (
        "| nat_tiny | training | compiled | 128 | 1,000 | - | out of memory | 1,500 | - |" in text
    )
