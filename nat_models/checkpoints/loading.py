"""Loading weights of any known layout into a model, and saying why they do not fit."""

from pathlib import Path
from typing import Any

from timm.layers import resize_rel_pos_bias_table_simple
from torch import Size, Tensor, nn

from nat_models.checkpoints.files import CheckpointError, StateDict, read_checkpoint
from nat_models.checkpoints.layouts import to_ours

# What a file may hold that the model was created without.
_OPTIONAL = ("stage_norms.", "head.")


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint of any known layout into a model.

    Args:
        model: The model; unchanged if the checkpoint does not fit.
        path: A safetensors file, or one that `torch.save` wrote.

    Raises:
        CheckpointError: The file cannot be read, or its keys or shapes are not the model's.
    """
    state_dict = read_checkpoint(path)
    try:
        state_dict = checkpoint_filter_fn(state_dict, model)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error
    load_weights(model, state_dict, path)


def load_weights(model: nn.Module, state_dict: StateDict, path: str | Path) -> None:
    """Load a state dict whose keys are the model's own.

    Args:
        model: The model; unchanged if the state dict does not fit.
        state_dict: Tensors by key.
        path: The file that they come from, for the error.

    Raises:
        CheckpointError: The keys or shapes are not the model's.
    """
    if problems := mismatches(state_dict, model.state_dict()):
        raise CheckpointError(path, f"does not fit {type(model).__name__}:{shown(problems)}")
    model.load_state_dict(state_dict)


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Bring a state dict of any known layout into the model's.

    Tables of relative positional biases are resized where the model's kernel size is another one.
    A classifier and norms of the levels' outputs are left out if the model has none.

    Args:
        state_dict: Tensors by key; not modified.
        model: The model to be loaded.

    Returns:
        A new state dict. Keys of no known layout are passed on as they are.

    Raises:
        ValueError: The state dict holds several models.
    """
    wanted = model.state_dict(keep_vars=True)
    return {
        key: _resized(value, wanted[key].shape) if key.endswith(".rpb") and key in wanted else value
        for key, value in to_ours(state_dict).items()
        if key in wanted or not key.startswith(_OPTIONAL)
    }


def pretrained_filter_fn(state_dict: StateDict, model: Any) -> StateDict:
    """As `checkpoint_filter_fn`, for timm's `pretrained=True`; it refuses what fits in part only.

    timm itself would load the part, where it adapts the weights to other classes or to features.

    Args:
        state_dict: Tensors by key; not modified.
        model: The model to be loaded, with its `pretrained_cfg`.

    Returns:
        A new state dict. A detector's has no classifier and no norm before it.

    Raises:
        CheckpointError: Keys or shapes are not the model's, those aside that timm adapts: the
            classifier's and the image's channels.
    """
    cfg = model.pretrained_cfg
    source = next((cfg[key] for key in ("file", "hf_hub_id", "url") if key in cfg), "")
    if "state_dict" in cfg:
        source = "pretrained_cfg's state_dict"
    try:
        ours = checkpoint_filter_fn(state_dict, model)
    except ValueError as error:
        raise CheckpointError(source, str(error)) from error
    body = {key: value for key, value in ours.items() if not key.startswith("head.")}
    wanted = {
        key: value
        for key, value in model.state_dict().items()
        if key in body or not key.startswith((*_OPTIONAL, "norm."))
    }
    stem = f"{cfg['first_conv']}.weight"
    if stem in body and body[stem].ndim == 4:
        wanted[stem] = wanted[stem][:, :1].expand(-1, body[stem].shape[1], -1, -1)
    if problems := mismatches(body, wanted):
        raise CheckpointError(source, f"does not fit {type(model).__name__}:{shown(problems)}")
    return ours


def convert_before_loading(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Let `model.load_state_dict` take every known layout.

    A hook for `Module.register_load_state_dict_pre_hook`. timm loads what `create_model`'s
    `checkpoint_path` and its scripts' `--checkpoint` name without any filter.

    Raises:
        ValueError: The state dict holds several models.
    """
    given = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    ours = checkpoint_filter_fn(
        {key.removeprefix(prefix): value for key, value in given.items()}, model
    )
    state_dict.update({prefix + key: value for key, value in ours.items()})


def mismatches(state_dict: StateDict, expected: StateDict) -> list[str]:
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


def shown(problems: list[str], most: int = 5) -> str:
    """The first of them, one a line."""
    more = f"\n  and {len(problems) - most} more" if len(problems) > most else ""
    return "".join(f"\n  {problem}" for problem in problems[:most]) + more


def _resized(table: Tensor, shape: Size) -> Tensor:
    """Resize a bias table bicubically, as the original did for larger kernels."""
    if table.ndim != 3 or table.shape[0] != shape[0] or not table.is_floating_point():
        return table  # not one for this many heads: a mismatch
    kernel_size = ((shape[1] + 1) // 2, (shape[2] + 1) // 2)
    resized: Tensor = resize_rel_pos_bias_table_simple(table, kernel_size, shape)
    return resized
