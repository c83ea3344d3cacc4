import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from nat_models.data.images import Complaints, DecodedDataset, collate, decode
from nat_models.errors import RunStopped

GREY = np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


PICTURES = {
    "grey": encoded(Image.fromarray(GREY)),
    "rgb": encoded(Image.fromarray(np.stack([GREY] * 3, -1))),
    "rgba": encoded(Image.fromarray(np.stack([GREY] * 4, -1))),
    "palette": encoded(Image.fromarray(GREY).convert("P")),
    "sixteen_bits": encoded(Image.fromarray(GREY.astype(np.uint16) * 257)),
    "cmyk": encoded(Image.fromarray(np.stack([GREY] * 3, -1)).convert("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_is_the_same_grey(name, mode):
    pixels = np.asarray(decode(PICTURES[name], mode)).astype(int)
    expected = GREY if mode == "L" else np.stack([GREY] * 3, -1)
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_single_pixel_becomes_a_whole_image(training):
    source = [(encoded(Image.new("RGB", (1, 1), "red")), 3)]
    transform = create_transform(
        (3, 16, 16), is_training=training, use_prefetcher=True, color_jitter=0
    )
    image, target, errors, _ = DecodedDataset(source, transform, "RGB", training)[0]
    assert (image.shape, target, errors) == ((3, 16, 16), 3, [])
    assert image[0].min() > 250


class Files(list):
    def filename(self, index: int, absolute: bool) -> str:
        return f"{index}.png"


def files() -> Files:
    good = PICTURES["rgb"]
    return Files([(good, 0), (good[:60], 1), (b"", 2), (b"text", 3), (good, 4)])


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_in_training_the_next_image_takes_the_place_of_a_broken_one():
    data = DecodedDataset(files(), pixels, "RGB", training=True)
    image, target, errors, index = data[1]
    assert (image is not None, target, index) == (True, 4, 1)
    assert [error.partition(":")[0] for error in errors] == ["1.png", "2.png", "3.png"]
    assert "truncated" in errors[0]


def test_whatever_a_damaged_file_makes_a_decoder_raise_is_a_broken_image():
    file = bytearray(encoded(Image.fromarray(GREY).convert("1"), "TIFF"))
    file[file.index(b"\x11\x01\x04\x00") + 2] = 7  # where its pixels are: bytes, no integer
    with pytest.raises(TypeError):
        decode(bytes(file), "L")
    data = DecodedDataset([(bytes(file), 0)], pixels, "L", training=False)
    assert data[0][:2] == (None, -1)


def test_in_evaluation_nothing_does():
    data = DecodedDataset(files(), pixels, "RGB", training=False)
    images, targets, errors, indices = collate([data[i] for i in range(5)])
    assert indices.tolist() == [0, 4]
    assert (images.shape, targets.tolist(), len(errors)) == ((2, 3, 6, 8), [0, 4], 3)
    images, targets, errors, _ = collate([data[2]])
    assert (len(images), len(targets), len(errors)) == (0, 0, 1)


def test_complaints_raise_or_count(caplog):
    with pytest.raises(RunStopped, match=r"a\.png: truncated \(data\.on_error=skip leaves"):
        Complaints("raise")(["a.png: truncated"])
    skipping = Complaints("skip")
    skipping(["a.png: x", "b.png: y"])
    skipping([])
    assert skipping.count == 2
    assert "skipped an image, 2 so far: b.png: y" in caplog.text
    with pytest.raises(ValueError, match=r"data\.on_error=ignore: expected one of"):
        Complaints("ignore")
