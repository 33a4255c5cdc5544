"""`fit_seeds`: the same training from several seeds, together on one backbone; mean ± standard deviation."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltaprompt.errors import ConfigError, TrainingError
from deltaprompt.model.trainable import Trainable
from deltaprompt.store import write_text
from deltaprompt.trainer.accelerated import is_main
from deltaprompt.trainer.fitting import fit
from deltaprompt.trainer.kept import note
from deltaprompt.trainer.many import TOGETHER, train_many
from deltaprompt.trainer.plan import Plan
from deltaprompt.trainer.possible import whole
from deltaprompt.trainer.progress import Progress
from deltaprompt.trainer.run import Metrics, Run, rank
from deltaprompt.trainer.training import Training
from deltaprompt.types import Example

SEEDS = "seeds.json"  # in the folder of several
Sets = tuple[Sequence[Any], Sequence[Any] | None]  # of examples, or of episodes


@dataclass(frozen=True)
class SeedsResult:
    """What several seeds came to."""

    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    test: Mapping[str, Mapping[str, Any]]  # metric -> mean, std, each, of those that came to their end
    best_seed: int  # the best on dev; without dev the first
    seconds: float
    out: Path | None  # of several seeds, `out/seed-0`, … are the adaptations

    @property
    def best(self) -> Run:
        """The run of the best seed."""
        return self.runs[self.seeds.index(self.best_seed)]

    @property
    def failed(self) -> dict[int, str]:
        """The seeds that could not go on, and why."""
        return {seed: run.failed for seed, run in zip(self.seeds, self.runs, strict=True) if run.failed}

    def as_json(self) -> dict[str, Any]:
        """What `deltaprompt fit --json` prints."""
        failed = {str(seed): why for seed, why in self.failed.items()}
        return {
            "seeds": list(self.seeds),
            **({"failed": failed} if failed else {}),
            "best_seed": self.best_seed,
            "test": {name: dict(told) for name, told in self.test.items()},
            "trainable": self.best.trainable,
            "bytes": self.best.bytes,
            "seconds": round(self.seconds, 3),
            "out": None if self.out is None else str(self.out),
        }


def fit_seeds(
    make_model: Callable[[Sequence[int]], Trainable],
    train_of: Callable[[int], Sets],
    test: Sequence[Any] | None = None,
    *,
    seeds: Sequence[int] = (0,),
    training: Training = Training(),  # noqa: B008  frozen
    together: int = TOGETHER,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    unlabelled: Sequence[Example] = (),
) -> SeedsResult:
    """Trains an adaptation of every seed, measures each on test, and names the one that is best on dev.

    Args:
        make_model: a new model with a slot for each of the seeds. It is taken off its backbone afterwards.
        train_of: the training and dev examples of a seed.
        test: labelled examples.
        seeds: each once.
        training: how, the same for all.
        together: seeds in one pass through the backbone at most; each ends as it would alone.
        out: a folder: of one seed the adaptation itself, of several `out/seed-<seed>` each.
        resume: seeds that are finished are not trained again; what was broken off goes on.
        unlabelled: texts of the task, as `fit` takes them.

    Raises:
        TrainingError: no seed came to its end, or there is not enough memory. One that failed alone is told in the
            result.
    """
    each_once(seeds)
    out, alone = None if out is None else Path(out), len(seeds) == 1
    plans = [Plan(*train_of(seed), training, seed, unlabelled=unlabelled) for seed in seeds]

    def train(model: Trainable) -> list[Run]:
        if not alone:
            return train_many(model, plans, together=together, out=out, resume=resume, progress=progress)
        return [_alone(model, plans[0], out, resume, progress)]

    folders = [] if out is None else [out] if alone else [out / plan.called for plan in plans]
    runs, scores = tested(make_model(seeds), train, folders, test)
    whole = [i for i, run in enumerate(runs) if not run.failed]
    if not whole:
        raise TrainingError(f"no seed came to its end; {plans[0].called}: {runs[0].failed}")
    best, test_told = seeds[whole[best_of([dev_of(runs[i]) for i in whole])]], told_of([scores[i] for i in whole])
    result = SeedsResult(tuple(seeds), tuple(runs), test_told, best, math.fsum(r.seconds for r in runs), out)
    if out is not None and not alone:
        written(out / SEEDS, result.as_json())
    return result


def _alone(model: Trainable, plan: Plan, out: Path | None, resume: bool, progress: Progress | None) -> Run:
    return fit(
        model,
        plan.train,
        plan.dev,
        training=plan.training,
        seed=plan.seed,
        out=out,
        resume=resume,
        progress=progress,
        unlabelled=plan.unlabelled,
    )


# What a grid of cells shares


def each_once(seeds: Sequence[int]) -> None:
    """Raises where there is no seed, one twice, or one that is no whole number, 0 or more."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds = {list(seeds)}: there is one or more, and each once")
    if not all(map(whole, seeds)):
        raise ConfigError(f"seeds = {list(seeds)}: each is a whole number, 0 or more")


def tested(
    model: Trainable, train: Callable[[Trainable], list[Run]], folders: Sequence[Path], test: Sequence[Any] | None
) -> tuple[list[Run], list[Metrics]]:
    """The runs of a model's slots and their metrics on test (empty without), which their folders then tell too.

    What failed is not measured. The model is taken off its backbone.
    """
    try:
        runs = train(model)
        scores: list[Metrics] = [
            model.evaluate(test, slot=slot) if test and not run.failed else {} for slot, run in enumerate(runs)
        ]
    finally:
        model.adapted.remove()
    if folders and test and is_main():
        runs = [
            run if run.failed else replace(run, bytes=note(folder, "test", score))
            for run, folder, score in zip(runs, folders, scores, strict=True)
        ]
    return runs, scores


def dev_of(run: Run) -> Metrics:
    """A run's best on dev, of a failed one nothing; a loss that was no number, which records leave out, is infinite."""
    return {} if run.failed else {name: math.inf if value is None else value for name, value in run.best.items()}


def best_of(each: Sequence[Metrics]) -> int:
    """Which is the best; without metrics the first."""
    return max(range(len(each)), key=lambda i: rank(each[i]))


def told(each: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for one) and every value."""
    known = all(map(math.isfinite, each))
    std = (statistics.stdev(each) if known else math.nan) if len(each) > 1 else 0.0
    return {"mean": statistics.fmean(each), "std": std, "each": list(each)}


def told_of(each: Sequence[Metrics]) -> dict[str, dict[str, Any]]:
    """By metric; empty where one was not measured."""
    return {metric: told([metrics[metric] for metrics in each]) for metric in each[0]} if all(each) else {}


def written(path: Path, result: Mapping[str, Any]) -> None:
    """Keeps a result, of several processes once."""
    if is_main():
        write_text(path, json.dumps(result, indent=1) + "\n")
