"""What training and evaluation have in common: from a configuration to PyTorch and a trainer."""

import os
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from timm.models import get_model_traits

from nat_models.data import ImageDataModule
from nat_models.engine.averaging import EMA
from nat_models.engine.callbacks import ProgressBar
from nat_models.engine.checkpoint_io import AtomicCheckpointIO
from nat_models.engine.module import Classifier
from nat_models.engine.replicas import DDP
from nat_models.engine.sharding import FSDP2


def make_trainer(cfg: DictConfig) -> Trainer:
    """Instantiate the trainer with the callbacks and loggers of the configuration."""
    loggers = [instantiate(c) for c in (cfg.get("logger") or {}).values() if c]
    options: dict[str, Any] = {"logger": loggers or False}
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        options["profiler"] = None  # the first process's profile is the run's
    if cfg.trainer.precision == "auto":
        options["precision"] = _precision(cfg.trainer.accelerator)
    callbacks: list[Callback] = [instantiate(c) for c in (cfg.callbacks or {}).values() if c]
    if not loggers:
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    if cfg.trainer.strategy == "fsdp2":
        if any(isinstance(c, EMA) for c in callbacks):
            raise ValueError(
                "trainer.strategy=fsdp2: the weights' average (callbacks.ema) is whole"
            )
        options["strategy"] = FSDP2()
    # What Lightning chooses for several processes, too.
    StrategyRegistry.register("ddp", DDP, override=True, start_method="popen")
    try:
        trainer: Trainer = instantiate(
            cfg.trainer,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
            _convert_="all",
            **options,
        )
    except InstantiationException as error:
        raise ValueError(_with_key(str(error.__cause__ or error), cfg.trainer)) from error
    return trainer


def _with_key(reason: str, given: DictConfig) -> str:
    """Lightning's complaint, after the key and the value that it speaks of."""
    reason = " ".join(reason.split())
    for key in ("devices", "precision", "strategy", "accelerator"):
        if key in reason.lower() or f" {given[key]} " in reason:
            return f"trainer.{key}={given[key]}: {reason}"
    return reason


def make_data(cfg: DictConfig) -> ImageDataModule:
    """Instantiate the data of a training's configuration, which is not opened yet."""
    data: ImageDataModule = instantiate(
        cfg.data,
        augment=cfg.augment.transform,
        mixup=cfg.augment.mixup,
        seed=cfg.seed,
        _convert_="all",
    )
    return data


def given_data(cfg: DictConfig) -> dict[str, Any]:
    """What a configuration says of the data, to stand above what a checkpoint knows."""
    return {k: v for k, v in plain(cfg.data).items() if v is not None and k != "_target_"}


def _precision(accelerator: str) -> str:
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    # Older GPUs only emulate bf16.
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def accumulate(trainer: Trainer, cfg: DictConfig, images: int) -> None:
    """Accumulate batches until all processes together have used the images of one step.

    Args:
        trainer: To be set so.
        cfg: Composed from configs/train.yaml.
        images: Number of images to train on.

    Raises:
        ValueError: Steps of that size cannot be made of the batches, or of the images.
    """
    at_once = cfg.data.batch_size * trainer.world_size
    if cfg.global_batch_size is not None:
        if cfg.global_batch_size % at_once:
            raise ValueError(
                f"global_batch_size={cfg.global_batch_size}: expected a multiple of {at_once}, "
                f"data.batch_size={cfg.data.batch_size} times {trainer.world_size} processes"
            )
        trainer.accumulate_grad_batches = cfg.global_batch_size // at_once
    batches, limit = trainer.accumulate_grad_batches, cfg.trainer.limit_train_batches
    if images < at_once * batches:
        raise ValueError(
            f"data.batch_size={cfg.data.batch_size}: a step takes {at_once * batches} images over "
            f"{trainer.world_size} processes and {batches} batches, there are {images} to train on"
        )
    if batches > 1 and limit is not None and (limit % batches or isinstance(limit, float)):
        raise ValueError(
            f"trainer.limit_train_batches={limit}: expected a multiple of {batches}, the batches "
            "of a step"
        )


def set_up_torch(cfg: DictConfig) -> None:
    """TF32, caches of compiled code, threads, seeds; first checks the number of epochs."""
    if "trainer" in cfg:
        _check_positive("trainer.max_epochs", cfg.trainer.max_epochs)
    torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = cfg.tf32
    if "paths" in cfg:  # not a default: to import PyTorch is enough for it to set the first one
        for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            folder = Path(cfg.paths.cache, variable.partition("_")[0].lower())
            os.environ[variable] = str(folder.absolute())
    if cfg.threads is not None:
        _check_positive("threads", cfg.threads)
        torch.set_num_threads(cfg.threads)
    if "seed" in cfg:
        if cfg.seed not in range(2**32):
            raise ValueError(f"seed={cfg.seed}: expected an integer from 0 to {2**32 - 1}")
        seed_everything(cfg.seed, verbose=False)


def _check_positive(key: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}={value}: expected an integer, at least 1")


def check_fits(data: ImageDataModule, module: Classifier) -> None:
    """The data must have the model's classes, channels and, if it takes no other, size."""
    classes, outputs = data.num_classes, module.num_classes
    # With a class map the data may show a part of the model's classes.
    fits = classes is None or classes == outputs or (data.settings.class_map and classes < outputs)
    if not fits:
        raise ValueError(
            f"data.name={data.settings.name}: has {classes} classes, the model has {outputs}; "
            "set model.num_classes; for a part of its classes valid_labels or data.class_map"
        )
    traits = get_model_traits(module.model)
    side = data.config["input_size"][1:]
    if traits.get("fixed_input_size") and traits["img_size"] != tuple(side):
        raise ValueError(
            f"data.input_size={list(data.config['input_size'])}: the model takes images of "
            f"{traits['img_size']} alone; set +model.img_size"
        )
    channels, taken = data.config["input_size"][0], getattr(module.model, "in_chans", None)
    if taken not in (None, channels):
        raise ValueError(
            f"data.input_size={list(data.config['input_size'])}: the model takes {taken} channels; "
            "set +model.in_chans"
        )


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as a dictionary, resolved."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    return dict(plain)
