"""Operations in fewer passes over memory than PyTorch makes of them, in Triton."""

from nat_models.fused.functional import (
    USED,
    Branch,
    add,
    add_layer_norm,
    is_used,
    layer_norm,
    linear_gelu,
    mlp,
)
from nat_models.fused.modules import LayerNorm, Mlp, is_observed

__all__ = [
    "USED",
    "Branch",
    "LayerNorm",
    "Mlp",
    "add",
    "add_layer_norm",
    "is_observed",
    "is_used",
    "layer_norm",
    "linear_gelu",
    "mlp",
]
