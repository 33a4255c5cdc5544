"""Gives every part of a backbone its common name: by the family's table, by a table that fits, or by structure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltaprompt.backbone.families import CALLED, SHAPED_LIKE, TABLES, Table
from deltaprompt.backbone.sites import Part, Site, Sites, linear_sizes
from deltaprompt.errors import BackboneError

FUSED = re.compile(r"[+/]")
WORDS = re.compile(r"word|tokens|tok_emb|wte|embed_in")  # what word embeddings, and no others, are called
CROSS = re.compile(r"cross|enc_?dec|encoder_att", re.IGNORECASE)


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
        widths = ("hidden_size", "n_embd", "d_model", "dim")
        width = next((int(config[n]) for n in widths if isinstance(config.get(n), int)), 0)
        size = config.get("head_dim") or config.get("d_kv") or (width // query if query else 0)
        return cls(query, int(key_value), int(size))


def name_sites(model: nn.Module, base: nn.Module, config: Mapping[str, Any], head: nn.Module | None) -> Sites:
    """The sites of `model`, whose states come from `base` and whose output embedding is `head`."""
    modules = dict(base.named_modules())
    named = _by_table(modules, str(config.get("model_type", ""))) or guess(modules)
    if not any(name.endswith(("attn.q", "attn.q+k+v", "attn.q/k/v", "attn.qkv")) for name in named.values()):
        raise BackboneError(
            f"{type(model).__name__} (model_type {config.get('model_type')!r}) has no attention that DeltaPrompt can "
            "name. Possible are transformer encoders, decoders and encoder-decoders; address other parts by module path"
        )
    paths = {id(m): p for p, m in model.named_modules()}
    found: dict[str, Site] = {}
    for relative, module in modules.items():
        if relative in named:
            for site in _sites_of(named[relative], paths[id(module)], module, config):
                found[site.name] = site
    found = {s.name: _with_heads(s, found, config) for s in found.values()}
    if head is not None and (sizes := linear_sizes(head)):
        found["head"] = Site("head", paths[id(head)], "linear", *sizes)
    return Sites(found)


def _by_table(modules: Mapping[str, nn.Module], model_type: str) -> dict[str, str] | None:
    """Relative module path -> common name, by the family's own table or by the one that fits the modules best."""
    own = TABLES.get(SHAPED_LIKE.get(model_type, model_type))
    if own is not None and (named := _apply(own, modules, whole=False)):
        return named
    fits = (named for table in TABLES.values() if (named := _apply(table, modules, whole=True)))
    return max(fits, key=len, default=None)


def _apply(table: Table, modules: Mapping[str, nn.Module], whole: bool) -> dict[str, str] | None:
    """The table's rows on these modules; None where a row finds none and the table must fit as a `whole`."""
    named: dict[str, str] = {}
    linears = {path for path, module in modules.items() if linear_sizes(module)}
    for path, site in table.items():
        pattern = re.compile(re.escape(path).replace(r"\*", r"(\d+)"))
        hits = {p: m for p in modules if (m := pattern.fullmatch(p))}
        if not hits and (whole or site.endswith(("attn.q", "attn.q+k+v"))):
            return None
        for p, match in hits.items():
            named[p] = site.replace("*", _layer_number(match.groups(), modules, path)) if "*" in site else site
    inside = {path for path in linears if re.search(r"\.\d+\.", path)}
    return None if whole and not inside <= named.keys() else named


def _layer_number(numbers: tuple[str, ...], modules: Mapping[str, nn.Module], path: str) -> str:
    """One number for a layer; where layers come in groups (ALBERT), counted through the groups."""
    if len(numbers) == 1:
        return numbers[0]
    inner = path.split(".*", 1)[0] + f".{numbers[0]}." + path.split(".*.", 1)[1].split(".*", 1)[0]
    return str(int(numbers[0]) * len(list(modules[inner].children())) + int(numbers[1]))


def _sites_of(name: str, path: str, module: nn.Module, config: Mapping[str, Any]) -> Iterator[Site]:
    """The sites at one module: one, or one for each part of a fused map; none where the module has no weights."""
    sizes = linear_sizes(module)
    if sizes and FUSED.search(name):
        stem, _, last = name.rpartition(".")
        heads = Heads.of(config, decoder=stem.startswith("decoder"))
        for part_name, part in _parts(last, sizes[1], heads).items():
            yield Site(f"{stem}.{part_name}", path, "linear", sizes[0], part.groups * part.size, part=part)
    elif sizes:
        yield Site(name, path, "linear", *sizes)
    elif isinstance(module, nn.Embedding):
        yield Site(name, path, "embed", module.num_embeddings, module.embedding_dim)
    elif name.endswith(("attn", "cross")):
        yield Site(name, path, "attn", 0, 0)
    elif weights := [p for p in module.parameters(recurse=False) if p.ndim == 1]:
        yield Site(name, path, "norm", weights[0].numel(), weights[0].numel())


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


def _with_heads(site: Site, found: Mapping[str, Site], config: Mapping[str, Any]) -> Site:
    """An attention site with its key-value heads and width, which its k part tells."""
    key = found.get(f"{site.name}.k")
    if site.kind != "attn" or key is None:
        return site
    heads = Heads.of(config, decoder=site.name.startswith("decoder"))
    count = heads.key_value if heads.key_value and key.outputs % heads.key_value == 0 else 0
    return Site(site.name, site.path, "attn", 0, key.outputs, heads=count)


def guess(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Common names by structure: stacks of layers, in them linear maps by what they are called and how large."""
    named: dict[str, str] = {}
    stacks = _stacks(modules)
    for stack, side in stacks.items():
        for number, _ in modules[stack].named_children():
            layer = f"{stack}.{number}."
            inside = {p.removeprefix(layer): m for p, m in modules.items() if p.startswith(layer)}
            named |= {f"{layer}{p}": f"{side}layers.{number}.{s}" for p, s in _guess_layer(inside).items()}
    outside = {p: m for p, m in modules.items() if not any(p.startswith(f"{stack}.") for stack in stacks)}
    return named | _guess_ends(outside, stacks)


def _stacks(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Path of each outermost stack of layers with attention in it -> prefix of its common names."""
    lists = [
        path
        for path, module in modules.items()
        if isinstance(module, nn.ModuleList) and any("att" in n.lower() for n, _ in module.named_modules())
    ]
    outermost = [p for p in lists if not any(p.startswith(other + ".") for other in lists)]
    if len(outermost) == 1:
        return {outermost[0]: ""}
    return {p: ("decoder." if "decoder" in p else "encoder.") for p in outermost}


def _guess_ends(outside: Mapping[str, nn.Module], stacks: Mapping[str, str]) -> dict[str, str]:
    """Names of what lies before and behind the layers: the word embedding, its norm, the last norm."""
    named: dict[str, str] = {}
    for path, module in outside.items():
        side = next((side for side in stacks.values() if side and path.startswith(side)), "")
        leaf = path.split(".")[-1]
        if isinstance(module, nn.Embedding) and WORDS.search(leaf) and side in stacks.values():
            named[path] = f"{side}embed"
        elif _is_norm(module) and len(outside) > 1:
            named[path] = f"{side}embed.norm" if "emb" in path.lower() else f"{side}norm"
    return named


def _guess_layer(inside: Mapping[str, nn.Module]) -> dict[str, str]:
    """Names within one layer: attention, cross-attention, feed-forward, norms."""
    named: dict[str, str] = {}
    norms: list[str] = []
    for path, module in inside.items():
        block, leaf, sizes = _block(path), path.split(".")[-1].lower(), linear_sizes(module)
        if sizes and (role := _role(leaf, sizes, block)) and f"{block}.{role}" not in named.values():
            named[path] = f"{block}.{role}"
        elif _is_norm(module) and leaf in ("q_norm", "k_norm"):
            named[path] = f"{block}.{leaf}"
        elif _is_norm(module):
            norms.append(path)
    return named | _attention_modules(named) | _norms(norms, "cross.q" in named.values())


def _block(path: str) -> str:
    """Which part of a layer a module belongs to, by its path."""
    if CROSS.search(path):
        return "cross"
    return "attn" if "att" in path.lower() else "ffn"


def _norms(paths: Sequence[str], crossed: bool) -> dict[str, str]:
    """A layer's norms in their order: one a block, or one before and one behind each block."""
    blocks = ["attn", "cross", "ffn"] if crossed else ["attn", "ffn"]
    each = ("norm", "post_norm") if len(paths) == 2 * len(blocks) else ("norm",)
    return dict(zip(paths, (f"{block}.{norm}" for block in blocks for norm in each), strict=False))


def _attention_modules(named: Mapping[str, str]) -> dict[str, str]:
    """The module that holds the q (or fused) map is the one that calls the attention function."""
    holders = {p.rpartition(".")[0]: s.partition(".")[0] for p, s in named.items() if s.endswith((".q", ".qkv"))}
    return {path: block for path, block in holders.items() if path}


def _is_norm(module: nn.Module) -> bool:
    weights = list(module.parameters(recurse=False))
    return bool(weights) and all(w.ndim == 1 for w in weights) and "norm" in type(module).__name__.lower()


def _role(leaf: str, sizes: tuple[int, int], block: str) -> str | None:
    """What a linear map does, by its name and, for the feed-forward maps, by which side is larger."""
    if block != "ffn":
        fused = "qkv" if sizes[1] == 3 * sizes[0] else None
        return next((role for role in ("q", "k", "v", "qkv", "o") if leaf in CALLED[role]), fused)
    grows = sizes[1] > sizes[0]
    order = ("gate", "up") if grows else ("down",)
    return next((role for role in order if leaf in CALLED[role]), "up" if grows else "down")
