"""How the texts of one task are read and scored: its template, its labels, and its verbalizer's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deltaprompt.backbone import Backbone
from deltaprompt.compose import Index, Routing, Stack
from deltaprompt.deltas._base import Delta, VirtualTokens
from deltaprompt.deltas.p_tuning import PTuning
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError
from deltaprompt.features import Features
from deltaprompt.features.named_tokens import SENTINEL
from deltaprompt.model import several
from deltaprompt.model.task import Task
from deltaprompt.model.virtual import room
from deltaprompt.params import Param, Weights, zeros
from deltaprompt.templates import Field, Literal, Mask, Special, Template, parse
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import PRIOR, Answers, Phrased, Setting, Trained, Verbalizer, Worded, normalised


class Scorer(Stack):
    """A verbalizer with its tensors: one slot per adaptation of those that are its own, and those that do not change.

    A calibration's prior is one of the former. It is over the words, which the verbalizer then takes it from itself, or
    over the classes.
    """

    def __init__(self, reading: Reading, slots: int, routing: Routing, like: Tensor) -> None:
        verbalizer, setting, calibration = reading.verbalizer, reading.setting, reading.task.calibration
        of_words = isinstance(verbalizer, Worded) and calibration is not None and not calibration.of_classes
        params = dict(verbalizer.params(setting))
        if calibration is not None:
            answers = verbalizer.units(setting) if isinstance(verbalizer, Worded) and of_words else len(setting.labels)
            params[PRIOR] = Param((answers,), zeros, trains=False)
        if reading.task.several:
            params[several.ODDS] = Param((len(setting.labels),), zeros)
        super().__init__(params, slots, routing, like)
        self.verbalizer = verbalizer
        self.setting = setting
        self.calibrated = calibration is not None
        self.of_words = of_words
        self.several = reading.task.several
        self.constants = tuple(reading.constants)
        for name, tensor in reading.constants.items():
            self.register_buffer(name, tensor.to(like.device), persistent=False)

    def forward(self, at: AtMask) -> Tensor:
        """Class scores [b, c]; of several labels an example the logarithm of each one's odds."""
        scores = self.of_one(at)
        return several.log_odds(scores) + self.weights(len(scores))[several.ODDS] if self.several else scores

    def of_one(self, at: AtMask) -> Tensor:
        """Class scores [b, c] whose softmax is a distribution over the labels."""
        scores = self.verbalizer.scores(self.seen(at, self.of_words), self.setting, at)
        if not self.calibrated or self.of_words:
            return scores
        return normalised(scores) - self.weights(at.hidden.shape[0])[PRIOR]

    def probabilities(self, scores: Tensor) -> Tensor:
        """How likely each label is, from class scores [b, c], in float32."""
        return scores.float().sigmoid() if self.several else scores.float().softmax(-1)

    def forget_prior(self, place: int) -> None:
        """What a calibration measured of one of its slots no longer holds."""
        if self.calibrated:
            self.tensors[PRIOR].data[place] = 0

    def answers(self, at: AtMask) -> Tensor:
        """Normalised log p of what a prior is over, before calibration: of words [b, u] or of classes [b, c]."""
        w = self.seen(at, False)
        if isinstance(self.verbalizer, Worded) and self.of_words:
            return normalised(self.verbalizer.word_scores(w, self.setting, at))
        return normalised(self.verbalizer.scores(w, self.setting, at))

    def loss(self, at: AtMask, scores: Tensor, classes: Tensor) -> Tensor:
        """The loss of rows of one adaptation: the verbalizer's own, or the mean cross-entropy of their scores [b, c].

        Args:
            classes: of the rows [b]; of several labels an example which are right [b, c].
        """
        if self.several:
            return several.loss(scores, classes)
        if isinstance(self.verbalizer, Trained):
            return self.verbalizer.loss(self.seen(at, self.of_words), self.setting, at, scores, classes)
        return cross_entropy(scores.float(), classes)

    def seen(self, at: AtMask, calibrated: bool) -> Weights:
        """The tensors as the verbalizer sees them, with or without a prior that it takes away itself."""
        own = self.weights(at.hidden.shape[0])
        fixed = {name: self.get_buffer(name) for name in self.constants}
        return Weights({n: t for n, t in own.items() if calibrated or n != PRIOR} | fixed, self.training)


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
        check_several(task, verbalizer)
        check_domain(task)
        features = features_of(backbone, task, verbalizer, deltas)
        setting = setting_of(backbone, task, features)
        return cls(task, features, verbalizer, setting, verbalizer.constants(setting))

    @property
    def continues(self) -> bool:
        """Whether answers of several tokens are scored one after another, so that its rows are run by themselves."""
        return self.later > 0 or isinstance(self.verbalizer, Phrased)

    @property
    def later(self) -> int:
        """The most tokens of an answer that follow its first one; at masks none does."""
        return max(self.features.answer_lengths) - 1 if self.features.kind in ("causal", "seq2seq") else 0

    def scorer(self, backbone: Backbone, slots: int = 1) -> Scorer:
        """The verbalizer with a slot for each adaptation, whose tensors are to be written."""
        like = next(backbone.model.parameters())
        return Scorer(self, slots, Routing(), like)


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

    def forward(self, at: AtMask, slot: Index = None, of_one: bool = False) -> Tensor:
        """Class scores [b, c], or those `of_one` label; `slot` is one of its own for all rows, or one a row [b]."""
        self.scorer.routing.index = slot
        return self.scorer.of_one(at) if of_one else self.scorer(at)

    def show(self, features: Features) -> None:
        """Its texts are read with these demonstrations from now on."""
        self.reading = replace(self.reading, features=features)

    def loss(self, at: AtMask, scores: Tensor, classes: Tensor, slot: int) -> Tensor:
        """The loss of rows of one of its slots, from their scores [b, c]."""
        self.scorer.routing.index = slot
        return self.scorer.loss(at, scores, classes)


def of_rows(at: AtMask, rows: Sequence[int] | Tensor) -> AtMask:
    """What is read of some rows, in their order; answers that go on are scored for all rows of a batch."""
    if len(rows) == len(at.hidden):
        return at
    return AtMask(at.hidden[rows], at.present[rows], at.logits, None)


def features_of(backbone: Backbone, task: Task, verbalizer: Verbalizer, deltas: Sequence[Delta]) -> Features:
    """The features of a task, with as many masks as the verbalizer's words need."""
    if len(task.names) < 2 or len(set(task.names)) < len(task.names):
        raise ConfigError(f"a task needs two labels or more, each once; got {list(task.names)}")
    longest, virtual = room(backbone, deltas, task.max_length)
    config = backbone.config
    two = backbone.kind == "seq2seq"
    first = SENTINEL.format(0)
    sentinel = first if two and first in backbone.tokenizer.get_vocab() else None
    features = Features(
        backbone.tokenizer,
        parse(task.template),
        backbone.kind,
        longest,
        task.names,
        soft_base=backbone.vocabulary,
        prepend_soft=virtual,
        decoder_start_id=config.get("decoder_start_token_id"),
        sentinel=sentinel,
        several=task.several,
    )
    if not isinstance(verbalizer, Answers):
        return features
    lengths, phrases = verbalizer.answer_lengths(setting_of(backbone, task, features)), phrases_of(task, verbalizer)
    if fixed := [len(features.answer_ids(phrase.filled({}))) for phrase in phrases if not phrase.fields]:
        lengths = (max(fixed if len(fixed) == len(phrases) else (*fixed, *lengths)),)
    return replace(features, answer_lengths=lengths, phrases=phrases)


def phrases_of(task: Task, verbalizer: Verbalizer) -> tuple[Template, ...]:
    """The text of each label, where it is one of the example's own."""
    if not isinstance(verbalizer, Phrased):
        return ()
    found = tuple(map(parse, verbalizer.phrases(task.names)))
    for phrase in found:
        if odd := [str(piece) for piece in phrase.pieces if not isinstance(piece, Literal | Field)]:
            raise ConfigError(f"the text of a label is made of text and fields, got {odd[0]} in {str(phrase)!r}")
    if task.calibration is not None and not task.calibration.needs_texts and any(phrase.fields for phrase in found):
        raise ConfigError(
            f"{type(task.calibration).__name__} asks without an example, and these answers are texts of the example; "
            "use Contextualised or BatchCalibration, or leave the calibration out"
        )
    return found


def check_several(task: Task, verbalizer: Verbalizer) -> None:
    """What is made for one label an example is refused where there may be several."""
    if task.several and isinstance(verbalizer, Trained):
        raise ConfigError(
            f"{type(verbalizer).__name__} has a loss of its own, for one label an example; for several choose another "
            "verbalizer, such as label_words, hierarchical, soft or prototypes"
        )
    if task.several and parse(task.template).demos is not None:
        raise ConfigError("a demonstration shows one label, and this task gives several; leave {demos} out")


def check_domain(task: Task) -> None:
    """What a calibration asks in place of the template is text, with as many masks."""
    own = None if task.calibration is None else task.calibration.template()
    if own is None:
        return
    domain, masks = parse(own), parse(task.template).masks
    if odd := [str(piece) for piece in domain.pieces if not isinstance(piece, Literal | Mask | Special)]:
        raise ConfigError(f"a domain is text and {{mask}}, got {odd[0]} in {own!r}")
    if domain.masks != masks:
        raise ConfigError(f"the domain {own!r} has {domain.masks} masks, and the task's template {masks}; give as many")


def setting_of(backbone: Backbone, task: Task, features: Features) -> Setting:
    """What a verbalizer may know."""
    return Setting(
        task.names,
        backbone.kind,
        backbone.width,
        features.answer_ids,
        features.template.masks,
        0 if backbone.head is None else backbone.head.size,
        task.several,
        features.whole_words,
    )


def of_template(features: Features) -> list[Delta]:
    """The deltas that a template asks for: of its soft tokens one a range of rows, and its prefix."""
    first, found = features.prepend_soft, list[Delta]()
    for encoder, rows in features.soft_ranges:
        if encoder is None:
            found.append(SoftPrompt(length=rows, first=first))
        else:
            found.append(PTuning(length=rows, encoder=encoder, first=first))
        first += rows
    if features.template.prefix is not None:
        found.append(Prefix(features.template.prefix.length))
    return found


def placed(deltas: Sequence[Delta], features: Features) -> list[Delta]:
    """The deltas with soft prompts in their rows of virtual tokens, behind those that the template asks for."""
    first, placed = 0, list[Delta]()
    for delta in deltas:
        if isinstance(delta, VirtualTokens):
            delta, first = replace(delta, first=first), first + delta.length
        placed.append(delta)
    return [*of_template(features), *placed]


def check_alike(readers: Sequence[Reader]) -> None:
    """The tasks of one model have the same labels, and their templates ask for the same deltas, which are of all."""
    first = readers[0]
    for other in readers[1:]:
        if other.task.several != first.task.several:
            raise ConfigError(
                "of the tasks of one model some give several labels and some one; put them in a model each"
            )
        if other.task.names != first.task.names:
            raise ConfigError(
                f"the tasks of one model have the same labels in the same order; got {list(first.task.names)} and "
                f"{list(other.task.names)}"
            )
        if other.features.soft_rows != first.features.soft_rows:
            raise ConfigError(
                f"the templates of one model have as many soft tokens each; got {first.features.soft_rows} and "
                f"{other.features.soft_rows}. Put those that differ in a model each"
            )
        if of_template(other.features) != of_template(first.features):
            raise ConfigError(
                "the templates of one model have as many soft tokens of each network, and the same prefix; got "
                f"{str(first.features.template)!r} and {str(other.features.template)!r}. Put those that differ in a "
                "model each"
            )
