import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from nat_models.engine.module import Classifier
from nat_models.engine.non_finite import NonFiniteSteps, clip_or_skip
from nat_models.errors import RunStopped

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_skipped_step_changes_neither_weights_nor_state(name, value):
    module = nn.Linear(2, 2)
    optimizer = OPTIMIZERS[name](module.parameters())

    def step(value: float) -> torch.Tensor:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        module.weight.grad[0, 1] = value
        norm = clip_or_skip(optimizer, 5.0)
        optimizer.step()
        return norm

    def state() -> list[torch.Tensor]:
        moments = [t for s in optimizer.state.values() for t in s.values()]
        return [t.clone() for t in [*module.parameters(), *moments]]

    assert step(1.0) == pytest.approx(6**0.5)
    before = state()
    assert not step(value).isfinite()
    assert all(map(torch.equal, state(), before))
    step(1.0)
    assert not torch.equal(module.weight, before[0])


@pytest.mark.parametrize("limit", [None, 0.0], ids=["none", "zero"])
def test_without_a_limit_gradients_stay(limit):
    module = nn.Linear(2, 2)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    clip_or_skip(torch.optim.SGD(module.parameters(), lr=1.0), limit)
    assert module.weight.grad.eq(3.0).all()


def test_gradients_are_clipped_by_their_norm():
    module = nn.Linear(2, 2)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    before = module.weight.detach().clone()
    assert clip_or_skip(optimizer, 1.0) == pytest.approx(3 * 6**0.5)
    optimizer.step()
    torch.testing.assert_close(before - module.weight, torch.full((2, 2), 6**-0.5))


class Scalar(LightningModule):
    """Its loss is its batch times its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        return (self.weight * batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    configure_gradient_clipping = Classifier.configure_gradient_clipping


def fit(guard: NonFiniteSteps, values: list[float], **options) -> Scalar:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[guard], enable_model_summary=False,
        **quiet, **options,
    )  # fmt: skip
    module = Scalar()
    trainer.fit(module, DataLoader(torch.tensor(values), batch_size=1))
    return module


def test_skipped_steps_are_counted_and_the_rest_trains(tmp_path, caplog):
    guard = NonFiniteSteps(patience=2, dirpath=str(tmp_path))
    module = fit(guard, [1.0, float("nan"), 1.0, float("inf"), 1.0])
    assert (guard.skipped, guard.in_a_row) == (2, 0)
    assert module.weight.item() == pytest.approx(0.7)
    assert "step 4: the loss or a gradient is not finite; skipped, 2 in all" in caplog.text
    assert list(tmp_path.iterdir()) == []
    again = NonFiniteSteps(patience=2, dirpath="")
    again.load_state_dict(guard.state_dict())
    assert again.skipped == 2


def test_several_in_a_row_stop_the_run_and_leave_the_batch(tmp_path):
    guard = NonFiniteSteps(patience=2, dirpath=str(tmp_path))
    with pytest.raises(RunStopped, match=r"step 3: 2 steps in a row .*callbacks\.non_finite"):
        fit(guard, [1.0, float("nan"), float("inf"), 1.0])
    saved = torch.load(tmp_path / "non_finite_rank0.pt", weights_only=True)
    assert saved["step"] == 3
    assert saved["batches"] == [torch.tensor([float("inf")])]


@pytest.mark.parametrize("patience", [1, 10], ids=str)
def test_batches_are_kept_only_where_the_run_may_stop(tmp_path, patience, monkeypatch):
    kept = []
    original = NonFiniteSteps.on_train_batch_end

    def watched(self, *arguments):
        original(self, *arguments)
        kept.append(len(self._batches))

    monkeypatch.setattr(NonFiniteSteps, "on_train_batch_end", watched)
    guard = NonFiniteSteps(patience=patience, dirpath=str(tmp_path))
    fit(guard, [1.0, 1.0, 1.0, 1.0], accumulate_grad_batches=4)
    assert kept == ([1, 2, 3, 0] if patience == 1 else [0, 0, 0, 0])


def test_an_accumulated_step_is_skipped_as_a_whole_and_all_its_batches_are_kept(tmp_path):
    guard = NonFiniteSteps(patience=1, dirpath=str(tmp_path))
    values = [1.0, 1.0, float("nan"), 2.0]
    with pytest.raises(RunStopped, match="step 2: 1 steps in a row"):
        fit(guard, values, accumulate_grad_batches=2)
    saved = torch.load(tmp_path / "non_finite_rank0.pt", weights_only=True)
    assert [batch.item() for batch in saved["batches"]] == [
        pytest.approx(float("nan"), nan_ok=True),
        2.0,
    ]


def test_patience_is_checked():
    with pytest.raises(ValueError, match=r"callbacks\.non_finite\.patience=0: expected at least 1"):
        NonFiniteSteps(patience=0, dirpath="")
