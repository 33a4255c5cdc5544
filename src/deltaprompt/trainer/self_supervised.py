"""PLET's self-supervised stage: types of mentions are learned from which sentences mention the same entity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltaprompt.data.linked import Linked
from deltaprompt.model import Model
from deltaprompt.model.similar import Similar
from deltaprompt.trainer.fitting import fit
from deltaprompt.trainer.progress import Progress
from deltaprompt.trainer.run import Run
from deltaprompt.trainer.training import Training
from deltaprompt.types import Example


def fit_typing(
    model: Model,
    rows: Sequence[Example],
    linked: Linked = Linked(),  # noqa: B008  frozen
    *,
    training: Training = Training(),  # noqa: B008  frozen
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Trains a model's deltas without a label: two sentences that mention one entity are to have like types.

    The model then answers with its own label words, and may be trained further with `fit`.

    Args:
        model: of one adaptation, whose template has the fields of entity rows.
        rows: entity rows, as `read_entities(path, labelled=False)` gives them; their labels are not read. Rows of one
            entity are those with the same field "entity", or where they have none with the same words for a mention.
        linked: how pairs are made of rows.
        training: how.
        seed: of the pairs, of their order and of dropout.
        out: as `fit` has it.
        resume: as `fit` has it.
        progress: a bar on a terminal where not given.

    Raises:
        DataError: no entity is mentioned in two of the texts.
        ConfigError: nothing trains, or the verbalizer starts from labelled examples.
    """
    train, dev = linked.dealt(rows, seed)
    return fit(
        Similar(model),
        train,
        dev or None,
        training=training,
        seed=seed,
        out=out,
        resume=resume,
        progress=progress,
        what="pairs",
    )
