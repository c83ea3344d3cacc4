"""The addressing that the kernels share, run by small kernels of its own."""

import itertools

import pytest
import torch
from oracle import axis_window

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from neighborhood_attention.backends import Inputs  # noqa: E402
from neighborhood_attention.backends.triton.launch import Problem, describe  # noqa: E402
from neighborhood_attention.backends.triton.ring import takes  # noqa: E402
from neighborhood_attention.backends.triton.tile import Tile  # noqa: E402
from neighborhood_attention.backends.triton.tiles import TilePlan, tile_axis  # noqa: E402
from neighborhood_attention.backends.triton.window import (  # noqa: E402
    additional_scores,
    block_tokens,
    count_strips,
    locate_tile,
    masked_gradient,
    masked_scores,
    ring_strip,
    strip_start,
    tile_type,
    token_index,
    token_offsets,
)
from neighborhood_attention.geometry import Neighborhood  # noqa: E402

pytestmark = pytest.mark.interpreter


@triton.jit
def _locate(found, heads, tiles, DILATION: tl.constexpr):
    image, head, group, tile = locate_tile(heads, tiles, DILATION)
    found += tl.program_id(0) * 8
    tl.store(found, image)
    tl.store(found + 1, head)
    for axis in tl.static_range(3):
        tl.store(found + 2 + axis, group[axis])
        tl.store(found + 5 + axis, tile[axis])


def test_each_tile_of_each_group_head_and_image_has_one_program(device):
    images, heads, dilation, tiles = 2, 3, (2, 1, 3), (1, 2, 3)
    sizes = images, heads, *dilation, *tiles
    programs = torch.tensor(sizes).prod().item()
    found = torch.full((programs, 8), -1, device=device)
    _locate[(programs,)](found, heads, tiles, dilation)
    assert sorted(map(tuple, found.tolist())) == sorted(itertools.product(*map(range, sizes)))
    assert found[:heads, 1].tolist() == list(range(heads))  # neighbors in memory


@triton.jit
def _type(found, group, size, length, front, back, DILATION: tl.constexpr, TILE: tl.constexpr):
    tile = tl.program_id(0)
    kind, types = tile_type(tile, group, size, length, front, back, DILATION, TILE)
    tl.store(found + 2 * tile, kind)
    tl.store(found + 2 * tile + 1, types)


@pytest.mark.parametrize(
    ("length", "kernel_size", "stride", "dilation"),
    [(56, 7, 1, 1), (61, 5, 2, 3), (20, 15, 1, 1), (23, 3, 3, 4)],
)
def test_types_are_numbered_from_the_front_to_the_back(
    length, kernel_size, stride, dilation, device
):
    axis = tile_axis(length, kernel_size, stride, dilation, False, 4, False)
    for group in range(dilation):
        members = len(range(group, length, dilation))
        tiles = -(-members // 4)
        found = torch.full((tiles, 2), -1, device=device)
        arguments = group, length, members, axis.front, axis.back
        _type[(tiles,)](found, *arguments, DILATION=dilation, TILE=4)
        is_short = members < len(range(0, length, dilation))
        first = is_short * axis.types // axis.classes
        between = tiles - axis.front - axis.back
        last = first + axis.front + 1
        expected = [
            *range(first, first + min(axis.front, tiles)),
            *[first + axis.front] * between,
            *range(last, last + axis.back),
        ]
        assert found[:, 0].tolist() == expected
        assert found[:, 1].tolist() == [axis.types] * tiles


@triton.jit
def _strips(found, count, start, end, STRIP: tl.constexpr, STRIPS: tl.constexpr):
    strips = count_strips(start, end, STRIP, STRIPS)
    tl.store(count, strips)
    for strip in range(strips):
        first = strip_start(strip, start, STRIP, STRIPS)
        for axis in tl.static_range(3):
            tl.store(found + 3 * strip + axis, first[axis])


@pytest.mark.parametrize(
    ("start", "end", "strip", "strips"),
    [
        ((0, 0, 3), (1, 1, 30), (1, 1, 8), (1, 1, 5)),
        ((0, 2, 3), (1, 9, 12), (1, 2, 16), (1, 5, 1)),
        ((0, 2, 3), (1, 9, 30), (1, 2, 8), (1, 4, 4)),
        ((4, 2, 3), (6, 9, 30), (1, 4, 8), (3, 2, 4)),
    ],
    ids=["sequence", "rows", "rows and columns", "volume"],
)
def test_strips_cover_what_a_tile_meets_once(start, end, strip, strips, device):
    """`strips` cover the largest halo of all tiles; this one may be smaller."""
    found = torch.full((torch.tensor(strips).prod().item(), 3), -1, device=device)
    count = torch.zeros(1, dtype=torch.int32, device=device)
    _strips[(1,)](found, count, start, end, strip, strips)
    firsts = found[: count.item()].tolist()
    assert sorted(firsts) == firsts
    blocks = [
        token
        for first in firsts
        for token in itertools.product(
            *(range(f, f + size) for f, size in zip(first, strip, strict=True))
        )
    ]
    assert len(set(blocks)) == len(blocks)
    assert set(itertools.product(*map(range, start, end))) <= set(blocks)
    axis = next((a for a in range(3) if strips[a] > 1), 2)
    assert max(first[axis] for first in firsts) < end[axis]  # none that meets nothing


@triton.jit
def _ring_strips(
    found, lengths,
    KERNEL_SIZE: tl.constexpr, TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    length = tl.load(lengths + tl.program_id(0))
    tile = tl.arange(0, 64)
    strip = ring_strip(tile, length, KERNEL_SIZE, TILE, STRIP, STRIPS)
    tl.store(found + tl.program_id(0) * 64 + tile, strip)


def ring_size(length, kernel_size, tile, strip):
    """Strips of the rows of a map that is as wide as a strip; None if its kernels refuse it."""
    tile = Tile((1, tile, 16), (1, strip, 16), num_warps=tile, walk=7)
    window = Neighborhood((kernel_size, 3), (1, 1), (1, 1), (False, False))
    plan = TilePlan(tile, window, (length, 16), of_keys=False)
    query = torch.empty(1, length, 16, 1, 16, dtype=torch.bfloat16, device="meta")
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        is_taken = takes(Problem.of(describe(Inputs(query, query, query))), window, plan)
    return plan.strips[1] if is_taken else None


@pytest.mark.parametrize("kernel_size", range(2, 10))
@pytest.mark.parametrize(("tile", "strip"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_the_strips_of_a_ring_hold_all_keys_of_each_tile(tile, strip, kernel_size, device):
    sizes = {n: ring_size(n, kernel_size, tile, strip) for n in range(max(7, kernel_size), 41)}
    assert (sizes[40] is None) == (kernel_size + tile - 1 > 10 * strip)
    for strips in set(sizes.values()) - {None}:
        lengths = [length for length, size in sizes.items() if size == strips]
        found = torch.full((len(lengths), 64), -1, dtype=torch.int32, device=device)
        _ring_strips[(len(lengths),)](
            found, torch.tensor(lengths, device=device), kernel_size, tile, strip, strips
        )
        for length, firsts in zip(lengths, found.tolist(), strict=True):
            before = None
            for first_query in range(0, length, tile):
                members = range(first_query, min(first_query + tile, length))
                keys = {k for q in members for k, _ in axis_window(q, length, kernel_size, 1, 1, 0)}
                first = firsts[first_query // tile]
                start = first * strip - kernel_size // 2
                assert start <= min(keys), (length, first_query)
                assert max(keys) < start + strips * strip, (length, first_query)
                if before is not None:  # the copies of a step suffice
                    assert 0 <= first - before <= tile // strip, (length, first_query)
                before = first


def test_no_strip_of_a_ring_lies_before_the_first_place(device):
    # Of windows of one row, in a dilation group that is one row shorter than others.
    for length, tile, strip, strips in ((1, 2, 1, 2), (2, 4, 2, 2), (3, 4, 1, 4)):
        found = torch.full((1, 64), -1, dtype=torch.int32, device=device)
        _ring_strips[(1,)](found, torch.tensor([length], device=device), 1, tile, strip, strips)
        assert found[0, 0] == 0


@triton.jit
def _tokens(
    found, first, length, group, size, strides,
    DILATION: tl.constexpr, SHAPE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[2]
    token, exists = block_tokens(first, length, group, DILATION, SHAPE)
    found += tl.arange(0, TOKENS)
    tl.store(found, tl.where(exists, token_offsets(token, strides, WIDE), -1))
    tl.store(found + TOKENS, tl.where(exists, token_index(token, size, 5, WIDE), -1))


def test_tokens_of_a_block_have_their_place_on_the_map(device):
    size, dilation, group, first, shape = (3, 7, 12), (1, 2, 3), (0, 1, 2), (1, 1, 2), (1, 4, 4)
    strides = 10**9, 10**6, 10**3, 1, 7
    length = tuple(len(range(g, s, d)) for g, s, d in zip(group, size, dilation, strict=True))
    found = torch.zeros(2, 16, dtype=torch.int64, device=device)
    _tokens[(1,)](found, first, length, group, size, strides, dilation, shape, WIDE=True)
    expected = []
    for inner in itertools.product(*map(range, shape)):
        d, h, w = (
            g + step * (f + i) for g, step, f, i in zip(group, dilation, first, inner, strict=True)
        )
        exists = d < size[0] and h < size[1] and w < size[2]
        offsets = d * 10**6 + h * 10**3 + w, ((d * size[1] + h) * size[2] + w) * 5
        expected.append(offsets if exists else (-1, -1))
    assert found.T.tolist() == [list(pair) for pair in expected]


def test_wide_offsets_exceed_32_bits(device):
    found = torch.zeros(2, 16, dtype=torch.int64, device=device)
    size, strides = (2, 2**16, 2**13), (0, 2**31, 2**32, 2**33, 1)
    _tokens[(1,)](
        found, (1, 0, 0), (2, 4, 4), (0, 0, 0), size, strides, (1, 1, 1), (1, 4, 4), WIDE=True
    )
    places = [*itertools.product(range(4), range(4))]
    assert found[0].tolist() == [2**31 + h * 2**32 + w * 2**33 for h, w in places]
    assert found[1].tolist() == [((2**16 + h) * 2**13 + w) * 5 for h, w in places]


@triton.jit
def _mask(dots, bias, scores, gradients):
    i = tl.arange(0, 4)
    d, b = tl.load(dots + i), tl.load(bias + i)
    tl.store(scores + i, masked_scores(d, 0.5, b))
    tl.store(gradients + i, masked_gradient(tl.exp2(b), d, 1.0))


def test_what_overflows_outside_the_window_is_masked(device):
    inf = float("inf")
    dots = torch.tensor([2.0, inf, -inf, torch.nan], device=device)
    bias = torch.tensor([1.0, -inf, -inf, -inf], device=device)
    scores, gradients = torch.empty_like(dots), torch.empty_like(dots)
    _mask[(1,)](dots, bias, scores, gradients)
    assert scores[0].item() == pytest.approx(2 * 0.5 * 1.4426950408889634 + 1)
    assert scores[1:].tolist() == [-inf] * 3
    assert gradients.tolist() == [2.0, 0.0, 0.0, 0.0]


@triton.jit
def _additional(dots, scores, first, count):
    i = tl.arange(0, 4)
    d = tl.load(dots + i)[None, :]
    tl.store(scores + i[None, :], additional_scores(d, 0.5, first, count, 4))


def test_additional_keys_end_where_they_are_counted_to(device):
    dots, scores = torch.ones(4, device=device), torch.empty(4, device=device)
    _additional[(1,)](dots, scores, 8, 10)
    assert scores[:2].tolist() == pytest.approx([0.5 * 1.4426950408889634] * 2)
    assert scores[2:].tolist() == [-float("inf")] * 2
