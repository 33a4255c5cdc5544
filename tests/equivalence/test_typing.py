"""PLET's scores against brute force: the full model, the full vocabulary, one row, one token, one word at a time."""

from functools import cache

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.backbone import load
from deltaprompt.calibrations.batch import BatchCalibration
from deltaprompt.calibrations.contextual import Contextual
from deltaprompt.calibrations.contextualised import Contextualised
from deltaprompt.calibrations.domain_pmi import DomainPMI
from deltaprompt.data.entities import mention
from deltaprompt.errors import ConfigError
from deltaprompt.model import Model, Task
from deltaprompt.templates.entity import HARD1, HARD3
from deltaprompt.types import Example
from deltaprompt.verbalizers.hierarchical import Hierarchical
from deltaprompt.verbalizers.label_words import LabelWords
from tests import backbones_zoo as zoo
from tests.equivalence.test_scoring import log_p, of_length

CLOSE = {"atol": 1e-6, "rtol": 1e-6}
FAMILIES = ["bert", "gpt2", "t5"]
ROWS = [
    mention("", "the cat", " sat on the mat ;"),
    mention("a good ", "film", " and a great plot"),
    mention("it was bad , ", "the dog", ""),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        built = zoo.build(family)
        built.model.save_pretrained(where / family)
        built.tokenizer.save_pretrained(where / family)
    return where


@cache
def loaded(path):
    return load(path, dtype="float64", device="cpu")


def word_log_p(model, example, word):
    """log p(word | prompt) by plain forward passes."""
    encoded, ids = model.encode([example])[0], model.features.answer_ids(word)
    ask = lambda **inputs: log_p(model.adapted, inputs, 0)  # noqa: E731
    if model.backbone.kind == "masked":
        row = next(r for r in encoded.variants if len(r.at) == len(ids))
        return sum(float(ask(input_ids=row.ids)[0, at, i]) for at, i in zip(row.at, ids, strict=True))
    row, total = encoded.variants[0], 0.0
    for n, i in enumerate(ids):
        if model.backbone.kind == "causal":
            total += float(ask(input_ids=row.ids + ids[:n])[0, -1, i])
        else:
            total += float(ask(input_ids=row.ids, decoder_input_ids=row.decoder + ids[:n])[0, -1, i])
    return total


@torch.no_grad()
def expected(model, words, examples, mean="geometric", prior=None):
    """Class scores, each type by itself: the mean over its words of log p, or the log of the mean of p."""
    every = list(dict.fromkeys(word for own in words.values() for word in own))
    prior = dict.fromkeys(every, 0.0) if prior is None else prior
    scores = []
    for example in examples:
        found = {word: word_log_p(model, example, word) - prior[word] for word in every}
        row = []
        for own in words.values():
            each = torch.tensor([found[word] for word in own], dtype=torch.float64)
            row.append(each.mean() if mean == "geometric" else each.exp().mean().log())
        scores.append(torch.stack(row))
    return torch.stack(scores).log_softmax(-1)


def logits_of(model, examples=ROWS):
    with torch.no_grad():
        return model(model.features.collate(model.encode([Example(e.fields) for e in examples])))["logits"]


def made(path, words, template=HARD3, **options):
    calibration = options.pop("calibration", None)
    verbalizer = Hierarchical(words=words, **options)
    return Model(loaded(str(path)), Task(template, tuple(words), verbalizer, calibration=calibration), [])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", [HARD1, HARD3])
@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 2, 3)])
def test_scores_are_those_of_brute_force(folder, family, template, mean, lengths):
    a, b, c = of_length(family, lengths, template="{text} It is {mask}")
    words = {"/a": (a,), "/a/b": (a, b), "/a/b/c": (a, b, c), "/d": (c,)}  # words that types share
    model = made(folder / family, words, template, mean=mean)
    lone = [len(model.features.answer_ids(word)) for word in (a, b, c)]
    assert tuple(lone) == lengths
    assert_close(logits_of(model).double(), expected(model, words, ROWS, mean), **CLOSE)
    model.adapted.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prior_is_taken_from_every_distinct_word(folder, family):
    a, b, c = of_length(family, (1, 2, 1), template="{text} It is {mask}")
    words = {"/a": (a,), "/a/b": (a, b), "/c": (c,)}
    for calibration in (Contextual(("no",)), Contextualised(size=3)):
        model = made(folder / family, words, calibration=calibration)
        model.calibrate(ROWS)
        free = ROWS if isinstance(calibration, Contextualised) else [Example(dict.fromkeys(ROWS[0].fields, "no"))]
        every = [a, b, c]
        each = torch.tensor([[word_log_p(model, e, w) for w in every] for e in free], dtype=torch.float64)
        prior = each.log_softmax(-1).mean(0).log_softmax(-1)  # of one text it is its own
        want = expected(model, words, ROWS, prior=dict(zip(every, prior.tolist(), strict=True)))
        assert_close(logits_of(model).double(), want, **CLOSE)
        model.adapted.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
@pytest.mark.parametrize(
    "calibration",
    [None, Contextual(("no", "not")), Contextualised(size=2), DomainPMI("it is {mask}"), BatchCalibration()],
)
def test_words_that_types_do_not_share_are_plain_label_words(folder, family, mean, calibration):
    a, b, c, d = of_length(family, (1, 2, 1, 3), template="{text} It is {mask}")
    words = {"/a": (a, b), "/b": (c,), "/c": (d,)}
    found = []
    for verbalizer in (Hierarchical(words=words, mean=mean), LabelWords(words, mean=mean)):
        task = Task(HARD3, tuple(words), verbalizer, calibration=calibration)
        model = Model(loaded(str(folder / family)), task, [])
        if calibration is not None:
            model.calibrate(ROWS)
        found.append(logits_of(model))
        model.adapted.remove()
    assert_close(*found, **CLOSE)


def test_the_loss_of_one_label_is_the_cross_entropy_over_types(folder):
    words = {"/good": ("good",), "/good/film": ("good", "film"), "/bad": ("bad",)}
    model = made(folder / "bert", words)
    labelled = [Example(row.fields, label) for row, label in zip(ROWS, words, strict=True)]
    scores = expected(model, words, ROWS)
    with torch.no_grad():
        loss = model(model.features.collate(model.encode(labelled)))["loss"]
    assert_close(loss.double(), -scores.diagonal().mean(), **CLOSE)
    model.adapted.remove()


@pytest.mark.parametrize(
    ("label", "of", "words"),
    [
        ("/person/artist/actor", "path", ("person", "artist", "actor")),
        ("/person/artist/actor", "leaf", ("actor",)),
        ("person-artist/author", "path", ("person", "artist", "author")),
        ("person-artist/author", "leaf", ("artist", "author")),
        ("person-other", "leaf", ("person",)),
        ("other-law", "path", ("law",)),
        ("other", "path", ("other",)),
        ("/ORGANIZATION/GOVERNMENT", "path", ("organization", "government")),
        ("/WORK_OF_ART/BOOK", "path", ("work", "art", "book")),
        ("/location/location", "path", ("location",)),
        ("basketball_player", "path", ("basketball", "player")),
        ("the_thing", "path", ("the", "thing")),
        ("location-GPE", "leaf", ("geopolitical",)),
    ],
)
def test_the_words_of_a_type(label, of, words):
    given = {"location-GPE": "geopolitical"}
    assert Hierarchical(of=of, words=given).named(label) == words


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (("/good", "/other/good"), {}, "labels '/good' and '/other/good' have the same words to this vocabulary"),
        (("/good/film", "/bad/film"), {"of": "leaf"}, "have the same words to this vocabulary"),
        (("/good", "/bad"), {"words": {"/so": "so"}}, "there is no label '/so' to have words"),
        (("/good", "/ß∂ƒ"), {}, "is unknown to this vocabulary"),
    ],
)
def test_words_that_do_not_tell_types_apart_are_an_error(folder, labels, options, message):
    with pytest.raises(ConfigError, match=message):
        Model(loaded(str(folder / "bert")), Task(HARD3, labels, Hierarchical(**options)), [])


def test_a_plain_encoder_and_two_masks_are_an_error():
    with pytest.raises(ConfigError, match="label words need a language model"):
        Model(zoo.build("bert-encoder"), Task(HARD3, ("/good", "/bad"), Hierarchical()), [])
    with pytest.raises(ConfigError, match=r"label words answer at one \{mask\}, and the template has 2"):
        Model(zoo.build("bert"), Task("{text} {mask} {mask}", ("/good", "/bad"), Hierarchical()), [])


def test_the_same_words_in_another_order_score_the_same_and_learn_apart():
    labels = ("bad_film", "film_bad", "cat")
    model = Model(zoo.build("bert"), Task(HARD3, labels, Hierarchical(), several=True), [])
    before = logits_of(model)
    assert_close(before[:, 0], before[:, 1])
    with torch.no_grad():
        model.scorer.tensors["odds"][0, 1] += 1.0
    assert_close(logits_of(model)[:, 1], before[:, 1] + 1.0)


def test_types_in_the_thousands_are_no_larger_than_their_words():
    labels = [f"/{a}/{b}" for a in ("good", "bad", "great") for b in ("film", "plot", "cat")]
    model = Model(zoo.build("bert"), Task(HARD3, labels, Hierarchical()), [])
    words = model.scorer.get_buffer("ids")
    assert len(words) == 6
    assert model.scorer.get_buffer("at").shape == (9, 2)
