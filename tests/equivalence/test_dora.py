"""DoRA is PEFT's where nothing is dropped, and the formula of the paper written out."""

import pytest
import torch
from torch.testing import assert_close

from deltaprompt import registry
from deltaprompt.compose import Adapted
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.dora import DoRA
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError
from tests import backbones_zoo as zoo
from tests.backbones_zoo import inputs_of

RANK, ALPHA = 4, 6.0
TARGETS = {
    "bert": (("query", "value", "intermediate.dense"), ("attn.q", "attn.v", "ffn.up")),
    "llama": (("q_proj", "v_proj", "down_proj"), ("attn.q", "attn.v", "ffn.down")),
}
PEFTS = {
    "a": "lora_A.default.weight",
    "b": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}


@torch.no_grad()
def moved(adapted, seed=0):
    """Every parameter away from where it starts."""
    g = torch.Generator().manual_seed(seed)
    for _, p in adapted.parts():
        p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=0.3)
    return adapted


def pair(family, stabilised):
    """The same DoRA by PEFT and by us, and pairs of corresponding tensors."""
    peft = pytest.importorskip("peft")
    targets, selectors = TARGETS[family]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(targets), bias="none", use_dora=True, use_rslora=stabilised
    )
    with zoo.quiet():
        theirs = peft.get_peft_model(zoo.build(family, torch.float64).model, config).eval()
    delta = DoRA(RANK, ALPHA, rank_stabilised=stabilised, at=selectors)
    ours = Adapted(zoo.build(family, torch.float64), [delta])
    pairs = []
    for patch in ours.patches:
        for name, other in PEFTS.items():
            pairs.append((patch.tensors[name], theirs.get_parameter(f"base_model.model.{patch.site.path}.{other}")))
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters())
    return theirs, ours, pairs


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("family", list(TARGETS))
def test_it_is_pefts_also_after_training(family, stabilised):
    theirs, ours, pairs = pair(family, stabilised)
    inputs = inputs_of(ours.backbone)
    assert ours.parameter_count() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    for (_, name), (mine, other) in zip(((p, n) for p in ours.patches for n in PEFTS), pairs, strict=True):
        if name == "magnitude":
            assert_close(mine[0, 0], other, rtol=0, atol=1e-12)  # both start at the norms of the frozen weight
    moved(ours)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine[0].view_as(other))
    optimizers = [torch.optim.AdamW([p[i] for p in pairs], lr=0.01) for i in range(2)]
    for _ in range(3):
        outputs = [model(**inputs).logits for model in (ours, theirs)]
        assert_close(*outputs, rtol=0, atol=1e-9)
        for optimizer, logits in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            logits.tanh().square().mean().backward()
            optimizer.step()
        for mine, other in pairs:
            assert_close(mine.grad[0].view_as(other), other.grad, rtol=0, atol=1e-9)
            assert_close(mine[0].view_as(other), other, rtol=0, atol=1e-9)
    merged, unloaded = ours.merge().model, theirs.merge_and_unload()
    for (name, p), (_, q) in zip(merged.named_parameters(), unloaded.named_parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=1e-9, msg=name)


def seen_at(adapted, path):
    """What enters and what leaves a module in one pass, the deltas at it included."""
    seen = []
    handle = adapted.model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    adapted.states(inputs_of(adapted.backbone))
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("constant", [True, False])
def test_it_is_the_formula_and_the_norm_is_a_constant_to_the_gradient(constant):
    delta = DoRA(RANK, ALPHA, at=("layers[0].ffn.up",))
    adapted = moved(Adapted(zoo.build("bert", torch.float64), [delta]))
    (patch,) = adapted.patches
    module = adapted.model.get_submodule(patch.site.path)
    x, y = seen_at(adapted, patch.site.path)
    a, b, m = (patch.tensors[n][0].detach().requires_grad_() for n in ("a", "b", "magnitude"))
    direction = module.weight + ALPHA / RANK * b @ a
    norm = direction.norm(dim=1)
    expected = x.detach() @ (m[0] / (norm.detach() if constant else norm) * direction.T).T.mT + module.bias
    assert_close(y, expected, rtol=0, atol=1e-9)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    (expected * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert_close(patch.tensors["magnitude"].grad[0], m.grad, rtol=0, atol=1e-9)
    for name, other in (("a", a), ("b", b)):
        assert torch.allclose(patch.tensors[name].grad[0], other.grad, rtol=0, atol=1e-9) == constant


@torch.no_grad()
def test_on_a_part_of_a_fused_map_it_is_the_formula():
    adapted = moved(Adapted(zoo.build("gpt2", torch.float64), [DoRA(at=("layers[0].attn.k",))]))
    (patch,) = adapted.patches
    module, part = adapted.model.get_submodule(patch.site.path), patch.site.part
    x, y = seen_at(adapted, patch.site.path)
    weight = part.take(module.weight).T  # [in, out] -> [out, in]
    direction = weight + 2 * patch.tensors["b"][0] @ patch.tensors["a"][0]
    own = patch.tensors["magnitude"][0].T * direction / direction.norm(dim=1, keepdim=True)
    assert_close(part.take(y), x @ own.T + part.take(module.bias), rtol=0, atol=1e-9)
    frozen = x @ module.weight + module.bias
    assert_close(y, part.put(frozen, part.take(y)), rtol=0, atol=1e-12)  # q and v are as they were


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@torch.no_grad()
def test_merged_is_attached_also_with_deltas_within_it(family):
    within = [LoRA(2, at=("attn.q",))] + [BitFit(at=("attn.q",))] * (family != "llama")
    adapted = moved(Adapted(zoo.build(family, torch.float64), [*within, DoRA(at=("attn.q", "ffn.up"))]))
    inputs = inputs_of(adapted.backbone)
    attached = adapted.states(inputs)
    assert_close(adapted.merge().states(inputs), attached, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_row_of_zeros_in_the_frozen_weight_is_no_division_by_zero(dtype):
    backbone = zoo.build("bert", dtype)
    backbone.model.get_submodule(backbone.sites["layers.0.attn.q"].path).weight[3] = 0
    inputs = inputs_of(backbone)
    before = backbone.states(inputs)
    adapted = Adapted(backbone, [DoRA()])
    assert torch.equal(adapted.states(inputs), before)
    assert moved(adapted).states(inputs).isfinite().all()


@torch.no_grad()
def test_dropout_is_of_what_enters_a_alone():
    backbone = zoo.build("bert", torch.float64)
    inputs = inputs_of(backbone)
    before = backbone.states(inputs)
    adapted = Adapted(backbone, [DoRA(dropout=0.5)]).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(adapted.states(inputs), before)  # B = 0: only the low-rank path could differ
        first, second = (moved(adapted).states(inputs), adapted.states(inputs))
    assert not torch.allclose(first, second)
    assert torch.equal(adapted.eval().states(inputs), adapted.states(inputs))


def test_the_count_is_the_closed_form():
    backbone = zoo.build("llama")
    adapted = Adapted(backbone, [DoRA(3, at=("attn.v", "ffn.down"))])
    sizes = [(16, 8), (24, 16)] * 2  # in, out of v and of down in both layers
    assert adapted.parameter_count() == sum(3 * (i + o) + o for i, o in sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "dora: got rank=0, dropout=0.0; rank >= 1 and 0 <= dropout < 1 are possible"),
        ({"dropout": 1.0}, "dora: got rank=8, dropout=1.0; rank >= 1 and 0 <= dropout < 1 are possible"),
    ],
)
def test_a_wrong_option_is_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        registry.build("deltas", "dora", options)
