"""Frozen work is done once: what layers below the lowest delta make of a text is kept, and later passes start there.

The model's own forward stays. The layers below are passed by: for one pass each of them returns what was kept, padded
as the batch is. Where no delta acts in the backbone, it is the states at the answer positions that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deltaprompt.backbone import Backbone
from deltaprompt.model.below import Below, leaving, passed_by
from deltaprompt.model.model import at_answers
from deltaprompt.model.shelf import Shelf
from deltaprompt.types import Batch

IDS, MASKS = ("input_ids", "decoder_input_ids"), ("attention_mask", "decoder_attention_mask")


class Once:
    """Reads the states at the answer positions, and runs what lies below once a text.

    A text is known by its token ids, so all that read the same text through the same backbone share what is kept.
    """

    def __init__(self, backbone: Backbone, found: Below, shelf: Shelf | None = None) -> None:
        self.backbone = backbone
        self.found = found
        self.shelf = shelf or Shelf()

    def __call__(self, batch: Batch) -> Tensor:
        """The states at the answer positions [b*v, m, d]."""
        place = self._place(batch)
        side = "left" if self.found.modules and bool(place[:, -1].all()) else "right"
        states = pad_sequence(self._rows(batch), batch_first=True, padding_side=side).to(place.device)
        if not self.found.modules:
            return states
        with passed_by(self.found, states):
            return at_answers(self.backbone.states(batch.inputs), batch.answer_at)

    def fill(self, batch: Batch) -> None:
        """Keeps what is not kept yet of a batch."""
        self._rows(batch)

    def _place(self, batch: Batch) -> Tensor:
        """Where a row has states that are kept: at its tokens [b*v, s], or at its answers [b*v, m]."""
        return batch.inputs["attention_mask"].bool() if self.found.modules else batch.answer_at >= 0

    def _rows(self, batch: Batch) -> list[Tensor]:
        """What is kept of every row [n, d] of n tokens or answers, on the CPU; what is not yet is computed."""
        keys = _keys(batch)
        missing = [i for i, key in enumerate(keys) if key not in self.shelf]
        fresh = self._made(batch, missing) if missing else {}
        for i, rows in fresh.items():
            self.shelf.put(keys[i], rows)
        return [fresh[i] if i in fresh else self.shelf[key] for i, key in enumerate(keys)]

    @torch.no_grad()
    def _made(self, batch: Batch, numbers: Sequence[int]) -> dict[int, Tensor]:
        """What the frozen part makes of these rows of a batch, each without padding."""
        some = torch.tensor(numbers, device=batch.answer_at.device)
        inputs = {name: t[some] for name, t in batch.inputs.items()}
        if self.found.modules:
            states = leaving(self.backbone, inputs, self.found.modules[-1])
        else:
            states = at_answers(self.backbone.states(inputs), batch.answer_at[some])
        states, place = states.cpu(), self._place(batch)[some].cpu()
        return {i: own[at] for i, own, at in zip(numbers, states, place, strict=True)}


def _keys(batch: Batch) -> list[bytes]:
    """A digest of every row's own tokens, of its answer's beginning, of where it is read, and of the arithmetic."""
    device = batch.answer_at.device.type
    how = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
    inputs = {name: t.cpu().numpy() for name, t in batch.inputs.items()}
    ids = [inputs[name] for name in IDS if name in inputs]
    own = [inputs[name].astype(bool) for name in MASKS if name in inputs]
    keys = []
    for i, places in enumerate(batch.answer_at.cpu().numpy()):
        read = places[places >= 0] - own[-1][i].argmax()  # padding on the left is no part of the row
        told = [how.encode(), *(t[i][mask[i]].tobytes() for t, mask in zip(ids, own, strict=True)), read.tobytes()]
        keys.append(blake2b(b"|".join(told), digest_size=16).digest())
    return keys
