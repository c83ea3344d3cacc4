"""How a model runs on its device: memory layout, and compilation where that pays."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import DictConfig
from torch import Tensor, nn

from nat_models.data import ImageDataModule
from nat_models.engine.sharding import separate_blocks

GRAPHS = "reduce-overhead"  # torch.compile's name for replaying CUDA graphs
MODES = ("auto", False, "default", GRAPHS)
# Images of a process that win back one or two minutes of compiling, for NAT-Tiny on an H100.
TRAINING_IMAGES, EVALUATION_IMAGES = 300_000, 2_000_000


@dataclass(frozen=True)
class Execution:
    """Runs a model; as it is by default.

    Attributes:
        channels_last: Whether images, and so all maps, lie in memory with the channels innermost.
        contiguous_weights: Whether the weights do not: FSDP2 takes no others.
        mode: Of `torch.compile`: "default" or "reduce-overhead"; None: not compiled.
        batch_size: Images of the batches that compiled code is made for; others run eagerly.
    """

    channels_last: bool = False
    mode: str | None = None
    batch_size: int = 0
    contiguous_weights: bool = False

    def prepare(self, model: nn.Module) -> None:
        """Lay out and compile in place: the names of the weights stay."""
        if self.channels_last and not self.contiguous_weights:
            model.to(memory_format=torch.channels_last)
        if self.mode is not None:
            # DDP would have a CUDA graph for each of its buckets.
            torch._dynamo.config.optimize_ddp = self.mode != GRAPHS
            model.compile(dynamic=False, mode=self.mode)

    def __call__(self, model: nn.Module, images: Tensor) -> Any:
        """The model's output for images [B, C, H, W]."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mode is None:
            return model(images)
        if len(images) != self.batch_size:  # the last of an evaluation: not worth compiling for
            with torch.compiler.set_stance("force_eager"):
                return model(images)
        if self.mode == GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()
        return model(images)

    def __str__(self) -> str:
        way = "eager" if self.mode is None else f"compiled, mode {self.mode}"
        return f"{way}, {'channels_last' if self.channels_last else 'contiguous'}"


def choose_execution(
    cfg: DictConfig, trainer: Trainer, model: nn.Module, batch_size: int, is_long: bool
) -> Execution:
    """What `channels_last` and `compile` of a configuration mean for a trainer.

    Args:
        cfg: Composed from configs/train.yaml or configs/eval.yaml.
        trainer: Tells device, strategy, and accumulated batches.
        model: To be run, not sharded yet.
        batch_size: Images of a whole batch.
        is_long: Whether compiling takes less time than it saves.

    Raises:
        ValueError: A value is not one of those allowed, or cannot be used by this trainer.
    """
    on_gpu = trainer.strategy.root_device.type == "cuda"
    is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    layout = cfg.channels_last
    if layout not in ("auto", True, False):
        raise ValueError(f"channels_last={layout}: expected auto, true or false")
    if layout == "auto":
        layout = on_gpu
    mode = cfg.compile
    if mode not in MODES:
        raise ValueError(f"compile={mode}: expected auto, false, default or {GRAPHS}")
    objection = _objection_to_graphs(trainer, model) if is_sharded else None
    if mode == GRAPHS and objection:
        raise ValueError(f"compile={mode}: {objection}; expected compile=default")
    if mode == "auto":
        recomputes = "task" in cfg and cfg.task.grad_checkpointing
        best = "default" if objection or recomputes else GRAPHS
        mode = best if on_gpu and is_long else False
    return Execution(layout, mode or None, batch_size, contiguous_weights=is_sharded)


def _objection_to_graphs(trainer: Trainer, model: nn.Module) -> str | None:
    """Why FSDP2 cannot replay a model's steps as CUDA graphs; None if it can."""
    if trainer.accumulate_grad_batches > 1:
        return (
            "with trainer.strategy=fsdp2 untested on GPUs where, as here, a step takes "
            f"{trainer.accumulate_grad_batches} batches"
        )
    if separate_blocks(model):
        return "trainer.strategy=fsdp2 gathers so large a model block by block, at new addresses"
    return None


def trains_long(trainer: Trainer, data: ImageDataModule) -> bool:
    """Whether compiling a training pays."""
    epochs = trainer.max_epochs or 0
    images = _images(trainer, data, "train", trainer.limit_train_batches)
    return epochs * images >= TRAINING_IMAGES


def evaluates_long(trainer: Trainer, data: ImageDataModule) -> bool:
    """Whether compiling an evaluation pays."""
    return _images(trainer, data, "val", trainer.limit_val_batches) >= EVALUATION_IMAGES


def _images(trainer: Trainer, data: ImageDataModule, part: str, limit: float) -> float:
    """Images of a process in one pass; the limit is a share, or if an int a number of batches."""
    images: float = data.sizes[part] / trainer.world_size
    if isinstance(limit, float):
        return images * limit
    most: int = limit * data.settings.batch_size
    return min(images, most)
