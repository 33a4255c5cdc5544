"""`deltaprompt methods`: every delta method, its formula and paper, and what it trains on a backbone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from deltaprompt.cli import console, options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from deltaprompt.catalogue import Method


def methods(backbone: options.BackboneName = None, as_json: options.Json = False, debug: options.Debug = False) -> None:
    """List every delta method: what it computes, its paper, where it goes, what it trains on --backbone."""
    from deltaprompt import catalogue
    from deltaprompt.backbone import load

    found = list(catalogue.methods(None if backbone is None else load(backbone, device="cpu", dtype="auto")))
    if as_json:
        console.print_json({"methods": [dataclasses.asdict(method) for method in found]})
        return
    console.output().print(_table(found, backbone))
    for method in found:
        if method.problem is not None:
            console.note(f"{method.name}: {method.problem}")


def _table(found: Sequence[Method], backbone: str | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if backbone is None else f"with default options on {backbone}", show_lines=True)
    for name in ("delta", "taxonomy", "formula and source", "default sites", "merges"):
        table.add_column(name, max_width=28 if name == "default sites" else None)
    if backbone is not None:
        table.add_column("parameters", justify="right")
    for method in found:
        told = Text(method.formula).append(f"\n{method.source}", "dim")
        row = (Text(method.name, "bold"), method.taxonomy, told, Text("\n".join(method.selectors).replace("|", " | ")))
        count = [] if method.parameters is None else ["-" if method.problem else f"{method.parameters:,}"]
        table.add_row(*row, "yes" if method.merges else "no", *count)
    return table
