"""A journal of what a search has found, one line each, so that a search that was killed goes on where it was.

A line is written, flushed and checked by a digest; the one that a kill left half written is dropped. What a search
computes goes through `once`, so that it is computed once, and a resumed search has the numbers of an uninterrupted one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from deltaprompt.errors import ConfigError, StoreError
from deltaprompt.types import Example

FILE: Final = "journal.jsonl"
SETTINGS: Final = "settings"


class Journal:
    """Values by name, in memory and, with a folder, in its `journal.jsonl`.

    Args:
        folder: where the file is; without one nothing outlives the process.
        settings: all that the values depend on, by name, as JSON.
        resume: goes on with what the folder has; otherwise it begins anew.

    Raises:
        ConfigError: what is to be resumed had other settings.
        StoreError: a line other than the last is damaged.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], resume: bool = False) -> None:
        self.path = None if folder is None else folder / FILE
        self._known: dict[str, Any] = {}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.path.exists():
            self._known = _read(self.path)
        else:
            self.path.write_bytes(b"")
        self._same(self.once(SETTINGS, lambda: dict(settings)), settings)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of that name, made where it is not known; as JSON gives it back."""
        if name not in self._known:
            value = json.loads(json.dumps(make()))
            if self.path is not None:
                _append(self.path, _line(name, value))
            self._known[name] = value
        return self._known[name]

    def _same(self, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(settings))
        if names := sorted(name for name in before | now if before.get(name) != now.get(name)):
            told = "; ".join(f"{n} was {before.get(n)!r:.120} and is now {now.get(n)!r:.120}" for n in names)
            raise ConfigError(f"cannot go on with the search in {self.path}: {told}. Set it back, or start anew")


def rows_told(rows: Sequence[Example]) -> str:
    """The number of rows and a digest of them in their order."""
    digest = blake2b(digest_size=6)
    for row in rows:
        digest.update(json.dumps([sorted(row.fields.items()), row.label]).encode())
    return f"{len(rows)} rows ({digest.hexdigest()})"


def _line(name: str, value: Any) -> bytes:
    return json.dumps({"name": name, "value": value, "check": _check(name, value)}, ensure_ascii=False).encode() + b"\n"


def _check(name: str, value: Any) -> str:
    return blake2b(json.dumps([name, value]).encode(), digest_size=8).hexdigest()


def _append(path: Path, line: bytes) -> None:
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    """The values of a file, from which a last line without an end is cut off."""
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        with path.open("r+b") as file:
            file.truncate(len(whole) + 1 if whole else 0)
    known: dict[str, Any] = {}
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        name, value = _checked(path, number, line)
        known[name] = value
    return known


def _checked(path: Path, number: int, line: bytes) -> tuple[str, Any]:
    try:
        told = json.loads(line)
        if told["check"] == _check(told["name"], told["value"]):
            return str(told["name"]), told["value"]
    except (ValueError, TypeError, KeyError):
        pass
    raise StoreError(f"{path}, line {number}: it is damaged; start the search anew, without resume")
