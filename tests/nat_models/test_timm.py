"""Scripts that are run with the models registered."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nat_models
from nat_models.timm import main

REPO = Path(__file__).parents[2]
SCRIPT = """
import sys, timm, beside
from timm.models import create_model

if __name__ == "__main__":
    model = create_model("nat_mini", embed_dim=32, depths=(1, 1), num_heads=(1, 2), num_classes=3)
    print(type(model).__name__, model.num_classes, beside.NAME, sys.argv[1:], __file__)
    sys.exit(5)
"""


def test_script_runs_as_by_python_with_the_models(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "validate.py").write_text(SCRIPT)
    (folder / "beside.py").write_text("NAME = 'beside'\n")
    command = [sys.executable, "-m", "nat_models.timm", "scripts/validate", "--model", "nat_mini"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "kernels")])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert done.stdout == "NAT 3 beside ['--model', 'nat_mini'] scripts/validate.py\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/validate"], "error: no/validate: no such script"),
        (["no/none.py"], "error: no/none.py: no such script"),
        ([], "usage: "),
    ],
)
def test_missing_script_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.startswith(message)


def test_the_package_goes_on_to_list_its_models():
    assert nat_models.list_models("nat_t*") == ["nat_tiny"]  # although its `timm` is this module
