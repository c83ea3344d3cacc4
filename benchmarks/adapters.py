"""Whole models on other implementations of neighborhood attention, put in place of the operator."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from math import ceil

import torch
from peers import attends, bias_places, heads_first, heads_last
from problem import Problem
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from nat_models.benchmark import steps
from nat_models.benchmark.case import Case
from nat_models.models.base import neighborhood_attentions
from neighborhood_attention import list_backends

Attend = Callable[
    [Tensor], Tensor
]  # packed projection [B, H, W, 3, heads, D] to [B, H, W, heads, D]


def create_model(case: Case, device: torch.device) -> nn.Module:
    """The case's model; an attention backend that is none of ours is put into it."""
    name = case.attention_backend
    if name is None or name in list_backends():
        return steps.create_model(case, device)
    model = steps.create_model(Case(**{**vars(case), "attention_backend": None}), device)
    for attention, problem in _problems(model, case).items():
        attention._attend = ADAPTERS[name](attention, problem, device)
    return model


def available_backends() -> list[str]:
    """Ours, and those of the adapters that can be imported."""
    return [*list_backends(), *(name for name in ADAPTERS if name == "flex" or find_spec(name))]


def _problems(model: nn.Module, case: Case) -> dict[nn.Module, Problem]:
    """What each attention computes; a map smaller than its window is padded to it."""
    problems: dict[nn.Module, Problem] = {}
    for level, info in zip(model.levels, model.feature_info, strict=False):
        for attention in neighborhood_attentions(level):
            sides = [ceil(side / info["reduction"]) for side in case.image_shape[1:]]
            padded = tuple(map(max, sides, attention.extent))
            window = attention.kernel_size, attention.dilation
            heads = attention.num_heads, attention.head_dim
            problems[attention] = Problem(padded, *heads, *window, case.batch_size)
    return problems


def flex(attention: nn.Module, problem: Problem, device: torch.device) -> Attend:
    """PyTorch's FlexAttention on tokens in rows: block mask made before, bias by score_mod."""
    blocks = _block_mask(problem, device.type)
    torch._dynamo.config.recompile_limit = 64  # in the eager model each attention is a new one
    run = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def attend(qkv: Tensor) -> Tensor:
        rpb = attention.rpb.flatten(1)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + rpb[h, bias_places(problem, query, key)]

        query, key, value = (heads_first(x) for x in qkv.unbind(-3))
        scale = attention.scale
        output = run(query, key, value, score_mod=score_mod, block_mask=blocks, scale=scale)
        return heads_last(problem, output)

    return attend


@cache
def _block_mask(problem: Problem, device: str) -> BlockMask:
    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return attends(problem, query, key)

    return create_block_mask(mask_mod, None, None, problem.tokens, problem.tokens, device=device)


def natten(attention: nn.Module, problem: Problem, device: torch.device) -> Attend:
    """NATTEN's own choice of kernel; it adds no bias, so it computes less than the model needs."""
    from natten import na2d

    window = {"kernel_size": attention.kernel_size, "dilation": attention.dilation}

    def attend(qkv: Tensor) -> Tensor:
        query, key, value = (x.contiguous() for x in qkv.unbind(-3))
        return na2d(query, key, value, scale=attention.scale, **window)

    return attend


ADAPTERS: dict[str, Callable[[nn.Module, Problem, torch.device], Attend]] = {
    "flex": flex,
    "natten": natten,
}
