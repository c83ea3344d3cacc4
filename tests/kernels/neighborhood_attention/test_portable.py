"""The gathering implementation against the brute-force oracle."""

import pytest
import torch
from oracle import Case, attention, inputs

from neighborhood_attention import portable
from neighborhood_attention.geometry import Neighborhood

CASES = [
    Case((9, 11), (3, 4), dilation=(2, 1)),
    Case((13, 10), (4, 3), stride=(2, 3), dilation=(3, 1), is_causal=(True, False), head_dim=5),
    Case((12,), (5,), stride=(2,), dilation=(2,), is_causal=(True,), rpb=False),
    Case((6, 5, 7), (3, 2, 3), stride=(1, 1, 2), dilation=(1, 2, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition(case):
    qkv, rpb = inputs(case, torch.float64)
    flat = Neighborhood(*case.window).flat
    output = portable.attention_qkvpacked(qkv, rpb, flat, scale=0.3)
    expected = attention(case, *qkv.unbind(-3), rpb, scale=0.3)[0]
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_sizes_may_be_symbolic_and_only_plain_operators_are_used():
    flat = Neighborhood((3, 5), (1, 1), (2, 1), (False, False)).flat

    class Attention(torch.nn.Module):
        def forward(self, qkv, rpb):
            return portable.attention_qkvpacked(qkv, rpb, flat, scale=0.3)

    rpb = torch.randn(2, 5, 9)
    sizes = {axis: torch.export.Dim(name, min=6) for axis, name in ((1, "height"), (2, "width"))}
    program = torch.export.export(
        Attention(), (torch.randn(2, 8, 9, 3, 2, 4), rpb), dynamic_shapes=(sizes, None)
    )
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in", "_operator")) for name in operators)
    qkv = torch.randn(2, 11, 7, 3, 2, 4)
    torch.testing.assert_close(program.module()(qkv, rpb), Attention()(qkv, rpb))
