"""A prefix where PEFT has it, in transformers' own cache: what deltas that stand for it are checked by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltaprompt.backbone import Backbone, attention
from deltaprompt.compose import Adapted
from deltaprompt.compose.patch import Patch
from deltaprompt.deltas._base import KeyValue
from deltaprompt.deltas._position_shift import PositionShift
from deltaprompt.errors import StoreError
from deltaprompt.model.trainable import evaluating

PROBE = 5  # tokens
CLOSE = 1e-4  # of the largest number, in float32
ROUNDINGS = 32  # of the model's own precision


@dataclass(frozen=True)
class Table:
    """The keys and values [heads, n, size] of a cache, by layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """n, the tokens of the prefix."""
        return self.keys[0].shape[1]


@torch.no_grad()
def reference(backbone: Backbone, table: Table) -> Tensor:
    """The model's scores (an encoder's states) of a probe behind a cache."""
    inputs = _inputs(backbone)
    mask = "decoder_attention_mask" if backbone.kind == "seq2seq" else "attention_mask"
    inputs[mask] = torch.ones(1, table.length + PROBE, dtype=torch.long, device=inputs[mask].device)
    try:
        with evaluating(backbone.model):
            return cast(Tensor, backbone.model(**inputs, past_key_values=_cache(backbone, table))[0])
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as e:
        raise StoreError(
            f"{type(backbone.model).__name__} does not run with a prefix in its cache, which is what PEFT's prefix "
            f"tuning is: {e}"
        ) from e


def check(adapted: Adapted, slot: int, expected: Tensor) -> None:
    """An error unless the deltas do to the probe what the cache does."""
    with torch.no_grad(), evaluating(adapted):
        found = cast(Tensor, adapted(**_inputs(adapted.backbone), adaptation=slot)[0])
    far = float((found - expected).abs().max())
    close = max(CLOSE, ROUNDINGS * torch.finfo(found.dtype).eps) * max(1.0, float(expected.abs().max()))
    if not far <= close:
        raise StoreError(
            f"on {type(adapted.model).__name__} a prefix in a cache gives other answers than a prefix here (by "
            f"{far:.2g} on a probe): its positions are of a kind that DeltaPrompt does not know how to turn into "
            "one another. Open it with peft"
        )


@contextmanager
def bare(adapted: Adapted, slot: int) -> Iterator[None]:
    """Within it the keys and values of an adapted backbone are its own, and the text's positions are not moved."""
    patches = cast(list[Patch], list(adapted.patches))
    prefixes = [(adapted.model.get_submodule(p.site.path), p) for p in patches if isinstance(p.delta, KeyValue)]
    back = [
        adapted.model.get_submodule(p.site.path).register_forward_pre_hook(partial(_moved_back, p.delta.by))
        for p in patches
        if isinstance(p.delta, PositionShift)
    ]
    for module, patch in prefixes:
        attention.take_away(module, patch)
    try:
        with adapted.routing.at(slot):
            yield
    finally:
        for module, patch in prefixes:
            attention.hooks_at(module).append(patch)
        for handle in back:
            handle.remove()


def _moved_back(by: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] - by, *args[1:])


def _inputs(backbone: Backbone) -> dict[str, Any]:
    """The probe for a kind of backbone."""
    ids = torch.arange(3, 3 + PROBE, device=backbone.model.device)[None]
    ids = ids + PROBE * (ids == backbone.tokenizer.pad_token_id)  # padding may have no position of its own
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if backbone.kind == "seq2seq":
        inputs |= {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": torch.ones_like(ids)}
    return inputs


def _cache(backbone: Backbone, table: Table) -> Any:
    """transformers' cache with a prefix in every layer."""
    from transformers import DynamicCache, EncoderDecoderCache

    like: Mapping[str, Any] = {"dtype": backbone.model.dtype, "device": backbone.model.device}
    pairs = zip(table.keys, table.values, strict=True)
    own = DynamicCache([(k[None].to(**like), v[None].to(**like)) for k, v in pairs])
    return EncoderDecoderCache(own, DynamicCache()) if backbone.kind == "seq2seq" else own
