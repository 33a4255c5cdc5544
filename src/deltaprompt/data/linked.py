"""Pairs of sentences that mention one entity, or two: what types are learned from without labels (PLET, section 3.3).

An entity is what a row's field "entity" says, such as a link's target. Where there is none it is the mention's surface,
in whatever case; a pronoun, which stands for whoever was named before, is then nobody.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Final, TypeVar

from deltaprompt.data.entities import BLANK, COARSE, ENTITY, hidden, mention
from deltaprompt.data.letters import marks
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.types import Example

SAME, APART = "same", "apart"  # the labels of pairs
ONE, OTHER = "one.", "other."  # what the names of the two rows' fields begin with
PRONOUNS: Final = """
i you he she it we they me him her us them this that these those who mine yours his hers its ours theirs
myself yourself himself herself itself ourselves yourselves themselves
"""
OPENS: Final = ".!?:;\"“”'‘(-–"  # signs behind which a word may be capitalised without being a name

T = TypeVar("T")


@dataclass(frozen=True)
class Linked:
    """How pairs are made of entity rows.

    Args:
        negatives: pairs of two entities for each pair of one. In a field "coarse", as gazetteers give it, they differ.
        sentences: of one entity at most.
        hidden: how likely a mention is hidden, in its sentence and wherever else the template has it.
        blank: what stands in its place.
        most: pairs at most; all where not given.
        held_out: the share of the pairs to choose the best by, one at least; 0 for none.
    """

    negatives: int = 2
    sentences: int = 10
    hidden: float = 0.4
    blank: str = BLANK
    most: int | None = None
    held_out: float = 0.01

    def __post_init__(self) -> None:
        shares = (self.hidden, self.held_out)
        counts = (self.negatives, self.sentences - 1, 1 if self.most is None else self.most)
        if min(counts) < 1 or not all(0 <= share < 1 for share in shares) or not self.blank.strip():
            raise ConfigError(
                f"got {self}; possible: negatives >= 1, sentences >= 2, most >= 1, hidden and held_out from 0 to below "
                "1, and a blank that is not empty"
            )

    def pairs(self, rows: Sequence[Example], seed: int = 0) -> list[Example]:
        """Examples of two rows each, labelled "same" or "apart", their fields "one.text", "other.text" and so on.

        Raises:
            DataError: no entity is mentioned in two texts, or there is nothing apart from one.
        """
        chance = Random(seed)
        entities = {name: _shuffled(own, chance)[: self.sentences] for name, own in grouped(rows).items()}
        every = [(name, row) for name, own in entities.items() for row in own]
        if not (linked := {name: own for name, own in entities.items() if len(own) > 1}):
            raise DataError(f"no entity is mentioned in two texts of these {len(rows)} rows; give more of them")
        if len(entities) < 2:
            raise DataError(f"all mentions are of one entity, {every[0][0]!r}; give rows of others too")
        made = list[Example]()
        for name, own in linked.items():
            for row, next_one in zip(own, own[1:] + own[: len(own) > 2], strict=False):
                made.append(self._pair(row, next_one, SAME, chance))
                made += [self._pair(row, other, APART, chance) for other in self._apart(name, row, every, chance)]
        return _shuffled(made, chance)[: self.most]

    def dealt(self, rows: Sequence[Example], seed: int = 0) -> tuple[list[Example], list[Example]]:
        """The pairs to train on, and those that are held out."""
        made = self.pairs(rows, seed)
        count = max(1, round(self.held_out * len(made))) if self.held_out else 0
        return made[count:], made[:count]

    def _apart(
        self, name: str, row: Example, every: Sequence[tuple[str, Example]], chance: Random
    ) -> Iterator[Example]:
        """Rows of other entities, where their coarse types are known of another one."""
        coarse = row.fields.get(COARSE)
        for _ in range(self.negatives):
            start = int(chance.random() * len(every))
            turned = (every[(start + i) % len(every)] for i in range(len(every)))
            fits = (r for other, r in turned if other != name and (coarse is None or r.fields.get(COARSE) != coarse))
            if (found := next(fits, None)) is None:
                raise DataError(f"every mention has the coarse type {coarse!r}; give rows of others too")
            yield found

    def _pair(self, one: Example, other: Example, label: str, chance: Random) -> Example:
        seen = [hidden(row, self.blank) if chance.random() < self.hidden else row for row in (one, other)]
        sides = zip((ONE, OTHER), seen, strict=True)
        return Example({f"{start}{name}": text for start, row in sides for name, text in row.fields.items()}, label)


def entity_of(row: Example) -> str:
    """The entity that a row mentions; "" for a pronoun."""
    if row.fields.get(ENTITY):
        return row.fields[ENTITY]
    surface = " ".join(row.fields["mention"].casefold().split())
    return "" if surface in PRONOUNS.split() else surface


def grouped(rows: Iterable[Example]) -> dict[str, list[Example]]:
    """The rows of each entity, each of its texts once."""
    found: dict[str, dict[str, Example]] = {}
    for row in rows:
        if name := entity_of(row):
            found.setdefault(name, {}).setdefault(row.fields["text"], row)
    return {name: list(own.values()) for name, own in found.items()}


def rows_of_pair(pair: Example) -> tuple[Example, Example]:
    """The rows of a pair."""
    each = [
        {name.removeprefix(start): text for name, text in pair.fields.items() if name.startswith(start)}
        for start in (ONE, OTHER)
    ]
    return Example(each[0]), Example(each[1])


def find_mentions(texts: Sequence[str]) -> list[Example]:
    """Rows of the names in plain texts: runs of words that these texts write with a capital where none has to stand.

    A crude stand-in for links: a word counts as a name where, within sentences, it is capitalised more often than not.
    """
    counts = Counter[str]()  # capitalised minus small
    for text in texts:
        for word in _word().finditer(text):
            if not _opens(text, word.start()):
                counts[word[0].casefold()] += 1 if word[0][0].isupper() else -1
    return [mention(text[:a], text[a:b], text[b:]) for text in texts for a, b in _names(text, counts)]


def _names(text: str, counts: Mapping[str, int]) -> list[tuple[int, int]]:
    """Where in a text its names are: capitalised words with a blank between them."""
    found = list[tuple[int, int]]()
    for word in _word().finditer(text):
        if not word[0][0].isupper() or len(word[0]) == 1 or counts[word[0].casefold()] <= 0:
            continue
        if found and text[found[-1][1] : word.start()] == " ":
            found[-1] = (found[-1][0], word.end())
        else:
            found.append(word.span())
    return found


@cache
def _word() -> re.Pattern[str]:
    """Letters with their marks, and what these signs join to them."""
    letters = rf"(?:[^\W_]{marks()}*)+"
    return re.compile(rf"{letters}(?:['’&-]{letters})*")


def _opens(text: str, at: int) -> bool:
    """Whether a word there begins a sentence, or may do so."""
    before = text[:at].rstrip()
    return not before or before[-1] in OPENS


def _shuffled(items: Sequence[T], chance: Random) -> list[T]:
    """In an order drawn by `random()` alone, whose sequence Python keeps across versions."""
    keys = [chance.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
