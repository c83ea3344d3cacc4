"""FSDP2's shards as plain tensors, for optimizers that work element by element.

What a step does to each DTensor (norm, clipping, update) costs the host more than the GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import SGD, Adam, AdamW, Optimizer

from nat_models.engine.optimization import parameters_of

ELEMENTWISE = (Adam, AdamW, SGD)  # others may look at whole tensors


class LocalShards:
    """Plain tensors on the local shards of an optimizer's parameters, held by it in their place.

    The model keeps its DTensors, and FSDP2 gives them their gradients.

    Args:
        optimizer: One of `ELEMENTWISE`; its parameters are DTensors on one 1-D mesh, and its
            state, if it has any, is theirs.

    Raises:
        TypeError: The optimizer may not be elementwise, or a parameter is no DTensor.
    """

    @torch.no_grad()
    def __init__(self, optimizer: Optimizer) -> None:
        if type(optimizer) not in ELEMENTWISE:
            raise TypeError(f"optimizer={type(optimizer).__name__}: expected one of {ELEMENTWISE}")
        self.optimizer = optimizer
        self.parameters = parameters_of(optimizer)
        if not all(isinstance(parameter, DTensor) for parameter in self.parameters):
            raise TypeError("optimizer: expected DTensors as its parameters")
        self.shards = [parameter.to_local().detach() for parameter in self.parameters]
        self._hold(self.shards, _local)
        optimizer.local_shards = self  # type: ignore[attr-defined]

    @staticmethod
    def of(optimizer: Optimizer) -> "LocalShards | None":
        """What an optimizer holds; None: its parameters are the model's."""
        return getattr(optimizer, "local_shards", None)

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Take the gradients over from the DTensors, and clip them by their norm on all processes.

        Returns:
            The norm before clipping, a scalar on the device, the same on all processes.
        """
        self._take_gradients()
        norm = get_total_norm([s.grad for s in self.shards if s.grad is not None])
        squared = norm.square()
        distributed.all_reduce(squared, group=self.parameters[0].device_mesh.get_group())
        norm = squared.sqrt()
        clip_grads_with_norm_(self.shards, max_norm, norm)
        return norm

    @contextmanager
    def as_dtensors(self) -> Iterator[None]:
        """Let the optimizer hold the DTensors for a while, with its state in DTensors, too."""
        with torch.no_grad():
            self._hold(self.parameters, _sharded)
        try:
            yield
        finally:
            with torch.no_grad():
                self._hold(self.shards, _local)

    def _take_gradients(self) -> None:
        for parameter, shard in zip(self.parameters, self.shards, strict=True):
            gradient = parameter.grad
            shard.grad = None if gradient is None else gradient.to_local()
            parameter.grad = None

    def _hold(self, tensors: Sequence[Any], convert: Callable[[Any, Any], Any]) -> None:
        """Exchange the optimizer's parameters in place, and convert its state to theirs."""
        new = dict(zip(parameters_of(self.optimizer), tensors, strict=True))
        for group in self.optimizer.param_groups:
            group["params"][:] = [new[parameter] for parameter in group["params"]]
        state = self.optimizer.state
        converted = {
            new[old]: {name: convert(value, new[old]) for name, value in values.items()}
            for old, values in state.items()
        }
        state.clear()
        state.update(converted)


def _local(value: Any, shard: Tensor) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _sharded(value: Any, parameter: DTensor) -> Any:
    """What has an element for each of the parameter's is sharded; a count of steps is not."""
    if not isinstance(value, Tensor) or value.shape != parameter.to_local().shape:
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
