"""Equal to PEFT where PEFT has the same method: LoRA (also while training) and prefix tuning.

PEFT puts a prefix into the cache, so that the real tokens are n positions further on, while ours keep their positions.
With rotary embeddings R, a query at p sees a prefix key K as (R_{p+n} q)·K there and as (R_p q)·K' here: the two are
the same for K' = R_{-n} K, and what real tokens see of one another depends on distances only. The tests convert with
the model's own rotary angles.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.compose import Adapted
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from tests import backbones_zoo as zoo
from tests.backbones_zoo import inputs_of

peft = pytest.importorskip("peft")

RANK, ALPHA, LENGTH = 4, 6.0, 3
TARGETS = {
    "bert": (("query", "value", "intermediate.dense"), ("attn.q", "attn.v", "ffn.up")),
    "llama": (("q_proj", "v_proj", "down_proj"), ("attn.q", "attn.v", "ffn.down")),
    "t5": (("q", "v", "wi"), ("attn.q", "attn.v", "cross.q", "cross.v", "ffn.up")),
    "gpt2": (("c_attn",), ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn")),
}


def lora_pair(family):
    """The same LoRA by PEFT and by us, and pairs of corresponding tensors."""
    targets, selectors = TARGETS[family]
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(targets), fan_in_fan_out=family == "gpt2", bias="none"
    )
    with zoo.quiet():
        theirs = peft.get_peft_model(zoo.build(family, torch.float64).model, config).eval()
    ours = Adapted(zoo.build(family, torch.float64), [LoRA(RANK, ALPHA, at=selectors)])
    pairs = []
    with torch.no_grad():
        for patch in ours.patches:
            for name, side in (("a", "lora_A"), ("b", "lora_B")):
                other = theirs.get_parameter(f"base_model.model.{patch.site.path}.{side}.default.weight")
                other.copy_(torch.randn(other.shape) * 0.3)
                patch.tensors[name][0].copy_(other)
                pairs.append((patch.tensors[name], other))
    trained = sum(p.requires_grad for p in theirs.parameters())
    assert len(pairs) == trained
    return theirs, ours, pairs


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_lora_is_pefts_also_after_training(family):
    theirs, ours, pairs = lora_pair(family)
    inputs = inputs_of(ours.backbone)
    assert ours.parameter_count() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    optimizers = [torch.optim.AdamW([pair[i] for pair in pairs], lr=0.01) for i in range(2)]
    for _ in range(3):
        outputs = [model(**inputs).logits for model in (ours, theirs)]
        assert_close(*outputs, rtol=0, atol=1e-9)
        for optimizer, logits in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            logits.tanh().square().mean().backward()
            optimizer.step()
        for mine, other in pairs:
            assert_close(mine.grad[0], other.grad, rtol=0, atol=1e-9)
            assert_close(mine[0], other, rtol=0, atol=1e-9)
    merged, unloaded = ours.merge().model, theirs.merge_and_unload()
    for (name, p), (_, q) in zip(merged.named_parameters(), unloaded.named_parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=1e-9, msg=name)


@torch.no_grad()
def test_rank_stabilised_lora_is_pefts():
    """s = α/√r instead of α/r."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], use_rslora=True)
    with zoo.quiet():
        theirs = peft.get_peft_model(zoo.build("llama", torch.float64).model, config).eval()
    ours = Adapted(zoo.build("llama", torch.float64), [LoRA(RANK, ALPHA, rank_stabilised=True, at=("attn.q",))])
    for patch in ours.patches:
        for name, side in (("a", "lora_A"), ("b", "lora_B")):
            other = theirs.get_parameter(f"base_model.model.{patch.site.path}.{side}.default.weight")
            patch.tensors[name][0].copy_(other.copy_(torch.randn(other.shape) * 0.3))
    inputs = inputs_of(ours.backbone)
    attached = ours(**inputs).logits
    assert_close(attached, theirs(**inputs).logits, rtol=0, atol=1e-9)
    assert_close(ours.merge().model(**inputs).logits, attached, rtol=0, atol=1e-9)


@torch.no_grad()
def test_three_loras_on_a_fused_map_are_pefts_one():
    """PEFT adapts GPT-2's fused map with one A and B; with the same A, B's rows are those of our q, k and v."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["c_attn"], fan_in_fan_out=True)
    with zoo.quiet():
        theirs = peft.get_peft_model(zoo.build("gpt2", torch.float64).model, config).eval()
    ours = Adapted(zoo.build("gpt2", torch.float64), [LoRA(RANK, ALPHA, at=("attn.q", "attn.k", "attn.v"))])
    for patch in ours.patches:
        module = theirs.get_submodule(f"base_model.model.{patch.site.path}")
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        b.copy_(torch.linspace(-1, 1, b.numel()).view_as(b))
        patch.tensors["a"][0].copy_(a)
        patch.tensors["b"][0].copy_(patch.site.part.take(b.T).T)
    inputs = inputs_of(ours.backbone)
    assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@torch.no_grad()
def test_a_prefix_is_pefts_rotated_back(family):
    model = zoo.build(family).model
    with zoo.quiet():
        theirs = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    backbone = zoo.build(family)
    ours = Adapted(backbone, [Prefix(LENGTH)])
    config = backbone.model.config
    layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    table = theirs.prompt_encoder["default"].embedding.weight
    assert ours.parameter_count() == table.numel()
    table.copy_(torch.randn(table.shape))
    keys_values = table.view(LENGTH, layers, 2, heads, size).permute(1, 2, 3, 0, 4)  # [layer, 2, heads, n, size]
    cos, sin = backbone.base.rotary_emb(table, torch.tensor([[LENGTH]]))  # [1, 1, size]
    for (k, v), patch in zip(keys_values, ours.patches, strict=True):
        patch.tensors["k"][0].copy_(rotated(k, cos[0], -sin[0]))
        patch.tensors["v"][0].copy_(v)
    inputs = inputs_of(backbone)
    real = inputs["attention_mask"].bool()
    expected = theirs.eval()(**inputs).logits
    assert_close(ours(**inputs).logits[real], expected[real], rtol=0, atol=1e-5)


def rotated(k, cos, sin):
    """R k for keys [heads, n, size], written out: (x, y) -> (x cos - y sin, y cos + x sin) on the two halves."""
    x, y = k.chunk(2, dim=-1)
    return k * cos + torch.cat([-y, x], dim=-1) * sin


@torch.no_grad()
def test_a_prefix_is_a_gated_parallel_adapter():
    """Attn([P_k; K], [P_v; V]) = (1 - λ) Attn(K, V) + λ softmax(q P_kᵀ) P_v, λ = Σ exp(q P_kᵀ) / (Σ exp(q P_kᵀ) +
    Σ exp(q Kᵀ)) (He et al. 2022, eq. 7): on the first attention of a tiny BERT."""
    backbone = zoo.build("bert", torch.float64)
    ours = Adapted(backbone, [Prefix(LENGTH, init_std=1.0)])
    attention = ours.model.get_submodule(backbone.sites["layers.0.attn"].path)
    seen = []
    handle = attention.register_forward_hook(lambda m, args, out: seen.append((args[0], out[0])))
    inputs = inputs_of(backbone)
    ours.states(inputs)
    handle.remove()
    x, out = seen[0]
    q, k, v = (m(x).unflatten(-1, (4, -1)).transpose(1, 2) for m in (attention.query, attention.key, attention.value))
    pk, pv = (ours.patches[0].tensors[n][0] for n in ("k", "v"))
    blind = torch.where(inputs["attention_mask"].bool(), 0.0, -math.inf)[:, None, None]
    own, prefix = ((q @ keys.mT) / math.sqrt(q.shape[-1]) for keys in (k, pk))  # [b, heads, s, s], [b, heads, s, n]
    own = own + blind
    gate = prefix.exp().sum(-1, keepdim=True) / (prefix.exp().sum(-1, keepdim=True) + own.exp().sum(-1, keepdim=True))
    expected = (1 - gate) * (own.softmax(-1) @ v) + gate * (prefix.softmax(-1) @ pv)
    assert_close(out, expected.transpose(1, 2).flatten(2), rtol=0, atol=1e-9)
