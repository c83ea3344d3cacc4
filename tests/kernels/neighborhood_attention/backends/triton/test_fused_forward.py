import pytest
import torch

pytest.importorskip("triton")

from neighborhood_attention.backends.triton import fused_forward
from neighborhood_attention.geometry import Neighborhood

WINDOW = Neighborhood((3, 3), (1, 1), (1, 1), (False, False))


class Recorded:
    """A launch that records the addresses of its tensors."""

    def __init__(self, is_bound):
        self.is_bound, self.addresses, self.bindings = is_bound, None, 0

    def at(self, addresses):
        self.addresses = addresses
        return self.is_bound

    def __call__(self, *tensors):
        self.bindings += 1
        assert self.addresses == [0 if x is None else x.data_ptr() for x in tensors]


class Table:
    tensor = torch.empty(4)

    def build(self, rpb):
        return self.tensor


@pytest.mark.parametrize("takes_additional", [True, False])
@pytest.mark.parametrize("is_bound", [True, False])
@pytest.mark.parametrize("order", ["BHW3hD", "BHWh3D"])
def test_a_packed_projection_is_launched_on_its_parts(
    order, is_bound, takes_additional, monkeypatch
):
    launch = Recorded(is_bound)
    prepared = Table(), launch, takes_additional
    monkeypatch.setattr(fused_forward, "_prepare", lambda *_: prepared)
    qkv = torch.empty(2, 4, 5, 3, 2, 8, dtype=torch.bfloat16)
    if order == "BHWh3D":
        qkv = torch.empty(2, 4, 5, 2, 3, 8, dtype=torch.bfloat16).transpose(3, 4)
    output, lse = fused_forward.forward_packed(qkv, None, WINDOW, 0.5)
    assert (output.shape, output.dtype) == ((2, 4, 5, 2, 8), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 5, 2), torch.float32)
    parts = [part.data_ptr() for part in qkv.unbind(3)]
    none = [0, 0] if takes_additional else []
    results = [x.data_ptr() for x in (Table.tensor, output, lse)]
    assert launch.addresses == parts + none + results
    assert launch.bindings == (not is_bound)


def test_an_empty_batch_is_not_launched(monkeypatch):
    monkeypatch.setattr(fused_forward, "_prepare", None)
    qkv = torch.empty(0, 4, 5, 3, 2, 8)
    output, lse = fused_forward.forward_packed(qkv, None, WINDOW, 0.5)
    assert (output.shape, lse.shape) == ((0, 4, 5, 2, 8), (0, 4, 5, 2))
