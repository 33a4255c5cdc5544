"""Calibrations: content-free texts become uniform, priors are kept, and what is missing is said."""

import re

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.calibrations._base import spread
from deltaprompt.calibrations.batch import BatchCalibration
from deltaprompt.calibrations.contextual import Contextual
from deltaprompt.calibrations.contextualised import Contextualised
from deltaprompt.calibrations.domain_pmi import DomainPMI
from deltaprompt.errors import ConfigError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.model.many import open_many
from deltaprompt.model.saved import open_
from deltaprompt.registry import variants
from deltaprompt.types import Example
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.prototypes import Prototypes
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo

LABELS = ("up", "down", "so")
WORDS = {"up": ("good", "great film"), "down": "bad", "so": ("not", "the")}
TEMPLATE = "{text} It was {mask}"
TEXTS = ["good", "a good film and a great plot", "not", "the cat sat on the mat", "no", "a film"]
EXAMPLES = [Example({"text": text}, LABELS[i % 3]) for i, text in enumerate(TEXTS)]
EACH = {"contextual": Contextual(), "contextualised": Contextualised(), "domain_pmi": DomainPMI("it was {mask}")}
EACH |= {"batch": BatchCalibration()}
UNIFORM = torch.full((1, 3), 1 / 3)


def task(calibration, verbalizer=None):
    return Task(TEMPLATE, LABELS, verbalizer or LabelWords(WORDS), calibration=calibration)


def test_every_calibration_is_tried_here():
    assert set(EACH) == set(variants("calibrations"))


@pytest.mark.parametrize("verbalizer", [LabelWords(WORDS), LabelWords(WORDS, mean="geometric"), SoftVerbalizer()])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_content_free_text_becomes_uniform(family, verbalizer):
    model = adapt(zoo.build(family), task(Contextual(), verbalizer))
    free = [Example({"text": "N/A"})]
    assert_close(model.probabilities(free), UNIFORM, atol=1e-6, rtol=0)
    assert not torch.allclose(model.probabilities(EXAMPLES), UNIFORM, atol=1e-3)


def test_of_several_content_free_texts_the_mean_becomes_uniform():
    model = adapt(
        zoo.build("bert"), task(Contextual(("N/A", "")), LabelWords({"up": "good", "down": "bad", "so": "a"}))
    )
    prior = model.scorer.tensors["prior"][0].exp()
    each = model.probabilities([Example({"text": text}) for text in ("N/A", "")]) * prior  # up to a factor a row
    plain = each / each.sum(-1, keepdim=True)
    assert_close(plain.mean(0), prior, atol=1e-6, rtol=0)


def test_a_batch_s_mean_becomes_uniform_after_one_step_of_its_correction():
    backbone = zoo.build("bert")
    model = adapt(backbone, task(None))
    plain = model.probabilities(EXAMPLES)
    model.adapted.remove()
    model = adapt(backbone, task(BatchCalibration()))
    model.calibrate(EXAMPLES)
    ratio = plain / plain.mean(0)
    assert_close(model.probabilities(EXAMPLES), ratio / ratio.sum(-1, keepdim=True), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", EACH)
def test_a_prior_is_saved_and_opened(name, tmp_path):
    backbone = zoo.build("bert")
    model = Model(backbone, task(EACH[name]), [], [0])
    model.calibrate(EXAMPLES)
    before = model.probabilities(EXAMPLES)
    model.save(tmp_path / "one")
    model.adapted.remove()
    opened = open_(tmp_path / "one", backbone)
    assert torch.equal(opened.probabilities(EXAMPLES), before)
    assert opened.task.calibration == EACH[name]
    opened.adapted.remove()
    many = open_many([tmp_path / "one"], backbone).predict(TEXTS, "one")
    assert_close(torch.tensor([list(p["scores"].values()) for p in many]), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", EACH)
def test_a_prior_is_of_its_own_slot_and_changes_nothing_but_scores(name):
    model = Model(zoo.build("bert"), task(EACH[name]), [], [0, 1])
    model.calibrate(EXAMPLES, slot=0)
    model.calibrate(EXAMPLES[:1], slot=1)
    same = torch.allclose(model.probabilities(EXAMPLES, slot=0), model.probabilities(EXAMPLES, slot=1), atol=1e-6)
    assert same == (not EACH[name].needs_texts)


def test_what_has_not_been_measured_does_not_answer():
    model = adapt(zoo.build("bert"), task(Contextualised()))
    with pytest.raises(ConfigError, match=r"Contextualised has not been measured; give model.calibrate\(examples\)"):
        model.probabilities(EXAMPLES)
    with pytest.raises(ConfigError, match="contextualised calibration needs texts of the task"):
        model.calibrate()


def test_a_calibration_waits_for_the_start_of_prototypes():
    model = adapt(zoo.build("bert"), task(Contextual(), Prototypes()))
    with pytest.raises(ConfigError, match="has no start yet"):
        model.probabilities(EXAMPLES)
    model.start(EXAMPLES)
    model.calibrate()
    assert_close(model.probabilities([Example({"text": "N/A"})]), UNIFORM, atol=1e-6, rtol=0)


def test_bad_options_are_said():
    with pytest.raises(ConfigError, match="a template without fields, got text"):
        DomainPMI("{text} is {mask}")
    with pytest.raises(ConfigError, match="size >= 1"):
        Contextualised(size=0)
    with pytest.raises(ConfigError, match="size >= 1"):
        BatchCalibration(size=0)
    with pytest.raises(ConfigError, match="needs content-free texts"):
        Contextual(())
    with pytest.raises(ConfigError, match="needs content-free texts, such as .* got 'N/A'"):
        Contextual("N/A")


def test_texts_are_taken_evenly_spaced():
    texts = [Example({"text": str(i)}) for i in range(10)]
    assert [e.fields["text"] for e in spread(texts, 4)] == ["0", "2", "5", "7"]
    assert spread(texts, 12) == texts


@pytest.mark.parametrize(
    ("template", "domain", "message"),
    [
        (TEMPLATE, "it was {mask} {mask}", "has 2 masks, and the task's template 1; give as many"),
        (TEMPLATE, "{soft:3} it was {mask}", "a domain is text and {mask}, got {soft:3}"),
        (TEMPLATE, "{prefix:3} it was {mask}", "a domain is text and {mask}, got {prefix:3}"),
    ],
)
def test_a_domain_that_does_not_fit_the_task_is_refused(template, domain, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        adapt(zoo.build("bert"), Task(template, LABELS, LabelWords(WORDS), calibration=DomainPMI(domain)))


def test_a_prior_is_of_a_start_and_of_a_prompt():
    model = adapt(zoo.build("bert"), task(BatchCalibration(), Prototypes()))
    with pytest.raises(ConfigError, match="has no start yet"):
        model.calibrate(EXAMPLES)
    model.start(EXAMPLES)
    model.calibrate(EXAMPLES)
    before = model.probabilities(EXAMPLES)
    model.start(EXAMPLES[:3])
    with pytest.raises(ConfigError, match="has not been measured"):
        model.probabilities(EXAMPLES)
    model.start(EXAMPLES)
    model.calibrate(EXAMPLES)
    assert torch.equal(model.probabilities(EXAMPLES), before)


def test_other_demonstrations_need_another_prior():
    shown = Task("{demos:2}{text} so {mask}\n", LABELS, LabelWords(WORDS), calibration=Contextualised())
    model = Model(zoo.build("gpt2"), shown, [])
    model.demonstrate(EXAMPLES)
    model.calibrate(EXAMPLES)
    model.probabilities(EXAMPLES)
    model.demonstrate(EXAMPLES, seed=1)
    with pytest.raises(ConfigError, match="has not been measured"):
        model.probabilities(EXAMPLES)


def test_calibrating_a_task_without_calibration_is_said():
    model = adapt(zoo.build("bert"), task(None))
    with pytest.raises(ConfigError, match="this task has no calibration; give it one"):
        model.calibrate(EXAMPLES)
