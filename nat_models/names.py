"""Names of models."""

import difflib

import timm


def check_model_name(key: str, name: str) -> None:
    """Raise ValueError if timm has no model of that name; an address (`local-dir:...`) is let pass.

    Args:
        key: The configuration's key that it is the value of.
        name: Registered name, with or without a tag.
    """
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{key}={name}: timm has no such model{hint}")
