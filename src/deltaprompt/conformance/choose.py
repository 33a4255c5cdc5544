"""Which architectures and which deltas a run of the conformance proof is about."""

from __future__ import annotations

from fnmatch import fnmatchcase

from deltaprompt import registry
from deltaprompt.conformance.shrink import MAPPINGS, Architecture, known
from deltaprompt.errors import ConfigError, nearest

SPREAD: tuple[str, ...] = (  # forty that cover what models are made of
    "masked:bert",
    "masked:albert",  # one layer's weights for all
    "masked:bart",  # a decoder that reads the same ids
    "masked:convbert",  # convolutions beside attention
    "masked:deberta-v2",  # maps of relative positions
    "masked:fnet",  # no attention
    "masked:funnel",  # sequences that are pooled
    "masked:longformer",  # [s, b, d]; in float32
    "masked:mobilebert",  # four feed-forward blocks in a layer
    "masked:modernbert",  # fused queries, keys and values; fused gate and up
    "masked:reformer",  # a backward pass of its own; queries that are keys
    "masked:xlm",  # lists of parts side by side
    "causal:llama",
    "causal:bloom",  # fused head by head, in code of its own
    "causal:deepseek_v3",  # latent attention, shared experts
    "causal:deepseek_v32",  # an indexer without gradient
    "causal:falcon",  # one key for several queries, fused
    "causal:gemma4_text",  # embeddings of each layer, keys and values shared
    "causal:gpt2",  # turned weights
    "causal:gpt_neox",  # fused head by head
    "causal:gpt_oss",  # fused experts, attention sinks
    "causal:jamba",  # attention, Mamba and experts
    "causal:jetmoe",  # experts in attention
    "causal:longcat_flash",  # two sub-layers in a layer
    "causal:mamba2",  # a state space alone
    "causal:mixtral",  # fused experts
    "causal:phi3",  # fused q, k, v; fused gate and up
    "causal:qwen3_next",  # linear attention
    "causal:recurrent_gemma",  # gated linear recurrence
    "causal:rwkv",  # recurrence with receptance
    "causal:xlnet",  # maps that are parameters, [s, b, d]
    "causal:zamba2",  # a block shared by several layers
    "seq2seq:t5",  # relative position biases of the first layer
    "seq2seq:bart",
    "seq2seq:encoder-decoder",  # a model of two
    "seq2seq:led",  # windows in the encoder
    "seq2seq:nllb-moe",  # experts that are modules
    "seq2seq:prophetnet",  # several tokens at once
    "seq2seq:switch_transformers",  # experts in float32's router
    "seq2seq:t5gemma",  # a decoder's layers on both sides
)


def chosen_models(text: str) -> list[Architecture]:
    """Architectures by `all`, `spread`, kinds, types, `kind:type` and patterns with `*`, joined by commas.

    Raises:
        ConfigError: a name is none of these.
    """
    every = known()
    wanted: set[str] = set()
    for name in (piece.strip() for piece in text.split(",")):
        found = {str(a) for a in every if _is_meant(name, a)}
        if not found:
            possible = [*map(str, every), *(a.model_type for a in every)]
            raise ConfigError(
                f"--models {name!r} is no text architecture of the installed transformers{nearest(name, possible)}"
            )
        wanted |= found
    return [a for a in every if str(a) in wanted]


def _is_meant(name: str, architecture: Architecture) -> bool:
    if name in ("all", "spread"):
        return name == "all" or str(architecture) in SPREAD
    if name in MAPPINGS:
        return architecture.kind == name
    return fnmatchcase(str(architecture) if ":" in name else architecture.model_type, name)


def chosen_deltas(text: str) -> list[str]:
    """Names of deltas by `all` or names joined by commas.

    Raises:
        ConfigError: there is no delta of that name.
    """
    possible = sorted(registry.variants("deltas"))
    if text == "all":
        return possible
    names = list(dict.fromkeys(piece.strip() for piece in text.split(",")))
    for name in names:
        if name not in possible:
            raise ConfigError(f"--deltas {name!r} is no delta{nearest(name, possible)}")
    return names
