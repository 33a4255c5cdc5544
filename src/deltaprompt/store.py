"""An adaptation on disk: `adaptation.json` + `adaptation.safetensors`, every byte checked, replaced both or neither.

A save is prepared whole in `.next-…` and takes place when that folder becomes `.pending`; its files are then moved into
place. The current version of a file is the one in `.pending` where there is one, otherwise the one in place: right
at whatever moment a writer is killed, also where several move. The next writer finishes the moving.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from deltaprompt.errors import StoreError, nearest

SCHEMA = 1
JSON = "adaptation.json"
TENSORS = "adaptation.safetensors"
PENDING = ".pending"
RESERVED = ("checksum", "schema", "tensors")
CHECKSUM = re.compile(rb'^  "checksum": .*\n', re.MULTILINE)  # its line in a canonical record: nested keys lie deeper
RESTORE = "Restore both files of the adaptation from a copy, or make it anew"
TRIES = 100  # with other writers or readers at work; alone, the first succeeds

Found = tuple[bytes, tuple[int, ...]]  # a file's content, and what tells it from a later version
T = TypeVar("T")


def write(folder: str | Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Keeps a record and its tensors in a folder, in place of what was kept there; the bytes of both files.

    Raises:
        StoreError: the record holds what JSON cannot, or the folder cannot be written; what was saved there is whole.
    """
    folder = Path(folder)
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    data = safetensors.torch.save(own)
    if taken := sorted(set(RESERVED) & set(record)):
        raise StoreError(f"the store itself writes the keys {', '.join(taken)} of a record; give yours other names")
    body = {**_plain(record, ""), "schema": SCHEMA, "tensors": {"bytes": len(data), "sha256": _sha256(data)}}
    try:
        text = _canonical({**body, "checksum": _sha256(_canonical(body))})
    except UnicodeEncodeError as e:
        raise StoreError(f"the record has a text with half a character in it ({e.reason}); clean the text") from e
    try:
        _make(folder)
        _replace(folder, {JSON: text, TENSORS: data})
    except OSError as e:
        raise StoreError(f"{folder} cannot be written ({e}); mend that and save again, nothing saved is lost") from e
    return len(text) + len(data)


def read(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record (with its "schema" and the size and digest of its "tensors") and the tensors of a folder.

    Raises:
        StoreError: there is none, a byte of it has changed, or its schema is a newer one.
    """
    folder = Path(folder)

    def both(text: bytes, data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
        record = _record(text, folder / JSON)
        return record, _tensors(data, record["tensors"], folder / TENSORS)

    return _steady(folder, (JSON, TENSORS), both)


def describe(folder: str | Path) -> dict[str, Any]:
    """The record alone, checked; the tensors, which may be large, are not read."""
    folder = Path(folder)
    return _steady(folder, (JSON,), lambda text: _record(text, folder / JSON))


def tensors(folder: str | Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a folder whose record was read before.

    Raises:
        StoreError: they are not those that the record is of.
    """
    folder = Path(folder)
    return _steady(folder, (TENSORS,), lambda data: _tensors(data, record["tensors"], folder / TENSORS))


def holds_adaptation(folder: str | Path) -> bool:
    """Whether there is an adaptation in a folder, whole or damaged."""
    folder = Path(folder)
    return any((place / name).is_file() for place in (folder, folder / PENDING) for name in (JSON, TENSORS))


# The record as JSON


def _canonical(value: Mapping[str, Any]) -> bytes:
    """The one serialisation of a record."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _plain(value: Any, at: str) -> Any:
    """A value as JSON gives it back; what JSON cannot hold is an error that says where it is."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise StoreError(f"record{at} has the key {key!r}; only strings are possible")
        return {key: _plain(inner, f"{at}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{at}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise StoreError(f"record{at} is {value}, which JSON has no form for; store None or a text instead")
    if value is None or isinstance(value, str | int | float):
        return value
    raise StoreError(f"record{at} is a {type(value).__name__}; possible: text, numbers, bool, None, lists and mappings")


def _record(text: bytes, path: Path) -> dict[str, Any]:
    """The record in the bytes of a JSON file, without its checksum."""
    try:
        record = json.loads(text.decode())
        if not isinstance(record, dict) or type(record.get("schema")) is not int:
            raise ValueError("it does not say its schema")
        if record["schema"] > SCHEMA:
            raise StoreError(
                f"{path} has schema {record['schema']}, and this version of DeltaPrompt knows schemas up to {SCHEMA}. "
                "Upgrade it: pip install --upgrade deltaprompt"
            )
        body = CHECKSUM.sub(b"", text, count=1)
        if text != _canonical(record) or record.pop("checksum", None) != _sha256(body):
            raise ValueError("its checksum is not that of its contents")
    except (ValueError, RecursionError) as e:
        raise StoreError(f"{path} is damaged or was edited: {e}. {RESTORE}") from e
    return record


def _tensors(data: bytes, saved: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file, which must be the bytes that were saved."""
    if len(data) < saved["bytes"]:
        raise StoreError(f"{path} is truncated: it has {len(data)} of {saved['bytes']} bytes. {RESTORE}")
    if (digest := _sha256(data)) != saved["sha256"]:
        raise StoreError(
            f"{path} is not the file that was saved with {JSON}: its sha256 is {digest[:16]}…, saved was "
            f"{saved['sha256'][:16]}…. {RESTORE}"
        )
    return safetensors.torch.load(data)


# Reading


def _steady(folder: Path, names: Sequence[str], parse: Callable[..., T]) -> T:
    """What `parse` makes of the files; an error counts where they are the same still, else a writer was at work."""
    before: Sequence[object] | None = None
    for _ in range(TRIES):
        found = {name: _current(folder, name) for name in names}
        try:
            if missing := [name for name, file in found.items() if file is None]:
                raise _missing(folder, missing)
            return parse(*(file[0] for file in found.values() if file is not None))
        except StoreError:
            now = [None if file is None else file[1] for file in found.values()]
            if now == before:
                raise
            before = now
    raise StoreError(f"{folder} is written all the time, so that it cannot be read; wait for the writer to end")


def _current(folder: Path, name: str) -> Found | None:
    """The current version of a file."""
    for path in (folder / PENDING / name, folder / name):
        try:
            with suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as f:
                stat = os.fstat(f.fileno())
                return f.read(), (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except OSError as e:
            raise StoreError(f"{path} cannot be read ({e}); give it the permissions of an ordinary file") from e
    return None


def _missing(folder: Path, names: Sequence[str]) -> StoreError:
    """The error for files that are not there."""
    if folder.is_file():
        return StoreError(f"{folder} is a file; give the folder that holds {JSON} and {TENSORS}")
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        return StoreError(f"there is no folder {folder}{nearest(folder.name, sorted(beside))}")
    if not holds_adaptation(folder):
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        return StoreError(f"{folder} holds no adaptation, that is {JSON} and {TENSORS}; it holds {inside}")
    return StoreError(f"{folder} lacks {' and '.join(names)}, one of the two files of an adaptation. {RESTORE}")


# Writing


def _make(folder: Path) -> None:
    """The folder and those above it, on disk for good."""
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        file = next(p for p in (folder, *folder.parents) if p.is_file())
        raise StoreError(f"{folder} cannot be a folder: {file} is a file; give another name, or remove it") from e
    for path in new:
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """A file in place of the old one; it is whole, or not there."""
    part = path.with_name(f".{path.name}.{token_hex(4)}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """New files in place of the old ones, all or none."""
    _clear(folder)
    new = folder / f".next-{token_hex(4)}"
    try:
        new.mkdir()
        for name, data in files.items():
            _put(new / name, data)
        _sync(new)
        _commit(new, folder)
    except FileNotFoundError as e:
        raise StoreError(f"another process saved in {folder} at the same time; give each a folder of its own") from e
    finally:
        shutil.rmtree(new, ignore_errors=True)  # where it was not committed
    _sync(folder)
    _finish(folder)


def _clear(folder: Path) -> None:
    """Removes what killed writers left; renamed first, so that one still at work cannot commit what is half removed."""
    for left in folder.glob(".next-*"):
        with suppress(FileNotFoundError):  # committed just now
            left.rename(folder / f".dead-{token_hex(4)}")
    for dead in folder.glob(".dead-*"):
        shutil.rmtree(dead, ignore_errors=True)  # another writer may be at it


def _put(path: Path, data: bytes) -> None:
    """A new file, on disk when this returns."""
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _commit(new: Path, folder: Path) -> None:
    """`new` becomes `.pending`, once an earlier one is in place: from here on the new version is the current one."""
    for _ in range(TRIES):
        _finish(folder)
        try:
            new.rename(folder / PENDING)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
    raise StoreError(f"{folder / PENDING} holds files that are not of an adaptation; remove it")


def _finish(folder: Path) -> None:
    """Moves the files of `.pending` into place. Anyone may do so at any moment: no file's current version changes."""
    if not (folder / PENDING).exists():
        return
    for name in (JSON, TENSORS):
        with suppress(FileNotFoundError):
            (folder / PENDING / name).replace(folder / name)
    with suppress(OSError):  # there is none, or another writer's by now; a real hindrance is met in `_commit`
        (folder / PENDING).rmdir()
    _sync(folder)


def _sync(folder: Path) -> None:
    """What was renamed, made or removed in a folder is on disk when this returns; Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
