"""Label words against plain transformers: scores and gradients of brute force, never all scores of a vocabulary."""

from contextlib import suppress
from functools import cache
from itertools import islice, pairwise

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltaprompt.backbone import continuation
from deltaprompt.backbone.shared import is_whole
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError
from deltaprompt.model import Model, Task
from deltaprompt.types import Batch, Example
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo

CLOSE = {"atol": 3e-6, "rtol": 3e-6}  # scores are formed in float32
TEMPLATE = "{text} It was {mask} ."
TEXTS = ["good", "a good film and a great plot", "not", "the cat sat on the mat ; it was bad"]
CANDIDATES = [
    "good",
    "bad",
    "great",
    "was",
    "terrible",
    "plot",
    "movie",
    "a good film",
    "not there",
    "cat",
    "maybe not",
]
CANDIDATES += ["the", "dog", "a", "is", "of", "no", "business", "sports", "what is it", "is not", "mad", "text of"]
MASKED = [f for f, (_, cls, *_) in zoo.FAMILIES.items() if cls.endswith("ForMaskedLM")]
CAUSAL = [f for f, (_, cls, *_) in (zoo.FAMILIES | zoo.UNTABLED).items() if cls.endswith(("CausalLM", "LMHeadModel"))]
SEQ2SEQ = ["t5", "t5-gated", "bart", "pegasus"]
ALL = [*MASKED, *CAUSAL, *SEQ2SEQ]
EAGER = ("gemma2", "bloom")  # transformers' own attention in float64 is NaN at padding: it takes a softmax in float32
EACH_KIND = ["bert", "gpt2", "llama", "mistral", "opt", "gpt_neox", "t5", "bart"]


@cache
def shared(family):
    """A backbone in float64 that no test changes for good."""
    return zoo.build(family, torch.float32 if family in EAGER else torch.float64)


def made(family, words, deltas=(), slots=1, template=TEMPLATE):
    model = Model(shared(family), Task(template, words), deltas, range(slots))
    with torch.no_grad():
        for i, (_, p) in enumerate(model.parts()):
            p.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(i))
    return model


def of_length(family, lengths, template=TEMPLATE):
    """A different word for each of the lengths, in tokens."""
    model = Model(shared(family), Task(template, ["good", "bad"]), [])
    model.adapted.remove()
    features = model.features
    sized = {}
    for word in (*CANDIDATES, *map(" ".join, pairwise(CANDIDATES))):
        with suppress(ConfigError):
            sized.setdefault(len(features.answer_ids(word)), []).append(word)
    return [sized[length].pop(0) for length in lengths]


def encoded_of(model, texts):
    return model.encode([Example({"text": t}) for t in texts])


def rows_of(model, texts, padding=None):
    batch = model.features.collate(encoded_of(model, texts), padding=padding)
    return Batch(batch.inputs, batch.answer_at, batch.variants, None)


def brute(model, text, word, slot=0):
    """log p(word | text), from the logits of plain forward passes: uncached, one row, one token at a time."""
    encoded, ids = encoded_of(model, [text])[0], model.features.answer_ids(word)
    answer = lambda **inputs: log_p(model.adapted, inputs, slot)  # noqa: E731
    if model.backbone.kind == "masked":
        row = next(r for r in encoded.variants if len(r.at) == len(ids))
        return sum(answer(input_ids=row.ids)[0, at, i] for at, i in zip(row.at, ids, strict=True))
    row, total = encoded.variants[0], 0.0
    for n, i in enumerate(ids):
        if model.backbone.kind == "causal":
            total = total + answer(input_ids=row.ids + ids[:n])[0, -1, i]
        else:
            total = total + answer(input_ids=row.ids, decoder_input_ids=row.decoder + ids[:n])[0, -1, i]
    return total


def log_p(adapted, inputs, slot):
    tensors = {name: torch.tensor([ids]) for name, ids in inputs.items()}
    options = {} if adapted.backbone.kind == "masked" else {"use_cache": False}
    mask = torch.ones_like(tensors["input_ids"])
    return adapted(**tensors, **options, attention_mask=mask, adaptation=slot).logits.log_softmax(-1)


def expected(model, words, texts, slots):
    """Class scores [b, c] by brute force: log of the mean probability of a class's words, normalised over them."""
    each = [
        torch.stack(
            [
                torch.stack([brute(model, text, w, slot) for w in own]).logsumexp(0) - torch.tensor(len(own)).log()
                for own in words.values()
            ]
        )
        for text, slot in zip(texts, slots, strict=True)
    ]
    return torch.stack(each).log_softmax(-1)


def check(family, words, deltas=(), slots=1, texts=TEXTS, template=TEMPLATE):
    model = made(family, words, deltas, slots, template)
    index = torch.arange(len(texts)) * 2 % slots if slots > 1 else None
    with torch.no_grad():
        logits = model(rows_of(model, texts), index)["logits"]
        want = expected(model, words, texts, [0] * len(texts) if index is None else index.tolist())
    model.adapted.remove()
    assert_close(logits, want, **CLOSE)


# Scores


@pytest.mark.parametrize("family", ALL)
def test_one_word_of_one_token_each_is_the_log_softmax_of_the_models_logits(family):
    words = of_length(family, [1, 1, 1])
    check(family, {w: (w,) for w in words})


@pytest.mark.parametrize("family", ALL)
def test_words_of_one_to_four_tokens_are_the_brute_force_likelihoods(family):
    a, b, c, d = of_length(family, [1, 2, 3, 4])
    check(family, {"x": (a,), "y": (b,), "z": (c,), "u": (d,)})


@pytest.mark.parametrize("family", EACH_KIND)
def test_several_words_are_the_mean_of_their_probabilities(family):
    a, b, c, d, e, f = of_length(family, [1, 1, 1, 2, 2, 3])
    check(family, {"x": (a, b), "y": (c,)})
    check(family, {"x": (a, d, f), "y": (b, e)})
    check(family, {"x": (d,), "y": (e,)})  # none of one token


@pytest.mark.parametrize("family", EACH_KIND)
@pytest.mark.parametrize("lengths", [[1, 1], [1, 2, 3]])
@pytest.mark.parametrize(
    "deltas",
    [
        [LoRA(rank=2)],
        [Prefix(length=3)],
        [SoftPrompt(length=3)],
        [SoftPrompt(length=2), LoRA(rank=2, at=("ffn.*", "head")), Prefix(length=2)],
    ],
    ids=["lora", "prefix", "soft", "all"],
)
def test_with_deltas_every_row_in_its_own_adaptation(family, lengths, deltas):
    check(family, {w: (w,) for w in of_length(family, lengths)}, deltas, slots=3)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_with_deltas_in_cross_attention(family):
    deltas = [LoRA(rank=2, at=("decoder.*.cross.k", "decoder.*.cross.q")), Prefix(length=2, at=("cross",))]
    check(family, {w: (w,) for w in of_length(family, [1, 3])}, deltas, slots=3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bert"])
def test_with_soft_tokens_of_the_template_and_of_a_soft_prompt(family):
    template = "{soft:2} {text} {soft:3:a} It was {soft:1} {mask}"
    words = of_length(family, [1, 2], template)
    check(family, {w: (w,) for w in words}, [SoftPrompt(length=2)], slots=2, template=template)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_answers_a_few_at_a_time_have_the_same_scores(family, monkeypatch):
    words = of_length(family, [1, 2, 3, 2, 4, 2])
    monkeypatch.setattr(continuation, "TOKENS", 1)
    check(family, {w: (w,) for w in words}, [LoRA(rank=2)], slots=3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "mistral", "t5", "bart", "bert"])
def test_under_gradient_checkpointing_where_no_keys_are_kept(family):
    words = of_length(family, [1, 2, 3])
    model = made(family, {w: (w,) for w in words}, [LoRA(rank=2)], slots=3)
    index = torch.tensor([1, 0, 2, 1])
    batch, seen = rows_of(model, TEXTS), []
    for on in (False, True):
        model.adapted.checkpointing(on)
        model.train(on)
        model.zero_grad()
        logits = model(batch, index)["logits"]
        logits[:, 0].sum().backward()
        seen.append((logits.detach(), *(p.grad.clone() for _, p in model.parts())))
    model.adapted.checkpointing(False)
    model.train(False)
    model.adapted.remove()
    for plain, again in zip(*seen, strict=True):
        assert_close(again, plain, **CLOSE)


@pytest.mark.parametrize("family", EACH_KIND)
def test_gradients_are_those_of_brute_force(family):
    a, b, c = of_length(family, [1, 2, 3])
    words, deltas = {"x": (a, c), "y": (b,)}, [LoRA(rank=2), Prefix(length=2), SoftPrompt(length=2)]
    model = made(family, words, deltas, slots=2)
    texts, index = TEXTS[:2], torch.tensor([1, 0])
    model(rows_of(model, texts), index)["logits"][:, 0].sum().backward()
    got = {name: p.grad.clone() for name, p in model.parts()}
    model.zero_grad()
    expected(model, words, texts, index.tolist())[:, 0].sum().backward()
    want = {name: p.grad.clone() for name, p in model.parts()}
    model.adapted.remove()
    assert all(g.any() for g in want.values())
    assert_close(got, want, atol=1e-5, rtol=1e-5)


# The token ids, by the tokenizer alone


def test_a_masked_row_is_the_tokenizers_own_with_a_mask_for_each_token():
    model = made("bert", {"x": "terrible film", "y": "good"})
    encoded, tokenizer = encoded_of(model, ["a good film"])[0], model.backbone.tokenizer
    for row, masks in zip(encoded.variants, model.features.answer_lengths, strict=True):
        assert row.ids == tokenizer(f"a good film It was {'[MASK] ' * masks}.")["input_ids"]
    model.adapted.remove()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_causal_prompt_and_its_answer_are_the_tokenization_of_the_whole(family):
    model = made(family, {"x": "terrible film", "y": "good"}, template="{text} It was {mask}")
    prompt = encoded_of(model, ["a good film"])[0].variants[0].ids
    for word in ("terrible film", "good"):
        assert (
            prompt + model.features.answer_ids(word)
            == model.backbone.tokenizer(f"a good film It was {word}")["input_ids"]
        )
    model.adapted.remove()


def test_t5_answers_after_its_sentinel_and_bart_after_the_text_up_to_its_mask():
    t5, bart = (made(f, {"x": "terrible film", "y": "good"}, template="{text} It was {mask}") for f in ("t5", "bart"))
    row = encoded_of(t5, ["a good film"])[0].variants[0]
    tokenizer = t5.backbone.tokenizer
    assert row.ids == tokenizer("a good film It was <extra_id_0>")["input_ids"]
    assert row.decoder == [tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<extra_id_0>")]
    row = encoded_of(bart, ["a good film"])[0].variants[0]
    tokenizer = bart.backbone.tokenizer
    assert row.ids == tokenizer("a good film It was<mask>")["input_ids"]
    assert row.decoder == [
        bart.backbone.config["decoder_start_token_id"],
        *tokenizer("a good film It was")["input_ids"][:-1],
    ]
    for model in (t5, bart):
        model.adapted.remove()


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_prompt_as_long_as_the_backbone_takes_leaves_room_for_its_answer(family):
    words = of_length(family, [1, 4])
    check(family, {w: (w,) for w in words}, texts=["good film " * 60, "bad"])


def test_barts_decoder_has_room_for_its_answer():
    words = of_length("bart", [1, 4], "{text} {mask}")
    check("bart", {w: (w,) for w in words}, texts=["good film " * 60, "bad"], template="{text} {mask}")


# Never all scores


class Sizes(TorchDispatchMode):
    """Records the shapes of all floating-point tensors that are made, and not views of the given ones."""

    def __init__(self, model):
        super().__init__()
        self.owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if (
                isinstance(t, torch.Tensor)
                and t.is_floating_point()
                and t.untyped_storage().data_ptr() not in self.owned
            ):
                self.shapes.append(tuple(t.shape))
        return out


def shapes_with_vocabulary(model, batch):
    """The shapes of tensors over the vocabulary that a training step and a prediction make."""
    with Sizes(model) as seen:
        model(batch)["loss"].backward()
        with torch.no_grad():
            model(batch)
    assert len(seen.shapes) > 50
    return {s for s in seen.shapes if model.backbone.vocabulary in s}


def long_batch(model, labels=2):
    texts = ["good film " * 60, "a bad plot " * 6, "bad", "it was the cat on the mat"]
    batch = model.features.collate(encoded_of(model, texts))
    return Batch(batch.inputs, batch.answer_at, batch.variants, torch.arange(4) % labels)


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "distilbert", "gpt2", "llama", "gemma2", "t5", "bart"])
@pytest.mark.parametrize("verbalizer", [None, SoftVerbalizer()], ids=["words", "soft"])
def test_no_scores_of_a_whole_vocabulary_are_made_for_words_of_one_token(family, verbalizer):
    a, b = of_length(family, [1, 1])
    task = Task(TEMPLATE, {a: a, b: b}, verbalizer)
    model = Model(shared(family), task, [LoRA(rank=2), SoftPrompt(length=2)])
    made_shapes = shapes_with_vocabulary(model, long_batch(model))
    model.adapted.remove()
    assert not made_shapes


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart"])
def test_words_of_several_tokens_have_scores_only_where_the_answer_is(family):
    words = of_length(family, [1, 3])
    model = made(family, {w: (w,) for w in words}, [LoRA(rank=2)])
    batch = long_batch(model)
    shapes = shapes_with_vocabulary(model, batch)
    model.adapted.remove()
    assert shapes
    assert all(torch.Size(s).numel() <= 4 * 3 * model.backbone.vocabulary for s in shapes)
    assert batch.inputs["input_ids"].shape[1] > 30


def test_the_recorder_sees_what_plain_transformers_makes():
    model = made("bert", {"x": "good", "y": "bad"}, [LoRA(rank=2)])
    batch = long_batch(model)
    with Sizes(model) as seen:
        model.backbone.model(**batch.inputs)
    model.adapted.remove()
    rows, length = batch.inputs["input_ids"].shape
    assert (rows, length, model.backbone.vocabulary) in seen.shapes


# Numbers


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart"])
def test_in_bfloat16_scores_are_close_and_sum_to_one(family):
    words = of_length(family, [1, 2, 3])
    task = Task(TEMPLATE, {w: (w,) for w in words})
    low = Model(zoo.build(family, torch.bfloat16), task, [LoRA(rank=2)])
    high = Model(zoo.build(family), task, [LoRA(rank=2)])
    got, want = (m(rows_of(m, TEXTS))["logits"].detach() for m in (low, high))
    assert got.dtype == torch.float32
    assert_close(got.exp().sum(-1), torch.ones(4))
    assert_close(got, want, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bart", "bert"])
def test_a_row_has_the_same_scores_in_any_batch(family):
    words = of_length(family, [1, 2, 3])
    model = made(family, {w: (w,) for w in words}, [LoRA(rank=2)])
    with torch.no_grad():
        together = model(rows_of(model, TEXTS))["logits"]
        alone = torch.cat([model(rows_of(model, [text]))["logits"] for text in islice(TEXTS, 4)])
    model.adapted.remove()
    assert_close(together, alone, **CLOSE)


def test_a_verbalizer_for_all_rows_asks_for_the_answers_more_than_once():
    words = of_length("gpt2", [1, 2])
    model = made("gpt2", {w: (w,) for w in words})
    with torch.no_grad():
        at = model.at_mask(rows_of(model, TEXTS))
        first, second = (model.scorer(at) for _ in range(2))
    model.adapted.remove()
    assert torch.equal(first, second)


def test_label_words_are_the_default_and_take_plain_strings():
    model = made("bert", {"x": "good", "y": ("bad", "terrible")})
    assert model.verbalizer == LabelWords({"x": ("good",), "y": ("bad", "terrible")})
    model.adapted.remove()


@pytest.mark.parametrize("site", ["head", "norm"])
def test_a_delta_at_the_end_of_the_backbone_acts_in_every_row_as_alone(site):
    words = of_length("gpt2", [1, 2, 3])
    deltas = [LoRA(rank=2, at=("head",))] if site == "head" else [BitFit(at=("norm",))]
    check("gpt2", {w: (w,) for w in words}, deltas, slots=3)


def test_a_cache_that_does_not_hold_the_whole_prompt_is_not_gone_on_from():
    from transformers import DynamicCache

    assert not is_whole(None, 3)
    assert not is_whole(DynamicCache(), 3)
