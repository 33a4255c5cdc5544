"""One adaptation, one folder: what `save` keeps of a model, `open_` makes a model again, on the same backbone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from deltaprompt import store
from deltaprompt.backbone import Backbone, load
from deltaprompt.backbone.fingerprint import fingerprint
from deltaprompt.backbone.load import DEMO
from deltaprompt.compose import plain
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import BackboneError, ConfigError, DeltaPromptError, StoreError
from deltaprompt.model.episodic import Episodic
from deltaprompt.model.generator import GENERATIONS, Generator
from deltaprompt.model.learner import Learner
from deltaprompt.model.model import Model
from deltaprompt.model.showing import restored
from deltaprompt.model.tagger import Tagger
from deltaprompt.model.tagging import Tagging
from deltaprompt.model.task import Task
from deltaprompt.model.trainable import Trainable
from deltaprompt.registry import describe as described
from deltaprompt.registry import from_description
from deltaprompt.templates import parse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Opened: TypeAlias = Model | Generator | Tagger | Learner  # what a folder holds
UNLABELLED = {  # what records of models without labels of their own have, and what those do
    "generation": "writes texts",
    "tagging": "finds spans of texts",
    "episodic": "learns from episodes",
}
PROBES = (  # what normalizers, splitters and post-processors differ in: case, accents, blanks, digits, scripts, symbols
    "The quick brown fox doesn't jump over 12 lazy dogs.",
    " Ünïcôdé, ÉCOLE  naïve\tﬁne ½ İstanbul straße",
    "$1,234.50 3/4 e-mail: a_b@c.org [x] {y} <z> (#7) 100% \"q\" 'r' it's I'LL",
    "电影很好看。 映画 영화 фильм सिनेमा فيلم 🙂🎬",
    "one\ntwo\n\n  three…   four — five",
)
ROLES = ("mask_token", "bos_token", "eos_token", "cls_token", "sep_token", "unk_token")  # padding changes no score
ADVICE = {  # what tells a backbone, the most telling first: how to mend a difference
    "model_type": "give the backbone it was made for, or train again on this one",
    "kind": "load the backbone with the kind that it was made on: dp.load(..., kind=...)",
    "dtype": "load the backbone with the dtype that it was made on; to run it in another, let open load it: "
    "dp.open(folder, dtype=...)",
    "fingerprint": "give the very weights that it was made on (the same revision, nothing merged or fine-tuned since), "
    "or train again on these",
    "tokenizer": "give the tokenizer that it was made with, unchanged, or train again with this one",
}


def save(
    model: Trainable,
    folder: str | Path,
    slot: int = 0,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> int:
    """Keeps one adaptation of a model in a folder, in place of one that is there; the bytes written.

    Args:
        folder: is made where it does not exist. Killed at any moment, it holds the old adaptation or the new one.
        slot: which of the model's adaptations.
        training: how it was trained, for the record: text, numbers, lists and mappings.
        metrics: what it reached.

    Raises:
        StoreError: the folder cannot be written, or the record has what JSON cannot hold.
    """
    kept, same = tensors(model, slot), identity(model.backbone, model.record(slot)["template"])
    return store.write(folder, record_of(model, kept, same, slot, training, metrics), kept)


def record_of(
    model: Trainable,
    kept: Mapping[str, Tensor],
    backbone: Mapping[str, Any],
    slot: int = 0,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of one adaptation, from which, with its tensors, it can be made again; see `save`.

    Args:
        model: that has it.
        kept: its tensors.
        backbone: what tells the backbone; see `identity`.
        slot: which of the model's adaptations.
        training: how it was trained.
        metrics: what it reached.
    """
    fixed = {name for name, tensor, _ in model.slot_parts(slot) if not tensor.requires_grad}  # a start's, not trained
    return {
        "deltaprompt": version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "backbone": backbone,
        **model.record(slot),
        "deltas": [described("deltas", plain(delta)) for delta in model.chosen],
        "parameters": sum(tensor.numel() for name, tensor in kept.items() if name not in fixed),
        "training": training,
        "metrics": metrics,
    }


def open_(
    folder: str | Path,
    backbone: Backbone | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Opened:
    """The model, generator or tagger that was saved in a folder; `deltaprompt.open`.

    Args:
        backbone: the one it was made for, where it is at hand; loaded by its stored name where not given.
        device: where to load it; the accelerator where there is one.
        dtype: to run it in another than it was made in. The weights are checked in the stored one first.

    Raises:
        StoreError: nothing is saved there, it is damaged, or the backbone is not the one it was made for.
    """
    record, saved = store.read(folder)
    if backbone is None:
        backbone = _loaded(record, folder, device, dtype)
    elif device is not None or dtype is not None:
        raise ConfigError("device and dtype are for a backbone that open loads itself; load yours with them")
    else:
        check(record, identity(backbone, record["template"]), folder)
    model = rebuilt(record, backbone, folder)
    try:
        fill(model, saved)
    except StoreError as e:
        model.adapted.remove()
        raise StoreError(f"{folder}: {e}") from e
    return model


def describe(folder: str | Path) -> dict[str, Any]:
    """The record of a saved adaptation, checked; neither its tensors nor its backbone are read."""
    return store.describe(folder)


def tensors(model: Trainable, slot: int = 0) -> dict[str, Tensor]:
    """What is kept of one slot, by stored name; of a reparametrised delta what it computes."""
    if not 0 <= slot < model.adapted.slots:
        raise ConfigError(f"there is no slot {slot}; this model has the slots 0 to {model.adapted.slots - 1}")
    return model.stored(slot)


@torch.no_grad()
def fill(model: Trainable, saved: Mapping[str, Tensor], slot: int = 0) -> None:
    """Writes tensors, which must be exactly the model's, into one slot; nothing is written where one does not fit.

    Reparametrised deltas become the plain ones that are saved.
    """
    model.settle()
    own = {name: tensor.detach()[at] for name, tensor, at in model.slot_parts(slot)}
    for name, tensor in own.items():
        if name not in saved:
            raise StoreError(f"the saved tensors lack {name!r}, which this model has; they are of another adaptation")
        if saved[name].shape != tensor.shape:
            raise StoreError(
                f"the saved tensor {name!r} has shape {list(saved[name].shape)}, this model's has {list(tensor.shape)}"
            )
    if extra := sorted(set(saved) - set(own)):
        raise StoreError(f"there is a saved tensor {extra[0]!r} that this model has no place for ({len(extra)} such)")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def version() -> str:
    """The version of DeltaPrompt that runs."""
    try:
        return version_of("deltaprompt")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "source"


# The backbone, and whether it is the same


def identity(backbone: Backbone, template: str) -> dict[str, Any]:
    """What tells a backbone that a template is used with; only its name may be another where it is used again."""
    name = backbone.name
    return {
        "name": str(Path(name).resolve()) if name not in ("", DEMO) and Path(name).is_dir() else name,
        "model_type": backbone.config.get("model_type"),
        "kind": backbone.kind,
        "dtype": _dtype(backbone.model.dtype),
        "fingerprint": fingerprint(backbone.model),  # not the cached one: weights change when a delta is merged
        "tokenizer": tokenizer_digest(backbone.tokenizer, parse(template).is_chat),
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast, chat: bool = False) -> str:
    """16 hex digits from what a tokenizer does: its vocabulary, merges, special tokens and the ids of texts that tell.

    Its file is no measure: releases of the tokenizers package write the same tokenizer in different ways, and its last
    truncation is part of it. A chat template counts where `chat` says that it is used.
    """
    from tokenizers.models import BPE

    backend, vocabulary = tokenizer.backend_tokenizer, tokenizer.get_vocab()
    merges = json.loads(backend.to_str())["model"]["merges"] if isinstance(backend.model, BPE) else []
    parts = [
        [(token, vocabulary[token]) for token in sorted(vocabulary)],
        [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],  # written both ways
        [str(tokenizer.special_tokens_map.get(role)) for role in ROLES],
        tokenizer(list(PROBES), padding=False, truncation=False, verbose=False)["input_ids"],
        str(tokenizer.chat_template) if chat else None,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _dtype(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _loaded(
    record: Mapping[str, Any], folder: str | Path, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> Backbone:
    """The backbone of the stored name, checked in the stored dtype, then in the one asked for."""
    stored = record["backbone"]
    name, kind = stored["name"], stored["kind"]
    mend = f"load it and pass it on: dp.open({str(folder)!r}, backbone=dp.load(...))"
    if not name:
        raise StoreError(f"{folder} was made on a backbone {_told(stored)}; {mend}")
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise StoreError(f"{folder} was made on the backbone in {name}, and that folder is gone; {mend}")
    try:
        backbone = load(name, kind=kind, device=device, dtype=stored["dtype"])
        check(record, identity(backbone, record["template"]), folder)
        if dtype is not None and _dtype(dtype) != stored["dtype"]:
            backbone = load(name, kind=kind, device=device, dtype=dtype)
    except BackboneError as e:
        raise StoreError(f"{folder} was made on the backbone {name!r}, which cannot be loaded: {e}. Or {mend}") from e
    return backbone


def check(record: Mapping[str, Any], found: Mapping[str, Any], folder: str | Path) -> None:
    """An error unless the backbone that was found is the one of the record, whatever its name."""
    stored = record["backbone"]
    for what, mend in ADVICE.items():
        if stored[what] != found[what]:
            raise StoreError(
                f"{folder} was made on the backbone {_told(stored)}, and this one is {_told(found)}. They differ in "
                f"their {what}: {stored[what]} and {found[what]}; {mend}"
            )


def _told(backbone: Mapping[str, Any]) -> str:
    name = repr(backbone["name"]) if backbone["name"] else "without a name"
    return f"{name} (fingerprint {backbone['fingerprint']})"


def rebuilt(record: Mapping[str, Any], backbone: Backbone, folder: str | Path) -> Opened:
    """The model of a record, its tensors as at the start of training; errors name the folder."""
    try:
        deltas = [from_description("deltas", delta) for delta in record["deltas"]]
        if "generation" in record:
            asked = dict(record["generation"])
            return Generator(backbone, GENERATIONS[asked.pop("kind")](**asked), deltas)
        if "tagging" in record:
            return Tagger(backbone, Tagging.recorded(record["tagging"]), deltas)
        if "episodic" in record:
            return Learner(backbone, Episodic.recorded(record["episodic"]), deltas)
        task, deltas = asked_of(record)
        model = Model(backbone, task, deltas)
        reader = model.reader()
        reader.show(restored(backbone, reader.features, reader.verbalizer, record))
        return model
    except DeltaPromptError as e:
        raise not_made(record, folder, e) from e


def asked_of(record: Mapping[str, Any]) -> tuple[Task, list[Delta]]:
    """The task and the deltas of a record."""
    if kind := next((kind for kind in UNLABELLED if kind in record), None):
        raise ConfigError(f"it {UNLABELLED[kind]} and has no labels of texts; open it by itself, with dp.open")
    verbalizer = from_description("verbalizers", record["verbalizer"])
    deltas = [from_description("deltas", delta) for delta in record["deltas"]]
    asked = record.get("calibration")  # records of before there were any have none
    calibration = None if asked is None else from_description("calibrations", asked)
    several = record.get("several", False)  # only those that may give several labels say so
    return Task(record["template"], record["labels"], verbalizer, record["max_length"], calibration, several), deltas


def not_made(record: Mapping[str, Any], folder: str | Path, why: DeltaPromptError) -> StoreError:
    """The error for a record that is whole and that this version cannot make an adaptation of."""
    return StoreError(
        f"{folder}, saved by DeltaPrompt {record['deltaprompt']}, cannot be made a model again by DeltaPrompt "
        f"{version()}: {why}"
    )
