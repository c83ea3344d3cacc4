"""Results of an evaluation as files."""

import csv
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from nat_models import viz
from nat_models.data import ImageDataModule
from nat_models.errors import RunStopped

_log = logging.getLogger(__name__)


def output_folder(cfg: DictConfig) -> Path | None:
    """Make the folder for the results, None if there are to be none.

    Raises:
        ValueError: It cannot be written to.
    """
    if cfg.output is None:
        return None
    output = Path(cfg.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(
            f"output={output}: expected a folder that can be written to: {error}"
        ) from error
    return output


@contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """Around the writing of results: tells where they are.

    Raises:
        RunStopped: They cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise RunStopped(f"output={output}: the results could not be written: {error}") from error
    _log.info("results: %s", output)


def write_results(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write results.json and results.csv.

    Args:
        folder: Where to.
        results: A row for each evaluation.
    """
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _write_csv(folder / "results.csv", list(results[0]), [[*row.values()] for row in results])


def write_report(
    folder: Path, table: dict[str, Any], data: ImageDataModule, names: Sequence[str]
) -> None:
    """Write predictions.csv, classes.csv and confusion.png.

    Args:
        folder: Where to.
        table: Of `Predictions`.
        data: Where the images come from.
        names: Names of the classes.
    """
    labels, classes = table["label"], table["classes"]
    images = [data.image_name(int(index)) for index in table["index"]]
    ranked = [f"{what}_{k}" for k in range(1, classes.shape[1] + 1) for what in ("class", "share")]
    _write_csv(
        folder / "predictions.csv",
        ["image", "label", *ranked],
        [
            [
                image,
                names[label],
                *(x for c, p in zip(top, ps, strict=True) for x in (names[c], f"{p:.4f}")),
            ]
            for image, label, top, ps in zip(
                images, labels, classes, table["probabilities"], strict=True
            )
        ],
    )
    matrix = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(matrix, (labels, classes[:, 0]), 1)
    top5 = np.bincount(labels[(classes == labels[:, None]).any(1)], minlength=len(names))
    count, given, right = matrix.sum(1), matrix.sum(0), matrix.diagonal()
    _write_csv(
        folder / "classes.csv",
        ["class", "images", "top1", "top5", "precision"],
        [
            [name, n, *(f"{a / b:.4f}" if b else "" for a, b in ((r, n), (five, n), (r, g)))]
            for name, n, r, five, g in zip(names, count, right, top5, given, strict=True)
        ],
    )
    viz.confusion(matrix, names).savefig(folder / "confusion.png")


def write_named(folder: Path, found: dict[str, list[tuple[str, float]]]) -> None:
    """Write predictions.csv of pictures without labels, a row for each class of each.

    Args:
        folder: Where to.
        found: By file name, the classes and their probabilities, the most probable first.
    """
    _write_csv(
        folder / "predictions.csv",
        ["file", "rank", "class", "probability"],
        [
            [file, rank, name, f"{probability:.4f}"]
            for file, top in found.items()
            for rank, (name, probability) in enumerate(top, 1)
        ],
    )


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
