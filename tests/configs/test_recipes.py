"""The published recipes, as the papers' code states them."""

from pathlib import Path

import pytest

import nat_models
from nat_models.cli import config_dir

EXPERIMENTS = {path.stem for path in Path(config_dir(), "experiment").glob("*.yaml")}


def test_every_published_model_has_its_recipe():
    published = set(nat_models.list_models()) - {"nat_demo"}
    published -= {"dinat_large_21k_11x11"}  # only weights resized, never trained
    recipes = {f"{m}_in22k" if m.endswith("_21k") else f"{m}_in1k" for m in published}
    assert len(recipes) == 24
    assert recipes <= EXPERIMENTS


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("nat_tiny_in1k", {"warmup": 20, "ema": None, "epochs": 310, "images": 1024, "wd": 0.05}),
        (
            "vitrpb_base_in1k",
            {"warmup": 50, "ema": 0.9998, "epochs": 310, "images": 1024, "wd": 0.05},
        ),
        ("dinat_s_large_in1k", {"warmup": 0, "ema": None, "epochs": 30, "images": 512, "wd": 1e-4}),
        (
            "dinat_s_large_384_in1k",
            {"warmup": 0, "ema": None, "epochs": 30, "images": 512, "wd": 1e-5},
        ),
        (
            "dinat_large_384_11x11_in1k",
            {"warmup": 0, "ema": None, "epochs": 30, "images": 512, "wd": 1e-10},
        ),
    ],
)
def test_a_recipe_is_the_published_one(compose, experiment, expected):
    cfg = compose("train", f"experiment={experiment}", "data.root=x")
    assert expected == {
        "warmup": cfg.scheduler.warmup_epochs,
        "ema": cfg.callbacks.ema.decay if "ema" in cfg.callbacks else None,
        "epochs": cfg.trainer.max_epochs,
        "images": cfg.global_batch_size,
        "wd": cfg.optimizer.weight_decay,
    }
    assert cfg.name == experiment
    assert cfg.optimizer.decay_rpb
    assert cfg.augment.transform.auto_augment == "rand-m9-mstd0.5-inc1"
    if cfg.model.weights_of:
        assert cfg.augment.mixup is None
        assert (cfg.optimizer.lr, cfg.scheduler.sched) == (5e-5, "none")
    else:
        assert dict(cfg.augment.mixup) == {
            "mixup_alpha": 0.8,
            "cutmix_alpha": 1.0,
            "prob": 1.0,
            "switch_prob": 0.5,
        }
        assert cfg.optimizer.lr == 1e-3


@pytest.mark.parametrize("experiment", sorted(EXPERIMENTS))
def test_every_recipe_can_be_shortened(compose, experiment):
    cfg = compose("train", f"experiment={experiment}", "debug=short", "model.name=nat_mini")
    assert cfg.trainer.max_epochs > cfg.scheduler.warmup_epochs + cfg.scheduler.cooldown_epochs
    assert cfg.global_batch_size is None  # a step of several batches would not fit into two


def test_the_large_models_rate_is_constant_or_falls_in_a_line(compose):
    recipe = ["experiment=dinat_large_in1k", "data.root=x"]
    assert compose("train", *recipe).scheduler.sched == "none"
    assert compose("train", *recipe, "scheduler=linear").scheduler.sched == "poly"
