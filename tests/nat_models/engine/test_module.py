import math

import pytest
import torch
from lightning import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from nat_models.engine.callbacks import History
from nat_models.engine.execution import Execution
from nat_models.engine.module import Classifier
from nat_models.engine.non_finite import NonFiniteSteps
from nat_models.engine.saving import StopOnSignal


def classifier(**arguments) -> Classifier:
    return Classifier(model={"name": "test_vit", "num_classes": 4, "img_size": 32}, **arguments)


def loader(targets: torch.Tensor, batch_size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(len(targets), 3, 32, 32), targets), batch_size)


def trainer(**options) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)


def test_loss_takes_indices_and_probabilities_with_smoothing():
    module = classifier(label_smoothing=0.1).eval()
    module.log = lambda *_, **__: None
    images, indices = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0])
    smooth = torch.full((5, 4), 0.1 / 4)
    smooth[torch.arange(5), indices] += 0.9
    expected = -(smooth * module(images).log_softmax(-1)).sum(-1).mean()
    one_hot = torch.eye(4)[indices]
    torch.testing.assert_close(module.training_step((images, indices), 0), expected)
    torch.testing.assert_close(module.training_step((images, one_hot), 0), expected)


def test_accuracy_counts_every_image_once_also_in_a_short_last_batch():
    module = classifier().eval()
    data = loader(torch.tensor([0, 1, 2, 3, 0, 1, 2]), batch_size=3)
    [metrics] = trainer().validate(module, data, verbose=False)
    images, targets = (torch.stack(column) for column in zip(*data.dataset, strict=True))
    with torch.no_grad():
        logits = module(images)
    assert metrics["val/top1"] == pytest.approx(
        (logits.argmax(-1) == targets).float().mean().item()
    )
    assert metrics["val/top5"] == 1.0  # of four classes
    assert metrics["val/loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets).item()
    )


def test_schedule_warms_up_then_falls_to_its_minimum_every_step():
    rates = []

    class Watched(Classifier):
        def training_step(self, batch, batch_idx):
            rates.append(self.optimizers().param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    module = Watched(
        model={"name": "test_vit", "num_classes": 4, "img_size": 32},
        optimizer={"opt": "adamw", "lr": 1e-2},
        scheduler={
            "sched": "cosine",
            "warmup_epochs": 1,
            "warmup_lr": 0.0,
            "min_lr": 1e-4,
            "cooldown_epochs": 1,
        },
    )
    trainer(max_epochs=4).fit(module, loader(torch.arange(16) % 4))
    steps = torch.arange(16)
    cosine = 1e-4 + 0.5 * (1e-2 - 1e-4) * (1 + torch.cos(math.pi * steps / 12))
    expected = torch.where(steps < 4, steps / 4 * 1e-2, torch.where(steps < 12, cosine, 1e-4))
    torch.testing.assert_close(torch.tensor(rates), expected.float())


@pytest.mark.parametrize("epochs", [5, 10])
def test_a_run_that_ends_before_its_cooldown_is_refused(epochs):
    module = classifier(
        optimizer={"opt": "sgd", "lr": 0.1}, scheduler={"sched": "cosine", "cooldown_epochs": 10}
    )
    message = rf"^trainer\.max_epochs={epochs}: expected more than scheduler\.cooldown_epochs=10$"
    with pytest.raises(ValueError, match=message):
        module.schedule(epochs, updates_per_epoch=1)
    module.schedule(11, updates_per_epoch=1)


def test_nothing_asks_for_the_loss_at_each_step():
    fitted = trainer(max_epochs=1)
    fitted.fit(classifier(optimizer={"opt": "sgd", "lr": 0.1}), loader(torch.arange(4)))
    assert "train/loss" in fitted.callback_metrics
    assert not fitted.progress_bar_metrics  # Lightning reads these after every batch


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_step_waits_for_the_gpu(tmp_path):
    class Strict(Callback):
        """From the start of the third step to the end of the fifth."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if 2 <= batch_idx < 5 else "default")

    callbacks = [Strict(), History(), NonFiniteSteps(3, str(tmp_path)), StopOnSignal()]
    fitted = Trainer(
        accelerator="gpu", devices=1, precision="bf16-mixed", max_epochs=1, callbacks=callbacks,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batch = torch.randn(4, 3, 32, 32, device="cuda"), torch.arange(4, device="cuda")
    module = classifier(optimizer={"opt": "adamw", "lr": 1e-3})
    try:
        fitted.fit(module, DataLoader([batch] * 6, batch_size=None))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fitted.global_step == 6


def test_biases_and_norms_are_not_decayed():
    module = classifier(optimizer={"opt": "adamw", "lr": 1e-3, "weight_decay": 0.1})
    fitted = trainer(max_epochs=1)
    fitted.fit(module, loader(torch.arange(4)))
    decay = {p: g["weight_decay"] for g in fitted.optimizers[0].param_groups for p in g["params"]}
    assert len(decay) == len(list(module.parameters()))
    assert decay[module.model.head.weight] == 0.1
    assert decay[module.model.head.bias] == decay[module.model.norm.weight] == 0.0


def test_a_run_continues_in_another_memory_layout(tmp_path):
    arguments = {"model": {"name": "nat_demo"}, "optimizer": {"opt": "adamw", "lr": 1e-3}}
    data = DataLoader(TensorDataset(torch.randn(4, 1, 28, 28), torch.arange(4)), 4)
    first = trainer(max_epochs=1)
    first.fit(Classifier(**arguments), data)
    first.save_checkpoint(tmp_path / "contiguous.ckpt")
    module, second = Classifier(**arguments), trainer(max_epochs=2)
    module.run_by(Execution(channels_last=True))
    second.fit(module, data, ckpt_path=tmp_path / "contiguous.ckpt", weights_only=True)
    assert second.global_step == 2
    weight = module.model.levels[1].downsample.reduction.weight
    assert not weight.is_contiguous()
    assert second.optimizers[0].state[weight]["exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize("algorithm", ["value", "norm"])
def test_gradients_are_clipped_as_the_trainer_says(algorithm):
    module = classifier(optimizer={"opt": "sgd", "lr": 0.1})
    options = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    trainer(max_epochs=1, **options).fit(module, loader(torch.arange(4)))
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    if algorithm == "value":
        assert max(g.abs().max() for g in gradients) == pytest.approx(1e-3)
        assert norm > 2e-3
    else:
        assert norm == pytest.approx(1e-3, rel=1e-3)


def test_a_linear_probe_trains_the_classifier_alone_on_evaluations_features():
    module = Classifier(
        model={"name": "nat_demo", "drop_path_rate": 0.9},
        optimizer={"opt": "sgd", "lr": 0.1},
        linear_probe=True,
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    images = DataLoader(TensorDataset(torch.randn(8, 1, 28, 28), torch.arange(8)), 4)
    module.train()
    assert torch.equal(module(images.dataset[0][0][None]), module(images.dataset[0][0][None]))
    trainer(max_epochs=1).fit(module, images)
    changed = {n for n, v in module.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"model.head.fc.weight", "model.head.fc.bias"}
