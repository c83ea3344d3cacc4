"""How a fused kernel cuts its work: the tiles of one kernel, and of all kernels of a problem."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Tile:
    """A program's tile of tokens, and the strips of the tokens that they meet, over three axes."""

    tile: tuple[int, int, int]
    strip: tuple[int, int, int]
    num_warps: int
    num_stages: int = 2
    max_registers: int | None = None
    programs: int = 2048  # to aim at where a program walks over images or, in a ring, over tiles
    walk: int | None = None  # tiles that a program walks down at most, its keys in a ring

    def __str__(self) -> str:
        sizes = ("x".join(map(str, axes)) for axes in (self.tile, self.strip))
        cap = "" if self.max_registers is None else f" r{self.max_registers}"
        programs = "" if self.programs == Tile.programs else f" n{self.programs}"
        walk = "" if self.walk is None else f" walk{self.walk}"
        return f"{'/'.join(sizes)} w{self.num_warps} s{self.num_stages}{cap}{programs}{walk}"

    @property
    def warps(self) -> tuple[int, int]:
        """Warps over the rows, and over the columns, of a product [tile, strip]."""
        rows = min(self.num_warps, max(1, prod(self.tile) // 16))
        return rows, self.num_warps // rows

    @property
    def options(self) -> dict[str, int | None]:
        """Triton's options for a launch."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


@dataclass(frozen=True)
class Tiles:
    """The tiles of the fused kernels."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile
    bias_gradient: Tile
    query_bias_gradient: Tile | None = None  # in place of query and bias gradient
    whole_group: Tile | None = None  # in place of all gradients
    ring_forward: Tile | None = None  # in place of the forward where it can run
