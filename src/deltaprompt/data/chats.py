"""Conversations: lists of messages, or UltraChat's alternating lists of what is said."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Final

from deltaprompt.data.formats import Row, Rows, rows_of, stdin_rows
from deltaprompt.data.readers import STDIN, listing, sound
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.types import Example, Message

COLUMNS: Final = ("messages", "data")  # a list of {"role", "content"}; a list of texts, the user's first (UltraChat)
SPEAKERS: Final = ("user", "assistant")


def read_chats(
    path_or_name: str | os.PathLike[str], split: str | None = None, limit: int | None = None
) -> list[Example]:
    """The conversations of a file or of a dataset on the Hub, as `Example.messages`; see `read`.

    A row has `{"messages": [{"role": "user", "content": "…"}, …]}`, or `{"data": ["…", "…"]}` as UltraChat has, where
    the user speaks first. After a system message, which may open it, user and assistant take turns, the user first.

    Raises:
        DataError: a row has neither, nobody speaks, a message is blank, or the turns do not alternate.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: a limit is 1 row or more; leave it out to read all")
    found = list(islice(_chats(rows_of(path_or_name, split)), limit))
    if not found:
        raise DataError(f"{path_or_name}: there are no rows; at least one is needed")
    return found


def read_questions(path_or_dash: str | os.PathLike[str]) -> Iterator[Example]:
    """Conversations to be gone on with, one at a time, of a file or of standard input for "-".

    In plain text each line is what a user says first.
    """
    return _chats(stdin_rows() if path_or_dash == STDIN else rows_of(path_or_dash, None))


def _chats(rows: Rows) -> Iterator[Example]:
    for row in rows:
        if row.plain:
            yield Example({}, messages=(Message("user", str(row.values["text"])),))
            continue
        messages = tuple(_messages(row))
        _check_turns(row, messages)
        texts = {name: v for name, v in row.values.items() if name not in COLUMNS and isinstance(v, str)}
        fields = {name: sound(text, f"{row.at}: column {name!r}") for name, text in texts.items()}
        yield Example(fields, messages=messages)


def _messages(row: Row) -> Iterator[Message]:
    """What is said in a row."""
    column = next((name for name in COLUMNS if name in row.values), None)
    if column is None:
        raise DataError(f"{row.at}: neither of the columns {' and '.join(COLUMNS)}{listing('messages', row.values)}")
    said = row.values[column]
    if not isinstance(said, list) or not said:
        raise DataError(f"{row.at}: column {column!r} is a list of what is said, and holds {said!r:.60}")
    for number, one in enumerate(said, 1):
        at = f"{row.at}: message {number}"
        role, content = (SPEAKERS[(number - 1) % 2], one) if column == "data" else _parts(at, one)
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"{at} says nothing, it holds {content!r:.60}; put a text there, or leave the row out")
        yield Message(role, sound(content, at))  # type: ignore[arg-type]  # checked in _check_turns


def _parts(at: str, message: object) -> tuple[str, object]:
    """Who speaks, and what is said."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise DataError(f'{at} is {message!r:.60}; it is an object, for example {{"role": "user", "content": "…"}}')
    return str(message["role"]), message["content"]


def _check_turns(row: Row, messages: tuple[Message, ...]) -> None:
    """Raises unless user and assistant take turns, the user first."""
    first = 1 if messages[0].role == "system" else 0
    for number, message in enumerate(messages[first:], first):
        wanted = SPEAKERS[(number - first) % 2]
        if message.role != wanted:
            raise DataError(
                f"{row.at}: message {number + 1} is of the role {message.role!r}, and the next to speak is {wanted!r}; "
                "after a system message, which may come first, user and assistant take turns, the user first"
            )
    if len(messages) == first:
        raise DataError(f"{row.at}: nobody speaks but the system; put what the user says behind it")
