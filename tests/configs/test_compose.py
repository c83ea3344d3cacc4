from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from nat_models.cli import config_dir

ROOT = Path(config_dir())
GROUPS = sorted(path.relative_to(ROOT) for path in ROOT.glob("*/*.yaml"))
PROGRAM = {"hydra", "paths"}


def installed(plugin: str) -> bool:
    return bool(find_spec("hydra_plugins") and find_spec(f"hydra_plugins.{plugin}"))


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_command_composes_and_resolves(compose, name):
    cfg = compose(name)
    OmegaConf.to_container(cfg, resolve=True)
    assert cfg.ckpt is None


@pytest.mark.parametrize("path", [p for p in GROUPS if p.parts[0] not in PROGRAM], ids=str)
def test_every_choice_composes(compose, path):
    if path.name == "as_trained.yaml":
        assert compose("eval", "data=as_trained").data.name is None
        return
    plugin = {"sweep": "hydra_optuna_sweeper", "launcher": "hydra_submitit_launcher"}
    if (name := plugin.get(path.parts[0])) and not installed(name):
        pytest.skip(f"{name} is an extra")
    cfg = compose("train", f"{path.parts[0]}={path.stem}")
    unset = OmegaConf.missing_keys(cfg)
    assert unset <= {"data.root", "data.name", "task.teacher.name"}


def test_a_choice_on_the_command_line_goes_before_the_experiments(compose):
    assert compose("train").data.name == "mnist5k"
    cfg = compose("train", "data=digits", "optimizer.lr=0.5")
    assert (cfg.data.name, cfg.optimizer.lr, cfg.name) == ("digits", 0.5, "demo")


@pytest.mark.parametrize(
    ("command", "override"),
    [
        ("train", "optimiser.lr=1"),
        ("train", "trainer.max_epoch=1"),
        ("train", "model.drop_path=0.1"),
        ("train", "data.batchsize=1"),
        ("eval", "model.drop_path=0.1"),
        ("eval", "data.batchsize=1"),
    ],
)
def test_a_wrong_key_fails(compose, command, override):
    with pytest.raises(ConfigCompositionException, match="Could not override"):
        compose(command, override)


def test_a_wrong_choice_fails_and_lists_the_right_ones(compose):
    with pytest.raises(MissingConfigException, match=r"(?s)data/mnist.*mnist5k"):
        compose("train", "data=mnist")


def test_files_are_short():
    for path in ROOT.rglob("*.yaml"):
        assert len(path.read_text().splitlines()) <= 30, path
