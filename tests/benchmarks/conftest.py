import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(FOLDER))  # where a script finds its modules


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """on_cpu(module): a study that measures on the CPU, with all but the clock.

    What it returns runs the study with some options, into r.json of the temporary folder.
    """
    import measuring
    import peers
    import problem
    import study

    from neighborhood_attention.tune.records import Deadline

    def once(function: Callable[[], object], *_: float) -> measuring.Timing:
        function()
        return measuring.Timing(20.0, 19.0, 21.0)

    limits = {"count": 2, "registers": 65536, "shared_memory": 233472, "threads": 2048}
    description = {"device": "CPU", "versions": {"torch": "2", "triton": "3"}}
    monkeypatch.setattr(study, "describe_device", lambda: description | {"multiprocessor": limits})
    monkeypatch.setattr(peers, "graph_time", once)

    def prepare(module: ModuleType) -> Callable[..., measuring.Results]:
        for attribute, value in {
            "random_tensors": partial(problem.random_tensors, device="cpu"),
            "copy_bandwidth": lambda: 2e12,
            "product_rate": lambda _: 4e14,
        }.items():
            monkeypatch.setattr(module, attribute, value, raising=False)

        def run(*words: str, commit: str = "a", seconds: float = 1000) -> measuring.Results:
            arguments = study.parse(module, [str(tmp_path / "r.json"), "--commit", commit, *words])
            return study.run(module, arguments, Deadline(seconds))

        return run

    return prepare


@pytest.fixture
def generations_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The providers of our Triton kernels run the reference backend."""
    import peers

    class OnReference(peers.Operator):
        compiler = None

        def __init__(self, name: str) -> None:
            self.name = name

        def prepare(self, problem: Any, tensors: Any) -> Any:
            yield peers._OperatorCall("reference", problem, tensors)

    for name in peers.GENERATIONS:
        monkeypatch.setitem(peers.PROVIDERS, name, OnReference(name))
