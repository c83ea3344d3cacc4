from pathlib import Path

import pytest
import report
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_the_numbers_in_the_readme_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text()
    assert report.fill(readme, report.RESULTS) == readme, "run make report"


def test_the_picture_in_the_readme_is_of_the_results():
    with Image.open(report.PICTURE) as picture:
        source = picture.text["Source"]
    assert source == report.digest(report.RESULTS / report.BLOCKS["models"][0]), "run make report"
    assert f"({report.PICTURE.relative_to(ROOT)})" in (ROOT / "README.md").read_text()


def test_a_missing_block_is_an_error():
    with pytest.raises(ValueError, match="results: demo"):
        report.fill("nothing to fill", report.RESULTS)


def test_every_result_of_a_study_has_its_section(tmp_path):
    sections = report.sections(report.RESULTS, tmp_path)
    titles = [section.title for section in sections]
    assert titles.index("Models: models-h100") < titles.index("Operator: kernels-h100")
    drawn = {f"models-h100-{name.replace(' ', '-')}.png" for name in sections[0].figures}
    assert drawn == {path.name for path in tmp_path.glob("models-h100-*.png")} != set()
    assert {f"{title.split(': ')[1]}.md" for title in titles} == {
        path.name for path in tmp_path.glob("*.md")
    }
    written = (tmp_path / "models-h100.md").read_text()
    assert written == f"# {titles[0]}\n\n{sections[0].markdown}\n"
    captions = [caption for section in sections for caption in section.images]
    assert "Roofline: rates by arithmetic intensity" in captions
    assert not [caption for caption in captions if "nvidia" in caption.lower()]
