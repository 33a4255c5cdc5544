"""LoRA and DoRA: one A and B a module in PEFT, one a site here.

A fused map is one module and several sites. Read, every part has a copy of A and its own rows of B. Written, the parts
become one low-rank change: the different A's one above the other, B zero where a part does not read an A.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from deltaprompt.backbone import Backbone, Part, Site
from deltaprompt.backbone.maps import map_of
from deltaprompt.backbone.sites import is_turned, linear_sizes
from deltaprompt.deltas._base import Delta
from deltaprompt.deltas.dora import DoRA
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import StoreError
from deltaprompt.interchange.fields import LORA
from deltaprompt.interchange.folder import Folder
from deltaprompt.interchange.forms import PREFIX, Opened, Piece, Written, check_all_used, maps_at, taken
from deltaprompt.interchange.targets import by_pattern, names_of, selectors_of, targeted

ENDS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
NEUTRAL = {"bias": "none", "init_lora_weights": True, "modules_to_save": None}
LowRankDelta = LoRA | DoRA


# Reading


def read(folder: Folder, backbone: Backbone) -> Opened:
    """A LoRA (DoRA) for each rank and alpha of the folder, at the sites that have them."""
    config = folder.config
    out = None if backbone.head is None else backbone.head.out
    groups: dict[tuple[int, float], dict[Site, Mapping[str, Tensor]]] = {}
    used: set[str] = set()
    for path in targeted(config, backbone.model, out):
        sites = maps_at(path, backbone, folder.path)
        rank, alpha = _rank(folder, path), _alpha(folder, path)
        tensors = _tensors(folder, path, rank, backbone)
        used |= {f"{PREFIX}{path}.{ENDS[name]}" for name in tensors}
        for site in sites:
            groups.setdefault((rank, alpha), {})[site] = _of_part(tensors, site.part)
    check_all_used(folder, used, backbone)
    if not groups:
        raise StoreError(f"{folder.path} names no module of this backbone: {config['target_modules']!r}")
    return _opened(folder, backbone, groups)


def _opened(
    folder: Folder, backbone: Backbone, groups: Mapping[tuple[int, float], Mapping[Site, Mapping[str, Tensor]]]
) -> Opened:
    """The groups as deltas in their order."""
    dropout = float(folder.config.get("lora_dropout") or 0.0)
    method = DoRA if folder.config.get("use_dora") else LoRA
    deltas: list[Delta] = []
    tensors: dict[str, Tensor] = {}
    for number, ((rank, alpha), sites) in enumerate(groups.items()):
        at = selectors_of(sites, backbone.sites)
        deltas.append(method(rank, alpha, dropout, bool(folder.config.get("use_rslora")), at))
        for site, own in sites.items():
            tensors |= {f"{number}.{site.name}.{name}": tensor for name, tensor in own.items()}
    return Opened(tuple(deltas), tensors)


def _rank(folder: Folder, path: str) -> int:
    rank = by_pattern(folder.config.get("rank_pattern"), path, folder.config.get("r"))
    if type(rank) is not int or rank < 1:
        raise StoreError(f"{folder.path} gives {path} the rank {rank!r}; a whole number from 1 on is possible")
    return rank


def _alpha(folder: Folder, path: str) -> float:
    alpha = by_pattern(folder.config.get("alpha_pattern"), path, folder.config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise StoreError(f"{folder.path} gives {path} the alpha {alpha!r}; a number is possible")
    return float(alpha)


def _tensors(folder: Folder, path: str, rank: int, backbone: Backbone) -> dict[str, Tensor]:
    """A module's tensors by their name here."""
    module = backbone.model.get_submodule(path)
    inputs, outputs = linear_sizes(module) or (0, 0)
    found = {
        "a": taken(folder, path, ENDS["a"], (rank, inputs)),
        "b": taken(folder, path, ENDS["b"], (outputs, rank)),
    }
    if folder.config.get("use_dora"):
        found["magnitude"] = taken(folder, path, ENDS["magnitude"], (outputs,))
    return found


def _of_part(tensors: Mapping[str, Tensor], part: Part | None) -> dict[str, Tensor]:
    """The rows of B and of the magnitude that a part of a fused map has, in the shapes of a site's tensors."""
    own = dict(tensors)
    if part is not None:
        own["b"] = part.take(own["b"].mT).mT
    if "magnitude" in own:
        own["magnitude"] = own["magnitude"] if part is None else part.take(own["magnitude"])
        own["magnitude"] = own["magnitude"][None]  # [1, out]
    return own


# Writing


@dataclass(frozen=True)
class LowRank:
    """s · B A at one module, and the magnitude of its rows for DoRA."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float
    magnitude: Tensor | None = None  # [out]

    @property
    def rank(self) -> int:
        return len(self.a)

    def scaled(self, scale: float) -> LowRank:
        """The same change with another s."""
        return self if scale == self.scale else replace(self, b=self.b * (self.scale / scale), scale=scale)

    def padded(self, rank: int) -> LowRank:
        """The same change at a higher rank, with rows and columns of zeros."""
        more = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(more, self.a.shape[1])])
        return replace(self, a=a, b=torch.cat([self.b, self.b.new_zeros(len(self.b), more)], dim=1))


def write(pieces: Sequence[Piece], backbone: Backbone, uniform: bool) -> Written:
    """One PEFT LoRA of all LoRAs (DoRAs); where `uniform`, of one rank and alpha, without patterns."""
    at: dict[str, list[Piece]] = {}
    for piece in pieces:
        at.setdefault(piece.site.path, []).append(piece)
    changes = {path: _change(own, backbone.model.get_submodule(path)) for path, own in at.items()}
    settings = [_low_rank(piece) for piece in pieces]
    stabilised = all(delta.rank_stabilised for delta in settings)
    if uniform:
        scale = _most(change.scale for change in changes.values())
        rank = max(change.rank for change in changes.values())
        changes = {path: change.scaled(scale).padded(rank) for path, change in changes.items()}
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        own = {"a": change.a, "b": change.b, "magnitude": change.magnitude}
        tensors |= {f"{PREFIX}{path}.{ENDS[name]}": t for name, t in own.items() if t is not None}
    modules = {path: module for path, module in backbone.model.named_modules() if path}
    dropouts = {delta.dropout for delta in settings}
    config = {
        "peft_type": LORA,
        "target_modules": names_of(changes, modules),
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "fan_in_fan_out": any(is_turned(modules[path]) for path in changes),
        "use_rslora": stabilised,
        "use_dora": isinstance(settings[0], DoRA),
        **_patterns(changes, stabilised),
        **NEUTRAL,
    }
    return Written(config, tensors)


def _change(pieces: Sequence[Piece], module: nn.Module) -> LowRank:
    """The change of a module that all deltas at its sites make together."""
    first = pieces[0]
    if len(pieces) == 1 and first.site.part is None:
        magnitude = first.tensors["magnitude"][0] if isinstance(first.delta, DoRA) else None
        return LowRank(first.tensors["a"], first.tensors["b"], _scale(first), magnitude)
    scale = _most(_scale(piece) for piece in pieces)
    apart: list[Tensor] = []  # the different A's
    for piece in pieces:
        if not any(torch.equal(piece.tensors["a"], a) for a in apart):
            apart.append(piece.tensors["a"])
    outputs = (linear_sizes(module) or (0, 0))[1]
    b = torch.cat([_b(a, pieces, outputs, scale) for a in apart], dim=1)
    return LowRank(torch.cat(apart), b, scale, _magnitude(pieces, module))


def _b(a: Tensor, pieces: Sequence[Piece], outputs: int, scale: float) -> Tensor:
    """The columns [out, r] of B behind one A: those of the pieces that read it, at their parts' rows."""
    b = a.new_zeros(outputs, len(a))
    for piece in pieces:
        if torch.equal(piece.tensors["a"], a):
            own, part = piece.tensors["b"] * (_scale(piece) / scale), piece.site.part
            b = b + (own if part is None else part.put(torch.zeros_like(b).mT, own.mT).mT)
    return b


def _magnitude(pieces: Sequence[Piece], module: nn.Module) -> Tensor | None:
    """DoRA's row norms of a whole fused map; the frozen weight's own where no part is adapted."""
    first = pieces[0]
    if not isinstance(first.delta, DoRA):
        return None
    if len({piece.site.name for piece in pieces}) < len(pieces):
        raise StoreError(f"two DoRAs at {first.site.name} have no form in one folder of PEFT; merge one of them first")
    weight, _ = map_of(replace(first.site, part=None), module)
    whole = weight.detach().to(first.tensors["a"].dtype).norm(dim=1)
    for piece in pieces:
        own = piece.tensors["magnitude"][0]
        whole = own if piece.site.part is None else piece.site.part.put(whole, own)
    return whole


def _low_rank(piece: Piece) -> LowRankDelta:
    return cast(LowRankDelta, piece.delta)


def _scale(piece: Piece) -> float:
    return _low_rank(piece).scale


def _most(scales: Iterable[float]) -> float:
    """The commonest scale that is not zero, which the others are put in proportion to."""
    return Counter([scale for scale in scales if scale] or [1.0]).most_common(1)[0][0]


def _patterns(changes: Mapping[str, LowRank], stabilised: bool) -> dict[str, object]:
    """r and lora_alpha of most modules, and the patterns for the others."""
    told = {path: (change.rank, _alpha_of(change, stabilised)) for path, change in changes.items()}
    rank, alpha = Counter(told.values()).most_common(1)[0][0]
    ranks = {path: r for path, (r, _) in told.items() if r != rank}
    alphas = {path: a for path, (_, a) in told.items() if a != alpha}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _by_name(ranks, told),
        "alpha_pattern": _by_name(alphas, told),
    }


def _by_name(values: Mapping[str, float], among: Mapping[str, object]) -> dict[str, float]:
    """The values by the shortest names of the modules that have each."""
    patterns: dict[str, float] = {}
    for value in sorted(set(values.values())):
        paths = [path for path, v in values.items() if v == value]
        patterns |= dict.fromkeys(names_of(paths, among), value)
    return patterns


def _alpha_of(change: LowRank, stabilised: bool) -> float:
    """α with α/r (α/√r) = s; a whole number where it is one."""
    alpha = change.scale * (change.rank**0.5 if stabilised else change.rank)
    near = round(alpha)
    return near if abs(alpha - near) <= 1e-12 * abs(alpha) else alpha
