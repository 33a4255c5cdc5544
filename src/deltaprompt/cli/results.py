"""What `deltaprompt fit` shows of several seeds, whatever was learned."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from deltaprompt.cli import console

if TYPE_CHECKING:
    from deltaprompt.trainer import SeedsResult


def show(result: SeedsResult, metrics: Mapping[str, str], dev: str = "accuracy", digits: int = 3) -> None:
    """A line a seed, and the mean of several.

    Args:
        result: of the seeds.
        metrics: what was measured on test, and how each is called.
        dev: what the best was chosen by.
        digits: behind the point of a test metric.
    """
    metrics = {name: called for name, called in metrics.items() if name in result.test}
    columns = ["seed", f"dev {dev}", *(f"test {called}" for called in metrics.values()), "steps", "seconds"]
    each = {name: iter(result.test[name]["each"]) for name in metrics}
    body = [
        [
            str(seed),
            "failed" if run.failed else f"{run.best[dev]:.3f}" if run.best else "–",
            *("–" if run.failed else f"{next(each[name]):.{digits}f}" for name in metrics),
            str(run.steps),
            f"{run.seconds:.1f}",
        ]
        for seed, run in zip(result.seeds, result.runs, strict=True)
    ]
    if len(body) > 1 and metrics:
        means = [console.plus_minus(result.test[name], len(body) - len(result.failed)) for name in metrics]
        body.append(["mean ± std", "", *means, "", f"{result.seconds:.1f}"])
    screen = console.output()
    screen.print(console.table(columns, body))
    for seed, why in result.failed.items():
        screen.print(f"seed {seed} failed: {why}", markup=False, soft_wrap=True)
    kept = f"{console.size(result.best.bytes)} in {result.out}" if result.out else "not saved (--out DIR saves it)"
    screen.print(f"{result.best.trainable:,} trained parameters, {kept}", markup=False, soft_wrap=True)
    if result.out is not None:
        screen.print(f"use it: deltaprompt predict {shlex.quote(str(result.out))} FILE", markup=False, soft_wrap=True)
