"""Write the numbers of benchmarks/results/ into the README, between its `results` comments.

python benchmarks/report.py            # rewrite README.md
python benchmarks/report.py --check    # only say whether it is up to date
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
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
            *(_over_floor(r, name) for name in ("forward", "backward")),
        ]
        for r in result["results"]
        if r["dtype"] == "bfloat16"
        and r.get("provider", "fused") == "fused"
        and r.get("main", True)
    ]
    first = result["results"][0]
    window = f"{first['kernel_size']}x{first['kernel_size']}"
    caption = (
        f"Microseconds with bias and its gradient ({_source(result)}; bf16, batch "
        f"{first['batch']}, {window} windows, {first['head_dim']} channels a head), and the ratio "
        "to the time that the memory traffic alone takes:"
    )
    return f"{caption}\n\n{_table(['map', 'forward', 'backward'], rows)}"


def models(result: Result) -> str:
    """Throughput of models."""
    rows = [
        [
            f"`{r['model']}`",
            f"{r['pass']}, {r['execution'].replace('_', ' ')}",
            r["batch_size"],
            f"{r['images_per_second']:,.0f}",
            f"{r['peak_memory_mib'] / 1024:.1f}",
        ]
        for r in sorted(result["results"], key=lambda r: (r["pass"], r["execution"], r["model"]))
        if r["status"] == "ok"
    ]
    precision = result["settings"]["precision"]
    caption = (
        f"Measured by `nat-bench` ({_source(result)}; autocast to {precision}, random images):"
    )
    return f"{caption}\n\n{_table(['model', 'step', 'batch', 'images/s', 'peak GiB'], rows)}"


# Comment in the README: result file, and the function that renders it.
BLOCKS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "demo": ("demo.json", demo),
    "kernels": ("kernels-h100.json", kernels),
    "models": ("models-h100.json", models),
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


def main() -> int:
    """Rewrite or check the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = fill(before, RESULTS)
    if parser.parse_args().check:
        return int(before != after)
    readme.write_text(after)
    return 0


def _over_floor(result: Result, name: str) -> str:
    time, floor = result[f"{name}_us"], result[f"{name}_floor_us"]
    return f"{time:.0f} ({time / floor:.1f}x)"


def _source(result: Result) -> str:
    versions = result["versions"]
    return (
        f"{result['device']}, torch {versions['torch']}, Triton {versions['triton']}, "
        f"{result['date'][:10]}"
    )


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
