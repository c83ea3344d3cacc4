import numpy as np
import pytest

from nat_models.data import ImageDataModule
from nat_models.engine.labels import class_names, real_accuracy, valid_labels
from nat_models.engine.module import Classifier


def test_names_come_from_imagenet_or_are_numbers():
    names = class_names(Classifier(model={"name": "test_resnet"}), None, None)
    assert (len(names), names[0]) == (1000, "tench, Tinca tinca")
    assert class_names(Classifier(model={"name": "nat_demo", "num_classes": 2}), None, None) == [
        "0",
        "1",
    ]


def test_parts_of_imagenet():
    assert valid_labels(None) is None
    for name in ("imagenet_a", "imagenet_r"):
        labels = valid_labels(name)
        assert len(labels) == 200
        assert labels.tolist() == sorted(labels.tolist())
        assert labels.max() < 1000


def test_a_file_that_holds_no_indices_is_named(tmp_path):
    (tmp_path / "x.txt").write_text("cat")
    with pytest.raises(ValueError, match=r"valid_labels=.*x\.txt: expected an index a line"):
        valid_labels(str(tmp_path / "x.txt"))


def test_real_labels_accept_any_of_an_images_labels(monkeypatch):
    data = ImageDataModule("fake")
    monkeypatch.setattr(data, "image_name", lambda i: f"val/ILSVRC2012_val_{i + 1:08d}.JPEG")
    # The first image has no label, the second 795 and 970, the third 230 and 231.
    classes = np.array([[1, 2, 3, 4, 5], [970, 1, 2, 3, 4], [1, 2, 231, 3, 4]])
    table = {"index": np.arange(3), "classes": classes}
    assert real_accuracy(table, data) == {"val/real_top1": 0.5, "val/real_top5": 1.0}
