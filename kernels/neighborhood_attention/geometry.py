"""The semantics of neighborhood attention: which keys a query attends to, per axis.

This is the only copy. Every backend asks these functions; the Triton kernels compile this very
source. The arithmetic therefore stays within what Python ints and Triton blocks share: no `min`, no
`max`, no calls, and only non-negative operands of `//`.
`x -= (x - bound) * (x > bound)` reads `x = min(x, bound)`.
Annotations are `int` throughout: Triton evaluates them and knows no `bool`.

Coordinates are those of a dilation group. A token at position `i` of an axis belongs to the group
`i % dilation`, has the index `i // dilation` in it, and sees tokens of its own group only. "length"
is the number of tokens in the group.

Definitions: "Neighborhood Attention Transformer" (arXiv 2204.07143), "Dilated Neighborhood
Attention Transformer" (arXiv 2209.15001), "Generalized Neighborhood Attention" (arXiv 2504.16922;
stride and causal axes).
"""

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod


@dataclass(frozen=True)
class Neighborhood:
    """The window of every axis of a 1-D, 2-D or 3-D problem; one entry an axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    # Derived once, since every call needs them.
    # Tokens that an axis must have: `kernel_size * dilation`.
    extent: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # Of one head's relative positional bias: `2 * kernel_size - 1` offsets an axis.
    bias_shape: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # All settings in one list, in their order: how the operators take them.
    flat: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = zip(self.kernel_size, self.dilation, strict=True)
        flat = (*self.kernel_size, *self.stride, *self.dilation, *map(int, self.is_causal))
        object.__setattr__(self, "extent", tuple(size * step for size, step in sizes))
        object.__setattr__(self, "bias_shape", tuple(2 * size - 1 for size in self.kernel_size))
        object.__setattr__(self, "flat", flat)

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    @property
    def size(self) -> int:
        """Keys of a window, one that is not truncated."""
        return prod(self.kernel_size)

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_flat(flat: tuple[int, ...]) -> "Neighborhood":
        """The window whose `flat` this is."""
        dims = len(flat) // 4
        kernel_size, stride, dilation, is_causal = (
            flat[first : first + dims] for first in range(0, 4 * dims, dims)
        )
        return Neighborhood(kernel_size, stride, dilation, tuple(map(bool, is_causal)))


def group_length(group: int, length: int, dilation: int) -> int:
    """Number of tokens of an axis of `length` tokens that belong to `group`."""
    return (length - group + dilation - 1) // dilation


def window_start(query: int, length: int, kernel_size: int, stride: int, is_causal: int) -> int:
    """First key that `query` attends to."""
    lead = (query // stride) * stride + (stride - 1 if is_causal else stride // 2)
    lead -= (lead - length + 1) * (lead >= length)
    start = lead - (kernel_size - 1 if is_causal else kernel_size // 2)
    start -= start * (start < 0)
    if not is_causal:
        start -= (start + kernel_size - length) * (start + kernel_size > length)
    return start


def window_end(query: int, start: int, kernel_size: int, is_causal: int) -> int:
    """One past the last key that `query` attends to; `start` is its `window_start`."""
    return query + 1 if is_causal else start + kernel_size


def attending_start(key: int, kernel_size: int, stride: int, is_causal: int) -> int:
    """First query that attends to `key`; the queries that do are contiguous."""
    start = key
    if not is_causal:
        right = kernel_size // 2 + kernel_size % 2 - 1
        start = ((key - right + stride - stride // 2 - 1) // stride) * stride * (key >= kernel_size)
    return start


def attending_end(key: int, length: int, kernel_size: int, stride: int, is_causal: int) -> int:
    """One past the last query that attends to `key`."""
    if is_causal:
        end = ((key + kernel_size) // stride + (key + kernel_size >= length)) * stride
    else:
        left = kernel_size // 2
        end = ((key + left + stride - stride // 2) // stride) * stride
        end += length * (key >= length - kernel_size)
    end -= (end - length) * (end > length)
    return end


def bias_index(query: int, key: int, kernel_size: int) -> int:
    """Index into an axis of the relative positional bias for `query` attending to `key`."""
    return key - query + kernel_size - 1
