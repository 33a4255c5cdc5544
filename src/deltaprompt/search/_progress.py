"""What a user sees of a search: a bar on standard error, with the time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[int], None]  # so many more are done


@contextmanager
def bar(total: int, what: str) -> Iterator[Step]:
    """Within it a bar where somebody may be watching, nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(what, total=total)

        def step(done: int) -> None:
            shown.update(task, advance=done)

        yield step
