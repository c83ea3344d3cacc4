"""Small models with random weights, and the original code's key layout, shared by the tests."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import nat_models  # noqa: F401  registers the models

TINY = {"embed_dim": 32, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 4, 8), "num_classes": 11}
TINY_ISOTROPIC = {"embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 11}


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Creates a narrow, shallow model in which no parameter is at a value that hides a mistake."""

    def create(name: str, **kwargs: Any) -> Any:
        tiny = TINY_ISOTROPIC if re.search("isotropic|vitrpb", name) else TINY
        model = timm.create_model(name, **{**tiny, **kwargs}).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(".rpb"):
                    parameter.normal_()
                elif parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return model

    return create


@pytest.fixture
def tiny_nat(tiny_model) -> Callable[..., Any]:
    """Creates a small NAT."""
    return lambda name="nat_mini", **kwargs: tiny_model(name, **kwargs)


@pytest.fixture
def to_original() -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Converts our state dict to the original code's layout."""

    def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        # Those with two convolutions in the stem say "levels", the others "layers".
        name = "levels" if "patch_embed.proj.0.weight" in state_dict else "layers"
        original = {}
        for key, value in state_dict.items():
            parts = key.split(".")
            if parts[2:3] == ["downsample"]:
                parts[1] = str(int(parts[1]) - 1)
            key = ".".join(parts).replace("head.fc.", "head.").replace("levels.", f"{name}.")
            original[re.sub(r"ls([12])\.gamma", r"gamma\1", key)] = value
        return original

    return convert
