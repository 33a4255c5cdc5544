"""What an estimator is given, checked: samples, labels, parameters. A mistake says where it is and how to mend it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import column_or_1d

from deltaprompt.data.readers import sound
from deltaprompt.errors import ConfigError, DataError, nearest

LISTS: Final = "a list, a tuple, a numpy array of one dimension or a pandas Series"
SHOWN: Final = 60  # characters of a value in a message


class InputError(DataError, ValueError):
    """What is wrong with X or y, as scikit-learn's conventions ask also a `ValueError`."""


class ParameterError(ConfigError, ValueError):
    """What is wrong with a parameter, as scikit-learn's conventions ask also a `ValueError`."""


@contextmanager
def conventional() -> Iterator[None]:
    """Within it what is wrong with data or parameters is a `ValueError` too."""
    try:
        yield
    except (InputError, ParameterError):
        raise
    except DataError as e:
        raise InputError(str(e)) from e
    except ConfigError as e:
        raise ParameterError(str(e)) from e


def plain(value: Any) -> Any:
    """A value of numpy's as Python's own; any other as it is."""
    return value.item() if isinstance(value, np.generic) else value


def listed(given: Any, name: str, of: str) -> list[Any]:
    """The items of X or y, one a sample, in one dimension.

    Args:
        given: as the user gave it.
        name: "X" or "y".
        of: what is in it: "texts", "labels", …
    """
    shape = (len(given),) if isinstance(given, list | tuple) else np.asarray(given).shape
    if not shape:
        raise InputError(f"{name} is {told(given)}; give {of}, one a sample: {LISTS}")
    if len(shape) != 1:
        raise InputError(
            f"{name} has {len(shape)} dimensions, its shape is {shape}, and {of} have one: give {LISTS}. Of a data "
            "frame that is a column, frame['text'], or for a template of several fields its rows, "
            "frame.to_dict('records')"
        )
    if not shape[0]:
        raise InputError(f"{name} is empty, it has 0 samples; at least one is needed")
    return list(given if isinstance(given, list | tuple) else np.asarray(given))


def told(value: Any) -> str:
    """A value in a message, and of what type it is."""
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…"
    return shown if value is None else f"{shown} ({type(value).__name__})"


def text_in(value: Any, at: str) -> str:
    """A text, which can be blank; anything else is an error that says where it is."""
    if isinstance(value, str):
        return sound(str(value), at)
    number = isinstance(plain(value), int | float) and value == value
    mend = "write numbers as texts, str(…)" if number else "fill what is missing with a text, or leave the sample out"
    mend = "join its words, ' '.join(…)" if isinstance(value, list | tuple) else mend
    raise InputError(f"{at} is {told(value)} and no text; {mend}")


def rows_in(X: Any, fields: Sequence[str]) -> list[dict[str, str]]:
    """The fields of every sample.

    Args:
        X: texts, for a template of one field; or mappings of fields.
        fields: those of the template.
    """
    each = listed(X, "X", "texts or mappings of fields")
    return [_row(value, n, fields) for n, value in enumerate(each)]


def _row(value: Any, number: int, fields: Sequence[str]) -> dict[str, str]:
    at = f"X[{number}]"
    if not isinstance(value, Mapping):
        text = text_in(value, at)
        if len(fields) > 1:
            raise InputError(
                f"{at} is a text, and the template has the fields {', '.join(fields)}; give mappings, "
                f"{{{', '.join(f'{name!r}: …' for name in fields)}}}"
            )
        return dict.fromkeys(fields or ("text",), text)
    if missing := [name for name in fields if name not in value]:
        raise InputError(f"{at} has no field {missing[0]!r}, which the template has{nearest(missing[0], value)}")
    return {name: text_in(value[name], f"{at}[{name!r}]") for name in fields}


def labels_in(y: Any, samples: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The classes, sorted, in the type that they have in y, and the number of each sample's class.

    Raises:
        InputError: a label is missing, there are labels and fractions, texts and numbers, or one class only.
    """
    required(y)
    if not isinstance(y, list | tuple) and np.asarray(y).shape[1:] == (1,):
        y = column_or_1d(y, warn=True)
    each = listed(y, "y", "labels")
    paired(samples, len(each))
    families = [_family(plain(value), n) for n, value in enumerate(each)]
    if len(set(families)) > 1:
        n = families.index(next(family for family in families if family != families[0]))
        raise InputError(
            f"y[0] is {told(each[0])} and y[{n}] is {told(each[n])}; labels are all texts, or all numbers: "
            "[str(label) for label in y] makes them texts"
        )
    values = np.asarray(y)
    if values.dtype == object and families[0] == "number":  # of a Series that could have gaps
        values = np.asarray([plain(value) for value in each])
    classes, numbers = np.unique(values, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"y has one class only, {plain(classes[0])!r}; there must be two or more to tell apart")
    return classes, numbers


def _family(value: Any, number: int) -> str:
    """What sort of label a value is."""
    match value:
        case str():
            if not sound(str(value), f"y[{number}]").strip():
                raise InputError(f"y[{number}] is {told(value)}, a blank label; name it, or leave the sample out")
            return "text"
        case bool() | int():
            return "number"
        case float() if value.is_integer():
            return "number"
        case float() if not math.isnan(value):
            raise InputError(
                f"Unknown label type: y[{number}] is {value}, and a continuous target is none for a classifier; labels "
                "are texts, whole numbers or booleans"
            )
    raise InputError(
        f"y[{number}] is {told(value)} and no label; labels are texts, whole numbers or booleans. Leave samples out "
        "that have none"
    )


def required(y: Any) -> None:
    """Raises where there is no y."""
    if y is None:
        raise InputError(
            "an estimator that learns from answers requires y to be passed, but the target y is None; give fit(X, y) "
            "what is right for each sample"
        )


def paired(samples: int, answers: int) -> None:
    """Raises where X and y are not of as many samples."""
    if samples != answers:
        raise InputError(f"X has {samples} samples and y has {answers}; each sample of X has one in y")


def names_of(classes: NDArray[Any]) -> tuple[str, ...]:
    """The classes as label names, as files have them: 1.0 is "1", True is "true"."""
    return tuple(_name(plain(one)) for one in classes)


def _name(label: Any) -> str:
    if isinstance(label, bool):
        return "true" if label else "false"
    return str(int(label)) if isinstance(label, float) else str(label)


def words_for(given: Any, classes: NDArray[Any]) -> dict[str, Any] | None:
    """What stands for each label name; `given` has it by class."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ParameterError(
            f"label_words is {told(given)}; give a mapping of every class to its word, words or sentence"
        )
    known = {plain(label): words for label, words in given.items()}
    found = {}
    for name, label in zip(names_of(classes), classes.tolist(), strict=True):
        if label not in known and name not in known:
            raise ParameterError(f"label_words has none for the class {label!r}{nearest(str(label), map(str, known))}")
        words = known[label if label in known else name]
        if not isinstance(words, str) and not (
            isinstance(words, list | tuple) and all(isinstance(w, str) for w in words)
        ):
            raise ParameterError(
                f"label_words of the class {label!r} are {told(words)}; give a text or a list of texts"
            )
        found[name] = words if isinstance(words, str) else tuple(words)
    return found
