"""Settings for the benchmark's tests: the shipped configuration with overrides, small and short."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from nat_models.benchmark.settings import Settings

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def compose_bench(tmp_path: Path) -> Callable[..., DictConfig]:
    def compose_with(*overrides: str) -> DictConfig:
        small = ["models=[test_vit]", "input_size=64", "batch_size=2", "warmup=1", "rounds=2"]
        where = [f"output={tmp_path}/bench.json", "round_seconds=0.01", "device=cpu"]
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose("bench", overrides=[*small, *where, *overrides])

    return compose_with


@pytest.fixture
def settings_with(compose_bench: Callable[..., DictConfig]) -> Callable[..., Settings]:
    return lambda *overrides: Settings.from_config(compose_bench(*overrides))
