import pytest
from PIL import Image

from nat_models.data.sources import class_indices, num_classes, open_dataset


def test_folder_finds_its_splits_and_classes(image_folder):
    train = open_dataset("folder", str(image_folder), "train", training=True)
    val = open_dataset("folder", str(image_folder), "validation", training=False)
    assert (len(train), len(val)) == (12, 6)
    assert class_indices(train) == {"cat": 0, "dog": 1, "newt": 2}
    assert num_classes(val) == 3
    image, label = val[5]
    assert (image.size, image.mode, label) == ((40, 30), "RGB", 2)


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
        ("folder", None, r"data\.root is not set"),
        ("folder", "no/such/folder", r"data\.root=no/such/folder: expected a folder"),
        (
            "mnist",
            None,
            r"data\.name='mnist': expected one of \['mnist5k', 'digits', 'fake', 'folder'\]",
        ),
    ],
)
def test_bad_input_names_key_and_value(name, root, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(name, root, "train", training=True)


def test_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"data\.root={tmp_path}.*0 images"):
        open_dataset("folder", str(tmp_path), "train", training=True)


def test_evaluation_does_not_replace_an_unreadable_image(tmp_path):
    for label in ("a", "b"):
        folder = tmp_path / "val" / label
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "1.png")
    (tmp_path / "val" / "a" / "0.png").touch()
    data = open_dataset("folder", str(tmp_path), "val", training=False)
    assert len(data) == 3
    with pytest.raises(RuntimeError, match="Failed to load"):
        data[0]
    assert open_dataset("folder", str(tmp_path), "val", training=True)[0][1] == 0
