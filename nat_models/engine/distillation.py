"""Training with a teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nat_models.engine.building import build_model
from nat_models.engine.module import Classifier


class Distiller(Classifier):
    """A classifier that also learns the logits of a frozen teacher (arXiv 1503.02531).

    The loss is (1 - w) CE(student, targets) + w T^2 KL(teacher / T, student / T).

    Args:
        teacher: Arguments of `build_model`; its classes are the student's.
        distillation_weight: w, from 0 to 1.
        temperature: T, above 0.
        **arguments: Those of `Classifier`.
    """

    def __init__(
        self,
        teacher: Mapping[str, Any],
        distillation_weight: float,
        temperature: float,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.save_hyperparameters()
        if not 0 <= distillation_weight <= 1:
            raise ValueError(
                f"task.distillation_weight={distillation_weight}: expected a number from 0 to 1"
            )
        if not temperature > 0:
            raise ValueError(f"task.temperature={temperature}: expected more than 0")
        self.distillation_weight = distillation_weight
        self.temperature = temperature
        arguments = {"num_classes": self.model.num_classes, **teacher}
        model = build_model(**arguments, key="task.teacher")
        for key in ("num_classes", "in_chans"):
            ours, theirs = (getattr(m, key, None) for m in (self.model, model))
            if ours != theirs:
                raise ValueError(
                    f"task.teacher.name={teacher['name']}: has {key} {theirs}, the student {ours}"
                )
        # In a list: neither optimized, nor averaged, nor saved.
        self._teacher = [model.requires_grad_(False).eval()]
        self._teachers_view: list[Tensor] = []

    def on_fit_start(self) -> None:
        """Put the teacher on the device too, and see to it that it gets images as it knows them."""
        [teacher] = self._teacher
        teacher.to(self.device)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        view = renormalisation(data.config, teacher.pretrained_cfg)
        self._teachers_view = [t.to(self.device) for t in view]

    def loss(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean of the weighted sum of both parts."""
        [teacher] = self._teacher
        with torch.no_grad():
            if self._teachers_view:
                scale, shift = self._teachers_view
                images = images * scale + shift
            wanted = (teacher(images) / self.temperature).log_softmax(-1)
        given = (logits / self.temperature).log_softmax(-1)
        imitation = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        own = super().loss(images, logits, targets)
        w = self.distillation_weight
        return (1 - w) * own + w * self.temperature**2 * imitation


def renormalisation(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Tensor]:
    """Factor and summand [C, 1, 1] from one `mean` and `std` to others; none if they are equal."""
    mean, std, teachers_mean, teachers_std = (
        torch.tensor(normalisation[name]).view(-1, 1, 1)
        for normalisation in (given, wanted)
        for name in ("mean", "std")
    )
    if mean.equal(teachers_mean) and std.equal(teachers_std):
        return []
    return [std / teachers_std, (mean - teachers_mean) / teachers_std]
