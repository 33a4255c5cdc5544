"""log p(answer | prompt) of many answers of several tokens, the prompt being run once (its keys and values are kept)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import log_softmax

from deltaprompt.backbone.heads import Head
from deltaprompt.backbone.load import Backbone
from deltaprompt.errors import BackboneError

AT_ONCE = 1 << 24  # scores [rows, tokens, vocabulary] formed at once: 64 MB in float32


@dataclass(frozen=True)
class Prompted:
    """A prompt that has been run: its states [b, s, d] and what a continuation needs."""

    backbone: Backbone
    states: Tensor
    inputs: Mapping[str, Tensor]
    cache: Any
    encoded: Tensor | None
    repeated: Callable[[int], AbstractContextManager[None]]  # tells the patches that rows are repeated

    def log_likelihood(self, last: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Σ_i log p(id_i | prompt, id_<i) [b, w] for answers ids [w, t] of the given lengths [w]; `last` [b, d] reads id_0."""
        head, rows, (words, longest) = self._head, last.shape[0], ids.shape
        first = log_softmax(head.logits(last, None).float(), dim=-1)[:, ids[:, 0]]  # [b, w]
        if longest == 1:
            return first
        even = self.encoded is None or bool(self.inputs["decoder_attention_mask"].all())
        states = (self._continue if even else self._decode_again)(ids[:, :-1], rows)  # [b * w, t - 1, d]
        targets = ids[:, 1:].repeat(rows, 1)  # [b * w, t - 1]
        step = max(1, AT_ONCE // (head.out.out_features * (longest - 1)))
        pieces = [_chosen(head, states[i : i + step], targets[i : i + step]) for i in range(0, len(states), step)]
        each = torch.cat(pieces).unflatten(0, (rows, words))  # [b, w, t - 1]
        inside = torch.arange(1, longest, device=ids.device) < lengths[:, None]  # [w, t - 1]
        return first + each.masked_fill(~inside, 0.0).sum(-1)

    @property
    def _head(self) -> Head:
        if self.backbone.head is None:
            raise BackboneError("a plain encoder has no head to score answers with")
        return self.backbone.head

    def _continue(self, ids: Tensor, rows: int) -> Tensor:
        """The states of every answer's tokens after every prompt: ids [w, t] -> [b * w, t, d]."""
        words, tokens = ids.shape
        self.cache.batch_repeat_interleave(words)
        key = "decoder_attention_mask" if self.encoded is not None else "attention_mask"
        seen = self.inputs[key].repeat_interleave(words, 0)
        mask = torch.cat([seen, seen.new_ones(rows * words, tokens)], dim=1)
        with self.repeated(words):
            if self.encoded is None:
                place = seen.sum(1, keepdim=True) + torch.arange(tokens, device=ids.device)
                return self.backbone.base(  # type: ignore[no-any-return]
                    input_ids=ids.repeat(rows, 1), attention_mask=mask, position_ids=place, past_key_values=self.cache
                ).last_hidden_state
            inputs = {
                "decoder_input_ids": ids.repeat(rows, 1),
                "decoder_attention_mask": mask,
                "attention_mask": self.inputs["attention_mask"].repeat_interleave(words, 0),
            }
            encoded = self.encoded.repeat_interleave(words, 0)
            return self.backbone.decoded(encoded, inputs, past_key_values=self.cache).last_hidden_state  # type: ignore[no-any-return]

    def _decode_again(self, ids: Tensor, rows: int) -> Tensor:
        """As `_continue` where decoder prompts differ in length (BART): its learned positions count padding, so answers
        are put behind each prompt's last token and the decoder, not the encoder, runs again."""
        words, tokens = ids.shape
        seen = self.inputs["decoder_attention_mask"].repeat_interleave(words, 0)  # [b * w, s]
        place = seen.sum(1, keepdim=True) + torch.arange(tokens, device=ids.device)  # [b * w, t]
        prompt = functional.pad(self.inputs["decoder_input_ids"].repeat_interleave(words, 0), (0, tokens))
        inputs = {
            "decoder_input_ids": prompt.scatter(1, place, ids.repeat(rows, 1)),
            "decoder_attention_mask": functional.pad(seen, (0, tokens)).scatter(1, place, 1),
            "attention_mask": self.inputs["attention_mask"].repeat_interleave(words, 0),
        }
        with self.repeated(words):
            encoded = self.encoded.repeat_interleave(words, 0)  # type: ignore[union-attr]
            states = self.backbone.decoded(encoded, inputs).last_hidden_state  # [b * w, s + t, d]
        return states.gather(1, place[..., None].expand(-1, -1, states.shape[-1]))  # type: ignore[no-any-return]


def prompted(
    backbone: Backbone, inputs: Mapping[str, Tensor], repeated: Callable[[int], AbstractContextManager[None]]
) -> Prompted:
    """Runs prompts once and keeps what their continuations need."""
    if backbone.kind == "seq2seq":
        encoded = backbone.encoded(inputs)
        out = backbone.decoded(encoded, inputs, use_cache=True)
    else:
        encoded, out = None, backbone.base(**inputs, use_cache=True)
    return Prompted(backbone, out.last_hidden_state, inputs, out.past_key_values, encoded, repeated)


def _chosen(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    """log p of the target at each state: [n, t, d], [n, t] -> [n, t]."""
    return log_softmax(head.logits(states, None).float(), dim=-1).gather(-1, targets[..., None])[..., 0]
