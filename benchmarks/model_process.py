"""Cases in processes of their own: they are prepared side by side and timed in turns.

Compiling takes far longer than timing, and a process compiles on one core: side by side they use
all cores. Memory, compiled code and failures of one case do not touch another's. While one is timed
all others wait, with their unused memory given back.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from adapters import create_model
from measuring import Deadline
from torch import nn

from nat_models.benchmark.case import Case
from nat_models.benchmark.measure import (
    Candidate,
    Sampling,
    allocate_workspaces,
    is_out_of_memory,
    release_memory,
)
from nat_models.benchmark.steps import Step

CreateModel = Callable[[Case, torch.device], nn.Module]

# Each case's process is a fork of one that has imported what takes long.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["nat_models.benchmark.measure"])


def measure_together(
    cases: Sequence[Case],
    device: str,
    sampling: Sampling,
    deadline: Deadline,
    create: CreateModel = create_model,
) -> list[dict[str, Any]]:
    """Measure cases in turns.

    What fails beside others is tried once more when they have given back their memory, and if it
    fails again, alone.

    Args:
        cases: What to measure.
        device: Where.
        sampling: How often.
        deadline: When all must have ended.
        create: From case and device to the model, in the case's process.

    Returns:
        A record of each case. One that could not be measured says why in its status.

    Raises:
        TimeoutError: The deadline came first.
    """
    members = [CaseProcess(case, device, sampling, create) for case in cases]
    try:
        for member in members:
            member.start("prepare")
        for member in members:
            member.finish(deadline)
        for member in members:
            if member.failed and len(members) > 1:
                member.run("prepare", deadline)
        for _ in range(sampling.rounds):
            for member in members:
                member.run("time_round", deadline)
        for member in members:
            timed = member.record
            member.run("profile", deadline)
            if member.failed:  # times are worth keeping without
                member.record = timed
    finally:
        for member in members:
            member.end()
    if len(members) == 1:
        return [members[0].record]
    return [
        measure_together([member.case], device, sampling, deadline, create)[0]
        if member.failed
        else member.record
        for member in members
    ]


class CaseProcess:
    """A candidate in a process of its own, and the newest record of it."""

    def __init__(
        self, case: Case, device: str, sampling: Sampling, create: CreateModel = create_model
    ) -> None:
        self.case, self.record = case, case.as_record() | {"status": "ok"}
        self._connection, theirs = _processes.Pipe()
        arguments = theirs, case, device, sampling, create
        self._process = _processes.Process(target=_serve, args=arguments, daemon=False)
        self._process.start()
        theirs.close()

    @property
    def failed(self) -> bool:
        """Whether the last method of the candidate failed."""
        return self.record["status"] != "ok"

    def run(self, method: str, deadline: Deadline) -> None:
        """Call a method of the candidate, unless an earlier one failed for good."""
        if method == "prepare" or not self.failed:
            self.start(method)
            self.finish(deadline)

    def start(self, method: str) -> None:
        """Begin a method of the candidate."""
        with suppress(OSError):  # it has died, which `finish` will note
            self._connection.send(method)

    def finish(self, deadline: Deadline) -> None:
        """Wait for its end."""
        if not self._connection.poll(deadline.left):
            raise TimeoutError
        try:
            self.record = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            self.record["status"] = f"failed: process ended with {self._process.exitcode}"

    def end(self) -> None:
        """Stop the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()


class PatientCandidate(Candidate):
    """A candidate that waits for memory, as others are being prepared too."""

    def call_first(self, step: Step) -> None:
        """Try again what is compiled by then."""
        for pause in (3, 10, 20, 0):
            try:
                return super().call_first(step)
            except RuntimeError as error:
                if not pause or not is_out_of_memory(error) or self.device.type == "cpu":
                    raise
            release_memory()
            time.sleep(pause)


def _serve(
    connection: Connection, case: Case, device: str, sampling: Sampling, create: CreateModel
) -> None:
    candidate = PatientCandidate(case, torch.device(device), sampling, create)
    allocate_workspaces(candidate.device)
    while True:
        try:
            method = connection.recv()
        except EOFError:  # nobody asks any more
            return
        try:
            getattr(candidate, method)()
            record = candidate.result() if candidate.rounds else candidate.record
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            record = candidate.record | {"status": f"failed: {type(error).__name__}: {reason}"}
        release_memory()
        connection.send(record)
