"""Laws of what a template puts in: soft tokens, tied or computed, and prefixes, in every kind of backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from deltaprompt.backbone import Backbone
from deltaprompt.deltas.p_tuning import PTuning
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.model.generation import Generation
from deltaprompt.model.generator import Generator
from deltaprompt.model.many import open_many
from deltaprompt.model.saved import describe, open_
from deltaprompt.trainer import Plan, Training, fit, fit_many
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo

FAMILIES = ["bert", "roberta", "gpt2", "llama", "t5", "bart", "bert-encoder"]
WORDS = {"good": ("great",), "bad": ("terrible",)}
TEXTS = ("a great movie", "a bad film with a terrible plot", "good", "it was not there", "great acting", "bad")
ROWS = [Example({"text": text}, label) for text, label in zip(TEXTS, ["good", "bad"] * 3, strict=True)]
MIXED = '{prefix:2}{soft:2|lstm} {text} {soft:3|tied} so {soft:2} {soft:2:x|lstm} {soft:2|mlp}{soft:"It was"} {mask}'
HOW = Training(epochs=3, batch_size=2, learning_rate=1e-2)


def task(family: str, template: str) -> Task:
    """Of an encoder, which has no answer, without `{mask}`."""
    if family.endswith("encoder"):
        return Task(template.replace(" {mask}", ""), list(WORDS), SoftVerbalizer())
    return Task(template, WORDS)


def made(family: str, template: str, deltas: object = (), backbone: Backbone | None = None) -> Model:
    return adapt(backbone or zoo.build(family, torch.float64), task(family, template), list(deltas))  # type: ignore


@torch.no_grad()
def shaken(model: Model) -> Model:
    """With every parameter moved away from where it starts."""
    g = torch.Generator().manual_seed(3)
    for _, p in model.parts():
        p.add_(torch.randn(p.shape, generator=g).to(p), alpha=0.3)
    return model


def said(model: Model, slot: int = 0) -> Tensor:
    return model.probabilities(ROWS, slot=slot)


def part(model: Model, name: str) -> torch.nn.Parameter:
    return dict(model.parts())[name]


# Soft tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_that_a_template_asks_for_learns(family: str) -> None:
    model = shaken(made(family, MIXED))
    model.train()
    model(model.features.collate(model.encode(ROWS)))["loss"].backward()
    for name, p in model.parts():
        assert p.grad is not None
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_cover_the_rows_of_a_template_in_order(family: str) -> None:
    model = made(family, MIXED.replace('{soft:"It was"}', "{soft:2:y}"), [SoftPrompt(length=4)])
    features, base = model.features, model.features.soft_base
    assert [(e, n) for e, n in features.soft_ranges] == [(None, 1 + 2 + 2), ("lstm", 4), ("mlp", 2)]
    assert [type(delta) for delta in model.adapted.deltas] == [SoftPrompt, PTuning, PTuning, Prefix, SoftPrompt]
    spans = [(d.first, d.first + d.length) for d in model.adapted.deltas if isinstance(d, SoftPrompt | PTuning)]
    assert spans == [(4, 9), (9, 13), (13, 15), (0, 4)]
    assert model.chosen == (SoftPrompt(length=4),)
    ids = [i - base for i in features.encode(ROWS[:1])[0].variants[0].ids if i >= base]
    assert ids == [0, 1, 2, 3, 9, 10, 4, 4, 4, 5, 6, 11, 12, 13, 14, 7, 8]


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_tokens_are_one_row_in_every_place(family: str) -> None:
    tied = shaken(made(family, "{text} {soft:3:a|tied} so {soft:3:a|tied} {mask}"))
    apart = made(family, "{text} {soft:3} so {soft:3} {mask}")
    table = f"delta.0.{tied.backbone.input_embedding}.p"
    assert part(tied, table).shape == (1, 1, tied.backbone.width)
    for name, p in apart.parts():
        p.data.copy_(part(tied, name).expand(p.shape) if name == table else part(tied, name))
    assert_close(said(tied), said(apart))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_computed_tokens_are_those_of_p_tuning(family: str, encoder: str) -> None:
    in_text = shaken(made(family, f"{{soft:2|{encoder}}}{{soft:1}}{{soft:1|tied|{encoder}}}{{text}} {{mask}}"))
    in_front = made(family, "{soft:1}{text} {mask}", [PTuning(length=3, encoder=encoder)])  # type: ignore[arg-type]
    own = dict(in_front.parts())
    for name, p in in_text.parts():
        own[name].data.copy_(p.data)
    computed = in_text.stored()[f"delta.1.{in_text.backbone.input_embedding}.p"]
    assert computed.shape == (3, in_text.backbone.width)
    assert_close(in_front.stored()[f"delta.1.{in_text.backbone.input_embedding}.p"], computed)
    in_text.settle()  # plain rows: the same tokens in the order of the other's
    assert isinstance(in_text.adapted.deltas[1], SoftPrompt)
    hard = made(family, "{soft:2}{soft:1}{soft:1}{text} {mask}")
    rows = torch.cat([computed[:2], part(in_text, f"delta.0.{in_text.backbone.input_embedding}.p")[0], computed[2:]])
    for name, p in hard.parts():
        p.data.copy_(rows if name.endswith(".p") else part(in_text, name))
    assert_close(said(in_text), said(hard))


def test_words_begin_a_block_behind_computed_ones() -> None:
    model = made("bert", '{soft:4|mlp} {text} {soft:2} {soft:"It was good"} {soft:"It was good":again} {mask}')
    ids = model.backbone.tokenizer("It was good", add_special_tokens=False)["input_ids"]
    words = model.backbone.model.get_input_embeddings().weight[ids]
    table = part(model, "delta.0.embed.p")[0]
    assert torch.equal(table[2:5], words)
    assert torch.equal(table[5:8], words)
    assert len(table) == 8
    assert [block.key for block in model.features.soft_blocks] == ["#0", "#1", '"It was good"', "again"]


# Prefixes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_templates_prefix_is_the_delta(family: str) -> None:
    asked, given = shaken(made(family, "{text} so {prefix:3} {mask}")), made(family, "{text} so  {mask}", [Prefix(3)])
    assert asked.adapted.deltas == given.adapted.deltas == (Prefix(length=3),)
    assert asked.chosen == ()
    ids = [[row.variants[0].ids for row in model.encode(ROWS)] for model in (asked, given)]
    assert ids[0] == ids[1]
    before = said(given)
    for name, p in given.parts():
        p.data.copy_(part(asked, name))
    assert_close(said(asked), said(given))
    assert not torch.equal(said(given), before)


# Saving, opening, many at once


@pytest.mark.parametrize("family", FAMILIES)
def test_what_opens_is_what_was_saved(family: str, tmp_path: Path) -> None:
    backbone = zoo.build(family)
    model = shaken(made(family, MIXED, [SoftPrompt(length=2)], backbone))
    expected = said(model)
    model.save(tmp_path)
    model.adapted.remove()
    assert [delta["kind"] for delta in describe(tmp_path)["deltas"]] == ["soft_prompt"]
    opened = open_(tmp_path, backbone)
    assert [type(d) for d in opened.adapted.deltas] == [SoftPrompt, SoftPrompt, SoftPrompt, Prefix, SoftPrompt]
    assert_close(said(opened), expected, atol=1e-6, rtol=1e-5)
    again = tmp_path / "again"
    opened.save(again)
    opened.adapted.remove()
    assert (again / "adaptation.safetensors").read_bytes() == (tmp_path / "adaptation.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bert-encoder"])
def test_adaptations_with_such_templates_open_together(family: str, tmp_path: Path) -> None:
    backbone, expected = zoo.build(family), {}
    templates = {"a": MIXED, "b": MIXED.replace(" so ", " and "), "c": "{text} {soft:2|lstm} {mask}"}
    for name, template in templates.items():
        model = shaken(made(family, template, [], backbone))
        expected[name] = said(model)
        model.save(tmp_path / name)
        model.adapted.remove()
    many = open_many([tmp_path / name for name in templates], backbone=backbone)
    texts = [(text, name) for name in templates for text in TEXTS]
    found = many.predict([text for text, _ in texts], [name for _, name in texts])
    got = torch.tensor([list(one["scores"].values()) for one in found]).reshape(3, len(TEXTS), 2)
    assert_close(got, torch.stack(list(expected.values())), atol=1e-5, rtol=1e-4)
    many.remove()


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bert-encoder"])
def test_several_seeds_in_one_pass_end_as_each_alone(family: str, tmp_path: Path) -> None:
    backbone, seeds = zoo.build(family, torch.float64), (0, 1, 2)
    alone = []
    for seed in seeds:
        model = Model(backbone, task(family, MIXED), [], [seed])
        fit(model, ROWS, ROWS[:4], training=HOW, seed=seed)
        alone.append((model.stored(), said(model)))
        model.adapted.remove()
    model = Model(backbone, task(family, MIXED), [], seeds)
    fit_many(model, [Plan(ROWS, ROWS[:4], HOW, seed, str(seed)) for seed in seeds], out=tmp_path)
    for slot, (stored, expected) in enumerate(alone):
        for name, tensor in model.stored(slot).items():
            assert_close(tensor, stored[name], rtol=0, atol=1e-8)
        assert_close(said(model, slot), expected, rtol=0, atol=1e-6)
    model.adapted.remove()
    assert not torch.equal(alone[0][1], alone[1][1])
    opened = open_(tmp_path / "1", backbone)
    assert_close(said(opened), alone[1][1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
def test_a_generator_has_what_its_template_asks_for(family: str, tmp_path: Path) -> None:
    backbone, examples = zoo.build(family), [Example({"text": text, "target": "great"}) for text in TEXTS]
    template = MIXED.replace(" {mask}", " =>")
    model = Generator(backbone, Generation(template, max_target=4), [SoftPrompt(length=2)])
    with torch.no_grad():
        for _, p in model.adapted.parts():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.5)
    assert model.chosen == (SoftPrompt(length=2),)
    losses = model(model.collate(model.encode(examples)))["loss"]
    written = model.generate(examples)
    model.save(tmp_path)
    model.adapted.remove()
    opened = open_(tmp_path, backbone)
    assert isinstance(opened, Generator)
    assert_close(opened(opened.collate(opened.encode(examples)))["loss"], losses)
    assert opened.generate(examples) == written
    opened.adapted.remove()


def test_templates_of_one_model_ask_for_the_same_deltas() -> None:
    backbone = zoo.build("bert")
    templates = ("{soft:2|lstm} {text} {mask}", "{soft:2|mlp} {text} {mask}", "{prefix:2}{soft:2|mlp} {text} {mask}")
    for first, second in ((0, 1), (1, 2)):
        tasks = [Task(templates[first], WORDS), Task(templates[second], WORDS)]
        with pytest.raises(ConfigError, match=r"as many soft tokens of each network, and the same prefix; got '{"):
            Model(backbone, tasks, [], [0, 1])
    alike = [Task(templates[0], WORDS), Task("{text} so {soft:2|lstm} {mask}", WORDS)]
    model = Model(backbone, alike, [], [0, 1])
    assert model.parameter_count() == model.parameter_count(1)
