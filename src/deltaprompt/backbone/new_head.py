"""A language model's head at its start: maps at the identity, biases at 0, norms at 1.

States of a pretrained encoder then reach the tied output embedding nearly as they are, which is a far better start than
random numbers: an embedding of the last layer's states is most alike to those of the words that fit there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from deltaprompt.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def head_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """A language model's parameters outside its base, by name, in the order in which a state meets them.

    An output embedding that is tied to the input's is the base's. Deeper ones come first: a head's maps are modules in
    it, and the bias of the scores hangs at the head itself.
    """
    within = {id(p) for p in model.base_model.parameters()}
    own = [(name, p) for name, p in model.named_parameters() if id(p) not in within]
    return dict(sorted(own, key=lambda pair: -pair[0].count(".")))


@torch.no_grad()
def start_head(model: PreTrainedModel) -> set[str]:
    """Starts a head, and says which parameters that were.

    Raises:
        BackboneError: there is none, or a map in it is not square, so that it has no identity. Nothing is changed then.
    """
    head = head_parameters(model)
    name = type(model).__name__
    if not head:
        raise BackboneError(f"{name} has no head of its own to begin anew, only the embedding; leave out new_head")
    if odd := [n for n, p in head.items() if p.ndim > 2 or (p.ndim == 2 and p.shape[0] != p.shape[1])]:
        shape = list(head[odd[0]].shape)
        raise BackboneError(
            f"{name}: the head's {odd[0]} has shape {shape}, which has no identity to begin with; square maps beside "
            "an output embedding that is tied to the input's can begin anew"
        )
    for n, p in head.items():
        if p.ndim == 2:
            nn.init.eye_(p)
        else:
            p.fill_(1.0 if n.endswith("weight") else 0.0)
    return set(head)
