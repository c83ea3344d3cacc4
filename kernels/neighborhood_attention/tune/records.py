"""The file of all measurements, which a later run continues, and what a run prints."""

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
SAVE_EVERY = 5.0  # seconds
TELL_EVERY = 15.0


class Deadline:
    """The end of the time that a run may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, 0 at least."""
        return max(0.0, self._end - time.monotonic())


class Records:
    """A JSON file with the candidates' times and the choices among them.

    Raises:
        ValueError: The file is of another device, of other versions or of another commit.
    """

    def __init__(self, path: Path, description: Record) -> None:
        self._path, self._saved = path, time.monotonic()
        before = json.loads(path.read_text()) if path.exists() else {}
        for name, value in description.items():
            if name != "date" and before.get(name, value) != value:
                raise ValueError(
                    f"{path}: {name} {before[name]}, but this is {value}: their measurements go "
                    "into different files"
                )
        self.description = description
        self.choices: list[Record] = before.get("choices", [])
        self._candidates = {self._key(entry): entry for entry in before.get("candidates", [])}

    @staticmethod
    def _key(record: Record) -> str:
        names = [name for name in record if name not in ("us", "low", "high", "error", "failure")]
        return json.dumps({name: record[name] for name in sorted(names)})

    def __len__(self) -> int:
        return len(self._candidates)

    def find(self, record: Record) -> Record | None:
        """The measurement with this identity."""
        return self._candidates.get(self._key(record))

    def add(self, record: Record) -> Record:
        """Take a measurement; now and then the file is written."""
        self._candidates[self._key(record)] = record
        if time.monotonic() > self._saved + SAVE_EVERY:
            self.save()
        return record

    def save(self) -> None:
        """Write the file, a record a line; never half of it."""
        lists = {"choices": self.choices, "candidates": list(self._candidates.values())}
        rows = [
            f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, records)) + "\n ]"
            for name, records in lists.items()
            if records
        ]
        head = json.dumps(self.description, indent=1).removesuffix("\n}")
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(",\n".join([head, *rows]) + "\n}\n")
        os.replace(temporary, self._path)
        self._saved = time.monotonic()


def describe(commit: str) -> Record:
    """What the measurements of one file have in common."""
    import triton

    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    name = torch.cuda.get_device_name()
    date = datetime.date.today().isoformat()
    return {"device": name, "versions": versions, "commit": commit, "date": date}


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, else a line now and then; yields what counts one and says what it is."""
    try:
        from rich.progress import Progress
    except ImportError:
        pass
    else:
        if sys.stdout.isatty():
            with Progress() as bar:
                task = bar.add_task("", total=total)
                yield lambda text: bar.update(task, advance=1, description=text)
            return
    done, told = 0, time.monotonic()

    def tell(text: str) -> None:
        nonlocal done, told
        done += 1
        if time.monotonic() > told + TELL_EVERY:
            told = time.monotonic()
            print(f"{done}/{total} {text}", flush=True)

    yield tell


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
