"""What a run says: lines on the terminal, beside the progress bar, and in a file."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rich
from lightning.pytorch.utilities import rank_zero_only

# Advice of libraries that does not apply here.
_NOISE = [
    ".*does not have many workers.*",
    ".*your dataloader is not resumable.*",  # its sampler is
    ".*Checkpoint directory .* exists and is not empty.*",  # it holds the records
    ".*number of training batches .* smaller than the logging interval.*",
    ".*treespec, LeafSpec.*",
]


class ConsoleHandler(logging.Handler):
    """Prints through rich's console, which keeps lines and a live progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line, unwrapped."""
        rich.get_console().print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def set_up_logging() -> None:
    """Send messages and warnings to the terminal, from the first process only; drop known noise."""
    first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[ConsoleHandler()], force=True)
    for library in ("lightning.pytorch", "lightning.fabric", "timm", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append our messages to a file too, from the first process only."""
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        yield
        return
    logger = logging.getLogger("nat_models")
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
