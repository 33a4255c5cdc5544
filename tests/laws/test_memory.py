"""What autograd keeps, counted by hand and by `kept`; what a step will hold, predicted and then measured."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from deltaprompt.backbone.fused import at_rest
from deltaprompt.compose import Adapted
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError
from deltaprompt.memory import held, kept, predicted
from deltaprompt.model import Task, adapt
from deltaprompt.types import Example
from tests import backbones_zoo as zoo
from tests.adapted_zoo import DELTAS, loss_of, made, same, snapshot

ROWS, LENGTH = 5, 20
PAIRS = [(name, family) for name in DELTAS for family in ("bert", "t5")]
PAIRS += [("lora", family) for family in ("gpt2", "llama", "deberta-v2", "opt", "bart", "albert", "mpnet")]


# Counting


def test_each_storage_is_counted_once_and_the_models_own_never():
    model, x = nn.Linear(8, 4), torch.ones(2, 8)
    with kept(model) as counted:
        y = model(x)
        assert counted.bytes == 2 * 8 * 4  # x for the weight's gradient, and no weight
        z = y.tanh()
        assert counted.bytes == 2 * 8 * 4 + 2 * 4 * 4  # a tanh keeps its result
        both = z[:, :2].square().sum() + z[:, 2:].square().sum()
        assert counted.bytes == 2 * 8 * 4 + 2 * 4 * 4  # two views of it are it
    both.backward()
    assert counted.bytes == 0


def test_what_is_dropped_is_no_longer_counted():
    model, x = nn.Linear(8, 4), torch.ones(2, 8)
    with kept(model) as counted:
        model(x).tanh()
        assert counted.bytes == 0
        y = model(x)
        assert counted.bytes == 64
        del y
        assert counted.bytes == 0


def test_counting_changes_no_gradient():
    model, x = nn.Sequential(nn.Linear(8, 4), nn.GELU()), torch.randn(2, 8)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with kept(model):
        y = model(x).square().sum()
    y.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_a_gate_keeps_what_it_weighs_once():
    """The change y' − y [2, 7, 24] and σ [2, 7, 1], and not both y and y'."""
    found = []
    for gated in (False, True):
        adapted = Adapted(zoo.build("bert", torch.float64), [LoRA(at=("layers[1].ffn.up",), gated=gated)])
        inputs = zoo.inputs_of(adapted.backbone)
        with kept(adapted) as counted:
            states = adapted.states(inputs)
            found.append(counted.bytes)
        assert states.requires_grad
    assert 2 * 7 * 24 * 8 <= found[1] - found[0] <= 2 * 7 * (24 + 2) * 8


# Predicting


def measured(backbone, delta, again):
    """What autograd keeps of a pass as `fit` makes it, in bytes."""
    adapted = Adapted(backbone, [delta])
    inputs = {n: t.repeat(ROWS, 3)[:ROWS, :LENGTH] for n, t in zoo.inputs_of(backbone).items()}
    inputs |= {n: t[:, :2] for n, t in inputs.items() if n.startswith("decoder")}
    with at_rest(adapted.model), kept(adapted) as counted:
        if again:
            adapted.checkpointing()
        states = adapted.states(inputs)
        found = counted.bytes
        assert states.requires_grad
    adapted.remove()
    return found


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_what_is_kept_is_predicted(name, family):
    backbone = zoo.build(family)
    told = predicted(backbone, [made(name)], ROWS, LENGTH)
    assert told.kept == pytest.approx(measured(backbone, made(name), False), rel=0.05)
    if family in ("albert", "mpnet"):
        assert told.recomputed is None  # these cannot compute their layers again
        return
    assert told.recomputed == pytest.approx(measured(backbone, made(name), True), rel=0.05)
    assert told.recomputed <= told.kept


@pytest.mark.parametrize("at", ["attn.v", "layers[1].attn.v"])
def test_checkpointing_keeps_less_wherever_the_delta_is(at):
    told = predicted(zoo.build("bert"), [LoRA(at=(at,))], ROWS, LENGTH)
    assert told.recomputed is not None
    assert told.recomputed < 0.7 * told.kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DELTAS)
def test_weights_gradients_and_moments_are_predicted(name, dtype):
    backbone = zoo.build("bert", dtype)
    told = predicted(backbone, [made(name)], ROWS, LENGTH)
    adapted = Adapted(backbone, [made(name)])
    inputs = zoo.inputs_of(backbone)
    adam = torch.optim.AdamW([p for _, p in adapted.parts()])
    loss_of(adapted.states(inputs), inputs["attention_mask"]).backward()
    adam.step()
    own = [p for _, p in adapted.parts()]
    moments = held(t for state in adam.state.values() for t in state.values() if t.ndim)
    assert told.gradients == held(p.grad for p in own)
    assert told.optimizer == moments
    assert told.deltas == held((*own, *adapted.commons.buffers()))
    assert told.backbone == held(p for p in (*backbone.model.parameters(), *backbone.model.buffers()))
    assert told.total() == told.backbone + told.deltas + told.gradients + told.optimizer + told.kept
    assert told.total(again=True) == told.total() - told.kept + told.recomputed


def test_predicting_leaves_nothing_behind():
    backbone = zoo.build("bert")
    backbone.model.train()
    chance, before = torch.get_rng_state(), snapshot(backbone)
    predicted(backbone, [made("lora")], ROWS, LENGTH)
    assert same(snapshot(backbone), before)
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(module.training for module in backbone.model.modules())
    assert not backbone.model.is_activation_checkpointing


def test_a_model_that_looks_at_numbers_is_run_on_two_rows():
    backbone = zoo.build("bert")
    rows = []

    def look(module, args, output):
        rows.append(len(output))
        float(output.detach().sum())  # a tensor without numbers has no answer to that

    backbone.model.get_submodule(backbone.sites["layers.0.ffn.up"].path).register_forward_hook(look)
    told = predicted(backbone, [made("lora")], ROWS, LENGTH)
    assert rows == [ROWS, 1, 2] * 2
    assert told.kept == measured(backbone, made("lora"), False)


@pytest.mark.parametrize(("rows", "length"), [(0, 8), (1, 0), (1, 65)])
def test_sizes_that_are_not_possible(rows, length):
    with pytest.raises(ConfigError, match=f"got {rows} rows of {length} tokens; 1 row or more and 1 to 64 tokens"):
        predicted(zoo.build("bert"), [made("lora")], rows, length)


@pytest.mark.parametrize("delta", [LoRA(), LoRA(freeze_a=True), made("adapter"), made("soft_prompt")])
def test_what_fit_keeps_is_predicted(delta):
    """With the template, the verbalizer and the loss, which are not in the prediction."""
    backbone = zoo.build("bert")
    told = predicted(backbone, [delta], ROWS, 32)
    model = adapt(backbone, Task("{text} {mask}", {"good": ("great",), "bad": ("terrible",)}), [delta])
    lengths = {30: "good", 29: "bad", 28: "good", 9: "bad", 8: "good"}
    texts = [Example({"text": "great " * words}, label) for words, label in lengths.items()]
    reader = model.reader()
    reader.reading = replace(reader.reading, features=replace(model.features, max_length=32))
    batch = model.features.collate(model.encode(texts))
    assert batch.inputs["input_ids"].shape == (ROWS, 32)
    with at_rest(backbone.model), kept(model) as counted:
        loss = model(batch)["loss"]
        assert told.kept == pytest.approx(counted.bytes, rel=0.1)
    loss.backward()
