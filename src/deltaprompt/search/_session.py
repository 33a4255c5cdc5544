"""What every search stands on: its rows, kept apart by what they are for, its journal, and how prompts are scored.

Training rows rank all candidates; other rows, dev, choose among the best of them; test rows are looked at once, when
everything is chosen, and no function here has them before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from deltaprompt.backbone import Backbone
from deltaprompt.errors import ConfigError, DataError, nearest
from deltaprompt.features.batching import chunks
from deltaprompt.model import Task
from deltaprompt.model.saved import identity
from deltaprompt.search._frozen import Frozen, check_answers, label_words
from deltaprompt.search._journal import Journal, rows_told
from deltaprompt.search._progress import bar
from deltaprompt.types import Example
from deltaprompt.verbalizers.label_words import LabelWords

LEAST = torch.finfo(torch.float32).tiny  # a probability whose logarithm is still a number


@dataclass(frozen=True, order=True)
class Score:
    """How well probabilities fit: by accuracy, and of equal ones by the mean log-likelihood of the right class."""

    accuracy: float
    log_likelihood: float

    @classmethod
    def of(cls, p: Tensor, classes: Tensor) -> Score:
        """Of probabilities [n, c] and classes [n]."""
        right = p.argmax(-1) == classes
        likely = p.double().gather(-1, classes[:, None]).clamp(min=LEAST).log()
        return cls(float(right.double().mean()), float(likely.mean()))


class Options(Protocol):
    """What the options of every search have."""

    @property
    def shortlist(self) -> int:
        """Candidates, the best on the training rows, among which dev rows choose."""

    @property
    def ensemble(self) -> int:
        """The best of these whose probabilities are averaged."""

    @property
    def permutations(self) -> int:
        """New orders of the labels that the search is compared with."""

    @property
    def together(self) -> int:
        """Prompts that are scored in common passes."""

    @property
    def batch_size(self) -> int:
        """Rows in one pass."""


@dataclass(frozen=True)
class Tuning:
    """How candidates are tuned before dev rows choose among them.

    Args:
        run: (tasks, train, dev, asked) -> the class probabilities [t, n, c] of `asked`, after training on `train` for
            each task by itself.
        settings: all that its result depends on, by name, as JSON.
    """

    run: Callable[[Sequence[Task], Sequence[Example], Sequence[Example], Sequence[Example]], Tensor]
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Session:
    """One search on one draw of rows; `begin` makes it."""

    search: str
    backbone: Backbone
    task: Task
    train: Sequence[Example]
    dev: Sequence[Example]
    options: Options
    seed: int
    journal: Journal
    tuning: Tuning | None = None

    @cached_property
    def frozen(self) -> Frozen:
        """The backbone, asked through many templates at once."""
        return Frozen(self.backbone, self.train, self.options.batch_size, self.seed)

    @cached_property
    def labels(self) -> int:
        """C, the number of classes."""
        return len(self.task.names)

    def classes(self, rows: Sequence[Example]) -> Tensor:
        """The classes [n] of rows."""
        number = {name: i for i, name in enumerate(self.task.names)}
        return torch.tensor([number[str(row.label)] for row in rows], dtype=torch.long)

    def each(
        self,
        stage: str,
        tasks: Sequence[Task],
        rows: Sequence[Example],
        keep: Callable[[Tensor], Any] = Tensor.tolist,
        together: int | None = None,
    ) -> list[Any]:
        """What is kept of each task's probabilities [n, c] of rows, in blocks that the journal remembers."""

        def made(own: Sequence[Task]) -> list[Any]:
            return [keep(p) for p in self.frozen.probabilities(own, rows)]

        return self._blocks(stage, tasks, together or self.options.together, made)

    def probabilities(
        self, stage: str, tasks: Sequence[Task], rows: Sequence[Example], together: int | None = None
    ) -> list[Tensor]:
        """Each task's probabilities [n, c] of rows."""
        return [torch.tensor(p) for p in self.each(stage, tasks, rows, together=together)]

    def ranked(self, tasks: Sequence[Task]) -> tuple[Tensor, list[Score]]:
        """Each task's answers to the training rows, [t, n], and how well these fit."""
        classes = self.classes(self.train)

        def kept(p: Tensor) -> dict[str, Any]:
            return {"predicted": p.argmax(-1).tolist(), "log_likelihood": Score.of(p, classes).log_likelihood}

        found = self.each("train", tasks, self.train, kept)
        predicted = torch.tensor([one["predicted"] for one in found])  # [t, n]
        accuracies = (predicted == classes).double().mean(1).tolist()
        return predicted, [Score(a, one["log_likelihood"]) for a, one in zip(accuracies, found, strict=True)]

    def tuned(self, stage: str, tasks: Sequence[Task], rows: Sequence[Example]) -> list[Tensor]:
        """The probabilities [n, c] of rows after tuning for each task; none without tuning."""
        if self.tuning is None:
            return []
        run = self.tuning.run

        def made(own: Sequence[Task]) -> list[Any]:
            return list(run(own, self.train, self.dev, rows).tolist())

        return [torch.tensor(p) for p in self._blocks(stage, tasks, self.options.together, made)]

    def _blocks(
        self, stage: str, tasks: Sequence[Task], size: int, make: Callable[[Sequence[Task]], list[Any]]
    ) -> list[Any]:
        """What is made of each task, so many at a time, each block once."""
        found: list[Any] = []
        with bar(len(tasks), f"{self.search}: {stage}") as step:
            for block in chunks(range(len(tasks)), size):
                own = [tasks[i] for i in block]
                found += self.journal.once(f"{stage} {block[0]}-{block[-1]}", partial(make, own))
                step(len(block))
        return found

    def worded(self, words: Mapping[str, tuple[str, ...]]) -> Task:
        """The task with other label words."""
        settled = self.task.settled(self.backbone)
        made = dataclasses.replace(settled, words=words) if isinstance(settled, LabelWords) else LabelWords(words)
        return dataclasses.replace(self.task, labels=words, verbalizer=made)

    def words(self) -> dict[str, tuple[str, ...]]:
        """The task's label words."""
        return label_words(self.task, self.backbone)


def begin(
    search: str,
    backbone: Backbone,
    task: Task,
    train: Sequence[Example],
    dev: Sequence[Example],
    options: Options,
    seed: int,
    out: str | Path | None,
    resume: bool,
    tuning: Tuning | None = None,
    others: Mapping[str, Any] | None = None,
) -> Session:
    """A session, its rows and its task checked; `others` are further things that its numbers depend on."""
    if backbone.kind == "encoder":
        raise ConfigError(
            "a search needs a language model, which answers at {mask}; this backbone is a plain encoder: load it with "
            "kind = 'masked' if it has a head for words, or take another"
        )
    if resume and out is None:
        raise ConfigError("to resume needs the folder of the search that was broken off: give out")
    if task.several:
        raise ConfigError("a search is for tasks of one label a row, and this one may give several")
    check_answers(task.settled(backbone))
    _check_rows(task.names, "train", train, every=True)
    _check_rows(task.names, "dev", dev, every=False)
    settings = {
        "search": search,
        "options": dataclasses.asdict(options),  # type: ignore[call-overload]
        "task": repr(task),
        "seed": seed,
        "backbone": told_of(backbone, task),
        "train": rows_told(train),
        "dev": rows_told(dev),
        "tuning": None if tuning is None else dict(tuning.settings),
        **(others or {}),
    }
    journal = Journal(None if out is None else Path(out), settings, resume)
    return Session(search, backbone, task, list(train), list(dev), options, seed, journal, tuning)


def told_of(backbone: Backbone, task: Task) -> dict[str, Any]:
    """What tells a backbone and its tokenizer, wherever its folder is."""
    return {name: value for name, value in identity(backbone, task.template).items() if name != "name"}


def check_counts(options: Any, **least: int) -> None:
    """An error for a number of the options that is below its least."""
    for name, low in least.items():
        value = vars(options)[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{name} = {value!r} is not possible: it is a whole number, {low} or more")


def _check_rows(names: Sequence[str], what: str, rows: Sequence[Example], every: bool) -> None:
    """Every row has one of the task's labels, and there are some (of `every` label)."""
    if not rows:
        raise DataError(f"there are no {what} rows; a search ranks on training rows and chooses on other rows, dev")
    for number, row in enumerate(rows, 1):
        if row.label is None:
            raise DataError(f"{what} row {number} has no label; a search needs one on each")
        if row.label not in names:
            raise DataError(f"{what} row {number}: there is no label {row.label!r}{nearest(row.label, names)}")
    if lacking := [name for name in names if every and all(row.label != name for row in rows)]:
        raise DataError(f"no {what} row has the label {lacking[0]!r}; give one or more of every label")
