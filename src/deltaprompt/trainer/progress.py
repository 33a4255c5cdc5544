"""What a user sees of a training run: a bar with the loss, the metric on dev and the time left, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from deltaprompt.trainer.run import headline

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress(Protocol):
    """What a training run tells while it goes on."""

    def start(self, total: int, what: str) -> None:
        """A run of `total` optimizer steps begins; `what` names it."""

    def step(self, step: int, loss: float) -> None:
        """So many steps are done."""

    def evaluated(self, metrics: Mapping[str, float], best: bool) -> None:
        """The metrics on dev, and whether they are the best so far."""

    def done(self) -> None:
        """The run is over, finished or not."""


class Silent:
    """Nothing is shown."""

    def start(self, total: int, what: str) -> None:
        pass

    def step(self, step: int, loss: float) -> None:
        pass

    def evaluated(self, metrics: Mapping[str, float], best: bool) -> None:
        pass

    def done(self) -> None:
        pass


class RichProgress:
    """A bar on standard error, one line a run."""

    def __init__(self) -> None:
        self._bar: Bar | None = None

    def start(self, total: int, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        texts = [TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[dev]}")]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *texts, TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(what, total=total, loss="", dev="")
        self._bar.start()

    def step(self, step: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"loss {loss:.3f}")

    def evaluated(self, metrics: Mapping[str, float], best: bool) -> None:
        if self._bar is not None and best:
            self._bar.update(self._task, dev=f"best dev {headline(metrics)}")

    def done(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def usual() -> Progress:
    """The bar where somebody may be watching, nothing otherwise."""
    return RichProgress() if sys.stderr.isatty() else Silent()
