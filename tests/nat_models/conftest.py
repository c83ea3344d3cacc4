"""Small models with random weights, and the published key layouts, shared by the tests."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import nat_models  # noqa: F401  registers the models

_RECORDED = Path(__file__).parents[1] / "data/official_state_dicts.json.gz"
OFFICIAL = json.loads(gzip.decompress(_RECORDED.read_bytes()))
_TRANSFORMERS_NAMES = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.rpb": "attention.self.rpb",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
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


def pytest_generate_tests(metafunc: Any) -> None:
    """`official_name`: each published model; `transformers_name`: those that transformers has."""
    if "official_name" in metafunc.fixturenames:
        metafunc.parametrize("official_name", sorted(OFFICIAL))
    if "transformers_name" in metafunc.fixturenames:
        in_transformers = re.compile(r"(di)?nat_(?!s_|isotropic)")
        metafunc.parametrize("transformers_name", sorted(filter(in_transformers.match, OFFICIAL)))


@pytest.fixture
def official_shapes() -> Callable[[str], dict[str, list[int]]]:
    """Shapes of the original code's state dict, by model name."""
    return lambda name: OFFICIAL[name]["state_dict"]


@pytest.fixture
def official_weights() -> Callable[[str], dict[str, Tensor]]:
    """The original code's keys with random tensors, 32 times narrower than the published ones."""

    def create(name: str) -> dict[str, Tensor]:
        def tensor(key: str, shape: list[int]) -> Tensor:
            if key.endswith("relative_position_index"):
                return _flipped_swin_index(14)
            return torch.randn([size // 32 if size % 32 == 0 else size for size in shape])

        return {key: tensor(key, shape) for key, shape in OFFICIAL[name]["state_dict"].items()}

    return create


@pytest.fixture
def to_transformers() -> Callable[..., dict[str, Tensor]]:
    """Converts the original code's layout to transformers'."""
    return _to_transformers


def _to_transformers(original: dict[str, Tensor], prefix: str = "nat.") -> dict[str, Tensor]:
    result = {}
    for key, value in original.items():
        if match := re.fullmatch(r"levels\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            level, block, leaf = match.groups()
            layer = f"{prefix}encoder.levels.{level}.layers.{block}"
            if leaf.startswith("attn.qkv"):
                for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    result[f"{layer}.attention.self.{name}.{leaf.split('.')[-1]}"] = part
            elif leaf == "gamma1":
                gamma2 = original[key.replace("gamma1", "gamma2")]
                result[f"{layer}.layer_scale_parameters"] = torch.stack([value, gamma2])
            elif leaf != "gamma2":
                ours = next(name for name in _TRANSFORMERS_NAMES if leaf.startswith(name))
                result[f"{layer}.{leaf.replace(ours, _TRANSFORMERS_NAMES[ours])}"] = value
        elif key.startswith("levels."):
            result[f"{prefix}encoder.{key}"] = value
        elif key.startswith("patch_embed."):
            name = key[: len("patch_embed.proj")]
            result[prefix + key.replace(name, _TRANSFORMERS_NAMES[name])] = value
        elif key.startswith("norm."):
            result[f"{prefix}layernorm.{key.split('.')[1]}"] = value
        elif match := re.fullmatch(r"norm(\d)\.(\w+)", key):
            result[f"{prefix}hidden_states_norms.stage{int(match[1]) + 1}.{match[2]}"] = value
        else:
            result[key.replace("head.", "classifier.")] = value
    return result


def _flipped_swin_index(side: int) -> Tensor:
    """Swin's index of query minus key, flipped in both axes as the original code does."""
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = ys.flatten(), xs.flatten()
    rows, columns = y[:, None] - y[None, :] + side - 1, x[:, None] - x[None, :] + side - 1
    return torch.flipud(torch.fliplr(rows * (2 * side - 1) + columns))
