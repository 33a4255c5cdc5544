"""Heads: what is found of a model's own head, and that watching it leaves nothing behind."""

import re

import pytest
import torch
import transformers
from torch.testing import assert_close

from deltaprompt.backbone import heads
from deltaprompt.backbone.heads import Chain, Whole
from deltaprompt.backbone.load import wrap
from deltaprompt.conformance import shrink
from deltaprompt.errors import BackboneError
from tests import backbones_zoo as zoo
from tests import tokenizers_zoo

WIDE = {**zoo.LLAMA, "vocab_size": 320}


def head_of(prefix, cls="ForCausalLM", tokenizer="llama", **options):
    config = getattr(transformers, f"{prefix}Config")(**{**WIDE, **options})
    with zoo.quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, prefix + cls)(config).eval()
    return wrap(model, tokenizers_zoo.build(tokenizer))


def find(name):
    return next(a for a in shrink.known() if str(a) == name)


@pytest.mark.parametrize(
    ("prefix", "options", "factors"),
    [
        ("Llama", {}, (1.0, 1.0, None)),
        ("Granite", {"logits_scaling": 4.0}, (1.0, 0.25, None)),
        ("HyperCLOVAX", {"logits_scaling": 4.0}, (1.0, 4.0, None)),  # multiplies, where Granite divides
        ("Gemma2", {"final_logit_softcapping": 7.0}, (1.0, 1.0, 7.0)),
        ("Gemma2", {"final_logit_softcapping": None}, (1.0, 1.0, None)),
    ],
)
def test_factors_are_those_of_the_config(prefix, options, factors):
    head = head_of(prefix, **options).head
    assert (head.before, head.scale, head.softcap) == factors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_are_exact_in_any_type(dtype):
    model = zoo.model("cohere").to(dtype)
    head = wrap(model, tokenizers_zoo.build("llama")).head
    assert head.scale == 0.25
    t5 = wrap(zoo.model("t5").to(dtype), tokenizers_zoo.build("t5")).head
    assert t5.before == 16**-0.5
    granite = wrap(zoo.model("granite").to(dtype), tokenizers_zoo.build("llama")).head
    assert granite.scale == 1 / 3.0


def test_a_chain_is_narrowed_to_rows_with_every_table_of_words():
    """ESM adds a bias of its own to what its output embedding gives."""
    head = shrink.backbone(find("masked:esm")).head
    assert isinstance(head, Chain)
    assert head.narrow


def test_a_head_that_is_no_chain_is_run_by_the_model():
    """NeoMME multiplies with the weight of a map that it does not call."""
    backbone = shrink.backbone(find("masked:neomme"))
    assert isinstance(backbone.head, Whole)
    states = torch.randn(2, 3, backbone.width)
    scores = backbone.head.logits(states)
    assert scores.shape == (2, 3, backbone.head.size)
    assert_close(backbone.head.logits(states[:, 0], torch.tensor([4, 1])), scores[:, 0, [4, 1]])


def test_gradients_pass_a_head_that_the_model_runs():
    backbone = shrink.backbone(find("masked:neomme"))
    states = torch.randn(1, 2, backbone.width, requires_grad=True)
    backbone.head.logits(states).sum().backward()
    assert states.grad.abs().sum() > 0


def test_a_model_without_scores_of_its_states_is_refused_by_name():
    message = "ProphetNetForCausalLM: its scores cannot be computed from the states of ProphetNetDecoder"
    with pytest.raises(BackboneError, match=re.escape(message) + ".*Load it with kind='encoder'"):
        shrink.backbone(find("causal:prophetnet"))


def test_watching_a_head_leaves_the_model_as_it_was():
    model, state = zoo.model("t5").train(), torch.get_rng_state()
    model.encoder.eval()
    wrap(model, tokenizers_zoo.build("t5"))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.encoder.training
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_a_forward_that_was_there_is_there_again():
    model = zoo.model("llama")
    own = model.model.forward
    vars(model.model)["forward"] = own  # as accelerate's hooks do
    wrap(model, tokenizers_zoo.build("llama"))
    assert vars(model.model)["forward"] is own


@pytest.mark.parametrize(
    ("ratio", "numbers", "told"),
    [
        (0.25, [4.0], 0.25),
        (1 / 3, [3.0], 1 / 3),
        (16**-0.5, [16.0], 0.25),
        (1.00000003, [7.0], 1.0),
        (0.1250000002, [7.0], 0.125),
        (0.123456, [7.0], 0.123456),
    ],
)
def test_a_ratio_is_snapped_to_what_the_config_says(ratio, numbers, told):
    left = torch.linspace(1, 2, 9, dtype=torch.float64)
    assert heads._ratio(left * ratio, left, numbers) == pytest.approx(told, abs=1e-12)


def test_numbers_of_a_config_are_those_of_its_parts_too():
    assert heads._numbers({"a": 2, "b": True, "c": {"d": 0.5, "e": None}, "f": [3], "g": 1e9}) == [2.0, 0.5]
