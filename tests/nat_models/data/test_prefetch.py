import pytest
import torch
from lightning import Trainer

from nat_models.data import ImageDataModule
from nat_models.data.prefetch import DevicePrefetcher
from nat_models.engine.building import build_model

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
