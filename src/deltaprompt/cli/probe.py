"""The frozen baseline: logistic regression, C by cross-validation, on mean-pooled embeddings of length 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from deltaprompt.backbone import Backbone
    from deltaprompt.types import Example

INVERSE_STRENGTHS = [10.0**power for power in range(-2, 5)]  # C, chosen by cross-validation
FOLDS = 4


def embedded(backbone: Backbone, examples: Sequence[Example], max_length: int | None = None) -> Tensor:
    """Frozen embeddings of length 1 [n, d]."""
    from torch.nn.functional import normalize

    from deltaprompt.model import Task, adapt
    from deltaprompt.verbalizers.soft import SoftVerbalizer

    model = adapt(backbone, Task("{text}", ("any", "other"), SoftVerbalizer(), max_length=max_length))
    states = model.embed(model.features, examples)
    model.adapted.remove()
    return normalize(states, dim=-1)


def regression(states: Tensor, labels: Sequence[str | None]) -> Any:
    """The fitted classifier of a support, its C by cross-validation; of one example a class its C is 1."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    parts = min(FOLDS, len(labels) // len(set(labels)))
    if parts < 2:
        return LogisticRegression(max_iter=5000).fit(states, labels)
    folds = StratifiedKFold(parts, shuffle=True, random_state=0)
    return GridSearchCV(LogisticRegression(max_iter=5000), {"C": INVERSE_STRENGTHS}, cv=folds).fit(states, labels)
