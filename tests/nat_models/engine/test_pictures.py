import logging

import numpy as np
import pytest
from PIL import Image

from nat_models.engine.evaluation import evaluate
from nat_models.errors import ConfigError

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
    assert len(list((tmp_path / "out").glob("*_attention.png"))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["images=no/where"], r"images=no/where: expected a picture or a folder"),
        (["images=EMPTY"], r"images=.*: holds no picture"),
        (["images=TEXT"], r"images=.*x\.png: cannot identify"),
        (["images=TEXT", "attention=auto"], r"attention=auto: expected output=FOLDER"),
    ],
    ids=["missing", "empty", "text", "no_output"],
)
def test_bad_input_is_named(compose, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.png").write_text("x")
    paths = {"EMPTY": f"{tmp_path}/empty", "TEXT": f"{tmp_path}/x.png"}
    for key, path in paths.items():
        options = [option.replace(key, path) for option in options]
    with pytest.raises(ConfigError, match=message):
        evaluate(compose("eval", *MODEL, *options))
