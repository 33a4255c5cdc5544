"""Demonstrations: what is drawn, how it stands in the prompt, character by character; what fits, what is refused."""

from __future__ import annotations

import pickle
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaprompt.errors import ConfigError, DataError, TemplateError
from deltaprompt.features import Features
from deltaprompt.features.beside import LEAST, Form
from deltaprompt.features.demonstrations import MOST, Demonstrations, drawn, from_json
from deltaprompt.templates import Demos, parse
from deltaprompt.types import Example
from tests.tokenizers_zoo import build

BASE = 1000
WORDS = {"bad": ("terrible",), "good": ("great",), "so": ("so so",)}
TEXTS = {
    "good": ["a good movie", "the cat sat", "a gem"],
    "bad": ["one two", "x y", "no"],
    "so": ["it was", "a dog", "well"],
}
POOL = [Example({"text": text}, label) for label, texts in TEXTS.items() for text in texts]
KINDS = {"gpt2": "causal", "llama": "causal", "chatml": "causal", "t5": "seq2seq"}
REVIEW = "{demos:3}Review: {text}\nSentiment: {mask}\n\n"
ASKED = Demos(3)


def features(name, source, pool=POOL, seed=0, max_length=400, states=None, words=None, **more) -> Features:
    kind = KINDS.get(name, "masked")
    if kind == "seq2seq":
        more = {"decoder_start_id": 0, "sentinel": "<extra_id_0>", **more}
    f = Features(build(name), parse(source), kind, max_length, tuple(TEXTS), soft_base=BASE, **more)
    t = f.template
    if t.demos is None or pool is None:
        return f
    rows = drawn(t.demos, t.fields, pool, seed)
    return replace(f, demonstrations=Demonstrations(t.demos, t.fields, words or WORDS, rows, states)).checked()


def ids(f: Features, text: str) -> list[int]:
    return f.encode([Example({"text": text})])[0].variants[0].ids


def prompt(f: Features, text: str) -> str:
    return f.tokenizer.decode([i if i < BASE else f.tokenizer.convert_tokens_to_ids("x") for i in ids(f, text)])


def shown(f: Features, text: str) -> list[tuple[str, str]]:
    """(label, text) of each demonstration, from the start of the prompt."""
    return [(str(e.label), e.fields["text"]) for e in f.shown([Example({"text": text})])[0]]


# What is drawn


def test_labels_take_turns_in_an_order_that_the_seed_draws():
    orders = {tuple(e.fields["text"] for e in drawn(Demos(9), ("text",), POOL, seed)) for seed in range(20)}
    assert len(orders) == 20
    for seed in range(20):
        labels = [e.label for e in drawn(Demos(9), ("text",), POOL, seed)]
        assert all(set(labels[i : i + 3]) == set(TEXTS) for i in (0, 3, 6))
    firsts = {drawn(Demos(9), ("text",), POOL, seed)[0].label for seed in range(20)}
    assert firsts == set(TEXTS)


def test_the_same_seed_draws_the_same():
    assert drawn(ASKED, ("text",), POOL, 7) == drawn(ASKED, ("text",), POOL, 7)


def test_labels_that_are_used_up_are_left_out():
    rows = drawn(Demos(5), ("text",), [*POOL[:4], POOL[4]], 0)
    assert Counter(e.label for e in rows) == {"good": 3, "bad": 2}


def test_what_is_kept_of_seeded_is_what_can_be_shown():
    rows = drawn(ASKED, ("text",), POOL, 0)
    assert {e.label for e in rows[:3]} == set(TEXTS)
    assert Counter(e.label for e in rows) == {"good": 2, "bad": 2, "so": 2}


def test_of_nearest_all_are_kept_up_to_a_limit():
    assert len(drawn(Demos(3, "nearest"), ("text",), POOL, 0)) == len(POOL)
    many = [Example({"text": str(i)}, str(i % 2)) for i in range(MOST + 10)]
    rows = drawn(Demos(3, "nearest"), ("text",), many, 0)
    assert Counter(e.label for e in rows) == {"0": MOST // 2, "1": MOST // 2}


def test_a_text_stands_once_and_with_the_fields_that_are_used():
    twice = [Example({"text": "a", "title": str(i)}, "good") for i in range(4)]
    assert drawn(Demos(1), ("text",), twice, 0) == (Example({"text": "a"}, "good"),)


def test_too_few():
    with pytest.raises(ConfigError, match="shows 3 demonstrations, and 2 labelled examples that differ were given"):
        drawn(ASKED, ("text",), [*POOL[:2], POOL[0]], 0)
    with pytest.raises(ConfigError, match=r"write \{demos:1\}"):
        drawn(ASKED, ("text",), [], 0)


def test_an_example_without_one_label_or_a_field():
    with pytest.raises(DataError, match="example 10 has no label, and a demonstration shows one"):
        drawn(ASKED, ("text",), [*POOL, Example({"text": "a"})], 0)
    with pytest.raises(DataError, match="example 1 has several labels, and a demonstration shows one"):
        drawn(ASKED, ("text",), [Example({"text": "a"}, labels=("good", "bad")), *POOL], 0)
    with pytest.raises(TemplateError, match="the example has no field 'title'"):
        drawn(ASKED, ("text", "title"), POOL, 0)


def test_json_and_back():
    f = features("gpt2", REVIEW)
    assert from_json(f.demonstrations.as_json()) == f.demonstrations.rows


# A text is not its own demonstration


@pytest.mark.parametrize("seed", range(5))
def test_the_next_of_its_label_stands_in_the_place_of_its_own(seed):
    f = features("gpt2", REVIEW, seed=seed)
    usual = shown(f, "anything")
    assert len({label for label, _ in usual}) == 3
    for place, (label, text) in enumerate(usual):
        own = shown(f, text)
        assert [pair for i, pair in enumerate(own) if i != place] == [
            pair for i, pair in enumerate(usual) if i != place
        ]
        assert own[place][0] == label
        assert own[place][1] != text
    others = [e.fields["text"] for e in POOL if (e.label, e.fields["text"]) not in usual]
    assert all(shown(f, text) == usual for text in others)


def test_it_is_left_out_where_its_label_has_no_other():
    f = features("gpt2", REVIEW, pool=[POOL[0], POOL[3], POOL[6]])
    assert len(shown(f, "anything")) == 3
    assert [label for label, _ in shown(f, TEXTS["bad"][0])].count("bad") == 0
    assert len(shown(f, TEXTS["bad"][0])) == 2


def test_what_is_kept_shows_the_same():
    f = features("gpt2", REVIEW, seed=3)
    kept = replace(f, demonstrations=replace(f.demonstrations, rows=from_json(f.demonstrations.as_json())))
    for text in ["anything", *(e.fields["text"] for e in POOL)]:
        assert shown(kept, text) == shown(f, text)


# The prompt


def test_the_prompt_of_a_left_to_right_model():
    f = features("gpt2", REVIEW)
    told = "".join(f"Review: {text}\nSentiment: {WORDS[label][0]}\n\n" for label, text in shown(f, "a fine thing"))
    assert prompt(f, "a fine thing") == told + "Review: a fine thing\nSentiment:"
    assert ids(f, "a fine thing") == f.tokenizer(told + "Review: a fine thing\nSentiment:")["input_ids"]


def test_the_prompt_of_a_masked_model():
    f = features("roberta", "{demos:2}{text} It was {mask}.")
    told = "".join(f"{text} It was {WORDS[label][0]}." for label, text in shown(f, "a fine thing"))
    assert ids(f, "a fine thing") == f.tokenizer(f"{told}a fine thing It was{f.tokenizer.mask_token}.")["input_ids"]


def test_the_prompt_of_an_encoder_decoder():
    f = features("t5", "{demos:2}{text} It was {mask}.\n")
    told = "".join(f"{text} It was {WORDS[label][0]}.\n" for label, text in shown(f, "a fine thing"))
    blanks = told.replace("\n", " ")  # all that this vocabulary has for a line end
    assert prompt(f, "a fine thing") == f"{blanks}a fine thing It was<extra_id_0>.</s>"


def test_words_before_the_piece_stand_once():
    f = features("gpt2", "Rate it.\n{demos:2}{text}: {mask}\n")
    told = "".join(f"{text}: {WORDS[label][0]}\n" for label, text in shown(f, "z"))
    assert prompt(f, "z") == f"Rate it.\n{told}z:"


def test_behind_the_text_the_nearest_comes_first():
    f = features("roberta", "{text} It was {mask}.{demos:2} End.")
    before = features("roberta", "{demos:2}{text} It was {mask}.")
    assert shown(f, "z") == shown(before, "z")[::-1]
    told = "".join(f"{text} It was {WORDS[label][0]}." for label, text in shown(f, "z"))
    assert ids(f, "z") == f.tokenizer(f"z It was{f.tokenizer.mask_token}.{told} End.")["input_ids"]


@pytest.mark.parametrize(
    ("source", "joined"),
    [
        ("{demos:1}{text}: {mask}", "{text}: {word}\n"),
        ("{demos:1}Review: {text}: {mask}", "Review: {text}: {word}\n"),
        ("{demos:1}\n{text}: {mask}", "\n{text}: {word}"),
        ("{demos:1}{text}: {mask} ", "{text}: {word} "),
        ("{demos:1}{text}: {mask}.\n", "{text}: {word}.\n"),
    ],
)
def test_demonstrations_are_joined_as_the_template_says_and_never_touch(source, joined):
    f = features("gpt2", source)
    [(label, text)] = shown(f, "z")
    assert prompt(f, "z").startswith(joined.replace("{text}", text).replace("{word}", WORDS[label][0]))


def test_a_special_token_is_a_join():
    f = features("roberta", "{demos:1}{text} {mask}{special:sep}")
    [(label, text)] = shown(f, "z")
    assert prompt(f, "z") == f"<s>{text} {WORDS[label][0]}</s>z<mask></s></s>"


def test_soft_blocks_are_the_same_in_every_demonstration():
    f = features("gpt2", "{soft:1:front}{demos:2}{soft:2}{text}{soft:1:named}: {mask}\n")
    plain = features("gpt2", "{soft:1:front}{soft:2}{text}{soft:1:named}: {mask}")
    own = [i for i in ids(plain, "z") if i >= BASE]
    assert own == [BASE, BASE + 1, BASE + 2, BASE + 3]
    assert [i for i in ids(f, "z") if i >= BASE] == [own[0], *own[1:] * 3]
    assert f.soft_blocks == plain.soft_blocks


def test_filters_act_in_demonstrations():
    pool = [Example({"text": "A GEM."}, "good"), Example({"text": "OH NO."}, "bad")]
    f = features("gpt2", "{demos:2}{text|lower|nodot}: {mask}\n", pool=pool)
    assert sorted(prompt(f, "Z.").split("\n")) == ["a gem: great", "oh no: terrible", "z:"]


def test_demonstrations_are_earlier_turns_of_a_chat():
    f = features("chatml", "{system}Rate it.{user}\n{demos:2}Review: {text}{assistant}{mask}")
    plain = [{"role": "system", "content": "Rate it."}]
    for label, text in shown(f, "z"):
        plain += [{"role": "user", "content": f"Review: {text}"}, {"role": "assistant", "content": WORDS[label][0]}]
    messages = [*plain, {"role": "user", "content": "Review: z"}]
    told = f.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt(f, "z") == told


def test_a_text_without_content_is_shown_what_a_seed_draws():
    def broken(examples):
        raise AssertionError("no state is asked for")

    f = features("gpt2", "{demos:3:nearest}{text}: {mask}\n", states=broken)
    assert shown(f.seeded(), "N/A") == shown(features("gpt2", "{demos:3}{text}: {mask}\n"), "N/A")


def test_nearest_by_cosine_the_nearest_last_and_never_itself():
    angle = {e.fields["text"]: i * i / 100 for i, e in enumerate(POOL)}

    def states(examples):
        turned = torch.tensor([angle.get(e.fields["text"], 0.18) for e in examples])
        return torch.stack([turned.cos(), turned.sin()], -1) * torch.arange(1, len(examples) + 1)[:, None]

    f = features("gpt2", "{demos:3:nearest}{text}: {mask}\n", states=states)
    assert [text for _, text in shown(f, "elsewhere")] == [POOL[i].fields["text"] for i in (3, 5, 4)]
    assert sorted(text for _, text in shown(f, "x y")) == sorted(POOL[i].fields["text"] for i in (3, 5, 2))
    whole = features("gpt2", "{demos:9:nearest}{text}: {mask}\n", states=states)
    assert len(shown(whole, "elsewhere")) == 9
    assert len(shown(whole, "a gem")) == 8


# What fits


def test_as_many_whole_ones_as_fit_and_the_text_is_whole():
    full = features("gpt2", REVIEW, max_length=10_000)
    for text in ("z", "a good movie " * 5):
        whole = ids(full, text)
        for length in range(len(ids(features("gpt2", REVIEW.replace("{demos:3}", "")), text)) + 4, len(whole) + 2, 3):
            cut = features("gpt2", REVIEW, max_length=max(length, 60))
            got, kept = ids(cut, text), shown(cut, text)
            assert kept == shown(full, text)[3 - len(kept) :]
            assert len(got) <= max(length, 60)
            one_more = len(ids(replace(full, demonstrations=_only(full, len(kept) + 1)), text))
            assert len(kept) == 3 or one_more > max(length, 60)
            assert f"Review: {text}\nSentiment:" in prompt(cut, text)


def _only(f: Features, count: int) -> Demonstrations:
    demos = f.demonstrations
    return replace(demos, asked=Demos(min(count, 3)))


def test_without_demonstrations_the_text_is_cut_as_usual():
    plain = features("gpt2", "Review: {text}\nSentiment: {mask}", max_length=100)
    f = features("gpt2", REVIEW, max_length=100)
    long = "a good movie " * 60
    assert shown(f, long) == []
    assert ids(f, long) == ids(plain, long)


@pytest.mark.parametrize("cut", ["tail", "head", "middle"])
def test_long_texts_of_demonstrations_are_cut_to_a_share_of_their_own(cut):
    pool = [Example({"text": (word + " ") * 2000}, label) for label, word in (("good", "yes"), ("bad", "no"))]
    assert min(len(e.fields["text"]) for e in pool) >= 6_000
    f = features(
        "gpt2", f"{{demos:2}}Review: {{text|truncate:{cut}}}\nSentiment: {{mask}}\n\n", pool=pool, max_length=300
    )
    got = prompt(f, "a fine thing")
    assert len(shown(f, "a fine thing")) == 2
    assert got.endswith("Review: a fine thing\nSentiment:")
    parts = got.split("\n\n")[:2]
    assert [part.rsplit("\n")[-1] for part in parts] == [f"Sentiment: {WORDS[label][0]}" for label, _ in shown(f, "z")]
    assert all(90 <= len(f.tokenizer(part)["input_ids"]) <= 102 for part in parts)


def test_which_side_of_a_demonstration_is_cut():
    pool = [Example({"text": "first " + "and " * 300 + "last"}, "good")]
    for cut, stays in (("tail", {"first"}), ("head", {"last"}), ("middle", {"first", "last"})):
        f = features("gpt2", f"{{demos:1}}{{text|truncate:{cut}}}: {{mask}}\n", pool=pool, max_length=100)
        words = prompt(f, "z").split("\n")[0].removesuffix(": great").split()
        assert {"first", "last"} & set(words) == stays


def test_a_text_that_is_kept_is_whole_in_a_demonstration():
    pool = [Example({"text": "well " * 60, "title": "a gem"}, "good")]
    f = features("gpt2", "{demos:1}{title|keep}: {text} {mask}\n", pool=pool, max_length=120)
    got = f.tokenizer.decode(f.encode([Example({"text": "z", "title": "t"})])[0].variants[0].ids)
    assert got.startswith("a gem: well well")
    kept = [Example({"text": "well " * 300}, "good")]
    with pytest.raises(TemplateError, match="not one demonstration fits: with the shortest the prompt has"):
        features("gpt2", "{demos:1}{text|keep} {mask}\n", pool=kept, max_length=100)


def test_no_demonstration_has_room_at_all():
    with pytest.raises(TemplateError, match=r"max_length is 30; raise max_length, or shorten the template's words"):
        features("gpt2", REVIEW, max_length=30)


def test_some_text_is_always_left():
    pool = [Example({"text": "well " * 300}, label) for label in ("good", "bad")]
    pool[1] = Example({"text": "oh " * 300}, "bad")
    f = features("gpt2", "{demos:2}Review: {text}\nSentiment: {mask}\n\n", pool=pool, max_length=90)
    assert len(f.shown([Example({"text": ""})])[0]) >= 1
    text = prompt(f, "").split("\n")[0].removeprefix("Review: ")
    assert LEAST - 2 <= len(f.tokenizer(text)["input_ids"]) <= LEAST + 2


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=4),
    extra=st.integers(0, 200),
    by=st.sampled_from(["seeded", "nearest"]),
)
def test_no_row_is_longer_than_it_may_be(lengths, extra, by):
    def states(examples):
        return torch.tensor([[float(len(e.fields["text"])), 1.0] for e in examples])

    f = features("bert", f"{{demos:3:{by}}}{{text}} It was {{mask}}.", max_length=40 + extra, states=states)
    plain = features("bert", "{text} It was {mask}.", max_length=40 + extra)
    examples = [Example({"text": "good " * n}) for n in lengths]
    for row, bare, demos in zip(f.encode(examples), plain.encode(examples), f.shown(examples), strict=True):
        assert row.length <= 40 + extra
        assert row.variants[0].ids.count(f.tokenizer.mask_token_id) == 1
        good = f.tokenizer.convert_tokens_to_ids("good")
        shows = sum(e.fields["text"].split().count("good") for e in demos)
        assert row.variants[0].ids.count(good) - shows == bare.variants[0].ids.count(good)


# What is refused


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("gpt2", "{demos:2}{text}", r"a demonstration shows its answer at \{mask\}, got none"),
        ("gpt2", "{text}: {mask}{demos:2}", "sees only what stands before its answer"),
        ("gpt2", "{text}{demos:2}: {mask}", r"fields and \{mask\} stand on one side of \{demos\}"),
        ("gpt2", "{demos:2}{mask}: {text}", "a left-to-right model does not see what stands after"),
        ("chatml", "{user}Rate {demos:2}{text}{assistant}{mask}", r"\{demos\} opens a \{user\} turn"),
        ("chatml", "{system}{demos:2}Rate{user}{text}{assistant}{mask}", r"\{demos\} opens a \{user\} turn"),
        ("chatml", "{user}{text}{assistant}{demos:2}{mask}", r"\{demos\} opens a \{user\} turn"),
    ],
)
def test_templates_that_do_not_fit(name, source, message):
    with pytest.raises(TemplateError, match=message):
        features(name, source)


def test_without_a_pool_nothing_is_encoded():
    f = features("gpt2", REVIEW, pool=None)
    with pytest.raises(ConfigError, match=r"there are none yet; give model.demonstrate\(examples\)"):
        ids(f, "z")
    assert f.answer_ids("great") == features("gpt2", REVIEW).answer_ids("great")


def test_nearest_needs_something_to_compare():
    f = features("gpt2", "{demos:3:nearest}{text}: {mask}\n")
    with pytest.raises(ConfigError, match="need a backbone to compare states of"):
        ids(f, "z")


def test_features_are_copied_and_pickled_with_what_they_show():
    f = features("gpt2", REVIEW)
    expected = ids(f, "z")
    assert ids(deepcopy(f), "z") == expected
    assert ids(pickle.loads(pickle.dumps(f)), "z") == expected


def test_an_answer_is_written_as_it_stands_behind_demonstrations():
    """A word that opens a sequence may be other tokens than one behind something."""
    f = features("roberta_prefix", "{demos:2}{mask}: {text}\n")
    assert Form.of(f.template, "masked").specimen().masks == 1
    assert f.answer_ids("great") == features("roberta_prefix", "x\n{mask}: {text}").answer_ids("great")
    assert f.answer_ids("great") != features("roberta_prefix", "{mask}: {text}").answer_ids("great")
