"""What a language model learns to guess: masked tokens, the next token, or spans that were taken out.

An objective cuts a stream of tokens into rows, and makes of a step's rows the model's inputs and the positions whose
scores count. Rows have no padding, and what is hidden is drawn from a generator, so a step is a function of its number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from deltaprompt.backbone import Backbone
from deltaprompt.backbone import Kind as BackboneKind
from deltaprompt.errors import ConfigError
from deltaprompt.features.named_tokens import SENTINEL
from deltaprompt.pretrain.pretraining import Kind, Pretraining

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MASKED, IN_SPANS = 0.2, 0.15  # shares hidden where none is given (Wettig et al. 2023, section 3; Raffel et al. 2020)
SPAN = 3.0  # tokens (Raffel et al. 2020, section 3.3.4)
DEV_MASKED = 0.15  # on dev: what is usually reported (Devlin et al. 2019)
KIND_FOR: Mapping[Kind, BackboneKind] = {"masked": "masked", "causal": "causal", "spans": "seq2seq"}
OF_KIND: Mapping[BackboneKind, Kind] = {kind: objective for objective, kind in KIND_FOR.items()}


@dataclass(frozen=True)
class Scored:
    """Inputs, and the positions of the states [b, t] that guess a token each."""

    inputs: Mapping[str, Tensor]
    at: Tensor  # [b, t], bool
    labels: Tensor  # [b, t]; counted where `at` is

    def rows(self, first: int, last: int | None = None, each: int = 1) -> Scored:
        """Some of the rows."""
        own = slice(first, last, each)
        return Scored({name: t[own] for name, t in self.inputs.items()}, self.at[own], self.labels[own])

    def to(self, device: torch.device) -> Scored:
        """On a device."""
        return Scored({n: t.to(device) for n, t in self.inputs.items()}, self.at.to(device), self.labels.to(device))


class Objective(ABC):
    """How a stream becomes rows, and rows a task."""

    kind: ClassVar[Kind]
    room: int  # tokens of the stream in a row
    end: int  # the token that closes a document

    @abstractmethod
    def scored(self, rows: Tensor, generator: torch.Generator) -> Scored:
        """Rows [b, room] of the stream as inputs; what is hidden is drawn."""

    def for_dev(self) -> Objective:
        """The objective as it is measured on dev."""
        return self


@dataclass(frozen=True, eq=False)
class Masked(Objective):
    """[CLS] row [SEP], a share of its tokens replaced by [MASK] and guessed; special tokens never (Devlin et al. 2019).

    All of what is guessed is masked, unlike there: nothing is learned of tokens that stay, and prompts have masks only.
    """

    room: int
    rate: float
    first: int
    end: int
    mask: int
    special: Tensor  # ids that are never masked
    kind: ClassVar[Kind] = "masked"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, length: int, rate: float) -> Self:
        """With a tokenizer's special tokens."""
        ids = {"cls_token": tokenizer.cls_token_id, "sep_token": tokenizer.sep_token_id}
        ids["mask_token"] = tokenizer.mask_token_id
        if missing := [name for name, found in ids.items() if found is None]:
            raise ConfigError(
                f"the objective masked needs a {missing[0]}, and the tokenizer has none; take another tokenizer, or "
                "train one ([tokenizer] pieces = 8192)"
            )
        special = torch.tensor(sorted(tokenizer.all_special_ids))
        return cls(length - 2, rate, ids["cls_token"], ids["sep_token"], ids["mask_token"], special)

    def for_dev(self) -> Masked:
        return replace(self, rate=DEV_MASKED)

    def scored(self, rows: Tensor, generator: torch.Generator) -> Scored:
        first, end = (rows.new_full((len(rows), 1), token) for token in (self.first, self.end))
        ids = torch.cat([first, rows, end], 1)  # [b, length]
        at = (torch.rand(ids.shape, generator=generator) < self.rate) & ~torch.isin(ids, self.special)
        inputs = {"input_ids": ids.masked_fill(at, self.mask), "attention_mask": torch.ones_like(ids)}
        return Scored(inputs, at, ids)


@dataclass(frozen=True)
class Causal(Objective):
    """Every token of a row but its first is guessed from those before it."""

    room: int
    end: int
    kind: ClassVar[Kind] = "causal"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, length: int) -> Self:
        """With a tokenizer's end token."""
        if tokenizer.eos_token_id is None:
            raise ConfigError("the objective causal needs an end-of-text token (eos_token), and the tokenizer has none")
        return cls(length, tokenizer.eos_token_id)

    def scored(self, rows: Tensor, generator: torch.Generator) -> Scored:
        at = torch.ones_like(rows, dtype=torch.bool)
        at[:, -1] = False
        return Scored({"input_ids": rows, "attention_mask": torch.ones_like(rows)}, at, rows.roll(-1, 1))


@dataclass(frozen=True)
class Spans(Objective):
    """Spans are taken out, a sentinel stands for each, and the decoder says them (Raffel et al. 2020, section 3.1.4).

    Of row a b c d e f: the encoder reads `a <0> d <1> f </s>`, the decoder says `<0> b c <1> e </s>`. Every row has as
    many spans and as many tokens in them; where they lie and how long each is, is drawn evenly among all ways.
    """

    room: int
    hidden: int  # tokens of a row in spans
    sentinels: tuple[int, ...]  # one a span
    end: int
    start: int  # what the decoder begins with
    kind: ClassVar[Kind] = "spans"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, length: int, rate: float, span: float, start: int | None) -> Self:
        """Rows of which as much is left as fits into `length`, with its sentinels and its end."""
        room = max(n for n in range(2, 2 * length + 2) if n == 2 or _read(n, rate, span) <= length)
        hidden, spans = _counts(room, rate, span)
        vocabulary = tokenizer.get_vocab()
        names = [SENTINEL.format(i) for i in range(spans)]
        if missing := [name for name in names if name not in vocabulary]:
            raise ConfigError(
                f"the objective spans takes {spans} spans out of a row and needs as many sentinels; the tokenizer has "
                f"no {missing[0]}. Take T5's tokenizer or one that is trained here ([tokenizer] pieces), shorter rows "
                "or longer spans"
            )
        if tokenizer.eos_token_id is None or start is None:
            raise ConfigError(
                "the objective spans needs an end token (eos_token) and the config's decoder_start_token_id"
            )
        return cls(room, hidden, tuple(vocabulary[name] for name in names), tokenizer.eos_token_id, start)

    def scored(self, rows: Tensor, generator: torch.Generator) -> Scored:
        hidden = self._drawn(len(rows), generator)  # [b, room]
        begins = hidden & ~torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        sentinel = torch.tensor(self.sentinels)[(begins.cumsum(1) - 1).clamp(min=0)]  # [b, room]
        end = rows.new_full((len(rows), 1), self.end)
        left = torch.where(begins, sentinel, rows)[begins | ~hidden].view(len(rows), -1)
        both, kept = torch.stack([sentinel, rows], -1), torch.stack([begins, hidden], -1)  # [b, room, 2]
        said = torch.cat([both[kept].view(len(rows), -1), end], 1)  # [b, spans + hidden + 1]
        ids = torch.cat([left, end], 1)
        before = torch.cat([rows.new_full((len(rows), 1), self.start), said[:, :-1]], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": before}
        return Scored(inputs, torch.ones_like(said, dtype=torch.bool), said)

    def _drawn(self, rows: int, generator: torch.Generator) -> Tensor:
        """Which tokens are in spans [b, room]: what is between spans has a token at least, what is around may not."""
        spans = len(self.sentinels)
        inside = _parts(rows, self.hidden, spans, generator)
        around = _parts(rows, self.room - self.hidden + 2, spans + 1, generator)
        around[:, [0, -1]] -= 1
        turns = torch.stack([around[:, :-1], inside], -1).view(rows, -1)  # before, in, between, in, …
        turns = torch.cat([turns, around[:, -1:]], 1)
        flags = (torch.arange(turns.shape[1]) % 2 == 1).repeat(rows)
        return flags.repeat_interleave(turns.view(-1)).view(rows, self.room)


def _parts(rows: int, total: int, parts: int, generator: torch.Generator) -> Tensor:
    """`total` as a sum of `parts` numbers, 1 or more each [rows, parts]; all ways are equally likely."""
    order = torch.rand(rows, total - 1, generator=generator).argsort(1)
    cuts = order[:, : parts - 1].sort(1).values + 1
    edges = torch.cat([torch.zeros(rows, 1, dtype=torch.long), cuts, torch.full((rows, 1), total)], 1)
    return edges.diff(dim=1)


def _counts(room: int, rate: float, span: float) -> tuple[int, int]:
    """Tokens of a row in spans, and spans: some are left between any two."""
    hidden = min(max(round(room * rate), 1), room - 1)
    return hidden, min(max(round(hidden / span), 1), hidden, room - hidden + 1)


def _read(room: int, rate: float, span: float) -> int:
    """What the encoder reads of a row of so many tokens."""
    hidden, spans = _counts(room, rate, span)
    return room - hidden + spans + 1


def objective_of(backbone: Backbone, p: Pretraining) -> Objective:
    """The objective that is asked for, or that a backbone's kind tells."""
    if backbone.kind not in OF_KIND:
        raise ConfigError(
            f"{backbone.name or 'this backbone'} is of kind {backbone.kind!r}, which has no head to guess tokens with; "
            "load it as 'masked' with new_head=True"
        )
    own = OF_KIND[backbone.kind]
    if p.objective not in (None, own):
        raise ConfigError(f"objective = {p.objective!r} does not go with a backbone of kind {backbone.kind!r}: {own!r}")
    p.check_for(own)
    if p.length > backbone.max_length:
        raise ConfigError(f"length = {p.length} is more than the {backbone.max_length} tokens that the backbone takes")
    tokenizer = backbone.tokenizer
    if own == "masked":
        return Masked.of(tokenizer, p.length, MASKED if p.rate is None else p.rate)
    if own == "causal":
        return Causal.of(tokenizer, p.length)
    start = backbone.config.get("decoder_start_token_id")
    return Spans.of(tokenizer, p.length, *_hidden(p), start)


def _hidden(p: Pretraining) -> tuple[float, float]:
    """The share of tokens in spans, and the mean length of one."""
    return IN_SPANS if p.rate is None else p.rate, SPAN if p.span is None else p.span


def packed(stream: Tensor, room: int) -> Tensor:
    """A stream [n] as rows [n // room, room], every token once and in order; fewer than `room` at its end are left."""
    rows = len(stream) // room
    return stream[: rows * room].view(rows, room)
