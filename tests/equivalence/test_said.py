"""SAID is W + λ P θ with P written out as a matrix; P is linear, keeps lengths on average, and is its seed's."""

import pytest
import torch
from torch.testing import assert_close

from deltaprompt import registry
from deltaprompt.compose import Adapted, sites_of
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.said import SAID, _hadamard
from deltaprompt.errors import ConfigError
from deltaprompt.params import Weights
from tests import backbones_zoo as zoo
from tests.backbones_zoo import inputs_of

AT = ("attn.q", "ffn.up")  # [16 -> 16] and [16 -> 24] in both layers of BERT: 640 weights each
FIRST = {
    "flip": [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, -1],
    "order": [19, 0, 27, 17, 14, 31, 23, 20, 10, 12, 30, 8],
    "layers.1.ffn.up": [1, -1, 1, -1, -1, -1, 1, 1, 1, 1, 1, -1],
}  # of seed 0


@torch.no_grad()
def moved(adapted, seed=0):
    """Every parameter away from where it starts."""
    g = torch.Generator().manual_seed(seed)
    for _, p in adapted.parts():
        p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=0.3)
    return adapted


def projected(delta, backbone, theta):
    """P θ of all sites, in their order, [D]; `theta` is [d] or, of n slots, [n, 1, d]."""
    sites = sites_of(delta, backbone)
    seen = Weights({**delta.fixed(sites), "theta": theta}, False)
    return torch.cat([delta.computed(seen, site)["change"].flatten(-2) for site in sites], dim=-1)


def sylvester(size):
    """Sylvester's orthonormal matrix: entry i, j is 1 or -1 by the ones that i and j share in binary."""
    return (
        torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]).double() / size**0.5
    )


def written_out(delta, sites):
    """P of each site as a matrix [out * in, d], from dense diagonal, permutation and Hadamard matrices."""
    fixed, p = delta.fixed(sites), delta.width
    h, total = sylvester(p), sum(site.inputs * site.outputs for site in sites)
    z = torch.eye(p).double()[fixed["order"]] @ h @ fixed["flip"][0].double().diag()
    for site in sites:
        blocks = torch.cat([h @ signs.double().diag() @ z for signs in fixed[site.name]])
        yield (p / total) ** 0.5 * blocks[: site.inputs * site.outputs, : delta.dimension]


@pytest.mark.parametrize("size", [1, 2, 8, 32, 64])
def test_the_fast_transform_is_the_matrix(size):
    x = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(_hadamard(x), x @ sylvester(size), rtol=0, atol=1e-12)
    assert_close(_hadamard(_hadamard(x)), x, rtol=0, atol=1e-12)  # its own inverse


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("dimension", [1, 5, 16, 100, 300])
def test_it_is_the_matrix_written_out(dimension, aware):
    """Forward and gradients, where a map has many blocks, part of one, and where θ is and is not filled up."""
    delta = SAID(dimension, aware, projection_seed=4, at=AT)
    ours = moved(Adapted(zoo.build("bert", torch.float64), [delta]))
    plain = zoo.build("bert", torch.float64).model
    sites = sites_of(delta, ours.backbone)
    theta = ours.commons[0].tensors["theta"][0, 0].detach().clone().requires_grad_()
    strengths = [p.tensors["lambda"][0].detach().clone().requires_grad_() if aware else 1.0 for p in ours.patches]
    changed = {}
    for site, matrix, strength in zip(sites, written_out(delta, sites), strengths, strict=True):
        change = strength * (matrix @ theta).view(site.outputs, site.inputs)
        changed[f"{site.path}.weight"] = plain.get_parameter(f"{site.path}.weight").detach() + change
    inputs = inputs_of(ours.backbone)
    outputs = ours(**inputs).logits, torch.func.functional_call(plain, changed, kwargs=inputs).logits
    assert_close(*outputs, rtol=0, atol=1e-9)
    for logits in outputs:
        logits.tanh().square().sum().backward()
    assert_close(ours.commons[0].tensors["theta"].grad[0, 0], theta.grad, rtol=0, atol=1e-9)
    for patch, strength in zip(ours.patches, strengths, strict=True):
        assert not aware or torch.allclose(patch.tensors["lambda"].grad[0], strength.grad, rtol=0, atol=1e-9)
    merged = dict(ours.merge().model.named_parameters())
    for name, weight in changed.items():
        assert_close(merged[name], weight, rtol=0, atol=1e-9)


def test_the_size_of_a_block_is_the_next_power_of_two():
    assert [SAID(d).width for d in (1, 2, 3, 16, 17, 1000)] == [1, 2, 4, 16, 32, 1024]


def test_it_is_linear_and_the_matrix_column_by_column():
    delta, backbone = SAID(20, at=AT), zoo.build("bert")
    columns = projected(delta, backbone, torch.eye(20, dtype=torch.float64)[:, None])  # [d, D], a slot for each
    dense = torch.cat(list(written_out(delta, sites_of(delta, backbone))))  # [D, d]
    assert_close(columns.T, dense, rtol=0, atol=1e-12)
    theta = torch.linspace(-1, 2, 20, dtype=torch.float64)
    assert_close(projected(delta, backbone, theta[None]), theta @ columns, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dimension", [16, 20, 100, 2000])
def test_it_keeps_lengths_on_average(dimension):
    """E‖P θ‖² = ‖θ‖² over seeds; where blocks fill the maps it holds for each seed."""
    backbone = zoo.build("bert")
    theta = torch.linspace(-1, 2, dimension, dtype=torch.float64)[None]
    seeds = range(5 if dimension == 16 else 200)
    ratios = [projected(SAID(dimension, projection_seed=s, at=AT), backbone, theta).norm() ** 2 for s in seeds]
    ratios = torch.stack(ratios) / theta.norm() ** 2
    if dimension == 16:  # 16 divides the weights of every map
        assert_close(ratios, torch.ones_like(ratios), rtol=0, atol=1e-12)
    error = float(ratios.std()) / len(seeds) ** 0.5
    assert abs(float(ratios.mean()) - 1) < 4 * error + 1e-12
    assert error < 0.01


def test_the_projection_is_that_of_its_seed_whatever_the_seed_of_the_slot():
    def drawn(seed, slot=0):
        return Adapted(zoo.build("bert"), [SAID(20, projection_seed=seed, at=AT)], 1, [slot]).commons[0].constants()

    first, same, other = drawn(1), drawn(1, 7), drawn(2)
    assert all(torch.equal(t, same[n]) for n, t in first.items())
    assert not any(torch.equal(t, other[n]) for n, t in first.items() if n != "scale")
    known = drawn(0)  # numbers that may never change: what is saved would be of no use
    assert known["flip"][0, :12].tolist() == FIRST["flip"]
    assert known["order"][:12].tolist() == FIRST["order"]
    assert known["layers.1.ffn.up"][-1, :12].tolist() == FIRST["layers.1.ffn.up"]
    assert {t.dtype for n, t in known.items() if "layers" in n} == {torch.int8}


@torch.no_grad()
def test_merged_is_attached_also_on_parts_of_a_fused_map():
    adapted = moved(Adapted(zoo.build("gpt2", torch.float64), [LoRA(2), SAID(50)]))
    inputs = inputs_of(adapted.backbone)
    attached = adapted.states(inputs)
    assert_close(adapted.merge().states(inputs), attached, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("aware", "count"), [(True, 1000 + 2 * 6), (False, 1000)])
def test_the_count_is_d_and_one_a_map(aware, count):
    adapted = Adapted(zoo.build("bert"), [SAID(structure_aware=aware)], 3)
    assert adapted.parameter_count() == count
    assert sum(p.numel() for _, p in adapted.parts()) == 3 * count
    assert not any("order" in n or t.dtype == torch.int8 for n, t in adapted.state_dict().items())


def test_a_wrong_option_is_an_error():
    with pytest.raises(ConfigError, match="said: got dimension=0; dimension >= 1 is possible"):
        registry.build("deltas", "said", {"dimension": 0})
