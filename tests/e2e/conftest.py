from collections.abc import Callable
from pathlib import Path

import pytest

# Small enough for seconds; every source of chance is on: order, crops, erasing, mixup, drop path.
SMALL = [
    "data=digits",
    "data.input_size=[1,16,16]",
    "data.batch_size=32",
    "callbacks.progress=null",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
]
CHANCE = [
    "augment.transform.re_prob=0.5",
    "+augment.transform.re_mode=pixel",
    "augment.mixup={mixup_alpha:0.8,cutmix_alpha:1.0}",
    "model.drop_path_rate=0.3",
]


@pytest.fixture
def small() -> list[str]:
    return SMALL


@pytest.fixture
def chance() -> list[str]:
    return CHANCE


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Pictures are not rendered, which takes half of a short run."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_: None)


@pytest.fixture
def losses() -> Callable[[Path], dict[int, float]]:
    """losses(OUTPUT_DIR): training loss by step, as the CSV logs of all parts of a run hold it."""

    def read(output: Path) -> dict[int, float]:
        import csv

        found = {}
        for log in sorted(output.glob("csv/version_*/metrics.csv")):
            with log.open() as lines:
                rows = [row for row in csv.DictReader(lines) if row.get("train/loss")]
            found.update({int(row["step"]): float(row["train/loss"]) for row in rows})
        return found

    return read
