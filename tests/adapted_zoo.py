"""Deltas on tiny backbones as tests run them: every registered one, moved from its start, with inputs it acts on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltaprompt import registry
from deltaprompt.backbone import Backbone
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Delta
from tests import backbones_zoo as zoo

DELTAS = list(registry.variants("deltas"))


def made(name: str) -> Delta:
    """A delta with its default options."""
    return registry.variant("deltas", name)()


@torch.no_grad()
def shake(adapted: Adapted, by: float = 0.2) -> Adapted:
    """Moves every parameter away from where it starts, each slot differently."""
    g = torch.Generator().manual_seed(5)
    for _, p in adapted.parts():
        p.add_(torch.randn(p.shape, generator=g).to(p), alpha=by)
    return adapted


def adapted_to(family: str, name: str, slots: int = 1, dtype: torch.dtype = torch.float64, by: float = 0.2) -> Adapted:
    """A backbone of its own with one delta, moved away from its start."""
    return shake(Adapted(zoo.build(family, dtype), [made(name)], slots), by)


def inputs_for(name: str, backbone: Backbone, side: str = "right") -> dict[str, Tensor]:
    """Inputs that the delta has something to do with: virtual ids for a delta at the embedding."""
    inputs = zoo.inputs_of(backbone, side)
    if made(name).acts_on == ("embed",):
        inputs["input_ids"][:, 3] = backbone.vocabulary + 1
        inputs["input_ids"][0, 5] = backbone.vocabulary + 4
        inputs["attention_mask"][:, 3] = 1
    return inputs


def mask_of(inputs: dict[str, Tensor]) -> Tensor:
    """The mask [b, s] of the states that are the result."""
    return inputs.get("decoder_attention_mask", inputs["attention_mask"])


def loss_of(states: Tensor, mask: Tensor) -> Tensor:
    """A smooth function of the states at real positions, a different one for each of their numbers."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    weight = torch.linspace(-1, 1, states.shape[-1] * states.shape[-2], dtype=states.dtype).view(states.shape[-2:])
    return ((states * weight).tanh() * mask[..., None]).sum()


def gradients(adapted: Adapted) -> dict[str, Tensor]:
    """The gradient of every delta's tensor; an error where one has none."""
    found = {n: p.grad for n, p in adapted.parts()}
    assert all(g is not None for g in found.values()), [n for n, g in found.items() if g is None]
    return {n: g.clone() for n, g in found.items() if g is not None}


def snapshot(backbone: Backbone) -> dict[str, Any]:
    """Everything about a backbone that attaching could change; `same` compares two."""
    model = backbone.model
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "grad": {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "identity": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "vars": {n: {v for v in vars(m) if not v.startswith("_hf")} for n, m in model.named_modules()},
        "hooks": {n: [len(vars(m)[h]) for h in hooks] for n, m in model.named_modules()},
        "config": model.config.to_dict(),
        "attention": [m.config._attn_implementation for m in model.modules() if "config" in vars(m)],
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two snapshots are equal, the tensors bitwise."""
    one, other = (snap["state"] for snap in (before, after))
    alike = one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())
    return alike and all(before[n] == after[n] for n in before if n != "state")
