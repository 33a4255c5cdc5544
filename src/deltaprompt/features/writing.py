"""Examples -> rows whose targets are to be generated: the prompt, behind it the target, and where its ids are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat

import torch
from torch import Tensor

from deltaprompt.errors import DataError
from deltaprompt.features.batching import bucketed, padded
from deltaprompt.features.features import Features
from deltaprompt.features.rows import Encoded, Row
from deltaprompt.templates import Field, Literal, Template
from deltaprompt.types import Batch, Example


class Writing(ABC):
    """How examples become rows with targets, and prompts that a text is to follow."""

    features: Features  # of the prompts; it knows of virtual tokens and how rows are padded
    longest: int  # ids of a target at most
    ends: tuple[int, ...]  # ids behind which nothing follows

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Rows with targets; an example with several right texts is as many rows."""

    @abstractmethod
    def prompts(self, examples: Sequence[Example]) -> list[Encoded]:
        """The prompt of each example alone."""

    @abstractmethod
    def answers(self, example: Example) -> tuple[str, ...]:
        """The right texts of an example; none where it has none."""

    @abstractmethod
    def answered(self, example: Example) -> Example:
        """An example without what nothing follows, so that its prompt asks for what its right texts answer."""


@dataclass(frozen=True, eq=False)
class FromTemplate(Writing):
    """A prompt template, and behind it a target.

    The prompt has `features.max_length` tokens at most, whatever the target, so that it is the same when nothing
    follows it yet. A target with its `after` that is longer than `longest` is cut, and so ends without it.
    """

    features: Features
    target: Template  # of literals and fields
    longest: int
    ends: tuple[int, ...]
    before: tuple[int, ...]  # ids that a target begins with
    after: tuple[int, ...]  # ids that it ends with

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        texts = [self._answers(example, number) for number, example in enumerate(examples, 1)]
        ids = self.features.continued(list(chain.from_iterable(texts)))
        prompts = [row for row, own in zip(self.prompts(examples), texts, strict=True) for row in repeat(row, len(own))]
        return [self._row(prompt.variants[0], own) for prompt, own in zip(prompts, ids, strict=True)]

    def prompts(self, examples: Sequence[Example]) -> list[Encoded]:
        return self.features.encode([Example(example.fields) for example in examples])

    def answers(self, example: Example) -> tuple[str, ...]:
        """The references as they stand, or the target template's text."""
        if example.references or not set(self.target.fields) <= set(example.fields):
            return example.references
        pieces = (p for p in self.target.pieces if isinstance(p, Literal | Field))
        return ("".join(p.text if isinstance(p, Literal) else p.value(example.fields) for p in pieces),)

    def answered(self, example: Example) -> Example:
        return example

    def _answers(self, example: Example, number: int) -> tuple[str, ...]:
        texts = self.answers(example)
        if not texts or not all(text.strip() for text in texts):
            wanted = f"the fields {', '.join(self.target.fields)} of {str(self.target)!r}"
            got = "a blank one" if texts else f"the fields {', '.join(sorted(example.fields)) or 'none'}"
            raise DataError(f"example {number} has no target, got {got}; give it {wanted}, or references")
        return texts

    def _row(self, prompt: Row, ids: Sequence[int]) -> Encoded:
        """A prompt with a target, the last id of which nothing needs to read."""
        target = (*self.before, *ids, *self.after)[: self.longest]
        if prompt.decoder is None:
            return reading(prompt.ids, target)
        start = len(prompt.decoder)
        at = list(range(start - 1, start - 1 + len(target)))
        return Encoded((Row(prompt.ids, at, [*prompt.decoder, *target[:-1]]),), targets=target)


def reading(prompt: Sequence[int], target: tuple[int, ...]) -> Encoded:
    """A left-to-right row: prompt and target, each of whose ids the state before it is to give."""
    first = len(prompt) - 1
    return Encoded((Row([*prompt, *target[:-1]], list(range(first, first + len(target)))),), targets=target)


def collated(features: Features, rows: Sequence[Encoded], index: Sequence[int] | None = None) -> Batch:
    """Rows with targets -> one batch; a row of several texts is told apart by positions that begin anew.

    transformers makes the block mask of these positions where there is no other mask, so padding is a text of its own.
    """
    packed = any(row.parts for row in rows)
    batch = features.collate(rows, index, "right" if packed else None)
    batch = replace(batch, targets=padded([row.targets for row in rows], -1))  # [b, m], as answer_at
    if not packed:
        return batch
    ids = batch.inputs["input_ids"]
    return replace(batch, inputs={"input_ids": ids, "position_ids": _anew(rows, ids.shape[1])})


def batches(features: Features, rows: Sequence[Encoded], batch_size: int) -> Iterator[Batch]:
    """Batches of rows with targets, the longest first; `index` says which they are."""
    for part in bucketed([row.length for row in rows], batch_size):
        yield collated(features, [rows[i] for i in part], part)


def _anew(rows: Sequence[Encoded], longest: int) -> Tensor:
    """Positions [b, longest] that begin at 0 with every text of a row, and with the padding."""
    lengths = [row.parts or (row.length,) for row in rows]
    sizes = [[*own, longest - sum(own)] for own in lengths]
    return torch.stack([torch.cat([torch.arange(n) for n in own]) for own in sizes])
