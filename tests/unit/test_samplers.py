"""Samplers: laws that hold for any data, shots and seed, and a message for each thing that cannot be dealt."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaprompt.data import few_shot, labels_of, split
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.types import Example

quick = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**32)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


def rows(**counts: int) -> list[Example]:
    """So many rows of each class, each with a text of its own."""
    return [Example({"text": f"{name} {number}"}, name) for name, count in counts.items() for number in range(count)]


def counted(examples: list[Example]) -> Counter[str]:
    return Counter(str(example.label) for example in examples)


def texts(examples: list[Example]) -> list[str]:
    return [example.fields["text"] for example in examples]


@st.composite
def tasks(draw: st.DrawFn) -> tuple[list[Example], int]:
    """Rows in any order, and a number of shots that every class has, with one more for dev."""
    shots = draw(st.integers(1, 6))
    counts = draw(st.dictionaries(st.sampled_from("abcde"), st.integers(shots + 1, 20), min_size=1))
    return draw(st.permutations(rows(**counts))), shots


@quick
@given(tasks(), seeds)
def test_same_seed_same_sample(task: tuple[list[Example], int], seed: int) -> None:
    examples, shots = task
    assert few_shot(examples, shots, seed) == few_shot(examples, shots, seed)


@quick
@given(tasks(), seeds)
def test_counts_and_disjoint(task: tuple[list[Example], int], seed: int) -> None:
    examples, shots = task
    train, dev = few_shot(examples, shots, seed)
    counts = counted(examples)
    assert counted(train) == dict.fromkeys(counts, shots)
    assert counted(dev) == {name: min(shots, count - shots) for name, count in counts.items()}
    drawn = texts(train) + texts(dev)
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(texts(examples))


@quick
@given(tasks(), seeds)
def test_without_dev_the_training_rows_are_the_same(task: tuple[list[Example], int], seed: int) -> None:
    examples, shots = task
    train, none = few_shot(examples, shots, seed, dev=False)
    assert none == []
    assert set(texts(train)) == set(texts(few_shot(examples, shots, seed)[0]))


@quick
@given(tasks(), seeds, seeds)
def test_independent_of_the_global_generator(task: tuple[list[Example], int], seed: int, other: int) -> None:
    examples, shots = task
    sample = few_shot(examples, shots, seed), split(examples, 0.3, seed)
    random.seed(other)
    before = random.getstate()
    assert sample == (few_shot(examples, shots, seed), split(examples, 0.3, seed))
    assert random.getstate() == before


@quick
@given(tasks(), seeds, st.data())
def test_independent_of_the_order_of_classes(task: tuple[list[Example], int], seed: int, data: st.DataObject) -> None:
    """Only the order within a class counts, so classes may appear in any order."""
    examples, shots = task
    order = data.draw(st.permutations(labels_of(examples)))
    regrouped = [example for name in order for example in examples if example.label == name]
    assert few_shot(regrouped, shots, seed) == few_shot(examples, shots, seed)
    assert split(regrouped, 0.3, seed) == split(examples, 0.3, seed)


@quick
@given(tasks(), seeds, st.data())
def test_permuted_labels_deal_as_many_of_each(task: tuple[list[Example], int], seed: int, data: st.DataObject) -> None:
    """Renaming the classes among themselves permutes the counts, and nothing else about them."""
    examples, shots = task
    names = labels_of(examples)
    renamed = dict(zip(names, data.draw(st.permutations(names)), strict=True))
    other = [Example(example.fields, renamed[str(example.label)]) for example in examples]
    for ours, theirs in zip(few_shot(examples, shots, seed), few_shot(other, shots, seed), strict=True):
        assert {renamed[name]: count for name, count in counted(ours).items()} == counted(theirs)


@quick
@given(tasks(), seeds)
def test_fewer_shots_are_among_more(task: tuple[list[Example], int], seed: int) -> None:
    examples, shots = task
    more = set(texts(few_shot(examples, shots, seed)[0]))
    for fewer in range(1, shots):
        assert set(texts(few_shot(examples, fewer, seed)[0])) <= more


@quick
@given(tasks(), fractions, seeds)
def test_split_is_stratified(task: tuple[list[Example], int], fraction: float, seed: int) -> None:
    examples, _ = task
    train, dev = split(examples, fraction, seed)
    assert sorted(texts(train) + texts(dev)) == sorted(texts(examples))
    held_out = counted(dev)
    for name, count in counted(examples).items():
        assert 1 <= held_out[name] <= count - 1
        assert abs(held_out[name] - fraction * count) <= 1


def test_no_row_of_the_dev_set_is_a_training_row_too() -> None:
    twins = [Example({"text": f"{n % 30}"}, label) for n in range(40) for label in "ab"]
    for train, dev in (split(twins, 0.3, 1), few_shot(twins, 2, 3)):
        assert dev
        assert not {e.fields["text"] for e in train} & {e.fields["text"] for e in dev}
    with pytest.raises(DataError, match="every row that could be in the dev set is in the training set too"):
        split([Example({"text": "same"}, label) for label in "aaabbb"], 0.3, 0)


def test_rows_of_one_text_and_several_targets_are_different_rows() -> None:
    stances = [Example({"text": "same", "target": f"{n}"}, label) for n in range(10) for label in "ab"]
    for train, dev in (split(stances, 0.3, 1), few_shot(stances, 2, 3)):
        assert dev
        assert not {e.fields["target"] for e in train} & {e.fields["target"] for e in dev}


def test_split_keeps_a_single_row_for_training() -> None:
    train, dev = split(rows(a=1, b=10), 0.5, seed=0)
    assert counted(train) == {"a": 1, "b": 5}
    assert counted(dev) == {"b": 5}


def test_the_sample_is_pinned() -> None:
    """The same on any machine and any Python: a change here breaks everybody's recorded samples."""
    train, dev = few_shot(rows(a=6, b=5), shots=2, seed=13)
    assert texts(train) == ["a 4", "a 5", "b 3", "b 0"]
    assert texts(dev) == ["a 2", "b 4", "b 1", "a 0"]


def test_shuffled_and_seeded() -> None:
    examples = rows(a=40, b=40)
    train, _ = few_shot(examples, 20, seed=0)
    assert [example.label for example in train] != sorted(str(example.label) for example in train)
    assert few_shot(examples, 20, seed=1)[0] != train


@pytest.mark.parametrize(
    ("counts", "dev", "message"),
    [
        (
            {"a": 20, "b": 16},
            True,
            "class 'b' has 16 rows; shots=16 needs 17 of each class, one of them for dev; possible: shots up to 15 or "
            "dev=False or more rows of that class",
        ),
        (
            {"a": 3, "b": 1, "c": 20},
            True,
            "class 'b' has 1 row (and 1 more class has too few); shots=16 needs 17 of each class, one of them for dev; "
            "possible: more rows of that class",
        ),
        (
            {"a": 3, "b": 2, "c": 5},
            False,
            "class 'b' has 2 rows (and 2 more classes have too few); shots=16 needs 16 of each class; "
            "possible: shots up to 2 or more rows of that class",
        ),
    ],
)
def test_too_few_rows(counts: dict[str, int], dev: bool, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        few_shot(rows(**counts), 16, seed=0, dev=dev)


def test_impossible_options() -> None:
    with pytest.raises(ConfigError, match="shots=0: a few-shot sample takes 1 row of each class or more"):
        few_shot(rows(a=2), 0, seed=0)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="fraction=.*: the dev set's share lies between 0 and 1, for example 0.1"):
            split(rows(a=2), fraction, seed=0)


def test_nothing_to_deal() -> None:
    with pytest.raises(DataError, match="there are no rows to sample from; read some with labels first"):
        few_shot([], 1, seed=0)
    with pytest.raises(
        DataError, match="every class has 1 row only, so none can go to the dev set; add rows, or train"
    ):
        split(rows(a=1, b=1), 0.5, seed=0)
    with pytest.raises(DataError, match="example 1 has no label"):
        few_shot([Example({"text": "a"})], 1, seed=0)
