"""What episodes are drawn from at the command line: rows of files, divided by their labels; or whole episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from deltaprompt.errors import ConfigError, DataError

if TYPE_CHECKING:
    from deltaprompt.cli.recipe import DataTable, Recipe
    from deltaprompt.data.episodes import Episode
    from deltaprompt.model.episodic import Episodic
    from deltaprompt.model.transitions import Moves
    from deltaprompt.types import Example


@dataclass(frozen=True)
class EpisodesTable:
    """`[episodes]`."""

    spans: bool = False
    ways: int = 5
    shots: int = 1
    queries: int = 1
    train: int = 1000  # episodes
    dev: int = 200
    test: int = 1000
    label_share: float = 0.5  # of one file's labels, to train on, where there is no test file
    dev_share: float = 0.25  # of the training labels, to choose by, where there is no dev file and they are enough
    shift: bool = False  # whether the test file's rows are only told, and learned from in the training file
    steps: int = 0  # on the support's own loss, of what the verbalizer starts with
    rate: float = 0.1
    structured: bool = False  # whether moves between tags, counted in the training rows, count (StructShot)
    tau: float = 0.32
    legacy: bool = False  # whether spans are counted as Few-NERD's code does


def rows(source: str, asked: Episodic, data: DataTable | None = None) -> list[Example]:
    """The labelled rows of a file: texts with spans, relations, or texts with labels."""
    from deltaprompt.cli import tagging
    from deltaprompt.cli.data import rows as read_rows
    from deltaprompt.cli.recipe import DataTable
    from deltaprompt.templates import parse

    if asked.spans:
        return tagging.rows(source)
    return read_rows(source, data or DataTable(), parse(asked.template).fields, "train")


@dataclass(frozen=True)
class Pools:
    """What episodes are drawn from, or those of files that have whole ones."""

    table: EpisodesTable
    train: Sequence[Any]
    dev: Sequence[Any]
    test: Sequence[Any]

    @classmethod
    def of(cls, recipe: Recipe, table: EpisodesTable, asked: Episodic) -> Pools:
        """Those of a recipe; labels of one file are divided where there is no other file."""
        from deltaprompt.cli.data import training_file

        data = recipe.data
        files = (training_file(recipe), data.dev, data.test)
        train, dev, test = ([] if file is None else _read(file, asked, data) for file in files)
        if not test:
            train, test = _divided(train, table.label_share, asked.spans)
        if not dev and not _whole(train):
            train, dev = _for_dev(train, table, asked.spans)
        return cls(table, train, dev, test)

    def dealt(self, role: str, seed: int) -> list[Episode]:
        """The episodes of a seed."""
        from deltaprompt.data.episodes import class_episodes, sentence_episodes

        t, pool = self.table, vars(self)[role]
        count = {"train": t.train, "dev": t.dev, "test": t.test}[role]
        if not pool or _whole(pool):
            return list(pool[:count])
        draws = sentence_episodes if t.spans else class_episodes
        first, queries = (self.train, pool) if role == "test" and t.shift else (pool, None)
        try:
            return list(islice(draws(first, t.ways, t.shots, t.queries, seed, query_from=queries), count))
        except DataError as error:
            none = ", or dev = 0 in [episodes] to do without" if role == "dev" else ""
            raise DataError(f"{role} rows: {error}{none}") from error


def _read(source: str, asked: Episodic, data: DataTable) -> Sequence[Any]:
    """The rows of a file, or its episodes."""
    from deltaprompt.data.columns import in_columns
    from deltaprompt.data.episodes import read_episodes
    from deltaprompt.data.formats import HUB, rows_of

    if asked.spans and not in_columns(source) and not source.startswith(HUB):
        first = next(rows_of(source, None), None)
        if first is not None and {"support", "query"} <= first.values.keys():
            return list(read_episodes(source))
    return rows(source, asked, data)


def _whole(pool: Sequence[Any]) -> bool:
    """Whether these are episodes already."""
    from deltaprompt.data.episodes import Episode

    return bool(pool) and isinstance(pool[0], Episode)


def _divided(pool: Sequence[Any], share: float, spans: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """Rows of some labels, and others of the other labels; the division does not depend on a seed."""
    from deltaprompt.data.episodes import split_by_label, split_by_span_label

    if _whole(pool):
        raise ConfigError("a file of episodes to train on needs another to measure on; give --test FILE")
    return split_by_span_label(pool, share) if spans else split_by_label(pool, 0, share)


def _for_dev(pool: Sequence[Any], table: EpisodesTable, spans: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """Rows to train on and to choose by: of other labels where both have enough for an episode, else of other rows."""
    from deltaprompt.data import labels_of, split
    from deltaprompt.data.pairs import hold_out
    from deltaprompt.data.tagged import span_labels

    if table.dev == 0:
        return pool, []
    names = span_labels(pool) if spans else labels_of(pool)
    held = int(table.dev_share * len(names))
    if held >= table.ways and len(names) - held >= table.ways:
        return _divided(pool, 1 - held / len(names), spans)
    return hold_out(pool, table.dev_share, 0) if spans else split(pool, table.dev_share, 0)


def moves_in(pool: Sequence[Any]) -> Moves:
    """How often tags follow one another in the training rows, or in the support of training episodes."""
    from deltaprompt.data.tagged import word_tags
    from deltaprompt.model.transitions import Moves

    texts = [row for one in pool for row in (one.support if _whole(pool) else (one,))]
    return Moves.counted(word_tags(text, "io") for text in texts if text.words)
