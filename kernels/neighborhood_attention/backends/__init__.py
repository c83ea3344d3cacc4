"""The implementations of the operators, and the choice among them.

A backend is a module with three functions of `Inputs`:

    supports(inputs, window) -> str | None
        Why it cannot run this problem, or None when it can.
    forward(inputs, window, scale) -> (output, lse)
        [B, *spatial, heads, D_v] in the inputs' dtype and [B, *spatial, heads] in fp32 (fp64 for
        fp64), both contiguous.
    backward(grad_output, grad_lse, inputs, output, lse, window, scale, gradients) -> None
        Fills `gradients`, `Inputs` of buffers shaped as the inputs. Those of query, key and value
        are always there and may be strided views of a packed gradient. Those of rpb, and of both
        additional tensors, are None without such an input or a need of its gradient. `grad_lse` may
        be None; `grad_output` may have any strides.

One that can be faster without views of the parts has a fourth:

    forward_packed(qkv, rpb, window, scale) -> (output, lse)
        As `forward` of the parts of `qkv` [B, *spatial, 3, heads, D].
"""

import importlib
import logging
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from neighborhood_attention.geometry import Neighborhood

# In the order of preference on a GPU.
BACKENDS = {
    "fused": "neighborhood_attention.backends.triton.fused",
    "reference": "neighborhood_attention.backends.reference",
    # Baselines, never chosen by themselves.
    "naive": "neighborhood_attention.backends.triton.naive",
    "gemm": "neighborhood_attention.backends.triton.gemm",
}


class Inputs(NamedTuple):
    """The tensors of a problem; of any strides, all but `rpb` in one dtype.

    Query head h uses key head h // (heads // key_heads): one key head for several query heads is
    grouped-query attention (arXiv 2305.13245), a single one multi-query attention (arXiv
    1911.02150). Every query sees the S additional keys, unmasked and without a bias, in the same
    softmax with the same scale.
    """

    query: Tensor  # [B, *spatial, heads, D]
    key: Tensor  # [B, *spatial, key_heads, D]; key_heads divides heads
    value: Tensor  # [B, *spatial, key_heads, D_v]
    rpb: Tensor | None = None  # [heads, *(2 * kernel_size - 1)], any floating dtype
    additional_keys: Tensor | None = None  # [B, S, key_heads, D], S may be 0
    additional_values: Tensor | None = None  # [B, S, key_heads, D_v], where there are keys


_log = logging.getLogger("neighborhood_attention")


def check_name(backend: str | None) -> None:
    """Raise unless `backend` is None or the name of a backend."""
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise ValueError(f"{backend=}: expected None or one of {sorted(BACKENDS)}")


def resolve_backend(device_type: str) -> str:
    """The backend that `backend=None` prefers on a type of device ("cpu", "cuda").

    Raises:
        ValueError: PyTorch knows no such type.
    """
    if device_type == "cuda":
        return "fused"
    try:
        is_type = torch.device(device_type).type == device_type
    except (RuntimeError, TypeError):
        is_type = False
    if not is_type:
        raise ValueError(f"{device_type=}: expected a type of device as 'cpu' or 'cuda'")
    return "reference"


def choose(backend: str | None, inputs: Inputs, window: Neighborhood) -> ModuleType:
    """The module that runs this problem.

    Raises:
        ValueError: No backend has this name.
        NotImplementedError: The backend asked for cannot run the problem.
    """
    name = resolve_backend(inputs.query.device.type) if backend is None else backend
    try:
        module = load(name)
        reason = module.supports(inputs, window)
    except ModuleNotFoundError as error:
        reason = f"needs the package {error.name}, which is not installed"
    if reason is None:
        return module
    if backend is not None:
        raise NotImplementedError(f"{backend=} {reason}")
    _log_fallback(name, reason)
    return load("reference")


@cache
def load(name: str) -> ModuleType:
    """The backend's module; Triton is imported here, on its first use."""
    check_name(name)
    return importlib.import_module(BACKENDS[name])


@cache
def _log_fallback(name: str, reason: str) -> None:
    _log.info("backend 'reference' is used: %r %s", name, reason)


__all__ = ["BACKENDS", "Inputs", "check_name", "choose", "load", "resolve_backend"]
