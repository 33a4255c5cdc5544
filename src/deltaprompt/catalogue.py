"""Every delta method: what it computes, who found it, where it goes and what it trains on a backbone."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from deltaprompt import registry
from deltaprompt.backbone import Backbone
from deltaprompt.compose import parameters_of, sites_of
from deltaprompt.deltas._base import Delta, Mergeable
from deltaprompt.errors import ConfigError, DeltaPromptError

STATED = re.compile(r"(?P<formula>.+?) \((?P<source>[^()]*\d{4}[^()]*)\)\.?")  # a file's first line: formula (paper).


@dataclass(frozen=True)
class Method:
    """One delta method with its default options; the last three are of a backbone."""

    name: str
    taxonomy: str
    formula: str
    source: str
    selectors: tuple[str, ...]
    merges: bool
    sites: int | None = None
    parameters: int | None = None
    problem: str | None = None  # why it cannot be attached


def methods(backbone: Backbone | None = None) -> Iterator[Method]:
    """Every delta by name, also those that other packages add."""
    for name in sorted(registry.variants("deltas")):
        delta: Delta = registry.variant("deltas", name)()
        formula, source = stated(delta)
        own = (name, delta.taxonomy, formula, source, tuple(delta.selectors()), isinstance(delta, Mergeable))
        yield Method(*own, *_on(delta, backbone))


def stated(delta: Delta) -> tuple[str, str]:
    """Formula and source of a method, from the first line of its file."""
    module = type(delta).__module__
    line = (sys.modules[module].__doc__ or "").strip().split("\n")[0]
    found = STATED.fullmatch(line)
    if found is None:
        raise ConfigError(
            f"the first line of {module} must be a formula and its source, (Author et al. 2022): {line!r}"
        )
    return found["formula"].rstrip(":,"), found["source"]


def _on(delta: Delta, backbone: Backbone | None) -> tuple[int | None, int | None, str | None]:
    if backbone is None:
        return None, None, None
    try:
        return len(sites_of(delta, backbone)), parameters_of(delta, backbone), None
    except DeltaPromptError as error:
        return 0, 0, str(error)
