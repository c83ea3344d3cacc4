"""Checkpoint files that are whole or not there."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from nat_models.errors import RunStopped


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: a crash or a full disk leaves the file before."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            RunStopped: It could not be written; a file that was there before still is.
        """
        path = Path(path)
        temporary = path.with_name(
            f".{path.name}.part"
        )  # one name: the next save replaces a leftover
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise RunStopped(
                f"{path}: the checkpoint could not be written: {error}. The one before it is "
                "whole, if there was one: make room and continue from it"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint without running code from it, whatever `weights_only` says."""
        # Mapped: a host's processes share one copy. A save renames, so this file stays as it is.
        checkpoint: dict[str, Any] = torch.load(
            path, map_location=map_location, weights_only=True, mmap=True
        )
        return checkpoint


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
