"""UniPELT (Mao et al. 2022, section 3) is a LoRA, an adapter and a prefix, each with a gate of its own.

The paper reads a prefix's gate off what enters the layer; here a prefix sees no input, and its gate is σ(b). That of a
LoRA or an adapter is read, at every token, off what enters the map beside which it lies.
"""

import json

import pytest
import torch
from torch.nn.functional import gelu
from torch.testing import assert_close

import deltaprompt as dp
from deltaprompt.compose import Adapted
from deltaprompt.deltas.adapter import Adapter
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from tests import backbones_zoo as zoo
from tests.adapted_zoo import shake
from tests.by_hand import ByHand
from tests.command import last_json, succeeds

FAMILIES = ["bert", "gpt2", "llama", "t5"]
UNIPELT = (LoRA(2, alpha=6.0, gated=True), Adapter(3, placement="pfeiffer", gated=True), Prefix(3, gated=True))
TEXTS = {"good": ["a great movie", "a good film", "great plot"], "bad": ["terrible acting", "a bad film", "bad plot"]}
TRAIN = [dp.Example({"text": text}, label) for label, texts in TEXTS.items() for text in texts]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_papers_formula(family):
    ours = shake(Adapted(zoo.build(family, torch.float64), UNIPELT))
    hand = ByHand(family, ours)
    t = hand.t

    def gate(n, x):
        return torch.sigmoid(x @ t[f"{n}.gate"].T + t[f"{n}.gate_bias"])

    def lora(n):
        return lambda x, y: y + gate(n, x) * 3.0 * (x @ t[f"{n}.a"].T @ t[f"{n}.b"].T)

    def adapter(n):
        def change(y):
            return gelu(y @ t[f"{n}.down"].T + t[f"{n}.down_bias"]) @ t[f"{n}.up"].T + t[f"{n}.up_bias"]

        return lambda x, y: y + gate(n, x) * change(y)

    def prefix(n):
        return lambda: tuple(torch.sigmoid(t[f"{n}.gate_bias"]) * t[f"{n}.{of}"] for of in ("k", "v"))

    for patch in ours.patches:
        site, n = patch.site.name, f"{patch.number}.{patch.site.name}"
        if patch.number == 2:
            hand.prefix(site, prefix(n))
        else:
            hand.behind(site, (lora, adapter)[patch.number](n))
    hand.agrees()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_at_the_start_it_is_half_of_the_prefix_and_rows_have_their_own(family):
    backbone = zoo.build(family, torch.float64)
    inputs = zoo.inputs_of(backbone)
    prefix = Adapted(backbone, [Prefix(3)])
    adapted = Adapted(backbone, UNIPELT, 3)
    for patch, other in zip((p for p in adapted.patches if p.number == 2), prefix.patches, strict=True):
        for name in ("k", "v"):
            other.tensors[name].copy_(patch.tensors[name][:1] / 2)
    adapted.remove()
    started = prefix.states(inputs)
    prefix.remove()
    adapted = Adapted(backbone, UNIPELT, 3)
    assert torch.equal(adapted.states(inputs), started)
    mixed = shake(adapted).states(inputs, torch.tensor([2, 1]))
    for row, slot in enumerate((2, 1)):
        assert_close(mixed[row], adapted.states(inputs, slot)[row], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_fitted_saved_and_opened_as_one_and_its_gates_learn(tmp_path, family):
    backbone = zoo.build(family)
    model = dp.adapt(backbone, dp.Task("{text} It was {mask}.", {"good": "great", "bad": "terrible"}), UNIPELT)
    dp.fit(model, TRAIN, TRAIN, training=dp.Training(steps=6, learning_rate=1e-2), out=tmp_path)
    answers = model.probabilities(TRAIN)
    gates = {name: t for name, t in model.parts() if name.rpartition(".")[2] in ("gate", "gate_bias")}
    assert len(gates) == 2 * len(model.adapted.patches) - sum(p.number == 2 for p in model.adapted.patches)
    assert all(t.abs().max() > 0 for t in gates.values())  # they start at 0
    model.adapted.remove()
    again = dp.open(tmp_path, backbone=backbone)
    assert torch.equal(again.probabilities(TRAIN), answers)
    assert again.chosen == UNIPELT


def test_on_the_command_line(tmp_path):
    tiny, out, data = tmp_path / "tiny", tmp_path / "out", tmp_path / "reviews.jsonl"
    backbone = zoo.build("bert-encoder")
    for part in (backbone.model, backbone.tokenizer):
        part.save_pretrained(tiny)
    data.write_text("".join(json.dumps({"text": e.fields["text"], "label": e.label}) + "\n" for e in TRAIN))
    deltas = ("lora:rank=2,gated=yes", "adapter:bottleneck=3,placement=pfeiffer,gated=yes", "prefix:length=3,gated=yes")
    chosen = [argument for delta in deltas for argument in ("--delta", delta)]

    fit = ["fit", "--data", data, "--no-dev", "--backbone", tiny, "--steps", 2, "--device", "cpu", "--out", out]
    succeeds(*fit, *chosen)
    record = last_json(succeeds("inspect", out, "--json"))
    assert [(d["kind"], d["gated"]) for d in record["deltas"]] == [("lora", True), ("adapter", True), ("prefix", True)]
    shown = succeeds("inspect", tiny, *chosen).stdout
    model = dp.open(out, backbone=dp.load(str(tiny)))
    for number, delta in enumerate(("lora (", "adapter (", "prefix (")):
        line = next(line for line in shown.splitlines() if line.startswith(f"✓ {delta}"))
        own = sum(t[0].numel() for name, t in model.adapted.parts() if name.startswith(f"{number}."))
        assert "gated=True" in line
        assert f" {own:,} parameters" in line
    assert "gated: True" in succeeds("inspect", out).stdout
    assert "good" in succeeds("predict", out, data, "--device", "cpu", "--json").stdout
