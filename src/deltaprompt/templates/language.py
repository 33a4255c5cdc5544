"""The template language: `parse("{text|lower} It was {mask}.")` -> an immutable tree; `str` of a tree is its source.

    {text}  {text|nodot|lower}                  a field of the example, its filters applied left to right
    {text|truncate:head}  {text|keep}           where a field is cut when the whole is too long (tail), or never
    {mask}                                      an answer position
    {soft:20}  {soft:20:intro}  {soft:"Or so"}  trainable tokens: a block of its own, shared by name, begun from words
    {system}  {user}  {assistant}               a turn of a chat, up to the next one
    {{  }}                                      braces as they are

White space inside a piece means nothing. A tree checks itself: one built by hand obeys the rules of a parsed one.
"""

from __future__ import annotations

import re
import typing
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, pairwise

from deltaprompt.errors import TemplateError, nearest
from deltaprompt.templates.filters import FILTERS, apply_filters, filter_named, text_of

Cut: typing.TypeAlias = typing.Literal["tail", "head", "middle"]
RoleName: typing.TypeAlias = typing.Literal["system", "user", "assistant"]

CUTS: typing.Final[dict[str, Cut]] = {"tail": "tail", "head": "head", "middle": "middle"}
ROLES: typing.Final[dict[str, RoleName]] = {"system": "system", "user": "user", "assistant": "assistant"}
FLAGS: typing.Final = ("truncate", "keep")
RESERVED: typing.Final = ("mask", "soft", *ROLES)
LONGEST_SOFT: typing.Final = 1000  # tokens in one block; ours: beyond it a context window is the limit
WIDEST: typing.Final = 120  # characters of the template that an error shows: one line of a wide terminal

_SPACE = re.compile(r"\s*")
_TEXT = re.compile(r"(?:[^{}]+|\{\{|\}\})+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SIZE = re.compile(r'[0-9]+|"')
_QUOTED = re.compile(r'(?:[^"\\]+|\\["\\])*')
_ESCAPED = re.compile(r'\\(["\\])')
_COLON, _BAR, _QUOTE, _CLOSE = (re.compile(re.escape(sign)) for sign in ':|"}')

_NAME_RULE = "a name is made of the letters a-z and A-Z, digits and _"
_SOFT_RULE = 'write {soft:20}, {soft:20:name} or {soft:"some words"}'


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that stands in the prompt as it is."""

    text: str

    def __str__(self) -> str:
        return self.text.replace("{", "{{").replace("}", "}}")


@dataclass(frozen=True, slots=True)
class Field:
    """`{name|filter|…}`: a text of the example; when the whole is too long it loses its `cut` side, unless `keep`."""

    name: str
    filters: tuple[str, ...] = ()
    keep: bool = False
    cut: Cut = "tail"

    def __post_init__(self) -> None:
        _check_name(self.name, RESERVED)
        for name in self.filters:
            filter_named(name)
        if self.cut not in CUTS:
            raise TemplateError(_unknown_cut(self.cut))
        if self.keep and self.cut != "tail":
            raise TemplateError(f"the field {self.name!r} is kept, so it has no side to cut; drop keep or cut")

    def __str__(self) -> str:
        flag = "|keep" if self.keep else "" if self.cut == "tail" else f"|truncate:{self.cut}"
        return "{" + "|".join((self.name, *self.filters)) + flag + "}"

    def value(self, example_fields: Mapping[str, object]) -> str:
        """The filtered text of this field in an example, or an error that names what the example has."""
        return apply_filters(text_of(example_fields, self.name), self.filters)


@dataclass(frozen=True, slots=True)
class Mask:
    """`{mask}`: a position where the answer is read."""

    def __str__(self) -> str:
        return "{mask}"


@dataclass(frozen=True, slots=True)
class Soft:
    """`{soft:size}`, `{soft:size:name}` or `{soft:"words"}`: trainable tokens; blocks of one name are one block."""

    size: int | None = None
    words: str | None = None
    name: str | None = None  # of a block begun from words: the words

    def __post_init__(self) -> None:
        if (self.size is None) == (self.words is None):
            raise TemplateError(f"a soft block has either a size or words, got {self.size!r}, {self.words!r}")
        if self.words is None:
            self._check_sized()
        elif not self.words.strip():
            raise TemplateError(f"a soft block needs at least one word to begin from; {_SOFT_RULE}")
        elif self.name not in (None, self.words):
            raise TemplateError(f"soft words are their own name, got {self.name!r} too; leave the name out")
        else:
            object.__setattr__(self, "name", self.words)

    def _check_sized(self) -> None:
        if self.size is None or not 1 <= self.size <= LONGEST_SOFT:
            raise TemplateError(f"a soft block has 1 to {LONGEST_SOFT} tokens, got {self.size}")
        if self.name is not None:
            _check_name(self.name)

    def __str__(self) -> str:
        if self.words is not None:
            return '{soft:"' + self.words.replace("\\", "\\\\").replace('"', '\\"') + '"}'
        return f"{{soft:{self.size}" + (f":{self.name}" if self.name else "") + "}"


@dataclass(frozen=True, slots=True)
class Role:
    """`{system}`, `{user}` or `{assistant}`: a turn of a chat begins."""

    name: RoleName

    def __post_init__(self) -> None:
        if self.name not in ROLES:
            raise TemplateError(f"there is no role {self.name!r}{nearest(self.name, ROLES)}")

    def __str__(self) -> str:
        return f"{{{self.name}}}"


Piece: typing.TypeAlias = Literal | Field | Mask | Soft | Role


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
        for _, reason in _faults(self.pieces):
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
    def is_chat(self) -> bool:
        """Whether the pieces are turns of a chat."""
        return any(isinstance(piece, Role) for piece in self.pieces)

    def turns(self) -> tuple[Turn, ...]:
        """The turns of a chat, without the white space around each; none when there is no role."""
        turns: list[tuple[RoleName, list[Piece]]] = []
        for piece in self.pieces:
            if isinstance(piece, Role):
                turns.append((piece.name, []))
            elif turns:
                turns[-1][1].append(piece)
        return tuple(Turn(role, _trimmed(said)) for role, said in turns)


def _check_name(name: str, reserved: Sequence[str] = ()) -> None:
    if not _NAME.fullmatch(name):
        raise TemplateError(f"{name!r} is not a name; {_NAME_RULE}")
    if name in reserved:
        raise TemplateError(f"{name!r} cannot be a field: it is a word of the language ({', '.join(reserved)})")


def _unknown_cut(where: str) -> str:
    return f"truncate says where to cut, got {where!r}{nearest(where, CUTS)}"


def _merged(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """The same pieces with adjacent literals joined and empty ones dropped."""
    merged: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Literal) and merged and isinstance(merged[-1], Literal):
            merged[-1] = Literal(merged[-1].text + piece.text)
        elif piece != Literal(""):
            merged.append(piece)
    return tuple(merged)


def _trimmed(said: list[Piece]) -> tuple[Piece, ...]:
    if said and isinstance(said[0], Literal):
        said = [Literal(said[0].text.lstrip()), *said[1:]]
    if said and isinstance(said[-1], Literal):
        said = [*said[:-1], Literal(said[-1].text.rstrip())]
    return _merged(said)


def _faults(pieces: Sequence[Piece]) -> Iterator[tuple[int, str]]:
    """What is wrong with the pieces together: (the number of the piece, the reason)."""
    if not pieces:
        yield 0, "the template is empty; write for example '{text} It was {mask}.'"
    yield from chain(_soft_faults(pieces), _role_faults(pieces))


def _soft_faults(pieces: Sequence[Piece]) -> Iterator[tuple[int, str]]:
    known: dict[str, Soft] = {}
    for i, soft in enumerate(pieces):
        if isinstance(soft, Soft) and soft.name is not None and known.setdefault(soft.name, soft) != soft:
            yield i, f"{soft} was {known[soft.name]} before; one name is one block: rename one, or write both alike"


def _role_faults(pieces: Sequence[Piece]) -> Iterator[tuple[int, str]]:
    roles = [(i, piece.name) for i, piece in enumerate(pieces) if isinstance(piece, Role)]
    for i, piece in enumerate(pieces[: roles[0][0]] if roles else ()):
        if not (isinstance(piece, Literal) and piece.text.isspace()):
            yield i, f"nothing may stand before the first role, {{{roles[0][1]}}}; move it into a turn"
    for (_, before), (i, role) in pairwise(roles):
        if role == "system":
            yield i, f"{{system}} comes first or not at all, got it after {{{before}}}; move it to the start"
        if role == before:
            yield i, f"two turns of {{{role}}} in a row; join them, or put another role between"
    if roles and roles[-1][1] == "system":
        yield roles[-1][0], "the last turn is {system}; end with {user} or {assistant}"


def parse(text: str) -> Template:
    """Template source -> its tree (cached); an error shows the source with a caret under what is wrong."""
    return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Template:
    s = _Scanner(text)
    try:
        return _template(s)
    except TemplateError as error:
        raise TemplateError(_pointed(str(error), text, s.mark)) from None


@dataclass(slots=True)
class _Scanner:
    """Reads `text` from `at`; inside a piece, which began at `opened`, white space is skipped before every token."""

    text: str
    at: int = 0
    mark: int = 0  # what an error is about: the token read last, or what stands in its place
    opened: int = 0

    def has_more(self) -> bool:
        return self.at < len(self.text)

    def match(self, pattern: re.Pattern[str]) -> str | None:
        if found := pattern.match(self.text, self.at):
            self.at = found.end()
        return found and found[0]

    def take(self, pattern: re.Pattern[str]) -> str | None:
        self.match(_SPACE)
        self.mark = self.at
        return self.match(pattern)

    def need(self, pattern: re.Pattern[str], what: str, mend: str) -> str:
        got = self.take(pattern)
        if got is not None:
            return got
        if self.has_more():
            raise TemplateError(f"expected {what}, got {self.text[self.at]!r}; {mend}")
        self.mark = self.opened
        raise TemplateError("this '{' is never closed; end it with '}', or write '{{' for a brace")


def _template(s: _Scanner) -> Template:
    starts, pieces = [0], list[Piece]()
    while s.has_more():
        pieces.append(_piece(s))
        starts.append(s.at)
    for i, _ in islice(_faults(pieces), 1):
        s.at = starts[i]
        s.take(_SPACE)
    return Template(tuple(pieces))  # which says what is wrong


def _piece(s: _Scanner) -> Piece:
    if text := s.match(_TEXT):
        return Literal(text.replace("{{", "{").replace("}}", "}"))
    s.opened = s.mark = s.at
    if s.match(_CLOSE):
        raise TemplateError("this '}' closes nothing; write '}}' for a brace")
    s.at += 1
    name = s.need(_NAME, "a field, mask, soft or a role", "write '{{' for a brace")
    if name == "soft":
        return _soft(s)
    if name == "mask" or name in ROLES:
        s.need(_CLOSE, f"'}}' after {name!r}", f"write {{{name}}}: it takes no filters and no arguments")
        return Role(ROLES[name]) if name in ROLES else Mask()
    return _field(s, name)


def _field(s: _Scanner, name: str) -> Field:
    filters: list[str] = []
    flags: dict[str, Cut] = {}  # truncate or keep -> where to cut, at most one
    last = name
    while s.take(_BAR):
        last = s.need(_NAME, "a filter", f"possible: {', '.join((*FILTERS, *FLAGS))}")
        if last not in FLAGS:
            filter_named(last, FLAGS)
            filters.append(last)
        elif flags:
            raise TemplateError(f"truncate or keep stands once, got {last!r} after {min(flags)!r}; leave one out")
        else:
            flags[last] = _where(s) if last == "truncate" else "tail"
    s.need(_CLOSE, f"'|' or '}}' after {last!r}", f"{_NAME_RULE}; only truncate and soft take ':'; '{{{{' is a brace")
    return Field(name, tuple(filters), "keep" in flags, flags.get("truncate", "tail"))


def _where(s: _Scanner) -> Cut:
    if not s.take(_COLON):
        return "tail"
    where = s.need(_NAME, "a side after 'truncate:'", f"possible: {', '.join(CUTS)}")
    if where not in CUTS:
        raise TemplateError(_unknown_cut(where))
    return CUTS[where]


def _soft(s: _Scanner) -> Soft:
    s.need(_COLON, "':' after 'soft'", _SOFT_RULE)
    token = s.need(_SIZE, "a number or quoted words after 'soft:'", _SOFT_RULE)
    at = s.mark
    words = _words(s) if token == '"' else None
    size = int(token.lstrip("0")[:9] or "0") if words is None else None  # int() refuses thousands of digits
    name = s.need(_NAME, "a name after the size and ':'", _NAME_RULE) if size is not None and s.take(_COLON) else None
    s.need(_CLOSE, "'}' after the soft block", _SOFT_RULE)
    s.mark = at
    return Soft(size, words, name)


def _words(s: _Scanner) -> str:
    words = s.match(_QUOTED) or ""
    if s.match(_QUOTE):
        return _ESCAPED.sub(r"\1", words)
    if not s.has_more():
        raise TemplateError("""this '"' is never closed; end the words with '"'""")
    s.mark = s.at
    raise TemplateError(r"""a '\' in words stands only before '"' or '\'; write '\\' for a backslash""")


def _pointed(reason: str, text: str, at: int) -> str:
    """The reason, the line of the template that holds `at`, and a caret under it."""
    begin, end = text.rfind("\n", 0, at) + 1, text.find("\n", at)
    line, at = text[begin : len(text) if end < 0 else end], at - begin
    number = f" (line {text.count(chr(10), 0, begin) + 1})" if "\n" in text else ""
    low = max(0, at - WIDEST // 2) if len(line) > WIDEST else 0
    shown = "".join(c if c.isprintable() else " " for c in line[low : low + WIDEST])
    shown = ("…" + shown[1:] if low else shown) + ("…" if low + WIDEST < len(line) else "")
    return f"{reason}{number}\n  {shown}\n  {' ' * _width(shown[: at - low])}^"


def _width(text: str) -> int:
    """The columns that a terminal gives the text: two for a wide character, none for a combining one."""
    return sum((unicodedata.east_asian_width(c) in "WF") + (not unicodedata.combining(c)) for c in text)
