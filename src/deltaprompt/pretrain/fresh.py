"""A language model that knows nothing yet: random weights of given sizes, and pieces learned from the text itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from deltaprompt.backbone import Backbone
from deltaprompt.backbone.demo import demo_folder
from deltaprompt.backbone.load import DEMO, quiet, tokenizer_of, wrap
from deltaprompt.errors import ConfigError, nearest
from deltaprompt.features.named_tokens import SENTINEL
from deltaprompt.pretrain.objectives import KIND_FOR
from deltaprompt.pretrain.pretraining import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

SENTINELS = 100  # as many as T5 has
TEXT_END = "<|endoftext|>"  # GPT-2's
FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
FURTHER = ("decoder_start_token_id", "tie_word_embeddings")  # fields that some configs take and do not list


def new_backbone(
    type: str,
    tokenizer: PreTrainedTokenizerFast,
    sizes: Mapping[str, Any] | None = None,
    *,
    objective: Kind | None = None,
    attention: str | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Backbone:
    """A language model of an architecture of transformers, with random weights.

    Args:
        type: as in a config's model_type: "llama", "gpt2", "bert", "t5", …
        tokenizer: its vocabulary and special tokens are the model's.
        sizes: further fields of the architecture's config, such as hidden_size.
        objective: what it will be trained for; told by the architecture where not given.
        attention: transformers' attention implementation; its own choice where not given.
        device: where to put it; the accelerator where there is one.
        seed: of the weights.

    Raises:
        ConfigError: an unknown architecture or field, or sizes that do not go together.
    """
    objective = objective_for(type, objective)
    config = _config(type, tokenizer, dict(sizes or {}))
    options = {"attn_implementation": attention} if attention else {}
    with quiet(), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # nothing else's chance is touched
        try:
            model = _classes()[objective].from_config(config, **options).float()
        except (ValueError, TypeError, RuntimeError, AssertionError) as e:
            raise ConfigError(f"a model of type {type!r} cannot be made with these sizes: {_line(e)}") from e
    model.eval()
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    return wrap(model.to(device), tokenizer, kind=KIND_FOR[objective], name=f"new {type}")


def objective_for(type: str, objective: Kind | None = None) -> Kind:
    """The objective that an architecture is trained for, where it is that which is asked for or none is."""
    from transformers import CONFIG_MAPPING

    if type not in CONFIG_MAPPING:
        raise ConfigError(f"no architecture {type!r}{nearest(type, CONFIG_MAPPING.keys())}")
    config = CONFIG_MAPPING[type]
    kinds = [kind for kind, made in _classes().items() if config in made._model_mapping]
    kinds = ["spans"] if "spans" in kinds else kinds
    if not kinds or objective not in (None, *kinds):
        possible = " or ".join(kinds) or "none: it is no language model"
        raise ConfigError(f"{type!r} cannot be trained for the objective {objective!r}; possible: {possible}")
    return objective or kinds[0]


def tokenizer_from(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, a name on the hub, or "demo"."""
    return tokenizer_of(str(demo_folder()) if name == DEMO else name)


def byte_level(documents: Iterable[str], pieces: int, objective: Kind) -> PreTrainedTokenizerFast:
    """Byte-pair pieces of bytes (Sennrich et al. 2016, on bytes as in Radford et al. 2019), learned from documents.

    Args:
        documents: what to learn from.
        pieces: of the vocabulary in all, with the 256 bytes and the special tokens of the objective.
        objective: "causal": `<|endoftext|>` alone; "masked": RoBERTa's tokens, around every text; "spans": T5's, with
            100 sentinels.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = _special(objective)
    specials = list(dict.fromkeys([*names.values(), *_sentinels(objective)]))
    if pieces < 256 + len(specials):
        raise ConfigError(
            f"a vocabulary of {pieces} pieces is too small: {256 + len(specials)} are bytes and special tokens alone"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(documents, trainer)
    single = {"causal": "", "masked": "<s> $A </s>", "spans": "$A </s>"}[objective]
    if single:
        around = [(token, core.token_to_id(token)) for token in single.split() if token != "$A"]
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    options: dict[str, Any] = {**names, "extra_special_tokens": _sentinels(objective)}
    if objective == "masked":  # it takes the blank in front of it, which is part of the piece that it hides
        options["mask_token"] = AddedToken(names["mask_token"], lstrip=True, special=True, normalized=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **options)


def _classes() -> dict[Kind, Any]:
    """What makes a model for an objective from a config."""
    import transformers

    return {
        "masked": transformers.AutoModelForMaskedLM,
        "causal": transformers.AutoModelForCausalLM,
        "spans": transformers.AutoModelForSeq2SeqLM,
    }


def _special(objective: Kind) -> dict[str, str]:
    """The special tokens that an objective needs, by role."""
    if objective == "causal":
        return dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), TEXT_END)
    if objective == "spans":
        return {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    ends = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    return {**ends, "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}


def _sentinels(objective: Kind) -> list[str]:
    return [SENTINEL.format(i) for i in range(SENTINELS)] if objective == "spans" else []


def _config(type: str, tokenizer: PreTrainedTokenizerFast, sizes: dict[str, Any]) -> PreTrainedConfig:
    """A config of sizes and of a tokenizer's vocabulary; a field that it does not have is an error."""
    from transformers import AutoConfig

    usual = AutoConfig.for_model(type)
    known = [*usual.to_dict(), *usual.attribute_map, *FURTHER]
    if odd := next((name for name in sizes if name not in known), None):
        raise ConfigError(f"the config of {type!r} has no field {odd!r}{nearest(odd, known)}")
    if taken := next((name for name in sizes if name in FROM_TOKENIZER), None):
        raise ConfigError(f"{taken} is the tokenizer's, which says what it is; leave it out of the model's sizes")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    own = {
        "vocab_size": len(tokenizer),
        "pad_token_id": pad,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    start = {"decoder_start_token_id": pad} if usual.is_encoder_decoder else {}
    try:
        return AutoConfig.for_model(type, **{**own, **start, **sizes})
    except Exception as e:  # transformers checks fields by errors of its own, of no common class
        raise ConfigError(f"the config of {type!r} cannot be made with these sizes: {_line(e)}") from e


def _line(e: Exception) -> str:
    """An error's text in one line."""
    return " ".join(str(e).split())
