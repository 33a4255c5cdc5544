"""`fit_seeds`: the same training from several seeds, together on one backbone; mean ± standard deviation."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltaprompt.errors import ConfigError
from deltaprompt.model import Model
from deltaprompt.trainer.accelerated import is_main
from deltaprompt.trainer.fitting import fit
from deltaprompt.trainer.kept import note
from deltaprompt.trainer.many import TOGETHER, fit_many
from deltaprompt.trainer.plan import Plan
from deltaprompt.trainer.progress import Progress
from deltaprompt.trainer.run import Run, rank
from deltaprompt.trainer.training import Training
from deltaprompt.types import Example

Sets = tuple[Sequence[Example], Sequence[Example] | None]


@dataclass(frozen=True)
class SeedsResult:
    """What several seeds came to."""

    seeds: tuple[int, ...]
    runs: tuple[Run, ...]
    test: Mapping[str, Mapping[str, Any]]  # metric -> mean, std, each; empty without test data
    best_seed: int  # the best on dev; without dev the first
    seconds: float
    out: Path | None  # of several seeds, `out/seed-0`, … are the adaptations

    @property
    def best(self) -> Run:
        """The run of the best seed."""
        return self.runs[self.seeds.index(self.best_seed)]

    def as_json(self) -> dict[str, Any]:
        """What `deltaprompt fit --json` prints."""
        return {
            "seeds": list(self.seeds),
            "best_seed": self.best_seed,
            "test": {name: dict(told) for name, told in self.test.items()},
            "trainable": self.best.trainable,
            "bytes": self.best.bytes,
            "seconds": round(self.seconds, 3),
            "out": None if self.out is None else str(self.out),
        }


def fit_seeds(
    make_model: Callable[[Sequence[int]], Model],
    train_of: Callable[[int], Sets],
    test: Sequence[Example] | None = None,
    *,
    seeds: Sequence[int] = (0,),
    training: Training = Training(),  # noqa: B008  frozen
    together: int = TOGETHER,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
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
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds = {list(seeds)}: there is one or more, and each once")
    out, alone = None if out is None else Path(out), len(seeds) == 1
    sets = [train_of(seed) for seed in seeds]
    model = make_model(seeds)
    try:
        if alone:
            (train, dev), seed = sets[0], seeds[0]
            runs = [fit(model, train, dev, training=training, seed=seed, out=out, resume=resume, progress=progress)]
        else:
            plans = [Plan(*own, training, seed) for own, seed in zip(sets, seeds, strict=True)]
            runs = fit_many(model, plans, together=together, out=out, resume=resume, progress=progress)
        scores = [model.evaluate(test, slot=slot) if test else {} for slot in range(len(seeds))]
    finally:
        model.adapted.remove()
    if out is not None and test and is_main():
        folders = [out if alone else out / f"seed-{seed}" for seed in seeds]
        runs = [replace(run, bytes=note(f, "test", s)) for run, f, s in zip(runs, folders, scores, strict=True)]
    return _together(tuple(seeds), tuple(runs), scores, out)


def _together(
    seeds: tuple[int, ...], runs: tuple[Run, ...], scores: Sequence[Mapping[str, float]], out: Path | None
) -> SeedsResult:
    """The result, kept in `out` too where there are several."""
    test = {metric: told([score[metric] for score in scores]) for metric in scores[0]}
    best = seeds[max(range(len(seeds)), key=lambda i: rank(runs[i].best))]
    result = SeedsResult(seeds, runs, test, best, math.fsum(run.seconds for run in runs), out)
    if out is not None and len(seeds) > 1 and is_main():
        (out / "seeds.json").write_text(json.dumps(result.as_json(), indent=1) + "\n")
    return result


def told(each: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for one) and every value."""
    std = statistics.stdev(each) if len(each) > 1 else 0.0
    return {"mean": statistics.fmean(each), "std": std, "each": list(each)}
