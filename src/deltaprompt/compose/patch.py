"""One delta at one site: its tensors there, and the hooks that call its maths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaprompt.backbone import attention
from deltaprompt.backbone.maps import map_of
from deltaprompt.backbone.sites import Site
from deltaprompt.compose.layout import Layout
from deltaprompt.compose.placing import GATE, GATE_BIAS, gate_params
from deltaprompt.compose.routing import Gathered, Routing
from deltaprompt.compose.stack import Common, Stack
from deltaprompt.deltas._base import After, Before, Computed, Delta, KeyValue, Started
from deltaprompt.errors import SiteError
from deltaprompt.params import Map, Weights

IDS = "input_ids"  # what transformers calls them
NOTHING: Gathered = (None, 0, Weights({}, False))  # is gathered yet: no batch has 0 rows


class Patch(Stack):
    """One delta at one site.

    The deltas of a site lie around one another, the first innermost: each sees what enters and leaves those within.
    """

    def __init__(
        self, number: int, delta: Delta, site: Site, slots: int, routing: Routing, like: Tensor, common: Common
    ) -> None:
        params = {**delta.params(site), **gate_params(delta, site)}
        super().__init__(params, slots, routing, like)
        self.number = number  # of the delta
        self.delta = delta
        self.computes = isinstance(delta, Computed)
        self.site = site
        self._common = (common,)  # in a tuple: it is a module of the `Adapted`, once, and not of every patch
        self.entered: Tensor | None = None  # what entered the site, between the two hooks of one call
        self.layout: Layout = "rows"

    # Its tensors

    def weights(self, rows: int, module: nn.Module | None = None) -> Weights:
        """What the maths sees: one slot's tensors, or one slot for each of `rows` rows."""
        routing = self.routing
        if routing.gathered is None or self.computes or self.training or torch.is_grad_enabled():
            return self._seen(self.routed(rows), module, self.training)
        index, of, kept = routing.gathered.get(self, NOTHING)
        if index is not routing.index or of != rows:
            kept = self._seen(self.routed(rows), module, False)
            routing.gathered[self] = routing.index, rows, kept
        return kept

    def slot(self, index: int, module: nn.Module | None = None) -> Weights:
        """What the maths sees of one slot, not training."""
        return self._seen(index, module, False)

    def _seen(self, slot: int | Tensor, module: nn.Module | None, training: bool) -> Weights:
        return Weights(self._picked(slot, training, module), training, self._frozen(module))

    def _frozen(self, module: nn.Module | None) -> Callable[[], Map] | None:
        return None if module is None else _Frozen(self, module)

    def _picked(
        self, slot: int | Tensor, training: bool, module: nn.Module | None
    ) -> Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]:
        """The tensors of one slot, or of one a row; of a delta that computes them, what does so when they are asked."""
        common = self._common[0]
        own = {**self.own, **common.own}
        fixed = common.constants() if common.names else {}
        if self.computes:
            return partial(self._computed, slot, own, fixed, training, self._frozen(module))
        return {**{n: _at(t, slot) for n, t in own.items()}, **fixed}

    def _computed(
        self,
        slot: int | Tensor,
        own: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        training: bool,
        frozen: Callable[[], Map] | None,
    ) -> Mapping[str, Tensor]:
        """What a delta computes, of one slot or of all; in its own precision, as it is saved, also under autocast."""
        if not isinstance(slot, Tensor):
            own = {n: t[slot] for n, t in own.items()}
        with torch.autocast(next(iter(own.values())).device.type, enabled=False):
            made = cast(Computed, self.delta).computed(Weights({**own, **fixed}, training, frozen), self.site)
        gate = {n: own[n] for n in (GATE, GATE_BIAS) if n in own}
        picked = {n: _at(t, slot) if isinstance(slot, Tensor) else t for n, t in {**made, **gate}.items()}
        return {**fixed, **picked}

    @torch.no_grad()
    def begin(self, module: nn.Module) -> None:
        """Gives a delta that starts from the frozen weight its start, in every slot."""
        if not isinstance(self.delta, Started):
            return
        for index in range(len(next(iter(self.tensors.values())))):
            own = {**self.own, **self._common[0].own}
            w = Weights(
                {n: t[index] for n, t in own.items()} | self._common[0].constants(), False, self._frozen(module)
            )
            for name, tensor in self.delta.start(w, self.site).items():
                self.tensors[name][index].copy_(tensor)

    # Its hooks

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook in front of the site: x' = before(x)."""
        if self.routing.resting:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        self.entered = x if isinstance(self.delta, After) else None
        if not isinstance(self.delta, Before):
            return None
        new = self._mapped(self._before, module, x)
        return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): new})

    def known(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook in front of others that read the ids: they are told of virtual ones what the site's own table is."""
        if self.routing.resting:
            return None
        if IDS in kwargs and kwargs[IDS] is not None:
            return args, {**kwargs, IDS: self._mapped(self._before, module, kwargs[IDS])}
        is_table = isinstance(module, nn.Embedding) and args
        return ((self._mapped(self._before, module, args[0]), *args[1:]), kwargs) if is_table else None

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The hook behind the site: y' = after(x, y), on the site's part of a fused map's output."""
        if self.routing.resting:
            return output
        x = args[0]
        if self.entered is not None:
            x, self.entered = self.entered, None
        y = output[0] if isinstance(output, tuple | list) else output  # a layer may return more than its states
        part = self.site.part
        if part is None:
            y = self._mapped(self._after, module, x, y)
        else:
            y = part.put(y, self._mapped(self._after, module, x, part.take(y)))
        return y if isinstance(output, Tensor) else _led_by(y, output)

    def key_value(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The hook at an attention site: k', v' from k, v [b, heads, s, size]."""
        rows = self.routing.rows
        if self.routing.resting:
            return k, v
        if rows is None:
            return self._key_value(k, v)
        new = self._key_value(k.index_select(0, rows), v.index_select(0, rows))
        added = new[0].shape[-2] - k.shape[-2]  # columns that other rows have too, and do not see
        wide = (functional.pad(t, (0, 0, added, 0)) for t in (k, v))
        return tuple(t.index_copy(0, rows, n) for t, n in zip(wide, new, strict=True))  # type: ignore[return-value]

    @property
    def rows(self) -> Tensor | None:
        """The rows of the batch that see the columns that this puts in front of keys and values; None for all."""
        return self.routing.rows

    def _key_value(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        w, columns = self.weights(k.shape[0]), k.shape[-2]
        k, v = cast(KeyValue, self.delta).key_value(w, self.site, k, v)
        if not self.delta.gated:
            return k, v
        gate = torch.sigmoid(w[GATE_BIAS])[..., None].to(k.dtype)  # [1, 1, 1] or [b, 1, 1, 1]
        added = k.shape[-2] - columns
        return tuple(torch.cat([gate * t[..., :added, :], t[..., added:, :]], dim=-2) for t in (k, v))  # type: ignore

    # Its maths

    def _before(self, w: Weights, site: Site, x: Tensor) -> Tensor:
        new = cast(Before, self.delta).before(w, site, x)
        return _weighed(x, new, _gate(w, x)) if self.delta.gated else new

    def _after(self, w: Weights, site: Site, x: Tensor, y: Tensor) -> Tensor:
        new = cast(After, self.delta).after(w, site, x, y)
        return _weighed(y, new, _gate(w, x)) if self.delta.gated else new

    def _mapped(self, maths: Callable[..., Tensor], module: nn.Module, *seen: Tensor) -> Tensor:
        """The maths on [b, s, size], in the delta's precision (in autocast's within it), returned as the last seen."""
        last, routing = seen[-1], self.routing
        turned = self.layout == "turned" and isinstance(routing.index, Tensor)
        seen = tuple(t.transpose(0, 1) for t in seen) if turned else seen
        rows = self._rows(seen[0])
        own = None if torch.is_autocast_enabled(last.device.type) else self.precision()
        if routing.rows is None:
            weights = self.weights(rows, module)
            new = maths(weights, self.site, *[_ready(t, rows, own) for t in seen])
        else:
            weights = self.weights(len(routing.rows), module)
            whole = _ready(seen[-1], rows, None)
            mine = (_ready(_ready(t, rows, None).index_select(0, routing.rows), len(routing.rows), own) for t in seen)
            new = whole.index_copy(0, routing.rows, maths(weights, self.site, *mine).to(last.dtype))
        new = new if new.dtype is last.dtype else new.to(last.dtype)
        if new.shape != seen[-1].shape:
            new = new.reshape(seen[-1].shape)
        return new.transpose(0, 1) if turned else new

    def precision(self) -> torch.dtype | None:
        """What its tensors are kept in; None where it has none."""
        for stack in (self, self._common[0]):
            for tensor in stack.own.values():
                return tensor.dtype
        return None

    def _rows(self, t: Tensor) -> int:
        """The number of rows b of a tensor that passes the site."""
        index = self.routing.index
        flat = t.ndim <= (2 if t.is_floating_point() else 1)  # of numbers [b * s, size], of ids [b * s]
        if not isinstance(index, Tensor):
            return 1 if flat else t.shape[0]
        if self.layout == "mingled":
            raise SiteError(
                f"{self.site.name} sees tokens of all rows in an order of their own, as an expert does, so rows cannot "
                "have an adaptation each there. Name one for all, or choose other sites, such as the block around it"
            )
        rows = index.shape[0] if self.routing.rows is None else self.routing.of
        if t.shape[0] == 1 < rows:
            raise SiteError(
                f"{self.site.name} also maps what all rows of a batch share (DeBERTa's relative positions), so they "
                "cannot have an adaptation each there. Name one for all, or choose other sites: attn.v, attn.o, ffn.*"
            )
        return rows if flat and t.shape[0] % rows == 0 else t.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        """As of any stack, without what an interrupted pass leaves behind, which cannot be copied."""
        return {**super().__getstate__(), "entered": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.delta, KeyValue):
            attention.known()


class _Frozen:
    """Reads the frozen weight and bias of a site's map when a delta asks for them, in the precision of its tensors."""

    def __init__(self, patch: Patch, module: nn.Module) -> None:
        self.patch, self.module = patch, module

    def __call__(self) -> Map:
        weight, bias = map_of(self.patch.site, self.module)
        dtype = self.patch.precision() or weight.dtype
        return weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)


def _at(t: Tensor, slot: int | Tensor) -> Tensor:
    """One slot of [n, …], or one a row [rows, …]."""
    return t.index_select(0, slot) if isinstance(slot, Tensor) else t[slot]


def _ready(t: Tensor, rows: int, own: torch.dtype | None) -> Tensor:
    """Token ids [b, s] as they are; numbers as [b, s, size] (OPT: [b * s, size]; Qwen 3: [b, s, heads, size])."""
    if not t.is_floating_point():
        return t
    t = t if t.ndim == 3 and t.shape[0] == rows else t.reshape(rows, -1, t.shape[-1])
    return t if own is None or own is t.dtype else t.to(own)


def _led_by(first: Tensor, output: Any) -> Any:
    """What a module returns, a tuple, a named one or a list, with another first part."""
    parts = (first, *output[1:])
    return type(output)(parts) if type(output) in (tuple, list) else type(output)(*parts)


def _weighed(y: Tensor, new: Tensor, gate: Tensor) -> Tensor:
    """y + σ (y' − y), which keeps one tensor for the backward pass where torch.lerp keeps two."""
    return y + gate * (new - y)


def _gate(w: Weights, x: Tensor) -> Tensor:
    """σ(w x + b) of every token, [b, s, 1]."""
    return torch.sigmoid(x @ w[GATE].mT + w[GATE_BIAS])
