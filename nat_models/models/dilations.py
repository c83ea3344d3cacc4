"""Named lists of dilations: those of the published classification, detection and other models.

A list holds one dilation a block, per stage. It is written as a pattern that repeats along a stage,
so that one name serves models of several depths.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice

__all__ = ["DINAT", "DINAT_S", "ISOTROPIC", "resolve_dilations"]

Patterns = Mapping[str, Sequence[Sequence[int]]]

# 7x7 windows unless said otherwise.
DINAT: Patterns = {
    "imagenet": ((1, 8), (1, 4), (1, 2), (1,)),  # classification at 224x224
    "imagenet_384": ((1, 13), (1, 6), (1, 3), (1,)),
    "coco": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),  # Mask and Cascade R-CNN
    "ade20k": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),  # UPerNet, crops of 512x512
    "ade20k_640": (  # UPerNet with DiNAT-Large, crops of 640x640
        (1, 20),
        (1, 5, 1, 10),
        (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5),
        (1, 2),
    ),
    "mask2former": (  # DiNAT-Large with 11x11 windows
        (1, 14),
        (1, 4, 1, 7),
        (*(1, 2, 1, 3) * 4, 1, 3),
        (1,),
    ),
}
DINAT_S: Patterns = {
    "imagenet": DINAT["imagenet"],
    "imagenet_384": DINAT["imagenet_384"],
    "coco": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "ade20k": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
}
ISOTROPIC: Patterns = {"imagenet": ((1, 2),)}


def resolve_dilations(name: str, depths: Sequence[int], patterns: Patterns) -> list[list[int]]:
    """The dilations of every block, per stage.

    Args:
        name: Name of a pattern.
        depths: Number of blocks, per stage.
        patterns: Patterns by name.

    Raises:
        ValueError: There is no pattern of that name, or it is one for another number of stages.
    """
    if name not in patterns:
        raise ValueError(f"dilations must be a list or one of {[*patterns]}, got {name!r}")
    if len(patterns[name]) != len(depths):
        stages = len(patterns[name])
        raise ValueError(f"dilations={name!r} is a list for {stages} stages, got {depths=}")
    return [
        [*islice(cycle(pattern), depth)]
        for pattern, depth in zip(patterns[name], depths, strict=True)
    ]
