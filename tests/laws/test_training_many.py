"""Adaptations that train in one pass end as each would alone: losses, bests, what is learned and what is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaprompt.backbone import Backbone
from deltaprompt.deltas._base import Delta
from deltaprompt.deltas.adapter import Adapter
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.dora import DoRA
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.reparametrised_prefix import ReparametrisedPrefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.features import Encoded
from deltaprompt.features.rows import Row
from deltaprompt.model import Model, Task
from deltaprompt.params import Weights
from deltaprompt.trainer import Plan, Run, Training, fit, fit_many
from deltaprompt.trainer.passes import MOST, by_length
from deltaprompt.trainer.streams import Shares, Streams
from deltaprompt.types import Example
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.prototypes import Prototypes
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo

WORDS = {"good": ("great",), "bad": ("terrible",)}
TEXTS = {
    "good": ["a great movie", "a good film with a great plot and good acting", "great plot", "a great film", "good"],
    "bad": ["terrible acting", "a bad film", "a terrible movie with a bad plot", "bad plot", "a terrible bad movie"],
}
ROWS = [
    Example({"text": text}, label)
    for pair in zip(*TEXTS.values(), strict=True)
    for text, label in zip(pair, TEXTS, strict=True)
]
FAST = Training(steps=6, batch_size=4, learning_rate=1e-2)
PLANS = (  # other rows, other lengths of a run, other rates, batches and clipping
    Plan(ROWS, ROWS[:4], FAST, seed=3),
    Plan(ROWS[2:], ROWS[4:], replace(FAST, steps=None, epochs=1, batch_size=3, accumulate=2, clip=0.1), seed=4),
    Plan(ROWS[:8], None, replace(FAST, steps=9, learning_rate=3e-3, schedule="cosine", weight_decay=0.3), seed=5),
)
DELTAS = {
    "lora": LoRA(rank=2, dropout=0.4),
    "dora": DoRA(rank=2, dropout=0.2),
    "adapter": Adapter(bottleneck=3),
    "prefix": Prefix(length=2),
    "soft_prompt": SoftPrompt(length=2),
    "bitfit": BitFit(),
    "reparametrised_prefix": ReparametrisedPrefix(length=2),
}
VERBALIZERS = {"label_words": LabelWords(WORDS), "prototypes": Prototypes(), "soft": SoftVerbalizer()}


@pytest.fixture(autouse=True)
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the few tokens of these texts make several passes."""
    monkeypatch.setitem(MOST, "cpu", 40)


def made(backbone: Backbone, delta: Delta, verbalizer: Any, seeds: Sequence[int]) -> Model:
    return Model(backbone, Task("{text} It was {mask}.", WORDS, verbalizer), [delta], seeds)


def said(model: Model, slot: int) -> Tensor:
    return model.probabilities(ROWS, slot=slot)


def told(run: Run) -> list[float]:
    """The numbers of a run."""
    return [
        number
        for entry in run.history
        for number in (entry["step"], entry["loss"], entry["learning_rate"], *entry["dev"].values())
    ]


def both(
    backbone: Backbone, delta: Delta, verbalizer: Any, plans: Sequence[Plan] = PLANS, **options: Any
) -> tuple[list[tuple[Run, dict[str, Tensor], Tensor]], list[tuple[Run, dict[str, Tensor], Tensor]]]:
    """What each plan comes to in one pass with the others, and alone."""
    model = made(backbone, delta, verbalizer, [plan.seed for plan in plans])
    runs = fit_many(model, plans, **options)
    joint = [(run, clone(model, slot), said(model, slot)) for slot, run in enumerate(runs)]
    model.adapted.remove()
    alone = []
    for plan in plans:
        model = made(backbone, delta, verbalizer, [plan.seed])
        run = fit(model, plan.train, plan.dev, training=plan.training, seed=plan.seed)
        alone.append((run, clone(model), said(model, 0)))
        model.adapted.remove()
    return joint, alone


def clone(model: Model, slot: int = 0) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.stored(slot).items()}


def check(joint: Any, alone: Any, tolerance: float) -> None:
    for (one, learned, says), (other, expected, says_alone) in zip(joint, alone, strict=True):
        assert (one.steps, one.best_step, one.stopped, one.trainable) == (
            other.steps,
            other.best_step,
            other.stopped,
            other.trainable,
        )
        assert told(one) == pytest.approx(told(other), abs=max(tolerance, 1e-6), rel=tolerance)
        torch.testing.assert_close(says, says_alone, atol=max(tolerance, 1e-6), rtol=0)
        assert learned.keys() == expected.keys()
        if tolerance < 1e-6:
            for name, tensor in learned.items():
                torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("verbalizer", VERBALIZERS)
@pytest.mark.parametrize("delta", DELTAS)
def test_each_ends_as_it_would_alone(delta: str, verbalizer: str) -> None:
    backbone = zoo.build("bert", torch.float64)
    check(*both(backbone, DELTAS[delta], VERBALIZERS[verbalizer]), 1e-9)
    check(*both(zoo.build("bert"), DELTAS[delta], VERBALIZERS[verbalizer], PLANS[:2]), 1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart", "bert-encoder"])
def test_on_every_kind_of_backbone(family: str) -> None:
    """Padded on the left, on the right, and on two sides."""
    words = {"good": ("great",), "bad": ("terrible",)}
    verbalizer = Prototypes() if family == "bert-encoder" else LabelWords(words)
    check(
        *both(zoo.build(family, torch.float64), LoRA(rank=2, dropout=0.3, at=("attn.*", "cross.*|attn.q")), verbalizer),
        1e-9,
    )


def test_on_what_frozen_layers_made_of_the_texts() -> None:
    """Layers below the lowest delta run once a text, and dropout above them is drawn as alone."""
    for dropout in (0.0, 0.4):
        delta = LoRA(rank=2, dropout=dropout, at=("layers.1.attn.v",))
        check(*both(zoo.build("bert", torch.float64), delta, SoftVerbalizer()), 1e-9)


def test_dropout_is_drawn_as_alone() -> None:
    """Shares that overlap a padded pass, on both sides; a layer that is computed again meets the same."""
    features = made(zoo.build("bert"), BitFit(), SoftVerbalizer(), [0]).features
    batches = [features.encode(ROWS[:3]), features.encode(ROWS[3:5])]
    widths = [max(row.length for row in batch) for batch in batches]
    x, cpu = torch.ones(5, max(widths), 7), torch.device("cpu")
    for left in (False, True):
        streams = Streams([11, 12], cpu)
        with streams.over([0, 1], Shares.of(batches, left)):
            state = torch.get_rng_state()
            once = [Weights({}, True).dropped(x, 0.5) for _ in range(2)]
            torch.set_rng_state(state)
            again = [Weights({}, True).dropped(x, 0.5) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        for seed, rows, width in ((11, slice(0, 3), widths[0]), (12, slice(3, 5), widths[1])):
            torch.manual_seed(seed)
            for drawn in once:
                own = drawn[rows, -width:] if left else drawn[rows, :width]
                assert torch.equal(own, torch.dropout(torch.ones_like(own), 0.5, True))


def test_passes_cost_as_little_as_they_can() -> None:
    """Against all splits of rows that lie in the order of their lengths."""
    lengths = [3, 40, 9, 8, 41, 4, 39, 17]
    whole = [(0, [Encoded((Row(list(range(n)), [0]),), 0) for n in lengths], 1.0)]
    ordered = sorted(lengths, reverse=True)

    def price(passes: list[list[int]], cost: float) -> float:
        return sum(cost + max(own) * len(own) for own in passes)

    for cost in (1, 20, 100, 500):
        found = [[row.length for _, own, _ in one for row in own] for one in by_length(whole, cost, 10_000)]
        cuts = product((False, True), repeat=len(ordered) - 1)
        splits = ([0, *(i + 1 for i, cut in enumerate(some) if cut), len(ordered)] for some in cuts)
        least = min(price([ordered[a:b] for a, b in pairwise(split)], cost) for split in splits)
        assert price(found, cost) == least


def test_rows_of_one_length_share_a_pass() -> None:
    rows = [Encoded((Row(list(range(length)), [0]),), 0) for length in (3, 40, 9, 8, 41, 4, 39)]
    whole = [(0, rows[:3], 1.0), (1, rows[3:], 0.5)]
    passes = list(by_length(whole, 10, 1000))
    assert [[row.length for _, own, _ in one for row in own] for one in passes] == [[40, 41, 39], [9, 3, 8, 4]]
    for course, _, share in whole:
        assert sum(s for one in passes for n, _, s in one if n == course) == pytest.approx(share)
    assert [len(own) for one in by_length(whole, 10, 50) for _, own, _ in one] == [1, 1, 1, 2, 2]
    assert list(by_length(whole, 10_000, 10_000)) == [
        [(0, [rows[1], rows[2], rows[0]], 1.0), (1, [rows[4], rows[6], rows[3], rows[5]], 0.5)]
    ]
