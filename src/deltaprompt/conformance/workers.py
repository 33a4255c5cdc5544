"""`checked(architectures, deltas, workers)`: architectures are checked in processes, so that a crash is one's own.

A worker takes one architecture after another. One that dies or takes too long is that architecture's failure, and a
fresh worker takes its place; however the caller ends, no worker is left.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from deltaprompt.conformance.check import Checked, Outcome, check
from deltaprompt.conformance.shrink import Architecture

LIMIT = 600.0  # seconds for one architecture, the start of its worker included


@dataclass
class Worker:
    """A process, and what it is at since when."""

    process: BaseProcess
    connection: Connection
    at: Architecture
    since: float

    def give(self, architecture: Architecture) -> None:
        """The next one to check."""
        self.at, self.since = architecture, time.monotonic()
        self.connection.send(architecture)

    def result(self, limit: float) -> Checked | str | None:
        """What it has found, or why it never will; None while it is at work."""
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return f"its process ended with exit code {self.process.exitcode}"
        return f"not done within {limit:.0f} seconds" if time.monotonic() - self.since > limit else None

    def stop(self) -> None:
        """Ends the process, whatever it is at."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def checked(
    architectures: Sequence[Architecture], deltas: Sequence[str], workers: int = 1, limit: float = LIMIT
) -> Iterator[Checked]:
    """What became of each architecture, in the order in which they are done."""
    left = list(reversed(architectures))
    busy: list[Worker] = []
    try:
        while left or busy:
            while left and len(busy) < workers:
                busy.append(_start(deltas, left.pop()))
            wait([w.connection for w in busy], timeout=1.0)
            for worker in list(busy):
                found = worker.result(limit)
                if isinstance(found, str):
                    busy.remove(worker)
                    worker.stop()
                    yield _lost(worker.at, deltas, found)
                elif found is not None:
                    if left:
                        worker.give(left.pop())
                    else:
                        busy.remove(worker)
                        worker.stop()
                    yield found
    finally:
        for worker in busy:
            worker.stop()


def _lost(architecture: Architecture, deltas: Sequence[str], why: str) -> Checked:
    outcomes = (Outcome(str(architecture), delta, "failed", f"worker: {why}") for delta in deltas)
    return Checked(str(architecture), outcomes=tuple(outcomes))


def _start(deltas: Sequence[str], first: Architecture) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, tuple(deltas)), daemon=True)
    process.start()
    theirs.close()
    worker = Worker(process, ours, first, 0.0)
    worker.give(first)
    return worker


def _work(connection: Connection, deltas: Sequence[str]) -> None:
    """A worker: silent, on one thread, ended by its parent or by the end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    try:
        while True:
            connection.send(check(connection.recv(), deltas))
    except (EOFError, ConnectionError):
        return
