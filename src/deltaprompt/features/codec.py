"""Text -> token ids as the text would be tokenised where it stands, and never a special token by accident."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ask: TypeAlias = tuple[str, bool]  # a text, and whether it opens a sequence (else it goes on after something)

PROBE: Final = "a"  # any text that every vocabulary has, or has an unknown token for
ANCHORS: Final = ("|", ".", "x", "0")  # one of them stands before a text that goes on, in tokenizers that add a blank
BLANK_SIGNS: Final = ("▁", "Ġ")  # how a blank is written by Metaspace (sentencepiece) and by byte-level BPE


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of a text, and for each the characters `[start, end)` that it comes from."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Codec:
    """A fast tokenizer seen as: ids of a text that opens a sequence, or goes on after another token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.is_fast:
            got = type(tokenizer).__name__
            raise ConfigError(f"a fast tokenizer is needed, got {got}; make a tokenizer.json of it with transformers")
        self.tokenizer = tokenizer
        self.unknown: int | None = tokenizer.unk_token_id
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special: frozenset[int] = frozenset({*added, *tokenizer.all_special_ids} - {self.unknown})
        self.before, self.after = _around(tokenizer)

    @cached_property
    def prefixed(self) -> bool:
        """Whether the tokenizer puts a blank before a text that has none (sentencepiece's dummy prefix)."""
        text, backend = PROBE, self.tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        if backend.pre_tokenizer is not None:
            text = backend.pre_tokenizer.pre_tokenize_str(text)[0][0]
        return text.startswith(BLANK_SIGNS)

    @cached_property
    def restarts(self) -> bool:
        """Whether that blank is put after a special token in the text too, as at the start of a sequence."""
        specials = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        texts = [PROBE, *(special + PROBE for special in specials[:1])]
        alone, *after = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return all(ids[1:] == alone for ids in after)

    def one(self, text: str, opens: bool = True) -> list[int]:
        """The token ids of one text."""
        return self.encode([(text, opens)])[text, opens].ids

    def encode(self, asks: Iterable[Ask]) -> dict[Ask, Tokens]:
        """Every text, tokenised once, all of them in one call of the tokenizer (a second for the rare odd ones)."""
        asks = dict.fromkeys(asks)
        done = {ask: Tokens([], []) for ask in asks if not ask[0]}
        left = [ask for ask in asks if ask[0]]
        for anchor in (*ANCHORS, ""):  # without an anchor no token is in the way
            leads = ["" if opens or not self.prefixed else anchor for _, opens in left]
            calls = self._call([lead + text for lead, (text, _) in zip(leads, left, strict=True)])
            for ask, lead, encoding in zip(left, leads, calls, strict=True):
                if tokens := _behind(encoding, len(lead)):
                    done[ask] = self._spelled(ask[0], tokens)
            left = [ask for ask in left if ask not in done]
        return done

    def _call(self, texts: Sequence[str]) -> Sequence[Any]:
        if not texts:
            return []
        called = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        encodings: Sequence[Any] = called.encodings
        return encodings

    def _spelled(self, text: str, tokens: Tokens) -> Tokens:
        """The tokens with every special one, which a Unigram model finds in plain text too, spelled by characters."""
        if self.special.isdisjoint(tokens.ids):
            return tokens
        spelled = Tokens([], [])
        for i, span in zip(tokens.ids, tokens.spans, strict=True):
            inner = [(i, span)] if i not in self.special else self._letters(text, *span)
            spelled.ids.extend(i for i, _ in inner)
            spelled.spans.extend(span for _, span in inner)
        return spelled

    def _letters(self, text: str, start: int, end: int) -> list[tuple[int, tuple[int, int]]]:
        letters = text[start:end] if end - start > 1 else ""  # a special token of one letter has no other spelling
        spelled = self.encode((letter, False) for letter in letters)
        return [(i, (at, at + 1)) for at, letter in enumerate(letters, start) for i in spelled[letter, False].ids]


def _behind(encoding: Any, lead: int) -> Tokens | None:
    """The tokens after the first `lead` characters; none when one token has characters of both sides."""
    ids, spans = encoding.ids, encoding.offsets
    if not lead:
        return Tokens(ids, spans)
    skip = next((i for i, (_, end) in enumerate(spans) if end > lead), len(spans))
    if skip < len(spans) and spans[skip][0] < lead:
        return None
    return Tokens(ids[skip:], [(start - lead, end - lead) for start, end in spans[skip:]])


def _around(tokenizer: PreTrainedTokenizerFast) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after a single sequence."""
    whole: list[int] = tokenizer(PROBE)["input_ids"]
    bare: list[int] = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return tuple(whole[:at]), tuple(whole[at + len(bare) :])
    raise ConfigError(
        f"the tokenizer changes a text when it adds special tokens: {PROBE!r} is {bare} without and {whole} with them; "
        "use a tokenizer whose post-processor only adds tokens"
    )
