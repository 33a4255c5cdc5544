"""The forward path: template and deltas in front, states where the answer is read, the verbalizer behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.continuation import prompted
from deltaprompt.backbone.shared import Begun, begun, states_after
from deltaprompt.compose import Adapted, Index, Routing, Stack, carries_deltas, instances
from deltaprompt.deltas._base import Delta, VirtualTokens
from deltaprompt.deltas._position_shift import PositionShift
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError
from deltaprompt.features import Encoded, Features
from deltaprompt.model.task import Task
from deltaprompt.params import Weights
from deltaprompt.templates import parse
from deltaprompt.types import AtMask, Batch, Example
from deltaprompt.verbalizers._base import Answers, Setting, Started, Verbalizer, pooled

T5_SENTINEL = "<extra_id_0>"
BARE = "{text}"


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


class Model(nn.Module):
    """A backbone adapted to a task. `forward` maps a `Batch` to `{"loss", "logits"}`: any trainer can train it."""

    def __init__(self, backbone: Backbone, task: Task, deltas: Sequence[Delta], seeds: Sequence[int] = (0,)) -> None:
        super().__init__()
        self.task = task
        self.backbone = backbone
        self.once: Callable[[Batch], Tensor] | None = None  # while it trains: reads states, of which it keeps some
        verbalizer = task.settled(backbone)
        self.features = features_of(backbone, task, verbalizer, instances(deltas))
        setting = Setting(task.names, backbone.kind, backbone.width, self.features.answer_ids)
        constants = verbalizer.constants(setting)  # whatever is wrong is said before anything is attached
        if carries_deltas(backbone.model):
            raise ConfigError(
                "this backbone already carries another model's deltas, which would act here too; take them off it with "
                "that model's .adapted.remove(), or load the backbone again"
            )
        self.adapted = Adapted(backbone, placed(deltas, self.features), len(seeds), seeds)
        like = next(backbone.model.parameters())
        self.scorer = Scorer(verbalizer, setting, constants, len(seeds), self.adapted.routing, like)
        self.scorer.start(seeds)
        self._begin_soft_words()
        self.train(False)

    @property
    def chosen(self) -> tuple[Delta, ...]:
        """The task's deltas; the soft tokens of its template are one more, the first of all."""
        return self.adapted.deltas[1 if self.features.soft_rows else 0 :]

    @property
    def verbalizer(self) -> Verbalizer:
        """The verbalizer in use."""
        return self.scorer.verbalizer

    def forward(self, batch: Batch, adaptation: Index = None) -> dict[str, Tensor]:
        """Class scores `logits` [b, c] and, where the batch has labels, the mean cross-entropy `loss`."""
        logits = self.scorer(self.at_mask(batch, adaptation))
        if batch.labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits.float(), batch.labels), "logits": logits}

    def at_mask(self, batch: Batch, adaptation: Index = None) -> AtMask:
        """The states where the answer is read, and the head that scores words there."""
        self.adapted.route(adaptation)
        with self.adapted.repeated(batch.variants):
            longest = max(self.features.answer_lengths)
            repeated = self.adapted.repeated if longest > 1 else None
            return read(
                self.backbone, batch, repeated, self.once, alike=not (self.training or isinstance(adaptation, Tensor))
            )

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Examples as token ids."""
        return self.features.encode(examples)

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.model.parameters()).device

    @torch.no_grad()
    def start(self, examples: Sequence[Example], slot: int = 0, batch_size: int = 32) -> None:
        """Gives a verbalizer that starts from states (prototypes, descriptions) its start from training examples."""
        verbalizer, setting = self.verbalizer, self.scorer.setting
        if not isinstance(verbalizer, Started):
            return
        classes = torch.tensor(
            [self.features.label_index(_label(e)) for e in examples], dtype=torch.long, device=self.device
        )
        support = self.embed(self.features, examples, slot, batch_size)
        plain = self._plain
        described = [Example(dict.fromkeys(plain.template.fields, text)) for text in verbalizer.texts(setting)]
        texts = self.embed(plain, described, slot, batch_size)
        for name, tensor in verbalizer.start(setting, texts, support, classes).items():
            self.scorer.tensors[name][slot].copy_(tensor)

    @property
    def _plain(self) -> Features:
        """How a description is read: by itself where states are means over tokens, otherwise through the template."""
        if self.backbone.kind != "encoder" or self.features.template.masks:
            return self.features
        return replace(self.features, template=parse(BARE), prepend_soft=0)

    @torch.no_grad()
    def embed(self, features: Features, examples: Sequence[Example], slot: int = 0, batch_size: int = 32) -> Tensor:
        """The pooled states [n, d] of examples, in their order; the model is not training."""
        out = torch.zeros(len(examples), self.backbone.width, device=self.device)
        with evaluating(self):
            for batch in features.batches(features.encode(unlabelled(examples)), batch_size):
                at = self.at_mask(batch.to(self.device), slot)
                out[batch.index] = pooled(at).float()
        return out

    def predict(
        self, examples: Sequence[str | Mapping[str, str] | Example], batch_size: int = 32, slot: int = 0
    ) -> list[dict[str, Any]]:
        """`{"label", "score", "scores"}` for each text: the likeliest label, its probability, and every label's."""
        if isinstance(examples, str | Mapping | Example):
            raise ConfigError("predict takes a list, and got one text; write predict([text])")
        found = self.probabilities([example_of(e) for e in examples], batch_size, slot)
        return [answer(self.task.names, p) for p in found.tolist()]

    @torch.inference_mode()
    def probabilities(self, examples: Sequence[Example], batch_size: int = 32, slot: int = 0) -> Tensor:
        """Class probabilities [n, c] on the CPU, in the order of the examples."""
        if isinstance(self.verbalizer, Started) and not any(t[slot].any() for t in self.scorer.tensors.values()):
            raise ConfigError(
                "the prototypes have no start yet; give model.start(examples) labelled examples, or fit the model"
            )
        out = torch.zeros(len(examples), len(self.task.names))
        with evaluating(self):
            for batch in self.features.batches(self.features.encode(unlabelled(examples)), batch_size):
                logits = self(batch.to(self.device), slot)["logits"]
                out[batch.index] = logits.float().softmax(-1).cpu()
        return out

    def evaluate(self, examples: Sequence[Example], batch_size: int = 32, slot: int = 0) -> dict[str, float]:
        """Accuracy and macro F1 on labelled examples."""
        from sklearn.metrics import accuracy_score, f1_score

        if not examples:
            raise ConfigError("there are no examples to evaluate on")
        gold = [self.features.label_index(_label(e)) for e in examples]
        predicted = self.probabilities(examples, batch_size, slot).argmax(-1).tolist()
        macro = f1_score(gold, predicted, average="macro", labels=range(len(self.task.names)), zero_division=0.0)
        return {"accuracy": float(accuracy_score(gold, predicted)), "macro_f1": float(macro)}

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable tensor `[slots, …]` by stored name."""
        for name, tensor in self.adapted.parts():
            yield f"delta.{name}", tensor
        for name, tensor in self.scorer.tensors.items():
            yield f"verbalizer.{name}", tensor

    def stored(self, slot: int = 0) -> dict[str, Tensor]:
        """What is kept of one slot, by stored name: what trains, and of a reparametrised delta what it computes."""
        if sum(d.length for d in self.chosen if isinstance(d, VirtualTokens)) != self.features.prepend_soft:
            raise ConfigError(
                "virtual tokens were attached or detached after the model was made, and its texts have as many as "
                "before; make a new one with dp.adapt(backbone, task, deltas)"
            )
        kept = {f"delta.{name}": tensor for name, tensor in self.adapted.stored(slot).items()}
        return kept | {f"verbalizer.{name}": tensor.detach()[slot] for name, tensor in self.scorer.tensors.items()}

    def settle(self) -> None:
        """Every reparametrised delta becomes the plain one that it computes, as `save` keeps it; answers stay."""
        self.adapted.settle()

    def parameter_count(self) -> int:
        """Trainable numbers of one adaptation."""
        return sum(tensor[0].numel() for _, tensor in self.parts() if tensor.requires_grad)

    def save(
        self,
        folder: str | Path,
        slot: int = 0,
        training: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> int:
        """Keeps one adaptation in a folder, with a record of its training; the bytes written. See `saved.save`."""
        from deltaprompt.model.saved import save

        return save(self, folder, slot, training, metrics)

    def _begin_soft_words(self) -> None:
        """Soft tokens that begin from words take these words' embeddings."""
        parts = dict(self.parts())
        row = 0
        for block in self.features.soft_blocks:
            if block.words is not None:
                ids = torch.tensor(self.features.word_ids(block.words), device=self.device)
                name = f"delta.0.{self.backbone.input_embedding}.p"
                with torch.no_grad():
                    parts[name][:, row : row + block.size] = self.backbone.model.get_input_embeddings()(ids).to(
                        parts[name].dtype
                    )
            row += block.size


def read(
    backbone: Backbone,
    batch: Batch,
    repeated: Callable[[int], AbstractContextManager[None]] | None = None,
    once: Callable[[Batch], Tensor] | None = None,
    alike: bool = False,
) -> AtMask:
    """The states of a batch where the answer is read.

    Args:
        backbone: with deltas that know of the batch's rows.
        batch: b rows of v variants each.
        repeated: where answers of several tokens are scored, what tells the deltas that rows are repeated.
        once: what reads the states in place of the backbone, while those of frozen layers are kept.
        alike: whether all rows are of one adaptation, so that tokens which they share in front can be run once.
    """
    b, v = batch.answer_at.shape[0] // batch.variants, batch.variants
    prompt = None
    front = _begun(backbone, batch.inputs) if alike and once is None else None
    if repeated is not None and backbone.kind in ("causal", "seq2seq"):
        prompt = prompted(backbone, batch.inputs if front is None else front.inputs, repeated, front)
    if once is not None and prompt is None:
        hidden = once(batch)
    elif front is not None:
        states = states_after(backbone, front) if prompt is None else prompt.states
        hidden = at_answers(states, batch.answer_at - front.length)
    else:
        states = backbone.states(batch.inputs) if prompt is None else prompt.states
        hidden = at_answers(states, batch.answer_at)
    return AtMask(
        hidden.unflatten(0, (b, v)),
        (batch.answer_at >= 0).unflatten(0, (b, v)),
        None if backbone.head is None else backbone.head.logits,
        None if prompt is None else lambda ids, lengths: prompt.log_likelihood(hidden[:, 0], ids, lengths),
    )


def _begun(backbone: Backbone, inputs: Mapping[str, Tensor]) -> Begun | None:
    """A batch whose shared tokens have been run; not in training, where each row draws its own dropout."""
    if backbone.kind != "causal" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return begun(backbone, inputs)


def at_answers(states: Tensor, answer_at: Tensor) -> Tensor:
    """The states [b*v, m, d] at the answer positions [b*v, m] of states [b*v, s, d]."""
    rows = torch.arange(len(states), device=states.device)[:, None]
    return states[rows, answer_at.clamp(min=0)]


def adapt(backbone: Backbone, task: Task, deltas: Sequence[Delta] = (), seed: int = 0) -> Model:
    """A model for a task: the frozen backbone, its deltas in the order in which they act, and the task's verbalizer.

    Where labels are described by sentences it answers at once, from these alone.
    """
    model = Model(backbone, task, deltas, [seed])
    if isinstance(model.verbalizer, Started) and model.verbalizer.texts(model.scorer.setting):
        model.start([])
    return model


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model, each module of which then goes back to its own mode, is in evaluation mode."""
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was:
            module.training = training


def answer(names: Sequence[str], probabilities: Sequence[float]) -> dict[str, Any]:
    """The likeliest label, its probability, and every label's."""
    scores = dict(zip(names, probabilities, strict=True))
    label = max(scores, key=lambda name: scores[name])
    return {"label": label, "score": scores[label], "scores": scores}


def example_of(given: str | Mapping[str, str] | Example) -> Example:
    if isinstance(given, Example):
        return given
    return Example({"text": given} if isinstance(given, str) else given)


def unlabelled(examples: Iterable[Example]) -> list[Example]:
    return [Example(e.fields) for e in examples]


def _label(example: Example) -> str:
    if example.label is None:
        raise ConfigError(f"an example has no label, {dict(example.fields)}; every one needs one here")
    return example.label
