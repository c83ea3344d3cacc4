"""A kernel's launch, prepared once for a problem, and the arguments that the kernels share."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton import tile_table
from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tiles import TilePlan, three_axes
from neighborhood_attention.geometry import Neighborhood

# Problems whose launches are kept ready, a pass.
CACHED_PROBLEMS = 4096


class Launch:
    """A kernel with all its arguments but the tensors, which come first.

    Triton binds and specialises every argument at every launch; for some fifty of them the host
    takes longer than the kernel. Here it is done once for each alignment of the tensors' addresses.
    """

    def __init__(
        self, kernel: Any, programs: int, arguments: Mapping[str, Any], **options: Any
    ) -> None:
        self._grid = (programs, 1, 1)
        self._kernel = kernel[self._grid]
        tensors = next(i for i, name in enumerate(kernel.arg_names) if name in arguments)
        self._arguments = [arguments[name] for name in kernel.arg_names[tensors:]]
        self._options = options
        self._runners: dict[tuple[int, ...], Callable[..., None]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current GPU and stream."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if self.at(addresses):
            return
        compiled = self._kernel(*tensors, *self._arguments, **self._options)
        if compiled is not None:  # not interpreted
            self._runners[_alignments(addresses)] = runner(compiled, self._grid)

    def at(self, addresses: list[int]) -> bool:
        """Launch on tensors there, 0 for None, and tell whether such were launched before.

        If not, nothing is done: a first launch needs the tensors.
        """
        run = self._runners.get(_alignments(addresses))
        if run is None:
            return False
        run(*addresses, *self._arguments)
        return True


def _alignments(addresses: list[int]) -> tuple[int, ...]:
    return tuple([address % 16 if address else -1 for address in addresses])


def runner(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """As `compiled[grid]`, which takes twice as long: it prepares for hooks that are not there.

    TorchInductor launches in the same way.
    """
    runtime, driver = triton.knobs.runtime, triton.runtime.driver.active
    device, stream_of = driver.get_current_device(), driver.get_current_stream
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    with_hooks = compiled[grid]  # keeps the compiled code alive as well

    def launch(*arguments: Any) -> None:
        # Of a profiler; anything else than Triton's chains of hooks is called, too.
        hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(hooks[0], "calls", True) or getattr(hooks[1], "calls", True):
            with_hooks(*arguments)
        else:
            run(*grid, stream_of(device), function, metadata, None, None, None, *arguments)

    return launch


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel can begin there before the one before it has ended.

    Programmatic dependent launch, from Hopper on: a kernel that waits (`gdc_wait`) before it reads
    what the one before it wrote, and that one tells that it may begin (`gdc_launch_dependents`).
    """
    capability = tile_table.capability(device)
    return capability is not None and int(capability.split(".")[0]) >= 9


class Layout(NamedTuple):
    """What a launch depends on, of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class Problem(NamedTuple):
    """What a launch depends on, of all tensors and PyTorch's settings."""

    query: Layout
    key: Layout
    value: Layout
    rpb: Layout | None
    additional_keys: Layout | None
    additional_values: Layout | None
    device: torch.device
    allow_tf32: bool

    @classmethod
    def of(cls, description: tuple[Any, ...]) -> "Problem":
        """From what `describe` or `describe_packed` returned."""
        layouts: list[Any] = [x and Layout(*x) for x in description[:-2]]
        if len(layouts) == 2:
            qkv, rpb = layouts
            part = qkv._replace(shape=_part(qkv.shape), strides=_part(qkv.strides))
            layouts = [part, part, part, rpb, None, None]
        return cls(*layouts, *description[-2:])

    @property
    def spatial(self) -> torch.Size:
        """Sizes of the axes."""
        return self.query.shape[1:-2]

    @property
    def head_arguments(self) -> dict[str, Any]:
        """Numbers of heads and head dimensions, the precision of products."""
        head_dim, value_dim = self.query.shape[-1], self.value.shape[-1]
        heads = self.query.shape[-2]
        return {
            "heads": heads,
            "heads_per_key": heads // self.key.shape[-2],
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),  # tensor cores take no less
            "VALUE_DIM": value_dim,
            "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
            "PRECISION": self.precision,
        }

    @property
    def precision(self) -> str:
        """How `product` multiplies fp32: in TF32, or with about the error of fp32's own rounding.

        The latter by three products in TF32, of the two parts of each factor: by IEEE they would
        be multiplied out, without tensor cores, and take twice as long. Of heads of more than 128
        channels the parts do not fit into registers.
        """
        is_huge = max(self.query.shape[-1], self.value.shape[-1]) > 128
        if self.query.dtype is not torch.float32 or not _has_tf32(self.device):
            return "ieee"
        return "tf32" if self.allow_tf32 else "ieee" if is_huge else "tf32x3"

    @property
    def additional_arguments(self) -> dict[str, Any]:
        """Count and strides of the additional keys and values; None without them."""
        if self.additional_keys is None or self.additional_values is None:
            names = "additional_count", "additional_key_strides", "additional_value_strides"
            return dict.fromkeys(names)
        return {
            "additional_count": self.additional_keys.shape[1],
            "additional_key_strides": self.additional_keys.strides[:3],
            "additional_value_strides": self.additional_values.strides[:3],
        }

    def map_arguments(self, **others: Layout) -> dict[str, Any]:
        """Size of the map, strides of query, key, value and `others`, the width of offsets.

        EQUAL_STRIDES: query, key, value and their gradients have the same.
        """
        layouts = {"query": self.query, "key": self.key, "value": self.value, **others}
        packed = {layout.strides for name, layout in layouts.items() if name != "grad_output"}
        tokens = prod(self.query.shape[1:-1]) * max(self.query.shape[-1], self.value.shape[-1])
        return {
            "size": three_axes(self.spatial),
            "WIDE": max(tokens, *map(_extent, layouts.values())) >= 2**31,
            "EQUAL_STRIDES": len(packed) == 1,
            **{f"{name}_strides": _strides(layout) for name, layout in layouts.items()},
        }


def describe(inputs: Inputs) -> tuple[Any, ...]:
    """The problem that these tensors pose, as a key for caches: the arguments of `Problem`."""
    query, key, value, rpb, keys, values = inputs
    return (
        (query.shape, query.stride(), query.dtype),
        (key.shape, key.stride(), key.dtype),
        (value.shape, value.stride(), value.dtype),
        layout(rpb),
        layout(keys),
        layout(values),
        query.device,
        _is_tf32(query.dtype),
    )


def describe_packed(qkv: Tensor, rpb: Tensor | None) -> tuple[Any, ...]:
    """As `describe`, of query, key and value packed into one tensor."""
    return layout(qkv), layout(rpb), qkv.device, _is_tf32(qkv.dtype)


def _part(sizes: Any) -> Any:
    return sizes[:-3] + sizes[-2:]


def layout(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """The arguments of a tensor's `Layout`."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _is_tf32(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _has_tf32(device: torch.device) -> bool:
    """Whether its tensor cores take TF32: NVIDIA's, from Ampere on."""
    capability = tile_table.capability(device)
    return capability is not None and float(capability) >= 8 and torch.version.hip is None


def with_contiguous_heads(tensor: Tensor) -> Tensor:
    """The tensor, copied where the head dimension is strided (as in the gradient of a sum)."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def scale_arguments(scale: float) -> dict[str, float]:
    """The scale and its sign: 1, 0 or -1."""
    return {"scale": scale, "SIGN": (scale > 0) - (scale < 0)}


def window_arguments(window: Neighborhood) -> dict[str, tuple[int, ...]]:
    """The window, with three axes."""
    return {
        "KERNEL_SIZE": three_axes(window.kernel_size),
        "STRIDE": three_axes(window.stride),
        "DILATION": three_axes(window.dilation),
        "IS_CAUSAL": three_axes(window.is_causal, False),
    }


def plan_arguments(plan: TilePlan) -> dict[str, int | tuple[int, ...]]:
    """The tiles and strips, and the warps over them."""
    return {
        "front": tuple(axis.front for axis in plan.axes),
        "back": tuple(axis.back for axis in plan.axes),
        "TILE": plan.tile.tile,
        "STRIP": plan.tile.strip,
        "STRIPS": plan.strips,
        "ROW_WARPS": plan.tile.warps[0],
        "COLUMN_WARPS": plan.tile.warps[1],
    }


def reading_launch(
    kernel: Any, programs: int, problem: Problem, tile: Tile, arguments: Mapping[str, Any]
) -> Launch:
    """Of a kernel that may begin, where it can, before the one ends whose results it waits for."""
    overlaps = can_overlap(problem.device)
    arguments = {**arguments, "OVERLAPS": overlaps}
    return Launch(kernel, programs, arguments, **tile.options, launch_pdl=overlaps)


def walking_launch(
    kernel: Any, problem: Problem, plan: TilePlan, settings: Mapping[str, Any], parts: int = 1
) -> Launch:
    """Of programs that walk over images and dilation groups, at each position, part and head."""
    batch, heads = problem.query.shape[0], problem.query.shape[-2]
    shares = plan.shares(batch, heads * parts)
    arguments = {
        **settings, **plan_arguments(plan),
        "batch": batch, "shares": shares, "positions": plan.positions,
    }  # fmt: skip
    programs = plan.positions * parts * heads * shares
    return reading_launch(kernel, programs, problem, plan.tile, arguments)


def _strides(layout: Layout) -> tuple[int, ...]:
    """Of image, three axes and head of a [B, *spatial, heads, D]; a missing axis has stride 0."""
    batch, *spatial, head, _ = layout.strides
    return batch, *three_axes(spatial, 0), head


def _extent(layout: Layout) -> int:
    """Elements that an image spans."""
    return sum(n * s for n, s in zip(layout.shape[1:-2], layout.strides[1:-2], strict=True))
