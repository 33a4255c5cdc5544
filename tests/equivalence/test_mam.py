"""MAM (He et al. 2022, section 4.6) is a prefix and a parallel adapter: attention as the paper's gated sum, and
FFN(x) + s · (W_up ReLU(W_down x))."""

import pytest
import torch
from torch.testing import assert_close

import deltaprompt as dp
from deltaprompt.compose import Adapted
from deltaprompt.deltas.parallel_adapter import ParallelAdapter
from deltaprompt.deltas.prefix import Prefix
from tests import backbones_zoo as zoo
from tests.adapted_zoo import shake
from tests.by_hand import ByHand

FAMILIES = ["bert", "gpt2", "llama", "t5"]
MAM = (Prefix(3), ParallelAdapter(5, scale=4.0))
TEXTS = {"good": ["a great movie", "a good film", "great plot"], "bad": ["terrible acting", "a bad film", "bad plot"]}
TRAIN = [dp.Example({"text": text}, label) for label, texts in TEXTS.items() for text in texts]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_papers_formula(family):
    ours = shake(Adapted(zoo.build(family, torch.float64), MAM))
    hand = ByHand(family, ours)
    t = hand.t
    for site in (patch.site for patch in ours.patches):
        n = site.name
        if site.kind == "attn":
            hand.prefix(n, lambda n=n: (t[f"0.{n}.k"], t[f"0.{n}.v"]))
            continue

        def parallel(x, y, n=n):
            inner = (x @ t[f"1.{n}.down"].T + t[f"1.{n}.down_bias"]).relu()
            return y + 4.0 * (inner @ t[f"1.{n}.up"].T + t[f"1.{n}.up_bias"])

        first = next(f"{n}.{part}" for part in ("up", "gate") if f"{n}.{part}" in hand.sites)
        hand.behind(f"{n}.down", parallel, first)
    assert len(t) == sum(2 if patch.site.kind == "attn" else 4 for patch in ours.patches)
    hand.agrees()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_at_the_start_it_is_the_prefix_alone_and_rows_have_their_own(family):
    backbone = zoo.build(family, torch.float64)
    inputs = zoo.inputs_of(backbone)
    prefix = Adapted(backbone, MAM[:1])
    expected = prefix.states(inputs)
    prefix.remove()
    adapted = Adapted(backbone, MAM, 3)
    assert torch.equal(adapted.states(inputs), expected)
    mixed = shake(adapted).states(inputs, torch.tensor([2, 1]))
    assert not torch.allclose(mixed, expected)
    for row, slot in enumerate((2, 1)):
        assert_close(mixed[row], adapted.states(inputs, slot)[row], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_fitted_saved_and_opened_as_one(tmp_path, family):
    backbone = zoo.build(family)
    model = dp.adapt(backbone, dp.Task("{text} It was {mask}.", {"good": "great", "bad": "terrible"}), MAM)
    before = model.probabilities(TRAIN)
    dp.fit(model, TRAIN, TRAIN, training=dp.Training(steps=6, learning_rate=1e-2), out=tmp_path)
    answers = model.probabilities(TRAIN)
    assert not torch.allclose(answers, before)
    model.adapted.remove()
    again = dp.open(tmp_path, backbone=backbone)
    assert torch.equal(again.probabilities(TRAIN), answers)
    assert again.chosen == MAM
