import csv
import json
import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from nat_models.engine.evaluation import evaluate
from nat_models.engine.module import Classifier
from nat_models.errors import ConfigError, RunStopped

MODEL = [
    "model.name=test_vit",
    "+model.img_size=32",
    "trainer.accelerator=cpu",
    "callbacks.progress=null",
]


@pytest.fixture
def folder(tmp_path):
    """Seven images in three classes, their names those of ImageNet's validation images."""
    noise = np.random.default_rng(0)
    for i, label in enumerate("aabbbcc"):
        path = tmp_path / "data" / "val" / label / f"ILSVRC2012_val_{i + 1:08}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def options(folder, *more: str) -> list[str]:
    data = ["data=imagefolder", f"data.root={folder}", "data.num_workers=0", "data.batch_size=3"]
    return [*MODEL, *data, *more]


def rows(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_results_predictions_and_report_agree(compose, folder, tmp_path):
    torch.manual_seed(0)
    more = ["model.num_classes=3", f"output={tmp_path}/out", "sizes=[32,48]", "model.name=nat_mini"]
    more += ["+model.embed_dim=32", "+model.depths=[1,1,1,1]", "+model.num_heads=[1,1,1,1]"]
    chosen = [o for o in options(folder, *more) if "img_size" not in o]
    metrics = evaluate(compose("eval", *chosen))
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert [row["size"] for row in results] == [32, 48]
    assert results[1]["val/top1"] == metrics["val/top1"]
    assert [float(row["val/top1"]) for row in rows(out / "results.csv")] == pytest.approx(
        [row["val/top1"] for row in results]
    )
    predictions = rows(out / "predictions.csv")
    assert len(predictions) == 7
    assert predictions[3]["image"] == "b/ILSVRC2012_val_00000004.JPEG"
    right = [row["label"] == row["class_1"] for row in predictions]
    assert np.mean(right) == pytest.approx(metrics["val/top1"])
    assert all(
        0.99 < sum(float(row[f"share_{k}"]) for k in (1, 2, 3)) < 1.01 for row in predictions
    )
    classes = {row["class"]: row for row in rows(out / "classes.csv")}
    assert [int(classes[c]["images"]) for c in "abc"] == [2, 3, 2]
    hits = sum(int(row["images"]) * float(row["top1"]) for row in classes.values())
    assert hits == pytest.approx(sum(right), abs=1e-3)
    assert min(Image.open(out / "confusion.png").size) > 300


def test_a_model_for_one_size_takes_each_from_its_own_weights(compose, folder, tmp_path):
    small = ["+model.embed_dim=32", "+model.depth=1", "+model.num_heads=1", "model.num_classes=3"]
    more = [*small, "model.name=vitrpb_small", "sizes=[32,16,32]", f"output={tmp_path}/out"]
    evaluate(compose("eval", *options(folder, *more)))
    first, other, again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert first == again != other


def test_a_model_that_takes_one_size_alone_is_named(compose, folder):
    fixed = ["model.name=mixer_s32_224", "model.num_classes=3", "sizes=[64]"]
    chosen = [o for o in options(folder, *fixed) if "img_size" not in o]
    with pytest.raises(ConfigError, match=r"sizes=64: MlpMixer takes \(224, 224\) alone"):
        evaluate(compose("eval", *chosen))


def test_a_sharded_model_that_is_made_for_one_size_takes_no_second(compose, folder):
    more = ["model.name=vitrpb_small", "sizes=[32,16]", "trainer.strategy=fsdp2"]
    message = r"sizes=\[32, 16\]: expected one size, or .*fsdp2 shards IsotropicNAT for the first"
    with pytest.raises(ConfigError, match=message):
        evaluate(compose("eval", *options(folder, *more, "model.num_classes=3")))


def test_images_need_not_be_square(compose, folder, monkeypatch):
    shapes, original = set(), Classifier.forward
    monkeypatch.setattr(
        Classifier, "forward", lambda self, x: (shapes.add(x.shape[1:]), original(self, x))[1]
    )
    more = ["model.name=nat_demo", "+model.in_chans=3", "data.input_size=[3,32,48]"]
    chosen = [o for o in options(folder, *more, "model.num_classes=3") if "img_size" not in o]
    evaluate(compose("eval", *chosen))
    assert shapes == {(3, 32, 48)}


def test_a_part_of_the_classes_and_the_reassessed_labels(compose, folder, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("970\n795\n230\n")
    more = [f"valid_labels={labels}", f"output={tmp_path}/out", "real_labels=true"]
    metrics = evaluate(compose("eval", *options(folder, *more)))
    assert metrics["val/top5"] == 1.0  # of three
    assert 0 <= metrics["val/real_top1"] <= metrics["val/real_top5"] <= 1


def test_unreadable_images_are_reported(compose, folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (folder / "val" / "a" / "x.jpeg").write_bytes(b"")
    more = ["model.num_classes=3", f"output={tmp_path}/out", "data.on_error=skip", "sizes=[32,32]"]
    evaluate(compose("eval", *options(folder, *more)))
    assert caplog.text.count("1 images could not be read and are not counted") == 2
    assert [row["unreadable"] for row in rows(tmp_path / "out" / "results.csv")] == ["1", "1"]
    assert len(rows(tmp_path / "out" / "predictions.csv")) == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("valid_labels=imagenet_x", r"valid_labels=imagenet_x: expected imagenet_a"),
        ("sizes=[0]", r"sizes=0: expected integers, at least 1"),
        ("weights=best", r"weights=best: expected averaged or trained"),
    ],
    ids=["labels", "size", "weights"],
)
def test_bad_input_is_named(compose, folder, tmp_path, override, message):
    more = ["model.num_classes=3", override]
    if "weights" in override:
        (tmp_path / "x.ckpt").touch()
        more.append(f"ckpt={tmp_path}/x.ckpt")
    with pytest.raises(ConfigError, match=message):
        evaluate(compose("eval", *options(folder, *more)))


def test_names_outside_imagenet_have_no_reassessed_label(compose, folder, monkeypatch):
    monkeypatch.setattr(Classifier, "validation_step", None)  # it is known before
    (folder / "val" / "a" / "ILSVRC2012_val_00000001.JPEG").rename(folder / "val" / "a" / "x.JPEG")
    cfg = compose("eval", *options(folder, "model.num_classes=3", "real_labels=true"))
    with pytest.raises(ConfigError, match=r"real_labels=true: x\.JPEG is no validation image"):
        evaluate(cfg)


RANDOM = "the weights are random; set ckpt=PATH or model.pretrained=true"


@pytest.mark.parametrize("pictures", [False, True], ids=["data", "pictures"])
def test_random_weights_are_told(compose, folder, caplog, pictures):
    more = ["model.num_classes=3", *([f"images={folder}/val/a"] if pictures else [])]
    evaluate(compose("eval", *options(folder, *more)))
    assert caplog.text.count(f"model.name=test_vit: {RANDOM}") == 1


def test_weights_that_are_not_random_are_not_told(compose, folder, tmp_path, caplog):
    path = tmp_path / "model.pth"
    torch.save(timm.create_model("test_vit", img_size=32, num_classes=3).state_dict(), path)
    more = ["model.num_classes=3", f"+model.checkpoint_path={path}"]
    evaluate(compose("eval", *options(folder, *more)))
    assert "random" not in caplog.text


def test_a_folder_that_cannot_be_written_to_is_named_before(compose, folder, monkeypatch):
    monkeypatch.setattr(Classifier, "validation_step", None)
    cfg = compose("eval", *options(folder, "model.num_classes=3", "output=/proc"))
    with pytest.raises(ConfigError, match=r"output=/proc: expected a folder that can be written"):
        evaluate(cfg)


@pytest.mark.parametrize("file", ["results.json", "predictions.csv"])
def test_results_that_cannot_be_written_are_one_line(compose, folder, tmp_path, file):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).symlink_to("/dev/full")
    cfg = compose("eval", *options(folder, "model.num_classes=3", f"output={tmp_path}/out"))
    with pytest.raises(RunStopped, match=r"output=.*/out: the results could not be .*No space"):
        evaluate(cfg)
