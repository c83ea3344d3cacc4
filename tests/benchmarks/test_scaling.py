import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scaling

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "scaling.py"
TINY = ["+model.embed_dim=32", "+model.depths=[1,1,1,1]", "+model.num_heads=[1,1,1,1]"]
TINY += ["+model.kernel_size=3", "compile=false", "data.num_workers=0"]
SMALL = ["--gpus", "1", "2", "--models", "nat_tiny", "--strategies", "fsdp2", "--size", "32"]
SMALL += ["--batch", "4", "--global-batch", "16", "--rounds", "2", "--round-steps", "2"]
SMALL += ["--repeats", "1", "--precisions", "32-true", "--steps", "20"]


@pytest.mark.slow
def test_two_processes_are_measured_agree_with_one_and_resume_on_another_number(
    tmp_path, monkeypatch, capsys
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
    cases = [r["case"] for r in report["results"]]
    kinds = [(case["part"], case["gpus"], case.get("micro_batches")) for case in cases]
    assert kinds == [
        ("throughput", 1, None), ("throughput", 2, None), ("loader", 1, None),
        ("loss", 1, 1), ("loss", 2, 1), ("loss", 1, 2), ("resume", 2, 1),
    ]  # fmt: skip
    assert len(report["results"][2]["round_seconds"]) == 2
    alone, sharded, micro, resumed = report["results"][3:]
    assert [*alone["losses"]] == [str(step) for step in range(20)]
    assert alone["losses"]["19"] < 0.8 * alone["losses"]["0"]
    for one in (micro, sharded):
        assert one["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    whole = {**resumed["losses_before"], **resumed["losses"]}
    assert len(resumed["losses_before"]) == 14  # in the fourth epoch of four steps
    assert whole == pytest.approx(alone["losses"], abs=1e-4)
    output.with_suffix(".png").unlink()
    monkeypatch.setattr(sys, "argv", ["scaling.py", str(output), *SMALL, "--set", *TINY])
    assert scaling.main() == 0
    assert '"part"' not in capsys.readouterr().out  # what is there is not measured again
    assert output.with_suffix(".png").stat().st_size > 0


def test_a_file_of_another_machine_is_refused(tmp_path, monkeypatch):
    output = tmp_path / "scaling.json"
    text = json.dumps({"device": "another", "versions": {}, "results": []})
    output.write_text(text)
    monkeypatch.setattr(scaling, "measure", None)
    monkeypatch.setattr(sys, "argv", ["scaling.py", str(output), *SMALL])
    device = scaling.machine()["device"]
    with pytest.raises(ValueError, match=f"device another, but this is {device}"):
        scaling.main()
    assert output.read_text() == text


@pytest.mark.parametrize(
    "option",
    ["--batch=8", "--size=64", "--global-batch=32", "--steps=40", "--rounds=3", "--set=seed=1"],
)
def test_what_a_result_depends_on_is_in_its_case(monkeypatch, option):
    found = []
    for more in ([], [option]):
        monkeypatch.setattr(sys, "argv", ["scaling.py", "x.json", *SMALL, *more])
        found.append(scaling.cases(scaling.parse()))
    assert any(ours not in found[0] for ours in found[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--gpus", "3"], "--global-batch 16: expected a multiple of 3")],
)
def test_bad_arguments_are_named(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "x.json", *SMALL, *arguments])
    with pytest.raises(SystemExit):
        scaling.parse()
    assert message in capsys.readouterr().err
