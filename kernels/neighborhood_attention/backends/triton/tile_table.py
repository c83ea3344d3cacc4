"""The tiles that were measured to be the fastest, by GPU and problem.

The table, `tile_table.json`, is written by `python -m neighborhood_attention.tune`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from neighborhood_attention.backends.triton.tile import Tile, Tiles
from neighborhood_attention.geometry import Neighborhood

if TYPE_CHECKING:
    from neighborhood_attention.backends.triton.launch import Problem

PATH = Path(__file__).with_name("tile_table.json")
PRECISIONS = "half", "tf32", "ieee"
KERNELS = tuple(field.name for field in fields(Tiles))
OPTIONAL = tuple(field.name for field in fields(Tiles) if field.default is None)
_DEFAULTS = {field.name: field.default for field in fields(Tile) if field.default is not MISSING}


class Key(NamedTuple):
    """What the problems of one entry have in common.

    Both 16-bit types are "half": their kernels differ in conversions alone. Head dimensions count
    as the power of 2 that they are padded to, a map as the longest of its dilation groups. Heads,
    batch, strides and causality make none here, though they do to the tiles that an entry leaves.
    """

    capability: str | None  # "9.0"; None without a GPU
    precision: str  # of PRECISIONS
    head_dim: int
    kernel_size: tuple[int, ...]
    group: tuple[int, ...]
    is_dilated: bool

    @classmethod
    def of(cls, problem: "Problem", window: Neighborhood) -> "Key":
        """The key of a problem."""
        heads = problem.head_arguments
        is_half = problem.query.dtype.itemsize == 2
        sizes = zip(problem.spatial, window.dilation, strict=True)
        return cls(
            capability=capability(problem.device),
            precision="half" if is_half else "tf32" if problem.allow_tf32 else "ieee",
            head_dim=max(heads["BLOCK_D"], heads["BLOCK_V"]),
            kernel_size=window.kernel_size,
            group=tuple(ceil(length / dilation) for length, dilation in sizes),
            is_dilated=max(window.dilation) > 1,
        )


# The tiles that an entry sets, by the names in `Tiles`; None takes a kernel out of use.
Entry = Mapping[str, Tile | None]


@cache
def capability(device: torch.device) -> str | None:
    """The compute capability of a GPU; None for another device."""
    if device.type != "cuda":
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


@cache
def table() -> dict[Key, Entry]:
    """The package's table, read once."""
    return load(PATH)


def load(path: Path) -> dict[Key, Entry]:
    """Read a table.

    Raises:
        ValueError: The file is no table; the message names the entry.
    """
    try:
        records = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    entries: dict[Key, Entry] = {}
    for number, record in enumerate(records):
        try:
            key, entry = _parse(record)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"{path}: entry {number}: {error}") from None
        if key in entries:
            raise ValueError(f"{path}: entry {number}: a second one for {key}")
        entries[key] = entry
    return entries


def save(entries: Mapping[Key, Entry], path: Path) -> None:
    """Write a table in order, a kernel a line; never half of it."""
    blocks = []
    for key, entry in sorted(entries.items(), key=lambda item: str(item[0])):
        head = json.dumps(key._asdict()).removesuffix("}")
        rows = [f'  "{name}": {json.dumps(as_record(tile))}' for name, tile in entry.items()]
        blocks.append(f' {head}, "tiles": {{\n' + ",\n".join(rows) + "}}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(blocks) + "\n]\n")
    os.replace(temporary, path)


def as_record(tile: Tile | None) -> dict[str, Any] | None:
    """A tile as JSON has it, without defaults."""
    if tile is None:
        return None
    return {k: v for k, v in asdict(tile).items() if k not in _DEFAULTS or v != _DEFAULTS[k]}


def from_record(record: Mapping[str, Any]) -> Tile:
    """The tile of a record."""
    axes = {name: tuple(record[name]) for name in ("tile", "strip")}
    tile = Tile(**{**record, **axes})
    if any(len(sizes) != 3 or any(n & (n - 1) or n < 1 for n in sizes) for sizes in axes.values()):
        raise ValueError(f"{tile}: expected three powers of 2 for tile and strip")
    return tile


def _parse(record: dict[str, Any]) -> tuple[Key, Entry]:
    tiles: dict[str, Any] = record.pop("tiles")
    axes = {name: tuple(record[name]) for name in ("kernel_size", "group")}
    settings: dict[str, Any] = {**record, **axes}
    key = Key(**settings)
    if key.precision not in PRECISIONS:
        raise ValueError(f"precision {key.precision!r}: expected one of {PRECISIONS}")
    for name, tile in tiles.items():
        if name not in KERNELS:
            raise ValueError(f"kernel {name!r}: expected one of {KERNELS}")
        if tile is None and name not in OPTIONAL:
            raise ValueError(f"kernel {name!r}: it cannot be null")
    entry = {name: tile and from_record(tile) for name, tile in tiles.items()}
    whole_group = entry.get("whole_group")
    if whole_group is not None and whole_group.tile != whole_group.strip:
        raise ValueError(f"whole_group {whole_group}: its tile is its strip")
    for name, tile in entry.items():
        if tile is None:
            continue
        if not (is_ring(tile) if name == "ring_forward" else tile.walk is None):
            raise ValueError(
                f"{name} {tile}: expected a walk for ring_forward alone, of flat tiles of 16 "
                "queries a warp, as long as some strips of 16 keys or more"
            )
    return key, entry


def is_ring(tile: Tile) -> bool:
    """Whether the kernels that keep strips in a ring take such tiles."""
    queries, keys = prod(tile.tile), prod(tile.strip)
    is_flat = tile.tile[0] == tile.strip[0] == 1
    fills_warps = queries == 16 * tile.num_warps and keys >= 16
    walks = tile.walk is not None and tile.walk >= 1 and tile.programs >= 1
    return is_flat and fills_warps and walks and tile.tile[1] % tile.strip[1] == 0
