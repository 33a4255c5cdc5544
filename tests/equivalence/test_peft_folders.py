"""Folders of PEFT: what peft writes gives the same scores here, and what is written here gives them in peft."""

import json

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from deltaprompt.compose import Adapted
from deltaprompt.deltas._position_shift import PositionShift
from deltaprompt.deltas.dora import DoRA
from deltaprompt.deltas.ia3 import IA3
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.p_tuning import PTuning
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.reparametrised_prefix import ReparametrisedPrefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import SiteError, StoreError
from deltaprompt.interchange import open_peft, save_peft
from deltaprompt.model import Model, Task
from deltaprompt.model.saved import open_
from tests import backbones_zoo as zoo

pytest.importorskip("peft")

from tests.peft_zoo import FAMILIES, LENGTH, METHODS, config_of, made, opened, rows, scores

CLOSE = {"rtol": 0, "atol": 1e-5}
SAME = {"rtol": 0, "atol": 1e-9}  # in double precision
every = pytest.mark.parametrize("family", FAMILIES)
each = pytest.mark.parametrize("method", METHODS)


def ours(method, family):
    """Our deltas of a method, as a user would choose them."""
    selectors = ("attn.q", "attn.v", "ffn.down")  # on GPT-2, q and v have an A each
    decoder = ("decoder.*.attn",) if family == "t5" else ("attn",)
    shift = [PositionShift(LENGTH)] if family in ("bert", "gpt2") else []
    return {
        "lora": [LoRA(rank=3, alpha=5.0, at=selectors)],
        "dora": [DoRA(rank=3, alpha=5.0, at=selectors)],
        "ia3": [IA3()],
        "prompt": [SoftPrompt(LENGTH)],
        "prefix": [Prefix(LENGTH, at=decoder), *shift],
    }[method]


@torch.no_grad()
def shaken(adapted, seed=7):
    g = torch.Generator().manual_seed(seed)
    for _, p in adapted.parts():
        p.add_(torch.randn(p.shape, generator=g).to(p), alpha=0.5)
    return adapted.eval()


def config_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_in(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


# The four methods on the four families, both ways


@each
@every
def test_what_peft_writes_opens_here(method, family, tmp_path):
    theirs = made(family, config_of(method, family))
    theirs.save_pretrained(tmp_path)
    plain = scores(zoo.build(family).model, family)
    adapted = open_peft(tmp_path, zoo.build(family))
    found, expected = scores(adapted, family, method == "prompt"), scores(theirs, family)
    assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, plain, atol=0.01)


@each
@every
def test_what_is_written_here_opens_in_peft(method, family, tmp_path):
    adapted = shaken(Adapted(zoo.build(family), ours(method, family), slots=2))
    for slot in (0, 1):
        written = save_peft(adapted, tmp_path / str(slot), slot)
        assert written == sum(p.stat().st_size for p in (tmp_path / str(slot)).iterdir())
        found = scores(adapted, family, method == "prompt", adaptation=slot)
        assert_close(found, scores(opened(tmp_path / str(slot), family), family), **CLOSE)
    assert not torch.allclose(found, scores(adapted, family, method == "prompt", adaptation=0), atol=0.01)


@each
@every
def test_a_folder_of_pefts_comes_back_as_it_was(method, family, tmp_path):
    theirs = made(family, config_of(method, family))
    theirs.save_pretrained(tmp_path / "theirs")
    save_peft(open_peft(tmp_path / "theirs", zoo.build(family)), tmp_path / "back")
    assert_close(scores(opened(tmp_path / "back", family), family), scores(theirs, family), **CLOSE)
    before, after = (tensors_in(tmp_path / name) for name in ("theirs", "back"))
    if (method, family) in (("prompt", "t5"), ("prefix", "t5")):  # peft keeps rows that it does not use
        return
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert_close(after[name], tensor, rtol=0, atol=1e-6 if method == "prefix" else 0)
    asked, got = (config_in(tmp_path / name) for name in ("theirs", "back"))
    for field in ("r", "lora_alpha", "fan_in_fan_out", "task_type", "num_virtual_tokens", "token_dim", "num_layers"):
        assert got.get(field, asked.get(field)) == asked.get(field)
    for field in ("target_modules", "feedforward_modules"):
        assert set(got.get(field) or ()) == set(asked.get(field) or ())


@each
@every
def test_training_goes_on_from_a_folder(method, family, tmp_path):
    made(family, config_of(method, family)).save_pretrained(tmp_path)
    adapted = open_peft(tmp_path, zoo.build(family)).train()
    inputs = rows(adapted.backbone, LENGTH if method == "prompt" else 0)
    optimizer = torch.optim.Adam([p for _, p in adapted.parts()], lr=0.02)
    losses = []
    for _ in range(5):
        loss = adapted(**inputs)[0].tanh().square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for _, p in adapted.parts())
    assert losses == sorted(losses, reverse=True)


# With a task


TASK = Task("{text} It was {mask}.", {"bad": "no", "good": "yes"})


@each
@every
def test_a_folder_with_a_task_is_a_model_that_is_kept(method, family, tmp_path):
    made(family, config_of(method, family)).save_pretrained(tmp_path / "theirs")
    backbone = zoo.build(family)
    model = open_peft(tmp_path / "theirs", backbone, TASK)
    assert isinstance(model, Model)
    batch = next(iter(model.features.batches(model.encode(_examples()), 2)))
    expected = model(batch)["logits"]
    model.save(tmp_path / "ours")
    save_peft(model, tmp_path / "back")
    model.adapted.remove()
    again = open_(tmp_path / "ours", backbone)
    assert again.features.max_length == model.features.max_length
    assert torch.equal(again(batch)["logits"], expected)
    again.adapted.remove()
    once_more = open_peft(tmp_path / "back", backbone, TASK)
    assert_close(once_more(batch)["logits"], expected, **CLOSE)


def _examples():
    from deltaprompt.types import Example

    return [Example({"text": text}) for text in ("a film", "the best of all the days")]


def test_prototypes_have_their_start(tmp_path):
    """From the sentences that describe the labels, as seen with the adapter."""
    theirs = made("bert-encoder", config_of("lora", "bert-encoder", target_modules=["query"]))
    theirs.save_pretrained(tmp_path)
    task = Task("{text}", {"bad": "it is bad", "good": "it is good"})
    model = open_peft(tmp_path, zoo.build("bert-encoder"), task)
    first = {name: t.clone() for name, t in model.scorer.tensors.items()}
    model.start([])
    assert first
    assert all(torch.equal(model.scorer.tensors[name], t) and t.any() for name, t in first.items())


def test_a_text_leaves_room_for_moved_positions(tmp_path):
    made("gpt2", config_of("prefix", "gpt2")).save_pretrained(tmp_path)
    model = open_peft(tmp_path, zoo.build("gpt2"), TASK)
    assert model.features.max_length == model.backbone.max_length - LENGTH
    assert model.predict(["word " * 200])[0]["label"] in TASK.names


# LoRA


FUSED = {
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "modernbert": ["Wqkv", "Wi"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", FUSED)
def test_a_fused_map_has_one_lora_there_and_one_a_part_here(method, family, tmp_path):
    theirs = made(family, config_of(method, family, target_modules=FUSED[family]), dtype=torch.float64)
    theirs.save_pretrained(tmp_path / "theirs")
    adapted = open_peft(tmp_path / "theirs", zoo.build(family, torch.float64))
    assert_close(scores(adapted, family), scores(theirs, family), **SAME)
    save_peft(adapted, tmp_path / "back")
    before, after = (tensors_in(tmp_path / name) for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("delta", [LoRA, DoRA])
@pytest.mark.parametrize("family", ["gpt2", *FUSED])
def test_parts_with_an_a_each_become_one_lora_of_their_ranks_together(delta, family, tmp_path):
    """Also where a part is left out, and where parts have ranks and scales of their own."""
    first = delta(rank=2, alpha=5.0, at=("attn.q",))
    second = delta(rank=3, alpha=1.0, rank_stabilised=True, at=("attn.v", "attn.o"))
    adapted = shaken(Adapted(zoo.build(family), [first, second]))
    save_peft(adapted, tmp_path)
    assert_close(scores(adapted, family), scores(opened(tmp_path, family), family), **CLOSE)
    path = adapted.backbone.sites["layers.0.attn.q"].path
    tensors = tensors_in(tmp_path)
    assert tensors[f"base_model.model.{path}.lora_A.weight"].shape[0] == 5
    assert tensors[f"base_model.model.{adapted.backbone.sites['layers.0.attn.o'].path}.lora_A.weight"].shape[0] == 3
    adapted.remove()
    again = open_peft(tmp_path, adapted.backbone)
    assert_close(scores(again, family), scores(opened(tmp_path, family), family), **CLOSE)


def test_loras_at_one_site_are_added(tmp_path):
    deltas = [LoRA(rank=2, alpha=5.0, at=("attn.q",)), LoRA(rank=1, alpha=0.0), LoRA(rank=3, alpha=4.0, at=("attn.*",))]
    adapted = shaken(Adapted(zoo.build("llama"), deltas))
    save_peft(adapted, tmp_path)
    assert_close(scores(adapted, "llama"), scores(opened(tmp_path, "llama"), "llama"), **CLOSE)


@pytest.mark.parametrize("stabilised", [False, True])
def test_rank_and_alpha_patterns(stabilised, tmp_path):
    patterns = {
        "rank_pattern": {"^model.layers.1.self_attn.q_proj": 2, "down_proj": 5},
        "alpha_pattern": {"layers.0.mlp.down_proj": 12, "v_proj": 2.5},
    }
    theirs = made("llama", config_of("lora", "llama", use_rslora=stabilised, **patterns))
    theirs.save_pretrained(tmp_path / "theirs")
    adapted = open_peft(tmp_path / "theirs", zoo.build("llama"))
    expected = scores(theirs, "llama")
    assert_close(scores(adapted, "llama"), expected, **CLOSE)
    settings = {(d.rank, d.alpha, d.rank_stabilised) for d in adapted.deltas}
    assert settings == {(r, a, stabilised) for r, a in ((4, 6.0), (2, 6.0), (4, 2.5), (5, 12.0), (5, 6.0))}
    save_peft(adapted, tmp_path / "back")
    got = config_in(tmp_path / "back")
    assert (got["r"], got["lora_alpha"], got["use_rslora"]) == (4, got["lora_alpha"], stabilised)
    assert got["rank_pattern"]
    assert got["alpha_pattern"]
    assert_close(scores(opened(tmp_path / "back", "llama"), "llama"), expected, **CLOSE)


@pytest.mark.parametrize("delta", [LoRA, DoRA])
def test_uniform_has_one_rank_and_scale(delta, tmp_path):
    deltas = [
        delta(rank=2, alpha=5.0, at=("attn.q",)),
        delta(rank=3, alpha=1.0, at=("ffn.up",)),
        delta(rank=4, alpha=0.0, at=("attn.k",)),
    ]
    adapted = shaken(Adapted(zoo.build("llama"), deltas))
    save_peft(adapted, tmp_path, uniform=True)
    got = config_in(tmp_path)
    assert (got["r"], got["lora_alpha"], got["rank_pattern"], got["alpha_pattern"]) == (4, 10, {}, {})
    assert {t.shape[0] for name, t in tensors_in(tmp_path).items() if "lora_A" in name} == {4}
    assert_close(scores(adapted, "llama"), scores(opened(tmp_path, "llama"), "llama"), **CLOSE)


def test_a_causal_lora_is_plain_enough_for_engines(tmp_path):
    """What vLLM's reader asks of a folder: whole r and lora_alpha, ends of paths, A and B of every module alone."""
    adapted = shaken(Adapted(zoo.build("llama"), [LoRA(rank=8, at=("attn.*", "ffn.*"))]))
    save_peft(adapted, tmp_path)
    got = config_in(tmp_path)
    assert got["peft_type"] == "LORA"
    assert got["task_type"] == "CAUSAL_LM"
    assert got["base_model_name_or_path"] == "llama"
    assert (type(got["r"]), got["r"], type(got["lora_alpha"]), got["lora_alpha"]) == (int, 8, int, 16)
    assert set(got["target_modules"]) == {f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")}
    assert (got["bias"], got["modules_to_save"], got["use_rslora"], got["use_dora"]) == ("none", None, False, False)
    assert (got["rank_pattern"], got["alpha_pattern"], got["fan_in_fan_out"]) == ({}, {}, False)
    known = {name for name in config_of("lora", "llama").to_dict()}
    assert set(got) <= known
    assert {name.split(".")[-2] for name in tensors_in(tmp_path)} == {"lora_A", "lora_B"}
    assert {t.dtype for t in tensors_in(tmp_path).values()} == {torch.float32}


NAMED = [
    {"target_modules": r".*layers\.1\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["k_proj", "model.layers.0.mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0.*q_proj"},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "down_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": []},
    {"target_modules": ["lm_head", "v_proj"]},
]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("named", NAMED)
def test_modules_are_named_as_peft_names_them(named, tmp_path):
    theirs = made("llama", config_of("lora", "llama", **named), dtype=torch.float64)
    theirs.save_pretrained(tmp_path / "theirs")
    if "lm_head" not in named["target_modules"]:  # as the user wrote it; peft writes the modules that it found
        config = {**config_in(tmp_path / "theirs"), **named}
        (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    adapted = open_peft(tmp_path / "theirs", zoo.build("llama", torch.float64))
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert adapted.parameter_count() == trained
    assert_close(scores(adapted, "llama"), scores(theirs, "llama"), **SAME)
    save_peft(adapted, tmp_path / "back")
    assert_close(scores(opened(tmp_path / "back", "llama", torch.float64), "llama"), scores(theirs, "llama"), **SAME)


def test_dropout_is_pefts_and_rests_until_training(tmp_path):
    theirs = made("llama", config_of("lora", "llama", lora_dropout=0.5))
    theirs.save_pretrained(tmp_path / "theirs")
    adapted = open_peft(tmp_path / "theirs", zoo.build("llama"))
    assert [delta.dropout for delta in adapted.deltas] == [0.5]
    assert_close(scores(adapted, "llama"), scores(theirs, "llama"), **CLOSE)
    assert not torch.allclose(scores(adapted.train(), "llama"), scores(theirs, "llama"), atol=1e-3)
    save_peft(adapted, tmp_path / "back")
    assert config_in(tmp_path / "back")["lora_dropout"] == 0.5


@each
def test_a_backbone_in_half_precision(method, tmp_path):
    """The adapter is in float32 on both sides, so only roundings of the backbone differ."""
    theirs = made("llama", config_of(method, "llama"), dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    adapted = open_peft(tmp_path / "theirs", zoo.build("llama", torch.bfloat16))
    assert {p.dtype for _, p in adapted.parts()} == {torch.float32}
    assert_close(scores(adapted, "llama", method == "prompt"), scores(theirs, "llama"), rtol=0, atol=0.05)
    save_peft(adapted, tmp_path / "back")
    assert {t.dtype for t in tensors_in(tmp_path / "back").values()} == {torch.float32}
    again = opened(tmp_path / "back", "llama", torch.bfloat16)
    assert torch.equal(scores(again, "llama"), scores(theirs, "llama"))


# IA3


def test_ia3_on_parts_of_a_fused_map_and_in_some_layers(tmp_path):
    at = ("attn.v", "layers[1].attn.o")
    adapted = shaken(Adapted(zoo.build("gpt2"), [IA3(at=at, at_input=("re:^layers.0.ffn.down$",))]))
    save_peft(adapted, tmp_path)
    expected = scores(adapted, "gpt2")
    assert_close(scores(opened(tmp_path, "gpt2"), "gpt2"), expected, **CLOSE)
    adapted.remove()
    assert_close(scores(open_peft(tmp_path, adapted.backbone), "gpt2"), expected, **CLOSE)


def test_ends_of_feedforward_modules_need_not_begin_at_a_dot(tmp_path):
    """`o` would be the end of `wo` too."""
    adapted = shaken(Adapted(zoo.build("t5"), [IA3(at=("ffn.down",), at_input=("attn.o", "cross.o"))]))
    save_peft(adapted, tmp_path)
    assert all(name != "o" for name in config_in(tmp_path)["feedforward_modules"])
    assert_close(scores(opened(tmp_path, "t5"), "t5"), scores(adapted, "t5"), **CLOSE)


# Prompts and prefixes


def test_soft_prompts_stand_one_behind_the_other(tmp_path):
    adapted = shaken(Adapted(zoo.build("gpt2"), [SoftPrompt(2), SoftPrompt(1, first=2)]))
    save_peft(adapted, tmp_path)
    assert_close(scores(opened(tmp_path, "gpt2"), "gpt2"), scores(adapted, "gpt2", prompted=True), **CLOSE)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_reparametrised_prompts_and_prefixes_are_written_as_what_they_compute(family, tmp_path):
    shift = [PositionShift(LENGTH)] if family == "bert" else []
    for deltas in ([PTuning(length=LENGTH)], [ReparametrisedPrefix(length=LENGTH), *shift]):
        adapted = shaken(Adapted(zoo.build(family), deltas))
        save_peft(adapted, tmp_path)
        found = scores(adapted, family, prompted=len(deltas) == 1 and isinstance(deltas[0], PTuning))
        assert_close(found, scores(opened(tmp_path, family), family), **CLOSE)


@every
def test_a_projected_prefix_is_saved_as_its_table(family, tmp_path):
    config = config_of("prefix", family, prefix_projection=True, encoder_hidden_size=6)
    theirs = made(family, config)
    theirs.save_pretrained(tmp_path)
    assert_close(scores(open_peft(tmp_path, zoo.build(family)), family), scores(theirs, family), **CLOSE)


@pytest.mark.parametrize("family", ["roberta", "electra", "qwen3", "gpt_neox", "phi", "gemma", "cohere", "stablelm"])
def test_a_prefix_where_positions_are_of_other_kinds(family, tmp_path):
    """Behind the padding index; rotations of a part of a key, of pairs side by side, of normed keys."""
    theirs = made(family, config_of("prefix", family))
    theirs.save_pretrained(tmp_path / "theirs")
    adapted = open_peft(tmp_path / "theirs", zoo.build(family))
    assert_close(scores(adapted, family), scores(theirs, family), **CLOSE)
    save_peft(adapted, tmp_path / "back")
    assert_close(scores(opened(tmp_path / "back", family), family), scores(theirs, family), **CLOSE)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mistral", "sees only what is near"),
        ("gemma2", "sees only what is near"),
        ("opt", "positions are of a kind"),
        ("bart", "positions are of a kind"),
    ],
)
def test_a_prefix_that_would_not_be_the_same_is_refused(family, reason, tmp_path):
    made(family, config_of("prefix", family)).save_pretrained(tmp_path)
    backbone = zoo.build(family)
    with pytest.raises(StoreError, match=reason):
        open_peft(tmp_path, backbone)
    assert all(p.requires_grad for p in backbone.model.parameters())  # nothing is left attached
    decoder = ("decoder.*.attn",) if backbone.kind == "seq2seq" else ("attn",)
    with pytest.raises(StoreError, match=reason):
        save_peft(shaken(Adapted(backbone, [Prefix(LENGTH, at=decoder)])), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_prefix_where_attention_is_code_of_its_own(tmp_path):
    made("gptj", config_of("prefix", "gptj")).save_pretrained(tmp_path)
    with pytest.raises(SiteError, match="computes attention in code of its own"):
        open_peft(tmp_path, zoo.build("gptj"))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_a_layer_of_an_encoder_decoder_has_its_own_slot_of_pefts_table(layers, tmp_path):
    """peft lets decoder layer i read slot 2i mod slots; with as many slots as layers, and these even, two share one."""
    family = f"t5-{layers}"
    zoo.FAMILIES[family] = ("T5", "T5ForConditionalGeneration", "t5", {**zoo.T5, "num_layers": layers})
    try:
        adapted = shaken(Adapted(zoo.build(family), [Prefix(LENGTH, at=("decoder.*.attn",))]))
        save_peft(adapted, tmp_path / "ours")
        assert config_in(tmp_path / "ours")["num_layers"] == layers + (layers % 2 == 0)
        assert_close(scores(opened(tmp_path / "ours", family), family), scores(adapted, family), **CLOSE)
        theirs = made(family, config_of("prefix", family))
        theirs.save_pretrained(tmp_path / "theirs")
        again = open_peft(tmp_path / "theirs", zoo.build(family))
        assert_close(scores(again, family), scores(theirs, family), **CLOSE)
    finally:
        del zoo.FAMILIES[family]


def test_moving_positions_on_is_what_a_model_does_behind_a_cache():
    """Texts of other lengths too; and each row of a mixed batch."""
    backbone = zoo.build("gpt2")
    ids = torch.arange(12).reshape(2, 6) + 5
    at = torch.arange(4, 10)[None]
    with torch.no_grad():
        expected = backbone.model(input_ids=ids, position_ids=at)[0]
        adapted = Adapted(backbone, [PositionShift(4)])
        assert torch.equal(adapted(input_ids=ids)[0], expected)
        assert adapted.parameter_count() == 0
        adapted.remove()
        assert not torch.allclose(backbone.model(input_ids=ids)[0], expected)
