"""The best so far on disk: the adaptation in `out`, replaced whole at every new best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaprompt import store
from deltaprompt.model.saved import save, tensors
from deltaprompt.model.trainable import Trainable
from deltaprompt.trainer.checkpoint import Checkpoints
from deltaprompt.trainer.run import Metrics, Run, finite


class Kept:
    """The adaptation of one run.

    Args:
        out: its folder.
        settings: all that the run's result depends on, for the record.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out = out
        self.settings = settings
        self._record: dict[str, Any] | None = None  # what does not change: the task, the backbone and its digest, …

    def write(self, model: Trainable, slot: int, best: Metrics, run: Run | None = None) -> int:
        """Keeps one slot of a model as it is, with the run where it is finished; the bytes written."""
        training = {"finished": run is not None, "settings": self.settings, "run": run and run.record()}
        metrics = finite({"dev": best})
        if self._record is None:
            written = save(model, self.out, slot, training=training, metrics=metrics)
            self._record = _written(store.describe(self.out))
            return written
        return store.write(self.out, {**self._record, "training": training, "metrics": metrics}, tensors(model, slot))


def finished(checkpoints: Checkpoints, main: bool = True) -> tuple[Run, dict[str, Tensor]] | None:
    """The run that is finished in the folder and what it learned; none where there is none.

    Of several processes the main one also writes it once more, to tell its bytes.
    """
    if not store.holds_adaptation(checkpoints.out):
        return None
    record, saved = store.read(checkpoints.out)
    training = record.get("training") or {}
    if not training.get("finished"):
        return None
    checkpoints.same(training["settings"])
    written = store.write(checkpoints.out, _written(record), saved) if main else 0
    return replace(Run(**training["run"]), bytes=written), saved


def note(out: Path, name: str, metrics: Mapping[str, float]) -> int:
    """Adds metrics to the record of the adaptation in a folder; its bytes then."""
    record, saved = store.read(out)
    return store.write(out, {**_written(record), "metrics": {**record["metrics"], name: finite(metrics)}}, saved)


def _written(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what the store itself adds."""
    return {name: value for name, value in record.items() if name not in store.RESERVED}
