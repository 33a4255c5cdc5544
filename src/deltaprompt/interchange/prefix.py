"""Prefix tuning: PEFT puts keys and values into the cache, `Prefix` in front of those of an attention.

PEFT's table is [n, slots · 2 · heads · size]. Decoder layer i of an encoder-decoder takes slot 2i mod slots, since PEFT
doubles the table for a cross-attention whose half it then throws away. With an odd number of slots each has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from deltaprompt.backbone import Backbone, Site
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Delta
from deltaprompt.deltas._position_shift import PositionShift
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.errors import StoreError
from deltaprompt.interchange import cached, fields, positions
from deltaprompt.interchange.cached import Table
from deltaprompt.interchange.folder import Folder
from deltaprompt.interchange.forms import Opened, Piece, Written, check_all_used, shaped
from deltaprompt.interchange.prompt import TABLE, TASKS, check_table, check_task
from deltaprompt.interchange.targets import selectors_of

# Reading


def read(folder: Folder, backbone: Backbone) -> Opened:
    """A prefix at every attention, and where positions are learned a shift of the text's."""
    check_task(folder, backbone)
    check_table(folder)
    check_all_used(folder, {TABLE}, backbone)
    positions.check(backbone)
    sites = positions.attentions(backbone)
    table = _table(folder, backbone, sites)
    turns = positions.rotations(backbone, sites, table.length)
    deltas: list[Delta] = [Prefix(table.length, at=selectors_of(sites, backbone.sites))]
    if positions.moves_text(backbone):
        deltas.append(PositionShift(table.length))
    tensors: dict[str, Tensor] = {}
    for site, k, v in zip(sites, table.keys, table.values, strict=True):
        tensors[f"0.{site.name}.k"] = turns[site.name].turned(k, forward=False) if site.name in turns else k
        tensors[f"0.{site.name}.v"] = v
    return Opened(tuple(deltas), tensors, cached.reference(backbone, table))


def _table(folder: Folder, backbone: Backbone, sites: Sequence[Site]) -> Table:
    """The folder's table by the layers that read it."""
    length = folder.whole("num_virtual_tokens")
    heads, width = sites[0].heads, sites[0].outputs
    if not heads:
        raise StoreError(f"the number of heads at {sites[0].name} is not known; prefix tuning cannot act there")
    if any((site.heads, site.outputs) != (heads, width) for site in sites):
        raise StoreError("layers of this backbone have keys of different sizes; a prefix of PEFT has no form here")
    asked = {"num_attention_heads": heads, "token_dim": width}
    for field, own in asked.items():
        if folder.config.get(field) not in (None, own):
            raise StoreError(
                f"{folder.path} has {field} = {folder.config[field]!r}, and keys of this backbone have {own}; give the "
                "backbone that it was made for"
            )
    copies = folder.config.get("num_transformer_submodules") or _copies(backbone)
    if copies != _copies(backbone):
        raise StoreError(f"{folder.path} has num_transformer_submodules = {copies!r}; {_copies(backbone)} is possible")
    slots = folder.whole("num_layers") if folder.config.get("num_layers") is not None else len(sites)
    if slots < len(sites):
        raise StoreError(f"{folder.path} has num_layers = {slots}, and this backbone has {len(sites)} to reach")
    flat = shaped(folder, TABLE, (length, slots * 2 * width))
    by_slot = flat.view(length, slots, 2, heads, width // heads).permute(1, 2, 3, 0, 4)  # [slots, 2, heads, n, size]
    read = [by_slot[_slot(layer, slots, backbone)] for layer in range(len(sites))]
    return Table(tuple(k for k, _ in read), tuple(v for _, v in read))


def _copies(backbone: Backbone) -> int:
    return 2 if backbone.kind == "seq2seq" else 1


def _slot(layer: int, slots: int, backbone: Backbone) -> int:
    """The slot of PEFT's table that a layer reads."""
    return _copies(backbone) * layer % slots


# Writing


def write(pieces: Sequence[Piece], backbone: Backbone, adapted: Adapted, slot: int) -> Written:
    """One PEFT prefix of a prefix at every attention that a cache reaches."""
    positions.check(backbone)
    sites = positions.attentions(backbone)
    at = {piece.site.name: piece for piece in pieces if isinstance(piece.delta, Prefix)}
    if at.keys() != {site.name for site in sites} or len(at) < sum(isinstance(p.delta, Prefix) for p in pieces):
        raise StoreError(
            f"a prefix of PEFT reaches {sites[0].name} to {sites[-1].name} once each, and these deltas "
            f"{', '.join(at) or 'none'}; choose at={selectors_of(sites, backbone.sites)!r}"
        )
    length = next(cast(Prefix, piece.delta).length for piece in at.values())
    _check_shift([p.delta for p in pieces if isinstance(p.delta, PositionShift)], length, backbone)
    with adapted.routing.at(slot):
        turns = positions.rotations(backbone, sites, length)
    keys = [at[s.name].tensors["k"] for s in sites]
    keys = [turns[s.name].turned(k, forward=True) if s.name in turns else k for s, k in zip(sites, keys, strict=True)]
    values = [at[s.name].tensors["v"] for s in sites]
    table = Table(tuple(keys), tuple(values))
    with cached.bare(adapted, slot):
        expected = cached.reference(backbone, table)
    cached.check(adapted, slot, expected)
    return Written(_config(table, backbone), {TABLE: _flat(table, backbone)})


def _check_shift(shifts: Sequence[Delta], length: int, backbone: Backbone) -> None:
    """An error unless the text's learned positions are moved on by the length of the prefix, as in PEFT."""
    moved = sum(cast(PositionShift, shift).by for shift in shifts)
    if moved != (length if positions.moves_text(backbone) else 0):
        raise StoreError(
            f"behind a prefix of PEFT the text's learned positions begin at {length}, and here at {moved}: the two "
            f"give other answers. Train with PositionShift({length}) (position_shift:by={length}) beside the prefix"
        )


def _slots(table: Table, backbone: Backbone) -> int:
    layers = len(table.keys)
    return layers if _copies(backbone) == 1 or layers % 2 else layers + 1


def _flat(table: Table, backbone: Backbone) -> Tensor:
    """PEFT's table [n, slots · 2 · heads · size]; slots that no layer reads are zero."""
    slots = _slots(table, backbone)
    heads, length, size = table.keys[0].shape
    by_slot = table.keys[0].new_zeros(slots, 2, heads, length, size)
    for layer, (k, v) in enumerate(zip(table.keys, table.values, strict=True)):
        by_slot[_slot(layer, slots, backbone)] = torch.stack([k, v])
    return by_slot.permute(3, 0, 1, 2, 4).reshape(length, -1)


def _config(table: Table, backbone: Backbone) -> dict[str, object]:
    heads, _, size = table.keys[0].shape
    return {
        "peft_type": fields.PREFIX,
        "task_type": TASKS[backbone.kind],
        "num_virtual_tokens": table.length,
        "num_layers": _slots(table, backbone),
        "num_attention_heads": heads,
        "token_dim": heads * size,
        "num_transformer_submodules": _copies(backbone),
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,
        "modules_to_save": None,
    }
