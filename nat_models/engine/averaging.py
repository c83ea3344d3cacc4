"""Exponential moving average (EMA) of the weights."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA(WeightAveraging):
    """Keeps averaged weights: validation, the checkpoints' `state_dict` and the end use them.

    Args:
        decay: Share of the average that a step keeps.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay}: expected a number between 0 and 1")
        # All weights in a few kernels; Lightning's own EMA takes them one by one.
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the model to its device, on which Lightning has not put it yet."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average after training: a later validation must not swap it in."""
        self._average_model = None
