import itertools

import pytest
import torch
from oracle import Case, random_tensors, scores

from neighborhood_attention import attention_maps, na2d

CASES = [
    Case((6, 7), (3, 5)),
    Case((9, 8), (4, 2), dilation=(2, 3), rpb=False),
    Case((7, 6), (3, 4), stride=(2, 3), is_causal=(True, False)),
    Case((11,), (3,), dilation=(2,), is_causal=(True,), heads=4, key_heads=2),
    Case((3, 4, 5), (2, 3, 1), stride=(2, 1, 1), is_causal=(False, False, True), key_heads=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_maps_agree_with_the_definition(case, device):
    tensors = random_tensors(case.shapes(), torch.float32, device)
    tensors.pop("value")
    positions = list(itertools.product(*map(range, case.spatial)))
    maps = attention_maps(**tensors, **case.settings, positions=positions)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    expected = scores(case, **wide, scale=case.head_dim**-0.5).softmax(-1)
    assert maps.dtype == torch.float32
    assert maps.shape == (case.batch, case.heads, len(positions), *case.spatial)
    torch.testing.assert_close(maps.double().flatten(3), expected, rtol=1e-5, atol=1e-6)


def test_maps_weight_the_values_as_the_operator_does(device):
    query, key, value = torch.randn(3, 2, 6, 7, 2, 8, dtype=torch.float64, device=device).unbind()
    maps = attention_maps(query, key, 3, scale=0.7, positions=[(0, 6), (4, 2)])
    expected = na2d(query, key, value, 3, scale=0.7, backend="reference")
    expected = torch.stack([expected[:, 0, 6], expected[:, 4, 2]], 2)
    torch.testing.assert_close(torch.einsum("bnphw,bhwnd->bnpd", maps, value), expected)


def test_a_scale_of_zero_gives_every_key_of_the_window_the_same_weight():
    query = torch.randn(1, 5, 5, 1, 4)
    maps = attention_maps(query, query, 3, scale=0.0, positions=[(0, 0)])
    assert torch.equal(maps[0, 0, 0, :3, :3], torch.full((3, 3), 1 / 9))


def test_under_autocast_they_are_fp32_of_what_the_operator_takes():
    query, key = torch.randn(2, 1, 6, 7, 2, 8)
    position = {"kernel_size": 3, "positions": [(2, 3)]}
    expected = attention_maps(query.bfloat16(), key.bfloat16(), **position)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_maps(query, key, **position), expected)


def test_vmap_gives_the_maps_of_each_entry():
    query = torch.randn(3, 1, 5, 1, 4)

    def maps(query):
        return attention_maps(query, query, 3, positions=[(1,)])

    assert torch.allclose(torch.func.vmap(maps)(query), torch.stack(list(map(maps, query))))


def good():
    query = torch.ones(2, 6, 7, 2, 4)
    return {"query": query, "key": query, "kernel_size": 3, "positions": [(0, 0)]}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("query", None, TypeError, r"query: expected a tensor, got NoneType"),
        (
            "query",
            torch.ones(4),
            ValueError,
            r"query: expected \[B, L, heads, D\], .*, got shape \(4,\)",
        ),
        ("key", None, TypeError, r"key: expected a tensor, got NoneType"),
        ("key", torch.ones(2, 6, 7, 3, 4), ValueError, r"key: .* divides query's 2"),
        ("key", torch.ones(2, 6, 7, 2, 5), ValueError, r"key: expected query's shape"),
        ("kernel_size", 7, ValueError, r"kernel_size=\(7, 7\)"),
        ("dilation", 3, ValueError, r"dilation=\(3, 3\): spans 9 tokens"),
        ("stride", 4, ValueError, r"stride=\(4, 4\): expected 1 <= stride"),
        ("is_causal", "no", TypeError, r"is_causal='no': expected bool"),
        ("scale", "1", TypeError, r"scale='1': expected a number"),
        ("rpb", torch.ones(2, 5, 3), ValueError, r"rpb: expected shape"),
        ("positions", [(0, 0), (6, 0)], ValueError, r"positions\[1\]=\(6, 0\): .* \(6, 7\)"),
        ("positions", [(0, -1)], ValueError, r"positions\[0\]=\(0, -1\)"),
        ("positions", [(0, 0, 0)], ValueError, r"positions\[0\]=\(0, 0, 0\)"),
        ("positions", [3], TypeError, r"positions\[0\]=3: expected a tuple"),
        ("positions", [(0.5, 0)], TypeError, r"positions\[0\]=\(0.5, 0\): expected int"),
    ],
)
def test_it_names_the_argument_that_breaks_a_rule(name, value, error, message):
    attention_maps(**good())
    with pytest.raises(error, match=message):
        attention_maps(**good() | {name: value})
