"""Whether a backbone takes several texts in one row, each seeing itself alone: tried once, on two short texts."""

from __future__ import annotations

from typing import Final
from weakref import WeakKeyDictionary

import torch
from torch import nn

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.fused import at_rest
from deltaprompt.backbone.shared import ROUNDING, alike
from deltaprompt.errors import ConfigError

LENGTHS: Final = (7, 5)  # tokens of the texts that a model is tried on

TRIED: Final[WeakKeyDictionary[nn.Module, bool]] = WeakKeyDictionary()  # models that were tried, whether they can


def check_packing(backbone: Backbone) -> None:
    """Raises where the states of a text depend on what stands beside it in its row."""
    if backbone.model not in TRIED:
        TRIED[backbone.model] = _tried(backbone)
    if not TRIED[backbone.model]:
        raise ConfigError(
            f"{type(backbone.model).__name__} does not keep the texts of one row apart (attention by position_ids), so "
            "conversations cannot be packed; leave packed=True out"
        )


@torch.no_grad()
def _tried(backbone: Backbone) -> bool:
    device = next(backbone.model.parameters()).device
    ids = torch.arange(sum(LENGTHS), device=device)[None] * 7 % backbone.vocabulary
    places = torch.cat([torch.arange(n, device=device) for n in LENGTHS])[None]
    try:
        with at_rest(backbone.model):
            packed = backbone.states({"input_ids": ids, "position_ids": places})
            alone = [
                backbone.states({"input_ids": own, "position_ids": torch.arange(own.shape[1], device=device)[None]})
                for own in ids.split(LENGTHS, dim=1)
            ]
    except Exception:  # whatever a model's code does with such positions
        return False
    whole = torch.cat(alone, dim=1)
    return bool(whole.isfinite().all()) and alike(packed, whole, ROUNDING)
