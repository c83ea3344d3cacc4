"""Where operations run fused: where that was measured to be the faster, or where `using` says."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

Operation = Literal["add_layer_norm", "mlp", "small_linear"]

# Below these a launch costs the host more than the GPU gains (benchmarks/NOTES.md).
MIN_ROWS = 2**13  # of add_layer_norm: the GPU gains 1 ns a row
MIN_HIDDEN = 2**25  # elements between an MLP's layers: the GPU gains 1 ps an element
MAX_SMALL = 2**19  # elements of a map whose layers are small: by estimate

_HALF = torch.bfloat16, torch.float16
_DTYPES = *_HALF, torch.float32
_MAX_CHANNELS = 4096  # a row is kept in registers
_MAX_SMALL_CHANNELS = 1024  # the same, beside a block of the weight
_chosen: frozenset[str] | None = None


@contextmanager
def using(*operations: Operation) -> Iterator[None]:
    """Run these operations fused wherever there are kernels for it, and no others.

    Without it they run fused on a GPU of the measured kind, where the tensors are large enough;
    norms in compiled code only before layers where gradients are enabled, and of few tokens in 16
    bits where they are not, since PyTorch's compiler makes about the same of others. Code compiled
    under one choice is compiled again under another.

    Args:
        operations: "add_layer_norm" (also alone, without an addition), "mlp" and "small_linear".
    """
    global _chosen
    before, _chosen = _chosen, frozenset(operations)
    try:
        yield
    finally:
        _chosen = before


def norm_is_used(x: Tensor, with_layers: bool = False) -> bool:
    """Whether `layer_norm` and `add_layer_norm` take a tensor [..., C].

    Args:
        x: The tensor.
        with_layers: Whether linear layers take the norm, in `add_norm_linear` and `add_norm_mlp`:
            then training keeps less than PyTorch's compiler would.
    """
    return (
        _is_plain(x)
        and not _is_observed()
        and x.shape[-1] <= _MAX_CHANNELS
        and x.dtype in _DTYPES
        and (
            "add_layer_norm" in _chosen
            if _chosen is not None
            else _is_measured(x) and _norm_pays(x, with_layers)
        )
        and _has_kernels(x.device, 8)
    )


def _norm_pays(x: Tensor, with_layers: bool) -> bool:
    if not torch.compiler.is_compiling() or (with_layers and torch.is_grad_enabled()):
        return x.numel() >= MIN_ROWS * x.shape[-1]
    # PyTorch's compiler takes two kernels and 14 us for the norm of one image's stem.
    few = x.dtype in _HALF and x.numel() <= MAX_SMALL
    return few and not with_layers and not torch.is_grad_enabled()


def mlp_is_used(x: Tensor, weight1: Tensor, weight2: Tensor) -> bool:
    """Whether `mlp` takes a tensor [..., K] and weights [N, K] and [M, N]."""
    return (
        _is_plain(x)
        and not _is_observed()
        and (
            "mlp" in _chosen
            if _chosen is not None
            else _is_measured(x) and x.numel() * weight1.shape[0] >= MIN_HIDDEN * x.shape[-1]
        )
        and _has_kernels(x.device, 9)
        and _fits(x, weight1, weight2)
    )


def small_linear_is_used(x: Tensor) -> bool:
    """Whether `small_linear` takes a map [..., C] and what a block makes of it, if its weights fit.

    Its weights are to have the map's dtype, and multiples of 16 channels.
    """
    return (
        not torch.is_grad_enabled()
        and _is_plain(x)
        and not _is_observed()
        and x.dtype in _HALF
        and x.shape[-1] % 16 == 0
        and x.shape[-1] <= _MAX_SMALL_CHANNELS
        and (
            "small_linear" in _chosen
            if _chosen is not None
            else _is_measured(x) and x.numel() <= MAX_SMALL
        )
        and _has_kernels(x.device, 9)
        and autocast_dtype(x) in (None, x.dtype)
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would cast a linear layer's arguments to; None if it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _is_plain(x: Tensor) -> bool:
    """Not a symbol of torch.fx, nor a tensor that is not one piece of a GPU's memory."""
    return type(x) in (Tensor, torch.nn.Parameter)


def _is_measured(x: Tensor) -> bool:
    return x.is_cuda and _is_hopper(x.device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: torch.device, generation: int) -> bool:
    """Products need the descriptors and the shared memory of H100 or B200."""
    major, _ = _capability(device)
    return major >= 8 if generation == 8 else major in (9, 10)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_hopper(device: torch.device) -> bool:
    return _capability(device) == (9, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) for what is no GPU of NVIDIA, or without Triton."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def _is_observed() -> bool:
    """Whether something looks inside, for which there are no rules here."""
    return (
        torch.jit.is_tracing()
        or torch.compiler._is_exporting_flag  # is_exporting() is True for all that 2.11 compiles
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or bool(_has_any_global_hook())  # of all modules: each must be called
    )


def _fits(x: Tensor, *weights: Tensor) -> bool:
    cast = autocast_dtype(x)
    dtypes = {x.dtype, *(w.dtype for w in weights)} if cast is None else {cast}
    return (
        len(dtypes) == 1
        and dtypes <= {*_HALF}
        and all(size % 16 == 0 for weight in weights for size in weight.shape)
    )
