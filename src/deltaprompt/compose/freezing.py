"""A backbone is frozen while anything is attached to it, by however many, and then as it was before the first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deltaprompt.backbone.maps import keep_unpacked

KEY = "_deltaprompt_frozen"


@dataclass
class Ledger:
    """How many have frozen a model, and which of its parameters trained before."""

    trained: dict[str, bool]
    holders: int = 0


def freeze(model: nn.Module) -> None:
    """Freezes a model's parameters until it is thawed as often; the ledger is kept on the model, and copied with it."""
    keep_unpacked(model)
    ledger = vars(model).setdefault(KEY, Ledger({name: p.requires_grad for name, p in model.named_parameters()}))
    ledger.holders += 1
    model.requires_grad_(False)


def thaw(model: nn.Module) -> None:
    """Takes one freezing back; after the last the parameters train that trained before."""
    ledger: Ledger = vars(model)[KEY]
    ledger.holders -= 1
    if ledger.holders:
        return
    del vars(model)[KEY]
    for name, p in model.named_parameters():
        p.requires_grad_(ledger.trained[name])
