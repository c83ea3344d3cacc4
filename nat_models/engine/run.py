"""The order of events: all is checked and built, then work starts, then results are written."""

import json
import logging
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from nat_models import viz
from nat_models.checkpoints import load_weights
from nat_models.data import ImageDataModule
from nat_models.engine import facts
from nat_models.engine.building import neighborhood_attentions
from nat_models.engine.callbacks import History, accuracy
from nat_models.engine.console import log_to_file
from nat_models.engine.execution import choose_execution, trains_long
from nat_models.engine.fail_together import fail_together
from nat_models.engine.folder import claim, resume_path, share_output_dir
from nat_models.engine.module import Classifier
from nat_models.engine.predictions import Predictions
from nat_models.engine.publish import check_repository, push, write_card, write_model
from nat_models.engine.setup import (
    accumulate,
    check_fits,
    make_data,
    make_trainer,
    plain,
    set_up_torch,
)
from nat_models.engine.trained import TrainedRun
from nat_models.errors import bad_input, faults_of_the_machine

_log = logging.getLogger(__name__)

OBJECTIVES = ("val/top1", "val/top5")


def train(cfg: DictConfig) -> float:
    """Train, evaluate the best checkpoint, leave pictures and records beside it.

    Without `callbacks.best` it is the last one.

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
        if cfg.push_to_hub is not None:
            check_repository(cfg.push_to_hub)
        result = _result(cfg)
        path = resume_path(cfg)
        resumed = TrainedRun.read(path) if path else None
        set_up_torch(cfg)
        data = make_data(cfg)
        data.open(training=True)
        model = plain(cfg.model)
        model["num_classes"] = model["num_classes"] or data.num_classes
        module: Classifier = instantiate(
            cfg.task, model=model, optimizer=cfg.optimizer, scheduler=cfg.scheduler, _convert_="all"
        )
        module.schedule(cfg.trainer.max_epochs, updates_per_epoch=1)
        data.follow(module.model)
        check_fits(data, module)
        if resumed:
            resumed.check_same_model(model)
            resumed.check_length(cfg.trainer.max_epochs)
            load_weights(module, resumed.state_dict, resumed.path)
            cfg.paths.output_dir = str(resumed.path.parent)
        share_output_dir(cfg)
        output = Path(cfg.paths.output_dir)
        trainer = make_trainer(cfg)
        accumulate(trainer, cfg, data.sizes["train"])
        if resumed:
            resumed.check_same_pace(data.pace(trainer))
        size = data.settings.batch_size
        is_long = trains_long(trainer, data)
        module.run_by(choose_execution(cfg, trainer, module.model, size, is_long))
        claim(output, resuming=resumed is not None)
    with log_to_file(output / "train.log"), fail_together(trainer), faults_of_the_machine():
        _record_start(output, cfg, trainer, module, data)
        _tell_origin(output, cfg, resumed)
        trainer.fit(module, data, ckpt_path=resumed.path if resumed else None, weights_only=True)
        output = trainer.strategy.broadcast(output)  # torchrun's processes each name another
        checkpoint = output / result
        execution = module.execution
        # Not by the trainer's ckpt_path, which would take the callbacks back to that epoch too.
        module = TrainedRun.read(checkpoint).module(
            {"attention_backend": cfg.model.attention_backend}
        )
        _draw(output, trainer, module, data)
        _write_model(output / "model", module, data)
        module.run_by(execution)
        predictions = Predictions()
        trainer.callbacks.append(predictions)  # type: ignore[attr-defined]
        [metrics] = trainer.validate(module, data, verbose=False)
        images = len(predictions.table()["index"])
        _write_metrics(output, metrics, images, module, data, cfg.push_to_hub)
        _log.info("%s  %s", accuracy(metrics), checkpoint)
        _end_logs(trainer)
    objective: float = metrics[cfg.objective]
    return objective


def _result(cfg: DictConfig) -> str:
    """Name of the checkpoint that a run ends with."""
    for name in ("best", "last"):
        if (cfg.callbacks or {}).get(name):
            return f"{name}.ckpt"
    raise ValueError("callbacks.best=null and callbacks.last=null: expected one of the two")


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
def _tell_origin(output: Path, cfg: DictConfig, resumed: TrainedRun | None) -> None:
    if resumed is None:
        if cfg.ckpt == "auto":
            _log.info("ckpt=auto: %s holds no last.ckpt, a new run begins", output)
        return
    path, epochs = resumed.path, resumed.epochs
    _log.info("%-10s %s: after %d epochs, %d steps", "continued", path, epochs, resumed.steps)
    if epochs == cfg.trainer.max_epochs:
        message = "%s has its trainer.max_epochs=%d already; to train on, raise trainer.max_epochs"
        _log.warning(message, path, epochs)


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
def _write_model(folder: Path, module: Classifier, data: ImageDataModule) -> None:
    write_model(folder, module, data)


@rank_zero_only
def _write_metrics(
    output: Path,
    metrics: Any,
    images: int,
    module: Classifier,
    data: ImageDataModule,
    repository: str | None,
) -> None:
    _write_json(output / "metrics.json", {name: round(value, 6) for name, value in metrics.items()})
    write_card(output / "model", module, data, metrics, images)
    if repository is not None:
        push(output / "model", repository)


def _end_logs(trainer: Trainer) -> None:
    """W&B alone would go on with its log in the next job of a sweep."""
    if any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
        import wandb

        wandb.finish()


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
