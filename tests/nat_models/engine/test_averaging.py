import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from nat_models.engine.averaging import EMA


class Counter(LightningModule):
    """Its weight is the number of steps taken."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.validated: list[float] = []

    def training_step(self, batch, batch_idx):
        return -self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_validation_uses_the_average_and_a_later_one_what_is_loaded():
    module, loader = Counter(), DataLoader(torch.zeros(3), batch_size=1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, limit_val_batches=1, callbacks=[EMA(0.5)],
        num_sanity_val_steps=0, enable_model_summary=False, **quiet,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    assert module.validated == [2.25]  # 1, then (1 + 2) / 2, then (1.5 + 3) / 2
    module.weight.data.fill_(7.0)
    trainer.validate(module, loader, verbose=False)
    assert module.validated == [2.25, 7.0]


def test_decay_is_checked():
    with pytest.raises(ValueError, match=r"callbacks\.ema\.decay=1: expected a number between"):
        EMA(1)
