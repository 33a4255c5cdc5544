"""Rows of what is given and what is to be written: a text, or a list of texts that are all right.

Data-to-text rows hold triples, `[[subject, predicate, object], …]`: such a column becomes the field
"subject | predicate | object && …", without the quotes and underscores of RDF terms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Final

from deltaprompt.data.formats import Row, Rows, rows_of, stdin_rows
from deltaprompt.data.readers import STDIN, filled, listing, sound, written
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.types import Example

TARGET: Final = "target"  # the field of a text that is to be written
Fields = tuple[tuple[str, str], ...]


def read_pairs(
    path_or_name: str | os.PathLike[str],
    target: str = TARGET,
    fields: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[Example]:
    """The rows of a file, or of a dataset on the Hub, as examples to write texts for; see `read`.

    Args:
        path_or_name: a file in any format that `read` knows, or `hf:name`.
        target: the column of what is to be written: a text becomes the field "target", a list the references.
        fields: further fields and their columns. Every other column that holds a text, a number or triples is a field
            under its own name.
        split: of a dataset on the Hub.
        limit: keeps the first rows.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: a limit is 1 row or more; leave it out to read all")
    found = list(islice(_pairs(rows_of(path_or_name, split), target, fields or {}), limit))
    if not found:
        raise DataError(f"{path_or_name}: there are no rows; at least one is needed")
    return found


def read_inputs(path_or_dash: str | os.PathLike[str], fields: Mapping[str, str] | None = None) -> Iterator[Example]:
    """Rows without a text to compare with, one at a time, of a file or of standard input for "-"; see `read_texts`."""
    rows = stdin_rows() if path_or_dash == STDIN else rows_of(path_or_dash, None)
    return _pairs(rows, None, fields or {})


def grouped(examples: Sequence[Example]) -> list[Example]:
    """Examples that are equal but for the target as one, with all their right texts as references, each once."""
    found: dict[tuple[Fields, str | None], list[Example]] = {}
    for example in examples:
        found.setdefault((given_of(example), example.label), []).append(example)
    return [_together(some) for some in found.values()]


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, dev): about `fraction` of what is given, all that is to be written for it together, is dev."""
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction={fraction}: the dev set's share lies between 0 and 1, for example 0.1")
    given = list(dict.fromkeys(map(given_of, examples)))
    if len(given) < 2:
        raise DataError("all rows give the same, so none can go to the dev set; add rows, or train without a dev set")
    chance = Random(seed)
    drawn = sorted((chance.random(), n) for n in range(len(given)))
    held = {given[n] for _, n in drawn[: min(max(int(fraction * len(given) + 0.5), 1), len(given) - 1)]}
    sides = [given_of(example) in held for example in examples]
    train, dev = ([e for e, out in zip(examples, sides, strict=True) if out == side] for side in (False, True))
    return train, dev


def told_apart(examples: Sequence[Example], train: Sequence[Example], field: str) -> list[Example]:
    """The examples, labelled "seen" where some training example has the same in a field, and "unseen" elsewhere."""
    for name, rows in (("test", examples), ("train", train)):
        if bare := next((n for n, row in enumerate(rows, 1) if field not in row.fields), 0):
            raise DataError(f"{name} example {bare} has no field {field!r}{listing(field, rows[bare - 1].fields)}")
    known = {example.fields[field] for example in train}
    return [replace(e, label="seen" if e.fields[field] in known else "unseen") for e in examples]


def given_of(example: Example) -> Fields:
    """What is given in an example to write a text for: all that is said in it but the target."""
    return tuple(one for one in said_in(example) if one[0] != TARGET)


def said_in(example: Example) -> Fields:
    """All that is said in an example: its fields, a target among them, and its messages."""
    return (*sorted(example.fields.items()), *example.messages)


def linearised(triples: Sequence[Sequence[str]]) -> str:
    """Triples as a text: `[["Aarhus_Airport", "cityServed", "Aarhus"]]` -> "Aarhus Airport | cityServed | Aarhus"."""
    return " && ".join(" | ".join(map(_term, triple)) for triple in triples)


def _term(term: str) -> str:
    bare = term[1:-1] if len(term) > 1 and term[0] == term[-1] == '"' else term
    return bare.replace("_", " ").strip()


def _together(examples: Sequence[Example]) -> Example:
    """Examples that give the same as one."""
    first = examples[0]
    fields = {name: text for name, text in first.fields.items() if name != TARGET}
    texts = [text for example in examples for text in (example.references or _target(example))]
    return replace(first, fields=fields, references=tuple(dict.fromkeys(texts)))


def _target(example: Example) -> tuple[str, ...]:
    return tuple(text for name, text in example.fields.items() if name == TARGET)


def _pairs(rows: Rows, target: str | None, fields: Mapping[str, str]) -> Iterator[Example]:
    """One example a row."""
    for row in rows:
        texts = {name: value for name in row.values if (value := _text(row, name)) is not None}
        own = {name: _given(row, column, name, texts) for name, column in fields.items()}
        others = {n: text for n, text in texts.items() if n not in (target, TARGET, "", *fields.values())}
        references = () if target is None else _references(row, target)
        right = {} if target is None or references else {TARGET: filled(row, target, "target")}
        yield Example(others | own | right, references=references)


def _given(row: Row, column: str, name: str, texts: Mapping[str, str]) -> str:
    """The text of a field that was asked for."""
    return texts[column] if texts.get(column, "").strip() else filled(row, column, f"field {name!r}")


def _text(row: Row, column: str) -> str | None:
    """What a column holds as a text; None where it is none."""
    value = row.values[column]
    if isinstance(value, list) and value and all(map(_is_triple, value)):
        return sound(linearised(value), f"{row.at}: column {column!r}")
    return written(row, column)


def _is_triple(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(term, str) for term in value)


def _references(row: Row, column: str) -> tuple[str, ...]:
    """The list of texts in the target's column; none where it holds one text."""
    value = row.values.get(column)
    if not isinstance(value, list):
        return ()
    if not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise DataError(
            f"{row.at}: column {column!r} is a list of texts to be written, and holds {value!r:.60}; put one text or "
            "more there, none of them blank"
        )
    return tuple(sound(text, f"{row.at}: column {column!r}") for text in value)
