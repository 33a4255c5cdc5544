"""Episodes as rows: each text's token ids, where it is read, and the classes that are read there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from deltaprompt.data.episodes import Episode
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.features import Encoded, Features
from deltaprompt.features.batching import padded
from deltaprompt.features.rows import Row
from deltaprompt.features.words import Words
from deltaprompt.model.episodic import Episodic
from deltaprompt.model.starting import unlabelled_of
from deltaprompt.model.tagging import Tagging
from deltaprompt.model.task import Task
from deltaprompt.types import Batch, Example

Read = tuple[Row, tuple[int, ...]]  # a sequence of a text, and of spans the numbers of the words that are read there


@dataclass(frozen=True, eq=False)
class EpisodeRows:
    """How episodes become rows.

    Args:
        features: of the texts.
        episodic: what is asked.
    """

    features: Features
    episodic: Episodic

    @cached_property
    def words(self) -> Words:
        """How texts become rows of words."""
        return Words(self.features)

    def encode(self, episodes: Sequence[Any]) -> list[Encoded]:
        """Episodes as rows of their texts; texts that many episodes have are read once."""
        self.check(episodes, "episode")
        texts = {id(row): row for episode in episodes for row in (*episode.support, *episode.query)}
        known = dict(zip(texts, self.rows(list(texts.values())), strict=True))
        return [self._encoded(episode, known) for episode in episodes]

    def rows(self, texts: Sequence[Example]) -> list[list[Read]]:
        """Each text's sequences; of spans its windows, with the numbers of the words that are read there."""
        if not self.episodic.spans:
            return [[(row.variants[0], ())] for row in self.features.encode(unlabelled_of(texts))]
        each = self.words.windows([self.words.split(text) for text in texts])
        return [[(window.row, window.words) for window in own if window.words] for own in each]

    def _encoded(self, episode: Episode, known: Mapping[int, Sequence[Read]]) -> Encoded:
        task = self.episodic.task(episode.labels)
        rows, targets, counts = list[Row](), list[int](), [0, 0]
        for side, texts in enumerate((episode.support, episode.query)):
            for text in texts:
                classes = self._classes(text, task)
                for row, words in known[id(text)]:
                    rows.append(row)
                    targets += [classes[n] for n in words] if words else classes
                    counts[side] += 1
        return Encoded(tuple(rows), targets=tuple(targets), support=counts[0])

    def _classes(self, text: Example, task: Task | Tagging) -> list[int]:
        if isinstance(task, Tagging):
            return task.classes(self.words.split(text))
        return [task.names.index(str(text.label))]

    def check(self, episodes: Sequence[Any], name: str) -> None:
        """Raises where an episode cannot be learned from."""
        for number, episode in enumerate(episodes, 1):
            if not isinstance(episode, Episode):
                raise ConfigError(
                    f"{name} {number} is no episode but {type(episode).__name__}; draw some with class_episodes or "
                    "sentence_episodes of deltaprompt.data"
                )
            if not episode.support or not episode.query:
                counts = f"{len(episode.support)} rows to learn from and {len(episode.query)} to tell"
                raise DataError(f"{name} {number} has {counts}; give 1 of each or more")
            learnt, asked = (
                [span.label for row in rows for span in row.spans]
                if self.episodic.spans
                else [row.label for row in rows]
                for rows in (episode.support, episode.query)
            )
            if missing := [label for label in episode.labels if label not in learnt]:
                raise DataError(f"{name} {number} has no row to learn {missing[0]!r} from")
            if other := [label for label in (*learnt, *asked) if label not in episode.labels]:
                raise DataError(f"{name} {number} asks for {other[0]!r}, which is none of its labels")

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Episodes as one batch: their rows one after another."""
        flat = [Encoded((row,)) for episode in rows for row in episode.variants]
        batch = self.features.collate(flat)
        episodes = [[n, int(i < own.support)] for n, own in enumerate(rows) for i in range(len(own.variants))]
        targets = [part for own in rows for part in self._parts(own)]
        return replace(batch, targets=padded(targets, -1), episodes=torch.tensor(episodes))

    def _parts(self, episode: Encoded) -> Iterator[tuple[int, ...]]:
        """The classes in each of its rows."""
        start = 0
        for row in episode.variants:
            end = start + (len(row.at) if self.episodic.spans else 1)
            yield episode.targets[start:end]
            start = end
