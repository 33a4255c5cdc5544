"""Single verbalizers on planted numbers: what is chosen, what is dropped, and their losses by loops."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.backbone.load import wrap
from deltaprompt.errors import ConfigError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.model.starting import looked_at
from deltaprompt.params import Weights
from deltaprompt.types import AtMask, Example
from deltaprompt.verbalizers._base import Setting
from deltaprompt.verbalizers._relevance import relevant
from deltaprompt.verbalizers.automatic import Automatic
from deltaprompt.verbalizers.dect import DecT
from deltaprompt.verbalizers.hierarchical import Hierarchical
from deltaprompt.verbalizers.knowledgeable import Knowledgeable
from deltaprompt.verbalizers.label_descriptions import LabelDescriptions
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.proto_verb import ProtoVerb
from deltaprompt.verbalizers.prototypes import Prototypes
from deltaprompt.verbalizers.rules import Rules
from deltaprompt.verbalizers.soft import SoftVerbalizer
from deltaprompt.verbalizers.written import Written
from tests import backbones_zoo as zoo

LABELS = ("up", "down", "so")


def setting(whole=()):
    return Setting(LABELS, "masked", 4, lambda word: [len(word)], 1, 50, whole_words=lambda: list(whole))


def at(hidden):
    return AtMask(hidden[:, None, None], torch.ones(len(hidden), 1, 1, dtype=torch.bool))


# KPT


def test_words_that_go_with_another_class_are_dropped():
    """Class names 0 and 3; word 1 goes with its name, 2 with the other's, 4 with its name, 5 with neither's."""
    generator = torch.Generator().manual_seed(0)
    first, second, other = torch.randn(3, 200, generator=generator)
    words = torch.stack([first, first + 0.1 * other, second + 0.1 * other, second, second + 0.1 * other, other], 1)
    member = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).bool()
    found = relevant(words, member, torch.tensor([0, 3]), torch.ones(6, dtype=torch.bool))
    assert found.tolist()[:5] == [True, True, False, True, True]


def test_relevance_is_the_paper_s_by_a_loop():
    words = torch.randn(30, 7, generator=torch.Generator().manual_seed(1))
    member = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]]).bool()
    found = relevant(words, member, torch.tensor([0, 3, 5]), torch.ones(7, dtype=torch.bool))
    centred = words - words.mean(0)
    for v in range(7):
        r = [max(0.0, float(torch.cosine_similarity(centred[:, v], centred[:, n], dim=0))) for n in (0, 3, 5)]
        own = r.pop([0, 0, 0, 1, 1, 2, 2][v])
        assert bool(found[v]) == (own > 0 and own * 2 >= sum(r))


def test_the_released_code_keeps_the_share_where_relevance_is_nearest_to_one():
    words = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    member = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]).bool()
    found = relevant(words, member, torch.tensor([0, 4]), torch.ones(8, dtype=torch.bool), legacy=True)
    centred, scores = words - words.mean(0), {}
    for v in range(8):
        r = [max(0.0, float(torch.cosine_similarity(centred[:, v], centred[:, n], dim=0))) for n in (0, 4)]
        own, other = r if v < 4 else r[::-1]
        scores[v] = own / other if other else math.inf  # a power mean of one is itself
        if not own:
            del scores[v]  # goes against its own class
    assert len(scores) < 8
    orders = [sorted((v for v in scores if v in of), key=lambda v: -scores[v]) for of in (range(4), range(4, 8))]
    counts = lambda share: [max(1, round(share * len(order))) for order in orders]  # noqa: E731
    miss = lambda share: sum(  # noqa: E731
        (min(scores[order[n - 1]], 10) - 1) ** 2 for order, n in zip(orders, counts(share), strict=True)
    )
    best = min((i / 100 for i in range(1, 101)), key=miss)
    kept = {v for order, n in zip(orders, counts(best), strict=True) for v in order[:n]}
    assert {v for v in range(8) if found[v]} == kept


def test_a_name_that_is_too_long_and_too_few_texts_are_said():
    words = {"up": ("a good film", "great"), "down": ("bad",), "so": ("not",)}
    with pytest.raises(ConfigError, match="the name of 'up', its first word, has 3 tokens; raise longest"):
        adapt(zoo.build("bert"), Task("{text} It was {mask}", LABELS, Knowledgeable(words)))
    model = adapt(zoo.build("bert"), Task("{text} It was {mask}", LABELS, Knowledgeable(words, longest=3)))
    with pytest.raises(ConfigError, match="has no start yet"):
        model.predict(["a film"])
    with pytest.raises(ConfigError, match="refined by what a model says to texts, and got 1"):
        model.start([Example({"text": "a film"})])


def test_relevance_is_not_asked_of_words_that_are_out_already():
    words = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    member = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    kept = torch.tensor([True, False, True, True])
    assert not relevant(words, member, torch.tensor([0, 2]), kept)[1]


def test_words_with_a_rare_token_are_dropped_and_names_are_not():
    words = {"up": ("good", "great"), "down": ("bad", "film"), "so": ("not", "cat")}
    model = adapt(zoo.build("bert"), Task("{text} It was {mask}", LABELS, Knowledgeable(words, relevance=False)))
    ids = model.scorer.get_buffer("ids")[:, 0]
    every = torch.zeros(2, model.backbone.vocabulary)
    every[:, ids] = torch.tensor([-9.0, -1.0, -9.0, -9.0, -1.0, -1.0])  # good, bad and film are the rarest tokens
    every[:, [i for i in range(every.shape[1]) if i not in ids.tolist()]] = -5.0
    support = torch.cat([torch.zeros(2, len(ids)), every], 1)
    start = model.verbalizer.start(model.scorer.slot(0), model.scorer.setting, every, support, torch.tensor([-1, -1]))
    assert start["kept"].tolist() == [1, 1, 1, 0, 1, 1]  # good and bad are names


def test_words_learn_their_weights():
    words = {"up": ("good", "great"), "down": ("bad", "film"), "so": ("not", "cat")}
    model = adapt(
        zoo.build("bert"), Task("{text} It was {mask}", LABELS, Knowledgeable(words, frequency=0.0, relevance=False))
    )
    assert model.parameter_count() == 6
    batch = model.features.collate(model.encode([Example({"text": "a film"}, "up")]))
    model(batch)["loss"].backward()
    assert model.scorer.tensors["alpha"].grad.any()
    assert model.scorer.tensors["kept"].grad is None


# PETAL


def test_the_words_of_a_class_are_those_that_it_alone_makes_likely():
    log_p = torch.full((6, 50), 0.01).log()
    classes = torch.tensor([0, 1, 2, 0, 1, 2])
    for c, words in enumerate(([5, 6], [7, 8], [9, 10])):
        log_p[classes == c, words[0]], log_p[classes == c, words[1]] = math.log(0.5), math.log(0.2)
    log_p[:, 11] = math.log(0.6)  # likely, and no sign of any class
    verbalizer, s = Automatic(size=2), setting(range(5, 40))
    found = verbalizer.start(Weights({}, False), s, log_p, log_p, classes)["ids"]
    assert found.tolist() == [[5, 6], [7, 8], [9, 10]]


def test_the_ratio_is_that_of_a_loop():
    log_p = torch.randn(7, 12, generator=torch.Generator().manual_seed(0)).log_softmax(-1).double()
    classes = torch.tensor([0, 0, 1, 2, 2, 2, 1])
    odds = [[float(v) - math.log1p(-math.exp(float(v))) for v in row] for row in log_p]
    got = Automatic()._each(log_p, classes, 3)
    for c in range(3):
        own = [row for row, of in zip(odds, classes.tolist(), strict=True) if of == c]
        others = [row for row, of in zip(odds, classes.tolist(), strict=True) if of != c]
        for word in range(12):
            want = sum(r[word] for r in own) / len(own) - sum(r[word] for r in others) / len(others)
            assert abs(float(got[c, word]) - want) < 1e-9


def test_only_whole_words_are_chosen_and_each_once():
    model = Model(zoo.build("bert"), Task("{text} It was {mask}", LABELS, Automatic(size=2)), [])
    model.start([Example({"text": text}, LABELS[i]) for i, text in enumerate(("good", "a bad film", "not"))])
    ids = model.scorer.tensors["ids"][0].long().flatten().tolist()
    assert len(set(ids)) == 6
    for i in ids:
        word = model.backbone.tokenizer.decode([i])
        assert word.isalpha()
        assert model.features.answer_ids(word) == [i]


def test_too_few_candidates_are_an_error():
    with pytest.raises(ConfigError, match="4 candidates are too few for 3 classes of 2 words each"):
        Automatic(size=2).start(
            Weights({}, False), setting(range(4)), torch.zeros(3, 50), torch.zeros(3, 50), torch.arange(3)
        )


# ProtoVerb


@pytest.mark.parametrize("legacy", [False, True])
def test_the_contrast_is_that_of_a_loop(legacy):
    generator = torch.Generator().manual_seed(0)
    h, w, z = (torch.randn(*shape, generator=generator).double() for shape in ((5, 4), (3, 4), (3, 3)))
    classes = torch.tensor([0, 0, 1, 1, 2])
    verbalizer = ProtoVerb(dim=3, scale=5.0, legacy=legacy)
    got = verbalizer.loss(Weights({"w": w, "z": z}, True), setting(), at(h), torch.zeros(5, 3), classes)
    v = [w @ row for row in h]
    scale = 1.0 if legacy else 5.0

    def cos(a, b):
        return scale * float(a @ b / a.norm() / b.norm())

    proto = [
        -math.log(math.exp(cos(v[i], z[c])) / sum(math.exp(cos(v[i], u)) for u in z)) for i, c in enumerate(classes)
    ]
    pairs = []
    for i, c in enumerate(classes):
        others = [j for j in range(5) if legacy or j != i]
        total = sum(math.exp(cos(v[i], v[j])) for j in others)
        own = [-math.log(math.exp(cos(v[i], v[j])) / total) for j in others if classes[j] == c]
        pairs += [sum(own) / len(own)] if own else []
    want = sum(proto) / len(proto) + sum(pairs) / len(pairs)
    assert_close(float(got), want / 3 if legacy else want, atol=1e-9, rtol=0)


def test_separable_features_are_told_apart_at_once():
    model = Model(zoo.build("bert"), Task("{text} It was {mask}", LABELS, ProtoVerb(dim=8)), [])
    examples = [Example({"text": text}, LABELS[i]) for i, text in enumerate(("good", "a bad film", "not the cat"))]
    model.start(examples)
    assert model.evaluate(examples)["accuracy"] == 1.0


# Rules


def test_rules_have_the_loss_of_their_classes_and_of_each_mask():
    rules = Rules({"up": ("good", "bad"), "down": ("bad", "film"), "so": ("good", "film")}, auxiliary=0.5)
    model = adapt(zoo.build("bert"), Task("{text} is {mask} , it was {mask}", LABELS, rules))
    examples = [Example({"text": "a film"}, "down"), Example({"text": "not"}, "so")]
    batch = model.features.collate(model.encode(examples))
    out = model(batch)
    states = model.at_mask(batch)
    joint, own = -out["logits"].log_softmax(-1)[[0, 1], batch.labels].mean(), []
    for m, words in enumerate((("good", "bad"), ("bad", "film"))):
        ids = torch.tensor([model.features.answer_ids(word)[0] for word in words])
        log_p = states.logits(states.hidden[:, 0, m], ids).log_softmax(-1)
        own.append(-sum(log_p[i, words.index(rules.rules[e.label][m])] for i, e in enumerate(examples)) / 2)
    assert_close(out["loss"], joint + 0.5 * (own[0] + own[1]) / 2)


def test_rules_of_one_mask_are_plain_label_words():
    words = {"up": "good", "down": "bad", "so": "not"}
    backbone, text = zoo.build("bert"), [Example({"text": "a film"})]
    one = adapt(backbone, Task("{text} It was {mask}", words))
    want = one.probabilities(text)
    one.adapted.remove()
    rules = adapt(backbone, Task("{text} It was {mask}", LABELS, Rules({k: (v,) for k, v in words.items()})))
    assert_close(rules.probabilities(text), want)


def test_bad_rules_are_said():
    backbone, template = zoo.build("bert"), "{text} is {mask} , it was {mask}"
    good = {"up": ("good", "bad"), "down": ("bad", "film"), "so": ("not", "film")}
    for rules, message in (
        (good | {"so": ("not",)}, "the rule of 'so' has words for 1 masks, and the template has 2"),
        (good | {"so": ("bad", "film")}, "labels 'down' and 'so' have the same rule"),
        (good | {"so": ("not", "good film")}, "has 2 tokens; at each mask stands a word of one"),
        ({k: v for k, v in good.items() if k != "so"}, "label 'so' has no rule"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapt(backbone, Task(template, LABELS, Rules(rules)))
    with pytest.raises(ConfigError, match="needs a masked model; this one is causal"):
        adapt(zoo.build("gpt2"), Task("{text} It was {mask}", LABELS, Rules({k: (v[0],) for k, v in good.items()})))


def test_of_two_classes_prototypes_and_words_both_count():
    """A standardised score of two classes is only a sign, and two signs would mostly tie."""
    words = {"up": "good", "down": "bad"}
    model = adapt(zoo.build("bert"), Task("{text} It was {mask}", ["up", "down"], ProtoVerb(dim=4, words=words)))
    rows = [
        Example({"text": text}, "up" if i % 2 else "down") for i, text in enumerate(("good", "not", "a film", "no"))
    ]
    model.start(rows)
    both = model.probabilities(rows)
    own = replace(model.verbalizer, words={})
    model.adapted.remove()
    alone = adapt(zoo.build("bert"), Task("{text} It was {mask}", ["up", "down"], own))
    with torch.no_grad():
        for name in ("w", "z"):
            alone.scorer.tensors[name].copy_(model.scorer.tensors[name])
    by_words = adapt(zoo.build("bert"), Task("{text} It was {mask}", ["up", "down"], LabelWords(words)))
    want = ((alone.probabilities(rows).log() + by_words.probabilities(rows).log()) / 2).softmax(-1)
    assert_close(both, want, atol=1e-5, rtol=0)
    assert len({round(float(p), 4) for p in both[:, 0]}) == len(rows)


def test_words_that_are_the_same_to_the_vocabulary_count_once():
    models = [
        adapt(zoo.build("bert"), Task("{text} It was {mask}", ["up", "down"], LabelWords({"up": own, "down": "bad"})))
        for own in (("good", "Good", "great"), ("good", "great"))
    ]
    assert torch.equal(*(model.probabilities([Example({"text": "a film"})]) for model in models))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: LabelWords({"up": "good"}, mean="median"), "mean = 'median' is not possible; possible: arithmetic"),
        (lambda: Knowledgeable({"up": "good"}, mean="median"), "mean = 'median'"),
        (lambda: Automatic(mean="median"), "mean = 'median'"),
        (lambda: Automatic(score="ratios"), "score = 'ratios' is not possible; possible: ratio, likelihood"),
        (lambda: Hierarchical(of="leafs"), "of = 'leafs' is not possible; possible: path, leaf"),
        (
            lambda: Rules({"up": "good", "down": "bad"}),
            "the rule of 'up' is one text, 'good'; write what stands at each mask",
        ),
        (lambda: Prototypes(scale=0), "prototypes: got scale=0; scale > 0"),
        (lambda: Prototypes(scale=math.nan), "got scale=nan"),
        (lambda: Prototypes(description_weight=math.nan), "prototypes: got description_weight=nan"),
        (lambda: ProtoVerb(scale=math.inf), "proto_verb: got scale=inf; scale > 0 is possible"),
        (lambda: ProtoVerb(dim=0), "proto_verb: got dim=0; dim >= 1 is possible"),
        (lambda: DecT(word_weight=math.nan), "dect: got word_weight=nan"),
        (lambda: DecT(dim=0), "dect: got dim=0"),
        (lambda: Rules({"up": ("good",)}, auxiliary=math.nan), "rules: got auxiliary=nan"),
        (lambda: SoftVerbalizer(init_std=-1), "soft: got init_std=-1"),
        (lambda: Written({"up": "good"}, longest=0), "written: got longest=0; a text has 1 token or more"),
        (lambda: LabelDescriptions({"up": "good"}, scale=-1), "label_descriptions: got scale=-1"),
        (lambda: Task("{text}", "ab"), "labels are names, each a text, in a list or a mapping; got 'ab'"),
        (lambda: Task("{text}", {0: "bad", 1: "good"}), "labels are names, each a text"),
    ],
)
def test_impossible_options_are_said(made, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        made()


def test_an_empty_word_is_said_with_its_label():
    with pytest.raises(ConfigError, match="a word of label 'up' is empty"):
        adapt(zoo.build("bert"), Task("{text} It was {mask}", {"up": ("good", " "), "down": "bad"}))


def test_types_with_the_same_words_in_another_order_are_refused():
    with pytest.raises(ConfigError, match="'good_film' and 'film_good' have the same words"):
        adapt(zoo.build("bert"), Task("{text} It was {mask}", ["good_film", "film_good"], Hierarchical()))


def test_rules_write_a_word_as_it_stands_at_its_own_mask():
    rules = {"up": ("it", "a"), "down": ("a", "it")}
    model = adapt(zoo.build("roberta"), Task("{text} is {mask}({mask})", ["up", "down"], Rules(rules)))
    first, second = [set(model.scorer.get_buffer(f"ids_{m}").tolist()) for m in (0, 1)]
    told = [sorted(model.backbone.tokenizer.decode([i]) for i in ids) for ids in (first, second)]
    assert told == [[" a", " it"], ["a", "it"]]


def test_a_start_looks_at_no_more_than_it_says(monkeypatch):
    rows = [Example({"text": f"{i}"}, "up" if i < 30 else "down") for i in range(40)]
    monkeypatch.setattr(Automatic, "most", 10)
    some = looked_at(Automatic(), rows, [])
    assert [sum(row.label == label for row in some) for label in ("up", "down")] == [5, 5]
    assert looked_at(Prototypes(), rows, rows) == rows
    assert looked_at(LabelDescriptions({"up": "good"}), rows, rows) == []
    monkeypatch.setattr(Knowledgeable, "most", 20)
    assert len(looked_at(Knowledgeable({"up": "good"}), rows, rows)) == 20


def test_an_empty_text_has_a_state_also_where_no_special_token_stands():
    gpt2 = zoo.build("gpt2")
    encoder = wrap(gpt2.model.transformer, gpt2.tokenizer, kind="encoder")
    model = adapt(encoder, Task("{text}", ["up", "down"], Prototypes()))
    model.start([Example({"text": "good"}, "up"), Example({"text": "bad"}, "down")])
    assert torch.isfinite(model.probabilities([Example({"text": ""})])).all()
