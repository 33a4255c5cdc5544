"""Laws of every delta on every backbone family. A new file in `deltas/` is tested without being named here."""

import copy
import io
import pickle
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from deltaprompt import registry
from deltaprompt.compose import Adapted, sites_of
from deltaprompt.deltas._base import KeyValue, Mergeable
from deltaprompt.errors import ConfigError, SiteError
from tests import backbones_zoo as zoo
from tests.adapted_zoo import DELTAS, inputs_for, loss_of, made, mask_of, same, shake, snapshot
from tests.backbones_zoo import inputs_of

FAMILIES = list(zoo.FAMILIES)
OWN_ATTENTION = ("mpnet", "mpnet-encoder", "deberta-v2", "deberta-v3")
GENERATING = [f for f in FAMILIES if zoo.FAMILIES[f][1].endswith(("CausalLM", "LMHeadModel", "Generation"))]
PREFIXES = [d for d in DELTAS if issubclass(registry.variant("deltas", d), KeyValue)]
PAIRS = [
    pytest.param(d, f, id=f"{d}-{f}") for d in DELTAS for f in FAMILIES if d not in PREFIXES or f not in OWN_ATTENTION
]
every = pytest.mark.parametrize(("name", "family"), PAIRS)

CLOSED_FORMS = {  # numbers at one site, from the papers, with the default options
    "lora": lambda s: 8 * (s.inputs + s.outputs),
    "adapter": lambda s: 2 * 24 * s.outputs + 24 + s.outputs,
    "bitfit": lambda s: s.outputs,
    "ia3": lambda s: s.inputs if s.name.endswith("ffn.down") else s.outputs,
    "prefix": lambda s: 2 * 10 * s.outputs,
    "soft_prompt": lambda s: 20 * s.outputs,
}


@cache
def shared(family, dtype=torch.float64):
    """A backbone that tests attach to and remove from; that this leaves it as it was is a law of its own."""
    return zoo.build(family, dtype)


@contextmanager
def attached(name, family, slots=1, seeds=None, dtype=torch.float64, random=True):
    adapted = Adapted(shared(family, dtype), [made(name)], slots, seeds)
    try:
        yield shake(adapted) if random else adapted
    finally:
        adapted.eval().remove()


def four_rows(inputs):
    """The rows and as many others, which differ from them."""
    more = {n: t.clone() for n, t in inputs.items()}
    for n in more:
        if n.endswith("input_ids"):
            more[n][:, 0] += 1
    return {n: torch.cat([t, more[n]]) for n, t in inputs.items()}


def mixed_or_refused(family, run):
    """The result; None on DeBERTa, whose maps also run on the relative positions that all rows share."""
    try:
        return run()
    except SiteError as error:
        reason = str(error)
    assert family.startswith("deberta")
    assert "also maps what all rows of a batch share" in reason
    return None


@pytest.mark.parametrize("family", OWN_ATTENTION)
@pytest.mark.parametrize("name", PREFIXES)
def test_a_prefix_is_refused_where_attention_has_code_of_its_own(name, family):
    message = "Prefix cannot act at layers.0.attn: .* computes attention in code of its own"
    with pytest.raises(SiteError, match=message):
        Adapted(shared(family), [made(name)])
    assert all(p.requires_grad for p in shared(family).model.parameters())


@every
@torch.no_grad()
def test_it_is_the_identity_at_the_start_or_says_that_it_is_not(name, family):
    backbone = shared(family)
    inputs = inputs_of(backbone)
    before = backbone.states(inputs)
    with attached(name, family, random=False) as adapted:
        assert torch.equal(adapted.states(inputs), before) == made(name).identity_at_start
    with attached(name, family) as adapted:
        inputs = inputs_for(name, backbone)
        start = adapted.states(inputs)
        assert not torch.allclose(shake(adapted).states(inputs), start)


@every
def test_nothing_is_left_behind_after_removal(name, family):
    backbone = zoo.build(family, torch.float64)
    frozen = next(backbone.model.parameters()).requires_grad_(False)
    inputs = inputs_for(name, backbone)
    plain = inputs_of(backbone)
    with torch.no_grad():
        output, before = backbone.states(plain), snapshot(backbone)
    adapted = shake(Adapted(backbone, [made(name)]))
    assert not any(p.requires_grad for p in backbone.model.parameters())
    loss_of(adapted.states(inputs), mask_of(inputs)).backward()
    assert adapted.remove() is backbone
    assert same(snapshot(backbone), before)
    assert not frozen.requires_grad
    with torch.no_grad():
        assert torch.equal(backbone.states(plain), output)
    assert adapted.parameter_count() == 0


@every
def test_every_parameter_learns(name, family):
    """Within two steps, since a factor whose partner starts at zero has no gradient in the first. A bias of all keys
    never has one where attention adds no positions to them: softmax does not see what is added to all scores."""
    with attached(name, family, random=False) as adapted:
        inputs = inputs_for(name, adapted.backbone)
        if made(name).acts_on == ("embed",):
            inputs["input_ids"][0] = adapted.backbone.vocabulary + torch.arange(7)
        sgd = torch.optim.SGD([p for _, p in adapted.parts()], lr=0.1)
        largest = {n: 0.0 for n, _ in adapted.parts()}
        for _ in range(2):
            sgd.zero_grad()
            loss_of(adapted.states(inputs), mask_of(inputs)).backward()
            largest = {n: max(largest[n], float(p.grad.abs().max())) for n, p in adapted.parts()}
            sgd.step()
    assert largest
    assert {n for n, size in largest.items() if size < 1e-12 and not n.endswith((".k.bias", ".pos_k.bias"))} == set()
    assert all(p.grad is None for p in shared(family).model.parameters())


@every
@torch.no_grad()
def test_each_row_of_a_mixed_batch_is_that_adaptation_alone(name, family):
    with attached(name, family, slots=3) as adapted:
        inputs = four_rows(inputs_for(name, adapted.backbone))
        index = torch.tensor([2, 0, 1, 0])
        mixed = mixed_or_refused(family, lambda: adapted.states(inputs, index))
        if mixed is None:
            return
        for row, slot in enumerate(index.tolist()):
            alone = adapted.states({n: t[row : row + 1] for n, t in inputs.items()}, slot)
            assert_close(mixed[row], alone[0], rtol=0, atol=1e-6)
        assert not torch.allclose(adapted.states(inputs, 1), adapted.states(inputs, 2))


def trained(name, family, seeds, inputs, index):
    """Each slot's parameters after two steps on the sum of the rows' losses."""
    with attached(name, family, len(seeds), seeds, random=False) as adapted:
        adam = torch.optim.AdamW([p for _, p in adapted.parts()], lr=0.01)
        for _ in range(2):
            adam.zero_grad()
            loss_of(adapted.states(inputs, index), mask_of(inputs)).backward()
            adam.step()
        return {n: p.detach().clone() for n, p in adapted.parts()}


@every
def test_training_slots_at_once_is_training_each_alone(name, family):
    inputs = four_rows(inputs_for(name, shared(family)))
    index = torch.tensor([0, 1, 1, 0])
    together = mixed_or_refused(family, lambda: trained(name, family, [3, 4], inputs, index))
    if together is None:
        return
    for slot, seed in enumerate([3, 4]):
        rows = {n: t[index == slot] for n, t in inputs.items()}
        for n, p in trained(name, family, [seed], rows, None).items():
            if not n.endswith((".k.bias", ".pos_k.bias")):  # no gradient but rounding, which AdamW makes large
                assert_close(together[n][slot], p[0], rtol=0, atol=1e-6 if rounded(family) else 1e-9)


def rounded(family):
    """What is computed in float32 whatever the precision: the softmax of eager attention, Gemma's norms."""
    return shared(family).model.config._attn_implementation == "eager" or family.startswith("gemma")


@every
def test_merged_is_attached_or_refused_with_a_reason(name, family):
    adapted = shake(Adapted(zoo.build(family, torch.float64), [made(name)], 2))
    inputs = inputs_of(adapted.backbone)
    attached = adapted.states(inputs, 1)
    refused = None
    try:
        merged = adapted.merge(1)
    except SiteError as error:
        refused = str(error)
    if refused is not None:
        assert ("needs a bias at" if isinstance(made(name), Mergeable) else "has no form in weights") in refused
        assert torch.equal(adapted.states(inputs, 1), attached)  # nothing has changed
        assert_close(adapted.remove().states(inputs), shared(family).states(inputs), rtol=0, atol=0)
        return
    assert isinstance(made(name), Mergeable)
    # a weight that is used in float32 is rounded there with the delta in it
    assert_close(merged.states(inputs), attached, rtol=0, atol=1e-5 if rounded(family) else 1e-9)
    assert all(p.requires_grad for p in merged.model.parameters())


@every
def test_the_parameter_count_is_the_closed_form(name, family):
    sites = sites_of(made(name), shared(family))
    modules = set()
    for slots in (1, 3):
        with attached(name, family, slots) as adapted:
            count = adapted.parameter_count()
            assert sum(p.numel() for _, p in adapted.parts()) == slots * count
            assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == slots * count
            modules.add(len(list(adapted.modules())))
    assert len(modules) == 1
    if name in CLOSED_FORMS:
        assert count == sum(CLOSED_FORMS[name](site) for site in sites)


@every
@torch.no_grad()
def test_it_follows_the_precision_of_the_backbone(name, family):
    backbone = zoo.build(family, torch.bfloat16)
    inputs = inputs_for(name, backbone)
    adapted = shake(Adapted(backbone, [made(name)], 2))
    assert {p.dtype for _, p in adapted.parts()} == {torch.float32}
    for index in (0, torch.tensor([0, 1])):
        states = mixed_or_refused(family, lambda index=index: adapted.states(inputs, index))
        assert states is None or (states.dtype == torch.bfloat16 and states.isfinite().all())
    adapted.to(torch.bfloat16)
    assert adapted.states(inputs).dtype == torch.bfloat16
    adapted.remove()
    double = shake(Adapted(zoo.build(family), [made(name)])).to(torch.float64)
    with attached(name, family) as exact:
        assert_close(double.states(inputs), exact.states(inputs), rtol=0, atol=1e-5 if rounded(family) else 1e-6)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("name", DELTAS)
def test_it_starts_on_the_device_of_the_backbone(name, family):
    backbone = zoo.build(family)
    backbone.model.to("meta")
    assert {p.device.type for _, p in Adapted(backbone, [made(name)], 2).parts()} == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@every
@torch.no_grad()
def test_it_is_the_same_on_an_accelerator(name, family):
    adapted = shake(Adapted(zoo.build(family), [made(name)], 2))
    inputs = inputs_for(name, adapted.backbone)
    there = {n: t.to("cuda") for n, t in inputs.items()}
    here = adapted.states(inputs, 1)
    index = torch.tensor([1, 1], device="cuda")
    adapted.to("cuda")
    assert_close(adapted.states(there, 1).cpu(), here, rtol=0, atol=1e-3)
    mixed = mixed_or_refused(family, lambda: adapted.states(there, index))
    assert mixed is None or torch.allclose(mixed.cpu(), here, atol=1e-3)


@every
def test_it_learns_under_autocast(name, family):
    with attached(name, family, dtype=torch.float32) as adapted, torch.autocast("cpu", torch.bfloat16):
        inputs = inputs_for(name, adapted.backbone)
        loss_of(adapted.states(inputs), mask_of(inputs)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for _, p in adapted.parts())


def pickled(adapted):
    file = io.BytesIO()
    pickle.dump(adapted, file)
    file.seek(0)
    return pickle.load(file)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@every
@torch.no_grad()
def test_a_copy_is_equal_and_independent(name, family, copied):
    adapted = shake(Adapted(zoo.build(family), [made(name)], 2))
    inputs = inputs_for(name, adapted.backbone)
    states = adapted.states(inputs, 1)
    twin = copied(adapted)
    assert torch.equal(twin.states(inputs, 1), states)
    shake(twin)
    assert torch.equal(adapted.states(inputs, 1), states)
    changed = twin.states(inputs, 1)
    assert not torch.allclose(changed, states)
    adapted.remove()
    assert torch.equal(twin.states(inputs, 1), changed)
    assert twin.backbone.model is twin.model is not adapted.model
    assert all(id(p) not in {id(q) for q in adapted.parameters()} for p in twin.parameters())
    twin.remove()
    assert torch.equal(twin.backbone.states(inputs_of(twin.backbone)), adapted.states(inputs_of(adapted.backbone)))


@every
def test_checkpointing_gives_the_same_gradients(name, family):
    """Also where passes in different slots come before the backward pass."""
    if not shared(family).model.supports_gradient_checkpointing:
        with attached(name, family) as adapted, pytest.raises(ConfigError, match="train it without checkpointing"):
            adapted.checkpointing()
        return
    found = []
    for on in (False, True):
        with attached(name, family, slots=2) as adapted:
            inputs = inputs_for(name, adapted.backbone)
            adapted.train()
            adapted.checkpointing(on)
            losses = [(slot + 1) * loss_of(adapted.states(inputs, slot), mask_of(inputs)) for slot in (0, 1)]
            sum(losses).backward()
            adapted.checkpointing(False)
            found.append({n: p.grad for n, p in adapted.parts()})
    for n in found[0]:
        assert_close(found[1][n], found[0][n], rtol=0, atol=1e-6 if rounded(family) else 1e-9)
        assert found[0][n].any() or n.endswith(".k.bias")


@pytest.mark.parametrize("family", GENERATING)
@pytest.mark.parametrize("name", DELTAS)
@torch.no_grad()
def test_generating_with_a_cache_is_generating_without(name, family):
    with attached(name, family, slots=2, dtype=torch.float32) as adapted:
        inputs = inputs_for(name, adapted.backbone, "left" if adapted.backbone.kind == "causal" else "right")
        inputs = {n: t for n, t in inputs.items() if not n.startswith("decoder")}
        how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_scores": True}
        with adapted.routing.at(torch.tensor([1, 0])):
            kept, again = (
                adapted.model.generate(**inputs, **how, use_cache=cached, return_dict_in_generate=True)
                for cached in (True, False)
            )
        assert torch.equal(kept.sequences, again.sequences)
        scores = [torch.stack(out.scores) for out in (kept, again)]
        finite = scores[1].isfinite()
        assert_close(scores[0][finite], scores[1][finite], rtol=0, atol=1e-4)


@every
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing_at_real_positions(name, family, side):
    with attached(name, family, dtype=torch.float32) as adapted:
        kind = adapted.backbone.kind
        if side == "left" and kind != "causal":
            pytest.skip("padded on the right only")
        inputs = inputs_for(name, adapted.backbone, side)
        if kind == "causal":
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        real = inputs["attention_mask"][1].bool()
        row = {n: t[1:] if n.startswith("decoder") else t[1:, real] for n, t in inputs.items()}
        padded, alone = adapted.states(inputs)[1], adapted.states(row)[0]
        assert_close(padded if kind == "seq2seq" else padded[real], alone, rtol=0, atol=1e-5)
