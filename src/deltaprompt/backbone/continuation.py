"""log p(answer | prompt) of many answers of several tokens; the prompt is run once, its keys and values are kept."""

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
from deltaprompt.backbone.load import Backbone, states_of
from deltaprompt.backbone.shared import Begun, is_whole, repeated_cache
from deltaprompt.errors import BackboneError

SCORES = 1 << 26  # scores [rows, words, tokens, vocabulary] formed at once: 256 MB in float32
TOKENS = 1 << 15  # tokens whose keys and values lie side by side at once: 2.4 GB for GPT-2 in float32


@dataclass(frozen=True)
class Prompted:
    """A prompt that has been run: its states [b, s, d] and what a continuation needs."""

    backbone: Backbone
    states: Tensor
    inputs: Mapping[str, Tensor]
    cache: Any  # None where the prompt must be run again with each answer
    encoded: Tensor | None
    repeated: Callable[[int], AbstractContextManager[None]]  # tells the patches that rows are repeated

    def log_likelihood(self, last: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """Σ_i log p(id_i | prompt, id_<i) [b, w]; `last` [b, d] reads id_0.

        Args:
            ids: answers [w, t], or of each prompt its own [b, w, t].
            lengths: of the answers, [w] or [b, w].
        """
        rows = len(last)
        ids, lengths = ids.expand(rows, -1, -1), lengths.expand(rows, -1)
        scores = _log_p(self._head.logits(last[:, None]))[:, 0].gather(1, ids[..., 0])  # [b, w]
        later, longer = ids.shape[2] - 1, (lengths > 1).any(0).nonzero()[:, 0]
        if not len(longer):
            return scores
        scores_a_word = rows * max(later, 1) * self._head.size
        tokens_a_word = rows * (self.states.shape[1] + later)
        for some in longer.split(max(1, min(SCORES // scores_a_word, TOKENS // tokens_a_word))):
            scores = scores.index_add(1, some, self._later(ids[:, some], lengths[:, some]))
        return scores

    @property
    def _head(self) -> Head:
        if self.backbone.head is None:
            raise BackboneError("a plain encoder has no head to score answers with")
        return self.backbone.head

    def _later(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The terms i > 0 of the sum: ids [b, w, t] -> [b, w]."""
        rows, words, longest = ids.shape
        with self.repeated(words):
            states = (self._again if self.cache is None else self._continue)(ids[..., :-1])  # [b * w, t - 1, d]
        states = states.unflatten(0, (rows, words)).flatten(
            1, 2
        )  # [b, w * (t - 1), d]: the head's rows are the prompts
        every = _log_p(self._head.logits(states)).unflatten(1, (words, longest - 1))
        each = every.gather(-1, ids[..., 1:, None])[..., 0]  # [b, w, t - 1]
        inside = torch.arange(1, longest, device=ids.device) < lengths[..., None]  # [b, w, t - 1]
        return each.masked_fill(~inside, 0.0).sum(-1)

    def _continue(self, ids: Tensor) -> Tensor:
        """The states of every answer's tokens after every prompt: ids [b, w, t] -> [b * w, t, d]."""
        rows, words, tokens = ids.shape
        seen = self._repeated("attention_mask", words)
        inputs = {
            "input_ids": ids.flatten(0, 1),
            "attention_mask": torch.cat([seen, seen.new_ones(rows * words, tokens)], dim=1),
            "position_ids": seen.sum(1, keepdim=True) + torch.arange(tokens, device=ids.device),
        }
        return self._run(inputs, words, past_key_values=repeated_cache(self.cache, words))

    def _again(self, ids: Tensor) -> Tensor:
        """As `_continue` without keys and values: answers stand behind each prompt's last token, all is run again."""
        _, words, tokens = ids.shape
        seen = self._repeated("attention_mask", words)  # [b * w, s]
        columns = torch.arange(1, seen.shape[1] + 1, device=ids.device)
        place = (seen * columns).amax(1, keepdim=True) + torch.arange(tokens, device=ids.device)  # [b * w, t]
        mask = functional.pad(seen, (0, tokens)).scatter(1, place, 1)
        prompt = functional.pad(self._repeated("input_ids", words), (0, tokens))
        inputs = {
            "input_ids": prompt.scatter(1, place, ids.flatten(0, 1)),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        states = self._run(inputs, words, use_cache=False)  # [b * w, s + t, d]
        return states.gather(1, place[..., None].expand(-1, -1, states.shape[-1]))

    def _repeated(self, name: str, words: int) -> Tensor:
        """An input of the module that reads prompts (the decoder, where there are two), each row `words` times."""
        return self.inputs[name if self.encoded is None else f"decoder_{name}"].repeat_interleave(words, 0)

    def _run(self, inputs: Mapping[str, Tensor], words: int, **cache: Any) -> Tensor:
        """The states of a causal model, or of a decoder on the repeated states of its encoder."""
        if self.encoded is None:
            return states_of(self.backbone.outputs(inputs, **cache))
        decoder = {
            "decoder_input_ids": inputs["input_ids"],
            "decoder_attention_mask": inputs["attention_mask"],
            "attention_mask": self.inputs["attention_mask"].repeat_interleave(words, 0),
        }
        encoded = self.encoded.repeat_interleave(words, 0)
        return states_of(self.backbone.decoded(encoded, decoder, **cache))


def prompted(
    backbone: Backbone,
    inputs: Mapping[str, Tensor],
    repeated: Callable[[int], AbstractContextManager[None]],
    begun: Begun | None = None,
) -> Prompted:
    """Runs prompts once, from where they have `begun`, and keeps what their continuations need.

    Keys and values are of no use where decoder prompts differ in length (BART counts padding as positions), nor where
    the model keeps none: under gradient checkpointing, and in layers that are not attention.
    """
    if backbone.kind == "seq2seq":
        encoded = backbone.encoded(inputs)
        out = backbone.decoded(encoded, inputs, use_cache=True)
        even = bool(inputs["decoder_attention_mask"].all())
    else:
        encoded, even = None, True
        past = {} if begun is None else {"past_key_values": begun.cache}
        out = backbone.outputs(inputs, use_cache=True, **past)
    states, kept = states_of(out), out.get("past_key_values")
    length = states.shape[1] + (0 if begun is None else begun.length)
    cache = kept if even and is_whole(kept, length) else None
    return Prompted(backbone, states, inputs, cache, encoded, repeated)


def _log_p(scores: Tensor) -> Tensor:
    """log softmax over the vocabulary, in float32 or better."""
    return log_softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1)
