import logging
from types import SimpleNamespace

import pytest
import rich
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from nat_models.engine.callbacks import History, ProgressBar, accuracy

ALONE = SingleDeviceStrategy(torch.device("cpu"))


class Beside(SingleDeviceStrategy):
    """One of two processes; the other's tensor is given."""

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "mean"
        return (tensor + self.other) / 2


def feed(history: History, *losses: float, strategy=ALONE) -> None:
    trainer = SimpleNamespace(accumulate_grad_batches=1, strategy=strategy)
    history.on_train_start(trainer, None)
    for loss in losses:
        history.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss)}, None, 0)


def test_history_survives_a_resume_in_the_middle_of_an_epoch(caplog):
    caplog.set_level(logging.INFO)
    metrics = {"val/loss": 0.5, "val/top1": 0.975, "val/top5": 1.0, "lr": 1.0}
    trainer = SimpleNamespace(callback_metrics=metrics, max_epochs=12, strategy=ALONE)
    before, after = History(), History()
    feed(before, 4.0, 2.0)
    before.on_train_epoch_end(trainer, None)
    feed(before, 3.0)
    after.load_state_dict(before.state_dict())
    feed(after, 1.0)
    after.on_train_epoch_end(trainer, None)
    assert [epoch["train/loss"] for epoch in after.epochs] == [3.0, 2.0]
    assert after.epochs[1]["val/top1"] == 0.975
    assert "lr" not in after.epochs[1]
    assert "epoch  2/12  train loss 2.000  held-out loss 0.500  top-1 97.50 %" in caplog.text


def test_history_goes_on_with_the_losses_of_all_processes():
    pair, after = Beside(torch.device("cpu")), [History(), History()]
    before = History()
    feed(before, 1.0, 1.0, strategy=pair)
    pair.other = torch.tensor([10.0, 2.0])
    state = before.state_dict()
    for history, loss in zip(after, (1.0, 3.0), strict=True):
        history.load_state_dict(state)
        feed(history, loss, strategy=pair)
    pair.other = torch.tensor([after[1]._loss_sum, after[1]._batches])
    after[0].on_train_epoch_end(SimpleNamespace(callback_metrics={}, max_epochs=1), None)
    assert after[0].epochs[0]["train/loss"] == (1 + 1 + 10 + 1 + 3) / 6


def test_history_leaves_out_losses_that_are_not_finite(caplog):
    history = History()
    feed(history, 4.0, float("nan"), float("inf"), 2.0)
    trainer = SimpleNamespace(callback_metrics={}, max_epochs=1, strategy=ALONE)
    history.on_train_epoch_end(trainer, None)
    assert history.epochs[0]["train/loss"] == 3.0


class Mean(LightningModule):
    """Its loss is the mean of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return batch.mean() + self.zero.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("accumulated", [1, 2], ids=str)
def test_the_loss_of_an_epoch_is_the_mean_of_its_batches(accumulated):
    history = History()
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=accumulated, callbacks=[history],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Mean(), DataLoader(torch.arange(4.0), batch_size=1))
    assert history.epochs[0]["train/loss"] == 1.5


def test_the_bar_does_not_wait_for_the_device_at_each_step(monkeypatch):
    monkeypatch.setattr(rich.get_console(), "_force_terminal", True)
    asked = []

    class Watched(Trainer):
        @property
        def callback_metrics(self):
            asked.append(super().callback_metrics)
            return asked[-1]

    trainer = Watched(
        accelerator="cpu", max_epochs=1, callbacks=[ProgressBar()], logger=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Mean(), DataLoader(torch.arange(100.0), batch_size=1))
    assert 1 <= len(asked) < 10


def test_the_bar_shows_the_loss():
    class Logged(Mean):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/loss", loss)
            return loss

    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Logged()
    trainer.fit(module, DataLoader(torch.arange(4.0), batch_size=1))
    assert ProgressBar().get_metrics(trainer, module) == {"train/loss": 3.0}


def test_accuracy_is_in_percent():
    assert accuracy({"val/top1": 0.975, "val/top5": 1.0}) == "top-1 97.50 %  top-5 100.00 %"
