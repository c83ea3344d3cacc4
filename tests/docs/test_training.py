"""Every command on the page of training composes."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nat_models.cli import config_dir

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines()
]
PLUGINS = {"sweep=optuna": "hydra_optuna_sweeper", "launcher=slurm": "hydra_submitit_launcher"}
SCRIPTS = {"train.py": "train", "eval.py": "eval", "nat_models.benchmark": "bench"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_composes(command):
    for word in set(command) & set(PLUGINS):
        if not (find_spec("hydra_plugins") and find_spec(f"hydra_plugins.{PLUGINS[word]}")):
            pytest.skip(f"{PLUGINS[word]} is an extra")
    [script] = set(command) & set(SCRIPTS)
    words = [word for word in command[command.index(script) + 1 :] if word != "-m"]
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        singles = [re.sub(r"^(optimizer\.lr|seed)=([^,]+),.*", r"\1=\2", word) for word in words]
        cfg = hydra.compose(SCRIPTS[script], overrides=singles, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    del cfg.hydra
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def test_the_page_names_files_and_groups_that_are_there():
    for name in re.findall(r"`(benchmarks/\w+\.py)`", PAGE):
        assert (ROOT / name).is_file()
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|.*\| .*\|$", PAGE, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    kinds = {path.stem for path in Path(config_dir(), "data").glob("*.yaml")}
    assert named == kinds - {"default", "as_trained"}
