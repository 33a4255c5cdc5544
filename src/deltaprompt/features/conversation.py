"""Conversations -> rows whose targets are what the assistant says, each turn to its end-of-turn token.

What the tokenizer's own chat template writes around messages is found by rendering marks in their place, once for
every sequence of roles; what is said is never read as a special token. Where the template marks the assistant's part
itself ({% generation %}), that is taken.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Final, Literal

from deltaprompt.errors import DataError, TemplateError
from deltaprompt.features.chat import MARK, MARKED, split_specials
from deltaprompt.features.codec import Ask, Codec
from deltaprompt.features.features import AT_ONCE, Features
from deltaprompt.features.layout import Fixed
from deltaprompt.features.rows import Encoded, Row
from deltaprompt.features.writing import Writing
from deltaprompt.types import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Roles = tuple[str, ...]
Piece = tuple[str | Fixed, bool]  # a text or a special token, and whether it is the assistant's
Marked = tuple[list[int], list[bool]]  # the ids of a conversation, and which of them are the assistant's

GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template marks the assistant's part by itself
Overlong = Literal["error", "drop"]


class ChatTemplate:
    """What a tokenizer's chat template writes around messages, for every sequence of roles."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if tokenizer.chat_template is None:
            raise TemplateError(
                "conversations need a chat template and this tokenizer has none; set tokenizer.chat_template, or use a "
                "chat model"
            )
        self.tokenizer = tokenizer
        self.codec = Codec(tokenizer)
        self.own = GENERATION.search(str(tokenizer.chat_template)) is not None
        self._around: dict[tuple[Roles, bool], list[str]] = {}
        self._ends: dict[Roles, str] = {}
        self._pieces: dict[tuple[Roles, bool], list[list[Piece]]] = {}

    def rendered(self, messages: Sequence[Message], reply: bool = False) -> str:
        """The text of a conversation; with `reply` the assistant's turn is begun."""
        told = [message._asdict() for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=reply)
        except Exception as error:  # a chat template raises what its author chose, of several Jinja classes
            roles = ", ".join(message.role for message in messages)
            raise TemplateError(f"the tokenizer's chat template refuses the roles {roles}: {error}") from error
        return text

    def pieces(self, messages: Sequence[Message], reply: bool = False) -> list[Piece]:
        """A conversation in order; a text that is the assistant's is tokenised apart from what stands before it.

        Raises:
            DataError: the template writes something else than what is said.
        """
        roles = tuple(message.role for message in messages)
        key = roles, reply
        if key not in self._pieces:
            self._pieces[key] = list(self._found(roles, reply))
        texts = self._around[key]
        whole = "".join([text + said.content for text, said in zip(texts, messages, strict=False)] + [texts[-1]])
        if self.rendered(messages, reply) != whole:
            raise DataError(
                "the tokenizer's chat template writes a conversation in another way than what is said in it, so the "
                "assistant's part cannot be told exactly; leave such conversations out, or mark that part in the "
                f"template with {{% generation %}}. It begins {messages[0].content[:60]!r}"
            )
        found: list[Piece] = []
        for around, message in zip(self._pieces[key], messages, strict=False):
            found += [*around, (message.content, message.role == "assistant")]
        return found + self._pieces[key][-1]

    def end(self, roles: Roles = ("user", "assistant")) -> str:
        """The end-of-turn token behind the last of these roles, an assistant's, with what is written before it."""
        if roles not in self._ends:
            text = self._written(roles)[-1]
            specials = list(split_specials(self.tokenizer, text))
            at = next((i for i, piece in enumerate(specials) if isinstance(piece, Fixed)), None)
            if at is None:
                raise TemplateError(
                    f"the tokenizer's chat template writes no special token behind what the assistant says (it writes "
                    f"{text!r}), so that a model could not learn to end; add one to the template"
                )
            token = self.tokenizer.convert_ids_to_tokens(specials[at].ids[0])  # type: ignore[union-attr]
            self._ends[roles] = text[: text.index(token) + len(token)]
        return self._ends[roles]

    def end_id(self) -> int:
        """The end-of-turn token."""
        found = [p for p in split_specials(self.tokenizer, self.end()) if isinstance(p, Fixed)]
        return found[0].ids[0]

    def _found(self, roles: Roles, reply: bool) -> Iterator[list[Piece]]:
        """What stands in front of each message, and behind the last; checked against every shorter conversation."""
        texts = self._written(roles, reply)
        ended = ""  # what of a text is the end of the assistant's turn before
        for k, text in enumerate(texts):
            if not text.startswith(ended):
                raise self._odd(roles, f"behind the assistant's turn it writes {text!r}, and alone {ended!r}")
            begun, own = text[len(ended) :], ""
            if roles[k : k + 1] == ("assistant",):
                begun, own = self._opening(roles, k, texts, ended)
            yield [*self._split(ended, True), *self._split(begun, False), *self._split(own, True)]
            ended = self.end(roles[: k + 1]) if roles[k : k + 1] == ("assistant",) else ""

    def _opening(self, roles: Roles, k: int, texts: Sequence[str], ended: str) -> tuple[str, str]:
        """The text in front of an assistant's turn: what a prompt for a reply has of it too, and the rest."""
        prompt = self._written(roles[:k], True)
        if prompt[:k] != list(texts[:k]) or not texts[k].startswith(prompt[k]) or not prompt[k].startswith(ended):
            raise self._odd(
                roles, f"a prompt for turn {k + 1} ends with {prompt[k]!r}, and turn {k + 1} has {texts[k]!r}"
            )
        return prompt[k][len(ended) :], texts[k][len(prompt[k]) :]

    def _odd(self, roles: Roles, what: str) -> TemplateError:
        return TemplateError(
            f"the tokenizer's chat template writes the beginning of a conversation ({', '.join(roles)}) in another way "
            f"once it goes on: {what}; mark the assistant's part in the template with {{% generation %}}"
        )

    def _split(self, text: str, own: bool) -> list[Piece]:
        pieces = split_specials(self.tokenizer, text)
        return [(piece if isinstance(piece, Fixed) else piece.text, own) for piece in pieces]

    def _written(self, roles: Roles, reply: bool = False) -> list[str]:
        """The texts around messages of these roles: one more than there are."""
        key = roles, reply
        if key not in self._around:
            marks = [Message(role, MARK.format(i)) for i, role in enumerate(roles)]  # type: ignore[arg-type]
            found = MARKED.split(self.rendered(marks, reply))
            if found[1::2] != [str(i) for i in range(len(roles))]:
                raise TemplateError(
                    f"the tokenizer's chat template does not write every message of {', '.join(roles)} once and in "
                    f"order: it wrote {', '.join(found[1::2]) or 'none'} of 0 to {len(roles) - 1}"
                )
            self._around[key] = found[::2]
        return self._around[key]


@dataclass(frozen=True, eq=False)
class FromMessages(Writing):
    """Conversations through the tokenizer's chat template; the targets are the assistant's turns.

    A conversation that is too long ends with the last of the assistant's turns that it has whole. Packed, several stand
    in one row, each with virtual tokens of its own.
    """

    features: Features
    longest: int
    ends: tuple[int, ...]
    template: ChatTemplate
    packed: bool = False
    overlong: Overlong = "error"

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        rows = list[Encoded]()
        for start in range(0, len(examples), AT_ONCE):
            some = [_said(example, start + n) for n, example in enumerate(examples[start : start + AT_ONCE], 1)]
            marked = self._by_template(some) if self.template.own else self._by_marks(some)
            rows += [row for n, one in enumerate(marked, start + 1) for row in self._row(one, n)]
        return pack(rows, self.features.max_length) if self.packed else rows

    def prompts(self, examples: Sequence[Example]) -> list[Encoded]:
        """The conversation up to the assistant's last turn, without the oldest exchanges where it is too long."""
        return [self._prompt(_asked(_said(example, n), n)) for n, example in enumerate(examples, 1)]

    def answers(self, example: Example) -> tuple[str, ...]:
        """What the assistant says last."""
        last = example.messages[-1:]
        return example.references or tuple(m.content.strip() for m in last if m.role == "assistant")

    def answered(self, example: Example) -> Example:
        """The conversation without a question at its end that has no answer."""
        open_ = not example.references and [m.role for m in example.messages[-1:]] == ["user"]
        return replace(example, messages=example.messages[:-1]) if open_ else example

    @cached_property
    def _front(self) -> list[int]:
        """The virtual tokens in front of a conversation."""
        base = self.features.soft_base
        return list(range(base, base + self.features.prepend_soft))

    def _by_marks(self, conversations: Sequence[Sequence[Message]]) -> list[Marked]:
        """The ids of conversations, the template's text and what is said tokenised together within a turn."""
        return self._tokenised([self.template.pieces(messages) for messages in conversations])

    def _tokenised(self, each: Sequence[Sequence[Piece]]) -> list[Marked]:
        codec = self.template.codec
        joined = [_joined(pieces, codec.restarts) for pieces in each]
        known = codec.encode(ask for pieces in joined for ask, _ in pieces if not isinstance(ask, Fixed))
        found = list[Marked]()
        for pieces in joined:
            ids = [(piece.ids if isinstance(piece, Fixed) else known[piece].ids, own) for piece, own in pieces]
            found.append(([i for some, _ in ids for i in some], [own for some, own in ids for _ in some]))
        return found

    def _by_template(self, conversations: Sequence[Sequence[Message]]) -> list[Marked]:
        """The ids and the mask that transformers gives where the template marks the assistant's part."""
        for messages in conversations:
            self._check_plain(messages)
        told = [[message._asdict() for message in messages] for messages in conversations]
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        out = self.features.tokenizer.apply_chat_template(told, **how)
        return [
            (list(ids), [bool(own) for own in mask])
            for ids, mask in zip(out["input_ids"], out["assistant_masks"], strict=True)
        ]

    def _check_plain(self, messages: Sequence[Message]) -> None:
        """What is said holds no special token, which transformers would read as one."""
        for message in messages:
            if found := [p for p in split_specials(self.features.tokenizer, message.content) if isinstance(p, Fixed)]:
                token = self.features.tokenizer.convert_ids_to_tokens(found[0].ids[0])
                raise DataError(f"a message has the special token {token!r} in it, {message.content[:60]!r}; remove it")

    def _row(self, marked: Marked, number: int) -> list[Encoded]:
        """The row of a conversation, cut to length behind a turn of the assistant's; none where it is dropped."""
        ids, own = [*self._front, *marked[0]], [*[False] * len(self._front), *marked[1]]
        ends = list(accumulate(len(list(run)) for _, run in groupby(own)))  # behind each run of one's tokens
        turns = [end for end in ends if own[end - 1]]
        if not turns:
            raise DataError(f"conversation {number} has no turn of the assistant's to learn from; leave it out")
        fitting = [end for end in turns if end - 1 <= self.features.max_length]
        if not fitting and self.overlong == "drop":
            return []
        if not fitting:
            raise DataError(
                f"conversation {number} has its first answer whole after {turns[0] - 1} tokens, and max_length is "
                f"{self.features.max_length}; raise max_length, or leave such conversations out with overlong='drop'"
            )
        targets = [i for i in range(fitting[-1]) if own[i]]
        row = Row(ids[: fitting[-1] - 1], [i - 1 for i in targets])
        return [Encoded((row,), targets=tuple(ids[i] for i in targets))]

    def _prompt(self, messages: Sequence[Message]) -> Encoded:
        room = self.features.max_length - self.longest
        first = 1 if messages[0].role == "system" else 0
        while True:
            ids = [*self._front, *self._prompt_ids(messages)]
            if len(ids) <= room:
                return Encoded((Row(ids, [len(ids) - 1]),))
            if len(messages) - first < 3:  # nothing but the question
                raise DataError(
                    f"a prompt of {len(ids)} tokens leaves no room for {self.longest} more in max_length "
                    f"{self.features.max_length}; shorten it, raise max_length, or lower max_target"
                )
            messages = [*messages[:first], *messages[first + 2 :]]

    def _prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation and of the beginning of the assistant's turn."""
        if not self.template.own:
            ((ids, _),) = self._tokenised([self.template.pieces(messages, reply=True)])
            return ids
        self._check_plain(messages)
        return self.features.tokenizer(self.template.rendered(messages, reply=True), add_special_tokens=False).input_ids


def pack(rows: Sequence[Encoded], room: int) -> list[Encoded]:
    """Rows of several conversations: each, the longest first, goes where it leaves the least room."""
    bins, free = list[list[Encoded]](), list[tuple[int, int]]()  # room that is left, and the bin
    for row in sorted(rows, key=lambda row: -row.length):
        at = bisect_left(free, (row.length, -1))
        left, number = free.pop(at) if at < len(free) else (room, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(row)
        insort(free, (left - row.length, number))
    return [_one_of(some) for some in bins]


def _one_of(rows: Sequence[Encoded]) -> Encoded:
    """Several conversations in one row."""
    starts = list(accumulate((row.length for row in rows), initial=0))
    ids = [i for row in rows for i in row.variants[0].ids]
    at = [start + place for row, start in zip(rows, starts, strict=False) for place in row.variants[0].at]
    targets = tuple(i for row in rows for i in row.targets)
    return Encoded((Row(ids, at),), targets=targets, parts=tuple(row.length for row in rows))


def _joined(pieces: Sequence[Piece], restarts: bool) -> list[tuple[Ask | Fixed, bool]]:
    """Texts of one side that stand together as one, with whether each opens a sequence."""
    found: list[tuple[Ask | Fixed, bool]] = []
    opens = True
    for (special, own), run in groupby(pieces, lambda piece: (isinstance(piece[0], Fixed), piece[1])):
        if special:
            found += [(piece, own) for piece, _ in run if isinstance(piece, Fixed)]
            opens = restarts
            continue
        text = "".join(piece for piece, _ in run if isinstance(piece, str))
        if text:
            found.append(((text, opens), own))
            opens = False
    return found


def _said(example: Example, number: int) -> list[Message]:
    """A conversation without the white space around what is said."""
    if not example.messages:
        raise DataError(f"example {number} has no messages; read conversations with read_chats")
    return [Message(message.role, message.content.strip()) for message in example.messages]


def _asked(messages: Sequence[Message], number: int) -> list[Message]:
    """A conversation up to a question."""
    last = len(messages) - (messages[-1].role == "assistant")
    if not last:
        raise DataError(f"example {number} has an answer of the assistant's and nothing before it that asks for one")
    return list(messages[:last])
