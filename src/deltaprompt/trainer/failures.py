"""Why training cannot go on, what is kept, and what to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deltaprompt.errors import TrainingError
from deltaprompt.trainer.training import Training

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")  # CUDA, MPS; PyTorch's for CPUs


def check_finite(loss: float, norm: float, step: int, scaler: Any, kept: Callable[[], str]) -> None:
    """Raises where the loss or the gradient is not a number; fp16 may have its scale lowered first."""
    if math.isfinite(loss) and (math.isfinite(norm) or (scaler is not None and scaler.get_scale() >= 1)):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    raise TrainingError(
        f"{what} at step {step}, so training stopped; {kept()}. Try a third of the learning rate, more warmup, or "
        "precision 'no'"
    )


@contextmanager
def of_memory(training: Training, kept: Callable[[], str] | None = None, together: int = 1) -> Iterator[None]:
    """Within it, memory that runs out is a `TrainingError` that names the batch size, or how many, to try."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as e:
        if not isinstance(e, torch.OutOfMemoryError | MemoryError) and not _tells_of_memory(e):
            raise
        at_once = f" and {together} together" if together > 1 else ""
        what = f"memory ran out with batch_size = {training.batch_size}{at_once}" + (
            "" if kept is None else f"; {kept()}"
        )
        raise TrainingError(f"{what}. {_instead(training, together)}") from e


def _tells_of_memory(e: RuntimeError) -> bool:
    return any(words in str(e).lower() for words in OUT_OF_MEMORY)


def _instead(training: Training, together: int) -> str:
    if together > 1:
        return f"Try together = {together // 2}: the same numbers with half the memory"
    if training.batch_size == 1:
        return "That is one row already: cut texts with max_length, try precision 'bf16', or take a smaller backbone"
    half = training.batch_size // 2
    accumulate = math.ceil(training.rows / half)
    return f"Try batch_size = {half} with accumulate = {accumulate}: steps of as many rows with half the memory"
