"""What each number of a config means, and the size it has in a tiny model: told by its name, then by its relations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

WIDTH = "width"
ROLES: tuple[tuple[str, str], ...] = (  # the first pattern that matches a whole name tells the number's role
    (r".*(_id|_ids|_token_index|_token|_idx)", "token"),
    (r"n_langs|num_labels|pretraining_tp|number_of_conv_states|chunk_size_feed_forward", "kept"),
    (r".*vocab(_size)?(_per_layer_input|_base)?|.*_vocab|n_vocab|unpadded_vocab_size|.*_vocab_size.*", "vocabulary"),
    (r"(.*_)?(num|n)_(.*_)?layers?|(en|de)coder_layers|.*_(en|de)coder_layers|depth|n_layers?|num_blocks", "layers"),
    (r"(.*_)?(num|n)_(key_value|kv|kv_.*)_heads|kv_n_heads|num_kv_heads|.*_kv_heads|(.*_)?n_kv_heads", "kv_heads"),
    (r"(num|n)_(experts?|routed_experts|local_experts)|.*num_experts|zero_expert_num", "experts"),
    (r".*(num|n)_experts_per_tok(en)?|.*top_?k(_experts)?|moe_k|.*_topk", "chosen"),
    (r".*experts_(num|count)|.*num_shared_experts|n_shared_experts", "few"),
    (r"n_group|topk_group|num_expert_group|.*n_groups?|.*ngroups", "few"),
    (r".*head_dim|.*head_size|.*d_head|d_kv|.*headdim|dim_head|kv_channels", "head_dim"),
    (r"(.*_)?(num|n)_(.*_)?heads?|(.*_)?attention_heads|.*n_heads", "heads"),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|hidden_dim|d_ff|dff|dim_ff|mlp_dim|d_inner)(_.*)?", "inner"),
    (r"feed_forward_size", "inner"),
    (r"(.*_)?hidden_size|(.*_)?d_model|n_embd|dim|emb_dim|embed_dim|embedding_size|.*_hidden_size|output_dim", WIDTH),
    (r".*embedding_dim|.*embed_proj_dim|.*output_dim|.*out_dim|lru_width|.*latents", WIDTH),
    (r".*max_.*position.*|n_positions|n_ctx|max_seq_len|context_length|model_max_length", "positions"),
    (r".*_rank|.*lora.*", "rank"),
)


@dataclass(frozen=True)
class Plan:
    """One choice of sizes; `tiny` tries a few, since some models ask for more of one or less of another."""

    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    inner: int = 48
    layers: int = 2
    vocabulary: int = 160
    positions: int = 64
    experts: int = 4
    chosen: int = 2
    few: int = 1
    rank: int = 8
    other: int = 16


def role_of(name: str) -> str | None:
    """The role that a number's name tells."""
    return next((role for pattern, role in ROLES if re.fullmatch(pattern, name)), None)


def shrunk_numbers(numbers: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """The numbers of one config made small; equal stays equal, a multiple of a named number stays that multiple."""
    small: dict[str, int] = {}
    for name, value in numbers.items():
        role = role_of(name)
        if role == "kv_heads":
            query = next((v for n, v in numbers.items() if role_of(n) == "heads"), value)
            small[name] = min(value, plan.heads if value >= query else plan.kv_heads)
        elif role not in (None, "token", "kept"):
            small[name] = min(value, plan.__dict__[role])
    for name, value in numbers.items():
        if name not in small and role_of(name) is None:
            small[name] = _related(value, numbers, small) or min(value, plan.other)
    return small


def _related(value: int, numbers: Mapping[str, int], small: Mapping[str, int]) -> int | None:
    """The small number that relates to the named ones as `value` does; None where nothing is found."""
    if value < 32:
        return None
    for name, other in numbers.items():
        if role_of(name) in (WIDTH, "inner") and name in small:
            if other and value % other == 0 and value // other <= 4:
                return small[name] * (value // other)
            if other % value == 0 and other // value <= 16:
                return max(small[name] // (other // value), 1)
    return None
