"""Prototypes, spheres, nearest examples and ProtoRE's losses on planted states: what geometry and the papers say."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

from deltaprompt.errors import ConfigError
from deltaprompt.model import Task, adapt
from deltaprompt.model.model import Model
from deltaprompt.model.saved import open_
from deltaprompt.params import Weights
from deltaprompt.types import AtMask, Example
from deltaprompt.verbalizers._base import Setting
from deltaprompt.verbalizers._contrast import contrast, log_odds, s2s, s2z, told_apart
from deltaprompt.verbalizers.dect import DecT
from deltaprompt.verbalizers.hyper_proto import HyperProto
from deltaprompt.verbalizers.nn_shot import NNShot
from deltaprompt.verbalizers.proto_net import ProtoNet
from deltaprompt.verbalizers.proto_verb import ProtoVerb
from deltaprompt.verbalizers.prototypes import Prototypes
from deltaprompt.verbalizers.spherical_prototypes import SphericalPrototypes
from tests import backbones_zoo as zoo

NONE = torch.zeros(0, 1)
EXACT = {"atol": 1e-9, "rtol": 1e-9}
OTHERS = {
    "proto_net": ProtoNet(),
    "dot": ProtoNet(metric="dot"),
    "proto_net_unit": ProtoNet(unit=True, scale=20.0),
    "nn_shot": NNShot(each=2),
    "nn_shot_cosine": NNShot(each=3, metric="cosine"),
    "spherical": SphericalPrototypes(),
    "spherical_legacy": SphericalPrototypes(legacy=True),
}
SPHERES = {
    "distance": HyperProto(),
    "zero": HyperProto(inside="zero"),
    "abs": HyperProto(inside="abs", radius="abs"),
    "cone": HyperProto(metric="cone"),
    "gaussian": HyperProto(metric="gaussian"),
    "unit": HyperProto(unit=True, scale=20.0),
    "softplus": HyperProto(radius="softplus", one_shot=0.5),
    "unbiased": HyperProto(metric="gaussian", radius="softplus", unbiased=True),
}
NEW = OTHERS | SPHERES
STARTED = NEW | {"prototypes": Prototypes(), "dect": DecT(dim=3), "proto_verb": ProtoVerb(dim=3)}


def setting(classes, width):
    return Setting(tuple(f"class {c}" for c in range(classes)), "encoder", width, lambda word, mask=0: [len(word)])


def at(hidden):
    return AtMask(hidden[:, None, None], torch.ones(len(hidden), 1, 1, dtype=torch.bool))


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(verbalizer, s):
    """Its tensors before the start."""
    made = {}
    for name, param in verbalizer.params(s).items():
        made[name] = torch.zeros(param.shape, dtype=torch.float64)
        param.init(made[name], torch.Generator().manual_seed(0))
    return Weights(made, False)


def started(verbalizer, support, classes, count):
    s = setting(count, support.shape[1])
    w = fresh(verbalizer, s)
    return w | verbalizer.start(w, s, NONE[:0], support, classes)


def scores(verbalizer, w, hidden):
    return verbalizer.scores(w, setting(len(w["z"] if "z" in w else w["s"]), hidden.shape[1]), at(hidden))


# Spheres


def test_with_equal_radii_a_sphere_is_its_centre():
    h, z = seeded(40, 6), seeded(4, 6, seed=1)
    got = scores(HyperProto(), Weights({"z": z, "r": torch.full((4,), 0.7, dtype=torch.float64)}, False), h)
    want = torch.stack([-(h - own).norm(dim=1) for own in z], 1)
    assert_close(got.log_softmax(-1), want.log_softmax(-1), **EXACT)
    squared = scores(ProtoNet(), Weights({"z": z}, False), h)
    assert torch.equal(got.argsort(-1), squared.argsort(-1))
    assert_close(squared, -want.square(), **EXACT)


@pytest.mark.parametrize("name", [n for n in SPHERES if n not in ("cone", "unit")] + ["proto_net", "nn_shot"])
def test_what_is_measured_by_distances_does_not_change_where_all_is_moved(name):
    support, h, by = seeded(6, 5), seeded(7, 5, seed=1), 3 * seeded(5, seed=2)
    classes = torch.arange(6) % 2
    found = [scores(NEW[name], started(NEW[name], support + t, classes, 2), h + t) for t in (0, by)]
    assert_close(found[1], found[0], **EXACT)
    turn = torch.linalg.qr(seeded(5, 5, seed=3)).Q
    assert_close(scores(NEW[name], started(NEW[name], support @ turn, classes, 2), h @ turn), found[0], **EXACT)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_radius_is_trained_as_a_bias_is(scale):
    """dL/dε_n = τ Σ_x (p_n(x) − 1[y = n])."""
    h, classes = seeded(30, 4), torch.arange(30) % 3
    r = seeded(3, seed=2).requires_grad_()
    found = scores(HyperProto(scale=scale), Weights({"z": seeded(3, 4, seed=1), "r": r}, True), h)
    cross_entropy(found, classes, reduction="sum").backward()
    want = torch.zeros(3, dtype=torch.float64)
    for row, y in zip(found.softmax(-1).detach(), classes.tolist(), strict=True):
        for n in range(3):
            want[n] += row[n] - float(y == n)
    assert_close(r.grad, scale * want, **EXACT)


def test_the_boundary_of_two_spheres_is_a_hyperbola():
    """Foci (±3, 0) and ε₁ − ε₂ = −2: x = cosh t, y = √8 sinh t, on the side of the smaller sphere's focus or not."""
    t = torch.linspace(-2, 2, 41, dtype=torch.float64)
    z = torch.tensor([[-3.0, 0], [3, 0]], dtype=torch.float64)
    for radii, side in (([1.0, 3.0], -1), ([3.0, 1.0], 1)):
        w = Weights({"z": z, "r": torch.tensor(radii, dtype=torch.float64)}, False)
        on = torch.stack([side * t.cosh(), math.sqrt(8) * t.sinh()], 1)
        found = scores(HyperProto(), w, on)
        assert_close(found[:, 0], found[:, 1], **EXACT)
        first, second = (scores(HyperProto(), w, on + torch.tensor([d, 0.0])) for d in (-1e-3, 1e-3))
        assert (first.argmax(-1) == 0).all()
        assert (second.argmax(-1) == 1).all()


def test_inside_a_sphere_there_are_three_rules():
    z, r = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    h = torch.tensor([[0.25, 0.0], [0, 1.0], [3.0, 4.0]], dtype=torch.float64)
    for inside, want in (("signed", [0.75, 0, -4]), ("zero", [0, 0, -4]), ("abs", [-0.75, 0, -4])):
        got = scores(HyperProto(inside=inside), Weights({"z": z, "r": r}, False), h)
        assert_close(got[:, 0], torch.tensor(want, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_cone_is_an_angle_and_within_it_all_are_alike():
    z = torch.tensor([[2.0, 0, 0], [0, 5.0, 0]], dtype=torch.float64)
    h, e = seeded(50, 3), torch.tensor([0.4, -0.9], dtype=torch.float64)  # |ε|
    got = scores(HyperProto(metric="cone"), Weights({"z": z, "r": e}, False), h)
    for row, found in zip(h, got, strict=True):
        for c in range(2):
            angle = math.acos(float(row[c] / row.norm()))
            assert_close(float(found[c]), math.cos(max(0.0, angle - abs(float(e[c])))), atol=1e-9, rtol=0)
    assert (got == 1).any()
    assert_close(scores(HyperProto(metric="cone"), Weights({"z": z, "r": e}, False), 7 * h), got, **EXACT)


def test_a_gaussian_is_its_density():
    h, z, e = seeded(20, 6), seeded(3, 6, seed=1), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    got = scores(HyperProto(metric="gaussian"), Weights({"z": z, "r": e}, False), h)
    want = torch.stack(
        [torch.distributions.Normal(z[c], e[c].abs()).log_prob(h).sum(-1) + 3 * math.log(2 * math.pi) for c in range(3)]
    )
    assert_close(got, want.T, **EXACT)


def spreads(verbalizer, support, classes, count):
    """Where its centres and radii start."""
    w = started(verbalizer, support, classes, count)
    return w["z"], verbalizer._radius(w["r"])


def test_a_sphere_starts_from_its_support():
    support, classes = 2 * seeded(7, 4) + 5, torch.tensor([0, 0, 0, 1, 1, 1, 1])
    own = [support[:3], support[3:]]
    for radius in ("raw", "abs", "softplus"):
        z, e = spreads(HyperProto(radius=radius), support, classes, 2)
        assert_close(z, torch.stack([x.mean(0) for x in own]), **EXACT)
        assert_close(e, torch.stack([(x - x.mean(0)).norm(dim=1).mean() for x in own]), **EXACT)
    z, e = spreads(HyperProto(metric="gaussian"), support, classes, 2)
    assert_close(z, torch.stack([x.mean(0) for x in own]), **EXACT)
    assert_close(e, torch.stack([(x - x.mean(0)).square().mean().sqrt() for x in own]), **EXACT)
    z, e = spreads(HyperProto(metric="cone"), support, classes, 2)
    mean = torch.stack([normalize(x, dim=1).mean(0) for x in own])
    angles = [torch.cosine_similarity(x, m[None]).acos().mean() for x, m in zip(own, mean, strict=True)]
    assert_close(z, mean, **EXACT)
    assert_close(e, torch.stack(angles), **EXACT)


@pytest.mark.parametrize("metric", ["distance", "cone", "gaussian"])
def test_one_example_has_no_spread_and_is_given_one(metric):
    support = seeded(7, 4)
    support[5:] = support[4]  # three times the same example
    classes = torch.tensor([0, 0, 1, 2, 3, 3, 3])
    known = spreads(HyperProto(metric=metric), support[:2], classes[:2], 1)[1]
    for given, want in ((None, float(known)), (0.3, 0.3), (2.0, 2.0)):
        got = spreads(HyperProto(metric=metric, one_shot=given), support, classes, 4)[1]
        assert_close(got, torch.tensor([float(known), want, want, want], dtype=torch.float64), **EXACT)
    alone = spreads(HyperProto(metric=metric), support[:3], torch.arange(3), 3)[1]
    assert alone.tolist() == [1.0 if metric == "gaussian" else 0.0] * 3


def test_on_the_unit_sphere_only_directions_count():
    support, h, classes = seeded(6, 5), seeded(9, 5, seed=1), torch.tensor([0, 0, 1, 1, 1, 0])
    long = torch.linspace(0.5, 4, 6, dtype=torch.float64)[:, None]
    for name, plain in (("unit", HyperProto(scale=20.0)), ("proto_net_unit", ProtoNet(scale=20.0))):
        got = scores(NEW[name], started(NEW[name], long * support, classes, 2), 3 * h)
        want = scores(plain, started(plain, normalize(support, dim=1), classes, 2), normalize(h, dim=1))
        assert_close(got, want, **EXACT)


def test_all_of_one_example_are_prototypes():
    support, h = seeded(4, 6), seeded(30, 6, seed=1)
    near = scores(ProtoNet(), started(ProtoNet(), support, torch.arange(4), 4), h)
    for name in ("distance", "zero", "abs", "gaussian"):
        got = scores(SPHERES[name], started(SPHERES[name], support, torch.arange(4), 4), h)
        assert torch.equal(got.argsort(-1), near.argsort(-1)), name
    cone = scores(SPHERES["cone"], started(SPHERES["cone"], support, torch.arange(4), 4), h)
    assert_close(cone, scores(Prototypes(scale=1.0), Weights({"z": support}, False), h), atol=1e-9, rtol=0)


@pytest.mark.parametrize("shots", [2, 3, 5, 20])
def test_an_unbiased_radius_is_what_new_examples_have(shots):
    wide, chance = 400, torch.Generator().manual_seed(shots)
    support = 1.7 * torch.randn(200, shots, wide, generator=chance)
    new = 1.7 * torch.randn(200, wide, generator=chance)
    found = [
        [float(spreads(HyperProto(unbiased=unbiased), x, torch.zeros(shots, dtype=torch.long), 1)[1]) for x in support]
        for unbiased in (True, False)
    ]
    far = float((new - support.mean(1)).norm(dim=1).mean())
    assert abs(sum(found[0]) / 200 / far - 1) < 0.01
    assert sum(found[1]) / 200 / far == pytest.approx(math.sqrt((shots - 1) / (shots + 1)), rel=0.01)


def drawn(spread, shots, width, apart, seed):
    """An episode: support, query and their classes; equally distant centres, a spread each."""
    chance = torch.Generator().manual_seed(seed)
    centres = torch.eye(len(spread), width) * apart / math.sqrt(2)
    every = []
    for each in (shots, 20):
        classes = torch.arange(len(spread)).repeat_interleave(each)
        noise = torch.randn(len(classes), width, generator=chance)
        every += [centres[classes] + torch.tensor(spread)[classes, None] * noise, classes]
    return every


def accuracy(verbalizer, spread, width, apart, draws=100, shots=5, steps=0):
    """Over episodes; with steps of Adam on the radii and the support before."""
    right = 0.0
    for seed in range(draws):
        support, classes, query, gold = drawn(spread, shots, width, apart, seed)
        w = started(verbalizer, support, classes, len(spread))
        if steps:
            r = w["r"].clone().requires_grad_()
            optimizer = torch.optim.Adam([r], lr=0.05)
            for _ in range(steps):
                optimizer.zero_grad()
                cross_entropy(scores(verbalizer, w | {"r": r}, support), classes).backward()
                optimizer.step()
            w = w | {"r": r.detach()}
        right += float((scores(verbalizer, w, query).argmax(-1) == gold).float().mean())
    return right / draws


@pytest.mark.parametrize("inside", ["signed", "zero", "abs"])
def test_spheres_are_better_where_classes_have_unequal_spread(inside):
    """As long as no sphere has the other's centre within it."""
    plain = accuracy(ProtoNet(), [0.5, 2.0], 4, 7.0)
    assert plain < 0.98
    assert accuracy(HyperProto(inside=inside), [0.5, 2.0], 4, 7.0) > plain + 0.015
    assert accuracy(HyperProto(inside=inside), [0.4, 0.4, 2.0, 2.0], 5, 7.0) > 0.015 + accuracy(
        ProtoNet(), [0.4, 0.4, 2.0, 2.0], 5, 7.0
    )


def test_spheres_that_swallow_others_are_mended_by_training_their_radii():
    """In many dimensions radii differ by more than centres do: what the support says of them is only a start."""
    spread = [0.6, 1.0, 1.4, 1.8, 2.2]
    plain = accuracy(ProtoNet(), spread, 16, 5.0, draws=40)
    assert accuracy(HyperProto(), spread, 16, 5.0, draws=40) < plain - 0.1
    assert accuracy(HyperProto(), spread, 16, 5.0, draws=40, steps=60) > plain + 0.02


def test_gaussians_are_better_where_classes_have_unequal_spread():
    spread = [0.6, 1.0, 1.4, 1.8, 2.2]
    for width, apart in ((5, 4.0), (16, 4.0), (64, 5.0)):
        plain = accuracy(ProtoNet(), spread, width, apart, draws=40)
        assert accuracy(HyperProto(metric="gaussian", unbiased=True), spread, width, apart, draws=40) > plain + 0.02


@pytest.mark.parametrize("name", ["distance", "zero", "gaussian", "unbiased"])
def test_where_spreads_are_equal_it_is_a_tie(name):
    found = [accuracy(verbalizer, [1.5] * 4, 4, 8.0) for verbalizer in (SPHERES[name], ProtoNet())]
    assert found[0] == pytest.approx(found[1], abs=0.012)
    assert 0.9 < found[1] < 0.995


# Nearest examples


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_nearest_example_is_that_of_a_loop(metric):
    support, h, classes = seeded(9, 4), seeded(6, 4, seed=1), torch.tensor([2, 0, 1, 2, 2, 0, 2, -1, 0])
    verbalizer = NNShot(each=5, metric=metric, scale=2.0)
    w = started(verbalizer, support, classes, 3)
    assert w["s"].shape == (3, 5, 4)
    assert w["has"].sum(-1).tolist() == [3, 1, 4]
    got = scores(verbalizer, w, h)
    for row, found in zip(h, got, strict=True):
        for c in range(3):
            own = [x for x, y in zip(support, classes.tolist(), strict=True) if y == c]
            near = [-float((row - x) @ (row - x)) for x in own]
            if metric == "cosine":
                near = [float(row @ x / row.norm() / x.norm()) for x in own]
            assert_close(float(found[c]), 2 * max(near), **EXACT)


def test_of_many_examples_those_are_kept_that_are_evenly_spread():
    support, classes = torch.arange(24.0)[:, None], torch.arange(24) % 2
    kept = started(NNShot(each=4), support, classes, 2)
    assert kept["s"][..., 0].tolist() == [[0, 6, 12, 18], [1, 7, 13, 19]]
    assert started(NNShot(each=12), support, classes, 2)["s"][1, :, 0].tolist() == list(range(1, 24, 2))


def test_stored_states_train_only_where_that_is_asked():
    for trains in (False, True):
        model = adapt(zoo.build("bert"), Task("{text} It was {mask}", ["a", "b"], NNShot(each=3, trains=trains)))
        assert model.parameter_count() == (2 * 3 * 16 if trains else 0)
        model.start([Example({"text": "a film"}, "a"), Example({"text": "not"}, "b")])
        assert [p["label"] for p in model.predict(["a film", "not"])] == ["a", "b"]


def test_prototypes_are_those_of_a_loop():
    support, h, classes = seeded(9, 4), seeded(6, 4, seed=1), torch.tensor([2, 0, 1, 2, 2, 0, 2, -1, 0])
    for metric in ("euclidean", "dot"):
        verbalizer = ProtoNet(metric=metric, scale=0.5)
        got = scores(verbalizer, started(verbalizer, support, classes, 3), h)
        for row, found in zip(h, got, strict=True):
            for c in range(3):
                own = [x for x, y in zip(support, classes.tolist(), strict=True) if y == c]
                z = sum(own) / len(own)
                want = (
                    float(row @ z)
                    if metric == "dot"
                    else -sum((float(a) - float(b)) ** 2 for a, b in zip(row, z, strict=True))
                )
                assert_close(float(found[c]), 0.5 * want, **EXACT)


def test_states_far_from_zero_are_measured_as_exactly():
    """Distances are of differences: what all states have in common does not cost digits."""
    h, z = seeded(50, 64).float() + 100, seeded(5, 64, seed=1).float() + 100
    got = scores(ProtoNet(), Weights({"z": z}, False), h)
    want = -(h.double()[:, None] - z.double()).square().sum(-1)
    assert_close(got.double(), want, atol=1e-3, rtol=0)


# Gradients through a start


@pytest.mark.parametrize("name", STARTED)
def test_the_gradient_of_a_query_reaches_the_support(name):
    """Three classes of two, one and three examples."""
    verbalizer, classes = STARTED[name], torch.tensor([0, 0, 1, 2, 2, 2])
    support, query = seeded(6, 4), seeded(5, 4, seed=1)

    def found(x):
        return scores(verbalizer, started(verbalizer, x, classes, 3), query).log_softmax(-1)

    x = support.clone().requires_grad_()
    assert torch.autograd.gradcheck(found, x)
    (grad,) = torch.autograd.grad(cross_entropy(found(x), torch.tensor([0, 1, 2, 2, 0])), x)
    assert grad.isfinite().all()
    assert name.startswith("nn_shot") or grad.any(-1).all()


@pytest.mark.parametrize("name", STARTED)
def test_a_start_is_of_as_many_classes_as_are_asked_for(name):
    """Tensors of another task do not matter but for a map of states, which is of no class."""
    verbalizer, support, h = STARTED[name], seeded(12, 4), seeded(5, 4, seed=1)
    for count in (2, 4):
        classes = torch.arange(12) % count
        other = {n: t for n, t in fresh(verbalizer, setting(7, 4)).items() if n == "w"}
        s = setting(count, 4)
        w = Weights(other, False)
        w = w | verbalizer.start(w, s, NONE[:0], support, classes)
        assert_close(
            verbalizer.scores(w, s, at(h)), scores(verbalizer, started(verbalizer, support, classes, count), h)
        )
        with pytest.raises(ConfigError, match="no training example of 'class 1'"):
            verbalizer.start(w, s, NONE[:0], support, torch.zeros_like(classes) - (classes == 1).long())


@pytest.mark.parametrize("name", [n for n in STARTED if n not in ("dot", "spherical_legacy")])  # products, unscaled
def test_an_encoder_learns_from_episodes(name):
    """A linear encoder, trained by the loss of queries through the start, tells new classes apart better."""
    chance = torch.Generator().manual_seed(0)
    useful = torch.zeros(12)
    useful[:3] = 1.0  # classes differ in three of twelve dimensions
    encoder = (torch.randn(6, 12, generator=chance) / math.sqrt(12)).requires_grad_()
    verbalizer = STARTED[name]
    fixed = {n: t.float() for n, t in fresh(verbalizer, setting(3, 6)).items() if n == "w"}
    if "scale" in vars(verbalizer):
        verbalizer = replace(verbalizer, scale=10.0 if "cosine" in name or name == "cone" else verbalizer.scale)

    def episode():
        centres, classes = 2 * torch.randn(3, 12, generator=chance) * useful, torch.arange(12) % 3
        x, y = (centres[classes] + torch.randn(12, 12, generator=chance) * (1.5 - useful) for _ in range(2))
        w = Weights(fixed, True)
        w = w | verbalizer.start(w, setting(3, 6), NONE[:0], x @ encoder.T, classes)
        found = verbalizer.scores(w, setting(3, 6), at(y @ encoder.T))
        return cross_entropy(found, classes), float((found.argmax(-1) == classes).float().mean())

    def tested():
        with torch.no_grad():
            return sum(episode()[1] for _ in range(100)) / 100

    before, optimizer = tested(), torch.optim.Adam([encoder], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        episode()[0].backward()
        optimizer.step()
    assert tested() > before + 0.05


# ProtoRE's losses


def settled(count, width, scale):
    """Free directions of statements and prototypes where S2Z of both directions is least; the prototypes' cosines."""
    x, z = seeded(4 * count, width).requires_grad_(), seeded(count, width, seed=1).requires_grad_()
    classes, optimizer = torch.arange(4 * count) % count, torch.optim.Adam([x, z], lr=0.05)
    for _ in range(600):
        odds = log_odds(z, x, scale)
        optimizer.zero_grad()
        (s2z(odds, classes, "statements") + s2z(odds, classes, "prototypes")).backward()
        optimizer.step()
    unit = normalize(z.detach(), dim=-1)
    return (unit @ unit.T)[~torch.eye(count, dtype=torch.bool)], torch.cosine_similarity(x.detach(), unit[classes])


@pytest.mark.parametrize(("count", "width", "scale"), [(2, 4, 2.0), (3, 2, 2.0), (4, 3, 5.0), (5, 8, 1.0)])
def test_prototypes_of_statements_form_a_simplex(count, width, scale):
    """Every two prototypes have the cosine −1 / (C − 1), and statements lie on theirs."""
    cosines, own = settled(count, width, scale)
    assert_close(cosines, torch.full_like(cosines, -1 / (count - 1)), atol=1e-2, rtol=0)
    assert (own > 0.999).all()


def test_a_large_scale_and_dimensions_to_spare_part_statements_from_prototypes():
    """What pulls is satisfied early, and one direction that all statements avoid pushes every foreign pair apart."""
    cosines, own = settled(5, 8, 10.0)
    assert (cosines > 0).all()
    assert (own < 0.7).all()


def test_without_a_temperature_what_pulls_has_a_floor():
    floor = -math.log(1 / (1 + math.exp(-1)))
    assert floor == pytest.approx(0.3133, abs=1e-4)
    z = normalize(seeded(1, 8), dim=-1)
    for x in (z * 5, seeded(20, 8)):
        odds = log_odds(z, x, scale=1.0)
        pull = s2z(odds, torch.zeros(len(x), dtype=torch.long), "statements")
        assert pull >= floor - 1e-12
    assert_close(float(s2z(log_odds(z, z, 1.0), torch.tensor([0]), "statements")), floor, **EXACT)
    assert s2z(log_odds(z, z, 20.0), torch.tensor([0]), "statements") < 1e-8


def sigma(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("legacy", [False, True])
def test_s2z_is_that_of_a_loop_in_both_directions(legacy):
    odds, classes = 2 * seeded(7, 4), [0, 0, 2, 3, -1, 3, 2]  # class 1 has no statement, one statement no class
    more = 1e-5 if legacy else 0.0
    own = lambda i, c: math.log(sigma(float(odds[i, c])) + more)  # noqa: E731
    foreign = lambda i, c: math.log(1 - sigma(float(odds[i, c])) + more)  # noqa: E731
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    by_prototype = [
        mean([own(i, c) for i, y in enumerate(classes) if y == c])
        + mean([foreign(i, c) for i, y in enumerate(classes) if y != c])
        for c in (0, 2, 3)
    ]
    by_statement = [
        own(i, y) + mean([foreign(i, c) for c in range(4) if c != y]) for i, y in enumerate(classes) if y >= 0
    ]
    for over, want in (("statements", by_prototype), ("prototypes", by_statement)):
        got = s2z(odds, torch.tensor(classes), over, legacy=legacy)
        assert_close(float(got), -mean(want), **EXACT)


def test_the_official_losses_of_a_bag():
    """Eight statements of a relation and eight of others, states of 1536 numbers; each number by the official rule."""
    own, others, z = 0.5 + 0.05 * seeded(8, 1536), 0.45 + 0.05 * seeded(8, 1536, seed=1), 0.5 + seeded(1536, seed=2) / 9
    h, bag = torch.cat([own, others]), torch.tensor([0] * 8 + [-1] * 8)
    dot = lambda a, b: sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True))  # noqa: E731
    d = [1 - 1 / (1 + math.exp((dot(x, z) - 384) / 100)) for x in h]
    want = -sum(math.log(p + 1e-5) for p in d[:8]) / 8 - sum(math.log(1 - p + 1e-5) for p in d[8:]) / 8
    got = s2z(log_odds(z[None], h, 1.0, legacy=True), bag, "statements", legacy=True)
    assert_close(float(got), want, **EXACT)
    want = 0.0
    for i in range(8):
        near = math.exp(dot(own[i], own[7 - i]) / 100)
        far = sum(math.exp(dot(own[i], x) / 100) for x in others)
        want -= math.log(near / (near + far) + 1e-5) / 8
    assert_close(float(s2s(h, bag, 10.0, legacy=True)), want, **EXACT)


def test_official_pairs_are_reversed_within_each_class():
    h, classes = 4 * seeded(7, 5), [1, 0, 1, 1, 0, 1, 0]
    want = 0.0
    for i, y in enumerate(classes):
        alike = [j for j, other in enumerate(classes) if other == y]
        near = math.exp(float(h[i] @ h[alike[-1 - alike.index(i)]]) / 100)
        far = sum(math.exp(float(h[i] @ h[j]) / 100) for j, other in enumerate(classes) if other != y)
        want -= math.log(near / (near + far) + 1e-5) / 7
    assert_close(float(s2s(h, torch.tensor(classes), 1.0, legacy=True)), want, **EXACT)


def test_statements_are_contrasted_as_directions():
    h, classes = seeded(6, 4), torch.tensor([0, 1, 0, 1, 2, 2])
    assert torch.equal(s2s(h, classes, 5.0), contrast(normalize(h, dim=-1), classes, 5.0))
    assert_close(s2s(h, classes, 5.0), s2s(3 * h, classes, 5.0), **EXACT)


def test_losses_of_one_class_only_are_finite():
    h, one = seeded(3, 4).requires_grad_(), torch.zeros(3, dtype=torch.long)
    for legacy in (False, True):
        odds = log_odds(seeded(2, 4, seed=1), h, 2.0, legacy=legacy)
        ways = [s2z(odds, one, over, legacy=legacy) for over in ("statements", "prototypes")]
        total = sum(ways) + s2s(h, one, 2.0, legacy=legacy) + s2z(odds, one - 1, "statements", legacy=legacy)
        (grad,) = torch.autograd.grad(total, h)
        assert grad.isfinite().all()


@pytest.mark.parametrize("legacy", [False, True])
def test_the_loss_of_spherical_prototypes_is_the_sum_of_its_parts(legacy):
    h, classes, s = 3 * seeded(8, 5), torch.tensor([0, 1, 2, 2, 1, 0, 0, 0]), setting(3, 5)
    w = Weights({"z": seeded(3, 5, seed=1), "weight": seeded(3, 5, seed=2), "bias": seeded(3, seed=3)}, True)
    verbalizer = SphericalPrototypes(scale=4.0, s2z=0.3, cls=0.7, s2s=2.0, legacy=legacy)
    odds = verbalizer.scores(w, s, at(h))
    z = w["z"] if legacy else normalize(w["z"], dim=-1)
    assert_close(odds, (h @ z.T - 384) / 100 if legacy else 4 * normalize(h, dim=-1) @ z.T, **EXACT)
    near = s2z(odds, classes, "statements", legacy=legacy)
    near = near if legacy else near + s2z(odds, classes, "prototypes")
    told = [cross_entropy(w["weight"] @ z[c] + w["bias"], torch.tensor(c)) for c in range(3)]
    apart = sum(told[c] for c in classes.tolist()) / 8 if legacy else sum(told) / 3
    assert_close(told_apart(z, w["weight"], w["bias"], torch.arange(3)), sum(told) / 3, **EXACT)
    want = 0.3 * near + 0.7 * apart + 2.0 * s2s(h, classes, 4.0, legacy=legacy)
    assert_close(verbalizer.loss(w, s, at(h), odds, classes), want, **EXACT)
    noise = verbalizer.noise_score(w, h, classes)
    assert_close(noise, torch.stack([1 - odds[i, c].sigmoid() for i, c in enumerate(classes.tolist())]), **EXACT)


def above(low, high):
    """How often one of `high` is above one of `low`: the area under the curve."""
    return float((high[:, None] > low).double().mean() + 0.5 * (high[:, None] == low).double().mean())


def test_flipped_labels_have_a_high_noise_score():
    found = {}
    for share in (0.05, 0.2, 0.4):
        chance = torch.Generator().manual_seed(3)
        true = torch.arange(400) % 4
        h = torch.randn(4, 16, generator=chance)[true] + 1.2 * torch.randn(400, 16, generator=chance)
        flipped = torch.rand(400, generator=chance) < share
        given = torch.where(flipped, (true + torch.randint(1, 4, (400,), generator=chance)) % 4, true)
        verbalizer, s = SphericalPrototypes(), setting(4, 16)
        w = {n: t.float() for n, t in started(verbalizer, h.double(), given, 4).items()}
        w = {n: t.clone().requires_grad_() for n, t in w.items()}
        optimizer = torch.optim.Adam(w.values(), lr=0.01)
        for _ in range(100):
            optimizer.zero_grad()
            seen = Weights(w, True)
            verbalizer.loss(seen, s, at(h), verbalizer.scores(seen, s, at(h)), given).backward()
            optimizer.step()
        noise = verbalizer.noise_score(Weights(w, False), h, given).detach()
        found[share] = above(noise[~flipped], noise[flipped])
    assert found[0.05] > 0.9
    assert found[0.2] > 0.85
    assert found[0.4] > 0.75
    assert found[0.05] > found[0.4]


# In a model

LABELS = ("up", "down", "so")
TEXTS = ["good", "a good film and a great plot", "not", "the cat sat on the mat ; it was bad", "no", "a film"]
EXAMPLES = [Example({"text": text}, LABELS[i % 3]) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("name", NEW)
def test_what_is_saved_opens_as_it_was(name, tmp_path):
    model = adapt(zoo.build("bert"), Task("{text} It was {mask}", LABELS, NEW[name]))
    model.start(EXAMPLES)
    want = model.probabilities(EXAMPLES)
    model.save(tmp_path)
    again = open_(tmp_path, zoo.build("bert"))
    assert again.verbalizer == NEW[name]
    assert torch.equal(again.probabilities(EXAMPLES), want)
    assert len({tuple(row) for row in want.tolist()}) > 1


@pytest.mark.parametrize("name", NEW)
def test_each_row_may_be_of_another_adaptation(name):
    model = Model(zoo.build("bert", torch.float64), Task("{text} It was {mask}", LABELS, NEW[name]), [], range(3))
    for slot in range(3):
        model.start(EXAMPLES[slot:], slot)
    batch, index = model.features.collate(model.encode(EXAMPLES)), torch.tensor([2, 0, 1, 1, 2, 0])
    with torch.no_grad():
        mixed = model(batch, index)["logits"]
        alone = torch.stack([model(batch, slot)["logits"][i] for i, slot in enumerate(index.tolist())])
        assert not torch.allclose(model(batch, 0)["logits"], model(batch, 1)["logits"])
    assert_close(mixed, alone, **EXACT)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: HyperProto(metric="sphere"), "metric = 'sphere' is not possible; possible: distance, cone, gaussian"),
        (lambda: HyperProto(inside="out"), "inside = 'out' is not possible; possible: signed, zero, abs"),
        (lambda: HyperProto(radius="exp"), "radius = 'exp' is not possible; possible: raw, abs, softplus"),
        (lambda: HyperProto(scale=0), "hyper_proto: got scale=0; scale > 0 is possible"),
        (lambda: HyperProto(metric="cone", inside="zero"), "inside='zero' is of the metric 'distance'; leave one"),
        (lambda: HyperProto(metric="cone", unit=True), "hyper_proto: a cone sees only directions; leave unit out"),
        (lambda: HyperProto(one_shot=-1), "hyper_proto: got one_shot=-1; 0 or more is possible"),
        (lambda: HyperProto(one_shot=math.nan), "got one_shot=nan; 0 or more"),
        (lambda: HyperProto(metric="gaussian", one_shot=0.0), "got one_shot=0.0; above 0 is possible"),
        (lambda: ProtoNet(metric="cosine"), "metric = 'cosine' is not possible; possible: euclidean, dot"),
        (lambda: ProtoNet(scale=-1), "proto_net: got scale=-1"),
        (lambda: NNShot(metric="dot"), "metric = 'dot' is not possible; possible: euclidean, cosine"),
        (lambda: NNShot(each=0), "nn_shot: got each=0; each >= 1 is possible"),
        (lambda: NNShot(scale=math.inf), "nn_shot: got scale=inf"),
        (lambda: SphericalPrototypes(scale=0), "spherical_prototypes: got scale=0"),
        (lambda: SphericalPrototypes(s2z=0), "got s2z=0, cls=0.5, s2s=1.0; possible: s2z > 0"),
        (lambda: SphericalPrototypes(cls=-1), "got s2z=0.5, cls=-1, s2s=1.0"),
    ],
)
def test_impossible_options_are_said(made, message):
    with pytest.raises(ConfigError, match=message):
        made()
