"""Prompt tuning: PEFT puts a table's rows in front of the embedded text, `SoftPrompt` at virtual ids in front of it.

In an encoder-decoder PEFT uses the first rows only, in front of the encoder's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from deltaprompt.backbone import Backbone
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import StoreError
from deltaprompt.interchange import fields
from deltaprompt.interchange.folder import Folder
from deltaprompt.interchange.forms import Opened, Piece, Written, check_all_used, shaped

TABLE = "prompt_embeddings"
TASKS = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "masked": "FEATURE_EXTRACTION",
    "encoder": "FEATURE_EXTRACTION",
}


def check_task(folder: Folder, backbone: Backbone) -> None:
    """An error where PEFT's model of the folder's task type does not run on this kind of backbone."""
    task, own = folder.config.get("task_type"), TASKS[backbone.kind]
    if task != own:
        raise StoreError(
            f"{folder.path} has task_type = {task!r}, and a backbone of kind {backbone.kind!r} is run as {own}: with "
            "another, peft uses the prompt in another way or not at all. Load the backbone with the kind that fits"
        )


def check_table(folder: Folder) -> None:
    if TABLE not in folder.tensors:
        raise StoreError(f"{folder.path} lacks the tensor {TABLE}, the trained prompt; get the folder again")


def read(folder: Folder, backbone: Backbone) -> Opened:
    """A soft prompt in front of the text."""
    check_task(folder, backbone)
    check_table(folder)
    check_all_used(folder, {TABLE}, backbone)
    length = folder.whole("num_virtual_tokens")
    copies = folder.config.get("num_transformer_submodules") or (2 if backbone.kind == "seq2seq" else 1)
    if copies != 1 and backbone.kind != "seq2seq":
        raise StoreError(f"{folder.path} has num_transformer_submodules = {copies!r}; 1 is possible on this backbone")
    site = backbone.sites[backbone.input_embedding]
    table = shaped(folder, TABLE, (length * copies, site.outputs))
    return Opened((SoftPrompt(length, at=(site.name,)),), {f"0.{site.name}.p": table[:length]})


def write(pieces: Sequence[Piece], backbone: Backbone) -> Written:
    """One PEFT prompt of all soft prompts, in the order in which they stand in front of the text."""
    ordered = sorted(pieces, key=lambda piece: _delta(piece).first)
    ends = [0]
    for piece in ordered:
        ends.append(ends[-1] + _delta(piece).length)
        if _delta(piece).first != ends[-2] or piece.site.name != backbone.input_embedding:
            raise StoreError("PEFT has one prompt in front of the text; these soft prompts leave gaps or overlap")
    table = torch.cat([piece.tensors["p"] for piece in ordered])
    config = {
        "peft_type": fields.PROMPT,
        "task_type": TASKS[backbone.kind],
        "num_virtual_tokens": ends[-1],
        "token_dim": table.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "modules_to_save": None,
    }
    return Written(config, {TABLE: table})


def _delta(piece: Piece) -> SoftPrompt:
    return cast(SoftPrompt, piece.delta)
