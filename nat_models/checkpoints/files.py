"""Files of tensors, read without running any code from them and written whole or not at all."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
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


def write_checkpoint(state_dict: StateDict, path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors to a file; a failure leaves the file that was there before.

    Args:
        state_dict: Tensors by key; they may be views of each other.
        path: The file, whose folder is made; of `torch.save` unless it ends in ".safetensors".
        metadata: Entries of a safetensors file's header; other files have none.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {key: value.contiguous().clone() for key, value in state_dict.items()}
    try:
        if path.suffix == ".safetensors":
            # `save_file` would let its owner alone read it; transformers asks for the format.
            temporary.write_bytes(save(own, {"format": "pt", **metadata}))
        else:
            torch.save(own, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    """First sentence of what went wrong, or the code that the file asks for."""
    cause = error.__cause__ or error
    if refused := re.search(r"GLOBAL (\S+)", str(cause)):
        return f"it would run code ({refused[1]}); save its tensors alone"
    return f"{type(cause).__name__}: {cause}".split("\n")[0].split(". ")[0]
