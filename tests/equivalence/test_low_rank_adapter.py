"""The low-rank adapter is an adapter whose two maps are products of thin ones, and counts as its paper says."""

import pytest
import torch
from torch import nn

from deltaprompt.backbone.sites import Site
from deltaprompt.compose import Adapted
from deltaprompt.deltas.low_rank_adapter import LowRankAdapter
from deltaprompt.errors import ConfigError
from tests import backbones_zoo as zoo
from tests.references import AFTER, AT, agree, behind, pairs_of

D, M, K = 16, 8, 2
T5_BASE, T5_BASE_NORMS = 222_903_552, 62 * 768  # parameters; those of the layer norms, which the paper trains too


class Reference(nn.Module):
    """h + W_up σ(W_down h + b_down) + b_up with W = W_l W_r of rank k, written out as dense maps."""

    def __init__(self, sigma):
        super().__init__()
        self.sigma = sigma
        shapes = {"down_left": (M, K), "down_right": (K, D), "up_left": (D, K), "up_right": (K, M)}
        for name, shape in {**shapes, "down_bias": (M,), "up_bias": (D,)}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float64)))

    def forward(self, h):
        inner = nn.functional.linear(h, self.down_left @ self.down_right, self.down_bias)
        return h + nn.functional.linear(self.sigma(inner), self.up_left @ self.up_right, self.up_bias)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
def test_it_is_an_adapter_with_maps_of_low_rank(family, activation):
    sigma = torch.tanh if activation == "tanh" else getattr(nn.functional, activation)
    delta = LowRankAdapter(reduction_factor=D // M, rank=K, activation=activation, at=AT[family])
    ours = Adapted(zoo.build(family, torch.float64), [delta])
    theirs = zoo.build(family, torch.float64).model
    agree(ours, theirs, pairs_of(ours, behind(theirs, AFTER[family], lambda: Reference(sigma))))


def test_it_goes_behind_attention_and_feed_forward():
    names = [patch.site.name for patch in Adapted(zoo.build("bert"), [LowRankAdapter()]).patches]
    assert names == [f"layers.{layer}.{site}" for layer in (0, 1) for site in ("attn.o", "ffn.down")]


def test_the_count_on_t5_base_is_the_papers():
    """0.073 % of T5-base, two adapters in each of 24 layers and the layer norms (table 1)."""
    at_one = LowRankAdapter().params(Site("o", "o", "linear", 768, 768))
    count = sum(param.size for param in at_one.values())
    assert count == 2 * (768 + 24) + 768 + 24
    assert round(100 * (48 * count + T5_BASE_NORMS) / T5_BASE, 3) == 0.073


@pytest.mark.parametrize(("width", "bottleneck"), [(768, 24), (100, 3), (16, 1)])
def test_the_bottleneck_is_rounded_down_and_at_least_one(width, bottleneck):
    assert LowRankAdapter().params(Site("o", "o", "linear", width, width))["down_bias"].shape == (1, bottleneck)


@pytest.mark.parametrize(("option", "value"), [("reduction_factor", 0), ("rank", 0), ("activation", "swish")])
def test_impossible_options_are_refused(option, value):
    message = (
        "low_rank_adapter: got reduction_factor=.*, rank=.*, activation='.*'; possible: reduction_factor >= 1, "
        r"rank >= 1, activation in \['gelu', 'relu', 'silu', 'tanh'\]"
    )
    with pytest.raises(ConfigError, match=message) as error:
        LowRankAdapter(**{option: value})
    assert f"{option}={value!r}" in str(error.value)
