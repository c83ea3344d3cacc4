"""What a model said of each image of an evaluation."""

from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

TOP = 5


class Predictions(Callback):
    """Keeps index, label, and the most probable classes of every image."""

    def __init__(self) -> None:
        self._rows: list[dict[str, torch.Tensor]] = []
        self._table: dict[str, Any] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._rows = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch, on the device."""
        probabilities, classes = outputs.float().softmax(-1).topk(min(TOP, outputs.shape[-1]))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows = {"index": data.indices, "label": batch[1]}
        self._rows.append({**rows, "classes": classes, "probabilities": probabilities})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the images of all processes, in the order of the data set."""
        keys = ("index", "label", "classes", "probabilities")
        ours = {
            key: torch.cat([row[key] for row in self._rows]).cpu().numpy() if self._rows else None
            for key in keys
        }
        parts: list[Any] = [ours]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, ours)
        whole = [part for part in parts if part["index"] is not None]
        table = {key: np.concatenate([part[key] for part in whole]) for key in keys}
        order = np.argsort(table["index"], kind="stable")
        self._table = {key: value[order] for key, value in table.items()}

    def table(self) -> dict[str, Any]:
        """Columns of the last evaluation: index and label [N], classes and probabilities [N, 5]."""
        return self._table
