"""The recipe of `deltaprompt compare`: data sets and methods, each a table, checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from deltaprompt.cli.recipe import (
    BackboneTable,
    DataTable,
    Labels,
    TaskTable,
    check_keys,
    delta_of,
    seeds_of,
    table_of,
    value_of,
)
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError, nearest
from deltaprompt.registry import variant_of
from deltaprompt.study.data import Shots
from deltaprompt.study.running import check_asked
from deltaprompt.trainer import Training
from deltaprompt.trainer.many import TOGETHER

TOP = ("shots", "seeds", "baseline", "test_rows", "metric", "together", "out", "backbone", "data", "methods")
OF_TASK = ("template", "max_length", "verbalizer", "calibration")
KEYS = {  # of a method, by its kind
    "fit": (*OF_TASK, "tasks", "deltas", "training", "backbone"),
    "probe": ("template", "max_length", "backbone"),
    "call": ("function", "options", "dev", "zero_shot", "outside"),
}
USELESS = ("target", "seen")  # keys of a data set


@dataclass(frozen=True)
class SetTask:
    """`[data.task]`: what a data set's task is for all methods."""

    template: str | None = None
    labels: Labels | None = None
    order: tuple[str, ...] | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class SetTable:
    """`[[data]]`."""

    name: str
    data: DataTable
    task: SetTask = SetTask()
    outside: str | None = None  # a file of texts that belong to none of the labels


@dataclass(frozen=True)
class MethodTable:
    """`[[methods]]`."""

    name: str
    kind: str = "fit"
    task: Mapping[str, Any] = field(default_factory=dict)  # what it says of every data set's task
    tasks: Mapping[str, SetTask] = field(default_factory=dict)  # and of single ones, by name
    deltas: tuple[Delta, ...] | None = None  # None: chosen for the backbone
    training: Training = Training()  # noqa: RUF009  frozen
    dev: bool = True
    backbone: BackboneTable = BackboneTable()  # noqa: RUF009  frozen
    function: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    zero_shot: bool = False
    outside: bool = False

    def task_of(self, data: SetTable) -> TaskTable:
        """Its task on a data set: what it says of that one, else of all, else what the data set says."""
        own = self.tasks.get(data.name, SetTask())
        return TaskTable(**{**_given(data.task), **self.task, **_given(own)})


@dataclass(frozen=True)
class CompareRecipe:
    """All that `deltaprompt compare` needs."""

    shots: tuple[Shots, ...]
    seeds: tuple[int, ...]
    baseline: str | None
    test_rows: int | None
    metric: Literal["accuracy", "macro_f1"]
    together: int
    out: str | None
    datasets: tuple[SetTable, ...]
    methods: tuple[MethodTable, ...]


def build(given: Mapping[str, Any]) -> CompareRecipe:
    """The recipe of nested tables; an unknown key is an error that names the nearest known one and its table."""
    check_keys(given, TOP, "")
    shots = given.get("shots", [1, 4, 16])
    backbone = value_of(dict[str, Any], given.get("backbone", {}), "[backbone]")
    table_of(BackboneTable, backbone, "[backbone]")
    made = CompareRecipe(
        value_of(tuple[Shots, ...], shots if isinstance(shots, list) else [shots], "shots"),
        seeds_of(given.get("seeds", "0-4")),
        value_of(str | None, given.get("baseline"), "baseline"),
        value_of(int | None, given.get("test_rows"), "test_rows"),
        given.get("metric", "accuracy"),
        value_of(int, given.get("together", TOGETHER), "together"),
        value_of(str | None, given.get("out"), "out"),
        tuple(_set(table, f"[[data]] {n}") for n, table in enumerate(_tables(given, "data"), 1)),
        tuple(_method(table, f"[[methods]] {n}", backbone) for n, table in enumerate(_tables(given, "methods"), 1)),
    )
    _check(made)
    return made


def _check(made: CompareRecipe) -> None:
    """Names and numbers, before a file is read."""
    sets, methods = [d.name for d in made.datasets], [m.name for m in made.methods]
    check_asked(sets, methods, made.shots, made.seeds, made.baseline, made.test_rows, made.metric)
    for method in made.methods:
        if odd := [name for name in method.tasks if name not in sets]:
            raise ConfigError(f"[[methods]] {method.name!r}: tasks has {odd[0]!r}, no data set{nearest(odd[0], sets)}")
    if made.together < 1:
        raise ConfigError(f"together = {made.together} is not possible: it is a whole number, 1 or more")


def _tables(given: Mapping[str, Any], name: str) -> list[Any]:
    tables = given.get(name, [])
    if isinstance(tables, Mapping):
        raise ConfigError(f"a comparison may have several {name}: write [[{name}]], each with a name")
    return value_of(list[Any], tables, name)


def _named(given: object, where: str, known: Sequence[str]) -> tuple[dict[str, Any], str, str]:
    """The table without its name, the name, and what errors call it."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is a table of names and values; got {given!r:.60}")
    check_keys(given, ("name", *known), where)
    name = value_of(str, given.get("name", ""), f"{where} name").strip()
    if not name:
        raise ConfigError(f'{where} has no name; give it one, name = "…"')
    return {key: value for key, value in given.items() if key != "name"}, name, f"{where.split()[0]} {name!r}"


def _set(given: object, where: str) -> SetTable:
    table, name, where = _named(given, where, (*(f.name for f in fields(DataTable)), "outside", "task"))
    if odd := [key for key in USELESS if key in table]:
        raise ConfigError(f"{odd[0]} in {where} is not for a comparison; leave it out")
    task = table_of(SetTask, table.pop("task", {}), f"the task of {where}")
    outside = value_of(str | None, table.pop("outside", None), f"{where} outside")
    data = table_of(DataTable, table, where)
    for key, mend in (("train", 'train = "FILE"'), ("test", 'test = "FILE", or test_share = 0.2')):
        if vars(data)[key] is None and (key == "train" or data.test_share is None):
            raise ConfigError(f"{where} has no {key} rows; give {mend}")
    return SetTable(name, data, task, outside)


def _method(given: object, where: str, backbone: Mapping[str, Any]) -> MethodTable:
    kind = given.get("kind", "fit") if isinstance(given, Mapping) else "fit"
    if kind not in KEYS:
        raise ConfigError(f"{where}: kind = {kind!r} is not possible; possible: {', '.join(KEYS)}")
    table, name, where = _named(given, where, ("kind", *KEYS[kind]))
    own = value_of(dict[str, Any], table.get("backbone", {}), f"{where} backbone")
    training = value_of(dict[str, Any], table.get("training", {}), f"{where} training")
    deltas = table.get("deltas")
    if kind == "call" and "function" not in table:
        raise ConfigError(f'{where} has no function; give it one, function = "module:function"')
    return MethodTable(
        name,
        kind,
        _of_task(table, where),
        {
            data: table_of(SetTask, task, f"the task of {where} for {data!r}")
            for data, task in value_of(dict[str, Any], table.get("tasks", {}), f"{where} tasks").items()
        },
        None if deltas is None else _deltas(deltas, where),
        table_of(Training, {k: v for k, v in training.items() if k != "dev"}, f"training of {where}"),
        value_of(bool, {**training, **table}.get("dev", kind == "fit"), f"{where} dev"),
        table_of(BackboneTable, {**backbone, **own}, f"backbone of {where}"),
        value_of(str, table.get("function", ""), f"{where} function"),
        value_of(dict[str, Any], table.get("options", {}), f"{where} options"),
        value_of(bool, table.get("zero_shot", False), f"{where} zero_shot"),
        value_of(bool, table.get("outside", False), f"{where} outside"),
    )


def _of_task(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a method says of tasks; a verbalizer or a calibration may be a text, as options give it."""
    own = {key: table[key] for key in OF_TASK if key in table}
    for key in ("verbalizer", "calibration"):
        if isinstance(own.get(key), str):
            own[key] = variant_of(f"{key}s", own[key])
    checked = asdict(table_of(TaskTable, own, where))
    return {key: checked[key] for key in own}


def _deltas(given: object, where: str) -> tuple[Delta, ...]:
    """Those of a list, or the one of a text; "none" is none."""
    each = given if isinstance(given, list) else [given]
    if each == ["none"]:
        return ()
    return tuple(delta_of(delta, f"deltas of {where}, {n},") for n, delta in enumerate(each, 1))


def _given(task: SetTask) -> dict[str, Any]:
    return {name: value for name, value in vars(task).items() if value is not None}
