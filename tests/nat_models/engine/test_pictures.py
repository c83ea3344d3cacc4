import csv
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nat_models.data import ImageDataModule
from nat_models.engine.evaluation import evaluate
from nat_models.engine.module import Classifier
from nat_models.engine.pictures import name_pictures
from nat_models.errors import ConfigError, RunStopped

MODEL = ["model.name=nat_mini", "+model.embed_dim=32", "+model.depths=[1,1,1,1]"]
MODEL += ["+model.num_heads=[1,1,1,1]"]


def test_pictures_are_named_and_their_attention_drawn(compose, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    noise = np.random.default_rng(0)
    for name in ("a.png", "b.jpeg", "c.webp"):
        pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    options = [f"images={tmp_path}", f"output={tmp_path}/out"]
    options += ["attention=levels.1.blocks.0.attn"]
    found = evaluate(compose("eval", *MODEL, *options))
    assert list(found) == ["a.png", "b.jpeg", "c.webp"]
    for name, top in found.items():
        assert len(top) == 5
        assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)
        assert not top[0][0].isdecimal()  # a name of ImageNet's
        assert f"{name}: {top[0][0]}" in caplog.text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "predictions.csv",
        *(f"{name}_attention.png" for name in found),
    }


def test_what_pictures_show_is_written_if_it_is_to(compose, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    three_pictures(tmp_path)
    out = tmp_path / "out"
    found = evaluate(compose("eval", *MODEL, f"images={tmp_path}", f"output={out}"))
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["class"]) for row in rows] == [
        (name, label) for name, top in found.items() for label, _ in top
    ]
    assert [row["rank"] for row in rows] == 3 * list("12345")
    assert float(rows[0]["probability"]) == pytest.approx(found["a.png"][0][1], abs=1e-4)
    assert f"results: {out}" in caplog.text


def test_drawings_of_pictures_that_share_a_stem_are_both_kept(compose, tmp_path):
    for name in ("x.png", "x.jpg"):
        Image.new("RGB", (40, 40), "teal").save(tmp_path / name)
    options = [f"images={tmp_path}", f"output={tmp_path}/out", "attention=auto"]
    evaluate(compose("eval", *MODEL, *options))
    assert len(list((tmp_path / "out").glob("*_attention.png"))) == 2


def test_results_that_cannot_be_written_are_one_line(compose, tmp_path):
    three_pictures(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.csv").symlink_to("/dev/full")
    cfg = compose("eval", *MODEL, f"images={tmp_path}", f"output={tmp_path}/out")
    with pytest.raises(RunStopped, match=r"output=.*/out: the results could not be .*No space"):
        evaluate(cfg)


def three_pictures(folder: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (40, 40), "teal").save(folder / name)


@pytest.mark.parametrize("fault", ["truncated", "text", "bomb"])
def test_a_broken_picture_is_left_out_and_counted(compose, tmp_path, caplog, monkeypatch, fault):
    caplog.set_level(logging.INFO)
    three_pictures(tmp_path)
    path = tmp_path / "b.png"
    if fault == "bomb":  # no OSError, as several of PIL's
        Image.new("RGB", (500, 500)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    else:
        path.write_bytes(path.read_bytes()[:60] if fault == "truncated" else b"text")
    with pytest.raises(ConfigError, match=rf"images={path}: .*\(data\.on_error=skip leaves"):
        evaluate(compose("eval", *MODEL, f"images={tmp_path}"))
    caplog.clear()
    found = evaluate(compose("eval", *MODEL, f"images={tmp_path}", "data.on_error=skip"))
    assert list(found) == ["a.png", "c.png"]
    assert f"skipped an image, 1 so far: images={path}: " in caplog.text
    assert "1 of 3 pictures could not be read" in caplog.text


def test_pictures_are_prepared_as_the_data_options_say(compose, tmp_path, monkeypatch):
    three_pictures(tmp_path)
    sides = []
    prepare = ImageDataModule.prepare

    def noted(data, picture):
        pixels, shown = prepare(data, picture)
        sides.append(tuple(pixels.shape))
        return pixels, shown

    monkeypatch.setattr(ImageDataModule, "prepare", noted)
    evaluate(compose("eval", *MODEL, f"images={tmp_path}", "data.input_size=[3,64,96]"))
    assert sides == 3 * [(3, 64, 96)]


def test_pictures_go_where_the_trainer_does(compose, tmp_path, monkeypatch):
    three_pictures(tmp_path)
    module = Classifier(model={"name": "nat_demo"})
    devices = []
    module.model.register_forward_pre_hook(lambda _, inputs: devices.append(inputs[0].device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = compose("eval", f"images={tmp_path}", "trainer.accelerator=cpu")
    assert len(name_pictures(cfg, module, None)) == 3
    assert devices == 3 * [torch.device("cpu")]


def classifier() -> tuple[Classifier, list[Tensor]]:
    """A small model of colour images, and the list of what it will be fed."""
    small = {"embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    module, fed = Classifier(model={"name": "nat_mini", **small}), []
    module.model.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
    return module, fed


@pytest.mark.parametrize(
    ("options", "autocast", "innermost", "compiled"),
    [
        ([], None, False, []),
        (["trainer.precision=bf16-mixed"], torch.bfloat16, False, []),
        (["channels_last=true"], None, True, []),
        (["compile=default"], None, False, ["default"]),
    ],
    ids=["auto", "precision", "channels_last", "compile"],
)
def test_pictures_run_as_an_evaluation_does(
    compose, tmp_path, monkeypatch, options, autocast, innermost, compiled
):
    three_pictures(tmp_path)
    module, fed = classifier()
    casts, modes = [], []
    module.model.register_forward_pre_hook(
        lambda *_: casts.append(
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        )
    )
    monkeypatch.setattr(module.model, "compile", lambda mode, **_: modes.append(mode))
    cfg = compose("eval", f"images={tmp_path}", "trainer.accelerator=cpu", *options)
    name_pictures(cfg, module, None)
    assert casts == 3 * [autocast]
    layouts = [images.is_contiguous(memory_format=torch.channels_last) for images in fed]
    assert layouts == 3 * [innermost]
    assert modes == compiled


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)],
    ids=["mixed", "true"],
)
def test_attention_is_drawn_in_any_precision(compose, tmp_path, precision, dtype):
    three_pictures(tmp_path)
    module, fed = classifier()
    options = [f"images={tmp_path}", "attention=auto", f"output={tmp_path}/out"]
    options += ["trainer.accelerator=cpu", f"trainer.precision={precision}"]
    name_pictures(compose("eval", *options), module, None)
    assert [images.dtype for images in fed] == 6 * [dtype]
    assert len(list((tmp_path / "out").glob("*_attention.png"))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["images=no/where"], r"images=no/where: expected a picture or a folder"),
        (["images=EMPTY"], r"images=.*: holds no picture"),
        (["images=TEXT"], r"images=.*x\.png: cannot identify"),
        (["images=PICTURE", "trainer.accelerator=none"], r"`none`|'none'"),
        (["images=PICTURE", "compile=max"], r"compile=max: expected auto, false, default"),
        (["images=PICTURE", "output=/proc"], r"output=/proc: expected a folder that can be"),
        (["images=TEXT", "attention=auto"], r"attention=auto: expected output=FOLDER"),
    ],
    ids=["missing", "empty", "text", "accelerator", "compile", "output", "no_output"],
)
def test_bad_input_is_named(compose, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.png").write_text("x")
    Image.new("RGB", (40, 40)).save(tmp_path / "y.png")
    for key, name in {"PICTURE": "y.png", "EMPTY": "empty", "TEXT": "x.png"}.items():
        options = [option.replace(key, f"{tmp_path}/{name}") for option in options]
    with pytest.raises(ConfigError, match=message):
        evaluate(compose("eval", *MODEL, *options))
