"""One attention function for every model: what transformers would call, after the deltas at the site have seen k and v.

transformers (>= 5) calls each attention as `fn(module, q, k, v, mask, **kw)` by the name in the config. `install` gives a
model a name of ours that stands in front of the one it had; `KeyValueHook`s listed at an attention module then map its
(k, v), and the mask is widened by the columns that they put in front.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaprompt.errors import SiteError

PREFIX = "deltaprompt_"
KEY = "_deltaprompt_key_value_hooks"


class KeyValueHook(Protocol):
    """Maps the keys and values of an attention site: [b, heads, s, size] each, possibly longer afterwards."""

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


def hooks_at(module: nn.Module) -> list[KeyValueHook]:
    """The key-value hooks of an attention module, in order; kept outside its parameters and submodules."""
    hooks: list[KeyValueHook] = vars(module).setdefault(KEY, [])
    return hooks


def forget(module: nn.Module) -> None:
    """Leaves nothing behind at a module whose hooks are all gone."""
    if not vars(module).get(KEY, True):
        del vars(module)[KEY]


def supported(module: nn.Module) -> bool:
    """Whether the modelling code of an attention module calls the shared attention function."""
    return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(module).__module__])


def install(model: nn.Module, current: str) -> str:
    """Puts our function in front of the model's `current` attention; returns the name to give back to `uninstall`."""
    register(current)
    model.set_attn_implementation(PREFIX + current)  # type: ignore[operator]
    return current


def uninstall(model: nn.Module, original: str) -> None:
    """Gives the model back the attention it had."""
    model.set_attn_implementation(original)  # type: ignore[operator]


def register(base: str) -> None:
    """Makes the name `deltaprompt_<base>` known to transformers, with the masks of `base`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if base not in ("eager", "sdpa"):
        raise SiteError(
            f"prefixes need the attention implementation 'sdpa' or 'eager'; this backbone runs {base!r}. "
            "Load it with dp.load(..., attention='sdpa')"
        )
    AttentionInterface.register(PREFIX + base, partial(attend, base))
    AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def attend(base: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kw: Any) -> Any:
    """The attention that `base` names, on the keys and values that the site's hooks return."""
    columns = k.shape[-2]
    for hook in vars(module).get(KEY, ()):
        k, v = hook(k, v)
    added = k.shape[-2] - columns
    if added:
        mask = _widened(mask, module, q, columns, added, kw)
        if kw.get("position_bias") is not None:
            kw["position_bias"] = functional.pad(kw["position_bias"], (added, 0))
    return _function(base, module)(module, q, k, v, mask, **kw)


def _function(base: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function that the modelling code would have run without us."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if base == "eager":
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"]  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS[base]  # type: ignore[no-any-return]


def _widened(mask: Tensor | None, module: nn.Module, q: Tensor, columns: int, added: int, kw: dict[str, Any]) -> Tensor | None:
    """The mask with `added` open columns in front; a causal mask that was left to the kernel is written out."""
    if mask is not None:
        return functional.pad(mask, (added, 0), value=True if mask.dtype is torch.bool else 0.0)
    asked = kw.get("is_causal")
    causal = vars(module).get("is_causal", True) if asked is None else asked
    kw["is_causal"] = False
    rows = q.shape[-2]
    if not causal or rows == 1:
        return None
    seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
    return functional.pad(seen, (added, 0), value=True)[None, None]
