"""Every experiment takes two steps, with a small model of its kind on noise."""

from pathlib import Path

import pytest

from nat_models.cli import config_dir
from nat_models.engine import run

pytestmark = pytest.mark.usefixtures("undrawn")

EXPERIMENTS = sorted(path.stem for path in Path(config_dir(), "experiment").glob("*.yaml"))
BASES = {"in1k", "in1k_from_in22k", "in22k", "none", "demo"}  # without a model, or tested elsewhere
NOISE = [
    "data=fake",
    "data.options={size:8,image_size:[3,40,40],num_classes:5}",
    "data.input_size=[3,32,32]",
    "data.batch_size=4",
    "global_batch_size=4",
    "model.num_classes=5",
    "model.pretrained=false",
    "model.weights_of=null",
]
RUN = [
    "callbacks.progress=null",
    "logger.tensorboard=null",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "scheduler.warmup_epochs=0",
    "scheduler.cooldown_epochs=0",
]


def shrunken(experiment: str) -> list[str]:
    """Few channels and blocks, windows of 3x3, otherwise the experiment's own model."""
    if "isotropic" in experiment or "vitrpb" in experiment:
        size = ["+model.embed_dim=32", "+model.depth=2", "+model.num_heads=1"]
        window = [] if "vitrpb" in experiment else ["+model.kernel_size=2"]
        return [*size, *window, "+model.img_size=32"]
    size = ["+model.embed_dim=32", "+model.depths=[1,1,1,1]", "+model.num_heads=[1,1,1,1]"]
    extra = []
    if experiment == "distill":
        extra = ["task.teacher.name=test_vit", "+task.teacher.img_size=32"]
        extra += ["task.teacher.pretrained=false"]
    if experiment == "finetune":
        extra = ["model.rescale_to=32"]
    return [*size, "+model.kernel_size=3", *extra]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [e for e in EXPERIMENTS if e not in BASES])
def test_an_experiment_takes_two_steps(compose, losses, tmp_path, experiment):
    options = [f"experiment={experiment}", *NOISE, *RUN, *shrunken(experiment)]
    cfg = compose("train", *options, f"paths.output_dir={tmp_path}")
    assert cfg.scheduler.sched == "none" or cfg.optimizer.lr > cfg.scheduler.min_lr
    assert 0 <= run.train(cfg) <= 1
    epochs = (tmp_path / "train.log").read_text()
    assert "epoch 1/1  train loss" in epochs
    assert "nan" not in epochs
