"""Evaluation: of a checkpoint or of any model by name, on held-out images or on plain pictures."""

import logging
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig
from timm.models import get_model_traits

from nat_models.data import ImageDataModule
from nat_models.engine import facts
from nat_models.engine.callbacks import accuracy
from nat_models.engine.execution import choose_execution, evaluates_long
from nat_models.engine.fail_together import fail_together
from nat_models.engine.labels import check_real_labels, class_names, real_accuracy, valid_labels
from nat_models.engine.module import Classifier
from nat_models.engine.pictures import name_pictures
from nat_models.engine.predictions import Predictions
from nat_models.engine.report import output_folder, write_report, write_results, writing_to
from nat_models.engine.setup import check_fits, given_data, make_trainer, plain, set_up_torch
from nat_models.engine.trained import TrainedRun
from nat_models.errors import bad_input, faults_of_the_machine

_log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> Any:
    """Evaluate on held-out images, or with `images=PATH` name what pictures show.

    Args:
        cfg: Composed from configs/eval.yaml.

    Returns:
        Loss and accuracies by name, of the last of several sizes; of pictures, what they show.

    Raises:
        ConfigError: A value cannot be used; raised before any work, and names its key.
    """
    with bad_input():
        if not cfg.ckpt and not cfg.model.name:
            raise ValueError("expected ckpt=PATH or model.name=NAME")
        trained = TrainedRun.read(Path(cfg.ckpt), cfg.weights) if cfg.ckpt else None
        set_up_torch(cfg)
        given = plain(cfg.model)
        module = trained.module(given) if trained else Classifier(model=given)
    if not (trained or given["pretrained"] or given["weights_of"] or "checkpoint_path" in given):
        _log.warning(
            "model.name=%s: the weights are random; set ckpt=PATH or model.pretrained=true",
            given["name"],
        )
    if cfg.images is not None:
        return name_pictures(cfg, module, trained)
    with bad_input():
        data = _evaluation_data(cfg, trained)
        data.open(training=False)
        data.follow(module.model)
        module.restrict(valid_labels(cfg.valid_labels))
        check_fits(data, module)
        if cfg.real_labels:
            check_real_labels(data)
        output = output_folder(cfg)
        predictions = Predictions()
        trainer = make_trainer(cfg)
        trainer.callbacks.append(predictions)  # type: ignore[attr-defined]
        _check_sizes(cfg, trainer, module.model)
        size = data.settings.batch_size
        is_long = evaluates_long(trainer, data)
        module.run_by(choose_execution(cfg, trainer, module.model, size, is_long))
    for name, value in facts.describe(trainer, module, data).items():
        _log.info("%-10s %s", name, value)
    with fail_together(trainer):
        results, metrics = _evaluate_at_sizes(cfg, trainer, module, data, predictions)
        if output is not None and trainer.is_global_zero:
            names = class_names(module, data, trained)
            _write(output, results, predictions.table(), data, names)
    return metrics


def _evaluate_at_sizes(
    cfg: DictConfig,
    trainer: Trainer,
    module: Classifier,
    data: ImageDataModule,
    predictions: Predictions,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a row of results for each of the sizes, and the metrics of the last."""
    name = cfg.ckpt or cfg.model.name
    results = []
    model = module.model
    own_size, own_weights = get_model_traits(model).get("img_size"), model.state_dict()
    for size in cfg.sizes or [None]:
        with bad_input():
            if size is not None:
                _adapt(model, own_size, own_weights, size)
                data.resize(size, model)
        data.complaints.count = 0
        with faults_of_the_machine():
            [metrics] = trainer.validate(module, data, verbose=False)
        if cfg.real_labels:
            metrics = {**metrics, **real_accuracy(predictions.table(), data)}
        unreadable = _over_processes(trainer, data.complaints.count)
        side = data.config["input_size"][-1]
        results.append({"model": name, "size": side, "unreadable": unreadable, **metrics})
        _log.info("%s  %d pixels  %s", accuracy(metrics), side, name)
        if unreadable:
            _log.warning("%d images could not be read and are not counted", unreadable)
    return results, dict(metrics)


def _evaluation_data(cfg: DictConfig, trained: TrainedRun | None) -> ImageDataModule:
    if "_target_" in cfg.data:
        data: ImageDataModule = instantiate(cfg.data, _convert_="all")
        return data
    if trained is None:
        raise ValueError(
            "data: expected a data set (data=imagefolder data.root=FOLDER, or another), or a "
            "checkpoint that knows its own (ckpt=PATH)"
        )
    return trained.data(given_data(cfg))


def _check_sizes(cfg: DictConfig, trainer: Trainer, model: Any) -> None:
    """A model that is sharded already cannot get position embeddings of another size."""
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    if sharded and len(cfg.sizes or ()) > 1 and get_model_traits(model).get("fixed_input_size"):
        raise ValueError(
            f"sizes={list(cfg.sizes)}: expected one size, or trainer.strategy=ddp: fsdp2 shards "
            f"{type(model).__name__} for the first alone"
        )


def _adapt(model: Any, own_size: Any, weights: dict[str, Any], size: int) -> None:
    """Let a model that is made for one size take another, each time from its own weights."""
    if not get_model_traits(model).get("fixed_input_size"):
        return
    if not hasattr(model, "set_input_size"):
        if own_size == (size, size):
            return
        raise ValueError(f"sizes={size}: {type(model).__name__} takes {own_size} alone")
    model.set_input_size(own_size)
    model.load_state_dict(weights)
    model.set_input_size((size, size))


def _over_processes(trainer: Trainer, count: int) -> int:
    total: Any = trainer.strategy.reduce(
        torch.tensor(count, device=trainer.strategy.root_device), reduce_op="sum"
    )
    return int(total)


def _write(
    output: Path,
    results: list[dict[str, Any]],
    table: dict[str, Any],
    data: ImageDataModule,
    names: list[str],
) -> None:
    with writing_to(output):
        write_results(output, results)
        write_report(output, table, data, names)
