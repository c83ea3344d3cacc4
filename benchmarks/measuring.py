"""Times on a GPU, what that GPU can do at most, and files of results that a later run continues."""

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Record = dict[str, Any]


class Timing(NamedTuple):
    """Microseconds: the median of the replays, and their 10 % and 90 % quantiles."""

    median: float
    low: float
    high: float


@cache
def _cold() -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def graph_time(
    function: Callable[[], Any], seconds: float = 0.1, limit: float = math.inf
) -> Timing:
    """Time of a call captured in a CUDA graph; each replay finds a cold L2 cache.

    The current stream must not be the default one. It takes about `seconds` and the replays of at
    least 5 calls, 50 at most; one replay where that takes more than `limit` microseconds, and more
    than 1,000, beside which a graph's first launch is short.
    """
    function()
    give_memory_back()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin()  # not by torch.cuda.graph, which gives all cached memory back first
    try:
        function()
    finally:
        graph.capture_end()
    (first,) = _replay(graph, 1)
    if first > max(limit, 1000):
        return Timing(first, first, first)
    times = sorted(_replay(graph, min(50, max(5, int(seconds * 1e6 / first)))))
    tenth = len(times) // 10
    return Timing(statistics.median(times), times[tenth], times[-1 - tenth])


def give_memory_back() -> None:
    """What is cached, where more than half of the GPU's memory is in use.

    Graphs that are gone leave memory that nothing else can take, and while a graph is captured
    none is given back. The processes that compile need some, too.
    """
    free, total = torch.cuda.mem_get_info()
    if free < total // 2:
        torch.cuda.empty_cache()


def _replay(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        _cold().fill_(1)
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a kernel that copies 4 GiB and changes their sign.

    Not of `copy_`: captured in a CUDA graph that is left to the driver, and slow (2.8 TB/s, H200).
    """
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (graph_time(lambda: torch.neg(source, out=target)).median / 1e6)


def product_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP a second of a square matrix product, by PyTorch's present settings."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / (graph_time(lambda: a @ b).median / 1e6)


def describe_device() -> Record:
    """The GPU and the software that runs on it."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        driver = "unknown"
    return {
        "device": properties.name,
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "driver": driver,  # machines of one kind may differ in it
        "multiprocessor": {
            "count": properties.multi_processor_count,
            "registers": properties.regs_per_multiprocessor,
            "shared_memory": properties.shared_memory_per_multiprocessor,
            "threads": properties.max_threads_per_multi_processor,
        },
    }


class Results:
    """A JSON file: a description, and a list of records that grows from run to run.

    Records that agree in the fields of `identity` are of the same measurement: the later replaces
    the earlier. A file goes on only on the same kind of machine with the same software. It has
    `digits` of a float, by default more than a measurement of time has.

    Raises:
        ValueError: The file was made by another device or other versions.
    """

    def __init__(
        self, path: Path, description: Record, identity: Sequence[str], digits: int = 4
    ) -> None:
        self._path, self._identity, self._digits = path, identity, digits
        self._run = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        before = json.loads(path.read_text()) if path.exists() else {"results": []}
        for name in ("device", "versions"):
            if name in before and before[name] != description[name]:
                raise ValueError(
                    f"{path}: {name} {before[name]}, but this is {description[name]}: "
                    "results of different machines go into different files"
                )
        self._records: dict[str, Record] = {}
        self._rows: dict[str, str] = {}  # as the file has them
        for record in before.pop("results"):
            self._set(record)
        self.content = before | description

    def _key(self, record: Record) -> str:
        return json.dumps([record[name] for name in self._identity])

    @property
    def records(self) -> list[Record]:
        """All measurements, the earliest first."""
        return list(self._records.values())

    def find(self, record: Record) -> Record | None:
        """The measurement with the same identity."""
        return self._records.get(self._key(record))

    def add(self, record: Record) -> None:
        """Take a measurement, and write the file; `run` is when this run began."""
        stamp = {"commit": self.content["commit"], "date": self.content["date"], "run": self._run}
        self._set(record | stamp)
        self.save()

    def _set(self, record: Record) -> None:
        key = self._key(record)
        self._records[key] = record
        self._rows[key] = f"  {json.dumps(_rounded(record, self._digits))}"

    def save(self) -> None:
        """Write the file, one record a line; never half of it."""
        # With `indent`, json is slow: seconds of the GPU's time in a long run.
        head = [f" {json.dumps(name)}: {_lines(value)}" for name, value in self.content.items()]
        rows = _in_brackets(list(self._rows.values()))
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("{\n" + ",\n".join([*head, f' "results": {rows}']) + "\n}\n")
        os.replace(temporary, self._path)


def _lines(value: Any) -> str:
    """As JSON; a list of objects has one a line."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _in_brackets([f"  {json.dumps(entry)}" for entry in value])
    return json.dumps(value)


def _in_brackets(rows: Sequence[str]) -> str:
    return "[\n" + ",\n".join(rows) + "\n ]"


def _rounded(value: Any, digits: int) -> Any:
    """With so many significant digits to a float."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {name: _rounded(entry, digits) for name, entry in value.items()}
    return (
        [_rounded(entry, digits) for entry in value] if isinstance(value, list | tuple) else value
    )


def today() -> str:
    """The date, as results name it."""
    return datetime.date.today().isoformat()


def save_picture(figure: Any, result: Record, name: str, folder: Path) -> Path:
    """A PNG file whose name has the device in it."""
    file = folder / f"{name}-{result['device'].replace(' ', '-').lower()}.png"
    figure.savefig(file, dpi=110)
    return file


def markdown_table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Rows under a head."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
