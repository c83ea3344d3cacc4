"""Neighborhood-attention vision models. Importing the package registers the models with timm.

Example:
    >>> import nat_models
    >>> model = nat_models.create_model("nat_tiny", num_classes=10)
"""

from timm import create_model
from timm import list_models as list_timm_models

import neighborhood_attention.flops  # noqa: F401 (registers the operators' FLOP counts)
from nat_models import models

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models", "models"]


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names of the models that this package adds to timm.

    Args:
        filter: Shell-style pattern, e.g. `"nat_*"`; all models if empty.
        pretrained: Only the models with published weights, each with its tag.

    Returns:
        Sorted names, ready for `create_model`.
    """
    return list_timm_models(filter, module=models.__all__, pretrained=pretrained)
