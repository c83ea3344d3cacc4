"""The table of biases, entry by entry against the definition."""

import itertools
import math

import pytest
import torch
from oracle import Case, axis_window, inputs

pytest.importorskip("triton")

from neighborhood_attention.backends.triton.bias_table import build_bias_table
from neighborhood_attention.backends.triton.tiles import Tile, TilePlan
from neighborhood_attention.geometry import Neighborhood

pytestmark = pytest.mark.interpreter

CASES = [
    Case((9, 10), (3, 2), dilation=(2, 1), heads=2),
    Case((6, 9), (3, 4), stride=(2, 3), dilation=(1, 2), is_causal=(True, False), heads=1),
    Case((6, 9), (3, 2), rpb=False),
]


def axis_blocks(case, plan, a):
    """Of one axis, for each tile of each group length: its type, and the pairs of its tokens.

    A pair is (token of the tile, token of the strips), its value the index into the bias.
    """
    settings = case.kernel_size[a], case.stride[a], case.dilation[a], case.is_causal[a]
    axis, tile = (plan.rows, plan.columns)[a], plan.tile.tile[a]
    blocks, length, step = {}, case.spatial[a], case.dilation[a]
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
            blocks[short, t] = (
                kind + short * axis.types // axis.classes,
                {(inner - t * tile, other - start): n for (inner, other), n in own.items()},
            )
    return blocks.values()


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_entries_hold_the_bias_inside_the_window_and_minus_infinity_outside(case, of_keys, device):
    _, rpb = inputs(case, torch.float32, device)
    window = Neighborhood(*case.window)
    plan = TilePlan(Tile((2, 4), (2, 4), num_warps=1), window, case.spatial, of_keys)
    like = torch.empty(0, device=device)
    table = build_bias_table(rpb, window, case.spatial, plan, like)
    rows, columns = (axis_blocks(case, plan, a) for a in (0, 1))
    for head, (row_type, row_pairs), (column_type, column_pairs) in itertools.product(
        range(case.heads if case.rpb else 1), rows, columns
    ):
        # Tile tokens and strip tokens, by axis: [row, column, strip row, strip column].
        strip_rows = plan.strips // plan.column_strips * 2
        expected = torch.full((2, 4, strip_rows, plan.column_strips * 4), -torch.inf)
        for ((r, s), i), ((c, t), j) in itertools.product(row_pairs.items(), column_pairs.items()):
            expected[r, c, s, t] = rpb[head, i, j] / math.log(2) if case.rpb else 0
        strips = table[head, row_type, column_type].cpu()
        strips = strips.view(-1, plan.column_strips, 2, 4, 2, 4).permute(2, 3, 0, 4, 1, 5)
        torch.testing.assert_close(strips.reshape(expected.shape), expected)
