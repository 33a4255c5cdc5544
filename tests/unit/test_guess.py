"""Names by structure on made-up layers, for what no architecture of the spread shows."""

import pytest
from torch import nn

from deltaprompt.backbone.blocks import name_layer
from deltaprompt.backbone.guess import Text, guess, stacks_of


class Block(nn.Module):
    """A module with children of these names; dots make blocks in blocks."""

    def __init__(self, **children):
        super().__init__()
        for path, module in children.items():
            first, _, rest = path.partition("__")
            if rest:
                inner = self._modules.setdefault(first, Block())
                inner.add_module(rest.replace("__", "_"), module)
            else:
                self.add_module(first, module)


def linear(entering, leaving):
    return nn.Linear(entering, leaving)


def names(layer):
    return name_layer({path: module for path, module in layer.named_modules() if path})


@pytest.mark.parametrize(
    ("children", "named"),
    [
        (
            {"attn__combined": linear(4, 12), "attn__o": linear(4, 4)},
            {"attn.combined": "attn.qkv", "attn.o": "attn.o", "attn": "attn"},
        ),
        ({"ffn__one": linear(4, 8), "ffn__two": linear(8, 4)}, {"ffn.one": "ffn.up", "ffn.two": "ffn.down"}),
        ({"ffn__one": linear(4, 4), "ffn__two": linear(4, 4)}, {"ffn.one": "ffn.up", "ffn.two": "ffn.down"}),
        ({"mlp__w1": linear(4, 8), "mlp__w2": linear(8, 4)}, {"mlp.w1": "ffn.up", "mlp.w2": "ffn.down"}),
        (
            {"mlp__w1": linear(4, 8), "mlp__w2": linear(8, 4), "mlp__w3": linear(4, 8)},
            {"mlp.w1": "ffn.gate", "mlp.w2": "ffn.down", "mlp.w3": "ffn.up"},
        ),
        ({"mlp__one": linear(4, 16), "mlp__two": linear(8, 4)}, {"mlp.one": "ffn.gate+up", "mlp.two": "ffn.down"}),
        ({"fc1": linear(4, 8), "fc2": linear(8, 4)}, {"fc1": "ffn.up", "fc2": "ffn.down"}),
        (
            {"ssm__in_proj": linear(4, 16), "ssm__x_proj": linear(8, 3), "ssm__out_proj": linear(8, 4)},
            {"ssm.in_proj": "mixer.in", "ssm.x_proj": "mixer.x_proj", "ssm.out_proj": "mixer.out"},
        ),
        ({"something__else": linear(4, 8)}, {"something.else": "something.else"}),
        (
            {"attn__q_proj": linear(4, 4), "attn__indexer": Block(wk=linear(4, 4))},
            {"attn.q_proj": "attn.q", "attn.indexer.wk": "attn.indexer.wk", "attn": "attn"},
        ),
        (
            {"mlp__gate": linear(4, 3), "mlp__experts": nn.ModuleList([Block(up_proj=linear(4, 8))])},
            {"mlp.gate": "router", "mlp.experts.0.up_proj": "experts.0.up", "mlp": "ffn"},
        ),
        (
            {
                "mlp__shared_expert_gate": linear(4, 1),
                "mlp__experts": Block(),
                "mlp__shared_expert": Block(up=linear(4, 8)),
            },
            {"mlp.shared_expert_gate": "shared.router", "mlp.shared_expert.up": "shared.up", "mlp": "ffn"},
        ),
    ],
)
def test_maps_have_the_roles_that_they_play(children, named):
    assert names(Block(**children)) == named


@pytest.mark.parametrize(
    ("order", "named"),
    [
        (
            ["pre", "post_attention", "pre_ffn", "post_ffn"],
            ["attn.norm", "attn.post_norm", "ffn.norm", "ffn.post_norm"],
        ),
        (["input", "post_attention", "post_1", "post_2"], ["attn.norm", "ffn.norm", "attn.post_norm", "ffn.post_norm"]),
        (["ln_a", "ln_b", "ln_c", "ln_d"], ["attn.norm", "attn.post_norm", "ffn.norm", "ffn.post_norm"]),
        (["a", "b"], ["attn.norm", "ffn.norm"]),
        (["a"], ["attn.norm"]),
        (["mlp_last"], ["ffn.norm"]),
        (["a", "b", "post_mlp"], ["attn.norm", "ffn.norm", "ffn.post_norm"]),
        (["pre_ln", "ln1", "ln2"], ["pre_ln", "attn.norm", "ffn.norm"]),
        (["a", "b", "c"], ["a", "b", "c"]),
    ],
)
def test_norms_are_named_by_their_order_and_names(order, named):
    blocks = {"self_attn__q_proj": linear(4, 4), "mlp__up": linear(4, 8)}
    norms = {f"{name}_layernorm" if "ln" not in name else name: nn.LayerNorm(4) for name in order}
    found = names(Block(**blocks, **norms))
    expected = [name if "." in name or "ln" in name else f"{name}_layernorm" for name in named]
    assert [found[path] for path in norms] == expected


def test_two_sub_layers_are_told_by_their_numbers():
    twice = nn.ModuleList([Block(q_proj=linear(4, 4)), Block(q_proj=linear(4, 4))])
    assert names(Block(self_attn=twice)) == {
        "self_attn.0": "0.attn",
        "self_attn.1": "1.attn",
        "self_attn.0.q_proj": "0.attn.q",
        "self_attn.1.q_proj": "1.attn.q",
    }


def test_a_third_of_a_name_keeps_its_own_path():
    layer = Block(mlp=Block(up_proj=linear(4, 8)), mlp_b=Block(up_proj=linear(4, 8)))
    assert sorted(names(layer).values()) == ["ffn.up", "mlp_b.up_proj"]


def model(**stacks):
    return dict(Block(embed=nn.Embedding(3, 4), **stacks).named_modules())


def layer():
    return Block(mlp=Block(up_proj=linear(4, 8), down_proj=linear(8, 4)))


def test_of_several_stacks_the_nearest_to_the_words_is_meant():
    modules = model(layers=nn.ModuleList([layer()]), tower=Block(layers=nn.ModuleList([layer()])))
    assert stacks_of(modules, Text("", "embed")) == {"": [("layers.0",)]}


@pytest.mark.parametrize(
    ("stacks", "sides"),
    [
        ({"encoder": "layers", "decoder": "block"}, ["encoder.", "decoder."]),
        ({"low": "layers", "high": "layers"}, ["low.", "high."]),
        ({"low": "layers", "high": "stages"}, ["low.", "high.stages."]),
    ],
)
def test_several_stacks_are_told_by_their_paths(stacks, sides):
    modules = model(**{name: Block(**{inner: nn.ModuleList([layer()])}) for name, inner in stacks.items()})
    assert list(stacks_of(modules, Text("", "embed"))) == sides
    assert {n for n in guess(modules, [Text("", "embed")]).values() if n.endswith("layers.0")} == {
        f"{side}layers.0" for side in sides
    }


def test_lists_of_layers_in_layers_are_counted_through():
    groups = nn.ModuleList([nn.ModuleList([layer(), layer()]), nn.ModuleList([layer()])])
    assert stacks_of(model(blocks=groups), Text("", "embed")) == {
        "": [("blocks.0.0",), ("blocks.0.1",), ("blocks.1.0",)]
    }


def test_a_model_without_layers_has_its_word_embedding():
    assert guess(model(), [Text("", "embed", "encoder.")]) == {"embed": "encoder.embed"}
