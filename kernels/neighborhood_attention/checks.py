"""Argument checks of the public functions; an error names the argument, its value and the rule."""

from collections.abc import Sequence
from typing import TypeVar

from torch import SymFloat, Tensor

from neighborhood_attention.geometry import Neighborhood

T = TypeVar("T", int, bool)

SPATIAL = {1: "L", 2: "H, W", 3: "D, H, W"}


def per_axis(name: str, value: T | Sequence[T], dims: int, kind: type[T]) -> tuple[T, ...]:
    """`value` for each of `dims` axes: a single one counts for all of them."""
    values = value if isinstance(value, (tuple, list)) else (value,) * dims
    if not all(isinstance(v, kind) and isinstance(v, bool) == (kind is bool) for v in values):
        raise TypeError(f"{name}={value!r}: expected {kind.__name__} or a tuple of {dims} of them")
    if len(values) != dims:
        raise ValueError(f"{name}={value!r}: expected {dims} entries, one for each spatial axis")
    return tuple(values)


def make_neighborhood(
    dims: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> Neighborhood:
    """The checked window of `dims` axes."""
    window = Neighborhood(
        per_axis("kernel_size", kernel_size, dims, int),
        per_axis("stride", stride, dims, int),
        per_axis("dilation", dilation, dims, int),
        per_axis("is_causal", is_causal, dims, bool),
    )
    for axis in range(dims):
        if window.kernel_size[axis] < 1:
            raise ValueError(f"{kernel_size=}: expected at least 1 on every axis")
        if not 1 <= window.stride[axis] <= window.kernel_size[axis]:
            raise ValueError(f"{stride=}: expected 1 <= stride <= kernel_size={window.kernel_size}")
        if window.dilation[axis] < 1:
            raise ValueError(f"{dilation=}: expected at least 1 on every axis")
    return window


def check_fits(window: Neighborhood, spatial: Sequence[int]) -> None:
    """Each dilated window must fit into its axis."""
    for axis in range(window.dims):
        extent = window.kernel_size[axis] * window.dilation[axis]
        if extent > spatial[axis]:
            raise ValueError(
                f"kernel_size={window.kernel_size} with dilation={window.dilation}: spans {extent} "
                f"tokens of axis {axis}, expected at most the input's {spatial[axis]}"
            )


def check_heads_last(name: str, tensor: Tensor, dims: int) -> None:
    """`tensor` must be floating point, [B, *spatial, heads, D]."""
    check_tensor(name, tensor)
    if tensor.dim() != dims + 3:
        raise ValueError(
            f"{name}: expected [B, {SPATIAL[dims]}, heads, D], got shape {tuple(tensor.shape)}"
        )
    if tensor.shape[-2] < 1 or tensor.shape[-1] < 1:
        raise ValueError(
            f"{name}: expected a head and a head dimension, got shape {tuple(tensor.shape)}"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_tensor(name: str, tensor: Tensor) -> None:
    """`tensor` must be one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def check_alike(query: Tensor, others: dict[str, Tensor]) -> None:
    """The others must agree with the query in shape, dtype and device."""
    for name, tensor in others.items():
        if tensor.shape != query.shape:
            raise ValueError(
                f"{name}: expected query's shape {tuple(query.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected query's device {query.device}, got {tensor.device}")


def check_bias(rpb: Tensor | None, query: Tensor, window: Neighborhood) -> None:
    """The relative positional bias must be [heads, 2 * kernel_size - 1, ...]."""
    if rpb is None:
        return
    check_tensor("rpb", rpb)
    expected = (query.shape[-2], *window.bias_shape)
    if tuple(rpb.shape) != expected:
        raise ValueError(
            "rpb: expected shape (heads, 2 * kernel_size - 1, ...) = "
            f"{expected}, got {tuple(rpb.shape)}"
        )
    if not rpb.is_floating_point():
        raise TypeError(f"rpb: expected a floating-point tensor, got {rpb.dtype}")
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
        scale = head_dim**-0.5
    if not isinstance(scale, (int, float, SymFloat)):
        raise TypeError(f"{name}={scale!r}: expected a number or None")
    return scale
