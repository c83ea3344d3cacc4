"""Opening a data set by name: small packaged ones, synthetic images, and all that timm opens."""

import os
import re
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, create_dataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import is_img_extension
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key
from torch.utils.data import Dataset
from torchvision.datasets import FakeData

from nat_models.data import small

ClassMap = str | dict[str, int] | None

SMALL = {"mnist5k": small.mnist5k, "digits": small.digits}
UNSUPPORTED = ("hfids", "tfds")  # streams without a repeatable order
EXTRA = {"hfds": "datasets", "wds": "webdataset"}  # packages of nat-models[data]


def open_dataset(
    name: str | None,
    root: str | None,
    split: str,
    training: bool,
    class_map: ClassMap = None,
    options: dict[str, Any] | None = None,
    labels: str | None = None,
) -> Dataset[Any]:
    """Open one split of a data set of (image or its bytes, class index) pairs.

    Args:
        name: "mnist5k", "digits", "fake" (synthetic), "folder" (one folder a class), "tar" (the
            same in tar files), "wds" (shards), or a name with a prefix that
            `timm.data.create_dataset` knows: "torch/..." (torchvision) or "hfds/..." (datasets).
        root: Folder of the data. For "folder" it holds the class folders, or one folder of them for
            each split; for "tar" SPLIT.tar, or what lies in them unpacked; for "wds" the shards.
        split: Name of the split; for "wds" it may be `NAME-{0000..0099}.tar|IMAGES`.
        training: Whether this is the part to train on, for the sets that have no named splits.
        class_map: For "folder": class index by folder name, or a file of folder names; default:
            sorted by name. With `labels`: of the names in that file, which may have no others.
        options: Further arguments of the set's own reader.
        labels: For a "folder" without class folders: file of lines `IMAGE CLASS`.

    Raises:
        ValueError: The data is not there; the message names the configuration key.
    """
    options = options or {}
    known = f"one of {[*SMALL, 'fake', 'folder', 'tar', 'wds']}, or timm's PREFIX/NAME"
    if not name:
        raise ValueError(f"data.name is not set: expected {known}, such as hfds/ylecun/mnist")
    prefix = name.partition("/")[0]
    if name in SMALL:
        return SMALL[name](training, **options)
    if name == "fake":
        # Other images for evaluation: each is drawn from its index plus the offset.
        fake: Dataset[Any] = FakeData(random_offset=0 if training else 10**6, **options)
        return fake
    if name in ("folder", "tar", "wds"):
        if root is None:
            raise ValueError("data.root is not set: expected the folder of the images")
        if not Path(root).is_dir():
            raise ValueError(f"data.root={root}: expected a folder, there is none")
    elif "/" not in name:
        raise ValueError(f"data.name={name!r}: expected {known}")
    if prefix in UNSUPPORTED:
        raise ValueError(f"data.name={name!r}: {prefix} is not supported, its order differs by run")
    if name == "folder" and labels is not None:
        flat = ImageDataset(root, reader=FlatReader(str(root), split, labels, class_map))
        return _strict(flat)  # type: ignore[no-any-return]
    try:
        data = _open_with_timm(name, root, split, training, class_map, options)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"data.name={name}: needs {EXTRA.get(prefix, error.name)}; pip install "
            "'nat-models[data]'"
        ) from error
    except (AssertionError, RuntimeError, OSError) as error:  # timm found nothing
        by_name = root is None or str(error).startswith("Unknown")
        given = f"data.name={name}" if by_name else f"data.root={root}"
        raise ValueError(f"{given}: {error}") from error
    if name == "folder" and class_map is None:
        _check_no_class_is_empty(Path(data.reader.root), class_indices(data) or {})
    return data  # type: ignore[no-any-return]


def num_classes(data: Dataset[Any]) -> int | None:
    """Number of classes that a data set knows of, None if it does not say."""
    if classes := class_indices(data):
        return max(classes.values()) + 1
    return getattr(data, "num_classes", None)


def class_indices(data: Dataset[Any]) -> dict[str, int] | None:
    """Class index by name, None if the data set does not say."""
    reader = getattr(data, "reader", data)
    for name in ("class_to_idx", "class_name_to_idx"):
        if indices := getattr(reader, name, None):
            return dict(indices)
    return None


def training_classes(root: str | None, split: str) -> dict[str, int] | None:
    """Class index by name of the training split's folders, None if there is no such split.

    As timm numbers them, but a class's folder is read to its first image alone.
    """
    for name in (split, "train", "training"):
        if root is not None and Path(root, name).is_dir():
            classes = sorted(_class_folders(Path(root, name)), key=natural_key)
            return {name: i for i, name in enumerate(classes)}
    return None


def count(data: Any) -> int:
    """Number of images."""
    images: int = getattr(getattr(data, "reader", None), "num_samples", None) or len(data)
    return images


class FlatReader(Reader):
    """Images in one folder, with their classes in a file, as ImageNet's validation images come.

    Args:
        root: The folder, or the one above it.
        split: Name of the folder.
        labels: File of lines `IMAGE CLASS`, separated by blanks or a comma, more behind them is
            left out, as is a header; a class is an index or a name.
        class_map: Class index by name, or a file of names; default: the file's own names, sorted.
    """

    def __init__(self, root: str, split: str, labels: str, class_map: ClassMap = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if not Path(labels).is_file():
            raise ValueError(f"data.labels={labels}: expected a file, there is none")
        folders = [Path(root, name) for name in (split, "val", "validation")]
        self.root = next((folder for folder in folders if folder.is_dir()), Path(root))
        files = {path.stem: path for path in self.root.iterdir()}
        pairs = []
        for number, line in enumerate(Path(labels).read_text().splitlines()):
            image, name, *_ = [*re.split(r"[\s,]+", line.strip()), ""]
            if Path(image).stem in files:
                pairs.append((files[Path(image).stem], name))
            elif image and number:  # the first line may be a header
                raise ValueError(f"data.labels={labels}: line {number + 1}: no image {image}")
        if not pairs:
            raise ValueError(f"data.labels={labels}: names no image of {self.root}")
        indices = self._indices({name for _, name in pairs}, labels, class_map)
        self.samples = [(str(path), indices[name]) for path, name in pairs]

    def _indices(self, names: set[str], labels: str, class_map: ClassMap) -> dict[str, int]:
        known = _load_class_map(class_map, self.root)
        # Where folders are called by numbers, a number is a name.
        may_be_indices = not any(name.isdecimal() for name in known or ())
        if may_be_indices and all(name.isdecimal() for name in names):
            return {name: int(name) for name in names}
        in_order = sorted(names, key=natural_key)  # timm's, of folders
        self.class_to_idx = known or {name: i for i, name in enumerate(in_order)}
        for name in in_order:
            if name not in self.class_to_idx:
                raise ValueError(
                    f"data.labels={labels}: unknown class {name!r}; expected a name in "
                    f"data.class_map, by default a training folder's: "
                    f"{', '.join([*self.class_to_idx][:5])}, ..."
                )
        return self.class_to_idx

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        return open(path, "rb"), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = Path(self.samples[index][0])
        return path.name if basename or not absolute else str(path)


def _open_with_timm(
    name: str,
    root: str | None,
    split: str,
    training: bool,
    class_map: ClassMap,
    options: dict[str, Any],
) -> Any:
    if name == "tar":
        names = [split, "val"] if split == "validation" else [split]
        tars = [Path(root or "", f"{name}.tar") for name in names]
        root = str(next((tar for tar in tars if tar.is_file()), root))
    if name == "wds":
        options = {"is_training": training, **options}
    create: Any = create_dataset  # its annotations leave out a class map's file name
    name = {"folder": "", "tar": "", "wds": "wds/"}.get(name, name)
    data: Any = create(name, root=root, split=split, class_map=class_map, **options)
    return _strict(data)


def _strict(data: Any) -> Any:
    """Images are decoded by us, and none is given in place of a broken one."""
    if isinstance(data, ImageDataset):
        data.load_bytes, data._max_retries = True, 1
    return data


def _load_class_map(class_map: ClassMap, root: Path) -> dict[str, int] | None:
    if class_map is None:
        return None
    try:
        return {str(name): i for name, i in load_class_map(class_map, str(root)).items()}
    except (AssertionError, ValueError, OSError) as error:
        raise ValueError(f"data.class_map={class_map}: {error}") from error


def _class_folders(root: os.PathLike[str]) -> set[str]:
    """Names of the folders with images below one: its own, or where they hold none, theirs."""
    names = set()
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir():
                names |= {entry.name} if _holds_image(entry) else _class_folders(entry)
            elif _is_image(entry):
                names.add("")  # as timm calls what lies in no folder
    return names


def _holds_image(folder: os.PathLike[str]) -> bool:
    with os.scandir(folder) as entries:
        return any(_is_image(entry) and not entry.is_dir() for entry in entries)


def _is_image(path: os.PathLike[str]) -> bool:
    return bool(is_img_extension(Path(path).suffix.lower()))


def _check_no_class_is_empty(root: Path, classes: dict[str, int]) -> None:
    for folder in sorted(root.iterdir()):
        empty = folder.is_dir() and folder.name not in classes
        if empty and not any(inner.is_dir() for inner in folder.iterdir()):
            raise ValueError(f"data.root: the class folder {folder} holds no image")
