"""What is asked in episodes, each of which has labels of its own and a few examples of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltaprompt.errors import ConfigError
from deltaprompt.model.tagging import Tagging
from deltaprompt.model.task import Task
from deltaprompt.model.transitions import Moves
from deltaprompt.registry import describe, from_description
from deltaprompt.verbalizers._base import Started, Verbalizer
from deltaprompt.verbalizers.proto_net import ProtoNet


@dataclass(frozen=True)
class Episodic:
    """What is asked in every episode, whose labels are its own.

    Args:
        template: of a text; with spans there is none beside "{text}".
        verbalizer: starts from the support: `ProtoNet`, `HyperProto`, `NNShot`, `Prototypes`, ….
        spans: whether spans of texts are looked for, in the scheme "io", and not labels of texts.
        max_length: tokens of a sequence at most; the backbone's own limit where not given.
        steps: of gradient descent on the support's loss for what the verbalizer started with.
        rate: of these steps.
        moves: how often tags followed one another in other data (StructShot); see `Tagging`.
        tau: τ of these moves.
        legacy: whether spans are counted as Few-NERD's code does; see `span_metrics.flattened`.
    """

    template: str = "{text}"
    verbalizer: Verbalizer = ProtoNet()  # noqa: RUF009  frozen
    spans: bool = False
    max_length: int | None = None
    steps: int = 0
    rate: float = 0.1
    moves: Moves | None = None
    tau: float = 0.32
    legacy: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.verbalizer, Started) or not self.verbalizer.labelled:
            raise ConfigError(
                f"{type(self.verbalizer).__name__} does not start from labelled examples, of which episodes are made; "
                "choose proto_net, hyper_proto, nn_shot, prototypes or another that does"
            )
        if self.steps < 0 or not 0 < self.rate < math.inf:
            raise ConfigError(f"got steps={self.steps}, rate={self.rate}; possible: steps >= 0, rate above 0")
        if self.spans and self.template != "{text}":
            raise ConfigError(f"spans are looked for in texts as they are; got the template {self.template!r}")
        if (self.moves is not None or self.legacy) and not self.spans:
            raise ConfigError("moves and legacy are of the tags of words; give spans=True too, or leave them out")

    def task(self, labels: Sequence[str]) -> Task | Tagging:
        """The same for one episode's labels."""
        if self.spans:
            return Tagging(tuple(labels), "io", self.verbalizer, self.max_length, self.moves, self.tau)
        return Task(self.template, tuple(labels), self.verbalizer, self.max_length)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        moves = None if self.moves is None else asdict(self.moves)
        return {**vars(self), "verbalizer": describe("verbalizers", self.verbalizer), "moves": moves}

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Episodic:
        """What a record tells."""
        verbalizer, moves = from_description("verbalizers", record["verbalizer"]), record["moves"]
        return cls(**{**record, "verbalizer": verbalizer, "moves": None if moves is None else Moves(**moves)})
