"""Named text filters: a field's text -> text, applied left to right in `{text|strip|lower}`; names only, no code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from deltaprompt.errors import TemplateError, nearest


def nodot(text: str) -> str:
    """`"A gem ."` -> `"A gem"`: without a final full stop (. or 。) and the white space around it; "..." stays."""
    body = text.rstrip()
    if not body.endswith((".", "。")) or body.endswith(("..", "。。")):
        return text
    return body[:-1].rstrip()


def nodots(text: str) -> str:
    """`"..a gem."` -> `"a gem"`: without the full stops at both ends."""
    return text.strip(".")


def dot(text: str) -> str:
    """`"A gem"` -> `"A gem."`: with one more full stop."""
    return f"{text}."


def chop(text: str) -> str:
    """`"A gem!"` -> `"A gem"`: without its last character."""
    return text[:-1]


def uncap(text: str) -> str:
    """`"A Gem"` -> `"a Gem"`: with a small first letter."""
    return text[:1].lower() + text[1:]


FILTERS: Final[Mapping[str, Callable[[str], str]]] = MappingProxyType(
    {
        "strip": str.strip,
        "nodot": nodot,
        "lower": str.lower,
        "dot": dot,
        "nodots": nodots,
        "chop": chop,
        "uncap": uncap,
    }
)


def filter_named(name: str, also: Iterable[str] = ()) -> Callable[[str], str]:
    """The filter of that name, or an error that lists the filters and what `also` may stand in their place."""
    if name not in FILTERS:
        raise TemplateError(f"there is no filter {name!r}{nearest(name, [*FILTERS, *also], limit=20)}")
    return FILTERS[name]


def apply_filters(text: str, names: Iterable[str]) -> str:
    """`f_n(… f_2(f_1(text)))` for the filters f_1 … f_n of these names."""
    for name in names:
        text = filter_named(name)(text)
    return text


def text_of(example_fields: Mapping[str, object], name: str) -> str:
    """The text in that field of an example, or an error that says what the example has there."""
    if name not in example_fields:
        every, close = nearest("", example_fields), nearest(name, example_fields)
        raise TemplateError(f"the example has no field {name!r}{every}{close if close != every else ''}")
    value = example_fields[name]
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise TemplateError(f"row has no text in {name!r}, got {value}; fill it in or leave the row out")
    got = f"{type(value).__name__} {value!r:.40}"
    raise TemplateError(f"the field {name!r} is not text, got {got}; turn it into a string first")
