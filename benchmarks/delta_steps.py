"""A training step with LoRA, an adapter and a prefix on BERT of base size: ours against hand-written ones and PEFT.

Beside it: how long it takes to attach LoRA to every linear map of a model of 24 layers of width 1024.
All sides train the same numbers with the same optimizer on the same batch; there is no head.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import deltaprompt as dp
from benchmarks.paired import Pair, pair, turns
from benchmarks.prompt_classification import RANK, SIZES, HandLoRA
from deltaprompt.backbone.load import demo_folder, wrap
from deltaprompt.compose import Adapted

BATCH, LENGTH, BOTTLENECK, PREFIX = 8, 128, 24, 10
EVERY = ("attn.*", "ffn.*")


class HandAdapter(nn.Module):
    """A linear map and a bottleneck behind it, as one writes them by hand."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.out_features, BOTTLENECK)
        self.up = nn.Linear(BOTTLENECK, inner.out_features)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + self.up(functional.gelu(self.down(y)))


class HandPrefix(nn.Module):
    """BERT's attention with trained keys and values in front, as one writes it by hand."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        shape = (1, inner.num_attention_heads, PREFIX, inner.attention_head_size)
        self.k = nn.Parameter(torch.randn(shape) * 0.02)
        self.v = nn.Parameter(torch.randn(shape) * 0.02)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        inner, rows = self.inner, hidden_states.shape[0]
        q, k, v = (
            m(hidden_states).unflatten(-1, (inner.num_attention_heads, -1)).transpose(1, 2)
            for m in (inner.query, inner.key, inner.value)
        )
        k, v = (torch.cat([p.expand(rows, -1, -1, -1), t], dim=2) for p, t in ((self.k, k), (self.v, v)))
        if attention_mask is not None:
            attention_mask = functional.pad(
                attention_mask, (PREFIX, 0), value=float(attention_mask.dtype is torch.bool)
            )
        out = functional.scaled_dot_product_attention(q, k, v, attention_mask)
        return out.transpose(1, 2).flatten(2), None


def encoder(size: str) -> BertModel:
    """A BERT of that size without a head, with random weights and no dropout, the same every time."""
    torch.manual_seed(0)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES[size])
    return BertModel(config, add_pooling_layer=False)


def by_hand(size: str, method: str) -> nn.Module:
    """The encoder with a hand-written delta."""
    model = encoder(size).requires_grad_(False)
    for layer in model.encoder.layer:
        if method == "lora":
            layer.attention.self.query = HandLoRA(layer.attention.self.query)
            layer.attention.self.value = HandLoRA(layer.attention.self.value)
        elif method == "adapter":
            layer.attention.output.dense = HandAdapter(layer.attention.output.dense)
            layer.output.dense = HandAdapter(layer.output.dense)
        else:
            layer.attention.self = HandPrefix(layer.attention.self)
    return model


def by_peft(size: str, method: str) -> nn.Module:
    """The encoder with PEFT's delta."""
    import peft

    kind = "FEATURE_EXTRACTION"
    config = (
        peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["query", "value"], task_type=kind)
        if method == "lora"
        else peft.PrefixTuningConfig(num_virtual_tokens=PREFIX, task_type=kind)
    )
    return peft.get_peft_model(encoder(size), config)


def ours(size: str, method: str) -> nn.Module:
    """The encoder with our delta."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(demo_folder()))
    delta = {"lora": dp.LoRA(RANK, 16.0), "adapter": dp.Adapter(BOTTLENECK), "prefix": dp.Prefix(PREFIX)}[method]
    return Adapted(wrap(encoder(size), tokenizer, kind="encoder", name="random"), [delta])


def step_of(model: nn.Module) -> Callable[[], object]:
    """One call is one training step on the same padded batch."""
    torch.manual_seed(1)
    ids = torch.randint(1000, 20000, (BATCH, LENGTH))
    mask = torch.ones_like(ids)
    mask[:, LENGTH - 20 :] = torch.arange(BATCH)[:, None] % 2
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-4)
    model.train()

    def step() -> object:
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask).last_hidden_state.square().mean().backward()
        return optimizer.step()

    return step


def steps(rounds: dict[str, int]) -> list[Pair]:
    """Training steps of three methods against hand-written ones, and against PEFT where it has the method."""
    pairs = []
    for size in SIZES:
        for method in ("lora", "adapter", "prefix"):
            runs = {"ours": step_of(ours(size, method)), "hand": step_of(by_hand(size, method))}
            if method != "adapter":
                runs["peft"] = step_of(by_peft(size, method))
            times = turns(runs, rounds[size])
            for peer in list(runs)[1:]:
                pairs.append(pair(f"{method} step, {size}: against {peer}", times["ours"], times[peer]))
            del runs
            gc.collect()
    return pairs


def injection(rounds: int) -> Pair:
    """LoRA on all linear maps of 24 layers of width 1024; removing it is not timed."""
    import peft

    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2816}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30522, **shape))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(demo_folder()))
    backbone = wrap(model, tokenizer, kind="causal", name="random")
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")

    def attach() -> Callable[[], object]:
        return Adapted(backbone, [dp.LoRA(RANK, at=EVERY)]).remove

    def theirs() -> Callable[[], object]:
        return peft.get_peft_model(model, config).unload

    times = turns({"ours": attach, "peft": theirs}, rounds)
    return pair("attaching LoRA to all 168 linear maps of 24 layers: against peft", times["ours"], times["peft"])


def run(rounds: dict[str, int]) -> list[Pair]:
    """All pairs."""
    return [injection(rounds["base"]), *steps(rounds)]
