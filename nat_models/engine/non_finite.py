"""Steps whose gradient is not finite: they change no weight, are counted, and may end the run."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nat_models.engine.delayed import Delayed
from nat_models.engine.local_shards import LocalShards
from nat_models.engine.optimization import parameters_of
from nat_models.errors import RunStopped

_log = logging.getLogger(__name__)


def clip_or_skip(optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """Clip the gradients by their total norm; if that is not finite, let the step do nothing.

    A fused optimizer decides on the device. For the others the host has to wait for the norm.

    Args:
        optimizer: About to step.
        max_norm: Largest norm; None or 0: not clipped.

    Returns:
        The norm before clipping, a scalar on the device.
    """
    parameters = parameters_of(optimizer)
    limit = max_norm or float("inf")
    if shards := LocalShards.of(optimizer):
        norm = shards.clip_gradients(limit)
    else:
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if all(group.get("fused") for group in optimizer.param_groups):
        # What GradScaler does: the kernel leaves out the update.
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    elif not norm.isfinite():
        for parameter in parameters:
            parameter.grad = None
    return norm


class NonFiniteSteps(Callback):
    """Counts the steps that were skipped; several in a row stop the run.

    Args:
        patience: Skipped steps in a row that stop the run; 1: the first does.
        dirpath: Folder for the batch of the last of them.
    """

    def __init__(self, patience: int, dirpath: str) -> None:
        if patience < 1:
            raise ValueError(f"callbacks.non_finite.patience={patience}: expected at least 1")
        self.patience = patience
        self.dirpath = Path(dirpath)
        self.skipped = self.in_a_row = 0
        self._norms = Delayed()
        self._batches: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the folder: processes that compose by themselves name it by different times."""
        self.dirpath = trainer.strategy.broadcast(self.dirpath)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the step, or on a GPU the one before.

        Raises:
            RunStopped: Too many in a row were skipped.
        """
        if self.in_a_row >= self.patience - 2:  # the count is a step late: only what may be saved
            self._batches.append(batch)
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        about = {"step": trainer.global_step, "batches": self._batches}
        self._batches = []
        norm: Any = pl_module.gradient_norm
        if received := self._norms.exchange(norm, about):
            self._count(*received, trainer.global_rank)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the last step too."""
        if received := self._norms.drain():
            self._count(*received, trainer.global_rank)

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take over what `state_dict` gave."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def _count(self, norm: Tensor, about: dict[str, Any], rank: int) -> None:
        if norm.isfinite():
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        step = about["step"]
        _log.warning(
            "step %d: the loss or a gradient is not finite; skipped, %d in all", step, self.skipped
        )
        if self.in_a_row >= self.patience:
            path = self.dirpath / f"non_finite_rank{rank}.pt"
            torch.save(about, path)
            raise RunStopped(
                f"step {step}: {self.in_a_row} steps in a row had a loss or gradient that is not "
                f"finite (callbacks.non_finite.patience). The weights are those of the step before "
                f"them; the last batch is in {path}. A lower optimizer.lr may help, or "
                "trainer.precision=bf16-mixed in place of 16-mixed"
            )
