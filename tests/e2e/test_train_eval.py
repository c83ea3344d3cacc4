"""The two commands, on real images."""

import json

import numpy as np
import pytest
from PIL import Image

from nat_models.engine import execution, run
from nat_models.engine.evaluation import evaluate


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    import hydra

    from nat_models.cli import config_dir

    output = tmp_path_factory.mktemp("digits")
    options = [
        "data=digits",
        "data.input_size=[1,16,16]",
        "data.batch_size=32",
        "trainer.accelerator=cpu",
    ]
    options += ["trainer.max_epochs=2", "optimizer.lr=3e-3", f"paths.output_dir={output}"]
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        cfg = hydra.compose("train", overrides=options)
    return output, run.train(cfg)


def test_training_learns(trained):
    assert trained[1] > 0.75  # chance: 0.1


def test_evaluation_reproduces_the_number(trained, compose):
    output, top1 = trained
    metrics = evaluate(compose("eval", f"ckpt={output}/best.ckpt", "trainer.accelerator=cpu"))
    assert metrics["val/top1"] == top1
    recorded = json.loads((output / "metrics.json").read_text())
    assert recorded == {name: pytest.approx(value, abs=1e-6) for name, value in metrics.items()}


def test_records_lie_beside_the_checkpoint(trained):
    output, _ = trained
    names = {path.name for path in output.iterdir()}
    assert {"best.ckpt", "last.ckpt", "epoch_000.ckpt", "epoch_001.ckpt", "model"} <= names
    assert {"config.yaml", "environment.json", "train.log"} <= names
    assert list(output.glob("csv/version_0/metrics.csv"))
    assert list(output.glob("tensorboard/version_0/events*"))
    log = (output / "train.log").read_text()
    assert "attention  backend reference (automatic on cpu)" in log
    assert log.splitlines()[-1].endswith("best.ckpt")
    for name in ("curves.png", "neighborhoods.png"):
        pixels = np.asarray(Image.open(output / name).convert("L"))
        assert min(pixels.shape) > 400
        assert pixels.std() > 10


def test_any_model_by_name_on_a_folder_of_images(compose, tmp_path):
    noise = np.random.default_rng(0)
    for label in ("a", "b", "c"):
        folder = tmp_path / "val" / label
        folder.mkdir(parents=True)
        for i in range(2):
            pixels = noise.integers(0, 256, (50, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpeg")
    options = [
        "data=imagefolder",
        f"data.root={tmp_path}",
        "data.num_workers=0",
        "model.num_classes=3",
    ]
    options += ["trainer.accelerator=cpu"]
    own = ["model.name=nat_tiny", "data.input_size=[3,64,64]"]
    for model in (own, ["model.name=test_vit"]):
        metrics = evaluate(compose("eval", *options, *model))
        assert metrics["val/top1"] * 6 == pytest.approx(round(metrics["val/top1"] * 6))
        assert metrics["val/top5"] == 1.0


@pytest.mark.gpu
def test_training_on_a_gpu(compose, small, chance, tmp_path):
    options = [o for o in small if o != "trainer.accelerator=cpu"] + chance
    options += ["debug=short", "trainer.devices=1", f"paths.output_dir={tmp_path}"]
    run.train(compose("train", *options))
    log = (tmp_path / "train.log").read_text()
    assert "backend fused (automatic on cuda)" in log
    assert "bf16-mixed" in log
    assert (tmp_path / "neighborhoods.png").exists()


@pytest.mark.gpu
def test_what_is_compiled_by_default_learns_and_evaluates_as_eager(
    compose, small, losses, undrawn, tmp_path, monkeypatch
):
    monkeypatch.setattr(execution, "TRAINING_IMAGES", 0)
    monkeypatch.setattr(execution, "EVALUATION_IMAGES", 0)
    options = [o for o in small if o != "trainer.accelerator=cpu"]
    options += ["+model.depths=[1,1,1]", "augment.mixup={mixup_alpha:0.8,cutmix_alpha:1.0}"]
    options += [
        "optimizer.opt=adamw",
        "optimizer.lr=1e-3",
        "callbacks=ema",
        "callbacks.ema.decay=0.5",
        "trainer.devices=1",
    ]
    options += [
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=8",
        "scheduler.warmup_epochs=0",
    ]
    exact = ["tf32=false", "trainer.precision=32-true", "trainer.devices=1"]
    found = {}
    for mode, line in {
        "false": "eager, channels_last",
        "auto": "compiled, mode reduce-overhead, channels_last",
    }.items():
        output = tmp_path / mode
        top1 = run.train(
            compose("train", *options, *exact, f"compile={mode}", f"paths.output_dir={output}")
        )
        assert line in (output / "train.log").read_text()
        # 359 images in batches of 32: the last one is shorter.
        metrics = evaluate(compose("eval", f"ckpt={output}/best.ckpt", *exact, f"compile={mode}"))
        assert metrics["val/top1"] == pytest.approx(top1, abs=1 / 359)
        found[mode] = losses(output), metrics["val/loss"]
    (eager, held_out), (compiled, held_out_compiled) = found["false"], found["auto"]
    assert len(eager) == 16
    assert compiled == pytest.approx(eager, rel=2e-3)
    assert held_out_compiled == pytest.approx(held_out, rel=2e-3)
