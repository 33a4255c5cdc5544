"""The reparametrised prefix is peft's with `prefix_projection`, up to where the numbers lie."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.compose import Adapted
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.reparametrised_prefix import ReparametrisedPrefix
from deltaprompt.errors import ConfigError, SiteError
from tests import backbones_zoo as zoo
from tests.backbones_zoo import inputs_of

LENGTH, MID = 3, 10


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_it_computes_what_pefts_network_computes_and_learns_the_same(family):
    peft = pytest.importorskip("peft")
    backbone = zoo.build(family, torch.float64)
    attentions = [site for site in backbone.sites.values() if site.kind == "attn"]
    heads, width = attentions[0].heads, attentions[0].outputs
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=LENGTH,
        prefix_projection=True,
        encoder_hidden_size=MID,
        token_dim=width,
        num_layers=len(attentions),
        num_attention_heads=heads,
    )
    theirs = peft.PrefixEncoder(config).to(torch.float64)
    ours = Adapted(backbone, [ReparametrisedPrefix(LENGTH, embed=width, mid=MID)])
    assert ours.parameter_count() == sum(p.numel() for p in theirs.parameters())
    first, _, second = theirs.transform
    shared = ours.commons[0].tensors
    weight, bias = (t.unflatten(0, (len(attentions), 2, width)) for t in (second.weight, second.bias))
    with torch.no_grad():
        for name, t in (("prefix", theirs.embedding.weight), ("first", first.weight), ("first_bias", first.bias[None])):
            shared[name][0].copy_(t)
        for layer, patch in enumerate(ours.patches):
            for number, name in enumerate(("k", "v")):
                patch.tensors[f"second_{name}"][0].copy_(weight[layer, number])
                patch.tensors[f"second_{name}_bias"][0, 0].copy_(bias[layer, number])
    optimizers = [torch.optim.AdamW(m, lr=0.05) for m in ([p for _, p in ours.parts()], theirs.parameters())]
    for _ in range(3):
        made = theirs(torch.arange(LENGTH)).view(LENGTH, len(attentions), 2, heads, -1).permute(1, 2, 3, 0, 4)
        mine = torch.stack([torch.stack([patch.slot(0)[n] for n in ("k", "v")]) for patch in ours.patches])
        assert_close(mine, made, rtol=0, atol=1e-12)
        for optimizer, computed in zip(optimizers, (mine, made), strict=True):
            optimizer.zero_grad()
            (computed * torch.linspace(-1, 1, made.numel()).view_as(made)).tanh().sum().backward()
            optimizer.step()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@torch.no_grad()
def test_it_acts_as_the_plain_prefix_of_what_it_computes(family):
    ours = Adapted(zoo.build(family, torch.float64), [ReparametrisedPrefix(LENGTH, 4, MID)])
    plain = Adapted(zoo.build(family, torch.float64), [Prefix(LENGTH)])
    for one, other in zip(ours.patches, plain.patches, strict=True):
        for name in ("k", "v"):
            other.tensors[name][0].copy_(one.slot(0)[name])
    inputs = inputs_of(ours.backbone)
    assert torch.equal(ours.states(inputs), plain.states(inputs))
    sites = [patch.site for patch in ours.patches]
    shared = LENGTH * 4 + MID * 4 + MID
    assert ours.parameter_count() == shared + sum(2 * (MID + 1) * site.outputs for site in sites)
    ours.settle()
    assert ours.parameter_count() == plain.parameter_count()
    assert ours.deltas == (Prefix(LENGTH),)


@pytest.mark.parametrize("change", [{"length": 0}, {"embed": 0}, {"mid": 0}, {"init_std": -1.0}])
def test_what_is_not_possible_is_an_error(change):
    with pytest.raises(ConfigError, match="reparametrised_prefix: got .*length, embed, mid >= 1"):
        ReparametrisedPrefix(**change)


@pytest.mark.parametrize(("delta", "name"), [(Prefix(), "prefix"), (ReparametrisedPrefix(), "reparametrised_prefix")])
def test_unknown_heads_are_an_error(delta, name):
    site = replace(zoo.build("bert").sites["layers.0.attn"], heads=0)
    with pytest.raises(SiteError, match=f"^{name}: the number of heads at layers.0.attn is not known; .*cannot act"):
        delta.params(site)
