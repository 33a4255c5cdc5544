"""Which modules a PEFT config names, and the shortest names that say the same of given modules or sites."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from deltaprompt.backbone import Site, Sites
from deltaprompt.backbone.sites import is_turned
from deltaprompt.errors import StoreError

ALL_LINEAR = "all-linear"
LAYER = re.compile(r"(.*?)layers\.(\d+)\.(.+)")


# What a config names


def targeted(config: Mapping[str, Any], model: nn.Module, out: nn.Module | None) -> list[str]:
    """The paths of the modules that a config adapts; `out` is the model's output embedding."""
    target = config.get("target_modules")
    if not target:
        raise StoreError("the config has no target_modules, which says where the adapter goes; peft always writes it")
    paths = [path for path, _ in model.named_modules() if path]
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        chosen = {p for p, m in model.named_modules() if _is_linear(m) and m is not out}
    else:
        chosen = {path for path in paths if _named(config, target, path)}
    excluded = config.get("exclude_modules") or []
    return [path for path in paths if path in chosen and not _spoken_of(excluded, path)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_turned(module)


def _named(config: Mapping[str, Any], target: str | list[str], path: str) -> bool:
    """Whether `target_modules`, within the layers that the config is limited to, names a path."""
    if isinstance(target, str) or path in target:
        return _spoken_of(target, path)
    return _spoken_of(target, path) and _in_layers(config, path)


def _spoken_of(names: str | Collection[str], path: str) -> bool:
    """A string is a regular expression of whole paths, a list has whole paths or their ends."""
    if isinstance(names, str):
        return _matches(names, path)
    return any(path == name or path.endswith(f".{name}") for name in names)


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    """Whether a path lies in `layers_to_transform`; the layer is the first number behind a name of `layers_pattern`."""
    layers = config.get("layers_to_transform")
    if layers in (None, []):
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = next((m for p in patterns if (m := _search(rf"(?:^|.*?\.){p}\.(\d+)\.", path))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def feeds_forward(config: Mapping[str, Any], path: str) -> bool:
    """Whether IA3 scales what enters a module; here a list has ends of paths, wherever they begin."""
    names = config.get("feedforward_modules") or []
    return _matches(names, path) if isinstance(names, str) else path.endswith(tuple(names))


def by_pattern(patterns: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says of a path: the first key that matches its end."""
    for key, value in (patterns or {}).items():
        if _search(rf"(.*\.)?({key})$", path):
            return value
    return otherwise


def _matches(pattern: str, path: str) -> bool:
    return _search(rf"(?:{pattern})\Z", path) is not None


def _search(pattern: str, path: str) -> re.Match[str] | None:
    """A match from the path's beginning; a pattern that is no regular expression is an error."""
    try:
        return re.match(pattern, path)
    except re.error as e:
        raise StoreError(f"the config has the pattern {pattern!r}, which is no regular expression: {e}") from e


# The shortest names


def names_of(paths: Collection[str], among: Collection[str]) -> list[str]:
    """The shortest ends of paths that name `paths` and none of the others `among` which they are."""
    names: set[str] = set()
    for path in paths:
        if not _spoken_of(names, path):
            ends = (end for end in _ends_of(path) if all(p in paths for p in among if _spoken_of([end], p)))
            name = next(ends, None)
            if name is None:
                raise StoreError(f"no end of {path} names it alone: other modules have paths that end so too")
            names.add(name)
    return sorted(names)


def _ends_of(path: str) -> Iterator[str]:
    """`proj`, `attn.proj`, …, the whole path."""
    pieces = path.split(".")
    for count in range(1, len(pieces) + 1):
        yield ".".join(pieces[-count:])


def selectors_of(chosen: Iterable[Site], sites: Sites) -> tuple[str, ...]:
    """Selectors that match the chosen sites and no others: roles where they can, else expressions of whole names."""
    wanted = {site.name: None for site in chosen}
    selectors: list[str] = []
    covered: set[str] = set()
    for name in wanted:
        if name not in covered:
            found = ((selector, set(sites.matching(selector))) for selector in _candidates(name, wanted))
            selector, hit = next((s, hit) for s, hit in found if name in hit and hit <= wanted.keys())
            selectors.append(selector)
            covered |= hit
    return tuple(selectors)


def _candidates(name: str, wanted: Iterable[str]) -> Iterator[str]:
    """Selectors of a site, from the widest to the one that matches it alone."""
    if place := LAYER.fullmatch(name):
        stack, _, role = place.groups()
        yield role
        yield f"{stack}*.{role}"
        others = (LAYER.fullmatch(other) for other in wanted)
        layers = sorted({int(m[2]) for m in others if m and (m[1], m[3]) == (stack, role)})
        numbers = "|".join(map(str, layers))
        yield rf"re:^{re.escape(stack)}layers\.({numbers})\.{re.escape(role)}$"
    yield name
    yield f"re:^{re.escape(name)}$"
