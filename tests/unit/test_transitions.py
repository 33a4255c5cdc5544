"""Transitions and Viterbi against hand counts and the enumeration of all paths."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.errors import ConfigError
from deltaprompt.model.transitions import Moves, Transitions, rules, viterbi

IO = [
    ["O", "person", "person", "O", "place"],
    ["place", "O", "O"],
    ["O", "O", "person", "place", "place", "place"],
    [],
]
COUNTED = Moves(start_out=2, start_in=1, out_out=2, out_in=3, in_out=2, in_same=3, in_other=1)
BIO = ["O", "B-a", "I-a", "B-b", "I-b"]
BMES = ["O", "B-a", "M-a", "E-a", "S-a", "S-b"]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(path, scores, moves):
    """The score of a path, by a loop."""
    total = float(moves.start[path[0]]) + float(moves.end[path[-1]])
    total += sum(float(scores[t, y]) for t, y in enumerate(path))
    return total + sum(float(moves.after[a, b]) for a, b in itertools.pairwise(path))


def best(scores, moves):
    return max(itertools.product(range(scores.shape[1]), repeat=len(scores)), key=lambda p: value(p, scores, moves))


def random_moves(c, seed):
    return Transitions(seeded(c, seed=seed), seeded(c, c, seed=seed + 1), seeded(c, seed=seed + 2))


MOVES = {
    "random": random_moves(4, 3),
    "counted": COUNTED.over(3, tau=0.3),
    "nothing unseen": Moves(1, 1, 1, 1, 1, 0, 1).over(2, floor=0.0),
    "bio": rules(BIO),
    "bmes": rules(BMES),
}


@pytest.mark.parametrize("name", MOVES)
def test_viterbi_is_the_best_of_all_paths(name):
    moves = MOVES[name]
    lengths = torch.tensor([6, 1, 3, 5, 2, 4])
    scores = seeded(len(lengths), 6, len(moves.start))
    found = viterbi(scores, lengths, moves)
    for row, length, path in zip(scores, lengths.tolist(), found.tolist(), strict=True):
        assert tuple(path[:length]) == best(row[:length], moves)
        assert path[length:] == [-1] * (6 - length)


def test_what_is_behind_the_end_of_a_sentence_changes_nothing():
    scores, lengths, moves = seeded(3, 6, 4), torch.tensor([2, 4, 6]), random_moves(4, 0)
    other = torch.where(torch.arange(6)[:, None] >= lengths[:, None, None], 100 * seeded(3, 6, 4, seed=9), scores)
    assert torch.equal(viterbi(scores, lengths, moves), viterbi(other, lengths, moves))
    alone = viterbi(scores[:1, :2], lengths[:1], moves)
    assert torch.equal(viterbi(scores, lengths, moves)[:1, :2], alone)


def legal(path, scheme):
    """Whether a path of tags is well-formed, by reading it."""
    inside = None
    for tag in path:
        prefix, _, kind = tag.partition("-")
        if prefix in ("I", "M", "E"):
            if inside != kind:
                return False
        elif scheme == "bmes" and inside is not None:
            return False
        inside = kind if prefix in ("B", "I", "M") else None
    return scheme == "bio" or inside is None


@pytest.mark.parametrize(("scheme", "tags"), [("bio", BIO), ("bmes", BMES)])
def test_the_rules_allow_well_formed_paths_and_no_others(scheme, tags):
    moves, zero = rules(tags), torch.zeros(5, len(tags))
    for length in range(1, 6):
        for path in itertools.product(range(len(tags)), repeat=length):
            possible = value(path, zero, moves) == 0
            assert possible == legal([tags[y] for y in path], scheme), [tags[y] for y in path]


def test_tags_that_are_no_scheme_may_stand_anywhere():
    for tags in (["O", "person", "place"], ["O", "I-person", "I-place"], ["O", "B-x", "I-x", "E-commerce"]):
        moves = rules(tags)
        free = [i for i, tag in enumerate(tags) if tag != "I-x"]
        assert not moves.start[free].any()
        assert not moves.after[:, free].any()
        assert not moves.end.any()


def test_moves_are_counted_whatever_the_types():
    assert Moves.counted(IO) == COUNTED
    other = [[{"person": "x", "place": "y"}.get(tag, "none") for tag in tags] for tags in IO]
    assert Moves.counted(other, outside="none") == COUNTED
    assert Moves.counted([]) == Moves()


def test_moves_over_types_are_those_of_the_paper():
    found = COUNTED.over(3, floor=0.0)
    start, after = found.start.exp(), found.after.exp()
    assert_close(start, torch.tensor([2 / 3, *[1 / 9] * 3]))
    assert_close(after[0], torch.tensor([2 / 5, *[1 / 5] * 3]))
    assert_close(after[2], torch.tensor([2 / 6, 1 / 12, 3 / 6, 1 / 12]))
    assert not found.end.any()


@pytest.mark.parametrize("types", [1, 2, 5, 10])
@pytest.mark.parametrize("tau", [0.0, 0.32, 1.0, 2.0])
@pytest.mark.parametrize("moves", [COUNTED, Moves(), Moves(1, 0, 1, 0, 0, 0, 0)])
def test_each_row_of_moves_is_a_distribution(types, tau, moves):
    found = moves.over(types, tau, floor=0.0)
    assert found.after.shape == (types + 1, types + 1)
    assert_close(found.start.exp().sum(), torch.tensor(1.0))
    assert_close(found.after.exp().sum(-1), torch.ones(types + 1))


def test_towards_zero_all_moves_that_were_seen_are_alike_and_at_one_they_stay():
    seen = Moves(3, 1, 5, 2, 4, 6, 0)  # no mention behind one of another type
    plain = seen.over(3, floor=0.0)
    assert_close(plain.after.exp()[1], torch.tensor([0.4, 0.6, 0.0, 0.0]))
    for tau in (0.0, 1e-6):
        flat = seen.over(3, tau, floor=0.0)
        assert_close(flat.start.exp(), torch.full((4,), 0.25), atol=1e-5, rtol=0)
        assert_close(flat.after.exp()[0], torch.full((4,), 0.25), atol=1e-5, rtol=0)
        assert_close(flat.after.exp()[1], torch.tensor([0.5, 0.5, 0.0, 0.0]), atol=1e-5, rtol=0)
    between = plain.after.exp()[0] ** 0.32
    assert_close(seen.over(3, 0.32).after.exp()[0], between / between.sum())


def test_what_was_never_seen_is_unlikely_or_impossible():
    seen = Moves(1, 0, 1, 1, 1, 1, 0)
    assert seen.over(2).start.tolist() == pytest.approx([0.0, math.log(1e-6), math.log(1e-6)])
    assert seen.over(2, floor=0.0).start.tolist() == [0.0, -math.inf, -math.inf]


@pytest.mark.parametrize("outside", [0, 1, 3])
def test_o_may_be_any_of_the_tags(outside):
    first, moved = COUNTED.over(3), COUNTED.over(3, outside=outside)
    order = [1, 2, 3]
    order.insert(outside, 0)
    assert torch.equal(moved.start, first.start[order])
    assert torch.equal(moved.after, first.after[order][:, order])
    assert moved.start[outside] == first.start[0]


@pytest.mark.parametrize(
    "options", [{"types": 0}, {"types": 2, "tau": -1}, {"types": 2, "floor": 1}, {"types": 2, "outside": 3}]
)
def test_impossible_moves_are_said(options):
    with pytest.raises(ConfigError, match="possible: a type or more, tau >= 0, 0 <= floor < 1, and an outside"):
        COUNTED.over(**options)


def test_a_lone_doubtful_word_gives_way_to_what_usually_follows():
    """Mentions that were never of one word: the middle word alone is a little likelier in one, the whole is not."""
    moves = Moves.counted([["O", "O", "x", "x", "x", "O", "O"]] * 10).over(1)
    inside = torch.tensor([0.1, 0.1, 0.55, 0.1, 0.1])
    scores = torch.stack([1 - inside, inside], -1).log()[None]
    assert viterbi(scores, torch.tensor([5]), moves).tolist() == [[0, 0, 0, 0, 0]]
    assert scores.argmax(-1).tolist() == [[0, 0, 1, 0, 0]]
