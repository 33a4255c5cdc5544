"""Laws of every delta on backbones in half precision, and under autocast: float32 deltas, one cast, no lost step."""

import copy

import pytest
import torch
from torch import nn

from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import After
from deltaprompt.model import Task, adapt
from deltaprompt.trainer import Training, fit
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo
from tests.adapted_zoo import DELTAS, adapted_to, gradients, inputs_for, loss_of, made, mask_of, shake

FAMILIES = ["bert", "gpt2", "qwen2", "t5"]  # separate maps, one fused map, grouped keys, an encoder-decoder
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # the largest relative error of one rounding
SMALL = 0.1  # away from the start; there and beyond a random T5 answers some roundings with another gradient
pairs = pytest.mark.parametrize(("name", "family"), [(d, f) for d in DELTAS for f in FAMILIES])
halves = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype).removeprefix("torch."))


def skip_where_the_cpu_cannot(dtype):
    """float16 has been an accelerator's type; a CPU build may lack its maps."""
    try:
        x = torch.ones(1, 1, 2, 4, dtype=dtype)
        nn.functional.scaled_dot_product_attention(x, x, x) + nn.functional.layer_norm(x @ x.mT, (2,)).sum()
    except RuntimeError as error:
        pytest.skip(f"no {dtype} on this CPU: {error}")


def apart(a, b):
    """|a − b| / |b| of two sets of tensors, each set taken as one vector."""
    a, b = (torch.cat([t.detach().double().flatten() for t in each]) for each in (a, b))
    return float((a - b).norm() / b.norm())


def aligned(a, b):
    """The cosine between two sets of tensors."""
    a, b = (torch.cat([t.double().flatten() for t in each]) for each in (a, b))
    return float(a @ b / a.norm() / b.norm())


def step(adapted, inputs, index=1):
    """The states of one pass and the gradients of one step."""
    adapted.zero_grad()
    states = adapted.states(inputs, index)
    loss_of(states, mask_of(inputs)).backward()
    return states.detach(), gradients(adapted)


@halves
@pairs
def test_on_a_half_precision_backbone_float32_deltas_learn_the_same(name, family, dtype):
    """The states and gradients are those of a float32 backbone that holds the same (rounded) weights."""
    skip_where_the_cpu_cannot(dtype)
    adapted = adapted_to(family, name, 2, torch.float32, SMALL).train()
    inputs = inputs_for(name, adapted.backbone)
    adapted.model.to(dtype)
    states, grads = step(adapted, inputs)
    adapted.model.to(torch.float32)
    wide_states, wide_grads = step(adapted, inputs)
    assert states.dtype == dtype
    assert {g.dtype for g in grads.values()} == {torch.float32} == {p.dtype for _, p in adapted.parts()}
    assert apart([states], [wide_states]) < 16 * HALF[dtype]
    assert aligned(grads.values(), wide_grads.values()) > (0.7 if family == "t5" else 0.98)
    assert all(g.isfinite().all() for g in grads.values())


def dtypes(backbone, run):
    """The dtype of what leaves every module of a model, in a run."""
    found = {}

    def note(path, y):
        y = y[0] if isinstance(y, tuple) else y
        if isinstance(y, torch.Tensor):
            found[path] = y.dtype

    handles = [m.register_forward_hook(lambda _, args, y, p=p: note(p, y)) for p, m in backbone.model.named_modules()]
    run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pairs
@torch.no_grad()
def test_no_delta_changes_the_dtype_of_what_flows_through_the_backbone(name, family, autocast):
    backbone = zoo.build(family, torch.float32 if autocast else torch.bfloat16)
    inputs = zoo.inputs_of(backbone)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = dtypes(backbone, lambda: backbone.states(inputs))
        adapted = shake(Adapted(backbone, [made(name)], 2))
        for index in (1, torch.tensor([1, 0])):
            assert dtypes(backbone, lambda index=index: adapted.states(inputs, index)) == before


@halves
@pytest.mark.parametrize(("name", "family"), [(d, f) for d in DELTAS for f in ("bert", "gpt2")])
@torch.no_grad()
def test_the_maths_is_in_float32_and_rounded_once(name, family, dtype):
    """At every site the result is that of float64, rounded to the backbone's dtype."""
    adapted = adapted_to(family, name, 2, torch.float32)
    if not isinstance(made(name), After) or made(name).acts_on == ("embed",):
        assert {p.dtype for _, p in adapted.parts()} == {torch.float32}  # what it adds is itself cast, once
        return
    adapted.model.to(dtype)
    exact = copy.deepcopy(adapted).to(torch.float64)
    g = torch.Generator().manual_seed(1)
    for patch, wide in zip(adapted.patches, exact.patches, strict=True):
        module, there = (each.model.get_submodule(patch.site.path) for each in (adapted, exact))
        out = patch.site.outputs if patch.site.part is None else module.weight.numel() // patch.site.inputs
        x, y = (torch.randn(2, 5, size, generator=g).to(dtype) for size in (patch.site.inputs, out))
        found = patch.leave(module, (x,), y)
        truth = wide.leave(there, (x.double(),), y.double())
        assert found.dtype == dtype
        assert ((found.double() - truth).abs() <= HALF[dtype] * 1.001 * truth.abs() + 1e-6).all()


@pytest.mark.parametrize("name", DELTAS)
def test_a_step_far_below_the_backbones_precision_is_not_lost(name):
    """A step of 1e-6 on a number near 1 is 4000 times smaller than bfloat16 can tell."""
    adapted = adapted_to("qwen2", name, dtype=torch.bfloat16)
    inputs = inputs_for(name, adapted.backbone)
    before = {n: p.detach().clone() for n, p in adapted.parts()}
    adam = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-6, eps=1e-30)
    _, grads = step(adapted, inputs, 0)
    adam.step()
    for n, p in adapted.parts():
        learned = grads[n] != 0
        assert p.dtype == torch.float32
        assert (p.detach() - before[n])[learned].abs().gt(1e-7).all()
    assert any((p.detach() != before[n]).any() for n, p in adapted.parts())


@pairs
def test_under_autocast_it_learns_and_answers_as_without(name, family):
    adapted = adapted_to(family, name, 2, torch.float32, SMALL).train()
    inputs = inputs_for(name, adapted.backbone)
    wide_states, wide_grads = step(adapted, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        states, grads = step(adapted, inputs)
        adapted.eval()
        with torch.no_grad():
            again = adapted.states(inputs, torch.tensor([1, 0]))
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert apart([states], [wide_states]) < 0.1
    assert apart([again[0]], [wide_states[0]]) < 0.1
    assert aligned(grads.values(), wide_grads.values()) > (0.7 if family == "t5" else 0.98)


WORDS = {"good": ("great",), "bad": ("terrible",)}
TEXTS = {"good": ["a great movie", "a good film"], "bad": ["a bad film", "terrible plot"]}
ROWS = [Example({"text": text}, label) for label, texts in TEXTS.items() for text in texts]
MIXED, HALVED = ("bf16", torch.float32), ("no", torch.bfloat16)


@pytest.mark.parametrize(("precision", "dtype"), [MIXED, HALVED], ids=["mixed", "bfloat16"])
@pytest.mark.parametrize("name", DELTAS)
def test_fit_in_bfloat16_comes_close_to_fit_in_float32(name, precision, dtype):
    found = {}
    for how in (("no", torch.float32), (precision, dtype)):
        model = adapt(zoo.build("bert", how[1]), Task("{text} It was {mask}.", WORDS, SoftVerbalizer()), [made(name)])
        run = fit(model, ROWS, ROWS, training=Training(steps=3, learning_rate=1e-2, precision=how[0]))
        assert {p.dtype for _, p in model.parts()} == {torch.float32}
        found[how] = [entry["loss"] for entry in run.history]
        found[how] += [entry["dev"]["loss"] for entry in run.history]
    assert found["no", torch.float32] == pytest.approx(found[precision, dtype], abs=0.05)
    assert found["no", torch.float32] != found[precision, dtype]
