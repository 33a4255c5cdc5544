"""Laws of demonstrations: a model with `{demos}` answers as one that is given the prompt by hand, on every kind."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers
from torch.testing import assert_close

import deltaprompt as dp
from deltaprompt.backbone import Backbone, shared
from deltaprompt.backbone.load import wrap
from deltaprompt.calibrations.contextual import Contextual
from deltaprompt.calibrations.contextualised import Contextualised
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.features.demonstrations import Demonstrations
from deltaprompt.model import Model
from deltaprompt.model.showing import MeanStates
from deltaprompt.trainer import Plan, Training, fit, fit_many, fit_seeds
from deltaprompt.types import Example
from deltaprompt.verbalizers.rules import Rules
from tests import backbones_zoo as zoo
from tests.adapted_zoo import shake

FAMILIES = ("bert", "roberta", "gpt2", "llama", "t5")
LONG = {"max_position_embeddings": 400, "n_positions": 400, "n_embd": 16}
TEXTS = ("one two three", "a good movie", "bad", "it was so", "two", "the cat sat on", "good good", "no", "movie it")
POOL = [Example({"text": text}, "ab"[i % 2]) for i, text in enumerate(TEXTS)]
QUERIES = [Example({"text": text}) for text in ("so good", "three", "it was bad movie", TEXTS[0], TEXTS[1])]
WORDS = {"one": {"a": "good", "b": "bad"}, "several": {"a": ("good movie", "good"), "b": "bad so so"}}
SHORT = Training(steps=2, batch_size=4)


@cache
def backbone_of(family: str) -> Backbone:
    """A tiny backbone with room for demonstrations, in double precision."""
    prefix, name, kind, options = zoo.FAMILIES[family]
    with zoo.quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        spec = (prefix, name, kind, {key: LONG.get(key, value) for key, value in options.items()})
        model = getattr(transformers, name)(zoo.config_of(spec)).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    tokenizer = zoo.tokenizers_zoo.build(kind)
    tokenizer.model_max_length = 400
    return wrap(model, tokenizer)


@pytest.fixture
def made():
    """Makes models, and takes them off their backbones."""
    models: list[Model] = []

    def make(family, source, words="one", deltas=(), seeds=(0,), **task) -> Model:
        models.append(Model(backbone_of(family), dp.Task(source, WORDS[words], **task), deltas, seeds))
        return models[-1]

    yield make
    for model in models:
        model.adapted.remove()


def source_of(family: str, asked: str = "{demos:3}") -> str:
    return asked + ("{text} is {mask} .\n" if family in ("gpt2", "llama") else "{text} is {mask} . ")


# By hand


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("by", ["", ":nearest"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_a_prompt_written_by_hand(family, by, words, made):
    source = source_of(family, f"{{demos:3{by}}}")
    model = made(family, source, words)
    model.demonstrate(POOL, seed=4)
    found = model.probabilities(QUERIES)
    shown = model.features.shown(QUERIES)
    assert all(len(demos) == 3 for demos in shown)
    own = source.removeprefix(f"{{demos:3{by}}}")
    first = {"a": "good" if words == "one" else "good movie", "b": "bad" if words == "one" else "bad so so"}
    texts = [
        "".join(own.replace("{text}", d.fields["text"]).replace("{mask}", first[str(d.label)]) for d in demos)
        + query.fields["text"]
        for demos, query in zip(shown, QUERIES, strict=True)
    ]
    model.adapted.remove()
    plain = made(family, own.removesuffix("\n"), words)
    expected = plain.probabilities([Example({"text": text}) for text in texts])
    assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.log().std(0).max() > 1e-3  # rows differ


@pytest.mark.parametrize("family", FAMILIES)
def test_the_nearest_are_those_of_mean_states_without_deltas(family, made):
    backbone = backbone_of(family)
    states = []
    for example in [*POOL, QUERIES[0]]:
        inputs = backbone.tokenizer(example.fields["text"], return_tensors="pt")
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            each = backbone.encoded(ids) if backbone.kind == "seq2seq" else backbone.states(ids)
        states.append(each[0].mean(0))
    cosines = torch.stack([torch.cosine_similarity(states[-1], state, dim=0) for state in states[:-1]])
    model = made(family, source_of(family, "{demos:4:nearest}"), deltas=[dp.LoRA(2), dp.Prefix(2), dp.SoftPrompt(2)])
    shake(model.adapted)
    model.demonstrate(POOL)
    [shown] = model.features.shown(QUERIES[:1])
    found = torch.stack([cosines[[e.fields for e in POOL].index(e.fields)] for e in shown])
    assert_close(found.flip(0), cosines.sort(descending=True).values[:4], rtol=0, atol=2e-6)
    assert len({e.fields["text"] for e in shown}) == 4


def test_a_text_without_a_token_has_the_state_of_what_an_empty_prompt_begins_with():
    backbone = backbone_of("gpt2")
    states = MeanStates(backbone, _features("gpt2"))([Example({"text": ""}), Example({"text": "good"})])
    with torch.no_grad():
        want = backbone.states({"input_ids": torch.tensor([[backbone.tokenizer.eos_token_id]])})[0, 0]
    torch.testing.assert_close(states[0], want.float())


def _features(family):
    from deltaprompt.model.showing import _plain

    model = Model(backbone_of(family), dp.Task("{demos:1:nearest}{text} {mask}\n", WORDS["one"]), [])
    model.adapted.remove()
    return _plain(model.features)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_long_texts_among_short_ones(family, made):
    """10,000 characters here and there: no text is cut for a demonstration, no row is too long."""
    pool = [*POOL, Example({"text": "good one " * 1200}, "a"), Example({"text": "bad two " * 1300}, "b")]
    model = made(family, source_of(family, "{demos:4:nearest}"), max_length=200)
    model.demonstrate(pool)
    queries = [*QUERIES, Example({"text": "so " * 3400}), Example({"text": "good one " * 60})]
    rows = model.encode(queries)
    assert all(row.length <= 200 for row in rows)
    counts = [len(demos) for demos in model.features.shown(queries)]
    assert counts[:5] == [4] * 5
    assert counts[5] == 0
    assert model.probabilities(queries).isfinite().all()


def test_rules_show_a_word_at_each_mask(made):
    rules = Rules({"a": ("good", ("movie", "film")), "b": ("bad", "great")})
    model = made("bert", "{demos:1}{text} {mask} {mask} . ", verbalizer=rules)
    model.demonstrate(POOL[:1])
    decoded = model.features.tokenizer.decode(model.encode(QUERIES[:1])[0].variants[0].ids)
    assert decoded.startswith("[CLS] one two three good movie. so good [MASK] [MASK]")
    other = made("t5", "{demos:1}{text} {mask} . ", verbalizer=dp.SoftVerbalizer())
    other.demonstrate(POOL[:1])  # a verbalizer without words: the label's name
    assert "one two three a ." in other.features.tokenizer.decode(other.encode(QUERIES[:1])[0].variants[0].ids)


def test_several_masks_without_rules_are_refused(made):
    model = made("bert", "{demos:1}{text} {mask} {mask} . ", verbalizer=dp.SoftVerbalizer())
    with pytest.raises(ConfigError, match="only rules say which stands at which of 2"):
        model.demonstrate(POOL)


def test_what_cannot_be_shown(made):
    model = made("gpt2", "{text} {mask}")
    with pytest.raises(ConfigError, match=r"'\{text\} \{mask\}' shows no demonstrations; write \{demos:4\}"):
        model.demonstrate(POOL)
    model = made("gpt2", "{demos:2}{text} {mask}\n")
    with pytest.raises(DataError, match="there is no label 'c'; possible: a, b"):
        model.demonstrate([*POOL[:1], Example({"text": "x"}, "c")])
    with pytest.raises(ConfigError, match="there are none yet"):
        model.predict(["x"])


# Saving


@pytest.mark.parametrize("by", ["", ":nearest"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_what_opens_answers_the_same(family, by, made, tmp_path):
    model = made(family, source_of(family, f"{{demos:2{by}}}"), deltas=[dp.LoRA(2)])
    shake(model.adapted)
    model.demonstrate(POOL, seed=1)
    everything = [*QUERIES, *POOL, *(Example({"text": text}) for text in ("", "cat"))]
    found, shown = model.probabilities(everything), model.features.shown(everything)
    model.save(tmp_path)
    model.adapted.remove()
    again = dp.open(tmp_path, backbone_of(family))
    assert again.features.shown(everything) == shown
    assert torch.equal(again.probabilities(everything), found)
    again.adapted.remove()
    many = dp.open_many([tmp_path], backbone_of(family))
    other = torch.tensor([[*p["scores"].values()] for p in many.predict(everything, many.names[0])])
    assert_close(other, found, rtol=0, atol=1e-6)
    many.remove()


def test_adaptations_that_differ_in_what_they_show_answer_side_by_side(made, tmp_path):
    model = made("gpt2", source_of("gpt2"), seeds=(0, 1, 2))
    for slot in range(3):
        model.demonstrate(POOL, slot, seed=slot)
    found = [model.probabilities(QUERIES, slot=slot) for slot in range(3)]
    assert not torch.equal(found[0], found[1])
    for slot in range(3):
        model.save(tmp_path / str(slot), slot)
    model.adapted.remove()
    many = dp.open_many([tmp_path / str(slot) for slot in range(3)], backbone_of("gpt2"))
    mixed = many.predict([q for q in QUERIES for _ in range(3)], ["0", "1", "2"] * len(QUERIES))
    for i, told in enumerate(mixed):
        scores = torch.tensor([*told["scores"].values()])
        assert_close(scores, found[i % 3][i // 3], rtol=0, atol=1e-6)
    many.remove()


def test_a_template_that_shows_nothing_yet_is_saved_so(made, tmp_path):
    model = made("gpt2", source_of("gpt2"))
    model.save(tmp_path)
    model.adapted.remove()
    again = dp.open(tmp_path, backbone_of("gpt2"))
    again.demonstrate(POOL)
    assert again.probabilities(QUERIES).isfinite().all()
    again.adapted.remove()


# In context, without training


def test_a_causal_backbone_runs_what_all_rows_share_once(made, monkeypatch):
    monkeypatch.setattr(shared, "SAVED", 1)
    monkeypatch.setattr(shared, "TRIED", shared.WeakKeyDictionary())
    model = made("llama", source_of("llama", "{demos:6}"))
    model.demonstrate(POOL)
    queries = [Example({"text": text}) for text in ("so good", "three one", "is cat", "no movie") * 4]
    model.probabilities(queries[:2])  # the backbone is tried once
    tokens: list[int] = []
    handle = model.backbone.base.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = model.probabilities(queries)
    handle.remove()
    lengths = [row.length for row in model.encode(queries)]
    demos = len(model.features._codec.one("")) + min(lengths)
    assert sum(tokens) < demos + len(queries) * 12
    assert sum(lengths) > 4 * sum(tokens)
    monkeypatch.setattr(shared, "SAVED", float("inf"))
    assert_close(model.probabilities(queries), found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("by", ["", ":nearest"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_contextual_calibration_is_of_the_prompt_with_demonstrations(family, by, made):
    source = source_of(family, f"{{demos:2{by}}}")
    model = made(family, source, calibration=Contextual(("so",)))
    model.demonstrate(POOL)
    content_free = model.features.seeded()
    batch = content_free.collate(content_free.encode([Example({"text": "so"})]))
    with torch.no_grad():
        uniform = model(batch)["logits"].softmax(-1)
    assert_close(uniform, torch.full_like(uniform, 0.5), rtol=0, atol=1e-6)
    assert (model.probabilities(QUERIES) - 0.5).abs().max() > 1e-3


def test_fit_without_anything_that_trains(made, tmp_path):
    model = made("gpt2", source_of("gpt2"), calibration=Contextualised())
    run = fit(model, POOL[:7], POOL[7:], seed=3, out=tmp_path)
    assert (run.steps, run.trainable, run.stopped) == (0, 0, "done")
    assert set(run.best) == {"accuracy", "macro_f1", "loss"}
    assert run.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    found = model.probabilities(QUERIES)
    model.adapted.remove()
    again = dp.open(tmp_path, backbone_of("gpt2"))
    assert torch.equal(again.probabilities(QUERIES), found)
    again.adapted.remove()
    fresh = made("gpt2", source_of("gpt2"), calibration=Contextualised())
    assert fit(fresh, POOL[:7], POOL[7:], seed=3, out=tmp_path, resume=True) == run
    assert torch.equal(fresh.probabilities(QUERIES), found)
    fresh.demonstrate(POOL[:7], seed=8)
    with pytest.raises(ConfigError, match="demonstrations was .* and is now"):
        fit(fresh, POOL[:7], POOL[7:], seed=3, out=tmp_path, resume=True)


def test_seeds_draw_other_demonstrations_and_all_are_measured(made, tmp_path):
    source = source_of("gpt2")
    result = fit_seeds(
        lambda seeds: made("gpt2", source, seeds=seeds),
        lambda seed: (POOL, POOL[:4]),
        POOL,
        seeds=(0, 1, 2),
        out=tmp_path,
    )
    assert [run.steps for run in result.runs] == [0, 0, 0]
    assert len(result.test["accuracy"]["each"]) == 3
    kept = [dp.open(tmp_path / f"seed-{seed}", backbone_of("gpt2")) for seed in (0,)]
    for seed, model in zip((0,), kept, strict=True):
        assert model.evaluate(POOL)["accuracy"] == result.test["accuracy"]["each"][seed]
        model.adapted.remove()
    texts = {tuple(e.fields["text"] for e in _shown(tmp_path / f"seed-{seed}")) for seed in (0, 1, 2)}
    assert len(texts) == 3


def _shown(folder) -> list[Example]:
    model = dp.open(folder, backbone_of("gpt2"))
    [shown] = model.features.shown(QUERIES[:1])
    model.adapted.remove()
    return shown


# Training


@pytest.mark.parametrize("by", ["", ":nearest"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_training_row_is_never_its_own_demonstration(family, by, made):
    model = made(family, source_of(family, f"{{demos:3{by}}}"), deltas=[dp.LoRA(2)])
    run = fit(model, POOL, POOL[:4], training=SHORT)
    assert run.steps == 2
    for row, shown in zip(POOL, model.features.shown(POOL), strict=True):
        assert len(shown) == 3
        assert row not in shown


def test_demonstrations_that_a_model_has_stay_when_it_is_fitted(made):
    model = made("gpt2", source_of("gpt2", "{demos:2}"), deltas=[dp.LoRA(2)])
    model.demonstrate(POOL[:2], seed=0)
    fit(model, POOL[4:], training=SHORT)
    assert sorted(e.fields["text"] for e in model.features.shown(QUERIES[:1])[0]) == sorted(TEXTS[:2])


def test_adaptations_that_train_in_one_pass_end_as_alone(made):
    source = source_of("gpt2", "{demos:2}")
    plans = [Plan(POOL, POOL[:3], SHORT, seed=seed) for seed in (5, 6)]
    together = made("gpt2", source, deltas=[dp.LoRA(2)], seeds=(5, 6))
    fit_many(together, plans)
    found = [together.probabilities(QUERIES, slot=slot) for slot in (0, 1)]
    together.adapted.remove()
    for slot, plan in enumerate(plans):
        alone = made("gpt2", source, deltas=[dp.LoRA(2)], seeds=(plan.seed,))
        fit(alone, plan.train, plan.dev, training=SHORT, seed=plan.seed)
        assert_close(alone.probabilities(QUERIES), found[slot], rtol=0, atol=1e-6)
        alone.adapted.remove()


def test_a_model_with_demonstrations_is_copied_with_them(made):
    from copy import deepcopy

    model = made("gpt2", source_of("gpt2", "{demos:2:nearest}"))
    model.demonstrate(POOL)
    found = model.probabilities(QUERIES)
    copied = deepcopy(model)
    assert torch.equal(copied.probabilities(QUERIES), found)
    shown = copied.features.demonstrations
    assert isinstance(shown, Demonstrations)
    assert isinstance(shown.states, MeanStates)
    assert shown.states.backbone.model is copied.backbone.model
