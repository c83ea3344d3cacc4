"""Reading weights: safe loading of files, and published key layouts brought into this package's.

Known layouts, recognised by their keys:

- this package's own;
- the original code's, which downsamples at the end of a level and names the classifier `head`;
- Hugging Face transformers' `Nat` and `Dinat` classes;
- any of them under a prefix, as in detectors (`backbone.`) and training modules (`model.`).
"""

import re
from pathlib import Path

import torch
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models import load_state_dict
from torch import Tensor, nn

__all__ = [
    "CheckpointError",
    "checkpoint_filter_fn",
    "load_checkpoint",
    "load_weights",
    "read_checkpoint",
]

StateDict = dict[str, Tensor]

# Applied in order to every key of a transformers checkpoint; the result is the original layout.
_TRANSFORMERS_TO_ORIGINAL = [
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.", ""),
    (r"\.layers\.", ".blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]

_STEM = re.compile(r"(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.")
_NOT_OURS = re.compile(r"\.relative_position_index$|^norm\d+\.|^hidden_states_norms\.")


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model.

    Args:
        path: The file.
        reason: What is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint of any known layout into a model.

    Args:
        model: The model; unchanged if the checkpoint does not fit.
        path: A safetensors file, or one that `torch.save` wrote.

    Raises:
        CheckpointError: The file cannot be read, or its keys or shapes are not the model's.
    """
    load_weights(model, checkpoint_filter_fn(read_checkpoint(path), model), path)


def load_weights(model: nn.Module, state_dict: StateDict, path: str | Path) -> None:
    """Load a state dict whose keys are the model's own.

    Args:
        model: The model; unchanged if the state dict does not fit.
        state_dict: Tensors by key.
        path: The file that they come from, for the error.

    Raises:
        CheckpointError: The keys or shapes are not the model's.
    """
    if problems := _mismatches(state_dict, model.state_dict()):
        shown = "".join(f"\n  {problem}" for problem in problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(path, f"does not fit {type(model).__name__}:{shown}{more}")
    model.load_state_dict(state_dict)


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
        raise CheckpointError(path, "no such file")
    try:
        state_dict = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        size = path.stat().st_size
        raise CheckpointError(path, f"cannot be read ({size} bytes): {_reason(error)}") from error
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise CheckpointError(path, "holds no dictionary of tensors")
    return state_dict


def _reason(error: Exception) -> str:
    """First sentence of what went wrong, or the code that the file asks for."""
    cause = error.__cause__ or error
    if refused := re.search(r"GLOBAL (\S+)", str(cause)):
        return f"it would run code ({refused[1]}); save its tensors alone"
    return f"{type(cause).__name__}: {cause}".split("\n")[0].split(". ")[0]


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Bring a state dict of any known layout into the model's.

    Tables of relative positional biases are resized where the model's kernel size is another one.

    Args:
        state_dict: Tensors by key; not modified.
        model: The model to be loaded.

    Returns:
        A new state dict. Keys of no known layout are passed on as they are.
    """
    state_dict = _without_prefix(state_dict)
    if any(key.startswith("embeddings.patch_embeddings.") for key in state_dict):
        state_dict = _from_transformers(state_dict)
    state_dict = {key: value for key, value in state_dict.items() if not _NOT_OURS.search(key)}
    if "levels.0.downsample.reduction.weight" in state_dict:
        state_dict = {_from_original(key): value for key, value in state_dict.items()}
    return _with_resized_biases(state_dict, model)


def _without_prefix(state_dict: StateDict) -> StateDict:
    """Keep what lies under the prefix of the stem's keys, and a classifier beside it."""
    match = next((match for key in state_dict if (match := _STEM.search(key))), None)
    prefix = match.string[: match.start()] if match else ""
    return {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith((prefix, "classifier."))
    }


def _from_transformers(state_dict: StateDict) -> StateDict:
    """Rename to the original layout, join query, key and value, split the layer scales."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in _TRANSFORMERS_TO_ORIGINAL:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value

    original = {}
    for key, value in renamed.items():
        if key.endswith(".layer_scale_parameters"):
            block = key.removesuffix("layer_scale_parameters")
            original[f"{block}gamma1"], original[f"{block}gamma2"] = value
        elif match := re.fullmatch(r"(.*\.attn\.)(query|key|value)(\.\w+)", key):
            attn, _, leaf = match.groups()
            parts = [renamed[f"{attn}{part}{leaf}"] for part in ("query", "key", "value")]
            original[f"{attn}qkv{leaf}"] = torch.cat(parts)
        else:
            original[key] = value
    return original


def _from_original(key: str) -> str:
    """Rename a key of the original layout: a downsampler moves to the start of the next level."""
    key = re.sub(
        r"^levels\.(\d+)\.downsample\.", lambda m: f"levels.{int(m[1]) + 1}.downsample.", key
    )
    key = re.sub(r"\.gamma([12])$", r".ls\1.gamma", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


def _with_resized_biases(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Resize the bias tables bicubically where the model's kernel size is another one."""
    parameters = dict(model.named_parameters())
    resized = {}
    for key, value in state_dict.items():
        if key.endswith(".rpb") and key in parameters and value.ndim == 3:
            shape = parameters[key].shape
            kernel_size = ((shape[1] + 1) // 2, (shape[2] + 1) // 2)
            value = resize_rel_pos_bias_table_simple(value, kernel_size, shape)
        resized[key] = value
    return resized


def _mismatches(state_dict: StateDict, expected: StateDict) -> list[str]:
    """Describe every key that is missing, unexpected or of another shape."""
    given = {key: list(value.shape) for key, value in state_dict.items()}
    wanted = {key: list(value.shape) for key, value in expected.items()}
    return [
        *(
            f"{key} has shape {given[key]}, the model's {shape}"
            for key, shape in wanted.items()
            if given.get(key, shape) != shape
        ),
        *(f"{key} {shape} is missing" for key, shape in wanted.items() if key not in given),
        *(f"{key} {shape} is not the model's" for key, shape in given.items() if key not in wanted),
    ]
