"""FSDP2: parameters, gradients and optimizer states divided among the processes."""

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

# 100 MB in fp32. Less is on its way before the host has started it, and each piece by itself is
# one more that the compiler must not cross.
MIN_PARAMETERS = 25_000_000


class FSDP2(ModelParallelStrategy):
    """Shards over all processes, and saves whole checkpoints that any number of them can resume."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Start the processes' group."""
        self._data_parallel_size = self.num_nodes * self.num_processes  # "auto" counts nodes
        super().setup_environment()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a timm model in place: its large blocks each by itself, then the rest.

    Args:
        model: What timm's models are: their repeated parts lie in containers named `blocks`.
        mesh: One-dimensional mesh of the processes.
    """
    blocks = separate_blocks(model)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # They are compiled one by one, since they differ in their drop path.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, len(blocks))


def separate_blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks large enough to be gathered each by itself."""
    return [
        block
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "blocks"
        for block in module.children()
        if sum(parameter.numel() for parameter in block.parameters()) >= MIN_PARAMETERS
    ]
