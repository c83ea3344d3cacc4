"""Neighborhood attention in plain PyTorch, for any device, floating dtype and number of axes.

Tile by tile (see `reference_tiles`, also for the shapes), in pieces of bounded size: nothing of
size tokens x tokens exists. The backward is explicit, since what lies outside a window must not
reach a gradient, be it infinite.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.reference_tiles import Tiles, tiles_of
from neighborhood_attention.geometry import Neighborhood

# Scores computed at a time; bounds the memory.
MAX_SCORES = 2**24


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would round the scores."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        inputs = next(x for x in arguments if isinstance(x, Inputs))
        with torch.autocast(inputs.query.device.type, enabled=False):
            return function(*arguments)

    return call


def supports(inputs: Inputs, window: Neighborhood) -> str | None:
    """Runs everything."""
    return None


@without_autocast
def forward(inputs: Inputs, window: Neighborhood, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; computes in fp32, or fp64 for fp64."""
    query, key, value, _, additional_keys, additional_values = inputs
    device, dtype, key_heads = query.device, compute_dtype(query), key.shape[-2]
    output = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=device)
    lse = torch.empty(query.shape[:-1], dtype=dtype, device=device)
    for tiles, bias, images in pieces(inputs, window):
        queries = tiles.queries(query[images], key_heads).to(dtype)
        scores = _scores(queries, _keys(tiles, key, additional_keys, images, dtype), bias, scale)
        lse_piece = scores.logsumexp(-1, keepdim=True)
        probabilities = scores.sub_(lse_piece).exp_()
        values = _keys(tiles, value, additional_values, images, dtype)
        tiles.write_queries(output[images], values.weighted_sum(probabilities))
        tiles.write_queries(lse[images].unsqueeze(-1), lse_piece)
    return output, lse


@without_autocast
def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: Inputs,
    output: Tensor,
    lse: Tensor,
    window: Neighborhood,
    scale: float,
    gradients: Inputs,
) -> None:
    """Fills the gradient buffers."""
    query, key, value, _, additional_keys, additional_values = inputs
    dtype, key_heads = compute_dtype(query), key.shape[-2]
    sums = Inputs(query, *[_zeros(x, dtype) for x in gradients[1:]])
    for tiles, bias, images in pieces(inputs, window):

        def rows(tensor: Tensor) -> Tensor:
            return tiles.queries(tensor[images], key_heads).to(dtype)  # noqa: B023

        queries, keys = rows(query), _keys(tiles, key, additional_keys, images, dtype)
        values = _keys(tiles, value, additional_values, images, dtype)
        probabilities = _scores(queries, keys, bias, scale).sub_(rows(lse.unsqueeze(-1))).exp_()
        # A query that stands twice must not count twice.
        is_query = tiles.is_query.repeat(1, query.shape[-2] // key_heads).unsqueeze(-1)
        grads = rows(grad_output).masked_fill_(~is_query, 0)
        _add_to_keys(sums.value, sums.additional_values, tiles, images, probabilities, grads)
        grad_scores = values.dot(grads)
        # Masked, since an overflow outside the window times a zero probability is NaN.
        _in_window(grad_scores, bias).masked_fill_(bias == -torch.inf, 0)
        delta = (probabilities * grad_scores).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta -= rows(grad_lse.unsqueeze(-1)).masked_fill_(~is_query, 0)
        grad_scores.sub_(delta).mul_(probabilities)
        if sums.rpb is not None:
            tiles.add_to_bias(sums.rpb, _in_window(grad_scores, bias).sum(0))
        grad_scores.mul_(scale)
        tiles.write_queries(gradients.query[images], keys.weighted_sum(grad_scores))
        _add_to_keys(sums.key, sums.additional_keys, tiles, images, grad_scores, queries)
    for gradient, total in zip(gradients[1:], sums[1:], strict=True):
        if gradient is not None and total is not None:
            gradient.copy_(total)


def compute_dtype(query: Tensor) -> torch.dtype:
    """The dtype of scores and sums."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


class _Keys(NamedTuple):
    """The keys (or values) of some tiles."""

    window: Tensor  # [B, G, T, K, D]
    additional: Tensor | None  # [B, G, S, D]

    def dot(self, rows: Tensor) -> Tensor:
        """[B, G, T, R, D] to the products with all keys, [B, G, T, R, K + S]."""
        products = rows @ self.window.mT
        if self.additional is None:
            return products
        additional = (rows.flatten(2, 3) @ self.additional.mT).unflatten(2, rows.shape[2:4])
        return torch.cat([products, additional], -1)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """[B, G, T, R, K + S] to sums over all keys, [B, G, T, R, D]."""
        size = self.window.shape[-2]
        total = weights[..., :size] @ self.window
        if self.additional is not None:
            additional = weights[..., size:].flatten(2, 3) @ self.additional
            total += additional.unflatten(2, total.shape[2:4])
        return total


def _keys(
    tiles: Tiles, tensor: Tensor, additional: Tensor | None, images: slice, dtype: torch.dtype
) -> _Keys:
    if additional is not None:
        additional = additional[images].transpose(1, 2).to(dtype)
    return _Keys(tiles.keys(tensor[images]).to(dtype), additional)


def _add_to_keys(
    target: Tensor,
    additional: Tensor | None,
    tiles: Tiles,
    images: slice,
    weights: Tensor,
    rows: Tensor,
) -> None:
    """Add, for every key, the sum of the rows with its weights [B, G, T, R, K + S]."""
    size = tiles.halo_size
    tiles.add_to_keys(target[images], weights[..., :size].mT @ rows)
    if additional is not None:
        rest = weights[..., size:].flatten(2, 3).mT @ rows.flatten(2, 3)
        additional[images] += rest.transpose(1, 2)


def _zeros(like: Tensor | None, dtype: torch.dtype) -> Any:
    return None if like is None else torch.zeros(like.shape, dtype=dtype, device=like.device)


def pieces(inputs: Inputs, window: Neighborhood) -> Iterator[tuple[Tiles, Tensor, slice]]:
    """The work, in pieces of bounded size: some tiles of the first axis, for some images."""
    query, key_heads = inputs.query, inputs.key.shape[-2]
    batch, *spatial, heads, _ = query.shape
    axes = tiles_of(tuple(spatial), window, query.device)
    all_tiles = axes[0].attends.shape[0]
    per_tile = heads * prod(axis.attends.numel() for axis in axes) // all_tiles
    if inputs.additional_keys is not None:
        queries = heads * prod(axis.queries.numel() for axis in axes) // all_tiles
        per_tile += queries * inputs.additional_keys.shape[1]
    step = max(1, MAX_SCORES // per_tile)
    images = max(1, MAX_SCORES // (per_tile * min(step, all_tiles)))
    for tile in range(0, all_tiles, step):
        tiles = Tiles([axes[0][tile : tile + step], *axes[1:]])
        bias = tiles.bias(inputs.rpb, heads, key_heads, compute_dtype(query))
        for image in range(0, batch, images):
            yield tiles, bias, slice(image, image + images)


def _scores(queries: Tensor, keys: _Keys, bias: Tensor, scale: float) -> Tensor:
    """Biased and masked logits [B, G, T, R, K + S]."""
    scores = keys.dot(queries * scale)
    # Not a plain addition: an overflow outside the window must not meet the -inf.
    _in_window(scores, bias).add_(bias).masked_fill_(bias == -torch.inf, -torch.inf)
    return scores


def _in_window(scores: Tensor, bias: Tensor) -> Tensor:
    """The scores without those of additional keys."""
    return scores[..., : bias.shape[-1]]
