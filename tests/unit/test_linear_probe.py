"""Logistic regression as a verbalizer: the one that scikit-learn finds, solved again on what deltas have learned."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

import deltaprompt as dp
from deltaprompt.data.episodes import Episode
from deltaprompt.errors import ConfigError
from deltaprompt.verbalizers.linear_probe import LinearProbe, regression
from tests import backbones_zoo as zoo

LABELS = ("up", "down", "so")
SENTENCES = {"up": "a good film", "down": "a bad film", "so": "maybe"}
TEXTS = ["good", "a good film and a great plot", "not", "the cat sat on the mat ; it was bad", "no", "a film"]
EXAMPLES = [dp.Example({"text": text}, LABELS[i % 3]) for i, text in enumerate(TEXTS)]
FAST = dp.Training(steps=6, learning_rate=1e-2)


def model_of(probe: LinearProbe, deltas: tuple[dp.LoRA, ...] = ()) -> dp.Model:
    return dp.adapt(zoo.build("bert-encoder"), dp.Task("{text}", LABELS, probe), deltas)


def states(model: dp.Model, texts: list[str]) -> torch.Tensor:
    found = model.embed(model.features, [dp.Example({"text": text}) for text in texts])
    return normalize(found.double(), dim=-1)


def by_scikit(h: torch.Tensor, y: list[int], weights: list[float], penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients on states themselves, of a regression on centred and scaled ones."""
    w = torch.tensor(weights, dtype=torch.float64)
    middle = (w[:, None] * h).sum(0) / w.sum()
    spread = ((w[:, None] * (h - middle) ** 2).sum() / w.sum()).sqrt()
    fitted = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000)
    fitted.fit(((h - middle) / spread).numpy(), y, sample_weight=weights)
    coefficients = fitted.coef_ / spread.item()
    return coefficients, fitted.intercept_ - coefficients @ middle.numpy()


@pytest.mark.parametrize("described", [False, True])
def test_it_is_the_regression_of_states_that_scikit_learn_finds(described: bool) -> None:
    probe = LinearProbe(SENTENCES if described else {}, description_weight=2.5, penalty=0.6)
    model = model_of(probe)
    model.start(EXAMPLES)
    h, y, weights = states(model, TEXTS), [0, 1, 2] * 2, [1.0] * 6
    if described:
        h, y, weights = (
            torch.cat([h, states(model, list(SENTENCES.values()))]),
            [*y, 0, 1, 2],
            [*weights, 2.5, 2.5, 2.5],
        )
    weight, bias = by_scikit(h, y, weights, 0.6 / 3)
    asked = states(model, ["so good a film", "bad"])
    want = asked.numpy() @ weight.T + bias
    found = model.probabilities([dp.Example({"text": text}) for text in ("so good a film", "bad")]).log().numpy()
    np.testing.assert_allclose(found - found.mean(1, keepdims=True), want - want.mean(1, keepdims=True), atol=1e-4)


def test_a_row_of_weight_two_is_two_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 4, generator=draw, dtype=torch.float64), torch.arange(9) % 3
    once = regression(x, y, torch.tensor([2.0, *[1.0] * 8], dtype=torch.float64), 3, 0.5)
    twice = regression(torch.cat([x, x[:1]]), torch.cat([y, y[:1]]), torch.ones(10, dtype=torch.float64), 3, 0.5)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_it_is_solved_again_on_what_the_deltas_have_learned() -> None:
    model = model_of(LinearProbe(SENTENCES), (dp.LoRA(rank=2),))
    run = dp.fit(model, EXAMPLES, training=FAST)
    assert run.trainable == sum(t.numel() for n, t in model.parts() if n.startswith("delta."))
    learned = {name: tensor.clone() for name, tensor, _ in model.slot_parts() if name.startswith("verbalizer.")}
    model.start(EXAMPLES)
    for name, tensor, _ in model.slot_parts():
        if name in learned:
            torch.testing.assert_close(tensor, learned[name], atol=1e-6, rtol=0)
    with torch.no_grad():
        for name, tensor, _ in model.slot_parts():
            if name.endswith(".b"):
                tensor.zero_()
    model.start(EXAMPLES)
    assert not torch.allclose(model.scorer.tensors["weight"][0], learned["verbalizer.weight"][0], atol=1e-3)


def test_with_dev_rows_what_was_measured_is_what_is_kept() -> None:
    model = model_of(LinearProbe(SENTENCES), (dp.LoRA(rank=2),))
    run = dp.fit(model, EXAMPLES, EXAMPLES[:3], training=replace(FAST, learning_rate=0.3))
    measured = model.measure(model.encode(EXAMPLES[:3]))
    assert measured["loss"] == pytest.approx(run.best["loss"], abs=1e-6)


def test_labels_alone_answer_before_any_example() -> None:
    model = model_of(LinearProbe(SENTENCES))
    assert [row["label"] for row in model.predict(list(SENTENCES.values()))] == list(LABELS)


def test_a_tagger_has_it_too() -> None:
    tagger = dp.Tagger(
        zoo.build("bert-encoder"),
        dp.Tagging(("film",), scheme="io", verbalizer=LinearProbe(penalty=1e-3)),
        [dp.LoRA(rank=2)],
    )
    rows = [
        dp.Example({"text": "a good film"}, spans=(dp.Span(7, 11, "film"),)),
        dp.Example({"text": "not bad"}, spans=()),
    ]
    dp.fit(tagger, rows, training=FAST)
    assert [found["text"] for found in tagger.predict(["a good film"])[0]["entities"]] == ["film"]


def test_it_begins_from_the_support_of_an_episode() -> None:
    learner = dp.Learner(
        zoo.build("bert-encoder"), dp.Episodic(verbalizer=LinearProbe(penalty=1e-3)), [dp.LoRA(rank=2)]
    )
    rows = tuple(dp.Example({"text": text}, label) for text, label in zip(TEXTS, "aabbcc", strict=True))
    found = learner.measure(learner.encode([Episode(rows, rows, ("a", "b", "c"))]))
    assert found["accuracy"] == 1


def test_what_it_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match="got penalty=0; penalty > 0 is possible"):
        LinearProbe(penalty=0)
    with pytest.raises(ConfigError, match="got description_weight=nan"):
        LinearProbe(description_weight=math.nan)
    with pytest.raises(ConfigError, match="no training example of 'so' to start a regression from; give descriptions"):
        model_of(LinearProbe()).start(EXAMPLES[:2])
    with pytest.raises(ConfigError, match="'so' has no description"):
        model_of(LinearProbe({"up": "a", "down": "b"}))
