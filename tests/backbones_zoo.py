"""Tiny random backbones of every family: `build("bert")`, `build("llama")`, … (see `FAMILIES`, `UNTABLED`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers.utils import logging

from deltaprompt.backbone import Backbone, Kind
from deltaprompt.backbone.load import wrap
from tests import tokenizers_zoo

Spec = tuple[str, str, str, dict[str, Any]]  # prefix of the config's name, the model class, tokenizer, config

WIDTHS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
DROPOUTS: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {**WIDTHS, "num_key_value_heads": 2, "head_dim": 4, "attention_dropout": 0.0}
BERT = {**WIDTHS, **DROPOUTS}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
DEBERTA_V3 = {**DEBERTA, "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
OPT = {
    **{k: v for k, v in WIDTHS.items() if k != "intermediate_size"},
    "ffn_dim": 24,
    "word_embed_proj_dim": 16,
    "dropout": 0.0,
}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
T5_GATED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SIDES = ("encoder_layers", "decoder_layers")
BART = {
    "d_model": 16,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    **dict.fromkeys(SIDES, 2),
    **dict.fromkeys((f"{s.removesuffix('layers')}attention_heads" for s in SIDES), 4),
    **dict.fromkeys((f"{s.removesuffix('layers')}ffn_dim" for s in SIDES), 24),
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, **dict.fromkeys(("resid_pdrop", "embd_pdrop"), 0.0)}
DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 64}

HALF_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

FAMILIES: dict[str, Spec] = {
    "bert": ("Bert", "BertForMaskedLM", "bert", BERT),
    "roberta": ("Roberta", "RobertaForMaskedLM", "roberta", BERT),
    "xlm-roberta": ("XLMRoberta", "XLMRobertaForMaskedLM", "roberta", BERT),
    "distilbert": ("DistilBert", "DistilBertForMaskedLM", "bert", {**DISTILBERT, "dropout": 0, "attention_dropout": 0}),
    "albert": ("Albert", "AlbertForMaskedLM", "bert", {**BERT, "embedding_size": 8, "num_hidden_groups": 2}),
    "electra": ("Electra", "ElectraForMaskedLM", "bert", {**BERT, "embedding_size": 8}),
    "mpnet": ("MPNet", "MPNetForMaskedLM", "roberta", BERT),
    "deberta-v2": ("DebertaV2", "DebertaV2ForMaskedLM", "bert", DEBERTA),
    "deberta-v3": ("DebertaV2", "DebertaV2ForMaskedLM", "bert", DEBERTA_V3),
    "modernbert": ("ModernBert", "ModernBertForMaskedLM", "bert", {**WIDTHS, "local_attention": 4}),
    "gpt2": ("GPT2", "GPT2LMHeadModel", "gpt2", {**GPT2, "attn_pdrop": 0.0}),
    "gpt_neox": ("GPTNeoX", "GPTNeoXForCausalLM", "gpt2", WIDTHS),
    "opt": ("OPT", "OPTForCausalLM", "gpt2", OPT),
    "opt-projected": ("OPT", "OPTForCausalLM", "gpt2", {**OPT, "word_embed_proj_dim": 8}),
    "llama": ("Llama", "LlamaForCausalLM", "llama", LLAMA),
    "mistral": ("Mistral", "MistralForCausalLM", "llama", {**LLAMA, "sliding_window": 4}),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", "chatml", LLAMA),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", "chatml", LLAMA),
    "gemma": ("Gemma", "GemmaForCausalLM", "llama", LLAMA),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", "llama", {**LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 4}),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", "llama", {**LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 4}),
    "phi": ("Phi", "PhiForCausalLM", "gpt2", {**WIDTHS, "resid_pdrop": 0.0}),
    "phi3": ("Phi3", "Phi3ForCausalLM", "llama", {**LLAMA, "resid_pdrop": 0.0}),
    "t5": ("T5", "T5ForConditionalGeneration", "t5", T5),
    "t5-gated": ("T5", "T5ForConditionalGeneration", "t5", T5_GATED),
    "bart": ("Bart", "BartForConditionalGeneration", "roberta", BART),
    "bert-encoder": ("Bert", "BertModel", "bert", BERT),
    "mpnet-encoder": ("MPNet", "MPNetModel", "roberta", BERT),
}

UNTABLED: dict[str, Spec] = {
    "stablelm": (
        "StableLm",
        "StableLmForCausalLM",
        "gpt2",
        {**WIDTHS, "num_key_value_heads": 2, "rope_parameters": HALF_ROPE},
    ),
    "cohere": ("Cohere", "CohereForCausalLM", "llama", {**LLAMA, "logit_scale": 0.25}),
    "granite": ("Granite", "GraniteForCausalLM", "llama", {**LLAMA, "logits_scaling": 3.0}),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", "gpt2", {**WIDTHS, "num_key_value_heads": 2}),
    "starcoder2": ("Starcoder2", "Starcoder2ForCausalLM", "gpt2", {**WIDTHS, "num_key_value_heads": 2}),
    "bloom": ("Bloom", "BloomForCausalLM", "gpt2", {"hidden_size": 16, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", "FalconForCausalLM", "gpt2", {**WIDTHS, "new_decoder_architecture": False}),
    "gptj": ("GPTJ", "GPTJForCausalLM", "gpt2", {**GPT2, "rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeo",
        "GPTNeoForCausalLM",
        "gpt2",
        {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "marian": ("Marian", "MarianMTModel", "t5", BART),
    "pegasus": ("Pegasus", "PegasusForConditionalGeneration", "t5", BART),
}


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' remarks on odd configs, which are not what is tested."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def config_of(spec: Spec) -> Any:
    """The config of a tiny model, with the vocabulary of its tokenizer."""
    prefix, _, kind, options = spec
    tokenizer = tokenizers_zoo.build(kind)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    ends = {"pad_token_id": pad, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": end}
    if "d_model" in options:
        ends |= {"decoder_start_token_id": pad}
    return getattr(transformers, f"{prefix}Config")(vocab_size=len(tokenizer), **ends, **options)


def model(family: str) -> Any:
    """A fresh random model, always the same; norms and biases are random too, so that none can be left out."""
    spec = (FAMILIES | UNTABLED)[family]
    cls = getattr(transformers, spec[1])
    options = {"add_pooling_layer": False} if family.endswith("-encoder") else {}
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        made = cls(config_of(spec), **options)
        for name, t in (*made.named_parameters(), *made.named_buffers()):
            if isinstance(t, torch.nn.Parameter) or name == "final_logits_bias":  # BART's, a buffer
                t.data.add_(torch.randn_like(t), alpha=0.1)
    return made.eval()


def build(family: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """A fresh backbone of a family; its tokenizer is shared and must not be changed."""
    kind: Kind | None = "encoder" if family.endswith("-encoder") else None
    tokenizer = tokenizers_zoo.build((FAMILIES | UNTABLED)[family][2])
    with quiet():
        return wrap(model(family).to(dtype), tokenizer, kind=kind, name=family)


def inputs_of(backbone: Backbone, side: str = "right") -> dict[str, torch.Tensor]:
    """Two rows, one of them padded, and a decoder's inputs where there is a decoder."""
    size = backbone.vocabulary
    ids = torch.arange(14).reshape(2, 7) * 5 % (size - 8) + 7
    mask = torch.ones(2, 7, dtype=torch.long)
    pads = slice(4, None) if side == "right" else slice(None, 3)
    mask[1, pads] = 0
    ids[1, pads] = backbone.tokenizer.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if backbone.kind == "seq2seq":
        inputs |= {
            "decoder_input_ids": ids[:, 1:5] % 6 + 8,
            "decoder_attention_mask": torch.ones(2, 4, dtype=torch.long),
        }
    return inputs
