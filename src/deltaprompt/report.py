"""What a backbone is made of, where a delta goes on it and what it costs there: the facts that `inspect` prints."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from deltaprompt import registry
from deltaprompt.backbone import Backbone, Site
from deltaprompt.compose import parameters_of, sites_of
from deltaprompt.compose.placing import gate_params
from deltaprompt.deltas._base import Delta, VirtualTokens
from deltaprompt.errors import SiteError

LAYER = re.compile(r"(.*?layers)\.(\d+)(?:\.(.+))?")
WHOLE = "(layer)"  # how the site that is a whole layer is called within it


@dataclass(frozen=True)
class SiteReport:
    """One site, in one layer: `parameters` of the backbone there, `costs` of each delta there (None: it is not)."""

    name: str  # within its layer
    kind: str
    inputs: int
    outputs: int
    parameters: int
    costs: tuple[int | None, ...]
    tied: bool = False  # its parameters are counted at another site


@dataclass(frozen=True)
class Group:
    """Layers that follow one another and are alike, or the sites outside of layers."""

    name: str  # "layers.0-11", "decoder.layers.3"; "" outside of layers
    layers: int
    sites: tuple[SiteReport, ...]


@dataclass(frozen=True)
class Placement:
    """Where one delta goes: its sites and parameters in all, or why it cannot be attached."""

    delta: Mapping[str, Any]
    sites: int
    parameters: int
    share: float  # of the backbone's parameters
    problem: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """A backbone and the deltas that are to go there."""

    name: str
    kind: str
    model: str
    width: int
    vocabulary: int
    max_length: int
    parameters: int
    elsewhere: int  # parameters at no site
    groups: tuple[Group, ...]
    placements: tuple[Placement, ...]


def anatomy(backbone: Backbone, deltas: Sequence[Delta] = ()) -> Anatomy:
    """The sites of a backbone, alike layers folded together, and where the deltas go among them."""
    placed = [_at_input(delta, backbone) for delta in deltas]
    matched = [_matched(delta, backbone) for delta in placed]
    reports = dict(_site_reports(backbone, placed, matched))
    total = sum(p.numel() for p in backbone.model.parameters())
    return Anatomy(
        name=backbone.name,
        kind=backbone.kind,
        model=type(backbone.model).__name__,
        width=backbone.width,
        vocabulary=backbone.vocabulary,
        max_length=backbone.max_length,
        parameters=total,
        elsewhere=total - sum(report.parameters for report in reports.values()),
        groups=tuple(_folded(reports)),
        placements=tuple(_placement(d, own, backbone, total) for d, own in zip(placed, matched, strict=True)),
    )


def _at_input(delta: Delta, backbone: Backbone) -> Delta:
    """A soft prompt goes to the input embedding of whatever backbone it is given."""
    return dataclasses.replace(delta, at=(backbone.input_embedding,)) if isinstance(delta, VirtualTokens) else delta


def _matched(delta: Delta, backbone: Backbone) -> dict[str, Site]:
    """The sites that the selectors of a delta match and that it can act on, by name; a selector may match none."""
    names = {name for selector in delta.selectors() for name in backbone.sites.matching(selector)}
    return {name: site for name, site in backbone.sites.items() if name in names and site.kind in delta.acts_on}


def _cost(delta: Delta, site: Site) -> int:
    """The closed form of what a delta trains at a site, its gate included."""
    return sum(param.size for param in {**delta.params(site), **gate_params(delta, site)}.values())


def _placement(delta: Delta, matched: Mapping[str, Site], backbone: Backbone, total: int) -> Placement:
    described = registry.describe("deltas", delta)
    try:
        chosen = sites_of(delta, backbone)
        parameters = parameters_of(delta, backbone)
    except SiteError as error:
        return Placement(described, len(matched), 0, 0.0, str(error))
    return Placement(described, len(chosen), parameters, parameters / total)


def _site_reports(
    backbone: Backbone, deltas: Sequence[Delta], matched: Sequence[Mapping[str, Site]]
) -> Iterator[tuple[str, SiteReport]]:
    modules = dict(backbone.model.named_modules())
    seen: set[tuple[int, object]] = set()
    for name, site in backbone.sites.items():
        own = list(modules[site.path].parameters(recurse=False)) if site.kind in ("linear", "norm", "embed") else []
        fresh = [p for p in own if (id(p), site.part) not in seen]
        seen |= {(id(p), site.part) for p in own}
        parameters = sum(_own_share(site, modules[site.path], p) for p in fresh)
        costs = tuple(_cost(d, site) if name in m else None for d, m in zip(deltas, matched, strict=True))
        short = found[3] or WHOLE if (found := LAYER.fullmatch(name)) else name
        yield (
            name,
            SiteReport(short, site.kind, site.inputs, site.outputs, parameters, costs, tied=len(fresh) < len(own)),
        )


def _own_share(site: Site, module: nn.Module, parameter: nn.Parameter) -> int:
    """The numbers of a parameter that belong to a site: a fused map's part has as much as its share of the outputs."""
    if site.part is None:
        return parameter.numel()
    return parameter.numel() * site.outputs // (module.get_parameter("weight").numel() // site.inputs)


def _folded(reports: Mapping[str, SiteReport]) -> Iterator[Group]:
    """The groups in the model's order; layers of one stack that follow one another and are equal become one."""
    for stack, named in groupby(reports.items(), key=lambda item: _stack(item[0])):
        if not stack:
            yield Group("", 1, tuple(report for _, report in named))
            continue
        layers = [
            (number, tuple(report for _, report in sites))
            for number, sites in groupby(named, lambda item: _number(item[0]))
        ]
        for sites, alike in groupby(layers, key=lambda layer: layer[1]):
            numbers = [number for number, _ in alike]
            span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
            yield Group(f"{stack}.{span}", len(numbers), sites)


def _stack(name: str) -> str:
    found = LAYER.fullmatch(name)
    return found[1] if found else ""


def _number(name: str) -> int:
    found = LAYER.fullmatch(name)
    return int(found[2]) if found else 0
