"""`fit_many`: adaptations of the same methods train at once, in one pass over their backbone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaprompt.errors import ConfigError, SiteError, TrainingError
from deltaprompt.features.batching import chunks
from deltaprompt.model.saved import fill
from deltaprompt.model.trainable import Trainable
from deltaprompt.trainer.accelerated import is_main, processes
from deltaprompt.trainer.checkpoint import SETTINGS, Checkpoints
from deltaprompt.trainer.fitting import Seat, finished_at, seat_of, trained
from deltaprompt.trainer.plan import Plan
from deltaprompt.trainer.progress import Progress
from deltaprompt.trainer.run import Run
from deltaprompt.trainer.untrained import given

TOGETHER = 8  # adaptations in one pass, where not given
NAMES = "together"  # the setting of a joint run that names its adaptations


def fit_many(
    model: Trainable,
    plans: Sequence[Plan],
    *,
    together: int = TOGETHER,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[Run]:
    """Trains every slot of a model by a plan of its own; each ends as it would alone. The runs, in the plans' order.

    Each has its own order of rows, rates, clipping, dropout, early stop and best; they share the passes through the
    backbone. Where they cannot (its own dropout, fp16, several processes, unlike precisions, a site that mixes rows)
    they are trained one after another, and the bar says why.

    Args:
        model: `Model(backbone, task, deltas, seeds)`, with a slot for each plan.
        plans: what each slot is trained on, and how.
        together: adaptations in one pass at most; what a pass keeps for the backward pass grows with it.
        out: a folder; each adaptation is kept in `out/<the plan's name>`.
        resume: goes on with what was broken off in `out`, to the result that it would have had. What is finished is
            not trained again.
        progress: a bar on a terminal where not given.

    Raises:
        ConfigError: nothing trains, or what is to be resumed had other settings or data.
        TrainingError: a loss that is no number, told when all others are trained and kept; not enough memory.
    """
    runs = train_many(model, plans, together=together, out=out, resume=resume, progress=progress)
    if wrong := [f"{plan.called}: {run.failed}" for plan, run in zip(plans, runs, strict=True) if run.failed]:
        raise TrainingError("; ".join(wrong))
    return runs


def train_many(
    model: Trainable,
    plans: Sequence[Plan],
    *,
    together: int,
    out: str | Path | None,
    resume: bool,
    progress: Progress | None,
) -> list[Run]:
    """As `fit_many`; what failed is told by its run alone."""
    seats = _seats(model, plans, together, None if out is None else Path(out))
    common = None if out is None else Checkpoints(Path(out), {})
    begun = _begun(common, seats) if common is not None and resume else []
    if common is not None and not resume and is_main():
        _forget(common, seats)
    found = {seat.slot: before for seat in seats if (before := _before(seat, begun, resume)) is not None}
    runs = {slot: run for slot, (run, _) in found.items()}
    waiting = [seat for seat in seats if seat.slot not in found]
    for seat in [seat for seat in waiting if model.parameter_count(seat.slot) == 0 or not seat.plan.train]:
        runs[seat.slot] = given(model, seat.plan, seat.slot, seat.kept)
        waiting.remove(seat)
    reason = obstacle(plans)
    for group in _groups(waiting, begun, 1 if reason else together):
        runs |= _group(model, group, common, resume, progress, reason)
    model.settle()
    for slot, (_, saved) in found.items():
        fill(model, saved, slot)
    return [runs[slot] for slot in range(len(seats))]


def obstacle(plans: Sequence[Plan]) -> str:
    """Why adaptations cannot share a pass; empty where they can."""
    each = [plan.training for plan in plans]
    if any(training.backbone_dropout for training in each):
        return "the backbone's own dropout is drawn for a whole batch"
    if any(training.precision == "fp16" for training in each):
        return "fp16 has one scale for all"
    if len({(training.precision, training.checkpointing) for training in each}) > 1:
        return "they differ in precision or checkpointing"
    return "several processes" if processes() > 1 else ""


def _seats(model: Trainable, plans: Sequence[Plan], together: int, out: Path | None) -> list[Seat]:
    slots, names = model.adapted.slots, [plan.called for plan in plans]
    if len(plans) != slots:
        raise ConfigError(f"{len(plans)} plans for a model of {slots} slots; give a plan for each")
    if together < 1:
        raise ConfigError(f"together = {together} is not possible: it is a whole number, 1 or more")
    if out is not None and (twice := sorted({name for name in names if names.count(name) > 1})):
        raise ConfigError(f"{len(twice)} names of plans are not their own ({twice[0]!r}); give each plan a name")
    return [seat_of(model, slot, plan, None if out is None else out / plan.called) for slot, plan in enumerate(plans)]


def _begun(common: Checkpoints, seats: Sequence[Seat]) -> list[str]:
    """The names of the adaptations that were in one pass when it was broken off."""
    newest = common.newest()
    names = [] if newest is None else json.loads((newest / SETTINGS).read_text()).get(NAMES, [])
    if lacking := [name for name in names if name not in {seat.plan.called for seat in seats}]:
        raise ConfigError(
            f"the run in {common.out} also trained {', '.join(lacking)}; add that again, or start without resume"
        )
    return list(names)


def _forget(common: Checkpoints, seats: Sequence[Seat]) -> None:
    """No run that was broken off is left."""
    for checkpoints in (common, *(seat.checkpoints for seat in seats)):
        if checkpoints is not None:
            checkpoints.clear()


def _before(seat: Seat, begun: Sequence[str], resume: bool) -> tuple[Run, dict[str, Tensor]] | None:
    return finished_at(seat) if resume and seat.plan.called not in begun else None


def _groups(waiting: Sequence[Seat], begun: Sequence[str], size: int) -> list[list[Seat]]:
    """What is trained at once: what was begun together, what was begun alone, and so many each of the rest."""
    first = [seat for seat in waiting if seat.plan.called in begun]
    alone = [s for s in waiting if s not in first and s.checkpoints is not None and s.checkpoints.newest() is not None]
    rest = [seat for seat in waiting if seat not in first and seat not in alone]
    groups = [first, *([seat] for seat in alone), *([rest[i] for i in part] for part in chunks(range(len(rest)), size))]
    return [group for group in groups if group]


def _group(
    model: Trainable,
    group: Sequence[Seat],
    common: Checkpoints | None,
    resume: bool,
    progress: Progress | None,
    reason: str,
) -> dict[int, Run]:
    """The runs of one group by slot: in one loop, or, where a site cannot tell rows apart, in a loop each."""
    if len(group) > 1:
        checkpoints = None if common is None else Checkpoints(common.out, _settings(group))
        try:
            together = trained(model, group, checkpoints, resume, progress, f"{_called(group)} in one pass")
            return {seat.slot: run for seat, run in zip(group, together, strict=True)}
        except SiteError:
            reason = "a site mixes the rows of a batch"
            if checkpoints is not None and is_main():
                checkpoints.clear()
    runs = dict[int, Run]()
    for seat in group:
        what = _called([seat]) + (f", not in one pass: {reason}" if reason else "")
        (runs[seat.slot],) = trained(model, [seat], seat.checkpoints, resume, progress, what)
    return runs


def _settings(group: Sequence[Seat]) -> dict[str, Any]:
    """All that the results of a group depend on."""
    own = {f"{name} of {seat.plan.called}": v for seat in group for name, v in seat.settings.items()}
    return {NAMES: [seat.plan.called for seat in group], **own}


def _called(group: Sequence[Seat]) -> str:
    names = [seat.plan.called for seat in group]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}: {len(names)}"
