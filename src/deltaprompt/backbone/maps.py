"""The frozen weight of a site's map as a matrix [out, in], however the module keeps it, and back again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaprompt.backbone.sites import Site, is_turned
from deltaprompt.errors import BackboneError

PLAIN = (Tensor, nn.Parameter)  # what is neither quantised nor sharded
PACKING = "support_avx512bf16_for_cpu"  # bitsandbytes' name


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are its own: floating point, neither quantised nor sharded."""
    return type(tensor) in PLAIN and type(tensor.data) is Tensor and tensor.is_floating_point()


def map_of(site: Site, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a site's map (of a norm [d], [d]), a fused map's part by itself."""
    own = dict(module.named_parameters(recurse=False))
    bias = own.get("bias")
    return seen(site, module, dense(own["weight"], module), None if bias is None else dense(bias, module))


def dense(weight: Tensor, module: Any) -> Tensor:
    """A module's weight as an ordinary tensor; a quantised one with its numbers written out, a spread one whole."""
    if is_plain(weight):
        return weight
    if "quant_state" in vars(weight):  # bitsandbytes, 4 bits
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, vars(weight)["quant_state"])
    if "SCB" in vars(weight):  # bitsandbytes, 8 bits: of 127 steps a row, by a scale that is the module's once it runs
        scale = vars(weight)["SCB"]
        return weight.data * (module.state.SCB if scale is None else scale)[:, None] / 127
    from torch.distributed.tensor import DTensor

    return (
        weight.full_tensor() if isinstance(weight, DTensor) else weight.dequantize()
    )  # processes must all ask at once


def keep_unpacked(model: nn.Module) -> None:
    """Keeps bitsandbytes' 4-bit maps in the form that has gradients.

    On some CPUs a map that is not training packs its weight, the first time it runs, into a form for inference only,
    through which no gradient passes, without an error.
    """
    for path, module in model.named_modules():
        if PACKING not in vars(module):
            continue
        vars(module)[PACKING] = False
        if vars(vars(module.weight)["quant_state"]).get("packing_format_for_cpu"):
            raise BackboneError(
                f"{path} has been packed by bitsandbytes for inference on this CPU, so nothing could learn behind it. "
                "Load the backbone again, and attach deltas before it runs for the first time"
            )


def seen(site: Site, module: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A module's weight as [out, in], and its bias, both of the site's part alone."""
    weight = weight.mT if is_turned(module) else weight
    if site.part is None:
        return weight, bias
    return site.part.take(weight.mT).mT, None if bias is None else site.part.take(bias)


def put_back(site: Site, module: nn.Module, weight: Tensor, new: Tensor) -> Tensor:
    """The module's weight, as it keeps it, with the site's part new [out, in]."""
    if site.part is not None:
        turned = weight if is_turned(module) else weight.mT  # [in, out]
        new = site.part.put(turned, new.mT).mT
    return new.mT if is_turned(module) else new


@torch.no_grad()
def offset_of(norm: nn.Module) -> float:
    """c of a norm that multiplies by c + its weight: 1 in Gemma, 0 in most; told by what it does to a vector."""
    weight, bias = norm.get_parameter("weight"), dict(norm.named_parameters(recurse=False)).get("bias")
    probe = torch.linspace(-1.0, 2.0, weight.numel(), dtype=weight.dtype, device=weight.device)[None, None]
    own = weight.clone()
    try:
        zero, one = (norm.forward(probe + 0 * weight.fill_(value)) for value in (0.0, 1.0))  # past the hooks
    finally:
        weight.copy_(own)
    zero, one = (zero, one) if bias is None else (zero - bias, one - bias)
    return float(round(float(zero.norm() / (one - zero).norm())))
