"""A training run as its checkpoint tells it: which model, which data, which weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nat_models.checkpoints import CheckpointError, load_weights
from nat_models.data import ImageDataModule
from nat_models.engine.module import Classifier


@dataclass(frozen=True)
class TrainedRun:
    """The plain contents of a training checkpoint.

    Attributes:
        path: The file.
        hparams: Arguments of its `Classifier`.
        data_hparams: Arguments of its `ImageDataModule`.
        state_dict: Weights of its `Classifier`.
        progress: State of its `ImageDataModule`.
        steps: Number of its optimizer steps.
    """

    path: Path
    hparams: dict[str, Any]
    data_hparams: dict[str, Any]
    state_dict: dict[str, Any]
    progress: dict[str, Any] = field(default_factory=dict)
    steps: int = 0

    @property
    def epochs(self) -> int:
        """Number of its whole epochs."""
        epochs: int = self.progress.get("epoch", 0)
        return epochs

    @property
    def class_names(self) -> list[str] | None:
        """Names of its classes, None if the data had none."""
        return self.progress.get("class_names")

    @classmethod
    def read(cls, path: Path, weights: str = "averaged") -> "TrainedRun":
        """Read a checkpoint without running code from it.

        Args:
            path: The file.
            weights: "averaged" (EMA) if there are such, or "trained".

        Raises:
            CheckpointError: There is no such file, it is damaged, or not of a training run.
        """
        if not path.is_file():
            raise CheckpointError(path, "no such file (ckpt)")
        if weights not in ("averaged", "trained"):
            raise ValueError(f"weights={weights}: expected averaged or trained")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files fail in many ways
            reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
            raise CheckpointError(path, f"damaged, or not a checkpoint: {reason}") from error
        try:
            trained_weights = content.get("current_model_state", content["state_dict"])
            return cls(
                path=path,
                hparams=content["hyper_parameters"],
                data_hparams=content["datamodule_hyper_parameters"],
                state_dict=trained_weights if weights == "trained" else content["state_dict"],
                progress=content.get("ImageDataModule", {}),
                steps=content.get("global_step", 0),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                path, f"not the checkpoint of a training run: no {error}"
            ) from error

    def module(self, given: dict[str, Any]) -> Classifier:
        """The trained classifier.

        Args:
            given: Arguments of `build_model` asked for now; those that are set must be the
                checkpoint's, but for the attention backend.

        Raises:
            ValueError: They are of another model.
            CheckpointError: The weights do not fit.
        """
        self.check_same_model(given)
        backend = given.get("attention_backend")
        model = {**self.hparams["model"], "pretrained": False, "weights_of": None}
        model["attention_backend"] = backend
        module = Classifier(model=model, label_smoothing=self.hparams["label_smoothing"])
        load_weights(module, self.state_dict, self.path)
        return module

    def data(self, given: dict[str, Any]) -> ImageDataModule:
        """The data trained with, its arguments replaced where new ones are given."""
        ours = {**self.data_hparams, "augment": None, "mixup": None}
        if given.get("name", ours["name"]) != ours["name"]:  # these belong to the data set
            ours = {k: v for k, v in ours.items() if k not in ("root", "class_map", "options")}
        return ImageDataModule(**{**ours, **given})

    def check_same_model(self, given: dict[str, Any]) -> None:
        """Raise ValueError if a model is asked for that is not the checkpoint's."""
        ours = self.hparams["model"]
        for key in ("name", "num_classes"):
            if given.get(key) is not None and given[key] != ours[key]:
                raise ValueError(
                    f"model.{key}={given[key]}: the checkpoint {self.path} has {ours[key]}"
                )

    def check_length(self, epochs: int) -> None:
        """Raise ValueError if a run of so many epochs would end before the checkpoint."""
        if epochs < self.epochs:
            raise ValueError(f"trainer.max_epochs={epochs}: {self.path} has {self.epochs} already")

    def check_same_pace(self, now: dict[str, int]) -> None:
        """Raise ValueError if the steps, or within an epoch the batches, would be others.

        Args:
            now: `pace` of the data that the run is to go on with.
        """
        within = self.progress.get("batches_done", 0) > 0
        before = self.progress.get("pace", {})
        for key in now if within else ("images_a_step",):
            if before.get(key) != now[key]:
                place = "within an epoch" if within else "at the end of an epoch"
                raise ValueError(
                    f"ckpt={self.path}: saved {place}, with {before.get(key)} "
                    f"{key.replace('_', ' ')}, now {now[key]}; continue with {before}: "
                    "global_batch_size, data.batch_size times processes, data.num_workers"
                )
