"""Measures which tiles are the fastest on this GPU, and writes them into the table of tiles.

    python -m neighborhood_attention.tune problems.json records.json --commit COMMIT

Needs a GPU and Triton. `problems.json` has a list "problems" of objects with map, heads, head_dim,
kernel_size, dilation and batch; of those that share an entry of the table, the first is measured.
`records.json` gets every measurement; a run that reaches its limit is continued by the same
command.

A time is that of a whole pass with its bias, a CUDA graph replayed with a cold L2 cache: the median
in microseconds. It counts only after the results of the first and the last image agreed with fp64.
Both forwards are tuned, ring_forward and forward. Where one kernel can take the place of others in
a backward, the best that can run is tuned, and those in use where they are others; the rest keep
their tiles. A kernel's tiles are chosen after those before it; the old tiles stay unless the new
ones gain more than 2 % and more than the times spread, measured once more, side by side. A pass
whose tiles all fail is named at the end.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from neighborhood_attention.backends.triton import tile_table
from neighborhood_attention.backends.triton.fused_direct_forward import direct_plan
from neighborhood_attention.backends.triton.tile import Tiles
from neighborhood_attention.backends.triton.tile_table import KERNELS, PRECISIONS, from_record
from neighborhood_attention.backends.triton.tiles import choose_tiles, default_tiles
from neighborhood_attention.tune.ahead import Ahead, Part
from neighborhood_attention.tune.choice import Chooser, NoTiles, is_of
from neighborhood_attention.tune.passes import FORWARD_KERNELS, Pass, Shape, Work
from neighborhood_attention.tune.records import (
    Deadline,
    Record,
    Records,
    describe,
    format_table,
    progress,
)
from neighborhood_attention.tune.search import Route, find_routes

MARGIN = 10.0  # seconds that a measurement may take


def main(words: list[str]) -> None:
    """The command."""
    arguments = parse(words)
    if not torch.cuda.is_available():
        sys.exit("the tuner needs a GPU")
    deadline = Deadline(arguments.limit_seconds)
    try:
        works = plan(arguments)
        table = tile_table.table()
        if arguments.table.exists():
            table.clear()
            table.update(tile_table.load(arguments.table))
        records = Records(arguments.records, describe(arguments.commit))
    except ValueError as error:
        sys.exit(f"error: {error}")
    tile_table.save(table, arguments.table)  # now, if it cannot be written
    failures: list[str] = []
    try:
        failures = tune(works, records, arguments.table, deadline)
    except TimeoutError:
        print("time is over: run this again")
    finally:
        records.save()
        print(summary(records.choices))
    if failures:
        sys.exit("\n".join(failures))


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m neighborhood_attention.tune",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("problems", type=Path)
    add("records", type=Path)
    add("--commit", required=True, help="of the code that is measured")
    add("--table", type=Path, default=tile_table.PATH, help="default: the package's own")
    add("--only", nargs="+", default=[""], metavar="PART", help="of names such as 56x56-k7x7-d1x1")
    add("--precisions", nargs="+", default=["half"], choices=PRECISIONS)
    add("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    add("--limit-seconds", type=float, default=530, help="of this run")
    return parser.parse_args(words)


def plan(arguments: argparse.Namespace) -> list[Work]:
    """What to tune: of the problems of an entry the first, its forward and its backward.

    Raises:
        ValueError: No problem has a name with a part asked for.
    """
    shapes = read_shapes(arguments.problems)
    shapes = [shape for shape in shapes if any(part in str(shape) for part in arguments.only)]
    if not shapes:
        raise ValueError(f"--only {arguments.only}: no such problem in {arguments.problems}")
    of_pass = [
        tuple(k for k in arguments.kernels if (k in FORWARD_KERNELS) == is_forward)
        for is_forward in (True, False)
    ]
    works: dict[object, Work] = {}
    for precision in arguments.precisions:
        for shape in shapes:
            for kernels in filter(None, of_pass):
                work = Work(shape, precision, kernels)
                works.setdefault((Pass(work, "meta").key, kernels), work)
    return list(works.values())


def read_shapes(path: Path) -> list[Shape]:
    """The problems of a file.

    Raises:
        ValueError: The file has no list of problems, or an entry of it is none.
    """
    try:
        entries = json.loads(path.read_text())["problems"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected JSON with a list "problems": {error!r}') from None
    shapes = []
    for number, entry in enumerate(entries):
        try:
            shapes.append(Shape.of(entry))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: problem {number}: {error}") from None
    return shapes


def tune(works: Sequence[Work], records: Records, path: Path, deadline: Deadline) -> list[str]:
    """Choose the tiles that are not chosen yet, and write the table after each choice.

    Returns:
        What there is no choice for, since all tiles fail.

    Raises:
        TimeoutError: The deadline came first.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    routes, failures = {}, []
    for work in works:
        if any(is_of(choice, work) for choice in records.choices):
            continue
        problem = Pass(work, "meta").problem._replace(device=device)
        if work.name == "forward" and direct_plan(problem, work.shape.window) is not None:
            failures.append(f"{work}: so few tokens take a kernel whose tiles are not chosen")
            continue
        present = choose_tiles(problem, work.shape.window)
        routes[work] = find_routes(work, problem, present, processors)
    trials = [Part(work, tiles) for work in routes for way in routes[work] for tiles in way.trials]
    with Ahead(trials) as ahead, progress(len(trials)) as advance:
        for work in routes:
            try:
                choose(work, routes[work], records, ahead, deadline, advance)
            except NoTiles as failure:
                failures.append(str(failure))
            else:
                tile_table.save(tile_table.table(), path)
    return failures


def choose(
    work: Work,
    routes: Sequence[Route],
    records: Records,
    ahead: Ahead,
    deadline: Deadline,
    advance: Callable[[str], None],
) -> None:
    """Choose the tiles of one pass, and enter them into the table.

    Raises:
        NoTiles: All fail, or the forward does that a backward needs; the table is as before.
        TimeoutError: The deadline came first.
    """
    bench = Pass(work, "cuda")
    try:
        bench.fill()
    except Exception as failure:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises if the GPU is lost to this process
        raise NoTiles(f"{work}: {type(failure).__name__}: {str(failure)[:200]}") from failure

    def wait(tiles: Tiles) -> None:
        if deadline.left < MARGIN:
            raise TimeoutError
        ahead.wait(Part(work, tiles), deadline)

    table = tile_table.table()
    before = table.get(bench.key)
    chooser = Chooser(work, bench, records, wait, advance)
    try:
        tiles = chooser.choose(routes)
    except NoTiles:
        table.pop(bench.key, None)  # what was tried last
        table.update({} if before is None else {bench.key: before})
        raise
    entry = chooser.entry(tiles, default_tiles(bench.problem, bench.window), routes)
    table[bench.key] = {**(before or {}), **entry}
    torch.cuda.empty_cache()


def summary(choices: Sequence[Record]) -> str:
    """A line for each kernel whose tiles changed, and for each pass that keeps its own."""
    rows = []
    for choice in choices:
        old_us, new_us = choice["old_us"], choice["new_us"]
        gain = "" if old_us is None else f"{1 - new_us / old_us:.1%}"
        title = str(Shape.of(choice)), choice["precision"], choice["pass"]
        times = "wrong" if old_us is None else f"{old_us:.1f}", f"{new_us:.1f}", gain
        names = [name for name in KERNELS if choice["old"].get(name) != choice["new"].get(name)]
        tiles = [[choice[when].get(name) for when in ("old", "new")] for name in names]
        texts = [[str(from_record(tile)) if tile else "-" for tile in pair] for pair in tiles]
        changes = [(name, *pair) for name, pair in zip(names, texts, strict=True)]
        rows += [(*title, *change, *times) for change in changes or [("-", "kept", "kept")]]
    head = "shape", "precision", "pass", "kernel", "old", "new", "old us", "new us", "gain"
    return format_table(head, rows)
