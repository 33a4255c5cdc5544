"""A recipe of `deltaprompt pretrain`: which model learns what from which texts, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deltaprompt import registry
from deltaprompt.cli.recipe import check_keys, table_of, value_of
from deltaprompt.errors import ConfigError
from deltaprompt.pretrain import Pretraining, Texts, Tuned

Attention = Literal["sdpa", "eager"]
OWN = ("learning_rate", "weight_decay")  # keys of [[deltas]] that are no options of the delta


@dataclass(frozen=True)
class Existing:
    """`[backbone]`: a pretrained model to go on with."""

    name: str
    attention: Attention | None = None
    new_head: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class New:
    """`[model]`: a model with random weights; what is not named here is a field of its config."""

    type: str
    attention: Attention | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pieces:
    """`[tokenizer]`: that of another model (`from`), or pieces that are learned from the texts."""

    source: str | None = None
    pieces: int | None = None


@dataclass(frozen=True)
class PretrainRecipe:
    """All that `deltaprompt pretrain` needs."""

    backbone: Existing | New
    tokenizer: Pieces
    data: tuple[Texts, ...]
    dev: tuple[Texts, ...]
    deltas: tuple[Tuned, ...]
    pretraining: Pretraining
    out: str | None
    device: str | None


KEYS = ("backbone", "model", "tokenizer", "data", "dev", "deltas", "pretraining", "out", "device")


def build(given: Mapping[str, Any]) -> PretrainRecipe:
    """The recipe of nested tables; an unknown key is an error that names the nearest known one."""
    check_keys(given, KEYS, "")
    if ("backbone" in given) == ("model" in given):
        raise ConfigError(
            "give either [backbone] name = …, a pretrained model to go on with, or [model] type = …, a new one; "
            f"it has {'both' if 'model' in given else 'neither'}"
        )
    tokenizer = _pieces(given)
    backbone: Existing | New
    if "backbone" in given:
        backbone = _with_name(table_of(Existing, _named(given["backbone"], "[backbone]", "name"), "[backbone]"))
    else:
        backbone = _new(_named(given["model"], "[model]", "type"))
    return PretrainRecipe(
        backbone,
        tokenizer,
        _texts(given, "data"),
        _texts(given, "dev"),
        tuple(_delta(d, n) for n, d in enumerate(value_of(list[Any], given.get("deltas", []), "deltas"), 1)),
        table_of(Pretraining, given.get("pretraining", {}), "[pretraining]"),
        *(None if given.get(key) is None else value_of(str, given[key], key) for key in ("out", "device")),
    )


def _named(given: object, where: str, key: str) -> Mapping[str, Any]:
    """A table that has a key."""
    if not isinstance(given, Mapping) or key not in given:
        raise ConfigError(f"{where} is a table with the key {key!r}; got {given!r:.60}")
    return given


def _with_name(backbone: Existing) -> Existing:
    if not backbone.name:
        raise ConfigError("[backbone] name is empty; give a folder, a name on the hub, or demo")
    return backbone


def _new(given: Mapping[str, Any]) -> New:
    own = {key: value for key, value in given.items() if key in ("type", "attention")}
    sizes = {key: value for key, value in given.items() if key not in own}
    return table_of(New, {**own, "sizes": sizes}, "[model]")


def _pieces(given: Mapping[str, Any]) -> Pieces:
    """Where a new model's tokenizer is from; a pretrained one has its own."""
    if "tokenizer" not in given:
        if "model" in given:
            raise ConfigError(
                "a new model needs a [tokenizer]: pieces = 8192 learns one from the texts, from = FOLDER takes another "
                "model's"
            )
        return Pieces()
    table = given["tokenizer"]
    if "model" not in given:
        raise ConfigError("a pretrained backbone has its own tokenizer; leave out [tokenizer]")
    if not isinstance(table, Mapping) or len(table) != 1:
        raise ConfigError(f"[tokenizer] has one key, pieces or from; got {table!r:.60}")
    check_keys(table, ("pieces", "from"), "[tokenizer]")
    return table_of(Pieces, {"source" if key == "from" else key: v for key, v in table.items()}, "[tokenizer]")


def _texts(given: Mapping[str, Any], key: str) -> tuple[Texts, ...]:
    tables = value_of(list[Any], given.get(key, []), f"[[{key}]]")
    return tuple(
        table_of(Texts, _named(table, f"[[{key}]] {n}", "path"), f"[[{key}]] {n}") for n, table in enumerate(tables, 1)
    )


def _delta(given: object, number: int) -> Tuned:
    if isinstance(given, str):
        given = registry.variant_of("deltas", given)
    table = _named(given, f"[[deltas]] {number}", "kind")
    own = {key: value_of(float, table[key], f"[[deltas]] {number} {key}") for key in OWN if key in table}
    options = {key: value for key, value in table.items() if key not in OWN}
    return Tuned(registry.from_description("deltas", options), **own)


def with_steps(recipe: PretrainRecipe, steps: int | None) -> PretrainRecipe:
    """The recipe with another number of steps, where one is given."""
    if steps is None:
        return recipe
    return dataclasses.replace(recipe, pretraining=dataclasses.replace(recipe.pretraining, steps=steps))
