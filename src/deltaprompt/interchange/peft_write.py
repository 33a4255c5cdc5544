"""`save_peft`: the deltas of an adaptation as a PEFT folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.demo import demo_folder
from deltaprompt.backbone.load import DEMO
from deltaprompt.compose import Adapted, plain
from deltaprompt.compose.patch import Patch
from deltaprompt.deltas._position_shift import PositionShift
from deltaprompt.deltas.dora import DoRA
from deltaprompt.deltas.ia3 import IA3
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError, StoreError
from deltaprompt.interchange import ia3, lora, prefix, prompt
from deltaprompt.interchange.folder import write as write_folder
from deltaprompt.interchange.forms import Piece, Written
from deltaprompt.model.trainable import Trainable

FORMS = (LoRA, DoRA, IA3, SoftPrompt, Prefix)
TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}  # peft has none for masked


def save_peft(model: Adapted | Trainable, folder: str | Path, slot: int = 0, uniform: bool = False) -> int:
    """Writes the deltas of one adaptation as a folder that `PeftModel.from_pretrained` opens; the bytes written.

    Only the deltas: a template has to be put around the text, and label words or prototypes be read, by who runs it.

    Args:
        folder: is made where there is none.
        slot: which of the model's adaptations.
        uniform: for engines that read no `rank_pattern` and `alpha_pattern` (vLLM): LoRAs of different ranks and scales
            are written as one of the largest rank, with zeros, and of one scale.

    Raises:
        StoreError: a delta, or several together, have no form in PEFT; or the folder cannot be written.
    """
    adapted = model if isinstance(model, Adapted) else model.adapted
    if not 0 <= slot < adapted.slots:
        raise ConfigError(f"there is no slot {slot}; this model has the slots 0 to {adapted.slots - 1}")
    if not isinstance(model, Adapted) and model.features.soft_rows:
        raise StoreError(
            "the template has soft tokens, and PEFT's stand in front of the text only; use a SoftPrompt instead"
        )
    method = _method(adapted)
    pieces = _pieces(adapted, slot)
    backbone = adapted.backbone
    written = _written(method, pieces, adapted, slot, uniform)
    return write_folder(folder, {**_common(backbone), **written.config}, written.tensors)


def _method(adapted: Adapted) -> type[Any]:
    """The one class of the deltas, shifts of a prefix's text aside."""
    deltas = [plain(delta) for delta in adapted.deltas]
    possible = ", ".join(cls.__name__ for cls in FORMS)
    if not deltas or not adapted.patches:
        raise StoreError(f"there are no deltas to write; {possible} are possible")
    for delta in deltas:
        if delta.gated:
            raise StoreError(f"a gated {type(delta).__name__} has no form in PEFT: it has no gates. Train without")
        if not isinstance(delta, (*FORMS, PositionShift)):
            raise StoreError(f"{type(delta).__name__} has no form in PEFT that computes the same; possible: {possible}")
    found = {type(delta) for delta in deltas}
    method = next((cls for cls in FORMS if cls in found), PositionShift)
    if found - {method} - ({PositionShift} if method is Prefix else set()) or method is PositionShift:
        names = ", ".join(sorted(cls.__name__ for cls in found))
        raise StoreError(
            f"these deltas are of the methods {names}, and a folder of PEFT holds one of {possible} (a Prefix with "
            "its PositionShift); write an adaptation with one method, or merge() the others first"
        )
    return method


def _pieces(adapted: Adapted, slot: int) -> list[Piece]:
    """Every delta at every site, with what is kept of it."""
    kept = adapted.stored(slot)
    pieces = []
    for patch in cast(list[Patch], list(adapted.patches)):
        start = f"{patch.number}.{patch.site.name}."
        own = {name.removeprefix(start): tensor for name, tensor in kept.items() if name.startswith(start)}
        pieces.append(Piece(plain(patch.delta), patch.site, own))
    return pieces


def _written(method: type[Any], pieces: Sequence[Piece], adapted: Adapted, slot: int, uniform: bool) -> Written:
    backbone = adapted.backbone
    if method in (LoRA, DoRA):
        return lora.write(pieces, backbone, uniform)
    if method is IA3:
        return ia3.write(pieces, backbone)
    if method is SoftPrompt:
        return prompt.write(pieces, backbone)
    return prefix.write(pieces, backbone, adapted, slot)


def _common(backbone: Backbone) -> dict[str, Any]:
    """The fields that every method has: on which model, and as what it is run."""
    task, model = TASKS.get(backbone.kind), type(backbone.model)
    name = str(demo_folder()) if backbone.name == DEMO else backbone.name
    return {
        "base_model_name_or_path": (str(Path(name).resolve()) if name and Path(name).is_dir() else name) or None,
        "revision": None,
        "task_type": task,
        "auto_mapping": None if task else {"base_model_class": model.__name__, "parent_library": model.__module__},
        "inference_mode": True,
        "peft_version": None,
    }
