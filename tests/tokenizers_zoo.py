"""Tiny tokenizers of every family, trained on a few lines: `build("bert")`, `build("t5")`, … (see `KINDS`)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "a great movie . It was great , it was terrible !",
    "great plot and terrible acting : a good film , a bad film .",
    "the text of a review is good or bad ; sports , world , business",
    "Review: it was good . Answer: yes or no ? maybe ( not ) what",
    "In summary the cat sat on the mat and the dog was not there",
    "positive negative neutral question answer user assistant system",
    "电影 很 好 看 坏 不 的 是 。",
] * 3

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)


def special(text: str, **how: bool) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, **how)


def around(core: Tokenizer, single: str) -> None:
    """Sets the post-processor that puts special tokens around a sequence, as in `"[CLS] $A [SEP]"`."""
    names = [name for name in single.split() if name != "$A"]
    tokens = [(name, core.token_to_id(name)) for name in names]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)


def bert() -> PreTrainedTokenizerFast:
    """WordPiece, lower case; its pieces are written down, as its trainer's differ from process to process."""
    names = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    split = core.pre_tokenizer.pre_tokenize_str(core.normalizer.normalize_str(" ".join(CORPUS)))
    words = {word for word, _ in split}
    letters = {letter for word in words for letter in word}
    pieces = {*letters, *(f"##{letter}" for letter in letters), *words, *(word[:3] for word in words)}
    vocab = {piece: i for i, piece in enumerate([*specials, *sorted(pieces)])}
    core.model = models.WordPiece(vocab, unk_token="[UNK]")
    core.add_special_tokens([special(name) for name in specials])
    around(core, "[CLS] $A [SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=core, **{f"{k}_token": v for k, v in names.items()})


def byte_level(specials: list[str], prefix: bool = False) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def roberta(prefix: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<mask>` that takes the blank before it."""
    core = byte_level(["<s>", "<pad>", "</s>", "<unk>"], prefix)
    core.add_special_tokens([special("<mask>", lstrip=True)])
    core.post_processor = processors.RobertaProcessing(
        ("</s>", core.token_to_id("</s>")), ("<s>", core.token_to_id("<s>")), trim_offsets=True, add_prefix_space=prefix
    )
    names = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "unk": "<unk>", "pad": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=core, **{f"{k}_token": v for k, v in names.items()})
    fast.mask_token = special("<mask>", lstrip=True)
    return fast


def roberta_prefix() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts a blank before a text."""
    return roberta(prefix=True)


def gpt2() -> PreTrainedTokenizerFast:
    """Byte-level BPE; no padding token, nothing around a sequence."""
    core = byte_level(["<|endoftext|>"])
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, unk_token=end)


def chatml() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the chat template of Qwen and others."""
    core = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


def sentencepiece_bpe() -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)  # no merges across words
    core.decoder = decoders.Metaspace()
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=names, show_progress=False))
    vocab = core.get_vocab()
    merges = [tuple(merge) for merge in json.loads(core.to_str())["model"]["merges"]]
    fresh = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fresh.add_special_tokens([special(name) for name in ("<unk>", "<s>", "</s>")])
    fresh.decoder = core.decoder
    return fresh


def llama_like(core: Tokenizer) -> PreTrainedTokenizerFast:
    around(core, "<s> $A")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )


def llama() -> PreTrainedTokenizerFast:
    """BPE with `▁` for blanks, one put before the first text only."""
    core = sentencepiece_bpe()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return llama_like(core)


def llama_legacy() -> PreTrainedTokenizerFast:
    """The same by a normalizer, which puts a `▁` before every stretch between special tokens."""
    core = sentencepiece_bpe()
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return llama_like(core)


def t5() -> PreTrainedTokenizerFast:
    """Unigram with sentinels, which (as in T5) are pieces of the model's own vocabulary too."""
    core = Tokenizer(models.Unigram())
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always", split=True)]
    core.pre_tokenizer = pre_tokenizers.Sequence(split)
    core.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=200, show_progress=False, unk_token="<unk>"))
    found = json.loads(core.to_str())["model"]["vocab"]
    learned = sorted((piece, round(score, 6)) for piece, score in found if piece != "<unk>")  # whatever the process
    sentinels = [f"<extra_id_{i}>" for i in range(3)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *learned, *((s, 0.0) for s in reversed(sentinels))]
    core.model = models.Unigram(pieces, unk_id=2)
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.add_special_tokens([special(name) for name in ("<pad>", "</s>", "<unk>", *sentinels)])
    around(core, "$A </s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_special_tokens=sentinels
    )


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    made.__name__: made for made in (bert, roberta, roberta_prefix, gpt2, chatml, llama, llama_legacy, t5)
}


@lru_cache
def trained(kind: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer of that family, trained once."""
    return KINDS[kind]()


def build(kind: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer of that family, the caller's own: what one test sets on it, no other test sees."""
    return copy.deepcopy(trained(kind))
