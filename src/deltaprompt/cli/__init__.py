"""The `deltaprompt` command. Every command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from deltaprompt import __version__
from deltaprompt.cli import (
    compare,
    conformance,
    demo,
    episodes,
    fit,
    inspect,
    interchange,
    methods,
    noise,
    predict,
    pretrain,
    search,
)
from deltaprompt.cli.console import guarded

app = typer.Typer(
    name="deltaprompt",
    help="Adapt a pretrained language model to a task from a few examples, and keep what it learned in one small file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (fit.fit, predict.predict, predict.evaluate, inspect.inspect, methods.methods, demo.demo):
    app.command()(guarded(command))
app.command()(guarded(interchange.export))
app.command()(guarded(conformance.conformance))
app.command()(guarded(search.search))
app.command()(guarded(noise.noise))
app.command()(guarded(episodes.episodes))
app.command()(guarded(compare.compare))
app.command()(guarded(pretrain.pretrain))
app.command("import")(guarded(interchange.import_))


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point."""
    app()
