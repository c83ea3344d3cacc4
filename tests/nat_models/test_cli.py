import subprocess
import sys
from pathlib import Path

import pytest

from nat_models import cli

ROOT = Path(__file__).parents[2]


def test_configs_are_found():
    assert (Path(cli.config_dir()) / "train.yaml").is_file()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    path = [str(ROOT), str(ROOT / "kernels")]
    code = f"import sys; sys.path[:0] = {path}; from nat_models.cli import train; train()"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "model.name=nat_nano"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    [line] = (result.stdout + result.stderr).splitlines()
    assert line.startswith("error: model.name=nat_nano: timm has no such model")
    assert list(tmp_path.iterdir()) == []


def test_wrong_key_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nat-eval", "chekpoint=x"])
    with pytest.raises(SystemExit, match="2"):
        cli.evaluate()
    captured = capsys.readouterr()
    assert captured.out + captured.err == "error: chekpoint=x: no such key; did you mean ckpt?\n"


def test_the_arguments_of_a_sweep_are_left_to_hydra(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nat-eval", "--cfg", "job", "weights=averaged,trained", "-m"])
    with pytest.raises(ValueError, match="Only one of"):
        cli.evaluate()


def test_doors_and_console_scripts_lead_to_the_same_functions():
    tomllib = pytest.importorskip("tomllib", reason="came with Python 3.11")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert module == "nat_models.cli"
        assert callable(getattr(cli, name))
    assert "from nat_models.cli import train" in (ROOT / "train.py").read_text()
    assert "from nat_models.cli import evaluate" in (ROOT / "eval.py").read_text()
