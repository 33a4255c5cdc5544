"""Documents from files, and their tokens one after the other: what rows are cut from."""

from __future__ import annotations

import glob
import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaprompt.data.formats import rows_of
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.trainer.possible import COUNT, count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AT_ONCE = 4_000_000  # characters that are tokenised at once


@dataclass(frozen=True)
class Texts:
    """A file of documents: `[[data]]` and `[[dev]]` in a recipe.

    Args:
        path: .jsonl .json .csv .tsv .parquet (.gz), a document a row; or .txt (.gz), which is one document. A pattern
            such as books/*.txt is all files that it matches, in the order of their names.
        text: the column that holds the document.
        repeat: how often it is gone through before a row is cut anew; each time rows begin elsewhere.
        limit: characters of a document at most.
        documents: documents at most, from the first.
        hold_out: every so many-th document is no training text but dev.
    """

    path: str
    text: str = "text"
    repeat: int = 1
    limit: int | None = None
    documents: int | None = None
    hold_out: int | None = None

    def __post_init__(self) -> None:
        if not count(self.repeat):
            raise ConfigError(f"{self.path}: repeat = {self.repeat!r} is not possible: it is {COUNT}")
        for name in ("limit", "documents"):
            if vars(self)[name] is not None and not count(vars(self)[name]):
                raise ConfigError(f"{self.path}: {name} = {vars(self)[name]!r} is not possible: it is {COUNT}")
        if self.hold_out is not None and not (count(self.hold_out) and self.hold_out > 1):
            raise ConfigError(f"{self.path}: hold_out = {self.hold_out!r} is not possible: it is 2 or more")

    def read(self) -> list[str]:
        """Its documents, those without a text left out.

        Raises:
            DataError: there is no such file, or it has no such column, or no document.
        """
        found: list[str] = []
        for document in self._all():
            if self.documents is not None and len(found) == self.documents:
                break
            if document.strip():
                found.append(document[: self.limit])
        if not found:
            raise DataError(f"{self.path}: holds no document; give a file with texts in the column {self.text!r}")
        return found

    def parted(self) -> tuple[list[str], list[str]]:
        """Its documents to train on, and those that are held out."""
        documents, each = self.read(), self.hold_out
        if each is None:
            return documents, []
        if len(documents) < each:
            raise DataError(
                f"{self.path}: hold_out = {each} takes every {each}th of its documents, and it has {len(documents)}; "
                "give a smaller number, or a file of its own in [[dev]]"
            )
        held = documents[each - 1 :: each]
        del documents[each - 1 :: each]
        return documents, held

    def _all(self) -> Iterator[str]:
        for path in self._files():
            if path.lower().endswith((".txt", ".txt.gz")):
                yield _whole(Path(path).expanduser())
                continue
            for row in rows_of(path, None):
                yield _text(row.at, row.values, self.text)

    def _files(self) -> Iterable[str]:
        if not any(sign in self.path for sign in "*?[") or Path(self.path).expanduser().is_file():
            return [self.path]
        found = sorted(glob.glob(str(Path(self.path).expanduser()), recursive=True))
        if not found:
            raise DataError(f"{self.path}: no file is of that pattern; patterns are relative to where you are")
        return found


@dataclass(frozen=True, eq=False)
class Stream:
    """A source's tokens, one document after the other, each closed by an end token."""

    name: str
    documents: int
    tokens: Tensor  # [n], int32
    repeat: int = 1

    def whole(self) -> Tensor:
        """All tokens as often as they are gone through."""
        return self.tokens.repeat(self.repeat)


def streams(
    sources: Sequence[Texts | str], tokenizer: PreTrainedTokenizerFast, end: int
) -> tuple[list[Stream], list[Stream]]:
    """What sources (strings are documents, together one source) give to train on, and what of them is held out."""
    train: list[Stream] = []
    held: list[Stream] = []
    for source in (s for s in sources if isinstance(s, Texts)):
        for documents, to in zip(source.parted(), (train, held), strict=True):
            if documents:
                repeat = source.repeat if to is train else 1
                to.append(Stream(source.path, len(documents), tokens_of(documents, tokenizer, end), repeat))
    if given := [s for s in sources if isinstance(s, str)]:
        train.append(Stream("texts", len(given), tokens_of(given, tokenizer, end)))
    return train, held


def tokens_of(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, end: int) -> Tensor:
    """Token ids of documents [n], int32, each followed by `end`."""
    pieces: list[Tensor] = []
    for some in _portions(documents):
        ids = tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [torch.tensor([*each, end], dtype=torch.int32) for each in ids]
    return torch.cat(pieces)


def training_documents(sources: Sequence[Texts | str]) -> Iterator[str]:
    """All documents to train on, each once, whatever repeats them."""
    for source in sources:
        yield from [source] if isinstance(source, str) else source.parted()[0]


def _portions(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of not many characters."""
    some: list[str] = []
    size = 0
    for document in documents:
        if some and size + len(document) > AT_ONCE:
            yield some
            some, size = [], 0
        some.append(document)
        size += len(document)
    yield some


def _text(at: str, values: Mapping[str, Any], column: str) -> str:
    if column not in values:
        raise DataError(f"{at}: there is no column {column!r}; there are {', '.join(values)}; name one with text")
    if not isinstance(values[column], str):
        raise DataError(f"{at}: the column {column!r} holds {values[column]!r:.40}; a document is text")
    return str(values[column])


def _whole(path: Path) -> str:
    """A text file as it is."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.name.lower().endswith(".gz") else data
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError as e:
        raise DataError(f"there is no file {str(path)!r}; paths are relative to where you are") from e
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read ({e}); it must be UTF-8 text") from e
