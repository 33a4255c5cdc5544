"""Texts from prompts by the model's own `generate`: a batch at a time, with keys and values, to an end token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaprompt.compose import Adapted
from deltaprompt.deltas._position_shift import PositionShift
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True)
class Decoding:
    """How texts are decoded; see `Generator.generate`."""

    max_new_tokens: int
    beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("beams", 1)):
            if not isinstance(vars(self)[name], int) or vars(self)[name] < least:
                raise ConfigError(f"{name} = {vars(self)[name]} is not possible: it is a whole number, {least} or more")
        if not 0 < self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature is a number above 0, and top_p above 0 and up to 1; got {self.temperature}, {self.top_p}"
            )
        if not self.sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ConfigError("temperature and top_p are of sampling; say sample=True, or leave them out")

    def config(self, ends: Sequence[int], pad: int) -> GenerationConfig:
        """The same as transformers has it."""
        from transformers import GenerationConfig

        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.sample else {}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            num_beams=self.beams,
            do_sample=self.sample,
            eos_token_id=list(ends),
            pad_token_id=pad,
            use_cache=True,
            **drawn,
        )


def decoded(adapted: Adapted, inputs: Mapping[str, Tensor], slot: int, how: Decoding, ends: Sequence[int]) -> list[str]:
    """A text for each prompt [b, s], padded as its kind of model wants it."""
    tokenizer = adapted.backbone.tokenizer
    _check_length(adapted, inputs["input_ids"].shape[1], how.max_new_tokens)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = adapted.generate(given, slot, how.config(ends, tokenizer.pad_token_id))  # [b, t]
    rows = found[:, 1:] if adapted.backbone.kind == "seq2seq" else found  # the decoder's start is no end
    as_written = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(cut(ids, ends), **as_written).strip() for ids in rows.tolist()]


def cut(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first that ends a text."""
    at = next((n for n, i in enumerate(ids) if i in ends), len(ids))
    return list(ids[:at])


def _check_length(adapted: Adapted, prompt: int, more: int) -> None:
    """Raises where a model has no positions for so many tokens."""
    backbone = adapted.backbone
    limit = backbone.max_length - sum(delta.by for delta in adapted.deltas if isinstance(delta, PositionShift))
    length = more + (1 if backbone.kind == "seq2seq" else prompt)
    if length > limit:
        behind = "" if backbone.kind == "seq2seq" else f" behind a prompt of {prompt}"
        raise ConfigError(
            f"{more} new tokens{behind} are more than the {limit} that this backbone takes; ask for fewer "
            "max_new_tokens, or cut prompts with max_length"
        )


@contextmanager
def drawn_from(seed: int, device: torch.device) -> Iterator[None]:
    """Within it PyTorch's generators start from that seed; after it they are where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
