import json
import shutil
import subprocess
from pathlib import Path

import pytest
import report
from matplotlib.figure import Figure
from page import Section, markdown_html, page, svg

TABLE = """
| name | img/s |
| --- | --- |
| a | 900 |
| b | - |
| c | 1,000 (2.0x) |
| d | 20 |
"""
# What a script that is put behind the page finds there, once it has loaded.
PROBE = """<script>
const head = document.querySelectorAll("th")[1];
const names = () => [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent);
const clicks = head ? [1, 2].map(() => { head.click(); return names().join(""); }) : [];
const width = picture => picture.getBoundingClientRect().width;
document.title = JSON.stringify({
  clicks,
  pictures: [...document.querySelectorAll("figure svg, figure img")].map(width),
  marks: [...document.querySelectorAll("svg use")].map(width),
  requests: performance.getEntriesByType("resource").map(entry => entry.name),
});
</script>"""


def figure_with_a_tip(text):
    figure = Figure()
    [point] = figure.subplots().plot(1, 2, "o")
    point.set_gid(f"tip:{text}")
    return figure


def browse(path: Path, content: str):
    """What the probe found, and what the console says."""
    chromium = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    assert chromium, "needs Chromium: apt-get install chromium-headless-shell"
    path.write_text(content + PROBE)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command = [chromium, *options, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = done.stdout.partition("<title>")[2].partition("</title>")[0]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(found), console


@pytest.mark.browser
def test_a_click_sorts_by_number_and_what_has_none_is_last(tmp_path):
    found, console = browse(tmp_path / "page.html", page("t", [Section("Table", TABLE)]))
    assert found["clicks"] == ["cadb", "dacb"]
    assert console == []


@pytest.mark.browser
def test_the_page_of_the_results_renders_without_errors_or_requests(tmp_path):
    sections = report.sections(report.RESULTS, tmp_path)
    found, console = browse(tmp_path / "index.html", page("t", sections))
    assert console == []
    assert [name for name in found["requests"] if not name.startswith("data:")] == []
    pictures = sum(len(section.figures) + len(section.images) for section in sections)
    assert len(found["pictures"]) == pictures > 0
    assert min(found["pictures"]) > 300
    assert max(found["marks"]) > 0


@pytest.mark.browser
def test_an_error_of_the_page_is_seen(tmp_path):
    _, console = browse(tmp_path / "page.html", page("t", []) + "<script>missing()</script>")
    assert "missing is not defined" in console[0]


def test_a_mark_shows_its_tip():
    text = svg(figure_with_a_tip("nat_tiny: 5 < 6 img/s"))
    assert "<title>nat_tiny: 5 &lt; 6 img/s</title>" in text
    assert "tip:" not in text


def test_a_figure_is_always_the_same_text():
    assert svg(figure_with_a_tip("a")) == svg(figure_with_a_tip("a"))


def test_tables_scroll_by_themselves_and_html_stays_text():
    html = markdown_html(TABLE + "\n<b>bold</b>\n")
    assert '<div class="table"><table>' in html
    assert "<b>" not in html


def test_links_lead_to_the_sections():
    html = page("t", [Section("Models: a & b", "text")])
    assert 'href="#models-a-b"' in html
    assert 'id="models-a-b"' in html


def test_pictures_are_inside(tmp_path):
    path = tmp_path / "a_picture.png"
    figure_with_a_tip("a").savefig(path)
    images = {"a <picture>": path}
    html = page("t", [Section("s", "", {"drawn": figure_with_a_tip("b")}, images)])
    assert html.count("<figure>") == 2
    assert "<figcaption>a &lt;picture&gt;</figcaption>" in html
    assert 'alt="a &lt;picture&gt;"' in html
    assert "data:image/png;base64," in html
