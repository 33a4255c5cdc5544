"""What a method's reader gives and what its writer gets: deltas with the tensors of one adaptation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltaprompt.backbone import Backbone, Site
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import StoreError
from deltaprompt.interchange.folder import TENSORS, Folder

PREFIX = "base_model.model."  # in front of a module's path in the names of PEFT's tensors


@dataclass(frozen=True)
class Opened:
    """Deltas, and the tensors of one adaptation by their stored name, `<number of the delta>.<site>.<tensor>`."""

    deltas: tuple[Delta, ...]
    tensors: Mapping[str, Tensor]
    expected: Tensor | None = None  # of a prefix: what the model says of a probe with it in its cache


@dataclass(frozen=True)
class Piece:
    """One delta at one site with its tensors, of one adaptation."""

    delta: Delta
    site: Site
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Written:
    """The fields of a config that a method has, and the tensors under PEFT's names."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def maps_at(path: str, backbone: Backbone, where: object) -> list[Site]:
    """The sites at a linear map that an adapter names: one, or one for each part of a fused map."""
    if found := [site for site in backbone.sites.values() if site.path == path and site.kind == "linear"]:
        return found
    module = backbone.model.get_submodule(path)
    told = "an embedding" if isinstance(module, nn.Embedding) else f"a {type(module).__name__}"
    raise StoreError(
        f"{where} adapts {path}, {told} that is no site of this backbone; linear maps that `deltaprompt inspect` "
        "shows are possible. Open it with peft"
    )


def taken(folder: Folder, path: str, end: str, shape: tuple[int, ...]) -> Tensor:
    """A module's tensor of a folder, which must be there and have this shape."""
    name = f"{PREFIX}{path}.{end}"
    if name not in folder.tensors:
        raise StoreError(f"{folder.path / TENSORS} lacks {name}, though the config names {path}; get the folder again")
    return shaped(folder, name, shape)


def shaped(folder: Folder, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a folder, which must have this shape."""
    tensor = folder.tensors[name]
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise StoreError(
            f"{folder.path / TENSORS}: {name} has shape {list(tensor.shape)} of {tensor.dtype}; {list(shape)} of "
            "floating point is what its config and this backbone ask for. Give the backbone that it was made for"
        )
    return tensor


def check_all_used(folder: Folder, used: set[str], backbone: Backbone) -> None:
    """An error where a folder has a tensor that nothing here stands for, unless it is the backbone's own, unchanged."""
    for name, tensor in sorted(folder.tensors.items()):
        if name in used or _is_own(name, tensor, backbone):
            continue
        path = name.removeprefix(PREFIX).rpartition(".lora_")[0] or name.removeprefix(PREFIX).rpartition(".")[0]
        modules = dict(backbone.model.named_modules())
        reason = "its config does not name that module" if path in modules else f"this backbone has no module {path}"
        raise StoreError(
            f"{folder.path / TENSORS} has {name}, and {reason}{_elsewhere(path, modules)}. Give the backbone that it "
            "was made for, loaded with the same kind"
        )


def _is_own(name: str, tensor: Tensor, backbone: Backbone) -> bool:
    """Whether a tensor is one of the backbone's, with the same numbers: peft may save embeddings beside an adapter."""
    own = dict(backbone.model.named_parameters(remove_duplicate=False))
    found = own.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
    return found is not None and found.shape == tensor.shape and bool((found.detach().cpu() == tensor).all())


def _elsewhere(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Where the backbone has a module of nearly that path: with or without the name of its base model in front."""
    near = [p for p in modules if p and (p.endswith(f".{path}") or path.endswith(f".{p}"))]
    longest = max(near, key=len, default="")
    return f" (but {longest})" if longest and path not in modules else ""
