"""What nat-bench measures, checked before any work."""

from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf

import nat_models
from nat_models.benchmark.case import EXECUTIONS, GRAPHS, PRECISIONS, Case
from nat_models.benchmark.measure import Sampling
from nat_models.names import check_model_name
from neighborhood_attention import list_backends, resolve_backend

CHOICES = {
    "passes": ["inference", "training"],
    "execution": EXECUTIONS,
    "precision": PRECISIONS,
    "attention_backend": list_backends(),
}
LEAST = {"batch_size": 1, "input_size": 1, "warmup": 1, "rounds": 1, "seed": 0}


@dataclass
class Settings:
    """The keys of configs/bench.yaml, with `auto` resolved and single values made lists."""

    models: list[str]
    passes: list[str]
    execution: list[str]
    batch_size: list[int]
    input_size: int | None
    precision: str
    channels_last: bool
    attention_backend: str | None
    device: str
    warmup: int
    rounds: int
    round_seconds: float
    seed: int
    output: Path

    def __post_init__(self) -> None:
        """Check the values; OmegaConf has checked their types."""
        for key, choices in CHOICES.items():
            for value in _values(self, key):
                if value not in choices:
                    raise ValueError(f"{key}={value}: expected one of {choices}")
        for key, least in LEAST.items():
            for value in _values(self, key):
                if value < least:
                    raise ValueError(f"{key}={value}: expected at least {least}")
        if not self.round_seconds > 0:
            raise ValueError(f"round_seconds={self.round_seconds}: expected more than 0")
        for execution in GRAPHS.intersection(self.execution):
            if not self.device.startswith("cuda"):
                raise ValueError(f"{execution=!s}: device={self.device} has no CUDA graphs")
        if self.output.is_dir():
            raise ValueError(f"output={self.output}: expected a file, this is a folder")
        check_models(self.models)

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Settings":
        """Resolve a composed configs/bench.yaml.

        Raises:
            ValueError: A value has the wrong type or is not allowed; the message names its key.
        """
        config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
        values = {field.name: config[field.name] for field in fields(cls)}
        values["device"] = _device(values["device"])
        on_gpu = values["device"].startswith("cuda")
        if values["execution"] == "auto":
            values["execution"] = ["eager", "compiled", "cuda_graphs"] if on_gpu else ["eager"]
        if values["precision"] == "auto":
            values["precision"] = "bfloat16" if on_gpu else "float32"
        for key in ("models", "passes", "execution", "batch_size"):
            if not isinstance(values[key], list):
                values[key] = [values[key]]
            if not values[key]:
                raise ValueError(f"{key}=[]: expected at least one value")
        return cast(
            Settings, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
        )

    @property
    def sampling(self) -> Sampling:
        """How often a case is timed."""
        return Sampling(self.warmup, self.rounds, self.round_seconds, self.seed)

    @property
    def groups(self) -> list[list[Case]]:
        """All models under one condition, for each condition."""
        conditions = product(self.passes, self.execution, self.batch_size)
        return [[self._case(name, *condition) for name in self.models] for condition in conditions]

    def _case(self, name: str, kind: str, execution: str, batch_size: int) -> Case:
        backend = attention_backend(name, self.attention_backend, self.device)
        own = self.precision, self.input_size, backend, self.channels_last
        return Case(name, kind, execution, batch_size, *own)


def attention_backend(name: str, wanted: str | None, device: str) -> str | None:
    """The backend that a model runs: the wanted one, or its device's; None for other models."""
    if name.partition(".")[0] not in nat_models.list_models():
        return None
    return wanted or resolve_backend(torch.device(device).type)


def check_models(names: list[str]) -> None:
    """Each must be a name that timm knows."""
    for name in names:
        check_model_name("models", name)


def _values(settings: Settings, key: str) -> list[Any]:
    value = getattr(settings, key)
    return value if isinstance(value, list) else [] if value is None else [value]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name}: {str(error).splitlines()[0]}") from error
    return name
