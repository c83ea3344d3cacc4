"""Supervised classification: model, loss, metrics, optimizer and schedule."""

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
from lightning import LightningModule
from timm.optim import (
    create_optimizer_v2,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import nat_models  # noqa: F401 - registers the models
from nat_models.engine.non_finite import clip_or_skip
from nat_models.engine.sharding import shard
from neighborhood_attention import NeighborhoodAttention2D, list_backends

Batch = tuple[Tensor, Tensor]
FUSED = ("adam", "adamw", "sgd")  # timm's names of PyTorch's optimizers with fused kernels


class Classifier(LightningModule):
    """Trains and evaluates an image classifier with cross entropy.

    Every argument is a plain container and is kept in the checkpoints, which so load without code.

    Args:
        model: Arguments of `build_model`.
        optimizer: Arguments of `timm.optim.create_optimizer_v2`.
        scheduler: Arguments of `timm.scheduler.create_scheduler_v2`; its epochs are the trainer's.
        label_smoothing: Share of each target spread evenly over the classes.
        compile: Whether training runs through `torch.compile`.
        grad_checkpointing: Whether to compute activations anew in the backward pass: less memory,
            more time.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        optimizer: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        compile: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = build_model(**model)
        self.optimizer_args = dict(optimizer or {})
        self.scheduler_args = dict(scheduler or {})
        self.label_smoothing = label_smoothing
        self.compiles = compile
        self.gradient_norm: Tensor
        if grad_checkpointing:
            checkpoint_activations(self.model)
        classes: int = self.model.num_classes
        self.val_loss = MeanMetric()
        self.val_accuracy = MetricCollection(
            {
                "val/top1": MulticlassAccuracy(classes, top_k=1, average="micro"),
                "val/top5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro"),
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] to logits [B, classes]."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss; targets are class indices [B] or, after mixup, probabilities [B, classes]."""
        images, targets = batch
        loss = F.cross_entropy(self(images), targets, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the held-out loss and accuracies."""
        images, targets = batch
        logits = self(images)
        self.val_loss.update(F.cross_entropy(logits, targets), len(targets))
        self.val_accuracy.update(logits, targets)
        self.log("val/loss", self.val_loss)
        self.log_dict(self.val_accuracy)

    def configure_model(self) -> None:
        """Divide the model among the processes, if the strategy asks for it."""
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            shard(self.model, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Compile in place: the names of the weights stay."""
        if self.compiles:
            self.model.compile()

    def configure_optimizers(self) -> Any:
        """Optimizer and schedule, stepped every update."""
        epochs = self.trainer.max_epochs
        assert epochs is not None
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, scheduler = self.schedule(epochs, updates_per_epoch=steps // epochs)
        if scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def schedule(self, epochs: int, updates_per_epoch: int) -> tuple[Optimizer, Scheduler | None]:
        """Create the optimizer, which leaves biases and norms undecayed, and its schedule.

        Args:
            epochs: Length of the run.
            updates_per_epoch: Optimizer steps an epoch.

        Returns:
            Optimizer and scheduler, the latter None if `sched` is "none".

        Raises:
            ValueError: timm cannot make one of them; the message names the configuration group.
        """
        try:
            optimizer = self._optimizer(**self.optimizer_args)
        except (ValueError, TypeError) as error:
            raise ValueError(f"optimizer={self.optimizer_args}: {error}") from error
        try:
            scheduler, _ = create_scheduler_v2(
                optimizer,
                num_epochs=epochs - self.scheduler_args.get("cooldown_epochs", 0),
                step_on_epochs=False,
                updates_per_epoch=updates_per_epoch,
                **self.scheduler_args,
            )
        except (AssertionError, ValueError, TypeError) as error:
            raise ValueError(
                f"scheduler={self.scheduler_args}, trainer.max_epochs={epochs}: {error}"
            ) from error
        return optimizer, scheduler

    def _optimizer(self, decay_rpb: bool = False, **options: Any) -> Optimizer:
        if decay_rpb:
            options["param_group_fn"] = partial(
                param_groups, options.get("weight_decay", 0.0), options.pop("layer_decay", None)
            )
        if self._can_fuse(options.get("opt")):
            options["fused"] = True
        return create_optimizer_v2(self.model, **options)

    def _can_fuse(self, name: str | None) -> bool:
        """Whether the optimizer's kernels can take all weights at once and skip bad steps."""
        trainer = self._trainer
        return (
            name in FUSED
            and trainer is not None
            and trainer.strategy.root_device.type == "cuda"
            and trainer.precision != "16-mixed"  # its scaler does not let gradients be clipped then
        )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the total norm, which tells also whether the step may be taken."""
        self.gradient_norm = clip_or_skip(optimizer, gradient_clip_val)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step timm's schedules by the number of updates."""
        scheduler.step_update(self.global_step)


def param_groups(
    weight_decay: float, layer_decay: float | None, model: nn.Module
) -> list[dict[str, Any]]:
    """Parameter groups in which only biases and norms are left undecayed.

    timm leaves out what the model's `no_weight_decay` names too, here the tables of relative
    positional biases. The published models were trained with these decayed.

    Args:
        weight_decay: Of all other parameters.
        layer_decay: Factor of the learning rate from a layer to the one before; None: 1.
        model: Model to be optimized.
    """
    groups: list[dict[str, Any]]
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay)
    else:
        groups = param_groups_layer_decay(model, weight_decay, layer_decay=layer_decay)
    return groups


def checkpoint_activations(model: Any) -> None:
    """Turn activation checkpointing on.

    Raises:
        ValueError: The model has none.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ValueError(
            f"task.grad_checkpointing=true: {type(model).__name__} does not support it"
        ) from error


def build_model(
    name: str | None,
    pretrained: bool = False,
    attention_backend: str | None = None,
    **options: Any,
) -> Any:
    """Create any model that timm knows, ours included.

    Args:
        name: Registered name, with or without a tag, or a `hf-hub:` or `local-dir:` address.
        pretrained: Whether to load the published weights.
        attention_backend: Backend of every neighborhood attention; None: chosen by the device.
        **options: Further arguments of `timm.create_model`; None values are left out.

    Raises:
        ValueError: There is no such model or backend, the model does not take an option, or it has
            no neighborhood attention to set a backend for.
    """
    if not name:
        raise ValueError(
            "model.name is not set: expected the name of a timm model, such as nat_tiny"
        )
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"model.name={name}: timm has no such model{hint}")
    if attention_backend is not None and attention_backend not in list_backends():
        raise ValueError(
            f"model.attention_backend={attention_backend}: expected one of {list_backends()}"
        )
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:  # an argument that the model does not have
        raise ValueError(f"model.name={name}: {error}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.pretrained=true: no weights for {name}: {reason}") from error
    if attention_backend is not None:
        if not hasattr(model, "set_attention_backend"):
            raise ValueError(
                f"model.attention_backend={attention_backend}: {name} has no neighborhood attention"
            )
        model.set_attention_backend(attention_backend)
    return model


def neighborhood_attentions(model: nn.Module) -> dict[str, NeighborhoodAttention2D]:
    """The neighborhood attention modules of a model, by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NeighborhoodAttention2D)
    }
