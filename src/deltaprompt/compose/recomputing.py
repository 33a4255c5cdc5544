"""Gradient checkpointing: a layer that is computed again in the backward pass has the slots of its own forward pass.

transformers (>= 5) runs a layer through a function on it where its switch is on. A hook in front of every layer puts
ours around that function, whoever turned the switch on and whenever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaprompt.compose.routing import Index, Routing
from deltaprompt.errors import ConfigError

FUNCTION = "_gradient_checkpointing_func"  # the name that transformers gives it, on a layer
AGAIN = partial(checkpoint, use_reentrant=False)
SHARE = 0.75  # of the layers: on BERT base 0.30 × the bytes and 1.38 × the operations; of all, 0.07 × and 1.50 ×


class Recomputing:
    """What the layers of an `Adapted` do where they are computed again."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.always = False  # also where the backbone is not training, whose dropout then stays off

    def enter(self, layer: Any, args: tuple[Any, ...]) -> None:
        """The hook in front of a layer."""
        if not layer.gradient_checkpointing:
            return
        own = vars(layer)[FUNCTION]
        if not isinstance(own, Around):
            own = vars(layer)[FUNCTION] = Around(own)
        if self.routing not in own.routings:
            own.routings.append(self.routing)
        if self.always and not layer.training and torch.is_grad_enabled():
            layer.training = own.resting = True  # transformers looks at this in its next line; `Around` takes it back

    def leave(self, layer: nn.Module) -> None:
        """A layer has the function again that it had."""
        own = vars(layer).get(FUNCTION)
        if isinstance(own, Around) and self.routing in own.routings:
            own.routings.remove(self.routing)
            vars(layer)[FUNCTION] = own if own.routings else own.function


class Around:
    """A checkpointing function whose layer runs, the first time and again, in the slots of the first time."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.routings: list[Routing] = []  # of all that are attached to the layer's model
        self.resting = False  # whether the layer is training only as far as transformers looks

    def __call__(self, forward: partial[Any], *args: Any) -> Any:
        if self.resting:
            forward.args[0].training = self.resting = False
        if self._reentrant() and torch.is_grad_enabled():
            args = _differentiable(args)
        return self.function(partial(self._in, [routing.index for routing in self.routings], forward), *args)

    def _in(self, indices: Sequence[Index], forward: Callable[..., Any], *args: Any) -> Any:
        with ExitStack() as slots:
            for routing, index in zip(self.routings, indices, strict=True):
                slots.enter_context(routing.at(index))
            return forward(*args)

    def _reentrant(self) -> bool:
        """Whether PyTorch's older form may be asked for, which gives no gradient where no input has one."""
        return not isinstance(self.function, partial) or self.function.keywords.get("use_reentrant") is not False


def rest(layers: Sequence[Any], changed: Iterable[nn.Module], share: float) -> None:
    """From the lowest layer that deltas change, a share is computed again, and the last ones keep what they have.

    Below it nothing is kept anyway. What is in no layer counts as below all of them.
    """
    within = [set(layer.modules()) for layer in layers]
    lowest = min((next((n for n, inner in enumerate(within) if m in inner), 0) for m in changed), default=0)
    for layer in layers[lowest + max(1, int(share * (len(layers) - lowest))) :]:
        layer.gradient_checkpointing = False


def has_own_backward(model: nn.Module) -> bool:
    """Whether a model's code has a backward pass of its own (Reformer), which needs an input with a gradient."""
    code = vars(sys.modules[type(model).__module__]).values()
    return any(isinstance(found, type) and issubclass(found, torch.autograd.Function) for found in code)


def differentiable(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """The hook behind an embedding: what leaves it has a gradient, though it is frozen."""
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def _differentiable(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A layer's inputs, of which one has a gradient: behind a frozen embedding none would."""
    if any(isinstance(t, Tensor) and t.requires_grad for t in args):
        return args
    first = next((i for i, t in enumerate(args) if isinstance(t, Tensor) and t.is_floating_point()), None)
    if first is None:
        raise ConfigError(
            "reentrant checkpointing reaches no delta here: this model gives its layers their states by name. Turn it "
            "on with use_reentrant=False"
        )
    return (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
