"""What a training step holds: the bytes that autograd keeps of a pass, counted, and all that a step holds, predicted.

Counted are saved tensors and not the process's memory: what the forward pass leaves behind for the backward pass. The
prediction counts a pass on tensors that have a shape and no numbers, which takes neither memory nor the time of a pass.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.fused import FAILURES, at_rest
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError

TARGETS = 2  # tokens that a decoder reads: its start and what stands for the mask
MOMENTS = 2  # numbers that AdamW keeps for each that trains (Kingma & Ba 2015)


# Counting


class _Saved:
    """A tensor that autograd keeps; it lives as long as autograd keeps it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Kept:
    """What autograd keeps of the passes under `kept`."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self._saved: WeakSet[_Saved] = WeakSet()

    @property
    def bytes(self) -> int:
        """Bytes that are kept now, each storage counted once; the model's own tensors are not."""
        sizes = {_storage(saved.tensor): saved.tensor.untyped_storage().nbytes() for saved in self._saved}
        return sum(size for storage, size in sizes.items() if storage not in self._own)

    def _take(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # a result that keeps itself would never be let go
        self._saved.add(saved)
        return saved


@contextmanager
def kept(model: nn.Module) -> Iterator[Kept]:
    """Within it what autograd keeps of a model's passes is counted: read `.bytes` while their result is still there."""
    counted = Kept(model)
    with saved_tensors_hooks(counted._take, lambda saved: saved.tensor):
        yield counted


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage counted once."""
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# Predicting


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step on `rows` rows of `length` tokens, with AdamW."""

    rows: int
    length: int
    backbone: int  # its weights
    deltas: int
    gradients: int  # of what trains
    optimizer: int  # its moments of what trains
    kept: int  # what autograd keeps of the forward pass
    recomputed: int | None  # the same where layers are computed again (`checkpointing`); None: this model cannot

    def total(self, again: bool = False) -> int:
        """Everything; where `again`, with layers computed again, if the model can."""
        kept = self.recomputed if again and self.recomputed is not None else self.kept
        return self.backbone + self.deltas + self.gradients + self.optimizer + kept


def predicted(backbone: Backbone, deltas: Sequence[Delta], rows: int, length: int) -> Memory:
    """What training these deltas holds; nothing is computed, and the backbone is as it was.

    The backbone's dropout is off, as it is in `fit`. Where a model's code looks at numbers (a mixture's router does),
    one row and two are run, and the others are taken to be as large.

    Raises:
        ConfigError: the backbone does not take texts of that length.
    """
    if rows < 1 or not 1 <= length <= backbone.max_length:
        raise ConfigError(
            f"got {rows} rows of {length} tokens; 1 row or more and 1 to {backbone.max_length} tokens are possible"
        )
    adapted = Adapted(backbone, deltas)
    try:
        own = [tensor for _, tensor in adapted.parts()]
        trained = [tensor for tensor in own if tensor.requires_grad]
        possible = adapted.model.supports_gradient_checkpointing
        return Memory(
            rows=rows,
            length=length,
            backbone=held((*backbone.model.parameters(), *backbone.model.buffers())),
            deltas=held((*own, *adapted.commons.buffers())),
            gradients=held(trained),
            optimizer=MOMENTS * held(trained),
            kept=_kept(adapted, rows, length, False),
            recomputed=_kept(adapted, rows, length, True) if possible else None,
        )
    finally:
        adapted.remove()


def _kept(adapted: Adapted, rows: int, length: int, again: bool) -> int:
    """What autograd keeps of a pass; where `again`, with the layers computed again."""
    with at_rest(adapted.model), torch.enable_grad():
        try:
            return _of_shapes(adapted, rows, length, again)
        except FAILURES:
            one, two = (_of_pass(adapted, n, length, again) for n in (1, 2))
            return one + (rows - 1) * (two - one)


def _of_shapes(adapted: Adapted, rows: int, length: int, again: bool) -> int:
    """What autograd keeps of a pass on tensors without numbers; PyTorch also logs where it cannot, before it raises."""
    log, numberless = logging.getLogger(FakeTensorMode.__module__), FakeTensorMode()
    silent, log.disabled = log.disabled, True
    try:
        with FakeCopyMode(numberless):
            shapes = copy.deepcopy(adapted)
        with numberless:
            return _of_pass(shapes, rows, length, again)
    finally:
        log.disabled = silent


def _of_pass(adapted: Adapted, rows: int, length: int, again: bool) -> int:
    """What autograd keeps of one pass, the last token of each row a padding."""
    try:
        if again:
            adapted.checkpointing()
        with kept(adapted) as counted:
            states = adapted.states(_inputs(adapted, rows, length))
            return counted.bytes if states.requires_grad else 0
    finally:
        if again:
            adapted.checkpointing(False)


def _inputs(adapted: Adapted, rows: int, length: int) -> dict[str, Tensor]:
    """Token ids that the model knows, on its device."""
    device = next(adapted.model.parameters()).device
    ids = torch.arange(rows * length, device=device).reshape(rows, length) % adapted.backbone.vocabulary
    mask = torch.ones_like(ids)
    mask[:, 1:][:, -1:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if adapted.backbone.kind == "seq2seq":
        read = torch.ones(rows, TARGETS, dtype=torch.long, device=device)
        inputs |= {"decoder_input_ids": read, "decoder_attention_mask": read}
    return inputs
