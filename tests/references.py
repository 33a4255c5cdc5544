"""Hand-written modules put into a plain model, to compare a delta with: same outputs, same gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deltaprompt.compose import Adapted
from tests.backbones_zoo import inputs_of

AFTER = {  # where Houlsby's adapters go, by module path: behind the attention's last map and the feed-forward one's
    "bert": ("attention.output.dense", "output.dense"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "t5": ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),
}
AT = {"bert": ("attn.o", "ffn.down"), "llama": ("attn.o", "ffn.down"), "t5": ("attn.o", "cross.o", "ffn.down")}


def behind(model: nn.Module, endings: Iterable[str], made: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """A reference behind every module whose path has one of these ends; it maps what leaves the module."""
    ends = tuple(f".{end}" for end in endings)
    references = {path: made() for path, _ in model.named_modules() if path.endswith(ends)}
    for path, reference in references.items():
        model.get_submodule(path).register_forward_hook(lambda _m, _a, y, r=reference: mapped(r, y))
    return references


def mapped(reference: nn.Module, y: Any) -> Any:
    """y' of a module's output, the first of a tuple."""
    return (reference(y[0]), *y[1:]) if isinstance(y, tuple) else reference(y)


def pairs_of(ours: Adapted, references: Mapping[str, nn.Module]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Each tensor of each site, and the reference's of the same name at the same path."""
    assert [patch.site.path for patch in ours.patches] == list(references)
    return [
        (tensor, references[patch.site.path].get_parameter(name))
        for patch in ours.patches
        for name, tensor in patch.tensors.items()
    ]


def agree(ours: Adapted, theirs: nn.Module, pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """With the same random numbers in both: the same logits and the same gradients, to 1e-9."""
    pairs = list(pairs)
    assert {id(mine) for mine, _ in pairs} == {id(p) for _, p in ours.parts()}
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mine, other in pairs:
            mine[0].copy_(other.copy_(torch.randn(other.shape, generator=g) * 0.3).view_as(mine[0]))
    inputs = inputs_of(ours.backbone)
    logits = [model(**inputs).logits for model in (ours, theirs)]
    assert_close(*logits, rtol=0, atol=1e-9)
    for each in logits:
        each.tanh().square().sum().backward()
    for mine, other in pairs:
        assert mine.grad.abs().max() > 1e-6
        assert_close(mine.grad[0], other.grad.view_as(mine[0]), rtol=0, atol=1e-9)
