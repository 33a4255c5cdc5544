"""IA3: one vector a module in PEFT, one a site here; a fused map's vector is its parts' one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from deltaprompt.backbone import Backbone, Site
from deltaprompt.backbone.sites import is_turned, linear_sizes
from deltaprompt.deltas.ia3 import IA3
from deltaprompt.errors import StoreError
from deltaprompt.interchange import fields
from deltaprompt.interchange.folder import Folder
from deltaprompt.interchange.forms import PREFIX, Opened, Piece, Written, check_all_used, maps_at, taken
from deltaprompt.interchange.targets import feeds_forward, names_of, selectors_of, targeted

END = "ia3_l"


def read(folder: Folder, backbone: Backbone) -> Opened:
    """One IA3 at the modules of the folder: `at_input` where PEFT calls them feedforward, `at` elsewhere."""
    out = None if backbone.head is None else backbone.head.out
    at: list[Site] = []
    at_input: list[Site] = []
    tensors: dict[str, Tensor] = {}
    used: set[str] = set()
    for path in targeted(folder.config, backbone.model, out):
        sites = maps_at(path, backbone, folder.path)
        inputs, outputs = linear_sizes(backbone.model.get_submodule(path)) or (0, 0)
        used.add(f"{PREFIX}{path}.{END}")
        if not feeds_forward(folder.config, path):
            at += sites
            tensors |= dict(_outputs(sites, taken(folder, path, END, (outputs, 1))[:, 0]))
            continue
        if sites[0].part is not None:
            raise StoreError(f"{folder.path} scales what enters the fused map {path}, which has no form here")
        at_input += sites
        tensors[f"0.{sites[0].name}.l_in"] = taken(folder, path, END, (1, inputs))
    check_all_used(folder, used, backbone)
    if not tensors:
        raise StoreError(f"{folder.path} names no module of this backbone: {folder.config['target_modules']!r}")
    delta = IA3(at=selectors_of(at, backbone.sites), at_input=selectors_of(at_input, backbone.sites))
    return Opened((delta,), tensors)


def _outputs(sites: Sequence[Site], vector: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The sites' own tensors [1, out] of a module's vector [out]."""
    for site in sites:
        yield f"0.{site.name}.l", (vector if site.part is None else site.part.take(vector))[None]


def write(pieces: Sequence[Piece], backbone: Backbone) -> Written:
    """One PEFT IA3 of all IA3s."""
    vectors: dict[str, Tensor] = {}
    inputs: set[str] = set()
    done: set[str] = set()
    for piece in pieces:
        site = piece.site
        if site.name in done or (site.path in vectors and site.part is None):
            raise StoreError(f"two IA3s at {site.name} have no form in one folder of PEFT; merge one of them first")
        done.add(site.name)
        if "l_in" in piece.tensors:
            inputs.add(site.path)
            vectors[site.path] = piece.tensors["l_in"]  # [1, in]
        else:
            vectors[site.path] = _with(vectors.get(site.path), piece, backbone)  # [out, 1]
    modules = {path: module for path, module in backbone.model.named_modules() if path}
    within, other = ({p for p in vectors if (p in inputs) == is_input} for is_input in (True, False))
    feedforward = _feedforward(within, vectors, modules)
    config = {
        "peft_type": fields.IA3,
        "target_modules": sorted({*names_of(other, modules), *feedforward}),
        "feedforward_modules": feedforward,
        "fan_in_fan_out": any(is_turned(modules[path]) for path in vectors),
        "init_ia3_weights": True,
        "modules_to_save": None,
    }
    return Written(config, {f"{PREFIX}{path}.{END}": vector for path, vector in vectors.items()})


def _with(vector: Tensor | None, piece: Piece, backbone: Backbone) -> Tensor:
    """A module's vector [out, 1] with a site's own in it; ones where no part is scaled."""
    own = piece.tensors["l"][0]
    if piece.site.part is None:
        return own[:, None]
    outputs = (linear_sizes(backbone.model.get_submodule(piece.site.path)) or (0, 0))[1]
    whole = own.new_ones(outputs) if vector is None else vector[:, 0]
    return piece.site.part.put(whole, own)[:, None]


def _feedforward(within: set[str], vectors: Mapping[str, Tensor], modules: Mapping[str, object]) -> list[str]:
    """Names of the modules whose input is scaled; PEFT takes them as bare ends, which no other target may have."""
    names = names_of(within, modules)
    if any(path.endswith(tuple(names)) for path in vectors if path not in within):
        names = sorted(within)
    return names
