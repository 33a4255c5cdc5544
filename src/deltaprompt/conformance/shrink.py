"""`tiny(architecture)`: a random model of a text architecture that transformers knows, with under a million weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from deltaprompt.backbone import Backbone, Kind
from deltaprompt.backbone.load import wrap
from deltaprompt.conformance.configs import asked_for, parts, shrunk, special_ids, starting
from deltaprompt.conformance.sizes import Plan
from deltaprompt.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

TextKind = Literal["masked", "causal", "seq2seq"]
MAPPINGS: dict[TextKind, str] = {
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
LIMIT = 1_000_000  # weights
NOISE = 0.1  # added to every weight, so that norms and biases are not exactly one or zero
WORDS = 100  # the most words that a tiny model's tokenizer has
ROUNDS = 6  # of mending a config by what its errors say
SPECIALS = ("pad", "bos", "eos", "unk", "mask")
EXCEPTIONS: dict[str, dict[str, int]] = {
    "reformer": {"axial_pos_embds": False},  # which in training take sequences of one length only, that of their shape
}
FIRST = Plan()
PLANS = (
    FIRST,
    replace(FIRST, each=2),
    replace(FIRST, fill=True),
    replace(FIRST, few=4),
    replace(FIRST, other=16),
    replace(FIRST, other=16, fill=True),
    replace(FIRST, heads=2, head_dim=16),
    replace(FIRST, width=128, heads=2, head_dim=64, inner=192),
)


@dataclass(frozen=True)
class Architecture:
    """One text architecture: its kind, transformers' model type, and the class that transformers maps them to."""

    kind: TextKind
    model_type: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.model_type}"


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
                return _built(architecture, plan)
        except Exception as e:
            reasons.append(f"{type(e).__name__}: {' '.join(str(e).split())}")
    reason, _ = Counter(reasons).most_common(1)[0]
    raise BackboneError(f"no tiny {architecture.class_name} ({architecture}) can be built and run on text: {reason}")


def _built(architecture: Architecture, plan: Plan) -> PreTrainedModel:
    """A model of these sizes that has run, its config mended by what its own checks ask for."""
    import transformers

    cls = getattr(transformers, architecture.class_name)
    config_class = transformers.CONFIG_MAPPING[architecture.model_type]
    asked = dict(EXCEPTIONS.get(architecture.model_type, {}))
    for _ in range(ROUNDS):
        try:
            config = shrunk(starting(config_class, asked), plan, cls.__module__, asked)
            return _lent(cls, config, architecture)
        except Exception as e:  # configs raise a class of their own, which is no ValueError
            if asked_for(str(e)).items() <= asked.items():
                raise
            asked |= asked_for(str(e))
    raise BackboneError(f"its config asks for more and more: {asked}")


def _lent(cls: type[PreTrainedModel], config: PreTrainedConfig, architecture: Architecture) -> PreTrainedModel:
    """A model of this config, or of its text part; what a part lacks is lent from the other parts."""
    config = next((part for part in parts(config) if isinstance(part, cls.config_class)), config)
    _set_kind(config, architecture.kind)
    for _ in range(ROUNDS):
        try:
            return _run(cls, config, architecture)
        except AttributeError as e:
            if not _lend(config, str(e)):
                raise
    raise BackboneError("its config lacks more than the other parts have")


def _run(cls: type[PreTrainedModel], config: PreTrainedConfig, architecture: Architecture) -> PreTrainedModel:
    """The model of this config, after a first forward pass."""
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size >= LIMIT:
        raise BackboneError(f"{size} weights, where a tiny model has under a million")
    with _marked_memory():
        model = cls(config).float().eval()
    _perturb(model)
    with torch.no_grad():
        logits = model(**inputs_for(model, architecture)).logits
    if not torch.isfinite(logits).all():
        raise BackboneError("its logits are not finite")
    return model


def _set_kind(config: PreTrainedConfig, kind: TextKind) -> None:
    """Models that are encoders or decoders by their config are told which."""
    for name in {"is_decoder", "causal"} & vars(config).keys():
        setattr(config, name, kind == "causal")
    if config.is_encoder_decoder and vars(config).get("decoder_start_token_id", 0) is None:
        config.decoder_start_token_id = 1


def _lend(config: PreTrainedConfig, message: str) -> bool:
    """Sets an attribute that a part of the config lacks to the value that another part has under that name."""
    match = re.search(r"'(\w+)' object has no attribute '(\w+)'", message)
    if match is None:
        return False
    taker, name = match.groups()
    values = [v for part in parts(config) for v in (part.to_dict(), *_dicts(part)) for n, v in v.items() if n == name]
    takers = [part for part in parts(config) if type(part).__name__ == taker]
    for part in takers:
        setattr(part, name, max(values, default=None))
    return bool(takers and values)


def _dicts(config: PreTrainedConfig) -> list[dict[str, Any]]:
    return [v for v in vars(config).values() if isinstance(v, dict)]


def _perturb(model: PreTrainedModel) -> None:
    """Adds noise to every weight, and to buffers that start at zero; what nobody initialised is noise alone."""
    kept = model.state_dict().keys()
    buffers = [t for n, t in model.named_buffers() if n in kept and t.is_floating_point() and not t.any()]
    for t in (*model.parameters(), *buffers):
        t.data.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).add_(torch.randn_like(t), alpha=NOISE)


def inputs_for(
    model: PreTrainedModel, architecture: Architecture, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """Two rows of ids [2, 8], one of them padded at `side`, and a decoder's inputs where there is a decoder."""
    special = special_ids(model.config)
    usable = [i for i in range(len(SPECIALS), _rows(model)) if i not in special]
    ids = torch.tensor([usable[i * 5 % len(usable)] for i in range(16)]).reshape(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    pads = slice(5, None) if side == "right" else slice(None, 3)
    mask[1, pads] = 0
    ids[1, pads] = _ids_of(model)["pad"]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if architecture.kind == "seq2seq" and model.config.is_encoder_decoder:
        inputs |= {
            "decoder_input_ids": ids[:1, 1:5].flip(1).repeat(2, 1),
            "decoder_attention_mask": mask[:1, :4].repeat(2, 1),
        }
    return inputs


def _rows(model: PreTrainedModel) -> int:
    """How many ids the tokenizer of a tiny model has."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        return min(embedding.num_embeddings, WORDS)
    return min(int(model.config.get_text_config().vocab_size), WORDS)  # Perceiver, MusicGen: no embedding of their own


def _ids_of(model: PreTrainedModel) -> dict[str, int]:
    """The tokenizer's special ids: the model's own where it has them, other low ids for the rest."""
    config = model.config.get_text_config().to_dict()
    own = {name: config.get(f"{name}_token_id") for name in SPECIALS}
    ids = {name: i for name, i in own.items() if isinstance(i, int) and 0 <= i < _rows(model)}
    ids = {name: i for name, i in ids.items() if list(ids.values()).index(i) == list(ids).index(name)}
    free = (i for i in range(_rows(model)) if i not in ids.values())
    return {name: ids[name] if name in ids else next(free) for name in SPECIALS}


def backbone(architecture: Architecture, dtype: torch.dtype = torch.float32, kind: Kind | None = None) -> Backbone:
    """A fresh tiny backbone with a tokenizer of whole words; of the architecture's kind where none is given."""
    model = tiny(architecture).to(dtype)
    with _quiet():
        return wrap(model, tokenizer_for(model), kind=kind or architecture.kind, name=str(architecture))


def tokenizer_for(model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words `w5`, `w6`, …, whose ids fit a tiny model."""
    special = _ids_of(model)
    words = {f"w{i}": i for i in range(_rows(model)) if i not in special.values()}
    return _tokenizer(tuple((words | {f"<{name}>": i for name, i in special.items()}).items()))


@lru_cache
def _tokenizer(words: tuple[tuple[str, int], ...]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(dict(words), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **{f"{name}_token": f"<{name}>" for name in SPECIALS})


@contextmanager
def _marked_memory() -> Iterator[None]:
    """Memory that is allocated and not initialised holds NaN, so that it can be told from a weight."""
    on, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn)


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
