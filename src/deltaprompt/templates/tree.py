"""A template is an immutable sequence of pieces that obeys the rules of the language, however it was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

from deltaprompt.errors import TemplateError
from deltaprompt.templates.pieces import Demos, Encoder, Field, Literal, Mask, Piece, Prefix, Role, RoleName, Soft


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a chat: who speaks, and the pieces said, without the white space around them."""

    role: RoleName
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Template:
    """A sequence of pieces; `parse(str(template)) == template`."""

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", _merged(self.pieces))
        for _, reason in faults(self.pieces):
            raise TemplateError(reason)

    def __str__(self) -> str:
        return "".join(str(piece) for piece in self.pieces)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the example's fields that are used, in order, each once."""
        return tuple(dict.fromkeys(piece.name for piece in self.pieces if isinstance(piece, Field)))

    @property
    def masks(self) -> int:
        """The number of answer positions."""
        return sum(isinstance(piece, Mask) for piece in self.pieces)

    @property
    def softs(self) -> tuple[Soft, ...]:
        """The blocks of trainable tokens, in order: each unnamed one, and each name once."""
        return tuple(dict(self._numbered_softs()).values())

    @property
    def soft_ids(self) -> tuple[int, ...]:
        """For each `Soft` piece in order, the number of its block in `softs`."""
        return tuple(number for number, _ in self._numbered_softs())

    def _numbered_softs(self) -> Iterator[tuple[int, Soft]]:
        numbers: dict[str | int, int] = {}  # a block's name, or where it stands -> its number
        for i, piece in enumerate(self.pieces):
            if isinstance(piece, Soft):
                yield numbers.setdefault(i if piece.name is None else piece.name, len(numbers)), piece

    @property
    def prefix(self) -> Prefix | None:
        """The prefix that the template asks for."""
        return next((piece for piece in self.pieces if isinstance(piece, Prefix)), None)

    @property
    def demos(self) -> Demos | None:
        """The demonstrations that the template asks for."""
        return next((piece for piece in self.pieces if isinstance(piece, Demos)), None)

    @property
    def is_chat(self) -> bool:
        """Whether the pieces are turns of a chat."""
        return any(isinstance(piece, Role) for piece in self.pieces)

    def filled(self, example_fields: Mapping[str, object]) -> str:
        """The text of a template that has nothing but text and fields."""
        return "".join(p.value(example_fields) if isinstance(p, Field) else str(p) for p in self._spoken())

    def _spoken(self) -> Iterator[Field | str]:
        for piece in self.pieces:
            if not isinstance(piece, Literal | Field):
                raise TemplateError(f"only text and fields can be filled, got {piece}")
            yield piece if isinstance(piece, Field) else piece.text

    @staticmethod
    def from_openprompt(text: str, encoder: Encoder | None = None) -> Template:
        """The template that a text in OpenPrompt's language means; no code in it is run.

        Args:
            text: of one template, as `{"placeholder": "text_a"} It was {"mask"}.`.
            encoder: the network that computes its soft tokens: "lstm" where the text is of OpenPrompt's P-tuning
                templates, "mlp" where of its PTR templates.
        """
        from deltaprompt.templates.openprompt import read

        return read(text, encoder)

    @staticmethod
    def all_from_openprompt(path: str | Path, encoder: Encoder | None = None) -> tuple[Template, ...]:
        """The templates of a file of OpenPrompt's, one a line; see `from_openprompt`."""
        from deltaprompt.templates.openprompt import read_all

        return read_all(path, encoder)

    def turns(self) -> tuple[Turn, ...]:
        """The turns of a chat, without the white space around each; none when there is no role."""
        turns: list[tuple[RoleName, list[Piece]]] = []
        for piece in self.pieces:
            if isinstance(piece, Role):
                turns.append((piece.name, []))
            elif turns and not isinstance(piece, Prefix):  # which stands for no token
                turns[-1][1].append(piece)
        return tuple(Turn(role, _trimmed(said)) for role, said in turns)


def _merged(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """The same pieces with adjacent literals joined and empty ones dropped."""
    merged: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Literal) and merged and isinstance(merged[-1], Literal):
            merged[-1] = Literal(merged[-1].text + piece.text)
        elif piece != Literal(""):
            merged.append(piece)
    return tuple(merged)


def _trimmed(said: Sequence[Piece]) -> tuple[Piece, ...]:
    said = list(_merged(said))
    if said and isinstance(said[0], Literal):
        said = [Literal(said[0].text.lstrip()), *said[1:]]
    if said and isinstance(said[-1], Literal):
        said = [*said[:-1], Literal(said[-1].text.rstrip())]
    return _merged(said)


def faults(pieces: Sequence[Piece]) -> Iterator[tuple[int, str]]:
    """What is wrong with the pieces together: (the number of the piece, the reason)."""
    if not pieces:
        yield 0, "the template is empty; write for example '{text} It was {mask}.'"
    yield from chain(_soft_faults(pieces), _twice(pieces), _role_faults(pieces))


def _soft_faults(pieces: Sequence[Piece]) -> Iterator[tuple[int, str]]:
    known: dict[str, Soft] = {}
    for i, soft in enumerate(pieces):
        if isinstance(soft, Soft) and soft.name is not None and known.setdefault(soft.name, soft) != soft:
            yield i, f"{soft} was {known[soft.name]} before; one name is one block: rename one, or write both alike"


def _twice(pieces: Sequence[Piece]) -> Iterator[tuple[int, str]]:
    for kind in (Prefix, Demos):
        found = [(i, piece) for i, piece in enumerate(pieces) if isinstance(piece, kind)]
        for i, piece in found[1:]:
            name = "prefix" if kind is Prefix else "demos"
            yield i, f"{name} stands once in a template, got {piece} after {found[0][1]}; leave one out"


def _role_faults(pieces: Sequence[Piece]) -> Iterator[tuple[int, str]]:
    roles = [(i, piece.name) for i, piece in enumerate(pieces) if isinstance(piece, Role)]
    for i, piece in enumerate(pieces[: roles[0][0]] if roles else ()):
        if not (isinstance(piece, Prefix) or (isinstance(piece, Literal) and piece.text.isspace())):
            yield i, f"nothing may stand before the first role, {{{roles[0][1]}}}; move it into a turn"
    for (_, before), (i, role) in pairwise(roles):
        if role == "system":
            yield i, f"{{system}} comes first or not at all, got it after {{{before}}}; move it to the start"
        if role == before:
            yield i, f"two turns of {{{role}}} in a row; join them, or put another role between"
    if roles and roles[-1][1] == "system":
        yield roles[-1][0], "the last turn is {system}; end with {user} or {assistant}"
