"""The places of a backbone where a delta may act, under names that are alike for every family, and their selectors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaprompt.errors import SiteError, nearest


@dataclass(frozen=True, slots=True)
class Part:
    """Columns `[start, start + size)` of each of `groups` equal groups of a fused map's output."""

    groups: int
    start: int
    size: int

    def take(self, y: Tensor) -> Tensor:
        """The part's columns: [..., out] -> [..., groups * size]."""
        grouped = y.unflatten(-1, (self.groups, -1))
        return grouped[..., self.start : self.start + self.size].flatten(-2)

    def put(self, y: Tensor, part: Tensor) -> Tensor:
        """`y` with the part's columns replaced (a new tensor)."""
        grouped = y.unflatten(-1, (self.groups, -1))
        new = part.unflatten(-1, (self.groups, -1)).to(y.dtype)
        return grouped.slice_scatter(new, -1, self.start, self.start + self.size).flatten(-2)


@dataclass(frozen=True, slots=True)
class Site:
    """A named place: a module of the backbone, or a part of a fused map's output, with its sizes."""

    name: str  # layers.3.attn.q
    path: str  # encoder.layer.3.attention.self.query, in the whole model
    kind: str  # linear, norm, embed, attn (what calls attention), ffn (a feed-forward block), layer (a whole one)
    inputs: int  # size of what enters (for embed: rows; for attn: 0)
    outputs: int  # size of what leaves (for attn: heads of k and v times the size of a key)
    heads: int = 0  # attn only: heads of k and v; 0 where they are not known
    part: Part | None = None
    entry: str = ""  # ffn only: path of the map where the block's input enters
    biased: bool = False  # linear and norm: whether the module has a bias
    values: int = 0  # attn only: heads times the size of a value, which latent attention has apart from a key's

    def among(self, selectors: Iterable[str]) -> bool:
        """Whether one of the selectors, layer ranges aside, speaks of this site."""
        return any(self.spoken_of(selector) is not None for selector in selectors)

    def spoken_of(self, selector: str) -> re.Match[str] | None:
        """The match of a selector, or of one of its alternatives, with this site's name or path; ranges aside."""
        if selector.startswith("re:"):
            return _expression(selector).search(self.name)
        matches = (self._called(one) for one in alternatives(selector))
        return next((match for match in matches if match is not None), None)

    def _called(self, plain: str) -> re.Match[str] | None:
        """By path (not where it is that of a block's last map, which is a site of its own) or by name."""
        own = re.fullmatch(re.escape(plain), self.path) if self.entry in ("", self.path) else None
        return own or _compiled(plain)[0].fullmatch(self.name)


def alternatives(selector: str) -> list[str]:
    """The selectors that `a|b|c` offers, of which a layer's first is meant; a `re:…` stays as it is."""
    return [selector] if selector.startswith("re:") else selector.split("|")


def layer_of(name: str) -> str:
    """The layer of a site's name; nothing where it lies in none."""
    found = re.match(r"(?:.*\.)?layers\.\d+(?=\.|$)", name)
    return found[0] if found else ""


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear map of any make (Linear, Conv1D, quantised ones that keep the two names), else None."""
    known = vars(module)
    if "in_features" in known and "out_features" in known:
        return None if _does_more(module) else (int(known["in_features"]), int(known["out_features"]))
    if "nx" in known and "nf" in known:
        return int(known["nx"]), int(known["nf"])
    return None


@torch.no_grad()
def _does_more(module: nn.Module) -> bool:
    """Whether a model's own kind of Linear is no linear map: a router that chooses, or several maps side by side."""
    if not isinstance(module, nn.Linear) or not _is_own_kind(module, nn.Linear):
        return False
    x = _probe(module.weight, module.weight.shape[1])
    try:
        y, plain = type(module).forward(module, x), functional.linear(x, module.weight, module.bias)
        return not isinstance(y, Tensor) or y.shape != plain.shape or not torch.allclose(y, plain, rtol=1e-2, atol=1e-3)
    except (RuntimeError, ValueError, IndexError):
        return module.weight.device.type != "meta"


@torch.no_grad()
def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises a vector and rescales it: called a norm, with a weight [d] and vectors only."""
    weights = dict(module.named_parameters(recurse=False))
    if "weight" not in weights or any(w.ndim != 1 for w in weights.values()):
        return False
    if "norm" not in type(module).__name__.lower():
        return False
    if isinstance(module, nn.LayerNorm) and _is_own_kind(module, nn.LayerNorm):
        x = _probe(weights["weight"], weights["weight"].numel())
        try:
            return type(module).forward(module, x).shape == x.shape
        except RuntimeError:  # SqueezeBERT's norms a vector that does not come last
            return weights["weight"].device.type == "meta"
    return True


def _is_own_kind(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a model's class made another forward of torch's own."""
    cls = type(module)
    return cls.forward is not kind.forward and "transformers.models" in cls.__module__


def _probe(like: Tensor, size: int) -> Tensor:
    """Two vectors [1, 2, size]."""
    return torch.linspace(-1.0, 1.0, 2 * size, dtype=like.dtype, device=like.device).view(1, 2, -1)


def is_turned(module: nn.Module) -> bool:
    """Whether a linear map keeps its weight as [in, out] (GPT-2's Conv1D)."""
    return "nx" in vars(module)


def _piece(text: str) -> str:
    """One piece of a selector as a regular expression: `*` is anything, `[…]` a captured layer number."""
    if text == "*":
        return r".*"
    if text.startswith("["):
        return r"\.(\d+)"
    return re.escape(text)


@lru_cache(maxsize=1024)
def _expression(selector: str) -> re.Pattern[str]:
    """The regular expression of a selector `re:…`."""
    try:
        return re.compile(selector.removeprefix("re:"))
    except re.error as e:
        raise SiteError(f"selector {selector!r} is not a regular expression: {e}") from e


@lru_cache(maxsize=1024)
def _compiled(selector: str) -> tuple[re.Pattern[str], tuple[slice | int, ...]]:
    """The pattern of a selector and the ranges that its captured numbers must lie in."""
    ranges: list[slice | int] = []
    for text in re.findall(r"\[([^\]]*)\]", selector):
        numbers = text.split(":")
        if (
            not all(re.fullmatch(r"-?\d*", n) for n in numbers)
            or len(numbers) > 3
            or text in ("", "-")
            or numbers[2:] == ["0"]
        ):
            raise SiteError(f"selector {selector!r}: [{text}] is no index or range; write [3], [8:], [:4] or [-2:]")
        ranges.append(int(text) if len(numbers) == 1 else slice(*(int(n) if n else None for n in numbers)))
    pieces = re.findall(r"\[[^\]]*\]|\*|[^*\[]+", selector)
    return re.compile(r"(?:.*\.)?" + "".join(map(_piece, pieces))), tuple(ranges)


def _within(number: int, wanted: slice | int, count: int) -> bool:
    if isinstance(wanted, int):
        return number == (wanted if wanted >= 0 else count + wanted)
    return number in range(count)[wanted]


@dataclass(frozen=True)
class Sites(Mapping[str, Site]):
    """All sites of a backbone by name, in the order of the model's modules."""

    by_name: Mapping[str, Site]

    def __getitem__(self, name: str) -> Site:
        if name not in self.by_name:
            raise SiteError(f"no site {name!r}{nearest(name, self.by_name)}")
        return self.by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self.by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    @property
    def roles(self) -> tuple[str, ...]:
        """The site names with the layer numbers taken out: `attn.q`, `ffn.down`, `embed`, …"""
        short = (re.sub(r"^(?:.*\.)?layers\.\d+(\.|$)", "", name) or "layers[:]" for name in self.by_name)
        return tuple(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", role) for role in short))

    @cached_property
    def layer_counts(self) -> dict[str, int]:
        """The number of layers of each stack, by its prefix (`""`, `"encoder."`, `"decoder."`)."""
        counts: dict[str, int] = {}
        for name in self.by_name:
            if found := re.match(r"(.*?)layers\.(\d+)(?:\.|$)", name):
                counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
        return counts

    def select(self, selectors: Iterable[str]) -> list[Site]:
        """The sites that any selector matches, in the model's order. A selector that matches nothing is an error."""
        chosen: set[str] = set()
        for selector in selectors:
            found = self.matching(selector)
            if not found and "" not in alternatives(selector)[1:]:
                raise SiteError(self._no_match(selector))
            chosen.update(found)
        return [site for name, site in self.by_name.items() if name in chosen]

    def matching(self, selector: str) -> list[str]:
        """The names that a selector matches: a common name or its end, `*`, `layers[8:]`, `re:…`, or a module path.

        Of alternatives `a|b|c` it is, in each layer, the first that matches anything there; `a|` may match nothing.
        """
        chosen: dict[str, list[str]] = {}
        for one in filter(None, alternatives(selector)):
            found: dict[str, list[str]] = {}
            for name, site in self.by_name.items():
                if self._matches(one, site):
                    found.setdefault(layer_of(name), []).append(name)
            chosen = found | chosen
        taken = {name for names in chosen.values() for name in names}
        return [name for name in self.by_name if name in taken]

    def _matches(self, selector: str, site: Site) -> bool:
        """Whether one selector, layer ranges included, speaks of a site."""
        match = site.spoken_of(selector)
        if match is None or match.string != site.name or selector.startswith("re:"):
            return match is not None
        counts = self.layer_counts
        for group, wanted in enumerate(_compiled(selector)[1], start=1):
            stack = site.name[: match.start(group)].removesuffix("layers.")
            if not _within(int(match[group]), wanted, counts.get(stack, 0)):
                return False
        return True

    def _no_match(self, selector: str) -> str:
        tried = alternatives(selector)
        what = (
            f"selector {selector!r} matches no site"
            if len(tried) == 1
            else (f"none of the alternatives {', '.join(map(repr, tried))} of selector {selector!r} matches a site")
        )
        return (
            f"{what} of this backbone{nearest(tried[0], self.roles)} `deltaprompt inspect` prints the tree of all sites"
        )
