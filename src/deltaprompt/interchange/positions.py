"""Where a backbone's text stands behind a prefix: at n in PEFT, which puts the prefix into the cache, at 0 here.

With R_p the rotation of position p, a query at p sees a prefix key K as (R_{p+n} q)·K there and as (R_p q)·K' here: the
same for K' = R_{-n} K. Relative position biases (T5) depend on distances alone. Learned positions differ unless the
text's are moved on by n, which `PositionShift` does.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaprompt.backbone import Backbone, Site
from deltaprompt.errors import StoreError

LEARNED = "embed.position"
BY_LENGTH = ("dynamic", "longrope")  # rotations that change with the length of the text
ONLY_NEAR = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Rotation:
    """R_n of one attention: the model's own function, and the cosines and sines of position n."""

    module: nn.Module
    cos: Tensor  # [1, 1, size], or [1, 1, part of it]
    sin: Tensor

    def turned(self, k: Tensor, forward: bool) -> Tensor:
        """R_n k, or R_{-n} k, of keys [heads, n, size]."""
        length = (self.cos.square() + self.sin.square()).sqrt()  # yarn stretches queries and keys, not the prefix
        cos, sin = (self.cos / length).to(k.dtype), (self.sin / length).to(k.dtype)
        size = cos.shape[-1]
        maths = vars(sys.modules[type(self.module).__module__])["apply_rotary_pos_emb"]
        _, turned = maths(k[None, ..., :size], k[None, ..., :size], cos, sin if forward else -sin)
        return torch.cat([turned[0], k[..., size:]], dim=-1)


def attentions(backbone: Backbone) -> list[Site]:
    """The attentions that PEFT's cache reaches, by layer: all of them, or the decoder's to itself."""
    stack = "decoder." if backbone.kind == "seq2seq" else ""
    layers = range(backbone.sites.layer_counts.get(stack, 0))
    names = [f"{stack}layers.{number}.attn" for number in layers]
    if not names or any(name not in backbone.sites for name in names):
        raise StoreError(f"{backbone.name or 'this backbone'} has layers without attention; a prefix cannot reach them")
    return [backbone.sites[name] for name in names]


def moves_text(backbone: Backbone) -> bool:
    """Whether the text's learned positions have to be moved on by n."""
    return LEARNED in backbone.sites


def check(backbone: Backbone) -> None:
    """An error where PEFT's prefix and ours cannot be the same function."""
    config = backbone.config
    kinds = _rotations(config.get("rope_parameters") or {})
    if bad := sorted(kinds & set(BY_LENGTH)):
        raise StoreError(
            f"the rotary embedding of this backbone is of type {bad[0]!r} and changes with the length of the text, so "
            "that a prefix in a cache has no form here"
        )
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window or set(config.get("layer_types") or ()) & set(ONLY_NEAR):
        raise StoreError(
            "attention of this backbone sees only what is near (a sliding window), in PEFT the prefix too, which here "
            "is always seen; such a prefix has no exact form here"
        )


def _rotations(parameters: Mapping[str, Any]) -> set[str]:
    """The types of rotary embeddings in a config, also where layers have different ones."""
    inner = [_rotations(p) for p in parameters.values() if isinstance(p, Mapping)]
    own = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return own.union(*inner)


@torch.no_grad()
def rotations(backbone: Backbone, sites: Sequence[Site], by: int) -> dict[str, Rotation]:
    """R_n of each attention that has one, by the site's name: the model is asked, with one token at position n."""
    if backbone.kind == "seq2seq":
        return {}
    found: dict[str, Rotation] = {}
    handles = []
    for site in sites:
        module = backbone.model.get_submodule(site.path)

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], name: str = site.name) -> None:
            match kwargs.get("position_embeddings"):
                case (Tensor() as cos, Tensor() as sin):
                    found[name] = Rotation(module, cos.double(), sin.double())

        handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    at = torch.tensor([[by]], device=backbone.model.device)
    try:
        backbone.base(input_ids=torch.zeros_like(at), attention_mask=torch.ones_like(at), position_ids=at)
    finally:
        for handle in handles:
            handle.remove()
    return found
