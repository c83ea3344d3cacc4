"""Opening a data set by name: small packaged ones, synthetic images, and all that timm opens."""

from pathlib import Path
from typing import Any, cast

from timm.data import create_dataset
from torch.utils.data import Dataset
from torchvision.datasets import FakeData

from nat_models.data import small

ClassMap = str | dict[str, int] | None

# Prefixes of timm's readers that cannot be indexed.
STREAMED = ("hfids", "tfds", "wds")
SMALL = {"mnist5k": small.mnist5k, "digits": small.digits}


def open_dataset(
    name: str,
    root: str | None,
    split: str,
    training: bool,
    class_map: ClassMap = None,
    options: dict[str, Any] | None = None,
) -> Dataset[Any]:
    """Open one split of a data set of (PIL image, class index) pairs.

    Args:
        name: "mnist5k", "digits", "fake" (synthetic), "folder" (one folder a class), or a name with
            a prefix that `timm.data.create_dataset` knows, such as "hfds/..." or "torch/...".
        root: Folder of the data; for "folder" it holds the class folders, or one folder of them for
            each split.
        split: Name of the split.
        training: Whether this is the part to train on, for the sets that have no named splits.
        class_map: For "folder": class index by folder name, or a file of folder names; default:
            sorted by name.
        options: Further arguments of the set's own reader.

    Raises:
        ValueError: The data is not there; the message names the configuration key.
    """
    options = options or {}
    if name in SMALL:
        return SMALL[name](training, **options)
    if name == "fake":
        # Other images for evaluation: each is drawn from its index plus the offset.
        fake: Dataset[Any] = FakeData(random_offset=0 if training else 10**6, **options)
        return fake
    if name == "folder":
        return _open_folder(root, split, training, class_map, options)
    if "/" not in name:
        known = [*SMALL, "fake", "folder"]
        raise ValueError(f"data.name={name!r}: expected one of {known}, or timm's PREFIX/NAME")
    if name.partition("/")[0] in STREAMED:
        raise ValueError(f"data.name={name!r}: streamed data sets are not supported yet")
    return _open_with_timm(name, root, split, training, class_map, options)


def num_classes(data: Dataset[Any]) -> int | None:
    """Number of classes that a data set knows of, None if it does not say."""
    if classes := class_indices(data):
        return max(classes.values()) + 1
    return getattr(data, "num_classes", None)


def class_indices(data: Dataset[Any]) -> dict[str, int] | None:
    """Class index by name, None if the data set does not say."""
    indices: dict[str, int] | None = getattr(getattr(data, "reader", data), "class_to_idx", None)
    return indices


def _open_with_timm(
    name: str,
    root: str | None,
    split: str,
    training: bool,
    class_map: ClassMap,
    options: dict[str, Any],
) -> Dataset[Any]:
    create: Any = create_dataset  # its annotations leave out a class map's file name
    data: Any = create(name, root=root, split=split, class_map=class_map, **options)
    if not training:  # an unreadable image must not be evaluated as its neighbor
        data._max_retries = 1
    return cast("Dataset[Any]", data)


def _open_folder(
    root: str | None,
    split: str,
    training: bool,
    class_map: ClassMap,
    options: dict[str, Any],
) -> Dataset[Any]:
    if root is None:
        raise ValueError("data.root is not set: expected the folder of the images")
    if not Path(root).is_dir():
        raise ValueError(f"data.root={root}: expected a folder, there is none")
    try:
        return _open_with_timm("", root, split, training, class_map, options)
    except RuntimeError as error:  # timm found no image
        raise ValueError(f"data.root={root}: {error}") from error
