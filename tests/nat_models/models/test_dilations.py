"""The named lists of dilations, written out from the publications."""

import pytest

from nat_models.models.dilations import DINAT, DINAT_S, resolve_dilations


@pytest.mark.parametrize(
    ("name", "depths", "expected"),
    [
        ("imagenet", (3, 4, 6, 5), [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1] * 5]),
        ("imagenet_384", (3, 4, 18, 5), [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("coco", (3, 4, 18, 5),
         [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]]),
        ("ade20k", (3, 4, 6, 5), [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]]),
        ("ade20k_640", (3, 4, 18, 5),
         [[1, 20, 1], [1, 5, 1, 10],
          [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5], [1, 2, 1, 2, 1]]),
        ("mask2former", (3, 4, 18, 5),
         [[1, 14, 1], [1, 4, 1, 7],
          [1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 2, 1, 3, 1, 3], [1] * 5]),
    ],
)  # fmt: skip
def test_lists_of_dinat(name, depths, expected):
    assert resolve_dilations(name, depths, DINAT) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coco", [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]]),
        ("ade20k", [[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]]),
    ],
)
def test_lists_of_dinat_s(name, expected):
    assert resolve_dilations(name, (2, 2, 6, 2), DINAT_S) == expected


@pytest.mark.parametrize(
    ("name", "depths", "message"),
    [("magic", (3, 4, 6, 5), "imagenet.*'magic'"), ("coco", (3, 4), r"4 stages.*\(3, 4\)")],
)
def test_wrong_name_or_model_is_refused(name, depths, message):
    with pytest.raises(ValueError, match=message):
        resolve_dilations(name, depths, DINAT)
