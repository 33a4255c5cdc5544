"""While a run goes on, what frozen layers make of its texts is kept: it is computed once, not in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from deltaprompt.model.below import Below, Nothing
from deltaprompt.model.once import Once
from deltaprompt.model.trainable import Trainable, evaluating
from deltaprompt.trainer.accelerated import processes
from deltaprompt.trainer.course import Course
from deltaprompt.trainer.objective import objective_of


@contextmanager
def frozen_once(
    model: Trainable, courses: Sequence[Course], autocast: Callable[[], AbstractContextManager[None]]
) -> Iterator[str]:
    """Within it frozen layers run once a text, where they can; gives what a progress line says of it.

    Training texts are run now, the longest first, so that what is kept does not depend on where a run goes on; texts
    of dev when they are first looked at.
    """
    found = _found(model, courses)
    if isinstance(found, Nothing):
        yield f", nothing kept: {found.why}" if found.why else ""
        return
    once = Once(model.backbone, found)
    try:
        with evaluating(model), autocast():
            for course in courses:
                for batch in model.batches(course.rows, course.training.batch_size):
                    once.fill(batch.to(model.device))
        model.once = once
        yield f", {found.told} kept"
    finally:
        model.once = None
        once.shelf.close()


def _found(model: Trainable, courses: Sequence[Course]) -> Below | Nothing:
    """What can be kept in a run, or why nothing can."""
    each = [course.training for course in courses]
    if not all(training.keep for training in each):
        return Nothing()
    if all(course.total <= course.order.epoch for course in courses):
        return Nothing()  # each text is read once
    if any(training.backbone_dropout for training in each):
        return Nothing("the backbone's dropout is on")
    if processes() > 1:
        return Nothing("several processes")
    return objective_of(model).below([row for course in courses for row in course.rows])
