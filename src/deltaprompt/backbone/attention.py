"""One attention function for every model: what transformers would call, after the deltas at the site have seen k and v.

transformers (>= 5) calls each attention as `fn(module, q, k, v, mask, **kw)` by the name in the config. `install` gives
a model a name of ours that stands in front of the one it had; `KeyValueHook`s listed at an attention module then map
its (k, v), and the mask is widened by the columns that they put in front.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaprompt.errors import SiteError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PREFIX = "deltaprompt_"
BASES = ("eager", "sdpa")  # what ours can stand in front of
KEY = "_deltaprompt_key_value_hooks"
DISTANCES = "_deltaprompt_distances"  # the module whose table of relative position biases an attention uses (T5)


class KeyValueHook(Protocol):
    """Maps the keys and values of an attention site: [b, heads, s, size] each, possibly longer afterwards."""

    def key_value(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k', v' from k, v."""

    @property
    def rows(self) -> Tensor | None:
        """The numbers of the rows [m] that see the columns that it puts in front; None for all of them."""


def in_front(prefix: Tensor, t: Tensor) -> Tensor:
    """Keys or values [b, heads, s, size] with a prefix [heads, n, size], or one a row [b, …], in front."""
    return torch.cat([prefix.to(t.dtype).expand(len(t), -1, -1, -1), t], dim=-2)


def hooks_at(module: nn.Module) -> list[KeyValueHook]:
    """The key-value hooks of an attention module, in order; kept outside its parameters and submodules."""
    hooks: list[KeyValueHook] = vars(module).setdefault(KEY, [])
    return hooks


def hooks_of(module: nn.Module) -> tuple[KeyValueHook, ...]:
    """The key-value hooks that a module has; unlike `hooks_at` it leaves one without any untouched."""
    return tuple(vars(module).get(KEY, ()))


def take_away(module: nn.Module, hook: KeyValueHook) -> None:
    """Removes one hook of an attention module, and leaves nothing behind after the last."""
    hooks = hooks_at(module)
    hooks.remove(hook)
    if not hooks:
        del vars(module)[KEY]


def supported(module: nn.Module) -> bool:
    """Whether an attention module's own forward calls the shared attention function."""
    forward = inspect.unwrap(type(module).forward)
    return inspect.isfunction(forward) and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def base_of(model: PreTrainedModel, path: str) -> str:
    """The name of what the attention at a path runs, ours aside; an error where ours cannot stand in front of it."""
    base = _name(_configs(model, path)[-1]).removeprefix(PREFIX)
    if base not in BASES:
        raise SiteError(
            f"prefixes need the attention implementation 'sdpa' or 'eager'; this backbone runs {base!r}. "
            "Load it with dp.load(..., attention='sdpa')"
        )
    return base


def install(model: PreTrainedModel, path: str) -> None:
    """Puts our function in front of what the attention at a path runs, where it is not there yet."""
    base = base_of(model, path)
    changed = [config for config in _configs(model, path) if _name(config) == base]
    for config in changed:
        config._attn_implementation_internal = PREFIX + base
    if changed:
        register(base)
        _share_distances(model)


def release(model: PreTrainedModel) -> None:
    """Gives the model back the attention it had, once no module has a hook."""
    if any(hooks_of(module) for module in model.modules()):
        return
    for config in _changed(model):
        config._attn_implementation_internal = _name(config).removeprefix(PREFIX)
    for module in model.modules():
        vars(module).pop(DISTANCES, None)


def _configs(model: PreTrainedModel, path: str) -> list[PreTrainedConfig]:
    """The configs of the module at a path and of those that it lies in, outermost first: masks are made by these."""
    pieces = path.split(".")
    around = (model.get_submodule(".".join(pieces[:n])) for n in range(len(pieces) + 1))
    return [config for module in around if (config := vars(module).get("config")) is not None]


def _changed(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs in a model that name our function."""
    found = (vars(module).get("config") for module in model.modules())
    return [config for config in found if config is not None and _name(config).startswith(PREFIX)]


def _name(config: PreTrainedConfig) -> str:
    return str(vars(config).get("_attn_implementation_internal"))


def _share_distances(model: nn.Module) -> None:
    """Tells every attention where its relative position biases come from: mostly the first layer's has the table."""
    holders: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        place = re.sub(r"\d+", "*", path)
        if "relative_attention_bias" in module._modules:
            holders[place] = module
        if place in holders:
            vars(module)[DISTANCES] = holders[place]


def known() -> None:
    """Makes our function known to transformers where a model that runs it came from another process."""
    for base in BASES:
        register(base)


def register(base: str) -> None:
    """Makes the name `deltaprompt_<base>` known to transformers, with the masks of `base`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(PREFIX + base, partial(attend, base))
    AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def attend(
    base: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kw: Any
) -> Any:
    """The attention that `base` names, on the keys and values that the site's hooks return."""
    mask, columns = attention_mask, k.shape[-2]
    added: list[tuple[int, Tensor | None]] = []  # columns that each hook put in front, and the rows that see them
    for hook in hooks_of(module):
        before = k.shape[-2]
        k, v = hook.key_value(k, v)
        added.append((k.shape[-2] - before, hook.rows))
    if k.shape[-2] > columns:
        mask = _widened(_written_out(base, mask, module, q, columns, kw), added, len(q))
        if mask is None and any(rows is not None for _, rows in added):
            mask = _widened(_open(base, q, columns), added, len(q))
        if kw.get("position_bias") is not None:
            kw["position_bias"] = _biased(module, kw["position_bias"], attention_mask, added)
    return _function(base, module)(module, q, k, v, mask, **kw)


def _function(base: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function that the modelling code would have run without us."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if base == "eager":
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS[base]


def _written_out(
    base: str, mask: Tensor | None, module: nn.Module, q: Tensor, columns: int, kw: dict[str, Any]
) -> Tensor | None:
    """The mask, also where a causal one [rows, columns] was left to the kernel to make up."""
    asked = kw.get("is_causal")
    causal = vars(module).get("is_causal", True) if asked is None else asked
    kw["is_causal"] = False
    rows = q.shape[-2]
    if mask is not None or base == "eager" or not causal or rows == 1:
        return mask
    return torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril()[None, None]


def _open(base: str, q: Tensor, columns: int) -> Tensor:
    """A mask [1, 1, rows, columns] that hides nothing, in the form that `base` reads."""
    shape = (1, 1, q.shape[-2], columns)
    return q.new_zeros(shape) if base == "eager" else q.new_ones(shape, dtype=torch.bool)


def _biased(module: nn.Module, bias: Tensor, mask: Tensor | None, added: Sequence[tuple[int, Tensor | None]]) -> Tensor:
    """The position biases [1, heads, rows, columns] with the added columns in front, at the distances that these have.

    To a row the columns that it does not see are not there: those of others that it sees stand next to its own.
    """
    holder = vars(module).get(DISTANCES)
    if holder is None:
        return functional.pad(bias, (sum(n for n, _ in added), 0))
    rows, columns = bias.shape[-2:]
    in_front = _in_front(mask, rows, columns)
    for number, (n, seen) in enumerate(added):
        behind = sum(other for other, by in added[:number] if by is seen)
        far = holder.compute_bias(rows, behind + n + columns, bias.device, past_seen_tokens=behind + n + in_front)
        bias = torch.cat([far[..., :n].to(bias.dtype), bias], dim=-1)
    return bias


def _in_front(mask: Tensor | None, rows: int, columns: int) -> int | Tensor:
    """How many columns stand in front of the first row's own; behind it a cache of fixed size has closed ones."""
    if rows == columns or (mask is None and rows > 1):
        return 0
    if mask is None:
        return columns - rows
    seen = mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2
    own = seen[..., 0, :].flatten(0, -2).any(0)  # [columns]
    return (own * torch.arange(columns, device=own.device)).amax()


def _widened(mask: Tensor | None, added: Sequence[tuple[int, Tensor | None]], batch: int) -> Tensor | None:
    """The mask with the added columns in front, open to the rows of the batch that see them."""
    if mask is None:
        return None
    for n, seen in added:
        if seen is None:
            mask = functional.pad(mask, (n, 0), value=float(mask.dtype is torch.bool))
            continue
        shape = (batch, *mask.shape[1:-1])
        shut = torch.finfo(mask.dtype).min if mask.is_floating_point() else False
        front = mask.new_full((*shape, n), shut).index_fill(0, seen, mask.dtype is torch.bool)
        mask = torch.cat([front, mask.expand(*shape, -1)], dim=-1)
    return mask
