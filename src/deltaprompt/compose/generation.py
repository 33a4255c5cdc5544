"""Generation by the model's own `generate`, in which tokens that all rows begin with are run once."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from math import inf
from typing import TYPE_CHECKING, Final, cast

import torch
from torch import Tensor

from deltaprompt.backbone.shared import begun
from deltaprompt.compose.routing import Index
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from deltaprompt.compose.adapted import Adapted

HARMLESS: Final = frozenset(  # settings that do not ask in which columns earlier tokens stand
    {
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "use_cache", "early_stopping"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("num_beams", "num_return_sequences", "length_penalty", "repetition_penalty", "renormalize_logits"),
        *("num_beam_groups", "diversity_penalty", "encoder_repetition_penalty", "suppress_tokens"),
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "transformers_version"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind"),
    }
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
    model, told = adapted.model, _settled(adapted.model, config)
    if told.return_dict_in_generate:
        raise ConfigError(
            "generate gives tokens alone; for scores too, run adapted.model.generate(...) within adapted.generating()"
        )
    each = max(told.num_beams or 1, told.num_return_sequences or 1)
    with adapted.generating(adaptation, each):
        if adapted.backbone.kind != "causal":
            return cast(Tensor, model.generate(**inputs, generation_config=config))
        ids, front = inputs["input_ids"], None
        if not isinstance(adaptation, Tensor) and _shares(told):
            front = begun(adapted.backbone, inputs, each, _more(told, ids.shape[1]))
        if front is not None:
            inputs = {
                "input_ids": torch.cat([front.shared.expand(len(ids), -1), front.inputs["input_ids"]], dim=1),
                "attention_mask": front.inputs["attention_mask"],
                "past_key_values": front.cache,
            }
        return cast(Tensor, model.generate(**inputs, generation_config=config))[:, ids.shape[1] :]


def _settled(model: PreTrainedModel, config: GenerationConfig | None) -> GenerationConfig:
    """A config with the model's own settings where it has none, as `generate` will have it."""
    from transformers import GenerationConfig

    told = GenerationConfig() if config is None else deepcopy(config)
    told.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    return told


def _shares(told: GenerationConfig) -> bool:
    """Whether keys and values are kept in the usual way, and nothing asks in which columns earlier tokens stand."""
    given = (name for name, value in told.to_dict().items() if value and not name.startswith("_"))
    return told.use_cache is not False and HARMLESS.issuperset(given)


def _more(told: GenerationConfig, length: int) -> float:
    """The most tokens that are generated behind `length`."""
    if told.max_new_tokens is not None:
        return int(told.max_new_tokens)
    return inf if told.max_length is None else max(int(told.max_length) - length, 0)
