"""How many images a second the loader alone gives."""

import time
from itertools import islice
from types import SimpleNamespace
from typing import Any

import timm
import torch
from hydra.utils import instantiate
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import DictConfig

from nat_models.data import ImageDataModule


def measure_loading(cfg: DictConfig) -> dict[str, Any]:
    """Load training batches for `rounds * round_seconds`, at most an epoch, after `warmup` of them.

    Args:
        cfg: Composed from configs/bench.yaml, with a data set.

    Returns:
        Images and seconds, their ratio, and what was loaded how.
    """
    augment, mixup = cfg.augment.transform, cfg.augment.mixup
    data: ImageDataModule = instantiate(
        cfg.data, augment=augment, mixup=mixup, seed=cfg.seed, _convert_="all"
    )
    data.open(training=True)
    data.follow(timm.create_model(cfg.model.name))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0, world_size=1, current_epoch=0, accumulate_grad_batches=1,
        strategy=SingleDeviceStrategy(torch.device("cpu")),
    )  # fmt: skip
    batches = iter(data.train_dataloader())
    for _ in islice(batches, cfg.warmup):
        pass
    images, start = 0, time.perf_counter()
    deadline = start + cfg.rounds * cfg.round_seconds
    for batch in batches:
        images += len(batch[1])
        if time.perf_counter() > deadline:
            break
    seconds = time.perf_counter() - start
    return {
        "data": data.settings.name,
        "input_size": list(data.config["input_size"]),
        "batch_size": data.settings.batch_size,
        "num_workers": data.settings.num_workers,
        "images": images,
        "seconds": seconds,
        "images_per_second": images / seconds,
    }
