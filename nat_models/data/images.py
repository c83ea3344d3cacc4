"""From what a data set holds to tensors: decoding, colour modes, and images that cannot be read."""

import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.loader import fast_collate
from torch import Tensor
from torch.utils.data import Dataset

from nat_models.errors import RunStopped

_log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
# Image, class, what went wrong (it travels to the first process), and the index.
Sample = tuple[Tensor | None, int, list[str], int]
ON_ERROR = ("raise", "skip")
MAX_TRIES = 10


def decode(image: bytes | Image.Image, mode: str) -> Image.Image:
    """Decode an encoded image and bring it to a colour mode.

    Args:
        image: Encoded, or as PIL has it.
        mode: "RGB" or "L" (grey).
    """
    picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    picture.load()  # PIL would else read the pixels, and fail, in the transform
    if picture.mode.startswith("I"):  # 16 bits, which PIL would clip to 8
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    return picture if picture.mode == mode else picture.convert(mode)


class DecodedDataset(Dataset[Any]):
    """Tensors from the images of another data set.

    An image that cannot be read gives way to the next one in training, and to nothing in
    evaluation.

    Args:
        source: Data set of (image or its bytes, class index).
        transform: PIL image to tensor.
        mode: Colour mode that the transform expects, see `decode`.
        training: Which of the two.
    """

    def __init__(
        self,
        source: Dataset[Any],
        transform: Callable[[Image.Image], Tensor],
        mode: str,
        training: bool,
    ) -> None:
        self.source = source
        self.transform = transform
        self.mode = mode
        self.training = training

    def __getitem__(self, index: int) -> Sample:
        errors: list[str] = []
        asked = index
        for _ in range(MAX_TRIES if self.training else 1):
            try:
                image, target = self.source[index]
                picture = decode(image, self.mode)
            except Exception as error:  # decoders fail in many ways
                errors.append(f"{self._name(index)}: {error}")
                index = (index + 1) % len(self)
            else:
                return self.transform(picture), target, errors, asked
        return None, -1, errors, asked

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def _name(self, index: int) -> str:
        try:
            return str(self.source.filename(index, absolute=True))  # type: ignore[attr-defined]
        except AttributeError:
            return f"image {index}"


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str], Tensor]:
    """uint8 images [B, C, H, W], class indices [B], what could not be read, and indices [B]."""
    errors = [error for sample in samples for error in sample[2]]
    whole = [sample for sample in samples if sample[0] is not None]
    indices = torch.tensor([sample[3] for sample in whole], dtype=torch.int64)
    if not whole:
        none = torch.empty(0, 1, 1, 1, dtype=torch.uint8)
        return none, torch.empty(0, dtype=torch.int64), errors, indices
    images, targets = fast_collate([sample[:2] for sample in whole])
    return images, targets, errors, indices


class Complaints:
    """Raises or counts what could not be read.

    Args:
        on_error: "raise", or "skip" to count and go on.
    """

    def __init__(self, on_error: str) -> None:
        if on_error not in ON_ERROR:
            raise ValueError(f"data.on_error={on_error}: expected one of {ON_ERROR}")
        self.on_error = on_error
        self.count = 0

    def __call__(self, errors: list[str]) -> None:
        """Take the errors of a batch.

        Raises:
            RunStopped: There are some, and they are not to be skipped.
        """
        for error in errors:
            self.count += 1
            if self.on_error == "raise":
                raise RunStopped(f"{error} (data.on_error=skip leaves such images out)")
            _log.warning("skipped an image, %d so far: %s", self.count, error)
