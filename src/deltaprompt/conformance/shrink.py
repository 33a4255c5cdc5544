"""`tiny(architecture)`: a random model of a text architecture that transformers knows, with under a million weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.load import wrap
from deltaprompt.conformance.sizes import Plan, role_of, shrunk_numbers
from deltaprompt.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

NOISE = 0.1  # added to every weight, so that norms and biases are not exactly one or zero
TextKind = Literal["masked", "causal", "seq2seq"]
MAPPINGS: dict[TextKind, str] = {
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
SPECIALS = {"pad": 0, "bos": 1, "eos": 2, "unk": 3, "mask": 4}
PLANS = (Plan(), Plan(heads=2, head_dim=16), Plan(kv_heads=4), Plan(width=64, head_dim=16, heads=4))


@dataclass(frozen=True)
class Architecture:
    """One text architecture: its kind, transformers' model type, and the class that transformers maps them to."""

    kind: TextKind
    model_type: str
    class_name: str


def known() -> list[Architecture]:
    """Every text architecture of the installed transformers, by its mappings."""
    from transformers.models.auto import modeling_auto

    return [
        Architecture(kind, model_type, name)
        for kind, mapping in MAPPINGS.items()
        for model_type, name in vars(modeling_auto)[mapping].items()
    ]


def tiny(architecture: Architecture, seed: int = 0) -> PreTrainedModel:
    """A random model of under a million weights: float32, without dropout, always the same for a seed.

    Raises:
        BackboneError: no plan of sizes gives a model that can be built and run.
    """
    reasons: list[str] = []
    for plan in PLANS:
        try:
            with _quiet(), torch.random.fork_rng():
                torch.manual_seed(seed)
                model = _model(architecture, plan)
                _try_out(model, architecture)
                return model
        except Exception as e:
            reasons.append(f"{type(e).__name__}: {e}")
    raise BackboneError(f"no tiny {architecture.class_name} could be built: {reasons[0]}")


def _model(architecture: Architecture, plan: Plan) -> PreTrainedModel:
    import transformers

    config = shrunk(transformers.CONFIG_MAPPING[architecture.model_type](), plan)
    _set_kind(config, architecture.kind)
    model = vars(transformers).get(architecture.class_name) or getattr(transformers, architecture.class_name)
    made = model(config)
    _perturb(made)
    return made.float().eval()


def _set_kind(config: PreTrainedConfig, kind: str) -> None:
    """Models that are encoders or decoders by their config are told which."""
    if "is_decoder" in {f.name for f in fields(config)}:
        config.is_decoder = kind == "causal"


def _perturb(model: PreTrainedModel) -> None:
    """Adds noise to every weight; those that were left uninitialised are noise alone."""
    for t in model.parameters():
        t.data = torch.nan_to_num(t.data, nan=0.0, posinf=0.0, neginf=0.0)
        t.data.add_(torch.randn_like(t), alpha=NOISE)


def _try_out(model: PreTrainedModel, architecture: Architecture) -> None:
    size = sum(p.numel() for p in model.parameters())
    if size >= 1_000_000:
        raise BackboneError(f"{size} weights, where a tiny model has under a million")
    with torch.no_grad():
        logits = model(**inputs_for(model, architecture)).logits
    if not torch.isfinite(logits).all():
        raise BackboneError("its logits are not finite")


def shrunk(config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
    """The same config class with every size made small."""
    from transformers import PreTrainedConfig

    given = {f.name: f.default for f in fields(config)}
    now = {name: vars(config)[name] for name in given if name in vars(config)}
    numbers = {n: v for n, v in now.items() if type(v) is int and given[n] is not None}
    small: dict[str, Any] = dict(shrunk_numbers(numbers, plan))
    depth = next((v for n, v in numbers.items() if n in ("num_hidden_layers", "num_layers", "n_layer")), None)
    for name, value in now.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = shrunk(value, plan)
        elif isinstance(value, float) and "drop" in name:
            small[name] = 0.0
        elif isinstance(value, list) and depth and len(value) == depth:
            small[name] = value[: plan.layers]
        elif type(value) is int and role_of(name) == "token":
            small[name] = value if value < 100 else plan.vocabulary - 1 - value % 50
    return type(config)(**small)


def inputs_for(
    model: PreTrainedModel, architecture: Architecture, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """Two rows of ids [2, 7], one of them padded at `side`, and a decoder's inputs where there is a decoder."""
    ids = torch.arange(14).reshape(2, 7) * 5 % 80 + 7
    mask = torch.ones(2, 7, dtype=torch.long)
    pads = slice(4, None) if side == "right" else slice(None, 3)
    mask[1, pads] = 0
    ids[1, pads] = model.config.get_text_config().to_dict().get("pad_token_id") or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if architecture.kind == "seq2seq" and model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids[:, 1:5] % 6 + 8, "decoder_attention_mask": torch.ones(2, 4).long()}
    return inputs


def backbone(architecture: Architecture, dtype: torch.dtype = torch.float32) -> Backbone:
    """A fresh tiny backbone with a tokenizer of whole words."""
    name = f"{architecture.kind}:{architecture.model_type}"
    return wrap(tiny(architecture).to(dtype), tokenizer(), kind=architecture.kind, name=name)


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, whose ids fit every tiny model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"<{name}>": i for name, i in SPECIALS.items()}
    words |= {f"w{i}": i for i in range(len(words), 100)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **{f"{name}_token": f"<{name}>" for name in SPECIALS})


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' remarks on odd configs, which are not what is tested."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
