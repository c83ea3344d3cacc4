"""Cases in processes of their own: they are prepared side by side and timed in turns.

Compiling takes far longer than timing, and a process compiles on one core: side by side they use
all cores. Memory, compiled code and failures of one case do not touch another's. While one is timed
all others wait, with their unused memory given back.
"""

import gc
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from adapters import create_model
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
from neighborhood_attention import list_backends
from neighborhood_attention.tune.records import Deadline

CreateModel = Callable[[Case, torch.device], nn.Module]
WAITS = "waits for memory"

# Each process is a fork of one that has imported what takes long.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["nat_models.benchmark.measure"])


class Workers:
    """Measure groups of cases; as a context they end at last.

    A process that neither compiled nor profiled, and did not fail, measures a case of the next
    group too.

    Args:
        device: Where.
        sampling: How often.
        create: From case and device to the model, in the case's process.
    """

    def __init__(self, device: str, sampling: Sampling, create: CreateModel = create_model) -> None:
        self._arguments = device, sampling, create
        self._rounds = sampling.rounds
        self._idle: list[Worker] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._end_idle()

    def measure(
        self, cases: Sequence[Case], deadline: Deadline, profile: bool = True
    ) -> Iterator[tuple[Case, dict[str, Any]]]:
        """Measure cases in turns.

        What finds too little memory beside others waits until all are prepared, then tries again.
        What fails nevertheless is measured alone after the others, whose records have been given.

        Args:
            cases: What to measure.
            deadline: When all must have ended.
            profile: Whether to say where the time goes.

        Yields:
            Each case and its record. Where it could not be measured, the status says why.

        Raises:
            TimeoutError: The deadline came first.
        """
        workers = [self._worker() for _ in cases]
        try:
            self._in_turns(workers, cases, deadline, profile)
            records = [worker.record for worker in workers]
            self._keep(workers, cases, deadline, profile)
        except BaseException:
            for worker in workers:
                worker.end()
            raise
        alone = []
        for case, record in zip(cases, records, strict=True):
            if record["status"] == "ok" or len(cases) == 1:
                yield case, record
            else:
                alone.append(case)
        if alone:  # also without the idle ones' memory
            self._end_idle()
        for case in alone:
            yield from self.measure([case], deadline, profile)

    def _in_turns(
        self, workers: Sequence["Worker"], cases: Sequence[Case], deadline: Deadline, profile: bool
    ) -> None:
        for worker, case in zip(workers, cases, strict=True):
            worker.start("prepare", case)
        for worker in workers:
            worker.finish(deadline)
        for worker in workers:
            if worker.record["status"] == WAITS:
                worker.start("go on")
                worker.finish(deadline)
        for _ in range(self._rounds):
            for worker in workers:
                worker.run("time_round", deadline)
        for worker in workers if profile else ():
            timed = worker.record
            worker.run("profile", deadline)
            if worker.failed:  # times are worth keeping without
                worker.record = timed

    def _worker(self) -> "Worker":
        return self._idle.pop() if self._idle else Worker(*self._arguments)

    def _end_idle(self) -> None:
        while self._idle:
            self._idle.pop().end()

    def _keep(
        self, workers: Sequence["Worker"], cases: Sequence[Case], deadline: Deadline, profile: bool
    ) -> None:
        kept = []
        for worker, case in zip(workers, cases, strict=True):
            compiles = case.is_compiled
            compiles |= case.attention_backend not in (None, *list_backends())
            is_clean = not compiles and not profile
            if is_clean and worker.record["status"] in ("ok", "out of memory"):
                worker.start("forget")
                kept.append(worker)
            else:
                worker.end()
        for worker in kept:
            worker.finish(deadline)
        self._idle += [worker for worker in kept if not worker.failed]


class Worker:
    """A process with a candidate, and the newest record of it."""

    def __init__(self, device: str, sampling: Sampling, create: CreateModel = create_model) -> None:
        self.record: dict[str, Any] = {"status": "ok"}
        self._connection, theirs = _processes.Pipe()
        arguments = theirs, device, sampling, create
        self._process = _processes.Process(target=_serve, args=arguments, daemon=False)
        self._process.start()
        theirs.close()

    @property
    def failed(self) -> bool:
        """Whether the last method of the candidate failed."""
        return bool(self.record["status"] != "ok")

    def run(self, method: str, deadline: Deadline) -> None:
        """Call a method of the candidate, unless an earlier one failed for good."""
        if not self.failed:
            self.start(method)
            self.finish(deadline)

    def start(self, method: str, case: Case | None = None) -> None:
        """Begin a method of the candidate, of a new one for a case."""
        if case is not None:
            self.record = case.as_record() | {"status": "ok"}
        with suppress(OSError):  # it has died, which `finish` will note
            self._connection.send((method, case))

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

    connection: Connection

    def call_first(self, step: Step) -> None:
        """Also the second call, which records a captured step; what is compiled is kept."""
        try:
            self._call_twice(step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return
        release_memory()
        self.connection.send(self.record | {"status": WAITS})
        self.connection.recv()
        self._call_twice(step)

    def _call_twice(self, step: Step) -> None:
        super().call_first(step)
        super().call_first(step)


def _serve(connection: Connection, device: str, sampling: Sampling, create: CreateModel) -> None:
    candidate: PatientCandidate | None = None
    allocate_workspaces(torch.device(device))
    gc.freeze()  # what was imported is not searched for garbage
    while True:
        try:
            method, case = connection.recv()
        except EOFError:  # nobody asks any more
            return
        if case is not None:
            candidate = PatientCandidate(case, torch.device(device), sampling, create)
            candidate.connection = connection
        record: dict[str, Any] = {"status": "ok"}
        if method == "forget":
            candidate = None
        else:
            assert candidate is not None
            record = _call(candidate, method)
        release_memory()
        connection.send(record)


def _call(candidate: Candidate, method: str) -> dict[str, Any]:
    try:
        getattr(candidate, method)()
        return candidate.result() if candidate.rounds else candidate.record
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        return candidate.record | {"status": f"failed: {type(error).__name__}: {reason}"}
