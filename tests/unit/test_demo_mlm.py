"""The demo as a masked language model: one small file makes it so, with bitwise the same weights everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import deltaprompt as dp
from deltaprompt.backbone import Backbone, demo, load
from deltaprompt.backbone.demo import as_masked_lm, demo_folder
from deltaprompt.backbone.fingerprint import fingerprint
from deltaprompt.backbone.new_head import head_parameters
from deltaprompt.compose import Adapted
from deltaprompt.deltas.ln_tuning import LNTuning
from deltaprompt.errors import BackboneError, ConfigError
from deltaprompt.pretrain import Pretraining, Tuned, pretrain
from deltaprompt.pretrain.ship import ship
from tests import backbones_zoo

PUBLISHED = "0170bc438eff56ba"  # fingerprint of the encoder as it is published
DELTAS = [dp.LoRA(rank=4, alpha=4.4, at=("layers.*",)), dp.BitFit(at=("layers.*",)), LNTuning()]
RULES = [{"kind": "lora", "scale": "1.1"}, {"kind": "bitfit", "scale": "1.0"}, {"kind": "ln_tuning", "scale": "1.0"}]
PROMPT = "The capital of France is [MASK]."


@pytest.fixture(scope="module")
def learned() -> dict[str, Tensor]:
    """Random numbers for every tensor of the deltas and the head, in 16 bits, by the names of a run's file."""
    backbone = load("demo", new_head=True, device="cpu")
    adapted = Adapted(backbone, DELTAS)
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, tensor in adapted.parts():
        noise = torch.randn(tensor.shape[1:], generator=generator) * 0.05
        made[name] = (noise + 1.0 if name.endswith(".l") else noise).half()
    adapted.remove()
    for name, tensor in head_parameters(backbone.model).items():
        made[f"head.{name}"] = (tensor.detach() + torch.randn(tensor.shape, generator=generator) * 0.02).half()
    return made


@pytest.fixture(scope="module")
def file(learned: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by the paths of modules, as the demo reads it."""
    sites = load("demo", device="cpu", kind="masked", new_head=True).sites
    moved = {}
    for name, tensor in learned.items():
        number, _, rest = name.partition(".")
        site, _, last = rest.rpartition(".")
        moved[name if number == "head" else f"{number}.{sites[site].path}.{last}"] = tensor
    path = tmp_path_factory.mktemp("demo") / "demo_mlm.safetensors"
    save_file(moved, path, {"deltas": json.dumps(RULES)})
    return path


@pytest.fixture
def shipped(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(demo, "SHIPPED", file)
    return file


def scores(backbone: Backbone) -> Tensor:
    inputs = backbone.tokenizer([PROMPT, "It was a [MASK] day"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return backbone.model(**inputs).logits


def test_the_file_makes_a_masked_language_model(shipped: Path) -> None:
    state = torch.random.get_rng_state()
    backbone = load("demo", kind="masked", device="cpu")
    assert (backbone.kind, backbone.name) == ("masked", "demo")
    assert backbone.head is not None
    assert torch.equal(state, torch.random.get_rng_state())
    task = dp.Task("{text} It was {mask}.", {"good": "great", "bad": "terrible"})
    model = dp.adapt(backbone, task, [])
    told = model.predict(["A gem."])[0]
    ids = backbone.tokenizer.convert_tokens_to_ids(["great", "terrible"])
    prompt = backbone.tokenizer(["A gem. It was [MASK]."], return_tensors="pt")
    with torch.no_grad():
        own = backbone.model(**prompt).logits[0, (prompt["input_ids"][0] == backbone.tokenizer.mask_token_id)][0, ids]
    assert told["score"] == pytest.approx(float(own.softmax(-1).max()), abs=1e-5)


def test_every_time_the_same_bits(shipped: Path) -> None:
    made = [load("demo", kind="masked", device="cpu") for _ in range(2)]
    assert made[0].fingerprint == made[1].fingerprint != PUBLISHED
    torch.set_num_threads(2)
    try:
        assert load("demo", kind="masked", device="cpu").fingerprint == made[0].fingerprint
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*(m.model.parameters() for m in made), strict=True))


def test_the_rules_number_by_number(shipped: Path, learned: dict[str, Tensor]) -> None:
    """In numpy: products and sums rounded to float32 one by one."""
    made = dict(load("demo", kind="masked", device="cpu").model.named_parameters())
    old = load_file(demo_folder() / "model.safetensors")
    t = {name: tensor.float().numpy() for name, tensor in learned.items()}
    a, b = t["0.layers.2.ffn.up.a"], t["0.layers.2.ffn.up.b"] * numpy.float32(1.1)
    change = numpy.zeros((1536, 384), numpy.float32)
    for r in range(4):
        change = change + numpy.outer(b[:, r], a[r]).astype(numpy.float32)
    name = "encoder.layer.2.intermediate.dense"
    assert numpy.array_equal(old[f"{name}.weight"].numpy() + change, made[f"bert.{name}.weight"].detach().numpy())
    bias = old[f"{name}.bias"].numpy() + t["1.layers.2.ffn.up.bias"][0]
    assert numpy.array_equal(bias, made[f"bert.{name}.bias"].detach().numpy())
    norm, own = "encoder.layer.2.output.LayerNorm", "layers.2.ffn.norm"
    bias = (old[f"{norm}.bias"].numpy() + t[f"1.{own}.bias"][0]) * t[f"2.{own}.l"][0] + t[f"2.{own}.b"][0]
    assert numpy.array_equal(bias, made[f"bert.{norm}.bias"].detach().numpy())
    scale = old[f"{norm}.weight"].numpy() * t[f"2.{own}.l"][0]
    assert numpy.array_equal(scale, made[f"bert.{norm}.weight"].detach().numpy())
    for name in (n for n in t if n.startswith("head.")):
        assert numpy.array_equal(t[name], made[name.removeprefix("head.")].detach().numpy())


def test_it_does_what_the_attached_deltas_do(shipped: Path, learned: dict[str, Tensor]) -> None:
    backbone = load("demo", new_head=True, device="cpu", dtype="float64")
    adapted = Adapted(backbone, DELTAS)
    with torch.no_grad():
        for name, tensor in adapted.parts():
            tensor[0].copy_(learned[name])
        for name, tensor in head_parameters(backbone.model).items():
            tensor.copy_(learned[f"head.{name}"])
    attached = scores(backbone)
    made = scores(load("demo", kind="masked", device="cpu", dtype="float64"))
    assert float((attached - made).abs().max() / attached.abs().max()) < 1e-6
    plain = load("demo", new_head=True, device="cpu", dtype="float64")
    assert float((attached - scores(plain)).abs().max()) > 0.1


def test_the_encoder_stays_as_published(shipped: Path) -> None:
    assert load("demo", kind="encoder", device="cpu").fingerprint == PUBLISHED
    own = load_file(demo_folder() / "model.safetensors")
    model = load("demo", kind="encoder", device="cpu").model
    assert all(torch.equal(own[name], p) for name, p in model.named_parameters())
    head = load("demo", new_head=True, device="cpu").model
    assert all(
        torch.equal(own[n.removeprefix("bert.")], p) for n, p in head.named_parameters() if n.startswith("bert.")
    )


def test_a_saved_adaptation_opens_again(shipped: Path, tmp_path: Path) -> None:
    task = dp.Task("{text} It was {mask}.", {"good": "great", "bad": "terrible"})
    model = dp.adapt(load("demo", kind="masked", device="cpu"), task, [dp.LoRA(rank=2)])
    model.save(tmp_path)
    again = dp.open(tmp_path, device="cpu")
    assert again.backbone.kind == "masked"
    assert again.predict(["A gem."]) == model.predict(["A gem."])


def test_other_types(shipped: Path) -> None:
    whole = load("demo", kind="masked", device="cpu")
    half = load("demo", kind="masked", device="cpu", dtype="bfloat16")
    rounded = {name: p.bfloat16() for name, p in whole.model.named_parameters()}
    assert all(torch.equal(rounded[name], p) for name, p in half.model.named_parameters())
    assert load("demo", kind="masked", device="cpu", attention="eager").fingerprint == whole.fingerprint


# What is refused


def test_without_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "SHIPPED", tmp_path / "no.safetensors")
    with pytest.raises(BackboneError, match=r"is not there: .*no.safetensors. Install DeltaPrompt again, or train it"):
        load("demo", kind="masked", device="cpu")


def test_files_that_are_wrong(file: Path, tmp_path: Path) -> None:
    model = load("demo", new_head=True, device="cpu").model
    before = fingerprint(model)
    cut, mute, other, deep = (tmp_path / f"{n}.safetensors" for n in ("cut", "mute", "other", "deep"))
    cut.write_bytes(file.read_bytes()[:-100])
    tensors = load_file(file)
    save_file(tensors, mute)
    save_file(tensors, other, {"deltas": json.dumps([{"kind": "adapter", "scale": "1.0"}])})
    path = "0.bert.encoder.layer.5.output.dense"
    moved = {f"0.bert.encoder.layer.6.{name[-1]}" if name[:-2] == path else name: t for name, t in tensors.items()}
    save_file(moved, deep, {"deltas": json.dumps(RULES)})
    for wrong, message in [
        (cut, "damaged"),
        (mute, "damaged"),
        (other, "damaged"),
        (deep, "is for a model that has bert.encoder.layer.6"),
    ]:
        with pytest.raises(BackboneError) as told:
            as_masked_lm(model, wrong)
        assert message in str(told.value)
    with pytest.raises(BackboneError, match="is for another model"):
        as_masked_lm(wide().model, file)
    assert fingerprint(model) == before


def wide() -> Any:
    """A BERT of the demo's names and other shapes."""
    import transformers

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 12}
    config = transformers.BertConfig(**sizes, vocab_size=100)
    return type("Made", (), {"model": transformers.BertForMaskedLM(config)})


# A head that begins anew


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet", "deberta-v2", "modernbert"])
def test_a_new_head(family: str, tmp_path: Path) -> None:
    backbone = backbones_zoo.build(family)
    backbone.model.base_model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="lacks"):
        load(tmp_path, kind="masked", device="cpu")
    made = load(tmp_path, new_head=True, device="cpu")
    assert made.kind == "masked"
    for name, tensor in head_parameters(made.model).items():
        expected = torch.eye(16) if tensor.ndim == 2 else torch.full_like(tensor, float(name.endswith("weight")))
        assert torch.equal(tensor, expected)


def test_heads_that_cannot_begin_anew(tmp_path: Path) -> None:
    for family, message in [
        ("albert", "which has no identity to begin with"),
        ("gpt2", "has no head of its own to begin anew"),
        ("llama", "which has no identity"),
    ]:
        backbone = backbones_zoo.build(family)
        backbone.model.save_pretrained(tmp_path / family)
        backbone.tokenizer.save_pretrained(tmp_path / family)
        with pytest.raises(BackboneError) as told:
            load(tmp_path / family, new_head=True, device="cpu")
        assert message in str(told.value)
    with pytest.raises(BackboneError, match="new_head is for a language model"):
        load("demo", kind="encoder", new_head=True, device="cpu")


# From a run to the file


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    deltas = [Tuned(dp.LoRA(rank=2, alpha=3.0, at=("layers.*",)), 2e-2), dp.BitFit(at=("layers.*",)), LNTuning()]
    p = Pretraining(steps=2, length=12, batch_size=2, head=True, warmup=0)
    backbone = load("demo", new_head=True, device="cpu")
    pretrain(backbone, ["a great movie and a bad film"] * 12, deltas=deltas, pretraining=p, out=out)
    return out


def test_a_run_is_shipped(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goal = tmp_path / "demo_mlm.safetensors"
    size = ship(run, goal)
    assert size == goal.stat().st_size
    assert list(tmp_path.iterdir()) == [goal]
    assert {t.dtype for t in load_file(goal).values()} == {torch.float16}
    monkeypatch.setattr(demo, "SHIPPED", goal)
    made, kept = load("demo", kind="masked", device="cpu"), load(run, device="cpu")
    assert torch.allclose(scores(made), scores(kept), atol=1e-4)
    again = tmp_path / "again.safetensors"
    ship(run, again)
    assert again.read_bytes() == goal.read_bytes()


def test_runs_that_cannot_be_shipped(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goal = tmp_path / "goal.safetensors"
    with pytest.raises(ConfigError, match="there is no .*delta.safetensors; give the folder of a finished run"):
        ship(tmp_path, goal)
    with monkeypatch.context() as patch:
        patch.setattr("deltaprompt.pretrain.ship.MOST", 1000)
        with pytest.raises(ConfigError, match="at most 1,000 are shipped; lower the rank"):
            ship(run, goal)
    tensors = load_file(run / "delta.safetensors")
    own = {"backbone": "demo", "fingerprint": load("demo", new_head=True, device="cpu").fingerprint}
    for told, message in [
        ({**own, "deltas": [{"kind": "adapter"}]}, "the demo's file has no rule for adapter"),
        ({**own, "fingerprint": "0", "deltas": []}, "was not trained on the demo with new_head = true"),
        (None, "is damaged"),
    ]:
        save_file(tensors, tmp_path / "delta.safetensors", None if told is None else {"learned": json.dumps(told)})
        with pytest.raises(ConfigError) as e:
            ship(tmp_path, goal)
        assert message in str(e.value)
    told = {**own, "deltas": [{"kind": "lora", "rank": 2, "alpha": 30.0}, {"kind": "bitfit"}, {"kind": "ln_tuning"}]}
    save_file(tensors, tmp_path / "delta.safetensors", {"learned": json.dumps(told)})
    (tmp_path / "model.safetensors").symlink_to(run / "model.safetensors")
    with pytest.raises(ConfigError, match="is not what its delta makes of the demo"):
        ship(tmp_path, goal)
    assert not goal.exists()
