"""Metrics of labels: hand cases with ancestors, and the definitions in plain loops on random sets."""

import random

import pytest
from sklearn.metrics import accuracy_score, f1_score

from deltaprompt.hierarchy import ancestors, are_paths, way
from deltaprompt.model.label_metrics import macro_f1, measures

PATHS = ("/person", "/person/artist", "/person/artist/actor", "/person/athlete", "/place", "/place/city")
FINE = ("person-actor", "person-artist/author", "place-GPE", "place-other")


def measured(names, gold, found, several=True):
    index = {name: i for i, name in enumerate(names)}
    sets = [[[index[name] for name in own.split()] for own in each] for each in (gold, found)]
    return measures(names, *sets, several)


def by_loops(names, gold, found):
    """Ling & Weld's definitions, one example and one type at a time."""

    def expanded(own):
        types = set()
        for i in own:
            name = names[i]
            if name.startswith("/"):
                parts = name.strip("/").split("/")
                types |= {"/" + "/".join(parts[: n + 1]) for n in range(len(parts))}
            else:
                types |= {name, name.split("-")[0]} if all("-" in n for n in names) else {name}
        return types

    g, f = [expanded(own) for own in gold], [expanded(own) for own in found]
    strict = p = r = 0.0
    shared = said = right = 0
    for a, b in zip(g, f, strict=True):
        both = sum(1 for t in a if t in b)
        strict += a == b
        p += both / len(b)
        r += both / len(a)
        shared, said, right = shared + both, said + len(b), right + len(a)
    p, r, mp, mr = p / len(g), r / len(g), shared / said, shared / right
    f1 = lambda x, y: 0.0 if x + y == 0 else 2 * x * y / (x + y)  # noqa: E731
    return {
        "accuracy": strict / len(g),
        "loose_macro_precision": p,
        "loose_macro_recall": r,
        "loose_macro_f1": f1(p, r),
        "loose_micro_precision": mp,
        "loose_micro_recall": mr,
        "loose_micro_f1": f1(mp, mr),
    }


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("/person/artist/actor", ("person", "artist", "actor")),
        ("/person", ("person",)),
        ("person-artist/author", ("person", "artist/author")),
        ("event-attack/battle/war/militaryconflict", ("event", "attack/battle/war/militaryconflict")),
        ("a-b-c", ("a", "b-c")),
        ("person", ("person",)),
        ("-x", ("-x",)),
        ("/", ("/",)),
    ],
)
def test_a_label_is_a_way_down(label, parts):
    assert way(label) == parts


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        (PATHS, True),
        (FINE, True),
        (("person", "place"), False),
        (("low-risk", "high-risk"), False),  # nothing is shared
        (("card-lost", "card-new", "other"), False),
        (("/person", "place"), False),
        ((), False),
    ],
)
def test_labels_are_paths_all_of_them_or_none(names, paths):
    assert are_paths(names) is paths


def test_ancestors_are_the_types_of_the_path():
    assert ancestors(PATHS)["/person/artist/actor"] == {
        ("person",),
        ("person", "artist"),
        ("person", "artist", "actor"),
    }
    assert ancestors(FINE)["person-artist/author"] == {("person",), ("person", "artist/author")}
    assert ancestors(["low-risk", "high-risk"])["low-risk"] == {("low-risk",)}


def test_a_hand_case_of_paths():
    gold = ["/person/artist/actor", "/place", "/person"]
    found = ["/person/athlete", "/place/city", "/person"]
    told = measured(PATHS, gold, found, several=False)
    assert told["accuracy"] == pytest.approx(1 / 3)
    # precisions 1/2, 1/2, 1; recalls 1/3, 1, 1
    assert told["loose_macro_precision"] == pytest.approx(2 / 3)
    assert told["loose_macro_recall"] == pytest.approx(7 / 9)
    assert told["loose_macro_f1"] == pytest.approx(2 * (2 / 3) * (7 / 9) / (2 / 3 + 7 / 9))
    assert told["loose_micro_precision"] == pytest.approx(3 / 5)
    assert told["loose_micro_recall"] == pytest.approx(3 / 5)
    assert told["macro_f1"] == pytest.approx(1 / 6)


def test_a_hand_case_of_few_nerds_form():
    told = measured(FINE, ["person-actor", "place-GPE"], ["person-artist/author", "place-GPE"], several=False)
    assert told["accuracy"] == 0.5
    assert told["loose_micro_f1"] == told["loose_macro_f1"] == pytest.approx(3 / 4)


def test_a_hand_case_of_several_flat_labels():
    told = measured(("a", "b", "c"), ["a b", "c", "b"], ["a", "c b", "b"])
    assert told["accuracy"] == pytest.approx(1 / 3)
    assert told["loose_macro_precision"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert told["loose_macro_recall"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert told["loose_micro_f1"] == pytest.approx(3 / 4)


def test_sets_with_the_same_ancestors_are_the_same():
    told = measured(PATHS, ["/person /person/artist"], ["/person/artist"])
    assert told["accuracy"] == told["loose_macro_f1"] == told["loose_micro_f1"] == 1.0


@pytest.mark.parametrize("names", [PATHS, FINE, ("x", "y", "z")])
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_random_sets_agree_with_loops_and_with_scikit_learn(names, several, seed):
    draw = random.Random(seed)

    def some():
        return sorted(draw.sample(range(len(names)), draw.randint(1, len(names)) if several else 1))

    gold, found = ([some() for _ in range(25)] for _ in range(2))
    told = measures(names, gold, found, several)
    hot = [[[i in own for i in range(len(names))] for own in each] for each in (gold, found)]
    assert told["macro_f1"] == pytest.approx(f1_score(*hot, average="macro", zero_division=0.0))
    assert macro_f1(len(names), gold, found) == pytest.approx(told["macro_f1"])
    if several or are_paths(names):
        assert {n: v for n, v in told.items() if n != "macro_f1"} == pytest.approx(by_loops(names, gold, found))
    else:
        assert told.keys() == {"accuracy", "macro_f1"}
        assert told["accuracy"] == accuracy_score(gold, found)


def test_nothing_in_common_is_zero():
    told = measured(("a", "b"), ["a"], ["b"])
    assert set(told.values()) == {0.0}
