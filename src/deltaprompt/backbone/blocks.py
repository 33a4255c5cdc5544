"""Names within one layer: its blocks, their maps by what they are called and how large, and its norms."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from deltaprompt.backbone.families import CALLED
from deltaprompt.backbone.sites import is_norm, linear_sizes

Layer = tuple[str, ...]  # the path of its module; several where its parts lie in lists side by side
Inside = Mapping[str, nn.Module]  # path within the layer -> module

# What the pieces of a path say about the block that lies there; the first that matches, from the outside in.
BLOCKS: dict[str, re.Pattern[str]] = {
    "": re.compile(r"layer_?norm|connection|adapter|residual|bottleneck"),  # none of them, whatever lies inside
    "cross": re.compile(r"cross|enc_?dec|encoder_att"),
    "mixer": re.compile(r"linear_att|mamba|mixer|^(short_?)?conv$|temporal|lstm|rglru|ssm|retention|fourier"),
    "attn": re.compile(r"att"),
    "shared": re.compile(r"shared_?(expert|mlp)"),
    "experts": re.compile(r"expert"),
    "router": re.compile(r"^router$"),
    "ffn": re.compile(r"mlp|ffn|feed_?forward|^ff$|intermediate|^output$|moe|^fc_?(\d|in|out)$|^lin(ear)?_?\d$|^w[io]"),
}
FEEDS = ("ffn", "shared", "experts")  # blocks of gate, up and down
ATTENDS = ("attn", "cross")
APART = re.compile(
    r"norm|connection|adapter|residual|bottleneck|indexer|compressor|forget|conv|global"
)  # with roles of their own
LINEAR_ATTENTION = re.compile(r"Delta|Lightning|Retention|Recurrent")  # classes named attention that are recurrences
INNER_NORM = re.compile(r"^(q|k|v|kv|qk|o|query|key|value)_|sub_norm|^(layer)?norm\d$")
QUERIES = ("q", "qkv", "q_a", "qk")
OF_FEED = re.compile(r"mlp|ffn|^ff_|feed_?forward")
SET_APART = re.compile(r"adapter|bottleneck|global|ffn\.\d")
LATE_NORM = re.compile(r"^post_(mlp|ffn|ff|feed_?forward|self_att)")
SAY_NOTHING = ("dense", "linear", "layer", "classifier", "conv")  # leaves that are told apart by what they lie in


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module of a layer lies: its block, the path of the block, and what comes after."""

    block: str
    holder: str
    rest: str


def name_layer(inside: Inside) -> dict[str, str]:
    """Path within a layer -> common name, for every linear map, norm and module that calls attention."""
    maps = {path: sizes for path, module in inside.items() if (sizes := linear_sizes(module))}
    places = _corrected({path: _place(path) for path in inside}, inside, maps)
    wanted: dict[str, str] = {}
    for block, holder in dict.fromkeys((p.block, p.holder) for path, p in places.items() if path in maps):
        own = {path: maps[path] for path in maps if (places[path].block, places[path].holder) == (block, holder)}
        wanted |= _block_names(block, own, places)
        if block in ATTENDS and (path := _caller(holder, inside, wanted)):
            wanted[path] = block
    wanted |= _norm_names(inside, places)
    if not {"ffn.up", "ffn.down"} & set(wanted.values()) and (path := _routed_block(inside, places)):
        wanted[path] = "ffn"
    return _unique(wanted, [path for path in inside if path in maps or is_norm(inside[path])])


# Blocks


def _place(path: str) -> Place:
    pieces = path.split(".")
    for i, piece in enumerate(pieces):
        block = next((b for b, words in BLOCKS.items() if words.search(piece.lower())), None)
        if block == "":
            return Place("", "", path)
        if block in ("ffn", "mixer"):
            block, i = _deeper(block, pieces, i)
        if block == "ffn" and i == len(pieces) - 1:  # a map by itself: the block is what it lies in
            return Place(block, ".".join(pieces[:i]), pieces[i])
        if block:
            end = i + 2 if i + 2 < len(pieces) and pieces[i + 1].isdigit() else i + 1
            return Place(_numbered(block, pieces[i:end]), ".".join(pieces[:end]), ".".join(pieces[end:]))
    return Place("", "", path)


def _deeper(block: str, pieces: Sequence[str], i: int) -> tuple[str, int]:
    """Within a feed-forward block: its experts, its shared expert, its router."""
    for j in range(i + 1, len(pieces)):
        for inner in ("shared", "experts", "router"):
            if BLOCKS[inner].search(pieces[j].lower()):
                deep = j + 1 if inner == "experts" and j + 2 < len(pieces) and re.search(r"\d", pieces[j + 1]) else j
                return inner, deep
        if pieces[j] == "gate" and j + 1 < len(pieces):
            return "router", j
    return block, i


def _numbered(block: str, pieces: Sequence[str]) -> str:
    """`experts.3`, where each expert is a module."""
    number = re.search(r"\d+$", pieces[-1]) if block == "experts" else None
    return f"experts.{number[0]}" if number else block


def _corrected(places: dict[str, Place], inside: Inside, maps: Mapping[str, tuple[int, int]]) -> dict[str, Place]:
    """The places, where what a block is made of outweighs what it is called."""
    routed = any("expert" in path.lower() for path in inside)
    for block, holder in dict.fromkeys((p.block, p.holder) for p in places.values()):
        own = [path for path in maps if (places[path].block, places[path].holder) == (block, holder)]
        actual = _actual(block, holder, own, inside)
        if block == "shared" and not any(p.block.startswith("experts") for p in places.values()):
            actual = "ffn"
        for path, place in places.items():
            if (place.block, place.holder) == (block, holder):
                alone = routed and actual == "ffn" and path in maps and place.rest == "gate"
                places[path] = Place("router" if alone else actual, path if alone else holder, place.rest)
    return places


def _actual(block: str, holder: str, own: Sequence[str], inside: Inside) -> str:
    """Attention calls the attention function or has queries; what only widens and narrows is a feed-forward block."""
    if block not in ("attn", "mixer"):
        return block
    under = [m for path, m in inside.items() if path == holder or path.startswith(f"{holder}.")]
    if any(calls_attention(module) for module in under):
        return "attn"
    leaves = {path.rpartition(".")[2].lower() for path in own}
    if leaves <= {*CALLED["gate"], *CALLED["up"], *CALLED["down"]} and (leaves or _is_routed(under)):
        return "ffn"
    if block == "attn" and own:
        roles = {_attention_role(path) for path in own if _leaf(path) != "receptance"}
        fused = any(
            leaving == 3 * entering for entering, leaving in filter(None, map(linear_sizes, (inside[p] for p in own)))
        )
        queries = roles & set(QUERIES) or ("k" not in roles and fused)
        return "attn" if queries and not LINEAR_ATTENTION.search(type(inside[holder]).__name__) else "mixer"
    return block


def _is_routed(block: Sequence[nn.Module]) -> bool:
    return any("expert" in name.lower() for module in block for name, _ in module.named_children())


def _routed_block(inside: Inside, places: Mapping[str, Place]) -> str:
    """The outermost module that sends tokens to experts: modules that are called so, or weights side by side."""
    for path, module in inside.items():
        feeds = places[path].block.startswith((*FEEDS, "router"))
        children = dict(module.named_children())
        if feeds and (_is_routed([module]) or any(_side_by_side(child) for child in children.values())):
            return path
    return ""


def _side_by_side(module: nn.Module) -> bool:
    """Whether a module's own weights are several maps [experts, out, in]."""
    own = module.parameters(recurse=False)
    return any(weight.ndim == 3 for weight in own) and not isinstance(module, nn.Conv1d)


def calls_attention(module: nn.Module) -> bool:
    """Whether a module's own forward calls the attention function that transformers shares."""
    forward = inspect.unwrap(type(module).forward)
    return inspect.isfunction(forward) and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _caller(holder: str, inside: Inside, named: Mapping[str, str]) -> str:
    """The module that calls attention in a block: the one whose code does, or the one that holds the queries."""
    under = [path for path in inside if path == holder or path.startswith(f"{holder}.")]
    calling = (path for path in under if calls_attention(inside[path]))
    holds = (p.rpartition(".")[0] for p in under if named.get(p, "").rpartition(".")[2] in QUERIES)
    return next(calling, next(holds, ""))


# Maps


def _block_names(block: str, own: Mapping[str, tuple[int, int]], places: Mapping[str, Place]) -> dict[str, str]:
    """The names of the maps of one block."""
    if not block:
        return {path: path for path in own}
    if block == "router":
        return {path: block if len(own) == 1 else f"{block}.{places[path].rest}" for path in own}
    main = {path: sizes for path, sizes in own.items() if not APART.search(places[path].rest.lower())}
    if block.startswith(FEEDS):
        roles = _feed_roles(main)
    else:
        roles = _mixer_roles(main) if block == "mixer" else _attention_roles(main)
    return {path: f"{block}.{roles.get(path) or _tail(places[path])}" for path in own}


def _tail(place: Place) -> str:
    """The own name of a map within its block: its leaf, or its path where it lies in a part with roles of its own."""
    pieces = place.rest.split(".")
    apart = next((i for i, piece in enumerate(pieces) if APART.search(piece.lower())), len(pieces))
    last = pieces[-2:-1] if pieces[-1] in SAY_NOTHING and len(pieces) > 1 else pieces[-1:]
    return ".".join(pieces[apart:] or last) or "router"


def _leaf(path: str) -> str:
    """What a map is called, in lower case; by what it lies in where its own name says nothing."""
    parent, _, leaf = path.lower().rpartition(".")
    around = parent.rpartition(".")[2]
    return around if leaf in SAY_NOTHING and _known(around) else leaf


def _known(leaf: str) -> bool:
    return any(leaf in names for names in CALLED.values())


def _attention_role(path: str) -> str | None:
    leaf = _leaf(path)
    if latent := re.fullmatch(r"(q|k|v|kv|o)_([ab])(_proj(_with_mqa)?)?", leaf):
        return f"{latent[1]}_{latent[2]}"
    return next((role for role in ("q", "k", "v", "qkv", "qk", "kv", "o") if leaf in CALLED[role]), None)


def _attention_roles(own: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    roles = _once((path, _attention_role(path)) for path in own)
    if not {"q", "qkv", "q_a"} & set(roles.values()):
        fused = (path for path, (entering, leaving) in own.items() if path not in roles and leaving == 3 * entering)
        roles |= {path: "qkv" for path in list(fused)[:1]}
    return roles


def _mixer_roles(own: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """in, out, or q, k, v, out: the map back to the hidden state, and the widest (then the last) of those from it."""
    roles = _once((path, _attention_role(path)) for path in own)
    if not own:
        return {}
    out = next((path for path, role in roles.items() if role == "o"), None) or list(own)[-1]
    apart = {path: role for path, role in roles.items() if role in ("q", "k", "v") and path != out}
    if {"q", "k"} <= set(apart.values()):
        return {**apart, out: "out"}
    width = own[out][1]
    widest = max((leaving for path, (entering, leaving) in own.items() if entering == width and path != out), default=0)
    receiving = [path for path, sizes in own.items() if sizes == (width, widest) and path != out]
    return {**{path: "in" for path in receiving[-1:]}, out: "out"}


def _feed_roles(own: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """gate, up, down: by name, then by which side is larger, then by order; `gate+up` where one map is both."""
    roles = _once((path, next((r for r in ("gate", "up", "down") if _leaf(path) in CALLED[r]), None)) for path in own)
    told = {
        path: "up" if leaving > entering else "down" for path, (entering, leaving) in own.items() if leaving != entering
    }
    for guesses in (told, dict.fromkeys(own, "up"), dict.fromkeys(own, "down")):
        for path, role in guesses.items():
            if path not in roles and role not in roles.values() and _may_be(path):
                roles[path] = role
    if "up" not in roles.values():
        roles = {path: "up" if role == "gate" else role for path, role in roles.items()}
    by_role = {role: path for path, role in roles.items()}
    if {"up", "down"} == by_role.keys() and own[by_role["up"]][1] == 2 * own[by_role["down"]][0]:
        roles[by_role["up"]] = "gate+up"
    return roles


def _may_be(path: str) -> bool:
    """Whether a map may be told by its size: not where its name says that it is something else."""
    return _leaf(path) != "receptance" and not _leaf(path).endswith("gate")


def _once(found: Iterator[tuple[str, str | None]]) -> dict[str, str]:
    """The roles found, each for the first map that has it."""
    roles: dict[str, str] = {}
    for path, role in found:
        if role is not None and role not in roles.values():
            roles[path] = role
    return roles


# Norms


def _norm_names(inside: Inside, places: Mapping[str, Place]) -> dict[str, str]:
    """A layer's norms: those within a block by their own names, those around the blocks by their order."""
    norms = [path for path, module in inside.items() if is_norm(module)]
    inner = {path: _inner_norm(path, places[path]) for path in norms}
    outer = [path for path in norms if not inner[path] and not SET_APART.search(path.lower())]
    outer.sort(key=lambda path: places[path].block != "attn")
    present = [place.block for path, place in places.items() if not is_norm(inside[path])]
    mixing = next((block for block in ("attn", "mixer") if block in present), None)
    feeding = "ffn" if any(b.startswith(FEEDS) or b == "router" for b in present) else None
    blocks = [b for b in (mixing, "cross" if "cross" in present else None, feeding) if b]
    return {path: name for path, name in inner.items() if name} | _outer_norms(outer, blocks)


def _inner_norm(path: str, place: Place) -> str:
    """`attn.q_norm`, `mixer.inner_norm`, or "" for a norm around its block."""
    leaf = path.rpartition(".")[2].lower()
    if not place.holder or not place.rest:
        return ""
    within = INNER_NORM.search(leaf) or APART.search(place.rest.lower()[: -len(leaf)])
    if not within and (place.block in (*ATTENDS, "ffn") or place.rest.startswith("output.")):
        return ""
    own = re.sub(r"layer_?norm", "norm", _tail_of_norm(place)).replace("query_", "q_").replace("key_", "k_")
    return f"{place.block}.{'inner_norm' if own == 'norm' else own}"


def _tail_of_norm(place: Place) -> str:
    before, _, leaf = place.rest.rpartition(".")
    return place.rest if APART.search(before.lower()) else leaf


def _outer_norms(paths: Sequence[str], blocks: Sequence[str]) -> dict[str, str]:
    """One a block, or one before and one behind each; else those that say they are behind, and the rest."""
    last = {path: path.rpartition(".")[2].lower() for path in paths}
    if not blocks or not paths:
        return {}
    if all(leaf.isdigit() for leaf in last.values()):  # one for each of several sub-layers
        stems = dict.fromkeys(path.rpartition(".")[0] for path in paths)
        named = _outer_norms(list(stems), blocks)
        return {path: f"{last[path]}.{named[stem]}" for path in paths if (stem := path.rpartition(".")[0]) in named}
    if "cross" in blocks and any(OF_FEED.search(leaf) for leaf in last.values()):  # written down in another order
        paths = sorted(paths, key=lambda path: 2 if OF_FEED.search(last[path]) else int("cross" in last[path]))
    count = len(blocks)
    if len(paths) >= 2 * count:
        return _before_and_behind(paths[: 2 * count], blocks)
    if len(paths) < count:
        return _by_block(paths, ["ffn" if OF_FEED.search(last[path]) else blocks[0] for path in paths], "norm")
    late = [path for path in paths if LATE_NORM.search(last[path])] if len(paths) > count else []
    early = [path for path in paths if path not in late]
    numbered = [path for path in early if last[path][-1].isdigit()]
    early = numbered if len(early) != count == len(numbered) else early
    behind = ["attn" if "att" in last[path] else "ffn" for path in late]
    return _by_block(early, blocks, "norm") | _by_block(late, behind, "post_norm") if len(early) == count else {}


def _before_and_behind(paths: Sequence[str], blocks: Sequence[str]) -> dict[str, str]:
    """Two norms a block: those called post are behind, except the first where too few are in front (Llama's name)."""
    late = [path for path in paths if path.rpartition(".")[2].startswith("post")]
    early = [path for path in paths if path not in late]
    while late and len(early) < len(blocks):
        early.append(late.pop(0))
    if len(early) != len(blocks):
        early, late = list(paths[::2]), list(paths[1::2])
    return _by_block(early, blocks, "norm") | _by_block(late, blocks, "post_norm")


def _by_block(paths: Sequence[str], blocks: Sequence[str], norm: str) -> dict[str, str]:
    return {path: f"{block}.{norm}" for path, block in zip(paths, blocks, strict=False)}


# All together


def _unique(wanted: Mapping[str, str], needed: Sequence[str]) -> dict[str, str]:
    """A name for each that is needed or wanted, none twice: by the number of the sub-layer, else by its own path."""
    taken: dict[str, list[str]] = {}
    for path, name in wanted.items():
        taken.setdefault(name, []).append(path)
    made: dict[str, str] = {}
    for name, paths in taken.items():
        found = [re.search(r"\.(\d+)(?=\.|$)", path) for path in paths]
        numbers = [f"{number[1]}." if number else "" for number in found]
        apart = len(paths) > 1 and len(set(numbers)) == len(paths)
        made |= {p: f"{numbers[i]}{name}" if apart else name if i == 0 else p for i, p in enumerate(paths)}
    return made | {path: path for path in needed if path not in made}
