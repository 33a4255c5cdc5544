"""Texts with labelled spans, for tagging tasks: rows of words and their tags, or of texts and where their spans are.

- A file of columns (.txt, .conll, .bio, .iob, .bmes and others, also .gz): a line a word, its tag last, a blank line
  behind each sentence. That is CoNLL's form and Few-NERD's.
- Rows of words and tags, `{"tokens": ["Ann", "sat"], "tags": ["B-PER", "O"]}`; on the Hub mostly "ner_tags".
- Rows of a text and its spans, `{"text": "Ann sat", "spans": [{"start": 0, "end": 3, "label": "PER"}]}`; the column may
  be "entities", a span `[0, 3, "PER"]`, and its label "type".

Words are joined by blanks, or by nothing where all of them are single characters and some are Chinese, Japanese or
Korean. Every other column that holds a text, a number or a boolean is a field.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Final, cast

from deltaprompt.data.columns import in_columns, sentences
from deltaprompt.data.formats import Row, refuse_split, rows_of
from deltaprompt.data.readers import listing, one_text, place, sound, texts_in, written
from deltaprompt.data.tags import (
    OUTSIDE,
    Places,
    check_scheme,
    in_order,
    malformed,
    nth,
    scheme_of,
    spans_of,
    tags_of,
)
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.hierarchy import way
from deltaprompt.types import Example, Span

WORDS: Final = ("tokens", "words", "word")  # columns that may hold them, the first that is there
TAGS: Final = ("tags", "ner_tags", "labels", "label")
SPANS: Final = ("spans", "entities", "labels", "label")
FORMS: Final = (
    'possible: {"tokens": […], "tags": […]}, or {"text": "…", "spans": [{"start": 0, "end": 3, "label": "…"}]}'
)
CHARACTER: Final = re.compile(r"[぀-ヿ㐀-䶿一-鿿가-힯豈-﫿]|[\U00020000-\U0003FFFF]")  # kana, Han, hangul


@dataclass(frozen=True, slots=True)
class _Words:
    """A row of words and tags, and where the n-th of these stands."""

    words: list[str]
    tags: list[str]
    at: Places
    others: Mapping[str, str]


def read_tagged(
    path_or_name: str | os.PathLike[str],
    split: str | None = None,
    limit: int | None = None,
    scheme: str | None = None,
    joiner: str | None = None,
    labelled: bool = True,
    words: str | None = None,
    tags: str | None = None,
    on_malformed: Callable[[str], None] | None = None,
) -> list[Example]:
    """Texts as examples with `spans` and, where the data has them, `words`; see the module for the forms of rows.

    Args:
        path_or_name: a file in any format that `read` knows, a file of columns, or `hf:name`.
        split: of a dataset on the Hub.
        limit: keeps the first texts.
        scheme: "io", "bio", "iob1", "bmes", "bioes" or "bilou"; told by the tags where not given.
        joiner: what stands between words in the text: " ", "", …; told by the words where not given.
        labelled: whether spans are read; without them rows need no tags.
        words: the column of the words; "tokens", "words" or "word" where not given.
        tags: the column of the tags; "tags", "ner_tags", "labels" or "label" where not given.
        on_malformed: told of each tag that the scheme would not have there, such as an I without a B. Such tags are
            read as `deltaprompt.data.tags` says.

    Raises:
        DataError: a row has none of the forms, a tag is of another scheme, a span is not in the text, or two overlap.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: a limit is 1 text or more; leave it out to read all")
    if scheme is not None:
        check_scheme(scheme)
    columns = ((words,) if words else WORDS, (tags,) if tags else TAGS)
    found = list(islice(_read(path_or_name, split, labelled, *columns), limit))
    if not found:
        raise DataError(f"{path_or_name}: there are no texts; at least one is needed")
    rows = [row for row in found if isinstance(row, _Words)]
    scheme = scheme or _told(path_or_name, rows)
    joiner = joiner_of(row.words for row in rows) if joiner is None else joiner
    return [_example(row, scheme, joiner, on_malformed) if isinstance(row, _Words) else row for row in found]


def joiner_of(texts: Iterable[Sequence[str]]) -> str:
    """What stands between the words of texts: nothing where each is a character and some are Chinese, else a blank."""
    some = False
    for words in texts:
        if any(len(word) > 1 for word in words):
            return " "
        some = some or any(map(CHARACTER.match, words))
    return "" if some else " "


def joined(words: Sequence[str], joiner: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text of words, and where each of them is in it."""
    places, end = [], 0
    for word in words:
        places.append((end, end + len(word)))
        end += len(word) + len(joiner)
    return joiner.join(words), tuple(places)


def of_words(words: Sequence[str], spans: Iterable[Span] = (), joiner: str = " ") -> Example:
    """The example of words with these spans, which are in words."""
    text, places = joined(words, joiner)
    moved = tuple(Span(places[first][0], places[end - 1][1], label) for first, end, label in spans)
    return Example({"text": text}, spans=moved, words=places)


def in_words(example: Example) -> list[Span]:
    """The spans of an example in words: the number of the first one, and of the one behind the last.

    Raises:
        DataError: a span does not begin and end where words do.
    """
    starts = {start: number for number, (start, _) in enumerate(example.words)}
    ends = {end: number for number, (_, end) in enumerate(example.words, 1)}
    found = [(starts.get(span.start), ends.get(span.end), span) for span in example.spans]
    if cut := next((span for first, end, span in found if first is None or end is None), None):
        raise DataError(
            f"the span {example.fields['text'][cut.start : cut.end]!r:.60}, {cut.start} to {cut.end}, does not begin "
            f"and end where words do; the text has {len(starts)} words"
        )
    return [Span(first, end, span.label) for first, end, span in found if first is not None and end is not None]


def word_tags(example: Example, scheme: str = "bio") -> list[str]:
    """The tags of the words of an example."""
    return tags_of(in_words(example), len(example.words), scheme)


def span_labels(examples: Iterable[Example]) -> tuple[str, ...]:
    """The labels of all spans, sorted."""
    return tuple(sorted({span.label for example in examples for span in example.spans}))


def coarse(examples: Iterable[Example]) -> list[Example]:
    """The same with the coarse labels: of "person-artist/author" (Few-NERD) and "/person/artist" "person"."""
    return [
        replace(example, spans=tuple(Span(s.start, s.end, way(s.label)[0]) for s in example.spans))
        for example in examples
    ]


def _read(
    source: str | os.PathLike[str], split: str | None, labelled: bool, words: Sequence[str], tags: Sequence[str]
) -> Iterator[_Words | Example]:
    if not in_columns(source):
        yield from (_of_row(row, labelled, words, tags) for row in rows_of(source, split))
        return
    refuse_split(source, split)
    for first, tokens, own in sentences(source, labelled):
        yield _Words(tokens, own, partial(_line, str(source), first), {})


def _line(source: str, first: int, number: int) -> str:
    return f"{source}, line {first + number}"


def _tag(row: Row, column: str, number: int) -> str:
    return f"{row.at}: column {column!r}, {nth(number)}"


def _of_row(row: Row, labelled: bool, words: Sequence[str], tags: Sequence[str]) -> _Words | Example:
    values = row.values
    column = next((name for name in words if isinstance(values.get(name), list)), None)
    tagged = next((name for name in tags if isinstance(values.get(name), list)), None)
    if column is not None and (tagged is not None or not labelled):
        return _of_words(row, column, tagged if labelled else None)
    if not isinstance(values.get("text"), str):
        raise DataError(f"{row.at}: no words and tags, nor a text and its spans{listing('tokens', values)}; {FORMS}")
    among = tags if len(tags) == 1 else SPANS
    spans = next((name for name in among if isinstance(values.get(name), list)), None)
    if labelled and spans is None:
        raise DataError(f"{row.at}: a text without a list of its spans{listing('spans', values)}; {FORMS}")
    return _of_text(row, spans if labelled else None)


def _of_words(row: Row, column: str, tagged: str | None) -> _Words:
    words = texts_in(row, column)
    if not words or not all(words):
        got = f"word {words.index('') + 1} is empty" if words else "there are no words"
        raise DataError(f"{row.at}: column {column!r}: {got}; write it, or remove the row")
    if tagged is None:
        return _Words(words, [], nth, _others(row, column))
    if any(isinstance(tag, int) for tag in cast("list[object]", row.values[tagged])):
        raise DataError(
            f"{row.at}: column {tagged!r} holds {row.values[tagged]!r:.60}, numbers without names; write the names of "
            "the tags, such as 'B-PER'"
        )
    tags = texts_in(row, tagged)
    if len(words) != len(tags):
        raise DataError(f"{row.at}: {len(words)} words and {len(tags)} tags; each word has one")
    return _Words(words, tags, partial(_tag, row, tagged), _others(row, column, tagged))


def _of_text(row: Row, column: str | None) -> Example:
    text = one_text(row, "text")
    if not text.strip():
        raise DataError(f"{row.at}: the text is blank; write one, or remove the row")
    fields = {"text": text, **_others(row)}
    if column is None:
        return Example(fields)
    given = cast("list[object]", row.values[column])
    spans = [span_from(one, len(text), f"{row.at}: column {column!r}, span {n}") for n, one in enumerate(given, 1)]
    return Example(fields, spans=tuple(span for span, _ in in_order(spans, len(text), "characters", row.at)))


def span_from(given: object, length: int, at: str) -> Span:
    """A span as rows write it, an object, or a list of start, end and label; `at` says where it stands."""
    match given:
        case {"start": start, "end": end, "label": label} | {"start": start, "end": end, "type": label}:
            pass
        case [start, end, label]:
            pass
        case _:
            raise DataError(
                f'{at} is {given!r:.60}; possible: {{"start": 0, "end": 3, "label": "PER"}} or [0, 3, "PER"]'
            )
    if not isinstance(label, str) or not label.strip():
        raise DataError(f"{at} has the label {label!r:.40}; a label is a text that is not blank")
    return Span(place(start, length, f"{at}: its start"), place(end, length, f"{at}: its end"), sound(label, at))


def _others(row: Row, *used: str) -> dict[str, str]:
    """The columns that are fields as they are."""
    texts = {name: written(row, name) for name in row.values if name not in ("", "text", *used)}
    return {name: text for name, text in texts.items() if text is not None}


def _told(source: str | os.PathLike[str], rows: Sequence[_Words]) -> str:
    """The scheme of the tags of all rows."""
    scheme = scheme_of(row.tags for row in rows)
    if scheme == "io" and not any(OUTSIDE in row.tags for row in rows):
        raise DataError(
            f"{source}: no tag is {OUTSIDE!r} and none begins with B- or I-, the first is {rows[0].tags[0]!r:.40}: are "
            "these tags? Where they are, and no word is outside of all spans, name their scheme: scheme='io'"
        )
    return scheme


def _example(row: _Words, scheme: str, joiner: str, on_malformed: Callable[[str], None] | None) -> Example:
    spans = spans_of(row.tags, scheme, row.at)
    if on_malformed is not None:
        for number, wanted in malformed(row.tags, spans, scheme):
            on_malformed(f"{row.at(number)}: {row.tags[number]!r} is read as {wanted!r} of the scheme {scheme}")
    example = of_words(row.words, spans, joiner)
    return replace(example, fields={**row.others, **example.fields}) if row.others else example
