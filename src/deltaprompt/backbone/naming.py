"""Gives every part of a backbone its common name: by the family's table, or by structure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from deltaprompt.backbone.families import SHAPED_LIKE, TABLES, Table
from deltaprompt.backbone.fused import parts_by_running
from deltaprompt.backbone.guess import Text, guess
from deltaprompt.backbone.heads import widths
from deltaprompt.backbone.sites import Part, Site, Sites, linear_sizes
from deltaprompt.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUSED = re.compile(r"[+/]")
LAYER = re.compile(r"(.*\.)?layers\.\d+")
HEAD_SIZES = (
    "qk_head_dim",
    "head_dim",
    "attention_head_size",
    "key_value_proj_dim",
    "head_size",
)  # what modules call it
HEADS = ("num_key_value_heads", "kv_heads")


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention sizes that the config tells: query heads, key-value heads, size of one head."""

    query: int
    key_value: int
    size: int

    @classmethod
    def of(cls, config: Mapping[str, Any], decoder: bool) -> Heads:
        """Read from a config's dictionary; `decoder` picks the decoder's number where there are two."""
        side = "decoder_" if decoder else "encoder_"
        names = (f"{side}attention_heads", "num_attention_heads", "n_head", "num_heads", "n_heads")
        query = next((int(config[n]) for n in names if isinstance(config.get(n), int)), 0)
        key_value = config.get("num_key_value_heads") or query
        width = next(iter(widths(config)), 0)
        size = config.get("head_dim") or config.get("d_kv") or (width // query if query else 0)
        return cls(query, int(key_value), int(size))


def name_sites(model: PreTrainedModel, base: nn.Module, config: Mapping[str, Any], head: nn.Module | None) -> Sites:
    """The sites of `model`, whose states come from `base` and whose output embedding is `head`."""
    modules = dict(base.named_modules())
    named = _by_table(modules, str(config.get("model_type", "")))
    split: dict[str, dict[str, Part]] = {}
    if named is None:
        named = guess(modules, texts_of(model, base, modules))
        split = parts_by_running(model, base, named)
    if not any(name.endswith("embed") for name in named.values()):
        raise BackboneError(
            f"{type(model).__name__} (model_type {config.get('model_type')!r}) has no word embedding that DeltaPrompt "
            "can find. Possible are models that read token ids"
        )
    paths = {id(m): p for p, m in model.named_modules()}
    found: dict[str, Site] = {}
    for relative, module in modules.items():
        if relative in named:
            for site in _sites_of(named[relative], paths[id(module)], module, config, split.get(relative)):
                found[site.name] = site
    found = {name: _completed(site, found, model, config) for name, site in _with_blocks(found).items()}
    if head is not None and (sizes := linear_sizes(head)):
        found["head"] = Site("head", paths[id(head)], "linear", *sizes, biased=_is_biased(head))
    return Sites(found)


def texts_of(model: PreTrainedModel, base: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[Text, ...]:
    """The parts of a model that read text: encoder and decoder, or the one around the word embedding."""
    paths = {id(module): path for path, module in modules.items()}
    if model.config.is_encoder_decoder and base is model.get_encoder():
        return (_text(base, base, paths, ""),)
    if model.config.is_encoder_decoder:
        sides = {"encoder.": model.get_encoder(), "decoder.": model.get_decoder()}
        if all(id(part) in paths for part in sides.values()):
            return tuple(_text(part, part, paths, side) for side, part in sides.items())
    return (_text(model, model.get_decoder(), paths, ""),)


def _text(owner: PreTrainedModel, root: nn.Module, paths: Mapping[int, str], side: str) -> Text:
    """The part around a word embedding: `root` where that holds it, else the smallest around it that has layers."""
    embedding = embedding_of(owner)
    holds = any(module is embedding for module in root.modules())
    return Text(paths.get(id(root), "") if holds else "", paths.get(id(embedding), ""), side)


def embedding_of(model: PreTrainedModel) -> nn.Module | None:
    """The word embedding; where a model does not tell, its largest table."""
    try:
        told = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        told = None
    if isinstance(told, nn.Module) and "weight" in dict(told.named_parameters(recurse=False)):
        return told
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(tables, key=lambda table: table.num_embeddings, default=None)


def _by_table(modules: Mapping[str, nn.Module], model_type: str) -> dict[str, str] | None:
    """Relative module path -> common name, by the family's own table; None where it has none that fits."""
    own = TABLES.get(SHAPED_LIKE.get(model_type, model_type))
    return None if own is None else _apply(own, modules)


def _apply(table: Table, modules: Mapping[str, nn.Module]) -> dict[str, str] | None:
    """The table's rows on these modules, and their layers; None where the row of the queries finds none."""
    named: dict[str, str] = {}
    for path, site in table.items():
        pattern = re.compile(re.escape(path).replace(r"\*", r"(\d+)"))
        hits = {p: m for p in modules if (m := pattern.fullmatch(p))}
        if not hits and site.endswith(("attn.q", "attn.q+k+v")):
            return None
        for p, match in hits.items():
            if "*" in site:
                layer = site.split("*")[0] + _layer_number(match.groups(), modules, path)
                named[p[: match.end(match.lastindex or 0)]] = layer
                named[p] = layer + site.split("*")[1]
            else:
                named[p] = site
    return named


def _layer_number(numbers: tuple[str, ...], modules: Mapping[str, nn.Module], path: str) -> str:
    """One number for a layer; where layers come in groups (ALBERT), counted through the groups."""
    if len(numbers) == 1:
        return numbers[0]
    inner = path.split(".*", 1)[0] + f".{numbers[0]}." + path.split(".*.", 1)[1].split(".*", 1)[0]
    return str(int(numbers[0]) * len(list(modules[inner].children())) + int(numbers[1]))


def _sites_of(
    name: str, path: str, module: nn.Module, config: Mapping[str, Any], split: Mapping[str, Part] | None
) -> Iterator[Site]:
    """The sites at one module: one, or one for each part of a fused map; none where the module has no weights."""
    sizes = linear_sizes(module)
    if sizes and (split or FUSED.search(name)):
        stem, _, last = name.rpartition(".")
        heads = Heads.of(config, decoder=stem.startswith("decoder"))
        for part_name, part in (split or _parts(last, sizes[1], heads)).items():
            size = part.groups * part.size
            yield Site(f"{stem}.{part_name}", path, "linear", sizes[0], size, part=part, biased=_is_biased(module))
    elif sizes:
        yield Site(name, path, "linear", *sizes, biased=_is_biased(module))
    elif name.endswith("embed"):
        rows, width = module.get_parameter("weight").shape
        yield Site(name, path, "embed", rows, width)
    elif LAYER.fullmatch(name):
        yield Site(name, path, "layer", 0, 0)
    elif name.endswith(".ffn"):
        yield Site(name, path, "ffn", 0, 0, entry=path)  # of experts
    elif name.endswith(("attn", "cross")):
        yield Site(name, path, "attn", 0, 0)
    elif weights := [p for p in module.parameters(recurse=False) if p.ndim == 1]:
        width = weights[0].numel()
        yield Site(name, path, "norm", width, width, biased=_is_biased(module))


def _is_biased(module: nn.Module) -> bool:
    return dict(module.named_parameters(recurse=False)).get("bias") is not None


def _parts(spec: str, out: int, heads: Heads) -> dict[str, Part]:
    """The parts of a fused map: `q+k+v` one after the other, `q/k/v` head by head, `gate+up` in halves."""
    if spec == "gate+up":
        return {"gate": Part(1, 0, out // 2), "up": Part(1, out // 2, out // 2)}
    if spec == "q/k/v":
        size = out // (3 * heads.query)
        return {p: Part(heads.query, i * size, size) for i, p in enumerate("qkv")}
    query = heads.query * heads.size
    rest = (out - query) // 2
    return {"q": Part(1, 0, query), "k": Part(1, query, rest), "v": Part(1, query + rest, rest)}


# Sites that others tell about


def _with_blocks(found: Mapping[str, Site]) -> dict[str, Site]:
    """The sites, and a feed-forward block behind the second of its maps."""
    made: dict[str, Site] = {}
    for name, site in found.items():
        made[name] = site
        stem, _, role = name.rpartition(".")
        if role not in ("gate", "up", "down") or stem.rpartition(".")[2] != "ffn" or stem in made:
            continue
        up, down = found.get(f"{stem}.up"), made.get(f"{stem}.down")
        entry = found.get(f"{stem}.gate", up)
        if up and down and entry and up.name in made and _is_whole(stem, down, found):
            made[stem] = Site(stem, down.path, "ffn", entry.inputs, down.outputs, entry=entry.path)
    return made


def _is_whole(stem: str, down: Site, found: Mapping[str, Site]) -> bool:
    """Whether gate, up and down are all the linear maps of the module that holds the last of them."""
    holder = down.path.rpartition(".")[0]
    beside = (s for s in found.values() if s.name.startswith(f"{stem}.") and s.path.rpartition(".")[0] == holder)
    return all(s.kind != "linear" or s.name.rpartition(".")[2] in ("gate", "up", "down") for s in beside)


def _completed(site: Site, found: Mapping[str, Site], model: nn.Module, config: Mapping[str, Any]) -> Site:
    """An attention site with its key-value heads, a layer or a block of experts with the width of what passes it."""
    if site.kind == "ffn" and not site.outputs:
        width = next(iter(widths(config)), 0) or _width(site, found, config)
        return replace(site, inputs=width, outputs=width)
    if site.kind == "layer":
        width = _width(site, found, config)
        return replace(site, inputs=width, outputs=width)
    if site.kind != "attn":
        return site
    count, size, value = _key_value(site, found, vars(model.get_submodule(site.path)), config)
    return replace(site, heads=count, outputs=count * size, values=count * value)


def _width(layer: Site, found: Mapping[str, Site], config: Mapping[str, Any]) -> int:
    """The size of the residual stream: its norms' where it is several streams, else the config's where a map has it."""
    inside = [s for name, s in found.items() if name.startswith(f"{layer.name}.")]
    told = next(iter(widths(config)), 0)
    normed = {s.outputs for s in inside if re.search(r"\.(attn|mixer|ffn)\.norm$", s.name)}
    if told and len(normed) == 1 and next(iter(normed)) % told == 0:
        return normed.pop()
    if any(told in (s.inputs, s.outputs) for s in inside if s.kind in ("linear", "norm")):
        return told
    back = ("ffn.down", "attn.o", "mixer.out", "shared.down", "experts.0.down", "attn.norm", "mixer.norm")
    sizes = (found[f"{layer.name}.{role}"].outputs for role in back if f"{layer.name}.{role}" in found)
    return next(sizes, 0) or told or next(s.outputs for s in found.values() if s.kind == "embed")


def _key_value(
    site: Site, found: Mapping[str, Site], known: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Heads of k and v, and the sizes of one key and one value; zeros where nothing tells them."""
    own = (known[name] for name in HEAD_SIZES if isinstance(known.get(name), int))
    told = Heads.of(config, decoder=site.name.startswith("decoder"))
    key = found.get(f"{site.name}.k") or found.get(f"{site.name}.kv")
    size = next(own, told.size)
    value = int(known.get("v_head_dim") or size)
    if "qk_head_dim" in known and f"{site.name}.kv_b" in found:
        return int(known.get("num_heads", told.query)), size, value
    groups, heads = known.get("num_key_value_groups"), known.get("num_heads")
    counts = (known[name] for name in HEADS if isinstance(known.get(name), int))
    if key is not None and (key.name.endswith(".k") or key.outputs == size):
        count = key.outputs // size if size and key.outputs % size == 0 else 0
    elif isinstance(groups, int) and isinstance(heads, int) and groups:
        count = heads // groups
    else:
        count = next(counts, told.key_value if groups else 0)
    return (count, size, value) if count and size else (0, 0, 0)
