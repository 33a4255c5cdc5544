"""Virtual tokens and the texts that they stand in front of: the room they take, and the words that they begin from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltaprompt.backbone import Backbone
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Delta, VirtualTokens
from deltaprompt.deltas._position_shift import PositionShift
from deltaprompt.errors import ConfigError
from deltaprompt.features import Features


def room(backbone: Backbone, deltas: Sequence[Delta], max_length: int | None) -> tuple[int, int]:
    """The tokens that a text has at most, and how many of them are virtual.

    Args:
        backbone: its own limit counts where `max_length` is not given.
        deltas: those that will act.
        max_length: what was asked for.
    """
    moved = sum(delta.by for delta in deltas if isinstance(delta, PositionShift))
    limit = backbone.max_length - moved
    if max_length is not None and not 1 <= max_length <= limit:
        behind = f" behind positions moved on by {moved}" if moved else ""
        raise ConfigError(f"max_length {max_length} is not possible: this backbone takes 1 to {limit} tokens{behind}")
    virtual = sum(delta.length for delta in deltas if isinstance(delta, VirtualTokens))
    if virtual >= (max_length or limit):
        raise ConfigError(
            f"{virtual} virtual tokens leave no room in the {max_length or limit} tokens of a text; take fewer"
        )
    return max_length or limit, virtual


def check_room(chosen: Sequence[Delta], features: Features) -> None:
    """Raises where a text has another number of virtual tokens in front than there are by now."""
    if sum(d.length for d in chosen if isinstance(d, VirtualTokens)) != features.prepend_soft:
        raise ConfigError(
            "virtual tokens were attached or detached after the model was made, and its texts have as many as "
            "before; make a new one with dp.adapt(backbone, task, deltas)"
        )


@torch.no_grad()
def begin_from_words(backbone: Backbone, adapted: Adapted, each: Sequence[Features]) -> None:
    """Soft tokens that begin from words take these words' embeddings; `each` has the features of every slot."""
    parts, name = dict(adapted.parts()), f"0.{backbone.input_embedding}.p"
    device = next(backbone.model.parameters()).device
    for slot, features in enumerate(each):
        for block, row in zip(features.soft_blocks, features.soft_starts, strict=True):
            if block.words is not None:
                ids = torch.tensor(features.word_ids(block.words), device=device)
                words = backbone.model.get_input_embeddings()(ids)
                parts[name][slot, row : row + block.size] = words.to(parts[name].dtype)
