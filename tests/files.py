"""Data files that tests write."""

from __future__ import annotations

import gzip
import json
from pathlib import Path


def written(path: Path, text: str) -> Path:
    """A file of a text, packed where it is called .gz."""
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rows(path: Path, *each: object) -> Path:
    """A file of JSON, a row a line."""
    return written(path, "\n".join(json.dumps(one, ensure_ascii=False) for one in each))
