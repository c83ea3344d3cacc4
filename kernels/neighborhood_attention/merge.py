"""Attention over the union of several sets of keys, from the attention over each."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine attentions of the same queries over disjoint sets of keys.

    With `lse = log(sum_i exp(lse_i))` the merged output is `sum_i exp(lse_i - lse) * output_i`, as
    one softmax over all keys gives it. The result can be merged again; every input gets its true
    gradient.

    Args:
        outputs: One [..., D] a set, in any one dtype.
        lses: Their log-sum-exps [...], as `return_lse=True` gives them.

    Returns:
        The merged output, in the dtype of `outputs`, and its log-sum-exp.

    Raises:
        ValueError: There is nothing to merge, or the shapes differ.
    """
    if not outputs or len(outputs) != len(lses):
        counts = f"{len(outputs)} and {len(lses)}"
        raise ValueError(f"outputs, lses: expected as many of each, at least one; got {counts}")
    for i, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        if output.shape != outputs[0].shape or lse.shape != output.shape[:-1]:
            raise ValueError(
                f"outputs[{i}], lses[{i}]: expected shapes {tuple(outputs[0].shape)} and "
                f"{tuple(outputs[0].shape[:-1])}, got {tuple(output.shape)} and {tuple(lse.shape)}"
            )
    stacked = torch.stack(list(lses))
    lse = stacked.logsumexp(0)
    weights = (stacked - lse).exp().unsqueeze(-1)
    merged = sum(w * output.to(w.dtype) for w, output in zip(weights, outputs, strict=True))
    return merged.to(outputs[0].dtype), lse
