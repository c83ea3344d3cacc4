"""The paper's tables from the results of paper.py: who matches whom, how much it improves."""

from collections import Counter
from collections.abc import Sequence
from statistics import mean, median

import commits
import paper_zoo
from improvement import PASSES, groups, improvements, matched, summary
from measuring import Record, markdown_table
from peers import GENERATIONS
from problem import Problem

PAIRS = [("gemm", "naive"), ("fused", "naive"), ("fused", "gemm")]
# Average improvements of the paper's table 3, percent: forward on an A100, by the pairs above.
PAPER = {
    ("float16", 1): (548, 1759, 180),
    ("float16", 2): (193, 958, 257),
    ("float16", 3): (None, 1135, None),
    ("float32", 1): (874, 978, 17),
    ("float32", 2): (386, 564, 43),
    ("float32", 3): (None, 712, None),
}


def tables(result: Record) -> str:
    """All tables, in Markdown."""
    versions, records = result["versions"], result["results"]
    return "\n\n".join([
        f"{result['device']}, torch {versions['torch']}, Triton {versions['triton']}; "
        f"{len(records)} problems and precisions; {commits.summary(records)}. "
        f"{result.get('note', '')}".rstrip(),
        "Improvement of one kernel over another, average (least, most):",
        breakdown(result),
        "Average improvements beside those of the paper's table 3, which are of an A100 and of "
        "CUDA kernels (its abstract has 895 % and 272 % for gemm in fp32); forward:",
        beside_paper(result),
        "Share of problems, each in its row, that the kernel matches or beats; of how many, if not "
        "of all (dense is measured where it does not take too long):",
        shares(result),
        "Improvement of fused over dense attention to the whole map, average (least, most):",
        over_dense(result),
        "Problems on which each of PyTorch's kernels was the fastest for dense attention:",
        dense_kernels(records),
        "The same function by PyTorch's compiler, half precision; improvement of fused:",
        compiled(result),
        paper_zoo.tables(result),
        failures(result),
    ])  # fmt: skip


def breakdown(result: Record) -> str:
    """Average, least and largest improvements."""
    rows = [
        [name, precision, f"{dims}-D", len(records), *(summary(records, *p, name) for p in PAIRS)]
        for name in PASSES
        for precision, dims, records in groups(result)
    ]
    heads = [f"{new} over {old}" for new, old in PAIRS]
    return markdown_table(["pass", "precision", "axes", "problems", *heads], rows)


def beside_paper(result: Record) -> str:
    """Averages and the paper's."""
    rows = []
    for precision, dims, records in groups(result):
        if (precision, dims) in PAPER:
            cells = []
            for pair, theirs in zip(PAIRS, PAPER[precision, dims], strict=True):
                found = improvements(records, *pair, "forward")
                cells += [f"{mean(found):.0f} %" if found else "-"]
                cells += ["-" if theirs is None else f"{theirs} %"]
            rows.append([precision, f"{dims}-D", *cells])
    heads = [
        head
        for new, old in PAIRS
        for head in (f"{new} over {old}, {result['device']}", "paper, A100")
    ]
    return markdown_table(["precision", "axes", *heads], rows)


def shares(result: Record) -> str:
    """For each kernel and each other."""
    others = *GENERATIONS, "dense"
    rows = [
        [name, precision, f"{dims}-D", len(records), kernel,
         *("" if kernel == other else matched(records, kernel, other, name) for other in others)]
        for name in PASSES
        for precision, dims, records in groups(result)
        for kernel in others
    ]  # fmt: skip
    return markdown_table(["pass", "precision", "axes", "problems", "kernel", *others], rows)


def over_dense(result: Record) -> str:
    """Where dense was measured."""
    rows = []
    for name in PASSES:
        for precision, dims, records in groups(result):
            found = improvements(records, "fused", "dense", name)
            if found:
                cells = summary(records, "fused", "dense", name), f"{median(found):.0f} %"
                count = f"{len(found)} of {len(records)}"
                rows.append([name, precision, f"{dims}-D", count, *cells])
    return markdown_table(["pass", "precision", "axes", "problems", "average", "median"], rows)


def dense_kernels(records: Sequence[Record]) -> str:
    """A row a pass and precision; a column a kernel."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for record in records:
        times = record.get("providers", {}).get("dense", {})
        for name in ("forward", "backward"):
            if way := times.get(f"{name}_way"):
                counts.setdefault((name, record["precision"]), Counter())[way] += 1
    ways = sorted({way for count in counts.values() for way in count})
    rows = [[*key, *(count[way] for way in ways)] for key, count in sorted(counts.items())]
    return markdown_table(["pass", "precision", *ways], rows)


def compiled(result: Record) -> str:
    """Fused over the providers of the subset."""
    rows = []
    for name in PASSES:
        for precision, dims, records in groups(result):
            for other in ("flex", "gathered"):
                found = improvements(records, "fused", other, name)
                if found:
                    measured = [r for r in records if other in r["providers"]]
                    share = matched(measured, "fused", other, name)
                    cells = summary(records, "fused", other, name), f"{median(found):.0f} %", share
                    rows.append([name, precision, f"{dims}-D", len(found), other, *cells])
    head = ["pass", "precision", "axes", "problems", "over", "average", "median", "matched"]
    return markdown_table(head, rows)


def failures(result: Record) -> str:
    """What could not be measured."""
    found = [
        f"- {Problem.of(r)} {r['precision']}: {name}: {reason}"
        for r in result["results"]
        for name, reason in r["failures"].items()
    ]
    return "\n".join([f"Measurements that failed: {len(found)}", *found[:30]])
