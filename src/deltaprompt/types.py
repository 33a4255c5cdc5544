"""What flows through the system: an `Example` from the data, a `Batch` to the backbone, `AtMask` to the verbalizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Message(NamedTuple):
    """A turn of a conversation: who speaks, and what is said."""

    role: Literal["system", "user", "assistant"]
    content: str


class Span(NamedTuple):
    """A piece of a text, `text[start:end]`, and what it is."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data: its named text fields and, where known, its label's name.

    What is to be generated is a field too, or, where several texts are right, its `references`; a conversation is its
    `messages`. A row of a task that may give several labels has `labels` in place of a label. Where pieces of its field
    "text" are labelled they are its `spans`, in characters, and where the data has split that text, `words` are the
    (start, end) of its words.
    """

    fields: Mapping[str, str]
    label: str | None = None
    references: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    labels: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    words: tuple[tuple[int, int], ...] = ()

    @property
    def gold(self) -> tuple[str, ...]:
        """Its labels, one or several; none where they are not known."""
        return self.labels or (() if self.label is None else (self.label,))


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokenised rows with the positions where the answer is read.

    A row has `v` variants, one for each number of masks that its label words need; the backbone sees b * v sequences.
    """

    inputs: Mapping[str, Tensor]  # input_ids, attention_mask [b*v, s]; decoder_input_ids [b*v, t]
    answer_at: Tensor  # [b*v, m] positions in the states that are read; -1 where a row has fewer
    variants: int = 1  # v
    labels: Tensor | None = None  # [b] class indices; where rows may have several, [b, c] which are right
    index: Tensor | None = None  # [b] rows of the data set, so that sorted batches can be put back in order
    answers: tuple[Tensor, Tensor] | None = None  # each class's own text in each row: ids [b, c, t], lengths [b, c]
    targets: Tensor | None = None  # [b, m] the ids that the states at `answer_at` are to give; -1 where a row has fewer
    episodes: Tensor | None = None  # [b, 2] of each row the number of its episode, and whether it is learned from

    def to(self, device: str | torch.device) -> Batch:
        """The same batch with every tensor on `device`."""
        return Batch(
            {name: t.to(device) for name, t in self.inputs.items()},
            self.answer_at.to(device),
            self.variants,
            None if self.labels is None else self.labels.to(device),
            None if self.index is None else self.index.to(device),
            None if self.answers is None else (self.answers[0].to(device), self.answers[1].to(device)),
            None if self.targets is None else self.targets.to(device),
            None if self.episodes is None else self.episodes.to(device),
        )


@dataclass(frozen=True, slots=True)
class AtMask:
    """The backbone's states where the answer is read, and what the verbalizer may ask of the backbone there."""

    hidden: Tensor  # [b, v, m, d]
    present: Tensor  # [b, v, m] true where there is an answer position
    logits: Callable[[Tensor, Tensor | None], Tensor] | None = None  # (hidden [..., d], rows [n] or all) -> [..., n]
    continued: Callable[[Tensor, Tensor], Tensor] | None = None  # (ids [w, t] or [b, w, t], lengths) -> [b, w]
    answers: tuple[Tensor, Tensor] | None = None  # of the batch
