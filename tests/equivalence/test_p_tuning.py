"""P-tuning: its LSTM is PyTorch's, its networks are those of peft in number, outputs and training."""

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.compose import Adapted
from deltaprompt.deltas.p_tuning import PTuning, both_ways
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError
from tests import backbones_zoo as zoo
from tests.backbones_zoo import inputs_of

LENGTH = 5
DIRECTIONS = ("", "_reverse")


def torchs_lstm(inputs, hidden, layers=2):
    torch.manual_seed(1)
    return torch.nn.LSTM(inputs, hidden, layers, bidirectional=True, batch_first=True, dtype=torch.float64)


def layer_of(lstm, layer):
    """A layer's tensors of both directions, stacked as ours."""
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        both = torch.stack([lstm.get_parameter(f"{kind}_l{layer}{way}") for way in DIRECTIONS])
        yield both if kind.startswith("weight") else both[:, None]


@pytest.mark.parametrize(("length", "inputs", "hidden"), [(1, 3, 2), (7, 4, 4), (20, 6, 9)])
def test_the_lstm_is_pytorchs_with_and_without_slots(length, inputs, hidden):
    lstms = [torchs_lstm(inputs, hidden), torchs_lstm(inputs, hidden)]
    with torch.no_grad():
        for p in lstms[1].parameters():
            p.mul_(-1.7)
    x = torch.randn(2, length, inputs, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([lstm(x[i : i + 1])[0] for i, lstm in enumerate(lstms)])
    ours, alone = x, x[0]
    for layer in range(2):
        tensors = [tuple(layer_of(lstm, layer)) for lstm in lstms]
        ours = both_ways(ours, *(torch.stack(each) for each in zip(*tensors, strict=True)))
        alone = both_ways(alone, *tensors[0])
    assert_close(ours, expected, rtol=0, atol=1e-12)
    assert_close(alone, expected[0], rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (ours, expected)]
    assert_close(*gradients, rtol=0, atol=1e-12)


def pairs_of(ours, theirs, encoder):
    """Pairs of a tensor of ours [1, …] and the tensors of peft's network that it has in it, in order."""
    mine = ours.patches[0].tensors
    yield mine["e"], [theirs.embedding.weight]
    for number, layer in enumerate(m for m in theirs.mlp_head if isinstance(m, torch.nn.Linear)):
        yield mine[f"map_{number}"], [layer.weight]
        yield mine[f"bias_{number}"], [layer.bias]
    if encoder == "lstm":
        for layer in range(2):
            for name, kind in (("w_ih", "weight_ih"), ("w_hh", "weight_hh"), ("b_ih", "bias_ih"), ("b_hh", "bias_hh")):
                yield (
                    mine[f"{name}_{layer}"],
                    [theirs.lstm_head.get_parameter(f"{kind}_l{layer}{way}") for way in DIRECTIONS],
                )


@pytest.mark.parametrize("hidden", [16, 6])
@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_it_is_pefts_also_after_training(encoder, hidden):
    peft = pytest.importorskip("peft")
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=LENGTH,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=hidden,
    )
    backbone = zoo.build("llama", torch.float64)
    with zoo.quiet():
        theirs = peft.get_peft_model(zoo.build("llama", torch.float64).model, config).to(torch.float64).eval()
    ours = Adapted(backbone, [PTuning(LENGTH, encoder=encoder, hidden=hidden)])
    pairs = list(pairs_of(ours, theirs.prompt_encoder["default"], encoder))
    assert ours.parameter_count() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert len(pairs) == len(list(ours.parts()))
    with torch.no_grad():
        for mine, others in pairs:
            mine.copy_(torch.cat([o.reshape(-1) for o in others]).view_as(mine))
    inputs = inputs_of(backbone)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    virtual = (backbone.vocabulary + torch.arange(LENGTH)).expand(2, -1)
    longer = {
        "input_ids": torch.cat([virtual, inputs["input_ids"]], dim=1),
        "attention_mask": torch.ones(2, 7 + LENGTH, dtype=torch.long),
    }
    groups = [[mine for mine, _ in pairs], [o for _, others in pairs for o in others]]
    optimizers = [torch.optim.AdamW(group, lr=0.01) for group in groups]
    for _ in range(3):
        outputs = [ours(**longer).logits, theirs(**inputs).logits]
        assert outputs[0].shape == outputs[1].shape
        assert_close(*outputs, rtol=0, atol=1e-9)
        for optimizer, logits in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            logits.tanh().square().mean().backward()
            optimizer.step()


def closed_form(encoder, d, h):
    """E, the maps with their biases, and of each of two layers both directions' four gates with two biases."""
    if encoder == "mlp":
        return LENGTH * d + (d * h + h) + (h * h + h) + (h * d + d)
    lstm = sum(2 * (4 * h * inputs + 4 * h * h + 2 * 4 * h) for inputs in (d, 2 * h))
    return LENGTH * d + lstm + (2 * h * 2 * h + 2 * h) + (2 * h * d + d)


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_its_parameter_count_while_training_and_after(family, encoder):
    for hidden in (None, 3):
        adapted = Adapted(zoo.build(family), [PTuning(LENGTH, encoder=encoder, hidden=hidden)])
        assert adapted.parameter_count() == closed_form(encoder, 16, hidden or (16 if encoder == "mlp" else 8))
        adapted.settle()
        assert adapted.parameter_count() == LENGTH * 16


def test_what_is_kept_is_a_soft_prompt_in_the_same_place():
    delta = PTuning(LENGTH, first=3, at=("embed",), hidden=4)
    assert delta.plain() == SoftPrompt(LENGTH, first=3, at=("embed",))


@pytest.mark.parametrize("change", [{"length": 0}, {"init_std": -1.0}, {"hidden": 0}, {"encoder": "gru"}])
def test_what_is_not_possible_is_an_error(change):
    with pytest.raises(ConfigError, match="p_tuning: got .*encoder lstm or mlp, hidden >= 1"):
        PTuning(**change)
