"""torch.compile: one graph without a break, the same outputs and gradients, few recompilations, none of them stale."""

import logging
from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from deltaprompt.compose import Adapted
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.model import Task, adapt
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo
from tests.adapted_zoo import DELTAS, adapted_to, gradients, inputs_for, loss_of, mask_of, shake

BACKENDS = [*((d, "bert", "eager") for d in DELTAS), *((d, "llama", "aot_eager") for d in ("lora", "adapter"))]
BACKENDS += [
    ("bitfit", "llama", "eager"),
    ("ia3", "llama", "eager"),
    ("prefix", "llama", "aot_eager"),
    ("prefix", "t5", "eager"),
]


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing that another test has compiled is left."""
    torch.compiler.reset()
    trace = logging.getLogger("torch.__trace")  # thousands of records, each of which pytest would format and keep
    propagated, trace.propagate = trace.propagate, False
    yield
    trace.propagate = propagated
    torch.compiler.reset()


def logits_and_gradients(adapted, run, inputs, index):
    adapted.zero_grad()
    logits = run(**inputs, adaptation=index).logits
    loss_of(logits, mask_of(inputs)).backward()
    return logits.detach(), gradients(adapted)


@pytest.fixture
def one_layer(monkeypatch):
    """Models of one layer, since compiling takes seconds a layer."""
    for family in ("bert", "llama", "t5"):
        *spec, options = zoo.FAMILIES[family]
        layers = "num_layers" if family == "t5" else "num_hidden_layers"
        monkeypatch.setitem(zoo.FAMILIES, family, (*spec, {**options, layers: 1}))


@pytest.mark.parametrize(("name", "family", "backend"), BACKENDS)
def test_one_graph_with_the_same_outputs_and_gradients(name, family, backend, one_layer):
    """`fullgraph` makes every graph break an error."""
    adapted = adapted_to(family, name, 2)
    inputs, index = inputs_for(name, adapted.backbone), torch.tensor([1, 0])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(adapted, backend=counter, fullgraph=True)
    expected, found = (logits_and_gradients(adapted, run, inputs, index) for run in (adapted, compiled))
    assert_close(found, expected, rtol=0, atol=1e-9)
    assert counter.frame_count == 1


@torch.no_grad()
def test_slots_are_compiled_four_times_at_most(one_layer):
    """Without a slot, with the first, with any other, and with one a row; never again for other values."""
    adapted = adapted_to("bert", "lora", 4)
    inputs = zoo.inputs_of(adapted.backbone)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(adapted, backend=counter, fullgraph=True)
    counts = []
    for index in (None, 0, 1, 2, 3, torch.tensor([0, 1]), torch.tensor([3, 2]), 3, 0, None):
        found, expected = (run(**inputs, adaptation=index).logits for run in (compiled, adapted))
        assert_close(found, expected, rtol=0, atol=1e-9)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 3, 3, 3, 4, 4, 4, 4, 4]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # it is only slower
def test_a_model_with_its_verbalizer_is_one_graph(one_layer):
    words = {"good": ("great",), "bad": ("terrible",)}
    model = adapt(zoo.build("bert"), Task("{text} It was {mask}.", words, SoftVerbalizer()), [LoRA(), Prefix(3)])
    batch = model.features.collate(
        model.encode([Example({"text": "a great film"}, "good"), Example({"text": "bad"}, "bad")])
    )
    model(batch)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_close(compiled(batch), model(batch), rtol=0, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_backbone_notices_what_is_attached_and_taken_away(one_layer):
    """PyTorch does not look for hooks that come after the compilation."""
    backbone = zoo.build("bert", torch.float64)
    backbone.model.requires_grad_(False)
    inputs = zoo.inputs_of(backbone)
    compiled = torch.compile(backbone.model, backend="eager")
    seen = []

    def check():
        seen.append(compiled(**inputs).logits)
        assert_close(seen[-1], backbone.model(**inputs).logits, rtol=0, atol=1e-9)

    check()
    adapted = shake(Adapted(backbone, [LoRA()]))
    check()
    adapted.attach(BitFit())
    shake(adapted)
    check()
    adapted.detach(0)
    check()
    adapted.merge()
    check()
    adapted.unmerge()
    check()
    adapted.remove()
    check()
    assert torch.equal(seen[0], seen[-1])
    assert not any(torch.allclose(a, b) for a, b in pairwise(seen[:4]))


def test_a_compiled_training_step(one_layer):
    """The loss and the optimizer's step in compiled code, as in plain code."""

    def trained(compile):
        adapted = adapted_to("bert", "lora", 2).train()
        inputs = zoo.inputs_of(adapted.backbone)
        adam = torch.optim.AdamW([p for _, p in adapted.parts()], lr=0.01)

        def forward():
            return loss_of(adapted(**inputs, adaptation=1).logits, mask_of(inputs))

        run = torch.compile(forward, backend="aot_eager", fullgraph=True) if compile else forward
        for _ in range(3):
            adam.zero_grad()
            run().backward()
            adam.step()
        return {n: p.detach() for n, p in adapted.parts()}

    assert_close(trained(True), trained(False), rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # PyTorch's own
def test_with_checkpointing(one_layer):
    adapted = adapted_to("llama", "lora", 2)
    inputs = zoo.inputs_of(adapted.backbone)
    expected = logits_and_gradients(adapted, adapted, inputs, 1)
    adapted.checkpointing()
    compiled = torch.compile(adapted, backend="aot_eager")
    assert_close(logits_and_gradients(adapted, compiled, inputs, 1), expected, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # PyTorch's own
def test_in_machine_code(one_layer):
    """Through inductor, PyTorch's own compiler."""
    adapted = adapted_to("bert", "lora", 2, torch.float32)
    inputs = zoo.inputs_of(adapted.backbone)
    compiled = torch.compile(adapted, fullgraph=True)
    expected, found = (logits_and_gradients(adapted, run, inputs, 1) for run in (adapted, compiled))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
