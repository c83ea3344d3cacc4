"""A fault of one process ends all processes of a run, whatever backend connects them.

With NCCL nothing else would: who waits for a process that is gone waits for the group's timeout,
half an hour. Lightning's own watch looks after the processes that the first one of a host starts,
not after that one, and torchrun's after those of one host.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread, Timer
from typing import Any

import rich
from lightning import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store

_log = logging.getLogger(__name__)

INTERVAL = 0.5  # seconds between two looks
GRACE = 30.0  # seconds to end by oneself: NCCL's group cannot be left alone
# The store of torchrun's agent outlives an attempt.
_KEY = f"nat_models/failed{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"


@contextmanager
def fail_together(trainer: Trainer) -> Iterator[None]:
    """Around the work of a run: a fault of any process ends all, and the first one's is told.

    Args:
        trainer: Starts the processes, or is in one that torchrun or SLURM has started.

    Raises:
        SystemExit: In place of an error here that came after another process's.
    """
    if trainer.world_size == 1:
        yield
        return
    watch = Watch(trainer.strategy.launcher)
    watch.start()
    try:
        yield
    except SIGTERMException:  # all processes stop, after the same step
        raise
    except BaseException as error:
        if not watch.tell():
            raise SystemExit(1) from error
        raise
    finally:
        watch.over.set()


class Watch(Thread):
    """Looks whether another process has failed, and then ends this one, which may hang.

    The processes tell each other by the store that they have met through.

    Args:
        launcher: Lightning's, which knows the processes that this one has started.
    """

    def __init__(self, launcher: Any) -> None:
        super().__init__(name="fault-watch", daemon=True)
        self.over = Event()
        self._launcher = launcher
        self._store: Any = None
        self._lost = 0
        self._beginning = Lock()

    def run(self) -> None:
        """Look until it is over."""
        while not self.over.wait(INTERVAL):
            if self._has_met() and self._another_failed() and not self.over.wait(INTERVAL):
                _end()  # the message is out by now

    def tell(self) -> bool:
        """Tell the others that this process has failed, which then ends soon, too.

        Returns:
            Whether it is the first that has.
        """
        self.over.set()
        if not self._has_met():
            return True
        last = Timer(GRACE, _end)  # the store may not answer either
        last.daemon = True
        last.start()
        first = self._set()
        if distributed.get_rank() == 0:
            time.sleep(2 * INTERVAL)  # the store may end with it
        return first

    def _has_met(self) -> bool:
        """Whether there is a store; its first sight is the beginning of the watch."""
        if not distributed.is_initialized():
            return False
        with self._beginning:
            if self._store is None:
                self._store = _get_default_store().clone()  # a connection waits for its own answers
                if started := getattr(self._launcher, "procs", None):
                    self._launcher.procs = started.copy()
                    started.clear()  # else Lightning's watch kills this process without a word
        return True

    def _set(self) -> bool:
        """Write that a process has failed; whether it had not been written."""
        me = str(distributed.get_rank())
        try:
            return bool(self._store.compare_set(_KEY, "", me) == me.encode())
        except RuntimeError:  # the store is gone
            return True

    def _another_failed(self) -> bool:
        try:
            failed = self._store.check([_KEY])
            self._lost = 0
        except RuntimeError:
            self._lost += 1  # or the first process is done, and this one about to be
            failed = self._lost * INTERVAL >= GRACE
            if failed and distributed.get_rank() == 1:
                _log.error("error: the first process of the run is gone")
        return failed or self._started_one_died()

    def _started_one_died(self) -> bool:
        for process in getattr(self._launcher, "procs", None) or ():
            code = process.poll() or 0
            if code < 0 and self._set():  # another code it has told of, or was told to stop
                _log.error(
                    "error: process %d of the run was killed by signal %d", process.pid, -code
                )
                time.sleep(2 * INTERVAL)
                return True
        return False


def _end() -> None:
    """End this process now: its main thread may wait for ever."""
    try:
        rich.get_console().show_cursor()
        sys.stdout.flush()
    finally:  # a pipe may be closed
        os._exit(1)
