import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "scaling.py"
TINY = ["+model.embed_dim=32", "+model.depths=[1,1,1,1]", "+model.num_heads=[1,1,1,1]"]
TINY += ["+model.kernel_size=3", "task.compile=false", "data.num_workers=0"]
SMALL = ["--gpus", "1", "2", "--models", "nat_tiny", "--strategies", "fsdp2", "--size", "32"]
SMALL += ["--batch", "4", "--global-batch", "16", "--rounds", "2", "--round-steps", "2"]
SMALL += ["--repeats", "1", "--precisions", "32-true", "--steps", "20"]


@pytest.fixture(scope="module")
def scaling():
    spec = util.spec_from_file_location("scaling", SCRIPT)
    module = util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_two_processes_are_measured_agree_with_one_and_resume_on_another_number(
    scaling, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "scaling.json"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(output), *SMALL, "--set", *TINY],
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    kinds = [(r["part"], r["gpus"], r.get("micro_batches")) for r in report["results"]]
    assert kinds == [
        ("throughput", 1, None), ("throughput", 2, None),
        ("loss", 1, 1), ("loss", 1, 2), ("loss", 2, 1), ("resume", 2, None),
    ]  # fmt: skip
    alone, micro, sharded, resumed = report["results"][2:]
    assert [*alone["losses"]] == [str(step) for step in range(20)]
    assert alone["losses"]["19"] < 0.8 * alone["losses"]["0"]
    for one in (micro, sharded):
        assert one["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    whole = {**resumed["losses_before"], **resumed["losses"]}
    assert len(resumed["losses_before"]) == 14  # in the fourth epoch of four steps
    assert whole == pytest.approx(alone["losses"], abs=1e-4)
    output.with_suffix(".png").unlink()
    monkeypatch.setattr(sys, "argv", ["scaling.py", str(output), *SMALL])
    assert scaling.main() == 0
    assert '"part"' not in capsys.readouterr().out  # what is there is not measured again
    assert output.with_suffix(".png").stat().st_size > 0


@pytest.fixture
def report():
    speed = {("auto", 1): 100.0, ("ddp", 2): 196.0, ("ddp", 4): 380.0, ("fsdp2", 2): 150.0}
    throughput = [
        {"part": "throughput", "model": "nat_tiny", "strategy": strategy, "gpus": gpus}
        | {"turn": turn, "images_per_second": value + turn}
        for (strategy, gpus), value in speed.items()
        for turn in (-1, 0, 1)
    ]
    runs = [("auto", 1, {"0": 2.0, "1": 1.5}), ("ddp", 2, {"0": 2.0, "1": 1.4998})]
    loss = [
        {"part": "loss", "gpus": gpus, "strategy": strategy, "micro_batches": 1}
        | {"precision": "32-true", "losses": losses}
        for strategy, gpus, losses in runs
    ]
    resume = [{"part": "resume", "gpus": 4, "onto": 2, "losses": {"1": 1.503}}]
    results = [*throughput, *loss, *resume]
    return {"device": "X", "nccl": "1", "versions": {"torch": "2"}, "results": results}


def test_the_table_tells_ratios_and_differences(scaling, report):
    table = scaling.table(report)
    assert "| nat_tiny | ddp | 4 | 380 | 3.80x |" in table
    assert "| ddp | 2 | 32-true | 2 | 1.4998 | 2.0e-04 |" in table
    assert "| fsdp2, continued on 2 | 4 | 32-true | 1 | 1.5030 | 3.0e-03 |" in table


def test_the_plot_shows_efficiencies(scaling, report):
    [axes] = scaling.plot(report).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["nat_tiny, ddp"] == pytest.approx([100, 98, 95])
    assert lines["nat_tiny, fsdp2"] == pytest.approx([100, 75])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--gpus", "3"], "--global-batch 16: expected a multiple of 3")],
)
def test_bad_arguments_are_named(scaling, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "x.json", *SMALL, *arguments])
    with pytest.raises(SystemExit):
        scaling.parse()
    assert message in capsys.readouterr().err
