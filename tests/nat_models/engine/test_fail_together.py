import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed
from two_processes import run_two

from nat_models.engine import fail_together as module
from nat_models.engine.fail_together import Watch, fail_together


def trainer(*started):
    """Of two processes."""
    launcher = SimpleNamespace(procs=list(started))
    return SimpleNamespace(world_size=2, strategy=SimpleNamespace(launcher=launcher))


@pytest.fixture
def _quick(monkeypatch):
    """The processes are forked."""
    monkeypatch.setattr(module, "INTERVAL", 0.05)
    monkeypatch.setattr(module, "_end", lambda: None)


def both_fail(rank):
    distributed.barrier()
    time.sleep(0.2 * rank)
    try:
        with fail_together(trainer()):
            raise ValueError(str(rank))
    except BaseException as error:
        return type(error)
    finally:
        distributed.barrier()


@pytest.mark.usefixtures("_quick")
def test_the_first_fault_alone_is_told():
    assert run_two(both_fail) == {0: ValueError, 1: SystemExit}


def stop_or_finish(rank, error):
    watch_ends = []
    module._end = lambda: watch_ends.append(rank)
    with suppress(SIGTERMException), fail_together(trainer()):
        time.sleep(0.3 + 0.3 * rank)
        if error and rank == 0:
            raise error
    time.sleep(0.3)
    distributed.barrier()
    return watch_ends


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("error", [None, SIGTERMException()], ids=["done", "told to stop"])
def test_the_end_of_one_process_is_no_fault_of_the_other(error):
    assert run_two(stop_or_finish, error) == {0: [], 1: []}


def watch_the_started(rank, code, caplog):
    if rank == 1:
        distributed.barrier()
        return None
    child = subprocess.Popen([sys.executable, "-c", code])
    ends = []
    module._end = lambda: ends.append(1)
    one = trainer(child)
    its_own = one.strategy.launcher.procs
    with caplog.at_level(logging.ERROR), fail_together(one):
        child.wait()
        time.sleep(0.6)
    distributed.barrier()
    return bool(ends), its_own, "was killed by signal 9" in caplog.text


KILLED = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(("code", "ends"), [(KILLED, True), ("exit(143)", False)])
def test_a_started_process_that_is_killed_is_told_by_the_first(caplog, code, ends):
    assert run_two(watch_the_started, code, caplog)[0] == (ends, [], ends)


def test_one_process_needs_no_watch(monkeypatch):
    monkeypatch.setattr(Watch, "start", None)
    with pytest.raises(ValueError, match="x"), fail_together(SimpleNamespace(world_size=1)):
        raise ValueError("x")


def hang_after_fault(rank):
    if rank == 1:
        distributed.barrier()
        time.sleep(0.6)
        return None
    module.GRACE = 0.2
    module._end = lambda: os.write(writing, b"ended")
    reading, writing = os.pipe()
    with pytest.raises(ValueError, match="x"), fail_together(trainer()):
        raise ValueError("x")
    distributed.barrier()
    time.sleep(0.4)
    os.set_blocking(reading, False)
    return os.read(reading, 10)


@pytest.mark.usefixtures("_quick")
def test_a_process_that_hangs_after_its_fault_is_ended():
    assert run_two(hang_after_fault)[0] == b"ended"
