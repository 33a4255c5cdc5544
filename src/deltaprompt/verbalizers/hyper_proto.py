"""score(c) = −τ M_c(h), M_c = ‖h − z_c‖ − ε_c: the distance to a sphere of learned radius (Ding et al. 2023).

As a cone M = −cos(max(0, ∠(h, z) − |ε|)), as a Gaussian M = ‖h − z‖² / 2ε² + d log ε. ε starts as the support's mean
distance from z, its mean angle to it, its standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from deltaprompt.errors import ConfigError, check_one_of
from deltaprompt.params import Param, Weights, zeros
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Setting, Started, Verbalizer, check_positive, each_has_examples, pooled
from deltaprompt.verbalizers._spheres import Metric, centres, measured, radii

LEAST = 1e-6  # what softplus gives where a radius of 0 is asked for, which it cannot


@dataclass(frozen=True)
class HyperProto(Verbalizer, Started):
    """A centre and a radius a class, both learned: c · (d + 1) parameters. O, of words outside, is a class like others.

    Args:
        metric: "distance" to the sphere, "cone", or "gaussian".
        inside: a distance within the sphere: "signed", below 0; "zero"; or "abs", as far as it is from the surface.
        radius: how ε is made of what trains: "raw", it is that; "abs", its absolute value; or "softplus" of it.
        one_shot: ε of a class of one example, which has no spread; where not given the mean of the other classes', and
            if all have one example 0 (of a Gaussian 1).
        unbiased: ε starts as that of new examples, √((k + 1) / (k − 1)) times that of the k that made the centre. Where
            classes have unequally many examples, those of few are behind without it.
        unit: whether states are taken to the unit sphere first, as DecT's are; a cone sees only directions anyway.
        scale: τ, the inverse temperature; on the unit sphere distances are short, and 20 is a start.
    """

    metric: Metric = "distance"
    inside: Literal["signed", "zero", "abs"] = "signed"
    radius: Literal["raw", "abs", "softplus"] = "raw"
    one_shot: float | None = None
    unbiased: bool = False
    unit: bool = False
    scale: float = 1.0
    begun: ClassVar[str] = "z"

    def __post_init__(self) -> None:
        check_one_of("metric", self.metric, get_args(Metric))
        check_one_of("inside", self.inside, ("signed", "zero", "abs"))
        check_one_of("radius", self.radius, ("raw", "abs", "softplus"))
        check_positive("hyper_proto", scale=self.scale)
        if self.metric != "distance" and self.inside != "signed":
            raise ConfigError(f"hyper_proto: inside={self.inside!r} is of the metric 'distance'; leave one of them out")
        if self.metric == "cone" and self.unit:
            raise ConfigError("hyper_proto: a cone sees only directions; leave unit out")
        one, gaussian = self.one_shot, self.metric == "gaussian"
        if one is not None and (not 0 <= one < torch.inf or (gaussian and one == 0)):
            raise ConfigError(f"hyper_proto: got one_shot={one}; {'above 0' if gaussian else '0 or more'} is possible")

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {"z": Param((len(s.labels), s.width), zeros), "r": Param((len(s.labels),), zeros)}

    def start(self, w: Weights, s: Setting, texts: Tensor, support: Tensor, classes: Tensor) -> Mapping[str, Tensor]:
        each_has_examples(s, classes, "a sphere")
        support = normalize(support, dim=-1) if self.unit else support
        z = centres(self.metric, support, classes, len(s.labels))
        e = radii(self.metric, z, support, classes, self.one_shot, self.unbiased)
        if self.radius == "softplus":
            e = e.clamp(min=LEAST)
            e = e + (-torch.expm1(-e)).log()  # the inverse of softplus
        return {"z": z, "r": e}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        h = pooled(at).to(w["z"].dtype)
        m = measured(self.metric, w["z"], self._radius(w["r"]), normalize(h, dim=-1) if self.unit else h)
        if self.inside != "signed":
            m = m.clamp(min=0) if self.inside == "zero" else m.abs()
        return -self.scale * m

    def _radius(self, r: Tensor) -> Tensor:
        """ε of what trains: [c], or one set a row."""
        if self.radius == "raw":
            return r
        return r.abs() if self.radius == "abs" else softplus(r)
