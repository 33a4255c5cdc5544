"""Metrics of spans: by hand, against brute force and seqeval, as Few-NERD's code counts, and with an interval."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaprompt.data import in_words, read_tagged
from deltaprompt.data.tags import spans_of, tags_of
from deltaprompt.errors import ConfigError
from deltaprompt.model.span_metrics import (
    Counts,
    Errors,
    by_label,
    count,
    errors,
    flattened,
    interval,
    measures,
    pooled,
)
from deltaprompt.types import Span

LABELS = ("person-actor", "person-other", "art-film", "misc")
quick = settings(max_examples=100, deadline=None)
io_text = st.lists(st.sampled_from(["O", "O", *LABELS]), max_size=8)
bio_tags = st.sampled_from(["O", *(f"{letter}-{label}" for letter in "BI" for label in ("x", "y"))])
pairs_of_tags = st.lists(st.lists(st.tuples(bio_tags, bio_tags), min_size=1, max_size=9), min_size=1, max_size=6)


def of(*tags: str) -> list[list[Span]]:
    """The spans of texts in IO, each written as in "a a O b"."""
    return [spans_of(text.split(), "io") for text in tags]


def test_counts_by_hand() -> None:
    gold, found = of("a a O b", "O c c", "O"), of("a a O c", "O O c", "b")
    assert count(gold, found, [4, 3, 1]) == Counts(right=1, found=4, gold=3)
    told = measures(gold, found, [4, 3, 1])
    assert told == {
        "precision": 1 / 4,
        "recall": 1 / 3,
        "f1": 2 / 7,
        "macro_f1": (1 + 0 + 0) / 3,
        "fp": 1 / 8,
        "fn": 1 / 8,
        "within": 0.0,
        "outer": 1 / 2,
    }
    assert by_label(gold, found, [4, 3, 1]) == {"a": Counts(1, 1, 1), "b": Counts(0, 1, 1), "c": Counts(0, 2, 1)}


def test_errors_by_hand() -> None:
    gold = of("person-actor O art-film art-film O misc")
    found = of("person-other O person-actor person-actor misc misc")
    assert errors(gold, found, [6]) == Errors(false_positive=1, false_negative=0, words=6, within=1, outer=1, placed=2)
    assert errors(gold, of("O O art-film O O misc"), [6]) == Errors(0, 2, 6, 0, 0, 1)


@quick
@given(st.lists(st.tuples(io_text, io_text), min_size=1, max_size=6))
def test_brute_force(texts: list[tuple[list[str], list[str]]]) -> None:
    pairs = [(g[:n], f[:n]) for g, f in texts for n in [min(len(g), len(f))]]
    sides = [[spans_of(pair[side], "io") for pair in pairs] for side in (0, 1)]
    lengths = [len(g) for g, _ in pairs]
    everything = [{(t, *span) for t, own in enumerate(side) for span in own} for side in sides]
    right, counts = everything[0] & everything[1], count(*sides, lengths)
    assert counts == Counts(len(right), len(everything[1]), len(everything[0]))
    found = errors(*sides, lengths)
    words = [(a, b) for g, f in pairs for a, b in zip(g, f, strict=True)]
    assert found.false_positive == sum(a == "O" != b for a, b in words)
    assert found.false_negative == sum(b == "O" != a for a, b in words)
    assert found.words == len(words)
    places = [{span[:3]: span[3] for span in side} for side in everything]
    placed = [(places[0][p], places[1][p]) for p in places[0].keys() & places[1].keys()]
    same = sum(a != b and a.split("-")[0] == b.split("-")[0] for a, b in placed)
    assert (found.within, found.outer, found.placed) == (same, sum(a != b for a, b in placed) - same, len(placed))
    assert found.placed == counts.right + found.within + found.outer
    assert pooled(by_label(*sides, lengths).values()) == counts


@quick
@given(st.lists(st.tuples(io_text, io_text), min_size=1, max_size=6))
def test_pooling_is_counting_at_once(texts: list[tuple[list[str], list[str]]]) -> None:
    pairs = [(g[:n], f[:n]) for g, f in texts for n in [min(len(g), len(f))]]
    gold, found = ([spans_of(pair[side], "io") for pair in pairs] for side in (0, 1))
    lengths = [len(g) for g, _ in pairs]
    each = [(gold[i : i + 1], found[i : i + 1], lengths[i : i + 1]) for i in range(len(pairs))]
    assert pooled(count(*one) for one in each) == count(gold, found, lengths)
    assert sum((errors(*one) for one in each), Errors()) == errors(gold, found, lengths)


# Few-NERD's own counting


def counted_as_few_nerd_does(gold: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> list[float]:
    """Restated: labels of all words of a batch in one row, spans as runs of one label, errors as in its code."""
    rows = [[label for text in side for label in text] for side in (gold, found)]
    spans = []
    for row in rows:
        at, own = 0, list[tuple[int, int, str]]()
        for label, run in groupby(row):
            size = len(list(run))
            own += [(at, at + size, label)] if label != "O" else []
            at += size
        spans.append({*own})
    placed = [(a[2], b[2]) for a in spans[0] for b in spans[1] if a[:2] == b[:2]]
    within = sum(a != b and a.split("-")[0] == b.split("-")[0] for a, b in placed)
    outer = sum(a.split("-")[0] != b.split("-")[0] for a, b in placed)
    fp = sum(a == "O" and b != "O" for a, b in zip(*rows, strict=True))
    fn = sum(a != "O" and b == "O" for a, b in zip(*rows, strict=True))
    return [len(spans[0] & spans[1]), len(spans[1]), len(spans[0]), fp, fn, len(rows[0]), within, outer, len(placed)]


@quick
@given(st.lists(st.tuples(io_text, io_text), min_size=1, max_size=6))
def test_legacy_counts_over_one_sequence(texts: list[tuple[list[str], list[str]]]) -> None:
    pairs = [(g[:n], f[:n]) for g, f in texts for n in [min(len(g), len(f))]]
    gold, found = ([spans_of(pair[side], "io") for pair in pairs] for side in (0, 1))
    lengths = [len(g) for g, _ in pairs]
    c, e = count(gold, found, lengths, legacy=True), errors(gold, found, lengths, legacy=True)
    expected = counted_as_few_nerd_does([g for g, _ in pairs], [f for _, f in pairs])
    assert [c.right, c.found, c.gold] == expected[:3]
    assert [e.false_positive, e.false_negative, e.words, e.within, e.outer, e.placed] == expected[3:]
    assert pooled(by_label(gold, found, lengths, legacy=True).values()) == c


def test_legacy_runs_go_on_into_the_next_text() -> None:
    gold = of("O a", "a O", "b")
    assert flattened(gold, [2, 2, 1]) == [(1, 3, "a"), (4, 5, "b")]
    assert count(gold, of("O a", "a O", "b"), [2, 2, 1]) == Counts(3, 3, 3)
    assert count(gold, of("O a", "a O", "b"), [2, 2, 1], legacy=True) == Counts(2, 2, 2)
    assert count(gold, of("O a", "O O", "b"), [2, 2, 1]) == Counts(2, 2, 3)
    assert count(gold, of("O a", "O O", "b"), [2, 2, 1], legacy=True) == Counts(1, 2, 2)
    assert measures(gold, of("O a", "O O", "b"), [2, 2, 1], legacy=True)["f1"] == 0.5


# seqeval

SEQEVAL = [  # what seqeval 1.2.2 says of gold and found tags: precision, recall, F1, macro F1
    (["B-x I-x O B-y"], ["B-x I-x O B-y"], (1.0, 1.0, 1.0, 1.0)),
    (["B-x I-x O B-y"], ["B-x O O B-y"], (0.5, 0.5, 0.5, 0.5)),
    (["B-x I-x O B-y", "I-x O"], ["I-x I-x O B-x", "B-x B-y"], (0.5, 2 / 3, 4 / 7, 0.4)),
    (["B-x B-x I-x"], ["B-x I-x I-x"], (0.0, 0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(("gold", "found", "expected"), SEQEVAL)
def test_what_seqeval_said(gold: list[str], found: list[str], expected: tuple[float, ...]) -> None:
    sides = [[spans_of(text.split(), "bio") for text in side] for side in (gold, found)]
    told = measures(*sides, [len(text.split()) for text in gold])
    assert [told[name] for name in ("precision", "recall", "f1", "macro_f1")] == pytest.approx(expected)


@quick
@given(pairs_of_tags)
@pytest.mark.filterwarnings("ignore")  # of seqeval's where nothing is there or found
def test_seqeval_says_the_same_on_bio(texts: list[list[tuple[str, str]]]) -> None:
    seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    tags = [[[pair[side] for pair in text] for text in texts] for side in (0, 1)]
    told = measures(*([spans_of(text, "bio") for text in side] for side in tags), [len(text) for text in texts])
    assert told["precision"] == pytest.approx(seqeval.precision_score(*tags))
    assert told["recall"] == pytest.approx(seqeval.recall_score(*tags))
    assert told["f1"] == pytest.approx(seqeval.f1_score(*tags))
    if any(tag != "O" for side in tags for text in side for tag in text):
        assert told["macro_f1"] == pytest.approx(seqeval.f1_score(*tags, average="macro"))


# The interval


def test_the_interval_is_of_episodes_drawn_anew() -> None:
    chance = random.Random(0)
    parts = [Counts(chance.randrange(5), 6, 5 + chance.randrange(3)) for _ in range(40)]
    low, high = interval(parts, seed=3, draws=4000)
    assert (low, high) == interval(parts, seed=3, draws=4000) != interval(parts, seed=4, draws=4000)
    assert low < pooled(parts).f1 < high
    generator = np.random.default_rng(11)
    drawn = [pooled([parts[i] for i in generator.integers(40, size=40)]).f1 for _ in range(4000)]
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    narrow = interval(parts, seed=3, draws=4000, share=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert interval(parts * 9, seed=3)[1] - interval(parts * 9, seed=3)[0] < (high - low) / 2


def test_episodes_that_are_alike_have_no_interval() -> None:
    assert interval([Counts(1, 2, 3)] * 5) == pytest.approx((0.4, 0.4))
    assert interval([Counts()]) == (0.0, 0.0)


# What is wrong


def test_nothing_found_and_nothing_there() -> None:
    assert measures([[]], [[]], [3]) == dict.fromkeys(
        ("precision", "recall", "f1", "macro_f1", "fp", "fn", "within", "outer"), 0.0
    )
    assert measures([], [], [])["f1"] == 0.0


@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 1, 2), (2, 2, 1)])
def test_each_text_has_one_of_each(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(
        ConfigError, match="texts with right spans, .* with found ones and .* lengths; each text has one"
    ):
        measures([[]] * sizes[0], [[]] * sizes[1], [1] * sizes[2])


@pytest.mark.parametrize("options", [{"episodes": []}, {"draws": 0}, {"share": 1.0}])
def test_an_interval_of_nothing(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="possible: one episode or more, draws >= 1, share between 0 and 1"):
        interval(**({"episodes": [Counts(1, 1, 1)]} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["crossner/ai_dev", "wikigold/test", "resume_ner/dev"])
def test_real_spans_with_planted_mistakes(data_dir, name: str) -> None:
    texts = read_tagged(data_dir / f"{name}.jsonl.gz")
    gold, lengths = [in_words(text) for text in texts], [len(text.words) for text in texts]
    assert measures(gold, gold, lengths)["f1"] == measures(gold, gold, lengths)["macro_f1"] == 1.0
    missed = [spans[1:] for spans in gold]
    n, left = sum(map(len, gold)), sum(map(len, missed))
    assert count(gold, missed, lengths) == Counts(left, left, n)
    assert errors(gold, missed, lengths).false_negative == sum(s[0].end - s[0].start for s in gold if s)
    counts = Counter(span.label for spans in gold for span in spans)
    assert {label: own.gold for label, own in by_label(gold, missed, lengths).items()} == dict(counts)
    assert [tags_of(spans, size, "bio") for spans, size in zip(gold, lengths, strict=True)]
