"""The frozen baseline: logistic regression, C by cross-validation, on mean-pooled embeddings of length 1."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from torch import Tensor
from torch.nn.functional import normalize

from deltaprompt.backbone import Backbone
from deltaprompt.model import Task, adapt
from deltaprompt.model.label_metrics import auroc
from deltaprompt.study.data import DataSet, Shots
from deltaprompt.study.method import Entry, Method, Outcome
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer

TEMPLATE = "{text}"
INVERSE_STRENGTHS = [10.0**power for power in range(-2, 5)]  # C, chosen by cross-validation
FOLDS = 4


def embedded(
    backbone: Backbone, examples: Sequence[Example], max_length: int | None = None, template: str = TEMPLATE
) -> Tensor:
    """Frozen embeddings of length 1 [n, d]."""
    model = adapt(backbone, Task(template, ("any", "other"), SoftVerbalizer(), max_length=max_length))
    try:
        return normalize(model.embed(model.features, examples), dim=-1).cpu()
    finally:
        model.adapted.remove()


def regression(states: Tensor, labels: Sequence[str | None]) -> Any:
    """The fitted classifier of a support, its C by cross-validation; where a class has one example it is 1."""
    parts = min(FOLDS, *Counter(labels).values())
    if parts < 2:
        return LogisticRegression(max_iter=5000).fit(states, labels)
    folds = StratifiedKFold(parts, shuffle=True, random_state=0)
    tried = GridSearchCV(LogisticRegression(max_iter=5000), {"C": INVERSE_STRENGTHS}, cv=folds)
    return tried.fit(states, labels).best_estimator_


def largest(fitted: Any, states: Tensor) -> npt.NDArray[np.float64]:
    """The largest decision value of each row [n, d] -> [n]; of two classes how far it is from their boundary."""
    values: npt.NDArray[np.float64] = fitted.decision_function(states)
    return np.abs(values) if values.ndim == 1 else values.max(1)


class Probe(Method):
    """The probe as a method of a study; the support rows alone choose C.

    Args:
        name: its own.
        backbone: whose states it reads.
        template: what it reads of a row.
        max_length: tokens of a text at most, of all data sets or by the name of each.
    """

    together = 1

    def __init__(
        self,
        name: str,
        backbone: Backbone,
        template: str = TEMPLATE,
        max_length: int | Mapping[str, int | None] | None = None,
    ) -> None:
        self.name = name
        self.backbone = backbone
        self.template = template
        self.max_length = max_length
        self._tested: tuple[DataSet, Tensor, Tensor] | None = None  # states of the data set that was last asked for

    def entry(self, data: DataSet) -> Entry:
        self._embedded(data, [data.train[0], data.test[0], *data.outside[:1]])
        told = {"kind": "probe", "template": self.template, "max_length": self._length(data)}
        return Entry({**told, "backbone": self.backbone.kind}, self.backbone.fingerprint)

    def ready(self) -> None:
        """Its entries are all that is checked."""

    def run(self, data: DataSet, shots: Shots, seeds: Sequence[int]) -> Sequence[Outcome | str]:
        return [self._one(data, shots, seed) for seed in seeds]

    def _one(self, data: DataSet, shots: Shots, seed: int) -> Outcome:
        support, _ = data.draw(shots, seed, dev=False)
        begun = time.process_time()
        fitted = regression(self._embedded(data, support), [e.label for e in support])
        seconds = time.process_time() - begun
        kept = (fitted.coef_, fitted.intercept_)
        inside, outside = self._states(data)
        found = data.classes(list(fitted.predict(inside)))
        area = auroc(largest(fitted, inside), largest(fitted, outside)) if data.outside else None
        return Outcome(found, seconds, sum(a.size for a in kept), sum(a.nbytes for a in kept), area)

    def _embedded(self, data: DataSet, rows: Sequence[Example]) -> Tensor:
        return embedded(self.backbone, rows, self._length(data), self.template)

    def _length(self, data: DataSet) -> int | None:
        return self.max_length.get(data.name) if isinstance(self.max_length, Mapping) else self.max_length

    def _states(self, data: DataSet) -> tuple[Tensor, Tensor]:
        """Of the test rows and of the texts outside, computed once."""
        if self._tested is None or self._tested[0] is not data:
            self._tested = data, self._embedded(data, data.test), self._embedded(data, data.outside)
        return self._tested[1:]
