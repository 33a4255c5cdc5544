"""A template seen by one kind of backbone: runs of text to tokenise, token ids that stand fixed, answer positions."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Final, NamedTuple, TypeAlias
from typing import Literal as OneOf

from deltaprompt.errors import TemplateError
from deltaprompt.features.codec import Ask
from deltaprompt.features.truncate import Filled
from deltaprompt.templates import Field, Literal, Mask, Piece

Kind: TypeAlias = OneOf["masked", "causal", "seq2seq", "encoder"]

CLOSING: Final = ("Pe", "Pf", "Po", "Zs", "Cc")  # Unicode: closing brackets and quotes, stops, blanks, line ends


@dataclass(frozen=True, slots=True)
class Fixed:
    """Token ids that are the same in every row: special tokens, or the virtual ids of a soft block."""

    ids: tuple[int, ...]
    virtual: bool = False
    trims: bool = False  # text before it loses the blanks at its end, as before a soft block


@dataclass(frozen=True, slots=True)
class Run:
    """Literals and fields that stand together; they are tokenised as one text."""

    pieces: tuple[Literal | Field, ...]
    opens: bool  # nothing but soft tokens stands before it
    bare: bool  # loses the blanks at its end: they belong to the answer that follows, or to nothing

    def fill(self, fields: Mapping[str, object]) -> tuple[Filled, Ask]:
        """The text of this run for one example, and how it is to be tokenised."""
        values = [p.text if isinstance(p, Literal) else p.value(fields) for p in self.pieces]
        text = "".join(values)
        text = text.rstrip(" ") if self.bare else text
        return Filled(self.pieces, text, list(accumulate(map(len, values)))), (text, self.opens)


Part: TypeAlias = Run | Fixed | Mask
Raw: TypeAlias = Literal | Field | Fixed | Mask


class Place(NamedTuple):
    """How an answer's word is written at a mask."""

    opens: bool  # it opens the sequence
    space: bool  # a blank stands before it

    def ask(self, word: str) -> Ask:
        """The word as it is to be tokenised there."""
        return (" " + word, False) if self.space else (word, self.opens)


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of a row in order, and the places of answers: at each mask, or at the end where there is none."""

    parts: tuple[Part, ...]
    places: tuple[Place, ...]

    @property
    def masks(self) -> int:
        """The number of `{mask}` parts."""
        return sum(isinstance(part, Mask) for part in self.parts)


def lay_out(pieces: Sequence[Raw], restarts: bool) -> Layout:
    """Groups text into runs; `restarts` says whether text after a special token is tokenised like the first text."""
    groups = [group for text, run in groupby(pieces, _is_text) for group in ([[*run]] if text else [[p] for p in run])]
    parts: list[Part] = []
    places: list[Place] = []
    opens, space = True, False
    for group, after in zip(groups, [*groups[1:], []], strict=True):
        head = group[0]
        if isinstance(head, Mask):
            places.append(Place(opens, space))
            parts.append(head)
            opens, space = False, False
        elif isinstance(head, Fixed):
            parts.append(head)
            opens, space = (opens, space) if head.virtual else (restarts, False)
        else:
            run = _run(group, opens and not (parts and _text(head).startswith(" ")), after)
            parts.append(run)
            space = _text(group[-1]).endswith(" ")
            opens = opens and run.bare and _is_blank(group)
    end = Place(opens=False, space=bool(groups) and _takes_blank(groups[-1][-1]))
    return Layout(tuple(parts), tuple(places) or (end,))


def _run(group: Sequence[Raw], opens: bool, after: Sequence[Raw]) -> Run:
    bare = any(isinstance(p, Mask) or (isinstance(p, Fixed) and (p.virtual or p.trims)) for p in after)
    return Run(tuple(p for p in group if isinstance(p, Literal | Field)), opens, bare)


def _is_text(piece: Raw) -> bool:
    return isinstance(piece, Literal | Field)


def _text(piece: Raw) -> str:
    return piece.text if isinstance(piece, Literal) else ""


def _takes_blank(last: Raw) -> bool:
    """Whether what comes after a prompt without a mask is a new word, with its blank."""
    return isinstance(last, Field) or (isinstance(last, Literal) and not last.text[-1:].isspace())


def _is_blank(group: Iterable[Raw]) -> bool:
    return all(isinstance(p, Literal) and not p.text.strip(" ") for p in group)


def ends_with_answer(pieces: Sequence[Raw], chat: bool) -> list[Raw]:
    """A left-to-right prompt without what follows its `{mask}`: the model does not see it."""
    at = next((i for i, p in enumerate(pieces) if isinstance(p, Mask)), None)
    if at is None:
        return list(pieces)
    for piece in pieces[at + 1 :]:
        if not (isinstance(piece, Literal) and all(unicodedata.category(c) in CLOSING for c in piece.text)):
            raise TemplateError(_not_last(piece, chat))
    return list(pieces[: at + 1])


def _not_last(piece: Raw, chat: bool) -> str:
    if chat:
        return "a left-to-right model answers last; let {mask} end an {assistant} turn that is the last one"
    fixed = "a soft block" if isinstance(piece, Fixed) and piece.virtual else "a special token"
    got = fixed if isinstance(piece, Fixed) else repr(str(piece))
    return (
        f"a left-to-right model does not see what stands after {{mask}}, got {got} there; let {{mask}} come last "
        "(only closing punctuation may follow it), or use a masked or an encoder-decoder backbone"
    )


def check_masks(kind: Kind, pieces: Iterable[Piece | Raw], lengths: Sequence[int]) -> None:
    """A kind of backbone answers at one place, at several, or (masked) at least at one."""
    masks = sum(isinstance(p, Mask) for p in pieces)
    if kind == "masked" and not masks:
        raise TemplateError(
            "a masked model answers at {mask}, got none; write for example '{text} It was {mask}.', or load it as a "
            "sentence encoder: kind='encoder'"
        )
    if kind in ("causal", "seq2seq") and masks > 1:
        what = "a left-to-right model" if kind == "causal" else "an encoder-decoder"
        raise TemplateError(f"{what} gives one answer, got {masks} masks; leave one {{mask}}, or use a masked backbone")
    if masks > 1 and tuple(lengths) != (1,):
        raise TemplateError(
            f"with {masks} masks each answer is one token, got label words of {', '.join(map(str, lengths))} tokens; "
            "choose words that are one token each, or use one {mask}"
        )
