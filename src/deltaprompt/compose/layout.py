"""Which row of a batch each number that passes a module belongs to, told by two short passes that differ in one row.

Most modules see [b, s, d]; XLNet's and Longformer's attention sees [s, b, d], and an expert sees whatever tokens were
sent to it, which belong to no row that could be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.fused import at_rest

Layout = Literal["rows", "turned", "mingled"]  # [b, s, d] or [b · s, d]; [s, b, d]; neither
ROWS, LENGTH, CHANGED = 3, 8, 1  # of the passes; the row that differs
TOLD: WeakKeyDictionary[nn.Module, dict[str, Layout]] = WeakKeyDictionary()
ROUNDING = 1e-3  # of the largest difference: below it, kernels sum in another order


def layouts_of(backbone: Backbone, paths: Iterable[str]) -> dict[str, Layout]:
    """Path of a module -> its layout, where that is not the usual one; nothing of a model that takes no such passes.

    A model is asked once for each path.
    """
    known = TOLD.setdefault(backbone.model, {})
    if missing := set(paths) - known.keys():
        known.update(_told(backbone, missing))
    return {path: layout for path in paths if (layout := known.get(path, "rows")) != "rows"}


def _told(backbone: Backbone, paths: set[str]) -> dict[str, Layout]:
    """The layouts of these modules, as two passes tell them."""
    try:
        with torch.no_grad(), at_rest(backbone.model):
            one, other = (_passed(backbone, paths, changed) for changed in (False, True))
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError):
        return {}
    return {path: _layout(one[path], other[path]) for path in paths & one.keys() & other.keys()}


def _passed(backbone: Backbone, paths: Iterable[str], changed: bool) -> dict[str, list[Tensor]]:
    """What leaves each module in a pass, call by call."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        backbone.model.get_submodule(path).register_forward_hook(partial(_note, seen.setdefault(path, [])))
        for path in paths
    ]
    try:
        backbone.states(_inputs(backbone, changed))
    finally:
        for handle in handles:
            handle.remove()
    return {path: calls for path, calls in seen.items() if calls}


def _note(calls: list[Tensor], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    y = output[0] if isinstance(output, tuple) else output
    if isinstance(y, Tensor):
        calls.append(y.detach())


def _inputs(backbone: Backbone, changed: bool) -> Mapping[str, Tensor]:
    """Three rows of different tokens [3, 8]; the one in the middle in another order where it is `changed`."""
    device = next(backbone.model.parameters()).device
    ids = (5 + torch.arange(ROWS * LENGTH, device=device)) % backbone.vocabulary
    ids = ids.view(ROWS, LENGTH)
    if changed:
        ids[CHANGED] = ids[CHANGED].roll(1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids} if backbone.kind == "seq2seq" else {})


def _layout(one: list[Tensor], other: list[Tensor]) -> Layout:
    """The layout that all calls have: a change of one row is seen in that row alone."""
    if [y.shape for y in one] != [y.shape for y in other]:
        return "mingled"
    shapes = {y.shape[:2] for y in one if y.ndim > 2}  # also where rows depend on one another
    if shapes in ({(ROWS, LENGTH)}, {(LENGTH, ROWS)}):
        return "rows" if (ROWS, LENGTH) in shapes else "turned"
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a.ndim > 1 and len(a) > 1]  # not what all rows share
    changes = [_changed(a, b) for a, b in pairs]
    if all(_in_row(change) for change in changes):
        return "rows"
    return "turned" if all(_in_row(change.mT) for change in changes) else "mingled"


def _changed(a: Tensor, b: Tensor) -> Tensor:
    """Where two outputs differ by more than rounding, [b, s] or [b · s, 1]."""
    size = (a.double() - b.double()).abs()
    size = size.flatten(2).amax(-1) if a.ndim > 2 else size.amax(-1, keepdim=True)
    return size > ROUNDING * size.max()


def _in_row(change: Tensor) -> bool:
    """Whether what changes of [b, s] lies in the row that was changed."""
    if len(change) % ROWS:
        return False
    each = len(change) // ROWS
    apart = change.clone()
    apart[CHANGED * each : (CHANGED + 1) * each] = False
    return not bool(apart.any())
