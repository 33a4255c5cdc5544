"""From states to scores of chosen vocabulary rows: the language model's own head, only where it is needed.

`Head.logits(states, rows)` equals `model(...).logits[..., rows]` for the same states. A model's head is found by
watching it: the model is run with states of ours in place of those its base would give, so nothing but the head does
any work. Mostly it is a chain of modules with a factor here and there, and is replayed without forming the scores of
the other rows (`Chain`); where it is not, the model runs it (`Whole`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from deltaprompt.backbone.fused import FAILURES, at_rest
from deltaprompt.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALES = (0.01, 1.0, 8.0)  # sizes of the states a head is watched at: a cap of the scores bends only large ones
EACH = 2  # states of each size
SOME = 1024  # scores of a state that factors are told by
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-5}  # of the largest score; coarser types 3e-2
COARSE = 3e-2


class Head(ABC):
    """The scores of the vocabulary at states."""

    width: int  # d, of the states
    size: int  # V, of the vocabulary
    out: nn.Module | None  # the output embedding

    @abstractmethod
    def logits(self, states: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores of the vocabulary `rows` [n] (all where None) at states [..., d] -> [..., n]."""


@dataclass(frozen=True)
class Chain(Head):
    """The modules between a model's states and its vocabulary scores, one after the other."""

    front: tuple[nn.Module, ...]  # applied in turn to the states
    holder: nn.Module  # then this one, which is, or holds, the output embedding
    behind: tuple[nn.Module, ...]  # then these, score by score
    out: nn.Linear
    out_path: str  # of the output embedding within its holder; "" if it is that module
    width: int
    size: int
    before: float = 1.0  # factor on the states (T5)
    scale: float = 1.0  # factor on the scores (Cohere, Granite)
    softcap: float | None = None  # c * tanh(scores / c) (Gemma 2)
    biased: nn.Module | None = None  # the model, where its buffer is added to the scores (BART)
    bias: str = ""  # the buffer's name
    narrow: bool = True  # whether the holder can run with a few rows of the output embedding alone

    def logits(self, states: Tensor, rows: Tensor | None = None) -> Tensor:
        x = states * self.before if self.before != 1.0 else states
        for module in self.front:
            x = _first(module(x))
        scores = self._scored(x, rows)
        for module in self.behind:
            scores = _first(module(scores))
        scores = scores * self.scale if self.scale != 1.0 else scores
        if self.biased is not None:
            bias = self.biased.get_buffer(self.bias).reshape(-1)
            scores = scores + (bias if rows is None else bias[rows])
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def _scored(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """The holder on x; a delta at the output embedding needs all rows, otherwise only `rows` are formed."""
        x = x if self.out_path else x.to(self.out.weight.dtype)
        if rows is None:
            return _first(self.holder(x))[..., : self.size]
        if not self.narrow or self.out._forward_hooks or self.out._forward_pre_hooks:
            return _first(self.holder(x))[..., rows]
        if not self.out_path:
            return functional.linear(x, self.out.weight[rows], None if self.out.bias is None else self.out.bias[rows])
        tall = dict(self.holder.named_parameters(remove_duplicate=False))
        narrowed = {name: p[rows] for name, p in tall.items() if len(p) == self.out.out_features}
        return _first(functional_call(self.holder, narrowed, (x,), tie_weights=False))


@dataclass(frozen=True)
class Whole(Head):
    """The model's own code from states to scores: it runs with the states in place of those its base would give."""

    model: PreTrainedModel
    base: nn.Module
    out: nn.Module | None
    width: int
    size: int

    def logits(self, states: Tensor, rows: Tensor | None = None) -> Tensor:
        scores = own_scores(self.model, self.base, states.reshape(1, -1, states.shape[-1]))
        scores = scores.reshape(*states.shape[:-1], -1)
        return scores if rows is None else scores[..., rows]


def find_head(model: PreTrainedModel, bases: Sequence[nn.Module], config: Mapping[str, Any]) -> Head:
    """The head of a language model whose states come from the first of `bases` that it calls.

    Raises:
        BackboneError: the model has no head, or its scores are no function of its states.
    """
    name = type(model).__name__
    bases = [base for base in bases if base is not model]
    if not bases:
        raise BackboneError(f"{name} has no language-model head; load it with kind='encoder'")
    out = model.get_output_embeddings()
    with torch.no_grad(), at_rest(model):
        tries = ((base, _watched(model, base, out, width)) for base in bases for width in widths(config, out))
        base, watched = next(((base, found) for base, found in tries if found is not None), (bases[0], None))
        if watched is None:
            raise BackboneError(
                f"{name}: its scores cannot be computed from the states of {type(base).__name__} alone, so it cannot "
                "be asked for words. Load it with kind='encoder', which needs no scores"
            )
        whole = Whole(model, base, out, watched.states.shape[-1], watched.scores.shape[-1])
        return _chain(model, watched, whole, config) or whole


def widths(config: Mapping[str, Any], out: nn.Module | None = None) -> list[int]:
    """Sizes that the states may have: the model's, the output embedding's, two streams' (Reformer), the scores'."""
    sizes = [config.get(name) for name in ("hidden_size", "d_model", "n_embd", "dim", "emb_dim")]
    hidden = [size for size in sizes if isinstance(size, int)]
    rows = list(_weight_of(out).shape[::-1]) if _weight_of(out) is not None else []
    return list(dict.fromkeys([*hidden[:1], *rows[:1], *hidden, *(2 * size for size in hidden), *rows[1:]]))


# Watching a head


class _Given(tuple[Tensor]):
    """What a base gives, as far as heads ask: the states, by the names that they have, and nothing else."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name in ("last_hidden_state", "logits") else None


@dataclass(frozen=True)
class _Call:
    """A module that a head called, with what entered and left it."""

    module: nn.Module
    entered: Tensor
    left: Tensor
    plain: bool  # nothing but one tensor entered


@dataclass(frozen=True)
class _Watched:
    """States [1, n, d], the scores [1, n, V] that the model gave for them, and the modules it called on the way."""

    states: Tensor
    scores: Tensor
    calls: Sequence[_Call]


def own_scores(
    model: PreTrainedModel, base: nn.Module, states: Tensor, called: Callable[[], None] = lambda: None
) -> Tensor:
    """What the model's own head makes of states [1, n, d]: scores [1, n, V]; `called` when it asks for the states."""
    ids = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
    inputs = {"input_ids": ids, "attention_mask": ids}
    with _standing_in(base, states, called):
        if not model.config.is_encoder_decoder or not _is_decoder(model, base):
            return _logits_of(model(**inputs))
        encoder = model.get_encoder()
        own = vars(encoder).get("config", model.config).get_text_config().to_dict()
        nothing = states.new_zeros(1, states.shape[1], widths(own)[0])
        with _standing_in(encoder, nothing):
            return _logits_of(model(**inputs, decoder_input_ids=ids))


def _is_decoder(model: PreTrainedModel, base: nn.Module) -> bool:
    return any(module is base for module in model.get_decoder().modules())


def _logits_of(given: Any) -> Tensor:
    return given[0] if isinstance(given, tuple) else given.logits


@contextmanager
def _standing_in(module: nn.Module, states: Tensor, called: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within it a module gives these states, whatever it is called with."""
    own = vars(module)
    kept = own.get("forward")

    def give(*args: Any, **kwargs: Any) -> _Given:
        called()
        return _Given((states,))

    own["forward"] = give
    try:
        yield
    finally:
        if kept is None:
            del own["forward"]
        else:
            own["forward"] = kept


def _weight_of(out: nn.Module | None) -> Any:
    return None if out is None else dict(out.named_parameters(recurse=False)).get("weight")


def _watched(model: PreTrainedModel, base: nn.Module, out: nn.Module | None, width: int) -> _Watched | None:
    """The model's head at random states of a width; None where it cannot be run at these."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(1, EACH, width, generator=generator).to(like.device, like.dtype)
    states = torch.cat([random * scale for scale in SCALES], dim=1)
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        if given and isinstance(given[0], Tensor) and isinstance(_first(y), Tensor):
            calls.append(_Call(module, given[0], _first(y), len(given) == 1))

    handles: list[Any] = []
    try:
        alone = own_scores(model, base, states[:, 1:2])
        handles += [m.register_forward_hook(note, with_kwargs=True) for m in _beside(model, base)]
        scores = own_scores(model, base, states, calls.clear)
    except FAILURES:
        return None
    finally:
        for handle in handles:
            handle.remove()
    weight = _weight_of(out)
    size = scores.shape[-1] if scores.ndim == 3 and scores.shape[1] == states.shape[1] else 0
    fits = size == width if weight is None else size == len(weight)
    if not size or (size == width and not fits) or not _close(alone, scores[:, 1:2]):
        return None
    return _Watched(states, scores, calls)


def _beside(model: nn.Module, base: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules of a model that neither lie in its base nor hold it."""
    for child in model.children():
        if child is not base and any(module is base for module in child.modules()):
            yield from _beside(child, base)
        elif child is not base:
            yield child


# From what was watched to a chain


def _chain(model: PreTrainedModel, watched: _Watched, whole: Whole, config: Mapping[str, Any]) -> Chain | None:
    """The calls as a chain with its factors, where that gives the same scores; None where not."""
    out, modules = whole.out, [call.module for call in watched.calls]
    at = next((i for i, m in enumerate(modules) if any(inner is out for inner in m.modules())), None)
    if at is None or not isinstance(out, nn.Linear) or not all(call.plain for call in watched.calls):
        return None
    holder = modules[at]
    path = next(name for name, module in holder.named_modules() if module is out)
    own = (n for n, b in model.named_buffers(recurse=False) if "bias" in n and b.numel() == whole.size)
    bias = next(own, "")
    chain = Chain(
        tuple(modules[:at]),
        holder,
        tuple(modules[at + 1 :]),
        out,
        path,
        whole.width,
        whole.size,
        biased=model if bias else None,
        bias=bias,
    )
    numbers = _numbers(config, model.config.to_dict())
    try:
        fitted = _with_factors(chain, watched, numbers)
        return fitted if fitted is None or _narrows(fitted, watched) else replace(fitted, narrow=False)
    except FAILURES:
        return None


def _with_factors(chain: Chain, watched: _Watched, numbers: Sequence[float]) -> Chain | None:
    """The chain with the factors and the cap that give the model's own scores, as its config names them."""
    before = _ratio(watched.calls[0].entered, watched.states, numbers)
    plain = replace(chain, before=before, biased=None).logits(watched.states)
    if plain.shape != watched.scores.shape:
        return None
    added = 0.0 if chain.biased is None else chain.biased.get_buffer(chain.bias).reshape(-1)
    straight = watched.scores - added
    scale = _ratio(straight[:, :EACH, :SOME], plain[:, :EACH, :SOME], numbers)  # where a cap does not bend them
    found = plain * scale + added
    caps = [None, *(number for number in numbers if number > 1)]
    errors = [float((_cap(found, cap) - watched.scores)[..., :SOME].abs().max()) for cap in caps]
    best = min(range(len(caps)), key=errors.__getitem__)
    cap = None if errors[0] <= 2 * errors[best] else caps[best]
    fitted = replace(chain, before=before, scale=scale, softcap=cap)
    return fitted if _close(_cap(found, cap), watched.scores) else None


def _cap(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else torch.tanh(scores / cap) * cap


def _narrows(chain: Chain, watched: _Watched) -> bool:
    """Whether a few rows can be asked for without the others."""
    rows = torch.tensor([chain.size - 1, 0, chain.size // 2], device=watched.states.device)
    try:
        return _close(chain.logits(watched.states, rows), watched.scores[..., rows])
    except FAILURES:
        return False


def _numbers(*configs: Mapping[str, Any]) -> list[float]:
    """All numbers that a config names, its parts' too."""
    found: dict[float, None] = {}
    for config in configs:
        for value in config.values():
            if isinstance(value, Mapping):
                found |= dict.fromkeys(_numbers(value))
            elif isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6:
                found[float(value)] = None
    return list(found)


def _ratio(left: Tensor, right: Tensor, numbers: Sequence[float]) -> float:
    """The factor between two tensors, as exactly as the config's numbers tell it: v, 1 / v, √v, 1 / √v."""
    if left.shape != right.shape:
        return 1.0
    ratio = float((left.double() / right.double()).nan_to_num(nan=1.0).median())
    within = 1e-4 if left.dtype in CLOSE else COARSE
    if abs(ratio - 1) < within:
        return 1.0
    named = (n for v in numbers for n in (v, 1 / v, v**0.5, v**-0.5))
    nearest = min(named, key=lambda n: abs(n / ratio - 1), default=ratio)
    simple = float(Fraction(ratio).limit_denominator(4096))
    return nearest if abs(nearest / ratio - 1) < within else simple if abs(simple / ratio - 1) < 1e-6 else ratio


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to what their type can hold."""
    if one.shape != other.shape:
        return False
    within = CLOSE.get(other.dtype, COARSE) if one.dtype in CLOSE else COARSE
    return float((one.double() - other.double()).abs().max()) <= within * (1 + float(other.abs().max()))


def _first(y: Any) -> Any:
    """A module's output, or the first of several (XLM)."""
    return y[0] if isinstance(y, tuple) else y
