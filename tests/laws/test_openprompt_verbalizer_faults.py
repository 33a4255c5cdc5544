"""OpenPrompt's faults of verbalizers, training and the command line, by their numbers in docs/openprompt.md."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.errors import ConfigError, DeltaPromptError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.model.saved import open_
from deltaprompt.registry import build, variants
from deltaprompt.trainer import Training, fit
from deltaprompt.types import Batch, Example
from deltaprompt.verbalizers.automatic import Automatic
from deltaprompt.verbalizers.knowledgeable import Knowledgeable
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.proto_verb import ProtoVerb
from deltaprompt.verbalizers.rules import Rules
from tests import backbones_zoo as zoo
from tests.command import succeeds

LABELS = ("up", "down", "so")
TEMPLATE = "{text} It was {mask}"
TEXTS = ["good", "a good film and a great plot", "not", "the cat sat on the mat ; it was bad", "no", "a film"]
ROWS = [Example({"text": text}, LABELS[i % 3]) for i, text in enumerate(TEXTS)]
RULES = {"up": ("good", "bad"), "down": ("bad", "film"), "so": ("not", "film")}


def scores(model: Model, rows: list[Example]) -> torch.Tensor:
    with torch.no_grad():
        return model(model.features.collate(model.encode(rows)))["logits"]


# B5: scores of rules change where the batch has labels


def test_b5_scores_do_not_depend_on_whether_labels_are_there() -> None:
    model = adapt(zoo.build("bert"), Task("{text} is {mask} , it was {mask}", LABELS, Rules(RULES)))
    assert torch.equal(scores(model, ROWS), scores(model, [Example(row.fields) for row in ROWS]))


# B6: a knowledgeable verbalizer cannot be made with its words


def test_b6_a_knowledgeable_verbalizer_takes_its_words() -> None:
    words = {"up": ("good", "great"), "down": ("bad", "a film"), "so": ("not",)}
    model = adapt(zoo.build("bert"), Task(TEMPLATE, LABELS, Knowledgeable(words, 3, frequency=0.0, relevance=False)))
    assert_close(model.probabilities(ROWS).sum(-1), torch.ones(len(ROWS)))
    assert build("verbalizers", "knowledgeable", {"words": words}) == Knowledgeable(words)


# B7: an automatic verbalizer answers at random before it has words, and its words are not saved


def test_b7_words_are_chosen_before_there_is_an_answer_and_saved_with_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    backbone = zoo.build("bert")
    model = adapt(backbone, Task(TEMPLATE, LABELS, Automatic(size=1)))
    with pytest.raises(ConfigError, match="Automatic has no start yet"):
        model.probabilities(ROWS)
    model.start(ROWS)
    before, words = model.probabilities(ROWS), model.scorer.tensors["ids"].detach().clone()
    model.save(tmp_path)
    model.adapted.remove()
    opened = open_(tmp_path, backbone)
    assert torch.equal(opened.scorer.tensors["ids"], words)
    assert torch.equal(opened.probabilities(ROWS), before)


# B8: prototypes are on a hard-coded GPU, forget that they were trained, and train by an optimizer of their own


def test_b8_prototypes_train_in_the_one_loop_on_any_device_and_are_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    backbone = zoo.build("bert")
    model = adapt(backbone, Task(TEMPLATE, LABELS, ProtoVerb(dim=4)))
    assert {name for name, tensor in model.parts() if tensor.requires_grad} == {"verbalizer.w", "verbalizer.z"}
    fit(model, ROWS, training=Training(steps=2), out=tmp_path / "out")
    before = model.probabilities(ROWS)
    model.adapted.remove()
    assert torch.equal(open_(tmp_path / "out", backbone).probabilities(ROWS), before)


# B9, B14: the command does not run on a CPU; its options do not parse


def test_b9_b14_the_command_runs_on_a_cpu_with_every_number_given(tmp_path) -> None:  # type: ignore[no-untyped-def]
    backbone = zoo.build("bert")
    backbone.model.save_pretrained(tmp_path / "bert")
    backbone.tokenizer.save_pretrained(tmp_path / "bert")
    data = tmp_path / "rows.csv"
    data.write_text("text,label\n" + "".join(f"{row.fields['text']},{row.label}\n" for row in ROWS * 2))
    command = ["fit", "--data", data, "--backbone", tmp_path / "bert", "--device", "cpu", "--template", TEMPLATE]
    command += ["--labels", "up=good", "--labels", "down=bad", "--labels", "so=not", "--delta", "lora:rank=2,at=attn.q"]
    command += ["--steps", "2", "--batch-size", "3", "--learning-rate", "1e-3", "--no-dev", "--out", tmp_path / "out"]
    succeeds(*command)
    assert (tmp_path / "out" / "adaptation.json").is_file()


# B15: misspelt options are ignored


@pytest.mark.parametrize("name", variants("verbalizers"))
def test_b15_an_unknown_option_is_an_error_that_names_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match="has no option 'num_cadidates'"):
        build("verbalizers", name, {"num_cadidates": 3})


def test_b15_an_unknown_kind_or_value_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no verbalizer 'automatik'; did you mean 'automatic'"):
        build("verbalizers", "automatik", {})
    with pytest.raises(DeltaPromptError, match="mean"):
        build("verbalizers", "label_words", {"words": {"a": "b"}, "mean": "harmonic"})


# B17: what is saved holds the backbone's embedding twice, and ids as trainable parameters


def test_b17_only_what_was_learned_is_saved() -> None:
    model = adapt(zoo.build("bert"), Task(TEMPLATE, LABELS, LabelWords({"up": "good", "down": "bad", "so": "not"})))
    assert model.stored() == {}
    assert not any(p.requires_grad for p in model.parameters())
    assert model.scorer.get_buffer("ids").dtype == torch.int64
    assert "ids" not in dict(model.named_parameters())
    assert not any("scorer" in name for name in model.state_dict())


# B19: a word of several tokens is scored at one mask, by its first, largest or mean token


def test_b19_a_word_of_several_tokens_has_its_own_masks() -> None:
    words = {"up": "good film", "down": "bad", "so": "not"}
    model = adapt(zoo.build("bert"), Task(TEMPLATE, words))
    batch: Batch = model.features.collate(model.encode(ROWS[:1]))
    masks = (batch.inputs["input_ids"] == model.backbone.tokenizer.mask_token_id).sum(-1).tolist()
    assert masks == [1, 2]
    with torch.no_grad():
        each = model.backbone.model(**batch.inputs).logits.log_softmax(-1)
    up, other = model.features.answer_ids("good film"), [model.features.answer_ids(w)[0] for w in ("bad", "not")]
    two = sum(each[1, at, i] for at, i in zip(batch.answer_at[1].tolist(), up, strict=True))
    want = torch.stack([two, *(each[0, batch.answer_at[0, 0], i] for i in other)]).log_softmax(-1)
    assert_close(scores(model, ROWS[:1])[0], want)


# B20: two places where text is to be written, of which only the first is


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_b20_a_second_mask_of_a_model_that_answers_once_is_refused(family: str) -> None:
    with pytest.raises(DeltaPromptError, match=r"gives one answer, got 2 masks|does not see what stands after"):
        adapt(zoo.build(family), Task("{text} is {mask} , it was {mask}", dict.fromkeys(LABELS, "good")))
