"""LN tuning reaches what PEFT's reaches, which trains γ and β themselves: y ⊙ l + b with γ' = γ ⊙ l, β' = β ⊙ l + b."""

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.compose import Adapted
from deltaprompt.deltas.ln_tuning import LNTuning
from deltaprompt.errors import SiteError
from tests import backbones_zoo as zoo
from tests.backbones_zoo import inputs_of

TARGETS = {  # not the norm in BERT's head, which is no site
    "bert": r"bert\..*LayerNorm",
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
}


@torch.no_grad()
def moved(adapted, seed=0):
    """Every parameter away from where it starts."""
    g = torch.Generator().manual_seed(seed)
    for _, p in adapted.parts():
        p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=0.3)
    return adapted


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's remark on every norm
@pytest.mark.parametrize("family", list(TARGETS))
def test_it_is_pefts_on_the_scale_and_bias(family):
    """Forward, count, merged weights, and gradients by the chain rule: ∂l = γ ⊙ ∂γ' + β ⊙ ∂β', ∂b = ∂β'."""
    peft = pytest.importorskip("peft")
    config = peft.LNTuningConfig(target_modules=TARGETS[family])
    with zoo.quiet():
        theirs = peft.get_peft_model(zoo.build(family, torch.float64).model, config).eval()
    ours = moved(Adapted(zoo.build(family, torch.float64), [LNTuning()]))
    inputs = inputs_of(ours.backbone)
    assert ours.parameter_count() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    layers = []
    for patch in ours.patches:
        layer = theirs.get_submodule(f"base_model.model.{patch.site.path}.ln_tuning_layers.default")
        layers.append(layer)
        with torch.no_grad():
            layer.weight *= patch.tensors["l"][0, 0]
            if patch.site.biased:
                layer.bias.mul_(patch.tensors["l"][0, 0]).add_(patch.tensors["b"][0, 0])
    outputs = [model(**inputs).logits for model in (ours, theirs)]
    assert_close(*outputs, rtol=0, atol=1e-9)
    for logits in outputs:
        logits.tanh().square().mean().backward()
    for patch, layer in zip(ours.patches, layers, strict=True):
        frozen = ours.model.get_submodule(patch.site.path)
        expected = frozen.weight * layer.weight.grad
        if patch.site.biased:
            expected = expected + frozen.bias * layer.bias.grad
            assert_close(patch.tensors["b"].grad[0, 0], layer.bias.grad, rtol=0, atol=1e-9)
        assert_close(patch.tensors["l"].grad[0, 0], expected, rtol=0, atol=1e-9)
    merged, unloaded = ours.merge().model, theirs.merge_and_unload()
    for (name, p), (_, q) in zip(merged.named_parameters(), unloaded.named_parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", ["bert", "bart", "t5", "opt", "gemma", "gemma3", "qwen3", "modernbert"])
@torch.no_grad()
def test_merged_is_attached_also_where_two_meet(family):
    adapted = moved(Adapted(zoo.build(family, torch.float64), [LNTuning(), LNTuning(at=("ffn.norm",))]))
    inputs = inputs_of(adapted.backbone)
    attached = adapted.states(inputs)
    exact = not family.startswith("gemma")  # whose norms multiply by the weight in float32, whatever its precision
    assert_close(adapted.merge().states(inputs), attached, rtol=0, atol=1e-9 if exact else 1e-5)


def test_a_norm_that_multiplies_by_one_plus_its_weight_takes_it_up():
    adapted = moved(Adapted(zoo.build("gemma", torch.float64), [LNTuning(at=("layers[0].attn.norm",))]))
    (patch,) = adapted.patches
    norm = adapted.model.get_submodule(patch.site.path)
    expected = (1 + norm.weight) * patch.tensors["l"][0, 0] - 1
    assert patch.tensors.keys() == {"l"}
    adapted.merge()
    assert_close(norm.weight, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "norms", "biased"), [("bert", 5, 5), ("llama", 5, 0), ("qwen3", 9, 0), ("t5", 12, 0)]
)
def test_the_count_is_the_closed_form(family, norms, biased):
    adapted = Adapted(zoo.build(family), [LNTuning()])
    sizes = [4 if patch.site.name.endswith(("q_norm", "k_norm")) else 16 for patch in adapted.patches]
    assert len(sizes) == norms
    assert adapted.parameter_count() == sum(sizes) * (2 if biased else 1)


def test_it_goes_to_norms_only():
    with pytest.raises(SiteError, match=r"LNTuning acts on sites of kind norm; 'attn.q' is of kind linear"):
        Adapted(zoo.build("bert"), [LNTuning(at=("attn.q",))])
