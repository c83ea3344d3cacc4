"""Pictures: curves of a run, and what the queries of a neighborhood attention look at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from neighborhood_attention import NeighborhoodAttention2D, attention_maps

Picture = NDArray[np.uint8]
Map = NDArray[np.float32]

BLUE, ORANGE, GREY = "#2a6fbb", "#d9742b", "#808080"
MAX_HEADS = 8

# From clear to solid, so that the image stays visible where little attention goes.
_HEAT = LinearSegmentedColormap.from_list("heat", [to_rgba(ORANGE, 0.0), to_rgba(ORANGE, 1.0)])


def curves(epochs: Sequence[dict[str, float]]) -> Figure:
    """Draw loss and accuracy of a run.

    Args:
        epochs: Values of each epoch, as `nat_models.engine.callbacks.History` keeps them.

    Returns:
        A figure of two panels.
    """
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    _line(loss, epochs, "train/loss", "training (augmented, smoothed)", GREY)
    _line(loss, epochs, "val/loss", "held out", BLUE)
    highest = max(max(e["train/loss"], e.get("val/loss", 0.0)) for e in epochs)
    loss.set(title="Loss (cross entropy)", ylim=(0, 1.05 * highest))
    _line(accuracy, epochs, "val/top1", "top-1", BLUE, percent=True)
    _line(accuracy, epochs, "val/top5", "top-5", ORANGE, percent=True)
    accuracy.set(title="Held-out accuracy (%)", ylim=(None, 100.5))
    for axes in (loss, accuracy):
        axes.set(xlabel="epoch", xlim=(0.5, len(epochs) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def neighborhoods(
    model: nn.Module,
    image: Tensor,
    picture: Picture,
    layer: str | None = None,
    positions: Sequence[tuple[int, int]] | None = None,
) -> Figure:
    """Draw where chosen queries of one layer look in an image, for each head.

    Args:
        model: Model with at least one `NeighborhoodAttention2D`.
        image: What the model is fed, [C, H, W].
        picture: The same image to look at, uint8 [H, W] or [H, W, 3].
        layer: Name of the attention module; default: the last one at the largest map.
        positions: (row, column) of queries in the layer's map; default: three down the middle.

    Returns:
        A figure with one row a query: the image with its window, then the attention of each head,
        up to eight.

    Raises:
        ValueError: The model has no such layer.
    """
    inputs = _attention_inputs(model, image)
    layer = max(inputs, key=lambda name: _area(inputs[name])) if layer is None else layer
    if layer not in inputs:
        raise ValueError(f"{layer=}: expected one of {list(inputs)}")
    attention = model.get_submodule(layer)
    assert isinstance(attention, NeighborhoodAttention2D)
    height, width = inputs[layer].shape[1:3]
    if positions is None:
        positions = [(row, width // 2) for row in (height // 4, height // 2, 3 * height // 4)]
    maps = _maps(attention, inputs[layer], positions)[:MAX_HEADS].numpy()

    heads = len(maps)
    figure = Figure(
        figsize=(1.9 * (heads + 1) + 0.9, 1.95 * len(positions) + 0.6),
        dpi=150,
        layout="constrained",
    )
    panels = figure.subplots(len(positions), heads + 1, squeeze=False)
    k, d = attention.kernel_size, attention.dilation
    window = f"{k[0]}x{k[1]} window" + (f", dilation {d[0]}x{d[1]}" if max(d) > 1 else "")
    figure.suptitle(f"{layer}: {window} on a {height}x{width} map", fontsize=10)
    for row, position in enumerate(positions):
        highest = maps[:, row].max()
        _show_query(panels[row, 0], picture, position, maps[:, row].any(0))
        for head in range(heads):
            heat = _show_attention(
                panels[row, head + 1], picture, position, maps[head, row], highest
            )
        panels[row, 0].set_ylabel(f"query ({position[0]}, {position[1]})", fontsize=8)
        bar = figure.colorbar(heat, ax=panels[row, -1], fraction=0.05, pad=0.04)
        bar.ax.tick_params(labelsize=7)
        bar.set_label("attention", fontsize=8)
    panels[0, 0].set_title("query and window", fontsize=9)
    for head in range(heads):
        panels[0, head + 1].set_title(f"head {head}", fontsize=9)
    return figure


def confusion(matrix: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Draw which classes are taken for which.

    Args:
        matrix: Number of images by their class and the class given, [C, C].
        names: Names of the classes; written out for up to 30.

    Returns:
        A figure whose rows are shares of a class.
    """
    count = len(names)
    side = 3.5 + 0.25 * min(count, 30)
    figure = Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="class given", ylabel="class", title="Confusion")
    if count <= 30:
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    figure.colorbar(image, ax=axes, label="share of the class")
    return figure


def _line(
    axes: Axes,
    epochs: Sequence[dict[str, float]],
    key: str,
    label: str,
    color: str,
    percent: bool = False,
) -> None:
    points = [(i, e[key] * (100 if percent else 1)) for i, e in enumerate(epochs, 1) if key in e]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=color, marker="o", markersize=3)


def _attention_inputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Input [1, H, W, C] of every neighborhood attention, by the module's name."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, module in model.named_modules()
        if isinstance(module, NeighborhoodAttention2D)
    ]
    if not hooks:
        raise ValueError(f"{type(model).__name__} has no NeighborhoodAttention2D")
    training = model.training
    try:
        # Compiled code knows nothing of hooks that came after it.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()(image.unsqueeze(0))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return inputs


def _area(x: Tensor) -> int:
    return x.shape[1] * x.shape[2]


@torch.no_grad()
def _maps(
    attention: NeighborhoodAttention2D, x: Tensor, positions: Sequence[tuple[int, int]]
) -> Tensor:
    """Probabilities [heads, P, H, W] on the CPU."""
    _, height, width, _ = x.shape
    spans = [k * d for k, d in zip(attention.kernel_size, attention.dilation, strict=True)]
    if attention.pad_small_inputs:  # as the module does
        x = F.pad(x, [0, 0, 0, max(0, spans[1] - width), 0, max(0, spans[0] - height)])
    query, key, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)
    maps = attention_maps(
        query,
        key,
        attention.kernel_size,
        attention.stride,
        attention.dilation,
        attention.is_causal,
        attention.scale,
        attention.rpb,
        positions=positions,
    )
    return maps[0, :, :, :height, :width].cpu()


def _show_query(axes: Axes, picture: Picture, position: tuple[int, int], window: Any) -> None:
    """The image, its query's token, and the extent of the window."""
    _show_picture(axes, picture)
    rows, columns = np.flatnonzero(window.any(1)), np.flatnonzero(window.any(0))
    cell = picture.shape[0] / window.shape[0], picture.shape[1] / window.shape[1]
    _outline(axes, (rows[0], columns[0]), (rows[-1] + 1, columns[-1] + 1), cell, ORANGE)
    _outline(axes, position, (position[0] + 1, position[1] + 1), cell, BLUE)


def _show_attention(
    axes: Axes, picture: Picture, position: tuple[int, int], attention: Map, highest: float
) -> AxesImage:
    """Attention as heat over the image, and the query's token."""
    _show_picture(axes, picture, alpha=0.7)
    height, width = picture.shape[:2]
    heat = axes.imshow(
        attention,
        cmap=_HEAT,
        vmin=0,
        vmax=highest,
        extent=(0, width, height, 0),
        interpolation="nearest",
    )
    cell = height / attention.shape[0], width / attention.shape[1]
    _outline(axes, position, (position[0] + 1, position[1] + 1), cell, BLUE)
    return heat


def _show_picture(axes: Axes, picture: Picture, alpha: float = 1.0) -> None:
    height, width = picture.shape[:2]
    axes.imshow(picture, cmap="gray", extent=(0, width, height, 0), alpha=alpha)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("0.8")


def _outline(
    axes: Axes, start: tuple[int, int], end: tuple[int, int], cell: tuple[float, float], color: str
) -> None:
    """Outline the tokens from `start` up to `end`, both (row, column), of `cell` pixels each."""
    corner = start[1] * cell[1], start[0] * cell[0]
    size = (end[1] - start[1]) * cell[1], (end[0] - start[0]) * cell[0]
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=color, linewidth=1.5))
