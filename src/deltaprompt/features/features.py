"""`Features`: examples -> token ids cut to length, with the positions where the answer is read, carried once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Final
from typing import Literal as OneOf

import torch

from deltaprompt.errors import ConfigError, DataError, nearest
from deltaprompt.features.batching import answers, attended, bucketed, chunks, classes, padded, shifted
from deltaprompt.features.beside import Beside, Form, Text
from deltaprompt.features.chat import chat_pieces
from deltaprompt.features.codec import Ask, Codec, Tokens
from deltaprompt.features.demonstrations import Demonstrations
from deltaprompt.features.layout import (
    Fixed,
    Kind,
    Layout,
    Part,
    Place,
    Raw,
    Run,
    check_masks,
    ends_with_answer,
    lay_out,
)
from deltaprompt.features.named_tokens import first_id, mask_id, pad_id, special_id
from deltaprompt.features.rows import Encoded, Row
from deltaprompt.features.soft import NETWORKS, SoftBlock
from deltaprompt.features.truncate import fit
from deltaprompt.templates import Demos, Encoder, Mask, Piece, Prefix, Role, Soft, Special, Template
from deltaprompt.types import Batch, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AT_ONCE: Final = 1024  # rows in one call of the tokenizer: its threads are busy, its results do not pile up


@dataclass(frozen=True, eq=False)
class Features:
    """Template × tokenizer × kind of backbone; checks that the three fit, then turns examples into batches.

    Soft tokens are virtual ids, `soft_base + row`: first the `prepend_soft` ones in front of the whole sequence, then
    the template's blocks, those that no network computes before those of each network, and each of these in order of
    appearance. Nothing after this changes a length: positions are right for good.
    """

    tokenizer: PreTrainedTokenizerFast
    template: Template
    kind: Kind
    max_length: int
    labels: tuple[str, ...]
    _: KW_ONLY
    soft_base: int  # the size of the vocabulary: the first virtual id
    answer_lengths: tuple[int, ...] = (1,)  # the numbers of tokens that label words have
    prepend_soft: int = 0
    decoder_start_id: int | None = None
    sentinel: str | None = None  # what stands for the answer in an encoder-decoder's input; none: its mask token
    demonstrations: Demonstrations | None = None  # what a template with `{demos}` shows
    phrases: tuple[Template, ...] = ()  # of each class the text that stands for it in an example
    several: bool = False  # whether an example may have several labels

    def __post_init__(self) -> None:
        if not self.answer_lengths or min(self.answer_lengths) < 1:
            raise ConfigError(f"answers have one token or more, got answer_lengths {self.answer_lengths}")
        if self.kind == "seq2seq" and self.decoder_start_id is None:
            raise ConfigError("an encoder-decoder needs decoder_start_id; it is in the backbone's config")
        check_masks(self.kind, self.template.pieces, self.answer_lengths)
        if self._layout.masks:
            self._mask_id  # noqa: B018  says what is wrong now rather than at the first row

    # What the template asks for

    @cached_property
    def soft_blocks(self) -> tuple[SoftBlock, ...]:
        """The template's blocks of soft tokens, each once, in order of appearance."""
        return tuple(self._block(i, soft) for i, soft in enumerate(self.template.softs))

    @property
    def soft_rows(self) -> int:
        """The number of the rows of the template's own soft tokens; `prepend_soft` ones come before them."""
        return sum(block.rows for block in self.soft_blocks)

    @cached_property
    def soft_ranges(self) -> tuple[tuple[Encoder | None, int], ...]:
        """How many of these rows no network computes, then each network, in the order of their virtual ids."""
        found = {e: sum(b.rows for b in self.soft_blocks if b.encoder == e) for e in NETWORKS}
        return tuple((encoder, rows) for encoder, rows in found.items() if rows)

    @cached_property
    def soft_starts(self) -> tuple[int, ...]:
        """Of each block the first of its rows among these."""
        blocks = self.soft_blocks
        order = sorted(range(len(blocks)), key=lambda i: NETWORKS.index(blocks[i].encoder))
        starts = accumulate((blocks[i].rows for i in order), initial=0)
        return tuple(start for _, start in sorted(zip(order, starts, strict=False)))

    @property
    def space_before_mask(self) -> bool:
        """Whether a blank stands before the (first) mask; it is part of the answer's first token."""
        return self._layout.places[0].space

    def word_ids(self, words: str) -> list[int]:
        """The token ids of words that stand alone."""
        return self._known(words, self._codec.one(words))

    def answer_ids(self, word: str, mask: int = 0) -> list[int]:
        """The token ids of a label word as it stands at a mask, the first where not given."""
        if (word, mask) not in self._answers:
            self._answers[word, mask] = self._known(word.strip(), self._ids_at(word.strip(), mask))
        return list(self._answers[word, mask])

    @cached_property
    def _answers(self) -> dict[tuple[str, int], list[int]]:
        """Of label words, for whose ids a verbalizer asks several times."""
        return {}

    def _ids_at(self, word: str, mask: int = 0) -> list[int]:
        ids = self._codec.one(*self._layout.places[mask].ask(word)) if word else []
        if self._codec.unknown in ids:  # no piece of the vocabulary goes on without a blank
            ids = self._codec.one(word)
        return ids

    def whole_words(self) -> list[int]:
        """The ids of the tokens that are, by themselves, a word of letters as it stands at the (first) mask."""
        texts = {i: self.tokenizer.decode([i]).strip() for i in sorted(set(self.tokenizer.get_vocab().values()))}
        words = {i: text for i, text in texts.items() if text.isalpha() and i not in self._codec.special}
        asks = {i: self._layout.places[0].ask(word) for i, word in words.items()}
        found = self._codec.encode(asks.values())
        return [i for i, ask in asks.items() if found[ask].ids == [i]]

    def continued(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts as they stand behind the prompt; of an encoder-decoder, as they open an answer."""
        place = self._layout.places[0]
        asks = [place.ask(text.lstrip(" ") if place.space else text) for text in texts]
        found = self._codec.encode(asks)
        return [found[ask].ids for ask in asks]

    def label_index(self, label: str) -> int:
        """The class of that label."""
        if label not in self._classes:
            raise DataError(f"there is no label {label!r}{nearest(label, self.labels)}")
        return self._classes[label]

    def classes_of(self, example: Example) -> tuple[int, ...]:
        """The classes of an example's labels; none where they are not known."""
        if len(example.gold) > 1 and not self.several:
            got = ", ".join(example.gold)
            raise DataError(f"an example has several labels, {got}, and the task gives one; give it several=True")
        return tuple(self.label_index(label) for label in example.gold)

    # Demonstrations

    def shown(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The demonstrations that stand beside each example, in their order from the start of the prompt."""
        if (beside := self._beside) is None:
            return [[] for _ in examples]
        return [beside.in_order(ranks) for _, ranks in beside.arranged(examples)]

    def seeded(self) -> Features:
        """The same for texts without content: the nearest to one are those that a seed draws."""
        own = self.demonstrations
        return self if own is None else replace(self, demonstrations=own.seeded())

    def checked(self) -> Features:
        """Itself; an error where no demonstration has room."""
        if (beside := self._beside) is not None:
            beside.check()
        return self

    # Examples -> rows -> batches

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Examples -> rows, truncated where the template allows it."""
        starts = range(0, len(examples), AT_ONCE)
        return [row for start in starts for row in self._encode(examples[start : start + AT_ONCE])]

    def collate(
        self,
        encoded: Sequence[Encoded],
        index: Sequence[int] | None = None,
        padding: OneOf["left", "right"] | None = None,
    ) -> Batch:
        """Rows -> one batch, as long as its longest row; variants of one example stand together.

        Padding is on the left of causal rows, so that an answer can follow at once, and on the right of all others:
        decoders with learned positions (BART) count them from the first column, padding or not.
        """
        rows = [row for one in encoded for row in one.variants]
        ids, left = [row.ids for row in rows], (padding or ("left" if self.kind == "causal" else "right")) == "left"
        mask = attended(ids, left)  # [b*v, s]
        inputs = {"input_ids": padded(ids, self._pad_id, left), "attention_mask": mask}
        if self.kind == "causal" and left:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        read = ids
        if self.kind == "seq2seq":
            read = [row.decoder or [] for row in rows]
            inputs["decoder_input_ids"] = padded(read, self._pad_id, left)  # [b*v, t]
            inputs["decoder_attention_mask"] = attended(read, left)
        return Batch(
            inputs=inputs,
            answer_at=shifted([row.at for row in rows], read, left),
            variants=len(rows) // max(len(encoded), 1),
            labels=classes([one.labels or one.label for one in encoded], len(self.labels)),
            index=None if index is None else torch.tensor(index, dtype=torch.long),
            answers=answers([one.answers for one in encoded]),
        )

    def batches(
        self, encoded: Sequence[Encoded], batch_size: int, *, order: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Batches of the rows in that order, or (for little padding) the longest first; `index` says which they are."""
        if order is None:
            parts = bucketed([one.length for one in encoded], batch_size)
        else:
            parts = chunks(order, batch_size)
        for part in parts:
            yield self.collate([encoded[i] for i in part], part)

    # How

    @cached_property
    def _codec(self) -> Codec:
        return Codec(self.tokenizer)

    @cached_property
    def _classes(self) -> dict[str, int]:
        return {label: i for i, label in enumerate(self.labels)}

    @cached_property
    def _pad_id(self) -> int:
        return pad_id(self.tokenizer)

    @cached_property
    def _mask_id(self) -> int:
        """The token that stands at `{mask}`."""
        return mask_id(self.tokenizer, self.sentinel if self.kind == "seq2seq" else None)

    @cached_property
    def _form(self) -> Form | None:
        return None if self.template.demos is None else Form.of(self.template, self.kind)

    @cached_property
    def _beside(self) -> Beside | None:
        """What puts demonstrations beside texts."""
        if self._form is None:
            return None
        if self.demonstrations is None:
            raise ConfigError(
                f"the template shows demonstrations, {self.template.demos}, and there are none yet; give "
                "model.demonstrate(examples) labelled examples, or fit the model"
            )
        return Beside(self._form, self.demonstrations, self.max_length, self._codec, self._laid_out, self._read)

    @cached_property
    def _layout(self) -> Layout:
        """The layout of every row; with demonstrations one that is like every row's where answers are read."""
        return self._laid_out(self.template if self._form is None else self._form.specimen())

    def _laid_out(self, template: Template) -> Layout:
        """The parts of a row, from the virtual ids in front to the tokenizer's own last special token."""
        numbers, blocks = iter(template.soft_ids), self._virtual_ids()

        def raw(piece: Piece) -> Raw:
            if isinstance(piece, Soft):
                return Fixed(blocks[next(numbers)], virtual=True)
            if isinstance(piece, Special):
                return Fixed((special_id(self.tokenizer, piece),), trims=True)
            return Fixed(()) if isinstance(piece, Role | Prefix | Demos) else piece  # a chat template writes roles

        chat = template.is_chat
        spoken = [p for p in template.pieces if not isinstance(p, Prefix)]  # which no token stands for
        pieces = chat_pieces(self.tokenizer, template, raw) if chat else [raw(p) for p in spoken]
        if self.kind == "causal":
            pieces = ends_with_answer(pieces, chat)
        middle = lay_out(pieces, self._codec.restarts)
        return self._enclosed(middle, chat)

    def _enclosed(self, middle: Layout, chat: bool) -> Layout:
        before, after = ((), ()) if chat else (self._codec.before, self._codec.after)
        parts: tuple[Part, ...] = middle.parts
        if self.kind == "causal":
            after, parts = (), tuple(p for p in parts if not isinstance(p, Mask))
        front = range(self.soft_base, self.soft_base + self.prepend_soft)
        parts = (Fixed(tuple(front), virtual=True), Fixed(before), *parts, Fixed(after))
        if self.kind == "seq2seq" and not middle.masks:  # the decoder's first word
            return Layout(parts, (Place(opens=True, space=False),))
        return Layout(parts, middle.places)

    def _virtual_ids(self) -> list[tuple[int, ...]]:
        first = self.soft_base + self.prepend_soft
        return [
            (first + start,) * block.size if block.tied else tuple(range(first + start, first + start + block.size))
            for block, start in zip(self.soft_blocks, self.soft_starts, strict=True)
        ]

    def _block(self, number: int, soft: Soft) -> SoftBlock:
        if soft.words is not None:
            key = soft.name if soft.name not in (None, soft.words) else f'"{soft.words}"'
            return SoftBlock(str(key), soft.words, len(self.word_ids(soft.words)))
        return SoftBlock(soft.name or f"#{number}", None, soft.size or 0, soft.tied, soft.encoder)

    def _known(self, words: str, ids: list[int]) -> list[int]:
        if not ids:
            raise ConfigError(f"{words!r} has no tokens in this vocabulary; choose another word")
        if self._codec.unknown in ids:
            unknown = self.tokenizer.unk_token
            raise ConfigError(f"{words!r} is unknown to this vocabulary (it has {unknown}); choose another word")
        return ids

    @cached_property
    def _masks_each(self) -> tuple[int, ...]:
        return self.answer_lengths if self._layout.masks and self.kind != "seq2seq" else (1,)

    def _around(self, layout: Layout) -> int:
        """The number of tokens that are not text, in the longest variant; with what an answer adds behind the text."""
        fixed = sum(len(part.ids) for part in layout.parts if isinstance(part, Fixed))
        follows = self.kind == "causal" or (self.kind == "seq2seq" and self.sentinel is None)
        later = max(self.answer_lengths) - 1 if follows else 0
        return fixed + later + layout.masks * max(self._masks_each)

    def _read(self, asked: Sequence[tuple[Layout, Example]]) -> list[Text]:
        """Examples in layouts, tokenised and not cut."""
        filled = [
            [part.fill(example.fields) for part in layout.parts if isinstance(part, Run)] for layout, example in asked
        ]
        tokens: dict[Ask, Tokens] = self._codec.encode(ask for row in filled for _, ask in row)
        return [
            Text(layout, [(text, tokens[ask]) for text, ask in row], self._around(layout))
            for (layout, _), row in zip(asked, filled, strict=True)
        ]

    def _encode(self, examples: Sequence[Example]) -> list[Encoded]:
        if (beside := self._beside) is None:
            texts = self._read([(self._layout, example) for example in examples])
        else:
            texts = [text for text, _ in beside.arranged(examples)]
        return [self._one(example, text) for example, text in zip(examples, texts, strict=True)]

    def _one(self, example: Example, text: Text) -> Encoded:
        found = self.classes_of(example)
        cut = fit(text.runs, self.max_length - text.around, text.around)
        rows = tuple(self._row(text.layout, cut, n) for n in self._masks_each)
        one = found[0] if found and not self.several else None
        return Encoded(rows, one, labels=found if self.several else (), answers=self._texts_of(example))

    def _texts_of(self, example: Example) -> tuple[tuple[int, ...], ...]:
        """The ids of each class's own text in an example."""
        texts = [phrase.filled(example.fields).strip() for phrase in self.phrases]
        each, longest = [tuple(self._ids_at(text)) for text in texts], max(self.answer_lengths)
        for label, text, ids in zip(self.labels if texts else (), texts, each, strict=True):
            if not ids:
                raise DataError(f"the text of label {label!r} is empty in an example, {dict(example.fields)}")
            if len(ids) > longest:
                raise DataError(
                    f"the text {text!r:.60} of a label has {len(ids)} tokens, and {longest} are possible; shorten it, "
                    "or raise the verbalizer's longest"
                )
        return tuple(each)

    def _row(self, layout: Layout, texts: list[list[int]], masks: int) -> Row:
        ids, at, text = list[int](), list[int](), iter(texts)
        for part in layout.parts:
            if isinstance(part, Mask):
                at.extend(range(len(ids), len(ids) + masks))
                ids.extend([self._mask_id] * masks)
            else:
                ids.extend(part.ids if isinstance(part, Fixed) else next(text))
        if self.kind == "seq2seq":
            return self._answered(ids, at)
        ids = ids or [first_id(self.tokenizer)]
        return Row(ids, [len(ids) - 1] if self.kind == "causal" else at or list(range(len(ids))))

    def _answered(self, ids: list[int], at: list[int]) -> Row:
        """T5's answer follows its sentinel; BART's follows its own text up to the mask, which the decoder repeats."""
        start = [i for i in (self.decoder_start_id,) if i is not None]
        if at and self.sentinel is not None:
            start.append(self._mask_id)
        elif at:
            start.extend(i for i in ids[: at[0]] if i < self.soft_base)
        return Row(ids, [len(start) - 1], start)
