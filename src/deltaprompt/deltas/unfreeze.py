"""y' = y + ΔW x + Δb: chosen weights and biases of the backbone itself train (Ding et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from deltaprompt.backbone.sites import Site
from deltaprompt.deltas._base import After, Delta, Mergeable, Started, Taxonomy
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights, zeros

Tuned = Literal["weight", "bias"]
Stored = Literal["difference", "value"]


@dataclass(frozen=True)
class Unfreeze(Delta, After, Mergeable, Started):
    """Specification-based tuning: in · out parameters a linear map, d a norm; out (or d) more where it has a bias.

    What a norm's scale trains is a factor on it, l = 1 + δ: y' = y + (y − bias) ⊙ δ + Δb.

    Args:
        last: so many of the last layers (of an encoder-decoder, in both stacks); 1 where `at` is not given either.
        at: selectors of linear maps and norms, instead of the last layers.
        of: what trains there; a site that has none of it is left out.
        stored: "difference": ΔW, Δb and δ, which start at 0, so that weight decay pulls towards the backbone;
            "value": W + ΔW, bias + Δb and l, so that it pulls towards 0 as it does when all of a model is trained.
    """

    last: int | None = None
    at: tuple[str, ...] = ()
    of: tuple[Tuned, ...] = ("weight", "bias")
    stored: Stored = "difference"
    taxonomy: ClassVar[Taxonomy] = "specification"
    acts_on: ClassVar[tuple[str, ...]] = ("linear", "norm")

    def __post_init__(self) -> None:
        if self.last is not None and (self.last < 1 or self.at):
            raise ConfigError(
                f"unfreeze: got last={self.last}, at={self.at}; give last >= 1, or at, or neither (last=1)"
            )
        if not self.of or not set(self.of) <= set(get_args(Tuned)) or self.stored not in get_args(Stored):
            raise ConfigError(
                f"unfreeze: got of={self.of}, stored={self.stored!r}; possible: one or both of "
                f"{list(get_args(Tuned))}, stored in {list(get_args(Stored))}"
            )

    def selectors(self) -> Sequence[str]:
        return self.at or (f"layers[-{self.last or 1}:].*",)

    def params(self, site: Site) -> Mapping[str, Param]:
        weight = (1, site.outputs) if site.kind == "norm" else (site.outputs, site.inputs)
        shapes = {"weight": weight, **({"bias": (1, site.outputs)} if site.biased else {})}
        return {name: Param(shape, zeros) for name, shape in shapes.items() if name in self.of}

    def start(self, w: Weights, site: Site) -> Mapping[str, Tensor]:
        if self.stored == "difference":
            return {}
        weight, bias = w.frozen()
        begun = {"weight": torch.ones_like(weight) if site.kind == "norm" else weight, "bias": bias}
        return {name: t for name, t in begun.items() if t is not None and name in w}

    def _changes(self, w: Weights, site: Site) -> Mapping[str, Tensor]:
        """ΔW (of a norm δ) and Δb, by the names of what trains."""
        begun = self.start(w, site)
        return {name: w[name] - begun[name] if name in begun else w[name] for name in self.of if name in w}

    def after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        change, new = self._changes(w, site), y
        if "weight" in change and site.kind == "norm":
            bias = w.frozen()[1] if site.biased else None
            new = new + (y if bias is None else y - bias) * change["weight"]
        elif "weight" in change:
            new = new + x @ change["weight"].mT  # [b, s, in] -> [b, s, out]
        return new + change["bias"] if "bias" in change else new

    def merged(self, w: Weights, site: Site, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change, begun = self._changes(w, site), self.start(w, site)
        if "weight" in change and site.kind == "norm":
            delta, own = change["weight"][0], w.frozen()[1]
            weight, bias = weight + weight * delta, bias if bias is None or own is None else bias + (bias - own) * delta
        elif "weight" in change:
            weight = _onto(weight, w["weight"], begun.get("weight"))
        return weight, bias if bias is None or "bias" not in w else _onto(bias, w["bias"][0], begun.get("bias"))


def _onto(given: Tensor, own: Tensor, begun: Tensor | None) -> Tensor:
    """What is given and the change: bitwise the value that trains, where nothing else has changed what is given."""
    return given + own if begun is None else own + (given - begun)
