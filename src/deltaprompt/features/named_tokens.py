"""The tokenizer's own tokens that rows need: at `{mask}`, at `{special:…}`, as padding, and first where nothing is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from deltaprompt.errors import DataError, TemplateError
from deltaprompt.templates import SPECIALS, Special

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTINEL: Final = "<extra_id_{}>"  # T5's names of what stands for a gap


def mask_id(tokenizer: PreTrainedTokenizerFast, sentinel: str | None) -> int:
    """The token that stands at `{mask}`: an encoder-decoder's sentinel, or the mask token."""
    found = tokenizer.mask_token_id if sentinel is None else tokenizer.get_vocab().get(sentinel)
    if found is None:
        raise TemplateError(
            f"the template has {{mask}}, but the tokenizer has no {sentinel or 'mask token'}; use a backbone "
            "that has one, or leave {mask} out and put a head or prototypes on the states"
        )
    return int(found)


def special_id(tokenizer: PreTrainedTokenizerFast, piece: Special) -> int:
    """The token of that name."""
    named = {name.removesuffix("_token"): str(t) for name, t in tokenizer.special_tokens_map.items()}
    if piece.name not in named:
        has = ", ".join(name for name in named if name in SPECIALS)
        raise TemplateError(
            f"the tokenizer has no {piece.name} token for {piece}; of these it has {has or 'none'}: write one that "
            "it has, or leave it out"
        )
    return int(tokenizer.get_vocab()[named[piece.name]])


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """What rows are filled up with."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(i for i in known if i is not None))


def first_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """What an empty prompt of a left-to-right model begins with."""
    for known in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if known is not None:
            return int(known)
    raise DataError("a row has no text at all; leave it out, or give the template some words of its own")
