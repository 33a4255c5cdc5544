"""What every command shares at the terminal: results go to standard output, all else to standard error."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from deltaprompt.errors import ConfigError, DeltaPromptError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

P = ParamSpec("P")
WRONG_USE, PIPE_CLOSED, INTERRUPTED = 2, 1, 130  # exit codes; 130 is what a shell gives a command stopped by Ctrl-C
PIPED_WIDTH = 120  # columns where there is no terminal to ask


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose user's errors are one line on standard error; with its option `debug` there is the traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except DeltaPromptError as error:
            if kwargs.get("debug"):
                raise
            _line(str(error), "bold red")
            raise typer.Exit(WRONG_USE) from error
        except KeyboardInterrupt as error:
            note("stopped by Ctrl-C")
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:  # the reader, such as `head`, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from error

    return run


@contextmanager
def resumable(out: object, resume: bool | None, what: str = "the run") -> Iterator[None]:
    """Within it Ctrl-C ends the command with the one that goes on, where a folder keeps what was done.

    `resume` is None for a command that goes on by itself.
    """
    if resume and out is None:
        raise ConfigError(f"--resume needs --out, the folder of {what} that was broken off")
    try:
        yield
    except KeyboardInterrupt as error:
        if out is None:
            raise
        again = [word for word in sys.argv[1:] if word != "--resume"]
        again += [] if resume is None else ["--resume"]
        note(f"stopped by Ctrl-C; go on with: {shlex.join(['deltaprompt', *again])}")
        raise typer.Exit(INTERRUPTED) from error


def note(text: str, style: str = "dim") -> None:
    """A line to standard error, as it is: no markup, no wrapping. Of several processes (torchrun) the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        _line(text, style)


def _line(text: str, style: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style=style, markup=False, emoji=False)


def output() -> Console:
    """Standard output, for tables and trees."""
    from rich.console import Console

    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A table whose first column is text and whose others are numbers."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    for row in rows:
        made.add_row(*row)
    return made


def print_json(value: Mapping[str, Any]) -> None:
    """One object on one line."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def plus_minus(told: Mapping[str, float], seeds: int) -> str:
    """A mean and, of several seeds, its standard deviation."""
    return f"{told['mean']:.3f}" + (f" ± {told['std']:.3f}" if seeds > 1 else "")


def size(count: int) -> str:
    """Bytes as a person reads them."""
    return (
        f"{count:,} B" if count < 1000 else f"{count / 1000:,.0f} kB" if count < 1_000_000 else f"{count / 1e6:,.1f} MB"
    )
