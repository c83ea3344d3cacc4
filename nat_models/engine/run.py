"""The order of events: all is checked and built, then work starts, then results are written."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from nat_models import viz
from nat_models.checkpoints import load_weights
from nat_models.data import ImageDataModule
from nat_models.engine import facts
from nat_models.engine.averaging import EMA
from nat_models.engine.building import neighborhood_attentions
from nat_models.engine.callbacks import History, ProgressBar, accuracy
from nat_models.engine.checkpoint_io import AtomicCheckpointIO
from nat_models.engine.console import log_to_file
from nat_models.engine.folder import claim, resume_path, share_output_dir
from nat_models.engine.module import Classifier
from nat_models.engine.sharding import FSDP2
from nat_models.engine.trained import TrainedRun
from nat_models.errors import bad_input, faults_of_the_machine

_log = logging.getLogger(__name__)

OBJECTIVES = ("val/top1", "val/top5")


def train(cfg: DictConfig) -> float:
    """Train, evaluate the best checkpoint, leave pictures and records beside it.

    Args:
        cfg: Composed from configs/train.yaml.

    Returns:
        The held-out metric that `cfg.objective` names.

    Raises:
        ConfigError: A value cannot be used; raised before any work, and names its key.
    """
    with bad_input():
        if cfg.objective not in OBJECTIVES:
            raise ValueError(f"objective={cfg.objective}: expected one of {OBJECTIVES}")
        path = resume_path(cfg)
        resumed = TrainedRun.read(path) if path else None
        _set_up_torch(cfg)
        data: ImageDataModule = instantiate(
            cfg.data,
            augment=cfg.augment.transform,
            mixup=cfg.augment.mixup,
            seed=cfg.seed,
            _convert_="all",
        )
        data.open(training=True)
        model = _plain(cfg.model)
        model["num_classes"] = model["num_classes"] or data.num_classes
        module: Classifier = instantiate(
            cfg.task, model=model, optimizer=cfg.optimizer, scheduler=cfg.scheduler, _convert_="all"
        )
        module.schedule(cfg.trainer.max_epochs, updates_per_epoch=1)
        data.follow(module.model)
        _check_fits(data, module)
        if resumed:
            resumed.check_same_model(model)
            load_weights(module, resumed.state_dict, resumed.path)
            cfg.paths.output_dir = str(resumed.path.parent)
        share_output_dir(cfg)
        output = Path(cfg.paths.output_dir)
        trainer = _trainer(cfg)
        _accumulate(trainer, cfg)
        claim(output, resuming=resumed is not None)
    with log_to_file(output / "train.log"), faults_of_the_machine():
        _record_start(output, cfg, trainer, module, data)
        trainer.fit(module, data, ckpt_path=resumed.path if resumed else None, weights_only=True)
        best = output / "best.ckpt"
        # Not by the trainer's ckpt_path, which would take the callbacks back to that epoch too.
        module = TrainedRun.read(best).module({"attention_backend": cfg.model.attention_backend})
        _draw(output, trainer, module, data)
        [metrics] = trainer.validate(module, data, verbose=False)
        _write_metrics(output, metrics)
        _log.info("%s  %s", accuracy(metrics), best)
    objective: float = metrics[cfg.objective]
    return objective


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Evaluate a checkpoint of a training run, or a model by name, on held-out images.

    Args:
        cfg: Composed from configs/eval.yaml.

    Returns:
        Held-out loss and accuracies by name.

    Raises:
        ConfigError: A value cannot be used; raised before any work, and names its key.
    """
    with bad_input():
        if not cfg.ckpt and not cfg.model.name:
            raise ValueError("expected ckpt=PATH or model.name=NAME")
        trained = TrainedRun.read(Path(cfg.ckpt)) if cfg.ckpt else None
        _set_up_torch(cfg)
        given = _plain(cfg.model)
        module = trained.module(given) if trained else Classifier(model=given)
        data = _evaluation_data(cfg, trained)
        data.open(training=False)
        data.follow(module.model)
        _check_fits(data, module)
        trainer = _trainer(cfg, logger=False)
    for name, value in facts.describe(trainer, module, data).items():
        _log.info("%-10s %s", name, value)
    with faults_of_the_machine():
        [metrics] = trainer.validate(module, data, verbose=False)
    _log.info("%s  %s", accuracy(metrics), cfg.ckpt or given["name"])
    return dict(metrics)


def _evaluation_data(cfg: DictConfig, trained: TrainedRun | None) -> ImageDataModule:
    if "_target_" in cfg.data:
        data: ImageDataModule = instantiate(cfg.data, _convert_="all")
        return data
    if trained is None:
        raise ValueError(
            "data: expected a data set (data=imagefolder data.root=FOLDER, or another), or a "
            "checkpoint that knows its own (ckpt=PATH)"
        )
    return trained.data({k: v for k, v in _plain(cfg.data).items() if v is not None})


def _trainer(cfg: DictConfig, **options: Any) -> Trainer:
    """Instantiate the trainer with the callbacks and loggers of the configuration."""
    if "logger" in cfg:
        options["logger"] = [instantiate(c) for c in (cfg.logger or {}).values() if c]
    if cfg.trainer.precision == "auto":
        options["precision"] = _precision(cfg.trainer.accelerator)
    callbacks: list[Callback] = [instantiate(c) for c in (cfg.callbacks or {}).values() if c]
    if cfg.trainer.strategy == "fsdp2":
        if any(isinstance(c, EMA) for c in callbacks):
            raise ValueError(
                "trainer.strategy=fsdp2: the weights' average (callbacks.ema) is whole"
            )
        options["strategy"] = FSDP2()
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        _convert_="all",
        **options,
    )
    return trainer


def _precision(accelerator: str) -> str:
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    # Older GPUs only emulate bf16.
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def _accumulate(trainer: Trainer, cfg: DictConfig) -> None:
    """Accumulate batches until all processes together have used the images of one step."""
    if cfg.global_batch_size is None:
        return
    at_once = cfg.data.batch_size * trainer.world_size
    if cfg.global_batch_size % at_once:
        raise ValueError(
            f"global_batch_size={cfg.global_batch_size}: expected a multiple of {at_once}, "
            f"data.batch_size={cfg.data.batch_size} times {trainer.world_size} processes"
        )
    trainer.accumulate_grad_batches = cfg.global_batch_size // at_once


def _set_up_torch(cfg: DictConfig) -> None:
    torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = cfg.tf32
    if "paths" in cfg:
        for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            folder = Path(cfg.paths.cache, variable.partition("_")[0].lower())
            os.environ.setdefault(variable, str(folder.absolute()))
    if cfg.threads is not None:
        if not isinstance(cfg.threads, int) or cfg.threads < 1:
            raise ValueError(f"threads={cfg.threads}: expected an integer, at least 1")
        torch.set_num_threads(cfg.threads)
    if "seed" in cfg:
        if cfg.seed not in range(2**32):
            raise ValueError(f"seed={cfg.seed}: expected an integer from 0 to {2**32 - 1}")
        seed_everything(cfg.seed, verbose=False)


def _check_fits(data: ImageDataModule, module: Classifier) -> None:
    """The data must have the model's classes and channels."""
    classes, outputs = data.num_classes, module.model.num_classes
    # With a class map the data may show a part of the model's classes.
    fits = classes is None or classes == outputs or (data.settings.class_map and classes < outputs)
    if not fits:
        raise ValueError(
            f"data.name={data.settings.name}: has {classes} classes, the model has {outputs}; "
            "set model.num_classes, or data.class_map for a part of the model's classes"
        )
    channels, taken = data.config["input_size"][0], getattr(module.model, "in_chans", None)
    if taken not in (None, channels):
        raise ValueError(
            f"data.input_size={list(data.config['input_size'])}: the model takes {taken} channels; "
            "set +model.in_chans"
        )


@rank_zero_only
def _record_start(
    output: Path, cfg: DictConfig, trainer: Trainer, module: Classifier, data: ImageDataModule
) -> None:
    lines = facts.describe(trainer, module, data)
    for name, value in {**lines, "output": str(output)}.items():
        _log.info("%-10s %s", name, value)
    OmegaConf.save(cfg, output / "config.yaml", resolve=True)
    _write_json(output / "environment.json", {**facts.environment(trainer), **lines})


@rank_zero_only
def _draw(output: Path, trainer: Trainer, module: Classifier, data: ImageDataModule) -> None:
    for history in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(history, History) and history.epochs:
            viz.curves(history.epochs).savefig(output / "curves.png")
    if neighborhood_attentions(module.model):
        image, picture = data.example()
        device = trainer.strategy.root_device
        figure = viz.neighborhoods(module.model.to(device), image.to(device), picture)
        figure.savefig(output / "neighborhoods.png")


@rank_zero_only
def _write_metrics(output: Path, metrics: Any) -> None:
    _write_json(output / "metrics.json", {name: round(value, 6) for name, value in metrics.items()})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _plain(cfg: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    return dict(plain)
