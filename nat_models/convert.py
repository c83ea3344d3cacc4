"""`python -m nat_models.convert SRC DST`: a checkpoint of any known layout, rewritten in another.

Layouts are described in `nat_models.checkpoints.layouts`. No tensor changes its values, shape aside
from the joining and splitting of projections, or its dtype.
"""

import argparse
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from timm.models import get_pretrained_cfg

import nat_models
from nat_models.checkpoints import (
    LAYOUTS,
    CheckpointError,
    layout_of,
    mismatches,
    read_checkpoint,
    sha256,
    shown,
    to_layout,
    to_ours,
    without_prefix,
    write_checkpoint,
)

StateDict = dict[str, torch.Tensor]


def convert(
    source: Path, target: Path, layout: str = "ours", model_name: str | None = None
) -> tuple[str, str]:
    """Rewrite a checkpoint.

    Args:
        source: File of any known layout.
        target: File to write. A safetensors file tells in its header the model, the layout and the
            SHA-256 of the source.
        layout: Layout of the target, "ours", "official" or "hf".
        model_name: The model; None: the one that the keys, the shapes and the names of the source
            leave.

    Returns:
        Name of the model, and the layout of the source.

    Raises:
        CheckpointError: The source cannot be read, or it is of another model, of none, or of
            several, or transformers has no class for it.
    """
    given = read_checkpoint(source)
    try:
        found = layout_of(without_prefix(given))
        ours = to_ours(given)
        if model_name is None:
            model_name = guess_model(source, given, ours)
        elif problems := _problems(ours, model_name):
            raise ValueError(f"does not fit {model_name}:{shown(problems)}")
        converted = to_layout(ours, layout, model_name)
    except ValueError as error:
        raise CheckpointError(source, str(error)) from error
    metadata = {"model": model_name, "layout": layout, "source_sha256": sha256(source)}
    write_checkpoint(converted, target, metadata)
    return model_name, found


def guess_model(source: Path, given: StateDict, ours: StateDict) -> str:
    """The model that a checkpoint is of, whatever its classes and the image's channels.

    Args:
        source: The file, whose name and header may tell models of the same shapes apart.
        given: Its tensors.
        ours: The same in this package's layout.

    Raises:
        ValueError: It fits no model, or several.
    """
    problems = {name: _problems(ours, name) for name in nat_models.list_models()}
    names = [name for name in problems if not problems[name]]
    if not names:
        nearest = min(problems, key=lambda name: len(problems[name]))
        raise ValueError(f"fits no model, the nearest is {nearest}:{shown(problems[nearest])}")
    for hint in _hints(source, given, ours):
        names = [name for name in names if hint(name)] or names
    if len(names) > 1:
        raise ValueError(f"may be of {', '.join(names)}: choose with --model")
    return names[0]


def _hints(source: Path, given: StateDict, ours: StateDict) -> list[Callable[[str], bool]]:
    """What tells models of the same shapes apart, the surest first."""
    matches = (re.search(r"\b(nat|dinat)\.embeddings\.", key) for key in given)
    family = next((match[1] for match in matches if match), None)
    classes = len(ours.get("head.fc.bias", ()))
    header = None
    if source.suffix == ".safetensors":
        with safe_open(source, "pt") as file:
            header = (file.metadata() or {}).get("model")
    config: Any = get_pretrained_cfg
    return [
        lambda name: name == header,
        lambda name: source.name == (config(name).url or "").rpartition("/")[2],
        lambda name: name.split("_")[0] == family,
        lambda name: config(name).num_classes == classes,
    ]


def _problems(ours: StateDict, model_name: str) -> list[str]:
    """What of a state dict does not fit a model, whatever its classes and the image's channels."""
    wanted = dict(_weights(model_name))
    stem = next(iter(wanted))
    if stem in ours and ours[stem].ndim == 4:  # the first convolution
        filters, _, *kernel = wanted[stem].shape
        wanted[stem] = torch.empty(filters, ours[stem].shape[1], *kernel, device="meta")
    if "head.fc.weight" in ours:
        classes, width = len(ours["head.fc.weight"]), len(wanted["norm.weight"])
        wanted["head.fc.weight"] = torch.empty(classes, width, device="meta")
        wanted["head.fc.bias"] = torch.empty(classes, device="meta")
    elif "norm.weight" not in ours:  # a detector's backbone
        del wanted["norm.weight"], wanted["norm.bias"]
    return mismatches({k: v for k, v in ours.items() if not k.startswith("stage_norms.")}, wanted)


@cache
def _weights(model_name: str) -> StateDict:
    """The state dict of a model without a classifier, and without memory."""
    if model_name not in nat_models.list_models():
        raise ValueError(f"{model_name} is none of {', '.join(nat_models.list_models())}")
    weights: StateDict = timm.create_model(model_name, num_classes=0, device="meta").state_dict()
    return weights


def main() -> None:
    """The command; bad input ends in one message and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m nat_models.convert", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST", help="DST.safetensors, or DST.pth")
    parser.add_argument("--to", choices=LAYOUTS, default="ours", help="layout of DST")
    parser.add_argument("--model", help="model, where the keys and shapes fit several")
    args = parser.parse_args()
    try:
        model_name, layout = convert(args.source, args.target, args.to, args.model)
    except (CheckpointError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{args.target}: {model_name}, {layout} to {args.to}")


if __name__ == "__main__":
    main()
