"""Which measurements are of other kernels than those at hand, by the commits that they name."""

import subprocess
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from measuring import Record

ROOT = Path(__file__).resolve().parents[1]


def is_old(before: str, now: str, again: Sequence[str] | None) -> bool:
    """Whether a measurement of commit `before` is to be taken anew at commit `now`.

    By default where the kernels differ, as git says. With `again`, which needs no git: where it is
    of another commit, one of `again` if that names any.
    """
    if again is None:
        return kernels_differ(before, now)
    return not is_same(before, now) and (not again or any(is_same(before, a) for a in again))


def is_same(one: str, other: str) -> bool:
    """Whether two commits are one, abbreviated or not."""
    return one.startswith(other) or other.startswith(one)


@cache
def kernels_differ(one: str, other: str) -> bool:
    """Whether kernels/ differs between two commits; not where git cannot tell."""
    command = ["git", "-C", str(ROOT), "diff", "--quiet", one, other, "--", "kernels"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 1
    except FileNotFoundError:
        return False


def summary(records: Sequence[Record]) -> str:
    """The commits of measurements, and how many are of each if there are several."""
    counts = Counter(record["commit"][:7] for record in records).most_common()
    if len(counts) == 1:
        return f"commit {counts[0][0]}"
    return "commits " + ", ".join(f"{commit} ({count})" for commit, count in counts)
