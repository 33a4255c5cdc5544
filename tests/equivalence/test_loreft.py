"""LoReFT edits a subspace of the hidden states that is spanned by orthonormal rows, and counts as its paper says."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltaprompt.backbone.sites import Site
from deltaprompt.compose import Adapted
from deltaprompt.deltas.loreft import LoReFT
from deltaprompt.errors import ConfigError, SiteError
from tests import backbones_zoo as zoo
from tests.backbones_zoo import inputs_of
from tests.references import AFTER, AT, agree, behind, pairs_of

D, R = 16, 3
LAYERS = {"bert": ("layer.0", "layer.1"), "llama": ("layers.0", "layers.1"), "t5": ("block.0", "block.1")}


def gram_schmidt(raw):
    """Each row less what lies along those before it, at length 1."""
    rows = []
    for row in raw:
        for done in rows:
            row = row - (row @ done) * done
        rows.append(row / row.norm())
    return torch.stack(rows)


class Reference(nn.Module):
    """h + Rᵀ (W h + b − R h)."""

    def __init__(self):
        super().__init__()
        for name, shape in {"raw": (R, D), "w": (R, D), "b": (R,)}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float64)))

    def forward(self, h):
        r = gram_schmidt(self.raw)
        return h + (nn.functional.linear(h, self.w, self.b) - nn.functional.linear(h, r)) @ r


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_it_edits_what_leaves_every_layer(family):
    ours = Adapted(zoo.build(family, torch.float64), [LoReFT(R)])
    theirs = zoo.build(family, torch.float64).model
    agree(ours, theirs, pairs_of(ours, behind(theirs, LAYERS[family], Reference)))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_it_edits_what_leaves_a_linear_map(family):
    ours = Adapted(zoo.build(family, torch.float64), [LoReFT(R, at=AT[family])])
    theirs = zoo.build(family, torch.float64).model
    agree(ours, theirs, pairs_of(ours, behind(theirs, AFTER[family], Reference)))


@torch.no_grad()
def test_rows_that_are_orthonormal_stay_as_they_are():
    """So that the R of another implementation is taken over as it is: here that of PyTorch's own parametrisation."""
    theirs = nn.utils.parametrizations.orthogonal(nn.Linear(D, R, bias=False, dtype=torch.float64))
    ours = Adapted(zoo.build("bert", torch.float64), [LoReFT(R, at=("attn.o",))])
    ours.patches[0].tensors["raw"][0].copy_(theirs.weight)
    assert_close(ours.patches[0].slot(0)["r"], theirs.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rows_are_orthonormal_in_any_precision_of_the_backbone(dtype):
    ours = Adapted(zoo.build("bert", dtype), [LoReFT(R, at=("attn.o",))], slots=3, seeds=[1, 2, 3])
    for tensor in (patch.tensors["raw"] for patch in ours.patches):
        tensor.mul_(5.0).add_(0.1)
    r = torch.stack([ours.patches[0].slot(slot)["r"] for slot in range(3)])
    assert r.dtype == torch.float32
    assert_close(r @ r.mT, torch.eye(R).expand(3, R, R), rtol=0, atol=1e-6)
    ours.to(torch.bfloat16)
    assert ours.patches[0].slot(0)["r"].dtype == torch.bfloat16
    assert_close(ours.patches[0].slot(0)["r"].float(), r[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_while_layers_are_computed_again(dtype):
    ours = Adapted(zoo.build("llama", dtype), [LoReFT(R, at=("attn.o",))]).train()
    ours.checkpointing()
    ours(**inputs_of(ours.backbone)).logits.float().square().mean().backward()
    ours.checkpointing(False)
    assert all(p.grad.isfinite().all() for _, p in ours.parts())
    assert all(p.grad.any() for _, p in ours.parts())


def test_the_count_on_llama_7b_is_the_papers():
    """0.031 % with r = 8 at all 32 layers of LLaMA-7B."""
    layer = Site("layers.0", "model.layers.0", "layer", 4096, 4096)
    count = sum(param.size for param in LoReFT(8).params(layer).values())
    assert count == 2 * 8 * 4096 + 8
    assert round(100 * 32 * count / 6_738_415_616, 3) == 0.031


def test_a_rank_above_the_width_is_refused_by_name():
    message = (
        "loreft: there are no 17 orthogonal directions in the 16 outputs of layers.0.attn.o; rank <= 16 is possible"
    )
    with pytest.raises(SiteError, match=message):
        LoReFT(17).params(Site("layers.0.attn.o", "o", "linear", 16, 16))


def test_an_impossible_rank_is_refused():
    with pytest.raises(ConfigError, match="loreft: got rank=0; rank >= 1 is possible"):
        LoReFT(0)
