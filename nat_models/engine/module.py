"""Supervised classification: model, loss, metrics, optimizer and schedule."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.nn.utils import clip_grad_value_
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from nat_models.engine.building import (
    build_model,
    checkpoint_activations,
    freeze_all_but_classifier,
)
from nat_models.engine.execution import Execution
from nat_models.engine.non_finite import clip_or_skip
from nat_models.engine.optimization import create_optimizer, lay_out_as_weights, parameters_of
from nat_models.engine.replicas import replays_graphs
from nat_models.engine.sharding import shard

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """Trains and evaluates an image classifier with cross entropy.

    Every argument is a plain container and is kept in the checkpoints, which so load without code.

    Args:
        model: Arguments of `build_model`.
        optimizer: Arguments of `timm.optim.create_optimizer_v2`.
        scheduler: Arguments of `timm.scheduler.create_scheduler_v2`; its epochs are the trainer's.
        label_smoothing: Share of each target spread evenly over the classes.
        grad_checkpointing: Whether to compute activations anew in the backward pass: less memory,
            more time.
        linear_probe: Whether to train the classifier alone, on the features that it would see in
            evaluation.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        optimizer: Mapping[str, Any] | None = None,
        scheduler: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        grad_checkpointing: bool = False,
        linear_probe: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = build_model(**model)
        self.optimizer_args = dict(optimizer or {})
        self.scheduler_args = dict(scheduler or {})
        self.label_smoothing = label_smoothing
        self.execution = Execution()
        self.linear_probe = linear_probe
        self.gradient_norm: Tensor
        if grad_checkpointing:
            checkpoint_activations(self.model)
        if linear_probe:
            freeze_all_but_classifier(self.model)
        self.val_loss = MeanMetric()
        self.restrict(None)

    def run_by(self, execution: Execution) -> None:
        """Choose how the model runs; before this it runs as it is."""
        self.execution = execution
        execution.prepare(self.model)

    def restrict(self, classes: Tensor | None) -> None:
        """Choose the classes that evaluation knows, as indices into the model's; None: all."""
        self.classes = classes
        count = self.num_classes
        self.val_accuracy = MetricCollection(
            {
                "val/top1": MulticlassAccuracy(count, top_k=1, average="micro"),
                "val/top5": MulticlassAccuracy(count, top_k=min(5, count), average="micro"),
            }
        )

    @property
    def num_classes(self) -> int:
        """Number of classes that evaluation knows."""
        everything: int = self.model.num_classes
        return everything if self.classes is None else len(self.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] to logits [B, classes]."""
        logits: Tensor = self.execution(self.model, images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss; targets are class indices [B] or, after mixup, probabilities [B, classes]."""
        images, targets = batch
        loss = self.loss(images, self(images), targets)
        self.log("train/loss", loss)  # not to the bar: Lightning would read it at each step
        return loss

    def loss(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy with the smoothed targets."""
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to the held-out loss and accuracies; returns its logits."""
        images, targets = batch
        logits: Tensor = self(images)[: len(targets)]  # a batch may be blank
        if self.classes is not None:
            logits = logits[:, self.classes.to(logits.device)]
        if len(targets):
            self.val_loss.update(F.cross_entropy(logits, targets), len(targets))
            self.val_accuracy.update(logits, targets)
        self.log("val/loss", self.val_loss)
        self.log_dict(self.val_accuracy)
        return logits

    def configure_model(self) -> None:
        """Divide the model among the processes, if the strategy asks for it."""
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            shard(self.model, self.device_mesh["data_parallel"])

    def train(self, mode: bool = True) -> "Classifier":
        """Switch to training; a model that is only probed stays as in evaluation."""
        super().train(mode)
        if self.linear_probe:
            self.model.eval()
        return self

    def on_train_start(self) -> None:
        """A checkpoint may have been saved in another memory layout."""
        for optimizer in self.trainer.optimizers:
            lay_out_as_weights(optimizer)

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
            ValueError: The run ends before its cooldown, or timm cannot make one of them; the
                message names the key or the configuration group.
        """
        cooldown = self.scheduler_args.get("cooldown_epochs", 0)
        # Other types are left to timm, which refuses them.
        if isinstance(cooldown, int) and epochs <= cooldown:
            raise ValueError(
                f"trainer.max_epochs={epochs}: expected more than "
                f"scheduler.cooldown_epochs={cooldown}"
            )
        try:
            optimizer = create_optimizer(self.model, self._trainer, **self.optimizer_args)
        except (ValueError, TypeError) as error:
            raise ValueError(f"optimizer={self.optimizer_args}: {error}") from error
        try:
            scheduler, _ = create_scheduler_v2(
                optimizer,
                num_epochs=epochs - cooldown,
                step_on_epochs=False,
                updates_per_epoch=updates_per_epoch,
                **self.scheduler_args,
            )
        except (AssertionError, ValueError, TypeError) as error:
            raise ValueError(
                f"scheduler={self.scheduler_args}, trainer.max_epochs={epochs}: {error}"
            ) from error
        if scheduler is None:  # timm's schedules would apply the layers' factors
            for group in optimizer.param_groups:
                group["lr"] *= group.get("lr_scale", 1.0)
        return optimizer, scheduler

    def on_before_backward(self, loss: Tensor) -> None:
        """Give gradients memory of their own, where replays of a CUDA graph add up to them.

        Those of the first batch would else be the graph's, which the second overwrites.
        """
        if self._adds_up_replays:
            for optimizer in self.trainer.optimizers:
                for parameter in parameters_of(optimizer):
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Forget the gradients, and give back their memory where nothing adds up to them."""
        optimizer.zero_grad(set_to_none=not self._adds_up_replays)

    @property
    def _adds_up_replays(self) -> bool:
        return replays_graphs(self) and self.trainer.accumulate_grad_batches > 1

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the total norm, which tells also whether the step may be taken, or by value."""
        by_value = gradient_clip_algorithm == "value"
        self.gradient_norm = clip_or_skip(optimizer, None if by_value else gradient_clip_val)
        if by_value and gradient_clip_val:
            clip_grad_value_(parameters_of(optimizer), gradient_clip_val)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step timm's schedules by the number of updates."""
        scheduler.step_update(self.global_step)
