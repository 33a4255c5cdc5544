"""`compare`: every method on every data set after so many shots, from every seed; what is kept is not done again."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaprompt.errors import ConfigError, DeltaPromptError, TrainingError, check_one_of, nearest
from deltaprompt.features.batching import chunks
from deltaprompt.study.bootstrap import SCORES, Metric
from deltaprompt.study.cells import FILE, Cell, Kept, key_of
from deltaprompt.study.comparison import Comparison, Found, Place, comparison
from deltaprompt.study.data import DataSet, Shots, called
from deltaprompt.study.method import Entry, Method, Outcome
from deltaprompt.trainer.possible import whole
from deltaprompt.trainer.seeds import each_once

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Nothing is told."""


@dataclass(frozen=True)
class Asked:
    """A method on a data set after so many shots."""

    method: Method
    data: DataSet
    entry: Entry
    shots: Shots
    seeds: tuple[int, ...]


def compare(
    datasets: Sequence[DataSet],
    methods: Sequence[Method],
    *,
    shots: Sequence[Shots] = (1, 4, 16),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    baseline: str | None = None,
    test_rows: int | None = None,
    metric: Metric = "accuracy",
    out: str | Path | None = None,
    say: Say = silent,
) -> Comparison:
    """Trains and measures every method on every data set, and compares them.

    All methods of a data set, number of shots and seed see the same support rows and the same test rows. With 0 shots
    nothing is drawn, so that one seed, the first, stands for all.

    Args:
        datasets: each with a name of its own.
        methods: each with a name of its own.
        shots: of each label; 0 for none, "all" for all rows.
        seeds: each once.
        baseline: the method that differences are to; without it there are none.
        test_rows: of each data set at most, evenly spaced, and as many texts outside.
        metric: "accuracy" or "macro_f1".
        out: a folder that keeps each cell when it is done. Those that are there are not computed again.
        say: is given a line for what is begun and what is done.

    Raises:
        ConfigError: something is wrong with what is asked; nothing was computed.
        TrainingError: no cell came to its end.
    """
    check_asked([d.name for d in datasets], [m.name for m in methods], shots, seeds, baseline, test_rows, metric)
    datasets = [data.limited(test_rows) for data in datasets]
    asked = _asked(datasets, methods, shots, tuple(seeds))
    kept = Kept(None if out is None else Path(out))
    found = _found(asked, kept)
    _told(kept, found, asked, say)
    for method in {a.method.name: a.method for a in asked if _missing(a, found)}.values():
        method.ready()
    _compute(asked, kept, found, say)
    if not any(isinstance(cell, Cell) for cell in found.values()):
        raise TrainingError(f"no cell came to its end: {next(iter(found.values()))}")
    return comparison(found, datasets, [m.name for m in methods], shots, seeds, metric, baseline)


def check_asked(
    datasets: Sequence[str],
    methods: Sequence[str],
    shots: Sequence[Shots],
    seeds: Sequence[int],
    baseline: str | None,
    test_rows: int | None,
    metric: str,
) -> None:
    """Raises where names, numbers or the metric are not possible."""
    each_once(seeds)
    check_one_of("metric", metric, SCORES)
    for what, names in (("data set", datasets), ("method", methods)):
        if not names:
            raise ConfigError(f"there is no {what}; a comparison has one or more")
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ConfigError(f"two {what}s are called {twice[0]!r}; give each a name of its own")
    odd = [k for i, k in enumerate(shots) if k in shots[:i] or not (k == "all" or whole(k))]
    if not shots or odd:
        raise ConfigError(f'shots = {list(shots)}: each is 0, a number above it or "all", and there once')
    if baseline is not None and baseline not in methods:
        raise ConfigError(f"baseline = {baseline!r} is no method here{nearest(baseline, methods)}")
    if test_rows is not None and test_rows < 1:
        raise ConfigError(f"test_rows = {test_rows}: it is a whole number, 1 or more, or left out for all")


def _asked(
    datasets: Sequence[DataSet], methods: Sequence[Method], shots: Sequence[Shots], seeds: tuple[int, ...]
) -> list[Asked]:
    """All that is to be known, in the order in which it is computed; whatever is wrong with it is told here."""
    found = list[Asked]()
    for data in datasets:
        entries = []
        for method in methods:
            try:
                entries.append((method, method.entry(data)))
            except DeltaPromptError as e:
                raise ConfigError(f"method {method.name!r} on {data.name}: {e}") from e
            if not any(entries[-1][1].answers(k) for k in shots):
                raise ConfigError(_idle(method.name, data.name, entries[-1][1]))
        for k in shots:
            own = seeds[:1] if k == 0 else seeds
            found += [Asked(method, data, entry, k, own) for method, entry in entries if entry.answers(k)]
    return found


def _idle(method: str, data: str, entry: Entry) -> str:
    if entry.learns:
        return f"method {method!r} on {data} needs examples, and shots has 0 alone; add others"
    return (
        f"method {method!r} on {data} learns nothing from examples, and shots has no 0; add that, or a delta or a "
        "verbalizer that learns"
    )


def _found(asked: Sequence[Asked], kept: Kept) -> dict[Place, Cell | str]:
    """What is kept of what is asked."""
    keys = [key_of(a.method.name, a.entry, a.data, a.shots, seed) for a in asked for seed in a.seeds]
    return {(k.method, k.data, k.shots, k.seed): kept.cells[k] for k in keys if k in kept.cells}


def _missing(a: Asked, found: Found) -> list[int]:
    return [seed for seed in a.seeds if (a.method.name, a.data.name, a.shots, seed) not in found]


def _told(kept: Kept, found: Found, asked: Sequence[Asked], say: Say) -> None:
    """What is about to be done."""
    cells = sum(len(a.seeds) for a in asked)
    where = "" if kept.path is None else f", {len(found)} of them in {kept.path}"
    say(f"{cells} cells{where}")
    if kept.skipped:
        say(f"{kept.skipped} line{'s' * (kept.skipped > 1)} of {FILE} cut off or of another form, left out")


def _compute(asked: Sequence[Asked], kept: Kept, found: dict[Place, Cell | str], say: Say) -> None:
    """Computes what is missing, as many seeds at once as a method takes, and keeps each when it is done."""
    todo, done = sum(len(_missing(a, found)) for a in asked), 0
    for a, seeds in list(_groups(asked, found)):
        named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        say(f"{done + 1} of {todo}: {a.data.name}, {called(a.shots)}: {a.method.name}, {named}")
        each = [_cell(a, seed, outcome) for seed, outcome in zip(seeds, _outcomes(a, seeds), strict=True)]
        for seed, cell in zip(seeds, each, strict=True):
            found[a.method.name, a.data.name, a.shots, seed] = cell
            if isinstance(cell, Cell):
                kept.add(cell)
        done += len(seeds)
        say(f"  {_line(each)}")


def _cell(a: Asked, seed: int, outcome: Outcome | str) -> Cell | str:
    if isinstance(outcome, str):
        return outcome
    return Cell.of(key_of(a.method.name, a.entry, a.data, a.shots, seed), a.data, outcome)


def _groups(asked: Sequence[Asked], found: Found) -> Iterator[tuple[Asked, list[int]]]:
    """What is missing, in parts that are computed at once."""
    for a in asked:
        for seeds in chunks(_missing(a, found), a.method.together):
            yield a, seeds


def _outcomes(a: Asked, seeds: Sequence[int]) -> Sequence[Outcome | str]:
    """What a method comes to; one that breaks down has failed there, and others go on."""
    try:
        return a.method.run(a.data, a.shots, seeds)
    except DeltaPromptError as e:
        return [str(e)] * len(seeds)
    except Exception as e:
        return [f"{type(e).__name__}: {e}"] * len(seeds)


def _line(each: Sequence[Cell | str]) -> str:
    """What cells came to."""
    cells = [cell for cell in each if isinstance(cell, Cell)]
    told = [f"failed: {why}" for why in dict.fromkeys(cell for cell in each if isinstance(cell, str))]
    if cells:
        accuracies, seconds = [cell.accuracy for cell in cells], statistics.fmean(cell.cpu_seconds for cell in cells)
        spread = f" ± {statistics.stdev(accuracies):.3f}" if len(cells) > 1 else ""
        areas = [cell.auroc for cell in cells if cell.auroc is not None]
        also = f", AUROC {statistics.fmean(areas):.3f}" if areas else ""
        told.insert(0, f"accuracy {statistics.fmean(accuracies):.3f}{spread}{also}, {seconds:.1f} CPU-seconds a seed")
    return "; ".join(told)
