"""What each number of a config means, and the size it has in a tiny model: told by its name, then by its relations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ROLES: tuple[tuple[str, str], ...] = (  # the first pattern that matches a whole name tells the number's role
    (r".*(_id|_ids|_token_index|_token|_idx|_index|vocab_offset)", "kept"),
    (r".*kernel.*|.*stride.*|n_langs|num_quantizers|num_labels|.*distance|.*buckets|max_pos_emb|context_size", "kept"),
    (r"num_filters|.*codebooks", "few"),
    (r".*vocab(_size)?(_.*)?|.*_vocab", "vocabulary"),
    (r".*kv_shared_layers|first_k_dense_replace|.*window_layers|.*dense_layers|.*_layer_(start|end)_.*", "some layers"),
    (r".*layer_offset", "offset"),
    (r".*(layer_period|interval|every_n_layers|sparse_step|window_pattern|layer_group_size)", "period"),
    (r"((.*_)?(num|n)_|(.*_)?(en|de)coder_)(.*_)?layers?(_per_.*)?|depths?|n_layers?|(.*_)?num_blocks", "layers"),
    (r"num_self_attends_per_block", "layers"),
    (r"(.*_)?(num_)?(key_value|kv)(_n)?_heads|(.*_)?(num|n)_kv_heads", "kv_heads"),
    (r"(.*_)?(num|n)_shared_experts|moe_num_shared_experts", "few"),
    (r"n_group|topk_group|num_expert_group|.*n_?groups", "few"),
    (r"((.*_)?(num|n)_|zero_)(.*_)?experts?(_num)?", "experts"),
    (r".*experts_per_tok(en)?|.*top_?k(_.*)?|moe_k", "chosen"),
    (r".*head_?dim|.*head_size|.*d_head|d_kv|dim_head|kv_channels|rotary_dim|.*attn_scalar", "head_dim"),
    (r"(.*_)?(num|n)_(.*_)?heads?|(.*_)?attention_heads", "heads"),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|hidden_dim|d_ff|dff|dim_ff|mlp_dim|d_inner)(_.*)?", "inner"),
    (r"feed_forward_size", "inner"),
    (r"(.*_)?hidden_size(_.*)?|(.*_)?d_model|n_embd|dim|emb_dim|embed_dim|embedding_size|lru_width", "width"),
    (r".*(embedding|embed)_dim|.*_embedding_size|.*embed_proj_dim|.*output_dim|.*out_dim|d_latents", "width"),
    (r".*max_.*position.*|n_positions|n_ctx|max_seq_len|context_length|model_max_length", "positions"),
    (r".*_rank|.*lora.*", "rank"),
    (
        r".*sliding_window(_size)?|local_attention|attention_window(_size)?|.*attention_chunk_size|.*attn_chunk_length",
        "window",
    ),
    (r".*multiple_of", "multiple"),
)
FACTORS = (1, 2, 3, 4, 6, 8)  # multiples that are taken for a relation rather than chance
LONG = 1 << 16  # a larger number is no size of a weight: a sampling rate, a length


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
    window: int = 4
    period: int = 2
    offset: int = 1
    multiple: int = 8
    other: int = LONG  # for numbers whose name tells nothing; left as they are unless the model is too large
    each: int = 1  # how many layers of every sort there are, at least
    fill: bool = False  # whether numbers without a default get one

    def of(self, role: str) -> int:
        """The size that a role has."""
        return int(vars(self)[role])


def role_of(name: str) -> str | None:
    """The role that a number's name tells."""
    return next((role for pattern, role in ROLES if re.fullmatch(pattern, name)), None)


def shrunk_numbers(numbers: Mapping[str, int], plan: Plan) -> dict[str, int]:
    """The numbers of one config made small; those that are multiples of others stay such multiples."""
    roles = {name: role_of(name) for name in numbers}
    small = {name: value for name, value in numbers.items() if roles[name] in ("kept", "some layers")}
    for name, value in numbers.items():
        role = roles[name]
        if role == "kv_heads":
            small[name] = min(value, plan.heads if value >= _first(numbers, "heads") else plan.kv_heads)
        elif role == "vocabulary":
            small[name] = value if value <= 2 * plan.vocabulary else plan.vocabulary
        elif role == "width" and "emb" in name and value < _first(numbers, "width"):
            small[name] = min(value, plan.width // 2)  # embeddings narrower than the states stay narrower
        elif role is not None and name not in small:
            small[name] = min(value, plan.of(role))
    for name, value in numbers.items():
        if name not in small:
            small[name] = _related(value, numbers, small) or (min(value, plan.other) if value < LONG else value)
    small |= dict(_head_counts(numbers, small))
    return small | dict(_head_sums(numbers, small))


def _first(numbers: Mapping[str, int], role: str) -> int:
    """The first number of a role; of the widths, that of the states where it has its common name."""
    found = {n: v for n, v in numbers.items() if role_of(n) == role}
    return found.get("hidden_size", next(iter(found.values()), 0))


def _related(value: int, numbers: Mapping[str, int], small: Mapping[str, int]) -> int | None:
    """The small number that relates to a width as `value` does; None where nothing is found."""
    if value < 32:
        return None
    for name, width in numbers.items():
        if role_of(name) in ("width", "inner") and width:
            if value % width == 0 and value // width in FACTORS:
                return small[name] * (value // width)
            if width % value == 0 and small[name] % (width // value) == 0:
                return small[name] // (width // value)
    return None


def _head_counts(numbers: Mapping[str, int], small: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Head counts that times their head's size give a multiple of some width, as in the default config."""
    for count, size in ((c, s) for c in numbers for s in numbers if _paired(c, s)):
        product = numbers[count] * numbers[size]
        for factor in FACTORS:
            roles = ("width", None) if factor == 1 else ("width",)
            wide = [n for n, v in numbers.items() if v * factor == product and role_of(n) in roles]
            if wide and (small[wide[0]] * factor) % small[size] == 0:
                yield count, small[wide[0]] * factor // small[size]
                break


def _head_sums(numbers: Mapping[str, int], small: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Head sizes that are the sum of a part with rotary positions and one without (multi-head latent attention)."""
    halves = [n for n in numbers if re.fullmatch(r"qk_(rope|nope)_head_dim", n)]
    for name, value in numbers.items():
        if len(halves) == 2 and role_of(name) == "head_dim" and value == sum(numbers[h] for h in halves):
            yield name, sum(small[h] for h in halves)


def _paired(count: str, size: str) -> bool:
    """Whether a head count and a head size are of the same heads."""
    if role_of(count) != "heads" or role_of(size) != "head_dim":
        return False
    first, other = count.split("_")[0], size.split("_")[0]
    return first == other or (first in ("num", "n") and other in ("head", "dim", "d"))
