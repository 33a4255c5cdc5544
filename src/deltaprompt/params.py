"""What trains: tensors stacked `[n, …]`, one slot per adaptation. A delta and a verbalizer say theirs as `Param`s."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from deltaprompt.errors import ConfigError

Init = Callable[[Tensor, torch.Generator], None]
Map = tuple[Tensor, Tensor | None]  # weight [out, in] of a linear map (of a norm: [d]) and bias [out]
Noise = Callable[[Tensor, float], Tensor]  # (x, p) -> what x is multiplied with: 0 or 1 / (1 − p)

_noise: list[Noise] = []  # the one that draws now; none: PyTorch's own generator. Global, as that one is


@dataclass(frozen=True, slots=True)
class Param:
    """One tensor of a patch: the shape of one slot, what it starts as, and whether it trains or stays so."""

    shape: tuple[int, ...]
    init: Init
    trains: bool = True

    @property
    def size(self) -> int:
        """Numbers in one slot that train."""
        return torch.Size(self.shape).numel() if self.trains else 0


class Weights(Mapping[str, Tensor]):
    """A patch's tensors as its maths sees them (one slot, or one a row), and whether the model is training.

    Args:
        tensors: by name; or what computes them, called when the first is asked for.
        training: whether the model is training.
        frozen: what reads the site's own weight.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]],
        training: bool,
        frozen: Callable[[], Map] | None = None,
    ) -> None:
        self._tensors = tensors
        self._frozen = frozen
        self.training = training

    def _known(self) -> Mapping[str, Tensor]:
        if not isinstance(self._tensors, Mapping):
            self._tensors = self._tensors()
        return self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._known()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def __or__(self, more: Mapping[str, Tensor]) -> Weights:
        """The same with these tensors in place of its own, such as a start's, through which gradients flow."""
        return Weights({**self._known(), **more}, self.training, self._frozen)

    def dropped(self, x: Tensor, p: float) -> Tensor:
        """x ⊙ m while training, m = 0 with probability p and otherwise 1 / (1 − p) (Srivastava et al. 2014)."""
        if not self.training or p == 0.0:
            return x
        return x * noise(x, p) if _noise else functional.dropout(x, p)

    def frozen(self) -> Map:
        """The site's own frozen weight [out, in] and bias [out] (None where it has none), in the tensors' precision."""
        if self._frozen is None:
            raise ConfigError("only a delta at a linear map or a norm sees a frozen weight; choose such sites")
        return self._frozen()


@contextmanager
def drawn_by(noise: Noise) -> Iterator[None]:
    """Within it dropout is drawn by that function, in every thread: backward passes may run in their own."""
    _noise.append(noise)
    try:
        yield
    finally:
        _noise.pop()


def noise(x: Tensor, p: float) -> Tensor:
    """What x is multiplied with in dropout: 0 with probability p, otherwise 1 / (1 − p)."""
    return _noise[-1](x, p) if _noise else functional.dropout(torch.ones_like(x), p)


def through(x: Tensor, m: Tensor) -> Tensor:
    """x mᵀ [b, s, r] of x [b, s, in] and m [r, in], or [b, r, in] for each row its own, which is one kernel."""
    return torch.bmm(x, m.mT) if m.ndim == 3 else x @ m.mT


def plus(y: Tensor, h: Tensor, m: Tensor, scale: float) -> Tensor:
    """y + s · h m of y [b, s, out], h [b, s, r] and m [r, out], or [b, r, out] for each row its own.

    The latter is one kernel, but within autocast, which would round y too.
    """
    if m.ndim == 3 and not torch.is_autocast_enabled(y.device.type):
        return torch.baddbmm(y, h, m, alpha=scale)
    return y + scale * h @ m


def zeros(t: Tensor, _: torch.Generator) -> None:
    """All zero."""
    t.zero_()


def ones(t: Tensor, _: torch.Generator) -> None:
    """All one."""
    t.fill_(1.0)


def normal(std: float) -> Init:
    """Independent normal numbers of mean 0."""
    return partial(_normal, std)  # a partial, and no inner function, so that it pickles


def _normal(std: float, t: Tensor, g: torch.Generator) -> None:
    t.normal_(0.0, std, generator=g)


def uniform(bound: float) -> Init:
    """Independent uniform numbers in ±bound."""
    return partial(_uniform, bound)


def _uniform(bound: float, t: Tensor, g: torch.Generator) -> None:
    t.uniform_(-bound, bound, generator=g)


def constant(value: float) -> Init:
    """All the same number."""
    return partial(_constant, value)


def _constant(value: float, t: Tensor, _: torch.Generator) -> None:
    t.fill_(value)


def kaiming(t: Tensor, g: torch.Generator) -> None:
    """Uniform in ±1/√in, PyTorch's own start of a linear map (He et al. 2015 with a = √5); t is [..., out, in]."""
    bound = t.shape[-1] ** -0.5
    t.uniform_(-bound, bound, generator=g)
