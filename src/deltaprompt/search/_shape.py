"""Where gaps and a label's word stand around the fields: `{text} <X> <word> <Y>`, as one with sentinels reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from deltaprompt.backbone import Backbone, Kind
from deltaprompt.errors import ConfigError
from deltaprompt.features.codec import Codec
from deltaprompt.features.truncate import shares
from deltaprompt.search._beam import SENTINELS
from deltaprompt.templates import Field, Literal, Piece, Template, parse
from deltaprompt.types import Example

MARKS: Final = ("<X>", "<word>", "<Y>")
SPLIT: Final = re.compile("(" + "|".join(map(re.escape, MARKS)) + ")")
ANCHOR: Final = "a"  # stands before a fill where it is written out, so that its own blank is kept


@dataclass(frozen=True)
class Shape:
    """Marks and, between them, pieces of a template, in order."""

    source: str
    parts: tuple[str | Template, ...]

    @classmethod
    def of(cls, source: str) -> Shape:
        """Reads a shape; each mark stands once, in their order, and there is a field."""
        pieces = [piece.strip() for piece in SPLIT.split(source)]
        parts = tuple(piece if piece in MARKS else parse(piece) for piece in pieces if piece)
        if tuple(part for part in parts if isinstance(part, str)) != MARKS:
            raise ConfigError(
                f"the shape {source!r} has <X>, <word> and <Y> once each and in this order; write for example "
                "'{text} <X> <word> <Y>'"
            )
        inner = [piece for part in parts if isinstance(part, Template) for piece in part.pieces]
        if odd := [str(piece) for piece in inner if not isinstance(piece, Field | Literal)]:
            raise ConfigError(f"the shape {source!r} has {odd[0]}; besides its marks it has fields and words only")
        if not any(isinstance(piece, Field) for piece in inner):
            raise ConfigError(
                f"the shape {source!r} has no field, so all rows would read alike; put one in, as {{text}}"
            )
        return cls(source, parts)

    def token_ids(
        self, generator: Backbone, rows: Sequence[Example], words: Mapping[str, str], max_length: int
    ) -> list[list[int]]:
        """Each row with its label's word between the sentinels; texts are cut at their end where it is too long."""
        codec, known = Codec(generator.tokenizer), generator.tokenizer.get_vocab()
        marks = {"<X>": [known[SENTINELS[0]]], "<Y>": [known[SENTINELS[1]]]}
        room = min(max_length, generator.max_length) - len(codec.before) - len(codec.after)
        texts = [[self._text(part, row, words) for part in self.parts] for row in rows]
        asks = [[(text, not n) for n, text in enumerate(own)] for own in texts]
        tokens = codec.encode(ask for own in asks for ask in own if ask[0])
        found = []
        for own in asks:
            ids = [
                marks[part] if isinstance(part, str) and part in marks else tokens[ask].ids
                for part, ask in self._with(own)
            ]
            found.append([*codec.before, *self._cut(ids, room), *codec.after])
        return found

    def template(self, generator: Backbone, gaps: Sequence[Sequence[int]]) -> str:
        """The template that fills of the gaps make, `{mask}` in place of the word."""
        made = ""
        for part in self.parts:
            if part == "<word>":
                made += " {mask}"
            elif isinstance(part, str):
                made += str(Literal(written_out(generator, gaps[part == "<Y>"])))
            else:
                made += f" {part}"
        return made.strip()

    def _with(self, own: Sequence[tuple[str, bool]]) -> zip[tuple[str | Template, tuple[str, bool]]]:
        return zip(self.parts, own, strict=True)

    def _text(self, part: str | Template, row: Example, words: Mapping[str, str]) -> str:
        """What a part is in a row, with a blank before it where it goes on; nothing for a gap."""
        if part == "<word>":
            text = words[str(row.label)]
        elif isinstance(part, str):
            return ""
        else:
            text = "".join(written(piece, row) for piece in part.pieces)
        return text.strip() if part is self.parts[0] else " " + text.strip()

    def _cut(self, ids: Sequence[Sequence[int]], room: int) -> list[int]:
        """All parts one after another, those with fields cut to what is left for them."""
        long = [n for n, part in enumerate(self.parts) if isinstance(part, Template) and part.fields]
        left = room - sum(len(own) for n, own in enumerate(ids) if n not in long)
        if left < len(long):
            raise ConfigError(
                f"max_length leaves {max(left, 0)} tokens for the texts of {self.source!r}; make it longer"
            )
        share = dict(zip(long, shares([len(ids[n]) for n in long], left), strict=True))
        return [i for n, own in enumerate(ids) for i in own[: share.get(n, len(own))]]


def written(piece: Piece, row: Example) -> str:
    """What a piece of a shape is in a row."""
    if isinstance(piece, Field):
        return piece.value(row.fields)
    return piece.text if isinstance(piece, Literal) else str(piece)


def usual_shapes(template: Template, kind: Kind) -> tuple[str, ...]:
    """The paper's shapes for one text or two: gaps before the text, behind it, or between the two."""
    fields = list(dict.fromkeys(str(piece) for piece in template.pieces if isinstance(piece, Field)))
    if len(fields) == 1:
        behind = f"{fields[0]} <X> <word> <Y>"
        return (behind,) if kind == "causal" else (behind, f"<X> <word> <Y> {fields[0]}")
    if len(fields) == 2:
        return (f"{fields[0]} <X> <word> <Y> {fields[1]}",)
    raise ConfigError(
        f"the template has {len(fields)} fields, and there are usual shapes for one or two; give shapes, such as "
        "'{title} <X> <word> <Y> {text}'"
    )


def written_out(generator: Backbone, ids: Sequence[int]) -> str:
    """Tokens as text, with the blank before them where they begin a word."""
    lead = Codec(generator.tokenizer).one(ANCHOR)
    alone, whole = (
        generator.tokenizer.decode(given, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for given in (lead, [*lead, *ids])
    )
    return str(whole[len(alone) :])
