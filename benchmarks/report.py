"""All results as one page, and the README's numbers and picture, from benchmarks/results/ alone.

python benchmarks/report.py            # outputs/report/, README.md, docs/images/throughput.png
python benchmarks/report.py --check    # only say whether the README is up to date
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import counters
import fusions
import limits
import model_report
import paper
import scaling_report
from matplotlib.figure import Figure
from measuring import markdown_table
from page import Section, page

import kernels as operator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "throughput.png"
Result = dict[str, Any]


def demo(result: Result) -> str:
    """The default experiment: accuracy and time."""
    return (
        f"The default experiment takes {result['minutes']:.1f} minutes on two cores of an "
        f"{result['device']} and reaches {result['top1']:.1%} on the 1,000 held-out digits "
        f"({result['date']}); a support-vector machine gets {result['svc_top1']:.1%}."
    )


def kernels(result: Result) -> str:
    """The operator's times beside the floor."""
    rows = [
        [
            f"{r['map'][0]}x{r['map'][1]}, {r['heads']} heads"
            + (f", dilation {r['dilation']}" if r["dilation"] > 1 else ""),
            *(operator.over_floor(r, name) for name in ("forward", "backward")),
        ]
        for r in result["results"]
        if r["dtype"] == "bfloat16" and r["provider"] == "fused" and r["main"]
    ]
    first = result["results"][0]
    window = f"{first['kernel_size']}x{first['kernel_size']}"
    caption = (
        f"Microseconds with bias and its gradient ({_source(result)}; bf16, batch "
        f"{first['batch']}, {window} windows, {first['head_dim']} channels a head), and the ratio "
        "to the time that the memory traffic alone takes at the "
        f"{result['copy_bandwidth_tb_s']:.1f} TB/s of a copy in that run:"
    )
    return f"{caption}\n\n{markdown_table(['map', 'forward', 'backward'], rows)}"


def models(result: Result) -> str:
    """Speed of models."""
    caption = (
        f"{_source(result)}; 224 pixels, channels_last, random images and weights. "
        "`bfloat16` is autocast, `bfloat16-true` has weights of that type. Accuracies are the "
        "authors'. `make report` makes a page of all cases."
    )
    return f"{caption}\n\n{model_report.summary(result)}"


def scaling(result: Result) -> str:
    """Training on several GPUs."""
    device, date = result["device"], result["date"]
    caption = f"Training steps on GPUs of one host ({device}, {date}; random images, bf16-mixed):"
    return f"{caption}\n\n{scaling_report.throughput(result)}"


# Comment in the README: result file, and the function that renders it.
BLOCKS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "demo": ("demo.json", demo),
    "kernels": ("kernels-h200.json", kernels),
    "models": ("models-h200.json", models),
    "scaling": ("scaling-h200.json", scaling),
}


def fill(text: str, results: Path) -> str:
    """`text` with each block rendered anew from its result file."""
    for name, (file, render) in BLOCKS.items():
        content = render(json.loads((results / file).read_text()))
        pattern = rf"<!-- results: {name} -->\n.*?<!-- end -->"
        block = f"<!-- results: {name} -->\n{content}\n<!-- end -->"
        text, count = re.subn(pattern, lambda _: block, text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(f"README.md: expected one block 'results: {name}', found {count}")
    return text


class Study(NamedTuple):
    """What the page shows of a study's result files.

    Attributes:
        title: Of its sections.
        pattern: Names of its result files.
        tables: A result's tables, as Markdown.
        figures: Its pictures by name.
        plots: Or its pictures as PNG files, drawn into a folder, by caption.
    """

    title: str
    pattern: str
    tables: Callable[[Result], str]
    figures: Callable[[Result], dict[str, Figure]] = lambda result: {}
    plots: Callable[[Result, Path], dict[str, Path]] = lambda result, folder: {}


STUDIES = [
    Study("Models", "models*.json", model_report.tables, figures=model_report.figures),
    Study("Operator", "kernels*.json", operator.tables, plots=operator.plots),
    Study("Generations of kernels", "paper*.json", paper.tables, plots=paper.plots),
    Study("Hardware counters", "counters*.json", counters.tables),
    Study("Large maps", "limits*.json", limits.tables, plots=limits.plots),
    Study("Fusions", "fusions*.json", fusions.tables),
    Study("Scaling", "scaling*.json", scaling_report.tables, figures=scaling_report.figures),
]


def sections(results: Path, folder: Path) -> list[Section]:
    """A section for each result file of each study.

    All pictures go into `folder` as PNG files, the tables beside them as Markdown.
    """
    found = []
    for study in STUDIES:
        for path in sorted(results.glob(study.pattern), key=lambda path: path.stem):
            result = json.loads(path.read_text())
            figures, images = study.figures(result), study.plots(result, folder)
            for name, figure in figures.items():
                figure.savefig(folder / f"{path.stem}-{name.replace(' ', '-')}.png", dpi=150)
            title, tables = f"{study.title}: {path.stem}", study.tables(result)
            (folder / f"{path.stem}.md").write_text(f"# {title}\n\n{tables}\n")
            found.append(Section(title, tables, figures, images))
    return found


def draw_picture(results: Path, picture: Path) -> None:
    """The README's picture; it holds the digest of its results."""
    path = results / BLOCKS["models"][0]
    figure = model_report.accuracy_throughput(json.loads(path.read_text()))
    if figure is not None:
        figure.savefig(picture, dpi=120, metadata={"Source": digest(path)})


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Rewrite or check the README; write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "report")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = fill(before, RESULTS)
    if arguments.check:
        return int(before != after)
    readme.write_text(after)
    draw_picture(RESULTS, PICTURE)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    index = arguments.folder / "index.html"
    index.write_text(page("nat-models: measured", sections(RESULTS, arguments.folder)))
    print(f"README.md, {PICTURE.relative_to(ROOT)}, {index}")
    return 0


def _source(result: Result) -> str:
    versions = result["versions"]
    return (
        f"{result['device']}, torch {versions['torch']}, Triton {versions['triton']}, "
        f"{result['date'][:10]}"
    )


if __name__ == "__main__":
    sys.exit(main())
