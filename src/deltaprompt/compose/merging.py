"""A backbone's weights with deltas taken up: one implementation for every method that has a form in weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from deltaprompt.backbone.layers import is_spread
from deltaprompt.backbone.maps import is_plain, offset_of, put_back, seen
from deltaprompt.compose.patch import Patch
from deltaprompt.deltas._base import Mergeable
from deltaprompt.errors import ConfigError, SiteError

MARKS = "_deltaprompt_merges"


class Mark:
    """Stands for one merge on the model that took it up; copied with it."""


def mark_merge(model: nn.Module) -> Mark:
    """Notes on a model that it has taken up one more."""
    marks: list[Mark] = vars(model).setdefault(MARKS, [])
    marks.append(Mark())
    return marks[-1]


def take_mark_back(model: nn.Module, mark: Mark | None) -> None:
    """Takes the note back; an error where another merge lies on top, which would be lost."""
    marks: list[Mark] = vars(model)[MARKS]
    if marks[-1] is not mark:
        raise ConfigError("other deltas were merged into this backbone later, on top of these; unmerge those first")
    marks.pop()
    if not marks:
        del vars(model)[MARKS]


def merged(patch: Patch, slot: int, model: nn.Module, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module after it takes up a patch, given those that earlier patches made `new`.

    Raises:
        SiteError: the delta has no form in weights, or the module has no tensor that can take it up.
    """
    delta, site, name = patch.delta, patch.site, type(patch.delta).__name__
    if not isinstance(delta, Mergeable):
        raise SiteError(f"{name} has no form in weights: it is no linear change of a map. Keep it attached")
    if delta.gated:
        raise SiteError(f"{name} has no form in weights where it is gated: the gate is another for every token")
    module = model.get_submodule(site.path)
    own = {f"{site.path}.{n}": p for n, p in module.named_parameters(recurse=False)}
    weight, bias = (new.get(f"{site.path}.{n}", own.get(f"{site.path}.{n}")) for n in ("weight", "bias"))
    if weight is None:
        raise SiteError(f"{name} cannot be merged at {site.name}: {site.path} has no weight")
    _check(name, patch, own, model)
    offset = offset_of(module) if site.kind == "norm" else 0.0
    seen_weight, seen_bias = seen(site, module, weight + offset if offset else weight, bias)
    w, b = delta.merged(patch.slot(slot, module), site, seen_weight, seen_bias)
    if bias is None and b is not None:
        raise SiteError(f"{name} needs a bias at {site.name} to be merged into, and {site.path} has none")
    made = {f"{site.path}.weight": put_back(site, module, weight, w - offset if offset else w)}
    if bias is not None and b is not None:
        made[f"{site.path}.bias"] = b if site.part is None else site.part.put(bias, b)
    return made


def _check(name: str, patch: Patch, own: Mapping[str, Tensor], model: nn.Module) -> None:
    """An error where a module's tensors are not its own numbers: quantised, sharded or tied."""
    site = patch.site
    odd = next((t for t in own.values() if not is_plain(t)), None)
    if odd is not None and is_spread(model):
        raise SiteError(
            f"{name} cannot be merged at {site.name}: the backbone is spread over processes, each of which has a share "
            "of the weight. Save the adaptation, and open and merge it in one process"
        )
    if odd is not None:
        raise SiteError(
            f"{name} cannot be merged at {site.name}: {site.path} keeps its weight as {_kept_as(odd)}, which would "
            "round the change away. Keep the delta attached, or merge it into the backbone in floating point"
        )
    if elsewhere := _elsewhere(own, model):
        raise SiteError(f"{name} cannot be merged at {site.name}: its weight is also that of {', '.join(elsewhere)}")


def _kept_as(weight: Tensor) -> str:
    kind = type(weight.data) if type(weight) is nn.Parameter else type(weight)
    return f"{kind.__name__} of {str(weight.dtype).removeprefix('torch.')}"


def _elsewhere(own: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """The names, outside `own`, under which the model has one of these tensors too (tied weights)."""
    ids = {id(p) for p in own.values()}
    return [n for n, p in model.named_parameters(remove_duplicate=False) if n not in own and id(p) in ids]
