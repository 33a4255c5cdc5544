"""`FewShotClassifier`: texts and labels in, labels out, as scikit-learn has it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from deltaprompt.calibrations._base import Calibration
from deltaprompt.data import split
from deltaprompt.defaults import TEMPLATES, kind_for, task_for
from deltaprompt.estimators import _adaptation as shared
from deltaprompt.estimators._base import FewShot
from deltaprompt.estimators._input import ParameterError, conventional, labels_in, names_of, rows_in, told, words_for
from deltaprompt.model import Model, Task
from deltaprompt.templates import parse
from deltaprompt.types import Example
from deltaprompt.verbalizers._base import Verbalizer

if TYPE_CHECKING:
    from deltaprompt.backbone import Backbone
    from deltaprompt.deltas._base import Delta


class FewShotClassifier(ClassifierMixin, FewShot):
    """A pretrained text model with deltas and a verbalizer that learns classes from a few examples of each.

    What is None is chosen as `deltaprompt fit` chooses it. Estimators of one process share one backbone of a name,
    which is loaded once; fitted, an estimator is the small part that it has learned, and pickles.

    Args:
        backbone: "demo", a name on the Hugging Face hub, or a folder.
        template: how a text is put before the model, as in "{text} It was {mask}."; of one field, whose name is free,
            for texts, of several for mappings.
        label_words: a word, words or a sentence that stand for each class, as a mapping; classes stand for themselves
            where not given.
        verbalizer: how states become class scores: an object, or text such as "prototypes:scale=20" or "soft".
        deltas: what is trained of the backbone: an object, text such as "lora:rank=16" or "bitfit", several in a list,
            or "none".
        calibration: takes away what the model would answer anyway: an object, or text such as "contextualised".
        max_length: tokens of a sequence at most; the backbone's own limit where not given.
        epochs: passes over the training samples. With neither this nor `steps` 30 steps or 6 epochs, the longer.
        steps: optimizer steps, instead of epochs.
        batch_size: samples in one pass.
        learning_rate: of the deltas, at its highest.
        dev_share: this share of each class is kept from training, to choose the best epoch by. Where not given all
            samples are trained on, to the end.
        device: "cpu", "cuda", …; the accelerator where there is one.
        random_state: a seed; a numpy `RandomState` or None for another one each time.

    Attributes:
        classes_: sorted, in the type that they have in y.
        adaptation_: what was learned: its `record`, its `tensors`, and `save(folder)`.
    """

    def __init__(
        self,
        backbone: str | Path = "demo",
        *,
        template: str | None = None,
        label_words: Mapping[Any, str | Sequence[str]] | None = None,
        verbalizer: Verbalizer | str | Mapping[str, Any] | None = None,
        deltas: Delta | str | Sequence[Delta | str] | None = None,
        calibration: Calibration | str | Mapping[str, Any] | None = None,
        max_length: int | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        batch_size: int = 16,
        learning_rate: float = 5e-4,
        dev_share: float | None = None,
        device: shared.Device = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        super().__init__(
            backbone,
            verbalizer=verbalizer,
            deltas=deltas,
            max_length=max_length,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            dev_share=dev_share,
            device=device,
            random_state=random_state,
        )
        self.template = template
        self.label_words = label_words
        self.calibration = calibration

    def fit(self, X: Collection[Any], y: Collection[Any]) -> Self:
        """Learns from texts, or mappings of fields to texts, and their labels: texts, whole numbers or booleans.

        Raises:
            InputError: X or y is not that; it is a `DataError` and a `ValueError`.
            ParameterError: a parameter is not possible; it is a `ConfigError` and a `ValueError`.
            TrainingError: the loss became no number, or memory ran out.
        """
        with conventional(), shared.alone():
            rows = rows_in(X, self._fields())
            classes, numbers = labels_in(y, len(rows))
            names = names_of(classes)
            examples = [Example(row, names[n]) for row, n in zip(rows, numbers, strict=True)]
            kind = kind_for(str(self.backbone), None, [self.template])
            self._learn(examples, kind, Model, lambda backbone: self._task(backbone, classes), split)
            self.classes_ = classes
        return self

    def predict(self, X: Collection[Any]) -> NDArray[Any]:
        """The likeliest class of each sample [n], in the type of y."""
        likeliest = self.predict_proba(X).argmax(1)
        return self.classes_[likeliest]

    def predict_proba(self, X: Collection[Any]) -> NDArray[np.float32]:
        """The probability of each class [n, c], classes in the order of `classes_`.

        Raises:
            NotFittedError: `fit` comes first.
            StoreError: the backbone is not the one that it was fitted on.
        """
        check_is_fitted(self)
        record = self.adaptation_.record
        with conventional(), shared.alone():
            rows = rows_in(X, parse(record["template"]).fields)
            model = cast(Model, self._learned(record["backbone"]["kind"]))
            return model.probabilities([Example(row) for row in rows]).numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = tags.input_tags.dict = True
        tags.classifier_tags.poor_score = True  # of blobs of numbers, by which scikit-learn means it
        return tags

    def _fields(self) -> tuple[str, ...]:
        """The fields that the template has."""
        if self.template is not None and not isinstance(self.template, str):
            raise ParameterError(f"template is {told(self.template)}; give a text, as in '{{text}} It was {{mask}}.'")
        return tuple(parse(self.template or TEMPLATES["encoder"]).fields)

    def _task(self, backbone: Backbone, classes: NDArray[Any]) -> Task:
        """What is asked of a backbone."""
        own, calibration = self.verbalizer, self.calibration
        if own is not None and not isinstance(own, Verbalizer):
            own = shared.described("verbalizers", own, "dp.Prototypes(scale=20)")
        if calibration is not None:
            calibration = shared.variant("calibrations", Calibration, calibration, "dp.Contextualised()")
        stands, length = words_for(self.label_words, classes), shared.length_of(self.max_length)
        return task_for(backbone, names_of(classes), self.template, stands, own, length, calibration)
