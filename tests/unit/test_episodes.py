"""Episodes: laws of every sampler, the algorithm restated, files of episodes, and what cannot be dealt."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaprompt.data import (
    Episode,
    class_episodes,
    few_sentences,
    limited_to,
    read_episodes,
    read_relations,
    read_tagged,
    sentence_episodes,
    span_labels,
    split_by_label,
)
from deltaprompt.data.tagged import of_words
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.types import Example, Span
from tests import files

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32)


def classes(**counts: int) -> list[Example]:
    return [Example({"text": f"{name} {n}"}, name) for name, count in counts.items() for n in range(count)]


def sentence(number: int, labels: str) -> Example:
    """A sentence with a span of each letter, in a word of its own, between other words."""
    words = [f"{number}", *(word for label in labels for word in (label.upper(), "o"))]
    return of_words(words, [Span(1 + 2 * i, 2 + 2 * i, label) for i, label in enumerate(labels)])


def corpus(size: int, seed: int, labels: str = "abcdef") -> list[Example]:
    chance = random.Random(seed)
    return [sentence(n, "".join(chance.choices(labels, k=chance.choice((0, 1, 1, 2, 3))))) for n in range(size)]


def texts(rows: Sequence[Example]) -> list[str]:
    return [row.fields["text"] for row in rows]


def spans_in(rows: Sequence[Example]) -> Counter[str]:
    return Counter(span.label for row in rows for span in row.spans)


# Classes


@quick
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), seeds)
def test_class_episodes_have_their_shots_and_queries(ways: int, shots: int, queries: int, seed: int) -> None:
    rows = classes(a=6, b=7, c=9, d=6)
    for episode in islice(class_episodes(rows, ways, shots, queries, seed), 5):
        assert len(set(episode.labels)) == ways
        assert Counter(e.label for e in episode.support) == dict.fromkeys(episode.labels, shots)
        assert Counter(e.label for e in episode.query) == dict.fromkeys(episode.labels, queries)
        drawn = texts(episode.support) + texts(episode.query)
        assert len({*drawn}) == len(drawn)
        assert {*drawn} <= {*texts(rows)}


@pytest.mark.parametrize("sampler", ["class", "sentence"])
def test_the_seed_alone_says_which(sampler: str) -> None:
    def deal(seed: int) -> list[Episode]:
        if sampler == "class":
            return list(islice(class_episodes(classes(a=9, b=9, c=9), 2, 2, 2, seed), 6))
        return list(islice(sentence_episodes(corpus(90, 0), 3, 2, 1, seed), 6))

    random.seed(0)
    before = random.getstate()
    first = deal(5)
    random.seed(1)
    assert first == deal(5) != deal(6)
    random.seed(0)
    assert random.getstate() == before
    assert len({tuple(texts(e.support)) for e in first}) == 6


def test_every_label_and_row_is_drawn_as_often() -> None:
    rows = classes(a=4, b=4, c=4, d=4)
    dealt = list(islice(class_episodes(rows, 2, 1, 1, 0), 4000))
    for drawn in (
        Counter(label for e in dealt for label in e.labels),
        Counter(text for e in dealt for text in texts(e.support)),
        Counter(text for e in dealt for text in texts(e.query)),
    ):
        mean = drawn.total() / len(drawn)
        assert all(abs(n - mean) < 5 * mean**0.5 for n in drawn.values())
        assert len(drawn) in (4, 16)


def test_a_query_of_another_source_has_the_same_labels() -> None:
    here, there = (
        classes(a=3, b=3, c=3),
        [Example({"text": f"there {e.fields['text']}"}, e.label) for e in classes(b=2, c=2, d=2)],
    )
    for episode in islice(class_episodes(here, shots=3, queries=2, query_from=there), 9):
        assert {*episode.labels} == {"b", "c"}
        assert not any(text.startswith("there") for text in texts(episode.support))
        assert all(text.startswith("there") for text in texts(episode.query))
        assert Counter(e.label for e in episode.query) == {"b": 2, "c": 2}
    with pytest.raises(DataError, match="3 ways are asked for, and the labels of both sources are 2: b, c"):
        class_episodes(here, 3, query_from=there)
    with pytest.raises(DataError, match="'a' is no label of both sources; possible: b, c"):
        class_episodes(here, labels=["a", "b"], query_from=there)
    with pytest.raises(DataError, match="label 'b' has 2 rows .*3 shots and 3 queries take 3"):
        class_episodes(here, shots=3, queries=3, query_from=there)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 3}, "3 ways are asked for, and the labels are 2: a, b"),
        ({"labels": ["a", "bb"]}, "'bb' is no label; did you mean 'b'"),
        ({"shots": 2, "queries": 2}, r"label 'a' has 3 rows; 2 shots and 2 queries take 4; possible: .*labels=\['b'\]"),
        ({"shots": 9}, r"label 'a' has 3 rows \(and 1 more label has too few\); 9 shots and 1 queries take 10"),
    ],
)
def test_classes_that_cannot_be_dealt(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_episodes(classes(a=3, b=5), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", [class_episodes, sentence_episodes])
@pytest.mark.parametrize("options", [{"ways": 0}, {"shots": 0}, {"queries": -1}])
def test_numbers_that_are_not_possible(sampler: object, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="possible: ways >= 1, shots >= 1, queries >= "):
        sampler(classes(a=3, b=3), **options)  # type: ignore[operator]


def test_rows_that_are_of_no_use() -> None:
    with pytest.raises(DataError, match="example 1 has no label"):
        class_episodes([Example({"text": "a"})])
    with pytest.raises(DataError, match="example 2 has several labels; rows with one label each"):
        class_episodes([Example({"text": "a"}, "x"), Example({"text": "a"}, labels=("x", "y"))])
    with pytest.raises(DataError, match="no text has a span to sample by"):
        sentence_episodes([sentence(0, "")])
    with pytest.raises(ConfigError, match="tries=0: an episode takes 1 try or more"):
        sentence_episodes(corpus(20, 0), tries=0)


# Sentences


@quick
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 3), seeds)
def test_sentence_episodes_have_k_to_2k_spans_of_each_label(ways: int, shots: int, queries: int, seed: int) -> None:
    rows = corpus(300, seed)
    for episode in islice(sentence_episodes(rows, ways, shots, queries, seed), 5):
        assert len({*episode.labels}) == ways
        for side, least in ((episode.support, shots), (episode.query, queries)):
            counts = spans_in(side)
            assert {*counts} <= {*episode.labels}
            assert all(least <= counts[name] <= 2 * least for name in episode.labels)
            assert all(row.spans for row in side)
        drawn = texts(episode.support) + texts(episode.query)
        assert len({*drawn}) == len(drawn)


def restated(rows: Sequence[Example], ways: int, shots: int, queries: int, chance: random.Random) -> Iterator[Episode]:
    """methods.md 3.2 in as few words as it takes."""
    names = sorted({s.label for row in rows for s in row.spans})
    counts = [Counter(s.label for s in row.spans) for row in rows]

    def gather(target: list[str], k: int, used: list[int]) -> list[int] | None:
        candidates = [i for i, own in enumerate(counts) if own and own.keys() <= {*target} and i not in used]
        total, taken = Counter[str](), list[int]()
        while any(total[c] < k for c in target):
            if not candidates:
                return None
            i = candidates.pop(int(chance.random() * len(candidates)))
            fits = all(total[c] + n <= 2 * k for c, n in counts[i].items())
            if fits and any(total[c] < k for c in counts[i]):
                taken.append(i)
                total += counts[i]
        return taken

    while True:
        left, target = [*names], list[str]()
        for n in range(ways):  # a shuffle's first swaps
            j = n + int(chance.random() * (len(left) - n))
            left[n], left[j] = left[j], left[n]
            target.append(left[n])
        if (support := gather(target, shots, [])) is not None and (
            query := gather(target, queries, support)
        ) is not None:
            yield Episode(tuple(rows[i] for i in support), tuple(rows[i] for i in query), tuple(target))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("ways", "shots", "queries"), [(5, 1, 1), (3, 2, 1), (6, 3, 2), (2, 5, 5)])
def test_the_sequence_is_that_of_the_algorithm(seed: int, ways: int, shots: int, queries: int) -> None:
    rows = corpus(200, seed)
    expected = islice(restated(rows, ways, shots, queries, random.Random(seed)), 20)
    assert list(islice(sentence_episodes(rows, ways, shots, queries, seed), 20)) == list(expected)


def test_drawing_without_what_was_refused_is_drawing_with_it() -> None:
    """Few-NERD draws from all candidates again and again: what was refused once is refused until the set is full."""
    rows = [sentence(n, labels) for n, labels in enumerate(("a", "ab", "abb", "b", "aab", "bb", "a"))]
    counts = [Counter(s.label for s in row.spans) for row in rows]
    chance, ours, theirs = random.Random(0), Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for episode in islice(sentence_episodes(rows, 2, 1, 0, 3), 6000):
        ours[tuple(texts(episode.support))] += 1
        total, taken = Counter[str](), list[int]()
        while min(total["a"], total["b"]) < 1:
            i = chance.randrange(len(rows))
            fits = all(total[c] + n <= 2 for c, n in counts[i].items())
            if i not in taken and fits and any(total[c] < 1 for c in counts[i]):
                taken.append(i)
                total += counts[i]
        theirs[tuple(texts([rows[i] for i in taken]))] += 1
    assert {*ours} == {*theirs}
    assert all(abs(ours[key] - theirs[key]) < 5 * (ours[key] + theirs[key]) ** 0.5 for key in theirs)


def test_a_shift_of_domain() -> None:
    here, there = corpus(100, 0, "abcd"), [sentence(1000 + n, "bcd"[n % 3]) for n in range(60)]
    for episode in islice(sentence_episodes(here, 2, 2, 2, query_from=there), 10):
        assert {*episode.labels} <= {*"bcd"}
        assert all(int(text.split()[0]) >= 1000 for text in texts(episode.query))
        assert all(int(text.split()[0]) < 1000 for text in texts(episode.support))


@pytest.mark.parametrize("draws", [class_episodes, sentence_episodes])
def test_sources_that_overlap_have_no_row_on_both_sides(draws: Callable[..., Iterator[Episode]]) -> None:
    rows = classes(a=9, b=9) if draws is class_episodes else [sentence(n, "ab"[n % 2]) for n in range(18)]
    for episode in islice(draws(rows[:14], shots=1, queries=1, query_from=rows[4:], labels=["b"]), 20):
        assert not {*texts(episode.support)} & {*texts(episode.query)}
    with pytest.raises(DataError, match="all 18 rows of query_from are among the examples too; give rows of another"):
        draws(rows, query_from=rows)


def test_what_never_comes_together_says_what_lacks() -> None:
    rows = [sentence(n, "abb" if n % 2 else "b") for n in range(40)]
    dealt = sentence_episodes(rows, 2, 3, 1, tries=20)  # 3 of "a" bring 6 of "b": no room for one more sentence
    message = r"no episode of 2 labels with 3 spans of each to learn from and 1 to be told .* in 20 tries; most often"
    with pytest.raises(DataError, match=message + r", in \d+, 'a' lacked some.*limited_to"):
        list(islice(dealt, 200))
    alone = [sentence(n, "a") for n in range(9)] + [sentence(n, "bc") for n in range(9, 18)]
    with pytest.raises(DataError, match="'[bc]' lacked some"):
        next(sentence_episodes(alone, 2, labels=["a", "b"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 3}, "3 ways are asked for, and the labels are 2: a, b"),
        ({"labels": ["x"]}, "'x' is no label; possible: a, b"),
        ({"shots": 2, "queries": 1}, r"label 'b' has 2 spans; 2 shots and 1 queries take 3; possible: fewer of them"),
    ],
)
def test_sentences_that_cannot_be_dealt(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        sentence_episodes([sentence(n, labels) for n, labels in enumerate("aaabb")], **options)  # type: ignore[arg-type]


# Few sentences of all labels


@quick
@given(st.integers(1, 5), seeds)
def test_few_sentences_cover_each_label_and_none_could_go(shots: int, seed: int) -> None:
    rows = corpus(200, seed)
    train, dev = few_sentences(rows, shots, seed)
    assert (train, dev) == few_sentences(rows, shots, seed)
    assert not {*texts(train)} & {*texts(dev)}
    left = spans_in(rows) - spans_in(train)
    for side, wanted in ((train, dict.fromkeys("abcdef", shots)), (dev, {c: min(shots, left[c]) for c in "abcdef"})):
        counts = spans_in(side)
        assert all(counts[name] >= n for name, n in wanted.items())
        for row in side:
            assert any(counts[s.label] - spans_in([row])[s.label] < wanted[s.label] for s in row.spans)
    assert texts(few_sentences(rows, shots, seed, dev=False)[0]) == texts(train)


@quick
@given(seeds)
def test_few_sentences_to_choose_by_are_not_those_to_train_on(seed: int) -> None:
    train, dev = few_sentences([sentence(n % 9, "ab") for n in range(40)], 2, seed)
    assert dev
    assert not {*texts(train)} & {*texts(dev)}
    with pytest.raises(DataError, match="all 3 texts with spans are needed to train; give more, or dev=False"):
        few_sentences([sentence(0, "a")] * 3, 1, seed)


def test_few_sentences_that_cannot_be_dealt() -> None:
    with pytest.raises(ConfigError, match="shots=0: a few-shot sample takes 1 span of each label or more"):
        few_sentences(corpus(20, 0), 0, 0)
    with pytest.raises(DataError, match="no text has a span to sample by"):
        few_sentences([sentence(0, "")], 1, 0)
    rows = [sentence(n, labels) for n, labels in enumerate(("a", "ab", "a"))]
    with pytest.raises(DataError, match="label 'b' has 1 spans; shots=2 needs 2 of each; possible: fewer shots"):
        few_sentences(rows, 2, 0)
    with pytest.raises(DataError, match="all 1 texts with spans are needed to train; give more, or dev=False"):
        few_sentences(rows[1:2], 1, 0)
    assert texts(few_sentences(rows, 1, 0)[0]) == texts(rows[1:2])


# Labels


def test_other_labels_are_outside() -> None:
    rows = [sentence(0, "abc"), sentence(1, "c"), sentence(2, "")]
    found = limited_to(rows, ["a", "b"])
    assert [[s.label for s in row.spans] for row in found] == [["a", "b"], [], []]
    assert [(row.fields, row.words) for row in found] == [(row.fields, row.words) for row in rows]
    assert {*texts(next(sentence_episodes(found, 2, 1, 0)).support)} == {texts(rows)[0]}
    with pytest.raises(DataError, match="no span has the label 'd'; possible: a, b, c"):
        limited_to(rows, ["a", "d"])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("share", "count"), [(0.5, 4), (0.25, 2), (0.01, 1), (0.99, 7)])
def test_a_split_by_label_keeps_each_label_on_one_side(seed: int, share: float, count: int) -> None:
    rows = classes(**dict.fromkeys("abcdefgh", 3))
    first, second = split_by_label(rows, seed, share)
    labels = [{row.label for row in side} for side in (first, second)]
    assert (len(labels[0]), len(labels[1])) == (count, 8 - count)
    assert not labels[0] & labels[1]
    assert sorted(texts(first) + texts(second)) == sorted(texts(rows))
    assert texts(first) == [text for text in texts(rows) if text in texts(first)]
    assert split_by_label(rows[::-1], seed, share)[0] == first[::-1]  # whatever the order of the rows
    assert any(split_by_label(rows, other, share)[0] != first for other in range(5, 15))


def test_splits_by_label_that_are_not_possible() -> None:
    with pytest.raises(ConfigError, match="share=1.0: the first part's share of the labels lies between 0 and 1"):
        split_by_label(classes(a=2, b=2), 0, 1.0)
    with pytest.raises(DataError, match="all rows have the label 'a'; a split by labels needs two labels or more"):
        split_by_label(classes(a=2), 0)


# Files

EPISODE = {
    "support": {"word": [["Bo", "Lee", "sat"]], "label": [["person-actor", "person-actor", "O"]]},
    "query": {
        "word": [["it", "rains"], ["in", "York"]],
        "label": [["O", "O"], ["O", "location-GPE"]],
    },
    "types": ["location-GPE", "person-actor"],
}


def test_episodes_of_a_file(tmp_path: Path) -> None:
    path = files.rows(tmp_path / "test_5_1.jsonl", EPISODE, EPISODE)
    first, second = read_episodes(path)
    assert first == second
    assert first.labels == ("location-GPE", "person-actor")
    assert first.support == (of_words(["Bo", "Lee", "sat"], [Span(0, 2, "person-actor")]),)
    assert first.query == (of_words(["it", "rains"]), of_words(["in", "York"], [Span(1, 2, "location-GPE")]))
    assert list(read_episodes(path, limit=1)) == [first]
    assert list(islice(read_episodes(path), 1)) == [first]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"types": None}, "line 1: no list of types"),
        ({"support": None}, "line 1: no lists in 'support.word'"),
        ({"types": ["person-actor"]}, "query, sentence 2: the label 'location-GPE' is none of the types person-actor"),
        ({"support": {"word": [["a"]], "label": []}}, "support has 1 lists of words and 0 of labels; an episode is {"),
        ({"support": {"word": [["a"]], "label": [["O", "O"]]}}, "support, sentence 1: 1 words and 2 labels; each word"),
        ({"support": {"word": [[""]], "label": [["O"]]}}, "each word has one, and none is empty"),
        ({"support": {"word": [["a"]], "label": [[""]]}}, "support, sentence 1, tag 1: '' is no tag of the scheme io"),
        (
            {"support": {"word": [[1]], "label": [["O"]]}},
            "line 1: support.word, list 1: column 'support.word' holds [1]",
        ),
    ],
)
def test_episodes_that_are_wrong_say_where(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        list(read_episodes(files.rows(tmp_path / "a.jsonl", EPISODE | change)))


def test_a_file_without_episodes_and_options_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="there are no episodes; at least one is needed"):
        read_episodes(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="limit=0: a limit is 1 episode or more"):
        read_episodes(tmp_path / "a.jsonl", limit=0)
    with pytest.raises(ConfigError, match="scheme='oi' is no scheme of tags"):
        read_episodes(tmp_path / "a.jsonl", scheme="oi")
    with pytest.raises(DataError, match="is neither a file nor a dataset on the Hub"):
        read_episodes(tmp_path / "b.jsonl")


# Real data


@pytest.mark.parametrize("domain", ["ai", "literature", "music", "politics", "science"])
@pytest.mark.parametrize("shots", [1, 5])
def test_crossner(data_dir: Path, domain: str, shots: int) -> None:
    rows = [
        e for part in ("train", "dev", "test") for e in read_tagged(data_dir / f"crossner/{domain}_{part}.jsonl.gz")
    ]
    for episode in islice(sentence_episodes(rows, 5, shots, shots, seed=1), 20):
        for side in (episode.support, episode.query):
            counts = spans_in(side)
            assert {*counts} == {*episode.labels}
            assert shots <= min(counts.values()) <= max(counts.values()) <= 2 * shots
    train, dev = few_sentences(rows, shots, 0)
    for side in (train, dev):
        assert {*spans_in(side)} == {*span_labels(rows)}
        assert min(spans_in(side).values()) >= shots


def test_fewrel(data_dir: Path) -> None:
    rows = read_relations(data_dir / "fewrel/val_wiki.jsonl.gz")
    first, second = split_by_label(rows, 0)
    assert [len({row.label for row in side}) for side in (first, second)] == [8, 8]
    assert [len(first), len(second)] == [5600, 5600]
    dealt = list(islice(class_episodes(second, 5, 1, 1, 0), 1000))
    assert all(len(e.support) == len(e.query) == 5 for e in dealt)
    assert {label for e in dealt for label in e.labels} == {row.label for row in second}
