"""A variant is a file: the module `deltas/lora.py` is the delta `lora`. Third parties add theirs by entry points."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, cast, get_origin, get_type_hints

from deltaprompt.errors import ConfigError, nearest

if TYPE_CHECKING:
    from pydantic import TypeAdapter

KINDS = ("deltas", "verbalizers", "calibrations")


@lru_cache(maxsize=len(KINDS))
def variants(kind: str) -> Mapping[str, str]:
    """Names of the variants of a kind -> the module of each; others add theirs by entry points `deltaprompt.<kind>`."""
    package = import_module(f"deltaprompt.{kind}")
    own = {m.name: f"{package.__name__}.{m.name}" for m in iter_modules(package.__path__) if not m.name.startswith("_")}
    return {e.name: e.value for e in entry_points(group=f"deltaprompt.{kind}")} | own


@lru_cache(maxsize=len(KINDS))
def companions(kind: str) -> Mapping[str, str]:
    """Names of what only goes with a variant and is none itself, such as `position_shift`: files `_<name>.py`."""
    package = import_module(f"deltaprompt.{kind}")
    files = [m.name for m in iter_modules(package.__path__) if m.name.startswith("_") and m.name != "_base"]
    return {file.removeprefix("_"): f"{package.__name__}.{file}" for file in files}


def variant(kind: str, name: str) -> type[Any]:
    """The class of a variant: the one public dataclass that its module defines."""
    known = variants(kind)
    if (where := known.get(name) or companions(kind).get(name)) is None:
        raise ConfigError(f"no {kind.removesuffix('s')} {name!r}{nearest(name, known)}")
    module = import_module(where)
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    public = [c for c in classes if dataclasses.is_dataclass(c) and not c.__name__.startswith("_")]
    if len(public) != 1:
        raise ConfigError(f"{where} must define one public dataclass, it defines {[c.__name__ for c in public]}")
    return public[0]


def build(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """A variant with these options; an unknown one is an error that names the nearest known, a bad value says why."""
    from pydantic import ValidationError

    cls = variant(kind, name)
    _check_options(kind, name, cls, options)
    try:
        return _adapter(cast(Hashable, cls)).validate_python(dict(options))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or name
        raise ConfigError(
            f"{kind.removesuffix('s')} {name!r}, option {where}: got {first['input']!r}: {first['msg']}"
        ) from e


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    """pydantic's reader of a variant, which costs more to make than to use."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _check_options(kind: str, name: str, cls: type[Any], options: Mapping[str, Any]) -> None:
    """An error for what a variant does not have, and for what is a number to Python only: True, NaN and infinity."""
    known, hints = [f.name for f in dataclasses.fields(cls)], _hints(cast(Hashable, cls))
    what = f"{kind.removesuffix('s')} {name!r}"
    for option, value in options.items():
        if option not in known:
            raise ConfigError(f"{what} has no option {option!r}{nearest(option, known)}")
        if isinstance(value, bool) and hints[option] in (int, float, int | None):
            raise ConfigError(f"{what}, option {option}: got {value}; a number is possible")
        if hints[option] is float and isinstance(value, str | float) and not _is_finite(value):
            raise ConfigError(f"{what}, option {option}: got {value}; a finite number is possible")


@cache
def _hints(cls: Any) -> Mapping[str, Any]:
    return get_type_hints(cls)


def _is_finite(value: str | float) -> bool:
    """False for NaN, infinity and what is written so; what is no number is told elsewhere."""
    try:
        return math.isfinite(float(value))
    except ValueError:
        return True


def describe(kind: str, value: Any) -> dict[str, Any]:
    """The stored form of a variant: its name and its options; `build` turns it back."""
    name = type(value).__module__.rpartition(".")[2]
    known = {**companions(kind), **variants(kind)}
    if variant_name := next((n for n, module in known.items() if module == type(value).__module__), None):
        name = variant_name
    return {"kind": name, **dataclasses.asdict(value)}


def from_description(kind: str, stored: Mapping[str, Any]) -> Any:
    """The variant that `describe` gave, also from a recipe's table."""
    if "kind" not in stored:
        raise ConfigError(f"a {kind.removesuffix('s')} needs the key 'kind'; possible: {', '.join(variants(kind))}")
    return build(kind, str(stored["kind"]), {k: v for k, v in stored.items() if k != "kind"})


def variant_of(kind: str, text: str) -> dict[str, Any]:
    """`"lora:rank=16,at=attn.q+attn.v"` as a table: its kind, and its options, those that are lists split at `+`."""
    name, _, rest = text.partition(":")
    hints = _hints(cast(Hashable, variant(kind, name)))
    options: dict[str, Any] = {}
    for piece in rest.split(",") if rest else ():
        option, equals, value = piece.partition("=")
        if not equals or not option.strip() or not value.strip():
            raise ConfigError(f"{text!r}: {piece!r} is no option; write {name}:option=value,option=value")
        known = option.strip() in hints and get_origin(hints[option.strip()]) is tuple
        options[option.strip()] = value.strip().split("+") if known else value.strip()
    return {"kind": name, **options}
