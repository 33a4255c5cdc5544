"""The fields of PEFT's configs (0.21): which are read, which change no logits, and which must be empty.

A field that is in none of the three tables must be empty too: it is of a later PEFT, or of another library, and may
change what the adapter computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltaprompt.errors import StoreError

LORA, IA3, PROMPT, PREFIX = "LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING"
METHODS = (LORA, IA3, PROMPT, PREFIX)
EMPTY: tuple[object, ...] = (None, False, "", "none", [], {})

_TARGETS = {"target_modules", "exclude_modules"}
_SHAPES = {"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"}
READ: Mapping[str, set[str]] = {
    LORA: _TARGETS
    | {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
    | {"layers_to_transform", "layers_pattern", "init_lora_weights"},
    IA3: _TARGETS | {"feedforward_modules"},
    PROMPT: {"task_type", *_SHAPES},
    PREFIX: {"task_type", *_SHAPES},
}

_NAMES, _PATTERNS = (str, list), (dict,)
SHAPED: Mapping[str, tuple[type, ...]] = {  # what a field that is read is, where it is not empty
    **dict.fromkeys(("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"), _NAMES),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _PATTERNS),
    "layers_to_transform": (int, list),
    "lora_dropout": (int, float),
}

_ORIGIN = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_START = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
HARMLESS: Mapping[str, set[str]] = {  # how training began, how weights are laid out or sharded, who wrote it
    LORA: _ORIGIN
    | {"inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"},  # told by init_lora_weights
    IA3: _ORIGIN | {"inference_mode", "fan_in_fan_out", "init_ia3_weights"},
    PROMPT: _ORIGIN | _START | {"inference_mode"},
    PREFIX: _ORIGIN | {"inference_mode", "encoder_hidden_size", "prefix_projection", "init_weights"},
}

_SAVED = {"modules_to_save": "whole modules were trained and saved beside the adapter, such as a classification head"}
MUST_BE_EMPTY: Mapping[str, Mapping[str, str]] = {
    LORA: {
        **_SAVED,
        "bias": "biases of the model itself were trained; train them here by BitFit",
        "lora_bias": "B has a bias of its own",
        "trainable_token_indices": "rows of the embedding were trained; use a soft prompt for new tokens",
        "target_parameters": "it adapts parameters that are not linear maps, such as stacked experts",
        "layer_replication": "layers of the model are repeated",
        "alora_invocation_tokens": "it acts from an invocation sequence on only (aLoRA)",
        "use_qalora": "inputs are pooled in groups before A (QALoRA)",
        "use_bdlora": "A or B is block-diagonal (BD-LoRA)",
        "arrow_config": "tokens are routed among several adapters (Arrow)",
        "monteclora_config": "its weights are drawn at random (MonteCLoRA)",
        "kasa_config": "it truncates the model's own weights (KaSA)",
        "velora_config": "its backward pass is approximated (VeLoRA)",
        "megatron_config": "it is laid out for Megatron's parallel layers",
        "ensure_weight_tying": "adapters of tied modules are tied",
    },
    IA3: _SAVED,
    PROMPT: _SAVED,
    PREFIX: _SAVED,
}

ON_OTHER_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that change the model's own weights
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "true", "false")


def method_of(config: Mapping[str, Any], path: object) -> str:
    """The method of a config, one of `METHODS`, once no field of it changes the logits in a way that is not read.

    Raises:
        StoreError: another method, or a field with a value that has no form here.
    """
    method = config.get("peft_type")
    if method not in METHODS:
        raise StoreError(f"{path} is of PEFT's method {method!r}; {', '.join(METHODS)} can be opened")
    for field, value in config.items():
        _check_shape(field, value, path)
        if field in READ[method] or field in HARMLESS[method] or value in EMPTY:
            continue
        reason = MUST_BE_EMPTY[method].get(field)
        if reason is None:
            raise StoreError(
                f"{path} has the field {field} = {value!r}, which DeltaPrompt does not know and which may change what "
                f"the adapter computes. Known fields of {method} are those of peft 0.21; if it changes nothing, take "
                "it out of the file"
            )
        raise StoreError(f"{path} has {field} = {value!r}: {reason}. That has no form here; open it with peft")
    _check_start(config.get("init_lora_weights"), path)
    return str(method)


def _check_shape(field: str, value: object, path: object) -> None:
    """An error where a field holds another sort of value than PEFT writes there."""
    possible = SHAPED.get(field)
    if possible is not None and value is not None and not isinstance(value, possible):
        names = " or ".join(kind.__name__ for kind in possible)
        raise StoreError(f"{path} has {field} = {value!r}; {names} is possible. Get the folder again")


def _check_start(start: object, path: object) -> None:
    """An error where the adapter is one of a model whose own weights were changed before training."""
    name = start.lower() if isinstance(start, str) else start
    if isinstance(name, str) and name.startswith(ON_OTHER_WEIGHTS):
        raise StoreError(
            f"{path} has init_lora_weights = {start!r}, which takes its start out of the model's own weights, so the "
            "tensors alone do not tell the change. Save it with peft as an ordinary LoRA: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=…)"
        )
    if name not in PLAIN_STARTS:
        raise StoreError(
            f"{path} has init_lora_weights = {start!r}, which DeltaPrompt does not know; open it with peft"
        )
