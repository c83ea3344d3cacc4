"""Modules that run fused; parameters and results are those of the modules that they replace."""

import torch
from timm import layers
from torch import Tensor, nn
from torch.nn import functional as F

from nat_models.fused import functional


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis, with weight and bias.

    Shape: [..., C] -> [..., C].
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        if torch.jit.is_scripting():
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            x = functional.layer_norm(x, self.weight, self.bias, self.eps)
        return x


class Mlp(layers.Mlp):
    """timm's MLP: a linear layer, GELU, a linear layer, each with dropout after it.

    Shape: [..., C] -> [..., C].
    """

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token."""
        if not torch.jit.is_scripting() and self._is_fused(x):
            x = functional.linear_gelu(x, self.fc1.weight, self.fc1.get_parameter("bias"))
        else:
            x = self.act(self.fc1(x))
        x = self.drop2(self.fc2(self.drop1(x)))
        return x

    @torch.jit.ignore
    def _is_fused(self, x: Tensor) -> bool:
        return (
            functional.is_used("linear_gelu", x)
            and type(self.fc1) is nn.Linear
            and type(self.act) is nn.GELU
            and not is_observed(self.fc1)
            and not is_observed(self.act)
        )


def is_observed(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward: then it must be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
    )
