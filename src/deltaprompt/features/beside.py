"""How demonstrations stand beside a text: the template once more for each, as many whole ones as there is room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Final

from deltaprompt.errors import TemplateError
from deltaprompt.features.codec import Codec, Tokens
from deltaprompt.features.demonstrations import Demonstrations
from deltaprompt.features.layout import Kind, Layout
from deltaprompt.features.truncate import Filled, kept, shares
from deltaprompt.templates import Field, Literal, Mask, Piece, Prefix, Role, Soft, Special, Template
from deltaprompt.types import Example

LEAST: Final = 16  # tokens of a demonstration's texts that are never cut
SLACK: Final = 2  # tokens by which a demonstration's length may differ between others and by itself
LAYOUTS: Final = 256  # kept: those of one draw, shortened and without a text's own
SPECIMEN: Final = Literal("x")  # stands for any text


@dataclass(frozen=True, slots=True)
class Text:
    """An example in a layout, tokenised and not cut yet."""

    layout: Layout
    runs: list[tuple[Filled, Tokens]]
    around: int  # tokens that are not text, the answer's own among them

    @property
    def length(self) -> int:
        """The tokens that it has in all."""
        return self.around + sum(len(tokens.ids) for _, tokens in self.runs)


@dataclass(frozen=True)
class Form:
    """A template around its `{demos}`: what stands once, and what a demonstration repeats.

    A demonstration is the side of the template, before or behind `{demos}`, that has the fields and `{mask}`s; the
    other side stands once. Each is joined to the next by what the template has there; by a line end where an answer or
    a text would touch the next one.
    """

    before: tuple[Piece, ...]
    own: tuple[Piece, ...]  # the text's, and filled each demonstration's
    after: tuple[Piece, ...]
    kind: Kind
    first: bool = True  # demonstrations stand before the text

    @classmethod
    def of(cls, template: Template, kind: Kind) -> Form:
        """Of a template with `{demos}`."""
        if not template.masks:
            raise TemplateError(
                "a demonstration shows its answer at {mask}, got none; write for example "
                r'"{demos:4}{text} Topic: {mask}\n"'
            )
        pieces = _named(template)
        at = next(i for i, piece in enumerate(pieces) if piece == template.demos)
        before, after = pieces[:at], pieces[at + 1 :]
        if template.is_chat:
            return cls._turns(before, after, kind)
        if _asks(before) and _asks(after):
            raise TemplateError(
                "fields and {mask} stand on one side of {demos}, got some before it and some behind it; move {demos} "
                "to the start of the template"
            )
        if not _asks(before):
            return cls(before, after, (), kind)
        if kind == "causal":
            raise TemplateError(
                "a left-to-right model sees only what stands before its answer, got {demos} behind it; move {demos} to "
                "the start of the template"
            )
        return cls((), before, after, kind, first=False)

    @classmethod
    def _turns(cls, before: tuple[Piece, ...], after: tuple[Piece, ...], kind: Kind) -> Form:
        """In a chat each demonstration is the turns from that of `{demos}` on, which is a user's."""
        begins = next((i for i in range(len(before) - 1, -1, -1) if isinstance(before[i], Role)), 0)
        blank = all(isinstance(p, Literal) and p.text.isspace() for p in before[begins + 1 :])
        last = [p.name for p in after if isinstance(p, Role)][-1:]
        if before[begins:] and before[begins] == Role("user") and blank and last == ["assistant"]:
            return cls(before[:begins], (before[begins], *after), (), kind)
        raise TemplateError(
            "in a chat demonstrations are earlier turns: {demos} opens a {user} turn, and {mask} is in a last turn of "
            "the {assistant}; write for example '{user}{demos:4}{text}{assistant}{mask}'"
        )

    def filled(self, texts: Mapping[int, str], words: Sequence[str]) -> tuple[Piece, ...]:
        """A demonstration: the texts of the fields by their places in `own`, and a word at each `{mask}`."""
        answers = iter(words)

        def fill(i: int, piece: Piece) -> Piece:
            if isinstance(piece, Field):
                return Literal(texts[i])
            return Literal(next(answers)) if isinstance(piece, Mask) else piece

        return tuple(fill(i, piece) for i, piece in enumerate(self.own) if not isinstance(piece, Prefix))

    def around(self, shown: Sequence[tuple[Piece, ...]]) -> Template:
        """The template with these demonstrations, the one that stands nearest to the text first."""
        join = (Literal(self._between),)
        own = self._answered()
        if self.first:
            pieces = [*self.before, *(p for demo in reversed(shown) for p in (*demo, *join)), *own]
        else:
            pieces = [*own, *(p for demo in shown for p in (*join, *demo)), *self.after]
        return Template(tuple(pieces))

    def specimen(self) -> Template:
        """The template with one demonstration of no matter what."""
        texts = {i: SPECIMEN.text for i in range(len(self.own))}
        return self.around([self.filled(texts, [SPECIMEN.text] * len(self.own))])

    def _answered(self) -> tuple[Piece, ...]:
        """The text's own pieces; a left-to-right model's end at its answer, what follows being for demonstrations."""
        if self.kind == "causal" and len(self.own) > 1 and isinstance(self.own[-1], Literal):
            return self.own[:-1] if isinstance(self.own[-2], Mask) else self.own
        return self.own

    @property
    def _between(self) -> str:
        head, tail = self.own[0], self.own[-1]
        if isinstance(tail, Literal | Special) or isinstance(head, Special | Role):
            return ""
        return "" if isinstance(head, Literal) and head.text[0].isspace() else "\n"


class Beside:
    """Puts demonstrations beside texts: as many whole ones as fit beside a whole text, the nearest ones.

    A demonstration's own texts are cut beforehand, as the template says, so that all and a text like them have room:
    each has `max_length / (count + 1)` tokens, and more only for the template's words and LEAST of text.

    Args:
        form: of the template.
        demonstrations: what there is to show.
        room: tokens of a sequence at most.
        codec: of the tokenizer.
        lay: a template without `{demos}` -> its layout.
        read: examples in layouts, tokenised.
    """

    def __init__(
        self,
        form: Form,
        demonstrations: Demonstrations,
        room: int,
        codec: Codec,
        lay: Callable[[Template], Layout],
        read: Callable[[Sequence[tuple[Layout, Example]]], list[Text]],
    ) -> None:
        self.form = form
        self.demonstrations = demonstrations
        self.room = room
        self.codec = codec
        self.lay = lay
        self.read = read
        self._demos: dict[int, tuple[Piece, ...]] = {}
        self._layouts: dict[tuple[int, ...], Layout] = {}

    def arranged(self, examples: Sequence[Example]) -> list[tuple[Text, tuple[int, ...]]]:
        """Each example beside the rows that fit, and their numbers, the one that stands nearest to it first."""
        found: dict[int, tuple[Text, tuple[int, ...]]] = {}
        waiting = dict(enumerate(self.demonstrations.ranked(examples)))
        while waiting:
            texts = self.read([(self._layout(ranks), examples[i]) for i, ranks in waiting.items()])
            found |= {i: (text, ranks) for text, (i, ranks) in zip(texts, waiting.items(), strict=True)}
            over = {i: found[i][0].length - self.room for i, ranks in waiting.items() if ranks}
            waiting = {i: self._fewer(found[i][1], excess) for i, excess in over.items() if excess > 0}
        return [found[i] for i in range(len(examples))]

    def in_order(self, ranks: Sequence[int]) -> list[Example]:
        """The rows of these numbers, in their order from the start of the prompt."""
        return [self.demonstrations.rows[i] for i in (reversed(ranks) if self.form.first else ranks)]

    def check(self) -> None:
        """An error where not one demonstration fits even beside an empty text."""
        least = min(self._lengths[i] for i in range(len(self.demonstrations.rows)))
        if least > self.room:
            raise TemplateError(
                f"not one demonstration fits: with the shortest the prompt has {least} tokens and no text yet, and "
                f"max_length is {self.room}; raise max_length, or shorten the template's words and what it keeps"
            )

    def _fewer(self, ranks: tuple[int, ...], excess: int) -> tuple[int, ...]:
        """Without those that stand farthest from the text: no more of them than must go."""
        while ranks and excess > 0:
            excess -= self._lengths[ranks[-1]] - self._bare + SLACK
            ranks = ranks[:-1]
        return ranks

    @cached_property
    def _lengths(self) -> list[int]:
        """Tokens of a row without a text, with each of the demonstrations alone."""
        rows = range(len(self.demonstrations.rows))
        return [text.length for text in self.read([(self._layout((i,)), self._blank) for i in rows])]

    @cached_property
    def _bare(self) -> int:
        """The same without any."""
        return self.read([(self._layout(()), self._blank)])[0].length

    @property
    def _blank(self) -> Example:
        return Example(dict.fromkeys(self.demonstrations.fields, ""))

    def _layout(self, ranks: tuple[int, ...]) -> Layout:
        """The layout with these rows."""
        if ranks not in self._layouts:
            if len(self._layouts) == LAYOUTS:
                self._layouts.clear()
            self._layouts[ranks] = self.lay(self.form.around([self._pieces(i) for i in ranks]))
        return self._layouts[ranks]

    def _pieces(self, number: int) -> tuple[Piece, ...]:
        """The demonstration that a row makes."""
        if number not in self._demos:
            self._demos[number] = self._made(self.demonstrations.rows[number])
        return self._demos[number]

    def _made(self, row: Example) -> tuple[Piece, ...]:
        fields = {i: piece for i, piece in enumerate(self.form.own) if isinstance(piece, Field)}
        texts = {i: field.value(row.fields) for i, field in fields.items()}
        words = self.demonstrations.words[str(row.label)]
        cuts = {i: field for i, field in fields.items() if not field.keep}
        asks = self.codec.encode((texts[i], False) for i in cuts)
        tokens = {i: asks[texts[i], False] for i in cuts}
        around = self.form.filled({**texts, **dict.fromkeys(cuts, "")}, words)
        stays = len(self.codec.one("".join(p.text for p in around if isinstance(p, Literal)), False))
        share = max(self.room // (self.demonstrations.asked.count + 1) - stays, LEAST)
        for i, length in zip(cuts, shares([len(t.ids) for t in tokens.values()], share), strict=True):
            texts[i] = _cut(texts[i], tokens[i], kept(range(len(tokens[i].ids)), length, cuts[i].cut))
        return self.form.filled(texts, words)


def _cut(text: str, tokens: Tokens, places: Sequence[int]) -> str:
    """The characters of the tokens at these places."""
    if len(places) == len(tokens.ids):
        return text
    parts = (list(run) for _, run in groupby(enumerate(places), lambda pair: pair[1] - pair[0]))
    return "".join(text[tokens.spans[run[0][1]][0] : tokens.spans[run[-1][1]][1]] for run in parts)


def _asks(pieces: Iterable[Piece]) -> bool:
    return any(isinstance(piece, Field | Mask) for piece in pieces)


def _named(template: Template) -> tuple[Piece, ...]:
    """The pieces, soft blocks by names of their own: the copies in demonstrations are the same blocks."""
    return tuple(
        replace(piece, name=f"unnamed_block_{i}") if isinstance(piece, Soft) and piece.name is None else piece
        for i, piece in enumerate(template.pieces)
    )
