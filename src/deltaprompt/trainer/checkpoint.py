"""Checkpoints: folders that are there whole or not at all, whatever kills the process.

A checkpoint is written under another name, flushed to the disk, and then renamed; one that is not needed is renamed
before it is deleted. So a folder `step-…` is always complete, and the newest is where a run goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaprompt.errors import ConfigError

FOLDER = "checkpoint"
SETTINGS = "settings.json"


class Checkpoints:
    """The checkpoints of one run, in `out/checkpoint`.

    Args:
        out: the folder of the adaptation.
        settings: all that the run's result depends on, by name.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out = out
        self.folder = out / FOLDER
        self.settings = dict(settings)

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = [(int(m[1]), p) for p in self._all() if (m := re.fullmatch(r"step-(\d+)", p.name))]
        return max(found)[1] if found else None

    def load(self, accelerator: Any) -> bool:
        """Goes back to the newest checkpoint; false where there is none."""
        newest = self.newest()
        if newest is None:
            return False
        self.same(json.loads((newest / SETTINGS).read_text()))
        accelerator.load_state(str(newest))
        return True

    def same(self, before: Mapping[str, Any]) -> None:
        """Raises an error that names what has changed since."""
        names = [name for name in (before | self.settings.keys()) if before.get(name) != self.settings.get(name)]
        if names:
            told = "; ".join(f"{n} was {before.get(n)} and is now {self.settings.get(n)}" for n in sorted(names))
            raise ConfigError(f"cannot go on with the run in {self.out}: {told}. Set it back, or start without resume")

    def write(self, accelerator: Any, step: int) -> None:
        """Writes a checkpoint, where there is none of that step; then the earlier ones are deleted."""
        part = self.folder / ".part"
        if (self.folder / f"step-{step}").exists():
            return
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove(part)
            part.mkdir()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._finish(part, f"step-{step}")
        accelerator.wait_for_everyone()

    def clear(self) -> None:
        """No checkpoint is left, nor a half-written one."""
        for path in self._all():
            self._discard(path)
        if self.folder.is_dir():
            self.folder.rmdir()

    def _finish(self, part: Path, name: str) -> None:
        (part / SETTINGS).write_text(json.dumps(self.settings))
        for path in part.iterdir():
            _flush(path)
        _flush(part)
        goal = self.folder / name
        part.rename(goal)
        _flush(self.folder)
        for path in self._all():
            if path != goal:
                self._discard(path)

    def _all(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []

    def _discard(self, path: Path) -> None:
        gone = self.folder / ".gone"
        if path != gone:
            _remove(gone)
            path.rename(gone)
        _remove(gone)


def hold_back_weights(accelerator: Any) -> None:
    """accelerate then writes no model: a run's `State` has all tensors that change, and the backbone does not."""
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _flush(path: Path) -> None:
    """What was written there is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
