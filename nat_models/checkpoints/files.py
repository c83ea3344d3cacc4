"""Files of tensors, read without running any code from them and written whole or not at all."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from timm.models import load_state_dict
from torch import Tensor

StateDict = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model.

    Args:
        path: The file.
        reason: What is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


def read_checkpoint(path: str | Path) -> StateDict:
    """Read the tensors of a checkpoint file to the CPU, without running any code from it.

    Of a training checkpoint only the model's weights are returned, the averaged ones (EMA) if it
    has them.

    Args:
        path: A safetensors file, or one that `torch.save` wrote.

    Raises:
        CheckpointError: There is no such file, or it is damaged, or it holds more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(path, "a folder, not a file" if path.is_dir() else "no such file")
    try:
        state_dict = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        size = path.stat().st_size
        raise CheckpointError(path, f"cannot be read ({size} bytes): {_reason(error)}") from error
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise CheckpointError(path, "holds no dictionary of tensors")
    return state_dict


def write_safetensors(state_dict: StateDict, path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and a header of strings; a failure leaves the file that was there before.

    Args:
        state_dict: Tensors by key; they may be views of each other.
        path: The file; its folder is made.
        metadata: Entries of the header.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        own = {key: value.contiguous().clone() for key, value in state_dict.items()}
        save_file(own, temporary, {"format": "pt", **metadata})  # transformers asks for the format
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """First sentence of what went wrong, or the code that the file asks for."""
    cause = error.__cause__ or error
    if refused := re.search(r"GLOBAL (\S+)", str(cause)):
        return f"it would run code ({refused[1]}); save its tensors alone"
    return f"{type(cause).__name__}: {cause}".split("\n")[0].split(". ")[0]
