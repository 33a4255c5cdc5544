"""The model around the forward path: order, odd texts, errors, words that soft tokens begin from."""

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.backbone import load
from deltaprompt.deltas._position_shift import PositionShift
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import BackboneError, ConfigError, DataError, TemplateError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.types import Example
from deltaprompt.verbalizers.label_descriptions import LabelDescriptions
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.prototypes import Prototypes
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo

WORDS = {"pos": ("good", "great"), "neg": "terrible"}
TASK = Task("{text} It was {mask} .", WORDS)
ODD = [
    "",
    " ",
    "good film " * 1000,
    "😀 👩‍👩‍👧",
    "电影 很 好",
    "\x00 \n\t \ufeff",
    "[MASK] <mask> <extra_id_0> <s>",
    "{text}",
    "a",
]


def model(family="bert", task=TASK, deltas=(), **how):
    return adapt(zoo.build(family), task, deltas, **how)


# Prediction


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart"])
def test_predictions_come_in_the_order_of_the_texts(family):
    texts = ["a " * n + "good film" for n in (5, 0, 9, 2, 7, 1, 3)]
    made = model(family)
    together = made.predict(texts, batch_size=3)
    for text, got in zip(texts, together, strict=True):
        assert got["label"] == made.predict([text])[0]["label"]
        assert got["scores"] == pytest.approx(made.predict([text])[0]["scores"], abs=1e-5)


def test_a_prediction_is_the_likeliest_label_with_its_probability_and_all():
    got = model().predict(["a good film"])[0]
    assert set(got) == {"label", "score", "scores"}
    assert got["scores"][got["label"]] == got["score"] == max(got["scores"].values())
    assert sum(got["scores"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5", "bart", "bert-encoder"])
@pytest.mark.parametrize("template", ["{text} It was {mask}", "{text}"])
def test_odd_texts_have_finite_scores_and_leave_the_others_alone(family, template):
    if template == "{text}" and family in ("bert", "roberta"):
        pytest.skip("a masked model answers at {mask}")
    made = model(family, Task(template, ["good", "bad"], max_length=60))
    got = made.probabilities([Example({"text": t}) for t in ODD])
    assert got.isfinite().all()
    assert_close(got[-1:], made.probabilities([Example({"text": "a"})]), atol=1e-5, rtol=1e-5)


def test_no_texts_have_no_predictions():
    assert model().predict([]) == []
    assert model().embed(model().features, []).shape == (0, 16)


def test_one_text_in_place_of_a_list_is_an_error():
    for given in ("a good film", {"text": "good"}, Example({"text": "good"})):
        with pytest.raises(ConfigError, match=r"predict takes a list, and got one text; write predict\(\[text\]\)"):
            model().predict(given)


def test_texts_of_several_fields_come_as_dictionaries():
    made = model(task=Task("{question} ? {mask} , {answer}", WORDS))
    rows = [{"question": "was it good", "answer": "no"}, {"question": "a", "answer": "yes it was great"}]
    as_examples = made.predict([Example(row) for row in rows])
    assert made.predict(rows) == as_examples
    assert as_examples[0] != as_examples[1]


def test_a_missing_field_is_an_error_that_names_those_there_are():
    with pytest.raises(TemplateError, match=r"question.*text"):
        model(task=Task("{question} {mask}", WORDS)).predict(["good"])


def test_prediction_leaves_modes_and_gradients_as_they_were():
    made = model(deltas=[LoRA(rank=2)])
    made.train()
    made.backbone.model.eval()
    was = [m.training for m in made.modules()]
    made.predict(["good"])
    assert [m.training for m in made.modules()] == was
    assert all(p.requires_grad for _, p in made.parts())


def test_each_slot_predicts_its_own():
    made = Model(zoo.build("bert"), Task("{text} {mask}", ["a", "b"], SoftVerbalizer()), [], [0, 1])
    first, second = (made.predict(["good"], slot=slot) for slot in (0, 1))
    assert first != second
    assert first == Model(zoo.build("bert"), made.task, [], [0]).predict(["good"])
    with pytest.raises(ConfigError, match="adaptation 2 was named; 0 to 1 are possible"):
        made.predict(["good"], slot=2)


# Evaluation and states


def test_evaluation_is_accuracy_and_macro_f1():
    made = model()
    texts = ["a good film", "bad", "not there", "the cat sat", "it was"]
    said = [p["label"] for p in made.predict(texts)]
    right = made.evaluate([Example({"text": t}, label) for t, label in zip(texts, said, strict=True)])
    assert right["accuracy"] == 1.0
    other = {"pos": "neg", "neg": "pos"}
    wrong = made.evaluate([Example({"text": t}, other[label]) for t, label in zip(texts, said, strict=True)])
    assert wrong == {"accuracy": 0.0, "macro_f1": 0.0}


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([], ConfigError, "there are no examples to evaluate on"),
        (
            [Example({"text": "good"})],
            ConfigError,
            "an example has no label, {'text': 'good'}; every one needs one here",
        ),
        ([Example({"text": "good"}, "post")], DataError, "there is no label 'post'; did you mean 'pos'?"),
    ],
)
def test_examples_that_cannot_be_evaluated_are_an_error(examples, error, message):
    with pytest.raises(error) as raised:
        model().evaluate(examples)
    assert str(raised.value).startswith(message)


def test_embeddings_are_states_in_the_order_of_the_examples():
    made = model("bert-encoder", Task("{text}", ["a", "b"]))
    texts = ["good", "a good film and a great plot", "bad film"]
    got = made.embed(made.features, [Example({"text": t}) for t in texts], batch_size=2)
    tokenizer, plain = made.backbone.tokenizer, made.backbone.model
    want = [plain(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in texts]
    assert_close(got, torch.stack(want).detach(), atol=1e-5, rtol=1e-5)


# Starts


def test_descriptions_answer_at_once():
    for verbalizer in (None, LabelDescriptions({"a": "good film", "b": "sports"})):
        made = model("bert-encoder", Task("{text}", {"a": "good film", "b": "sports"}, verbalizer))
        assert made.predict(["good film", "sports"]) != [{"a": 0.5, "b": 0.5}] * 2
        assert [p["label"] for p in made.predict(["good film", "sports"])] == ["a", "b"]


def test_prototypes_without_a_start_are_an_error_and_not_a_guess():
    made = model("bert-encoder", Task("{text}", ["a", "b"], Prototypes()))
    with pytest.raises(ConfigError, match=r"the verbalizer Prototypes has no start yet; give model.start\(examples\)"):
        made.predict(["good"])
    made.start([Example({"text": "good"}, "a"), Example({"text": "bad film"}, "b")])
    assert [p["label"] for p in made.predict(["good", "bad film"])] == ["a", "b"]


def test_a_start_needs_labels_and_those_of_the_task():
    made = model("bert-encoder", Task("{text}", ["a", "b"], Prototypes()))
    with pytest.raises(ConfigError, match="an example has no label"):
        made.start([Example({"text": "good"})])
    with pytest.raises(DataError, match="there is no label 'c'"):
        made.start([Example({"text": "good"}, "c")])


# Tasks


@pytest.mark.parametrize("labels", [["a"], ["a", "a"], [], {"a": "good"}])
def test_a_task_needs_two_labels_each_once(labels):
    with pytest.raises(ConfigError, match="a task needs two labels or more, each once; got"):
        model(task=Task("{text} {mask}", labels))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"a": "good", "b": []}, "label 'b' has no words"),
        ({"a": "good", "b": ""}, "a word of label 'b' is empty; leave it out"),
        ({"a": "good", "b": ["bad", " "]}, "a word of label 'b' is empty; leave it out"),
    ],
)
def test_a_label_needs_words(words, message):
    with pytest.raises(ConfigError, match=message):
        model(task=Task("{text} {mask}", words))


def test_an_encoder_without_words_or_sentences_for_a_label_is_an_error():
    with pytest.raises(ConfigError, match="label 'b' has no description"):
        model("bert-encoder", Task("{text}", {"a": "good", "b": []}))


@pytest.mark.parametrize("length", [0, -1, 65, 10_000])
def test_a_length_that_the_backbone_cannot_take_is_an_error(length):
    with pytest.raises(ConfigError, match=f"max_length {length} is not possible: this backbone takes 1 to 64 tokens"):
        model(task=Task("{text} {mask}", WORDS, max_length=length))


def test_a_text_leaves_room_for_positions_that_are_moved_on():
    moved = model("gpt2", Task("{text} It was {mask}.", WORDS), [Prefix(10), PositionShift(10)])
    assert moved.features.max_length == 54
    assert moved.predict(["good " * 200])[0]["label"] in WORDS
    message = "max_length 64 is not possible: this backbone takes 1 to 54 tokens behind positions moved on by 10"
    with pytest.raises(ConfigError, match=message):
        model("gpt2", Task("{text} It was {mask}.", WORDS, max_length=64), [PositionShift(10)])


def test_a_length_cuts_texts():
    made = model(task=Task("{text} {mask}", WORDS, max_length=10))
    assert made.features.encode([Example({"text": "good " * 50})])[0].length == 10


def test_a_length_without_room_for_the_template_is_an_error():
    with pytest.raises(TemplateError, match="max_length is 3"):
        model(task=Task("{text} it was so {mask}", WORDS, max_length=3)).predict(["good"])


def test_label_names_stand_for_themselves():
    assert Task("", ["very_good", "bad"]).words() == {"very_good": ("very good",), "bad": ("bad",)}
    assert Task("", WORDS).words() == {"pos": ("good", "great"), "neg": ("terrible",)}
    assert Task("", WORDS).names == ("pos", "neg")


@pytest.mark.parametrize(
    ("family", "template", "kind"),
    [("bert", "{text} {mask}", LabelWords), ("gpt2", "{text} {mask}", LabelWords), ("gpt2", "{text}", Prototypes),
     ("bert-encoder", "{text}", Prototypes), ("bert-encoder", "{text} {mask}", Prototypes)],
)  # fmt: skip
def test_the_default_verbalizer_is_of_the_kind_of_backbone(family, template, kind):
    assert type(model(family, Task(template, ["good", "bad"])).verbalizer) is kind


def test_a_verbalizer_that_needs_a_head_is_refused_by_an_encoder():
    with pytest.raises(ConfigError, match="label words need a language model"):
        model("bert-encoder", Task("{text}", ["a", "b"], LabelWords({"a": "good", "b": "bad"})))


# Soft tokens


def logits(made, texts):
    with torch.no_grad():
        return made(made.features.collate(made.encode([Example({"text": t}) for t in texts])))["logits"]


@torch.no_grad()
def alike(made, plain):
    """Gives the deltas of a task with soft tokens, whose own delta is the first, the tensors of the task without."""
    parts = dict(made.parts())
    for name, tensor in plain.adapted.parts():
        number, _, rest = name.partition(".")
        parts[f"delta.{int(number) + 1}.{rest}"].copy_(tensor)


@pytest.mark.parametrize(
    ("family", "soft"),
    [
        ("bert", '{text} {soft:"It was"} {mask} .'),
        ("deberta-v3", '{text} {soft:"It was"} {mask} .'),
        ("albert", '{text} {soft:"It was"} {mask} .'),
        ("gpt2", '{soft:"It was"} {text} {mask}'),
        ("bart", '{soft:"It was"} {text} {mask}'),
        ("t5", '{text} {soft:"It was"} {mask}'),
    ],
)
def test_soft_tokens_begun_from_words_are_these_words_at_the_start(family, soft):
    texts, words = ["a good film", "bad"], dict.fromkeys(["good", "bad"])
    made = model(family, Task(soft, list(words)), [SoftPrompt(length=2), Prefix(length=2)] if family == "gpt2" else [])
    hard = soft.replace('{soft:"It was"}', "It was")
    plain = model(family, Task(hard, list(words)), [SoftPrompt(length=2), Prefix(length=2)] if family == "gpt2" else [])
    alike(made, plain)
    ids = made.features.word_ids("It was")
    hard_ids = plain.encode([Example({"text": "good"})])[0].variants[0].ids
    assert any(hard_ids[i : i + len(ids)] == ids for i in range(len(hard_ids)))  # the words are the same tokens
    got = logits(made, texts)
    if family == "bart":  # its decoder repeats the text, in which soft tokens have no place
        assert not torch.equal(got, logits(plain, texts))
        return
    assert_close(got, logits(plain, texts), atol=1e-6, rtol=1e-6)


def test_soft_words_are_the_embeddings_of_these_words_in_every_slot():
    made = Model(zoo.build("bert"), Task('{text} {soft:3} {soft:"It was good"} {mask}', WORDS), [SoftPrompt(2)], [0, 1])
    table = dict(made.parts())["delta.0.embed.p"]
    ids = made.backbone.tokenizer("It was good", add_special_tokens=False)["input_ids"]
    for slot in (0, 1):
        assert torch.equal(table[slot, 3:], made.backbone.model.get_input_embeddings().weight[ids])
    assert not torch.equal(table[0, :3], table[1, :3])


def test_blocks_of_one_name_are_one_block():
    shared = model(task=Task("{soft:2:x} {text} {soft:2:x} {mask}", WORDS))
    apart = model(task=Task("{soft:2:x} {text} {soft:2:y} {mask}", WORDS))
    assert shared.parameter_count() == 2 * 16
    assert apart.parameter_count() == 4 * 16
    ids = shared.encode([Example({"text": "good"})])[0].variants[0].ids
    first = shared.backbone.vocabulary
    assert [i for i in ids if i >= first] == [first, first + 1] * 2


def test_a_soft_prompt_and_soft_tokens_of_the_template_have_rows_of_their_own():
    made = model(task=Task("{text} {soft:3} {mask}", WORDS), deltas=[SoftPrompt(length=2), SoftPrompt(length=4)])
    first = made.backbone.vocabulary
    ids = made.encode([Example({"text": "good"})])[0].variants[0].ids
    assert [i - first for i in ids if i >= first] == list(range(9))
    before = logits(made, ["good"])
    for name, p in made.parts():
        kept = p.detach().clone()
        for row in range(p.shape[1]):
            p.data[:, row, 0] += 1.0
            assert not torch.equal(logits(made, ["good"]), before), (name, row)
            p.data.copy_(kept)
    assert sum(p.shape[1] for _, p in made.parts()) == 9


def test_parts_are_every_trainable_tensor_once():
    made = model(
        task=Task("{text} {soft:3} {mask}", ["a", "b"], SoftVerbalizer()), deltas=[LoRA(rank=2), SoftPrompt(2)]
    )
    ours = {id(p) for _, p in made.parts()}
    assert ours == {id(p) for p in made.parameters() if p.requires_grad}
    assert len(dict(made.parts())) == len(ours)
    assert made.parameter_count() == 8 * 2 * 16 * 2 // 2 + (3 + 2) * 16 + 2 * 17


def test_the_seed_makes_the_model():
    task = Task("{text} {soft:3} {mask}", ["a", "b"], SoftVerbalizer())
    one, same, other = (model(task=task, deltas=[Prefix(length=2)], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(one, ["good"]), logits(same, ["good"]))
    assert not torch.equal(logits(one, ["good"]), logits(other, ["good"]))


@pytest.mark.parametrize("family", ["bart", "bert"])
def test_a_backbone_that_is_cast_after_it_was_wrapped_keeps_its_head(family):
    backbone = zoo.build(family)
    head = {name: b for name, b in backbone.model.named_buffers() if name == "final_logits_bias"}
    for bias in head.values():
        bias.normal_()
    task = Task("{text} It was {mask}", ["good", "bad"])
    before = logits(adapt(backbone, task), ["a good film"])
    backbone.model.to(torch.float64)
    made = adapt(backbone, task)
    at = made.at_mask(made.features.collate(made.encode([Example({"text": "good"})])))
    assert at.logits(at.hidden[:, 0], torch.tensor([5, 6])).dtype == torch.float64
    assert_close(logits(made, ["a good film"]).float(), before, atol=1e-5, rtol=1e-5)


def test_an_unknown_backbone_is_an_error():
    with pytest.raises(BackboneError, match="no backbone"):
        load("/nowhere/at/all")


# One backbone, one model at a time


@pytest.mark.parametrize("delta", [LoRA(), Prefix()])
def test_a_second_model_on_a_backbone_that_carries_deltas_is_refused(delta):
    backbone = zoo.build("bert")
    first = adapt(backbone, TASK, [delta])
    with pytest.raises(ConfigError, match=r"already carries another model's deltas.*remove\(\)"):
        adapt(backbone, TASK)
    first.adapted.remove()
    adapt(backbone, TASK)


def test_a_model_that_is_refused_leaves_the_backbone_as_it_was():
    backbone = zoo.build("bert")
    with pytest.raises(ConfigError):
        adapt(backbone, Task("{text} It was {mask} .", WORDS, LabelWords({"pos": "good"})), [LoRA()])
    assert not any(module._forward_hooks for module in backbone.model.modules())
    assert all(p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize("length", [64, 10**9])
def test_virtual_tokens_that_leave_no_room_are_an_error(length):
    with pytest.raises(ConfigError, match=f"{length} virtual tokens leave no room in the 64 tokens of a text"):
        model("bert", Task("{text} {mask}", WORDS), [SoftPrompt(length)])
