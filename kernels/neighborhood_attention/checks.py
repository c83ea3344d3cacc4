"""Arguments of the public functions: an error names the argument, its value and the rule.

They run at each call, so what is right takes the short way through them.
"""

from collections.abc import Sequence
from functools import lru_cache
from sys import float_info
from typing import Any, TypeVar

import torch
from torch import SymFloat, Tensor

from neighborhood_attention.geometry import Neighborhood

T = TypeVar("T", int, bool)

SPATIAL = {1: "L", 2: "H, W", 3: "D, H, W"}
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def per_axis(name: str, value: T | Sequence[T], dims: int, kind: type[T]) -> tuple[T, ...]:
    """`value` for each of `dims` axes: a single one counts for all of them."""
    if type(value) is kind:
        return (value,) * dims
    if not isinstance(value, (tuple, list)) or any(type(v) is not kind for v in value):
        raise TypeError(f"{name}={value!r}: expected {kind.__name__} or a tuple of {dims} of them")
    if len(value) != dims:
        raise ValueError(f"{name}={value!r}: expected {dims} entries, one for each spatial axis")
    return tuple(value)


def make_neighborhood(
    dims: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> Neighborhood:
    """The checked window of `dims` axes."""
    # TorchDynamo warns of caches, and needs none.
    make = _neighborhood if torch.compiler.is_compiling() else _cached_neighborhood
    return make(
        per_axis("kernel_size", kernel_size, dims, int),
        per_axis("stride", stride, dims, int),
        per_axis("dilation", dilation, dims, int),
        per_axis("is_causal", is_causal, dims, bool),
    )


def _neighborhood(
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
) -> Neighborhood:
    if min(kernel_size) < 1:
        raise ValueError(f"{kernel_size=}: expected at least 1 on every axis")
    if min(dilation) < 1:
        raise ValueError(f"{dilation=}: expected at least 1 on every axis")
    if not all(1 <= s <= k for s, k in zip(stride, kernel_size, strict=True)):
        raise ValueError(f"{stride=}: expected 1 <= stride <= {kernel_size=}")
    return Neighborhood(kernel_size, stride, dilation, is_causal)


_cached_neighborhood = lru_cache(maxsize=1024)(_neighborhood)


def check_fits(window: Neighborhood, spatial: Sequence[int]) -> None:
    """Each dilated window must fit into its axis."""
    for axis, extent in enumerate(window.extent):
        if extent > spatial[axis]:
            raise ValueError(
                f"kernel_size={window.kernel_size} with dilation={window.dilation}: spans {extent} "
                f"tokens of axis {axis}, expected at most the input's {spatial[axis]}; it is read "
                f"as [B, {SPATIAL[window.dims]}, heads, D] with axes {tuple(spatial)}"
            )


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors, under autocast those of fewer than 64 bits in its dtype."""
    first = tensors[0]
    device = "cuda" if isinstance(first, Tensor) and first.is_cuda else "cpu"
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in narrow else x for x in tensors)


def check_tensor(name: str, tensor: Tensor) -> None:
    """`tensor` must be one of a floating dtype that is supported."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected fp16, bf16, fp32 or fp64, got {tensor.dtype}")


def check_heads_last(name: str, tensor: Tensor, dims: int) -> None:
    """`tensor` must be [B, *spatial, heads, D]."""
    check_tensor(name, tensor)
    shape = tensor.shape
    if len(shape) != dims + 3:
        raise ValueError(
            f"{name}: expected [B, {SPATIAL[dims]}, heads, D], got shape {tuple(shape)}"
        )
    check_heads(name, tensor)


def check_heads(name: str, tensor: Tensor) -> None:
    """`tensor` must have a head and a head dimension."""
    shape = tensor.shape
    if shape[-2] < 1 or shape[-1] < 1:
        raise ValueError(f"{name}: expected a head and a head dimension, got shape {tuple(shape)}")


def check_key(query: Tensor, key: Tensor) -> None:
    """The key must be as the query; its heads may be fewer."""
    if isinstance(key, Tensor) and key.shape == query.shape:
        return _check_like_query("key", key, query)
    check_heads_last("key", key, query.dim() - 3)
    *rows, heads, size = query.shape
    if key.shape[:-2] != query.shape[:-2] or key.shape[-1] != size:
        raise ValueError(
            f"key: expected query's shape {_shape((*rows, 'key_heads', size))}, "
            f"got {tuple(key.shape)}"
        )
    if heads % key.shape[-2]:
        raise ValueError(
            f"key: expected a number of heads that divides query's {heads}, "
            f"got shape {tuple(key.shape)}"
        )
    return _check_like_query("key", key, query)


def check_value(query: Tensor, key: Tensor, value: Tensor) -> None:
    """The value must be as the key; its head dimension may differ."""
    if isinstance(value, Tensor) and value.shape == key.shape:
        return _check_like_query("value", value, query)
    check_heads_last("value", value, query.dim() - 3)
    if value.shape[:-1] != key.shape[:-1]:
        like = _shape((*key.shape[:-1], "D_v"))
        raise ValueError(f"value: expected key's shape {like}, got {tuple(value.shape)}")
    return _check_like_query("value", value, query)


def check_additional(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, values: Tensor | None
) -> None:
    """Additional keys and values come together: [B, S, key_heads, D] and [B, S, key_heads, D_v]."""
    count = None
    for name, tensor, like in (("keys", keys, key), ("values", values, value)):
        name = f"additional_{name}"
        if tensor is None:
            raise ValueError(f"{name}=None: expected both additional_keys and additional_values")
        check_tensor(name, tensor)
        batch, *_, heads, size = like.shape
        count = tensor.shape[1] if count is None and tensor.dim() == 4 else count
        if tuple(tensor.shape) != (batch, count, heads, size):
            expected = (batch, "S" if name == "additional_keys" else count, heads, size)
            raise ValueError(
                f"{name}: expected shape {_shape(expected)}, got {tuple(tensor.shape)}"
            )
        _check_like_query(name, tensor, query)


def check_dims(name: str, tensor: Tensor) -> int:
    """The number of spatial axes of a tensor that may have one to three."""
    check_tensor(name, tensor)
    dims = tensor.dim() - 3
    if dims not in SPATIAL:
        raise ValueError(
            f"{name}: expected [B, L, heads, D], [B, H, W, heads, D] or [B, D, H, W, heads, D], "
            f"got shape {tuple(tensor.shape)}"
        )
    return dims


def check_probabilities(probabilities: Tensor, value: Tensor, window: Neighborhood) -> None:
    """Probabilities must be [B, *spatial, heads, K]; value's heads may be fewer."""
    check_tensor("probabilities", probabilities)
    *rows, key_heads, _ = value.shape
    shape = probabilities.shape
    if len(shape) != value.dim() or (*shape[:-2], shape[-1]) != (*rows, window.size):
        raise ValueError(
            f"probabilities: expected shape {_shape((*rows, 'heads', window.size))}, "
            f"got {tuple(shape)}"
        )
    if shape[-2] < 1 or shape[-2] % key_heads:
        raise ValueError(
            f"probabilities: expected a number of heads that value's {key_heads} divide, "
            f"got shape {tuple(shape)}"
        )
    if probabilities.device != value.device:
        raise ValueError(
            f"probabilities: expected value's device {value.device}, got {probabilities.device}"
        )


def check_bias(rpb: Tensor, query: Tensor, window: Neighborhood) -> None:
    """The relative positional bias must be [heads, 2 * kernel_size - 1, ...]."""
    check_tensor("rpb", rpb)
    expected = (query.shape[-2], *window.bias_shape)
    if rpb.shape != expected:
        raise ValueError(
            "rpb: expected shape (heads, 2 * kernel_size - 1, ...) = "
            f"{expected}, got {tuple(rpb.shape)}"
        )
    if rpb.device != query.device:
        raise ValueError(f"rpb: expected query's device {query.device}, got {rpb.device}")


def check_position(name: str, position: Sequence[int], spatial: Sequence[int]) -> None:
    """A token of the map: one index an axis."""
    if isinstance(position, int):
        raise TypeError(f"{name}={position!r}: expected a tuple of {len(spatial)} ints")
    indices = per_axis(name, position, len(spatial), int)
    if not all(0 <= i < size for i, size in zip(indices, spatial, strict=True)):
        raise ValueError(f"{name}={position!r}: expected a token of the map, {tuple(spatial)}")


def checked_scale(name: str, scale: float | None, head_dim: int) -> float:
    """The factor of the dot products: 1 / sqrt(D) unless given."""
    if scale is None:
        default: float = head_dim**-0.5
        return default
    if not isinstance(scale, (int, float, SymFloat)) or isinstance(scale, bool):
        raise TypeError(f"{name}={scale!r}: expected a number or None")
    if isinstance(scale, SymFloat) or torch.compiler.is_compiling():
        return scale
    if not abs(scale) <= float_info.max:
        # Python refuses to print very large ints.
        found = f"<int of {scale.bit_length()} bits>" if isinstance(scale, int) else repr(scale)
        raise ValueError(f"{name}={found}: expected a finite number in the range of a float")
    return float(scale)  # also of NumPy's, which Triton does not take


def _check_like_query(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name}: expected query's dtype {query.dtype}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name}: expected query's device {query.device}, got {tensor.device}")


def _shape(sizes: Sequence[Any]) -> str:
    return f"({', '.join(map(str, sizes))})"


def checked_scores(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
    scale: float | None,
    rpb: Tensor | None,
) -> tuple[Neighborhood, float]:
    """Window and scale of functions that take query and key without values, all checked."""
    dims = check_dims("query", query)
    check_heads_last("query", query, dims)
    check_key(query, key)
    window = make_neighborhood(dims, kernel_size, stride, dilation, is_causal)
    check_fits(window, query.shape[1:-2])
    if rpb is not None:
        check_bias(rpb, query, window)
    return window, checked_scale("scale", scale, query.shape[-1])
