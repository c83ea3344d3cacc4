"""What a run shows while it runs: the progress bar, and a line an epoch."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import rich
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

_log = logging.getLogger(__name__)


class ProgressBar(RichProgressBar):
    """A bar on a terminal; none where output goes to a file or a pipe."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=int(rich.get_console().is_terminal))
        self._shown: dict[str, Any] = {}
        self._next = 0.0

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Loss at the end of the bar, a new one each second: for it the host has to wait."""
        if time.monotonic() >= self._next:
            loss = trainer.callback_metrics.get("train/loss")
            self._shown = {} if loss is None else {"train/loss": float(loss)}
            self._next = time.monotonic() + 1
        return self._shown


class History(Callback):
    """Loss and accuracy of each epoch: printed, and kept in the checkpoints to survive a resume."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._loss_sum: Tensor | float = 0.0
        self._batches: Tensor | float = 0.0
        self._strategy: Any = None
        self._clock = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._clock = time.monotonic()
        self._strategy = trainer.strategy

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the batch's loss if it is finite, without waiting for the device."""
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches  # Lightning divides
        finite = loss.isfinite()
        self._loss_sum = self._loss_sum + torch.where(finite, loss, 0.0)
        self._batches = self._batches + finite

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch, its loss over all processes, and print it."""
        now = time.monotonic()
        loss_sum, batches = self._means()
        epoch = {
            "train/loss": loss_sum / batches if batches else 0.0,
            "seconds": now - self._clock,
        }
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/"):
                epoch[name] = float(value)
        self.epochs.append(epoch)
        self._loss_sum, self._batches, self._clock = 0.0, 0, now
        self._print(trainer)

    def state_dict(self) -> dict[str, Any]:
        """All finished epochs, and the running sums of the one in progress, for each process."""
        loss_sum, batches = self._means()
        return {"epochs": self.epochs, "loss_sum": loss_sum, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.epochs = state_dict["epochs"]
        self._loss_sum, self._batches = state_dict["loss_sum"], state_dict["batches"]

    def _means(self) -> list[float]:
        """Sum of the losses, and number of the batches, of the mean process."""
        sums = torch.tensor([self._loss_sum, self._batches], device=self._strategy.root_device)
        means: list[float] = self._strategy.reduce(sums, reduce_op="mean").tolist()
        return means

    def _print(self, trainer: Trainer) -> None:
        epoch, total = self.epochs[-1], str(trainer.max_epochs)
        line = (
            f"epoch {len(self.epochs):>{len(total)}}/{total}  train loss {epoch['train/loss']:.3f}"
        )
        if "val/loss" in epoch:
            line += f"  held-out loss {epoch['val/loss']:.3f}  {accuracy(epoch)}"
        _log.info("%s  %5.1f s", line, epoch["seconds"])


def accuracy(metrics: Mapping[str, float]) -> str:
    """Top-1 and top-5 for people: "top-1 97.50 %  top-5 99.90 %"."""
    return f"top-1 {metrics['val/top1']:6.2%}  top-5 {metrics['val/top5']:6.2%}".replace("%", " %")
