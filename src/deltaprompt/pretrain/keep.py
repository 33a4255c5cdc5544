"""What a finished run leaves in its folder: a transformers folder, what trained alone, and the run's record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltaprompt import registry
from deltaprompt.backbone import Backbone
from deltaprompt.backbone.load import quiet
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError
from deltaprompt.store import write_text
from deltaprompt.trainer.run import finite

RECORD = "pretraining.json"
DELTA = "delta.safetensors"
LEARNED = "learned"  # in the metadata of that file: JSON, the deltas and the backbone that they were trained on
SCHEMA = 1
LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Pretrained:
    """A finished run."""

    backbone: Backbone  # the language model, everything that was learned in its weights
    steps: int
    tokens: int  # of the rows that steps went through, a row as often as it came
    trainable: int
    parameters: int
    seconds: float
    history: Sequence[Mapping[str, Any]]  # step, loss, learning rate, and of each dev text accuracy, loss and tokens

    @property
    def loss(self) -> float:
        """The mean training loss since the evaluation before the last."""
        return float(self.history[-1]["loss"])

    @property
    def dev(self) -> Mapping[str, Mapping[str, float]]:
        """Of each dev text, at the end: accuracy, loss and tokens."""
        found: Mapping[str, Mapping[str, float]] = self.history[-1]["dev"]
        return found

    def as_json(self) -> dict[str, Any]:
        """The run as a record has it."""
        own = {name: value for name, value in vars(self).items() if name != "backbone"}
        made: dict[str, Any] = finite({**own, "loss": self.loss, "dev": self.dev})
        return made


def small(tensor: Tensor) -> Tensor:
    """A tensor in 16 bits; one that does not fit there, as it is."""
    return tensor.half() if float(tensor.abs().max()) <= LARGEST else tensor


def keep(
    out: Path,
    run: Pretrained,
    learned: Mapping[str, Tensor],
    deltas: Sequence[Delta],
    settings: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
) -> None:
    """Writes a run; its record comes last, so that a folder that has one is whole."""
    model, tokenizer = run.backbone.model, run.backbone.tokenizer
    out.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    if learned:
        told = {name: settings[name] for name in ("backbone", "fingerprint")}
        told["deltas"] = [registry.describe("deltas", delta) for delta in deltas]
        own = {name: t.contiguous() for name, t in learned.items()}
        save_file(own, out / DELTA, {LEARNED: json.dumps(told)})  # one key: their order is another each time
    record = {"schema": SCHEMA, **run.as_json(), "sources": list(sources), "settings": dict(settings)}
    write_text(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def kept(out: Path) -> dict[str, Any] | None:
    """The record of the run that is finished in a folder, if any."""
    path = out / RECORD
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] > SCHEMA:
            raise ConfigError(
                f"{path} is of a newer version of DeltaPrompt; upgrade: pip install --upgrade deltaprompt"
            )
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path} is damaged ({e}); remove it and train again") from e
    return record


def as_run(record: Mapping[str, Any], backbone: Backbone) -> Pretrained:
    """A kept run, its model opened again."""
    names = ("steps", "tokens", "trainable", "parameters", "seconds", "history")
    return Pretrained(backbone, **{name: record[name] for name in names})


def as_setting(value: Any) -> Any:
    """A setting as JSON gives it back, so that runs can be compared."""
    return json.loads(json.dumps(value))


def described(options: Any) -> dict[str, Any]:
    """A dataclass of options as JSON gives it back."""
    made: dict[str, Any] = as_setting(asdict(options))
    return made
