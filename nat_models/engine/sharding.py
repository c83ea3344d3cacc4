"""FSDP2: parameters, gradients and optimizer states divided among the processes."""

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


class FSDP2(ModelParallelStrategy):
    """Shards over all processes, and saves whole checkpoints that any number of them can resume."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Start the processes' group."""
        self._data_parallel_size = self.num_nodes * self.num_processes  # "auto" counts nodes
        super().setup_environment()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a timm model in place: each of its blocks by itself, then the rest.

    Args:
        model: What timm's models are: their repeated parts lie in containers named `blocks`.
        mesh: One-dimensional mesh of the processes.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
