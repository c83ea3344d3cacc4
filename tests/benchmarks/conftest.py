import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(FOLDER))  # where a script finds its modules


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """on_cpu(module): its measurements run on the CPU, with all but the clock."""
    import measuring
    import peers
    import problem

    def once(function: Callable[[], object], _: float) -> measuring.Timing:
        function()
        return measuring.Timing(20.0, 19.0, 21.0)

    def description() -> dict[str, object]:
        versions = {"torch": "2", "triton": "3"}
        limits = {"count": 2, "registers": 65536, "shared_memory": 233472, "threads": 2048}
        return {"device": "CPU", "versions": versions, "multiprocessor": limits}

    def patch(name: str) -> None:
        module = __import__(name)
        tensors = partial(problem.random_tensors, device="cpu")
        for attribute, value in {
            "random_tensors": tensors,
            "copy_bandwidth": lambda: 2e12,
            "product_rate": lambda _: 4e14,
            "describe_device": description,
        }.items():
            monkeypatch.setattr(module, attribute, value, raising=False)
        monkeypatch.setattr(peers, "graph_time", once)

    return patch
