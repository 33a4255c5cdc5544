"""What one adaptation is trained on, and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

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
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True, default=_named).encode())
    return f"{len(examples)} examples ({digest.hexdigest()[:12]})"


def _named(value: Any) -> dict[str, Any]:
    """What JSON has no form for: a mapping, or all fields of an example or an episode by name."""
    return dict(value) if isinstance(value, Mapping) else {f.name: getattr(value, f.name) for f in fields(value)}
