"""What one adaptation is trained on, and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deltaprompt.data.episodes import Episode
from deltaprompt.trainer.training import Training
from deltaprompt.types import Example


@dataclass(frozen=True)
class Plan:
    """What one adaptation is trained on, and how.

    Args:
        train: labelled examples; of a `Learner` episodes.
        dev: labelled examples to choose by: the best accuracy, and of equal ones the lowest loss.
        training: how.
        seed: of the order of rows and of dropout. The same seed gives the same numbers, bitwise on a CPU.
        unlabelled: texts of the task, for a verbalizer's start and a calibration that need no labels; where there are
            none, the training examples serve.
        name: of the folder that keeps it, where several are trained; `seed-<seed>` where not given.
    """

    train: Sequence[Any]
    dev: Sequence[Any] | None = None
    training: Training = Training()  # noqa: RUF009  frozen
    seed: int = 0
    name: str = ""
    unlabelled: Sequence[Example] = ()

    @property
    def called(self) -> str:
        """Its name."""
        return self.name or f"seed-{self.seed}"


def told(examples: Sequence[Any]) -> str:
    """The number of examples, or of episodes, and a digest of them in their order."""
    digest = hashlib.sha256()
    for example in _rows(examples):
        more = [part for part in (example.references, example.messages, example.labels, example.spans) if part]
        digest.update(json.dumps([sorted(example.fields.items()), example.label, *more]).encode())
    return f"{len(examples)} examples ({digest.hexdigest()[:12]})"


def _rows(examples: Sequence[Any]) -> Iterator[Example]:
    for example in examples:
        yield from (*example.support, *example.query) if isinstance(example, Episode) else (example,)
