import socket

import pytest
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from nat_models.engine import sharding


@pytest.fixture
def mesh():
    """Of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


class Model(nn.Module):
    """710 parameters: two blocks, and a layer that is in none."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 38))
        self.head = nn.Linear(4, 100)

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize(("most", "separate"), [(710, False), (709, True)], ids=["small", "large"])
def test_a_large_model_is_gathered_block_by_block(monkeypatch, mesh, most, separate):
    monkeypatch.setattr(sharding, "MAX_AT_ONCE", most)
    model = Model()
    assert sharding.separate_blocks(model) == (list(model.blocks) if separate else [])
    sharding.shard(model, mesh)
    kinds = [isinstance(module, FSDPModule) for module in (model, *model.blocks, model.head)]
    assert kinds == [True, separate, separate, False]
