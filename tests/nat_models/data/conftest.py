from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ and val/ with three classes of four and two colour images, 40 wide and 30 high."""
    noise = np.random.default_rng(0)
    for split, count in {"train": 4, "val": 2}.items():
        for label in ("cat", "dog", "newt"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path
