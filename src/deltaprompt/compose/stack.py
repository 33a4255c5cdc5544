"""Trainable tensors stacked `[n, …]`, one slot per adaptation, read through the routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltaprompt.compose.routing import Routing
from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights


class Stack(nn.Module):
    """Trainable tensors stacked `[n, …]`, one slot per adaptation, read through the routing."""

    def __init__(self, params: Mapping[str, Param], slots: int, routing: Routing, like: Tensor) -> None:
        super().__init__()
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.routing = routing
        self.specs = dict(params)
        empty = {name: torch.empty(slots, *p.shape, dtype=dtype, device=like.device) for name, p in params.items()}
        self.tensors = nn.ParameterDict({n: nn.Parameter(t, params[n].trains) for n, t in empty.items()})
        self._roomy: dict[str, Tensor] = {}  # the storages with room to grow in that were made here, and their room

    @property
    def own(self) -> Mapping[str, Tensor]:
        """The tensors by name, as a plain mapping: reading a `ParameterDict` takes longer than a small map's maths."""
        return cast(Mapping[str, Tensor], self.tensors._parameters)

    @torch.no_grad()
    def start(self, seeds: Sequence[int]) -> None:
        """Every slot as a new adaptation of its seed; the numbers do not depend on the device or on the other slots."""
        for slot, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for name, spec in self.specs.items():
                fresh = torch.empty(spec.shape, dtype=torch.float32)
                spec.init(fresh, generator)
                self.tensors[name][slot].copy_(fresh)

    @torch.no_grad()
    def grow(self, slots: int) -> None:
        """As many more slots, all zero; parameters stay the same objects, but optimizers know them as they were."""
        for name, t in self.tensors.items():
            t.data, t.grad = self._longer(name, t.data, slots), None

    def _longer(self, name: str, t: Tensor, slots: int) -> Tensor:
        """A tensor [n, …] with as many more slots, zero: in a storage with room for them it stays there, not copied.

        A new storage has room for twice as many slots, so that one more costs the same on average however many there
        are. On a CPU that room takes no memory before it is written to; elsewhere it does, and is an eighth.
        """
        n, room = len(t) + slots, self._roomy.get(name)
        if room is None or room.data_ptr() != t.data_ptr() or n > len(room):
            room = t.new_empty(n + (n if t.device.type == "cpu" else n // 8), *t.shape[1:])
            room[: len(t)] = t
            self._roomy[name] = room
        room[len(t) : n].zero_()
        return room[:n]

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or pickled has no spare room."""
        for name, t in self.tensors.items():
            if name in self._roomy:
                t.data = t.data.clone()
        self._roomy.clear()
        return dict(vars(self))

    def routed(self, rows: int) -> int | Tensor:
        """The slot of all rows, or the slot of each of `rows` rows."""
        index, each = self.routing.index, self.routing.each
        if not isinstance(index, Tensor):
            return 0 if index is None else index
        if index.shape[0] == rows:
            return index
        if index.shape[0] * each == rows:
            return index.repeat_interleave(each)
        raise ConfigError(
            f"{index.shape[0]} adaptations were named for {rows} rows; name one a row, or one for all. Where generate "
            "searches or draws n sequences for each row, say so: with adapted.generating(adaptations, n)"
        )

    def weights(self, rows: int) -> Weights:
        """One slot's tensors, or one slot for each of `rows` rows."""
        slot = self.routed(rows)
        return Weights({name: t[slot] for name, t in self.own.items()}, self.training)

    def slot(self, index: int) -> Weights:
        """The tensors of one slot, not training."""
        return Weights({name: t[index] for name, t in self.own.items()}, False)


class Common(Stack):
    """What all sites of one delta share: trainable tensors, and numbers that do not train."""

    def __init__(
        self, params: Mapping[str, Param], fixed: Mapping[str, Tensor], slots: int, routing: Routing, like: Tensor
    ) -> None:
        super().__init__(params, slots, routing, like)
        self.names = tuple(fixed)
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        for number, tensor in enumerate(fixed.values()):  # by number: a buffer's name holds no dot, a site's does
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            self.register_buffer(str(number), tensor.to(like.device), persistent=False)

    def constants(self) -> dict[str, Tensor]:
        """The numbers that do not train, by name."""
        return {name: self.get_buffer(str(number)) for number, name in enumerate(self.names)}
