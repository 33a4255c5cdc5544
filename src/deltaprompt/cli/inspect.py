"""`deltaprompt inspect`: a backbone's sites and where a delta goes on them, or the record of a saved adaptation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaprompt.cli import console, options

if TYPE_CHECKING:
    from rich.tree import Tree

    from deltaprompt.report import Anatomy, Group, Placement, SiteReport


def inspect(
    what: Annotated[
        str,
        typer.Argument(
            help="A backbone (a folder, a name on the hub, demo), or a saved adaptation's folder.",
            metavar="NAME|FOLDER",
        ),
    ],
    delta: options.Deltas = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show a backbone's sites and what deltas cost there, or what a saved adaptation is."""
    from deltaprompt.store import holds_adaptation

    if holds_adaptation(what) or (Path(what) / "seeds.json").is_file():
        _adaptation(Path(what), as_json)
    elif _backbone(what, delta or [], as_json):
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


def _backbone(name: str, deltas: list[str], as_json: bool) -> bool:
    """Prints a backbone; true where a delta cannot be attached."""
    from deltaprompt.backbone import load
    from deltaprompt.cli.recipe import variant_of
    from deltaprompt.registry import from_description
    from deltaprompt.report import anatomy

    chosen = [from_description("deltas", variant_of("deltas", text)) for text in deltas if text != "none"]
    found = anatomy(load(name, device="cpu", dtype="auto"), chosen)
    if as_json:
        console.print_json(dataclasses.asdict(found))
    else:
        _draw(found)
    problems = [placement.problem for placement in found.placements if placement.problem]
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
