"""Where a delta goes on a backbone, what it trains there, and why it cannot go elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deltaprompt.backbone import Backbone, Site, attention
from deltaprompt.deltas._base import After, Delta, KeyValue, Shared
from deltaprompt.errors import ConfigError, SiteError
from deltaprompt.params import Param, zeros

GATE, GATE_BIAS = "gate", "gate_bias"


def instances(deltas: Sequence[Delta]) -> Sequence[Delta]:
    """The deltas, where they are; an error for a delta alone, a class or a name."""
    wrong = deltas if isinstance(deltas, Delta | str) else next((d for d in deltas if not isinstance(d, Delta)), None)
    if wrong is not None:
        raise ConfigError(f"deltas are a list of instances, such as [dp.LoRA(rank=8)]; got {wrong!r}")
    return deltas


def sites_of(delta: Delta, backbone: Backbone) -> list[Site]:
    """The sites where a delta has tensors on a backbone; an error where there is none, or where it cannot act."""
    name = type(delta).__name__
    chosen = backbone.sites.select(delta.selectors())
    if not chosen:
        raise SiteError(
            f"{name} finds no site on this backbone: nothing that {list(delta.selectors())} speak of is there"
        )
    for selector in delta.selectors():
        _check_kinds(delta, selector, backbone.sites.select([selector]))
    fitting = [site for site in chosen if site.kind in delta.acts_on]
    _check_recomputed(delta, fitting, backbone)
    if delta.gated and any(site.kind == "embed" for site in fitting):
        raise ConfigError(f"{name} cannot be gated: what enters {fitting[0].name} are token ids; leave out gated")
    if isinstance(delta, KeyValue):
        _check_attention(delta, fitting, backbone)
    if isinstance(delta, Shared):
        return fitting
    training = [site for site in fitting if delta.params(site)]
    if not training:
        raise SiteError(
            f"{name} has nothing to train at {list(delta.selectors())}: none of what it trains is at "
            f"{', '.join(site.name for site in fitting[:3])}; choose other sites"
        )
    return training


def _check_kinds(delta: Delta, selector: str, found: Sequence[Site]) -> None:
    """An error where a delta fits none of the sites that a selector finds."""
    if found and not any(site.kind in delta.acts_on for site in found):
        kinds = ", ".join(sorted({site.kind for site in found}))
        possible = ", ".join(delta.acts_on)
        raise SiteError(f"{type(delta).__name__} acts on sites of kind {possible}; {selector!r} is of kind {kinds}")


def _check_recomputed(delta: Delta, sites: Sequence[Site], backbone: Backbone) -> None:
    """An error where a layer's inputs are computed again from its outputs (Reformer), which must be its own then."""
    if isinstance(delta, After) and any(
        site.kind == "layer" and "backward_pass" in dir(type(backbone.model.get_submodule(site.path))) for site in sites
    ):
        raise SiteError(
            f"{type(delta).__name__} cannot act on what leaves a layer of {type(backbone.model).__name__}, whose "
            "backward pass computes the layer's inputs from that; choose sites within layers: ffn, attn.o"
        )


def _check_attention(delta: Delta, sites: list[Site], backbone: Backbone) -> None:
    """An error where an attention's keys and values do not pass transformers' shared function."""
    for site in sites:
        attention.base_of(backbone.model, site.path)
        if not attention.supported(backbone.model.get_submodule(site.path)):
            raise SiteError(
                f"{type(delta).__name__} cannot act at {site.name}: {type(backbone.model).__name__} computes attention "
                "in code of its own, which takes no further keys and values. Other deltas work on this backbone"
            )


def parameters_of(delta: Delta, backbone: Backbone) -> int:
    """What one adaptation with this delta trains on a backbone: the closed forms of its sites; nothing is attached."""
    sites = sites_of(delta, backbone)
    shared = delta.shared(sites).values() if isinstance(delta, Shared) else ()
    own = (param for site in sites for param in {**delta.params(site), **gate_params(delta, site)}.values())
    return sum(param.size for param in (*shared, *own))


def gate_params(delta: Delta, site: Site) -> Mapping[str, Param]:
    """The tensors of a delta's gate: a map of what enters to one number, or that number's offset alone."""
    if not delta.gated:
        return {}
    bias = {GATE_BIAS: Param((1, 1), zeros)}
    return bias if isinstance(delta, KeyValue) else {GATE: Param((1, site.inputs), zeros), **bias}
