"""`fit`: one adaptation, and what it has in common with several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaprompt.errors import ConfigError, TrainingError
from deltaprompt.features import Encoded
from deltaprompt.model.saved import fill
from deltaprompt.model.trainable import Trainable
from deltaprompt.trainer import failures
from deltaprompt.trainer.accelerated import is_main, recomputed
from deltaprompt.trainer.checkpoint import Checkpoints
from deltaprompt.trainer.course import Course
from deltaprompt.trainer.frozen import frozen_once
from deltaprompt.trainer.kept import Kept, finished
from deltaprompt.trainer.loop import Loop
from deltaprompt.trainer.objective import objective_of
from deltaprompt.trainer.order import chance_kept
from deltaprompt.trainer.plan import Plan
from deltaprompt.trainer.progress import Progress, usual
from deltaprompt.trainer.run import Run
from deltaprompt.trainer.settings import check, settings_of
from deltaprompt.trainer.training import Training
from deltaprompt.trainer.untrained import given
from deltaprompt.types import Example


@dataclass(frozen=True, eq=False)
class Seat:
    """A slot of a model, what is trained in it, and where that is kept."""

    slot: int
    plan: Plan
    folder: Path | None
    settings: dict[str, Any]  # empty without a folder

    @property
    def checkpoints(self) -> Checkpoints | None:
        """Its own, where it trains alone."""
        return None if self.folder is None else Checkpoints(self.folder, self.settings)

    @property
    def kept(self) -> Kept | None:
        """The best so far on disk."""
        return None if self.folder is None else Kept(self.folder, self.settings)


def fit(
    model: Trainable,
    train: Sequence[Example],
    dev: Sequence[Example] | None = None,
    *,
    training: Training = Training(),  # noqa: B008  frozen
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    what: str = "fit",
    unlabelled: Sequence[Example] = (),
) -> Run:
    """Trains a model's deltas and verbalizer in place; it is then as it was where dev was best (without dev: last).

    Where nothing trains, or there is nothing but unlabelled texts (zero-shot), it takes what it needs of them
    (demonstrations, a start, a calibration) and is measured on dev.

    Args:
        model: of one adaptation. A verbalizer that starts from examples is given its start first, and a template that
            shows demonstrations the training rows, where it has none.
        train: labelled examples.
        dev: labelled examples to choose by: the best accuracy, and of equal ones the lowest loss.
        training: how.
        seed: of the order of rows and of dropout. The same seed gives the same numbers, bitwise on a CPU.
        out: a folder; the best so far is always in it, and while training goes on, `out/checkpoint`.
        resume: goes on with the run that was broken off in `out`, to the result that it would have had. Begins at the
            beginning where there is none, and returns at once where it is finished.
        progress: a bar on a terminal where not given.
        what: what the bar calls this run.
        unlabelled: texts of the task, for a verbalizer's start and a calibration that need no labels; where there are
            none, the training examples serve.

    Raises:
        ConfigError: nothing trains or takes examples, or a run to resume had other settings or data.
        TrainingError: a non-finite loss, or not enough memory. The best so far is in the model, and in `out`.
    """
    if model.adapted.slots != 1:
        raise ConfigError(
            f"fit trains one adaptation, and this model has {model.adapted.slots}; make it with one seed, or train "
            "them with fit_many"
        )
    seat = seat_of(
        model, 0, Plan(train, dev, training, seed, unlabelled=unlabelled), None if out is None else Path(out)
    )
    before = finished_at(seat) if resume else None
    if before is not None:
        fill(model, before[1])
        return before[0]
    if model.parameter_count() == 0 or not train:
        return given(model, seat.plan, 0, seat.kept)
    (run,) = trained(model, [seat], seat.checkpoints, resume, progress, what)
    if run.failed:
        raise TrainingError(run.failed)
    model.settle()
    return run


def seat_of(model: Trainable, slot: int, plan: Plan, folder: Path | None) -> Seat:
    """A seat, its plan checked, the slot given what its template shows."""
    check(model, slot, plan)
    objective_of(model).prepare(slot, plan)
    return Seat(slot, plan, folder, {} if folder is None else settings_of(model, slot, plan))


def finished_at(seat: Seat) -> tuple[Run, dict[str, Tensor]] | None:
    """The run that is finished in the seat's folder and what it learned; none where there is none, or one goes on."""
    checkpoints = seat.checkpoints
    if checkpoints is None or checkpoints.newest() is not None:
        return None
    before = finished(checkpoints, is_main())
    if before is not None and is_main():
        checkpoints.clear()  # what is left where it was killed while it did so
    return before


def trained(
    model: Trainable,
    seats: Sequence[Seat],
    checkpoints: Checkpoints | None,
    resume: bool,
    progress: Progress | None,
    what: str,
) -> list[Run]:
    """The runs of one loop, the finished adaptations kept; what is reparametrised is so still.

    One may have failed, as its run says.
    """
    training = seats[0].plan.training
    with ExitStack() as everything, chance_kept(model.device), recomputed(model, training.checkpointing):
        with failures.of_memory(training, together=len(seats)):
            encode = _once(model)
            courses = [Course(model, seat.slot, seat.plan, seat.kept, encode) for seat in seats]
            loop = Loop(model, courses, checkpoints, progress or usual())
            kept = everything.enter_context(frozen_once(model, courses, loop.accelerator.autocast))
            loop.begin(resume)
        return loop.finish(loop.run(what + kept))


def _once(model: Trainable) -> Callable[[Sequence[Example], int], list[Encoded]]:
    """`model.encode`; the same sequence of examples, which plans of one task may share, is encoded once."""
    known: dict[tuple[int, int], list[Encoded]] = {}

    def encode(examples: Sequence[Example], slot: int) -> list[Encoded]:
        key = (id(examples), objective_of(model).group(slot))
        if key not in known:
            known[key] = model.encode(examples, slot)
        return known[key]

    return encode
