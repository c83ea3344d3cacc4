"""When a run saves and stops: only where a resume can repeat it exactly."""

import os
import signal
import subprocess
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nat_models.engine.delayed import Delayed

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


class LastCheckpoint(ModelCheckpoint):
    """Saves after every epoch, after every so many steps, and when the run is told to stop.

    Args:
        every_n_steps: Optimizer steps between two saves within an epoch; 0: none.
        **options: Arguments of `ModelCheckpoint`.
    """

    def __init__(self, every_n_steps: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._every_n_train_steps = every_n_steps  # Lightning's own argument excludes epochs

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Save within an epoch; its end has its own save, when the validation is done."""
        loop = trainer.fit_loop.epoch_loop
        if not loop.batch_progress.is_last_batch and not loop._should_accumulate():
            super().on_train_batch_end(trainer, *arguments)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save when told to stop, which is between two steps; other exceptions may be amid one."""
        self.save_on_exception = isinstance(exception, SIGTERMException)
        super().on_exception(trainer, pl_module, exception)


class StopOnSignal(Checkpoint):  # as such after those listed before it: a requeue ends the job
    """SIGTERM, SIGUSR1 and SIGUSR2 stop a run between two steps, all its processes after the same.

    Lightning's own handling cannot be resumed exactly: it may stop in the middle of a validation or
    of an accumulated step, in SLURM it saves wherever the signal comes, and to agree it makes every
    process wait for its device at every step. In SLURM the latter two, the warning before a time
    limit (submitit's is SIGUSR2), put the job back into the queue.
    """

    def __init__(self) -> None:
        self._told = self._requeue = False
        self._agreed = Delayed()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over; the trainer puts the former handlers back."""
        self._told = self._requeue = False
        self._agreed = Delayed()
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        for number in (signal.SIGTERM, *WARNINGS):
            trainer._signal_connector._register_signal(number, self._on_signal)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop after a whole optimizer step; a validation is finished first."""
        loop = trainer.fit_loop.epoch_loop
        validates = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        if not validates and not loop._should_accumulate():
            self._stop_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after a validation within training."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._stop_if_told(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """In SLURM, queue the job again after the warning before its time limit."""
        job = os.environ.get("SLURM_JOB_ID")
        if job and self._requeue and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", job], check=True)

    def _stop_if_told(self, trainer: Trainer) -> None:
        told: Any = self._told
        if trainer.world_size > 1:
            # Filled there: a copy to the device would wait for all its work.
            device = trainer.strategy.root_device
            wish = torch.full((), int(told), dtype=torch.int32, device=device)
            torch.distributed.all_reduce(wish)
            told, _ = self._agreed.exchange(wish) or (0, None)
        trainer._signal_connector.received_sigterm = bool(told)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        self._requeue |= number in WARNINGS
