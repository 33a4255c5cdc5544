"""`Adapted`: a backbone with deltas at its sites. Attaching, slots, removal, freezing, counting and merging, once for all methods.

Every delta becomes `Patch`es, one a site, held by PyTorch's own forward hooks on the backbone's modules; nothing of the
backbone is replaced or renamed. After `remove` it is bitwise what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaprompt.backbone import Backbone, Site, attention
from deltaprompt.deltas._base import After, Before, Delta, KeyValue, Mergeable, Param, Weights
from deltaprompt.errors import ConfigError, SiteError

Index = int | Tensor | None  # one slot for all rows, or a slot for each row [rows]; None is slot 0


class Routing:
    """Which slot each row of the running forward pass belongs to; shared by all patches of an `Adapted`."""

    def __init__(self) -> None:
        self.index: Index = None


class Stack(nn.Module):
    """Trainable tensors stacked `[n, …]`, one slot per adaptation, read through the routing."""

    def __init__(self, params: Mapping[str, Param], slots: int, routing: Routing, like: Tensor) -> None:
        super().__init__()
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.routing = routing
        self.specs = dict(params)
        self.tensors = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(slots, *p.shape, dtype=dtype, device=like.device)) for name, p in params.items()}
        )

    def start(self, seeds: Sequence[int]) -> None:
        """Every slot as a new adaptation of its seed; the numbers do not depend on the device or on the other slots."""
        with torch.no_grad():
            for name, spec in self.specs.items():
                for slot, seed in enumerate(seeds):
                    fresh = torch.empty(spec.shape, dtype=torch.float32)
                    spec.init(fresh, torch.Generator().manual_seed(seed))
                    self.tensors[name][slot].copy_(fresh)

    def weights(self, rows: int) -> Weights:
        """One slot's tensors, or one slot for each of `rows` rows."""
        index = self.routing.index
        if isinstance(index, Tensor) and index.shape[0] != rows:
            raise ConfigError(f"{index.shape[0]} adaptations were named for {rows} rows; name one a row, or one for all")
        slot = 0 if index is None else index
        return Weights({name: t[slot] for name, t in self.tensors.items()}, self.training)

    def slot(self, index: int) -> Weights:
        """The tensors of one slot, not training."""
        return Weights({name: t[index] for name, t in self.tensors.items()}, False)


class Patch(Stack):
    """One delta at one site: its tensors there, and the hooks that call its maths."""

    def __init__(self, delta: Delta, site: Site, slots: int, routing: Routing, like: Tensor) -> None:
        super().__init__(delta.params(site), slots, routing, like)
        self.delta = delta
        self.site = site
        self.entered: Tensor | None = None  # what entered the site, between the two hooks of one call

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The hook in front of the site: x' = before(x)."""
        assert isinstance(self.delta, Before)
        self.entered = args[0]
        x = self.delta.before(self.weights(args[0].shape[0]), self.site, args[0])
        return (x, *args[1:])

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The hook behind the site: y' = after(x, y), on the site's part of a fused map's output."""
        assert isinstance(self.delta, After)
        x = args[0] if self.entered is None else self.entered
        self.entered = None
        y = output if self.site.part is None else self.site.part.take(output)
        new = self._in_own_precision(self.weights(output.shape[0]), x, y)
        return new if self.site.part is None else self.site.part.put(output, new)

    def _in_own_precision(self, w: Weights, x: Tensor, y: Tensor) -> Tensor:
        """`after` in the delta's precision (not below autocast's), returned in the site's."""
        own = next(iter(w.values())).dtype
        delta: After = self.delta  # type: ignore[assignment]
        if y.dtype == own or torch.is_autocast_enabled(y.device.type):
            return delta.after(w, self.site, x, y).to(y.dtype)
        x = x.to(own) if x.is_floating_point() else x
        return delta.after(w, self.site, x, y.to(own)).to(y.dtype)

    def key_value(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The hook at an attention site."""
        assert isinstance(self.delta, KeyValue)
        return self.delta.key_value(self.weights(k.shape[0]), self.site, k, v)


class Adapted(nn.Module):
    """A frozen backbone and the patches of its deltas; an `nn.Module` that owns both.

    Args:
        backbone: it is frozen until `remove`.
        deltas: in the order in which they act at a site.
        slots: adaptations that live side by side.
        seeds: one a slot; what its parameters start from.
    """

    def __init__(self, backbone: Backbone, deltas: Sequence[Delta], slots: int = 1, seeds: Sequence[int] | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = backbone.model
        self.deltas = tuple(deltas)
        self.slots = slots
        self.routing = Routing()
        self.patches = nn.ModuleList()
        self._handles: list[RemovableHandle] = []
        self._attention: str | None = None
        chosen = [(delta, site) for delta in self.deltas for site in sites_of(delta, backbone)]
        self._trainable = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.model.requires_grad_(False)
        modules = dict(self.model.named_modules())
        for number, (delta, site) in enumerate(chosen):
            patch = Patch(delta, site, slots, self.routing, next(self.model.parameters()))
            patch.start([_mixed(seed, number) for seed in (seeds or [0] * slots)])
            self.patches.append(patch)
            self._hook(patch, modules[site.path])

    def _hook(self, patch: Patch, module: nn.Module) -> None:
        """Registers the hooks that the patch's delta needs."""
        if isinstance(patch.delta, Before):
            self._handles.append(module.register_forward_pre_hook(patch.enter))
        if isinstance(patch.delta, After):
            self._handles.append(module.register_forward_hook(patch.leave))
        if isinstance(patch.delta, KeyValue):
            if self._attention is None:
                self._attention = attention.install(self.model, self.model.config._attn_implementation)
            attention.hooks_at(module).append(patch.key_value)

    def forward(self, *args: Any, adaptation: Index = None, **inputs: Any) -> Any:
        """The backbone's own forward; `adaptation` is a slot, or one slot a row [rows]."""
        self.routing.index = adaptation
        return self.model(*args, **inputs)

    def states(self, inputs: Mapping[str, Tensor], adaptation: Index = None) -> Tensor:
        """The last hidden states [b, s, d] without the head."""
        self.routing.index = adaptation
        return self.backbone.states(inputs)

    @contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Within it every row stands for `times` rows that follow one another."""
        index = self.routing.index
        if isinstance(index, Tensor):
            self.routing.index = index.repeat_interleave(times)
        try:
            yield
        finally:
            self.routing.index = index

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stacked tensors by stored name: `<number of the delta>.<site>.<tensor>`."""
        for patch in self.patches:
            assert isinstance(patch, Patch)
            number = next(i for i, d in enumerate(self.deltas) if d is patch.delta)
            for name, tensor in patch.tensors.items():
                yield f"{number}.{patch.site.name}.{name}", tensor

    def parameter_count(self) -> int:
        """Trainable numbers of one adaptation."""
        return sum(spec.size for patch in self.patches for spec in patch.specs.values())  # type: ignore[union-attr]

    def remove(self) -> Backbone:
        """Takes every hook away and gives the backbone back as it was, bitwise."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        modules = dict(self.model.named_modules())
        for patch in self.patches:
            assert isinstance(patch, Patch)
            if isinstance(patch.delta, KeyValue):
                attention.hooks_at(modules[patch.site.path]).remove(patch.key_value)
                attention.forget(modules[patch.site.path])
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
        modules = dict(self.model.named_modules())
        new: dict[str, Tensor] = {}
        for patch in self.patches:
            assert isinstance(patch, Patch)
            new |= _merged(patch, slot, modules[patch.site.path], new)
        owned = dict(self.model.named_parameters())
        for name, tensor in new.items():
            owned[name].copy_(tensor)
        return self.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._attention is not None:
            attention.register(self._attention)


def sites_of(delta: Delta, backbone: Backbone) -> list[Site]:
    """The sites a delta goes to on a backbone; an error where there is none, or where it cannot act."""
    name = type(delta).__name__
    chosen = backbone.sites.select(delta.selectors())
    fitting = [site for site in chosen if site.kind in delta.acts_on]
    if not fitting:
        kinds = sorted({site.kind for site in chosen})
        raise SiteError(f"{name} acts on sites of kind {', '.join(delta.acts_on)}; {list(delta.selectors())} are {', '.join(kinds)}")
    if isinstance(delta, KeyValue):
        modules = dict(backbone.model.named_modules())
        for site in fitting:
            if not attention.supported(modules[site.path]):
                raise SiteError(
                    f"{name} cannot act at {site.name}: {type(modules[site.path]).__name__} computes attention in code of its "
                    "own, which takes no further keys and values. Other deltas work on this backbone"
                )
    return fitting


def _mixed(seed: int, number: int) -> int:
    """A seed for the patch of that number: apart for each (seed, number)."""
    return (seed * 1_000_003 + number * 7_919 + 17) % 2**63


def _merged(patch: Patch, slot: int, module: nn.Module, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module after it takes up a patch, given those that earlier patches made `new`."""
    delta, site = patch.delta, patch.site
    if not isinstance(delta, Mergeable):
        raise SiteError(f"{type(delta).__name__} has no form in weights: it is no linear change of a map. Keep it attached")
    own = {name: new.get(f"{site.path}.{name}", p) for name, p in module.named_parameters(recurse=False)}
    weight, bias = own["weight"], own.get("bias")
    turned = site.kind == "linear" and tuple(weight.shape) != (module_out(module, weight), weight.shape[-1])
    weight = weight.T if turned else weight
    if site.part is not None:
        part_w = site.part.take(weight.T).T
        part_b = None if bias is None else site.part.take(bias)
    else:
        part_w, part_b = weight, bias
    new_w, new_b = delta.merged(patch.slot(slot), site, part_w, part_b)
    if bias is None and new_b is not None:
        raise SiteError(f"{type(delta).__name__} needs a bias at {site.name} to be merged into, and {site.path} has none")
    if site.part is not None:
        new_w = site.part.put(weight.T, new_w.T).T
        new_b = None if bias is None or new_b is None else site.part.put(bias, new_b)
    made = {f"{site.path}.weight": new_w.T if turned else new_w}
    return made if new_b is None else made | {f"{site.path}.bias": new_b}


def module_out(module: nn.Module, weight: Tensor) -> int:
    """The number of outputs of a linear map, whichever way its weight lies."""
    from deltaprompt.backbone.sites import linear_sizes

    sizes = linear_sizes(module)
    return weight.shape[0] if sizes is None else sizes[1]
