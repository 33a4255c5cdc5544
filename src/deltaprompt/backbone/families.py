"""Where each model family keeps the parts that DeltaPrompt names alike: one row a part, one table a family.

A path is relative to the base model; `*` stands for a layer's number. The right side is the common name, with

    attn            the module that calls the attention function
    attn.q+k+v      one linear map whose output is q, k and v one after the other
    attn.q/k/v      one linear map whose output is q, k and v head by head

Families shaped like another are listed in `SHAPED_LIKE`; any other model is tried against every table, then `guess`
works its names out from what its modules are called and how large they are.
"""

from __future__ import annotations

Table = dict[str, str]


def _under(prefix: str, name: str, rows: Table) -> Table:
    """The rows of one layer, put under the layer's path and common name."""
    return {f"{prefix}.{path}": f"{name}.{site}" for path, site in rows.items()}


_BERT_LAYER: Table = {
    "attention.self": "attn",
    "attention.self.query": "attn.q",
    "attention.self.key": "attn.k",
    "attention.self.value": "attn.v",
    "attention.output.dense": "attn.o",
    "attention.output.LayerNorm": "attn.norm",
    "intermediate.dense": "ffn.up",
    "output.dense": "ffn.down",
    "output.LayerNorm": "ffn.norm",
}
_BERT_EMBED: Table = {"embeddings.word_embeddings": "embed", "embeddings.LayerNorm": "embed.norm"}
_BERT = _BERT_EMBED | _under("encoder.layer.*", "layers.*", _BERT_LAYER)

_DEBERTA_LAYER = {
    path.replace("query", "query_proj").replace("key", "key_proj").replace("value", "value_proj"): site
    for path, site in _BERT_LAYER.items()
} | {"attention.self.pos_query_proj": "attn.pos_q", "attention.self.pos_key_proj": "attn.pos_k"}
_MPNET_LAYER: Table = {
    "attention.attn": "attn",
    "attention.attn.q": "attn.q",
    "attention.attn.k": "attn.k",
    "attention.attn.v": "attn.v",
    "attention.attn.o": "attn.o",
    "attention.LayerNorm": "attn.norm",
    "intermediate.dense": "ffn.up",
    "output.dense": "ffn.down",
    "output.LayerNorm": "ffn.norm",
}
_DISTILBERT_LAYER: Table = {
    "attention": "attn",
    "attention.q_lin": "attn.q",
    "attention.k_lin": "attn.k",
    "attention.v_lin": "attn.v",
    "attention.out_lin": "attn.o",
    "sa_layer_norm": "attn.norm",
    "ffn.lin1": "ffn.up",
    "ffn.lin2": "ffn.down",
    "output_layer_norm": "ffn.norm",
}
_ALBERT_LAYER: Table = {
    "attention": "attn",
    "attention.query": "attn.q",
    "attention.key": "attn.k",
    "attention.value": "attn.v",
    "attention.dense": "attn.o",
    "attention.LayerNorm": "attn.norm",
    "ffn": "ffn.up",
    "ffn_output": "ffn.down",
    "full_layer_layer_norm": "ffn.norm",
}
_MODERNBERT_LAYER: Table = {
    "attn": "attn",
    "attn.Wqkv": "attn.q+k+v",
    "attn.Wo": "attn.o",
    "attn_norm": "attn.norm",
    "mlp.Wi": "ffn.gate+up",
    "mlp.Wo": "ffn.down",
    "mlp_norm": "ffn.norm",
}
_GPT2_LAYER: Table = {
    "attn": "attn",
    "attn.c_attn": "attn.q+k+v",
    "attn.c_proj": "attn.o",
    "ln_1": "attn.norm",
    "mlp.c_fc": "ffn.up",
    "mlp.c_proj": "ffn.down",
    "ln_2": "ffn.norm",
}
_NEOX_LAYER: Table = {
    "attention": "attn",
    "attention.query_key_value": "attn.q/k/v",
    "attention.dense": "attn.o",
    "input_layernorm": "attn.norm",
    "mlp.dense_h_to_4h": "ffn.up",
    "mlp.dense_4h_to_h": "ffn.down",
    "post_attention_layernorm": "ffn.norm",
}
_BART_ATTENTION: Table = {
    "": "attn",
    ".q_proj": "attn.q",
    ".k_proj": "attn.k",
    ".v_proj": "attn.v",
    ".out_proj": "attn.o",
    "_layer_norm": "attn.norm",
}
_BART_FFN: Table = {"fc1": "ffn.up", "fc2": "ffn.down", "final_layer_norm": "ffn.norm"}
_BART_SELF = {f"self_attn{path}": site for path, site in _BART_ATTENTION.items()}
_BART_CROSS = {f"encoder_attn{path}": site.replace("attn", "cross", 1) for path, site in _BART_ATTENTION.items()}
_LLAMA_ATTENTION: Table = {
    "self_attn": "attn",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "input_layernorm": "attn.norm",
}
_LLAMA_FFN: Table = {"mlp.gate_proj": "ffn.gate", "mlp.up_proj": "ffn.up", "mlp.down_proj": "ffn.down"}
_LLAMA_LAYER = _LLAMA_ATTENTION | _LLAMA_FFN | {"post_attention_layernorm": "ffn.norm"}
_QK_NORMS: Table = {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
_FOUR_NORMS: Table = {
    "post_attention_layernorm": "attn.post_norm",
    "pre_feedforward_layernorm": "ffn.norm",
    "post_feedforward_layernorm": "ffn.post_norm",
}
_PHI_LAYER: Table = {
    "self_attn": "attn",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.dense": "attn.o",
    "mlp.fc1": "ffn.up",
    "mlp.fc2": "ffn.down",
    "input_layernorm": "attn.norm",
}
_PHI3_LAYER: Table = {
    "self_attn": "attn",
    "self_attn.qkv_proj": "attn.q+k+v",
    "self_attn.o_proj": "attn.o",
    "input_layernorm": "attn.norm",
    "mlp.gate_up_proj": "ffn.gate+up",
    "mlp.down_proj": "ffn.down",
    "post_attention_layernorm": "ffn.norm",
}


def _llama(layer: Table) -> Table:
    return {"embed_tokens": "embed", "norm": "norm"} | _under("layers.*", "layers.*", layer)


def _t5_attention(path: str, module: str, site: str) -> Table:
    maps = {f"{path}.{module}.{p}": f"{site}.{p}" for p in "qkvo"}
    return maps | {f"{path}.{module}": site, f"{path}.layer_norm": f"{site}.norm"}


def _t5_ffn(path: str) -> Table:
    dense = f"{path}.DenseReluDense"
    up = {f"{dense}.wi": "ffn.up", f"{dense}.wi_0": "ffn.gate", f"{dense}.wi_1": "ffn.up"}  # the first, or the others
    return up | {f"{dense}.wo": "ffn.down", f"{path}.layer_norm": "ffn.norm"}


def _t5() -> Table:
    attention = _t5_attention("layer.0", "SelfAttention", "attn")
    cross = _t5_attention("layer.1", "EncDecAttention", "cross")
    ends = {f"{side}.embed_tokens": f"{side}.embed" for side in ("encoder", "decoder")}
    ends |= {f"{side}.final_layer_norm": f"{side}.norm" for side in ("encoder", "decoder")}
    encoder = _under("encoder.block.*", "encoder.layers.*", attention | _t5_ffn("layer.1"))
    return ends | encoder | _under("decoder.block.*", "decoder.layers.*", attention | cross | _t5_ffn("layer.2"))


def _bart() -> Table:
    ends = {f"{side}.embed_tokens": f"{side}.embed" for side in ("encoder", "decoder")}
    ends |= {f"{side}.layernorm_embedding": f"{side}.embed.norm" for side in ("encoder", "decoder")}
    encoder = _under("encoder.layers.*", "encoder.layers.*", _BART_SELF | _BART_FFN)
    return ends | encoder | _under("decoder.layers.*", "decoder.layers.*", _BART_SELF | _BART_CROSS | _BART_FFN)


TABLES: dict[str, Table] = {
    "bert": _BERT,
    "electra": _BERT | {"embeddings_project": "embed.project"},
    "distilbert": _BERT_EMBED | _under("transformer.layer.*", "layers.*", _DISTILBERT_LAYER),
    "albert": _BERT_EMBED
    | {"encoder.embedding_hidden_mapping_in": "embed.project"}
    | _under("encoder.albert_layer_groups.*.albert_layers.*", "layers.*", _ALBERT_LAYER),
    "mpnet": _BERT_EMBED | _under("encoder.layer.*", "layers.*", _MPNET_LAYER),
    "deberta-v2": _BERT_EMBED | _under("encoder.layer.*", "layers.*", _DEBERTA_LAYER),
    "modernbert": {"embeddings.tok_embeddings": "embed", "embeddings.norm": "embed.norm", "final_norm": "norm"}
    | _under("layers.*", "layers.*", _MODERNBERT_LAYER),
    "gpt2": {"wte": "embed", "ln_f": "norm"} | _under("h.*", "layers.*", _GPT2_LAYER),
    "gpt_neox": {"embed_in": "embed", "final_layer_norm": "norm"} | _under("layers.*", "layers.*", _NEOX_LAYER),
    "opt": {
        "decoder.embed_tokens": "embed",
        "decoder.final_layer_norm": "norm",
        "decoder.project_in": "embed.project",
        "decoder.project_out": "norm.project",
    }
    | _under("decoder.layers.*", "layers.*", _BART_SELF | _BART_FFN),
    "llama": _llama(_LLAMA_LAYER),
    "qwen3": _llama(_LLAMA_LAYER | _QK_NORMS),
    "gemma2": _llama(_LLAMA_LAYER | _FOUR_NORMS),
    "gemma3_text": _llama(_LLAMA_LAYER | _QK_NORMS | _FOUR_NORMS),
    "phi": {"embed_tokens": "embed", "final_layernorm": "norm"} | _under("layers.*", "layers.*", _PHI_LAYER),
    "phi3": _llama(_PHI3_LAYER),
    "t5": _t5(),
    "bart": _bart(),
}

SHAPED_LIKE: dict[str, str] = {
    "roberta": "bert",
    "xlm-roberta": "bert",
    "camembert": "bert",
    "mistral": "llama",
    "qwen2": "llama",
    "gemma": "llama",
    "mt5": "t5",
    "umt5": "t5",
}

# What linear maps are called where no table is known, by the last part of their path in lower case.
CALLED: dict[str, tuple[str, ...]] = {
    "q": (
        *("q", "query", "q_proj", "q_lin", "query_proj", "q_head", "project_q", "wq", "to_q", "linear_q"),
        "receptance",  # RWKV
    ),
    "k": ("k", "key", "k_proj", "k_lin", "key_proj", "k_head", "project_k", "wk", "to_k", "linear_k"),
    "v": ("v", "value", "v_proj", "v_lin", "value_proj", "v_head", "project_v", "wv", "to_v", "linear_v"),
    "qkv": ("qkv", "wqkv", "qkv_proj", "query_key_value", "c_attn", "in_proj"),
    "kv": ("kv", "kv_proj", "wkv", "to_kv", "c_kv"),
    "qk": ("query_key",),  # Reformer
    "o": (
        *("o", "o_proj", "out_proj", "out_lin", "wo", "c_proj", "dense", "to_out", "out", "linear_out"),
        *("output", "post_proj", "attention_out"),
    ),
    "gate": ("gate", "gate_proj", "w1", "wi_0", "w_0", "proj_up_gate"),
    "up": (
        *("up", "up_proj", "fc1", "fc_in", "wi", "wi_1", "w3", "w_1", "lin1", "c_fc", "dense_h_to_4h"),
        *("intermediate", "proj_up"),
    ),
    "down": (
        *("down", "down_proj", "fc2", "fc_out", "wo", "w2", "w_out", "lin2", "c_proj", "dense_4h_to_h"),
        *("output", "proj_down"),
    ),
}
