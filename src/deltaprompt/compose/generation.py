"""Generation by the model's own `generate`, in which tokens that all rows begin with are run once."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, Final, cast

import torch
from torch import Tensor

from deltaprompt.backbone.shared import begun
from deltaprompt.compose.routing import Index
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from deltaprompt.compose.adapted import Adapted

OTHERWISE: Final = (  # settings under which nothing is shared
    "cache_implementation",
    "no_repeat_ngram_size",
    "prompt_lookup_num_tokens",
    "guidance_scale",
    "penalty_alpha",
    "sequence_bias",
    "bad_words_ids",
    "dola_layers",
)


@torch.no_grad()
def generate(
    adapted: Adapted, inputs: Mapping[str, Tensor], adaptation: Index = None, config: GenerationConfig | None = None
) -> Tensor:
    """The tokens [b * n, t] that a model with deltas adds to causal rows, or answers with as an encoder-decoder.

    Where all rows are of one adaptation, those tokens that they share in front are run once.

    Args:
        adapted: the backbone and its deltas.
        inputs: input_ids and attention_mask [b, s], causal rows padded on the left.
        adaptation: a slot for all rows, or one a row [b].
        config: how to generate; the model's own where none is given. n is its num_return_sequences.

    Raises:
        ConfigError: the config asks for more than the tokens; run the model's own `generate` within `generating`.
    """
    model = adapted.model
    config = model.generation_config if config is None else config
    if config.return_dict_in_generate:
        raise ConfigError(
            "generate gives tokens alone; for scores too, run adapted.model.generate(...) within adapted.generating()"
        )
    each = max(config.num_beams or 1, config.num_return_sequences or 1)
    with adapted.generating(adaptation, each):
        if adapted.backbone.kind != "causal":
            return cast(Tensor, model.generate(**inputs, generation_config=config))
        ids, front = inputs["input_ids"], None
        if not isinstance(adaptation, Tensor) and _shares(config):
            front = begun(adapted.backbone, inputs, each, _more(config, ids.shape[1]))
        if front is not None:
            inputs = {
                "input_ids": torch.cat([front.shared.expand(len(ids), -1), front.inputs["input_ids"]], dim=1),
                "attention_mask": front.inputs["attention_mask"],
                "past_key_values": front.cache,
            }
        return cast(Tensor, model.generate(**inputs, generation_config=config))[:, ids.shape[1] :]


def _shares(config: GenerationConfig) -> bool:
    """Whether keys and values are kept in the usual way, and nothing asks in which columns earlier tokens stand."""
    told = config.to_dict()
    return told.get("use_cache") is not False and not any(told.get(name) for name in OTHERWISE)


def _more(config: GenerationConfig, length: int) -> float:
    """The most tokens that are generated behind `length`."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    return inf if config.max_length is None else max(int(config.max_length) - length, 0)
