"""PLET's self-supervised stage: the divergence, its loss by hand, and a model that learns from pairs."""

import math

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.calibrations.contextualised import Contextualised
from deltaprompt.data.entities import mention
from deltaprompt.data.linked import Linked, rows_of_pair
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.model import Model, Task
from deltaprompt.model.saved import describe, open_
from deltaprompt.model.similar import LEAST, Similar, jensen_shannon
from deltaprompt.templates.entity import HARD3
from deltaprompt.trainer import Plan, Training, fit, fit_many
from deltaprompt.trainer.self_supervised import fit_typing
from deltaprompt.types import Batch, Example
from deltaprompt.verbalizers.hierarchical import Hierarchical
from deltaprompt.verbalizers.knowledgeable import Knowledgeable
from deltaprompt.verbalizers.prototypes import Prototypes
from deltaprompt.verbalizers.written import Written
from tests import backbones_zoo as zoo

WORDS = {"/good": "good", "/good/film": ("great", "film"), "/bad": "terrible"}
NAMES = ["the cat", "the dog", "a plot", "a film"]
ROWS = [mention(f"{text} ", name, " was bad") for name in NAMES for text in ("good :", "the great", "not a")]
QUICK = Training(steps=4, batch_size=6, learning_rate=0.02)


def task(several=False, verbalizer=None, **more):
    return Task(HARD3, tuple(WORDS), verbalizer or Hierarchical(words=WORDS), several=several, **more)


def made(family="bert", several=False, slots=1, deltas=None, **more):
    return Model(zoo.build(family), task(several, **more), [LoRA(rank=2)] if deltas is None else deltas, range(slots))


def batch_of(model, pairs):
    return model.features.collate(model.encode(pairs))


# The divergence


def random_p(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


def by_loops(p, q):
    total = 0.0
    for a, b in zip(p.exp().tolist(), q.exp().tolist(), strict=True):
        m = (a + b) / 2
        total += sum(x * math.log2(x / m) / 2 for x in (a, b) if x > 0)
    return total


@pytest.mark.parametrize("seed", range(3))
def test_the_divergence_is_symmetric_and_what_loops_give(seed):
    p, q = random_p(seed, 5, 7), random_p(seed + 9, 5, 7)
    found = jensen_shannon(p, q)
    assert_close(found, jensen_shannon(q, p))
    assert_close(found, torch.tensor([by_loops(*each) for each in zip(p, q, strict=True)], dtype=torch.float64))
    assert ((found > 0) & (found < 1)).all()


def test_the_divergence_is_zero_only_where_they_are_equal():
    p = random_p(0, 4, 6)
    assert (jensen_shannon(p, p) < 1e-12).all()
    moved = (p.exp() + 1e-3 * torch.eye(6, dtype=torch.float64)[:4]).log()
    assert (jensen_shannon(p, moved.log_softmax(-1)) > 1e-9).all()


def test_the_divergence_is_one_where_nothing_is_shared():
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).log()
    q = torch.tensor([[0.0, 0.0, 0.1, 0.9], [0.0, 0.0, 0.0, 1.0]]).log()
    assert_close(jensen_shannon(p, q), torch.ones(2))
    assert_close(jensen_shannon(p, p), torch.zeros(2))


# Pairs


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("several", [False, True])
def test_the_loss_is_the_formula_over_the_models_own_distributions(family, several):
    exact = zoo.build(family, torch.float64)
    model = Similar(Model(exact, task(several), []))
    if several:
        with torch.no_grad():
            model.model.scorer.tensors["odds"].add_(torch.tensor([1.0, -2.0, 3.0]))  # no part of it
    pairs = Linked().pairs(ROWS)
    alone = Model(zoo.build(family, torch.float64), task(), [])
    wanted, similar = [], []
    for pair in pairs:
        one, other = (alone(batch_of(alone, [row]))["logits"].log_softmax(-1)[0] for row in rows_of_pair(pair))
        js = by_loops(one, other)
        similar.append(1 - js)
        wanted.append(-math.log((1 - js if pair.label == "same" else js) + LEAST))
    out = model(batch_of(model, pairs))
    assert_close(out["similarity"].double(), torch.tensor(similar, dtype=torch.float64), atol=1e-9, rtol=1e-9)
    want = torch.tensor(sum(wanted) / len(wanted), dtype=torch.float64)
    assert_close(out["loss"].double(), want, atol=1e-6, rtol=1e-6)
    assert {pair.label for pair in pairs} == {"same", "apart"}


def test_pairs_without_an_answer_have_no_loss():
    similar = Similar(made())
    batch = batch_of(similar, Linked().pairs(ROWS)[:3])
    assert similar(Batch(batch.inputs, batch.answer_at, batch.variants)).keys() == {"similarity"}


@pytest.mark.parametrize("several", [False, True])
def test_types_may_be_written_with_fields_of_each_of_the_two_texts(several):
    texts = Written({"/good": "a good film", "/good/film": "a {mention}", "/bad": "{mention} was bad"})
    model, pairs = made("gpt2", several, verbalizer=texts), Linked().pairs(ROWS)[:4]
    h = model.probabilities([row for pair in pairs for row in rows_of_pair(pair)]).log().unflatten(0, (-1, 2))
    found = Similar(model)(batch_of(Similar(model), pairs))["similarity"]
    assert_close(found, 1 - jensen_shannon(h[:, 0], h[:, 1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_a_model_learns_from_pairs_and_answers_with_its_own_words(several, tmp_path):
    model = made(several=several)
    pairs = Linked(held_out=0.0).pairs(ROWS)
    before = Similar(model)(batch_of(Similar(model), pairs))["loss"].item()
    run = fit_typing(model, ROWS, Linked(held_out=0.0), training=QUICK, out=tmp_path / "a")
    assert Similar(model)(batch_of(Similar(model), pairs))["loss"].item() < before
    assert run.trainable == model.parameter_count()
    told = describe(tmp_path / "a")
    assert told["training"]["settings"]["task"].endswith(", of pairs")
    want = model.predict(ROWS)
    model.adapted.remove()
    again = open_(tmp_path / "a", zoo.build("bert"))
    assert isinstance(again, Model)
    assert again.predict(ROWS) == want
    if several:
        assert not again.scorer.tensors["odds"].any()  # odds are not learned from pairs


def test_the_best_on_pairs_that_are_held_out_is_kept():
    model = made()
    run = fit_typing(model, ROWS, Linked(held_out=0.3), training=QUICK)
    assert run.best.keys() == {"accuracy", "loss"}
    assert len(run.history) == 4


def test_the_same_seed_gives_the_same_numbers_and_a_run_goes_on(tmp_path):
    found = []
    for out in (None, tmp_path / "a"):
        model = made()
        fit_typing(model, ROWS, training=QUICK, seed=3, out=out)
        found.append(model.probabilities(ROWS))
        model.adapted.remove()
    model = made()
    run = fit_typing(model, ROWS, training=QUICK, seed=3, out=tmp_path / "a", resume=True)
    assert run.steps == 4
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], model.probabilities(ROWS))


def test_slots_learn_together_as_each_alone():
    pairs = Linked().pairs(ROWS)
    together = Model(zoo.build("bert", torch.float64), task(), [LoRA(rank=2)], range(2))
    fit_many(Similar(together), [Plan(pairs, None, QUICK, seed=seed) for seed in range(2)])
    for slot in range(2):
        alone = Model(zoo.build("bert", torch.float64), task(), [LoRA(rank=2)], [slot])
        fit(Similar(alone), pairs, training=QUICK, seed=slot)
        assert_close(together.probabilities(ROWS, slot=slot), alone.probabilities(ROWS), atol=1e-5, rtol=1e-5)


def test_a_calibration_and_a_start_without_labels_see_texts_of_the_pairs():
    model = made(verbalizer=Knowledgeable({k: (v,) if isinstance(v, str) else v for k, v in WORDS.items()}))
    fit_typing(model, ROWS, training=QUICK)
    assert all(0 < p["score"] <= 1 for p in model.predict(ROWS))
    calibrated = made(calibration=Contextualised())
    fit_typing(calibrated, ROWS, training=QUICK)
    assert calibrated.scorer.tensors["prior"].any()


def test_what_starts_from_labels_is_refused():
    with pytest.raises(ConfigError, match="Prototypes starts from labelled examples, and pairs have no labels"):
        Similar(made(verbalizer=Prototypes()))
    with pytest.raises(ConfigError, match="nothing in this model trains"):
        fit_typing(made(deltas=[]), ROWS, training=QUICK)


def test_rows_that_are_no_pairs_are_refused():
    with pytest.raises(DataError, match="a pair is 'same' or 'apart', got 'up'; make pairs with Linked"):
        fit(Similar(made()), [Example({"text": "a"}, "up")])
