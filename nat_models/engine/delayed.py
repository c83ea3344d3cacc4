"""Reading values of a device without waiting for it."""

from typing import Any

import torch
from torch import Tensor


class Delayed:
    """Hands out small tensors one call late on a GPU, so that the host never waits for the device.

    On the CPU there is nothing to wait for, and no delay.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, torch.cuda.Event, Any] | None = None

    def exchange(self, value: Tensor, about: Any = None) -> tuple[Tensor, Any] | None:
        """Send a value and get the one before.

        Args:
            value: Small tensor on any device.
            about: Anything, handed out together with the value.

        Returns:
            A value on the CPU and what was said about it; None if there was none before.
        """
        if not value.is_cuda:
            return value, about
        received = self.drain()
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent = host, event, about
        return received

    def drain(self) -> tuple[Tensor, Any] | None:
        """Get what was sent last, without sending anything."""
        if self._sent is None:
            return None
        host, event, about = self._sent
        self._sent = None
        event.synchronize()  # a step old: done, or nearly
        return host, about
