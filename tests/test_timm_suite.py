"""The runner of timm's own tests; the run itself is `make test-timm`."""

import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "timm_suite.py"


@pytest.fixture(scope="module")
def suite():
    spec = util.spec_from_file_location("timm_suite", SUITE)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_patterns_choose_models(suite):
    assert suite.chosen_models(["nat_mini", "vitrpb_*"]) == [
        "nat_mini",
        "vitrpb_base",
        "vitrpb_small",
    ]
    assert len(suite.chosen_models([])) == 26


def test_a_name_of_no_model_fails_before_any_download():
    run = [sys.executable, SUITE, "nat_mini", "nat_magic"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no model is named 'nat_magic'" in done.stderr


def test_a_model_without_all_its_tests_fails(suite, tmp_path, monkeypatch):
    (tmp_path / "test_models.py").write_text(
        "import timm, pytest\n"
        "@pytest.mark.parametrize('model_name', timm.list_models())\n"
        "def test_model_forward(model_name): pass\n"
    )
    monkeypatch.setenv(suite.PATTERNS, "nat_mini")
    monkeypatch.setattr("timm.list_models", suite.timm.list_models)
    monkeypatch.setattr("timm.list_pretrained", suite.timm.list_pretrained)
    code = pytest.main(["-q", "-c", "/dev/null", "-p", "no:cacheprovider", tmp_path], [suite])
    assert code == pytest.ExitCode.USAGE_ERROR
