"""Operations in fewer passes over memory than PyTorch makes of them, in Triton."""

from nat_models.fused.functional import Branch, add, add_layer_norm, layer_norm, mlp
from nat_models.fused.modules import LayerNorm, Mlp, is_observed
from nat_models.fused.use import mlp_is_used, norm_is_used, using

__all__ = [
    "Branch",
    "LayerNorm",
    "Mlp",
    "add",
    "add_layer_norm",
    "is_observed",
    "layer_norm",
    "mlp",
    "mlp_is_used",
    "norm_is_used",
    "using",
]
