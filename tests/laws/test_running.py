"""An adapted backbone among other code: copied, saved and loaded elsewhere, tied, resized, saved by transformers."""

import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.backbone import attention, load
from deltaprompt.backbone.load import wrap
from deltaprompt.compose import Adapted
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import SiteError
from deltaprompt.model import Task, adapt
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo
from tests.adapted_zoo import DELTAS, adapted_to, gradients, inputs_for, loss_of, made, mask_of, shake

FAMILIES = ["bert", "qwen2", "t5"]
WORDS = {"good": ("great",), "bad": ("terrible",)}
ROOT = Path(__file__).resolve().parents[2]


# Copies


@pytest.mark.parametrize("name", DELTAS)
@torch.no_grad()
def test_torch_saves_and_loads_it(name, tmp_path):
    adapted = adapted_to("qwen2", name, 2)
    inputs, rows = inputs_for(name, adapted.backbone), torch.tensor([1, 0])
    torch.save(adapted, tmp_path / "adapted.pt")
    loaded = torch.load(tmp_path / "adapted.pt", weights_only=False)
    assert torch.equal(loaded.states(inputs, rows), adapted.states(inputs, rows))
    fresh = Adapted(zoo.build("qwen2", torch.float64), [made(name)], 2, seeds=[8, 9])
    fresh.load_state_dict(adapted.state_dict())
    assert torch.equal(fresh.states(inputs, rows), adapted.states(inputs, rows))
    plain = zoo.inputs_of(loaded.backbone)
    assert torch.equal(loaded.remove().states(plain), adapted.remove().states(plain))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_a_model_answers_alike_and_learns_alone(family, copied):
    model = adapt(zoo.build(family), Task("{text} It was {mask}.", WORDS, SoftVerbalizer()), [LoRA(), Prefix(3)])
    shake(model.adapted)
    twin = copied(model)
    texts = ["a great film", "bad plot"]
    assert twin.predict(texts) == model.predict(texts)
    before = model.predict(texts)
    shake(twin.adapted)
    assert twin.predict(texts) != before == model.predict(texts)
    assert twin.backbone.model is twin.adapted.model


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"]
)
@torch.no_grad()
def test_a_copy_after_merging_can_be_unmerged(copied):
    adapted = adapted_to("qwen2", "lora", 2)
    inputs = zoo.inputs_of(adapted.backbone)
    plain = zoo.build("qwen2", torch.float64).states(inputs)
    adapted.merge(1)
    twin = copied(adapted)
    assert torch.equal(twin.backbone.states(inputs), adapted.backbone.states(inputs))
    twin.unmerge()
    attached = twin.states(inputs, 1)
    assert_close(attached, adapted.backbone.states(inputs), rtol=0, atol=1e-9)
    assert torch.equal(twin.remove().states(inputs), plain)


def test_in_a_process_of_its_own(tmp_path):
    """What is pickled runs where nothing is registered: an Adapted, a Model, and the bare model with its hooks."""
    backbone = zoo.build("qwen2")
    model = adapt(backbone, Task("{text} It was {mask}.", WORDS, SoftVerbalizer()), [LoRA(), Prefix(3)])
    shake(model.adapted)
    inputs = zoo.inputs_of(backbone)
    torch.save((model, inputs), tmp_path / "model.pt")
    torch.save((model.adapted, inputs), tmp_path / "adapted.pt")
    torch.save((backbone.model, inputs), tmp_path / "bare.pt")
    code = """
import json, sys, torch
torch.set_num_threads(1)
found = []
for name in ("bare", "adapted"):
    module, inputs = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=False)
    found.append(module(**inputs).logits.double().sum().item())
model, _ = torch.load(f"{sys.argv[1]}/model.pt", weights_only=False)
print(json.dumps([found, model.predict(["a great film"])]))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sums, said = json.loads(done.stdout)
    with torch.no_grad():
        assert sums == [backbone.model(**inputs).logits.double().sum().item()] * 2
    assert said == model.predict(["a great film"])


# Tied weights, and a vocabulary that grew


def at_head(name):
    """The delta at the output embedding alone."""
    delta = made(name)
    other = {"at_input": (), "phm_dim": 1}  # a vocabulary of any size is divided into no more pieces
    return replace(delta, at=("head",), **{n: v for n, v in other.items() if n in {f.name for f in fields(delta)}})


LINEAR = [d for d in DELTAS if "linear" in made(d).acts_on and "at" in {f.name for f in fields(made(d))}]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("name", LINEAR)
def test_at_a_head_that_is_the_embedding(name, family):
    """It changes the scores and not the embedding; the weight stays one, and is not merged into."""
    backbone = zoo.build(family, torch.float64)
    inputs, tied = zoo.inputs_of(backbone), backbone.model.get_input_embeddings().weight
    with torch.no_grad():
        states, logits = backbone.states(inputs), backbone.model(**inputs).logits
    adapted = shake(Adapted(backbone, [at_head(name)], 2))
    assert backbone.head.out.weight is tied is backbone.model.get_input_embeddings().weight
    found = adapted(**inputs, adaptation=torch.tensor([1, 0])).logits
    loss_of(found, mask_of(inputs)).backward()
    assert all(g.any() for g in gradients(adapted).values())
    with torch.no_grad():
        assert torch.equal(adapted.states(inputs), states)
        assert not torch.allclose(found, logits)
        assert_close(adapted(**inputs, adaptation=1).logits[0], found[0], rtol=0, atol=1e-9)
    with pytest.raises(SiteError, match="its weight is also that of|has no form in weights|needs a bias"):
        adapted.merge()
    assert adapted.remove().model.get_output_embeddings().weight is tied


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen2"])
def test_a_vocabulary_that_grew_before(family):
    """Virtual tokens have the ids behind the new rows, and the head scores these rows too."""
    model = zoo.model(family)
    old = model.get_input_embeddings().num_embeddings
    with zoo.quiet():
        model.resize_token_embeddings(old + 3, mean_resizing=False)
        backbone = wrap(model, zoo.build(family).tokenizer)
    assert backbone.vocabulary == old + 3
    adapted = shake(Adapted(backbone, [LoRA(at=("head",)), SoftPrompt(2)]))
    inputs = zoo.inputs_of(backbone)
    inputs["input_ids"][0, 1:4] = torch.tensor([old + 2, old + 3, old + 4])  # a new word, and two virtual tokens
    with torch.no_grad():
        embedded = model.get_input_embeddings()(inputs["input_ids"])[0, 1:4]
        assert torch.equal(embedded[0], model.get_input_embeddings().weight[old + 2])
        assert torch.equal(embedded[1:], dict(adapted.parts())["1.embed.p"][0])
        logits, states, rows = adapted(**inputs).logits, adapted.states(inputs), torch.tensor([2, old + 1])
        assert logits.shape[-1] == old + 3
        assert_close(backbone.head.logits(states, rows), logits[..., rows], rtol=0, atol=1e-5)


# save_pretrained


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", DELTAS)
@torch.no_grad()
def test_transformers_saves_the_backbone_without_what_is_attached(name, family, tmp_path):
    """Also what a config says of the attention; once merged, the change is saved with it."""
    adapted = adapted_to(family, name, dtype=torch.float32)
    backbone, inputs = adapted.backbone, zoo.inputs_of(adapted.backbone)
    attached = adapted.states(inputs)
    backbone.tokenizer.save_pretrained(tmp_path)
    plain = zoo.build(family)
    backbone.model.save_pretrained(tmp_path)
    assert attention.PREFIX not in (tmp_path / "config.json").read_text()
    saved = load(tmp_path, device="cpu")
    assert torch.equal(saved.states(inputs), plain.states(inputs))
    assert saved.fingerprint == plain.fingerprint
    try:
        adapted.merge()
    except SiteError:
        adapted.remove()
    backbone.model.save_pretrained(tmp_path)
    merged = load(tmp_path, device="cpu").states(inputs)
    assert torch.equal(merged, backbone.states(inputs))
    assert torch.equal(merged, plain.states(inputs)) or torch.allclose(merged, attached, atol=1e-4)
