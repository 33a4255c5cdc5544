"""Prompt classification with label words: our step against plain transformers, used in two ways, with the same LoRA.

whole   as OpenPrompt uses the model: padded to the maximum length, the head at every position, then the mask rows
masked  as a careful user writes it by hand: padded to the longest of the batch, the head at the mask rows only
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import deltaprompt as dp
from benchmarks.paired import Pair, pair, turns
from deltaprompt.backbone.load import demo_folder, wrap

BATCH, LONGEST, RANK, ALPHA = 8, 128, 8, 16.0
LABELS = {"negative": "terrible", "positive": "great"}
SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
}


class HandLoRA(nn.Module):
    """A linear map with a low-rank addition, as one writes it by hand."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.a = nn.Parameter(torch.randn(RANK, inner.in_features) * inner.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(inner.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + ALPHA / RANK * functional.linear(functional.linear(x, self.a), self.b)


def texts(count: int, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> list[str]:
    """Texts of 8 to 40 words that are in the vocabulary."""
    chance = random.Random(seed)
    words = sorted(w for w in tokenizer.get_vocab() if w.isalpha() and w.isascii() and len(w) > 2)
    return [" ".join(chance.choices(words, k=chance.randint(8, 40))) for _ in range(count)]


def bert(size: str) -> BertForMaskedLM:
    """A BERT of that size with random weights and no dropout, the same every time."""
    torch.manual_seed(0)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES[size])
    return BertForMaskedLM(config)


def by_hand(size: str) -> BertForMaskedLM:
    """The same model with hand-written LoRA on every query and value."""
    model = bert(size).requires_grad_(False)
    for layer in model.bert.encoder.layer:
        layer.attention.self.query = HandLoRA(layer.attention.self.query)
        layer.attention.self.value = HandLoRA(layer.attention.self.value)
    return model


def scores_by_hand(model: BertForMaskedLM, inputs: Any, words: Tensor, mask_id: int, whole: bool) -> Tensor:
    """Label-word scores [b, c]: the head at every position first, or at the mask rows only."""
    at = inputs["input_ids"] == mask_id
    if whole:
        return model(**inputs).logits[at][:, words]
    return model.cls(model.bert(**inputs).last_hidden_state[at])[:, words]


def competitors(size: str, training: bool) -> dict[str, Callable[[], object]]:
    """One call is one step on the next batch; all three see the same texts in the same order."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(demo_folder()))
    rows = [f"{text} It was" for text in texts(BATCH * 40, tokenizer)]
    mask, mask_id = str(tokenizer.mask_token), int(tokenizer.mask_token_id)
    words = torch.tensor(tokenizer.convert_tokens_to_ids(list(LABELS.values())))
    gold = torch.tensor([i % 2 for i in range(BATCH)])

    def hand(whole: bool) -> Callable[[], object]:
        model = by_hand(size).train(training)
        chosen = [p for p in model.parameters() if p.requires_grad]
        optimizer, state = torch.optim.AdamW(chosen, lr=1e-4), {"at": 0}

        def step() -> object:
            start = state["at"] % len(rows)
            state["at"] += BATCH
            batch = [f"{row} {mask} ." for row in rows[start : start + BATCH]]
            padding: dict[str, Any] = {
                "padding": "max_length" if whole else "longest",
                "max_length": LONGEST,
                "truncation": True,
            }
            inputs = tokenizer(batch, return_tensors="pt", return_token_type_ids=False, **padding)
            if not training:
                with torch.inference_mode():
                    return scores_by_hand(model, inputs, words, mask_id, whole).softmax(-1)
            loss = functional.cross_entropy(scores_by_hand(model, inputs, words, mask_id, whole), gold)
            optimizer.zero_grad()
            loss.backward()
            return optimizer.step()

        return step

    def ours() -> Callable[[], object]:
        backbone = wrap(bert(size), tokenizer, name="random")
        task = dp.Task("{text} {mask} .", LABELS, max_length=LONGEST)
        model = dp.adapt(backbone, task, [dp.LoRA(rank=RANK, alpha=ALPHA)]).train(training)
        chosen = [p for p in model.parameters() if p.requires_grad]
        optimizer, state = torch.optim.AdamW(chosen, lr=1e-4), {"at": 0}
        names = list(LABELS)

        def step() -> object:
            start = state["at"] % len(rows)
            state["at"] += BATCH
            batch = [dp.Example({"text": r}, names[i % 2]) for i, r in enumerate(rows[start : start + BATCH])]
            if not training:
                return model.probabilities(batch, BATCH)
            loss = model(model.features.collate(model.encode(batch)))["loss"]
            optimizer.zero_grad()
            loss.backward()
            return optimizer.step()

        return step

    return {"ours": ours(), "whole": hand(True), "masked": hand(False)}


def run(rounds: dict[str, int]) -> list[Pair]:
    """All pairs: training and inference, two sizes, against both ways."""
    pairs = []
    for size in SIZES:
        for training in (True, False):
            times = turns(competitors(size, training), rounds[size])
            what = f"prompt {'training step' if training else 'inference'}, {size}"
            pairs.append(pair(f"{what}: head everywhere, padded to maximum", times["ours"], times["whole"]))
            pairs.append(pair(f"{what}: hand-written loop, head at masks", times["ours"], times["masked"]))
    return pairs
