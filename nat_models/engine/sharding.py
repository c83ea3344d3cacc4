"""FSDP2: parameters, gradients and optimizer states divided among the processes."""

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

# 0.4 GB in fp32. A smaller model is gathered at once: no piece of it is worth a collective of its
# own, and the compiler takes it whole.
MAX_AT_ONCE = 100_000_000


class FSDP2(ModelParallelStrategy):
    """Shards over all processes, and saves whole checkpoints that any number of them can resume."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Start the processes' group."""
        self._data_parallel_size = self.num_nodes * self.num_processes  # "auto" counts nodes
        super().setup_environment()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a timm model in place: a large one's blocks each by itself, then the rest.

    Args:
        model: What timm's models are: their repeated parts lie in containers named `blocks`.
        mesh: One-dimensional mesh of the processes.
    """
    for block in separate_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def separate_blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks that are gathered each by itself: those of a large model."""
    if sum(parameter.numel() for parameter in model.parameters()) <= MAX_AT_ONCE:
        return []
    return [
        block
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "blocks"
        for block in module.children()
    ]
