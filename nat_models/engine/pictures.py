"""Naming what plain pictures show."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from nat_models import viz
from nat_models.data import ImageDataModule
from nat_models.data.images import decode
from nat_models.engine.labels import class_names
from nat_models.engine.module import Classifier
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
        ConfigError: There is no picture, one cannot be read, or the model has no such layer.
    """
    with bad_input():
        paths = _pictures(Path(cfg.images))
        if cfg.attention is not None and cfg.output is None:
            raise ValueError(f"attention={cfg.attention}: expected output=FOLDER for the drawings")
        data = trained.data({}) if trained else ImageDataModule("fake")
        data.follow(module.model)
        names = class_names(module, None, trained)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = module.model.to(device).eval()
        found = {}
        for path in paths:
            pixels, picture = _read(path, data)
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
    return found


def _pictures(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"images={path}: expected a picture or a folder of them, there is none")
    if found := sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES):
        return found
    raise ValueError(f"images={path}: holds no picture ({', '.join(sorted(SUFFIXES))})")


def _read(path: Path, data: ImageDataModule) -> tuple[torch.Tensor, Any]:
    try:
        return data.prepare(decode(path.read_bytes(), data.mode))
    except OSError as error:
        raise ValueError(f"images={path}: {error}") from error
