"""Names of models."""

import timm

from nat_models.errors import did_you_mean


def check_model_name(key: str, name: str) -> None:
    """Raise ValueError if timm has no model of that name; an address (`local-dir:...`) is let pass.

    Args:
        key: The configuration's key that it is the value of.
        name: Registered name, with or without a tag.
    """
    if ":" not in name and not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise ValueError(f"{key}={name}: timm has no such model{hint}")
