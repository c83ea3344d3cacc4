"""What a run is made of: the lines that it starts with, and the record that it leaves."""

import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch
from lightning import Trainer

import nat_models
from nat_models.data import ImageDataModule
from nat_models.engine.building import neighborhood_attentions
from nat_models.engine.module import Classifier
from nat_models.provenance import commit
from neighborhood_attention import resolve_backend


def describe(trainer: Trainer, module: Classifier, data: ImageDataModule) -> dict[str, str]:
    """Device, precision, how and what runs, data and model, each in a line for people."""
    model: Any = module.hparams["model"]
    parameters = sum(p.numel() for p in module.model.parameters())
    size = "x".join(map(str, data.config["input_size"]))
    parts = {"train": "training", "val": "held-out"}
    images = " and ".join(f"{count:,} {parts[part]}" for part, count in data.sizes.items())
    return {
        "device": _device(trainer),
        "precision": str(trainer.precision),
        "execution": str(module.execution),
        "attention": _attention(trainer, module),
        "data": f"{data.settings.name}: {images} images of {size}, {data.num_classes} classes",
        "model": f"{model['name']}: {parameters / 1e6:.2f} M parameters",
    }


def environment(trainer: Trainer) -> dict[str, Any]:
    """Versions, machine, command and commit, to be kept beside the results."""
    packages = ("torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "nat_models": nat_models.__version__,
        **{name: version(name) for name in packages},
        "cuda": torch.version.cuda,
        "device": _device(trainer),
        "processes": trainer.world_size,
    }


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return f"{trainer.world_size} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}"


def _attention(trainer: Trainer, module: Classifier) -> str:
    attentions = neighborhood_attentions(module.model)
    if not attentions:
        return "the model has no neighborhood attention"
    if chosen := next(iter(attentions.values())).backend:
        return f"backend {chosen} (model.attention_backend)"
    device = trainer.strategy.root_device.type
    return f"backend {resolve_backend(device)} (automatic on {device})"
