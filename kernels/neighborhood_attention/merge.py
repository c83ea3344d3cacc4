"""Attention over the union of several sets of keys, from the attention over each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from neighborhood_attention.checks import check_tensor


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attentions of the same queries over disjoint sets of keys.

    With `lse = log(sum_i exp(lse_i))` the merged output is `sum_i exp(lse_i - lse) * output_i`, as
    one softmax over all keys gives it. The result can be merged again; every input gets its true
    gradient.

    Where `lse_i` is -inf, the set has no key for the query: its output, even NaN, has no influence,
    and the gradients of both are zero. Without a key in any set, the output is 0 and `lse` is -inf.

    Args:
        outputs: One [..., D] a set, all in one of fp16, bf16, fp32 and fp64.
        lses: Their log-sum-exps [...], as `return_lse=True` gives them: all in fp32 or all in fp64.

    Returns:
        The merged output, in the dtype of `outputs`, and its log-sum-exp, in that of `lses`.

    Raises:
        ValueError: There is nothing to merge, or shapes or devices differ.
        TypeError: An argument is no sequence of tensors, or a dtype breaks the rules above.
    """
    _check(outputs, lses)
    stacked = torch.stack(list(lses))
    is_empty = stacked == -torch.inf
    is_all_empty = is_empty.all(0)
    # Any finite number keeps the gradients of a query without keys from NaN.
    stacked = stacked.masked_fill(is_all_empty, 0.0)
    lse = stacked.logsumexp(0)
    weights = (stacked - lse).exp().unsqueeze(-1)
    merged = weights.new_zeros(())
    for weight, empty, output in zip(weights, is_empty.unsqueeze(-1), outputs, strict=True):
        merged = torch.addcmul(merged, weight, torch.where(empty, 0.0, output))  # 0 * NaN is NaN
    return merged.to(outputs[0].dtype), lse.masked_fill(is_all_empty, -torch.inf)


def _check(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    _check_sequence("outputs", outputs)
    _check_sequence("lses", lses)
    if not outputs or len(outputs) != len(lses):
        counts = f"{len(outputs)} and {len(lses)}"
        raise ValueError(f"outputs, lses: expected as many of each, at least one; got {counts}")
    first, lse = outputs[0], lses[0]
    check_tensor("outputs[0]", first)
    if first.dim() < 1:
        raise ValueError("outputs[0]: expected [..., D], got shape ()")
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lses[0]: expected fp32 or fp64, got {lse.dtype}")
    for i, tensor in enumerate(outputs):
        _check_one(f"outputs[{i}]", tensor, first.shape, first.dtype, first.device)
    for i, tensor in enumerate(lses):
        _check_one(f"lses[{i}]", tensor, first.shape[:-1], lse.dtype, first.device)


def _check_sequence(name: str, tensors: Sequence[Tensor]) -> None:
    found: object = type(tensors).__name__
    if isinstance(tensors, Sequence):
        if all(isinstance(tensor, Tensor) for tensor in tensors):
            return
        found = [type(tensor).__name__ for tensor in tensors]
    raise TypeError(f"{name}: expected a sequence of tensors, got {found}")


def _check_one(
    name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} as the first, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected outputs[0]'s device {device}, got {tensor.device}")
