"""DDP: every process has the whole model, and they average their gradients."""

from collections.abc import Sequence

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed

from nat_models.engine.execution import GRAPHS

Layout = tuple[torch.dtype, torch.Size, tuple[int, ...]]  # with the strides
ALIGNMENT = 4  # elements: parts of a buffer begin at 16 bytes or more, for vector loads


class DDP(DDPStrategy):
    """Lightning's, but for a model that replays CUDA graphs.

    DistributedDataParallel takes gradients one by one as the backward finishes them, so that it
    reduces the first beside the rest. A replayed graph gives all at once, and to copy some hundred
    of them one by one then takes longer than the reduction. So they are averaged together.
    """

    def configure_ddp(self) -> None:
        """Wrap the model; or only make all processes begin with the first one's weights."""
        module = self.lightning_module
        assert module is not None
        if not replays_graphs(module):
            super().configure_ddp()
            return
        self._average = Average()
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                distributed.broadcast(tensor, 0)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients, and buffers such as running statistics."""
        super().post_backward(closure_loss)
        module = self.lightning_module
        if module is None or self.model is not module:  # it is wrapped
            return
        if module.trainer.fit_loop.epoch_loop._should_accumulate():  # once a step is enough
            return
        parameters = [p for p in module.parameters() if p.grad is not None]
        buffers = [b for b in module.buffers() if b.is_floating_point()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        means = self._average([*gradients, *buffers])
        for parameter, mean in zip(parameters, means, strict=False):
            parameter.grad = mean
        for buffer, mean in zip(buffers, means[len(parameters) :], strict=True):
            buffer.copy_(mean)  # in place: graphs know its address


def replays_graphs(module: LightningModule) -> bool:
    """Whether its model's gradients come from a CUDA graph."""
    execution = getattr(module, "execution", None)
    return execution is not None and execution.mode == GRAPHS


class Average:
    """The mean of tensors over all processes, by one reduction a dtype."""

    def __init__(self) -> None:
        self._layouts: list[Layout] = []
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._parts: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Their means, which the next call overwrites if it gets tensors of the same layouts."""
        layouts = [(x.dtype, x.shape, x.stride()) for x in tensors]
        if layouts != self._layouts:
            self._allot(tensors, layouts)
            self._layouts = layouts
        torch._foreach_copy_(self._parts, list(tensors))
        for buffer in self._buffers.values():
            if distributed.get_backend() == "nccl":
                distributed.all_reduce(buffer, distributed.ReduceOp.AVG)
            else:  # others know no mean
                distributed.all_reduce(buffer)
                buffer /= distributed.get_world_size()
        return self._parts

    def _allot(self, tensors: Sequence[Tensor], layouts: list[Layout]) -> None:
        """Make a buffer for each dtype, and a part of it for each tensor, laid out as that is.

        Raises:
            RuntimeError: The processes have others.
        """
        of_all: list[object] = [None] * distributed.get_world_size()
        distributed.all_gather_object(of_all, layouts)
        if any(others != layouts for others in of_all):
            raise RuntimeError("gradients differ in number, shape or layout between the processes")
        sizes: dict[torch.dtype, int] = {}
        starts = []
        for tensor in tensors:
            start = sizes.get(tensor.dtype, 0)
            starts.append(start)
            sizes[tensor.dtype] = start + -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
        device = tensors[0].device
        self._buffers = {
            dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()
        }
        self._parts = [
            self._buffers[x.dtype].as_strided(x.shape, torch.empty_like(x).stride(), start)
            for x, start in zip(tensors, starts, strict=True)
        ]
