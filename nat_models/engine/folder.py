"""The folder of a run: one for all its processes, and for no other run at the same time."""

import fcntl
import os
from pathlib import Path
from typing import IO

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

_locks: dict[Path, IO[str]] = {}  # held until the process ends, however it does


def resume_path(cfg: DictConfig) -> Path | None:
    """The checkpoint to go on from, None to start anew.

    Raises:
        ValueError: `ckpt=last` finds none.
    """
    if cfg.ckpt == "auto":
        path = Path(cfg.paths.output_dir, "last.ckpt")
        return path if path.exists() else None
    if cfg.ckpt != "last":
        return Path(cfg.ckpt) if cfg.ckpt else None
    folder = Path(cfg.paths.root, cfg.name)
    found = sorted(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"ckpt=last: there is no last.ckpt under {folder}")
    return found[-1]


def share_output_dir(cfg: DictConfig) -> None:
    """One folder for all processes: those that Lightning starts compose anew, and later."""
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        os.environ["NAT_MODELS_OUTPUT_DIR"] = cfg.paths.output_dir
    cfg.paths.output_dir = os.environ.get("NAT_MODELS_OUTPUT_DIR", cfg.paths.output_dir)


@rank_zero_only
def claim(output: Path, resuming: bool) -> None:
    """Make the run's folder and hold it as long as the process lives.

    Raises:
        ValueError: It cannot be written to, another process holds it, or it has another run.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("a")
    except OSError as error:
        raise ValueError(
            f"paths.output_dir={output}: expected a folder that can be written to: {error}"
        ) from error
    _locks.pop(output, None)  # of an earlier run in this process
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loading processes
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"paths.output_dir={output}: another run writes there; choose another folder"
        ) from error
    if not resuming and (output / "last.ckpt").exists():
        raise ValueError(
            f"paths.output_dir={output}: holds another run; continue it with "
            f"ckpt={output}/last.ckpt or choose another folder"
        )
    _locks[output] = lock
