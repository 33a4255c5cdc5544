"""`deltaprompt inspect`: a backbone's sites and where a delta goes on them, or the record of a saved adaptation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaprompt.cli import console, options

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree

    from deltaprompt.memory import Memory
    from deltaprompt.report import Anatomy, Group, Placement, SiteReport

ROWS, LENGTH = 16, 128  # of a training step where not given; 16 is what `fit` takes


def inspect(
    what: Annotated[
        str,
        typer.Argument(
            help="A backbone (a folder, a name on the hub, demo), or a saved adaptation's folder.",
            metavar="NAME|FOLDER",
        ),
    ],
    delta: options.Counted = None,
    memory: options.MemoryFlag = False,
    batch_size: options.BatchSize = None,
    length: options.Length = None,
    dtype: options.StoredDtype = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show a backbone's sites and what deltas cost there, or what a saved adaptation is."""
    from deltaprompt.cli.predict import BEST
    from deltaprompt.errors import ConfigError
    from deltaprompt.store import holds_adaptation

    saved = holds_adaptation(what) or any((Path(what) / name).is_file() for name in BEST)
    if memory and (saved or not delta):
        raise ConfigError("--memory is of training deltas on a backbone: give a backbone's NAME and --delta")
    if not memory and (batch_size is not None or length is not None):
        raise ConfigError("--batch-size and --length are of a training step: give --memory too")
    if saved:
        _adaptation(Path(what), as_json)
        return
    step = (ROWS if batch_size is None else batch_size, length) if memory else None
    if _backbone(what, delta or [], step, dtype or ("float32" if memory else "auto"), as_json):
        raise typer.Exit(console.WRONG_USE)


def _adaptation(folder: Path, as_json: bool) -> None:
    from rich.tree import Tree

    from deltaprompt.cli.predict import settled
    from deltaprompt.model.saved import describe

    record = describe(settled(folder))
    if as_json:
        console.print_json(record)
        return
    tree = Tree(f"[bold]{folder}[/bold]")
    _grow(tree, record)
    console.output().print(tree)


def _grow(tree: Tree, value: Mapping[str, Any]) -> None:
    """A record's keys and values; lists of tables by number."""
    from rich.text import Text

    for key, inner in value.items():
        if isinstance(inner, list) and any(isinstance(v, dict) for v in inner):
            inner = {str(number): v for number, v in enumerate(inner)}
        if isinstance(inner, dict) and inner:
            _grow(tree.add(Text(str(key), "cyan")), inner)
        else:
            shown = ", ".join(map(str, inner)) if isinstance(inner, list) else str(inner)
            tree.add(Text.assemble((f"{key}: ", "cyan"), shown))


def _backbone(name: str, deltas: list[str], step: tuple[int, int | None] | None, dtype: str, as_json: bool) -> bool:
    """Prints a backbone, and the memory of a step of so many rows and tokens; true where a delta cannot be attached."""
    from deltaprompt.backbone import load
    from deltaprompt.memory import predicted
    from deltaprompt.registry import from_description, variant_of
    from deltaprompt.report import anatomy

    chosen = [from_description("deltas", variant_of("deltas", text)) for text in deltas if text != "none"]
    backbone = load(name, device="cpu", dtype=dtype)
    found = anatomy(backbone, chosen)
    problems = [placement.problem for placement in found.placements if placement.problem]
    memory = None
    if step and not problems:
        memory = predicted(backbone, chosen, step[0], min(LENGTH, backbone.max_length) if step[1] is None else step[1])
    if as_json:
        told = {"memory": dataclasses.asdict(memory) | {"total": memory.total()}} if memory else {}
        console.print_json(dataclasses.asdict(found) | told)
    else:
        _draw(found)
        if memory:
            console.output().print(_step(memory))
    for problem in problems:
        console.note(problem, "bold red")
    return bool(problems)


def _draw(found: Anatomy) -> None:
    from rich.text import Text
    from rich.tree import Tree

    head = f"{found.model}, {found.kind}, {found.parameters:,} parameters"
    tree = Tree(Text.assemble((found.name, "bold"), f"  {head}"))
    wide = max(len(site.name) for group in found.groups for site in group.sites)
    for group in found.groups:
        branch = tree.add(Text(_layers(group), "cyan")) if group.name else tree
        for site in group.sites:
            branch.add(Text("  ".join(_cells(site, wide if group.name else wide + 4)).rstrip(), _style(site)))
    tree.add(Text(f"{'elsewhere':{wide + 9}}  {'':30}  {found.elsewhere:>12,}", "dim"))
    screen = console.output()
    screen.print(tree)
    screen.print(
        f"states of width {found.width}, {found.vocabulary:,} tokens known, {found.max_length:,} at most in a text"
    )
    for placement in found.placements:
        screen.print(_summary(placement), markup=False, soft_wrap=True)


def _step(memory: Memory) -> Table:
    """What a training step holds, with and without checkpointing."""
    can = memory.recomputed is not None
    again = memory.kept if memory.recomputed is None else memory.recomputed
    held = {
        "backbone": (memory.backbone,) * 2,
        "deltas": (memory.deltas,) * 2,
        "gradients": (memory.gradients,) * 2,
        "optimizer (AdamW)": (memory.optimizer,) * 2,
        "kept activations": (memory.kept, again),
        "in all": (memory.total(), memory.total(again=True)),
    }
    wide = 2 if can else 1  # columns of bytes
    columns = ("", "", "--checkpointing")[: 1 + wide]
    title = f"a training step on {memory.rows} rows of {memory.length} tokens"
    return console.table(columns, ([name, *map(console.size, sizes[:wide])] for name, sizes in held.items()), title)


def _layers(group: Group) -> str:
    return group.name + (f"  {group.layers} alike, each with" if group.layers > 1 else "")


def _cells(site: SiteReport, wide: int) -> Iterator[str]:
    """The columns of a site's line: name, kind, shape, parameters, and for each delta ✓ and what it trains there."""
    yield f"{site.name:{wide}}"
    yield f"{site.kind:6}"
    yield f"{f'{site.inputs:,} → {site.outputs:,}' if site.kind in ('linear', 'embed') else f'{site.outputs:,}':>22}"
    yield f"{'tied' if site.tied and not site.parameters else f'{site.parameters:,}':>12}"
    for cost in site.costs:
        yield f"{'·' if cost is None else f'✓ +{cost:,}':>12}"


def _style(site: SiteReport) -> str:
    return "green" if any(cost is not None for cost in site.costs) else "dim" if site.costs else ""


def _summary(placement: Placement) -> str:
    options = ", ".join(f"{k}={v}" for k, v in placement.delta.items() if k != "kind")
    told = f"{placement.delta['kind']} ({options})"
    if placement.problem is not None:
        return f"✗ {told} cannot be attached; sites that its selectors do match: {placement.sites}"
    share = f"{placement.share:.3%} of the backbone's"
    return f"✓ {told}: {placement.sites} sites, {placement.parameters:,} parameters, {share}"
