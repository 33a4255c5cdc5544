"""Which tag follows which: counted over abstract tags (StructShot, Yang & Katiyar 2020), or by the rules of BIO.

The best path through a sentence's scores and these is found by Viterbi's algorithm, for a whole batch at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deltaprompt.errors import ConfigError

FLOOR = 1e-6  # of a move that was never seen: Few-NERD's code (Ding et al. 2021)
START, OUT, IN, SAME, OTHER = range(5)


class Transitions(NamedTuple):
    """Scores of moves between c tags, such as log-probabilities; −inf for a move that cannot be."""

    start: Tensor  # [c] into a sentence's first tag
    after: Tensor  # [c, c] from a tag (row) to the one behind it
    end: Tensor  # [c] out of a sentence's last tag


@dataclass(frozen=True, slots=True)
class Moves:
    """How often tags followed one another, whatever their types: in a sentence's beginning, O, or a mention.

    A mention goes on with its type, ends, or is followed by one of another type. Types that none of the counted
    sentences had have the same moves.
    """

    start_out: int = 0
    start_in: int = 0
    out_out: int = 0
    out_in: int = 0
    in_out: int = 0
    in_same: int = 0
    in_other: int = 0

    @classmethod
    def counted(cls, sentences: Iterable[Sequence[str]], outside: str = "O") -> Moves:
        """The moves of sentences of tags, a type each (no "B-" or "I-"), or `outside`."""
        found: Counter[tuple[int, int]] = Counter()
        for tags in sentences:
            before = [None, *tags]
            found.update(_move(a, b, outside) for a, b in zip(before, tags, strict=False))
        kinds = ((START, OUT), (START, IN), (OUT, OUT), (OUT, IN), (IN, OUT), (IN, SAME), (IN, OTHER))
        return cls(*(found[kind] for kind in kinds))

    def over(self, types: int, tau: float = 1.0, floor: float = FLOOR, outside: int = 0) -> Transitions:
        """log of the moves' probabilities between that many types and O.

        Those into a mention are dealt evenly among the types, those to another type among the others. Each row is
        then raised to the power τ and made a distribution again: at 1 it stays, towards 0 all moves become alike.

        Args:
            types: N, without O.
            tau: τ; Few-NERD's code has 0.32, of ten types and five shots 0.434.
            floor: the probability of a move that was never seen; at 0 it cannot be.
            outside: where O is among the N + 1 tags.
        """
        if types < 1 or not 0 <= tau < torch.inf or not 0 <= floor < 1 or not 0 <= outside <= types:
            raise ConfigError(
                f"moves over types={types}, tau={tau}, floor={floor}, outside={outside}; possible: a type or more, "
                "tau >= 0, 0 <= floor < 1, and an outside that is one of the types + 1 tags"
            )
        into = torch.full((types,), 1 / types)
        same = torch.eye(types, dtype=torch.bool)
        starts = torch.cat([torch.tensor([float(self.start_out)]), self.start_in * into])
        outs = torch.cat([torch.tensor([float(self.out_out)]), self.out_in * into])
        ins = torch.where(same, float(self.in_same), self.in_other / max(types - 1, 1))
        ins = torch.cat([torch.full((types, 1), float(self.in_out)), ins], 1)
        rows = _tempered(torch.stack([starts, outs, *ins]).double(), tau).clamp(min=floor).log().float()
        order = torch.tensor([*range(1, outside + 1), 0, *range(outside + 1, types + 1)])
        return Transitions(rows[0, order], rows[1:][order][:, order], torch.zeros(types + 1))


def _move(before: str | None, tag: str, outside: str) -> tuple[int, int]:
    if before is None or before == outside:
        return START if before is None else OUT, OUT if tag == outside else IN
    return IN, OUT if tag == outside else SAME if tag == before else OTHER


def _tempered(rows: Tensor, tau: float) -> Tensor:
    """pᵗ / Σ pᵗ of each row's moves that are possible; where none was seen all are alike."""
    rows = torch.where(rows.sum(-1, keepdim=True) > 0, rows, 1.0)
    return (tau * rows.log()).masked_fill(rows == 0, -torch.inf).softmax(-1)


def rules(tags: Sequence[str]) -> Transitions:
    """0 for moves between tags such as "B-person" that are possible, −inf for others.

    "I-x" goes on only with "B-x" or "I-x", where there is a "B-x". With "E-x" a mention that was begun has to end so,
    in which "M-x" is "I-x", and "S-x" is a mention of one word. Tags without a prefix may stand anywhere.
    """
    known = frozenset(tags)
    closes = any(tag[:2] == "E-" and f"B-{tag[2:]}" in known for tag in tags)

    def goes_on(tag: str) -> bool:
        return tag[:2] in ("I-", "M-", "E-") and f"B-{tag[2:]}" in known

    def is_open(tag: str) -> bool:
        return tag[:2] in ("B-", "I-", "M-") and f"B-{tag[2:]}" in known

    def possible(a: str, b: str) -> bool:
        if goes_on(b):
            return is_open(a) and a[2:] == b[2:]
        return not (closes and is_open(a))

    start = torch.tensor([not goes_on(tag) for tag in tags])
    after = torch.tensor([[possible(a, b) for b in tags] for a in tags])
    end = torch.tensor([not (closes and is_open(tag)) for tag in tags])
    return Transitions(*(torch.zeros(ok.shape).masked_fill(~ok, -torch.inf) for ok in (start, after, end)))


def viterbi(scores: Tensor, lengths: Tensor, moves: Transitions) -> Tensor:
    """argmax over paths y of start(y_1) + Σ_t s_t(y_t) + Σ_t after(y_{t−1}, y_t) + end(y_T): tags [b, t].

    Args:
        scores: of each tag of each word, log-probabilities where the moves are such: [b, t, c].
        lengths: words of each sentence [b]; behind its end the path is -1.
        moves: between the c tags.
    """
    start, after, end = (m.to(scores) for m in moves)
    best, stay = start + scores[:, 0], torch.arange(scores.shape[2], device=scores.device)  # [b, c], [c]
    back = []
    for t in range(1, scores.shape[1]):
        reached, came = (best[:, :, None] + after).max(1)  # [b, c]
        inside = (t < lengths)[:, None]
        best = torch.where(inside, reached + scores[:, t], best)
        back.append(torch.where(inside, came, stay))
    path = [(best + end).argmax(-1)]
    for came in reversed(back):
        path.append(came.gather(1, path[-1][:, None])[:, 0])
    words = torch.arange(scores.shape[1], device=scores.device)
    return torch.stack(path[::-1], 1).masked_fill(words >= lengths[:, None], -1)


def paths_of(scores: Tensor, lengths: Sequence[int], moves: Transitions) -> list[Tensor]:
    """The best path of each text's words: scores [n, c] of words one after another -> tags of each text."""
    each = pad_sequence(list(scores.float().log_softmax(-1).split(list(lengths))), batch_first=True)
    paths = viterbi(each, torch.tensor(lengths), moves)
    return [path[:n] for path, n in zip(paths, lengths, strict=True)]
