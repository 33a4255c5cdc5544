"""A digest that tells whether a backbone is the one an adaptation was made for: every number of it counts."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deltaprompt.backbone.layers import DIGEST, is_spread
from deltaprompt.backbone.maps import is_plain

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> str:
    """16 hex digits from the names, types, shapes and contents of all parameters, and of what a quantised map adds.

    A parameter's contents enter as two integer sums over its bit patterns, modulo 2^64, the second weighted by place,
    so that the digest costs one pass over memory on any device: any one changed number changes it. A model whose layers
    are spread over processes keeps the digest that it had before.
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
    """(Σ bits, Σ bits · (position mod 65521 + 1)) as 64-bit integers that wrap around; of all tensors within one."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return tuple(total for name in names for total in _sums(vars(tensor)[name]))
    bits = tensor.contiguous().view(INTEGERS[tensor.element_size()]).reshape(-1)
    total = weighted = 0
    for start in range(0, bits.numel(), CHUNK):
        chunk = bits[start : start + CHUNK].long()
        place = torch.arange(start, start + chunk.numel(), device=bits.device).remainder_(65521).add_(1)
        total += int(chunk.sum())
        weighted += int((chunk * place).sum())
    return total % 2**64, weighted % 2**64


CHUNK = 1 << 22  # numbers at once: 32 MB of 64-bit integers
