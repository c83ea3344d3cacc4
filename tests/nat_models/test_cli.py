import subprocess
import sys
from pathlib import Path

import pytest

from nat_models import cli

ROOT = Path(__file__).parents[2]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = [str(ROOT), str(ROOT / "kernels")]
    code = f"import sys; sys.path[:0] = {path}; from nat_models.cli import *; "
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + f"{arguments[0]}()", *arguments[1:]],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def test_configs_are_found():
    assert (Path(cli.config_dir()) / "train.yaml").is_file()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    result = command("train", "model.name=nat_nano", cwd=tmp_path)
    assert result.returncode == 2
    [line] = (result.stdout + result.stderr).splitlines()
    assert line.startswith("error: model.name=nat_nano: timm has no such model")
    assert list(tmp_path.iterdir()) == []


def test_wrong_key_is_hydras_own_error(tmp_path):
    result = command("evaluate", "chekpoint=x", cwd=tmp_path)
    assert result.returncode == 1
    assert "Key 'chekpoint' is not in struct" in result.stderr


def test_doors_and_console_scripts_lead_to_the_same_functions():
    tomllib = pytest.importorskip("tomllib", reason="came with Python 3.11")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, _, name = target.partition(":")
        assert module == "nat_models.cli"
        assert callable(getattr(cli, name))
    assert "from nat_models.cli import train" in (ROOT / "train.py").read_text()
    assert "from nat_models.cli import evaluate" in (ROOT / "eval.py").read_text()
