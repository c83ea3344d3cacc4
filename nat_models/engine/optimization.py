"""The optimizer: timm's, with the switches that the published recipes need."""

from functools import partial
from typing import Any

import torch
from lightning import Trainer
from timm.optim import (
    create_optimizer_v2,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import Tensor, nn
from torch.optim import Optimizer

FUSED = ("adam", "adamw", "sgd")  # timm's names of PyTorch's optimizers with fused kernels


def create_optimizer(
    model: nn.Module, trainer: Trainer | None, decay_rpb: bool = False, **options: Any
) -> Optimizer:
    """Create an optimizer that leaves biases and norms undecayed; fused on a GPU, if it can be.

    Args:
        model: Model to be optimized.
        trainer: Tells the device and the precision; None: the CPU.
        decay_rpb: Whether to decay relative positional biases.
        **options: Arguments of `timm.optim.create_optimizer_v2`.
    """
    if decay_rpb:
        options["param_group_fn"] = partial(
            param_groups, options.get("weight_decay", 0.0), options.pop("layer_decay", None)
        )
    if options.get("opt") in FUSED and trainer is not None:
        # With fp16 a fused optimizer would see gradients that are scaled, and not clipped.
        on_gpu = trainer.strategy.root_device.type == "cuda"
        options["fused"] = on_gpu and trainer.precision != "16-mixed"
    optimizer = create_optimizer_v2(model, **options)
    if "fused" in options:
        optimizer.register_load_state_dict_pre_hook(_stay_as_fused)
    return optimizer


def parameters_of(optimizer: Optimizer) -> list[Any]:
    """All that an optimizer holds, by its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def lay_out_as_weights(optimizer: Optimizer) -> None:
    """Bring an optimizer's state, which may be from a run with another layout, to its weights' one.

    Fused optimizers take it for granted, and would mix up the elements.
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            same_shape = isinstance(value, Tensor) and value.shape == weight.shape
            if same_shape and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _stay_as_fused(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What to load: a checkpoint's switch is its own run's, on its device and in its precision."""
    fused = optimizer.defaults["fused"]
    groups = [{**group, "fused": fused} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def param_groups(
    weight_decay: float, layer_decay: float | None, model: nn.Module
) -> list[dict[str, Any]]:
    """Parameter groups in which only biases and norms are left undecayed.

    timm leaves out what the model's `no_weight_decay` names too, here the tables of relative
    positional biases. The published models were trained with these decayed.

    Args:
        weight_decay: Of all other parameters.
        layer_decay: Factor of the learning rate from a layer to the one before; None: 1.
        model: Model to be optimized.
    """
    groups: list[dict[str, Any]]
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay)
    else:
        groups = param_groups_layer_decay(model, weight_decay, layer_decay=layer_decay)
    return groups
