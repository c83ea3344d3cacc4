"""Operations in fewer passes over memory than PyTorch makes of them, in Triton."""

from nat_models.fused.functional import (
    Branch,
    Norm,
    add,
    add_layer_norm,
    add_norm_linear,
    add_norm_mlp,
    layer_norm,
    mlp,
    small_linear,
)
from nat_models.fused.modules import LayerNorm, Mlp, is_observed
from nat_models.fused.use import mlp_is_used, norm_is_used, small_linear_is_used, using

__all__ = [
    "Branch",
    "LayerNorm",
    "Mlp",
    "Norm",
    "add",
    "add_layer_norm",
    "add_norm_linear",
    "add_norm_mlp",
    "is_observed",
    "layer_norm",
    "mlp",
    "mlp_is_used",
    "norm_is_used",
    "small_linear",
    "small_linear_is_used",
    "using",
]
