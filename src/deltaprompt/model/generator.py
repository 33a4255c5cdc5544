"""The forward path of generation: prompt and target in, cross-entropy of the target's tokens out; and decoding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import repeat
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.heads import Head
from deltaprompt.compose import Adapted, Index, carries_deltas, instances
from deltaprompt.compose.routing import Routing, check_slot, slots_of
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError
from deltaprompt.features import Encoded, Features
from deltaprompt.features.batching import bucketed
from deltaprompt.features.writing import batches, collated
from deltaprompt.model.decoding import Decoding, decoded, drawn_from
from deltaprompt.model.generation import Chat, Generation
from deltaprompt.model.model import at_answers
from deltaprompt.model.packing import check_packing
from deltaprompt.model.reader import of_template, placed
from deltaprompt.model.trainable import Trainable, check_known, evaluating
from deltaprompt.model.virtual import begin_from_words, check_room
from deltaprompt.types import Batch, Example, Message

SCORES: Final = 1 << 26  # scores [n, vocabulary] formed at once: 256 MB in float32

GENERATIONS: Final[Mapping[str, type[Generation | Chat]]] = {"generation": Generation, "chat": Chat}  # in records
Given: TypeAlias = str | Mapping[str, str] | Example


class Generator(Trainable):
    """A backbone adapted to writing texts. `forward` maps a `Batch` to `{"loss"}`: any trainer can train it.

    Args:
        backbone: a causal model or an encoder-decoder; it is frozen until `adapted.remove()`.
        generation: what is to be written.
        deltas: in the order in which they act.
        seeds: one an adaptation; what it starts from.
    """

    def __init__(
        self,
        backbone: Backbone,
        generation: Generation | Chat,
        deltas: Sequence[Delta] = (),
        seeds: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.generation = generation
        self.once = None
        self.writing = generation.writing(backbone, instances(deltas))  # says what is wrong before anything is attached
        if carries_deltas(backbone.model):
            raise ConfigError(
                "this backbone already carries another model's deltas, which would act here too; take them off it with "
                "that model's .adapted.remove(), or load the backbone again"
            )
        if self.packed:
            check_packing(backbone)
        self.adapted = Adapted(backbone, placed(deltas, self.features), len(seeds), seeds)
        begin_from_words(backbone, self.adapted, [self.features] * len(seeds))
        self.train(False)

    @property
    def features(self) -> Features:
        """How prompts become token ids."""
        return self.writing.features

    @property
    def chosen(self) -> tuple[Delta, ...]:
        """The deltas that were asked for; those that the prompt's template asks for come before them."""
        return self.adapted.deltas[len(of_template(self.features)) :]

    @property
    def packed(self) -> bool:
        """Whether several conversations stand in one row."""
        return isinstance(self.generation, Chat) and self.generation.packed

    # Learning

    def forward(self, batch: Batch, adaptation: Index = None, sizes: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The mean cross-entropy `loss` of the targets; only their states meet the head.

        Args:
            batch: b rows.
            adaptation: whose they are: a slot, or one a row [b].
            sizes: where rows of several adaptations stand one after another, the rows of each; `losses` are theirs.
        """
        if batch.targets is None:
            raise ConfigError("these rows have no targets; encode them with generator.encode(examples)")
        self.adapted.route(adaptation)
        there = batch.targets >= 0  # [b, m]
        states = self._read(batch)[there]  # [n, d]
        rows = there.sum(1)  # [b]
        whose = slots_of(adaptation, there.nonzero()[:, 0])
        each = token_losses(_head(self.backbone), states, batch.targets[there], self.adapted.routing, whose)  # [n]
        tokens = [int(own.sum()) for own in rows.split(list(sizes or [len(rows)]))]
        losses = torch.stack([own.mean() for own in each.split(tokens)])
        return {"loss": losses.mean(), "losses": losses}

    def _read(self, batch: Batch) -> Tensor:
        """The states [b, m, d] that the targets' ids are read from."""
        if self.once is not None:
            return self.once(batch)
        return at_answers(self.backbone.states(batch.inputs), batch.answer_at)

    def encode(self, examples: Sequence[Example], slot: int = 0) -> list[Encoded]:
        """Examples as rows with targets: one for each right text, or (of packed conversations) for several."""
        return self.writing.encode(examples)

    def collate(self, rows: Sequence[Encoded]) -> Batch:
        """Rows as one batch."""
        return collated(self.features, rows)

    def batches(self, rows: Sequence[Encoded], batch_size: int) -> Iterator[Batch]:
        """Rows as batches, the longest first."""
        return batches(self.features, rows, batch_size)

    # Writing

    def generate(
        self,
        examples: Sequence[Given],
        max_new_tokens: int | None = None,
        beams: int | None = None,
        sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        slot: int = 0,
    ) -> list[str]:
        """A text for each example, in their order; it stops at an end token.

        Args:
            examples: with the prompt's fields; a text alone is its one field, or what a user says.
            max_new_tokens: tokens of a text at most; the generation's `max_target` where not given.
            beams: searched for the likeliest text; the generation's where not given, 1 for greedy.
            sample: draws each token instead, from the softmax of scores / `temperature`, of the likeliest tokens that
                have `top_p` of it together (Holtzman et al. 2020).
            temperature: above 0.
            top_p: above 0, up to 1.
            seed: of what is drawn.
            batch_size: rows in one pass.
            slot: which adaptation.

        Raises:
            ConfigError: an option is out of its range, or a prompt leaves no room for so many tokens.
        """
        check_slot(slot, self.adapted.slots)
        how = Decoding(
            self.writing.longest if max_new_tokens is None else max_new_tokens,
            self.generation.beams if beams is None else beams,
            sample,
            temperature,
            top_p,
        )
        rows = self.writing.prompts([self._example(given) for given in _listed(examples)])
        found = [""] * len(rows)
        with evaluating(self), drawn_from(seed, self.device):
            for part in bucketed([row.length for row in rows], batch_size):
                batch = self.features.collate([rows[i] for i in part]).to(self.device)
                texts = decoded(self.adapted, batch.inputs, slot, how, self.writing.ends)
                for i, text in zip(part, texts, strict=True):
                    found[i] = text
        return found

    def predict(self, examples: Sequence[Given], batch_size: int = 32, slot: int = 0) -> list[dict[str, Any]]:
        """`{"text"}` for each example."""
        return [{"text": text} for text in self.generate(examples, batch_size=batch_size, slot=slot)]

    def evaluate(
        self,
        examples: Sequence[Example],
        batch_size: int = 32,
        slot: int = 0,
        max_new_tokens: int | None = None,
        beams: int | None = None,
    ) -> dict[str, float]:
        """BLEU, chrF and ROUGE of what is written, against all right texts; loss and perplexity of these.

        Examples that have labels (of seen and unseen categories, say) are measured by label too: `bleu_seen`.
        """
        from deltaprompt.model.text_metrics import by_label

        if not examples:
            raise ConfigError("there are no examples to evaluate on")
        examples = [self.writing.answered(example) for example in examples]
        right = [self.writing.answers(example) for example in examples]
        if (bare := next((n for n, texts in enumerate(right, 1) if not texts), None)) is not None:
            raise ConfigError(f"example {bare} has no right text to compare with; give it references, or a target")
        rows = self.encode(examples, slot)
        texts = self.generate(examples, max_new_tokens, beams, batch_size=batch_size, slot=slot)
        labels = [example.label for example in examples]
        return {**by_label(texts, right, labels), **self.measure(rows, batch_size, slot)}

    @torch.inference_mode()
    def measure(
        self, rows: Sequence[Encoded], batch_size: int = 32, slot: int = 0, through: nn.Module | None = None
    ) -> dict[str, float]:
        """`{"loss", "perplexity"}` of rows: the mean cross-entropy of their targets' tokens, and its exponential.

        Args:
            rows: with targets.
            batch_size: rows in one pass.
            slot: which adaptation.
            through: a module around this one that is called in its place.
        """
        check_known([bool(row.targets) for row in rows], "target")
        total, tokens = 0.0, sum(row.weight for row in rows)
        with evaluating(self):
            for batch in self.batches(rows, batch_size):
                assert batch.targets is not None
                loss = float((through or self)(batch.to(self.device), slot)["loss"])
                total += loss * int((batch.targets >= 0).sum())
        return told_of(total / tokens)

    def _example(self, given: Given) -> Example:
        if isinstance(given, Example):
            return given
        if isinstance(given, Mapping):
            return Example(given)
        if isinstance(self.generation, Chat):
            return Example({}, messages=(Message("user", given),))
        fields = self.features.template.fields
        if len(fields) != 1:
            raise ConfigError(
                f"a text alone stands for the prompt's one field, and this prompt has {', '.join(fields) or 'none'}; "
                "give a mapping of fields to texts"
            )
        return Example({fields[0]: given})

    # Its tensors

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable tensor `[slots, …]` by stored name."""
        for name, tensor in self.adapted.parts():
            yield f"delta.{name}", tensor

    def slot_parts(self, slot: int = 0) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Every tensor that an adaptation has a part of, by stored name, and which part it is."""
        for name, tensor in self.parts():
            yield name, tensor, slot

    def stored(self, slot: int = 0) -> dict[str, Tensor]:
        """What is kept of one slot, by stored name: what trains, and of a reparametrised delta what it computes."""
        check_room(self.chosen, self.features)
        return {f"delta.{name}": tensor for name, tensor in self.adapted.stored(slot).items()}

    def record(self, slot: int = 0) -> dict[str, Any]:
        """What is to be written, as JSON from which it can be made again."""
        kind = next(name for name, sort in GENERATIONS.items() if isinstance(self.generation, sort))
        return {"template": self.generation.template, "generation": {"kind": kind, **asdict(self.generation)}}


def generator(
    backbone: Backbone, generation: Generation | Chat, deltas: Sequence[Delta] = (), seed: int = 0
) -> Generator:
    """A generator: the frozen backbone, its deltas in the order in which they act, and what is to be written."""
    return Generator(backbone, generation, deltas, [seed])


def token_losses(head: Head, states: Tensor, targets: Tensor, routing: Routing, whose: Index) -> Tensor:
    """−log p(target) [n] at states [n, d]; too many scores at once are formed in parts, and again going back.

    Deltas that act at the head are those of `whose`: a slot, or one a state [n].
    """

    def losses(states: Tensor, targets: Tensor, whose: Index) -> Tensor:
        with routing.at(whose):
            scores = head.logits(states)  # [n, vocabulary]
        return cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), targets, reduction="none")

    size = max(1, SCORES // head.size)
    if len(states) <= size:
        return losses(states, targets, whose)
    slots = whose.split(size) if isinstance(whose, Tensor) else repeat(whose)
    parts = zip(states.split(size), targets.split(size), slots, strict=False)
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


def told_of(loss: float) -> dict[str, float]:
    """A mean loss, and its perplexity."""
    return {"loss": loss, "perplexity": math.exp(loss) if loss < math.log(torch.finfo(torch.float64).max) else math.inf}


def _head(backbone: Backbone) -> Head:
    assert backbone.head is not None  # of every causal model and encoder-decoder
    return backbone.head


def _listed(examples: Sequence[Given]) -> Sequence[Given]:
    if isinstance(examples, str | Mapping | Example):
        raise ConfigError("texts are generated for a list, and this is one; write generate([example])")
    return examples
