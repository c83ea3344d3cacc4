"""Naming what plain pictures show."""

import logging
from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL.Image import Image

from nat_models import viz
from nat_models.data import ImageDataModule
from nat_models.data.images import decode
from nat_models.engine.labels import class_names
from nat_models.engine.module import Classifier
from nat_models.engine.setup import given_data, make_trainer
from nat_models.engine.trained import TrainedRun
from nat_models.errors import bad_input

_log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def name_pictures(
    cfg: DictConfig, module: Classifier, trained: TrainedRun | None
) -> dict[str, list[tuple[str, float]]]:
    """Print the five most probable classes of each picture; draw one layer's attention if asked.

    Args:
        cfg: Composed from configs/eval.yaml; its `images` is a picture or a folder of them.
        module: The classifier.
        trained: Where it comes from, if from a checkpoint.

    Returns:
        By file name, the classes and their probabilities.

    Raises:
        ConfigError: There is no picture, the model has no such layer, or a picture cannot be read
            and, by `data.on_error`, is not to be skipped.
    """
    with bad_input():
        paths = _pictures(Path(cfg.images))
        if cfg.attention is not None and cfg.output is None:
            raise ValueError(f"attention={cfg.attention}: expected output=FOLDER for the drawings")
        data = _settings(cfg, trained)
        data.follow(module.model)
        names = class_names(module, None, trained)
        device = make_trainer(cfg).strategy.root_device
        model = module.model.to(device).eval()
        found = {}
        for path in paths:
            image = _read(path, data)
            if image is None:
                continue
            pixels, picture = data.prepare(image)
            with torch.inference_mode():
                probabilities = model(pixels[None].to(device))[0].float().softmax(-1).cpu()
            shares, classes = probabilities.topk(min(5, len(names)))
            top = [(names[c], float(p)) for c, p in zip(classes, shares, strict=True)]
            found[path.name] = top
            _log.info("%s: %s", path.name, ", ".join(f"{name} {p:.1%}" for name, p in top))
            if cfg.attention is not None:
                layer = None if cfg.attention == "auto" else cfg.attention
                figure = viz.neighborhoods(model, pixels.to(device), picture, layer)
                Path(cfg.output).mkdir(parents=True, exist_ok=True)
                figure.savefig(Path(cfg.output, f"{path.stem}_attention.png"))
    if data.complaints.count:
        _log.warning("%d of %d pictures could not be read", data.complaints.count, len(paths))
    return found


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
