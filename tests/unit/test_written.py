"""Labels as texts of the example itself: likelihoods by hand, refusals, save and open."""

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.calibrations.batch import BatchCalibration
from deltaprompt.calibrations.contextual import Contextual
from deltaprompt.errors import ConfigError, DataError, TemplateError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.model.saved import open_
from deltaprompt.types import Example
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.written import Written
from tests import backbones_zoo as zoo

CHOICES = {"0": "{choice1}", "1": "{choice2|lower}"}
EXAMPLES = [
    Example({"text": "the cat sat", "choice1": "a good film", "choice2": "NOT bad"}),
    Example({"text": "a film", "choice1": "no", "choice2": "the cat sat on the mat"}),
    Example({"text": "not", "choice1": "great plot", "choice2": "bad"}),
]
TEMPLATE = "{text} so {mask}"


def by_hand(model, example, text, per_token):
    """log p(text | prompt), one token at a time through the plain model."""
    encoded, ids = model.encode([example])[0].variants[0], model.features.answer_ids(text)
    total = 0.0
    for n, i in enumerate(ids):
        if model.backbone.kind == "causal":
            given = torch.tensor([encoded.ids + ids[:n]])
            out = model.backbone.model(input_ids=given, use_cache=False)
        else:
            out = model.backbone.model(
                input_ids=torch.tensor([encoded.ids]), decoder_input_ids=torch.tensor([encoded.decoder + ids[:n]])
            )
        total = total + out.logits[0, -1].log_softmax(-1)[i]
    return total / len(ids) if per_token else total


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_a_label_s_likelihood_is_that_of_its_text(family, per_token):
    backbone = zoo.build(family, torch.float64)
    model = adapt(backbone, Task(TEMPLATE, ["0", "1"], Written(CHOICES, per_token=per_token, longest=20)))
    with torch.no_grad():
        rows = [
            torch.stack(
                [
                    by_hand(model, e, e.fields["choice1"], per_token),
                    by_hand(model, e, e.fields["choice2"].lower(), per_token),
                ]
            ).softmax(-1)
            for e in EXAMPLES
        ]
    assert_close(model.probabilities(EXAMPLES), torch.stack(rows).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_texts_of_one_token_are_scored_like_others(family):
    backbone = zoo.build(family, torch.float64)
    model = adapt(backbone, Task(TEMPLATE, ["0", "1"], Written({"0": "good", "1": "bad"})))
    with torch.no_grad():
        rows = [torch.stack([by_hand(model, e, word, True) for word in ("good", "bad")]).softmax(-1) for e in EXAMPLES]
    assert_close(model.probabilities(EXAMPLES), torch.stack(rows).float(), atol=1e-6, rtol=0)


def test_it_is_saved_and_opened(tmp_path):
    backbone = zoo.build("gpt2")
    model = adapt(backbone, Task(TEMPLATE, ["0", "1"], Written(CHOICES, longest=20)))
    before = model.probabilities(EXAMPLES)
    model.save(tmp_path)
    model.adapted.remove()
    assert torch.equal(open_(tmp_path, backbone).probabilities(EXAMPLES), before)


def test_what_it_cannot_do_is_said():
    gpt2 = zoo.build("gpt2")
    with pytest.raises(ConfigError, match="texts that a model goes on with, and this backbone is masked"):
        adapt(zoo.build("bert"), Task(TEMPLATE, ["0", "1"], Written(CHOICES)))
    with pytest.raises(ConfigError, match=r"made of text and fields, got \{mask\}"):
        adapt(gpt2, Task(TEMPLATE, ["0", "1"], Written({"0": "{mask}", "1": "b"})))
    with pytest.raises(
        ConfigError, match="Contextual asks without an example, and these answers are texts of the example"
    ):
        adapt(gpt2, Task(TEMPLATE, ["0", "1"], Written(CHOICES), calibration=Contextual()))
    with pytest.raises(ConfigError, match="label '1' has no text"):
        adapt(gpt2, Task(TEMPLATE, ["0", "1"], Written({"0": "a"})))
    model = adapt(gpt2, Task(TEMPLATE, ["0", "1"], Written(CHOICES, longest=2)))
    with pytest.raises(DataError, match="tokens, and 2 are possible; shorten it, or raise the verbalizer's longest"):
        model.probabilities(EXAMPLES)
    with pytest.raises(TemplateError, match="has no field 'choice1'"):
        model.probabilities([Example({"text": "a"})])


def test_a_calibration_by_texts_takes_away_what_is_said_of_them_all():
    backbone = zoo.build("gpt2")
    plain = adapt(backbone, Task(TEMPLATE, ["0", "1"], Written(CHOICES, longest=20)))
    log_p = plain.probabilities(EXAMPLES).log()
    plain.adapted.remove()
    model = adapt(backbone, Task(TEMPLATE, ["0", "1"], Written(CHOICES, longest=20), calibration=BatchCalibration()))
    model.calibrate(EXAMPLES)
    assert_close(model.probabilities(EXAMPLES), (log_p - log_p.exp().mean(0).log()).softmax(-1), atol=1e-5, rtol=0)


def test_a_prompt_leaves_room_for_texts_as_long_as_they_are():
    text = [Example({"text": "good " * 60})]
    lengths = []
    for verbalizer in (LabelWords({"0": "good", "1": "bad"}), Written({"0": "good", "1": "bad"})):
        model = adapt(zoo.build("gpt2"), Task(TEMPLATE, ["0", "1"], verbalizer, max_length=40))
        lengths.append(model.encode(text)[0].length)
    assert lengths[0] == lengths[1]


def test_demonstrations_show_the_text_of_a_label():
    shown = Task("{demos:2}{text} so {mask}\n", ["0", "1"], Written({"0": "a good film", "1": "bad"}))
    model = Model(zoo.build("gpt2"), shown, [])
    rows = [Example({"text": "the plot"}, "0"), Example({"text": "the cat"}, "1")]
    model.demonstrate(rows)
    prompt = model.backbone.tokenizer.decode(model.encode([Example({"text": "not"})])[0].variants[0].ids)
    assert "the plot so a good film" in prompt
    with pytest.raises(ConfigError, match="shows a label's text, and '{choice1}' is another one in every example"):
        Model(zoo.build("gpt2"), Task("{demos:2}{text} so {mask}\n", ["0", "1"], Written(CHOICES)), []).demonstrate(
            [Example({**row.fields, "choice1": "a", "choice2": "b"}, row.label) for row in rows]
        )


def test_an_empty_text_of_a_label_is_said_with_the_label():
    model = adapt(zoo.build("gpt2"), Task(TEMPLATE, ["0", "1"], Written(CHOICES, longest=20)))
    with pytest.raises(DataError, match="the text of label '1' is empty in an example"):
        model.probabilities([Example({"text": "a", "choice1": "b", "choice2": " "})])
