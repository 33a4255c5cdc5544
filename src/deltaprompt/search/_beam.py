"""One beam for a whole set of rows: the text that fills the same two gaps of all rows best, Σ over rows of log p.

A fill is what an encoder-decoder that was trained on spans writes: tokens for the first gap, the second sentinel,
tokens for the second gap, the end. The next token is judged by Σ_rows log p(token | row, what is written so far) (Gao,
Fisch & Chen 2021, section 5.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.load import states_of
from deltaprompt.errors import BackboneError
from deltaprompt.features.batching import attended, padded
from deltaprompt.features.named_tokens import SENTINEL

GAPS: Final = 2
SENTINELS: Final = tuple(SENTINEL.format(i) for i in range(GAPS + 1))
SEQUENCES: Final = 256  # (row, beginning of a fill) pairs in one pass of the decoder

Step = Callable[[Tensor], Tensor]  # beginnings [h, t] -> Σ over rows of log p of what comes next [h, v]


@dataclass(frozen=True)
class Fill:
    """What stands in each gap, as tokens, and Σ over rows of its log p."""

    gaps: tuple[tuple[int, ...], ...]
    score: float


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Which tokens a fill may be made of, and which close its gaps."""

    allowed: Tensor  # [v] tokens that may stand in a gap
    closers: tuple[int, ...]  # of each gap, the last of all ends the fill

    @classmethod
    def of(cls, backbone: Backbone) -> Vocabulary:
        """That of an encoder-decoder with sentinels."""
        tokenizer = backbone.tokenizer
        known = tokenizer.get_vocab()
        lacking = [name for name in SENTINELS if name not in known]
        if backbone.kind != "seq2seq" or lacking or backbone.head is None:
            what = f"has no {lacking[0]}" if lacking else f"is of kind {backbone.kind!r}"
            raise BackboneError(
                f"templates are written by an encoder-decoder with the sentinels {', '.join(SENTINELS)}, such as T5, "
                f"and this one {what}; take another"
            )
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        allowed = torch.zeros(backbone.head.size, dtype=torch.bool)
        allowed[sorted({i for i in known.values() if i < len(allowed)})] = True
        allowed[sorted(i for i in {*special, *tokenizer.all_special_ids} if i < len(allowed))] = False
        return cls(allowed, tuple(known[name] for name in SENTINELS[1:]))


@dataclass(frozen=True)
class _Begun:
    """The beginning of a fill."""

    written: tuple[int, ...]
    gap: int  # the one that is being filled
    inside: int  # tokens in it so far
    score: float


def set_beam(step: Step, vocabulary: Vocabulary, beam: int, longest: int) -> list[Fill]:
    """The best fills of one beam, the best first.

    Args:
        step: judges what comes next for all rows at once.
        vocabulary: what may come, and what closes a gap.
        beam: beginnings that are kept at each step, and fills at most.
        longest: tokens in a gap at most.
    """
    alive, done = [_Begun((), 0, 0, 0.0)], list[Fill]()
    while alive:
        scores = step(torch.tensor([b.written for b in alive], dtype=torch.long).reshape(len(alive), -1))
        longer: list[_Begun] = []
        for b, own in zip(alive, scores, strict=True):
            closed = b.score + float(own[vocabulary.closers[b.gap]])
            written = (*b.written, vocabulary.closers[b.gap])
            if b.gap + 1 == GAPS:
                done.append(Fill(_gaps(b.written, vocabulary.closers), closed))
            else:
                longer.append(_Begun(written, b.gap + 1, 0, closed))
            if b.inside < longest:
                best = own.masked_fill(~vocabulary.allowed, -torch.inf).topk(min(beam, int(vocabulary.allowed.sum())))
                each = zip(best.values.tolist(), best.indices.tolist(), strict=True)
                longer += [_Begun((*b.written, i), b.gap, b.inside + 1, b.score + value) for value, i in each]
        alive = sorted(longer, key=lambda b: -b.score)[:beam]
        done = sorted(done, key=lambda fill: -fill.score)[:beam]
        if alive and len(done) == beam and alive[0].score <= done[-1].score:  # scores only fall
            break
    return done


def _gaps(written: Sequence[int], closers: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    at = list(written).index(closers[0])
    return tuple(written[:at]), tuple(written[at + 1 :])


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows with gaps, read by the encoder once; `step` judges beginnings of fills for all of them.

    Args:
        backbone: an encoder-decoder with sentinels.
        ids: of each row, with the first sentinel in the first gap and the second in the second.
    """

    backbone: Backbone
    encoded: Tensor  # [n, s, d]
    mask: Tensor  # [n, s]
    start: tuple[int, ...]  # what the decoder is given first
    ends: tuple[int, ...]  # tokens that end a fill alike

    @classmethod
    def of(cls, backbone: Backbone, ids: Sequence[Sequence[int]]) -> Rows:
        """The encoder's states of rows."""
        device = next(backbone.model.parameters()).device
        known, pad = backbone.tokenizer.get_vocab(), backbone.tokenizer.pad_token_id or 0
        inputs = {"input_ids": padded(ids, pad).to(device), "attention_mask": attended(ids).to(device)}
        parts = range(0, len(ids), SEQUENCES)
        with torch.inference_mode():
            encoded = [backbone.encoded({n: t[i : i + SEQUENCES] for n, t in inputs.items()}) for i in parts]
        start = backbone.config.get("decoder_start_token_id")
        ends = [known[SENTINELS[-1]], backbone.tokenizer.eos_token_id]
        return cls(
            backbone,
            torch.cat(encoded),
            inputs["attention_mask"],
            (*([] if start is None else [int(start)]), known[SENTINELS[0]]),
            tuple(i for i in ends if i is not None),
        )

    @torch.inference_mode()
    def step(self, written: Tensor) -> Tensor:
        """Σ over rows of log p of what comes next [h, v] after beginnings [h, t], on the CPU in float64.

        A fill ends where the last sentinel or the end of the sequence comes: the sentinel has the probability of both.
        """
        device = self.encoded.device
        start = torch.tensor(self.start).expand(len(written), -1)
        prefix = torch.cat([start, written], dim=1).to(device)  # [h, t']
        total: Tensor | float = 0.0
        for some in torch.arange(len(self.encoded), device=device).split(max(1, SEQUENCES // len(written))):
            total = total + self._log_p(some, prefix).sum(0, dtype=torch.float64).cpu()
        return torch.as_tensor(total)

    def _log_p(self, rows: Tensor, prefix: Tensor) -> Tensor:
        """log p of what comes next for some rows [r] after each prefix [h, t']: [r, h, v]."""
        count = len(prefix)
        ids = prefix.repeat(len(rows), 1)  # [r * h, t']
        inputs = {
            "decoder_input_ids": ids,
            "decoder_attention_mask": torch.ones_like(ids),
            "attention_mask": self.mask[rows].repeat_interleave(count, 0),
        }
        out = self.backbone.decoded(self.encoded[rows].repeat_interleave(count, 0), inputs, use_cache=False)
        head = self.backbone.head
        if head is None:
            raise BackboneError("an encoder-decoder without a head for words cannot write templates")
        log_p = head.logits(states_of(out)[:, -1]).float().log_softmax(-1)
        ends = log_p[:, list(self.ends)].logsumexp(-1)
        log_p[:, self.ends[0]] = ends
        return log_p.unflatten(0, (len(rows), count))
