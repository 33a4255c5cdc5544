"""OpenPrompt's template language, read and never run: `{"placeholder": "text_a"} It was {"mask"}.` -> a `Template`.

| there | here |
|---|---|
| `{"placeholder": "text_a"}`, with `"shortenable": False` | `{text_a}`, `{text_a|keep}` |
| `{"meta": "word"}`, with `"shortenable": True` | `{meta.word|keep}`, `{meta.word}` |
| `{"mask"}`, `{"special": "<sep>"}`, `{"text": "It was"}` | `{mask}`, `{special:sep}`, `It was` |
| `{"soft"}`, `{"soft": None, "duplicate": 5}`, with `"same": True` | `{soft:1}`, `{soft:5}`, `{soft:5|tied}` |
| `{"soft": "Or so"}`, with `"soft_id": 1` | `{soft:"Or so"}`, `{soft:"Or so":soft_1}` |
| `"post_processing": lambda x: x + "."` and the other functions in `FUNCTIONS` | `|dot`, … |

Blanks in front of a piece are one blank, and none in front of a special token and at the end. The words that a soft
block begins from have theirs with them. The blank of a label word is the one in front of `{"mask"}`.
"""

from __future__ import annotations

import ast
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deltaprompt.errors import TemplateError, nearest
from deltaprompt.templates.filters import FILTERS
from deltaprompt.templates.language import pointed
from deltaprompt.templates.pieces import Encoder, Field, Literal, Mask, Piece, Soft, Special, unknown_special
from deltaprompt.templates.tree import Template

Value: typing.TypeAlias = ast.expr | None  # of a key; none for a key that stands alone, as in {"mask"}
Keys: typing.TypeAlias = Mapping[str, Value]

KINDS: typing.Final = ("placeholder", "meta", "soft", "soft_id", "mask", "special", "text")
OPTIONS: typing.Final = ("duplicate", "same", "shortenable", "post_processing", "add_prefix_space")
TAKES: typing.Final[Mapping[str, tuple[str, ...]]] = {
    "placeholder": ("shortenable", "post_processing"),
    "meta": ("shortenable", "post_processing"),
    "soft": ("soft_id", "duplicate", "same"),
}
FUNCTIONS: typing.Final[Mapping[str, tuple[str, ...]]] = {  # all that are known, as Python writes them -> our filters
    "lambda x: x": (),
    "lambda x: x + '.'": ("dot",),
    "lambda x: x[:-1]": ("chop",),
    "lambda x: x[:1].lower() + x[1:]": ("uncap",),
    "lambda x: x.strip('.')": ("nodots",),
    "lambda x: x.strip()": ("strip",),
    "lambda x: x.lower()": ("lower",),
}
ADVICE: typing.Final[Mapping[str, str]] = {  # what a function names -> what does nearly the same
    "join": "join the texts in the data, into one field",
    "rstrip": "|nodot takes a final full stop away, |strip white space at both ends",
    "strip": "|nodot takes a final full stop away, |nodots those at both ends, |strip white space",
    "lower": "|lower makes all letters small, |uncap the first",
}


def read(text: str, encoder: Encoder | None = None) -> Template:
    """The template that a text in OpenPrompt's language means; an error shows the text with a caret.

    Args:
        text: of one template.
        encoder: the network that computes its soft tokens, as in OpenPrompt's P-tuning (lstm) and PTR (mlp) templates.
    """
    reader = _Reader(encoder)
    for at, space, source, braced in _sources(text):
        try:
            reader.take(_keys(source) if braced else source, space)
        except TemplateError as error:
            raise TemplateError(pointed(str(error), text, at)) from None
    if not reader.braced:
        raise TemplateError(f'OpenPrompt\'s templates have pieces in braces, such as {{"mask"}}; got {text!r:.80}')
    return Template(tuple(reader.pieces))


def read_all(path: str | Path, encoder: Encoder | None = None) -> tuple[Template, ...]:
    """The templates of a file, one a line, blank lines left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path} cannot be read as a file of templates: {error}") from error
    found: list[Template] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(read(line.rstrip(), encoder))
            except TemplateError as error:
                raise TemplateError(f"{path}, line {number}: {error}") from error
    if not found:
        raise TemplateError(f"{path} has no template in it; write one a line")
    return tuple(found)


# Where pieces begin and end


def _sources(text: str) -> Iterator[tuple[int, bool, str, bool]]:
    """Each piece: where it begins, whether a blank stands before it, its source, and whether it is in braces."""
    at = 0
    while (begin := at + _blanks(text, at)) < len(text):
        at = _closed(text, begin) if text[begin] == "{" else _end(text.find("{", begin), text)
        yield begin, begin > 0 and text[begin - 1] == " ", text[begin:at].rstrip(" "), text[begin] == "{"


def _blanks(text: str, at: int) -> int:
    return len(text) - at - len(text[at:].lstrip(" "))


def _end(at: int, text: str) -> int:
    return len(text) if at < 0 else at


def _closed(text: str, begin: int) -> int:
    """The end of the piece whose brace opens there; a brace in quotes is none."""
    depth, quote, at = 0, "", begin
    while at < len(text):
        sign = text[at]
        if quote:
            at += sign == "\\"  # and what follows it
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        else:
            depth += (sign == "{") - (sign == "}")
            if not depth:
                return at + 1
        at += 1
    raise TemplateError(pointed("this '{' is never closed; end the piece with '}'", text, begin))


# What is in the braces


def _keys(source: str) -> dict[str, Value]:
    """`{"soft": None, "duplicate": 5}` or `{"mask"}` -> its keys with their values, which are not evaluated."""
    node = _parsed(source, f"{source:.60} is no piece of OpenPrompt's")
    if isinstance(node, ast.Set):
        given: list[tuple[ast.expr | None, Value]] = [(key, None) for key in node.elts]
    elif isinstance(node, ast.Dict) and node.keys:
        given = list(zip(node.keys, node.values, strict=True))
    else:
        raise TemplateError(f'{source:.60} is no piece of OpenPrompt\'s; write {{"mask"}}, {{"placeholder": "text_a"}}')
    keys: dict[str, Value] = {}
    for key, value in given:
        name = key.value if isinstance(key, ast.Constant) else None
        if not isinstance(name, str) or name not in (*KINDS, *OPTIONS):
            told = "**" if key is None else ast.unparse(key)
            raise TemplateError(f"OpenPrompt has no key {told}{nearest(told, (*KINDS, *OPTIONS), limit=20)}")
        if name in keys:
            raise TemplateError(f"{name!r} stands twice in a piece; leave one out")
        keys[name] = value
    return keys


def _parsed(source: str, what: str) -> ast.expr:
    """A Python expression as a tree."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python says of "\d" is no matter of ours
            return ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TemplateError(f"{what}: {error.args[0] if error.args else error}") from None


_T = typing.TypeVar("_T")


def _constant(keys: Keys, name: str, kind: type[_T], default: _T) -> _T:
    """The value of a key that must be a plain one; `default` where it is not there or None."""
    node = keys.get(name)
    value = node.value if isinstance(node, ast.Constant) else node
    if value is None:
        return default
    if type(value) is not kind and kind is not object:
        got = repr(value) if isinstance(node, ast.Constant) else ast.unparse(typing.cast(ast.expr, node))
        raise TemplateError(f"{name!r} is a {kind.__name__}, got {got:.60}")
    return typing.cast(_T, value)


def _filters(keys: Keys) -> tuple[str, ...]:
    """Our filters for a function that OpenPrompt would run; told apart by how it is written."""
    node = keys.get("post_processing")
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = _parsed(node.value, f"'post_processing' is a function, got {node.value!r:.60}")
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return ()
    written = ast.unparse(_renamed(node))
    if written in FUNCTIONS:
        return FUNCTIONS[written]
    named = [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)]
    advice = [ADVICE[name] for name in dict.fromkeys(named) if name in ADVICE]
    raise TemplateError(
        f"no code is run, and so 'post_processing': {ast.unparse(node)} is not; "
        f"{advice[0] if advice else 'do it to the data before'}. Possible are the filters {', '.join(FILTERS)}, and "
        f"{'; '.join(FUNCTIONS)}"
    )


def _renamed(node: ast.expr) -> ast.expr:
    """A function of one argument with that called x."""
    if not isinstance(node, ast.Lambda) or len(node.args.args) != 1:
        return node
    own = node.args.args[0].arg
    renamed = ast.parse(ast.unparse(node), mode="eval").body
    for inner in ast.walk(renamed):
        if isinstance(inner, ast.Name) and inner.id == own:
            inner.id = "x"
        elif isinstance(inner, ast.arg) and inner.arg == own:
            inner.arg = "x"
    return renamed


# Their pieces -> ours


@dataclass
class _Reader:
    """The pieces so far, and the soft blocks that later ones may name."""

    encoder: Encoder | None
    pieces: list[Piece] = field(default_factory=list)
    named: dict[int, Soft] = field(default_factory=dict)  # by soft_id
    braced: bool = False

    def take(self, given: Keys | str, space: bool) -> None:
        """Adds a piece or a text; `space` says whether a blank stands before it."""
        if isinstance(given, str):
            self.pieces.append(Literal(" " * space + given))
            return
        self.braced = True
        kind = _kind(given)
        space = _space(given, space)
        if kind == "soft":
            piece: Piece = self._soft(given, space)
        else:
            piece = _plain(kind, given)
        apart = not isinstance(piece, Special) and not (isinstance(piece, Soft) and piece.words is not None)
        self.pieces.extend([Literal(" " * (space and apart)), piece])

    def _soft(self, keys: Keys, space: bool) -> Soft:
        number = _constant(keys, "soft_id", int, 0)
        if "soft_id" in keys and number < 1:
            raise TemplateError(f"'soft_id' is a number from 1 on, got {number}")
        words = _constant(keys, "soft", str, "")
        if number in self.named:
            before = self.named[number]
            if {"duplicate", "same"} & keys.keys() or (words and words != (before.words or "").strip(" ")):
                raise TemplateError(f"the block of 'soft_id' {number} is {before} already; write its 'soft_id' alone")
            return before
        soft = self._worded(keys, words, number, space) if words else self._sized(keys, number)
        if number:
            self.named[number] = soft
        return soft

    def _sized(self, keys: Keys, number: int) -> Soft:
        name = f"soft_{number}" if number else None
        size = _constant(keys, "duplicate", int, 1)
        tied = _constant(keys, "same", bool, False) and size > 1
        return Soft(size, name=name, tied=tied, encoder=self.encoder)

    def _worded(self, keys: Keys, words: str, number: int, space: bool) -> Soft:
        if {"duplicate", "same"} & keys.keys():
            raise TemplateError("a soft block has either words or 'duplicate'; leave one out")
        words = " " * space + words
        softs = [piece for piece in self.pieces if isinstance(piece, Soft)]
        again = any(soft.words == words for soft in softs)  # there a block of its own, here the same one
        name = f"soft_{number}" if number else f"again_{len(softs)}" if again else None
        return Soft(words=words, name=name, encoder=self.encoder)


def _kind(keys: Keys) -> str:
    """What a piece is; keys that it does not take are an error."""
    kinds = [kind for kind in KINDS if kind in keys]
    kinds = ["soft"] if set(kinds) == {"soft", "soft_id"} or kinds == ["soft_id"] else kinds
    if len(kinds) != 1:
        raise TemplateError(f"a piece is one of {', '.join(KINDS)}; got {' and '.join(kinds) or 'none of them'}")
    takes = (kinds[0], "add_prefix_space", *TAKES.get(kinds[0], ()))
    for key in keys:
        cut = key == "shortenable" and not _constant(keys, key, bool, False)
        if key not in takes and not cut:
            known = ", ".join(takes[2:]) or "none"
            raise TemplateError(f"a piece of {kinds[0]!r} has no {key!r}; its options: {known}. Leave {key!r} out")
    return kinds[0]


def _space(keys: Keys, space: bool) -> bool:
    """Whether a blank stands before a piece, which may say so itself."""
    if "add_prefix_space" not in keys:
        return space
    given = _constant(keys, "add_prefix_space", str, "")
    if given.strip(" "):
        raise TemplateError(f"'add_prefix_space' is a blank or nothing, got {given!r}")
    return bool(given)


def _plain(kind: str, keys: Keys) -> Piece:
    """A piece that is no soft block."""
    if kind in ("placeholder", "meta"):
        name = _named(kind, keys)
        shortenable = _constant(keys, "shortenable", bool, kind == "placeholder")
        return Field(f"meta.{name}" if kind == "meta" else name, _filters(keys), keep=not shortenable)
    if kind == "mask":
        if _constant(keys, "mask", object, None) is not None:
            raise TemplateError('a mask stands alone; write {"mask"}')
        return Mask()
    if kind == "text":
        return Literal(_constant(keys, "text", str, ""))
    given = _named(kind, keys)
    if not given.startswith("<") or not given.endswith(">"):
        raise TemplateError(f"a special token is written <sep>, got {given!r}")
    if given == "<mask>":
        raise TemplateError('<mask> is no place of an answer in OpenPrompt; write {"mask"} for one, or leave it out')
    try:
        return Special(typing.cast(typing.Any, given[1:-1]))
    except TemplateError:
        raise TemplateError(unknown_special(given[1:-1])) from None


def _named(kind: str, keys: Keys) -> str:
    if not (name := _constant(keys, kind, str, "")):
        raise TemplateError(f"{kind!r} has no name after it; write {{{kind!r}: …}}")
    return name
