"""A digest that tells whether a backbone is the one an adaptation was made for: every number of it counts."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deltaprompt.backbone.layers import DIGEST, is_spread
from deltaprompt.backbone.maps import is_plain


def fingerprint(model: nn.Module) -> str:
    """16 hex digits from the names, types, shapes and contents of all parameters, and of what a quantised map adds.

    A parameter's contents enter as two integer sums over its bit patterns, the second weighted by place, so that the
    digest costs one pass over memory on any device: any one changed number changes it. A model whose layers are spread
    over processes keeps the digest that it had before.
    """
    if is_spread(model):
        return str(vars(model)[DIGEST])
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_sums(tensor.detach())}\n".encode())
    return digest.hexdigest()[:16]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, and the scales that bitsandbytes' maps save beside theirs."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        if not all(is_plain(p) for p in module.parameters(recurse=False)):
            found |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    return found


def _sums(tensor: Any) -> tuple[int, ...]:
    """(Σ c_i, Σ c_i · i) of a tensor, c_i being the sum modulo 2^32 of the words i, i + PERIOD, … of its bits."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return tuple(total for name in names for total in _sums(vars(tensor)[name]))
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = (functional.pad(raw, (0, -len(raw) % WORD)) if len(raw) % WORD else raw).view(torch.int32)
    whole = len(words) // PERIOD * PERIOD
    columns = _added(words[:whole].view(-1, PERIOD)) if whole else words.new_zeros(len(words))
    columns[: len(words) - whole] += words[whole:]
    columns, places = columns.long(), torch.arange(1, len(columns) + 1, device=raw.device)
    return int(columns.sum()), int((columns * places).sum())


def _added(rows: Tensor) -> Tensor:
    """Σ of rows [n, PERIOD] modulo 2^32; on a CPU one by one, in half the time of torch's sum of whole numbers."""
    if rows.device.type != "cpu":
        return rows.sum(0, dtype=torch.int32)
    first, *others = rows.unbind()
    total = first.clone()
    for row in others:
        total += row
    return total


WORD = 4  # bytes
PERIOD = 65521  # words that are weighted differently
