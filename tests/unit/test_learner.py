"""Learning from episodes: the loss by hand, its gradient through the start, what is kept, and what is told."""

import json
import math
from itertools import islice

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import deltaprompt as dp
from deltaprompt.data import class_episodes, sentence_episodes
from deltaprompt.data.episodes import Episode, split_by_span_label
from deltaprompt.data.tagged import of_words
from deltaprompt.errors import ConfigError, DataError, StoreError
from deltaprompt.model import Model
from deltaprompt.model.episodic import Episodic
from deltaprompt.model.learner import Learner
from deltaprompt.model.many import open_many
from deltaprompt.model.tagger import Tagger
from deltaprompt.model.transitions import Moves
from deltaprompt.trainer import Plan, Training, fit, fit_many
from deltaprompt.types import Example, Span
from tests import backbones_zoo as zoo
from tests import command, files

WORDS = {"cats": "cat", "dogs": "dog", "films": "film", "plots": "plot"}
ROWS = [
    Example({"text": f"{a} {w} {b}"}, name)
    for name, w in WORDS.items()
    for a in ("the", "a")
    for b in ("was", "is", "")
]
SENTENCES = [
    of_words(f"{a} {w} was {b} .".split(), [Span(0, 2, name)])
    for name, w in WORDS.items()
    for a in ("the", "a")
    for b in ("good", "bad", "not bad")
]
QUICK = Training(steps=3, batch_size=2, learning_rate=0.02)
MANY = (
    dp.ProtoNet(),
    dp.ProtoNet(metric="dot"),
    dp.Prototypes(),
    dp.NNShot(),
    dp.HyperProto(),
    dp.HyperProto(metric="cone"),
    dp.HyperProto(metric="gaussian", one_shot=1.0),
    dp.ProtoVerb(dim=8),
)


def drawn(count=4, ways=3, shots=2, queries=2, spans=False, seed=0):
    draw = sentence_episodes if spans else class_episodes
    return list(islice(draw(SENTENCES if spans else ROWS, ways, shots, queries, seed), count))


def made(family="bert-encoder", slots=1, deltas=None, dtype=torch.float32, **more):
    template = more.pop("template", "{text}" if family == "bert-encoder" else "{text} was {mask}")
    deltas = [dp.LoRA(rank=2)] if deltas is None else deltas
    return Learner(zoo.build(family, dtype), Episodic(template, **more), deltas, range(slots))


def shaken(learner):
    for n, (_, tensor) in enumerate(learner.parts()):
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(n)).to(tensor.dtype)
    return learner


# The loss


@pytest.mark.parametrize("family", ["bert-encoder", "bert", "gpt2"])
def test_the_loss_of_an_episode_is_that_of_prototypical_networks(family):
    learner = shaken(made(family))
    episodes = drawn()
    out = learner(learner.collate(learner.encode(episodes)))
    model, each = learner.model, []
    for episode, logits in zip(episodes, out["logits"], strict=True):
        sides = (episode.support, episode.query)
        given, asked = ([model.embed(model.features, [Example(r.fields)])[0] for r in own] for own in sides)
        names = [row.label for row in episode.support]
        means = [
            torch.stack([h for h, own in zip(given, names, strict=True) if own == name]).mean(0)
            for name in episode.labels
        ]
        right = torch.tensor([episode.labels.index(row.label) for row in episode.query])
        scores = torch.stack([torch.stack([-((h - z) ** 2).sum() for z in means]) for h in asked])
        assert_close(logits, scores, atol=1e-4, rtol=1e-4)
        each.append(cross_entropy(scores, right))
    assert_close(out["loss"], torch.stack(each).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("verbalizer", MANY)
@pytest.mark.parametrize("steps", [0, 2])
def test_the_gradient_goes_through_the_start(verbalizer, steps):
    learner = shaken(made(dtype=torch.float64, verbalizer=verbalizer, steps=steps, rate=0.01))
    learner.train()
    batch = learner.collate(learner.encode(drawn(2)))
    learner(batch)["loss"].backward()
    (_name, tensor), *_ = [part for part in learner.parts() if part[0].endswith(".b")]
    slope, place = tensor.grad.flatten(), int(tensor.grad.abs().argmax())
    assert slope[place] != 0
    losses = []
    for side in (1e-6, -1e-6):
        with torch.no_grad():
            tensor.view(-1)[place] += side
            losses.append(float(learner(batch)["loss"]) if not steps else None)
            tensor.view(-1)[place] -= side
    if not steps:
        assert slope[place] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-3)


def test_without_a_gradient_through_the_support_it_would_be_another():
    """The law above can fail: with the support's states cut off the slope differs."""
    learner = shaken(made(dtype=torch.float64))
    batch = learner.collate(learner.encode(drawn(1)))
    learner(batch)["loss"].backward()
    whole = [t.grad.clone() for _, t in learner.parts()]
    start = dp.ProtoNet.start
    cut = lambda self, w, s, texts, support, classes: start(self, w, s, texts, support.detach(), classes)  # noqa: E731
    learner.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp.ProtoNet, "start", cut)
        learner(batch)["loss"].backward()
    assert any((a - t.grad).abs().max() > 1e-9 for a, (_, t) in zip(whole, learner.parts(), strict=True))


def test_steps_on_the_support_lower_its_loss():
    losses = []
    for steps in (0, 5):
        learner = made(verbalizer=dp.HyperProto(), steps=steps, rate=0.05)
        episode = drawn(1)[0]
        again = Episode(episode.support, episode.support, episode.labels)
        losses.append(learner.measure(learner.encode([again]))["loss"])
    assert losses[1] < losses[0]


@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_texts_that_are_read_once_are_answered_as_in_each_episode(spans, steps):
    learner = shaken(made(spans=spans, verbalizer=dp.HyperProto(), steps=steps))
    rows = learner.encode(drawn(5, ways=2, shots=1, queries=1, spans=spans))
    each = learner._measured(rows, 2, 0, learner)
    for once, own in zip(learner.answered(rows, 4), each, strict=True):
        assert_close(once.scores, own.scores, atol=1e-5, rtol=1e-5)
        assert once.classes.tolist() == own.classes.tolist()


@pytest.mark.parametrize("spans", [False, True])
def test_episodes_in_one_batch_are_answered_as_each_alone(spans):
    learner = shaken(made(spans=spans))
    rows = learner.encode(drawn(4, ways=2, shots=1, queries=1, spans=spans))
    together = learner._measured(rows, 4, 0, learner)
    for row, own in zip(rows, together, strict=True):
        (alone,) = learner._measured([row], 1, 0, learner)
        assert_close(own.scores, alone.scores, atol=1e-5, rtol=1e-5)
        assert own.classes.tolist() == alone.classes.tolist()


def test_words_outside_are_a_class_of_every_episode():
    learner = made(spans=True)
    rows = learner.encode(drawn(2, ways=2, shots=1, queries=1, spans=True))
    assert all(own.scores.shape[1] == 3 for own in learner.answered(rows, 2))
    assert all(0 in row.targets for row in rows)


# Learning


def test_what_learns_from_episodes_tells_others_better():
    learner, test = made(deltas=[dp.LoRA(rank=4)]), drawn(40, seed=1)
    untrained = learner.evaluate(test)["accuracy"]
    fit(learner, drawn(60), drawn(10, seed=2), training=Training(epochs=3, batch_size=4, learning_rate=2e-2))
    assert learner.evaluate(test)["accuracy"] > max(untrained, 0.9)


def test_several_learn_as_each_would_alone():
    plans = [Plan(drawn(6, seed=seed), drawn(2, seed=9), QUICK, seed=seed) for seed in range(2)]
    many = made(slots=2, dtype=torch.float64)
    fit_many(many, plans)
    for seed in range(2):
        alone = Learner(zoo.build("bert-encoder", torch.float64), Episodic(), [dp.LoRA(rank=2)], [seed])
        fit(alone, plans[seed].train, plans[seed].dev, training=QUICK, seed=seed)
        for name, tensor in alone.stored().items():
            assert_close(many.stored(seed)[name], tensor, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("spans", [False, True])
def test_what_is_saved_answers_the_same(tmp_path, spans):
    learner = made(spans=spans, verbalizer=dp.HyperProto())
    episodes = drawn(4, ways=2, shots=1, queries=1, spans=spans)
    fit(learner, episodes, training=QUICK, out=tmp_path / "a")
    before = learner.evaluate(episodes)
    learner.adapted.remove()
    again = dp.open(tmp_path / "a", zoo.build("bert-encoder"))
    assert isinstance(again, Learner)
    assert again.evaluate(episodes) == before
    again.adapted.remove()
    with pytest.raises(StoreError, match="learns from episodes"):
        open_many([tmp_path / "a"], zoo.build("bert-encoder"))


@pytest.mark.parametrize("spans", [False, True])
def test_what_has_learned_answers_as_its_episodes_do(spans):
    learner = shaken(made(spans=spans, verbalizer=dp.NNShot()))
    (episode,) = drawn(1, ways=2, shots=1, queries=1, spans=spans)
    (answered,) = learner.answered(learner.encode([episode]), 1)
    model = learner.learned(episode.support, episode.labels)
    assert isinstance(model, Tagger if spans else Model)
    if spans:
        p = torch.cat(model.probabilities(episode.query))
    else:
        p = model.probabilities(episode.query)
    assert_close(p, answered.scores.softmax(-1), atol=1e-5, rtol=1e-4)


def test_the_steps_that_an_episode_takes_are_taken_by_what_has_learned():
    learner = shaken(made(verbalizer=dp.HyperProto(), steps=5, rate=0.5))
    (episode,) = drawn(1, ways=2, shots=2, queries=1)
    (answered,) = learner.answered(learner.encode([episode]), 1)
    p = learner.learned(episode.support, episode.labels).probabilities(episode.query)
    assert_close(p, answered.scores.softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spans", [False, True])
def test_what_cannot_learn_from_a_support_keeps_its_deltas(spans):
    learner = made(spans=spans, deltas=[dp.LoRA(rank=2)])
    (episode,) = drawn(1, ways=2, shots=1, queries=1, spans=spans)
    count = learner.parameter_count()
    with pytest.raises(DataError, match="no row to learn 'none of them' from"):
        learner.learned(episode.support, [*episode.labels, "none of them"])
    assert learner.parameter_count() == count > 0


# Told


def test_the_interval_is_of_the_mean_of_episodes():
    learner, episodes = made(), drawn(20)
    told = learner.evaluate(episodes)
    each = [own.accuracy for own in learner.answered(learner.encode(episodes), 4)]
    mean = sum(each) / 20
    wide = 1.96 * (sum((x - mean) ** 2 for x in each) / 19 / 20) ** 0.5
    assert told == pytest.approx({"accuracy": mean, "low": mean - wide, "high": mean + wide})


def test_a_query_that_is_its_own_support_is_found_whole():
    learner = made(spans=True, verbalizer=dp.NNShot(each=100))
    (episode,) = drawn(1, ways=2, shots=1, queries=1, spans=True)
    told = learner.evaluate([Episode(episode.support, episode.support, episode.labels)])
    assert told["f1"] == told["precision"] == told["recall"] == 1.0
    assert set(told) == {"precision", "recall", "f1", "macro_f1", "fp", "fn", "within", "outer", "low", "high"}


def test_moves_of_other_data_count():
    learner = made(spans=True, verbalizer=dp.ProtoNet(scale=1e-6), moves=Moves(start_out=9, out_out=9, out_in=1))
    told = learner.evaluate(drawn(3, ways=2, shots=1, queries=1, spans=True))
    assert told["recall"] == 0.0


def test_only_what_trains_is_counted_and_kept():
    learner = made(deltas=[])
    assert learner.parameter_count() == 0
    assert learner.stored() == {}
    assert {name for name in made(deltas=[], verbalizer=dp.ProtoVerb(dim=8)).stored()} == {"verbalizer.w"}


# What is wrong


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made(verbalizer=dp.SoftVerbalizer()), "does not start from labelled examples"),
        (lambda: made(verbalizer=dp.LabelDescriptions({"a": "b"})), "does not start from labelled examples|sentences"),
        (lambda: made(verbalizer=dp.Prototypes(descriptions={"O": "a", "1": "b"})), "sentences about labels"),
        (lambda: made(verbalizer=dp.SphericalPrototypes()), "learns bias, weight for each label"),
        (lambda: made(steps=-1), "steps >= 0"),
        (lambda: made(rate=math.nan), "rate above 0"),
        (lambda: made("bert", spans=True, template="{text}"), "encoder's states"),
        (lambda: made(spans=True, template="{text}!"), "texts as they are"),
        (lambda: made(moves=Moves()), "spans=True"),
        (lambda: made().evaluate([]), "no episodes"),
        (lambda: made().evaluate(ROWS[:2]), "episode 1 is no episode but Example"),
        (lambda: fit(made(), ROWS), "train episode 1 is no episode"),
        (lambda: made().evaluate(drawn(1), slot=3), "0 to 0 are possible"),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: Episode((), e.query, e.labels), "0 rows to learn from"),
        (lambda e: Episode(e.support, (), e.labels), "0 to tell"),
        (lambda e: Episode(e.support[:1], e.query, e.labels), "no row to learn"),
        (lambda e: Episode(e.support, (Example({"text": "a"}, "z"),), e.labels), "asks for 'z'"),
    ],
)
def test_episodes_that_cannot_be_learned_from_are_told(change, message):
    with pytest.raises(DataError, match=f"episode 2 .*{message}"):
        made().evaluate([drawn(1)[0], change(drawn(1)[0])])


# The command line


@pytest.fixture
def csv(tmp_path):
    return files.written(tmp_path / "a.csv", "text,label\n" + "".join(f"{r.fields['text']},{r.label}\n" for r in ROWS))


@pytest.mark.parametrize("more", [(), ("--delta", "none"), ("--verbalizer", "hyper_proto:unbiased=true")])
def test_episodes_of_texts_at_the_command_line(csv, tmp_path, more):
    out = tmp_path / "out"
    asked = ("--ways", 2, "--episodes", 4, "--test-episodes", 3, "--out", out, "--json", *more)
    told = command.last_json(command.succeeds("episodes", "--data", csv, *asked))
    assert set(told["test"]) == {"accuracy", "low", "high"}
    answers = command.succeeds("predict", out, "-", "--support", csv, "--json", stdin="the cat was\n").stdout
    assert set(json.loads(answers)["scores"]) == set(WORDS)
    assert "give --support" in command.fails("predict", out, csv)
    measured = command.last_json(command.succeeds("evaluate", out, csv, "--support", csv, "--json"))
    assert measured["examples"] == len(ROWS)


def test_episodes_of_spans_at_the_command_line(tmp_path):
    rows = [
        {"tokens": f"{a} {w} was {b}".split(), "tags": ["O", f"B-{name}", "O", "O"]}
        for name, w in WORDS.items()
        for a in ("the", "a")
        for b in ("good", "bad", "not", "great", "it", "the", "a", "was")
    ]
    data = files.rows(tmp_path / "a.jsonl", *rows)
    recipe = files.written(
        tmp_path / "a.toml",
        f'seeds = "0-1"\n[data]\ntrain = "{data}"\n[episodes]\nspans = true\nways = 2\ntrain = 4\ntest = 3\n'
        'structured = true\n[task.verbalizer]\nkind = "nn_shot"\n',
    )
    done = command.succeeds("episodes", recipe)
    assert "test F1" in done.stdout
    assert "mean ± std" in done.stdout
    assert "2 ways, 1 shots, NNShot, LoRA" in done.stderr


def test_no_sentence_is_trained_on_and_measured():
    rows = [of_words(["Ann", str(n), "Rome"], [Span(0, 1, "per"), Span(2, 3, "loc")]) for n in range(20)]
    train, test = split_by_span_label([*rows, of_words(["Bob"], [Span(0, 1, "per")])])
    assert (len(train), len(test)) == (10, 11)
    assert not {row.fields["text"] for row in train} & {row.fields["text"] for row in test}
    assert {span.label for row in train for span in row.spans} == {"loc"}
    assert {span.label for row in test for span in row.spans} == {"per"}


def test_steps_legacy_and_what_is_no_part_of_episodes(csv, tmp_path):
    rows = [
        {"tokens": [a, w, "was", b], "tags": ["O", f"B-{name}", "O", "O"]}
        for name, w in WORDS.items()
        for a in ("the", "a", "some")
        for b in ("good", "bad", "not", "great")
    ]
    data = files.rows(tmp_path / "a.jsonl", *rows)
    recipe = f'[data]\ntrain = "{data}"\n[training]\nsteps = 1\n[episodes]\nspans = true\nways = 2\ntest = 9\n'
    path = files.written(tmp_path / "a.toml", recipe + "train = 4\nlegacy = true\n")
    command.succeeds("episodes", path, "--out", tmp_path / "out", "--delta", "bitfit")
    record = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert record["episodic"]["legacy"] is True
    assert record["training"]["run"]["steps"] == 1
    path = files.written(tmp_path / "b.toml", f'[data]\ntrain = "{csv}"\n[task]\nseveral = true\n')
    assert "several in [task] is not for episodes" in command.fails("episodes", path)
    path = files.written(tmp_path / "b.toml", f'[data]\ntrain = "{csv}"\n[masks]\n')
    assert "[masks] is not for episodes" in command.fails("episodes", path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ways", 3), "3 ways are asked for, and the labels are 2"),
        (("--shots", 9), "9 shots and 1 queries take 10"),
        (("--verbalizer", "soft"), "does not start from labelled examples"),
        (("--resume",), "--resume needs --out"),
    ],
)
def test_what_is_wrong_at_the_command_line(csv, options, message):
    assert message in command.fails("episodes", "--data", csv, "--ways", 2, "--episodes", 2, *options)
