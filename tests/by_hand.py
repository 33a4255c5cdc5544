"""Compositions written by hand into plain models: attention with a prefix as He et al.'s (2022) gated sum, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from deltaprompt.compose import Adapted
from tests import backbones_zoo as zoo
from tests.adapted_zoo import loss_of, mask_of

NAME = "by_hand"
PREFIX = "_prefix_by_hand"
FIRST = "_first_by_hand"  # of an attention of T5: that of the first layer, which has the table of all, in a tuple


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **kw: Any
) -> tuple[Tensor, None]:
    """(1 − λ) softmax(q Kᵀ) V + λ softmax(q P_kᵀ) P_v, λ = Σ exp(q P_kᵀ) / (Σ exp(q P_kᵀ) + Σ exp(q Kᵀ))."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))  # [b, heads, s, size]
    own = q @ k.mT * scale
    for added in (kw.get("position_bias"), mask):
        own = own if added is None else own + added
    out = own.softmax(-1) @ v
    if PREFIX in vars(module):
        pk, pv = (t.repeat_interleave(q.shape[1] // t.shape[0], dim=0) for t in vars(module)[PREFIX]())
        prefix = q @ pk.mT * scale  # [b, heads, s, n]
        if FIRST in vars(module):  # T5's distances: the prefix stands in front of the text
            s, n = prefix.shape[-2:]
            prefix = prefix + vars(module)[FIRST][0].compute_bias(s, n + s, past_seen_tokens=n)[..., :n]
        theirs, ours = (t.exp().sum(-1, keepdim=True) for t in (prefix, own))
        gate = theirs / (theirs + ours)
        out = (1 - gate) * out + gate * (prefix.softmax(-1) @ pv)
    return out.transpose(1, 2).contiguous(), None


class ByHand:
    """A plain model of the same weights, whose tensors `t` are, by stored name, copies of an adaptation's own."""

    def __init__(self, family: str, ours: Adapted) -> None:
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        self.backbone = zoo.build(family, torch.float64)
        self.model, self.sites = self.backbone.model, self.backbone.sites
        self.model.requires_grad_(False)
        self.model.set_attn_implementation(NAME)
        for stack in (self.model.encoder, self.model.decoder) if family == "t5" else ():
            attentions = [block.layer[0].SelfAttention for block in stack.block]
            for attention in attentions:
                vars(attention)[FIRST] = (attentions[0],)
        self.ours = ours
        self.t = {name: p[0].detach().clone().requires_grad_() for name, p in ours.parts()}

    def prefix(self, site: str, made: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """Puts P_k, P_v [heads, n, size] in front at an attention."""
        vars(self.model.get_submodule(self.sites[site].path))[PREFIX] = made

    def behind(self, site: str, made: Callable[[Tensor, Tensor], Tensor], entry: str = "") -> None:
        """y becomes made(x, y), where x is what enters `entry`, or the site itself."""
        seen: list[Tensor] = []
        into, part = self.model.get_submodule(self.sites[entry or site].path), self.sites[site].part
        into.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))

        def leave(_m: nn.Module, _args: Any, y: Tensor) -> Tensor:
            x = seen.pop()
            return made(x, y) if part is None else part.put(y, made(x, part.take(y)))

        self.model.get_submodule(self.sites[site].path).register_forward_hook(leave)

    def agrees(self) -> None:
        """The same states and gradients as ours, to 1e-9."""
        inputs = zoo.inputs_of(self.backbone)
        states = [self.ours.states(inputs), self.backbone.states(inputs)]
        assert_close(*states, rtol=0, atol=1e-9)
        for each in states:
            loss_of(each, mask_of(inputs)).backward()
        for name, p in self.ours.parts():
            assert p.grad is not None
            assert p.grad.abs().max() > 1e-9 or name.endswith(".k.bias"), name
            assert_close(p.grad[0], self.t[name].grad, rtol=0, atol=1e-9, msg=name)
