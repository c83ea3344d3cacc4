"""The work that is timed: one inference or one training step of a model."""

from collections.abc import Callable
from typing import Any, cast

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from nat_models.benchmark.settings import Settings


def create_model(name: str, settings: Settings) -> nn.Module:
    """The model with random weights, on the device, at the resolution of the settings."""
    model: Any = timm.create_model(name)
    size = settings.input_size
    if size is not None and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(size, size))
    if settings.attention_backend is not None and hasattr(model, "set_attention_backend"):
        model.set_attention_backend(settings.attention_backend)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    model.to(device=settings.device, memory_format=layout)
    return cast(nn.Module, model)


def create_images(model: nn.Module, batch_size: int, settings: Settings) -> Tensor:
    """Random images [B, 3, H, W]: zeros would draw less power and let the clock run faster."""
    channels, *own = resolve_model_data_config(model)["input_size"]
    size = own if settings.input_size is None else [settings.input_size] * 2
    images = torch.randn(batch_size, channels, *size, device=settings.device)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    return images.to(memory_format=layout)


def create_step(
    model: nn.Module, images: Tensor, kind: str, execution: str, precision: str
) -> Callable[[], object]:
    """A function that runs one step.

    Args:
        model: On the device of the images.
        images: The batch of every step.
        kind: "inference", or "training": forward, cross entropy, backward, AdamW.
        execution: "eager", "compiled", or "cuda_graphs": compiled, replayed as CUDA graphs.
        precision: "float32", or the dtype to autocast to.
    """
    device_type = images.device.type
    graphs = execution == "cuda_graphs"
    model.train(kind == "training")
    if execution != "eager":
        model.compile(dynamic=False, mode="reduce-overhead" if graphs else None)

    def forward() -> Tensor:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        dtype = getattr(torch, precision)
        with torch.autocast(device_type, dtype, enabled=precision != "float32"):
            return cast(Tensor, model(images))

    if kind == "inference":
        return torch.inference_mode()(forward)

    classes = cast(int, model.num_classes)
    targets = torch.randint(classes, images.shape[:1], device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device_type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device_type, enabled=precision == "float16")

    def train() -> None:
        loss = F.cross_entropy(forward(), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return train
