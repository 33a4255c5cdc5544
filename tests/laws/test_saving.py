"""Laws of saving: what opens is what was saved, on the same backbone only; over every delta and verbalizer there is."""

import copy
import json
import random
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from deltaprompt import registry, store
from deltaprompt.backbone.load import load, wrap
from deltaprompt.deltas.adapter import Adapter
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError, StoreError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.model.saved import describe, fill, identity, open_, tensors, tokenizer_digest
from deltaprompt.types import Example
from tests import backbones_zoo as zoo
from tests import tokenizers_zoo

KINDS = {"bert": "masked", "llama": "causal", "t5": "seq2seq", "bert-encoder": "encoder"}
LABELS = ("terrible", "great", "neutral")
WORDS = {"terrible": ("terrible", "bad film"), "great": "great", "neutral": ["yes"]}
OPTIONS = {  # of the verbalizers that have no default for one
    "label_words": {"words": WORDS},
    "label_descriptions": {"descriptions": {label: f"it was {label}" for label in LABELS}},
    "knowledgeable": {"words": WORDS, "longest": 30},
    "rules": {"rules": {label: (label,) for label in ("terrible", "great")} | {"neutral": ("yes",)}},
    "written": {"texts": {label: label for label in LABELS}},
}
LANGUAGE = ("masked", "causal", "seq2seq")
ACTS = {"rules": ("masked",), "written": ("causal", "seq2seq")}  # on which kinds, where not on all
ACTS |= dict.fromkeys(("label_words", "hierarchical", "knowledgeable", "automatic"), LANGUAGE)
EXAMPLES = [Example({"text": text}) for text in ("a great movie", "It was there and bad . " * 30, "", "电影 很 好 看")]
PRODUCT = [
    pytest.param(family, verbalizer, delta, id=f"{family}-{verbalizer}-{delta}")
    for family, kind in KINDS.items()
    for verbalizer in registry.variants("verbalizers")
    for delta in registry.variants("deltas")
    if kind in ACTS.get(verbalizer, (kind,))
]


@cache
def shared(family):
    """The backbone that a model is made on; all tests leave it as it was."""
    return zoo.build(family)


@cache
def another(family):
    """The same backbone, made once more, under another name."""
    return wrap(zoo.model(family), shared(family).tokenizer, kind=KINDS.get(family), name="another")


def task_of(family, verbalizer="soft"):
    template = "{soft:2} {text}" if KINDS[family] == "encoder" else '{soft:"In summary"} {text} It was {mask}'
    return Task(template, LABELS, registry.build("verbalizers", verbalizer, OPTIONS.get(verbalizer, {})))


@contextmanager
def model_of(backbone, task=None, deltas=("lora",), seeds=(0,)):
    """A model whose every parameter has moved, and which leaves its backbone when done."""
    chosen = [registry.build("deltas", name, {}) for name in deltas]
    model = Model(backbone, task or task_of("bert"), chosen, seeds)
    chance = torch.Generator().manual_seed(3)
    for _, tensor in model.parts():
        if tensor.requires_grad:
            tensor.data.add_(torch.randn(tensor.shape, generator=chance), alpha=0.3)
    for name, tensor in model.scorer.tensors.items():
        if name == "ids":  # of chosen words
            tensor.data.copy_(torch.arange(5, 5 + tensor.numel()).reshape(tensor.shape))
        elif name == "kept":  # all words but the second, which is not the only one of its label
            tensor.data.fill_(1)[..., 1] = 0
        elif name in ("weight", "bias"):  # of a regression, which is solved and does not train
            tensor.data.add_(torch.randn(tensor.shape, generator=chance))
        elif name in ("s", "has"):  # stored states, and which there are
            tensor.data.copy_(torch.rand(tensor.shape, generator=chance).round(decimals=0 if name == "has" else 9))
    try:
        yield model
    finally:
        model.adapted.remove()


@contextmanager
def opened(folder, backbone=None, **options):
    model = open_(folder, backbone, **options)
    try:
        yield model
    finally:
        model.adapted.remove()


@pytest.fixture
def folder(tmp_path):
    """A saved adaptation of the tiny BERT, with a LoRA, soft tokens and a soft verbalizer."""
    with model_of(shared("bert")) as model:
        model.save(tmp_path / "saved")
    return tmp_path / "saved"


def rewritten(folder, **changes):
    """Stores the same adaptation with another record, as a whole and undamaged."""
    record, kept = store.read(folder)
    store.write(folder, {k: v for k, v in record.items() if k not in store.RESERVED} | changes, kept)
    return folder


def refused(folder, backbone, message):
    """Opening says so, names both backbones, and leaves the backbone as it was."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules())
    trainable = [p.requires_grad for p in backbone.model.parameters()]
    with pytest.raises(StoreError, match=message) as error:
        open_(folder, backbone)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules())
    assert trainable == [p.requires_grad for p in backbone.model.parameters()]
    return str(error.value)


# What opens is what was saved


@pytest.mark.parametrize(("family", "verbalizer", "delta"), PRODUCT)
def test_the_same_probabilities_on_another_instance_of_the_backbone(tmp_path, family, verbalizer, delta):
    with model_of(shared(family), task_of(family, verbalizer), [delta, "bitfit"]) as model:
        size = model.save(tmp_path)
        expected = model.probabilities(EXAMPLES)
        model.settle()  # what a reparametrised delta computes is what is saved
        count = model.parameter_count()
    assert size == sum(f.stat().st_size for f in tmp_path.iterdir())
    with opened(tmp_path, another(family)) as again:
        assert torch.equal(again.probabilities(EXAMPLES), expected)
        assert again.parameter_count() == count == describe(tmp_path)["parameters"]
        assert again.verbalizer == model.verbalizer
        assert again.chosen == model.chosen
        assert again.task.names == LABELS
        assert not again.training


def test_each_slot_is_an_adaptation_of_its_own(tmp_path):
    with model_of(shared("bert"), seeds=(0, 1, 2)) as model:
        for slot in range(3):
            model.save(tmp_path / str(slot), slot)
        expected = [model.probabilities(EXAMPLES, slot=slot) for slot in range(3)]
        for slot in (-1, 3):
            with pytest.raises(ConfigError, match=f"no slot {slot}; this model has the slots 0 to 2"):
                model.save(tmp_path / "no", slot)
    assert not torch.equal(expected[0], expected[1])
    for slot in range(3):
        with opened(tmp_path / str(slot), another("bert")) as again:
            assert torch.equal(again.probabilities(EXAMPLES), expected[slot])


def test_saved_tensors_fill_any_slot(tmp_path):
    with model_of(shared("bert"), seeds=(0, 1)) as model:
        model.save(tmp_path, 0)
        was = model.probabilities(EXAMPLES, slot=0)
        for tensor in tensors(model, 0).values():
            tensor.zero_()
        fill(model, store.read(tmp_path)[1], 1)
        assert torch.equal(model.probabilities(EXAMPLES, slot=1), was)


def test_nothing_that_trains_is_a_small_adaptation_too(tmp_path):
    task = Task("{text} It was {mask}", {"bad": "bad", "good": "good"})
    model = adapt(shared("gpt2"), task)
    assert model.save(tmp_path) < 3000
    assert torch.equal(open_(tmp_path, another("gpt2")).probabilities(EXAMPLES), model.probabilities(EXAMPLES))
    assert store.read(tmp_path)[1] == {}


def test_the_length_limit_is_kept(tmp_path):
    with model_of(shared("bert"), Task("{text} {mask}", WORDS, max_length=9)) as model:
        model.save(tmp_path)
        expected = model.probabilities(EXAMPLES)
    with opened(tmp_path, another("bert")) as again:
        assert torch.equal(again.probabilities(EXAMPLES), expected)
        assert again.features.max_length == 9


def test_the_record(tmp_path):
    training = {"seed": 3, "steps": 20, "options": {"betas": (0.9, 0.98)}}
    with model_of(shared("bert"), deltas=("lora", "ia3")) as model:
        model.save(tmp_path, training=training, metrics={"accuracy": 0.5, "loss": None})
    record = describe(tmp_path)
    assert record == store.read(tmp_path)[0]
    assert record["labels"] == list(LABELS)
    assert record["template"] == model.task.template
    assert [delta["kind"] for delta in record["deltas"]] == ["lora", "ia3"]
    assert record["deltas"][0]["rank"] == 8
    assert record["verbalizer"]["kind"] == "soft"
    assert record["training"] == {"seed": 3, "steps": 20, "options": {"betas": [0.9, 0.98]}}
    assert record["metrics"] == {"accuracy": 0.5, "loss": None}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["created"])
    assert record["deltaprompt"]
    told = {key: record["backbone"][key] for key in ("name", "kind", "dtype", "model_type", "fingerprint")}
    assert told == {
        "name": "bert",
        "kind": "masked",
        "dtype": "float32",
        "model_type": "bert",
        "fingerprint": shared("bert").fingerprint,
    }


def test_metrics_that_are_no_numbers_are_refused(tmp_path):
    with model_of(shared("bert")) as model, pytest.raises(StoreError, match=r"record\['metrics'\]\['loss'\] is nan"):
        model.save(tmp_path / "no", metrics={"loss": float("nan")})
    assert not (tmp_path / "no").exists()


# Damage


def test_a_thousand_changed_bytes_are_all_found(folder):
    chance = random.Random(0)
    whole = {name: (folder / name).read_bytes() for name in (store.JSON, store.TENSORS)}
    for _ in range(1000):
        name = chance.choice(list(whole))
        at = chance.randrange(len(whole[name]))
        changed = bytearray(whole[name])
        changed[at] ^= chance.randrange(1, 256)
        (folder / name).write_bytes(changed)
        with pytest.raises(StoreError):
            open_(folder, shared("bert"))
        (folder / name).write_bytes(whole[name])
    with opened(folder, shared("bert")):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: kept.pop("verbalizer.bias"), "the saved tensors lack 'verbalizer.bias', which this model has"),
        (
            lambda kept: kept.update(more=torch.zeros(1)),
            "a saved tensor 'more' that this model has no place for",
        ),
        (
            lambda kept: kept.update({"delta.1.layers.1.attn.v.a": torch.zeros(4, 16)}),
            "tensor 'delta.1.layers.1.attn.v.a' has shape .4, 16., this model's has .8, 16.",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_tensors_that_are_not_the_models(folder, change, message):
    record, kept = store.read(folder)
    change(kept)
    store.write(folder, {k: v for k, v in record.items() if k not in store.RESERVED}, kept)
    assert str(folder) in refused(folder, shared("bert"), message)


def test_a_variant_that_is_not_known_names_both_versions(folder):
    rewritten(folder, deltas=[{"kind": "lorra"}], deltaprompt="9.9")
    refused(folder, shared("bert"), "saved by DeltaPrompt 9.9, cannot be made a model .*'lorra'; did you mean 'lora'")
    rewritten(folder, deltas=[{"kind": "lora", "rnk": 8}])
    refused(folder, shared("bert"), "saved by DeltaPrompt 9.9, .*no option 'rnk'; did you mean 'rank'")


# Only the same backbone


def test_another_backbone_is_refused_by_name_and_fingerprint(folder):
    message = refused(folder, shared("llama"), "model_type: bert and llama; give the backbone it was made for")
    for family in ("bert", "llama"):
        assert f"{family!r} (fingerprint {shared(family).fingerprint})" in message


def test_another_kind_is_refused(folder):
    plain = wrap(copy.deepcopy(shared("bert").model.base_model), shared("bert").tokenizer, kind="encoder")
    message = refused(folder, plain, "kind: masked and encoder; load the backbone with the kind that it was made on")
    assert f"and this one is without a name (fingerprint {plain.fingerprint})" in message


def test_one_changed_number_in_any_parameter_is_refused(folder):
    backbone = zoo.build("bert")
    expected = shared("bert").fingerprint
    for p in backbone.model.parameters():
        at, was = tuple(n // 2 for n in p.shape), p.detach().clone()
        p.data[at] = torch.nextafter(p.data[at], torch.tensor(9.0))
        message = refused(folder, backbone, "differ in their fingerprint: .*; give the very weights")
        assert expected in message
        p.data.copy_(was)
    with opened(folder, backbone):
        pass


def test_weights_with_a_merged_delta_are_refused_also_where_the_fingerprint_was_read_before(folder):
    backbone = zoo.build("bert")
    assert backbone.fingerprint == shared("bert").fingerprint
    with model_of(backbone, Task("{text} {mask}", WORDS)) as model:
        model.adapted.merge()
    refused(folder, backbone, "differ in their fingerprint")


def test_another_precision_is_refused(folder):
    refused(
        folder, zoo.build("bert", torch.bfloat16), "dtype: float32 and bfloat16; load .*dtype that .*open.folder, d"
    )


def changed_tokenizer(family, change):
    """A copy of a family's tokenizer, its core changed as JSON."""
    tokenizer = tokenizers_zoo.build(family)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    change(core)
    made = copy.deepcopy(tokenizer)
    made._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(core))
    return made


def swap_two_pieces(core):
    vocab = core["model"]["vocab"]
    vocab["great"], vocab["good"] = vocab["good"], vocab["great"]


def swap_two_merges(core):
    merges = core["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


def merges_as_text(core):
    core["model"]["merges"] = [" ".join(merge) for merge in core["model"]["merges"]]


TOKENIZERS = [
    ("bert", swap_two_pieces),
    ("bert", lambda core: core["normalizer"].update(lowercase=False)),
    ("bert", lambda core: core["normalizer"].update(strip_accents=False)),
    ("bert", lambda core: core["normalizer"].update(handle_chinese_chars=False)),
    ("bert", lambda core: core.update(post_processor=None)),
    ("roberta", swap_two_merges),
    ("roberta", lambda core: core["pre_tokenizer"].update(add_prefix_space=True)),
    ("llama", lambda core: core["pre_tokenizer"].update(prepend_scheme="never")),
    ("llama", lambda core: core.update(normalizer={"type": "NFKC"})),
]


@pytest.mark.parametrize(("family", "change"), TOKENIZERS)
def test_another_tokenizer_has_another_digest(family, change):
    same = changed_tokenizer(family, lambda core: None)
    assert tokenizer_digest(same) == tokenizer_digest(tokenizers_zoo.build(family))
    assert tokenizer_digest(changed_tokenizer(family, change)) != tokenizer_digest(same)


def test_another_tokenizer_is_refused(folder):
    backbone = shared("bert")
    changed = changed_tokenizer("bert", swap_two_pieces)
    refused(folder, wrap(backbone.model, changed), "differ in their tokenizer: .*; give the tokenizer that it was made")
    changed = copy.deepcopy(backbone.tokenizer)
    changed.mask_token = "[UNK]"
    refused(folder, wrap(backbone.model, changed), "differ in their tokenizer")
    changed = copy.deepcopy(backbone.tokenizer)
    changed.add_tokens(["greatest"])
    refused(folder, wrap(backbone.model, changed), "differ in their tokenizer")


@pytest.mark.parametrize("family", tokenizers_zoo.KINDS)
def test_a_tokenizer_keeps_its_digest_through_use_and_a_file(tmp_path, family):
    tokenizer = copy.deepcopy(tokenizers_zoo.build(family))
    digest = tokenizer_digest(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer(["a b c d e", "a"], padding="max_length", truncation=True, max_length=4)
    assert tokenizer_digest(tokenizer) == digest
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == digest


def test_a_tokenizers_file_may_write_the_same_in_another_way():
    """As of tokenizers 0.20 merges are pairs; texts before."""
    changed = changed_tokenizer("llama", merges_as_text)
    assert tokenizer_digest(changed) == tokenizer_digest(tokenizers_zoo.build("llama"))
    rewritten = copy.deepcopy(tokenizers_zoo.build("bert"))
    rewritten.backend_tokenizer.normalizer = normalizers.Sequence([rewritten.backend_tokenizer.normalizer])
    assert tokenizer_digest(rewritten) == tokenizer_digest(tokenizers_zoo.build("bert"))


def test_a_chat_template_counts_where_it_is_used():
    backbone = shared("qwen2")
    changed = copy.deepcopy(backbone.tokenizer)
    changed.chat_template += " "
    other = wrap(backbone.model, changed)
    for template, same in (("{text} is {mask}", True), ("{user} {text} {assistant} {mask}", False)):
        assert (identity(other, template)["tokenizer"] == identity(backbone, template)["tokenizer"]) is same


# The backbone by its name


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Tiny backbones as folders, in float32."""
    root = tmp_path_factory.mktemp("backbones")
    for family in KINDS:
        backbone = zoo.build(family)
        backbone.model.save_pretrained(root / family)
        backbone.tokenizer.save_pretrained(root / family)
    return root


@pytest.mark.parametrize("family", KINDS)
def test_the_backbone_is_found_by_its_name(tmp_path, on_disk, monkeypatch, family):
    monkeypatch.chdir(on_disk)
    backbone = load(family, device="cpu")
    with model_of(backbone, task_of(family)) as model:
        model.save(tmp_path)
        expected = model.probabilities(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    again = open_(tmp_path, device="cpu")
    assert torch.equal(again.probabilities(EXAMPLES), expected)
    assert again.backbone.name == str(on_disk / family)
    assert again.backbone.kind == KINDS[family]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32])
def test_it_is_loaded_as_it_was_and_on_request_converted(tmp_path, on_disk, dtype):
    """float32 and bfloat16 are two fingerprints of one checkpoint; a conversion is checked before it is made."""
    wide, half = (load(on_disk / "llama", device="cpu", dtype=d) for d in ("float32", "bfloat16"))
    assert wide.fingerprint != half.fingerprint
    with model_of(half if dtype == "bfloat16" else wide, task_of("llama")) as model:
        model.save(tmp_path)
        expected = model.probabilities(EXAMPLES)
    kept = open_(tmp_path, device="cpu")
    assert kept.backbone.model.dtype == model.backbone.model.dtype
    assert torch.equal(kept.probabilities(EXAMPLES), expected)
    refused(tmp_path, wide if dtype == "bfloat16" else half, "differ in their dtype")
    other = open_(tmp_path, device="cpu", dtype="float32" if dtype == "bfloat16" else torch.bfloat16)
    assert other.backbone.model.dtype != kept.backbone.model.dtype
    assert torch.allclose(other.probabilities(EXAMPLES), expected, atol=0.05)
    assert not torch.equal(other.probabilities(EXAMPLES), expected)


def test_a_backbone_of_the_name_that_has_changed_is_refused(tmp_path, on_disk):
    here = tmp_path / "backbone"
    backbone = load(on_disk / "bert", device="cpu")
    for part in (backbone.model, backbone.tokenizer):
        part.save_pretrained(here)
    with model_of(load(here, device="cpu")) as model:
        model.save(tmp_path / "saved")
    next(backbone.model.parameters()).data.view(-1)[3] += 1e-3
    backbone.model.save_pretrained(here)
    with pytest.raises(StoreError, match="differ in their fingerprint"):
        open_(tmp_path / "saved", device="cpu")


def test_a_backbone_that_is_not_found_can_be_given(folder):
    with pytest.raises(StoreError, match="backbone 'bert', which cannot be loaded: .*no backbone 'bert'.*Or load it"):
        open_(folder)
    stored = describe(folder)["backbone"]
    gone = str(Path("/gone/bert"))
    rewritten(folder, backbone=stored | {"name": gone})
    with pytest.raises(StoreError, match=f"backbone in {gone}, and that folder is gone; load it .*backbone=dp.load"):
        open_(folder)
    rewritten(folder, backbone=stored | {"name": ""})
    with pytest.raises(StoreError, match="without a name .fingerprint [0-9a-f]{16}.; load it and pass it on: dp.open"):
        open_(folder)
    with opened(folder, shared("bert")) as model:
        assert model.backbone is shared("bert")


def test_a_given_backbone_stays_where_it_is(folder):
    for options in ({"device": "cpu"}, {"dtype": "float32"}):
        with pytest.raises(ConfigError, match="device and dtype are for a backbone that open loads itself"):
            open_(folder, shared("bert"), **options)


def test_nothing_there(tmp_path):
    for reading in (open_, describe):
        with pytest.raises(StoreError, match="holds no adaptation"):
            reading(tmp_path)


def test_deltas_attached_and_detached_later_are_saved_as_they_then_are(tmp_path):
    task = Task("{text} {soft:2} {mask}", {"no": "bad", "yes": "good"})
    model = adapt(zoo.build("bert"), task, [LoRA(2), Adapter(4)])
    model.adapted.attach(BitFit())
    model.adapted.detach(2)  # the adapter: the soft tokens of the template are the first delta of all
    with torch.no_grad():
        for _, tensor in model.parts():
            tensor.add_(torch.linspace(-0.1, 0.1, tensor.numel()).view_as(tensor))
    model.save(tmp_path)
    again = open_(tmp_path, zoo.build("bert"))
    assert [type(delta) for delta in again.chosen] == [LoRA, BitFit] == [type(delta) for delta in model.chosen]
    assert again.predict(["a film"]) == model.predict(["a film"])


def test_virtual_tokens_attached_later_are_not_saved(tmp_path):
    model = adapt(zoo.build("bert"), Task("{text} {mask}", {"no": "bad", "yes": "good"}), [])
    model.adapted.attach(SoftPrompt(2, at=("embed",)))
    with pytest.raises(ConfigError, match="virtual tokens were attached or detached after the model was made"):
        model.save(tmp_path)
