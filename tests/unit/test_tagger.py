"""Finding spans: which token stands for a word, windows of long texts, the loss by hand, and what is told of a text."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import deltaprompt as dp
from deltaprompt.data.tagged import in_words, of_words
from deltaprompt.errors import ConfigError, DataError, StoreError
from deltaprompt.features.words import best_window, window_starts
from deltaprompt.model.many import open_many
from deltaprompt.model.tagger import Tagger
from deltaprompt.model.tagging import Tagging
from deltaprompt.model.transitions import Moves, paths_of
from deltaprompt.trainer import Plan, Training, fit, fit_many
from deltaprompt.types import Example, Span
from tests import backbones_zoo as zoo
from tests import command, files

TYPES = ("animal", "film")
ROWS = [
    of_words(["the", "cat", "saw", "the", "good", "film", "."], [Span(0, 2, "animal"), Span(3, 6, "film")]),
    of_words(["a", "dog", "was", "not", "bad"], [Span(0, 2, "animal")]),
    of_words(["the", "plot", "of", "the", "great", "film"], [Span(3, 6, "film")]),
    of_words(["the", "dog", "the", "cat"], [Span(0, 2, "animal"), Span(2, 4, "animal")]),
    of_words(["it", "was", "terrible"]),
]
ENCODERS = ("bert-encoder", "mpnet-encoder")
QUICK = Training(steps=4, batch_size=3, learning_rate=0.02)


def made(family="bert-encoder", tagging=None, slots=1, deltas=None):
    deltas = [dp.LoRA(rank=2)] if deltas is None else deltas
    return Tagger(zoo.build(family), tagging or Tagging(TYPES), deltas, range(slots))


def windows_of(tagger, example):
    (found,) = tagger.words.windows([tagger.words.split(example)])
    return found


def test_what_would_do_nothing_is_refused():
    described = dp.Prototypes(descriptions={"O": "no name", "animal": "an animal", "film": "a film"})
    with pytest.raises(ConfigError, match="Prototypes starts from sentences about labels, .* leave them out"):
        made(tagging=Tagging(TYPES, scheme="io", verbalizer=described))
    tagger = made()
    with pytest.raises(ConfigError, match="1 unlabelled texts, and nothing is done with them by a Tagger"):
        fit(tagger, [], unlabelled=[ROWS[0]])
    blank = Example({"text": "\u200b"})
    for sets, which in (([[blank]], "training"), ([ROWS, [blank]], "dev")):
        with pytest.raises(DataError, match=f"nothing is left of the 1 {which} examples"):
            fit(tagger, *sets, training=QUICK)


# Words and their tokens


@pytest.mark.parametrize(
    "text", ["the cat saw it", "Unbelievably, the cat's film!", "  a\tb \n c ", "电影很好 good", "🙂 a 🙂"]
)
def test_a_word_is_read_at_the_first_token_that_has_a_character_of_it(text):
    tagger = made()
    row = tagger.words.split(Example({"text": text}))
    spans = tagger.features.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    (window,) = windows_of(tagger, row)
    for number, at in zip(window.words, window.row.at, strict=True):
        start, end = row.words[number]
        assert next(n for n, (a, b) in enumerate(spans) if b > a and b > start and a < end) == at


def test_texts_are_split_at_blanks_signs_and_ideographs_and_where_spans_begin_and_end():
    words = made().words
    example = words.split(Example({"text": "It's 电影, e-mail"}))
    assert [example.fields["text"][a:b] for a, b in example.words] == [
        "It",
        "'",
        "s",
        "电",
        "影",
        ",",
        "e",
        "-",
        "mail",
    ]
    cut = words.split(Example({"text": "unhappy"}, spans=(Span(2, 5, "film"),)))
    assert cut.words == ((0, 2), (2, 5), (5, 7))


@pytest.mark.parametrize(
    "text", ["हिन्दी में लिखो", "cafe\u0301 pen\u0303a", "می\u200cخواهم", "か\u3099 x ❤\ufe0f", "葛\U000e0100 a_b 3"]
)
def test_marks_stay_with_what_they_are_on(text):
    row = made().words.split(Example({"text": text}))
    assert [text[start:end] for start, end in row.words] == text.split()


def test_words_that_the_data_gives_stay():
    assert made().words.split(ROWS[0]).words == ROWS[0].words


@given(tokens=st.integers(0, 200), room=st.integers(4, 60))
@settings(max_examples=200, deadline=None)
def test_windows_cover_every_token_and_give_it_room(tokens, room):
    starts = window_starts(tokens, room)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert all(start + room <= tokens for start in starts) or starts == [0]
    for place in range(tokens):
        start = starts[best_window(place, starts, room, tokens)]
        assert start <= place < start + room
        quarter = room // 4 // 2
        assert start == 0 or place - start >= quarter
        assert start + room >= tokens or start + room - 1 - place >= quarter


def test_a_long_text_is_read_once_a_word_in_windows():
    tagger = made(tagging=Tagging(TYPES, max_length=12))
    row = of_words(["cat", "dog", "film"] * 30)
    found = windows_of(tagger, row)
    assert len(found) > 5
    assert max(len(window.row.ids) for window in found) == 12
    assert sorted(n for window in found for n in window.words) == list(range(90))
    (p,) = tagger.probabilities([row])
    assert_close(p.sum(-1), torch.ones(90))


def test_ten_thousand_characters_are_read_and_their_spans_stand_where_they_are():
    text = "the cat saw the film . " * 450
    (told,) = made().predict([text])
    assert told["text"] == text
    assert all(text[e["start"] : e["end"]] == e["text"] for e in told["entities"])


def test_room_for_no_token_is_an_error():
    with pytest.raises(ConfigError, match="max_length"):
        made(tagging=Tagging(TYPES, max_length=4)).predict(["the cat"])


# The loss


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("deltas", [[dp.LoRA(rank=2)], [dp.SoftPrompt(3)]])
def test_the_loss_is_the_mean_cross_entropy_of_words(family, deltas):
    tagger = made(family, deltas=deltas)
    for _, tensor in tagger.parts():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    out = tagger(tagger.collate(tagger.encode(ROWS)))
    head, scores, classes = dict(tagger.parts()), [], []
    for row in ROWS:
        (window,) = windows_of(tagger, row)
        batch = tagger.features.collate([tagger.encode([row])[0]])
        tagger.adapted.route(0)
        states = tagger.backbone.states(batch.inputs)[0]
        for number, at in zip(window.words, window.row.at, strict=True):
            scores.append(states[at] @ head["verbalizer.weight"][0].mT + head["verbalizer.bias"][0])
            classes.append(tagger.tagging.classes(row)[number])
    assert_close(out["logits"].log_softmax(-1), torch.stack(scores).log_softmax(-1), atol=1e-5, rtol=1e-5)
    assert_close(out["loss"], cross_entropy(torch.stack(scores), torch.tensor(classes)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scheme", "tags"), [("io", 3), ("bio", 5), ("bmes", 9), ("bioes", 9)])
def test_classes_are_the_schemes_tags_and_back(scheme, tags):
    tagging = Tagging(TYPES, scheme)
    assert len(tagging.tags) == tags
    for row in ROWS:
        spans = tagging.spans(tagging.classes(row))
        apart = scheme != "io" or row is not ROWS[3]  # two that touch are one where nothing tells them apart
        assert (spans == in_words(row)) == apart


# Learning


@pytest.mark.parametrize("scheme", ["io", "bio", "bmes"])
def test_what_trains_learns_its_rows(scheme):
    tagger = made(tagging=Tagging(TYPES, scheme), deltas=[dp.LoRA(rank=4)])
    rows = [row for row in ROWS if scheme != "io" or row is not ROWS[3]]
    run = fit(tagger, rows, rows, training=Training(steps=150, learning_rate=2e-2, verbalizer_learning_rate=5e-2))
    assert run.best["f1"] == 1.0
    assert tagger.evaluate(rows)["f1"] == 1.0
    (told,) = tagger.predict(["the cat saw the good film ."])
    assert [(e["text"], e["label"]) for e in told["entities"]] == [("the cat", "animal"), ("the good film", "film")]
    assert all(0.3 < e["score"] <= 1 for e in told["entities"])


@pytest.mark.parametrize(
    "verbalizer", [dp.ProtoNet(), dp.NNShot(), dp.HyperProto(), dp.Prototypes(), dp.SphericalPrototypes()]
)
@pytest.mark.parametrize("deltas", [[], [dp.LoRA(rank=2)]])
def test_what_starts_from_examples_starts_from_their_words(verbalizer, deltas):
    tagger = made(tagging=Tagging(TYPES, "io", verbalizer), deltas=deltas)
    with pytest.raises(ConfigError, match="start"):
        tagger.predict(["the cat"])
    fit(tagger, ROWS, training=QUICK)
    p = tagger.probabilities(ROWS)
    assert all(torch.isfinite(each).all() for each in p)


def test_the_nearest_word_is_itself():
    tagger = made(tagging=Tagging(TYPES, "io", dp.NNShot()), deltas=[])
    tagger.start(ROWS)
    rows = [row for row in ROWS if row is not ROWS[3]]
    found = [p.argmax(-1).tolist() for p in tagger.probabilities(rows)]
    assert found == [tagger.tagging.classes(row) for row in rows]


@pytest.mark.parametrize("together", [1, 3])
def test_several_train_as_each_would_alone(together):
    plans = [Plan(ROWS, ROWS, QUICK, seed=seed) for seed in range(3)]
    many = Tagger(zoo.build("bert-encoder", torch.float64), Tagging(TYPES), [dp.LoRA(rank=2)], range(3))
    fit_many(many, plans, together=together)
    for seed in range(3):
        alone = Tagger(zoo.build("bert-encoder", torch.float64), Tagging(TYPES), [dp.LoRA(rank=2)], [seed])
        fit(alone, ROWS, ROWS, training=QUICK, seed=seed)
        for name, tensor in alone.stored().items():
            assert_close(many.stored(seed)[name], tensor, atol=1e-9, rtol=1e-9)


def test_the_best_f1_is_kept_not_the_best_loss():
    from deltaprompt.trainer.run import headline, rank

    assert rank({"f1": 0.5, "accuracy": 0.1, "loss": 9.0}) > rank({"f1": 0.4, "accuracy": 0.9, "loss": 1.0})
    assert headline({"f1": 0.5, "accuracy": 0.1, "loss": 9.0}) == "f1 0.500"


# Kept


@pytest.mark.parametrize(
    "tagging", [Tagging(TYPES), Tagging(TYPES, "io", dp.NNShot(), 32, Moves(1, 2, 3, 4, 5, 6, 7), 0.5)]
)
def test_what_is_saved_finds_the_same(tmp_path, tagging):
    tagger = made(tagging=tagging)
    fit(tagger, ROWS, training=QUICK, out=tmp_path / "a")
    before = tagger.probabilities(ROWS)
    tagger.adapted.remove()
    again = dp.open(tmp_path / "a", zoo.build("bert-encoder"))
    assert isinstance(again, Tagger)
    assert again.tagging == replace(tagging, max_length=tagging.max_length)
    for one, other in zip(again.probabilities(ROWS), before, strict=True):
        assert_close(one, other, atol=0, rtol=0)


def test_taggers_are_not_opened_among_models_of_labels(tmp_path):
    made().save(tmp_path / "a")
    with pytest.raises(StoreError, match="finds spans"):
        open_many([tmp_path / "a"], zoo.build("bert-encoder"))


# Told


def test_f1_is_seqevals():
    from seqeval.metrics import f1_score

    tagger = made()
    told = tagger.evaluate(ROWS)
    paths = [paths_of(p.log(), [len(p)], tagger.transitions)[0].tolist() for p in tagger.probabilities(ROWS)]
    names = tagger.tagging.tags
    gold = [[names[n] for n in tagger.tagging.classes(row)] for row in ROWS]
    found = [[names[n] for n in path] for path in paths]
    assert told["f1"] == pytest.approx(f1_score(gold, found))


def test_predictions_follow_the_rules_of_the_scheme():
    tagger = made(tagging=Tagging(TYPES, "bmes"))
    for p in tagger.probabilities(ROWS):
        tags = [tagger.tagging.tags[n] for n in paths_of(p.log(), [len(p)], tagger.transitions)[0].tolist()]
        for a, b in zip(["O", *tags], [*tags, "O"], strict=True):
            assert (a[0] in "BM") == (b[0] in "ME")


def test_moves_of_other_data_count_in_the_path():
    scores = torch.tensor([[0.0, 0.1, 0.0]] * 4)
    plain = made(tagging=Tagging(TYPES, "io"))
    moved = made(tagging=Tagging(TYPES, "io", moves=Moves(start_out=9, out_out=9, out_in=1), tau=1.0))
    assert [path.tolist() for path in paths_of(scores, [3, 1], plain.transitions)] == [[1, 1, 1], [1]]
    assert [path.tolist() for path in paths_of(scores, [3, 1], moved.transitions)] == [[0, 0, 0], [0]]


def test_odd_texts_have_no_spans_and_break_nothing():
    told = made().predict(["", "   ", "\u200b", "🙂", "a\x00b", "ab " * 3000])
    assert [t["text"] for t in told][:2] == ["", "   "]
    assert told[0]["entities"] == told[1]["entities"] == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tagging(()), "a type or more"),
        (lambda: Tagging(("a", "a")), "each once"),
        (lambda: Tagging(("O",)), "none of them 'O'"),
        (lambda: Tagging(("a",), "bilou"), "possible: io, bio, bmes, bioes"),
        (lambda: Tagging(("a",), "bip"), "did you mean 'bio'"),
        (lambda: Tagging(("a",), moves=Moves()), "scheme 'io'"),
        (lambda: made("bert"), "kind='encoder'"),
        (lambda: made("gpt2"), "kind='encoder'"),
        (lambda: made().predict("the cat"), "a list"),
        (lambda: made().evaluate([]), "no examples"),
        (lambda: made().predict([{"body": "a"}]), "no field 'text'"),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_type_that_is_not_asked_for_is_told_with_its_example():
    rows = [ROWS[0], of_words(["a"], [Span(0, 1, "films")])]
    with pytest.raises(DataError, match="train example 2: .*'films'; did you mean 'film'"):
        fit(made(), rows)
    with pytest.raises(DataError, match="test example 2"):
        made().evaluate(rows)


# The command line


def test_fit_predict_and_evaluate_at_the_command_line(tmp_path):
    train = files.written(tmp_path / "a.conll", "the O\ncat B-animal\n\na O\nfilm B-film\n\nthe O\ndog B-animal\n")
    out = tmp_path / "out"
    options = ("--tagging", "--data", train, "--test", train, "--no-dev", "--steps", 3, "--out", out, "--json")
    told = command.last_json(command.succeeds("fit", *options))
    assert set(told["test"]) >= {"f1", "precision", "recall", "macro_f1"}
    measured = command.last_json(command.succeeds("evaluate", out, train, "--json"))
    assert measured["f1"] == pytest.approx(told["test"]["f1"]["mean"])
    assert measured["examples"] == 3
    lines = command.succeeds("predict", out, "-", "--json", stdin="the cat\n").stdout.splitlines()
    assert json.loads(lines[0])["text"] == "the cat"
    assert len(command.succeeds("predict", out, train).stdout.splitlines()) == 3
    rows = files.rows(tmp_path / "b.jsonl", {"tokens": ["a", "cat"]})
    assert json.loads(command.succeeds("predict", out, rows, "--json").stdout)["text"] == "a cat"
    assert "F1" in command.succeeds("evaluate", out, train).stdout


def test_few_sentences_and_seeds_at_the_command_line(tmp_path):
    rows = [{"tokens": ["a", "cat", str(n)], "tags": ["O", "B-animal", "O"]} for n in range(8)]
    data = files.rows(tmp_path / "a.jsonl", *rows)
    told = command.succeeds("fit", "--tagging", "--data", data, "--shots", 2, "--steps", 2, "--seeds", "0-1")
    assert "dev f1" in told.stdout
    assert "bio, LoRA" in told.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--generate", "{text}"), "give one of them"),
        (("--template", "{text}"), "[task] has no meaning"),
        (("--label", "kind"), "label in [data] has no meaning"),
        (("--grid", "learning_rate=1e-3,1e-4"), "[grid] has no meaning"),
        (("--shots", "5"), "has 1 spans; shots=5 needs"),
        (("--verbalizer", "prototype"), "did you mean 'prototypes'"),
    ],
)
def test_options_that_mean_nothing_beside_tagging(tmp_path, options, message):
    data = files.rows(tmp_path / "a.jsonl", {"tokens": ["a", "cat"], "tags": ["O", "B-animal"]})
    assert message in command.fails("fit", "--tagging", "--data", data, *options)
