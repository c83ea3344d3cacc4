"""One HTML page with all in it: text, sortable tables, pictures with values to point at.

It asks nothing of a network. Text and tables are Markdown; a picture is inline SVG, in which a mark
whose gid is "tip:TEXT" shows TEXT when pointed at, or a PNG.
"""

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from xml.etree import ElementTree

import matplotlib
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
# HTML knows no other prefix.
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
TIP = "tip:"


@dataclass
class Section:
    """A heading with what is below it.

    Attributes:
        title: The heading.
        markdown: Text and tables.
        figures: Pictures to draw, by name.
        images: PNG files, by caption.
    """

    title: str
    markdown: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    images: Mapping[str, Path] = field(default_factory=dict)

    @property
    def anchor(self) -> str:
        """Where a link finds it."""
        return re.sub(r"\W+", "-", self.title.lower())

    @property
    def html(self) -> str:
        """Heading, pictures, text."""
        pictures = [_figure(name, svg(figure)) for name, figure in self.figures.items()]
        pictures += [_figure(name, _png(path, name)) for name, path in self.images.items()]
        heading = f'<h2 id="{self.anchor}">{escape(self.title)}</h2>'
        return "\n".join([heading, *pictures, markdown_html(self.markdown)])


def page(title: str, sections: list[Section]) -> str:
    """The page's HTML."""
    links = [f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections]
    template = Template(Path(__file__).with_suffix(".html").read_text())
    return template.substitute(
        title=escape(title),
        contents="\n".join(links),
        sections="\n".join(section.html for section in sections),
    )


def markdown_html(text: str) -> str:
    """Markdown to HTML; a table scrolls in a box of its own."""
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return html.replace("<table>", '<div class="table"><table>').replace(
        "</table>", "</table></div>"
    )


def svg(figure: Figure) -> str:
    """A figure as SVG, always the same text for the same figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        if (tip := element.get("id", "")).startswith(TIP):
            del element.attrib["id"]
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = tip.removeprefix(TIP)
            element.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _figure(caption: str, picture: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _png(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
