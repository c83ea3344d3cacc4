"""Copying to a GPU beside its work."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader


class DevicePrefetcher:
    """A loader whose images are on a GPU when they are asked for.

    While a batch is worked on, the next one is copied, and laid out in memory as the model takes
    it, in a stream of its own. (timm's loader of that kind takes pairs alone, and normalises and
    erases before our random generators are seeded.)

    Args:
        loader: Gives batches whose first part is the images, in pinned memory.
        device: The GPU.
        channels_last: Whether the model takes images so.
    """

    def __init__(
        self, loader: DataLoader[Any], device: torch.device, channels_last: bool = False
    ) -> None:
        self.loader = loader
        self.sampler = loader.sampler  # Lightning tells it the epoch
        self.batch_sampler = loader.batch_sampler  # in evaluation Lightning looks for it
        self.device = device
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def _iterator(self) -> Any:
        """By this Lightning ends the workers."""
        return self.loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: None) -> None:
        self.loader._iterator = iterator

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        copying = torch.cuda.Stream(self.device)
        waiting: Any = None
        for images, *rest in self.loader:
            with torch.cuda.stream(copying):
                images = images.to(self.device, non_blocking=True)
                images = images.contiguous(memory_format=self.layout)
            copied = copying.record_event()
            if waiting is not None:
                yield self._received(*waiting)
            waiting = images, rest, copied
        if waiting is not None:
            yield self._received(*waiting)

    def _received(self, images: torch.Tensor, rest: list[Any], copied: torch.cuda.Event) -> Any:
        working = torch.cuda.current_stream(self.device)
        working.wait_event(copied)
        images.record_stream(working)  # its memory must not be given away before the work is done
        return images, *rest
