"""Common names by structure: stacks of layers, in them blocks, in those maps by what they are called and how large.

A model that no table knows is read as a person would read its `print(model)`: the lists of layers beside the word
embedding, in each layer the blocks (attention, mixer, feed-forward, experts), in each block the maps by their names or,
where those say nothing, by which side is larger. Whatever has no common name keeps its own path within the layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from deltaprompt.backbone.blocks import Layer, calls_attention, name_layer
from deltaprompt.backbone.sites import is_norm, linear_sizes

Modules = Mapping[str, nn.Module]
LISTS = re.compile(r"layers?|h|blocks?", re.IGNORECASE)  # lists of layers whose own name says no more than that
OF_EMBEDDING = re.compile(r"norm_?emb|embeddings_?(layer_?)?norm")


@dataclass(frozen=True, slots=True)
class Text:
    """A part of a model that reads text: the module that holds it, its word embedding, and the prefix of its names."""

    root: str = ""
    embed: str = ""
    side: str = ""


def guess(modules: Modules, texts: Sequence[Text]) -> dict[str, str]:
    """Module path -> common name, for the layers and the ends of every part that reads text."""
    named: dict[str, str] = {}
    for text in texts:
        stacks = stacks_of(modules, text)
        for side, layers in stacks.items():
            for number, layer in enumerate(layers):
                name = f"{side}layers.{number}"
                paths = _inside(modules, layer)
                inner = name_layer({short: modules[path] for short, path in paths.items()})
                named |= {paths[short]: f"{name}.{site}" for short, site in inner.items()}
                if len(layer) == 1 and layer[0] not in named:
                    named[layer[0]] = name
        named |= _ends(modules, text, [layer for layers in stacks.values() for paths in layers for layer in paths])
    return named


def _inside(modules: Modules, layer: Layer) -> dict[str, str]:
    """Path within a layer -> path, of all that lies in it; where a layer lies side by side, with its list's name.

    A layer that is nothing but attention lies in itself, as `attn`.
    """
    if len(layer) == 1 and calls_attention(modules[layer[0]]):
        block = "cross" if "cross" in layer[0] else "attn"
        return {block + p.removeprefix(layer[0]): p for p in modules if p == layer[0] or p.startswith(f"{layer[0]}.")}
    found = {}
    for own in layer:
        start = f"{own}." if len(layer) == 1 else f"{own.rpartition('.')[0].rpartition('.')[0]}."
        for path in modules:
            if path.startswith(f"{own}.") or (path == own and len(layer) > 1):
                short = path.removeprefix(start)
                found[short if len(layer) == 1 else re.sub(r"\.\d+", "", short, count=1)] = path
    return found


def stacks_of(modules: Modules, text: Text) -> dict[str, list[Layer]]:
    """Prefix of its common names -> the layers of each stack beside (or nearest to) the word embedding."""
    lists = [p for p, m in modules.items() if _under(p, text.root) and isinstance(m, nn.ModuleList) and _has_layers(m)]
    outermost = [p for p in lists if not any(p.startswith(f"{other}.") for other in lists)]
    nearest = min((p.count(".") for p in outermost), default=0)
    groups = _side_by_side(modules, [p for p in outermost if p.count(".") == nearest])
    sides = _sides([group[0] for group in groups], text)
    return {side: list(_layers(modules, group)) for side, group in zip(sides, groups, strict=True)}


def _under(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def _has_layers(stack: nn.ModuleList) -> bool:
    maps = any(linear_sizes(m) or is_norm(m) for m in stack.modules())
    return maps and (_only_norms(stack) or any(list(layer.children()) for layer in stack))


def _side_by_side(modules: Modules, lists: Sequence[str]) -> list[list[str]]:
    """Lists that together are one stack (XLM: attentions, norms, feed-forwards), since some hold norms alone."""
    groups: dict[tuple[str, int], list[str]] = {}
    for path in lists:
        groups.setdefault((path.rpartition(".")[0], len(list(modules[path].children()))), []).append(path)
    split = ([g] if any(_only_norms(modules[p]) for p in g) else [[p] for p in g] for g in groups.values())
    return [group for part in split for group in part if not all(_only_norms(modules[p]) for p in group)]


def _only_norms(stack: nn.Module) -> bool:
    return all(is_norm(child) for child in stack.children())


def _sides(paths: Sequence[str], text: Text) -> list[str]:
    """The prefixes of several stacks: encoder and decoder where the paths say so, else the paths themselves."""
    if len(paths) == 1:
        return [text.side]
    told = ["decoder." if "decoder" in p else "encoder." if "encoder" in p else "" for p in paths]
    if all(told) and len(set(told)) == len(told):
        return told
    own = (p.removeprefix(f"{text.root}.").split(".") for p in paths)
    return ["".join(f"{piece}." for piece in (p[:-1] if LISTS.fullmatch(p[-1]) else p)) for p in own]


def _layers(modules: Modules, group: Sequence[str]) -> Iterator[Layer]:
    """The layers of a stack; where its members are nothing but lists of layers (ALBERT, Funnel), those are counted."""
    numbers = [name for name, _ in modules[group[0]].named_children()]
    for number in numbers:
        path = f"{group[0]}.{number}"
        inner = _inner_list(modules[path]) if len(group) == 1 else None
        if inner is None:
            yield tuple(f"{p}.{number}" for p in group)
        else:
            below = f"{path}.{inner}" if inner else path
            yield from ((f"{below}.{name}",) for name, _ in modules[below].named_children())


def _inner_list(member: nn.Module) -> str | None:
    """The name of the list that is all a member of a stack has, if its layers are of one class; "" for itself."""
    if isinstance(member, nn.ModuleList):
        return ""
    children = {name: child for name, child in member.named_children() if any(True for _ in child.parameters())}
    name, only = next(iter(children.items()), ("", None))
    alike = isinstance(only, nn.ModuleList) and len({type(layer) for layer in only}) == 1
    return name if len(children) == 1 and alike else None


def _ends(modules: Modules, text: Text, layers: Sequence[str]) -> dict[str, str]:
    """Names of what lies before and behind the layers: the word embedding, its norm, the last norm."""
    if not layers:
        return {text.embed: f"{text.side}embed"} if text.embed else {}
    before, around = _ancestors(text.embed), set.intersection(*(set(_ancestors(path)[1:]) for path in layers))
    named = {text.embed: f"{text.side}embed"} if text.embed else {}
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        if not is_norm(module) or not _under(path, text.root) or any(_under(path, layer) for layer in layers):
            continue
        if parent in before and (parent not in around or OF_EMBEDDING.search(leaf)):
            named[path] = _free(f"{text.side}embed.norm", path, named)
        elif parent in around:
            named[path] = _free(f"{text.side}norm", path.removeprefix(f"{text.root}."), named)
    return named


def _ancestors(path: str) -> list[str]:
    """A path and all it lies in, innermost first."""
    pieces = path.split(".")
    return [".".join(pieces[:n]) for n in range(len(pieces), -1, -1)] if path else [""]


def _free(name: str, path: str, named: Mapping[str, str]) -> str:
    return path if name in named.values() else name
