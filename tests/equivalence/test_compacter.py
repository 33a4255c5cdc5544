"""Compacter is an adapter whose two maps are sums of Kronecker products, and counts as its paper says."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltaprompt.backbone.sites import Site
from deltaprompt.compose import Adapted
from deltaprompt.deltas.compacter import Compacter
from deltaprompt.errors import ConfigError, SiteError
from tests import backbones_zoo as zoo
from tests.references import AFTER, AT, agree, behind, pairs_of

D, M, N = 16, 8, 4
T5_BASE, T5_BASE_NORMS = 222_903_552, 62 * 768  # parameters; those of the layer norms, which the paper trains too


def at_width(delta, d):
    """The tensors at a map with d outputs."""
    return delta.params(Site("layers.0.attn.o", "o", "linear", d, d))


class Reference(nn.Module):
    """h + W_up σ(W_down h + b_down) + b_up with W = Σ_i A_i ⊗ (s_i t_iᵀ), each product written out."""

    def __init__(self, a):
        super().__init__()
        self.shared = [a]  # in a list: it is no parameter of the module
        shapes = {"down_s": (N, M // N), "down_t": (N, D // N), "up_s": (N, D // N), "up_t": (N, M // N)}
        for name, shape in {**shapes, "down_bias": (M,), "up_bias": (D,)}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float64)))

    def weight(self, s, t):
        return sum(torch.kron(self.shared[0][i], torch.outer(s[i], t[i])) for i in range(N))  # [out, in]

    def forward(self, h):
        inner = nn.functional.linear(h, self.weight(self.down_s, self.down_t), self.down_bias)
        return h + nn.functional.linear(nn.functional.gelu(inner), self.weight(self.up_s, self.up_t), self.up_bias)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_its_maps_are_sums_of_kronecker_products(family):
    delta = Compacter(phm_dim=N, reduction_factor=D // M, at=AT[family])
    ours = Adapted(zoo.build(family, torch.float64), [delta])
    theirs = zoo.build(family, torch.float64).model
    a = torch.empty(N, N, N, dtype=torch.float64, requires_grad=True)
    pairs = pairs_of(ours, behind(theirs, AFTER[family], lambda: Reference(a)))
    agree(ours, theirs, [*pairs, (ours.commons[0].tensors["a"], a)])


@torch.no_grad()
def test_the_map_down_starts_as_large_as_a_dense_one():
    """Normal numbers of variance 1 give numbers of variance 1: the mean over many starts."""
    ours = Adapted(zoo.build("bert"), [Compacter()], slots=400, seeds=range(400))
    patch = ours.patches[0]
    a, s, t = ours.commons[0].tensors["a"], patch.tensors["down_s"], patch.tensors["down_t"]
    weight = torch.einsum("zipq,zik,zij->zpkqj", a, s, t).reshape(400, -1, D)  # [slots, out, in]
    assert 0.8 < float(weight.square().sum(-1).mean()) < 1.2
    assert not any(p.tensors["up_s"].any() for p in ours.patches)


def test_all_sites_share_one_set_of_slow_matrices():
    ours = Adapted(zoo.build("bert"), [Compacter()])
    assert [name for name, _ in ours.parts() if name.endswith(".a")] == ["0.shared.a"]
    assert ours.parameter_count() == 4 * 3 * (16 + 4) + 4**3
    names = [patch.site.name for patch in ours.patches]
    assert names == [f"layers.{layer}.{site}" for layer in (0, 1) for site in ("attn.o", "ffn.down")]


@pytest.mark.parametrize(("sites", "percent"), [(48, 0.073), (24, 0.047)])
def test_the_count_on_t5_base_is_the_papers(sites, percent):
    """Compacter, two adapters in each of 24 layers, and Compacter++, one; with the layer norms (table 1)."""
    delta = Compacter(reduction_factor=32)
    count = sum(param.size for param in at_width(delta, 768).values())
    assert count == 3 * (768 + 24)
    shared = sum(param.size for param in delta.shared([]).values())
    assert shared == 4**3
    assert round(100 * (sites * count + shared + T5_BASE_NORMS) / T5_BASE, 3) == percent


@pytest.mark.parametrize(("width", "bottleneck"), [(768, 48), (312, 20), (64, 4), (16, 4)])
def test_the_bottleneck_is_rounded_up_to_a_multiple_of_n(width, bottleneck):
    assert at_width(Compacter(), width)["down_bias"].shape == (1, bottleneck)


def test_a_width_that_n_does_not_divide_is_refused_by_name():
    message = (
        "compacter: phm_dim=4 does not divide the 18 outputs of layers.0.attn.o; "
        "possible: 1, 2, 3, 6, 9, or choose other sites"
    )
    with pytest.raises(SiteError, match=message):
        at_width(Compacter(), 18)
    assert at_width(Compacter(phm_dim=3), 18)["up_s"].shape == (3, 6)


@pytest.mark.parametrize(("option", "value"), [("phm_dim", 0), ("reduction_factor", 0), ("activation", "swish")])
def test_impossible_options_are_refused(option, value):
    message = (
        "compacter: got phm_dim=.*, reduction_factor=.*, activation='.*'; possible: phm_dim >= 1, "
        r"reduction_factor >= 1, activation in \['gelu', 'relu', 'silu', 'tanh'\]"
    )
    with pytest.raises(ConfigError, match=message) as error:
        Compacter(**{option: value})
    assert f"{option}={value!r}" in str(error.value)


@torch.no_grad()
def test_one_product_is_a_plain_adapter_of_rank_one():
    """n = 1: A is a number, and the maps are a s tᵀ."""
    ours = Adapted(zoo.build("bert", torch.float64), [Compacter(phm_dim=1, reduction_factor=2, at=("attn.o",))])
    g = torch.Generator().manual_seed(0)
    for _, p in ours.parts():
        p.copy_(torch.randn(p.shape, generator=g))
    patch = ours.patches[0]
    w = patch.slot(0)
    y = torch.randn(2, 3, D, dtype=torch.float64, generator=g)
    inner = nn.functional.gelu(w["a"].item() * (y @ w["down_t"].mT) @ w["down_s"] + w["down_bias"])
    expected = y + w["a"].item() * (inner @ w["up_t"].mT) @ w["up_s"] + w["up_bias"]
    assert_close(patch.delta.after(w, patch.site, y, y), expected, rtol=0, atol=1e-12)
