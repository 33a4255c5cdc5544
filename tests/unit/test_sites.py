"""Sites: selectors with alternatives, whole layers and blocks, and what is no linear map and no norm."""

import re

import pytest
import torch
from torch import nn

from deltaprompt.backbone.sites import Site, Sites, alternatives, is_norm, layer_of, linear_sizes
from deltaprompt.errors import SiteError

NAMES = [
    "embed",
    "layers.0",
    "layers.0.attn",
    "layers.0.attn.q",
    "layers.0.ffn.up",
    "layers.0.ffn.down",
    "layers.0.ffn",
    "layers.1",
    "layers.1.mixer.in",
    "layers.1.experts.0.up",
    "layers.1.experts.1.up",
    "layers.2",
    "layers.2.0.attn.q",
    "layers.2.1.attn.q",
    "norm",
]
KINDS = {"embed": "embed", "norm": "norm", "layers.0.attn": "attn", "layers.0.ffn": "ffn"}


def kind_of(name):
    return "layer" if re.fullmatch(r"layers\.\d", name) else KINDS.get(name, "linear")


PATHS = {"layers.0.ffn": "model.layers.0.ffn.down"}  # a block's is its last map's
ENTRIES = {"layers.0.ffn": "model.layers.0.ffn.up"}
SITES = Sites({n: Site(n, PATHS.get(n, f"model.{n}"), kind_of(n), 4, 4, entry=ENTRIES.get(n, "")) for n in NAMES})


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("layers[:]", ["layers.0", "layers.1", "layers.2"]),
        ("layers[-2:]", ["layers.1", "layers.2"]),
        ("layers[-1]", ["layers.2"]),
        ("layers[1:]*", [n for n in NAMES if n.startswith(("layers.1", "layers.2"))]),
        ("ffn", ["layers.0.ffn"]),
        ("ffn.*", ["layers.0.ffn.up", "layers.0.ffn.down"]),
        ("attn.q", ["layers.0.attn.q", "layers.2.0.attn.q", "layers.2.1.attn.q"]),
        ("experts.*.up", ["layers.1.experts.0.up", "layers.1.experts.1.up"]),
        ("attn.qkv|attn.q", ["layers.0.attn.q", "layers.2.0.attn.q", "layers.2.1.attn.q"]),
        ("cross.q|mixer.in", ["layers.1.mixer.in"]),
        ("norm|embed", ["norm"]),
        ("re:up|down", ["layers.0.ffn.up", "layers.0.ffn.down", "layers.1.experts.0.up", "layers.1.experts.1.up"]),
        ("model.layers.0.ffn.down", ["layers.0.ffn.down"]),
        ("model.layers.1", ["layers.1"]),
        ("cross.q|", []),
    ],
)
def test_a_selector_selects(selector, names):
    assert [site.name for site in SITES.select([selector])] == names


def test_alternatives_that_all_match_nothing_are_named():
    with pytest.raises(SiteError, match=re.escape("none of the alternatives 'attn.qkv', 'cross.q' of selector")):
        SITES.select(["attn.qkv|cross.q"])


def test_a_site_is_spoken_of_by_any_alternative():
    site = SITES["layers.1.mixer.in"]
    assert site.among(["attn.q|mixer.in"])
    assert not site.among(["attn.q|mixer.out"])
    assert site.spoken_of("layers[0].mixer.in|embed") is not None  # ranges aside


def test_alternatives_are_split_except_in_expressions():
    assert alternatives("a|b.*|c") == ["a", "b.*", "c"]
    assert alternatives("re:a|b") == ["re:a|b"]


def test_the_layer_of_a_name():
    assert [layer_of(n) for n in ("embed", "layers.0", "encoder.layers.3.attn.q")] == [
        "",
        "layers.0",
        "encoder.layers.3",
    ]


def test_roles_are_without_numbers():
    assert SITES.roles == (
        *("embed", "layers[:]", "attn", "attn.q", "ffn.up", "ffn.down", "ffn", "mixer.in", "experts.*.up"),
        *("0.attn.q", "1.attn.q", "norm"),
    )
    assert SITES.layer_counts == {"": 3}


class Chooser(nn.Linear):
    """A router that inherits from Linear, as Llama 4's does."""

    def forward(self, x):
        y = super().forward(x)
        return y.softmax(-1), y


class Grouped(nn.Linear):
    """Maps side by side, as DeepSeek V4's are."""

    def forward(self, x):
        return super().forward(x).unflatten(-1, (2, -1))[..., 0, :]


class Plain(nn.Linear):
    """A linear map written down otherwise, as Falcon's is."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class TurnedNorm(nn.LayerNorm):
    """A norm of vectors that do not come last, as SqueezeBERT's is."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.fixture(autouse=True)
def transformers_made_them():
    for cls in (Chooser, Grouped, Plain, TurnedNorm):
        cls.__module__ = "transformers.models.made_up"


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        (nn.Linear(3, 4), (3, 4)),
        (Plain(3, 4), (3, 4)),
        (Chooser(3, 4), None),
        (Grouped(3, 4), None),
        (nn.Embedding(3, 4), None),
    ],
)
def test_linear_maps_are_told_by_what_they_do(module, sizes):
    assert linear_sizes(module) == sizes


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (nn.LayerNorm(3), True),
        (nn.RMSNorm(3), True),
        (TurnedNorm(3), False),
        (nn.Linear(3, 3), False),
        (nn.PReLU(3), False),
    ],
)
def test_norms_are_told_by_their_weights_and_names(module, told):
    assert is_norm(module) == told


def test_on_the_meta_device_nothing_is_run():
    with torch.device("meta"):
        assert linear_sizes(Plain(3, 4)) == (3, 4)
        assert is_norm(TurnedNorm(3))
