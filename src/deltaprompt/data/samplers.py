"""Train and dev sets are dealt class by class from one seeded generator: the same seed, the same rows, on any machine.

Only `Random.random()` is drawn from, whose sequence Python keeps across versions (it does not keep `sample`'s and
`shuffle`'s: https://docs.python.org/3/library/random.html#notes-on-reproducibility). Classes are dealt in the order of
`labels_of`, so the order in which they first appear does not matter; the order of rows within a class does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import TypeVar

from deltaprompt.data.pairs import said_in
from deltaprompt.data.readers import labels_of
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.types import Example

T = TypeVar("T")
DEV_SHARE = 0.1  # of all rows, where there are neither shots nor a dev file
Dealt = tuple[list[Example], list[Example]]


def few_shot(examples: Sequence[Example], shots: int, seed: int, dev: bool = True) -> Dealt:
    """`shots` rows of each class to train on and, with `dev`, up to as many others of each (never none) to choose by.

    With one seed, the training rows of fewer shots are among those of more. Where rows have several labels, each label
    takes its own, or all it has where these are fewer, and a row that is taken by several is there once. What has the
    fields of a training row is not in the dev set.
    """
    if shots < 1:
        raise ConfigError(f"shots={shots}: a few-shot sample takes 1 row of each class or more")
    classes = by_class(examples)
    if not any(example.labels for example in examples):
        _check_counts({name: len(rows) for name, rows in classes.items()}, shots, dev)
    return _deal(
        examples, classes.values(), seed, lambda count: (shots, min(shots, max(count - shots, 0)) if dev else 0)
    )


def dealt(
    train: Sequence[Example],
    dev: Sequence[Example] | None,
    shots: int | None,
    seed: int,
    hold_out: bool = True,
    few: Callable[[Sequence[Example], int, int, bool], Dealt] = few_shot,
    apart: Callable[[Sequence[Example], float, int], Dealt] | None = None,
) -> tuple[Sequence[Example], Sequence[Example] | None]:
    """Rows to train on and rows to choose by: where there are none of these, some are kept from training.

    Args:
        train: what is drawn from.
        dev: rows to choose by, where there are some.
        shots: of each class, and as many to choose by; all rows where not given, of which a tenth is held out.
        seed: of the draws.
        hold_out: whether rows may be kept from training.
        few: how shots are drawn.
        apart: how a share is held out; class by class where not given.
    """
    held = dev is None and hold_out
    if shots is not None:
        some, others = few(train, shots, seed, held)
        return some, others if held else dev
    return (apart or split)(train, DEV_SHARE, seed) if held else (train, dev)


def few_sentences(examples: Sequence[Example], shots: int, seed: int, dev: bool = True) -> Dealt:
    """Texts with `shots` spans of each label, or a few more, to train on, and, with `dev`, as many others to choose by.

    The rarest label draws texts until it has its spans, then the next one; texts that no label needs are then left out
    (Yang & Katiyar 2020, greedy sampling). A label that has fewer spans left for dev has all of them there. What has
    the fields of a training text is not in the dev set.

    Raises:
        DataError: no text has a span, a label has fewer than `shots`, or nothing is left for dev.
    """
    if shots < 1:
        raise ConfigError(f"shots={shots}: a few-shot sample takes 1 span of each label or more")
    counts = [Counter(span.label for span in example.spans) for example in examples]
    totals = {name: sum(own[name] for own in counts) for name in sorted({name for own in counts for name in own})}
    if not totals:
        raise DataError("no text has a span to sample by; read them with their tags first (read_tagged)")
    if short := [name for name in totals if totals[name] < shots]:
        raise DataError(
            f"label {short[0]!r} has {totals[short[0]]} spans; shots={shots} needs {shots} of each; possible: fewer "
            "shots, more texts of that label, or limited_to(examples, labels) without it"
        )
    generator = Random(seed)
    train = _covering(counts, dict.fromkeys(totals, shots), (), generator)
    known = {said_in(examples[i]) for i in train}
    gone = [i for i, example in enumerate(examples) if said_in(example) in known]
    left = {name: n - sum(counts[i][name] for i in gone) for name, n in totals.items()}
    held = _covering(counts, {name: min(shots, n) for name, n in left.items()}, gone, generator) if dev else []
    if dev and not held:
        raise DataError(f"all {len(gone)} texts with spans are needed to train; give more, or dev=False")
    return [examples[i] for i in train], [examples[i] for i in held]


def _covering(
    counts: Sequence[Mapping[str, int]], wanted: Mapping[str, int], used: Sequence[int], generator: Random
) -> list[int]:
    """The numbers of texts that together have so many spans of each label, and of which none could be left out."""
    free, have, taken = sorted({*range(len(counts))} - {*used}), Counter[str](), list[int]()
    of_label = {name: [i for i in free if counts[i].get(name)] for name in wanted}
    for name in sorted(wanted, key=lambda name: (sum(counts[i][name] for i in of_label[name]), name)):
        drawn = iter(_shuffled(of_label[name], generator))
        while have[name] < wanted[name]:
            if (number := next(drawn)) not in taken:
                taken.append(number)
                have.update(counts[number])
    for number in tuple(taken):
        if all(have[name] - n >= wanted[name] for name, n in counts[number].items()):
            taken.remove(number)
            have.subtract(counts[number])
    return _shuffled(taken, generator)


def split(examples: Sequence[Example], fraction: float, seed: int) -> Dealt:
    """All rows as (train, dev): about `fraction` of each class is dev, at least one row of a class with two or more.

    What has the fields of a training row is left out of the dev set. Where rows have several labels, those with the
    same labels are a class here.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction={fraction}: the dev set's share lies between 0 and 1, for example 0.1")
    classes = by_labels(examples)
    if max(map(len, classes)) < 2:
        raise DataError(
            "every class has 1 row only, so none can go to the dev set; add rows, or train without a dev set"
        )

    def sizes(count: int) -> tuple[int, int]:
        held_out = 0 if count < 2 else min(max(int(fraction * count + 0.5), 1), count - 1)
        return count - held_out, held_out

    return _deal(examples, classes, seed, sizes)


def by_class(examples: Sequence[Example]) -> dict[str, list[int]]:
    """The numbers of each class's rows, classes in the order of `labels_of`; one of several labels is of each."""
    classes: dict[str, list[int]] = {name: [] for name in labels_of(examples)}
    if not classes:
        raise DataError("there are no rows to sample from; read some with labels first")
    for number, example in enumerate(examples):
        for name in example.gold:
            classes[name].append(number)
    return classes


def by_labels(examples: Sequence[Example]) -> list[list[int]]:
    """The numbers of the rows with the same labels, in the order of `labels_of`."""
    order = {name: i for i, name in enumerate(by_class(examples))}
    classes: dict[tuple[int, ...], list[int]] = {}
    for number, example in enumerate(examples):
        classes.setdefault(tuple(sorted(order[name] for name in example.gold)), []).append(number)
    return [classes[key] for key in sorted(classes)]


def _check_counts(counts: Mapping[str, int], shots: int, dev: bool) -> None:
    """Every class has `shots` rows, and one more where there is a dev set."""
    needed = shots + dev
    short = sorted((name for name in counts if counts[name] < needed), key=counts.__getitem__)
    if not short:
        return
    least = counts[short[0]]
    more = len(short) - 1
    others = f" (and {more} more {'class has' if more == 1 else 'classes have'} too few)" if more else ""
    for_dev = ", one of them for dev" if dev else ""
    raise DataError(
        f"class {short[0]!r} has {least} row{'s' * (least != 1)}{others}; shots={shots} needs {needed} of each class"
        f"{for_dev}; {_ways_out(least, shots, dev)}"
    )


def _ways_out(least: int, shots: int, dev: bool) -> str:
    """What the smallest class, of `least` rows, makes possible."""
    ways = [f"shots up to {least - dev}"] if least > dev else []
    ways += ["dev=False"] if dev and least >= shots else []
    return f"possible: {' or '.join([*ways, 'more rows of that class'])}"


def _deal(
    examples: Sequence[Example], classes: Iterable[Sequence[int]], seed: int, sizes: Callable[[int], tuple[int, int]]
) -> Dealt:
    """From each class, shuffled: first rows to train, next to dev, in the numbers that `sizes` gives for its count."""
    generator = Random(seed)
    mixed = [(_shuffled(rows, generator), *sizes(len(rows))) for rows in classes]
    train = dict.fromkeys(number for rows, first, _ in mixed for number in rows[:first])
    left = [([number for number in rows if number not in train], second) for rows, _, second in mixed]
    dev = dict.fromkeys(number for rows, second in left for number in rows[:second])
    first, second = ([examples[number] for number in _shuffled(list(some), generator)] for some in (train, dev))
    known = {said_in(example) for example in first}
    unseen = [example for example in second if said_in(example) not in known]
    if second and not unseen:
        raise DataError(
            "every row that could be in the dev set is in the training set too; add rows that are not alike"
        )
    return first, unseen


def _shuffled(items: Sequence[T], generator: Random) -> list[T]:
    """`items` in the order of one random number drawn for each."""
    keys = [generator.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
