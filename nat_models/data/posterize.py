"""timm's posterizing, made to do what it means: Pillow 13 refuses to keep no bit at all.

RandAugment's strongest posterizing keeps none, and leaves a black image. To import this replaces
timm's operation.
"""

from typing import Any

from PIL import Image
from timm.data import auto_augment


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Keep the highest bits of each channel; black for none."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    kept: Image.Image = auto_augment.posterize(image, bits_to_keep, **options)
    return kept


for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[_name] = posterize
