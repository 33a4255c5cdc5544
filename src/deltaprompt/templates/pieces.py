"""The pieces of a template, each of which checks itself and prints its own source."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass

from deltaprompt.errors import TemplateError, nearest
from deltaprompt.templates.filters import apply_filters, filter_named, text_of

Cut: typing.TypeAlias = typing.Literal["tail", "head", "middle"]
RoleName: typing.TypeAlias = typing.Literal["system", "user", "assistant"]
SpecialName: typing.TypeAlias = typing.Literal["bos", "eos", "sep", "cls", "pad"]
Encoder: typing.TypeAlias = typing.Literal["lstm", "mlp"]
By: typing.TypeAlias = typing.Literal["seeded", "nearest"]

CUTS: typing.Final[dict[str, Cut]] = {"tail": "tail", "head": "head", "middle": "middle"}
ROLES: typing.Final[dict[str, RoleName]] = {"system": "system", "user": "user", "assistant": "assistant"}
SPECIALS: typing.Final[dict[str, SpecialName]] = {
    "bos": "bos",
    "eos": "eos",
    "sep": "sep",
    "cls": "cls",
    "pad": "pad",
}
ENCODERS: typing.Final[dict[str, Encoder]] = {"lstm": "lstm", "mlp": "mlp"}
BYS: typing.Final[dict[str, By]] = {"seeded": "seeded", "nearest": "nearest"}
RESERVED: typing.Final = ("mask", "soft", "special", "prefix", "demos", *ROLES)
LONGEST_SOFT: typing.Final = 1000  # tokens in one block or prefix; ours: beyond it a context window is the limit
MOST_DEMOS: typing.Final = 1000  # demonstrations; ours, as above

NAME: typing.Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
DOTTED: typing.Final = re.compile(rf"{NAME.pattern}(?:\.{NAME.pattern})*")

NAME_RULE: typing.Final = "a name is made of the letters a-z and A-Z, digits and _"
FIELD_RULE: typing.Final = f"{NAME_RULE}, that of a field also of dots between names"
SOFT_RULE: typing.Final = 'write {soft:20}, {soft:20:name} or {soft:"some words"}'
WORDS_RULE: typing.Final = (
    "a block that begins from words is neither tied nor computed by a network; give it a size in place of the words"
)


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that stands in the prompt as it is."""

    text: str

    def __str__(self) -> str:
        return self.text.replace("{", "{{").replace("}", "}}")


@dataclass(frozen=True, slots=True)
class Field:
    """`{name|filter|…}`: a text of the example; when the whole is too long it loses its `cut` side, unless `keep`."""

    name: str
    filters: tuple[str, ...] = ()
    keep: bool = False
    cut: Cut = "tail"

    def __post_init__(self) -> None:
        if not DOTTED.fullmatch(self.name):
            raise TemplateError(f"{self.name!r} is not a name; {FIELD_RULE}")
        if self.name in RESERVED:
            words = ", ".join(RESERVED)
            raise TemplateError(f"{self.name!r} cannot be a field: it is a word of the language ({words})")
        for name in self.filters:
            filter_named(name)
        if self.cut not in CUTS:
            raise TemplateError(unknown_cut(self.cut))
        if self.keep and self.cut != "tail":
            raise TemplateError(f"the field {self.name!r} is kept, so it has no side to cut; drop keep or cut")

    def __str__(self) -> str:
        flag = "|keep" if self.keep else "" if self.cut == "tail" else f"|truncate:{self.cut}"
        return "{" + "|".join((self.name, *self.filters)) + flag + "}"

    def value(self, example_fields: Mapping[str, object]) -> str:
        """The filtered text of this field in an example, or an error that names what the example has."""
        return apply_filters(text_of(example_fields, self.name), self.filters)


@dataclass(frozen=True, slots=True)
class Mask:
    """`{mask}`: a position where the answer is read."""

    def __str__(self) -> str:
        return "{mask}"


@dataclass(frozen=True, slots=True)
class Special:
    """`{special:sep}`: the tokenizer's own token of that name."""

    name: SpecialName

    def __post_init__(self) -> None:
        if self.name not in SPECIALS:
            raise TemplateError(unknown_special(self.name))

    def __str__(self) -> str:
        return f"{{special:{self.name}}}"


@dataclass(frozen=True, slots=True)
class Soft:
    """`{soft:size}`, `{soft:size:name}` or `{soft:"words"}`: trainable tokens; blocks of one name are one block.

    Args:
        size: tokens.
        words: in place of a size: the words whose embeddings they begin from.
        name: of a block that begins from words the words, where no other is given.
        tied: all tokens of the block are one row that trains.
        encoder: the network that computes them while they train (P-tuning), one for all blocks that name it.
    """

    size: int | None = None
    words: str | None = None
    name: str | None = None
    tied: bool = False
    encoder: Encoder | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.words is None):
            raise TemplateError(f"a soft block has either a size or words, got {self.size!r}, {self.words!r}")
        if self.encoder is not None and self.encoder not in ENCODERS:
            raise TemplateError(f"there is no encoder {self.encoder!r}{nearest(self.encoder, ENCODERS)}")
        if self.words is None and (self.size is None or not 1 <= self.size <= LONGEST_SOFT):
            raise TemplateError(f"a soft block has 1 to {LONGEST_SOFT} tokens, got {self.size}")
        if self.words is not None:
            self._check_words(self.words)
        if self.name not in (None, self.words):
            check_name(self.name or "")

    def _check_words(self, words: str) -> None:
        if not words.strip():
            raise TemplateError(f"a soft block needs at least one word to begin from; {SOFT_RULE}")
        if self.tied or self.encoder is not None:
            raise TemplateError(WORDS_RULE)
        if self.name is None:
            object.__setattr__(self, "name", words)

    def __str__(self) -> str:
        name = f":{self.name}" if self.name not in (None, self.words) else ""
        flags = ("|tied" if self.tied else "") + (f"|{self.encoder}" if self.encoder else "")
        return f"{{soft:{self.size if self.words is None else _quoted(self.words)}{name}{flags}}}"


@dataclass(frozen=True, slots=True)
class Prefix:
    """`{prefix:6}`: trainable keys and values in front of every attention; no token stands for them."""

    length: int

    def __post_init__(self) -> None:
        if not 1 <= self.length <= LONGEST_SOFT:
            raise TemplateError(f"a prefix has 1 to {LONGEST_SOFT} rows, got {self.length}")

    def __str__(self) -> str:
        return f"{{prefix:{self.length}}}"


@dataclass(frozen=True, slots=True)
class Demos:
    """`{demos:3}` or `{demos:3:nearest}`: answered examples, drawn by a seed or those nearest to the text."""

    count: int
    by: By = "seeded"

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_DEMOS:
            raise TemplateError(f"there are 1 to {MOST_DEMOS} demonstrations, got {self.count}")
        if self.by not in BYS:
            raise TemplateError(unknown_choice(self.by))

    def __str__(self) -> str:
        return f"{{demos:{self.count}" + (f":{self.by}" if self.by != "seeded" else "") + "}"


@dataclass(frozen=True, slots=True)
class Role:
    """`{system}`, `{user}` or `{assistant}`: a turn of a chat begins."""

    name: RoleName

    def __post_init__(self) -> None:
        if self.name not in ROLES:
            raise TemplateError(f"there is no role {self.name!r}{nearest(self.name, ROLES)}")

    def __str__(self) -> str:
        return f"{{{self.name}}}"


Piece: typing.TypeAlias = Literal | Field | Mask | Special | Soft | Prefix | Demos | Role


def check_name(name: str) -> None:
    """An error unless that is a name."""
    if not NAME.fullmatch(name):
        raise TemplateError(f"{name!r} is not a name; {NAME_RULE}")


def unknown_cut(where: str) -> str:
    """What is wrong with a side to cut that is none."""
    return f"truncate says where to cut, got {where!r}{nearest(where, CUTS)}"


def unknown_special(name: str) -> str:
    """What is wrong with a special token that is none of the language's."""
    mend = "; write {mask}" if name == "mask" else nearest(name, SPECIALS)
    return f"there is no special token {name!r}{mend}"


def unknown_choice(by: str) -> str:
    """What is wrong with a way of choosing demonstrations that is none."""
    return f"demos says how examples are chosen, got {by!r}{nearest(by, BYS)}"


def _quoted(words: str) -> str:
    return '"' + words.replace("\\", "\\\\").replace('"', '\\"') + '"'
