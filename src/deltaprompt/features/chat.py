"""A chat as the tokenizer's own chat template writes it: header text, special tokens, and the turns' pieces between."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from deltaprompt.errors import TemplateError
from deltaprompt.features.layout import Fixed, Raw
from deltaprompt.templates import Literal, Piece, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARK: Final = "\ue000{}\ue001"  # private-use characters around a turn's number: no chat template trims or writes them
MARKED: Final = re.compile("\ue000([0-9]+)\ue001")


def chat_pieces(tokenizer: PreTrainedTokenizerFast, template: Template, raw: Callable[[Piece], Raw]) -> list[Raw]:
    """The pieces of every turn (each through `raw`) with the chat template's own text around them.

    A last turn of the assistant stays open, without its end-of-turn token; after a user's, the assistant's is begun.
    """
    turns = template.turns()
    texts = MARKED.split(_rendered(tokenizer, template))  # text, number, text, number, …, text
    if texts[1::2] != [str(i) for i in range(len(turns))]:
        raise TemplateError(
            f"the tokenizer's chat template does not write every turn once and in order: it wrote the turns "
            f"{', '.join(texts[1::2]) or 'none'} of 0 to {len(turns) - 1}; use other roles, or a template without roles"
        )
    if turns[-1].role == "assistant":
        texts[-1] = ""
    pieces: list[Raw] = list(split_specials(tokenizer, texts[0]))
    for turn, text in zip(turns, texts[2::2], strict=True):
        pieces.extend([*map(raw, turn.pieces), *split_specials(tokenizer, text)])
    return pieces


def _rendered(tokenizer: PreTrainedTokenizerFast, template: Template) -> str:
    if tokenizer.chat_template is None:
        raise TemplateError(
            "the template has roles, but this tokenizer has no chat template; set tokenizer.chat_template, "
            "use a chat model, or write the prompt without roles"
        )
    turns = template.turns()
    messages = [{"role": turn.role, "content": MARK.format(i)} for i, turn in enumerate(turns)]
    reply = turns[-1].role != "assistant"
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    except Exception as error:  # a chat template raises what its author chose, of several Jinja classes
        roles = ", ".join(turn.role for turn in turns)
        raise TemplateError(f"the tokenizer's chat template refuses the roles {roles}: {error}; use others") from error
    return text


def split_specials(tokenizer: PreTrainedTokenizerFast, text: str) -> Iterator[Literal | Fixed]:
    """Text between special tokens as literals, each special token as its id."""
    specials = {t.content: (i, t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    names = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    found = re.split(f"({names})", text) if specials else [text]  # text, special, text, special, …, text
    for i, piece in enumerate(found):
        if i % 2:
            yield Fixed((specials[piece][0],))
            continue
        if i and specials[found[i - 1]][1].rstrip:
            piece = piece.lstrip()
        if i + 1 < len(found) and specials[found[i + 1]][1].lstrip:
            piece = piece.rstrip()
        if piece:
            yield Literal(piece)
