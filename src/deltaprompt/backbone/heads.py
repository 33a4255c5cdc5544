"""From states to scores of chosen vocabulary rows: the language model's own head, only where it is needed.

`Head.logits(states, rows)` equals `model(...).logits[..., rows]` for the same states, without forming the scores of the
other rows. The transform in front of the output embedding (BERT's dense, GELU, norm) is the model's own module, run
with the output embedding narrowed to the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from deltaprompt.errors import BackboneError

# Families whose head is several modules side by side, in the order in which the model runs them.
CHAINS: dict[str, tuple[str, ...]] = {
    "distilbert": ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    "electra": ("generator_predictions", "generator_lm_head"),
    "modernbert": ("head", "decoder"),
}

BIAS = "final_logits_bias"


@dataclass(frozen=True)
class Head:
    """The modules between a model's states and its vocabulary scores."""

    chain: tuple[nn.Module, ...]  # applied in turn; the last is, or holds, the output embedding
    out: nn.Linear
    out_path: str  # of the output embedding within the last module of the chain; "" if it is that module
    before: float = 1.0  # factor on the states (T5)
    scale: float = 1.0  # factor on the scores (Cohere, Granite)
    softcap: float | None = None  # c * tanh(scores / c) (Gemma 2)
    biased: nn.Module | None = None  # the model, where its buffer BIAS is added to the scores (BART)

    def logits(self, states: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores of the vocabulary `rows` [n] (all where None) at states [..., d] -> [..., n]."""
        x = states * self.before if self.before != 1.0 else states
        for module in self.chain[:-1]:
            x = module(x)
        scores = self._last(x, rows) * self.scale if self.scale != 1.0 else self._last(x, rows)
        if self.biased is not None:
            bias = self.biased.get_buffer(BIAS).reshape(-1)
            scores = scores + (bias if rows is None else bias[rows])
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def _last(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """The last module on x; a delta at the output embedding needs all rows, otherwise only `rows` are formed."""
        if rows is None:
            return self.chain[-1](x)
        if self.out._forward_hooks or self.out._forward_pre_hooks:
            return self.chain[-1](x)[..., rows]
        weight = self.out.weight[rows]
        bias = None if self.out.bias is None else self.out.bias[rows]
        if not self.out_path:
            return functional.linear(x, weight, bias)
        narrowed = {f"{self.out_path}.weight": weight}
        if bias is not None:
            narrowed[f"{self.out_path}.bias"] = bias
        return functional_call(self.chain[-1], narrowed, (x,), tie_weights=False)


def find_head(model: nn.Module, base: nn.Module, out: nn.Module, config: Mapping[str, Any]) -> Head:
    """The head of a language model whose states come from `base` and whose output embedding is `out`."""
    if not isinstance(out, nn.Linear):
        raise BackboneError(
            f"the output embedding of {type(model).__name__} is a {type(out).__name__}, not a linear map"
        )
    chain = _chain(model, base, out, str(config.get("model_type", "")))
    path = next((name for name, module in chain[-1].named_modules() if module is out), None)
    if path is None:
        raise BackboneError(f"{type(model).__name__}: its output embedding is not in its head")
    tied_t5 = config.get("scale_decoder_outputs")
    return Head(
        chain,
        out,
        path,
        before=float(config["d_model"]) ** -0.5 if tied_t5 else 1.0,
        scale=float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0),
        softcap=config.get("final_logit_softcapping"),
        biased=model if BIAS in dict(model.named_buffers(recurse=False)) else None,
    )


def _chain(model: nn.Module, base: nn.Module, out: nn.Module, family: str) -> tuple[nn.Module, ...]:
    """The modules of the head: listed for the family, or the one child of the model that holds the output embedding."""
    children = dict(model.named_children())
    if family in CHAINS and all(name in children for name in CHAINS[family]):
        return tuple(children[name] for name in CHAINS[family])
    holding = [child for child in children.values() if child is not base and any(m is out for m in child.modules())]
    if len(holding) != 1:
        raise BackboneError(
            f"{type(model).__name__}: no single module between its states and its scores holds the output embedding"
        )
    return (holding[0],)
