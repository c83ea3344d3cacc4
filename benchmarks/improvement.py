"""How much one provider improves on another over problems.

An improvement is t_old / t_new - 1, in percent, as in "Faster Neighborhood Attention" (arXiv
2403.04690); a problem is matched where the time is at most 1 % longer, less than a run's noise.
"""

from collections.abc import Iterator, Sequence
from statistics import mean

from measuring import Record
from problem import PRECISIONS

NOISE = 1.01
PASSES = "forward", "forward and backward"


def time_of(record: Record, provider: str, name: str) -> float | None:
    """Microseconds of a pass, or of both."""
    times = record.get("providers", {}).get(provider, {})
    parts = [times.get(f"{part}_us") for part in name.split(" and ")]
    return None if None in parts else sum(parts)


def pairs(records: Sequence[Record], new: str, old: str, name: str) -> list[tuple[float, float]]:
    """Times of both, where both were measured."""
    times = [(time_of(r, new, name), time_of(r, old, name)) for r in records]
    return [(a, b) for a, b in times if a is not None and b is not None]


def improvements(records: Sequence[Record], new: str, old: str, name: str) -> list[float]:
    """In percent."""
    return [100 * (b / a - 1) for a, b in pairs(records, new, old, name)]


def matched(records: Sequence[Record], new: str, old: str, name: str) -> str:
    """Share of problems that `new` matches or beats; of how many, if not of all records."""
    times = pairs(records, new, old, name)
    if not times:
        return "-"
    share = f"{sum(a <= NOISE * b for a, b in times) / len(times):.1%}"
    return share if len(times) == len(records) else f"{share} of {len(times)}"


def summary(records: Sequence[Record], new: str, old: str, name: str) -> str:
    """Average, and the extremes."""
    found = improvements(records, new, old, name)
    return f"{mean(found):.0f} % ({min(found):.0f}, {max(found):.0f})" if found else "-"


def groups(result: Record) -> Iterator[tuple[str, int, list[Record]]]:
    """Records by precision and number of axes."""
    for precision in PRECISIONS:
        for dims in (1, 2, 3):
            records = [
                r
                for r in result["results"]
                if r["precision"] == precision and len(r["map"]) == dims
            ]
            if records:
                yield precision, dims, records
