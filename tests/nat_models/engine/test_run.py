"""Bad input is refused before any work, in one message, and leaves no folder behind."""

import logging
import os
import time
from pathlib import Path

import pytest
import torch

from nat_models.engine import run
from nat_models.engine.evaluation import evaluate
from nat_models.errors import ConfigError, RunStopped

FAKE = ["data=fake", "data.options={size:8,image_size:[3,8,8],num_classes:3}", "data.batch_size=4"]
TINY = [
    *FAKE,
    "augment=none",
    "model.name=test_vit",
    "+model.img_size=32",
    "data.input_size=[3,32,32]",
]
QUIET = ["callbacks.progress=null", "trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries for long


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A run of two steps."""
    import hydra

    from nat_models.cli import config_dir

    output = tmp_path_factory.mktemp("run")
    options = [*TINY, *QUIET, "trainer.max_epochs=1", f"paths.output_dir={output}"]
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = hydra.compose("train", overrides=options)
    run.train(cfg)
    return output / "best.ckpt"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=imagefolder", "data.root=no/where"], r"data\.root=no/where: expected a folder"),
        (["model.name=nat_nano"], r"model\.name=nat_nano: timm has no such model"),
        (["+model.kernel=3"], r"model\.name=test_vit: .*unexpected keyword argument 'kernel'"),
        (["model.num_classes=7"], r"data\.name=fake: has 3 classes, the model has 7"),
        (["optimizer.opt=adamww"], r"optimizer=.*adamww not found"),
        (["optimizer.lr=fast"], r"optimizer=.*'lr': 'fast'"),
        (["scheduler.sched=cosinus"], r"scheduler=.*cosinus"),
        (["trainer.precision=7"], r"Precision 7 is invalid"),
        (["threads=0"], r"threads=0: expected an integer, at least 1"),
        (["threads=abc"], r"threads=abc: expected an integer, at least 1"),
        (["objective=val/loss"], r"objective=val/loss: expected one of .*val/top1"),
        (["data.batch_size=0"], r"data\.batch_size=0: expected an integer, at least 1"),
        (["data.batch_size=abc"], r"data\.batch_size=abc: expected an integer"),
        (["data.num_workers=-1"], r"data\.num_workers=-1: expected an integer, at least 0"),
        (["data.interpolation=foo"], r"data\.interpolation=foo: expected one of .*bicubic"),
        (["data.input_size=32"], r"data\.input_size=32: expected \[channels, height, width\]"),
        (["data.input_size=[1,32,32]"], r"data\.input_size=\[1, 32, 32\]: the model takes 3"),
        (
            ["model.name=vitrpb_small", "data.input_size=[3,48,48]"],
            r"data\.input_size=\[3, 48, 48\]: the model takes images of \(32, 32\) alone",
        ),
        (["data.name=tfds/x"], r"data\.name='tfds/x': tfds is not supported"),
        (["model.pretrained=true"], r"model\.pretrained=true: no weights for test_vit"),
        (["seed=-1"], r"seed=-1: expected an integer from 0"),
        (["global_batch_size=6"], r"global_batch_size=6: expected a multiple of 4.*batch_size=4"),
        (["callbacks=ema", "trainer.strategy=fsdp2"], r"trainer\.strategy=fsdp2: .*callbacks\.ema"),
        (["trainer.strategy=dp2"], r"strategy.*dp2"),
        (["callbacks.non_finite.patience=0"], r"callbacks\.non_finite\.patience=0: expected"),
        (
            ["callbacks.best=null", "callbacks.last=null"],
            r"callbacks\.best=null and callbacks\.last",
        ),
        (["push_to_hub=foo"], r"push_to_hub=foo: expected ORG/NAME: it names no ORG"),
        (["push_to_hub=a/b/c"], r"push_to_hub=a/b/c: expected ORG/NAME: "),
        (["ckpt=no/last.ckpt"], r"no/last\.ckpt: no such file"),
        (["ckpt=last", "name=never"], r"ckpt=last: there is no last\.ckpt under .*never"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_train_refuses(compose, tmp_path, overrides, message):
    paths = [f"paths.root={tmp_path}", f"paths.output_dir={tmp_path}/run"]
    with pytest.raises(ConfigError, match=message):
        run.train(compose("train", *TINY, *QUIET, *paths, *overrides))
    assert os.listdir(tmp_path) == []


def test_train_refuses_a_folder_that_cannot_be_written(compose, tmp_path):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "run"
    with pytest.raises(ConfigError, match=rf"paths\.output_dir={output}: expected a folder"):
        run.train(compose("train", *TINY, *QUIET, f"paths.output_dir={output}"))


def test_train_refuses_the_folder_of_another_run(compose, checkpoint):
    output = checkpoint.parent
    with pytest.raises(ConfigError, match=rf"{output}: holds another run; continue it with ckpt="):
        run.train(compose("train", *TINY, *QUIET, f"paths.output_dir={output}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.name=test_resnet"],
            r"model\.name=test_resnet: the checkpoint .*best\.ckpt has test_vit",
        ),
        (["+model.img_size=64"], r"best\.ckpt: does not fit Classifier:\n.*pos_embed"),
    ],
)
def test_resume_refuses_another_model(compose, checkpoint, overrides, message):
    fake = [*FAKE, "augment=none", "data.input_size=[3,32,32]", "model.name=test_vit"]
    with pytest.raises(ConfigError, match=message):
        run.train(compose("train", *fake, *QUIET, *overrides, f"ckpt={checkpoint}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=nat_demo"], r"model\.name=nat_demo: the checkpoint .* has test_vit"),
        (["data=mnist5k"], r"data\.name=mnist5k: has 10 classes, the model has 3"),
        (["data.root=x", "data=imagefolder"], r"data\.root=x: expected a folder"),
        (["data.name=digits"], r"data\.name=digits: has 10 classes, the model has 3"),
    ],
)
def test_evaluate_refuses(compose, checkpoint, overrides, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(compose("eval", f"ckpt={checkpoint}", *QUIET, *overrides))


def test_evaluate_needs_a_model_and_data(compose):
    with pytest.raises(ConfigError, match=r"expected ckpt=PATH or model\.name=NAME"):
        evaluate(compose("eval"))
    with pytest.raises(ConfigError, match="data: expected a data set"):
        evaluate(compose("eval", "model.name=test_vit"))


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "code", "weights"])
def test_evaluate_refuses_a_file_that_is_no_checkpoint(compose, checkpoint, tmp_path, damage):
    path = tmp_path / "x.ckpt"
    content = checkpoint.read_bytes()
    path.write_bytes({"cut": content[:5000], "text": b"hello"}.get(damage, b""))
    if damage == "code":
        torch.save({"f": os.getcwd}, path)
    if damage == "weights":
        torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(ConfigError, match=rf"{path}: (damaged, or )?not (a|the) checkpoint.*: ."):
        evaluate(compose("eval", f"ckpt={path}", *QUIET))


def test_a_run_pushes_its_model_if_it_is_to(compose, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["debug=short", "push_to_hub=a/b", f"paths.output_dir={tmp_path}"]
    with pytest.raises(RunStopped, match=rf"push_to_hub=a/b: .*; the model is in {tmp_path}/model"):
        run.train(compose("train", *TINY, *QUIET, *options))
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_run_without_loggers(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run.train(compose("train", *TINY, *QUIET, "debug=short", "logger=none"))
    [output] = tmp_path.glob("outputs/debug/*")
    assert {"best.ckpt", "metrics.json"} <= set(os.listdir(output))
    assert not (output / "csv").exists()
    assert os.listdir(tmp_path) == ["outputs"]


@pytest.mark.parametrize(("limit", "images"), [(1, 4), ("null", 8)])
def test_the_card_tells_how_many_images_were_evaluated(compose, tmp_path, limit, images):
    options = ["debug=short", f"trainer.limit_val_batches={limit}", f"paths.output_dir={tmp_path}"]
    run.train(compose("train", *TINY, *QUIET, *options))
    assert f"Held-out images:** {images}, top-1" in (tmp_path / "model/README.md").read_text()


def test_a_recipe_can_be_shortened(compose, tmp_path):
    options = ["experiment=nat_tiny_in1k", *TINY, *QUIET, "data.root=null", "debug=short"]
    run.train(compose("train", *options, f"paths.output_dir={tmp_path}"))
    assert (tmp_path / "metrics.json").exists()


def test_a_run_that_is_continued_says_from_where(compose, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    last = tmp_path / "last.ckpt"
    options = [*TINY, *QUIET, "debug=short", "ckpt=auto", f"paths.output_dir={tmp_path}"]

    def said(epochs: int) -> str:
        caplog.clear()
        run.train(compose("train", *options, f"trainer.max_epochs={epochs}"))
        return caplog.text

    assert f"ckpt=auto: {tmp_path} holds no last.ckpt, a new run begins" in said(1)
    finished = f"{last} has its trainer.max_epochs=1 already; to train on, raise"
    assert finished in (again := said(1))
    assert f"continued  {last}: after 1 epochs, 2 steps" in again
    further = said(2)
    assert f"continued  {last}: after 1 epochs, 2 steps" in further
    assert "already" not in further
    assert f"continued  {last}: after 1 epochs, 2 steps" in (tmp_path / "train.log").read_text()
    with pytest.raises(ConfigError, match=rf"trainer\.max_epochs=1: {last} has 2 already"):
        said(1)


def test_a_run_without_the_best_checkpoint_ends_with_the_last(compose, tmp_path):
    options = ["debug=short", "callbacks.best=null", f"paths.output_dir={tmp_path}"]
    run.train(compose("train", *TINY, *QUIET, *options))
    assert not (tmp_path / "best.ckpt").exists()
    assert (tmp_path / "train.log").read_text().splitlines()[-1].endswith("last.ckpt")


def test_checkpoint_holds_plain_data_only(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    model = content["hyper_parameters"]["model"]
    assert type(model) is dict
    assert model["name"] == "test_vit"
    assert model["num_classes"] == 3
    assert type(content["datamodule_hyper_parameters"]["options"]) is dict


@pytest.mark.slow
def test_each_run_has_its_own_log_of_weights_and_biases(compose, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="comes with nat-models[wandb]")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = ["debug=short", "logger=wandb", "logger.wandb.offline=true"]
    for job in "ab":
        run.train(compose("train", *TINY, *QUIET, *options, f"paths.output_dir={tmp_path}/{job}"))
        [log] = (tmp_path / job).glob("wandb/offline-run-*/*.wandb")
        limit = time.monotonic() + 30  # another process writes it, and may still be at it
        while b"val/top1" not in log.read_bytes():
            assert time.monotonic() < limit, f"{log}: no metric in it"
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("simple", "run_training_batch"), ("advanced", "training_step"), ("pytorch", "aten::")],
)
def test_a_profile_lies_in_the_runs_folder(compose, tmp_path, kind, shown):
    options = ["debug=short", "data.batch_size=1", "trainer.limit_train_batches=5"]
    options += [f"profiler={kind}", f"paths.output_dir={tmp_path}"]
    run.train(compose("train", *TINY, *QUIET, *options))
    assert shown in (tmp_path / "fit-profile.txt").read_text()
    assert any(tmp_path.glob("*training_step*.json")) == (kind == "pytorch")
