"""Several deltas together, their order, slots and seeds, tied weights, and what is refused."""

import copy
import re

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from deltaprompt.backbone import attention
from deltaprompt.compose import Adapted, Routing, Stack
from deltaprompt.deltas.adapter import Adapter
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.ia3 import IA3
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError, SiteError
from deltaprompt.params import Param, normal
from tests import backbones_zoo as zoo
from tests.backbones_zoo import inputs_of

DOWN = "layers[0].ffn.down"


@torch.no_grad()
def shake(adapted):
    g = torch.Generator().manual_seed(5)
    for _, p in adapted.parts():
        p.add_(torch.randn(p.shape, generator=g).to(p), alpha=0.3)
    return adapted


def adapted_to(family, *deltas, slots=1, dtype=torch.float64):
    return shake(Adapted(zoo.build(family, dtype), deltas, slots))


def passed(adapted, path):
    """(x, y) of the module at `path` as the model around it sees them."""
    seen = []
    module = adapted.model.get_submodule(path)
    before = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]) or None, prepend=True)
    after = module.register_forward_hook(lambda m, args, y: seen.append(y) or None)
    with torch.no_grad():
        adapted.states(inputs_of(adapted.backbone))
    before.remove()
    after.remove()
    return seen


def slots_of(adapted):
    return {name: p[0].detach() for name, p in adapted.parts()}


LORA, IA3_IN, IA3_OUT = LoRA(2, 4.0, at=(DOWN,)), IA3((), (DOWN,)), IA3((DOWN,), ())


@pytest.mark.parametrize(
    ("deltas", "formula"),
    [
        ((LORA, IA3_OUT), lambda f, x, w: (f(x) + 2 * x @ w["0.a"].T @ w["0.b"].T) * w["1.l"]),
        ((IA3_OUT, LORA), lambda f, x, w: f(x) * w["0.l"] + 2 * x @ w["1.a"].T @ w["1.b"].T),
        ((LORA, IA3_IN), lambda f, x, w: f(x * w["1.l_in"]) + 2 * (x * w["1.l_in"]) @ w["0.a"].T @ w["0.b"].T),
        ((IA3_IN, LORA), lambda f, x, w: f(x * w["0.l_in"]) + 2 * x @ w["1.a"].T @ w["1.b"].T),
        ((LORA, LORA), lambda f, x, w: f(x) + 2 * sum(x @ w[f"{i}.a"].T @ w[f"{i}.b"].T for i in range(2))),
        ((IA3_IN, IA3_IN), lambda f, x, w: f(x * w["1.l_in"] * w["0.l_in"])),
    ],
)
def test_deltas_at_one_site_lie_around_one_another(deltas, formula):
    adapted = adapted_to("bert", *deltas)
    inputs = inputs_of(adapted.backbone)
    path = adapted.backbone.sites["layers.0.ffn.down"].path
    x, y = passed(adapted, path)
    weights = {name.replace("layers.0.ffn.down.", ""): t for name, t in slots_of(adapted).items()}
    module = adapted.model.get_submodule(path)
    assert_close(y, formula(lambda x: functional.linear(x, module.weight, module.bias), x, weights))
    states = adapted.states(inputs)
    assert_close(adapted.merge().states(inputs), states)


def test_the_order_of_a_map_and_an_adapter_counts():
    found = []
    for deltas in ((LORA, Adapter(4, at=(DOWN,))), (Adapter(4, at=(DOWN,)), LORA)):
        adapted = Adapted(zoo.build("bert"), deltas)
        with torch.no_grad():
            for _, p in sorted(adapted.parts(), key=lambda part: part[0][1:]):
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        found.append(adapted.states(inputs_of(adapted.backbone)))
    assert not torch.allclose(*found)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "modernbert", "gpt_neox"])
def test_a_delta_on_a_part_of_a_fused_map_leaves_the_other_parts_alone(family):
    adapted = adapted_to(family, LoRA(at=("layers[0].attn.k",)))
    sites = adapted.backbone.sites
    path = sites["layers.0.attn.k"].path
    x, y = passed(adapted, path)
    with torch.no_grad():
        adapted.remove()
        plain = adapted.model.get_submodule(path)(x)
    for part in "qkv":
        take = sites[f"layers.0.attn.{part}"].part.take
        assert torch.equal(take(y), take(plain)) == (part != "k")


def test_all_at_once_mixed_is_each_alone():
    deltas = [LoRA(), Adapter(), IA3(), BitFit(), Prefix(), SoftPrompt(4)]
    adapted = adapted_to("qwen3", *deltas, slots=3)
    inputs = inputs_of(adapted.backbone)
    inputs["input_ids"][:, 1] = adapted.backbone.vocabulary + 2
    mixed = adapted.states(inputs, torch.tensor([2, 0]))
    for row, slot in enumerate((2, 0)):
        assert_close(mixed[row], adapted.states(inputs, slot)[row])
    before = zoo.build("qwen3", torch.float64)
    plain = inputs_of(before)
    assert torch.equal(adapted.remove().states(plain), before.states(plain))


def test_two_soft_prompts_keep_to_their_rows():
    adapted = adapted_to("bert", SoftPrompt(3), SoftPrompt(2, first=3))
    embed, vocabulary = adapted.model.get_input_embeddings(), adapted.backbone.vocabulary
    ids = torch.tensor([[9, *range(vocabulary, vocabulary + 5), 9]])
    p = slots_of(adapted)
    seen = embed(ids)[0]
    assert torch.equal(seen[1:4], p["0.embed.p"])
    assert torch.equal(seen[4:6], p["1.embed.p"])
    assert torch.equal(seen[[0, 6]], embed.weight[[9, 9]])


def test_a_virtual_token_with_a_words_embedding_is_the_word():
    adapted = adapted_to("gemma", SoftPrompt(3))
    inputs = inputs_of(adapted.backbone)
    before = adapted.states(inputs)
    with torch.no_grad():
        adapted.patches[0].tensors["p"][0, 1] = adapted.model.get_input_embeddings()(inputs["input_ids"][0, 2])
    inputs["input_ids"][0, 2] = adapted.backbone.vocabulary + 1
    assert torch.equal(adapted.states(inputs), before)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "gemma"])
def test_tied_weights_stay_tied_and_are_not_merged_into(family):
    adapted = adapted_to(family, LoRA(at=("head",)), slots=2)
    backbone, inputs, rows = adapted.backbone, inputs_of(adapted.backbone), torch.tensor([1, 7])
    tied = backbone.model.get_input_embeddings().weight
    assert backbone.head.out.weight is tied
    logits = adapted(**inputs, adaptation=1).logits
    states = adapted.states(inputs, 1)
    assert_close(backbone.head.logits(states, rows), logits[..., rows])
    mixed = adapted(**inputs, adaptation=torch.tensor([1, 0])).logits
    assert_close(mixed[0], logits[0])
    with pytest.raises(SiteError, match="cannot be merged at head: its weight is also that of"):
        adapted.merge()
    assert adapted.remove().head.out.weight is tied


@pytest.mark.parametrize("family", ["qwen3", "opt", "gemma3"])
def test_rows_are_told_apart_whichever_way_a_site_lays_them_out(family):
    """OPT's feed-forward maps see [b * s, d], the norms of queries in Qwen 3 see [b, s, heads, size]."""
    adapted = adapted_to(family, BitFit(), slots=2)
    inputs = inputs_of(adapted.backbone)
    mixed = adapted.states(inputs, torch.tensor([1, 0]))
    assert_close(mixed[1], adapted.states(inputs, 0)[1])
    assert_close(mixed[0], adapted.states(inputs, 1)[0])


def test_slots_start_from_their_seeds_alone():
    def started(seeds):
        return dict(Adapted(zoo.build("bert"), [Prefix(3)], len(seeds), seeds).parts())

    one, three = started([7]), started([8, 7, 8])
    for name, p in one.items():
        assert torch.equal(p[0], three[name][1])
        assert torch.equal(three[name][0], three[name][2])
        assert not torch.equal(three[name][0], three[name][1])
    starts = [p[0].flatten() for p in one.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


@pytest.mark.parametrize(("slots", "seeds"), [(0, None), (2, [1]), (1, []), (1, [1, 2])])
def test_slots_without_a_seed_each_are_an_error(slots, seeds):
    with pytest.raises(ConfigError, match="one or more slots, and a seed for each, are possible"):
        Adapted(zoo.build("bert"), [LoRA()], slots, seeds)


def test_an_adaptation_that_is_not_there_is_an_error():
    adapted = adapted_to("bert", LoRA(), slots=2)
    inputs = inputs_of(adapted.backbone)
    for index in (2, -1):
        with pytest.raises(ConfigError, match=re.escape(f"adaptation {index} was named; 0 to 1 are possible")):
            adapted(**inputs, adaptation=index)
    with pytest.raises(ConfigError, match="3 adaptations were named for 2 rows"):
        adapted.states(inputs, torch.tensor([0, 1, 1]))
    assert torch.equal(adapted.states(inputs), adapted.states(inputs, 0))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([0, -1]), "adaptation -1 was named; 0 to 1 are possible"),
        (torch.tensor([0, 7]), "adaptation 7 was named; 0 to 1 are possible"),
        (torch.tensor([0.0, 1.0]), "one adaptation a row is a tensor of whole numbers [rows]; got float32 [2]"),
        (torch.tensor(1), "a tensor of whole numbers [rows]; got int64 []"),
        ([0, 1], "adaptation is a number, or a tensor of one a row, and not [0, 1]"),
        (True, "and not True"),
    ],
)
def test_an_adaptation_that_is_no_number_of_one_is_an_error(index, message):
    adapted = adapted_to("bert", LoRA(), slots=2)
    with pytest.raises(ConfigError, match=re.escape(message)):
        adapted.states(inputs_of(adapted.backbone), index)


@pytest.mark.parametrize("deltas", [LoRA(), ["lora"], [LoRA], "lora"])
def test_deltas_that_are_no_list_of_instances_are_an_error(deltas):
    with pytest.raises(ConfigError, match=re.escape("a list of instances, such as [dp.LoRA(rank=8)]; got ")):
        Adapted(zoo.build("bert"), deltas)


def test_what_is_removed_computes_no_layers_again():
    adapted = adapted_to("bert", LoRA())
    adapted.remove()
    with pytest.raises(ConfigError, match="merged or removed"):
        adapted.checkpointing()


def test_rows_that_stand_for_several():
    adapted = adapted_to("bert", LoRA(), slots=2)
    inputs = inputs_of(adapted.backbone)
    twice = {n: t.repeat_interleave(2, 0) for n, t in inputs.items()}
    expected = adapted.states(inputs, torch.tensor([1, 0])).repeat_interleave(2, 0)
    with adapted.repeated(2):
        assert_close(adapted.backbone.states(twice), expected)
    assert adapted.routing.index.tolist() == [1, 0]
    adapted.routing.index = 1
    with adapted.repeated(2):
        assert adapted.routing.index == 1


def test_an_interrupted_pass_does_not_hinder_a_copy():
    adapted = adapted_to("bert", LoRA())

    def fail(*_):
        raise InterruptedError

    handle = adapted.model.get_submodule(adapted.backbone.sites["layers.1.attn.v"].path).register_forward_hook(
        fail, prepend=True
    )
    with pytest.raises(InterruptedError):
        adapted.states(inputs_of(adapted.backbone))
    handle.remove()
    assert copy.deepcopy(adapted).states(inputs_of(adapted.backbone)).isfinite().all()


def test_parts_have_names_of_their_own():
    adapted = Adapted(zoo.build("bert"), [LORA, LORA, BitFit(at=(DOWN,))])
    site = "layers.0.ffn.down"
    assert [name for name, _ in adapted.parts()] == [
        f"0.{site}.a", f"0.{site}.b", f"1.{site}.a", f"1.{site}.b", f"2.{site}.bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (LoRA(at=("attn.qq",)), "selector 'attn.qq' matches no site of this backbone; did you mean 'attn.q'"),
        (LoRA(at=("attn",)), "LoRA acts on sites of kind linear; 'attn' is of kind attn"),
        (LoRA(at=("attn.q", "embed")), "LoRA acts on sites of kind linear; 'embed' is of kind embed"),
        (LoRA(at=()), "LoRA finds no site on this backbone: nothing that [] speak of is there"),
        (Prefix(at=("attn.q",)), "Prefix acts on sites of kind attn; 'attn.q' is of kind linear"),
        (IA3(at=(), at_input=("attn.q",)), "ia3: what enters layers.0.attn.q also enters the other parts"),
    ],
)
def test_a_delta_that_cannot_act_is_refused_and_changes_nothing(delta, message):
    backbone = zoo.build("gpt2")
    with pytest.raises(SiteError, match=re.escape(message)):
        Adapted(backbone, [LoRA(), delta])
    assert all(p.requires_grad for p in backbone.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())


def test_a_prefix_needs_an_attention_it_knows():
    backbone = zoo.build("llama")
    backbone.model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        SiteError, match="need the attention implementation 'sdpa' or 'eager'; this backbone runs 'flash"
    ):
        Adapted(backbone, [Prefix()])
    assert all(p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f not in ("gemma2",) and "mpnet" not in f])
@torch.no_grad()
def test_a_prefix_is_the_same_under_either_attention(family):
    if family.startswith("deberta"):
        pytest.skip("attention of its own")
    found = []
    for implementation in ("eager", "sdpa"):
        backbone = zoo.build(family)
        backbone.model.set_attn_implementation(implementation)
        inputs = {n: t for n, t in inputs_of(backbone).items() if not n.endswith("mask")}
        masked = inputs_of(backbone)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        adapted = shake(Adapted(backbone, [Prefix(3)]))
        assert backbone.model.config._attn_implementation == attention.PREFIX + implementation
        found.append((adapted.states(inputs), adapted.states(masked)))
    assert_close(*found, rtol=0, atol=1e-5)


def test_a_stack_alone_has_slots_too():
    routing = Routing()
    stack = Stack({"p": Param((2, 3), normal(1.0))}, 2, routing, torch.zeros(1))
    stack.start([1, 2])
    assert torch.equal(stack.weights(5)["p"], stack.slot(0)["p"])
    with routing.at(torch.tensor([1, 0, 1])):
        assert torch.equal(stack.weights(3)["p"][0], stack.slot(1)["p"])
    assert routing.index is None
