"""`open_many`: any number of saved adaptations on one backbone, each row of a batch with its own.

Adaptations with the same deltas, of whatever width, share one stack of tensors and one patch a site: there are as many
patches as sorts of adaptations, not as adaptations, and one more is a slot that is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from deltaprompt import store
from deltaprompt.backbone import Backbone
from deltaprompt.compose import patches_on, plain
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError, DeltaPromptError, SiteError, StoreError, nearest
from deltaprompt.features import Encoded, Features
from deltaprompt.features.batching import bucketed
from deltaprompt.model.group import Group, sort_of
from deltaprompt.model.model import answer, example_of, read
from deltaprompt.model.reader import Reading, Scorer, of_rows, placed
from deltaprompt.model.saved import asked_of, check, identity, not_made
from deltaprompt.model.showing import restored
from deltaprompt.model.starting import unlabelled_of
from deltaprompt.model.task import Task
from deltaprompt.templates import parse
from deltaprompt.types import Example

# what tensors are for, of a record
ASKED = ("template", "labels", "verbalizer", "calibration", "max_length", "deltas", "demonstrations", "several")
VERBALIZER, DELTA = "verbalizer.", "delta."  # what the stored names of tensors begin with

OTHERS = (
    "this backbone already carries a model's deltas, which would act here too; take them off it with that model's "
    ".adapted.remove(), or load the backbone again"
)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Entry:
    """One adaptation: how its texts are read and scored, and where its deltas are."""

    name: str
    asked: Asked
    scorer: Scorer
    group: Group | None  # none without deltas
    slot: int

    @property
    def task(self) -> Task:
        """What is asked."""
        return self.asked.reading.task

    @property
    def features(self) -> Features:
        """How its texts become token ids."""
        return self.asked.reading.features

    @property
    def continues(self) -> bool:
        """Whether its rows are run by themselves."""
        return self.asked.reading.continues

    def repeated(self, times: int) -> AbstractContextManager[None]:
        """Within it every row stands for `times` rows that follow one another."""
        return nullcontext() if self.group is None else self.group.adapted.repeated(times)


class Many:
    """Saved adaptations on one backbone, by name; they come and go while it predicts."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._entries: dict[str, Entry] = {}
        self._groups: dict[str, Group] = {}  # by sort
        self._weights: Sequence[tuple[int, int]] = ()  # of the backbone, when they were last digested: where, how often
        self._identities: dict[bool, Mapping[str, Any]] = {}  # of the backbone, with a chat template and without
        self._asked: WeakValueDictionary[str, Asked] = WeakValueDictionary()  # by what records say of it
        self._check_alone()

    @property
    def names(self) -> tuple[str, ...]:
        """The adaptations, in the order in which they came."""
        return tuple(self._entries)

    def labels(self, name: str) -> tuple[str, ...]:
        """The labels of an adaptation."""
        return self._entry(name).task.names

    def parameter_count(self) -> int:
        """Numbers that are held for all adaptations, also where narrow ones are filled up and slots are free."""
        scorers = sum(t.numel() for e in self._entries.values() for t in e.scorer.tensors.values())
        return scorers + sum(t.numel() for group in self._groups.values() for t in group.parts.values())

    # Coming and going

    def add(self, folder: str | Path, name: str | None = None) -> str:
        """Opens one more adaptation; its name, which is the folder's where none is given.

        Raises:
            StoreError: nothing is saved there, it is damaged, or it is not of this backbone. All else stays as it is.
        """
        return self._add({_name(folder) if name is None else name: folder})[0]

    def drop(self, name: str) -> None:
        """Forgets an adaptation; its place is the next one's."""
        entry = self._entry(name)
        del self._entries[name]
        if entry.group is not None:
            entry.group.give_back(entry.slot)
            if not entry.group.used:
                entry.group.remove()
                self._groups = {sort: group for sort, group in self._groups.items() if group is not entry.group}

    def remove(self) -> None:
        """Forgets all; the backbone is bitwise what it was."""
        for name in self.names:
            self.drop(name)

    def _add(self, folders: Mapping[str, str | Path]) -> list[str]:
        """Opens adaptations by name: all records first, so that every group is made as large as it must be."""
        self._check_alone()
        self._check_weights()
        made: dict[str, Entry] = {}
        try:
            planned = [self._planned(name, folder) for name, folder in folders.items()]
            wanted: dict[str, list[Sequence[Any]]] = {}
            for asked in (plan.asked for plan in planned if plan.asked.deltas):
                wanted.setdefault(asked.sort, []).append(asked.deltas)
            for sort, deltas in wanted.items():
                self._make_room(sort, deltas)
            for plan in planned:
                made[plan.name] = plan.entry(self._groups[plan.asked.sort] if plan.asked.deltas else None)
        except BaseException:
            for entry in made.values():
                if entry.group is not None:
                    entry.group.give_back(entry.slot)
            for sort, group in list(self._groups.items()):
                if not group.used:
                    self._groups.pop(sort).remove()
            raise
        self._entries |= made
        return list(made)

    def _planned(self, name: str, folder: str | Path) -> Plan:
        if name in self._entries:
            raise ConfigError(f"there is already an adaptation {name!r}; give {folder} another name, or drop that one")
        record = store.describe(folder)
        check(record, self._identity(record["template"]), folder)
        try:
            asked = self._asked_of(record)
        except DeltaPromptError as e:
            raise not_made(record, folder, e) from e
        return Plan(name, folder, record, asked, asked.reading.scorer(self.backbone).eval())

    def _identity(self, template: str) -> Mapping[str, Any]:
        """What tells the backbone."""
        chat = parse(template).is_chat
        if chat not in self._identities:
            self._identities[chat] = identity(self.backbone, template)
        return self._identities[chat]

    def _check_weights(self) -> None:
        """What tells the backbone is forgotten where its weights were written to since."""
        every = self.backbone.model.parameters()
        weights = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in every]
        if weights != self._weights:
            self._weights, self._identities = weights, {}

    def _check_alone(self) -> None:
        """An error where another model has deltas on the backbone, which would act here too."""
        own = {id(patch) for group in self._groups.values() for patch in group.adapted.patches}
        if any(id(patch) not in own for patch in patches_on(self.backbone.model)):
            raise ConfigError(OTHERS)

    def _asked_of(self, record: Mapping[str, Any]) -> Asked:
        """What a record asks for, made once for all records that ask for the same."""
        key = json.dumps([record.get(part) for part in ASKED])
        if (asked := self._asked.get(key)) is None:
            asked = self._asked[key] = Asked.of(record, self.backbone)
        return asked

    def _make_room(self, sort: str, wanted: Sequence[Sequence[Any]]) -> None:
        group = self._groups.get(sort)
        if group is not None and group.holds(wanted):
            group.make_room(len(wanted))
            return
        wider, moved = Group.of(self.backbone, wanted, group), dict[str, Entry]()
        try:
            for name, entry in self._entries.items():
                if group is not None and entry.group is group:
                    moved[name] = replace(entry, group=wider, slot=wider.take_over(group, entry.slot))
        except BaseException:
            wider.remove()
            raise
        self._groups[sort] = wider
        self._entries |= moved
        if group is not None:
            group.remove()

    # Answers

    def predict(
        self,
        examples: Sequence[str | Mapping[str, str] | Example],
        adaptation: str | Sequence[str],
        batch_size: int = 32,
    ) -> list[dict[str, Any]]:
        """`{"label", "score", "scores"}` for each text, by its own adaptation.

        Args:
            examples: texts, or rows with the fields that their adaptation's template names.
            adaptation: one name for all, or one a text.
            batch_size: rows in one pass through the backbone, whatever their adaptations.
        """
        if isinstance(examples, str | Mapping | Example):
            raise ConfigError("predict takes a list, and got one text; write predict([text], ...)")
        names = [adaptation] * len(examples) if isinstance(adaptation, str) else list(adaptation)
        if len(names) != len(examples):
            raise ConfigError(f"{len(names)} adaptations for {len(examples)} texts; name one for all, or one a text")
        self._check_alone()
        entries = [self._entry(name) for name in names]
        found = self._probabilities(entries, [example_of(e) for e in examples], batch_size)
        return [answer(e.task, p.tolist()) for e, p in zip(entries, found, strict=True)]

    @torch.inference_mode()
    def _probabilities(self, entries: Sequence[Entry], examples: Sequence[Example], batch_size: int) -> list[Tensor]:
        """Each row's class probabilities [c]."""
        rows = _encoded(entries, unlabelled_of(examples))
        found: dict[int, Tensor] = {}
        for part in _parts(entries, rows, batch_size):
            try:
                found |= self._scored(entries, rows, part)
            except SiteError:  # experts, for one, see tokens of all rows in an order of their own
                for _, own in _by([entries[i] for i in part]):
                    found |= self._scored(entries, rows, [part[i] for i in own])
        return [found[i] for i in range(len(rows))]

    def _scored(self, entries: Sequence[Entry], rows: Sequence[Encoded], part: Sequence[int]) -> dict[int, Tensor]:
        """The probabilities of some rows, run in one pass."""
        batch = entries[part[0]].features.collate([rows[i] for i in part]).to(self._device)
        of, found = [entries[i] for i in part], dict[int, Tensor]()
        one = of[0] if len({id(entry) for entry in of}) == 1 else None
        with self._alone(one) if one is not None else self._mixed(of, batch.variants):
            repeated = one.repeated if one is not None and one.continues else None
            at = read(self.backbone, batch, repeated, more=None if one is None else one.asked.reading.later)
            for entry, own in _by(of):
                each = entry.scorer.probabilities(entry.scorer(of_rows(at, own))).cpu()
                found |= zip([part[i] for i in own], each, strict=True)
        return found

    def _alone(self, entry: Entry) -> AbstractContextManager[None]:
        """Within it all rows are of one adaptation."""
        return nullcontext() if entry.group is None else entry.group.adapted.routing.at(entry.slot)

    @contextmanager
    def _mixed(self, entries: Sequence[Entry], variants: int) -> Iterator[None]:
        """Within it the rows of a batch have an adaptation each; a group without rows rests."""
        groups = {id(e.group): e.group for e in entries if e.group is not None}
        try:
            for key, group in groups.items():
                rows = [i for i, e in enumerate(entries) if id(e.group) == key]
                each = torch.tensor([i * variants + j for i in rows for j in range(variants)], device=self._device)
                slots = torch.tensor([entries[i].slot for i in rows for _ in range(variants)], device=self._device)
                group.adapted.routing.among(len(entries) * variants, each, slots)
            yield
        finally:
            for group in groups.values():
                group.adapted.routing.rest()

    @property
    def _device(self) -> torch.device:
        return next(self.backbone.model.parameters()).device

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise ConfigError(f"there is no adaptation {name!r}{nearest(name, self.names)}")
        return self._entries[name]


@dataclass(frozen=True, eq=False)
class Asked:
    """What a record asks for, but for its tensors; adaptations that differ in nothing else share it."""

    reading: Reading
    deltas: Sequence[Delta]
    sort: str

    @classmethod
    def of(cls, record: Mapping[str, Any], backbone: Backbone) -> Asked:
        """What a record asks for on a backbone."""
        task, deltas = asked_of(record)
        reading = Reading.of(backbone, task, deltas)
        features = restored(backbone, reading.features, reading.verbalizer, record)
        reading = replace(reading, features=features)
        every = [plain(delta) for delta in placed(deltas, reading.features)]  # which is what is saved
        return cls(reading, every, sort_of(every))


@dataclass(frozen=True)
class Plan:
    """An adaptation whose record is read and found good, and whose tensors are not read yet."""

    name: str
    folder: str | Path
    record: Mapping[str, Any]
    asked: Asked
    scorer: Scorer

    @torch.no_grad()
    def entry(self, group: Group | None) -> Entry:
        """The adaptation, its tensors read and written where they belong."""
        saved = store.tensors(self.folder, self.record)
        own = {n.removeprefix(VERBALIZER): t for n, t in saved.items() if n.startswith(VERBALIZER)}
        deltas = {n.removeprefix(DELTA): t for n, t in saved.items() if n.startswith(DELTA)}
        try:
            if {n: t.shape for n, t in own.items()} != {n: t[0].shape for n, t in self.scorer.tensors.items()}:
                raise StoreError("the saved tensors of the verbalizer are not those that it has")
            for name, tensor in own.items():
                self.scorer.tensors[name][0].copy_(tensor)
            slot = 0 if group is None else group.take(self.asked.deltas, deltas)
        except StoreError as e:
            raise StoreError(f"{self.folder}: {e}") from e
        return Entry(self.name, self.asked, self.scorer, group, slot)


def open_many(folders: Iterable[str | Path] | Mapping[str, str | Path], backbone: Backbone) -> Many:
    """Saved adaptations, of whatever methods, widths, templates, verbalizers and labels, on one backbone.

    Args:
        folders: of adaptations; each goes by its folder's name, or by the name that a mapping gives it.
        backbone: the one that they were made for.

    Raises:
        StoreError: one of them is missing, damaged or of another backbone; then none is opened.
    """
    if isinstance(folders, str | Path):
        raise ConfigError(f"open_many takes a list of folders, and got one; write open_many([{str(folders)!r}], ...)")
    many = Many(backbone)
    named = dict(folders) if isinstance(folders, Mapping) else _named(list(folders))
    many._add(named)
    return many


def _named(folders: Sequence[str | Path]) -> dict[str, str | Path]:
    named = {_name(folder): folder for folder in folders}
    if len(named) < len(folders):
        names = [_name(folder) for folder in folders]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two folders are called {twice!r}; give a mapping of names to folders")
    return named


def _name(folder: str | Path) -> str:
    return Path(folder).resolve().name


def _encoded(entries: Sequence[Entry], examples: Sequence[Example]) -> list[Encoded]:
    """The rows as token ids, each as its adaptation's template has it."""
    rows: dict[int, Encoded] = {}
    for asked, numbers in _by([entry.asked for entry in entries]):
        rows |= zip(numbers, asked.reading.features.encode([examples[i] for i in numbers]), strict=True)
    return [rows[i] for i in range(len(entries))]


def _by(of: Sequence[T]) -> Iterable[tuple[T, list[int]]]:
    """Each object and the numbers of its rows."""
    numbers: dict[int, list[int]] = {}
    for i, one in enumerate(of):
        numbers.setdefault(id(one), []).append(i)
    return [(of[rows[0]], rows) for rows in numbers.values()]


def _parts(entries: Sequence[Entry], rows: Sequence[Encoded], batch_size: int) -> Iterable[list[int]]:
    """Batches of rows that can be run together, of about one length."""
    together: dict[tuple[int, int], list[int]] = {}
    for i, (entry, row) in enumerate(zip(entries, rows, strict=True)):
        together.setdefault((len(row.variants), id(entry) if entry.continues else 0), []).append(i)
    for numbers in together.values():
        for part in bucketed([rows[i].length for i in numbers], batch_size):
            yield [numbers[i] for i in part]
