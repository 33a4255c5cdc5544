"""Laws of merging: merged is attached, taken back it is bitwise what it was; or it is refused and nothing changed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from deltaprompt import registry
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Mergeable
from deltaprompt.deltas.adapter import Adapter
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.ia3 import IA3
from deltaprompt.deltas.ln_tuning import LNTuning
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.errors import ConfigError, SiteError
from deltaprompt.model import Model, Task
from deltaprompt.model.saved import open_
from deltaprompt.types import Example
from tests import backbones_zoo as zoo
from tests.adapted_zoo import DELTAS, gradients, loss_of, made, mask_of, same, shake, snapshot
from tests.backbones_zoo import inputs_of

MERGEABLE = [n for n in DELTAS if issubclass(registry.variant("deltas", n), Mergeable)]
FAMILIES = list(zoo.FAMILIES)


def adapted_to(family, *deltas, slots=1, dtype=torch.float64):
    return shake(Adapted(zoo.build(family, dtype), deltas, slots))


def rounding(family):
    """Gemma's norms compute in float32, whatever the model's precision is."""
    return 1e-5 if family.startswith("gemma") else 1e-9


def refused(adapted, message, error=SiteError, slot=0):
    """Merging says so, and everything is as it was."""
    inputs = inputs_of(adapted.backbone)
    before, states = snapshot(adapted.backbone), adapted.states(inputs)
    with pytest.raises(error, match=message):
        adapted.merge(slot)
    assert same(snapshot(adapted.backbone), before)
    assert torch.equal(adapted.states(inputs), states)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_is_attached_and_taken_back_is_as_it_was(name, family):
    backbone = zoo.build(family, torch.float64)
    inputs, plain = inputs_of(backbone), snapshot(backbone)
    adapted = shake(Adapted(backbone, [made(name)], 2))
    if name == "bitfit" and not all(patch.site.biased for patch in adapted.patches):
        refused(adapted, "BitFit needs a bias at .* to be merged into, and .* has none", slot=1)
        return
    attached, states = snapshot(backbone), [adapted.states(inputs, slot).detach() for slot in (0, 1)]
    for slot in (1, 0):
        assert adapted.merge(slot) is backbone
        merged = snapshot(backbone)
        at_norms = any(patch.site.kind == "norm" for patch in adapted.patches)
        assert_close(backbone.states(inputs), states[slot], rtol=0, atol=rounding(family) if at_norms else 1e-9)
        assert merged["hooks"] == plain["hooks"]
        assert merged["identity"] == plain["identity"]
        assert all(p.requires_grad for p in backbone.model.parameters())
        adapted.unmerge()
        assert same(snapshot(backbone), attached)
        assert [torch.equal(adapted.states(inputs, other), states[other]) for other in (0, 1)] == [True, True]
    loss_of(adapted.states(inputs), mask_of(inputs)).backward()  # and training goes on
    assert any(g.any() for g in gradients(adapted).values())
    assert all(p.grad is None for p in backbone.model.parameters())
    adapted.remove()
    assert same(snapshot(backbone), plain)


AT = ("attn.v", "ffn.down")
LINEAR = {  # every mergeable delta at the same maps, of which one may be a part of a fused map
    name: IA3(AT[:1], AT[1:]) if name == "ia3" else replace(made(name), at=AT)
    for name in MERGEABLE
    if name != "ln_tuning"
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "phi"])
@pytest.mark.parametrize("second", LINEAR)
@pytest.mark.parametrize("first", LINEAR)
def test_several_at_one_map_are_merged_in_their_order(first, second, family):
    adapted = adapted_to(family, LINEAR[first], LINEAR[second], LoRA(2, at=AT))
    inputs = inputs_of(adapted.backbone)
    states = adapted.states(inputs)
    assert_close(adapted.merge().states(inputs), states, rtol=0, atol=1e-9)
    adapted.unmerge()
    assert torch.equal(adapted.states(inputs), states)


NORMS = {
    "scales": (LNTuning(), LNTuning()),
    "scales and biases": (LNTuning(), BitFit(at=("*norm",)), LNTuning()),
    "norms and maps": (LNTuning(), LoRA(2, at=("attn.o",)), replace(made("unfreeze"), at=("*norm", "attn.o"))),
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma", "gemma3", "qwen3", "t5"])
@pytest.mark.parametrize("deltas", NORMS.values(), ids=NORMS)
def test_norms_that_multiply_by_one_and_their_weight_are_merged_into_as_well(deltas, family):
    adapted = adapted_to(family, *deltas)
    inputs = inputs_of(adapted.backbone)
    if BitFit(at=("*norm",)) in deltas and not all(patch.site.biased for patch in adapted.patches):
        refused(adapted, "BitFit needs a bias at .*norm to be merged into")
        return
    states = adapted.states(inputs)
    assert_close(adapted.merge().states(inputs), states, rtol=0, atol=rounding(family))
    adapted.unmerge()
    assert torch.equal(adapted.states(inputs), states)


@pytest.mark.parametrize(("family", "offset"), [("gemma", 1), ("gemma3", 1), ("llama", 0), ("bert", 0)])
@torch.no_grad()
def test_a_norms_factor_is_that_of_what_it_multiplies_by(family, offset):
    adapted = adapted_to(family, LNTuning())
    norms = [(adapted.model.get_submodule(patch.site.path).weight, patch.slot(0)["l"][0]) for patch in adapted.patches]
    expected = [(offset + weight) * factor - offset for weight, factor in norms]
    adapted.merge()
    for (weight, _), new in zip(norms, expected, strict=True):
        assert_close(weight.data, new, rtol=0, atol=1e-15)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma2", "t5", "bart"])
@torch.no_grad()
def test_a_merged_backbone_is_a_model_of_transformers(tmp_path, family):
    adapted = adapted_to(family, LoRA(2, at=("attn.v", "ffn.down")), IA3(), LNTuning())
    inputs = inputs_of(adapted.backbone)
    attached = adapted(**inputs).logits
    merged = adapted.merge().model
    logits = merged(**inputs).logits
    with zoo.quiet():
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path, dtype=torch.float64).eval()
    state = merged.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert_close(again(**inputs).logits, logits, rtol=0, atol=1e-9)
    assert_close(logits, attached, rtol=0, atol=rounding(family))
    assert again.config._attn_implementation == merged.config._attn_implementation
    adapted.unmerge()
    assert torch.equal(adapted(**inputs).logits, attached)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_merging_into_half_precision_rounds_once(dtype):
    adapted = adapted_to("llama", LoRA(2), slots=2, dtype=dtype)
    before = snapshot(adapted.backbone)
    patch = adapted.patches[0]
    weight, w = adapted.model.get_submodule(patch.site.path).weight, patch.slot(1)
    exact = weight.double() + 8.0 * (w["b"].double() @ w["a"].double())
    adapted.merge(1)
    assert weight.dtype == dtype
    assert_close(weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    adapted.unmerge()
    assert same(snapshot(adapted.backbone), before)


@pytest.mark.parametrize("name", [n for n in DELTAS if n not in MERGEABLE])
def test_what_is_no_change_of_a_map_is_not_merged(name):
    message = "has no form in weights: it is no linear change of a map. Keep it attached"
    refused(adapted_to("bert", LoRA(), made(name)), message)


@pytest.mark.parametrize("name", MERGEABLE)
def test_what_is_gated_is_not_merged(name):
    message = "has no form in weights where it is gated: the gate is another for every token"
    refused(adapted_to("bert", LoRA(), replace(made(name), gated=True)), message)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_what_is_tied_is_not_merged_into(family):
    refused(adapted_to(family, LoRA(), LoRA(at=("head",))), "cannot be merged at head: its weight is also that of")


class Odd(torch.Tensor):
    """A tensor of another make, as of quantised or sharded weights."""


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (lambda w: torch.nn.Parameter(w.to(torch.int8), requires_grad=False), "keeps its weight as Tensor of int8"),
        (lambda w: torch.nn.Parameter(w.data.as_subclass(Odd), requires_grad=False), "as Odd of float64"),
    ],
    ids=["whole numbers", "a subclass"],
)
def test_what_is_quantised_is_not_merged_into(weight, told):
    adapted = adapted_to("bert", LoRA(), LoRA(at=("attn.o",)))
    module = adapted.model.get_submodule(adapted.backbone.sites["layers.1.attn.o"].path)
    before = snapshot(adapted.backbone)
    kept = module.weight
    module.weight = weight(kept)
    message = f"cannot be merged at layers.1.attn.o: .* {told}, which would round the change away. Keep the delta"
    with pytest.raises(SiteError, match=message):
        adapted.merge()
    module.weight = kept
    assert same(snapshot(adapted.backbone), before)


@pytest.mark.parametrize("slot", [2, -1])
def test_a_slot_that_is_not_there_is_not_merged(slot):
    adapted = adapted_to("bert", LoRA(), slots=2)
    refused(adapted, f"adaptation {slot} was named; 0 to 1 are possible", ConfigError, slot)


def test_merging_twice_and_taking_back_nothing_are_errors():
    adapted = adapted_to("bert", LoRA())
    with pytest.raises(ConfigError, match="nothing is merged; merge.. first"):
        adapted.unmerge()
    adapted.merge()
    merged = snapshot(adapted.backbone)
    for change in (Adapted.merge, Adapted.detach, lambda a: a.attach(LoRA())):
        with pytest.raises(ConfigError, match="the deltas are merged or removed; unmerge.. first, or make a new"):
            change(adapted)
    assert same(snapshot(adapted.backbone), merged)
    adapted.unmerge()
    with pytest.raises(ConfigError, match="nothing is merged"):
        adapted.unmerge()


def test_what_is_merged_stays_merged_when_the_deltas_are_removed():
    adapted = adapted_to("bert", LoRA(), BitFit())
    inputs = inputs_of(adapted.backbone)
    states = adapted.states(inputs)
    adapted.merge()
    merged = snapshot(adapted.backbone)
    assert_close(adapted.remove().states(inputs), states)
    assert same(snapshot(adapted.backbone), merged)
    with pytest.raises(ConfigError, match="nothing is merged"):
        adapted.unmerge()


def test_a_copy_is_taken_back_by_itself():
    adapted = adapted_to("bert", LoRA())
    inputs = inputs_of(adapted.backbone)
    states = adapted.states(inputs)
    merged = adapted.merge().states(inputs)
    twin = copy.deepcopy(adapted)
    twin.unmerge()
    assert torch.equal(twin.states(inputs), states)
    assert torch.equal(adapted.backbone.states(inputs), merged)


def test_merging_one_of_two_leaves_the_other_as_it_is():
    """Taken back, it lies around the other."""
    backbone = zoo.build("bert", torch.float64)
    inner = shake(Adapted(backbone, [LoRA(at=AT)]))
    outer = shake(Adapted(backbone, [Adapter(at=AT), Prefix(2)]))
    inputs = inputs_of(backbone)
    states = outer.states(inputs)
    inner.merge()
    assert_close(outer.states(inputs), states, rtol=0, atol=1e-9)
    assert not any(p.requires_grad for p in backbone.model.parameters())  # the other holds it still
    inner.unmerge()
    turned = Adapted(zoo.build("bert", torch.float64), [Adapter(at=AT), Prefix(2), LoRA(at=AT)])
    with torch.no_grad():
        for tensor, (_, p) in zip((p for each in (outer, inner) for _, p in each.parts()), turned.parts(), strict=True):
            p.copy_(tensor)
    assert torch.equal(inner.states(inputs), turned.states(inputs))
    assert not torch.allclose(turned.states(inputs), states)


def test_a_merged_model_is_not_saved(tmp_path):
    """Its backbone is another while it is merged, and would be taken for the one that it was made on."""
    model = Model(zoo.build("bert"), Task("{text} {mask}", {"bad": "bad", "good": "good"}), [LoRA()])
    shake(model.adapted)
    answers = model.probabilities([Example({"text": "a film"})])
    model.adapted.merge()
    with pytest.raises(ConfigError, match="the deltas are merged or removed; unmerge.. first"):
        model.save(tmp_path)
    model.adapted.unmerge()
    model.save(tmp_path)
    model.adapted.remove()
    with pytest.raises(ConfigError, match="the deltas are merged or removed"):
        model.save(tmp_path)
    assert torch.equal(open_(tmp_path, model.backbone).probabilities([Example({"text": "a film"})]), answers)


@torch.no_grad()
def test_what_was_merged_last_is_unmerged_first():
    backbone = zoo.build("bert", torch.float64)
    own = {name: p.clone() for name, p in backbone.model.named_parameters()}
    first, second = (shake(Adapted(backbone, [LoRA(2)])) for _ in range(2))
    first.merge()
    second.merge()
    with pytest.raises(ConfigError, match="other deltas were merged into this backbone later"):
        first.unmerge()
    second.unmerge()
    first.unmerge()
    first.remove()
    second.remove()
    assert all(torch.equal(p, own[name]) for name, p in backbone.model.named_parameters())
