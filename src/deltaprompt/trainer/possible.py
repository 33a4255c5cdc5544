"""What values of options are possible, each with the words that an error tells it by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from deltaprompt.errors import ConfigError

Possible = Mapping[str, tuple[Callable[[Any], bool], str]]  # by name: whether a value is possible, and what is

COUNT: Final = "a whole number, 1 or more"
RATE: Final = "a number above 0"


def check(given: Mapping[str, Any], possible: Possible) -> None:
    """Raises at the first value that is not possible."""
    for name, (fits, means) in possible.items():
        if not fits(given[name]):
            raise ConfigError(f"{name} = {given[name]!r} is not possible: it is {means}")


def whole(value: Any) -> bool:
    """A whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def count(value: Any) -> bool:
    """A whole number, 1 or more."""
    return whole(value) and value >= 1


def count_or_none(value: Any) -> bool:
    """A count, or nothing."""
    return value is None or count(value)


def number(value: Any) -> bool:
    """A number of whatever size."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def rate(value: Any) -> bool:
    """A learning rate."""
    return number(value) and 0 < value < math.inf


def decay(value: Any) -> bool:
    """A weight decay."""
    return number(value) and 0 <= value < math.inf


def truth(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


SHARED: Final[Possible] = {  # options that mean the same wherever something is trained
    "batch_size": (count, COUNT),
    "accumulate": (count, COUNT),
    "learning_rate": (rate, RATE),
    "weight_decay": (decay, "0 or a number above it"),
    "schedule": (lambda v: v in ("linear", "cosine", "constant"), "linear, cosine or constant"),
    "clip": (lambda v: number(v) and v > 0, "a number above 0; inf for no clipping"),
    "precision": (lambda v: v in ("no", "bf16", "fp16"), "no, bf16 or fp16"),
    "backbone_dropout": (truth, "true or false"),
}
