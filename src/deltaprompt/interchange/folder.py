"""A PEFT folder on disk: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from deltaprompt.errors import StoreError, nearest

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


@dataclass(frozen=True)
class Folder:
    """What a PEFT folder holds."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def whole(self, field: str) -> int:
        """A field of the config that must be a whole number, one or more."""
        value = self.config.get(field)
        if type(value) is not int or value < 1:
            raise StoreError(f"{self.path / CONFIG}: {field} is {value!r}; a whole number from 1 on is possible")
        return value


def read(path: str | Path) -> Folder:
    """The config and the tensors of a PEFT folder.

    Raises:
        StoreError: a file is missing, damaged, or a pickle.
    """
    path = Path(path)
    return Folder(path, config_of(path), _tensors(path))


def write(path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Writes both files in place of those that are there; the bytes written.

    Killed at any moment, the folder holds the old pair, the new one, or no config, without which nothing opens it.
    """
    path = Path(path)
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    files = {
        TENSORS: safetensors.torch.save(own, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    new = {name: path / f".{name}-{token_hex(4)}" for name in files}
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            _put(new[name], data)
        (path / CONFIG).unlink(missing_ok=True)
        for name in files:
            new[name].replace(path / name)
    except OSError as e:
        raise StoreError(f"{path} cannot be written ({e}); mend that, or name another folder") from e
    finally:
        for left in new.values():
            with suppress(OSError):
                left.unlink(missing_ok=True)
    return sum(map(len, files.values()))


def _put(path: Path, data: bytes) -> None:
    """A new file, on disk when this returns."""
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def config_of(path: Path) -> dict[str, Any]:
    """The config of a PEFT folder, checked to be one."""
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise StoreError(
            f"there is no folder {path}{nearest(path.name, sorted(beside))} An adapter on the hub is downloaded first: "
            "hf download NAME --local-dir FOLDER"
        )
    try:
        config = json.loads((path / CONFIG).read_bytes().decode())
    except FileNotFoundError as e:
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise StoreError(f"{path} holds no PEFT adapter, that is {CONFIG} and {TENSORS}; it holds {inside}") from e
    except (OSError, ValueError, RecursionError) as e:
        raise StoreError(f"{path / CONFIG} is damaged: {e}. Get the folder again from where it was made") from e
    if not isinstance(config, dict):
        raise StoreError(f"{path / CONFIG} is damaged: it is a {type(config).__name__}, not an object of fields")
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    if not (path / TENSORS).is_file():
        if (path / PICKLE).is_file():
            raise StoreError(
                f"{path} keeps its tensors in {PICKLE}, a pickle, which can run any code when it is read; only "
                f"{TENSORS} is read. Where you trust it, open it with peft and save it again: "
                f"PeftModel.from_pretrained(model, {str(path)!r}).save_pretrained({str(path)!r})"
            )
        raise StoreError(f"{path} lacks {TENSORS}, the tensors of the adapter; get the folder again")
    try:
        return safetensors.torch.load((path / TENSORS).read_bytes())
    except (OSError, SafetensorError, ValueError) as e:
        raise StoreError(f"{path / TENSORS} is damaged or truncated: {e}. Get it again from where it was made") from e
