"""The shrinker: tiny models of transformers' text architectures."""

from __future__ import annotations

import pytest
import torch

from deltaprompt.conformance.configs import asked_for, parts, shrunk, special_ids, starting
from deltaprompt.conformance.layers import Kept, kept_layers, speaks_of_layers
from deltaprompt.conformance.shrink import (
    LIMIT,
    WORDS,
    Architecture,
    backbone,
    inputs_for,
    known,
    tiny,
    tokenizer_for,
)
from deltaprompt.conformance.sizes import Plan, role_of, shrunk_numbers
from deltaprompt.errors import BackboneError

SPREAD = (
    "masked:bert",
    "masked:xmod",  # asks for a default language
    "masked:esm",  # has no vocabulary by default
    "masked:mobilebert",  # embeddings narrower than the states
    "masked:reformer",  # seeds, sums of axial widths
    "causal:llama",
    "causal:bamba",  # Mamba heads tied to the width, no attention by default
    "causal:dbrx",  # a part lacks what the whole has
    "causal:deepseek_v3",  # latent attention, experts in groups
    "causal:gemma3n_text",  # shared keys and values, a width for every layer
    "causal:gemma4_text",  # layers with sizes of their own
    "causal:gpt_neo",  # sorts of layers in a nested list
    "causal:jamba",  # periods and offsets
    "causal:qwen3_5",  # the text part of a larger config
    "causal:qwen4_exp_text",  # its checks ask for numbers
    "causal:zamba",  # shares weights between two layers of a sort
    "seq2seq:t5",
    "seq2seq:encoder-decoder",  # configs within a config
    "seq2seq:bart",
)


def find(name: str) -> Architecture:
    return next(a for a in known() if str(a) == name)


def test_known_are_the_mappings_of_transformers() -> None:
    from transformers.models.auto import modeling_auto as auto

    names = known()
    assert Architecture("masked", "bert", "BertForMaskedLM") in names
    assert len(names) == len(set(names))
    assert {a.model_type for a in names if a.kind == "causal"} == set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("name", SPREAD)
def test_a_tiny_model_is_small_finite_and_nowhere_degenerate(name: str) -> None:
    architecture = find(name)
    model = tiny(architecture)
    inputs = inputs_for(model, architecture)
    with torch.no_grad():
        logits = model(**inputs).logits
        trained = model.train()(**inputs).logits
    weights = dict(model.named_parameters())
    assert type(model).__name__ == architecture.class_name
    assert sum(w.numel() for w in weights.values()) < LIMIT
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, trained), "dropout is on"
    assert [n for n, w in weights.items() if w.dtype != torch.float32 or (w == 0).any() or (w == 1).any()] == []


@pytest.mark.parametrize("name", ["masked:bert", "causal:mixtral", "seq2seq:t5"])
def test_a_seed_tells_every_weight(name: str) -> None:
    first, again, other = tiny(find(name)), tiny(find(name)), tiny(find(name), seed=1)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    differ = [not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)]
    assert all(same)
    assert all(differ)


def test_making_a_model_leaves_the_random_state_as_it_was() -> None:
    before = torch.get_rng_state()
    tiny(find("masked:bert"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "sorts"),
    [
        ("causal:qwen3_5", {"linear_attention", "full_attention"}),
        ("causal:gemma3_text", {"sliding_attention", "full_attention"}),
        ("causal:bamba", {"linear_attention", "full_attention"}),
    ],
)
def test_every_sort_of_layer_is_kept(name: str, sorts: set[str]) -> None:
    config = tiny(find(name)).config
    assert set(config.layer_types) == sorts


def test_layers_with_sizes_of_their_own_keep_them_in_proportion() -> None:
    config = tiny(find("causal:gemma4_text")).config  # twice the head size on full attention
    sizes = {sort: config.per_layer_config[i].head_dim for i, sort in enumerate(config.layer_types)}
    assert sizes == {"sliding_attention": 8, "full_attention": 16}


@pytest.mark.parametrize("name", ["causal:qwen3_5", "seq2seq:bart", "causal:phi3", "seq2seq:t5gemma"])
def test_special_ids_are_in_the_vocabulary(name: str) -> None:
    model = tiny(find(name))
    rows = model.get_input_embeddings().num_embeddings
    assert special_ids(model.config) <= set(range(rows))


@pytest.mark.parametrize("side", ["left", "right"])
def test_inputs_have_a_padded_row_and_no_special_ids(side: str) -> None:
    architecture = find("causal:qwen3_5")
    model = tiny(architecture)
    inputs = inputs_for(model, architecture, side=side)  # type: ignore[arg-type]
    pads = [0, 0, 0, 1, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 1, 0, 0, 0]
    words = inputs["input_ids"][inputs["attention_mask"].bool()].tolist()
    assert inputs["attention_mask"].tolist() == [[1] * 8, pads]
    assert not special_ids(model.config) & set(words)
    assert max(words) < WORDS
    assert len(set(words)) == len(words)


def test_an_encoder_decoder_has_decoder_inputs_and_others_have_none() -> None:
    two, one = find("seq2seq:bart"), find("masked:bart")
    assert inputs_for(tiny(two), two)["decoder_input_ids"].shape == (2, 4)
    assert "decoder_input_ids" not in inputs_for(tiny(one), one)


@pytest.mark.parametrize("name", ["masked:roberta", "causal:llama", "seq2seq:t5"])
def test_a_backbone_has_sites_and_a_tokenizer_that_fits(name: str) -> None:
    made = backbone(find(name), torch.bfloat16)
    ids = made.tokenizer("w7 w8 unheard")["input_ids"]
    own = made.config["pad_token_id"]
    assert made.model.dtype == torch.bfloat16
    assert any(site.endswith("attn.q") for site in made.sites)
    assert ids == [7, 8, made.tokenizer.unk_token_id]
    assert len(made.tokenizer) <= made.vocabulary
    assert made.tokenizer.pad_token_id == own if own is not None else made.tokenizer.pad_token_id is not None


def test_special_tokens_of_the_tokenizer_differ() -> None:
    tokenizer = tokenizer_for(tiny(find("masked:roberta")))  # whose padding is 1, and start 0
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id]
    assert ids[:3] == [1, 0, 2]
    assert len(set(ids)) == 4


def test_what_cannot_be_built_is_refused_with_the_reason() -> None:
    with pytest.raises(
        BackboneError, match=r"no tiny ViTModel \(masked:vit\) can be built and run on text: .*vocab_size"
    ):
        tiny(Architecture("masked", "vit", "ViTModel"))


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("hidden_size", "width"),
        ("n_embd", "width"),
        ("num_key_value_heads", "kv_heads"),
        ("kv_n_heads", "kv_heads"),
        ("decoder_attention_heads", "heads"),
        ("mamba_d_head", "head_dim"),
        ("encoder_layers", "layers"),
        ("num_kv_shared_layers", "some layers"),
        ("moe_intermediate_size", "inner"),
        ("num_experts_per_tok", "chosen"),
        ("n_routed_experts", "experts"),
        ("topk_group", "few"),
        ("vocab_size_per_layer_input", "vocabulary"),
        ("image_token_id", "kept"),
        ("chunk_size", None),
    ],
)
def test_a_name_tells_its_role(name: str, role: str | None) -> None:
    assert role_of(name) == role


def test_numbers_keep_their_relations() -> None:
    numbers = {"hidden_size": 4096, "mamba_n_heads": 128, "mamba_d_head": 64, "d_ssm": 8192, "chunk": 100}
    small = shrunk_numbers(numbers, Plan())
    assert small == {"hidden_size": 32, "mamba_n_heads": 8, "mamba_d_head": 8, "d_ssm": 64, "chunk": 100}


def test_heads_that_are_sums_stay_sums() -> None:
    numbers = {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "qk_head_dim": 192, "v_head_dim": 128}
    assert shrunk_numbers(numbers, Plan())["qk_head_dim"] == 16


def test_one_layer_of_every_sort_is_kept_and_two_where_asked() -> None:
    lists = {"types": ["a", "a", "b", "a", "b", "b"], "dense_layers": [0]}
    assert kept_layers(lists, 6, 2, each=1).layers == (0, 1, 2)
    assert kept_layers(lists, 6, 2, each=2).layers == (0, 1, 2, 3, 5)
    assert kept_layers({}, 6, 2, each=1).layers == (0, 5)


def test_lists_and_counts_follow_the_kept_layers() -> None:
    kept = Kept(6, (0, 2, 5))
    assert kept.of(["a", "b", "c", "d", "e", "f"]) == ["a", "c", "f"]
    assert kept.of([1, 2, 5]) == [1, 2]
    assert [kept.count(n) for n in (0, 1, 3, 5, 6)] == [0, 1, 2, 2, 3]


def test_a_list_speaks_of_layers_by_its_length_or_its_name() -> None:
    assert speaks_of_layers("sorts", ["a", "b"], 2)
    assert speaks_of_layers("attn_layer_indices", [1, 3], 8)
    assert not speaks_of_layers("channels", [1, 3], 8)


def test_what_an_error_asks_for_is_read() -> None:
    assert asked_for("ValueError: hidden_size_per_layer_input must be 0, got 256") == {"hidden_size_per_layer_input": 0}
    assert asked_for("X requires `kv_heads`=1.") == {"kv_heads": 1}
    assert asked_for("missing required fields: ['budget', 'ratio'].") == {"budget": 2, "ratio": 2}
    assert asked_for("something else") == {}


def test_all_parts_of_a_config_are_made_small() -> None:
    from transformers import EncoderDecoderConfig

    config = starting(EncoderDecoderConfig, {})
    small = shrunk(config, Plan(), "transformers.models.encoder_decoder.modeling_encoder_decoder", {})
    assert [part.hidden_size for part in parts(small) if "hidden_size" in vars(part)] == [32, 32]
    assert small.decoder.add_cross_attention
