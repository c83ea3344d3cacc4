"""Classes: their names, parts of ImageNet's, and its reassessed labels."""

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.real_labels import RealLabelsImagenet
from torch import Tensor

from nat_models.data import ImageDataModule
from nat_models.engine.module import Classifier
from nat_models.engine.trained import TrainedRun


def class_names(
    module: Classifier, data: ImageDataModule | None, trained: TrainedRun | None
) -> list[str]:
    """Names of the classes, as far as the data, the run or the model know them, else numbers."""
    count = module.num_classes
    known: Any = data.class_names if data is not None else None
    known = known or (trained.class_names if trained else None)
    known = known or getattr(module.model, "pretrained_cfg", {}).get("label_names")
    if subset := infer_imagenet_subset(module.model):
        info = ImageNetInfo(subset)
        synsets = info.label_names()
        if known is None and count == len(synsets):
            known = synsets
        if known and set(known) <= set(synsets):  # wnids say nothing to people
            known = [info.label_name_to_description(name) for name in known]
    return list(known) if known and len(known) == count else [str(i) for i in range(count)]


def valid_labels(which: str | None) -> Tensor | None:
    """Indices of the model's classes that the data has.

    Args:
        which: "imagenet_a", "imagenet_r", or a file with an index a line; None: all.

    Raises:
        ValueError: There is no such set or file, or it does not hold indices.
    """
    if which is None:
        return None
    inside = resources.files("timm.data").joinpath("_info", f"{which}_indices.txt")
    path: Any = inside if inside.is_file() else Path(which)
    if not path.is_file():
        raise ValueError(f"valid_labels={which}: expected imagenet_a, imagenet_r or a file")
    try:
        return torch.tensor([int(line) for line in path.read_text().split()])
    except ValueError as error:
        raise ValueError(f"valid_labels={which}: expected an index a line: {error}") from error


def check_real_labels(data: ImageDataModule) -> None:
    """Each held-out image must have a reassessed label.

    Args:
        data: Where the images come from.

    Raises:
        ValueError: The name of one is not that of a validation image of ImageNet.
    """
    labels = _real_labels()
    for index in range(data.sizes["val"]):
        name = Path(data.image_name(index)).name
        if name not in labels:
            raise ValueError(f"real_labels=true: {name} is no validation image of ImageNet")


def real_accuracy(table: dict[str, Any], data: ImageDataModule) -> dict[str, float]:
    """Accuracy by the reassessed labels of ImageNet's validation images (arXiv 2006.07159).

    Args:
        table: Of `Predictions`.
        data: Where the images come from, see `check_real_labels`.
    """
    labels = _real_labels()
    hits: dict[int, list[bool]] = {1: [], 5: []}
    for index, top in zip(table["index"], table["classes"], strict=True):
        name = Path(data.image_name(int(index))).name
        if labels[name]:
            for k, found in hits.items():
                found.append(bool(set(top[:k].tolist()) & set(labels[name])))
    return {f"val/real_top{k}": float(np.mean(found)) for k, found in hits.items()}


def _real_labels() -> dict[str, list[int]]:
    """Classes of each image, by its name."""
    labels: dict[str, list[int]] = RealLabelsImagenet([""] * 50_000).real_labels
    return labels
