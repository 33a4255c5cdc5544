"""What is asked of words: a `Tagging` is the types of the parts of a text that are looked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltaprompt.data.tagged import in_words
from deltaprompt.data.tags import OUTSIDE, check_scheme, spans_of, tags_of
from deltaprompt.errors import ConfigError, DataError, nearest
from deltaprompt.model.task import Task
from deltaprompt.model.transitions import Moves, Transitions, rules
from deltaprompt.registry import describe, from_description
from deltaprompt.types import Example, Span
from deltaprompt.verbalizers._base import Verbalizer
from deltaprompt.verbalizers.soft import SoftVerbalizer

LETTERS = {"io": ("",), "bio": ("B-", "I-"), "bmes": ("B-", "M-", "E-", "S-"), "bioes": ("B-", "I-", "E-", "S-")}


@dataclass(frozen=True)
class Tagging:
    """Named entities, slots, and other parts of a text that have a type.

    Args:
        types: of the parts; what has none is outside.
        scheme: "bio": a part's first word has a tag of its own, so that two that touch are told apart; "io": it has
            not, and there are half as many classes, which few examples can tell apart better; "bmes", "bioes".
        verbalizer: how a word's state becomes class scores; a linear head where not given.
        max_length: tokens of a window at most; the backbone's own limit where not given.
        moves: how often tags followed one another in other data, with types of its own (StructShot, Yang & Katiyar
            2020): their scores count beside the words', in the scheme "io". Without them only what the scheme forbids
            counts.
        tau: τ of these moves.
    """

    types: tuple[str, ...]
    scheme: str = "bio"
    verbalizer: Verbalizer | None = None
    max_length: int | None = None
    moves: Moves | None = None
    tau: float = 0.32

    def __post_init__(self) -> None:
        check_scheme(self.scheme)
        if self.scheme not in LETTERS:
            raise ConfigError(f"scheme={self.scheme!r} is not for learning; possible: {', '.join(LETTERS)}")
        if not self.types or len(set(self.types)) < len(self.types) or OUTSIDE in self.types:
            raise ConfigError(f"a tagging needs a type or more, each once, none of them {OUTSIDE!r}; got {self.types}")
        if self.moves is not None and self.scheme != "io":
            raise ConfigError(f"moves are between types and need the scheme 'io'; got {self.scheme!r}")

    @property
    def tags(self) -> tuple[str, ...]:
        """The classes of words: outside, and for each type those of its parts."""
        return (OUTSIDE, *(letter + name for name in self.types for letter in LETTERS[self.scheme]))

    def of(self, name: str) -> list[int]:
        """The classes of words in spans of a type."""
        return [n for n, tag in enumerate(self.tags) if tag in {letter + name for letter in LETTERS[self.scheme]}]

    @property
    def transitions(self) -> Transitions:
        """The scores of one tag behind another."""
        return rules(self.tags) if self.moves is None else self.moves.over(len(self.types), self.tau)

    @property
    def task(self) -> Task:
        """The same as a classification of words."""
        return Task("{text}", self.tags, self.verbalizer or SoftVerbalizer(), self.max_length)

    def classes(self, example: Example) -> list[int]:
        """The class of each word of an example.

        Raises:
            DataError: a span is of no type that is asked for, or does not begin and end where words do.
        """
        for span in example.spans:
            if span.label not in self.types:
                raise DataError(f"a span is of the type {span.label!r}{nearest(span.label, self.types)}")
        numbers = {tag: n for n, tag in enumerate(self.tags)}
        return [numbers[tag] for tag in tags_of(in_words(example), len(example.words), self.scheme)]

    def spans(self, classes: Sequence[int]) -> list[Span]:
        """The spans, in words, that the classes of a text's words tell."""
        tags = self.tags
        return spans_of([tags[n] for n in classes], self.scheme)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **vars(self),
            "verbalizer": None if self.verbalizer is None else describe("verbalizers", self.verbalizer),
            "moves": None if self.moves is None else asdict(self.moves),
        }

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Tagging:
        """What a record tells."""
        verbalizer, moves = record["verbalizer"], record["moves"]
        own = {
            **record,
            "types": tuple(record["types"]),
            "verbalizer": None if verbalizer is None else from_description("verbalizers", verbalizer),
            "moves": None if moves is None else Moves(**moves),
        }
        return cls(**own)
