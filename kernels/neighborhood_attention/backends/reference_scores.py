"""The halves of neighborhood attention, with all scores in memory: products with keys, with values.

Windowed scores and probabilities are [B, *spatial, heads, W], W the product of the kernel sizes;
slot w of an axis is the key `window_start + w`. For the other shapes see `reference_tiles`.
"""

import torch
from torch import Tensor

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.reference import compute_dtype, pieces, without_autocast
from neighborhood_attention.backends.reference_tiles import Tiles
from neighborhood_attention.geometry import Neighborhood


@without_autocast
def scores(inputs: Inputs, window: Neighborhood, scale: float) -> Tensor:
    """Windowed logits of query and key; -inf where a causal window has no key."""
    query, key, *_ = inputs
    dtype, heads, key_heads = compute_dtype(query), query.shape[-2], key.shape[-2]
    shape = (*query.shape[:-1], window.size)
    result = torch.empty(shape, dtype=dtype, device=query.device)
    for tiles, bias, images in pieces(inputs, window):
        queries = tiles.queries(query[images], key_heads).to(dtype) * scale
        tile_scores = queries @ tiles.keys(key[images]).to(dtype).mT
        by_head = tiles.by_head(tile_scores.add_(bias), heads)
        tiles.write_queries(result[images], tiles.to_windows(by_head, window, -torch.inf))
    return result


@without_autocast
def scores_backward(
    inputs: Inputs, grad_scores: Tensor, window: Neighborhood, scale: float, gradients: Inputs
) -> None:
    """Fills the gradients of query, key and, where there is a buffer, rpb."""
    query, key, *_ = inputs
    dtype, key_heads = compute_dtype(query), key.shape[-2]
    key_sum = torch.zeros(key.shape, dtype=dtype, device=key.device)
    bias_sum = None
    if gradients.rpb is not None:
        bias_sum = torch.zeros(gradients.rpb.shape, dtype=dtype, device=key.device)
    for tiles, _, images in pieces(inputs, window):
        grads = _tile_weights(tiles, window, grad_scores[images], key_heads, dtype)
        if bias_sum is not None:
            tiles.add_to_bias(bias_sum, grads.sum(0))
        grads.mul_(scale)
        tiles.write_queries(gradients.query[images], grads @ tiles.keys(key[images]).to(dtype))
        queries = tiles.queries(query[images], key_heads).to(dtype)
        tiles.add_to_keys(key_sum[images], grads.mT @ queries)
    gradients.key.copy_(key_sum)
    if gradients.rpb is not None and bias_sum is not None:
        gradients.rpb.copy_(bias_sum)


@without_autocast
def apply(inputs: Inputs, window: Neighborhood) -> Tensor:
    """Sums of the values, weighted by the probabilities that stand in for the query."""
    probabilities, _, value, *_ = inputs
    dtype, key_heads = compute_dtype(value), value.shape[-2]
    shape = (*probabilities.shape[:-1], value.shape[-1])
    output = torch.empty(shape, dtype=value.dtype, device=value.device)
    for tiles, _, images in pieces(inputs, window):
        weights = _tile_weights(tiles, window, probabilities[images], key_heads, dtype)
        tiles.write_queries(output[images], weights @ tiles.keys(value[images]).to(dtype))
    return output


@without_autocast
def apply_backward(
    inputs: Inputs,
    grad_output: Tensor,
    window: Neighborhood,
    grad_probabilities: Tensor,
    grad_value: Tensor,
) -> None:
    """Fills the gradients of probabilities and value."""
    probabilities, _, value, *_ = inputs
    dtype, key_heads, heads = compute_dtype(value), value.shape[-2], probabilities.shape[-2]
    value_sum = torch.zeros(value.shape, dtype=dtype, device=value.device)
    for tiles, _, images in pieces(inputs, window):
        grads = tiles.queries(grad_output[images], key_heads).to(dtype)
        weights = _tile_weights(tiles, window, probabilities[images], key_heads, dtype)
        tiles.add_to_keys(value_sum[images], weights.mT @ grads)
        products = grads @ tiles.keys(value[images]).to(dtype).mT
        by_head = tiles.by_head(products, heads)
        tiles.write_queries(grad_probabilities[images], tiles.to_windows(by_head, window, 0.0))
    grad_value.copy_(value_sum)


def _tile_weights(
    tiles: Tiles, window: Neighborhood, windows: Tensor, key_heads: int, dtype: torch.dtype
) -> Tensor:
    """[B, *spatial, N, W] to [B, G, T, R, K]."""
    rows = tiles.queries(windows, windows.shape[-2]).to(dtype)
    return tiles.by_key_head(tiles.from_windows(rows, window), key_heads)
