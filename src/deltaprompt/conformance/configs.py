"""`shrunk(config, plan)`: a config of the same class with every size made small and every relation kept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from inspect import getsource
from typing import TYPE_CHECKING, Any

from deltaprompt.conformance.layers import Kept, kept_layers, speaks_of_layers
from deltaprompt.conformance.sizes import Plan, role_of, shrunk_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOKEN = re.compile(r".*_token_(id|ids|index)|.*(mask|unk|pad|bos|eos)_index")
NOISE = re.compile(r".*(drop|jitter).*|mask_(time|feature)_prob")
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
LOW = 100  # special ids below this stay, those above go to the end of the small vocabulary
FILLED = ("vocabulary", "heads", "kv_heads", "head_dim", "experts", "chosen", "few")  # what a model cannot do without
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
CLIP = 8.0
TOKENS = {"pad_token_id": 0, "mask_token_id": 4}


def starting(cls: type[PreTrainedConfig], asked: Mapping[str, int]) -> PreTrainedConfig:
    """The default config of a class; where its own check refuses that, with what was `asked` in it and its parts."""
    try:
        return cls()
    except Exception:  # configs raise a class of their own
        given: dict[str, Any] = _asked_of(cls, asked)
        for key, spec in cls.sub_configs_defaults.items():
            default = type(spec.default_config)
            if values := _asked_of(default, asked):
                given[key] = default(**values)
        return cls(**given)


def _asked_of(cls: type[PreTrainedConfig], asked: Mapping[str, int]) -> dict[str, int]:
    return {f.name: asked[f.name] for f in fields(cls) if f.name in asked}


def asked_for(message: str) -> dict[str, int]:
    """The numbers that an error of a config asks for."""
    plain = message.replace("`", "")
    found = re.findall(r"(\w+) must be (\d+)", plain) + re.findall(r"requires (\w+)=(\d+)", plain)
    missing = re.search(r"missing required fields: \[(.*?)\]", plain)
    names = re.findall(r"\w+", missing[1]) if missing else []
    return {name: int(number) for name, number in found} | dict.fromkeys(names, 2)


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and all configs in it, outermost first."""
    from transformers import PreTrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def special_ids(config: PreTrainedConfig) -> set[int]:
    """Every id that a config names as a special token."""
    named = [v for part in parts(config) for name, v in vars(part).items() if TOKEN.fullmatch(name)]
    return {i for v in named for i in (v if isinstance(v, list) else [v]) if type(i) is int}


def shrunk(config: PreTrainedConfig, plan: Plan, module: str, asked: Mapping[str, int]) -> PreTrainedConfig:
    """The same class of config made small.

    Args:
        config: the config to start from.
        plan: the sizes.
        module: the module of the model's code, which tells the sorts of layers that the model has.
        asked: numbers that override all others.
    """
    large = sorted(i for i in special_ids(config) if i >= LOW)
    tokens = {old: plan.vocabulary - 1 - new for new, old in enumerate(large)}
    return _shrunk(config, plan, _sorts(module) if plan.fill else (), asked, tokens)


def _sorts(module: str) -> tuple[str, ...]:
    """The sorts of layers that a model's code speaks of."""
    from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES

    code = getsource(import_module(module))
    return tuple(sort for sort in ALLOWED_ATTN_LAYER_TYPES if f'"{sort}"' in code)


def _shrunk(
    config: PreTrainedConfig, plan: Plan, sorts: Sequence[str], asked: Mapping[str, int], tokens: Mapping[int, int]
) -> PreTrainedConfig:
    from transformers import PreTrainedConfig

    source = Source.of(config, plan, sorts)
    small: dict[str, Any] = source.sizes()
    for name, value in source.now.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _shrunk(value, plan, sorts, asked, tokens)
        elif TOKEN.fullmatch(name) and isinstance(value, int | list):
            ids = [tokens.get(i, i) for i in (value if isinstance(value, list) else [value])]
            small[name] = ids if isinstance(value, list) else ids[0]
        elif type(value) in (int, float) and NOISE.fullmatch(name):
            small[name] = type(value)(0)
        elif value is None and name.endswith("_seed"):
            small[name] = 0  # or else hashing is random
        elif name in source.filled:
            small[name] = source.filled[name]
        elif isinstance(value, list | tuple):
            small |= _list(name, value, source, small)
        elif isinstance(value, bool | str | float) and value != source.given[name]:
            small[name] = value
    small |= _asked_of(type(config), asked)
    return type(config)(**small, **source.per_layer(small))


@dataclass(frozen=True)
class Source:
    """A config as it was, and what is known of it."""

    config: PreTrainedConfig
    plan: Plan
    given: Mapping[str, Any]  # the default of every field
    now: Mapping[str, Any]  # its value
    numbers: Mapping[str, int]  # those that are sizes or counts, and not told by others
    filled: Mapping[str, Any]  # what is put where there was nothing
    kept: Kept

    @classmethod
    def of(cls, config: PreTrainedConfig, plan: Plan, sorts: Sequence[str]) -> Source:
        """Reads a config; fields without a value are filled where the plan says so."""
        from transformers import PreTrainedConfig

        common = {f.name for f in fields(PreTrainedConfig)} - {"is_encoder_decoder"}
        own = {f.name: f for f in fields(config) if f.name not in common}
        given = {n: f.default if f.default_factory is MISSING else f.default_factory() for n, f in own.items()}
        now = {n: vars(config).get(config.attribute_map.get(n, n), given[n]) for n in own}
        types = {n: str(f.type) for n, f in own.items()}
        filled = dict(_filled(now, given, types, plan, sorts)) if plan.fill else {}
        numbers = {n: v for n, v in now.items() if type(v) is int and type(given[n]) is int and not TOKEN.fullmatch(n)}
        depth = next((now[n] for n in DEPTHS if type(now.get(n)) is int), 0)
        lists = {n: v for n, v in now.items() if speaks_of_layers(n, v, depth)}
        kept = kept_layers(lists, depth, plan.layers, plan.each)
        if "layer_types" in filled:
            kept = Kept(depth, tuple(range(len(filled["layer_types"]))))
        return cls(config, plan, given, now, numbers, filled, kept)

    def sizes(self) -> dict[str, int]:
        """The small numbers, each told by its own name or by the common one that the class maps to it."""
        small = self.shrink(self.numbers)
        small |= {n: self.kept.count(v) for n, v in self.numbers.items() if role_of(n) == "some layers"}
        return small | {n: len(self.kept.layers) for n in self.numbers if n in DEPTHS and self.kept.depth}

    def shrink(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Numbers of this config made small."""
        called = {actual: common for common, actual in self.config.attribute_map.items()}
        common = {n: called.get(n, n) if role_of(n) is None else n for n in numbers}
        sizes = shrunk_numbers({common[n]: v for n, v in numbers.items()}, self.plan)
        return {n: sizes[common[n]] for n in numbers}

    def per_layer(self, small: Mapping[str, Any]) -> dict[str, Any]:
        """What single layers have of their own, for the layers that are kept."""
        single = {int(i): own for i, own in (self.config.to_dict().get("per_layer_config") or {}).items()}
        found = {new: self._own(single[old], small) for new, old in enumerate(self.kept.layers) if old in single}
        return {"per_layer_config": found} if single else {}

    def _own(self, own: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
        """One layer's own values: a multiple of the common value stays that multiple."""
        numbers = {n: v for n, v in own.items() if type(v) is int}
        sizes = self.shrink({**self.numbers, **numbers})
        new = dict(own)
        for name, value in numbers.items():
            common = self.numbers.get(name, 0)
            whole = common and (value % common == 0 or common % value == 0)
            new[name] = max(small[name] * value // common, 1) if whole and value != common else sizes[name]
        told = {n: v for n, v in sizes.items() if role_of(n) == "head_dim" and n not in own and v != small[n]}
        return new | told


def _filled(
    now: Mapping[str, Any], given: Mapping[str, Any], types: Mapping[str, str], plan: Plan, sorts: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """A value for fields that have none and that a model cannot do without."""
    for name, value in now.items():
        role, plural = role_of(name), name.removeprefix("default_") + "s"
        if name == "layer_types" and given[name] is None and set(value or ()) <= {"linear_attention"}:
            yield name, list(sorts)
        elif name == "rope_parameters" and value == {} and isinstance(now.get("layer_types"), list):
            yield name, {sort: dict(ROPE) for sort in now["layer_types"]}
        elif value is not None:
            continue
        elif name in TOKENS:
            yield name, TOKENS[name]
        elif role in FILLED and "int" in types[name]:
            yield name, plan.of(role)
        elif "list[int]" in types[name] and "layer" in name:
            yield name, [plan.layers - 1]
        elif "float" in types[name] and "clip" in name:
            yield name, CLIP
        elif "str" in types[name] and isinstance(now.get(plural), list | tuple):
            yield name, now[plural][0]


def _list(name: str, value: Sequence[Any], source: Source, small: Mapping[str, Any]) -> dict[str, Any]:
    """A list made small: by layers, by what its numbers sum to, or each sort once; nothing where it may stay."""
    numbers = source.numbers
    whole = bool(value) and all(type(v) is int for v in value)
    new: list[Any] = []
    if speaks_of_layers(name, value, source.kept.depth):
        new = [_made_small(name, v, source) for v in source.kept.of(value)]
    elif value and all(isinstance(v, str) for v in value) and len(set(value)) < len(value):
        new = list(dict.fromkeys(value))
    elif value and all(isinstance(v, list) and len(v) == 2 and type(v[1]) is int for v in value):
        new = [[sorts, 1] for sorts, _ in value]  # sorts of layers and how often they come
    elif whole and role_of(name) == "layers":
        new = [1] * len(value)
    elif whole and (total := next((n for n, v in numbers.items() if v == sum(value)), None)):
        new = [max(v * small[total] // numbers[total], 1) for v in value]
    return {name: tuple(new) if isinstance(value, tuple) else new} if new else {}


def _made_small(name: str, value: Any, source: Source) -> Any:
    """A layer's own width, where a width is given for every layer."""
    role = role_of(name)
    return min(value, source.plan.of(role)) if type(value) is int and role in ("inner", "width", "heads") else value
