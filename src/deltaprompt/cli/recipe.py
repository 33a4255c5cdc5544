"""A recipe: one TOML file and the command's options, in one form, checked once and read into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from deltaprompt import registry
from deltaprompt.backbone import Kind
from deltaprompt.data.linked import Linked
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError, nearest
from deltaprompt.model.generation import Chat, Generation
from deltaprompt.trainer import Training
from deltaprompt.trainer.many import TOGETHER

Words = str | tuple[str, ...]
Labels = Mapping[str, Words] | tuple[str, ...] | str  # a text: a file of words, whose labels are the data's
T = TypeVar("T")


@dataclass(frozen=True)
class BackboneTable:
    """`[backbone]`: what `load` is given."""

    name: str = "demo"
    kind: Kind | None = None
    device: str | None = None
    dtype: str = "float32"
    attention: Literal["sdpa", "eager"] | None = None
    revision: str | None = None


@dataclass(frozen=True)
class TaskTable:
    """`[task]`: what is not given is chosen for the backbone and the data."""

    template: str | None = None
    labels: Labels | None = None
    order: tuple[str, ...] | None = None  # the labels, in the order of a file of words that does not name them
    verbalizer: Mapping[str, Any] | None = None
    max_length: int | None = None
    calibration: Mapping[str, Any] | None = None
    several: bool = False  # whether a row may have several labels


@dataclass(frozen=True)
class TaggingTable:
    """`[tagging]`: what spans of texts are looked for, in place of `[task]`."""

    types: tuple[str, ...] | None = None  # the data's where not given
    scheme: str = "bio"
    verbalizer: Mapping[str, Any] | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class MasksTable:
    """`[masks]`: tokens of training texts are masked and guessed too; see `WithMasks`."""

    weight: float = 0.5
    rate: float = 0.15


@dataclass(frozen=True)
class DataTable:
    """`[data]`: files, and which columns are what."""

    train: str | None = None
    dev: str | None = None
    test: str | None = None
    test_share: float | None = None  # of the training file, where there is no file of its own to measure on
    unlabelled: str | None = None
    text: str | None = None
    label: str = "label"
    fields: Mapping[str, str] = field(default_factory=dict)
    drop_empty: bool = False
    hold_out: bool = True  # without a dev file, some rows are kept from training to choose by
    target: str = "target"  # of generation: the column of what is to be written, a text or a list of right ones
    types: str | None = None  # a file of all labels, one a line, where the data does not have each
    seen: str | None = None  # a column by which test rows are measured apart: whether training rows have the same there


@dataclass(frozen=True)
class GridTable:
    """`[grid]`: settings of which several are tried, each with each; the last varies the fastest.

    What changes the texts varies slowly, so that neighbours, which train in one pass, read the same.
    """

    shots: tuple[int, ...] | None = None
    template: tuple[str, ...] | None = None
    labels: tuple[Labels, ...] | None = None
    learning_rate: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, values in self.axes.items():
            if not values:
                raise ConfigError(f"[grid] {name} has no values; give one or more, or leave it out")
            if twice := [value for i, value in enumerate(values) if value in values[:i]]:
                raise ConfigError(f"[grid] {name}: {twice[0]!r:.80} is there twice; give it once")
            if name in NUMBERS and (odd := [value for value in values if not 0 < value < math.inf]):
                raise ConfigError(f"[grid] {name}: got {odd[0]!r}; it is a number above 0")

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """What is tried of each setting that varies."""
        return {name: values for name, values in vars(self).items() if values is not None}


@dataclass(frozen=True)
class Recipe:
    """All that `deltaprompt fit` needs."""

    backbone: BackboneTable
    task: TaskTable
    deltas: tuple[Delta, ...] | None  # None: chosen for the backbone
    data: DataTable
    training: Training
    seeds: tuple[int, ...]
    together: int  # seeds in one pass
    shots: int | None
    out: str | None
    grid: GridTable = GridTable()
    generation: Generation | Chat | None = None  # texts are written, and there is no task
    tagging: TaggingTable | None = None  # spans of texts are found, and there is no task
    masks: MasksTable | None = None
    pairs: Linked | None = None  # of mentions, to train on without labels


WORD_FILE = re.compile(r"\.(txt|csv|jsonl?)(#[0-9]+)?$")  # of label words; #1: the second of several in it
TABLES = {"backbone": BackboneTable, "task": TaskTable, "data": DataTable, "training": Training, "grid": GridTable}
WRITING: dict[str, type[Generation | Chat]] = {"generation": Generation, "chat": Chat}  # instead of [task]
TAGGING, MASKS, PAIRS = "tagging", "masks", "pairs"
INSTEAD: dict[str, Any] = {**WRITING, TAGGING: TaggingTable}  # of [task]
OF_TEXTS = ("target", "seen")  # keys of [data] for what is written
OF_LABELS = ("text", "label", "unlabelled", "drop_empty", "types")
USELESS = {  # keys of [data] that have no meaning beside these tables
    **dict.fromkeys(WRITING, (*OF_LABELS, "test_share")),
    TAGGING: (*OF_LABELS, *OF_TEXTS, "fields"),
}
TOP = ("deltas", "seeds", "together", "shots", "out")
NUMBERS = ("shots", "learning_rate")  # axes of a grid whose values are numbers
HOMES = {  # of an axis: the table that has it where one value is for all, and its option
    "shots": ("", "--shots"),
    "template": ("task", "--template"),
    "labels": ("task", "--describe"),
    "learning_rate": ("training", "--learning-rate"),
}


def read_toml(path: Path) -> dict[str, Any]:
    """A recipe's tables as they stand in the file."""
    return _parsed(path, "recipe", toml=True)


def build(given: Mapping[str, Any]) -> Recipe:
    """The recipe of nested tables; an unknown key is an error that names the nearest known one and its table."""
    check_keys(given, (*TABLES, *INSTEAD, MASKS, PAIRS, *TOP), "")
    _check_grid(given)
    _check_instead(given)
    tables: dict[str, Any] = {name: table_of(cls, given.get(name, {}), f"[{name}]") for name, cls in TABLES.items()}
    deltas = given.get("deltas")
    shots = None if given.get("shots") is None else value_of(int, given["shots"], "shots")
    out = None if given.get("out") is None else value_of(str, given["out"], "out")
    return Recipe(
        **tables,
        deltas=None
        if deltas is None
        else tuple(delta_of(d, f"[[deltas]] {n}") for n, d in enumerate(value_of(list[Any], deltas, "deltas"), 1)),
        seeds=seeds_of(given.get("seeds", 0)),
        together=value_of(int, given.get("together", TOGETHER), "together"),
        shots=shots,
        out=out,
        generation=next(
            (table_of(cls, given[name], f"[{name}]") for name, cls in WRITING.items() if name in given), None
        ),
        tagging=table_of(TaggingTable, given[TAGGING], f"[{TAGGING}]") if TAGGING in given else None,
        masks=table_of(MasksTable, given[MASKS], f"[{MASKS}]") if MASKS in given else None,
        pairs=table_of(Linked, given[PAIRS], f"[{PAIRS}]") if PAIRS in given else None,
    )


def overlaid(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` with what `over` gives (not None) in its place, tables key by key; an axis for the one value it had."""
    made = _leaving(under, over.get("grid") or {})
    for name, value in over.items():
        if isinstance(value, Mapping) and name in (*TABLES, *INSTEAD):
            own = made.get(name, {})
            given = {k: v for k, v in value.items() if v is not None}
            made[name] = {**own, **given} if isinstance(own, Mapping) else own
        elif value is not None:
            made[name] = value
    return made


def seeds_of(given: object) -> tuple[int, ...]:
    """The seeds that `0-4`, `0,3,7`, a number or a list of numbers names."""
    if isinstance(given, int) and not isinstance(given, bool):
        return (given,)
    if isinstance(given, list):
        return value_of(tuple[int, ...], given, "seeds")
    found: list[int] = []
    for piece in str(given).split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ConfigError(f"seeds {given!r}: {piece.strip()!r} is no seed; write 0-4, or 0,3,7, or 0-2,9")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def labels_of(given: Sequence[str]) -> dict[str, Any] | str:
    """What `label=words` pairs, or a file of them, say of the labels; a file without their names is left as it is."""
    if len(given) == 1 and given[0].endswith((".toml", ".json")):
        found = _read(Path(given[0]), "file of labels", toml=given[0].endswith(".toml"))
        return given[0] if isinstance(found, list) else _as_table(found, Path(given[0]), "file of labels")
    if len(given) == 1 and WORD_FILE.search(given[0]):
        return given[0]
    return {label: words.split("|") if "|" in words else words for label, words in pairs(given, "--describe").items()}


def grid_of(given: Sequence[str]) -> dict[str, list[Any]]:
    """The axes that `name=value` options give: numbers with commas between them, of others one value a use."""
    axes: dict[str, list[Any]] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not name.strip() or not value.strip():
            raise ConfigError(
                f"--grid {text!r}: this names no value; write --grid learning_rate=1e-4,5e-4 or --grid shots=4,16, "
                "and --grid template=TEXT or --grid labels=FILE once for each value"
            )
        axis = name.strip().replace("-", "_")
        axes.setdefault(axis, []).extend(_tried(axis, value))
    return axes


def _tried(axis: str, value: str) -> list[Any]:
    if axis in NUMBERS:
        return [piece.strip() for piece in value.split(",")]
    if axis != "labels":
        return [value]
    if not value.strip().endswith(".toml") and not WORD_FILE.search(value.strip()):
        raise ConfigError(
            f"--grid labels={value}: label words are tried from a .toml or .json file each, with label = words in it, "
            "or a .txt, .csv or .jsonl file, with a line of words for each label"
        )
    return [labels_of([value.strip()])]


def pairs(given: Sequence[str], option: str) -> dict[str, str]:
    """`a=b` pairs as a mapping; each key once."""
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ConfigError(f"{option} {text!r}: this is no pair; write {option} name=value")
        if key.strip() in found:
            raise ConfigError(f"{option}: {key.strip()!r} is given twice; give it once")
        found[key.strip()] = value.strip()
    return found


def _parsed(path: Path, what: str, toml: bool) -> dict[str, Any]:
    return _as_table(_read(path, what, toml), path, what)


def _as_table(found: object, path: Path, what: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {found!r:.60}; a {what} is a table of names and values")
    return found


def _read(path: Path, what: str, toml: bool) -> object:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if toml else json.loads(text)
    except OSError as error:
        files = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        raise ConfigError(f"there is no {what} {str(path)!r} that can be read{nearest(path.name, files)}") from error
    except ValueError as error:  # of either parser, or of the decoding
        raise ConfigError(f"{path} is not {'TOML' if toml else 'JSON'}: {error}") from error


def check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """An error for a key that is not known; `where` is its table."""
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown key {key!r}{f' in {where}' if where else ' in the recipe'}{_hint(key, known)}")


def _hint(key: str, known: Sequence[str]) -> str:
    """The nearest name in the table, or the table that the key belongs to."""
    near = nearest(key, known, limit=20)
    tables: dict[str, Any] = {**TABLES, **INSTEAD}
    others = {name: {f.name for f in dataclasses.fields(cls)} for name, cls in tables.items() if name != "grid"}
    homes = [name for name, keys in others.items() if key in keys and name not in known]
    return f"; it belongs in [{homes[0]}]" if homes and key not in known and "did you mean" not in near else near


def _check_instead(given: Mapping[str, Any]) -> None:
    """What is said of labels has no place where texts are written or spans found, and the other way round."""
    asked, data = [name for name in INSTEAD if name in given], given.get("data", {})
    useless = [f"{key} in [data]" for key in (USELESS[asked[0]] if asked else OF_TEXTS) if key in data]
    if not asked:
        if useless:
            raise ConfigError(
                f"{useless[0]} is of texts that are written: give [generation] too (--generate), or leave it out"
            )
        return
    others = [*asked[1:], *(name for name in ("task", "grid", MASKS, PAIRS) if given.get(name))]
    more = [f"[{name}]" for name in others] + useless
    more += ["shots"] if given.get("shots") is not None and asked[0] in WRITING else []
    if more:
        what = "spans of texts" if asked[0] == TAGGING else "texts"
        raise ConfigError(f"[{asked[0]}] asks for {what}, so {more[0]} has no meaning; leave one of them out")


def _check_grid(given: Mapping[str, Any]) -> None:
    """Every axis is a list, and nothing else says what it says."""
    grid = given.get("grid", {})
    if not isinstance(grid, Mapping):
        return
    check_keys(grid, tuple(HOMES), "[grid]")
    for axis, values in grid.items():
        if not isinstance(values, list):
            raise ConfigError(f"[grid] {axis} is a list of what is tried; got {values!r:.60}; write {axis} = […]")
        home, option = HOMES[axis]
        table = given.get(home, {}) if home else given
        if isinstance(table, Mapping) and table.get(axis) is not None:
            where = f"in [{home}]" if home else "outside [grid]"
            raise ConfigError(
                f"{axis} is an axis of the grid, and is also given by itself ({option}, or {axis} {where}); "
                "leave one of them out"
            )


def _leaving(tables: Mapping[str, Any], axes: Iterable[str]) -> dict[str, Any]:
    """Tables without the one value that they give where an axis has several."""
    left = {(HOMES[axis][0], axis) for axis in axes if axis in HOMES}
    kept = {name: table for name, table in tables.items() if ("", name) not in left}
    return {
        name: {key: v for key, v in table.items() if (name, key) not in left} if isinstance(table, Mapping) else table
        for name, table in kept.items()
    }


def table_of(cls: type[T], given: object, where: str) -> T:
    """A table as the dataclass that it stands for."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is a table of names and values; got {given!r:.60}")
    check_keys(given, [f.name for f in dataclasses.fields(cls)], where)  # type: ignore[arg-type]
    return value_of(cls, given, where)


def delta_of(given: object, where: str) -> Delta:
    """A delta of a table, or of `"lora:rank=16"`."""
    if isinstance(given, str):
        given = registry.variant_of("deltas", given)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is a table with the key 'kind'; got {given!r:.60}")
    made: Delta = registry.from_description("deltas", given)
    return made


def value_of(cls: Any, given: object, where: str) -> Any:
    """A value of that type."""
    try:
        return TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = " ".join([where, *(str(part) for part in first["loc"][:1])])
        raise ConfigError(f"{place}: got {first['input']!r:.80}: {first['msg'].lower()}") from error
