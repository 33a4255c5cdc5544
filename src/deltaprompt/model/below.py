"""Which part of a backbone lies below the lowest delta, and whether a pass may leave it out: seen on two texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.layers import is_spread
from deltaprompt.backbone.load import states_of
from deltaprompt.backbone.shared import alike, rotates_by_length
from deltaprompt.compose.patch import Patch
from deltaprompt.features import Encoded
from deltaprompt.features.rows import Row
from deltaprompt.model.generator import Generator
from deltaprompt.model.model import Model
from deltaprompt.model.trainable import evaluating

ROUNDING: Final = 64  # units in the last place of a state's norm that other padding may make: 8e-6 in float32
CUT: Final = 3  # tokens by which the shorter of two rows is shorter

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Below:
    """What a pass may leave out: the layers below the lowest delta, a whole encoder, or everything."""

    modules: tuple[nn.Module, ...] = ()  # in the order of their calls; none: the whole backbone
    parts: tuple[int, ...] = ()  # what each returns: 0 for its states alone, n for a tuple of them and n - 1 times None
    told: str = "the backbone's states"


@dataclass(frozen=True)
class Nothing:
    """Why nothing can be kept; without a word where a delta acts in the first layer and nothing lies below."""

    why: str = ""


def below(model: Model | Generator, texts: Sequence[Encoded]) -> Below | Nothing:
    """What lies below a model's deltas. The shortest text is run by itself, and beside the longest one."""
    if reason := _forbidden(model):
        return Nothing(reason)
    rows = sorted((row for text in texts for row in text.variants), key=lambda row: len(row.ids))
    row, short = rows[-1], Row(rows[0].ids, [0], rows[0].decoder)
    if len(row.ids) - len(short.ids) < CUT:
        short = Row(row.ids[: max(1, len(row.ids) - CUT)], [0], row.decoder)
    device = model.device
    alone = model.features.collate([Encoded((short,))]).to(device).inputs
    both = model.features.collate([Encoded((row,)), Encoded((short,))]).to(device).inputs
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with torch.no_grad(), forked, evaluating(model), model.adapted.routing.at(0):
        with _watched(model) as seen:
            states = model.backbone.states(both)
        found = seen.found()
        if isinstance(found, Below) and not _exact(model.backbone, found, both, alone, states):
            return Nothing("its layers give each other more than each text's own states")
    return found


def _forbidden(model: Model | Generator) -> str:
    if is_spread(model.backbone.model):
        return "its layers are spread over processes"
    if any(p.requires_grad for p in model.backbone.model.parameters()):
        return "the backbone trains too"
    if rotates_by_length(model.backbone.config):
        return "its positions depend on how long a batch is"
    if isinstance(model, Generator):
        return "several texts stand in one row" if model.packed else ""
    if any(model.reader(slot).reading.continues for slot in range(model.adapted.slots)):
        return "answers of several tokens need its keys and values"
    return ""


@dataclass
class _Seen:
    """What a pass calls until the first delta acts."""

    deltas: dict[nn.Module, Patch]  # the first delta at each module
    layers: frozenset[nn.Module]
    encoder: nn.Module | None
    base: nn.Module
    acted: Patch | None = None
    inside: bool = False  # whether it acted when a layer had been entered
    entered: bool = False
    left: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def enter(self, module: nn.Module, args: Any) -> None:
        """The hook in front of layers and of whatever has a delta."""
        self.entered |= module in self.layers
        if self.acted is None and module in self.deltas:
            self.acted, self.inside = self.deltas[module], self.entered

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook behind layers and an encoder."""
        if self.acted is None and not any(inner in self.deltas for inner in module.modules()):
            self.left.append((module, output))
        elif self.acted is None:  # a delta in it that this text did not reach, such as an expert's
            self.acted, self.inside = next(self.deltas[m] for m in module.modules() if m in self.deltas), True

    def found(self) -> Below | Nothing:
        """What lies below the first delta."""
        if self.acted is None and not any(module in self.deltas for module in self.base.modules()):
            return Below()
        modules = [module for module, _ in self.left]
        if self.encoder is not None and self.encoder in modules:
            return Below((self.encoder,), (1,), "its encoder's states")
        if not modules:
            acted = self.acted or next(iter(self.deltas.values()))
            return Nothing("" if self.inside else f"{type(acted.delta).__name__} acts at {acted.site.name}")
        if len(set(modules)) < len(modules):
            return Nothing("its layers are one and the same")
        if not all(isinstance(output, Tensor) or type(output) is tuple for _, output in self.left):
            return Nothing("its layers give something else than states")
        parts = tuple(0 if isinstance(output, Tensor) else len(output) for _, output in self.left)
        return Below(
            tuple(modules), parts, "its lowest layer" if len(parts) == 1 else f"its {len(parts)} lowest layers"
        )


@contextmanager
def _watched(model: Model | Generator) -> Iterator[_Seen]:
    """Within it a pass tells which layers it has left when the first delta acts."""
    backbone, inner = model.backbone, model.backbone.model
    deltas: dict[nn.Module, Patch] = {}
    for patch in cast(list[Patch], list(model.adapted.patches)):
        for path in filter(None, (patch.site.path, patch.site.entry)):
            deltas.setdefault(inner.get_submodule(path), patch)
    stack = "encoder." if backbone.kind == "seq2seq" else ""
    sites = [s for s in backbone.sites.values() if s.kind == "layer" and s.name.startswith(stack)]
    layers = frozenset(inner.get_submodule(site.path) for site in sites)
    encoder = inner.get_encoder() if backbone.kind == "seq2seq" else None
    seen = _Seen(deltas, layers, encoder, backbone.base)
    before = dict.fromkeys([*layers, *deltas])
    behind = [*layers, *([] if encoder is None else [encoder])]
    handles = [module.register_forward_pre_hook(seen.enter, prepend=True) for module in before]
    handles += [module.register_forward_hook(seen.leave) for module in behind]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _exact(backbone: Backbone, found: Below, both: Inputs, alone: Inputs, states: Tensor) -> bool:
    """Whether the states of a text depend neither on padding nor on its neighbours, and passes may start from them."""
    mask = both["attention_mask"].bool()
    if not found.modules:
        reached, single = states, backbone.states(alone)
        read = mask if backbone.kind != "seq2seq" else torch.ones_like(states[..., 0], dtype=torch.bool)
    else:
        reached, single = (leaving(backbone, inputs, found.modules[-1]) for inputs in (both, alone))
        read = mask
    if reached.shape[:-1] != read.shape or single.ndim != reached.ndim:  # not one state a token
        return False
    if not alike(reached[1][read[1]], single[0], ROUNDING):
        return False
    if not found.modules:
        return True
    try:
        with passed_by(found, torch.where(mask[..., None], reached, 0)):
            again = backbone.states(both)
    except Exception:  # whatever a model's code does without what its layers give beside their states
        return False
    seen = again.shape[:-1] == mask.shape and backbone.kind != "seq2seq"
    return alike(again[mask], states[mask], ROUNDING) if seen else alike(again, states, ROUNDING)


# Passing by


class _Reached(Exception):
    """Carries a layer's states out of a pass that need not go on."""


def leaving(backbone: Backbone, inputs: Inputs, module: nn.Module) -> Tensor:
    """The states that leave a module; what comes behind it is not run."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output)

    handle = module.register_forward_hook(stop)
    try:
        return backbone.states(inputs)  # it is reached before
    except _Reached as reached:
        output = reached.args[0]
    finally:
        handle.remove()
    if isinstance(output, Tensor):
        return output
    return cast(Tensor, output[0]) if type(output) is tuple else states_of(output)


@contextmanager
def passed_by(found: Below, states: Tensor) -> Iterator[None]:
    """Within it the modules below return these states [b, s, d], and do nothing."""
    own = [vars(module).get("forward") for module in found.modules]
    for module, parts in zip(found.modules, found.parts, strict=True):
        vars(module)["forward"] = _returning(states if parts == 0 else (states, *[None] * (parts - 1)))
    try:
        yield
    finally:
        _put_back(found.modules, own)


def _put_back(modules: Sequence[nn.Module], own: Sequence[Any]) -> None:
    for module, before in zip(modules, own, strict=True):
        del vars(module)["forward"]
        if before is not None:  # a forward that somebody else had put there
            vars(module)["forward"] = before


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
