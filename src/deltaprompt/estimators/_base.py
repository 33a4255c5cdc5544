"""What the estimators have in common: the parameters of learning, and an adaptation that is learned and put to use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from sklearn.base import BaseEstimator

from deltaprompt.estimators import _adaptation as shared
from deltaprompt.types import Example
from deltaprompt.verbalizers._base import Verbalizer

if TYPE_CHECKING:
    from deltaprompt.backbone import Backbone, Kind
    from deltaprompt.deltas._base import Delta
    from deltaprompt.model.trainable import Trainable

Asked = TypeVar("Asked")  # a task, or a tagging
ForDev = Callable[[Sequence[Example], float, int], tuple[list[Example], list[Example]]]


class FewShot(BaseEstimator):
    """An estimator that learns a small part beside a backbone; each names its parameters, as scikit-learn asks."""

    adaptation_: shared.Adaptation

    def __init__(
        self,
        backbone: str | Path,
        *,
        verbalizer: Verbalizer | str | Mapping[str, Any] | None,
        deltas: Delta | str | Sequence[Delta | str] | None,
        max_length: int | None,
        epochs: int | None,
        steps: int | None,
        batch_size: int,
        learning_rate: float,
        dev_share: float | None,
        device: shared.Device,
        random_state: int | np.random.RandomState | None,
    ) -> None:
        self.backbone = backbone
        self.verbalizer = verbalizer
        self.deltas = deltas
        self.max_length = max_length
        self.epochs = epochs
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.dev_share = dev_share
        self.device = device
        self.random_state = random_state

    def _learn(
        self,
        examples: Sequence[Example],
        kind: Kind | None,
        model: Callable[[Backbone, Asked, Sequence[Delta], Sequence[int]], Trainable],
        asked: Callable[[Backbone], Asked],
        for_dev: ForDev,
    ) -> None:
        """Learns from examples, of which `for_dev` divides a share to choose by; wrong parameters raise first."""
        training = shared.training_of(self.epochs, self.steps, self.batch_size, self.learning_rate)
        seed, share = shared.seed_of(self.random_state), shared.share_of(self.dev_share)
        sets: shared.Sets = (examples, None) if share is None else for_dev(examples, share, seed)
        place = shared.place_of(self.backbone, kind, self.device)
        task, deltas = asked(place.backbone), shared.deltas_of(self.deltas, place.backbone)
        self.adaptation_ = place.learn(lambda own: model(own, task, deltas, [seed]), sets, training, seed)

    def _learned(self, kind: Kind | None) -> Trainable:
        """What was learned, on its backbone."""
        place = shared.place_of(self.backbone, kind, self.device)
        return place.hold(self.adaptation_, f"this {type(self).__name__}")
