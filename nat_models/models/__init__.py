"""The model zoo, one module a family; importing a family registers its models with timm."""

from nat_models.models import demo, dinat, dinat_s, isotropic, nat

__all__ = ["demo", "dinat", "dinat_s", "isotropic", "nat"]
