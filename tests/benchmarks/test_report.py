import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report():
    spec = util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = util.module_from_spec(spec)
    sys.modules["report"] = module
    spec.loader.exec_module(module)
    return module


def test_the_numbers_in_the_readme_are_those_of_the_results(report):
    readme = (ROOT / "README.md").read_text()
    assert report.fill(readme, report.RESULTS) == readme, "run python benchmarks/report.py"


def test_a_missing_block_is_an_error(report):
    with pytest.raises(ValueError, match="results: demo"):
        report.fill("nothing to fill", report.RESULTS)
