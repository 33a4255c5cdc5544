"""Tokens that all rows of a batch begin with are run once; every row goes on from their keys and values.

The rows are laid out as [shared tokens, padding, own tokens], so positions stay what they were. Nothing is shared where
it would not be exact: in a model that keeps something else than keys and values, where padding would move something out
of an attention window, where positions are rotated by a text's length, or where a model on two short rows gives other
states than in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from deltaprompt.backbone.fused import at_rest
from deltaprompt.backbone.layers import is_spread
from deltaprompt.backbone.load import Backbone, states_of, takes

SAVED: Final = 128  # tokens of a batch that need not be run, below which a pass of its own for them does not pay
KNOWN: Final = {"input_ids", "attention_mask", "position_ids"}
WINDOWS: Final = ("sliding_window", "window_size", "attention_window", "attention_chunk_size")  # in a config
BY_LENGTH: Final = ("longrope", "dynamic")  # sorts of rotary positions that depend on how long a text is
ROUNDING: Final = 256  # units in the last place of a state's norm that another order of sums may make
COARSE: Final = 0.1  # and never more, in half precision
FRONT, OWN = 3, (4, 2)  # tokens of the rows that a model is tried on

TRIED: Final[WeakKeyDictionary[nn.Module, bool]] = WeakKeyDictionary()  # models that were tried, whether they can

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Begun:
    """A batch of b rows whose first p tokens have been run."""

    shared: Tensor  # the ids of these tokens [1, p]
    inputs: Inputs  # input_ids and position_ids [b, s - p] of what is left, attention_mask [b, s]
    cache: Any  # keys and values of the p tokens, for every row

    @property
    def length(self) -> int:
        """p, the tokens that have been run."""
        return self.shared.shape[1]


def begun(backbone: Backbone, inputs: Inputs, each: int = 1, more: float = 0) -> Begun | None:
    """A causal batch, padded on the left, with its shared tokens run; None where none can be or it does not pay.

    Args:
        backbone: a causal model; no row has deltas of its own.
        inputs: input_ids and attention_mask [b, s].
        each: rows that will stand for each row, in generation.
        more: tokens that will follow.
    """
    length = shared_length(inputs)
    if (len(inputs["input_ids"]) * each - 1) * length < SAVED or not _in_sight(backbone, inputs, more):
        return None
    return _run(backbone, inputs, length, each) if _exact(backbone) else None


def shared_length(inputs: Inputs) -> int:
    """p: how many tokens all rows begin with, each row keeping one of its own at least; 0 where padding is not left."""
    if not inputs.keys() <= KNOWN or "attention_mask" not in inputs:
        return 0
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if mask.shape != ids.shape or mask.cummax(1).values.ne(mask).any():
        return 0
    places, own = (mask.cumsum(1) - 1).clamp(min=0), mask.sum(1)
    if not torch.equal(inputs.get("position_ids", places), places):
        return 0
    columns = ids.shape[1] - own[:, None] + torch.arange(max(int(own.min()) - 1, 0), device=ids.device)
    first = ids.gather(1, columns)  # [b, shortest - 1]
    return int((first == first[0]).all(0).cumprod(0).sum())


def states_after(backbone: Backbone, begun: Begun) -> Tensor:
    """The last hidden states [b, s - p, d] of what is left."""
    return states_of(backbone.outputs(begun.inputs, use_cache=False, past_key_values=begun.cache))


def rotates_by_length(config: Any) -> bool:
    """Whether a config, a plain dictionary with others in it, asks for positions that depend on how long a text is."""
    return any(name == "rope_type" and value in BY_LENGTH for name, value in _entries(config))


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """All names and values in a config, and in those in it."""
    for name, value in config.items() if isinstance(config, Mapping) else ():
        yield name, value
        yield from _entries(value)


def _run(backbone: Backbone, inputs: Inputs, length: int, each: int = 1) -> Begun | None:
    """The shared tokens run by themselves."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    start = ids.shape[1] - int(mask[0].sum())
    front = ids[:1, start : start + length]  # [1, p]
    places = torch.arange(length, device=ids.device)[None]
    first = {"input_ids": front, "attention_mask": torch.ones_like(front), "position_ids": places}
    cache = backbone.outputs(first, use_cache=True).get("past_key_values")
    if not is_whole(cache, length):
        return None
    places = mask.cumsum(1)[:, length:] - 1  # [b, s - p]
    own = (places >= length).to(mask.dtype)
    return Begun(
        front,
        {
            "input_ids": torch.where(places >= length, ids[:, length:], ids[:, : ids.shape[1] - length]),
            "attention_mask": torch.cat([mask.new_ones(len(mask), length), own], dim=1),
            "position_ids": places.clamp(min=0),
        },
        repeated_cache(cache, len(ids) * each),
    )


def _in_sight(backbone: Backbone, inputs: Inputs, more: float) -> bool:
    """Whether padding between the shared tokens and a row's own moves nothing out of an attention window."""
    told = _entries(backbone.config)
    windows = [value for name, value in told if name in WINDOWS and isinstance(value, int) and value > 0]
    mask = inputs["attention_mask"]
    return not windows or bool(mask.all()) or mask.shape[1] + more <= min(windows)


def _exact(backbone: Backbone) -> bool:
    """Whether a model gives the same states either way, seen once on two short rows."""
    if backbone.model not in TRIED:
        possible = takes(backbone.base, "past_key_values") and not is_spread(backbone.model)
        found = possible and not rotates_by_length(backbone.config) and _tried(backbone)
        if found is None:
            return False
        TRIED[backbone.model] = found
    return TRIED[backbone.model]


@torch.no_grad()
def _tried(backbone: Backbone) -> bool | None:
    """Whether two short rows have the same states either way; None where nothing could be seen."""
    total = FRONT + max(OWN)
    device = next(backbone.model.parameters()).device
    ids = torch.arange(2 * total, device=device).reshape(2, total) % backbone.vocabulary
    mask = torch.stack([torch.arange(total, device=device) >= total - FRONT - own for own in OWN]).long()
    ids[1, -FRONT - OWN[1] : -OWN[1]] = ids[0, :FRONT]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    try:
        with at_rest(backbone.model):
            whole = backbone.states(inputs)[:, FRONT:]
            rest = _run(backbone, inputs, FRONT)
            found = None if rest is None else states_after(backbone, rest)
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except Exception:  # whatever a model's code does with a cache that another pass has filled
        return False
    return False if found is None else _same(found, whole, mask.cumsum(1)[:, FRONT:] > FRONT)


def _same(found: Tensor, whole: Tensor, own: Tensor) -> bool | None:
    """Whether states [b, s, d] are alike up to rounding where `own` [b, s] says; None where they are no numbers."""
    return alike(found[own], whole[own], ROUNDING) if whole[own].isfinite().all() else None


def alike(states: Tensor, expected: Tensor, units: int) -> bool:
    """Whether each of the states [..., d] is the expected one, but for so many units in the last place of its norm."""
    if states.shape != expected.shape:
        return False
    coarsest = max(torch.finfo(expected.dtype).eps, torch.finfo(torch.float32).eps)  # of softmax, in every precision
    wide = torch.float64 if states.device.type != "mps" else torch.float32
    gap, size = (states.to(wide) - expected.to(wide)).norm(dim=-1), expected.to(wide).norm(dim=-1)
    return bool((gap <= min(units * coarsest, COARSE) * size).all())


def is_whole(cache: Any, length: int) -> bool:
    """Whether a cache holds `length` tokens, in attention layers only."""
    from transformers import Cache, EncoderDecoderCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(own, Cache) or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in own.layers
    ):
        return False
    return own.get_seq_length() == length


def repeated_cache(cache: Any, times: int) -> Any:
    """A cache with every row `times` times; the given one stays as it is."""
    from transformers import EncoderDecoderCache

    made = copy(cache)
    if isinstance(cache, EncoderDecoderCache):
        made.self_attention_cache = repeated_cache(cache.self_attention_cache, times)
        made.cross_attention_cache = repeated_cache(cache.cross_attention_cache, times)
        return made
    made.layers = [copy(layer) for layer in cache.layers]
    made.batch_repeat_interleave(times)
    return made
