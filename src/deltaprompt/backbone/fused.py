"""Which columns of a fused map are q, k and v, by what they do: told by two short passes through its own layer.

A token alone attends to itself, so only its v changes what attention gives: neither q nor k does. The second of two
tokens also reads the first one's k, and never its q. So the columns whose gradients vanish tell the three apart,
whatever order a model keeps them in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaprompt.backbone.sites import Part, linear_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL = 1e-4  # of the largest gradient: what a kernel's rounding leaves where the gradient is zero


FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError)


class _Reached(Exception):
    """The pass has come to the end of the attention that is looked at."""


def parts_by_running(model: PreTrainedModel, base: nn.Module, named: Mapping[str, str]) -> dict[str, dict[str, Part]]:
    """Path of a fused map -> its parts, where they can be told; equal maps are looked at once."""
    modules, made = dict(base.named_modules()), {}
    seen: dict[tuple[Any, ...], dict[str, Part] | None] = {}
    by_name = {name: path for path, name in named.items()}
    for path, name in named.items():
        out = by_name.get(name.removesuffix("qkv") + "o")
        if not name.endswith(("attn.qkv", "cross.qkv")) or out is None:
            continue
        alike = (type(modules[path.rpartition(".")[0]]), linear_sizes(modules[path]))
        if alike not in seen:
            seen[alike] = _parts_of(model, base, modules[path], modules[out])
        if (parts := seen[alike]) is not None:
            made[path] = parts
    return made


def _parts_of(model: PreTrainedModel, base: nn.Module, fused: nn.Module, out: nn.Module) -> dict[str, Part] | None:
    try:
        with at_rest(model):
            alone, first = (_gradient(base, fused, out, tokens) for tokens in (1, 2))
        own = alone > SMALL * alone.max()  # v, and gates
        read = first > 0  # k and v
        gates = bool((own & ~read).any())
    except FAILURES:
        return None
    return None if gates else _as_parts({"q": ~read, "k": read & ~own, "v": own})


def _gradient(base: nn.Module, fused: nn.Module, out: nn.Module, tokens: int) -> Tensor:
    """|∂ what enters `out` at the last token / ∂ what leaves `fused` at the first|, for each column [n]."""
    left: list[Tensor] = []
    entered: list[Tensor] = []

    def leave(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        left.append(y.detach().requires_grad_())
        return left[-1]

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        entered.append(args[0])
        raise _Reached

    handles = [fused.register_forward_hook(leave), out.register_forward_pre_hook(enter)]
    ids = torch.arange(1, tokens + 1, device=next(base.parameters()).device)[None]
    try:
        with torch.enable_grad():
            base(input_ids=ids, attention_mask=torch.ones_like(ids))
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    last = entered[0].reshape(tokens, -1)[-1]
    weights = torch.linspace(0.5, 1.5, last.numel(), device=last.device, dtype=last.dtype)
    (gradient,) = torch.autograd.grad((last * weights).sum(), left[0])
    return gradient.reshape(tokens, -1)[0].abs()


def _as_parts(masks: Mapping[str, Tensor]) -> dict[str, Part] | None:
    """Columns as parts: the same run in every one of the fewest equal groups."""
    size = next(iter(masks.values())).numel()
    for groups in (n for n in range(1, size // 3 + 1) if size % n == 0):
        parts = {name: _run(mask.reshape(groups, -1)) for name, mask in masks.items()}
        if all(parts.values()):
            return {name: part for name, part in parts.items() if part is not None}
    return None


def _run(rows: Tensor) -> Part | None:
    """The one run of true columns that all rows [groups, n] have."""
    places = rows[0].nonzero()[:, 0]
    count = len(places)
    if not count or not bool((rows == rows[0]).all()) or int(places[-1] - places[0]) != count - 1:
        return None
    return Part(len(rows), int(places[0]), count)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within it a model draws no random numbers of its own: nothing is in training, and the generators are kept."""
    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng():
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True
