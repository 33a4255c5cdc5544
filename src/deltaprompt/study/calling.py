"""`python calling.py ASKED ANSWERED`: the process in which a function of another library runs. It imports little."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from deltaprompt.types import Example


def floats(given: Any) -> list[float]:
    """Numbers of any library, as JSON has them."""
    try:
        return [float(one) for one in given]
    except (TypeError, ValueError) as e:
        raise ValueError(f"confidence is a list of numbers, one for each row; got {given!r:.60}") from e


KINDS: dict[str, Callable[[Any], Any]] = {  # of what stands beside labels
    "trainable": int,
    "bytes": int,
    "cpu_seconds": float,
    "confidence": floats,
}


def function_of(name: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, _, function = name.partition(":")
    found = vars(import_module(module)).get(function)
    if not callable(found):
        raise LookupError(f"there is no function {function!r} in {module}")
    return found


def answered(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a function gives; without rows it is only looked for."""
    function = function_of(asked["function"])
    if "train" not in asked:
        return {}
    train, test = _examples(asked["train"]), _examples(asked["test"])
    dev = None if asked["dev"] is None else _examples(asked["dev"])
    begun = cpu_seconds()
    given = function(train, dev, test, tuple(asked["labels"]), asked["seed"], asked["options"])
    spent = cpu_seconds() - begun
    both = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping)
    found, told = given if both else (given, {})
    if odd := sorted(set(told) - set(KINDS)):
        raise ValueError(f"beside labels it gave {odd[0]!r}; possible: {', '.join(KINDS)}")
    numbers = {name: KINDS[name](value) for name, value in {"cpu_seconds": spent, **told}.items()}
    return {"found": [str(label) for label in found], **dict.fromkeys(KINDS), **numbers}


def _examples(rows: Sequence[Any]) -> list[Example]:
    return [Example(fields, label) for fields, label in rows]


def cpu_seconds() -> float:
    """User and system time of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def main() -> None:
    """Reads what is asked, and writes the answer or why there is none."""
    asked, out = map(Path, sys.argv[1:])
    try:
        told = answered(json.loads(asked.read_text(encoding="utf-8")))
    except Exception as error:
        told = {"failed": f"{type(error).__name__}: {error}"}
    part = out.with_suffix(".part")
    part.write_text(json.dumps(told), encoding="utf-8")
    part.replace(out)


if __name__ == "__main__":
    main()
