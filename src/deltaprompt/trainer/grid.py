"""`fit_grid`: learning rates, shots, templates and label words are tried, all cells × seeds on one backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from deltaprompt.errors import ConfigError, TrainingError
from deltaprompt.model import Task
from deltaprompt.model.trainable import Trainable
from deltaprompt.trainer.many import TOGETHER, train_many
from deltaprompt.trainer.plan import Plan
from deltaprompt.trainer.progress import Progress
from deltaprompt.trainer.run import Metrics, Run, finite
from deltaprompt.trainer.seeds import Sets, best_of, dev_of, each_once, tested, told_of, written
from deltaprompt.trainer.training import Training
from deltaprompt.types import Example

GRID = "grid.json"  # in the grid's folder


@dataclass(frozen=True)
class Cell:
    """One combination of settings, which is trained from every seed.

    Args:
        name: its own; `out/<name>_seed-<seed>` are its folders.
        task: what is asked.
        sets: the training and dev examples of a seed. Cells with the same function have the same lists.
        training: how.
        varied: the settings that are this cell's and not all cells', by name, as JSON.
    """

    name: str
    task: Task
    sets: Callable[[int], Sets]
    training: Training = Training()  # noqa: RUF009  frozen
    varied: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CellResult:
    """What the seeds of one cell came to."""

    cell: Cell
    runs: tuple[Run, ...]  # by seed
    dev: Mapping[str, Mapping[str, Any]]  # metric -> mean, std, each; empty without dev
    test: Mapping[str, Mapping[str, Any]]  # the same; empty without test data
    folders: tuple[Path, ...]  # by seed; empty where nothing is kept

    @property
    def failed(self) -> str:
        """Why one of its runs could not go on; empty where all came to their end."""
        return next((run.failed for run in self.runs if run.failed), "")

    def as_json(self) -> dict[str, Any]:
        """A line of the grid."""
        folders = [str(folder) for folder in self.folders]
        told = {**self.cell.varied, "dev": self.dev or None, "test": self.test or None, "folders": folders}
        told |= {"failed": self.failed} if self.failed else {}
        return {name: finite(value) for name, value in told.items()}


@dataclass(frozen=True)
class GridResult:
    """What all cells came to."""

    seeds: tuple[int, ...]
    cells: tuple[CellResult, ...]
    seconds: float
    out: Path | None  # `out/<cell>_seed-<seed>` are the adaptations

    @property
    def best(self) -> CellResult:
        """The best mean accuracy on dev, and of equal ones the lowest mean loss; without dev the first.

        Cells of which a run failed are left out.
        """
        whole = [cell for cell in self.cells if not cell.failed]
        return whole[best_of([_means(cell.dev) for cell in whole])]

    @property
    def best_seed(self) -> int:
        """The best on dev of the best cell's; without dev the first."""
        return self.seeds[best_of([dev_of(run) for run in self.best.runs])]

    @property
    def best_folder(self) -> Path | None:
        """Of the best cell's best seed."""
        return None if self.out is None else self.out / _called(self.best.cell, self.best_seed)

    def as_json(self) -> dict[str, Any]:
        """What `deltaprompt fit --json` prints of a grid."""
        return {
            "grid": [cell.as_json() for cell in self.cells],
            "best": {**self.best.as_json(), "name": self.best.cell.name, "seed": self.best_seed},
            "seeds": list(self.seeds),
            "seconds": round(self.seconds, 3),
            "out": None if self.out is None else str(self.out),
        }


def fit_grid(
    make_model: Callable[[Sequence[Task], Sequence[int]], Trainable],
    cells: Sequence[Cell],
    test: Sequence[Example] | None = None,
    *,
    seeds: Sequence[int] = (0,),
    together: int = TOGETHER,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    unlabelled: Sequence[Example] = (),
) -> GridResult:
    """Trains an adaptation of every cell and seed, measures each on test, and names the cell that is best on dev.

    Args:
        make_model: a new model with a slot for each of these tasks and seeds: `Model(backbone, tasks, deltas, seeds)`.
            It is taken off its backbone afterwards.
        cells: each with a name of its own. Neighbours train in one pass: best those that read the same texts.
        test: labelled examples, the same for all.
        seeds: each once, the same for all.
        together: adaptations in one pass through the backbone at most; each ends as it would alone.
        out: a folder; each adaptation is kept in `out/<cell>_seed-<seed>`, the result in `out/grid.json`.
        resume: what is finished is not trained again; what was broken off goes on.
        unlabelled: texts of the task, as `fit` takes them; the same for all.

    Raises:
        TrainingError: no cell came to its end, or there is not enough memory. One that failed alone is told in its
            result.
    """
    each_once(seeds)
    _own_names(cells)
    out, dealt = None if out is None else Path(out), cache(_dealt)
    plans = [
        Plan(*dealt(c.sets, seed), c.training, seed, _called(c, seed), unlabelled) for c in cells for seed in seeds
    ]
    runs, scores = tested(
        make_model([cell.task for cell in cells for _ in seeds], [plan.seed for plan in plans]),
        lambda model: train_many(model, plans, together=together, out=out, resume=resume, progress=progress),
        [] if out is None else [out / plan.called for plan in plans],
        test,
    )
    found = [
        _found(cell, seeds, runs[i : i + len(seeds)], scores[i : i + len(seeds)], out)
        for cell, i in zip(cells, range(0, len(plans), len(seeds)), strict=True)
    ]
    if all(cell.failed for cell in found):
        raise TrainingError(f"no cell of the grid came to its end; {found[0].cell.name}: {found[0].failed}")
    result = GridResult(tuple(seeds), tuple(found), math.fsum(run.seconds for run in runs), out)
    if out is not None:
        written(out / GRID, result.as_json())
    return result


def _own_names(cells: Sequence[Cell]) -> None:
    names = [cell.name for cell in cells]
    if not names or (twice := sorted({name for name in names if names.count(name) > 1})):
        got = "none" if not names else f"{twice[0]!r} twice"
        raise ConfigError(f"a grid has one cell or more, each with a name of its own; got {got}")


def _dealt(sets: Callable[[int], Sets], seed: int) -> Sets:
    return sets(seed)


def _called(cell: Cell, seed: int) -> str:
    """The name of an adaptation, and of its folder."""
    return f"{cell.name}_seed-{seed}"


def _found(
    cell: Cell, seeds: Sequence[int], runs: Sequence[Run], scores: Sequence[Metrics], out: Path | None
) -> CellResult:
    folders = () if out is None else tuple(out / _called(cell, seed) for seed in seeds)
    return CellResult(cell, tuple(runs), told_of([dev_of(run) for run in runs]), told_of(scores), folders)


def _means(told: Mapping[str, Mapping[str, Any]]) -> Metrics:
    return {metric: own["mean"] for metric, own in told.items()}
