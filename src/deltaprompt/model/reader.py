"""How the texts of one task are read and scored: its template, its labels, and its verbalizer's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from deltaprompt.backbone import Backbone
from deltaprompt.compose import Index, Routing, Stack
from deltaprompt.deltas._base import Delta, VirtualTokens
from deltaprompt.deltas._position_shift import PositionShift
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError
from deltaprompt.features import Features
from deltaprompt.model.task import Task
from deltaprompt.params import Weights
from deltaprompt.templates import parse
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Answers, Setting, Verbalizer

T5_SENTINEL = "<extra_id_0>"


class Scorer(Stack):
    """A verbalizer with its tensors: those that train, one slot per adaptation, and those that do not."""

    def __init__(
        self,
        verbalizer: Verbalizer,
        setting: Setting,
        constants: Mapping[str, Tensor],
        slots: int,
        routing: Routing,
        like: Tensor,
    ) -> None:
        super().__init__(verbalizer.params(setting), slots, routing, like)
        self.verbalizer = verbalizer
        self.setting = setting
        self.constants = tuple(constants)
        for name, tensor in constants.items():
            self.register_buffer(name, tensor.to(like.device), persistent=False)

    def forward(self, at: AtMask) -> Tensor:
        """Class scores [b, c]."""
        fixed = {name: self.get_buffer(name) for name in self.constants}
        own = self.weights(at.hidden.shape[0])
        return self.verbalizer.scores(Weights({**own, **fixed}, self.training), self.setting, at)


@dataclass(frozen=True, eq=False)
class Reading:
    """How the texts of one task are read and scored, without a tensor that trains."""

    task: Task
    features: Features
    verbalizer: Verbalizer
    setting: Setting
    constants: Mapping[str, Tensor]  # of the verbalizer

    @classmethod
    def of(cls, backbone: Backbone, task: Task, deltas: Sequence[Delta]) -> Reading:
        """On a backbone, to which nothing is attached, with deltas that will act, each an instance."""
        verbalizer = task.settled(backbone)
        features = features_of(backbone, task, verbalizer, deltas)
        setting = Setting(task.names, backbone.kind, backbone.width, features.answer_ids)
        return cls(task, features, verbalizer, setting, verbalizer.constants(setting))

    @property
    def continues(self) -> bool:
        """Whether answers of several tokens are scored one after another, so that its rows are run by themselves."""
        return self.later > 0

    @property
    def later(self) -> int:
        """The most tokens of an answer that follow its first one; at masks none does."""
        return max(self.features.answer_lengths) - 1 if self.features.kind in ("causal", "seq2seq") else 0

    def scorer(self, backbone: Backbone, slots: int = 1) -> Scorer:
        """The verbalizer with a slot for each adaptation, whose tensors are to be written."""
        like = next(backbone.model.parameters())
        return Scorer(self.verbalizer, self.setting, self.constants, slots, Routing(), like)


class Reader(nn.Module):
    """A task's verbalizer in a model: with how its texts are read, and a slot for each of its adaptations."""

    def __init__(self, backbone: Backbone, task: Task, deltas: Sequence[Delta], slots: int) -> None:
        super().__init__()
        self.reading = Reading.of(backbone, task, deltas)
        self.scorer = self.reading.scorer(backbone, slots)

    @property
    def task(self) -> Task:
        """What is asked."""
        return self.reading.task

    @property
    def features(self) -> Features:
        """How texts become token ids."""
        return self.reading.features

    @property
    def verbalizer(self) -> Verbalizer:
        """The verbalizer in use."""
        return self.reading.verbalizer

    def forward(self, at: AtMask, slot: Index = None) -> Tensor:
        """Class scores [b, c]; `slot` is one of its own for all rows, or one a row [b]."""
        self.scorer.routing.index = slot
        return self.scorer(at)


def of_rows(at: AtMask, rows: Sequence[int] | Tensor) -> AtMask:
    """What is read of some rows, in their order; answers that go on are scored for all rows of a batch."""
    if len(rows) == len(at.hidden):
        return at
    return AtMask(at.hidden[rows], at.present[rows], at.logits, None)


def features_of(backbone: Backbone, task: Task, verbalizer: Verbalizer, deltas: Sequence[Delta]) -> Features:
    """The features of a task, with as many masks as the verbalizer's words need."""
    if len(task.names) < 2 or len(set(task.names)) < len(task.names):
        raise ConfigError(f"a task needs two labels or more, each once; got {list(task.names)}")
    moved = sum(delta.by for delta in deltas if isinstance(delta, PositionShift))
    limit = backbone.max_length - moved
    if task.max_length is not None and not 1 <= task.max_length <= limit:
        behind = f" behind positions moved on by {moved}" if moved else ""
        raise ConfigError(
            f"max_length {task.max_length} is not possible: this backbone takes 1 to {limit} tokens{behind}"
        )
    virtual = sum(delta.length for delta in deltas if isinstance(delta, VirtualTokens))
    if virtual >= (task.max_length or limit):
        raise ConfigError(
            f"{virtual} virtual tokens leave no room in the {task.max_length or limit} tokens of a text; take fewer"
        )
    config = backbone.config
    two = backbone.kind == "seq2seq"
    sentinel = T5_SENTINEL if two and T5_SENTINEL in backbone.tokenizer.get_vocab() else None
    features = Features(
        backbone.tokenizer,
        parse(task.template),
        backbone.kind,
        task.max_length or limit,
        task.names,
        soft_base=backbone.vocabulary,
        prepend_soft=virtual,
        decoder_start_id=config.get("decoder_start_token_id"),
        sentinel=sentinel,
    )
    if not isinstance(verbalizer, Answers):
        return features
    if features.template.masks > 1:
        raise ConfigError(
            f"label words answer at one {{mask}}, and the template has {features.template.masks}; leave one, or use "
            "soft or prototypes, which read the mean of the states at all of them"
        )
    setting = Setting(task.names, backbone.kind, backbone.width, features.answer_ids)
    return replace(features, answer_lengths=verbalizer.answer_lengths(setting))


def placed(deltas: Sequence[Delta], features: Features) -> list[Delta]:
    """The deltas with soft prompts in their rows of virtual tokens, behind one for the template's own soft tokens."""
    first, placed = 0, list[Delta]()
    for delta in deltas:
        if isinstance(delta, VirtualTokens):
            delta, first = replace(delta, first=first), first + delta.length
        placed.append(delta)
    if features.soft_rows:
        placed.insert(0, SoftPrompt(length=features.soft_rows, first=first))
    return placed
