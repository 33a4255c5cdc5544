"""`Snapshot`: everything of a model that attaching deltas could change."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model's tensors, and by what they are called: flags, gradients, identities, attributes, hooks, configs."""

    tensors: Mapping[str, Tensor]
    told: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, model: PreTrainedModel, without: Collection[str] = ()) -> Snapshot:
        """What a model is now; of its tensors those `without` the ones of these names."""
        modules = dict(model.named_modules(remove_duplicate=False))
        named = dict(model.named_parameters(remove_duplicate=False))
        tensors = {**named, **dict(model.named_buffers(remove_duplicate=False))}
        told: dict[str, dict[str, Any]] = {
            "what trains": {name: p.requires_grad for name, p in named.items()},
            "gradients": {name: p.grad is not None for name, p in named.items()},
            "parameters": {name: id(p) for name, p in named.items()},
            "buffers": {name: True for name in tensors},
            "attributes": {
                name: sorted(v for v in vars(m) if v != "_is_hf_initialized") for name, m in modules.items()
            },
            "hooks": {name: [len(vars(m)[h]) for h in HOOKS] for name, m in modules.items()},
            "modes": {name: m.training for name, m in modules.items()},
            "attention": {n: vars(m)["config"]._attn_implementation for n, m in modules.items() if "config" in vars(m)},
            "config": model.config.to_dict(),
        }
        return cls({name: t.detach().clone() for name, t in tensors.items() if name not in without}, told)

    def differences(self, after: Snapshot) -> Iterator[str]:
        """What is not as it was, in words."""
        for name, before in self.tensors.items():
            if name not in after.tensors or not _same(before, after.tensors[name]):
                yield f"the tensor {name}"
        for what, told in self.told.items():
            now = after.told[what]
            for name in sorted(told.keys() | now.keys()):
                if told.get(name) != now.get(name):
                    yield f"{what} of {name or 'the model'}: {told.get(name)} before, {now.get(name)} after"


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are bitwise equal, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
