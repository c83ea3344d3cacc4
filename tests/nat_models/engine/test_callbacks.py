import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nat_models.engine.callbacks import FiniteGuard, History, accuracy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_guard_stops_before_the_step(value):
    module = nn.Linear(2, 2)
    trainer = SimpleNamespace(precision_plugin=object(), global_step=7)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    FiniteGuard().on_before_optimizer_step(trainer, module, None)
    module.weight.grad[0, 1] = value
    with pytest.raises(FloatingPointError, match="step 7: the loss or a gradient is not finite"):
        FiniteGuard().on_before_optimizer_step(trainer, module, None)


def test_guard_leaves_fp16_to_its_scaler():
    module = nn.Linear(1, 1)
    module.weight.grad = torch.full((1, 1), float("inf"))
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    FiniteGuard().on_before_optimizer_step(trainer, module, None)


def feed(history: History, *losses: float) -> None:
    for loss in losses:
        history.on_train_batch_end(None, None, {"loss": torch.tensor(loss)}, None, 0)


def test_history_survives_a_resume_in_the_middle_of_an_epoch(caplog):
    caplog.set_level(logging.INFO)
    metrics = {"val/loss": 0.5, "val/top1": 0.975, "val/top5": 1.0, "lr": 1.0}
    trainer = SimpleNamespace(callback_metrics=metrics, max_epochs=12)
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


def test_accuracy_is_in_percent():
    assert accuracy({"val/top1": 0.975, "val/top5": 1.0}) == "top-1 97.50 %  top-5 100.00 %"
