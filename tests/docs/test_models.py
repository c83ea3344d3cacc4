"""The page of models is up to date, and agrees with what the papers state."""

import sys
from importlib import util
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).resolve().parents[2]
# Of models without a published figure: the official code's, counted with 21841 classes.
COUNTED = {"dinat_large_21k": 30.56, "dinat_large_21k_11x11": 41.14, "dinat_s_large_21k": 34.56}


@pytest.fixture(scope="module")
def models():
    spec = util.spec_from_file_location("docs_models", ROOT / "docs" / "models.py")
    module = util.module_from_spec(spec)
    sys.modules["docs_models"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table(models):
    return models.table()


def test_page_is_up_to_date(models, table):
    text = models.PAGE.read_text()
    assert models.page(text, table) == text
    assert models.page(models.page(text, "another"), table) == text != models.page(text, "another")


def test_every_published_model_has_its_line(models, table):
    names = {name.partition(".")[0] for name in timm.list_models("*.shi_*", pretrained=True)}
    assert set(models.PUBLISHED_GMACS) == names
    assert len(names) == 25
    assert all(f"| `{name}` |" in table for name in names)


def test_multiply_accumulates_are_the_published_ones(models, table):
    for line in table.splitlines()[2:]:
        name, *_ = cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        counted = float(cells[models.HEADER.index("GMACs")])
        expected = models.PUBLISHED_GMACS[name] or COUNTED[name]
        assert counted == pytest.approx(expected, rel=0.01), name


def test_speed_is_the_best_of_the_results(models, tmp_path, monkeypatch):
    result = '{"model": "nat_mini", "pass": "%s", "status": "%s", "images_per_second": %d}'
    rows = [("inference", "ok", 5), ("inference", "ok", 7), ("training", "ok", 9)]
    results = ", ".join(result % row for row in [*rows, ("inference", "failed", 11)])
    (tmp_path / "models-a.json").write_text(f'{{"device": "NVIDIA H100", "results": [{results}]}}')
    (tmp_path / "models-b.json").write_text(
        f'{{"device": "other", "results": [{result % rows[0]}]}}'
    )
    monkeypatch.setattr(models, "RESULTS", tmp_path)
    assert models.speeds() == {"nat_mini": 7}
    assert models.row("nat_mini", {"nat_mini": 1234.5})[-1] == "1,234"
    assert models.row("nat_mini", {})[-1] == "-"
