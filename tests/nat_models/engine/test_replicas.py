import os
import socket
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from nat_models.engine.execution import Execution
from nat_models.engine.replicas import ALIGNMENT, DDP, Average, replays_graphs
from nat_models.engine.setup import make_trainer


def average_rounds(rank: int, port: int, results) -> None:
    """One of two processes: three averages, the last of other shapes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
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
    results.put((rank, found))
    distributed.destroy_process_group()


@pytest.mark.slow
def test_an_average_is_that_of_all_processes_in_each_tensors_layout():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=average_rounds, args=(rank, port, results)) for rank in (0, 1)
    ]
    for one in processes:
        one.start()
    both = dict(results.get(timeout=60) for _ in processes)
    for one in processes:
        one.join(timeout=10)
    assert both[0] == both[1]
    for size, (keeps_layout, starts, images, expanded, half) in zip(
        (3, 3, 5), both[0], strict=True
    ):
        expected = torch.full((2, 3, size, size), 2.0)
        expected[0, 0, 0, 0] = 5.0
        assert keeps_layout
        assert starts == [0, 0, 0]
        assert images == expected.tolist()
        assert expanded == [2.0] * 7
        assert half == [1.5] * size


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
