"""Generation: how a prompt and its target stand, what is cut and refused, how texts are measured, what is kept."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import deltaprompt as dp
from deltaprompt.backbone.load import wrap
from deltaprompt.data import grouped
from deltaprompt.errors import ConfigError, DataError, DeltaPromptError, StoreError, TemplateError
from deltaprompt.features.conversation import ChatTemplate
from deltaprompt.model.many import open_many
from deltaprompt.model.saved import describe
from deltaprompt.model.text_metrics import by_label, scores, signatures
from tests import backbones_zoo as zoo
from tests import tokenizers_zoo

TALK = (dp.Message("user", "was it good ?"), dp.Message("assistant", "a great movie"))
PLAIN = (
    "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
THINKING = tokenizers_zoo.CHATML.replace("{{ m.content }}", "{{ m.content.split('THINK')[-1] }}")
NAMING = tokenizers_zoo.CHATML.replace("{% for m", "{{ messages | length }}{% for m")


def model(family: str = "gpt2", asked: dp.Generation | dp.Chat | None = None, *deltas: Any, **how: Any) -> dp.Generator:
    return dp.generator(zoo.build(family), asked or dp.Generation("{text} =>"), deltas, **how)


def chat(template: str | None, family: str = "qwen2", **how: Any) -> dp.Generator:
    backbone = zoo.build(family)
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = template
    return dp.generator(wrap(backbone.model, tokenizer), dp.Chat(**how))


def text_of(made: dp.Generator, row: Any) -> tuple[str, str]:
    """A row's prompt and its target, special tokens too."""
    tokenizer, (one,) = made.backbone.tokenizer, row.variants
    prompt = one.ids if one.decoder else one.ids[: one.at[0] + 1]
    return tokenizer.decode(prompt), tokenizer.decode(list(row.targets))


# A prompt and its target


@pytest.mark.parametrize(
    ("template", "prompt", "target"),
    [
        ("{text} =>", "a film =>", " good<|endoftext|>"),
        ("{text} => ", "a film =>", " good<|endoftext|>"),
        ("{text}", "a film", " good<|endoftext|>"),
        ("{text}\n", "a film\n", "good<|endoftext|>"),
        ("{text} ={mask}", "a film =", "good<|endoftext|>"),
        ("{text} = {mask}", "a film =", " good<|endoftext|>"),
    ],
)
def test_a_blank_before_the_target_is_part_of_it(template, prompt, target):
    made = model("gpt2", dp.Generation(template))
    (row,) = made.encode([dp.Example({"text": "a film", "target": "good"})])
    assert text_of(made, row) == (prompt, target)


def test_roles_are_written_by_the_chat_template_and_a_turns_end_is_learned():
    made = model("qwen2", dp.Generation("{system}be good{user}{text}{assistant}"))
    (row,) = made.encode([dp.Example({"text": "a film", "target": "good"})])
    assert text_of(made, row) == (
        "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\na film<|im_end|>\n<|im_start|>assistant\n",
        "good<|im_end|>",
    )


def test_each_right_text_is_a_row_and_references_come_before_the_target():
    made = model("gpt2", dp.Generation("{text}", "{first}, {second}"))
    fields = {"text": "a film", "first": "good", "second": "great"}
    rows = made.encode([dp.Example(fields), dp.Example(fields, references=("one", "two words"))])
    assert [text_of(made, row)[1] for row in rows] == [
        " good, great<|endoftext|>",
        " one<|endoftext|>",
        " two words<|endoftext|>",
    ]


def test_a_prompt_gives_way_and_its_target_stays_whole():
    made = model("gpt2", dp.Generation("{text} : {title|keep} =>", max_length=30, max_target=12))
    long = {"text": "a great movie " * 30, "title": "plot", "target": "It was terrible"}
    (row,) = made.encode([dp.Example(long)])
    prompt, target = text_of(made, row)
    assert prompt.endswith(" : plot =>")
    assert target == " It was terrible<|endoftext|>"
    assert len(row.variants[0].ids) - len(row.targets) + 1 == 30 - 12
    (asked,) = made.writing.prompts([dp.Example(long)])
    assert made.backbone.tokenizer.decode(asked.variants[0].ids) == prompt  # as without a target


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_too_long_a_target_is_cut_and_then_has_no_end(family):
    whole, cut = (model(family, dp.Generation("{text} =>", max_target=n)) for n in (24, 5))
    example = dp.Example({"text": "a film", "target": "the cat sat on the mat"})
    (row,), (short,) = whole.encode([example]), cut.encode([example])
    assert row.targets[-1] == whole.writing.ends[0]
    assert short.targets == row.targets[:5]
    assert cut.writing.ends[0] not in short.targets


def test_room_for_a_target_is_half_of_what_there_is_where_nothing_is_said():
    assert model("gpt2").writing.longest == 32  # of 64
    assert model("gpt2", dp.Generation("{text}", max_length=20)).writing.longest == 10
    assert model("gpt2", dp.Generation("{text}"), dp.SoftPrompt(length=40)).writing.longest == 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: dp.Generation("{text}", "no field"),
            "a target is made of words and fields, one field or more; got 'no",
        ),
        (lambda: dp.Generation("{text}", "{target}{mask}"), "a target is made of words and fields"),
        (lambda: dp.Generation("{text}", beams=0), "beams = 0 is not possible"),
        (lambda: dp.Chat(beams=0), "beams = 0 is not possible"),
        (lambda: dp.Chat(overlong="cut"), "overlong = 'cut' is not possible: it is 'error' or 'drop'"),
        (
            lambda: model("bert"),
            "generation needs a causal model or an encoder-decoder, and this one is of the kind 'mas",
        ),
        (lambda: model("bert-encoder"), "this one is of the kind 'encoder'"),
        (lambda: model("t5", dp.Chat()), "conversations need a causal model, and this one is of the kind 'seq2seq'"),
        (lambda: model("gpt2", dp.Chat()), "conversations need a chat template and this tokenizer has none"),
        (lambda: model("gpt2", dp.Generation("{mask} {text}")), r"stands at the end, and '\{mask\} \{text\}' has a"),
        (lambda: model("gpt2", dp.Generation("{text}", max_target=64)), "max_target 64 is not possible: 1 to 63 of 64"),
        (lambda: model("gpt2", dp.Generation("{text}", max_target=0)), "max_target 0 is not possible"),
        (
            lambda: model("gpt2", dp.Generation("{text}", max_length=65)),
            "max_length 65 is not possible: this backbone tak",
        ),
        (lambda: model("gpt2", dp.Generation("{demos:2}{text} {mask}")), r"\{demos:2\} shows labels at \{mask\}"),
    ],
)
def test_what_cannot_be_asked_is_refused(make, message):
    with pytest.raises(DeltaPromptError, match=message):
        make()


def test_what_lacks_a_target_is_told():
    made = model()
    with pytest.raises(DataError, match="example 2 has no target, got the fields text; give it the fields target of"):
        made.encode([dp.Example({"text": "a", "target": "b"}), dp.Example({"text": "a"})])
    with pytest.raises(DataError, match="example 1 has no target, got a blank one"):
        made.encode([dp.Example({"text": "a", "target": " "})])
    with pytest.raises(ConfigError, match="example 1 has no right text to compare with; give it references"):
        made.evaluate([dp.Example({"text": "a"})])
    with pytest.raises(ConfigError, match="there are no examples to evaluate on"):
        made.evaluate([])
    with pytest.raises(ConfigError, match=r"these rows have no targets; encode them with generator.encode"):
        made(made.features.collate(made.writing.prompts([dp.Example({"text": "a"})])))
    made.adapted.remove()
    with pytest.raises(ConfigError, match="nothing in this model trains"):
        dp.fit(made, [dp.Example({"text": "a", "target": "b"})])


# Decoding


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"beams": 0}, "beams = 0 is not possible: it is a whole number, 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 is not possible"),
        ({"temperature": 0.5}, "temperature and top_p are of sampling; say sample=True"),
        ({"top_p": 0.5}, "temperature and top_p are of sampling"),
        ({"sample": True, "temperature": 0.0}, r"temperature is a number above 0, and top_p above 0 .*got 0.0, 1.0"),
        ({"sample": True, "top_p": 1.5}, "got 1.0, 1.5"),
        ({"slot": 1}, "adaptation 1 was named; 0 to 0 are possible"),
        (
            {"max_new_tokens": 62},
            "62 new tokens behind a prompt of 5 are more than the 64 that this backbone takes; ask",
        ),
        ({"batch_size": 0}, "a batch has at least one row"),
    ],
)
def test_what_cannot_be_decoded_is_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        model().generate(["a film"], **how)


def test_what_is_given_to_generate():
    made = model()
    assert made.generate(["a film"], 3) == made.generate([{"text": "a film"}], 3)
    assert made.generate(["a film"], 3) == made.generate([dp.Example({"text": "a film"})], 3)
    assert made.predict(["a film"]) == [{"text": made.generate(["a film"])[0]}]
    assert made.generate([]) == []
    with pytest.raises(ConfigError, match="texts are generated for a list, and this is one; write generate"):
        made.generate("a film")
    made.adapted.remove()
    two = dp.generator(made.backbone, dp.Generation("{text} {title} =>"))
    with pytest.raises(
        ConfigError, match="a text alone stands for the prompt's one field, and this prompt has text, ti"
    ):
        two.generate(["a film"])


def test_a_longer_text_is_asked_for_where_there_is_room():
    made = model("gpt2", dp.Generation("{text} =>", max_target=4, beams=2))
    assert len(made.generate(["a film"], 40)[0]) > len(made.generate(["a film"])[0])
    assert made.generate(["a film"]) == made.generate(["a film"], beams=2)


def test_generating_leaves_the_modes_as_they_were():
    made = model()
    made.train()
    made.adapted.model.eval()
    before = [module.training for module in made.modules()]
    made.generate(["a film"], 2)
    made.evaluate([dp.Example({"text": "a", "target": "b"})])
    assert [module.training for module in made.modules()] == before


# Measures


def test_the_measures_are_those_of_sacrebleu_and_rouge_score():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    texts = ["the cat sat on a mat", "It was great , great !", "no"]
    right = [["the cat sat on the mat", "a cat sat on a mat there"], ["It was great !"], ["yes", "no", "maybe"]]
    found = scores(texts, right)
    columns = [
        ["the cat sat on the mat", "It was great !", "yes"],
        ["a cat sat on a mat there", None, "no"],
        [None, None, "maybe"],
    ]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, columns).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, columns).score)
    rouge = RougeScorer(["rougeL"])
    best = [max(rouge.score(r, text)["rougeL"].fmeasure for r in own) for text, own in zip(texts, right, strict=True)]
    assert found["rougeL"] == pytest.approx(100 * sum(best) / 3)
    assert scores(["the cat sat on the mat"], [["the cat sat on the mat"]])["bleu"] == pytest.approx(100)
    assert "tok:13a" in signatures(right)["bleu"]


def test_examples_with_labels_are_measured_by_label_too():
    texts, right = ["the cat sat on the mat", "no film", "a dog"], [["the cat sat on the mat"], ["yes"], ["a dog"]]
    found = by_label(texts, right, ["seen", "unseen", None])
    assert found["bleu_seen"] == pytest.approx(100)
    assert found["rougeL_unseen"] == 0
    assert found["rougeL"] == pytest.approx(200 / 3)
    made = model()
    told = made.evaluate(
        [dp.Example({"text": "a", "target": "b"}, "seen"), dp.Example({"text": "c"}, "unseen", ("d", "e"))]
    )
    assert {"bleu", "bleu_seen", "bleu_unseen", "chrf", "rougeL", "loss", "perplexity"} <= told.keys()


def test_what_measuring_needs_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ConfigError, match=r'this needs sacrebleu.metrics .*pip install "deltaprompt\[generation\]"'):
        scores(["a"], [["b"]])
    with pytest.raises(ConfigError, match="2 texts and 1 lists of right ones"):
        scores(["a", "b"], [["b"]])


# What is kept


def test_the_record_says_what_is_written(tmp_path: Path):
    asked = dp.Generation("{text} =>", "{target} .", max_length=40, max_target=9, beams=2)
    made = model("gpt2", asked, dp.LoRA(rank=2))
    made.save(tmp_path / "a", metrics={"dev": {"loss": 1.0}})
    record = describe(tmp_path / "a")
    assert record["generation"] == {
        **{"kind": "generation", "template": "{text} =>", "target": "{target} ."},
        **{"max_length": 40, "max_target": 9, "beams": 2},
    }
    assert "labels" not in record
    made.adapted.remove()
    again = dp.open(tmp_path / "a", made.backbone)
    assert isinstance(again, dp.Generator)
    assert again.generation == asked
    again.adapted.remove()
    with pytest.raises(StoreError, match=r"it writes texts and has no labels of texts; open it by itself"):
        open_many([tmp_path / "a"], made.backbone)


def test_a_chat_is_opened_on_the_tokenizer_with_its_chat_template_alone(tmp_path: Path):
    backbone = zoo.build("qwen2")
    made = dp.generator(backbone, dp.Chat(packed=True, overlong="drop", max_length=60), [dp.LoRA(rank=2)])
    texts = made.generate(["was it good ?"], 4)
    made.save(tmp_path)
    made.adapted.remove()
    again = dp.open(tmp_path, backbone)
    assert isinstance(again, dp.Generator)
    assert again.generation == made.generation
    assert again.generate(["was it good ?"], 4) == texts
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = PLAIN
    with pytest.raises(StoreError, match="They differ in their tokenizer"):
        dp.open(tmp_path, wrap(zoo.model("qwen2"), tokenizer))


def test_a_generators_deltas_are_written_for_peft(tmp_path: Path):
    made = model("qwen2", None, dp.LoRA(rank=2))
    assert dp.save_peft(made, tmp_path) > 0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    made.adapted.remove()
    soft = dp.generator(made.backbone, dp.Generation("{soft:3}{text} =>"))
    with pytest.raises(StoreError, match="the template has soft tokens"):
        dp.save_peft(soft, tmp_path)


# Conversations


def test_a_chat_template_must_write_a_conversation_exactly():
    with pytest.raises(TemplateError, match="writes no special token behind what the assistant says"):
        chat(PLAIN)
    with pytest.raises(TemplateError, match="writes the beginning of a conversation .* in another way once it goes on"):
        chat(NAMING).encode([dp.Example({}, messages=TALK)])
    talk = (TALK[0], dp.Message("assistant", "hm THINK a great movie"))
    with pytest.raises(DataError, match="in another way than what is said in it, .*It begins 'was it good"):
        chat(THINKING).encode([dp.Example({}, messages=talk)])
    assert chat(THINKING).encode([dp.Example({}, messages=TALK)])
    with pytest.raises(TemplateError, match="the tokenizer's chat template refuses the roles system, user"):
        chat(tokenizers_zoo.INST, "llama").encode([dp.Example({}, messages=(dp.Message("system", "be good"), *TALK))])


def test_the_end_of_a_turn_is_the_chat_templates_own():
    """As in Gemma, where it is not the tokenizer's end-of-text token."""
    tokenizer = copy.deepcopy(tokenizers_zoo.build("chatml"))
    tokenizer.eos_token = "<|endoftext|>"
    made = dp.generator(wrap(zoo.model("qwen2"), tokenizer), dp.Generation("{user}{text}{assistant}"))
    ends = tokenizer.convert_ids_to_tokens(list(made.writing.ends))
    assert ends[0] == "<|im_end|>"
    assert ChatTemplate(tokenizer).end() == "<|im_end|>"


def test_what_a_conversation_must_have():
    made = chat(tokenizers_zoo.CHATML, max_length=40, max_target=8)
    with pytest.raises(DataError, match="example 2 has no messages; read conversations with read_chats"):
        made.encode([dp.Example({}, messages=TALK), dp.Example({"text": "a"})])
    with pytest.raises(DataError, match="conversation 1 has no turn of the assistant's to learn from; leave it out"):
        made.encode([dp.Example({}, messages=TALK[:1])])
    long = (dp.Message("user", "a film " * 30), TALK[1])
    with pytest.raises(
        DataError, match=r"conversation 2 has its first answer whole after \d+ tokens, and max_length is 40"
    ):
        made.encode([dp.Example({}, messages=TALK), dp.Example({}, messages=long)])
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens leaves no room for 8 more in max_length 40"):
        made.generate([dp.Example({}, messages=long)])
    made.adapted.remove()
    dropping = dp.generator(made.backbone, dp.Chat(max_length=40, overlong="drop"))
    assert len(dropping.encode([dp.Example({}, messages=TALK), dp.Example({}, messages=long)])) == 1


def test_a_prompt_loses_its_oldest_exchanges_and_keeps_the_system():
    made = chat(tokenizers_zoo.CHATML, max_length=60, max_target=8)
    talk = (dp.Message("system", "be good"), *TALK * 3, dp.Message("user", "yes or no ?"))
    (row,) = made.writing.prompts([dp.Example({}, messages=talk)])
    text = made.backbone.tokenizer.decode(row.variants[0].ids)
    assert text.startswith("<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("yes or no ?<|im_end|>\n<|im_start|>assistant\n")
    assert 0 < text.count("great movie") < 3 or row.length <= 52
    assert row.length <= 52


def test_a_last_answer_is_what_a_chat_is_measured_by():
    made = chat(tokenizers_zoo.CHATML)
    example = dp.Example({}, messages=(*TALK, *TALK))
    assert made.writing.answers(example) == ("a great movie",)
    (prompt,) = made.writing.prompts([example])
    (asked,) = made.writing.prompts([dp.Example({}, messages=(*TALK, TALK[0]))])
    assert prompt == asked
    assert made.evaluate([example])["loss"] > 0


def test_grouped_references_measure_as_they_should():
    made = model()
    rows = [dp.Example({"text": "a", "target": "b"}), dp.Example({"text": "a", "target": "c"})]
    (one,) = grouped(rows)
    assert made.writing.answers(one) == ("b", "c")
    assert made.measure(made.encode(rows))["loss"] == pytest.approx(made.measure(made.encode([one]))["loss"])


def test_perplexity_is_the_exponential_of_the_loss_whatever_it_is():
    from deltaprompt.model.generator import told_of

    assert told_of(2.0)["perplexity"] == pytest.approx(torch.tensor(2.0).exp().item())
    assert told_of(1e6)["perplexity"] == float("inf")
