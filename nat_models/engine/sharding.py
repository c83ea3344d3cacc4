"""FSDP2: parameters, gradients and optimizer states divided among the processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from nat_models.engine.local_shards import ELEMENTWISE, LocalShards

# 0.4 GB in fp32. A smaller model is gathered at once, into memory that stays its own: no piece is
# worth a collective of its own, and the compiler takes it whole.
MAX_AT_ONCE = 100_000_000


class FSDP2(ModelParallelStrategy):
    """Shards over all processes, and saves whole checkpoints that any number of them can resume."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Start the processes' group."""
        self._data_parallel_size = self.num_nodes * self.num_processes  # "auto" counts nodes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: `load_optimizer_state_dict` does what Lightning leaves to `load_checkpoint`."""
        return True

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the weights, and return the rest.

        Lightning's broadcasts would mix up what was saved in the layout channels_last.
        """
        assert self.model is not None
        assert self.lightning_module is not None
        path = self.broadcast(checkpoint_path)
        checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        strict = self.lightning_module.strict_loading
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load whole states, of any strategy, into the optimizers."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if state["state"]:
                for group in optimizer.param_groups:
                    if group.get("fused"):  # until loaded: PyTorch takes a step, to learn the state
                        group["fused"] = False  # and there is no fused SGD of DTensors
                named = by_name(state, optimizer, self.model)
                set_optimizer_state_dict(self.model, optimizer, named, options=options)
            else:
                optimizer.load_state_dict(state)

    def on_train_start(self) -> None:
        """Let the optimizers that can work on the local shards alone, as plain tensors."""
        super().on_train_start()
        if self.precision_plugin.precision == "16-mixed":
            return  # for DTensors the scaler's unscaling agrees over the processes
        for optimizer in self.optimizers:
            if type(optimizer) in ELEMENTWISE:
                LocalShards(optimizer)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Whole state of an optimizer, on the first process."""
        shards = LocalShards.of(optimizer)
        if shards is None:
            return super().optimizer_state(optimizer)
        if not shards.optimizer.state:  # PyTorch would take a step, which counts, to learn it
            return shards.optimizer.state_dict() if self.is_global_zero else {}
        with shards.as_dtensors():
            return super().optimizer_state(optimizer)


def by_name(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimizer's state dict with the names of the model's parameters in place of numbers.

    One process numbers by the groups, FSDP2 by the model; the order within the groups is the same.

    Args:
        state: Of an optimizer with the same groups; which numbers it uses does not matter.
        optimizer: Holds the model's parameters.
        model: What PyTorch calls the parameters by.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[Any, str] = {}
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        ours = [names[parameter] for parameter in group["params"]]
        found.update(zip(saved["params"], ours, strict=True))
    return {
        "state": {found[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [found[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a timm model in place: a large one's blocks each by itself, then the rest.

    Args:
        model: What timm's models are: their repeated parts lie in containers named `blocks`.
        mesh: One-dimensional mesh of the processes.
    """
    blocks = separate_blocks(model)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    root = fully_shard(model, mesh=mesh)
    if not blocks:
        keep_addresses(root)


def keep_addresses(model: FSDPModule) -> None:
    """Leave the gathered weights' memory to them between steps, too.

    A CUDA graph holds their addresses, and is recorded again where one has changed.
    """
    group = model._get_fsdp_state()._fsdp_param_group
    assert group is not None
    for parameter in group.fsdp_params:
        parameter.free_unsharded_param = _keep  # type: ignore[method-assign]


def _keep() -> None:
    """Free nothing."""


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
