"""What is to be written: a `Generation` is a prompt template and behind it a text, a `Chat` is conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from deltaprompt.backbone import Backbone
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError, TemplateError
from deltaprompt.features import Features
from deltaprompt.features.codec import Codec
from deltaprompt.features.conversation import ChatTemplate, FromMessages, Overlong
from deltaprompt.features.writing import FromTemplate, Writing
from deltaprompt.model.virtual import room
from deltaprompt.templates import Field, Literal, Mask, Piece, Template, parse

LONGEST: Final = 128  # ids of a target where not given: nearly all one-paragraph descriptions (E2E, WebNLG) are shorter
ANYTHING: Final = parse("{text}")  # where the prompt comes from a chat template


@dataclass(frozen=True)
class Generation:
    """What is to be written: a prompt, and behind it a target.

    Args:
        template: of the prompt, in the template language. The target follows at its end, after a blank unless the
            template ends with white space; a last `{mask}` says that it follows at once.
        target: of the target: words and fields. The references of an example are targets as they stand.
        max_length: tokens of a prompt with its target (of an encoder-decoder, of the prompt) at most; the backbone's
            own limit where not given. A prompt gives way as its template says.
        max_target: tokens of a target at most, its end token among them; a longer one is cut, and has none. 128 where
            not given, or half of `max_length` where that is less.
        beams: that are searched where nothing else is asked.
    """

    template: str
    target: str = "{target}"
    max_length: int | None = None
    max_target: int | None = None
    beams: int = 1

    def __post_init__(self) -> None:
        target = parse(self.target)
        if not target.fields or not all(isinstance(piece, Literal | Field) for piece in target.pieces):
            raise ConfigError(
                f"a target is made of words and fields, one field or more; got {self.target!r}; write for example "
                "'{target}'"
            )
        if self.beams < 1:
            raise ConfigError(f"beams = {self.beams} is not possible: one or more are searched")

    def writing(self, backbone: Backbone, deltas: Sequence[Delta]) -> Writing:
        """How examples become rows on a backbone, with deltas that will act, each an instance."""
        longest, virtual = room(backbone, deltas, self.max_length)
        most = _most(self.max_target, longest, longest if _two(backbone) else longest - virtual - 1)
        features = Features(
            backbone.tokenizer,
            _prompt(parse(self.template), backbone),
            backbone.kind,
            longest if _two(backbone) else longest - most,
            (),
            soft_base=backbone.vocabulary,
            prepend_soft=virtual,
            decoder_start_id=backbone.config.get("decoder_start_token_id"),
        )
        before, after = Codec(backbone.tokenizer).before, (_end(backbone, parse(self.template).is_chat),)
        return FromTemplate(
            features, parse(self.target), most, _ends(backbone, after), before if _two(backbone) else (), after
        )


@dataclass(frozen=True)
class Chat:
    """Conversations (`Example.messages`) through the tokenizer's own chat template: what the assistant says is learned.

    Args:
        max_length: tokens of a conversation at most; the backbone's own limit where not given. A longer one ends with
            the last of the assistant's turns that fits in whole; a prompt loses its oldest exchanges.
        max_target: tokens that are generated at most where nothing else is asked; as in `Generation`.
        packed: whether several conversations are trained on in one row, each seeing itself alone. It changes which are
            in a step together, and no loss.
        overlong: what is done with a conversation whose first answer does not fit: "error", or "drop".
        beams: that are searched where nothing else is asked.
    """

    max_length: int | None = None
    max_target: int | None = None
    packed: bool = False
    overlong: Overlong = "error"
    beams: int = 1

    def __post_init__(self) -> None:
        if self.overlong not in ("error", "drop"):
            raise ConfigError(f"overlong = {self.overlong!r} is not possible: it is 'error' or 'drop'")
        if self.beams < 1:
            raise ConfigError(f"beams = {self.beams} is not possible: one or more are searched")

    @property
    def template(self) -> str:
        """A prompt in the template language that is written as the conversations are: by the chat template."""
        return "{user}{text}{assistant}"

    def writing(self, backbone: Backbone, deltas: Sequence[Delta]) -> Writing:
        """How conversations become rows on a backbone, with deltas that will act, each an instance."""
        if backbone.kind != "causal":
            raise ConfigError(f"conversations need a causal model, and this one is of the kind {backbone.kind!r}")
        longest, virtual = room(backbone, deltas, self.max_length)
        features = Features(
            backbone.tokenizer, ANYTHING, "causal", longest, (), soft_base=backbone.vocabulary, prepend_soft=virtual
        )
        template = ChatTemplate(backbone.tokenizer)
        ends = _ends(backbone, (template.end_id(),))
        return FromMessages(
            features, _most(self.max_target, longest, longest - virtual - 1), ends, template, self.packed, self.overlong
        )


def _two(backbone: Backbone) -> bool:
    return backbone.kind == "seq2seq"


def _most(asked: int | None, longest: int, free: int) -> int:
    """The ids of a target at most: what was asked for, where it leaves room for a prompt."""
    most = min(LONGEST, (free + 1) // 2) if asked is None else asked
    if not 1 <= most <= free:
        raise ConfigError(
            f"max_target {most} is not possible: 1 to {free} of {longest} tokens are; take fewer, or raise max_length"
        )
    return most


def _prompt(template: Template, backbone: Backbone) -> Template:
    """A prompt at whose end, where a `{mask}` says so, the target stands."""
    if backbone.kind not in ("causal", "seq2seq"):
        raise ConfigError(
            f"generation needs a causal model or an encoder-decoder, and this one is of the kind {backbone.kind!r}"
        )
    pieces, last = template.pieces, template.pieces[-1]
    if template.masks > isinstance(last, Mask):
        raise TemplateError(f"what is generated stands at the end, and {str(template)!r} has a {{mask}} before it")
    if template.demos is not None:
        raise TemplateError(f"{template.demos} shows labels at {{mask}}, of which generation has none; leave it out")
    if _two(backbone):
        return Template(pieces[:-1]) if template.masks else template
    if template.masks or template.is_chat:
        return template
    blank: tuple[Piece, ...] = (Literal(" "),) if _joins(last) else ()
    return Template((*pieces, *blank, Mask()))


def _joins(last: Piece) -> bool:
    """Whether a blank must be put between the end of a prompt and a new word."""
    return isinstance(last, Field) or (isinstance(last, Literal) and not last.text[-1].isspace())


def _end(backbone: Backbone, chat: bool) -> int:
    """The token that ends a target: of a chat a turn's, of an encoder-decoder what its tokenizer puts there."""
    tokenizer = backbone.tokenizer
    if chat:
        return ChatTemplate(tokenizer).end_id()
    after = Codec(tokenizer).after if _two(backbone) else ()
    end = after[-1] if after else tokenizer.eos_token_id
    if end is None:
        raise ConfigError("the tokenizer has no end-of-text token, so that no text could end; set tokenizer.eos_token")
    return int(end)


def _ends(backbone: Backbone, own: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens behind which nothing follows: our own, and those that the model stops at by itself."""
    config = backbone.model.generation_config
    told = None if config is None else config.eos_token_id
    known = [] if told is None else [told] if isinstance(told, int) else list(told)
    return tuple(dict.fromkeys([*own, *known]))
