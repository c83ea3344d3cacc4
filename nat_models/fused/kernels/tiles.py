"""How `linear_gelu` walks through its matrix, by the sizes of the layer."""

from typing import Literal, NamedTuple


class Tile(NamedTuple):
    """Sizes of a program's block, and how it is computed."""

    way: Literal["rows", "tiles", "persistent"]
    rows: int
    columns: int
    channels: int  # of a step; all of them for "rows", rounded up to a power of 2
    warps: int
    stages: int
    descriptors: bool = True
    resident: int = 1  # programs of a multiprocessor, for "persistent"


def choose_tile(channels: int, width: int) -> Tile:
    """The tile for a layer from `channels` to `width` channels."""
    columns = 128 if width % 128 == 0 else 64
    if channels <= 64:
        return Tile("rows", 128, 64, 64, 4, 3)
    if channels <= 128:
        return Tile("rows", 128, columns, 128, 8, 3)
    return Tile("tiles", 128, columns, 64, 8, 3)
