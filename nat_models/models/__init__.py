"""The model zoo, one module a family; importing a family registers its models with timm."""

from nat_models.models import demo, nat

__all__ = ["demo", "nat"]
