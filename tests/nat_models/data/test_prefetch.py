from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.utilities import CombinedLoader
from timm.data.random_erasing import RandomErasing
from torchvision.datasets import FakeData

from nat_models.data import ImageDataModule
from nat_models.data.prefetch import DevicePrefetcher
from nat_models.engine.building import build_model
from nat_models.engine.execution import Execution
from nat_models.engine.module import Classifier

FAKE = {"size": 24, "image_size": [3, 16, 16], "num_classes": 10}


def training(accelerator: str, **options) -> ImageDataModule:
    data = ImageDataModule(
        "fake", options=FAKE, batch_size=8, input_size=[3, 16, 16], augment={"no_aug": True},
        **options,
    )  # fmt: skip
    data.open(training=True)
    data.follow(build_model("nat_demo", num_classes=10, in_chans=3))
    data.trainer = Trainer(accelerator=accelerator, devices=1, logger=False)
    data.trainer.training = True
    return data


def test_on_the_cpu_there_is_nothing_to_copy():
    assert isinstance(training("cpu").train_dataloader(), torch.utils.data.DataLoader)


@pytest.fixture
def no_streams(monkeypatch):
    """CUDA's streams do nothing, so that the CPU can play the GPU."""
    stream = SimpleNamespace(record_event=lambda: None, wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda images, stream: None)


def test_lightning_ends_the_workers(no_streams):
    loader = torch.utils.data.DataLoader(
        [(torch.zeros(1),)] * 4, num_workers=1, persistent_workers=True
    )
    prefetcher = DevicePrefetcher(loader, torch.device("cpu"))
    combined = CombinedLoader(prefetcher)
    assert len(list(combined)) == 4
    [worker] = loader._iterator._workers
    combined.reset()
    assert loader._iterator is None
    worker.join(10)
    assert not worker.is_alive()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("part", ["train", "val"])
def test_images_lie_as_the_model_takes_them(no_streams, monkeypatch, part, channels_last):
    data = training("cpu", mixup={"mixup_alpha": 0.8, "cutmix_alpha": 1.0})
    data._erase = RandomErasing(1.0, mode="pixel")
    data.trainer.training = part == "train"
    load = getattr(data, f"{part}_dataloader")
    expected = list(load())
    strategy = data.trainer.strategy
    strategy._lightning_module = SimpleNamespace(execution=Execution(channels_last))
    monkeypatch.setattr(type(strategy), "root_device", torch.device("cuda"))
    loader = load()
    assert isinstance(loader, DevicePrefetcher)
    loader.device = torch.device("cpu")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for ours, theirs in zip(loader, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[0].is_contiguous(memory_format=layout)
        images, _ = data.on_after_batch_transfer(ours[:2], 0)
        assert images.is_contiguous(memory_format=layout)  # so that the model makes no copy


def test_evaluation_takes_prefetched_images(no_streams, monkeypatch):
    data = training("cpu", on_error="skip")
    monkeypatch.setattr(data.sources["val"], "size", 17)  # the last batch has one image
    draw = FakeData.__getitem__

    def read(source, index):
        if index == 16:
            raise OSError("truncated")
        return draw(source, index)

    monkeypatch.setattr(FakeData, "__getitem__", read)
    module = Classifier({"name": "nat_demo", "num_classes": 10, "in_chans": 3})
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    expected = trainer.validate(module, data, verbose=False)
    loaders = []

    def on_device(loader):
        loaders.append(DevicePrefetcher(loader, torch.device("cpu"), channels_last=True))
        return loaders[-1]

    monkeypatch.setattr(data, "_on_device", on_device)
    assert trainer.validate(module, data, verbose=False) == expected
    assert loaders
    assert data.complaints.count == 2


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_arrive_on_the_gpu_unchanged(workers):
    data = training("gpu", num_workers=workers)
    loader = data.train_dataloader()
    assert isinstance(loader, DevicePrefetcher)
    assert len(loader) == 3
    for _ in range(2):  # again in the next epoch
        received = list(loader)
        expected = list(training("cpu", num_workers=workers).train_dataloader())
        for ours, theirs in zip(received, expected, strict=True):
            assert ours[0].is_cuda
            assert torch.equal(ours[0].cpu(), theirs[0])
            assert torch.equal(ours[1], theirs[1])
            assert ours[1].device.type == "cpu"  # so that checking them waits for nothing
    device = data.trainer.strategy.root_device
    batch = data.on_before_batch_transfer(received[0], 0)
    images, targets = data.on_after_batch_transfer(
        data.transfer_batch_to_device(batch, device, 0), 0
    )
    assert images.dtype == torch.float32
    assert targets.is_cuda


@pytest.mark.gpu
def test_a_copy_does_not_wait_for_the_work_before_it(monkeypatch):
    original, streams = torch.cuda.Stream, []

    def noted(*device, **current):
        stream = original(*device, **current)
        streams.extend([stream] if device else [])
        return stream

    monkeypatch.setattr(torch.cuda, "Stream", noted)
    images = torch.arange(4 * 2**20).view(4, -1)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, torch.arange(4)), pin_memory=True
    )
    batches = iter(DevicePrefetcher(loader, torch.device("cuda")))
    next(batches)
    torch.cuda._sleep(10**9)  # cycles
    received, _ = next(batches)  # the third is being copied
    streams[0].synchronize()
    assert not torch.cuda.current_stream().query()  # still asleep
    assert torch.equal(received.cpu(), images[1:2])
