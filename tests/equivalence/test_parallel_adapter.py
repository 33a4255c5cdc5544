"""The scaled parallel adapter reads what enters a block and adds to what leaves it, and counts as its paper says."""

import pytest
import torch
from torch import nn

from deltaprompt.backbone.sites import Site
from deltaprompt.compose import Adapted
from deltaprompt.deltas.parallel_adapter import ParallelAdapter
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.errors import ConfigError
from tests import backbones_zoo as zoo
from tests.references import agree

M, S = 6, 2.5


class Beside(nn.Module):
    """block(x) + s · f(x) with f(x) = W_up ReLU(W_down x + b_down) + b_up."""

    def __init__(self, block, inputs, outputs):
        super().__init__()
        self.block = block
        self.down = nn.Linear(inputs, M, dtype=torch.float64)
        self.up = nn.Linear(M, outputs, dtype=torch.float64)

    def forward(self, x):
        return self.block(x) + S * self.up(torch.relu(self.down(x)))

    def parts(self):
        return {
            "down": self.down.weight,
            "down_bias": self.down.bias,
            "up": self.up.weight,
            "up_bias": self.up.bias,
        }


class BertOutput(nn.Module):
    """LayerNorm(block(x) + x): a BERT layer behind its attention, with all of the block in its last module."""

    def __init__(self, block, norm):
        super().__init__()
        self.block, self.norm = block, norm

    def forward(self, _, x):
        return self.norm(self.block(x) + x)


def beside_every_block(family, model):
    """The references put beside the feed-forward blocks of a plain model, in their order."""
    made = []
    if family == "bert":
        for layer in model.bert.encoder.layer:
            made.append(Beside(nn.Sequential(layer.intermediate, layer.output.dense), 16, 16))
            layer.intermediate, layer.output = nn.Identity(), BertOutput(made[-1], layer.output.LayerNorm)
    elif family == "llama":
        for layer in model.model.layers:
            layer.mlp = Beside(layer.mlp, 16, 16)
            made.append(layer.mlp)
    else:
        for layer in (*model.encoder.block, *model.decoder.block):
            layer.layer[-1].DenseReluDense = Beside(layer.layer[-1].DenseReluDense, 16, 16)
            made.append(layer.layer[-1].DenseReluDense)
    return made


def pairs_of(ours, references):
    """Each tensor of each site, and the reference's."""
    each = zip(ours.patches, references, strict=True)
    return [(tensor, r.parts()[name]) for patch, r in each for name, tensor in patch.tensors.items()]


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "t5-gated"])
def test_it_stands_beside_the_feed_forward_block(family):
    ours = Adapted(zoo.build(family, torch.float64), [ParallelAdapter(bottleneck=M, scale=S)])
    theirs = zoo.build(family, torch.float64).model
    agree(ours, theirs, pairs_of(ours, beside_every_block(family, theirs)))


def test_it_stands_beside_a_linear_map():
    """BERT's first feed-forward map, which is wider behind than in front."""
    ours = Adapted(zoo.build("bert", torch.float64), [ParallelAdapter(bottleneck=M, scale=S, at=("ffn.up",))])
    theirs = zoo.build("bert", torch.float64).model
    references = []
    for layer in theirs.bert.encoder.layer:
        layer.intermediate.dense = Beside(layer.intermediate.dense, 16, 24)
        references.append(layer.intermediate.dense)
    agree(ours, theirs, pairs_of(ours, references))


def test_mam_on_bart_large_counts_as_its_paper_says():
    """6.7 % of BART-large: a prefix of 30 at 36 attentions, and a bottleneck of 512 at 24 feed-forward blocks."""
    block = Site("layers.0.ffn", "fc2", "ffn", 1024, 1024, entry="fc1")
    count = sum(param.size for param in ParallelAdapter().params(block).values())
    assert count == 2 * 512 * 1024 + 512 + 1024
    attention = Site("layers.0.attn", "self_attn", "attn", 0, 1024, heads=16)
    prefix = sum(param.size for param in Prefix(30).params(attention).values())
    assert round(100 * (24 * count + 36 * prefix) / 406_290_432, 1) == 6.7


@pytest.mark.parametrize(
    ("option", "value"), [("bottleneck", 0), ("scale", 0.0), ("scale", float("nan")), ("activation", "swish")]
)
def test_impossible_options_are_refused(option, value):
    message = (
        "parallel_adapter: got bottleneck=.*, scale=.*, activation='.*'; possible: bottleneck >= 1, scale > 0, "
        r"activation in \['gelu', 'relu', 'silu', 'tanh'\]"
    )
    with pytest.raises(ConfigError, match=message) as error:
        ParallelAdapter(**{option: value})
    assert f"{option}={value!r}" in str(error.value)
