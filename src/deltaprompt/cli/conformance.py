"""`deltaprompt conformance`: the laws of every delta on every text architecture that transformers knows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaprompt.cli import console, options
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

    from deltaprompt.conformance.summary import Summary


def conformance(
    models: Annotated[
        str, typer.Option("--models", help="all, spread, a kind or type (llama), or causal:llama,masked:*.")
    ] = "all",
    deltas: Annotated[str, typer.Option("--deltas", help="all, or names such as lora,adapter.")] = "all",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes.")] = os.cpu_count() or 1,
    out: Annotated[
        Path | None, typer.Option("--out", help="A Markdown page of what was found.", metavar="FILE")
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Check the laws of deltas on a tiny random model of each text architecture that transformers knows."""
    from deltaprompt.conformance.choose import chosen_deltas, chosen_models
    from deltaprompt.conformance.page import page
    from deltaprompt.conformance.summary import Summary, in_order
    from deltaprompt.conformance.workers import checked

    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}; make it first, or name another")
    architectures, names = chosen_models(models), chosen_deltas(deltas)
    with _progress() as progress:
        task = progress.add_task("starting", total=len(architectures))
        found = []
        for one in checked(architectures, names, workers):
            found.append(one)
            progress.update(task, advance=1, description=one.model)
    summary = Summary(tuple(names), in_order(found, [str(a) for a in architectures]))
    if out is not None:
        command = f"deltaprompt conformance --models {models} --deltas {deltas} --out {out}"
        out.write_text(page(summary, command), encoding="utf-8")
    if as_json:
        console.print_json(summary.as_json())
    else:
        _show(summary)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        yield progress


def _show(summary: Summary) -> None:
    from deltaprompt.conformance.summary import COLUMNS

    screen = console.output()
    title = f"{len(summary.checked)} architectures, {summary.built} built"
    screen.print(console.table(COLUMNS, summary.rows(), title))
    for one in summary.checked:
        if one.problem:
            screen.print(f"not built  {one.model}: {one.problem}", markup=False, soft_wrap=True)
    for group in summary.refusals():
        told = f"refused  {', '.join(group.deltas)} on {', '.join(group.models)}: {group.reason}"
        screen.print(told, markup=False, soft_wrap=True)
    for o in summary.outcomes("failed"):
        screen.print(f"failed  {o.delta} on {o.model}: {o.reason}", style="red", markup=False, soft_wrap=True)
