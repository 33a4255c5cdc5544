"""What an estimator has learned, small and apart from the backbone, which all estimators of a process share.

A backbone carries the deltas of one estimator at a time; when another one is asked, its deltas take their place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from deltaprompt import registry, store
from deltaprompt.backbone import Backbone, Kind, load
from deltaprompt.backbone.load import usual_device
from deltaprompt.compose import carries_deltas
from deltaprompt.defaults import deltas_for
from deltaprompt.deltas._base import Delta
from deltaprompt.estimators._input import ParameterError, plain, told
from deltaprompt.model.saved import check, fill, identity, rebuilt, record_of, tensors
from deltaprompt.model.trainable import Trainable
from deltaprompt.templates import parse
from deltaprompt.trainer import Silent, Training, fit
from deltaprompt.trainer.possible import count_or_none, number
from deltaprompt.types import Example

Device: TypeAlias = str | torch.device | None
Sets: TypeAlias = tuple[Sequence[Example], Sequence[Example] | None]  # to train on, and to choose by

DTYPE: Final = "float32"
NONE: Final = "none"  # as deltas: no delta


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What is kept of a fitted estimator; it pickles, without its backbone and without code.

    Args:
        record: what is asked of which backbone, and how it was trained: plain values.
        tensors: what was learned, by name.
    """

    record: Mapping[str, Any]
    tensors: Mapping[str, NDArray[Any]]

    def save(self, folder: str | Path) -> int:
        """Keeps it in a folder that `dp.open` and `deltaprompt predict` read; the bytes written."""
        return store.write(folder, self.record, self.as_torch())

    def as_torch(self) -> dict[str, torch.Tensor]:
        """The tensors as PyTorch's own."""
        return {name: torch.tensor(array) for name, array in self.tensors.items()}


@dataclass(eq=False)
class Place:
    """A backbone of this process, and whose deltas are on it."""

    backbone: Backbone
    holder: Adaptation | None = None
    model: Trainable | None = None
    known: dict[bool, dict[str, Any]] = field(default_factory=dict)  # what tells the backbone, by whether chats count

    def identity(self, template: str) -> Mapping[str, Any]:
        """What tells the backbone; its weights never change here, so they are looked at once."""
        chat = parse(template).is_chat
        if chat not in self.known:
            self.known[chat] = identity(self.backbone, template)
        return self.known[chat]

    def clear(self) -> None:
        """Takes the deltas off the backbone."""
        model, self.holder, self.model = self.model, None, None
        if model is not None:
            model.adapted.remove()

    def learn(self, make: Callable[[Backbone], Trainable], sets: Sets, training: Training, seed: int) -> Adaptation:
        """What a model learns, which stays on the backbone."""
        with self._taken():
            self.model = model = make(self.backbone)
            run = fit(model, *sets, training=training, seed=seed, progress=Silent())
            kept, same = tensors(model), self.identity(model.record()["template"])
            record = record_of(model, kept, same, training={"run": run.record()}, metrics={"dev": run.best})
            arrays = {name: tensor.detach().cpu().numpy().copy() for name, tensor in kept.items()}
            self.holder = Adaptation(record, arrays)
        return self.holder

    def hold(self, adaptation: Adaptation, what: str) -> Trainable:
        """The model of an adaptation, put on the backbone where it is not.

        Raises:
            StoreError: the backbone is not the one that it was made for.
        """
        if self.model is None or self.holder is not adaptation:
            check(adaptation.record, self.identity(adaptation.record["template"]), what)
            with self._taken():
                self.model = rebuilt(adaptation.record, self.backbone, what)
                fill(self.model, adaptation.as_torch())
                self.holder = adaptation
        return self.model

    @contextmanager
    def _taken(self) -> Iterator[None]:
        """Within it the backbone, bare at first, is given deltas; where that fails it is bare again."""
        self.clear()
        try:
            yield
        except BaseException:
            self.clear()
            if carries_deltas(self.backbone.model):  # of a model that broke while it was made, and cannot be removed
                _forget(self)
            raise


Key: TypeAlias = tuple[str, Kind | None, str, str]
_ONE_AT_A_TIME: Final = RLock()  # loads, trains or answers: a backbone has one holder, and PyTorch one random state
_PLACES: Final[dict[Key, Place]] = {}


@contextmanager
def alone() -> Iterator[None]:
    """Within it no other thread's estimator is at work."""
    with _ONE_AT_A_TIME:
        yield


def place_of(backbone: Any, kind: Kind | None, device: Device) -> Place:
    """The backbone of that name, loaded where this process has not loaded it yet."""
    if not isinstance(backbone, str | Path):
        raise ParameterError(
            f"backbone is {told(backbone)}; give its name, as in 'roberta-base', its folder, or 'demo': every process "
            "loads it by itself, once"
        )
    where = str(Path(backbone).resolve()) if os.path.isdir(backbone) else str(backbone)
    on = str(device or usual_device())
    if (where, kind, on, DTYPE) not in _PLACES:
        _check_device(on)
        place = Place(load(backbone, kind=kind, device=on, dtype=DTYPE))
        place = _PLACES.setdefault((where, place.backbone.kind, on, DTYPE), place)
        _PLACES[where, kind, on, DTYPE] = place
    return _PLACES[where, kind, on, DTYPE]


def release() -> None:
    """Lets go of every backbone that estimators have loaded; one that is needed again is loaded again."""
    with alone():
        for place in set(_PLACES.values()):
            place.clear()
        _PLACES.clear()


def _forget(place: Place) -> None:
    for key in [key for key, value in _PLACES.items() if value is place]:
        del _PLACES[key]


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ParameterError(f"device = {device!r} cannot be used here ({reason}); possible: {usual_device()}") from e


# Parameters


def training_of(epochs: Any, steps: Any, batch_size: Any, learning_rate: Any) -> Training:
    """How to train, from parameters that a grid may give as numbers of numpy's."""
    return Training(
        epochs=plain(epochs), steps=plain(steps), batch_size=plain(batch_size), learning_rate=plain(learning_rate)
    )


def length_of(max_length: Any) -> int | None:
    """Tokens of a sequence at most."""
    if not count_or_none(length := plain(max_length)):
        raise ParameterError(f"max_length is {told(max_length)}; it is a whole number of tokens, 1 or more, or None")
    return length


def share_of(dev_share: Any) -> float | None:
    """The share of the samples to choose by."""
    share = plain(dev_share)
    if share is not None and not (number(share) and 0 < share < 1):
        raise ParameterError(
            f"dev_share is {told(dev_share)}; it is a share between 0 and 1, for example 0.2, of the samples to choose "
            "the best epoch by; or None to train on all of them to the end"
        )
    return share


def seed_of(random_state: Any) -> int:
    """A seed: the one given, or one drawn from a generator of numpy's."""
    given = plain(random_state)
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    if given is None:
        return int(np.random.randint(2**31 - 1))
    if isinstance(given, np.random.RandomState):
        return int(given.randint(2**31 - 1))
    raise ParameterError(f"random_state is {told(given)}; give a whole number, 0 or more, a numpy RandomState, or None")


def deltas_of(given: Any, backbone: Backbone) -> tuple[Delta, ...]:
    """The deltas that a parameter asks for: the default, none, one, or several."""
    if given is None:
        return deltas_for(backbone)
    each = list(given) if isinstance(given, list | tuple) else [given]
    if len(each) == 1 and isinstance(each[0], str) and each[0] == NONE:
        return ()
    return tuple(variant("deltas", Delta, one, "dp.LoRA(rank=16)") for one in each)


def variant(kind: str, base: type[Any], given: Any, example: str) -> Any:
    """A delta, verbalizer or calibration from itself, its text or its table."""
    return given if isinstance(given, base) else registry.from_description(kind, described(kind, given, example))


def described(kind: str, given: Any, example: str) -> Mapping[str, Any]:
    """The table of a delta, verbalizer or calibration that is given as text, "lora:rank=16", or as one."""
    if isinstance(given, str):
        return registry.variant_of(kind, given)
    if isinstance(given, Mapping):
        return given
    names = ", ".join(registry.variants(kind))
    raise ParameterError(
        f"{kind.removesuffix('s')} {told(given)} is none; give an object such as {example}, or a text "
        f"'name:option=value,option=value' with one of the names {names}"
    )
