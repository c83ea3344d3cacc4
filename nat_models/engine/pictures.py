"""Naming what plain pictures show."""

import logging
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL.Image import Image
from torch import Tensor

from nat_models import viz
from nat_models.data import ImageDataModule
from nat_models.data.images import decode
from nat_models.engine.execution import choose_execution
from nat_models.engine.labels import class_names
from nat_models.engine.module import Classifier
from nat_models.engine.report import output_folder, write_named, writing_to
from nat_models.engine.setup import given_data, make_trainer
from nat_models.engine.trained import TrainedRun
from nat_models.errors import bad_input

_log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def name_pictures(
    cfg: DictConfig, module: Classifier, trained: TrainedRun | None
) -> dict[str, list[tuple[str, float]]]:
    """Tell the five most probable classes of each picture; draw one layer's attention if asked.

    With `output` set they are also written there, as predictions.csv.

    Args:
        cfg: Composed from configs/eval.yaml; its `images` is a picture or a folder of them.
        module: The classifier.
        trained: Where it comes from, if from a checkpoint.

    Returns:
        By file name, the classes and their probabilities.

    Raises:
        ConfigError: There is no picture, the model has no such layer, or a picture cannot be read
            and, by `data.on_error`, is not to be skipped.
        RunStopped: The results cannot be written.
    """
    with bad_input():
        paths = _pictures(Path(cfg.images))
        if cfg.attention is not None and cfg.output is None:
            raise ValueError(f"attention={cfg.attention}: expected output=FOLDER for the drawings")
        output = output_folder(cfg)
        data = _settings(cfg, trained)
        data.follow(module.model)
        names = class_names(module, None, trained)
        trainer = make_trainer(cfg)
        # So few are never worth compiling for, but where that was asked for.
        module.run_by(choose_execution(cfg, trainer, module.model, batch_size=1, is_long=False))
        device, precision = trainer.strategy.root_device, trainer.precision_plugin
        precision.convert_module(module).to(device).eval()
        found = {}
        for path in paths:
            image = _read(path, data)
            if image is None:
                continue
            pixels, picture = data.prepare(image)
            pixels = precision.convert_input(pixels.to(device))
            with torch.inference_mode(), precision.val_step_context():
                probabilities = module(pixels[None])[0].float().softmax(-1).cpu()
            shares, classes = probabilities.topk(min(5, len(names)))
            top = [(names[c], float(p)) for c, p in zip(classes, shares, strict=True)]
            found[path.name] = top
            _log.info("%s: %s", path.name, ", ".join(f"{name} {p:.1%}" for name, p in top))
            if cfg.attention is not None and output is not None:
                with precision.val_step_context():
                    figure = _attention(cfg, module, pixels, picture)
                figure.savefig(output / f"{path.name}_attention.png")
    if data.complaints.count:
        _log.warning("%d of %d pictures could not be read", data.complaints.count, len(paths))
    if output is not None:
        with writing_to(output):
            write_named(output, found)
    return found


def _attention(cfg: DictConfig, module: Classifier, pixels: Tensor, picture: viz.Picture) -> Figure:
    layer = None if cfg.attention == "auto" else cfg.attention
    return viz.neighborhoods(module.model, pixels, picture, layer)


def _settings(cfg: DictConfig, trained: TrainedRun | None) -> ImageDataModule:
    """How pictures are prepared, and what is done about unreadable ones; no data is opened."""
    given = given_data(cfg)
    return trained.data(given) if trained else ImageDataModule(**{"name": "fake", **given})


def _pictures(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"images={path}: expected a picture or a folder of them, there is none")
    if found := sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES):
        return found
    raise ValueError(f"images={path}: holds no picture ({', '.join(sorted(SUFFIXES))})")


def _read(path: Path, data: ImageDataModule) -> Image | None:
    """The picture, None if it cannot be read and is to be skipped."""
    try:
        return decode(path.read_bytes(), data.mode)
    except Exception as error:  # decoders fail in many ways
        data.complaints([f"images={path}: {error}"])
        return None
