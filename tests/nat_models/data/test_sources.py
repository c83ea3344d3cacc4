import io
import os
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageDataset

from nat_models.data.sources import class_indices, num_classes, open_dataset, training_classes


def test_folder_finds_its_splits_and_classes(image_folder):
    train = open_dataset("folder", str(image_folder), "train", training=True)
    val = open_dataset("folder", str(image_folder), "validation", training=False)
    assert (len(train), len(val)) == (12, 6)
    assert class_indices(train) == {"cat": 0, "dog": 1, "newt": 2}
    assert num_classes(val) == 3
    encoded, label = val[5]
    assert (Image.open(io.BytesIO(encoded)).size, label) == ((40, 30), 2)


def test_class_map_keeps_the_numbers_of_a_larger_set(image_folder):
    numbers = {"cat": 281, "dog": 207, "newt": 26}
    val = open_dataset("folder", str(image_folder), "validation", False, class_map=numbers)
    assert {label for _, label in val} == {281, 207, 26}
    assert num_classes(val) == 282


def test_fake_images_differ_between_splits():
    options = {"size": 4, "image_size": (3, 8, 8), "num_classes": 5}
    train, val = (open_dataset("fake", None, "", part, options=options) for part in (True, False))
    assert num_classes(train) == 5
    assert train[0][0].tobytes() == train[0][0].tobytes()
    assert train[0][0].tobytes() != val[0][0].tobytes()


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        (None, None, r"data\.name is not set: expected one of .* such as hfds/"),
        ("torch/cifar99", "data", r"data\.name=torch/cifar99: Unknown torchvision dataset cifar99"),
        ("folder", None, r"data\.root is not set"),
        ("folder", "no/such/folder", r"data\.root=no/such/folder: expected a folder"),
        (
            "mnist",
            None,
            r"data\.name='mnist': expected one of \['mnist5k', .* 'folder', 'tar', 'wds'\]",
        ),
    ],
)
def test_bad_input_names_key_and_value(name, root, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(name, root, "train", training=True)


def test_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"data\.root={tmp_path}.*0 images"):
        open_dataset("folder", str(tmp_path), "train", training=True)


def test_an_empty_class_folder_is_named(image_folder):
    (image_folder / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"the class folder .*train/emu holds no image"):
        open_dataset("folder", str(image_folder), "train", training=True)
    chosen = {"cat": 0, "dog": 1}
    data = open_dataset("folder", str(image_folder), "train", training=True, class_map=chosen)
    assert len(data) == 8


@pytest.mark.parametrize("header", ["", "ImageId,PredictionString\n"], ids=["plain", "header"])
def test_a_flat_folder_has_its_classes_in_a_file(image_folder, header):
    flat = image_folder / "flat"
    (flat / "val").mkdir(parents=True)
    lines = []
    for path in (image_folder / "val").glob("*/*.png"):
        path.rename(flat / "val" / f"{path.parent.name}{path.name}")
        name = f"{path.parent.name}{path.stem}" if header else f"{path.parent.name}{path.name}"
        lines.append(
            f"{name},{path.parent.name} 1 2 3 4" if header else f"{name} {path.parent.name}"
        )
    labels = image_folder / "labels.txt"
    labels.write_text(header + "\n".join(lines) + "\n")
    data = open_dataset("folder", str(flat), "validation", False, labels=str(labels))
    assert class_indices(data) == {"cat": 0, "dog": 1, "newt": 2}
    found = {data.filename(i): data[i][1] for i in range(len(data))}
    assert found == {f"{n}{i}.png": k for k, n in enumerate(("cat", "dog", "newt")) for i in (0, 1)}
    assert isinstance(data[0][0], bytes)


@pytest.fixture
def labelled(tmp_path):
    """labelled(*CLASSES): a folder with an image of each, and the file that tells them."""

    def labelled(*classes: str) -> tuple[str, str]:
        (tmp_path / "val").mkdir()
        for i in range(len(classes)):
            (tmp_path / "val" / f"{i}.png").write_bytes(b"encoded")
        lines = [f"{i}.png {name}" for i, name in enumerate(classes)]
        (tmp_path / "labels.txt").write_text("\n".join(lines))
        return str(tmp_path), str(tmp_path / "labels.txt")

    return labelled


@pytest.mark.parametrize(
    ("classes", "class_map", "indices"),
    [
        (["dog", "newt", "dog"], {"cat": 0, "dog": 1, "newt": 2}, [1, 2, 1]),
        (["dog", "newt"], "FILE", [1, 2]),
        (["c10", "c2"], None, [1, 0]),  # in timm's order of folders
        (["1", "2"], {"cat": 0, "dog": 1, "newt": 2}, [1, 2]),  # indices
        (["2", "10"], {"1": 0, "2": 1, "10": 2}, [1, 2]),  # names
    ],
    ids=["map", "file", "own", "indices", "numbers"],
)
def test_a_flat_folders_classes_are_numbered_by_the_class_map(
    labelled, tmp_path, classes, class_map, indices
):
    root, labels = labelled(*classes)
    if class_map == "FILE":
        class_map = str(tmp_path / "classes.txt")
        (tmp_path / "classes.txt").write_text("cat\ndog\nnewt\n")
    data = open_dataset("folder", root, "val", False, class_map, labels=labels)
    assert [target for _, target in data] == indices


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        (
            {"cat": 0, "dog": 1},
            r"data\.labels=.*labels\.txt: unknown class 'newt'; expected a name in "
            r"data\.class_map, by default a training folder's: cat, dog",
        ),
        ({"0": 0, "1": 1}, r"unknown class 'dog'"),
        ("no.txt", r"data\.class_map=no\.txt: Cannot locate"),
    ],
    ids=["unknown", "numbers", "missing"],
)
def test_a_flat_folders_class_that_the_class_map_has_not_is_named(labelled, class_map, message):
    root, labels = labelled("dog", "newt")
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", root, "val", False, class_map, labels=labels)


def test_training_classes_are_timms(image_folder):
    train = image_folder / "train"
    for name in ("empty", "c10", "c2", "group/emu", "group/owl", "notes"):
        (train / name).mkdir(parents=True)
    for name in ("c10/x.JPEG", "c2/.x.jpg", "group/emu/x.jpg", "group/owl/y.png", "notes/x.txt"):
        (train / name).touch()
    (train / "linked").symlink_to(image_folder / "val" / "cat")
    classes = training_classes(str(image_folder), "train")
    assert classes == class_indices(ImageDataset(str(train)))
    assert [*classes] == ["c2", "c10", "cat", "dog", "emu", "linked", "newt", "owl"]
    assert training_classes(str(image_folder), "none") == classes  # timm's other names of it
    assert training_classes(str(train), "none") is None
    (train / "x.png").touch()
    classes = training_classes(str(image_folder), "train")
    assert classes == class_indices(ImageDataset(str(train)))


def test_training_folders_are_read_to_their_first_image(image_folder, monkeypatch):
    scandir, read = os.scandir, []

    class Noted:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.entries.close()

        def __iter__(self):
            return self

        def __next__(self):
            entry = next(self.entries)
            read.append(entry.name)
            return entry

    monkeypatch.setattr(os, "scandir", Noted)
    classes = training_classes(str(image_folder), "train")
    assert classes == {"cat": 0, "dog": 1, "newt": 2}
    assert sum(name.endswith(".png") for name in read) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data\.labels=.*x\.txt: expected a file"),
        ("", r"data\.labels=.*x\.txt: names no image of"),
        ("0.png 1\n7.png 1\n", r"data\.labels=.*x\.txt: line 2: no image 7\.png"),
    ],
    ids=["missing", "empty", "unknown"],
)
def test_a_bad_file_of_labels_is_named(image_folder, tmp_path, content, message):
    labels = tmp_path / "x.txt"
    if content is not None:
        labels.write_text(content)
    root = str(image_folder / "val" / "cat")
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", root, "val", False, labels=str(labels))


def test_tar_files_of_folders_and_of_tars(image_folder):
    with tarfile.open(image_folder / "train.tar", "w") as tar:  # as ImageNet's: a tar a class
        for folder in sorted((image_folder / "train").iterdir()):
            inner = image_folder / f"{folder.name}.tar"
            with tarfile.open(inner, "w") as packed:
                for path in folder.iterdir():
                    packed.add(path, path.name)
            tar.add(inner, inner.name)
            inner.unlink()
    with tarfile.open(image_folder / "val.tar", "w") as tar:
        tar.add(image_folder / "val", "val")
    for split, images in (("train", 12), ("validation", 6)):
        data = open_dataset("tar", str(image_folder), split, training=split == "train")
        assert len(data) == images
        assert class_indices(data) == {"cat": 0, "dog": 1, "newt": 2}
        encoded, label = data[images - 1]
        assert (Image.open(io.BytesIO(encoded)).size, label) == ((40, 30), 2)


def test_torchvisions_sets(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", 5), ("t10k", 3)):
        pixels = np.zeros((n, 28, 28), np.uint8)
        header = struct.pack(">IIII", 0x803, n, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">II", 0x801, n)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + bytes(range(n)))
    train = open_dataset("torch/mnist", str(tmp_path), "train", training=True)
    val = open_dataset("torch/mnist", str(tmp_path), "validation", training=False)
    assert (len(train), len(val), val[2][1], num_classes(train)) == (5, 3, 2, 10)


def test_hugging_faces_sets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="comes with nat-models[data]")
    columns = {"image": [Image.new("L", (8, 6), i) for i in range(4)], "label": [0, 1, 1, 0]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    (tmp_path / "set").mkdir()
    made.to_parquet(tmp_path / "set" / "train.parquet")
    data = open_dataset(f"hfds/{tmp_path}/set", str(tmp_path / "cache"), "train", training=True)
    assert class_indices(data) == {"a": 0, "b": 1}
    encoded, label = data[2]
    assert (Image.open(io.BytesIO(encoded)).size, label) == ((8, 6), 1)
