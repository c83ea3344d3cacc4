"""Key layouts of published checkpoints, recognised by their keys, and the way between them.

- `ours`: this package's; a downsampler opens its level, the classifier is `head.fc`.
- `official`: the original code's; a downsampler closes the level before, the classifier is `head`,
  DiNAT_s and the isotropic models say `layers`, and detectors have norms of the levels' outputs.
- `hf`: Hugging Face transformers' `Nat*` and `Dinat*` classes; query, key and value are apart.

Any of them may lie under a prefix, as in detectors (`backbone.`) and training modules (`model.`).
"""

import re

import torch
from torch import Tensor

from nat_models.checkpoints.files import StateDict

LAYOUTS = ("ours", "official", "hf")

# Beginnings of keys, official and transformers': of the whole model's, and of a block's.
_MODEL_KEYS = {
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "patch_embed.norm.": "embeddings.norm.",
    "levels.": "encoder.levels.",
    "norm.": "layernorm.",
    "norm0.": "hidden_states_norms.stage1.",
    "norm1.": "hidden_states_norms.stage2.",
    "norm2.": "hidden_states_norms.stage3.",
    "norm3.": "hidden_states_norms.stage4.",
    "head.": "classifier.",
}
_BLOCK_KEYS = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.rpb": "attention.self.rpb",
    "attn.proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
_QKV = ("query", "key", "value")
_STEM = re.compile(r"(?:patch_embed\.proj|(nat\.|dinat\.)?embeddings\.patch_embeddings)\.")


def layout_of(state_dict: StateDict) -> str:
    """The layout of keys that have no prefix; `ours` if they are of no known model."""
    if not any(key.endswith(".rpb") for key in state_dict):
        return "ours"
    if "embeddings.norm.weight" in state_dict:
        return "hf"
    official = re.compile(r"layers\.|levels\.0\.downsample\.|norm\d\.|head\.(weight|bias)$")
    return "official" if any(map(official.match, state_dict)) else "ours"


def to_ours(state_dict: StateDict) -> StateDict:
    """Bring a state dict of any known layout, prefixed or not, into this package's.

    Args:
        state_dict: Tensors by key; not modified.

    Returns:
        A new state dict, in which what lies beside the model is left out. Keys of no known model
        are passed on as they are.

    Raises:
        ValueError: It holds several models.
    """
    state_dict = {
        key: value
        for key, value in without_prefix(state_dict).items()
        if not key.endswith(".relative_position_index")  # follows from the size
    }
    layout = layout_of(state_dict)
    if layout == "hf":
        state_dict = _from_transformers(state_dict)
    if layout != "ours":
        state_dict = {_from_official(key): value for key, value in state_dict.items()}
    return state_dict


def to_layout(state_dict: StateDict, layout: str, model_name: str) -> StateDict:
    """Bring a state dict of this package's layout into another one.

    Args:
        state_dict: Tensors by key; not modified.
        layout: One of `LAYOUTS`.
        model_name: Name of the model.

    Returns:
        A new state dict. In transformers' layout, one without a classifier is that of the classes
        without a prefix, such as `DinatBackbone`.

    Raises:
        ValueError: transformers has no class for the model.
    """
    if layout == "ours":
        return dict(state_dict)
    two_convolutions = "patch_embed.proj.0.weight" in state_dict  # NAT and DiNAT
    levels = "levels" if two_convolutions else "layers"
    official = {_to_official(key, levels): value for key, value in state_dict.items()}
    if layout == "hf":
        if not two_convolutions:
            raise ValueError(f"transformers has no class for {model_name}")
        return _to_transformers(official, "dinat." if model_name.startswith("dinat") else "nat.")
    if model_name.startswith("vitrpb"):
        official |= _position_indices(official)
    return official


def without_prefix(state_dict: StateDict) -> StateDict:
    """Keep what lies under the prefix of the stem's keys, and transformers' classifier beside it.

    Raises:
        ValueError: There are several stems.
    """
    matches = [match for key in state_dict if (match := _STEM.search(key))]
    stems = {(match.string[: match.start()], match[1] or "") for match in matches}
    if len(stems) > 1:
        found = sorted(outer + inner for outer, inner in stems)
        raise ValueError(f"holds several models, under the prefixes {found}")
    outer, inner = stems.pop() if stems else ("", "")
    return {
        key.removeprefix(outer).removeprefix(inner): value
        for key, value in state_dict.items()
        if key.startswith((outer + inner, f"{outer}classifier."))
    }


def _from_official(key: str) -> str:
    """Rename a key of the original layout; those of ours stay."""
    key = re.sub(r"^layers\.", "levels.", key)
    key = _moved_downsampler(key, by=1)
    key = re.sub(r"\.gamma([12])$", r".ls\1.gamma", key)
    key = re.sub(r"^norm(\d)\.", r"stage_norms.\1.", key)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)


def _to_official(key: str, levels: str) -> str:
    """Rename a key of ours, to a model that calls its levels so."""
    key = _moved_downsampler(key, by=-1)
    key = re.sub(r"^levels\.", f"{levels}.", key)
    key = re.sub(r"\.ls([12])\.gamma$", r".gamma\1", key)
    key = re.sub(r"^stage_norms\.(\d)\.", r"norm\1.", key)
    return re.sub(r"^head\.fc\.", "head.", key)


def _moved_downsampler(key: str, by: int) -> str:
    return re.sub(
        r"^levels\.(\d+)\.downsample\.",
        lambda match: f"levels.{int(match[1]) + by}.downsample.",
        key,
    )


def _from_transformers(state_dict: StateDict) -> StateDict:
    """Rename to the official layout, join query, key and value, split the layer scales."""
    model_keys = {theirs: official for official, theirs in _MODEL_KEYS.items()}
    block_keys = {theirs: official for official, theirs in _BLOCK_KEYS.items()}
    official = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r"encoder\.levels\.(\d+)\.layers\.(\d+)\.(.+)", key)
        if not match:
            official[_renamed(key, model_keys)] = value
            continue
        block, leaf = f"levels.{match[1]}.blocks.{match[2]}.", match[3]
        if leaf == "layer_scale_parameters":
            official[f"{block}gamma1"], official[f"{block}gamma2"] = value
        elif part := re.fullmatch(r"attention\.self\.(query|key|value)\.(\w+)", leaf):
            projections.setdefault(f"{block}attn.qkv.{part[2]}", {})[part[1]] = value
        else:
            official[block + _renamed(leaf, block_keys)] = value
    for key, parts in projections.items():
        if len(parts) == len(_QKV):
            official[key] = torch.cat([parts[name] for name in _QKV])
    return official


def _to_transformers(official: StateDict, prefix: str) -> StateDict:
    """Rename from the official layout, split `qkv`, join the layer scales."""
    prefix = prefix if "head.weight" in official else ""
    hf = {}
    for key, value in official.items():
        match = re.fullmatch(r"levels\.(\d+)\.blocks\.(\d+)\.(.+)", key)
        if not match:
            renamed = _renamed(key, _MODEL_KEYS)
            hf[renamed if renamed.startswith("classifier.") else prefix + renamed] = value
            continue
        layer, leaf = f"{prefix}encoder.levels.{match[1]}.layers.{match[2]}.", match[3]
        if leaf.startswith("attn.qkv."):
            for part, rows in zip(_QKV, value.chunk(3), strict=True):
                hf[f"{layer}attention.self.{part}.{leaf.rpartition('.')[2]}"] = rows
        elif leaf == "gamma1":
            gamma2 = official[key.replace("gamma1", "gamma2")]
            hf[f"{layer}layer_scale_parameters"] = torch.stack([value, gamma2])
        elif leaf != "gamma2":
            hf[layer + _renamed(leaf, _BLOCK_KEYS)] = value
    return hf


def _renamed(key: str, beginnings: dict[str, str]) -> str:
    for old, new in beginnings.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _position_indices(official: StateDict) -> StateDict:
    """The buffers of ViT-RPB: where in the bias table a pair of tokens looks, [tokens, tokens]."""
    indices = {}
    for key, table in official.items():
        if key.endswith(".rpb"):
            height, width = ((side + 1) // 2 for side in table.shape[1:])
            grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
            row, column = (grid[None] - grid[:, None]).unbind(-1)  # key minus query
            index = (row + height - 1) * table.shape[2] + column + width - 1
            indices[key.replace(".rpb", ".relative_position_index")] = index
    return indices
