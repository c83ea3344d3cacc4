import socket

import pytest
import torch
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
    """Blocks of 20, 90 and 92 parameters, and a layer that is in none."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 18), nn.Linear(22, 4))
        self.head = nn.Linear(4, 100)

    def forward(self, x):
        return self.head(x)


def test_large_blocks_are_gathered_by_themselves(monkeypatch, mesh):
    monkeypatch.setattr(sharding, "MIN_PARAMETERS", 92)
    sharded = Model()
    assert sharding.separate_blocks(sharded) == list(sharded.blocks[2:])
    sharding.shard(sharded, mesh)
    kinds = [isinstance(module, FSDPModule) for module in (*sharded.blocks, sharded.head)]
    assert (isinstance(sharded, FSDPModule), kinds) == (True, [False, False, True, False])


@torch._dynamo.config.patch(recompile_limit=2)
def test_a_compiler_is_not_stopped_after_a_few_blocks(monkeypatch, mesh):
    monkeypatch.setattr(sharding, "MIN_PARAMETERS", 0)
    sharding.shard(Model(), mesh)
    assert torch._dynamo.config.recompile_limit == 3
