"""`FewShotTagger`: texts and their spans in, spans out; or words and their tags; as scikit-learn has estimators."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from sklearn.utils.validation import check_is_fitted

from deltaprompt.data import hold_out, in_words, span_labels
from deltaprompt.data.tags import tags_of
from deltaprompt.estimators import _adaptation as shared
from deltaprompt.estimators._base import FewShot
from deltaprompt.estimators._input import InputError, ParameterError, conventional, told
from deltaprompt.estimators._sentences import answered, unanswered
from deltaprompt.model import span_metrics
from deltaprompt.model.tagger import Tagger
from deltaprompt.model.tagging import Tagging
from deltaprompt.types import Example, Span
from deltaprompt.verbalizers._base import Verbalizer

if TYPE_CHECKING:
    from deltaprompt.deltas._base import Delta

Spans = list[Span]  # of a text: (start, end, label), in characters
Tags = list[str]  # of words


class FewShotTagger(FewShot):
    """A pretrained encoder with deltas and a head that learns to find labelled spans: named entities, slots.

    What is given decides what comes back: for texts lists of spans `(start, end, label)`, in characters; for lists of
    words lists of tags, in the scheme that the tags of y have, told by their letters. Estimators of one process share
    one backbone of a name, which is loaded once; fitted, an estimator is the small part that it has learned, and
    pickles.

    Args:
        backbone: "demo", a name on the Hugging Face hub, or a folder; it is read as an encoder.
        types: labels of spans; those of y where not given.
        scheme: of learning, whatever y has: "bio", "io" (half as many classes, for few examples), "bmes" or "bioes".
        verbalizer: how a word's state becomes class scores: an object, or text such as "proto_net"; a linear head
            where not given.
        deltas: what is trained of the backbone: an object, text such as "lora:rank=16" or "bitfit", several in a list,
            or "none"; LoRA on every linear map where not given.
        max_length: tokens of a window at most; the backbone's own limit where not given.
        epochs: passes over the training samples. With neither this nor `steps` 30 steps or 6 epochs, the longer.
        steps: optimizer steps, instead of epochs.
        batch_size: windows in one pass.
        learning_rate: of the deltas, at its highest.
        dev_share: this share of the samples is kept from training, to choose the best epoch by. Where not given all
            are trained on, to the end.
        device: "cpu", "cuda", …; the accelerator where there is one.
        random_state: a seed; a numpy `RandomState` or None for another one each time.

    Attributes:
        types_: labels of spans.
        adaptation_: what was learned: its `record`, its `tensors`, and `save(folder)`.
    """

    def __init__(
        self,
        backbone: str | Path = "demo",
        *,
        types: Sequence[str] | None = None,
        scheme: str = "bio",
        verbalizer: Verbalizer | str | Mapping[str, Any] | None = None,
        deltas: Delta | str | Sequence[Delta | str] | None = None,
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
        self.types = types
        self.scheme = scheme

    def fit(self, X: Collection[Any], y: Collection[Any]) -> Self:
        """Learns from texts and lists of their spans, or from lists of words and lists of their tags.

        Raises:
            InputError: X or y is not that; it is a `DataError` and a `ValueError`.
            ParameterError: a parameter is not possible; it is a `ConfigError` and a `ValueError`.
            TrainingError: the loss became no number, or memory ran out.
        """
        with conventional(), shared.alone():
            examples, form = answered(X, y)
            tagging = self._tagging(span_labels(examples))
            self._learn(examples, "encoder", Tagger, lambda _: tagging, hold_out)
            self.types_, self._form = tagging.types, form
        return self

    def predict(self, X: Collection[Any]) -> list[Spans] | list[Tags]:
        """The spans of each text, or the tags of each list of words.

        Raises:
            NotFittedError: `fit` comes first.
            StoreError: the backbone is not the one that it was fitted on.
        """
        check_is_fitted(self)
        with conventional():
            examples, words = unanswered(X, self._form)
            found = self._found(examples)
            return [self._tags(one) for one in found] if words else [list(one.spans) for one in found]

    def score(self, X: Collection[Any], y: Collection[Any]) -> float:
        """F1 of spans, which are right where start, end and label are, pooled over all samples."""
        check_is_fitted(self)
        with conventional():
            right, _ = answered(X, y, self._form.joiner)
            found = self._found([replace(one, spans=()) for one in right])
            lengths = [len(one.fields["text"]) for one in right]
            return span_metrics.count([one.spans for one in right], [one.spans for one in found], lengths).f1

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = tags.target_tags.required = True
        return tags

    def _found(self, examples: Sequence[Example]) -> list[Example]:
        """Examples with the spans that are found in them."""
        with shared.alone():
            tagger = cast(Tagger, self._learned("encoder"))
            entities = [one["entities"] for one in tagger.predict(examples)]
        return [
            replace(example, spans=tuple(Span(e["start"], e["end"], e["label"]) for e in own))
            for example, own in zip(examples, entities, strict=True)
        ]

    def _tags(self, example: Example) -> Tags:
        """The tags of an example's words."""
        return tags_of(in_words(example), len(example.words), self._form.scheme or self.scheme)

    def _tagging(self, found: tuple[str, ...]) -> Tagging:
        """What is looked for."""
        types, own = self.types, self.verbalizer
        if types is None and not found:
            raise InputError("there is no span in y to learn a type from; give samples with spans, or types=[…]")
        if types is not None and (isinstance(types, str) or not all(isinstance(name, str) for name in types)):
            raise ParameterError(f"types is {told(types)}; give a list of the labels of spans")
        if own is not None:
            own = shared.variant("verbalizers", Verbalizer, own, "dp.ProtoNet()")
        length = shared.length_of(self.max_length)
        return Tagging(found if types is None else tuple(types), self.scheme, own, length)
