"""`Adapted`: a backbone with deltas at its sites.

Attaching, slots, removal, freezing, counting and merging are written here, once for all methods.

Every delta becomes `Patch`es, one a site, held by PyTorch's own forward hooks on the backbone's modules; nothing of the
backbone is replaced or renamed. After `remove` it is bitwise what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from deltaprompt.backbone import Backbone, Site, attention
from deltaprompt.backbone.sites import is_turned
from deltaprompt.deltas._base import After, Before, Delta, KeyValue, Mergeable
from deltaprompt.errors import ConfigError, SiteError
from deltaprompt.params import Param, Weights

Index = int | Tensor | None  # one slot for all rows, or a slot for each row [rows]; None is slot 0


class Routing:
    """Which slot each row of the running forward pass belongs to; shared by all patches of an `Adapted`."""

    def __init__(self) -> None:
        self.index: Index = None

    @contextmanager
    def at(self, index: Index) -> Iterator[None]:
        """Within it the rows belong to `index`."""
        kept, self.index = self.index, index
        try:
            yield
        finally:
            self.index = kept

    def replay(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For checkpointing: nothing around the forward pass, and the slots of now around its recomputation."""
        return nullcontext(), self.at(self.index)


class Stack(nn.Module):
    """Trainable tensors stacked `[n, …]`, one slot per adaptation, read through the routing."""

    def __init__(self, params: Mapping[str, Param], slots: int, routing: Routing, like: Tensor) -> None:
        super().__init__()
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.routing = routing
        self.specs = dict(params)
        empty = {name: torch.empty(slots, *p.shape, dtype=dtype, device=like.device) for name, p in params.items()}
        self.tensors = nn.ParameterDict({name: nn.Parameter(t) for name, t in empty.items()})

    @torch.no_grad()
    def start(self, seeds: Sequence[int]) -> None:
        """Every slot as a new adaptation of its seed; the numbers do not depend on the device or on the other slots."""
        for slot, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for name, spec in self.specs.items():
                fresh = torch.empty(spec.shape, dtype=torch.float32)
                spec.init(fresh, generator)
                self.tensors[name][slot].copy_(fresh)

    def weights(self, rows: int) -> Weights:
        """One slot's tensors, or one slot for each of `rows` rows."""
        index = self.routing.index
        if isinstance(index, Tensor) and index.shape[0] != rows:
            raise ConfigError(
                f"{index.shape[0]} adaptations were named for {rows} rows; name one a row, or one for all"
            )
        slot = 0 if index is None else index
        return Weights({name: t[slot] for name, t in self.tensors.items()}, self.training)

    def slot(self, index: int) -> Weights:
        """The tensors of one slot, not training."""
        return Weights({name: t[index] for name, t in self.tensors.items()}, False)


class Patch(Stack):
    """One delta at one site: its tensors there, and the hooks that call its maths.

    The deltas of a site lie around one another, the first innermost: each sees what enters and leaves those within.
    """

    def __init__(self, number: int, delta: Delta, site: Site, slots: int, routing: Routing, like: Tensor) -> None:
        super().__init__(delta.params(site), slots, routing, like)
        self.number = number  # of the delta
        self.delta = delta
        self.site = site
        self.entered: Tensor | None = None  # what entered the site, between the two hooks of one call

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook in front of the site: x' = before(x)."""
        self.entered = args[0] if isinstance(self.delta, After) else None
        return (self._mapped(self.delta.before, args[0]), *args[1:]) if isinstance(self.delta, Before) else args

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The hook behind the site: y' = after(x, y), on the site's part of a fused map's output."""
        x, self.entered, part = self.entered, None, self.site.part
        after = cast(After, self.delta).after
        if part is None:
            return self._mapped(after, x, output)
        return part.put(output, self._mapped(after, x, part.take(output)))

    def key_value(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The hook at an attention site: k', v' from k, v [b, heads, s, size]."""
        return cast(KeyValue, self.delta).key_value(self.weights(k.shape[0]), self.site, k, v)

    def _mapped(self, maths: Callable[..., Tensor], *seen: Tensor | None) -> Tensor:
        """The maths on [b, s, size], in the delta's precision (in autocast's within it), returned as the last seen."""
        tensors = [t for t in seen if t is not None]
        last = tensors[-1]
        weights = self.weights(self._rows(last))
        dtypes = () if torch.is_autocast_enabled(last.device.type) else (w.dtype for w in weights.values())
        own = next(iter(dtypes), None)
        new = maths(weights, self.site, *(self._ready(t, own) for t in tensors))
        return new.reshape(last.shape).to(last.dtype)

    def _ready(self, t: Tensor, own: torch.dtype | None) -> Tensor:
        """Token ids [b, s] as they are; numbers as [b, s, size] (OPT: [b * s, size]; Qwen 3: [b, s, heads, size])."""
        if not t.is_floating_point():
            return t
        return t.reshape(self._rows(t), -1, t.shape[-1]).to(own or t.dtype)

    def _rows(self, t: Tensor) -> int:
        """The number of rows b of a tensor that passes the site."""
        index = self.routing.index
        flat = t.ndim == 2 and t.is_floating_point()
        if not isinstance(index, Tensor):
            return t.shape[0] if t.ndim > 2 else 1
        if t.shape[0] == 1 < len(index):
            raise SiteError(
                f"{self.site.name} also maps what all rows of a batch share (DeBERTa's relative positions), so they "
                "cannot have an adaptation each there. Name one for all, or choose other sites: attn.v, attn.o, ffn.*"
            )
        return len(index) if flat and t.shape[0] % len(index) == 0 else t.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "entered": None}  # an interrupted pass leaves it behind, and it cannot be copied


class Adapted(nn.Module):
    """A frozen backbone and the patches of its deltas; an `nn.Module` that owns both.

    Args:
        backbone: it is frozen until `remove`.
        deltas: in the order in which they act at a site.
        slots: adaptations that live side by side.
        seeds: one a slot; what its parameters start from.
    """

    def __init__(
        self, backbone: Backbone, deltas: Sequence[Delta], slots: int = 1, seeds: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        seeds = [0] * slots if seeds is None else seeds
        if slots < 1 or len(seeds) != slots:
            raise ConfigError(
                f"{len(seeds)} seeds for {slots} slots; one or more slots, and a seed for each, are possible"
            )
        self.backbone = backbone
        self.model = backbone.model
        self.deltas = tuple(deltas)
        self.slots = slots
        self.routing = Routing()
        self.patches = nn.ModuleList(self._patches_of(seeds))
        self._handles: list[RemovableHandle] = []
        self._attention: str | None = None
        self._trainable = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.model.requires_grad_(False)
        for patch in self._placed():
            self._hook(patch, self.model.get_submodule(patch.site.path))

    def _patches_of(self, seeds: Sequence[int]) -> Iterator[Patch]:
        """A patch for each delta at each of its sites."""
        chosen = [(n, delta, site) for n, delta in enumerate(self.deltas) for site in sites_of(delta, self.backbone)]
        for place, (number, delta, site) in enumerate(chosen):
            owner = self.model.get_submodule(site.path)
            like = next(owner.parameters(), next(self.model.parameters()))
            patch = Patch(number, delta, site, len(seeds), self.routing, like)
            patch.start([_mixed(seed, place) for seed in seeds])
            yield patch

    def _placed(self) -> list[Patch]:
        return cast(list[Patch], list(self.patches))

    def _hook(self, patch: Patch, module: nn.Module) -> None:
        """Registers the hooks that the patch's delta needs."""
        if isinstance(patch.delta, Before | After):
            self._handles.append(module.register_forward_pre_hook(patch.enter, prepend=True))
        if isinstance(patch.delta, After):
            self._handles.append(module.register_forward_hook(patch.leave))
        if isinstance(patch.delta, KeyValue):
            if self._attention is None:
                self._attention = attention.install(self.model)
            attention.hooks_at(module).append(patch.key_value)

    def forward(self, *args: Any, adaptation: Index = None, **inputs: Any) -> Any:
        """The backbone's own forward; `adaptation` is a slot, or one slot a row [rows]."""
        self.route(adaptation)
        return self.model(*args, **inputs)

    def states(self, inputs: Mapping[str, Tensor], adaptation: Index = None) -> Tensor:
        """The last hidden states [b, s, d] without the head."""
        self.route(adaptation)
        return self.backbone.states(inputs)

    def route(self, index: Index) -> None:
        """The rows of the passes to come belong to `index`."""
        if isinstance(index, int) and not 0 <= index < self.slots:
            raise ConfigError(f"adaptation {index} was named; 0 to {self.slots - 1} are possible")
        self.routing.index = index

    @contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Within it every row stands for `times` rows that follow one another."""
        index = self.routing.index
        with self.routing.at(index.repeat_interleave(times) if isinstance(index, Tensor) else index):
            yield

    def checkpointing(self, on: bool = True) -> None:
        """Whether the backward pass computes layers again, in the slots of their own forward pass, to save memory."""
        if not self.model.supports_gradient_checkpointing:
            raise ConfigError(
                f"{type(self.model).__name__} cannot compute its layers again; train it without checkpointing"
            )
        again = partial(checkpoint, use_reentrant=False, context_fn=self.routing.replay)
        self.model._set_gradient_checkpointing(enable=on, gradient_checkpointing_func=again)

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stacked tensors by stored name: `<number of the delta>.<site>.<tensor>`."""
        for patch in self._placed():
            for name, tensor in patch.tensors.items():
                yield f"{patch.number}.{patch.site.name}.{name}", tensor

    def parameter_count(self) -> int:
        """Trainable numbers of one adaptation."""
        return sum(spec.size for patch in self._placed() for spec in patch.specs.values())

    def remove(self) -> Backbone:
        """Takes every hook away and gives the backbone back as it was, bitwise."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for patch in self._placed():
            if isinstance(patch.delta, KeyValue):
                attention.take_away(self.model.get_submodule(patch.site.path), patch.key_value)
        if self._attention is not None:
            attention.uninstall(self.model, self._attention)
            self._attention = None
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._trainable[name])
        self.patches = nn.ModuleList()
        return self.backbone

    @torch.no_grad()
    def merge(self, slot: int = 0) -> Backbone:
        """The backbone with one slot's deltas taken up by its own weights; they are then removed.

        Raises:
            SiteError: a delta has no weight-space form, or a site has no tensor to take it up. Nothing is changed then.
        """
        self.route(slot)
        new: dict[str, Tensor] = {}
        for patch in self._placed():
            new |= merged(patch, slot, self.model, new)
        for name, tensor in new.items():
            self.model.get_parameter(name).copy_(tensor)
        return self.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._attention is not None:
            attention.register(self._attention)


def carries_deltas(model: nn.Module) -> bool:
    """Whether any patch is attached to a model."""
    hooks = (
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *attention.hooks_of(module))
    )
    return any(isinstance(hook, MethodType) and isinstance(hook.__self__, Patch) for hook in hooks)


def sites_of(delta: Delta, backbone: Backbone) -> list[Site]:
    """The sites a delta goes to on a backbone; an error where there is none, or where it cannot act."""
    name = type(delta).__name__
    chosen = backbone.sites.select(delta.selectors())
    fitting = [site for site in chosen if site.kind in delta.acts_on]
    if not fitting:
        kinds = ", ".join(sorted({site.kind for site in chosen})) or "none"
        possible = ", ".join(delta.acts_on)
        raise SiteError(f"{name} acts on sites of kind {possible}; {list(delta.selectors())} are of kind {kinds}")
    if isinstance(delta, KeyValue):
        attention.base_of(backbone.model)
    for site in fitting:
        if isinstance(delta, KeyValue) and not attention.supported(backbone.model.get_submodule(site.path)):
            raise SiteError(
                f"{name} cannot act at {site.name}: {type(backbone.model).__name__} computes attention in code of its "
                "own, which takes no further keys and values. Other deltas work on this backbone"
            )
    return fitting


def _mixed(seed: int, place: int) -> int:
    """A seed for the patch at that place: apart for each (seed, place)."""
    return (seed * 1_000_003 + place * 7_919 + 17) % 2**63


def merged(patch: Patch, slot: int, model: nn.Module, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module after it takes up a patch, given those that earlier patches made `new`."""
    delta, site, name = patch.delta, patch.site, type(patch.delta).__name__
    if not isinstance(delta, Mergeable):
        raise SiteError(f"{name} has no form in weights: it is no linear change of a map. Keep it attached")
    module = model.get_submodule(site.path)
    own = {f"{site.path}.{n}": p for n, p in module.named_parameters(recurse=False)}
    if elsewhere := _elsewhere(own, model):
        raise SiteError(f"{name} cannot be merged at {site.name}: its weight is also that of {', '.join(elsewhere)}")
    weight, bias = (new.get(f"{site.path}.{n}", own.get(f"{site.path}.{n}")) for n in ("weight", "bias"))
    if weight is None or not weight.is_floating_point():
        raise SiteError(f"{name} cannot be merged at {site.name}: {site.path} has no weight in floating point")
    w, b = delta.merged(patch.slot(slot), site, *_seen(site, module, weight, bias))
    if bias is None and b is not None:
        raise SiteError(f"{name} needs a bias at {site.name} to be merged into, and {site.path} has none")
    made = {f"{site.path}.weight": _put_back(site, module, weight, w)}
    if bias is not None and b is not None:
        made[f"{site.path}.bias"] = b if site.part is None else site.part.put(bias, b)
    return made


def _elsewhere(own: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """The names, outside `own`, under which the model has one of these tensors too (tied weights)."""
    ids = {id(p) for p in own.values()}
    return [n for n, p in model.named_parameters(remove_duplicate=False) if n not in own and id(p) in ids]


def _seen(site: Site, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of the site's part of its module."""
    weight = weight.mT if is_turned(module) else weight
    if site.part is None:
        return weight, bias
    return site.part.take(weight.mT).mT, None if bias is None else site.part.take(bias)


def _put_back(site: Site, module: nn.Module, weight: Tensor, new: Tensor) -> Tensor:
    """The module's weight, as it keeps it, with the site's part new [out, in]."""
    if site.part is not None:
        turned = weight if is_turned(module) else weight.mT  # [in, out]
        new = site.part.put(turned, new.mT).mT
    return new.mT if is_turned(module) else new
