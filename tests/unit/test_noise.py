"""ProtoRE's last loss and its use: masked tokens guessed beside the labels, and labels that are likely wrong."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import deltaprompt as dp
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.model.noise import noise_scores
from deltaprompt.model.with_masks import WithMasks
from deltaprompt.params import drawn_by
from deltaprompt.trainer import Plan, Training, fit, fit_many
from deltaprompt.types import Example
from tests import backbones_zoo as zoo
from tests import command, files

WORDS = {"pos": "good", "neg": "bad"}
ROWS = [Example({"text": f"{a} {b}"}, label) for label, b in WORDS.items() for a in ("the cat was", "a film is", "it")]
QUICK = Training(steps=4, batch_size=3, learning_rate=0.02)


def made(slots=1, dtype=torch.float32, words=None, verbalizer=None, **more):
    task = dp.Task("{text} It was {mask}.", words or WORDS, verbalizer)
    return WithMasks(dp.Model(zoo.build("bert", dtype), task, [dp.LoRA(rank=2)], range(slots)), **more)


@pytest.mark.parametrize("words", [WORDS, {"pos": "not good", "neg": "bad"}])
def test_the_loss_is_the_models_and_that_of_the_masked_tokens(words):
    """Every second token is masked; in a pass by hand their scores are the whole vocabulary's."""
    learns = made(words=words, weight=0.7)
    model, batch = learns.model, learns.collate(learns.encode(ROWS))

    def every_second(x, p):
        return (torch.arange(x.shape[1]) % 2 == 0).to(x).expand_as(x)

    learns.train()
    with drawn_by(every_second):
        out = learns(batch)
    learns.eval()
    tokenizer, ids = model.features.tokenizer, batch.inputs["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    hidden = (torch.arange(ids.shape[1]) % 2 == 1) & ~special
    inputs = {**batch.inputs, "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id)}
    model.adapted.route(0)
    scores = model.backbone.head.logits(model.backbone.states(inputs))
    own = model(type(batch)(inputs, batch.answer_at, batch.variants, batch.labels))["loss"]
    assert hidden.any()
    assert_close(out["loss"], own + 0.7 * cross_entropy(scores[hidden], ids[hidden]), atol=1e-5, rtol=1e-5)


def test_special_tokens_padding_and_answers_are_never_masked():
    learns = made(rate=0.99)
    batch = learns.collate(learns.encode(ROWS))
    drawn, tokenizer = learns._drawn(batch), learns.features.tokenizer
    ids = batch.inputs["input_ids"]
    assert not (drawn & torch.isin(ids, torch.tensor(tokenizer.all_special_ids))).any()
    assert not (drawn & (batch.inputs["attention_mask"] == 0)).any()
    assert drawn.float().mean() > 0.4


def test_answers_are_the_models():
    learns = made()
    batch = learns.collate(learns.encode(ROWS))
    assert_close(learns(batch)["logits"], learns.model(batch)["logits"], atol=0, rtol=0)
    assert learns.evaluate(ROWS) == learns.model.evaluate(ROWS)


def test_what_is_kept_is_the_model(tmp_path):
    learns = made()
    fit(learns, ROWS, ROWS, training=QUICK, out=tmp_path / "a")
    before = learns.model.probabilities(ROWS)
    learns.adapted.remove()
    again = dp.open(tmp_path / "a", zoo.build("bert"))
    assert type(again) is dp.Model
    assert_close(again.probabilities(ROWS), before, atol=0, rtol=0)


def test_guessing_gets_better():
    task = dp.Task("{text} It was {mask}.", WORDS)
    deltas = [dp.LoRA(rank=8, at=("attn.*", "ffn.*")), dp.BitFit()]
    learns = WithMasks(dp.Model(zoo.build("bert"), task, deltas), weight=5.0, rate=0.4)
    run = fit(learns, ROWS, training=Training(steps=100, learning_rate=3e-2))
    first, last = (sum(e["loss"] for e in part) / len(part) for part in (run.history[:5], run.history[-5:]))
    assert last < first  # by how much: the tiny tokenizer differs from process to process


@pytest.mark.parametrize("at", ["attn.q", "head"])
def test_several_draw_their_masks_as_each_would_alone(at):
    plans, task = [Plan(ROWS, ROWS, QUICK, seed=seed) for seed in range(2)], dp.Task("{text} It was {mask}.", WORDS)

    def learning(*seeds):
        model = dp.Model(zoo.build("bert", torch.float64), task, [dp.LoRA(rank=2, at=(at,))], seeds)
        return WithMasks(model, rate=0.5)

    many = learning(0, 1)
    fit_many(many, plans)
    for seed in range(2):
        alone = learning(seed)
        fit(alone, ROWS, ROWS, training=QUICK, seed=seed)
        for name, tensor in alone.stored().items():
            assert_close(many.stored(seed)[name], tensor, atol=1e-9, rtol=1e-9)


def asked(family, **more):
    return dp.Model(zoo.build(family), dp.Task("{text} {mask}", WORDS, **more), [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made(weight=0.0), "weight above 0"),
        (lambda: made(rate=1.0), "rate between 0 and 1"),
        (
            lambda: WithMasks(dp.Model(zoo.build("gpt2"), dp.Task("{text} {mask}", WORDS), [])),
            "this backbone is causal",
        ),
        (
            lambda: noise_scores(dp.Model(zoo.build("bert"), dp.Task("{text} {mask}", WORDS, several=True), []), ROWS),
            "one",
        ),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# Noise


def test_noise_is_the_distance_to_the_labels_prototype():
    spherical = dp.SphericalPrototypes(scale=5.0)
    model = dp.adapt(zoo.build("bert-encoder"), dp.Task("{text}", tuple(WORDS), spherical), [])
    model.start(ROWS)
    z = dict(model.parts())["verbalizer.z"][0].detach()
    states = model.embed(model.features, [Example(row.fields) for row in ROWS])
    each = [torch.cosine_similarity(h, z[list(WORDS).index(r.label)], dim=0) for h, r in zip(states, ROWS, strict=True)]
    assert noise_scores(model, ROWS) == pytest.approx([1 - float((5.0 * c).sigmoid()) for c in each], abs=1e-5)


def test_noise_of_other_verbalizers_is_the_rest_of_the_labels_probability():
    model = dp.adapt(zoo.build("bert"), dp.Task("{text} {mask}", WORDS))
    p = model.probabilities(ROWS)
    right = [p[n, list(WORDS).index(row.label)] for n, row in enumerate(ROWS)]
    assert noise_scores(model, ROWS) == pytest.approx([1 - float(x) for x in right], abs=1e-6)


def test_a_label_that_is_not_there_is_told():
    model = dp.adapt(zoo.build("bert"), dp.Task("{text} {mask}", WORDS))
    with pytest.raises((ConfigError, DataError), match="no label"):
        noise_scores(model, [Example({"text": "a"})])


def test_masks_and_noise_at_the_command_line(tmp_path):
    data = files.rows(tmp_path / "a.jsonl", *({"text": row.fields["text"], "label": row.label} for row in ROWS))
    recipe = files.written(
        tmp_path / "a.toml",
        f'[data]\ntrain = "{data}"\nhold_out = false\n[training]\nsteps = 2\n[masks]\nweight = 0.3\n'
        '[task]\ntemplate = "{text} It was {mask}."\nlabels = { pos = "good", neg = "bad" }\n',
    )
    command.succeeds("fit", recipe, "--out", tmp_path / "out")
    done = command.succeeds("noise", tmp_path / "out", data, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["noise"] for row in rows] == sorted((row["noise"] for row in rows), reverse=True)
    assert {row["row"] for row in rows} == set(range(1, len(ROWS) + 1))
    assert len(command.succeeds("noise", tmp_path / "out", data, "--top", 2).stdout.strip().splitlines()) < 8


def test_what_has_no_start_cannot_tell():
    model = dp.adapt(zoo.build("bert-encoder"), dp.Task("{text}", tuple(WORDS), dp.SphericalPrototypes()))
    with pytest.raises(ConfigError, match="the verbalizer SphericalPrototypes has no start yet"):
        noise_scores(model, ROWS)


@pytest.mark.parametrize("verbalizer", [dp.ProtoVerb(), dp.SphericalPrototypes()])
def test_the_loss_that_is_measured_does_not_depend_on_the_batches(verbalizer):
    model = dp.adapt(zoo.build("bert"), dp.Task("{text} It was {mask}.", tuple(WORDS), verbalizer))
    model.start(ROWS)
    rows = model.encode(ROWS)
    whole, parts = (model.measure(rows, batch_size)["loss"] for batch_size in (6, 1))
    assert parts == pytest.approx(whole, rel=1e-5)
