from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from two_processes import run_two

from nat_models.engine.execution import Execution
from nat_models.engine.replicas import ALIGNMENT, DDP, Average, replays_graphs
from nat_models.engine.setup import make_trainer

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def average_rounds(rank: int):
    """One of two processes: three averages, the last of other shapes."""
    average = Average()
    found = []
    for size in (3, 3, 5):
        images = torch.full((2, 3, size, size), 1.0 + 2 * rank).to(
            memory_format=torch.channels_last
        )
        images[0, 0, 0, 0] = 10.0 * rank
        expanded = torch.tensor([4.0 * rank]).expand(7)
        half = torch.full((size,), 1.0 + rank, dtype=torch.bfloat16)
        means = average([images, expanded, half])
        starts = [x.storage_offset() % ALIGNMENT for x in means]
        found.append([means[0].stride() == images.stride(), starts, *(x.tolist() for x in means)])
    return found


@pytest.mark.slow
def test_an_average_is_that_of_all_processes_in_each_tensors_layout():
    both = run_two(average_rounds)
    assert both[0] == both[1]
    for size, found in zip((3, 3, 5), both[0], strict=True):
        keeps_layout, starts, images, expanded, half = found
        expected = torch.full((2, 3, size, size), 2.0)
        expected[0, 0, 0, 0] = 5.0
        assert keeps_layout
        assert starts == [0, 0, 0]
        assert images == expected.tolist()
        assert expanded == [2.0] * 7
        assert half == [1.5] * size


def average_others(rank: int):
    """One of two processes, which have gradients of different parameters."""
    try:
        Average()([torch.ones(2 + rank), torch.ones(3 - rank)])
    except RuntimeError as error:
        return str(error)


@pytest.mark.slow
def test_gradients_of_different_parameters_are_not_averaged():
    assert all("differ in number, shape" in message for message in run_two(average_others).values())


class Normalized(LightningModule):
    """A model with running statistics and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
        self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)
        self.execution = Execution(mode="reduce-overhead")


def train_steps(rank: int, batches: int):
    """One of two processes, which begin with other weights and see other images."""
    torch.manual_seed(rank)
    module = Normalized().to(memory_format=torch.channels_last)
    strategy = DDP(parallel_devices=[torch.device("cpu")] * 2)
    strategy._lightning_module = strategy.model = module
    module.trainer = Trainer(accelerator="cpu", accumulate_grad_batches=batches, **QUIET)
    progress = module.trainer.fit_loop.epoch_loop.batch_progress.current
    strategy.configure_ddp()
    strategy._average = average = Mock(wraps=strategy._average)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=batches == 1)
        for _ in range(batches):
            progress.ready += 1
            loss = module.model(torch.randn(4, 3, 8, 8)).square().mean()
            loss.backward()
            strategy.post_backward(loss)
        optimizer.step()
    assert average.call_count == 3
    return {name: x.tolist() for name, x in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 2])
def test_processes_that_begin_apart_stay_together_with_their_statistics(batches):
    both = run_two(train_steps, batches)
    assert both[0] == both[1]
    assert both[0]["model.1.running_mean"] != [0.0] * 8


@pytest.mark.parametrize(
    ("mode", "expected"), [("reduce-overhead", True), ("default", False), (None, False)]
)
def test_only_replayed_graphs_give_all_gradients_at_once(mode, expected):
    assert replays_graphs(SimpleNamespace(execution=Execution(mode=mode))) is expected
    assert not replays_graphs(SimpleNamespace())


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_processes_average_by_it(compose, strategy):
    options = ["trainer.accelerator=cpu", "trainer.devices=2", f"trainer.strategy={strategy}"]
    trainer = make_trainer(compose("train", *options))
    assert type(trainer.strategy) is DDP
    assert isinstance(trainer.strategy, DDPStrategy)


def test_one_process_does_not(compose):
    trainer = make_trainer(compose("train", "trainer.accelerator=cpu", "trainer.devices=1"))
    assert not isinstance(trainer.strategy, DDPStrategy)
