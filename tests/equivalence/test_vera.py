"""VeRA is PEFT's where PEFT's projections are ours, and its formula written out."""

import pytest
import torch
from torch.testing import assert_close

from deltaprompt import registry
from deltaprompt.compose import Adapted
from deltaprompt.deltas.vera import VeRA
from deltaprompt.errors import ConfigError
from tests import backbones_zoo as zoo
from tests.backbones_zoo import inputs_of

RANK = 5
TARGETS = {  # of maps that differ in size, both ways
    "bert": (("query", "intermediate.dense", "output.dense"), ("attn.q", "attn.o", "ffn.up", "ffn.down")),
    "llama": (("q_proj", "v_proj", "down_proj"), ("attn.q", "attn.v", "ffn.down")),
}
FIRST = {
    "A": [-0.004585, 0.328503, -0.50401],
    "B": [-1.020905, 0.973295, 0.832932],
}  # of seed 0, for sites of 16 in and 16 out
PEFTS = {"d": "vera_lambda_d.default", "b": "vera_lambda_b.default"}


@torch.no_grad()
def moved(adapted):
    """Every parameter away from where it starts."""
    g = torch.Generator().manual_seed(0)
    for _, p in adapted.parts():
        p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=0.3)
    return adapted


@pytest.mark.parametrize("family", list(TARGETS))
def test_it_is_pefts_also_after_training(family):
    peft = pytest.importorskip("peft")
    targets, selectors = TARGETS[family]
    config = peft.VeraConfig(r=RANK, target_modules=list(targets), projection_prng_key=3)
    with zoo.quiet():
        theirs = peft.get_peft_model(zoo.build(family, torch.float64).model, config).eval()
    ours = Adapted(zoo.build(family, torch.float64), [VeRA(RANK, at=selectors)])
    inputs = inputs_of(ours.backbone)
    assert ours.parameter_count() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    projections = ours.commons[0].constants()
    pairs = []
    for patch in ours.patches:
        module = theirs.get_submodule(f"base_model.model.{patch.site.path}")
        for name, buffers in (("A", module.vera_A), ("B", module.vera_B)):
            assert buffers["default"].shape == projections[name].shape
            projections[name].copy_(buffers["default"])
        for name, other in PEFTS.items():
            pairs.append((patch.tensors[name], theirs.get_parameter(f"base_model.model.{patch.site.path}.{other}")))
            assert_close(pairs[-1][0][0, 0], pairs[-1][1], rtol=0, atol=1e-7)  # both start at 0.1 and at 0
    moved(ours)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine[0, 0])
    optimizers = [torch.optim.AdamW([p[i] for p in pairs], lr=0.01) for i in range(2)]
    for _ in range(3):
        outputs = [model(**inputs).logits for model in (ours, theirs)]
        assert_close(*outputs, rtol=0, atol=1e-9)
        for optimizer, logits in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            logits.tanh().square().mean().backward()
            optimizer.step()
        for mine, other in pairs:
            assert_close(mine.grad[0, 0], other.grad, rtol=0, atol=1e-9)
            assert_close(mine[0, 0], other, rtol=0, atol=1e-9)
    merged, unloaded = ours.merge().model, theirs.merge_and_unload()
    for (name, p), (_, q) in zip(merged.named_parameters(), unloaded.named_parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=1e-9, msg=name)


@torch.no_grad()
def test_it_is_the_formula_and_all_sites_share_the_projections():
    adapted = moved(Adapted(zoo.build("gpt2", torch.float64), [VeRA(RANK, at=("attn.q", "ffn.up"))]))
    inputs = inputs_of(adapted.backbone)
    attached = adapted.states(inputs)
    a, b = adapted.commons[0].constants().values()
    assert (a.shape, b.shape) == ((RANK, 16), (64, RANK))  # up is [16 -> 64]
    changes = {}
    for patch in adapted.patches:
        d, scale = patch.tensors["d"][0, 0], patch.tensors["b"][0, 0]
        changes[patch.site.name] = scale.diag() @ b[: len(scale)] @ d.diag() @ a  # [out, in]
    backbone = adapted.remove()
    for name, change in changes.items():
        site = backbone.sites[name]
        weight = backbone.model.get_submodule(site.path).weight  # [in, out]
        weight += change.T if site.part is None else site.part.put(torch.zeros_like(weight), change.T)
    assert_close(backbone.states(inputs), attached, rtol=0, atol=1e-9)


@torch.no_grad()
def test_merged_is_attached():
    adapted = moved(Adapted(zoo.build("llama", torch.float64), [VeRA(RANK, at=("attn.*", "ffn.down"))]))
    inputs = inputs_of(adapted.backbone)
    attached = adapted.states(inputs)
    assert_close(adapted.merge().states(inputs), attached, rtol=0, atol=1e-9)


def test_the_projections_are_those_of_their_seed_whatever_the_seed_of_the_slot():
    def drawn(seed, slots=0):
        delta = VeRA(RANK, projection_seed=seed)
        return list(Adapted(zoo.build("bert"), [delta], 1, [slots]).commons[0].constants().values())

    for first, same, other in zip(drawn(1), drawn(1, 7), drawn(2), strict=True):
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
    a, b = drawn(0)  # numbers that may never change: what is saved would be of no use
    assert_close(a[0, :3], torch.tensor(FIRST["A"]), rtol=0, atol=1e-6)
    assert_close(b[0, :3], torch.tensor(FIRST["B"]), rtol=0, atol=1e-6)


def test_the_projections_have_the_variances_of_he_et_al():
    backbone = zoo.build("bert", torch.float64)
    a, b = VeRA(4000).fixed([backbone.sites["layers.0.ffn.up"]]).values()
    assert abs(float(a.var()) * 16 - 2) < 0.02
    assert abs(float(b.var()) * 4000 - 2) < 0.02


@torch.no_grad()
def test_dropout_is_of_what_enters_a_while_training():
    adapted = moved(Adapted(zoo.build("bert", torch.float64), [VeRA(RANK, dropout=0.5)])).eval()
    inputs = inputs_of(adapted.backbone)
    still = adapted.states(inputs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted.train()
        assert not torch.allclose(adapted.states(inputs), adapted.states(inputs))
    assert torch.equal(adapted.eval().states(inputs), still)


def test_the_count_is_the_closed_form():
    adapted = Adapted(zoo.build("llama"), [VeRA(RANK, at=("attn.v", "ffn.down"))])
    assert adapted.parameter_count() == 2 * ((RANK + 8) + (RANK + 16))
    assert {n for n in adapted.state_dict() if "commons" in n} == set()  # the projections are not saved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "vera: got rank=0, d_initial=0.1, dropout=0.0; rank >= 1"),
        ({"d_initial": 0.0}, r"vera: got rank=256, d_initial=0.0, .* d_initial other than 0 \(nothing could learn\)"),
        ({"dropout": -0.1}, "dropout=-0.1; .* and 0 <= dropout < 1 are possible"),
    ],
)
def test_a_wrong_option_is_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        registry.build("deltas", "vera", options)
