"""What is asked of a backbone: a `Task` is a template, the labels and what stands for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltaprompt.backbone import Backbone
from deltaprompt.calibrations._base import Calibration
from deltaprompt.errors import ConfigError
from deltaprompt.templates import parse
from deltaprompt.verbalizers._base import Verbalizer
from deltaprompt.verbalizers._words import tuple_of
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.prototypes import Prototypes


@dataclass(frozen=True)
class Task:
    """What is asked: a template, and for each label the words (for a plain encoder, the sentence) that stand for it.

    Args:
        template: in the template language; `"{text} It was {mask}."`.
        labels: label -> word, words or sentence; or just the label names, which then stand for themselves.
        verbalizer: how states become class scores. Where not given: `LabelWords` for a language model with a `{mask}`,
            otherwise `Prototypes` that start from the sentences and the training examples.
        max_length: tokens of a sequence at most; the backbone's own limit where not given.
        calibration: takes away what the model would answer anyway; none where not given.
        several: whether an example may have several labels, each of which is then right or not by itself.
    """

    template: str
    labels: Mapping[str, str | Sequence[str]] | Sequence[str]
    verbalizer: Verbalizer | None = None
    max_length: int | None = None
    calibration: Calibration | None = None
    several: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.labels, str) or not all(isinstance(name, str) for name in self.labels):
            raise ConfigError(f"labels are names, each a text, in a list or a mapping; got {self.labels!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """The label names in order."""
        return tuple(self.labels)

    def words(self) -> dict[str, tuple[str, ...]]:
        """What stands for each label."""
        if not isinstance(self.labels, Mapping):
            return {label: (label.replace("_", " "),) for label in self.labels}
        return {label: tuple_of(given) for label, given in self.labels.items()}

    def settled(self, backbone: Backbone) -> Verbalizer:
        """The verbalizer, chosen by the kind of backbone where none is given."""
        if self.verbalizer is not None:
            return self.verbalizer
        if backbone.kind != "encoder" and parse(self.template).masks:
            return LabelWords(self.words())
        return Prototypes(descriptions={label: ", ".join(words) for label, words in self.words().items()})
