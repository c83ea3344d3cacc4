"""The table of biases, entry by entry against the definition."""

import itertools
import math

import pytest
import torch
from oracle import Case, axis_window, inputs

pytest.importorskip("triton")

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton.bias_table import BiasTable
from neighborhood_attention.backends.triton.launch import Problem, describe
from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tiles import TilePlan
from neighborhood_attention.geometry import Neighborhood

pytestmark = pytest.mark.interpreter

# With the tile and the strip.
CASES = [
    (Case((9, 10), (3, 2), dilation=(2, 1), heads=1), (1, 2, 8), (1, 2, 4)),
    (
        Case((6, 9), (3, 4), stride=(2, 3), dilation=(1, 2), is_causal=(True, False), heads=1),
        (1, 2, 4),
        (1, 1, 8),
    ),
    (Case((6, 9), (3, 2), rpb=False), (1, 2, 4), (1, 2, 4)),
    (Case((21,), (5,), stride=(2,), dilation=(2,), heads=2), (1, 1, 4), (1, 1, 4)),
    (
        Case((4, 3, 5), (2, 3, 3), dilation=(1, 1, 1), is_causal=(True, False, False), heads=1),
        (2, 1, 4),
        (1, 2, 4),
    ),
]
# With strips of rows that tiles share: these start kernel_size // 2 before the map.
RINGS = [
    (Case((11, 8), (7, 3), heads=1), (1, 2, 4), (1, 2, 8)),
    (Case((15, 8), (4, 3), dilation=(2, 1), heads=2), (1, 2, 4), (1, 1, 8)),
    (Case((19, 9), (5, 4), dilation=(1, 2), heads=1), (1, 4, 2), (1, 2, 8)),
    (Case((9, 10), (2, 3), heads=1, rpb=False), (1, 1, 4), (1, 1, 8)),
]


def three(values, filler=1):
    return (filler,) * (3 - len(values)) + tuple(values)


def axis_blocks(case, plan, a):
    """Of one of three axes, for each tile of each group length: its type, its tokens' pairs.

    A pair is (token of the tile, token of the strips), its value the index into the bias.
    """
    kernel_size, stride, step = (
        three(x)[a] for x in (case.kernel_size, case.stride, case.dilation)
    )
    settings = kernel_size, stride, step, three(case.is_causal, False)[a]
    axis, tile, length = plan.axes[a], plan.tile.tile[a], three(case.spatial)[a]
    blocks = []
    for short, group in enumerate([0, step - 1][: axis.classes]):
        positions = range(group, length, step)
        tiles = math.ceil(len(positions) / tile)
        pairs = {
            (q, key // step): index
            for q, i in enumerate(positions)
            for key, index in axis_window(i, length, *settings)
        }
        if plan.of_keys:
            pairs = {(k, q): index for (q, k), index in pairs.items()}
        for t in range(tiles):
            kind = min(t, axis.front) + max(0, t - tiles + axis.back + 1)
            own = {pair: n for pair, n in pairs.items() if pair[0] // tile == t}
            start = min(other for _, other in own)
            if plan.in_ring and a == 1:
                start = ring_start(t, len(positions), kernel_size, plan)
            block = {(inner - t * tile, other - start): n for (inner, other), n in own.items()}
            blocks.append((kind + short * axis.types // axis.classes, block))
    return blocks


def ring_start(t, length, kernel_size, plan):
    """Of a tile's first strip: aligned to the tile but for those that reach over a border."""
    tile, strip, strips = plan.tile.tile[1], plan.tile.strip[1], plan.strips[1]
    lead = kernel_size // 2
    last_strip = (length - 1 + lead) // strip
    first_strip = min(max(t * tile // strip, lead // strip), last_strip - strips + 1)
    return first_strip * strip - lead


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize(("case", "tile", "strip"), CASES, ids=[str(case) for case, *_ in CASES])
def test_entries_hold_the_bias_inside_the_window_and_minus_infinity_outside(
    case, tile, strip, of_keys, device
):
    plan = TilePlan(
        Tile(tile, strip, num_warps=1), Neighborhood(*case.window), case.spatial, of_keys
    )
    check_table(case, plan, device)


@pytest.mark.parametrize(("case", "tile", "strip"), RINGS, ids=[str(case) for case, *_ in RINGS])
def test_entries_of_tiles_that_share_strips_have_these_in_order(case, tile, strip, device):
    in_ring = Tile(tile, strip, num_warps=1, walk=7)
    plan = TilePlan(in_ring, Neighborhood(*case.window), case.spatial, of_keys=False)
    assert plan.strips == (1, plan.strips[1], 1)
    check_table(case, plan, device)


def check_table(case, plan, device):
    """Every entry must be as the definition has it."""
    qkv, rpb = inputs(case, torch.float32, device)
    window, tile, strip = Neighborhood(*case.window), plan.tile.tile, plan.tile.strip
    table = BiasTable(Problem.of(describe(Inputs(*qkv.unbind(-3), rpb))), window, plan)
    heads = case.heads if case.rpb else 1
    assert table.head_stride == (table.entry if heads > 1 else 0)
    types = [axis.types for axis in plan.axes]
    built = table.build(rpb).cpu().view(heads, *types, *plan.strips, *tile, *strip)
    # Each axis's tokens of all strips together: [d, h, w of the tile, d, h, w of the strips].
    built = built.permute(0, 1, 2, 3, 7, 8, 9, 4, 10, 5, 11, 6, 12).reshape(
        heads, *types, *tile, *(n * size for n, size in zip(plan.strips, strip, strict=True))
    )
    blocks = [axis_blocks(case, plan, a) for a in range(3)]
    for head, *kinds in itertools.product(range(heads), *blocks):
        expected = torch.full(built.shape[4:], -torch.inf)
        for pairs in itertools.product(*(block.items() for _, block in kinds)):
            tokens, others = zip(*(pair for pair, _ in pairs), strict=True)
            index = tuple(n for _, n in pairs)[3 - len(case.spatial) :]
            expected[(*tokens, *others)] = rpb[(head, *index)] / math.log(2) if case.rpb else 0
        entry = built[(head, *(kind for kind, _ in kinds))]
        torch.testing.assert_close(entry, expected)
