from functools import partial
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from lightning import Callback, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from timm import create_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.data import DataLoader, TensorDataset

from nat_models.data import ImageDataModule
from nat_models.engine import sharding
from nat_models.engine.execution import (
    Execution,
    choose_execution,
    evaluates_long,
    trains_long,
)
from nat_models.engine.module import Classifier
from nat_models.engine.sharding import FSDP2

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def on(kind: str, batches: int = 1) -> SimpleNamespace:
    """What is asked of a trainer, with Lightning's own strategies."""
    if kind in ("cpu", "cuda"):
        strategy = SingleDeviceStrategy(torch.device(kind))
    else:
        strategy = {"ddp": DDPStrategy, "fsdp2": FSDP2}[kind]()
        strategy.parallel_devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
        strategy.cluster_environment = LightningEnvironment()
    return SimpleNamespace(strategy=strategy, accumulate_grad_batches=batches)


@pytest.mark.parametrize(
    ("kind", "batches", "overrides", "is_long", "channels_last", "mode"),
    [
        ("cpu", 1, [], True, False, None),
        ("cuda", 1, [], True, True, "reduce-overhead"),
        ("cuda", 1, [], False, True, None),
        ("cuda", 4, [], True, True, "reduce-overhead"),
        ("fsdp2", 4, [], True, True, "default"),
        ("cuda", 1, ["task.grad_checkpointing=true"], True, True, "default"),
        ("ddp", 1, [], True, True, "reduce-overhead"),
        ("fsdp2", 1, [], True, True, "reduce-overhead"),
        ("cuda", 1, ["compile=false", "channels_last=false"], True, False, None),
        ("cpu", 1, ["compile=default", "channels_last=true"], False, True, "default"),
        ("ddp", 1, ["compile=reduce-overhead"], False, True, "reduce-overhead"),
    ],
    ids=["cpu", "gpu", "short", "adding-up", "fsdp2-adding-up", "recomputing", "ddp", "fsdp2",
         "off", "on", "set"],
)  # fmt: skip
def test_auto_follows_device_processes_and_length(
    compose, kind, batches, overrides, is_long, channels_last, mode
):
    cfg = compose("train", *overrides)
    chosen = choose_execution(cfg, on(kind, batches), nn.Identity(), 128, is_long)
    assert chosen == Execution(channels_last, mode, 128, contiguous_weights=kind == "fsdp2")


def test_what_is_gathered_block_by_block_is_compiled_in_pieces(compose, monkeypatch):
    monkeypatch.setattr(sharding, "MAX_AT_ONCE", 0)
    model = create_model("test_vit")
    for kind, mode in (("fsdp2", "default"), ("ddp", "reduce-overhead")):
        assert choose_execution(compose("train"), on(kind), model, 128, True).mode == mode
    cfg = compose("train", "compile=reduce-overhead")
    with pytest.raises(ValueError, match=r"compile=reduce-overhead: .*block by block"):
        choose_execution(cfg, on("fsdp2"), model, 128, True)


def test_evaluation_is_chosen_the_same_way(compose):
    chosen = choose_execution(compose("eval"), on("cuda"), nn.Identity(), 128, is_long=True)
    assert chosen == Execution(True, "reduce-overhead", batch_size=128)
    assert str(chosen) == "compiled, mode reduce-overhead, channels_last"
    chosen = choose_execution(compose("eval"), on("cpu"), nn.Identity(), 128, True)
    assert chosen == Execution(batch_size=128)


def test_ddp_does_not_cut_what_is_replayed():
    with torch._dynamo.config.patch(optimize_ddp="untouched"):
        for mode, cuts in (("reduce-overhead", False), ("default", True)):
            Execution(mode=mode).prepare(nn.Identity())
            assert torch._dynamo.config.optimize_ddp is cuts


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        ("cpu", "compile=true", "compile=True: expected auto, false, default or reduce-overhead"),
        ("cpu", "channels_last=yes", "channels_last=yes: expected auto, true or false"),
        ("fsdp2", "compile=reduce-overhead", "fsdp2 untested .* a step takes 2 batches"),
    ],
    ids=["compile", "channels_last", "fsdp2-adding-up"],
)
def test_what_cannot_be_is_named(compose, kind, override, message):
    trainer = on(kind, batches=2)
    with pytest.raises(ValueError, match=message):
        choose_execution(compose("train", override), trainer, nn.Identity(), 128, True)


@pytest.mark.parametrize(
    ("options", "training", "evaluation"),
    [
        ({"max_epochs": 2}, True, True),
        ({"max_epochs": 1}, False, True),
        ({"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 2}, False, False),
        ({"max_epochs": 3, "limit_train_batches": 0.5, "limit_val_batches": 0.5}, False, False),
    ],
    ids=["long", "few-epochs", "few-batches", "a-share"],
)
def test_long_is_counted_in_images(options, training, evaluation):
    data = ImageDataModule("fake")
    data.sources = {"train": range(150_000), "val": range(2_000_000)}
    trainer = Trainer(accelerator="cpu", **QUIET, **options)
    assert trains_long(trainer, data) == training
    assert evaluates_long(trainer, data) == evaluation


def test_code_is_compiled_for_whole_batches_alone():
    sizes = []

    def backend(graph, inputs):
        assert not any(isinstance(value, torch.SymInt) for value in inputs)
        sizes.append(len(inputs[-1]))
        return graph

    class Flatten(nn.Module):  # PyTorch 2.11 does not trace PyTorch's own
        def forward(self, x):
            return x.flatten(1)

    model, execution = Flatten(), Execution(mode="default", batch_size=4)
    model.compile = partial(model.compile, backend=backend)
    execution.prepare(model)
    for count in (4, 3, 1, 4):
        images = torch.randn(count, 3, 2, 2)
        assert torch.equal(execution(model, images), images.flatten(1))
    assert sizes == [4]


@pytest.mark.parametrize("contiguous_weights", [False, True], ids=str)
def test_weights_and_images_lie_with_their_channels_innermost(contiguous_weights):
    model = nn.Conv2d(3, 4, 3)
    execution = Execution(channels_last=True, contiguous_weights=contiguous_weights)
    seen = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    execution.prepare(model)
    execution(model, torch.randn(2, 3, 4, 4))
    (images,) = seen
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.is_contiguous(memory_format=torch.channels_last) != contiguous_weights
    assert model.weight.is_contiguous() == contiguous_weights


def replaying(graph, inputs, mode):
    """A backend that leaves all gradients where it left those before, as CUDA graphs do."""
    kept = []

    def backward(graph, _):
        def run(*arguments):
            gradients = graph(*arguments)
            if not kept:
                kept.extend(x if x is None else x.clone() for x in gradients)
            for place, gradient in zip(kept, gradients, strict=True):
                if gradient is not None:
                    place.copy_(gradient)
            return [place if place is None else place.detach() for place in kept]

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=make_boxed_func_of, bw_compiler=backward)(graph, inputs)


def make_boxed_func_of(graph, _):
    return make_boxed_func(graph)


class ForgetsAmidAStep(Callback):
    """As a run that begins there."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            pl_module.zero_grad()


def weights_after_steps_of_two(execution, accelerator="cpu", backend="inductor", callbacks=()):
    torch.manual_seed(0)
    module = Classifier(
        model={"name": "test_vit", "num_classes": 4, "img_size": 32},
        optimizer={"opt": "sgd", "lr": 0.1},
    )
    if execution.mode and backend != "inductor":
        module.model.compile = partial(module.model.compile, backend=backend)
    module.run_by(execution)
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, "enable_model_summary": False}
    options |= {"callbacks": list(callbacks)}
    trainer = Trainer(accelerator=accelerator, devices=1, **options, **QUIET)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 32, 32, generator=generator)
    trainer.fit(module, DataLoader(TensorDataset(images, torch.arange(16) % 4), 4))
    assert trainer.global_step == 2
    return module.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", [(), (ForgetsAmidAStep(),)], ids=["whole", "resumed"])
def test_gradients_that_the_next_batch_overwrites_add_up(callbacks):
    expected = weights_after_steps_of_two(Execution(), callbacks=callbacks)
    execution = Execution(mode="reduce-overhead", batch_size=4)
    found = weights_after_steps_of_two(execution, backend=replaying, callbacks=callbacks)
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_gradients_of_cuda_graphs_add_up():
    expected = weights_after_steps_of_two(Execution(), "gpu")
    execution = Execution(mode="reduce-overhead", batch_size=4)
    torch.testing.assert_close(weights_after_steps_of_two(execution, "gpu"), expected)


@pytest.mark.slow
def test_compiled_training_is_the_same_training():
    images, targets = torch.randn(10, 3, 32, 32), torch.arange(10) % 4
    weights, losses = [], []
    for execution in (Execution(), Execution(True, "default", batch_size=4)):
        torch.manual_seed(0)
        module = Classifier(
            model={"name": "test_vit", "num_classes": 4, "img_size": 32},
            optimizer={"opt": "sgd", "lr": 0.1},
        )
        module.model.compile = partial(module.model.compile, backend="aot_eager")
        module.run_by(execution)
        trainer = Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **QUIET)
        data = DataLoader(TensorDataset(images, targets), 4)
        trainer.fit(module, data)
        losses.append(trainer.validate(module, data, verbose=False)[0]["val/loss"])
        assert (module.model._compiled_call_impl is None) == (execution.mode is None)
        weights.append(module.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)
