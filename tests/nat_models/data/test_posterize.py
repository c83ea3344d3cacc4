"""Augmentation at its strongest."""

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import AugmentOp

import nat_models.data  # noqa: F401 - repairs the operation

PIXELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("magnitude", "bits"), [(10, 0), (9, 1), (5, 2), (0, 4)])
def test_as_many_bits_are_kept_as_the_magnitude_says(mode, magnitude, bits):
    picture = Image.fromarray(PIXELS).convert(mode)
    image = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=magnitude)(picture)
    assert (image.mode, image.size) == (picture.mode, picture.size)
    mask = 256 - 2 ** (8 - bits)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(picture) & mask)
