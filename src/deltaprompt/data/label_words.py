"""Files of label words as OpenPrompt writes them: .txt and .csv without label names, .json and .jsonl with them.

- .txt, .csv: a line a label, in the labels' order, its words between commas. A blank line begins another choice. One
  line alone has a word for each label, between commas or blanks.
- .json, .jsonl: an object of label = words, or a list of choices, each an object or a list in the labels' order. Of a
  .jsonl each line may be a choice too.

`<!>` in front of a word, which keeps OpenPrompt from putting a blank there, is taken away: the blank of a word is the
one in front of the template's `{mask}`.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from deltaprompt.errors import ConfigError, DataError, nearest

GLUED: Final = "<!>"
SUFFIXES: Final = (".txt", ".csv", ".json", ".jsonl")

Lines: TypeAlias = Sequence[Sequence[str]]  # of each label, or of the one line that there is: its words
Choice: TypeAlias = Lines | Mapping[str, Sequence[str]]


def read_label_words(
    path: str | os.PathLike[str], labels: Sequence[str], choice: int = 0
) -> dict[str, tuple[str, ...]]:
    """The words of each label, as they stand in a file of OpenPrompt's, also where a word stands twice.

    Args:
        path: a .txt, .csv, .json or .jsonl file.
        labels: whose words are asked for; of a file that does not name labels, the labels of its lines in order.
        choice: which of a file's several, from 0 on.

    Raises:
        DataError: there is no such file or choice, or it does not have a word for each label.
    """
    choices = _choices(Path(path).expanduser())
    if not 0 <= choice < len(choices):
        raise DataError(f"{path} has the choices 0 to {len(choices) - 1}, got {choice}")
    found = choices[choice]
    named = found if isinstance(found, Mapping) else _by_place(found, labels, path)
    for label in labels:
        if label not in named:
            raise DataError(f"{path} has no words for label {label!r}{nearest(label, named, limit=20)}")
        if not named[label]:
            raise DataError(f"{path}: label {label!r} has no word; write one at least")
    return {label: tuple(named[label]) for label in labels}


def _by_place(lines: Lines, labels: Sequence[str], path: str | os.PathLike[str]) -> Mapping[str, Sequence[str]]:
    """The words of each label by their place."""
    if len(lines) == 1 < len(labels):  # Yes No, or yes,no
        line = lines[0][0].split() if len(lines[0]) == 1 else lines[0]
        lines = [[word] for word in line]
    if len(lines) != len(labels):
        raise DataError(
            f"{path} has the words of {len(lines)} labels, and there are {len(labels)} ({', '.join(labels):.80}); give "
            "each label a line, in this order"
        )
    return dict(zip(labels, lines, strict=True))


def _choices(path: Path) -> list[Choice]:
    """All that a file has to choose from."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: label words are read from {', '.join(SUFFIXES)} files, got {path.suffix!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        files = [p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        raise DataError(f"there is no file of label words {str(path)!r}{nearest(path.name, files)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}; save it as UTF-8") from error
    choices = _listed(text, path.suffix) if path.suffix in (".txt", ".csv") else _parsed(text, path)
    if not choices:
        raise DataError(f"{path} has no label words in it; give each label a line")
    return choices


def _listed(text: str, suffix: str) -> list[Choice]:
    """The groups of lines that blank lines part, each line the words of a label."""
    groups: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if not line.strip():
            groups.append([])
        else:
            cells = next(csv.reader([line], skipinitialspace=True)) if suffix == ".csv" else line.split(",")
            groups[-1].append([word for cell in cells if (word := _word(cell))])
    return [group for group in groups if group]


def _parsed(text: str, path: Path) -> list[Choice]:
    """The choices of a JSON file: the file's one, those of its list, or one a line."""
    try:
        return _as_choices([json.loads(text)], path)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if path.suffix == ".json" or len(lines) < 2:
            raise DataError(f"{path} is not JSON: {error}; mend it there") from error
    try:
        return _as_choices([json.loads(line) for line in lines], path)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is neither one JSON value nor one a line: {error}; mend it") from error


def _as_choices(values: Sequence[object], path: Path) -> list[Choice]:
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    return [_as_choice(value, path) for value in values]


def _as_choice(value: object, path: Path) -> Choice:
    if isinstance(value, dict):
        return {label: _as_words(words, path) for label, words in value.items()}
    if isinstance(value, list):
        return [_as_words(words, path) for words in value]
    raise DataError(f'{path}: holds {value!r:.60}; label words are an object, such as {{"good": ["great", "fine"]}}')


def _as_words(value: object, path: Path) -> list[str]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{path}: the words of a label are a text or a list of texts, got {value!r:.60}")
    return [word for given in words if (word := _word(given))]


def _word(given: str) -> str:
    return given.strip().removeprefix(GLUED).strip()
