"""The commands nat-train, nat-eval and nat-bench; train.py and eval.py are doors to two of them."""

import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from nat_models.overrides import check_overrides

_log = logging.getLogger(__name__)


def config_dir() -> str:
    """Folder of the configurations: the installed package's, else the checkout's."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return str(inside if inside.is_dir() else package.parent / "configs")


def _command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """`hydra.main`, before which the arguments are checked; options, as of a sweep, are Hydra's."""

    def decorate(job: Callable[[DictConfig], Any]) -> Callable[[], None]:
        main = hydra.main(version_base="1.3", config_path=config_dir(), config_name=config_name)

        @functools.wraps(job)
        def command() -> None:
            if not any(argument.startswith(("-", "hydra.mode=")) for argument in sys.argv[1:]):
                _run(check_overrides, config_dir(), config_name, sys.argv[1:])
            main(job)()

        return command

    return decorate


@_command("train")
def train(cfg: DictConfig) -> Any:
    """nat-train: returns the objective, for sweeps."""
    from nat_models.engine import run

    hydra_config = HydraConfig.get()
    if hydra_config.mode is RunMode.MULTIRUN:  # each job of a sweep has its own folder
        cfg.paths.output_dir = hydra_config.runtime.output_dir
    return _run(run.train, cfg)


@_command("eval")
def evaluate(cfg: DictConfig) -> Any:
    """nat-eval."""
    from nat_models.engine.evaluation import evaluate as work

    return _run(work, cfg)


@_command("bench")
def bench(cfg: DictConfig) -> Any:
    """nat-bench."""
    from nat_models.benchmark.run import run

    return _run(run, cfg)


def _run(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run a command: bad input is a line and exit code 2, an end of the run 1, a stop 143."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from nat_models.engine.console import set_up_logging
    from nat_models.errors import ConfigError, RunStopped

    set_up_logging()
    try:
        return work(*arguments)
    except (ConfigError, NotImplementedError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        _log.error("error: %s", error)
        sys.exit(2)
    except RunStopped as error:
        _log.error("error: %s", error)
        sys.exit(1)
    except SIGTERMException:
        _log.info("told to stop: saved, continue with ckpt=last")
        sys.exit(143)
