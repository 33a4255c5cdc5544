"""The template language: `parse("{text|lower} It was {mask}.")` -> an immutable tree; `str` of a tree is its source.

    {text}  {meta.word}  {text|nodot|lower}     a field of the example, its filters applied left to right
    {text|truncate:head}  {text|keep}           where a field is cut when the whole is too long (tail), or never
    {mask}                                      an answer position
    {special:sep}                               the tokenizer's own token: bos, eos, sep, cls or pad
    {soft:20}  {soft:20:intro}  {soft:"Or so"}  trainable tokens: a block of its own, shared by name, begun from words
    {soft:5|tied}  {soft:5|lstm}  {soft:5|mlp}  five times one trained row; rows that a network computes (P-tuning)
    {prefix:6}                                  trainable keys and values in front of every attention
    {demos:3}  {demos:3:nearest}                answered examples, drawn by a seed or the nearest
    {system}  {user}  {assistant}               a turn of a chat, up to the next one
    {{  }}                                      braces as they are

White space inside a piece means nothing. A tree checks itself: one built by hand obeys the rules of a parsed one.
"""

from __future__ import annotations

import re
import typing
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from deltaprompt.errors import TemplateError, nearest
from deltaprompt.templates.filters import FILTERS, filter_named
from deltaprompt.templates.pieces import (
    BYS,
    CUTS,
    DOTTED,
    ENCODERS,
    FIELD_RULE,
    NAME,
    NAME_RULE,
    ROLES,
    SOFT_RULE,
    SPECIALS,
    WORDS_RULE,
    Cut,
    Demos,
    Field,
    Literal,
    Mask,
    Piece,
    Prefix,
    Role,
    Soft,
    Special,
    unknown_choice,
    unknown_cut,
    unknown_special,
)
from deltaprompt.templates.tree import Template, faults

FLAGS: typing.Final = ("truncate", "keep")
SOFT_FLAGS: typing.Final = ("tied", *ENCODERS)
WIDEST: typing.Final = 120  # characters of the template that an error shows: one line of a wide terminal

_SPACE = re.compile(r"\s*")
_TEXT = re.compile(r"(?:[^{}]+|\{\{|\}\})+")
_NUMBER = re.compile(r"[0-9]+")
_SIZE = re.compile(r'[0-9]+|"')
_QUOTED = re.compile(r'(?:[^"\\]+|\\["\\])*')
_ESCAPED = re.compile(r'\\(["\\])')
_COLON, _BAR, _QUOTE, _CLOSE = (re.compile(re.escape(sign)) for sign in ':|"}')


def parse(text: str) -> Template:
    """Template source -> its tree (cached); an error shows the source with a caret under what is wrong."""
    return _parse(text)


@lru_cache(maxsize=1024)
def _parse(text: str) -> Template:
    s = _Scanner(text)
    try:
        return _template(s)
    except TemplateError as error:
        raise TemplateError(pointed(str(error), text, s.mark)) from None


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
    for i, _ in islice(faults(pieces), 1):
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
    name = s.need(DOTTED, "a field, mask, soft, special, prefix, demos or a role", "write '{{' for a brace")
    if name in _WITH_ARGUMENTS:
        return _WITH_ARGUMENTS[name](s)
    if name == "mask" or name in ROLES:
        s.need(_CLOSE, f"'}}' after {name!r}", f"write {{{name}}}: it takes no filters and no arguments")
        return Role(ROLES[name]) if name in ROLES else Mask()
    return _field(s, name)


def _field(s: _Scanner, name: str) -> Field:
    filters: list[str] = []
    flags: dict[str, Cut] = {}  # truncate or keep -> where to cut, at most one
    last = name
    while s.take(_BAR):
        last = s.need(NAME, "a filter", f"possible: {', '.join((*FILTERS, *FLAGS))}")
        if last not in FLAGS:
            filter_named(last, FLAGS)
            filters.append(last)
        elif flags:
            raise TemplateError(f"truncate or keep stands once, got {last!r} after {min(flags)!r}; leave one out")
        else:
            flags[last] = _where(s) if last == "truncate" else "tail"
    mend = f"{FIELD_RULE}; after a field's name only truncate takes ':'; '{{{{' is a brace"
    s.need(_CLOSE, f"'|' or '}}' after {last!r}", mend)
    return Field(name, tuple(filters), "keep" in flags, flags.get("truncate", "tail"))


def _where(s: _Scanner) -> Cut:
    if not s.take(_COLON):
        return "tail"
    where = s.need(NAME, "a side after 'truncate:'", f"possible: {', '.join(CUTS)}")
    if where not in CUTS:
        raise TemplateError(unknown_cut(where))
    return CUTS[where]


def _special(s: _Scanner) -> Special:
    mend = f"possible: {', '.join(SPECIALS)}"
    s.need(_COLON, "':' after 'special'", f"write {{special:sep}}; {mend}")
    name = s.need(NAME, "a name after 'special:'", mend)
    if name not in SPECIALS:
        raise TemplateError(unknown_special(name))
    s.need(_CLOSE, f"'}}' after {name!r}", f"write {{special:{name}}}: it takes no filters")
    return Special(SPECIALS[name])


def _prefix(s: _Scanner) -> Prefix:
    length, at = _count(s, "prefix", "write {prefix:6}")
    s.need(_CLOSE, "'}' after the length of the prefix", "write {prefix:6}")
    s.mark = at
    return Prefix(length)


def _demos(s: _Scanner) -> Demos:
    rule = "write {demos:3} or {demos:3:nearest}"
    count, at = _count(s, "demos", rule)
    by = s.need(NAME, "a way of choosing after ':'", f"possible: {', '.join(BYS)}") if s.take(_COLON) else "seeded"
    if by not in BYS:
        raise TemplateError(unknown_choice(by))
    s.need(_CLOSE, "'}' after the demonstrations", rule)
    s.mark = at
    return Demos(count, BYS[by])


def _count(s: _Scanner, name: str, mend: str) -> tuple[int, int]:
    """The number after `{name:`, and where it stands."""
    s.need(_COLON, f"':' after {name!r}", mend)
    return _number(s.need(_NUMBER, f"a number after '{name}:'", mend)), s.mark


def _number(digits: str) -> int:
    return int(digits.lstrip("0")[:9] or "0")  # int() refuses thousands of digits


def _soft(s: _Scanner) -> Soft:
    s.need(_COLON, "':' after 'soft'", SOFT_RULE)
    token = s.need(_SIZE, "a number or quoted words after 'soft:'", SOFT_RULE)
    at = s.mark
    words = _words(s) if token == '"' else None
    size = _number(token) if words is None else None
    name = s.need(NAME, "a name after ':'", NAME_RULE) if s.take(_COLON) else None
    flags = _soft_flags(s, words)
    s.need(_CLOSE, "'}' after the soft block", SOFT_RULE)
    s.mark = at
    return Soft(size, words, name, "tied" in flags, next((ENCODERS[f] for f in flags if f in ENCODERS), None))


def _soft_flags(s: _Scanner, words: str | None) -> list[str]:
    """tied, and at most one network."""
    flags: list[str] = []
    while s.take(_BAR):
        flag = s.need(NAME, "tied, lstm or mlp", "a soft block takes no filters")
        if flag not in SOFT_FLAGS:
            raise TemplateError(f"a soft block is tied or has a network, got {flag!r}{nearest(flag, SOFT_FLAGS)}")
        if words is not None:
            raise TemplateError(WORDS_RULE)
        for before in flags:
            if before == flag or {before, flag} <= ENCODERS.keys():
                raise TemplateError(f"tied and one network stand once, got {flag!r} after {before!r}; leave one out")
        flags.append(flag)
    return flags


def _words(s: _Scanner) -> str:
    words = s.match(_QUOTED) or ""
    if s.match(_QUOTE):
        return _ESCAPED.sub(r"\1", words)
    if not s.has_more():
        raise TemplateError("""this '"' is never closed; end the words with '"'""")
    s.mark = s.at
    raise TemplateError(r"""a '\' in words stands only before '"' or '\'; write '\\' for a backslash""")


_WITH_ARGUMENTS: typing.Final[dict[str, Callable[[_Scanner], Piece]]] = {
    "soft": _soft,
    "special": _special,
    "prefix": _prefix,
    "demos": _demos,
}


def pointed(reason: str, text: str, at: int) -> str:
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
