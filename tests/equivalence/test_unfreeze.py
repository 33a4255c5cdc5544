"""Unfreezing by a delta is unfreezing: the same outputs, gradients and steps of AdamW as with the backbone's own."""

import pytest
import torch
from torch.testing import assert_close

from deltaprompt import registry
from deltaprompt.compose import Adapted, sites_of
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.unfreeze import Unfreeze
from deltaprompt.errors import ConfigError, SiteError
from tests import backbones_zoo as zoo
from tests.backbones_zoo import inputs_of

MAPS = ("attn.q", "attn.v", "attn.o", "ffn.up", "ffn.down")
NORMS = ("attn.norm", "ffn.norm")
STORED = ("difference", "value")


@torch.no_grad()
def moved(adapted, seed=0):
    """Every parameter away from where it starts."""
    g = torch.Generator().manual_seed(seed)
    for _, p in adapted.parts():
        p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=0.3)
    return adapted


def loss_of(logits):
    return (logits.tanh() * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).sum()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_it_is_training_the_weights_themselves(family, stored):
    """AdamW's weight decay pulls values towards 0, as the weights themselves, and differences towards the backbone."""
    decay = 0.1 if stored == "value" else 0.0
    plain = zoo.build(family, torch.float64).model
    ours = Adapted(zoo.build(family, torch.float64), [Unfreeze(at=MAPS, stored=stored)])
    inputs = inputs_of(ours.backbone)
    own = {p.site.path: plain.get_submodule(p.site.path) for p in ours.patches}
    trained = [p for module in own.values() for p in module.parameters()]
    assert ours.parameter_count() == sum(p.numel() for p in trained)
    pairs = [(trained, plain), ([p for _, p in ours.parts()], ours)]
    optimizers = [torch.optim.AdamW(parameters, lr=0.01, weight_decay=decay) for parameters, _ in pairs]
    for _ in range(3):
        outputs = [model(**inputs).logits for _, model in pairs]
        assert_close(*outputs, rtol=0, atol=1e-9)
        for optimizer, logits in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            loss_of(logits).backward()
        for patch in ours.patches:
            for name, p in own[patch.site.path].named_parameters():
                assert_close(patch.tensors[name].grad[0].view_as(p), p.grad, rtol=0, atol=1e-9)
        for optimizer in optimizers:
            optimizer.step()
    merged = ours.merge().model
    for (name, p), (_, q) in zip(merged.named_parameters(), plain.named_parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_norm_trains_its_bias_and_a_factor_on_its_scale(family, stored):
    """γ' = γ ⊙ (1 + δ), so that ∂δ = γ ⊙ ∂γ; the bias is the backbone's own."""
    ours = moved(Adapted(zoo.build(family, torch.float64), [Unfreeze(at=NORMS, stored=stored)]))
    plain = zoo.build(family, torch.float64).model
    start = zoo.build(family, torch.float64).model
    for patch in ours.patches:
        module, frozen = (m.get_submodule(patch.site.path) for m in (plain, start))
        with torch.no_grad():
            factor = patch.tensors["weight"][0, 0] + (stored == "difference")
            module.weight *= factor
            if patch.site.biased:
                module.bias.copy_(patch.tensors["bias"][0, 0] + (frozen.bias if stored == "difference" else 0))
    outputs = [model(**inputs_of(ours.backbone)).logits for model in (ours, plain)]
    assert_close(*outputs, rtol=0, atol=1e-9)
    for logits in outputs:
        loss_of(logits).backward()
    for patch in ours.patches:
        module, frozen = (m.get_submodule(patch.site.path) for m in (plain, start))
        assert_close(patch.tensors["weight"].grad[0, 0], frozen.weight * module.weight.grad, rtol=0, atol=1e-9)
        if patch.site.biased:
            assert_close(patch.tensors["bias"].grad[0, 0], module.bias.grad, rtol=0, atol=1e-9)
    assert any(patch.site.biased for patch in ours.patches) == (family == "bert")


@torch.no_grad()
def test_differences_and_values_are_the_same_adaptation():
    made = [Adapted(zoo.build("bert", torch.float64), [Unfreeze(last=2, stored=s)], 2) for s in STORED]
    for difference, value in zip(*(a.patches for a in made), strict=True):
        for name, t in difference.tensors.items():
            change = torch.linspace(-0.3, 0.3, t.numel(), dtype=t.dtype).view_as(t)
            t.add_(change)
            value.tensors[name].add_(change)
    inputs = inputs_of(made[0].backbone)
    for index in (0, 1, torch.tensor([1, 0])):
        assert_close(*(a.states(inputs, index) for a in made), rtol=0, atol=1e-9)
    merged = [dict(a.merge(1).model.named_parameters()) for a in made]
    for name in merged[0]:
        assert_close(merged[0][name], merged[1][name], rtol=0, atol=1e-9)


@torch.no_grad()
def test_values_are_merged_bitwise():
    adapted = moved(Adapted(zoo.build("bert"), [Unfreeze(at=MAPS, stored="value")]))
    modules = {patch.site.path: patch for patch in adapted.patches}
    model = adapted.merge().model
    for path, patch in modules.items():
        assert torch.equal(model.get_submodule(path).weight, patch.tensors["weight"][0])
        assert torch.equal(model.get_submodule(path).bias, patch.tensors["bias"][0, 0])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3", "bart"])
@torch.no_grad()
def test_merged_is_attached_also_with_deltas_within_it(family, stored):
    within = [LoRA(2, at=("attn.q",))] + [BitFit(at=("attn.q", "attn.norm"))] * (family != "qwen3")
    adapted = moved(Adapted(zoo.build(family, torch.float64), [*within, Unfreeze(last=2, stored=stored)]))
    inputs = inputs_of(adapted.backbone)
    attached = adapted.states(inputs)
    assert_close(adapted.merge().states(inputs), attached, rtol=0, atol=1e-9)


@pytest.mark.parametrize("stored", STORED)
@torch.no_grad()
def test_biases_alone_are_bitfit_where_there_are_biases(stored):
    backbone = zoo.build("qwen2", torch.float64)
    delta = Unfreeze(at=("attn.*", "ffn.*"), of=("bias",), stored=stored)
    assert {site.name[9:] for site in sites_of(delta, backbone)} == {"attn.q", "attn.k", "attn.v"}
    pair = [Adapted(zoo.build("qwen2", torch.float64), [d]) for d in (delta, BitFit(at=("attn.q", "attn.k", "attn.v")))]
    inputs = inputs_of(backbone)
    outputs = [moved(adapted).states(inputs) for adapted in pair]
    assert pair[0].parameter_count() == pair[1].parameter_count() == 2 * (16 + 8 + 8)
    assert_close(*outputs, rtol=0, atol=1e-9)
    with pytest.raises(SiteError, match=r"Unfreeze has nothing to train at \['attn.o'\]: none of .* layers.0.attn.o"):
        Adapted(backbone, [Unfreeze(at=("attn.o",), of=("bias",))])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"layers.1"}),
        ({"last": 1}, {"layers.1"}),
        ({"last": 2}, {"layers.0", "layers.1"}),
        ({"at": ("layers[0].ffn.*",)}, {"layers.0"}),
    ],
)
def test_it_goes_to_the_last_layers_or_where_it_is_told_to(options, names):
    sites = sites_of(Unfreeze(**options), zoo.build("bert"))
    assert {site.name[:8] for site in sites} == names


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(
    ("of", "weights", "biases"), [(("weight",), 1, 0), (("bias",), 0, 1), (("weight", "bias"), 1, 1)]
)
def test_the_count_is_the_closed_form(stored, of, weights, biases):
    maps = [(16, 16)] * 4 + [(16, 24), (24, 16)]  # in, out
    count = weights * (sum(i * o for i, o in maps) + 2 * 16) + biases * (sum(o for _, o in maps) + 2 * 16)
    assert Adapted(zoo.build("bert"), [Unfreeze(of=of, stored=stored)]).parameter_count() == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 0}, r"unfreeze: got last=0, at=\(\); give last >= 1, or at, or neither \(last=1\)"),
        ({"last": 1, "at": ["attn.q"]}, r"unfreeze: got last=1, at=\('attn.q',\); give last >= 1, or at, or neither"),
        ({"of": []}, r"unfreeze: got of=\(\), stored='difference'; possible: one or both of \['weight', 'bias'\]"),
        ({"of": ["scale"]}, "delta 'unfreeze', option of.0: got 'scale'"),
        ({"stored": "both"}, "delta 'unfreeze', option stored: got 'both'"),
    ],
)
def test_a_wrong_option_is_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        registry.build("deltas", "unfreeze", options)


def test_a_wrong_option_in_python_is_an_error_too():
    with pytest.raises(ConfigError, match=r"unfreeze: got of=\('weight',\), stored='both'; possible: .* stored in"):
        Unfreeze(of=("weight",), stored="both")
