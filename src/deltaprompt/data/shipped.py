"""The demo data that comes with the package, so that a first run needs no file and no download."""

from __future__ import annotations

from importlib.resources import as_file, files

from deltaprompt.data.readers import read
from deltaprompt.errors import DataError, nearest
from deltaprompt.types import Example

SPLITS = ("train", "test")


def load(split: str) -> list[Example]:
    """The labelled rows of the demo data's `split`, "train" or "test"."""
    if split not in SPLITS:
        raise DataError(f"the demo data has no split {split!r}{nearest(split, SPLITS)}")
    with as_file(files("deltaprompt.data").joinpath("demo", f"{split}.jsonl")) as path:
        return read(path)
