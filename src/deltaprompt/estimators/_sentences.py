"""What a tagger is given: texts and spans, or words and tags, as examples; and what must be known to answer alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from deltaprompt.data.readers import sound
from deltaprompt.data.tagged import joiner_of, of_words, span_from
from deltaprompt.data.tags import OUTSIDE, in_order, scheme_of, spans_of
from deltaprompt.estimators._input import InputError, listed, paired, plain, required, text_in, told
from deltaprompt.types import Example, Span

SAMPLES = "texts or lists of words"


@dataclass(frozen=True)
class Form:
    """How words and tags were given, where they were.

    Args:
        scheme: of the tags; none where spans were given.
        joiner: what stands between words.
    """

    scheme: str | None = None
    joiner: str | None = None


def answered(X: Any, y: Any, joiner: str | None = None) -> tuple[list[Example], Form]:
    """Examples with their spans, in characters, and how they were given.

    Args:
        X: texts, or lists of words.
        y: of texts lists of spans, of words lists of tags.
        joiner: what stands between words; told by them where not given.
    """
    required(y)
    each, right = listed(X, "X", SAMPLES), listed(y, "y", "lists of spans or of tags")
    paired(len(each), len(right))
    if not _in_words(each):
        pairs = enumerate(zip(each, right, strict=True))
        return [_spanned(text_in(text, f"X[{n}]"), spans, n) for n, (text, spans) in pairs], Form()
    words = [_words(one, n) for n, one in enumerate(each)]
    tags = [_tags(one, len(words[n]), n) for n, one in enumerate(right)]
    scheme, between = _scheme(tags), joiner_of(words) if joiner is None else joiner
    spans = [spans_of(own, scheme, partial("y[{}][{}]".format, n)) for n, own in enumerate(tags)]
    return [of_words(*pair, between) for pair in zip(words, spans, strict=True)], Form(scheme, between)


def unanswered(X: Any, form: Form) -> tuple[list[Example], bool]:
    """Examples to find spans in, and whether they were given as words."""
    each = listed(X, "X", SAMPLES)
    if not _in_words(each):
        return [Example({"text": text_in(text, f"X[{n}]")}) for n, text in enumerate(each)], False
    words = [_words(one, n) for n, one in enumerate(each)]
    joiner = joiner_of(words) if form.joiner is None else form.joiner
    return [of_words(one, (), joiner) for one in words], True


def _in_words(each: Sequence[Any]) -> bool:
    """Whether samples are lists of words; all are, or none."""
    lists = [isinstance(one, list | tuple | np.ndarray) for one in each]
    if any(lists) and not all(lists):
        raise InputError(
            f"X[{lists.index(True)}] is a list and X[{lists.index(False)}] is none; give texts only, or lists of words "
            "only"
        )
    return all(lists)


def _words(given: Any, number: int) -> list[str]:
    """The words of a sample."""
    words = [text_in(word, f"X[{number}][{i}]") for i, word in enumerate(given)]
    if not all(word.strip() for word in words):
        at = [bool(word.strip()) for word in words].index(False)
        raise InputError(f"X[{number}][{at}] is a blank word; leave it out, and its tag")
    return words


def _tags(given: Any, words: int, number: int) -> list[str]:
    """The tags of a sample's words."""
    if not isinstance(given, list | tuple | np.ndarray):
        raise InputError(f"y[{number}] is {told(given)}; a list of tags is possible, one a word, as in ['B-PER', 'O']")
    for i, tag in enumerate(given):
        if not isinstance(tag, str) or not tag:
            raise InputError(f"y[{number}][{i}] is {told(tag)}; a tag is a text, as in 'B-PER' or 'O'")
    if len(given) != words:
        raise InputError(f"X[{number}] has {words} words and y[{number}] has {len(given)} tags; each word has one")
    return [sound(str(tag), f"y[{number}]") for tag in given]


def _scheme(tags: Sequence[Sequence[str]]) -> str:
    """The scheme of all tags."""
    scheme = scheme_of(tags)
    if scheme == "io" and not any(OUTSIDE in own for own in tags):
        raise InputError(f"no tag of y is {OUTSIDE!r} and none begins with B- or I-; are these tags? y[0] is {tags[0]}")
    return scheme


def _spanned(text: str, given: Any, number: int) -> Example:
    """A text with its spans."""
    if isinstance(given, str | Mapping) or not isinstance(given, list | tuple | np.ndarray):
        raise InputError(
            f"y[{number}] is {told(given)}; a text has a list of its spans, [(start, end, label), …], or [] for none"
        )
    at = f"y[{number}]"
    spans = [_span(one, len(text), f"{at}[{i}]") for i, one in enumerate(given)]
    return Example({"text": text}, spans=tuple(span for span, _ in in_order(spans, len(text), "characters", at)))


def _span(given: Any, length: int, at: str) -> Span:
    """A span of a text, its numbers also numpy's own."""
    match given:
        case Mapping():
            given = {name: plain(value) for name, value in given.items()}
        case list() | tuple() | np.ndarray():
            given = [plain(value) for value in given]
    return span_from(given, length, at)
