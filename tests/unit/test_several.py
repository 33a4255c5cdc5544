"""Several labels an example: log-odds, their loss, what is chosen, from a row of data to a saved adaptation."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.data import few_shot, labels_of, read, split
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.model import Model, Task
from deltaprompt.model.many import open_many
from deltaprompt.model.saved import open_
from deltaprompt.model.several import chosen, log_odds, loss, right
from deltaprompt.trainer import Plan, Training, fit, fit_many
from deltaprompt.types import Example
from deltaprompt.verbalizers.hierarchical import Hierarchical
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.proto_verb import ProtoVerb
from deltaprompt.verbalizers.prototypes import Prototypes
from tests import backbones_zoo as zoo

WORDS = {"up": ("good", "great"), "down": "bad", "so": "not"}
LABELS = tuple(WORDS)
TEMPLATE = "{text} It was {mask}"
ROWS = [
    Example({"text": "a good film"}, labels=("up",)),
    Example({"text": "not a great plot"}, labels=("up", "so")),
    Example({"text": "it was bad"}, labels=("down",)),
    Example({"text": "the cat sat on the mat , not bad"}, labels=("down", "so")),
    Example({"text": "maybe"}, "so"),
    Example({"text": "good and bad , not there"}, labels=("so", "up", "down")),
]
QUICK = Training(steps=3, batch_size=4, learning_rate=0.05, verbalizer_learning_rate=0.05)


def task(verbalizer=None, template=TEMPLATE, several=True):
    return Task(template, LABELS, verbalizer or LabelWords(WORDS), several=several)


def made(verbalizer=None, family="bert", slots=1, deltas=()):
    return Model(zoo.build(family), task(verbalizer), deltas, range(slots))


def batch_of(model, rows=ROWS):
    return model.features.collate(model.encode(rows))


# Odds


@pytest.mark.parametrize("seed", range(3))
def test_log_odds_are_those_of_the_softmax(seed):
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4
    p = scores.softmax(-1)
    assert_close(log_odds(scores), (p / (1 - p)).log())
    assert_close(log_odds(scores).sigmoid(), p)
    assert_close(log_odds(scores + 7.0), log_odds(scores))


def test_log_odds_stay_finite_where_a_probability_rounds_to_one():
    scores = torch.tensor([[200.0, 0.0, -100.0], [0.0, 0.0, 0.0], [3.0, 3.0, -300.0]], requires_grad=True)
    found = log_odds(scores)
    assert_close(found[0], torch.tensor([200.0, -200.0, -300.0]))
    assert_close(found[1], torch.full((3,), -math.log(2.0)))
    assert_close(found[2], torch.tensor([0.0, 0.0, -303.0]) - torch.tensor([0.0, 0.0, math.log(2.0)]))
    found.tanh().sum().backward()
    assert scores.grad.isfinite().all()


def test_the_loss_is_the_mean_binary_cross_entropy_by_hand():
    scores, gold = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0]]), torch.tensor([[1, 0, 1], [0, 0, 1]]).bool()
    each = [
        -math.log(p if y else 1 - p)
        for row, own in zip(scores.tolist(), gold.tolist(), strict=True)
        for p, y in ((1 / (1 + math.exp(-s)), y) for s, y in zip(row, own, strict=True))
    ]
    assert_close(loss(scores, gold), torch.tensor(sum(each) / 6))


def test_the_loss_of_a_model_is_that_of_its_odds_by_hand():
    model = made()
    with torch.no_grad():
        model.scorer.tensors["odds"][0].copy_(torch.tensor([0.5, -1.0, 2.0]))
    out = model(batch_of(model))
    plain = Model(zoo.build("bert"), task(several=False), [])
    p = plain(batch_of(plain, [Example(row.fields) for row in ROWS]))["logits"].softmax(-1)
    odds = p / (1 - p) * torch.tensor([0.5, -1.0, 2.0]).exp()
    assert_close(out["logits"], odds.log())
    q = odds / (1 + odds)
    gold = torch.tensor([[label in row.gold for label in LABELS] for row in ROWS])
    assert_close(out["loss"], -torch.where(gold, q, 1 - q).log().mean())


def test_what_is_above_one_half_is_chosen_and_never_none():
    scores = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -0.5, -2.0], [0.0, 0.0, 0.0]])
    assert chosen(scores, several=True) == [[2, 0], [1], [0]]
    assert chosen(scores.sigmoid(), several=True, least=0.5) == [[2, 0], [1], [0]]
    assert chosen(scores, several=False) == [[2], [1], [0]]
    assert right(torch.tensor([2, 0])) == [[2], [0]]
    assert right(torch.tensor([[True, False, True], [False, True, False]])) == [[0, 2], [1]]


# A model


def test_before_anything_is_learned_a_probability_is_the_softmaxs():
    several, one = made(), Model(zoo.build("bert"), task(several=False), [])
    rows = [Example(row.fields) for row in ROWS]
    assert_close(several.probabilities(rows), one.probabilities(rows))
    assert [p["labels"][0] for p in several.predict(rows)] == [p["label"] for p in one.predict(rows)]


def test_predictions_are_all_labels_above_one_half():
    model = made()
    with torch.no_grad():
        model.scorer.tensors["odds"][0].copy_(torch.tensor([9.0, -9.0, 9.0]))
    for told in model.predict([row.fields["text"] for row in ROWS]):
        assert {*told["labels"]} == {"up", "so"}
        assert told["label"] == told["labels"][0]
        assert told["score"] == max(told["scores"].values())
        assert told["scores"]["down"] < 0.5


def test_evaluation_counts_sets_and_a_single_label_is_a_set_of_one():
    model = made()
    with torch.no_grad():
        model.scorer.tensors["odds"][0].copy_(torch.tensor([-9.0, -9.0, 9.0]))
    told = model.evaluate(ROWS)
    assert told["accuracy"] == pytest.approx(1 / 6)  # "maybe" alone is so and nothing else
    assert told["loose_macro_precision"] == told["loose_micro_precision"] == pytest.approx(4 / 6)
    assert told["loose_macro_recall"] == pytest.approx((0 + 1 / 2 + 0 + 1 / 2 + 1 + 1 / 3) / 6)
    assert told["loose_micro_recall"] == pytest.approx(4 / 10)
    assert told["macro_f1"] == pytest.approx((0 + 0 + 8 / 10) / 3)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("name", ["label_words", "hierarchical", "prototypes"])
def test_training_lowers_the_loss_and_the_result_is_kept(family, name, tmp_path):
    verbalizer = {
        "label_words": LabelWords(WORDS),
        "hierarchical": Hierarchical(words=WORDS),
        "prototypes": Prototypes(),
    }[name]
    model = made(verbalizer, family, deltas=[LoRA(rank=2)])
    model.start(ROWS)
    before = model(batch_of(model))["loss"].item()
    run = fit(model, ROWS, ROWS, training=QUICK, out=tmp_path / "a")
    assert run.best["loss"] < before
    assert {"accuracy", "macro_f1", "loose_macro_f1", "loose_micro_f1", "loss"} <= run.best.keys()
    assert run.trainable == model.parameter_count()
    texts = [row.fields["text"] for row in ROWS]
    want = model.predict(texts)
    model.adapted.remove()
    backbone = zoo.build(family)
    again = open_(tmp_path / "a", backbone)
    assert again.task.several
    assert again.predict(texts) == want
    again.adapted.remove()
    many = open_many([tmp_path / "a"], backbone).predict(texts, "a")
    assert [told["labels"] for told in many] == [told["labels"] for told in want]


def test_a_start_counts_a_row_for_each_of_its_labels():
    model = made(Prototypes())
    model.start(ROWS)
    h = model.embed(model.features, ROWS)
    unit = torch.nn.functional.normalize(h, dim=-1)
    up = unit[[0, 1, 5]].mean(0)
    assert_close(torch.nn.functional.normalize(model.scorer.tensors["z"][0, 0].detach(), dim=0), up / up.norm())


def test_slots_train_together_as_each_alone(tmp_path):
    plans = [Plan(ROWS, None, QUICK, seed=seed) for seed in range(2)]
    together = made(slots=2, deltas=[LoRA(rank=2)])
    fit_many(together, plans)
    for slot, plan in enumerate(plans):
        alone = Model(zoo.build("bert"), task(), [LoRA(rank=2)], [slot])
        fit(alone, plan.train, training=plan.training, seed=plan.seed)
        texts = [Example(row.fields) for row in ROWS]
        assert_close(together.probabilities(texts, slot=slot), alone.probabilities(texts), atol=1e-5, rtol=1e-5)


def test_without_several_nothing_has_changed_its_name_or_number():
    model = Model(zoo.build("bert"), task(several=False), [LoRA(rank=2)])
    assert {name for name, *_ in model.slot_parts() if not name.startswith("delta.")} == set()
    assert model.features.collate(model.encode([Example({"text": "a"}, "up")])).labels.tolist() == [0]
    told = model.evaluate([Example({"text": "a"}, "up"), Example({"text": "b"}, "so")])
    assert told.keys() == {"accuracy", "macro_f1"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made(ProtoVerb(dim=4)), "ProtoVerb has a loss of its own, for one label an example"),
        (
            lambda: Model(zoo.build("bert"), task(template="{demos:2} {text} It was {mask}"), []),
            "a demonstration shows one label, and this task gives several",
        ),
        (
            lambda: Model(zoo.build("bert"), [task(), task(several=False)], [], [0, 1]),
            "some give several labels and some one",
        ),
    ],
)
def test_what_is_made_for_one_label_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_several_labels_for_a_task_of_one_are_an_error():
    model = Model(zoo.build("bert"), task(several=False), [])
    with pytest.raises(
        DataError, match="an example has several labels, up, so, and the task gives one; give it several"
    ):
        model.encode(ROWS)
    assert model.encode([Example({"text": "a"}, labels=("so",))])[0].label == 2


# Rows


def test_a_list_in_the_label_column_is_read_as_labels(tmp_path):
    texts, numbers = tmp_path / "texts.jsonl", tmp_path / "numbers.jsonl"
    texts.write_text('{"text": "a", "label": ["x", "y", "x"]}\n{"text": "c", "label": "x"}')
    numbers.write_text('{"text": "b", "label": [3, 1.0]}')
    found = [*read(texts), *read(numbers)]
    assert [(e.label, e.labels, e.gold) for e in found] == [
        (None, ("x", "y"), ("x", "y")),
        ("x", (), ("x",)),
        (None, ("3", "1"), ("3", "1")),
    ]
    assert labels_of(found) == ("1", "3", "x", "y")
    assert read(texts, labelled=False)[0].labels == ()


@pytest.mark.parametrize("empty", [[], [""], ["x", None], [["x"]]])
def test_a_list_without_a_label_is_an_error_or_left_out(tmp_path, empty):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a", "label": empty}) + "\n" + json.dumps({"text": "b", "label": ["x"]}))
    with pytest.raises(DataError, match="line 1: the label is missing: column 'label' holds"):
        read(path)
    dropped = []
    assert [e.fields["text"] for e in read(path, on_empty=dropped.append)] == ["b"]
    assert len(dropped) == 1


MANY = [Example({"text": str(i)}, labels=("a",) + ("b",) * (i % 3 == 0) + ("c",) * (i % 4 == 0)) for i in range(40)]


@pytest.mark.parametrize("seed", range(3))
def test_shots_of_several_labels_are_some_rows_of_each_label(seed):
    drawn = {shots: few_shot(MANY, shots, seed) for shots in (1, 3, 5)}
    for shots, (train, dev) in drawn.items():
        texts = [e.fields["text"] for e in (*train, *dev)]
        assert len({*texts}) == len(texts)  # each row once
        for label in "abc":
            assert sum(label in e.gold for e in train) >= shots
            assert sum(label in e.gold for e in dev) >= 1
        assert len(train) <= 3 * shots
        assert len(dev) <= 3 * shots
    small, large = ({e.fields["text"] for e in drawn[n][0]} for n in (1, 5))
    assert small <= large
    assert drawn[3] == few_shot(MANY, 3, seed)


def test_a_label_of_few_rows_gives_what_it_has():
    rare = [*MANY, Example({"text": "rare"}, labels=("d", "a"))]
    train, dev = few_shot(rare, 5, 0)
    assert sum("d" in e.gold for e in train) == 1
    assert not any("d" in e.gold for e in dev)
    with pytest.raises(DataError, match="class 'd' has 1 row"):
        few_shot([Example(e.fields, e.labels[0]) for e in rare], 5, 0)


def test_a_split_of_several_labels_takes_a_share_of_each_combination():
    train, dev = split(MANY, 0.25, 0)
    assert sorted(e.fields["text"] for e in (*train, *dev)) == sorted(e.fields["text"] for e in MANY)
    for labels in {e.labels for e in MANY}:
        each = sum(e.labels == labels for e in MANY)
        assert sum(e.labels == labels for e in dev) == max(int(each * 0.25 + 0.5), 1)
