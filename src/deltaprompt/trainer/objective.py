"""What a model is trained for: what examples must have, how it starts, and what of its passes can be shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltaprompt.errors import ConfigError
from deltaprompt.features import Encoded
from deltaprompt.model import Model
from deltaprompt.model.below import Below, Nothing, below
from deltaprompt.model.generator import Generator
from deltaprompt.model.learner import Learner
from deltaprompt.model.reader import Reader
from deltaprompt.model.similar import Similar, label_of
from deltaprompt.model.starting import calibrate
from deltaprompt.model.tagger import Tagger
from deltaprompt.model.trainable import Trainable
from deltaprompt.model.with_masks import WithMasks
from deltaprompt.trainer.plan import Plan, told
from deltaprompt.types import Example
from deltaprompt.verbalizers._base import Started, Trained


class Objective(ABC):
    """What the training loop asks of a model beside its rows, their loss and its metrics, which it says itself."""

    model: Trainable

    @abstractmethod
    def check(self, name: str, examples: Sequence[Example]) -> None:
        """Raises where an example of a set lacks what training needs."""

    def takes_examples(self, slot: int) -> bool:
        """Whether examples change a slot though nothing of it trains; not unless a model says so."""
        return False

    def takes_unlabelled(self) -> bool:
        """Whether something is done with texts without labels; not unless a model says so."""
        return False

    @abstractmethod
    def told(self, slot: int) -> dict[str, Any]:
        """What is asked of a slot, in a few words by name."""

    def group(self, slot: int) -> int:
        """Slots of one number read the same examples as the same rows; all do unless a model says so."""
        return 0

    def prepare(self, slot: int, plan: Plan) -> None:
        """Gives a slot what its texts need to be read: mostly nothing."""
        return

    def start(self, slot: int, plan: Plan) -> None:
        """Gives a slot what it has from examples before it trains: nothing unless a model says so."""
        return

    def solve(self, slot: int, plan: Plan) -> None:
        """Gives it again what is solved from what deltas make of examples: nothing unless a model says so."""
        return

    @property
    def left(self) -> bool:
        """Whether rows are padded on the left."""
        return self.model.features.kind == "causal"

    def sort(self, slot: int, row: Encoded) -> tuple[int, int]:
        """Slots of another sort than this do not share a pass."""
        return 1, -1

    def whole(self, slots: Sequence[int]) -> bool:
        """Whether the rows of a slot's batch must stay together, since they have one loss."""
        return False

    @property
    def draws(self) -> bool:
        """Whether a pass draws from chance."""
        return any(vars(delta).get("dropout") for delta in self.model.adapted.deltas)

    @abstractmethod
    def below(self, rows: Sequence[Encoded]) -> Below | Nothing:
        """What of a pass over rows can be kept from epoch to epoch."""


class ByVerbalizer(Objective, ABC):
    """What is asked of a model whose verbalizer may start from labelled rows, and may have a loss of its own."""

    model: Model | Tagger

    def solve(self, slot: int, plan: Plan) -> None:
        verbalizer = self.model.reader(slot).verbalizer
        if isinstance(verbalizer, Started) and verbalizer.solved:
            self.start(slot, plan)

    def whole(self, slots: Sequence[int]) -> bool:
        return any(isinstance(self.model.reader(slot).verbalizer, Trained) for slot in slots)


@dataclass(frozen=True)
class Labelling(ByVerbalizer):
    """The loss of labels; the best accuracy is chosen, and of equal ones the lowest loss."""

    model: Model
    also: WithMasks | None = None  # the same, where masked tokens are guessed too

    def check(self, name: str, examples: Sequence[Example]) -> None:
        bare = next((i for i, e in enumerate(examples, 1) if not e.gold), None)
        if bare is not None:
            raise ConfigError(f"{name} example {bare} has no label; training needs one on each")

    def takes_examples(self, slot: int) -> bool:
        reader = self.model.reader(slot)
        shows = reader.features.template.demos is not None
        return shows or reader.task.calibration is not None or isinstance(reader.verbalizer, Started)

    def takes_unlabelled(self) -> bool:
        return True

    def told(self, slot: int) -> dict[str, Any]:
        reader = self.model.reader(slot)
        shown = reader.features.demonstrations
        masks = {} if self.also is None else {"masks": [self.also.weight, self.also.rate]}
        return {"task": repr(reader.task), **masks, **({} if shown is None else {"demonstrations": told(shown.rows)})}

    def group(self, slot: int) -> int:
        return self.model.seats[slot][0]

    def prepare(self, slot: int, plan: Plan) -> None:
        features = self.model.reader(slot).features
        if features.template.demos is not None and features.demonstrations is None:
            self.model.demonstrate(plan.train, slot, plan.seed)

    def start(self, slot: int, plan: Plan) -> None:
        rows = plan.training.batch_size
        self.model.start(plan.train, slot, rows, plan.unlabelled)
        calibrate(self.model, plan.unlabelled or plan.train, slot, rows)

    def sort(self, slot: int, row: Encoded) -> tuple[int, int]:
        return _sort(self.model.reader(slot), self.group(slot), row)

    @property
    def draws(self) -> bool:
        return self.also is not None or super().draws

    def below(self, rows: Sequence[Encoded]) -> Below | Nothing:
        return below(self.model, rows) if self.also is None else Nothing("its texts are masked anew in every pass")


@dataclass(frozen=True)
class Writing(Objective):
    """The mean cross-entropy of targets' tokens; the lowest is chosen."""

    model: Generator

    def check(self, name: str, examples: Sequence[Example]) -> None:
        """Whatever lacks a target is told when it is encoded."""

    def told(self, slot: int) -> dict[str, Any]:
        return {"task": repr(self.model.generation)}

    @property
    def left(self) -> bool:
        return self.model.features.kind == "causal" and not self.model.packed

    def below(self, rows: Sequence[Encoded]) -> Below | Nothing:
        return below(self.model, rows)


@dataclass(frozen=True)
class Pairing(Objective):
    """The loss of pairs of texts; the best accuracy in telling them apart is chosen, of equal ones the lowest loss."""

    model: Similar

    def check(self, name: str, examples: Sequence[Example]) -> None:
        for pair in examples:
            label_of(pair)

    def takes_unlabelled(self) -> bool:
        return True

    def told(self, slot: int) -> dict[str, Any]:
        return {"task": f"{self.model.reader(slot).task!r}, of pairs"}

    def group(self, slot: int) -> int:
        return self.model.model.seats[slot][0]

    def start(self, slot: int, plan: Plan) -> None:
        self.model.start(plan.train, slot, plan.training.batch_size, plan.unlabelled)

    def sort(self, slot: int, row: Encoded) -> tuple[int, int]:
        return _sort(self.model.reader(slot), self.group(slot), row)

    def below(self, rows: Sequence[Encoded]) -> Below | Nothing:
        return Nothing("each pair has two texts")


@dataclass(frozen=True)
class Finding(ByVerbalizer):
    """The loss of words' classes; the best F1 of spans is chosen, and of equal ones the lowest loss."""

    model: Tagger

    def check(self, name: str, examples: Sequence[Example]) -> None:
        self.model.check(examples, name)

    def takes_examples(self, slot: int) -> bool:
        return isinstance(self.model.reader(slot).verbalizer, Started)

    def told(self, slot: int) -> dict[str, Any]:
        return {"task": repr(self.model.tagging)}

    def start(self, slot: int, plan: Plan) -> None:
        self.model.start(plan.train, slot, plan.training.batch_size)

    def below(self, rows: Sequence[Encoded]) -> Below | Nothing:
        return below(self.model.model, rows)


@dataclass(frozen=True)
class Adapting(Objective):
    """The loss of episodes' queries; the best F1 of spans or accuracy is chosen, of equal ones the lowest loss."""

    model: Learner

    def check(self, name: str, examples: Sequence[Any]) -> None:
        self.model.check(examples, f"{name} episode")

    def takes_examples(self, slot: int) -> bool:
        return True

    def told(self, slot: int) -> dict[str, Any]:
        return {"task": repr(self.model.episodic)}

    def below(self, rows: Sequence[Encoded]) -> Below | Nothing:
        return below(self.model.model, rows)


def _sort(reader: Reader, group: int, row: Encoded) -> tuple[int, int]:
    """In rows for a text, or in tokens that answers have."""
    return len(row.variants), group if reader.reading.continues else -1


def objective_of(model: Trainable) -> Objective:
    """What a model is trained for."""
    match model:
        case Model():
            return Labelling(model)
        case Generator():
            return Writing(model)
        case Tagger():
            return Finding(model)
        case Learner():
            return Adapting(model)
        case WithMasks():
            return Labelling(model.model, model)
        case Similar():
            return Pairing(model)
    raise ConfigError(f"{type(model).__name__} is not what fit trains; possible: Model, Generator, Tagger, Learner")
