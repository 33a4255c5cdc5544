"""A tiny backbone that laws are checked on: its inputs, its answers before anything is attached, and a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltaprompt.backbone import Backbone
from deltaprompt.compose import Adapted, Index
from deltaprompt.conformance.configs import parts
from deltaprompt.conformance.shrink import Architecture, backbone, inputs_for
from deltaprompt.conformance.snapshot import Snapshot
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}  # of outputs; in float64 models still take softmax in float32
SEED = 20


@dataclass(frozen=True, eq=False)
class Subject:
    """A backbone, four rows of inputs [4, 8] of which two are padded, and its logits for them."""

    backbone: Backbone
    inputs: Mapping[str, Tensor]
    own: Tensor  # the logits before anything is attached
    logits: Tensor  # the same while nothing of it trains: some convolutions then sum in another order
    before: Snapshot
    independent: bool  # whether, in the plain model, a row's logits depend on that row alone

    @classmethod
    def of(cls, architecture: Architecture) -> Subject:
        """In float64 where the model runs in it, else in float32; its first parameter is frozen, as a user's may be.

        Raises:
            BackboneError: the architecture cannot be built, or it has no sites.
        """
        try:
            made = backbone(architecture)
        except BackboneError:  # ProphetNet's scores are of several tokens at once, and no head in DeltaPrompt's sense
            made = backbone(architecture, kind="encoder")
        model = made.model
        for part in parts(model.config):
            if "use_cache" in vars(part):
                part.use_cache = False  # as in training; RWKV and xLSTM give no gradients with it
        inputs = _four_rows(inputs_for(model, architecture))
        _in_double(model, inputs)
        moving = set(_moving(model, inputs))
        next(model.parameters()).requires_grad_(False)
        logits = _logits(model, inputs)
        other = {n: torch.cat([t[:1].roll(3, 1), t[1:]]) if n.endswith("ids") else t for n, t in inputs.items()}
        apart = float((_logits(model, other) - logits)[1:].abs().max()) < TOLERANCES[model.dtype]
        before = Snapshot.of(model, moving)
        frozen = _frozen_logits(model, inputs)
        return cls(made, inputs, logits, frozen, before, apart)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.backbone.model.dtype

    @property
    def tolerance(self) -> float:
        """How far outputs that should be equal may differ: a share of the largest logit."""
        return TOLERANCES[self.dtype] * max(1.0, float(self.logits.abs().max()))

    def again(self) -> Tensor:
        """The logits as they are now."""
        return _logits(self.backbone.model, self.inputs)

    def inputs_of(self, delta: Delta) -> dict[str, Tensor]:
        """Inputs that the delta has something to do with: virtual ids for a delta at the embedding."""
        inputs = {name: t.clone() for name, t in self.inputs.items()}
        if delta.acts_on == ("embed",):
            inputs["input_ids"][:, 2] = self.backbone.vocabulary + 1
            inputs["input_ids"][0, 5] = self.backbone.vocabulary + 4
        return inputs

    def close(self, a: Tensor, b: Tensor) -> bool:
        """Whether outputs are equal but for rounding."""
        return bool(torch.allclose(a, b, rtol=0, atol=self.tolerance))

    def loss(self, logits: Tensor) -> Tensor:
        """The mean cross-entropy of made-up labels at real positions; more scores than positions are left out."""
        mask = self.inputs.get("decoder_attention_mask", self.inputs["attention_mask"]).bool()
        logits = logits[:, : mask.shape[1]]
        labels = torch.arange(mask.numel()).view(mask.shape) * 7 % logits.shape[-1]
        return nn.functional.cross_entropy(logits[mask].double(), labels[mask])

    @contextmanager
    def attached(self, delta: Delta, slots: int = 1, shaken: bool = True) -> Iterator[Adapted]:
        """The backbone with the delta, moved away from where it starts, each slot differently."""
        adapted = Adapted(self.backbone, [delta], slots, range(slots)).eval()
        try:
            yield shake(adapted) if shaken else adapted
        finally:
            adapted.eval().remove()


def run(adapted: Adapted, inputs: Mapping[str, Tensor], index: Index = None) -> Tensor:
    """Logits [b, s, V]."""
    adapted.route(index)
    return _logits(adapted.model, inputs, torch.is_grad_enabled())


@torch.no_grad()
def shake(adapted: Adapted, seed: int = SEED) -> Adapted:
    """Moves every parameter away from where it is, each slot differently."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in adapted.parts():
        p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=0.1)
    return adapted


def _logits(model: nn.Module, inputs: Mapping[str, Tensor], gradients: bool = False) -> Tensor:
    """Logits [b, s, V]; what is random in a model is the same in every run."""
    with torch.random.fork_rng(), torch.set_grad_enabled(gradients):
        torch.manual_seed(SEED)
        return model(**inputs).logits


def _frozen_logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    training = {p for p in model.parameters() if p.requires_grad}
    model.requires_grad_(False)
    logits = _logits(model, inputs)
    for p in training:
        p.requires_grad_()
    return logits


def _in_double(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Puts a model in float64 if it runs there, forward and backward; in float32 if it does not."""
    try:
        model.to(torch.float64)
        _warm(model, inputs)
    except (RuntimeError, TypeError, ValueError, ArithmeticError):
        model.to(torch.float32)
        _warm(model, inputs)


def _moving(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Iterator[str]:
    """Buffers in which a model keeps statistics of what passes it in training."""
    before = Snapshot.of(model)
    _warm(model, {name: t.roll(1, 1) if name.endswith("ids") else t for name, t in inputs.items()})
    after = dict(model.named_buffers(remove_duplicate=False))
    return (name for name, t in after.items() if not torch.equal(t, before.tensors[name]))


def _warm(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """One pass there and back: what a model keeps of its passes is there before it is looked at."""
    model.train()
    _logits(model, inputs, gradients=True).double().square().mean().backward()
    finite = all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    model.eval()
    if not finite:  # Longformer in float64: its mask is that precision's least number, its softmax in float32
        raise ArithmeticError("its gradients are not finite")


def _four_rows(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows and as many others, which differ from them in their first tokens."""
    more = {name: t.clone() for name, t in inputs.items()}
    for name, t in more.items():
        if name.endswith("ids"):
            t[:, :3] = t[:, :3].flip(1)
    return {name: torch.cat([t, more[name]]) for name, t in inputs.items()}
