"""What a search has found, what it looked at for that, and how its choice does on test rows; as JSON and Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, pstdev
from time import monotonic
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from deltaprompt.errors import DataError
from deltaprompt.model import Model, Task
from deltaprompt.search._journal import rows_told
from deltaprompt.search._null import best_of, permuted
from deltaprompt.search._session import Score, Session, told_of
from deltaprompt.types import Example
from deltaprompt.verbalizers.label_words import LabelWords

Cell: TypeAlias = str | int | float
Metrics: TypeAlias = Mapping[str, float]
Test: TypeAlias = Sequence[Example] | Callable[[], Sequence[Example]]


@dataclass(frozen=True)
class Table:
    """A table of results: a title, its columns and its rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def markdown(self) -> str:
        """As Markdown; numbers with a point have three digits behind it."""
        lines = [self.columns, ["---"] * len(self.columns), *([_shown(cell) for cell in row] for row in self.rows)]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


@dataclass(frozen=True)
class Candidate:
    """One template with its words, and how well it does where it was chosen by."""

    task: Task
    train: Score
    dev: Score
    tuned: Score | None = None  # on dev, after tuning


@dataclass(frozen=True)
class Answer:
    """What is measured on test: the mean of the probabilities of one task or of several."""

    name: str
    tasks: tuple[Task, ...]
    dev: Score
    tuned: Score | None = None  # on dev, after tuning
    test: Metrics | None = None
    tuned_test: Metrics | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search has found; `measured` looks at test rows, once."""

    search: str
    session: Session = field(repr=False, compare=False)
    looked_at: Mapping[str, Mapping[str, Any]]
    shortlist: tuple[Candidate, ...]  # the best first
    answers: tuple[Answer, ...]  # baseline, chosen, ensemble
    controls: Mapping[str, Any]
    tables: tuple[Table, ...]
    seconds: float

    @property
    def task(self) -> Task:
        """The chosen task."""
        return self.shortlist[0].task

    def model(self) -> Model:
        """The frozen backbone with the chosen prompt, to predict with and to save; `adapted.remove()` takes it off."""
        return self.session.frozen.model(self.task)

    def measured(self, test: Test) -> SearchResult:
        """The same with what its answers come to on test rows, which are read now."""
        began, s = monotonic(), self.session
        rows = test() if callable(test) else test
        if not rows:
            raise DataError("there are no test rows to measure on")
        _check_labels(s.task.names, rows)
        every = [task for a in self.answers for task in a.tasks]
        tasks = [task for i, task in enumerate(every) if task not in every[:i]]
        found = s.probabilities(f"test {rows_told(rows)}", tasks, rows, together=1)
        tuned = s.tuned(f"tuned test {rows_told(rows)}", [a.tasks[0] for a in self.answers if a.tuned], rows)
        classes, later = s.classes(rows), iter(tuned)
        answers = tuple(
            replace(
                a,
                test=metrics(mixed([found[tasks.index(task)] for task in a.tasks]), classes),
                tuned_test=None if a.tuned is None else metrics(next(later), classes),
            )
            for a in self.answers
        )
        seen = {_told(row) for row in (*s.train, *s.dev)}
        looked = {
            "rows": rows_told(rows),
            "prompts": len(tasks),
            "also in train or dev": sum(_told(row) in seen for row in rows),
        }
        return replace(
            self,
            answers=answers,
            looked_at={**self.looked_at, "test": looked},
            seconds=self.seconds + monotonic() - began,
        )

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        s = self.session
        return {
            "search": self.search,
            "backbone": {"name": s.backbone.name, **told_of(s.backbone, s.task)},
            "seed": s.seed,
            "options": dataclasses.asdict(s.options),  # type: ignore[call-overload]
            "tuning": None if s.tuning is None else dict(s.tuning.settings),
            "looked_at": {name: dict(told) for name, told in self.looked_at.items()},
            "answers": [_answer(a) for a in self.answers],
            "shortlist": [_candidate(c) for c in self.shortlist],
            "controls": dict(self.controls),
            "tables": [dataclasses.asdict(table) for table in self.tables],
            "seconds": round(self.seconds, 2),
        }

    def markdown(self) -> str:
        """The answers, what they are compared with, and the tables of this search."""
        tables = [answers_table([self]), self._controls(), *self.tables, self._shortlist()]
        looked = "; ".join(
            f"{name}: " + ", ".join(f"{value} {key}" if key != "rows" else str(value) for key, value in told.items())
            for name, told in self.looked_at.items()
        )
        return "\n\n".join([*(table.markdown() for table in tables), f"Looked at: {looked}."])

    def _controls(self) -> Table:
        c = self.controls
        rows = (
            ("the best candidate", c["best"]),
            (f"the best of {c['candidates']:,} guessers (null)", c["null"]),
            (f"the best on permuted labels, mean of {c['permutations']}", c["permuted"]),
        )
        return Table("Accuracy on the training rows that it was chosen by", ("", "train"), rows)

    def _shortlist(self) -> Table:
        shown = self.shortlist[:SHOWN]
        tuned = any(c.tuned for c in shown)
        columns = ("prompt", "train", "dev", *(["tuned dev"] if tuned else []))
        prompts = prompts_told([c.task for c in shown])
        rows: list[tuple[Cell, ...]] = [
            (prompt, c.train.accuracy, c.dev.accuracy, *([c.tuned.accuracy] if c.tuned else []))
            for prompt, c in zip(prompts, shown, strict=True)
        ]
        return Table(f"The best {len(rows)}, in the order of the choice", columns, tuple(rows))


SHOWN: Final = 10  # of the shortlist, in the Markdown


def settled(
    s: Session,
    tasks: Sequence[Task],
    train: Sequence[Score],
    controls: Mapping[str, Any],
    tables: Sequence[Table],
    began: float,
) -> SearchResult:
    """The result of a search whose candidates are ranked on the training rows: dev chooses among the best of them."""
    first = sorted(range(len(tasks)), key=train.__getitem__, reverse=True)[: s.options.shortlist]
    short, classes = [tasks[i] for i in first], s.classes(s.dev)
    (own,) = s.probabilities("baseline on dev", [s.task], s.dev)
    found = s.probabilities("dev", short, s.dev)
    tuned = [Score.of(p, classes) for p in s.tuned("tuned dev", [s.task, *short], s.dev)]
    listed = [
        Candidate(task, train[i], Score.of(p, classes), tuned[n + 1] if tuned else None)
        for n, (i, task, p) in enumerate(zip(first, short, found, strict=True))
    ]
    order = sorted(range(len(listed)), key=lambda n: listed[n].tuned or listed[n].dev, reverse=True)
    best = listed[order[0]]
    answers = [
        Answer("baseline", (s.task,), Score.of(own, classes), tuned[0] if tuned else None),
        Answer("chosen", (best.task,), best.dev, best.tuned),
    ]
    if (several := order[: s.options.ensemble])[1:]:
        several_p = mixed([found[n] for n in several])
        answers.append(Answer("ensemble", tuple(short[n] for n in several), Score.of(several_p, classes)))
    return SearchResult(
        s.search,
        s,
        {
            "train": {"rows": rows_told(s.train), "prompts": controls["candidates"]},
            "dev": {"rows": rows_told(s.dev), "prompts": len(short) + 1},
        },
        tuple(listed[n] for n in order),
        tuple(answers),
        controls,
        tuple(tables),
        monotonic() - began,
    )


def ranked_controls(s: Session, predicted: Tensor) -> dict[str, Any]:
    """How well the best of candidates does on the training rows, and what that is worth: predictions [t, n]."""
    classes = s.classes(s.train)
    orders = permuted(classes, s.options.permutations, s.seed)
    found = [float((predicted == order).double().mean(1).max()) for order in orders]
    return {
        "candidates": len(predicted),
        "best": float((predicted == classes).double().mean(1).max()),
        "null": best_of(s.labels, len(classes), len(predicted)),
        "permuted": mean(found),
        "permutations": s.options.permutations,
    }


def mixed(each: Sequence[Tensor]) -> Tensor:
    """The mean of probabilities [n, c]."""
    return torch.stack(list(each)).mean(0)


def metrics(p: Tensor, classes: Tensor) -> dict[str, float]:
    """Accuracy and macro F1 of probabilities [n, c]."""
    from sklearn.metrics import accuracy_score, f1_score

    gold, predicted = classes.tolist(), p.argmax(-1).tolist()
    macro = f1_score(gold, predicted, average="macro", labels=range(p.shape[1]), zero_division=0.0)
    return {"accuracy": float(accuracy_score(gold, predicted)), "macro_f1": float(macro)}


MEASURES: Final[Mapping[str, Callable[[Answer], float | None]]] = {
    "dev accuracy": lambda a: a.dev.accuracy,
    "tuned dev accuracy": lambda a: a.tuned.accuracy if a.tuned else None,
    "test accuracy": lambda a: a.test["accuracy"] if a.test else None,
    "tuned test accuracy": lambda a: a.tuned_test["accuracy"] if a.tuned_test else None,
}


def by_name(results: Sequence[SearchResult]) -> list[list[Answer]]:
    """Every answer of those draws that have it, in the order of the first that has them."""
    found: dict[str, list[Answer]] = {}
    for result in results:
        for answer in result.answers:
            found.setdefault(answer.name, []).append(answer)
    return list(found.values())


def answers_table(results: Sequence[SearchResult]) -> Table:
    """What the answers of one search came to, or of one on several draws: mean ± standard deviation."""
    each = by_name(results)
    told = {
        name: [[value for a in own if (value := measure(a)) is not None] for own in each]
        for name, measure in MEASURES.items()
    }
    told = {name: values for name, values in told.items() if any(values)}
    prompts = prompts_told([own[0].tasks[0] for own in each])
    rows = [
        (own[0].name, *(_spread(values[n]) for values in told.values()), prompts[n] if len(own[0].tasks) == 1 else "")
        for n, own in enumerate(each)
    ]
    if len(results) > 1:  # each chose its own
        rows = [(*row[:-1], "") for row in rows]
    return Table(f"{results[0].search} on {results[0].session.backbone.name}", ("", *told, "prompt"), tuple(rows))


def prompts_told(tasks: Sequence[Task]) -> list[str]:
    """Each task in a line: its template, its words, or both, whatever differs."""
    words, templates = [words_told(task) for task in tasks], [code(task.template) for task in tasks]
    if len(set(words)) == 1:
        return templates
    return words if len(set(templates)) == 1 else [f"{t} {w}" for t, w in zip(templates, words, strict=True)]


def words_told(task: Task) -> str:
    """Label words in a line."""
    words = task.verbalizer.words if isinstance(task.verbalizer, LabelWords) else task.words()
    each = {label: own if isinstance(own, str) else "|".join(own) for label, own in words.items()}
    return ", ".join(f"{label}: {own}" for label, own in each.items()).replace("|", "\\|")


def code(text: str) -> str:
    """A template in a cell of a Markdown table."""
    return "`" + text.replace("|", "\\|").replace("\n", "⏎") + "`"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{mean(values):.3f}" + (f" ± {_deviation(values):.3f}" if len(values) > 1 else "")


def _deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation."""
    return pstdev(values) * (len(values) / (len(values) - 1)) ** 0.5


def _shown(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.3f}"


def _check_labels(names: Sequence[str], rows: Sequence[Example]) -> None:
    for number, row in enumerate(rows, 1):
        if row.label not in names:
            raise DataError(f"test row {number} has the label {row.label!r}, and the task has {', '.join(names)}")


def _told(row: Example) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(row.fields.items()))


def _candidate(c: Candidate) -> dict[str, Any]:
    scores = {name: dataclasses.asdict(v) for name in ("train", "dev", "tuned") if (v := vars(c)[name]) is not None}
    return {**_prompt(c.task), **scores}


def _answer(a: Answer) -> dict[str, Any]:
    told = {name: dataclasses.asdict(v) for name in ("dev", "tuned") if (v := vars(a)[name]) is not None}
    told |= {name: dict(v) for name in ("test", "tuned_test") if (v := vars(a)[name]) is not None}
    return {"name": a.name, "prompts": [_prompt(task) for task in a.tasks], **told}


def _prompt(task: Task) -> dict[str, Any]:
    words = task.verbalizer.words if isinstance(task.verbalizer, LabelWords) else task.words()
    return {
        "template": task.template,
        "words": {label: list((w,) if isinstance(w, str) else w) for label, w in words.items()},
    }
