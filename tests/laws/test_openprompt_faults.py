"""OpenPrompt's faults, by their numbers in docs/openprompt.md: each test would have caught one."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.data import read
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import DataError, TemplateError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.model.generation import Generation
from deltaprompt.model.generator import generator
from deltaprompt.templates import Template, parse
from deltaprompt.trainer import Training, fit
from deltaprompt.types import Example
from deltaprompt.verbalizers.prototypes import Prototypes
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo

WORDS = {"good": "great", "bad": "terrible"}
TEXTS = ("a great movie", "a bad film with a terrible plot and bad acting", "good")
ROWS = [Example({"text": text}, label) for text, label in zip(TEXTS, ("good", "bad", "good"), strict=True)]

# B1: soft tokens without words to begin from are dropped in left-to-right models, and P-tuning crashes there


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj", "llama"])
@pytest.mark.parametrize("soft", ["{soft:5}", "{soft:5|tied}", "{soft:5|lstm}", "{soft:5|mlp}"])
@pytest.mark.parametrize(
    "template", ["SOFT{text} It was {mask}", "{text} SOFT It was {mask}", "{text} It was SOFT {mask}"]
)
def test_b1_soft_tokens_reach_a_left_to_right_model_and_learn(family: str, soft: str, template: str) -> None:
    model = adapt(zoo.build(family), Task(template.replace("SOFT", soft), WORDS))
    batch = model.features.collate(model.encode(ROWS))
    assert ((batch.inputs["input_ids"] >= model.backbone.vocabulary).sum(1) == 5).all()
    before, said = model.stored(), model.probabilities(ROWS)
    assert [tensor.shape[0] for tensor in before.values()] == [1 if "tied" in soft else 5]
    before = {name: tensor.clone() for name, tensor in before.items()}
    fit(model, ROWS, training=Training(steps=3, learning_rate=0.1))
    for name, tensor in model.stored().items():
        assert (tensor != before[name]).any(-1).all()  # every row has moved
    assert not torch.equal(model.probabilities(ROWS), said)


# B2: behind a soft prompt, states are read that many positions too early


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("verbalizer", [SoftVerbalizer(), Prototypes()])
@pytest.mark.parametrize("front", ["delta", "template"])
def test_b2_states_are_read_at_the_mask_behind_soft_tokens(family: str, verbalizer: object, front: str) -> None:
    own = "{soft:7}" if front == "template" else ""
    task = Task(own + "{text} It was {mask}", list(WORDS), verbalizer)  # type: ignore[arg-type]
    model = Model(zoo.build(family), task, [SoftPrompt(length=7)] if front == "delta" else [])
    backbone, table = model.backbone, next(p for name, p in model.parts() if name.endswith("embed.p"))
    for example in ROWS:
        row = model.encode([example])[0].variants[0]
        batch = model.features.collate(model.encode([example]))
        with torch.no_grad():
            read_there = model.at_mask(batch).hidden[0, 0, 0]
            soft = [i - backbone.vocabulary for i in row.ids if i >= backbone.vocabulary]
            ids = torch.tensor([0 if i >= backbone.vocabulary else i for i in row.ids])
            embedded = backbone.model.get_input_embeddings()(ids)
            embedded[[i >= backbone.vocabulary for i in row.ids]] = table[0, soft]
            inputs = {"inputs_embeds": embedded[None], "output_hidden_states": True}
            if family == "t5":
                inputs["decoder_input_ids"] = torch.tensor([row.decoder])
            whole = backbone.model(**inputs)
            states = (whole.decoder_hidden_states if family == "t5" else whole.hidden_states)[-1][0]
        assert soft == list(range(7))
        if family == "bert":
            at = row.ids.index(backbone.tokenizer.mask_token_id)
        else:
            at = len(states) - 1  # where the answer is the next token
        assert_close(read_there, states[at], atol=1e-5, rtol=1e-4)


# B3: "head" cuts the tail


def shared(rows: list[list[int]]) -> list[int]:
    """What two rows begin with alike."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*rows, strict=False))]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("cut", ["head", "tail", "middle"])
def test_b3_a_text_loses_the_side_that_is_named(family: str, cut: str) -> None:
    backbone = zoo.build(family)

    def ids(text: str, longest: int | None = None) -> list[int]:
        template = f"so {{text|truncate:{cut}}} : {{mask}}"
        model = adapt(backbone, Task(template, list(WORDS), SoftVerbalizer(), max_length=longest))
        return model.encode([Example({"text": text})])[0].variants[0].ids

    whole = [ids(text) for text in ("a great movie was good", "film with bad plot")]
    front, back = shared(whole), shared([row[::-1] for row in whole])[::-1]
    text = whole[0][len(front) : len(whole[0]) - len(back)]
    half = (len(text) - 1) // 2
    kept = {"head": text[2:], "tail": text[:-2], "middle": text[:half] + text[half + 2 :]}
    assert len(text) >= 5
    assert ids("a great movie was good", len(whole[0]) - 2) == [*front, *kept[cut], *back]


# B4: in a left-to-right model what follows the mask is dropped, a second mask too, and a mask in front crashes


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text} It was {mask}. {other}", "a left-to-right model does not see what stands after {mask}"),
        ("{text} It was {mask} film", "does not see what stands after {mask}, got ' film' there; let {mask} come last"),
        ("{text} It was {mask} {soft:3}", "does not see what stands after {mask}, got a soft block there"),
        ("{text} It was {mask}{special:eos}", "does not see what stands after {mask}, got a special token there"),
        ("{text} It was {mask} or {mask}", "a left-to-right model gives one answer, got 2 masks"),
        ("{mask} is what {text} was", "a left-to-right model does not see what stands after {mask}"),
    ],
)
def test_b4_what_a_left_to_right_model_cannot_see_is_refused(family: str, template: str, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        adapt(zoo.build(family), Task(template, WORDS))
    assert message in str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_b4_a_mask_alone_is_read_at_the_start(family: str) -> None:
    model = adapt(zoo.build(family), Task("{mask}", WORDS))
    assert model.probabilities(ROWS).isfinite().all()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_b4_every_mask_is_read_in_a_masked_model(family: str) -> None:
    template = "{mask} {text} {mask} so {mask}"
    model = adapt(zoo.build(family), Task(template, list(WORDS), SoftVerbalizer()))
    batch = model.features.collate(model.encode(ROWS[:1]))
    ids = batch.inputs["input_ids"][0].tolist()
    assert batch.answer_at[0].tolist() == [i for i, t in enumerate(ids) if t == model.backbone.tokenizer.mask_token_id]
    assert model.at_mask(batch).hidden.shape[2] == 3


# B13: templates are evaluated, a mistake in one ends the interpreter, a fault in a batch is printed and a key dropped

HOSTILE = [
    "{__import__('pathlib').Path('ran').touch()}",
    "{text|__import__('os').abort()}",
    '{"placeholder": __import__("pathlib").Path("ran").touch()}',
    '{"placeholder": "text", "post_processing": lambda x: open("ran", "w")}',
    '{"placeholder": "text", "post_processing": "open(\'ran\', \'w\') and (lambda x: x)"}',
    '{"placeholder": "text", **exit()}',
    '{"placeholder": "text"',
    '{"mask" "soft"}',
    "{[].append(exit())}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_b13_templates_are_data(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TemplateError, match=r"\^"):  # with the place; neither SystemExit nor a value
        parse(text)
    with pytest.raises(TemplateError, match=r"\^"):
        Template.from_openprompt(text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", HOSTILE)
def test_b13_texts_and_fields_are_data(text: str) -> None:
    model = adapt(zoo.build("bert"), Task("{text} {mask}", WORDS))
    plain = text.replace("{", "(").replace("}", ")")
    lengths = [model.encode([Example({"text": given})])[0].length for given in (text, plain)]
    assert lengths[0] == lengths[1]  # braces in a text are text


def test_b13_a_batch_with_a_fault_is_an_error_and_not_a_batch_without_a_key() -> None:
    model = adapt(zoo.build("bert"), Task("{text} {other} {mask}", WORDS))
    with pytest.raises(TemplateError, match="the example has no field 'other'; possible: text"):
        model.encode([Example({"text": "a", "other": "b"}), Example({"text": "a"})])


# B16: a prefix makes its parameters anew whenever its text is set, also behind an optimiser's back


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_b16_a_prefix_has_its_parameters_once_and_for_good(family: str) -> None:
    model = adapt(zoo.build(family), Task("{prefix:3}{text} It was {mask}", WORDS))
    twin = adapt(zoo.build(family), Task("{text} It was {mask}", WORDS), [Prefix(length=3)])
    own = dict(model.parts())
    assert own.keys() == dict(twin.parts()).keys()
    assert model.parameter_count() == twin.parameter_count() == sum(p[0].numel() for p in own.values())
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    model.predict(list(TEXTS))
    model.encode(ROWS)
    model(model.features.collate(model.encode(ROWS)))["loss"].backward()
    before = {name: p.detach().clone() for name, p in own.items()}
    optimizer.step()
    assert all(p is own[name] for name, p in model.parts())
    assert all(not torch.equal(p, before[name]) for name, p in own.items())


# B18: features have a fixed list of keys, meta is lost, and rows without labels cannot be put together


def test_b18_every_field_of_a_row_can_stand_in_a_template(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"guid": 7, "tgt": "film", "meta": {"word": "plot", "at": {"start": 3}}, "label": "good"}\n')
    (example,) = read(path, text=None)
    model = adapt(zoo.build("bert"), Task("{tgt} {meta.word} {meta.at.start} {guid} {mask}", WORDS))
    ids = model.encode([example])[0].variants[0].ids
    assert ids == model.backbone.tokenizer("film plot 3 7 [MASK]")["input_ids"]
    assert model.predict([example.fields])[0]["label"] in WORDS


def test_b18_rows_without_labels_are_a_batch_and_some_without_are_an_error() -> None:
    model = adapt(zoo.build("bert"), Task("{text} {mask}", WORDS))
    unlabelled = model.encode([Example(row.fields) for row in ROWS])
    batch = model.features.collate(unlabelled)
    assert batch.labels is None
    assert set(model(batch)) == {"logits"}
    with pytest.raises(DataError, match="1 of 3 rows have no label; give every row one, or none"):
        model.features.collate([*model.encode(ROWS[:2]), unlabelled[2]])


# B10: the loader's default length of an answer overrides the wrapper's, so that the first example with T5 crashes


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_b10_an_encoder_decoder_writes_and_learns_without_any_length_given(family: str) -> None:
    made = generator(zoo.build(family), Generation("{text} In summary"), [LoRA(rank=2)])
    rows = [Example({"text": text, "target": text[:9]}) for text in TEXTS]
    assert all(len(row.targets) > 1 for row in made.encode(rows))
    assert len(made.generate(rows)) == len(rows)
    before = made.measure(made.encode(rows))["loss"]
    fit(made, rows, training=Training(steps=8, learning_rate=1e-2))
    assert made.measure(made.encode(rows))["loss"] < before


# B11: generate asks the model for what later releases of transformers do not have


@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj", "llama", "qwen2", "t5", "bart", "pegasus"])
@pytest.mark.parametrize("how", [{}, {"beams": 2}, {"sample": True, "top_p": 0.9}], ids=["greedy", "beams", "drawn"])
def test_b11_texts_are_generated_on_the_installed_transformers(family: str, how: dict[str, Any]) -> None:
    made = generator(zoo.build(family), Generation('{soft:"In summary"}{text} =>'), [LoRA(rank=2)])
    found = made.generate(list(TEXTS), 4, **how)
    assert [type(text) for text in found] == [str] * len(TEXTS)


# B12: left-to-right models write one example at a time


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_b12_left_to_right_models_write_a_batch_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = zoo.build(family)
    made = generator(backbone, Generation("{text} =>"), [SoftPrompt(length=3)])
    alone = [made.generate([text], 6)[0] for text in TEXTS]
    rows, plain = list[int](), type(backbone.model).generate

    def counted(self: Any, *args: Any, **given: Any) -> Any:
        rows.append(len(given["input_ids"]))
        return plain(self, *args, **given)

    monkeypatch.setattr(type(backbone.model), "generate", counted)
    assert made.generate(list(TEXTS), 6) == alone
    assert rows == [len(TEXTS)]
