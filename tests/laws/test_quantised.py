"""Deltas on quantised backbones: torchao's 8-bit weights, bitsandbytes' 4 and 8 bits, all on a CPU.

Neither package is needed for anything else; without them these tests skip.
"""

import copy
import logging
import warnings
from functools import cache

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deltaprompt.backbone.load import load, wrap
from deltaprompt.backbone.maps import keep_unpacked, map_of
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Mergeable
from deltaprompt.errors import BackboneError, SiteError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.model.saved import open_
from deltaprompt.trainer import Training, fit
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo as zoo
from tests.adapted_zoo import DELTAS, gradients, inputs_for, loss_of, made, mask_of, shake

KINDS = {"torchao-8": "torchao", "bitsandbytes-4": "bitsandbytes", "bitsandbytes-8": "bitsandbytes"}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # bitsandbytes' kernels want multiples of 64
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torchao"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
]
kinds = pytest.mark.parametrize("kind", KINDS)


def config_of(kind):
    """How transformers is told to quantise; the test is skipped where the package is not installed."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(KINDS[kind], reason=f"needs {KINDS[kind]}: pip install {KINDS[kind]}")
        if kind == "torchao-8":
            from torchao.quantization import Int8WeightOnlyConfig

            return TorchAoConfig(Int8WeightOnlyConfig())
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a warning a call
    if kind == "bitsandbytes-8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # with one, rows change one another
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on the disk, in float32."""
    *spec, options = zoo.FAMILIES["llama"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(zoo.FAMILIES, "llama", (*spec, {**options, **WIDE}))
        backbone = zoo.build("llama")
    path = tmp_path_factory.mktemp("whole")
    backbone.model.save_pretrained(path)
    backbone.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantised(folder):
    """A backbone of each kind, quantised as it is loaded, and the one that it was made from."""

    @cache
    def of(kind):
        from transformers import AutoModelForCausalLM

        whole = load(folder, device="cpu")
        config = config_of(kind)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        keep_unpacked(model)
        return wrap(model.eval(), whole.tokenizer, name=kind), whole

    return of


@kinds
def test_it_is_what_it_was_but_for_rounding(kind, quantised):
    backbone, whole = quantised(kind)
    inputs = zoo.inputs_of(backbone)
    with torch.no_grad():
        states, true = backbone.states(inputs), whole.states(inputs)
    assert (states - true).norm() < (0.4 if kind.endswith("4") else 0.05) * true.norm()
    assert {n: backbone.sites[n] for n in backbone.sites} == {n: whole.sites[n] for n in whole.sites}
    site = backbone.sites["layers.0.attn.k"]
    weight, _ = map_of(site, backbone.model.get_submodule(site.path))
    true, _ = map_of(site, whole.model.get_submodule(site.path))
    assert type(weight) is torch.Tensor
    steps = 3 if kind.endswith("4") else 127  # of a row's largest number; the widest of nf4's is 0.304
    assert ((weight - true).abs() <= 0.6 * true.abs().amax(1, keepdim=True) / steps).all()


@kinds
def test_every_number_counts_for_its_fingerprint(kind, quantised):
    backbone, whole = quantised(kind)
    again = copy.deepcopy(backbone.model)
    print_ = wrap(again, backbone.tokenizer).fingerprint
    assert print_ == backbone.fingerprint != whole.fingerprint
    with torch.no_grad():
        again(**zoo.inputs_of(backbone))
    assert wrap(again, backbone.tokenizer).fingerprint == print_
    layer = again.get_submodule(backbone.sites["layers.0.attn.k"].path)
    scale = {
        "torchao-8": lambda: layer.weight.scale,
        "bitsandbytes-4": lambda: layer.weight.quant_state.absmax,
        "bitsandbytes-8": lambda: layer.state.SCB,
    }[kind]()
    scale.view(-1)[0] *= 2
    assert wrap(again, backbone.tokenizer).fingerprint != print_


@kinds
@pytest.mark.parametrize("name", DELTAS)
def test_a_delta_starts_learns_and_leaves(name, kind, quantised):
    backbone, _ = quantised(kind)
    inputs, plain = inputs_for(name, backbone), zoo.inputs_of(backbone)
    with torch.no_grad():
        before = backbone.states(plain)
    adapted = Adapted(backbone, [made(name)], 2)
    try:
        with torch.no_grad():
            started = adapted.states(plain)
        assert_close(started, before, rtol=0, atol=1e-6) if made(name).identity_at_start else None
        shake(adapted)
        adam = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
        states = adapted.states(inputs, torch.tensor([1, 0]))
        for row, slot in enumerate((1, 0)):
            assert_close(states[row], adapted.states(inputs, slot)[row], rtol=0, atol=1e-4)
        loss_of(states, mask_of(inputs)).backward()
        assert all(g.isfinite().all() for g in gradients(adapted).values())
        adam.step()
        assert not torch.allclose(adapted.states(inputs, torch.tensor([1, 0])), states)
        assert all(p.grad is None for p in backbone.model.parameters())
    finally:
        adapted.remove()
    with torch.no_grad():
        assert torch.equal(backbone.states(plain), before)


@kinds
@pytest.mark.parametrize("name", [d for d in DELTAS if isinstance(made(d), Mergeable)])
@torch.no_grad()
def test_merging_into_a_quantised_map_is_refused(name, kind, quantised):
    backbone, _ = quantised(kind)
    adapted = shake(Adapted(backbone, [made(name)]))
    inputs, refused = zoo.inputs_of(backbone), ""
    attached = adapted.states(inputs)
    try:
        adapted.merge()
    except SiteError as error:
        refused = str(error)
    assert_close(backbone.states(inputs), attached, rtol=0, atol=1e-4)
    if refused:
        assert "which would round the change away" in refused or "needs a bias at" in refused
        adapted.remove()
        return
    assert {patch.site.kind for patch in adapted.patches} == {"norm"}  # norms are not quantised
    adapted.unmerge()
    adapted.remove()


def test_what_bitsandbytes_has_packed_for_inference_is_refused(folder):
    """No gradient would pass through it. The mark is set by hand, as bitsandbytes sets it on CPUs of some kinds."""
    config = config_of("bitsandbytes-4")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    backbone = wrap(model, load(folder, device="cpu").tokenizer)
    model.get_submodule(backbone.sites["layers.0.attn.k"].path).weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(BackboneError, match="has been packed by bitsandbytes .* Load the backbone again, and attach"):
        Adapted(backbone, [made("lora")])


WORDS = {"good": ("great",), "bad": ("terrible",)}
ROWS = [Example({"text": "a great movie"}, "good"), Example({"text": "a bad film"}, "bad")]


@kinds
@pytest.mark.parametrize("name", ["lora", "dora", "prefix"])
def test_what_it_learns_is_saved_and_opened_on_the_quantised_folder(name, kind, quantised, tmp_path):
    backbone, _ = quantised(kind)
    backbone.model.save_pretrained(tmp_path / "backbone")
    backbone.tokenizer.save_pretrained(tmp_path / "backbone")
    loaded = load(tmp_path / "backbone", device="cpu")
    assert loaded.fingerprint == backbone.fingerprint
    model = adapt(loaded, Task("{text} It was {mask}.", WORDS, SoftVerbalizer()), [made(name)])
    assert isinstance(model, Model)
    fit(model, ROWS, training=Training(steps=2, learning_rate=1e-2), out=tmp_path / "out")
    opened = open_(tmp_path / "out", device="cpu")
    assert type(next(m for n, m in opened.backbone.model.named_modules() if n.endswith("q_proj")).weight) is not (
        nn.Parameter
    )
    assert opened.predict(["a great film"]) == model.predict(["a great film"])
