"""PEFT folders that are damaged, of another model, or hold what has no form here; deltas that have none there."""

import dataclasses
import json
import re

import pytest
import safetensors.torch
import torch

from deltaprompt import registry
from deltaprompt.compose import Adapted
from deltaprompt.deltas._position_shift import PositionShift
from deltaprompt.deltas.adapter import Adapter
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.dora import DoRA
from deltaprompt.deltas.ia3 import IA3
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.errors import ConfigError, StoreError
from deltaprompt.interchange import fields, folder, open_peft, save_peft
from deltaprompt.interchange.targets import names_of, selectors_of
from deltaprompt.model import Model, Task
from tests import backbones_zoo as zoo

CONFIG, TENSORS = folder.CONFIG, folder.TENSORS
ONE = "base_model.model.model.layers.0.self_attn.q_proj"
DELTAS = {
    "lora": [LoRA(rank=2)],
    "dora": [DoRA(rank=2)],
    "ia3": [IA3()],
    "prompt": [SoftPrompt(2)],
    "prefix": [Prefix(2)],
}


def saved(path, method="lora", family="llama"):
    """A folder of ours, to be damaged."""
    save_peft(Adapted(zoo.build(family), DELTAS[method]), path)
    return path


def with_fields(path, **more):
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **more}))
    return path


def with_tensors(path, change):
    tensors = safetensors.torch.load_file(path / TENSORS)
    change(tensors)
    safetensors.torch.save_file(tensors, path / TENSORS)
    return path


def refused(path, message, family="llama", error=StoreError):
    """The message of the one error, after which nothing is attached."""
    backbone = zoo.build(family)
    with pytest.raises(error, match=message) as caught:
        open_peft(path, backbone)
    assert all(p.requires_grad for p in backbone.model.parameters())
    return str(caught.value)


# The config's fields


@pytest.mark.parametrize("method", fields.METHODS)
def test_every_field_of_the_installed_peft_is_known(method):
    peft = pytest.importorskip("peft")
    names = {"LORA": "LoraConfig", "IA3": "IA3Config", "PROMPT_TUNING": "PromptTuningConfig"}
    config = getattr(peft, names.get(method, "PrefixTuningConfig"))
    known = fields.READ[method] | fields.HARMLESS[method] | set(fields.MUST_BE_EMPTY[method])
    assert {f.name for f in dataclasses.fields(config)} - known == set()
    assert not fields.READ[method] & set(fields.MUST_BE_EMPTY[method])
    usual = config(**({"num_virtual_tokens": 2} if "PROMPT" in method or "PREFIX" in method else {})).to_dict()
    assert all(usual[name] in fields.EMPTY for name in fields.MUST_BE_EMPTY[method])


CHANGING = {
    "bias": ("all", "biases of the model itself were trained"),
    "lora_bias": (True, "B has a bias of its own"),
    "modules_to_save": (["score"], "whole modules were trained"),
    "trainable_token_indices": ([3], "rows of the embedding were trained"),
    "target_parameters": (["mlp.experts"], "parameters that are not linear maps"),
    "layer_replication": ([[0, 2]], "layers of the model are repeated"),
    "alora_invocation_tokens": ([1, 2], "from an invocation sequence on"),
    "use_qalora": (True, "QALoRA"),
    "use_bdlora": ({"nblocks": 2}, "block-diagonal"),
    "arrow_config": ({"top_k": 3}, "Arrow"),
    "monteclora_config": ({"x": 1}, "MonteCLoRA"),
    "kasa_config": ({"x": 1}, "KaSA"),
    "velora_config": ({"scale": 1.0}, "VeLoRA"),
    "megatron_config": ({"x": 1}, "Megatron"),
    "ensure_weight_tying": (True, "tied"),
}


@pytest.mark.parametrize("field", CHANGING)
def test_a_field_that_changes_the_result_is_refused_with_its_reason(field, tmp_path):
    value, reason = CHANGING[field]
    told = refused(
        with_fields(saved(tmp_path), **{field: value}), re.escape(f"has {field} = {value!r}: ") + ".*" + reason
    )
    assert "open it with peft" in told


def test_every_reason_is_tested():
    assert set(CHANGING) == set(fields.MUST_BE_EMPTY["LORA"])


@pytest.mark.parametrize("method", ["ia3", "prompt", "prefix"])
def test_a_trained_head_beside_any_method_is_refused(method, tmp_path):
    refused(with_fields(saved(tmp_path, method), modules_to_save=["classifier"]), "such as a classification head")


@pytest.mark.parametrize("method", DELTAS)
@pytest.mark.parametrize("value", [True, 3, "x", [0], {"a": 1}])
def test_an_unknown_field_with_a_value_is_refused(method, value, tmp_path):
    refused(with_fields(saved(tmp_path, method), use_new_trick=value), "has the field use_new_trick = .* does not know")


@pytest.mark.parametrize("method", DELTAS)
def test_what_changes_nothing_is_passed_over(method, tmp_path):
    empty = {"use_new_trick": False, "new_config": None, "new_list": [], "new_pattern": {}, "new_text": ""}
    harmless = {"peft_version": "0.99", "revision": "main", "inference_mode": False, "auto_mapping": {"x": "y"}}
    more = {"base_model_name_or_path": "elsewhere"}
    if method in ("lora", "dora"):
        more |= {"eva_config": {"rho": 2.0}, "megatron_core": "x", "fan_in_fan_out": True, "qalora_group_size": 8}
        more |= {"init_lora_weights": "gaussian", "bias": "none", "loftq_config": {"loftq_bits": 4}}
    with_fields(saved(tmp_path, method), **empty, **harmless, **more)
    adapted = open_peft(tmp_path, zoo.build("llama"))
    assert adapted.parameter_count() == sum(t.numel() for t in safetensors.torch.load_file(tmp_path / TENSORS).values())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_a_start_that_changes_the_models_weights_is_refused(start, tmp_path):
    told = refused(with_fields(saved(tmp_path), init_lora_weights=start), f"init_lora_weights = '{start}', which takes")
    assert "path_initial_model_for_weight_conversion" in told


def test_an_unknown_start_is_refused(tmp_path):
    refused(with_fields(saved(tmp_path), init_lora_weights="newest"), "'newest', which DeltaPrompt does not know")


@pytest.mark.parametrize("method", ["ADALORA", "LOHA", None, 3])
def test_another_method_is_refused(method, tmp_path):
    message = f"of PEFT's method {method!r}; LORA, IA3, PROMPT_TUNING, PREFIX_TUNING can be opened"
    refused(with_fields(saved(tmp_path), peft_type=method), re.escape(message))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"r": "8"}, "gives model.layers.0.self_attn.q_proj the rank '8'"),
        ({"r": 0}, "the rank 0; a whole number from 1 on"),
        ({"r": 3}, "lora_A.weight has shape [2, 16] of torch.float32; [3, 16] of"),
        ({"rank_pattern": {"q_proj": 4}}, "[4, 16]"),
        ({"lora_alpha": "16"}, "the alpha '16'; a number"),
        ({"lora_alpha": True}, "the alpha True; a number"),
        ({"target_modules": None}, "has no target_modules"),
        ({"target_modules": []}, "has no target_modules"),
        ({"target_modules": "(q_proj"}, "which is no regular expression"),
        ({"alpha_pattern": {"*q": 2}}, "which is no regular expression"),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_A.weight, and its config does not name that module"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "lacks base_model.model.model.layers.0.self_attn.k_proj"),
        ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "embed_tokens, an embedding that is no site"),
        ({"target_modules": ["q_proj", "v_proj", "self_attn"]}, "self_attn, a LlamaAttention that is no site"),
        ({"use_dora": True}, "lacks base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors(more, message, tmp_path):
    refused(with_fields(saved(tmp_path), **more), re.escape(message))


def test_a_magnitude_without_dora_is_not_passed_over(tmp_path):
    refused(with_fields(saved(tmp_path, "dora"), use_dora=False), "lora_magnitude_vector, and its config does not name")


def test_a_config_that_names_nothing(tmp_path):
    with_fields(saved(tmp_path), target_modules=["c_attn"])
    safetensors.torch.save_file({}, tmp_path / TENSORS)
    refused(tmp_path, re.escape("names no module of this backbone: ['c_attn']"))
    with_fields(saved(tmp_path, "ia3"), target_modules=["c_attn"])
    safetensors.torch.save_file({}, tmp_path / TENSORS)
    refused(tmp_path, re.escape("names no module of this backbone: ['c_attn']"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"target_modules": 5}, "target_modules = 5; str or list is possible. Get the folder again"),
        ({"exclude_modules": 7}, "exclude_modules = 7; str or list is possible"),
        ({"layers_pattern": 5}, "layers_pattern = 5; str or list is possible"),
        ({"rank_pattern": [1]}, "rank_pattern = [1]; dict is possible"),
        ({"alpha_pattern": "x"}, "alpha_pattern = 'x'; dict is possible"),
        ({"layers_to_transform": "x"}, "layers_to_transform = 'x'; int or list is possible"),
        ({"lora_dropout": [1]}, "lora_dropout = [1]; int or float is possible"),
        ({"lora_alpha": float("nan")}, "the alpha nan; a number is possible"),
    ],
)
def test_a_field_of_another_sort(more, message, tmp_path):
    refused(with_fields(saved(tmp_path, "lora"), **more), re.escape(message))


def test_a_fused_map_whose_input_is_scaled(tmp_path):
    with_fields(saved(tmp_path, "ia3", "gpt2"), feedforward_modules=["c_attn", "c_proj"])
    refused(tmp_path, "scales what enters the fused map transformer.h.0.attn.c_attn", family="gpt2")


# Prompts and prefixes


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("task", [None, "SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_a_prompt_for_another_kind_of_model(method, task, tmp_path):
    refused(with_fields(saved(tmp_path, method), task_type=task), f"task_type = {task!r}.*'causal' is run as CAUSAL_LM")


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens is None; a whole number"),
        ("prompt", {"num_virtual_tokens": 3}, "prompt_embeddings has shape [2, 16] of torch.float32; [3, 16] of"),
        ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules = 2; 1 is possible"),
        ("prefix", {"num_virtual_tokens": 5}, "[5, 32]"),
        ("prefix", {"num_attention_heads": 4}, "num_attention_heads = 4, and keys of this backbone have 2"),
        ("prefix", {"token_dim": 16}, "token_dim = 16, and keys of this backbone have 8"),
        ("prefix", {"num_layers": 1}, "num_layers = 1, and this backbone has 2 to reach"),
        ("prefix", {"num_layers": "two"}, "num_layers is 'two'"),
        ("prefix", {"num_transformer_submodules": 2}, "num_transformer_submodules = 2; 1 is possible"),
    ],
)
def test_a_table_that_does_not_fit(method, more, message, tmp_path):
    refused(with_fields(saved(tmp_path, method), **more), re.escape(message))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_prompt_without_its_table(method, tmp_path):
    with_tensors(saved(tmp_path, method), lambda tensors: tensors.pop("prompt_embeddings"))
    refused(tmp_path, "lacks the tensor prompt_embeddings")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_change_with_the_length_of_the_text(kind, tmp_path):
    saved(tmp_path, "prefix")
    backbone = zoo.build("llama")
    backbone.model.config.rope_parameters = {
        "full_attention": {**backbone.model.config.rope_parameters, "rope_type": kind}
    }
    with pytest.raises(StoreError, match=f"of type '{kind}' and changes with the length"):
        open_peft(tmp_path, backbone)


def test_layers_of_different_sizes(tmp_path, monkeypatch):
    saved(tmp_path, "prefix")
    backbone = zoo.build("llama")
    site = backbone.sites["layers.1.attn"]
    sites = dataclasses.replace(
        backbone.sites, by_name={**backbone.sites, "layers.1.attn": dataclasses.replace(site, heads=1)}
    )
    with pytest.raises(StoreError, match="layers of this backbone have keys of different sizes"):
        open_peft(tmp_path, dataclasses.replace(backbone, sites=sites))
    some = {name: s for name, s in backbone.sites.items() if name != "layers.0.attn"}
    with pytest.raises(StoreError, match="has layers without attention"):
        open_peft(tmp_path, dataclasses.replace(backbone, sites=dataclasses.replace(sites, by_name=some)))
    none = {name: dataclasses.replace(s, heads=0) for name, s in backbone.sites.items()}
    with pytest.raises(StoreError, match="the number of heads at layers.0.attn is not known"):
        open_peft(tmp_path, dataclasses.replace(backbone, sites=dataclasses.replace(sites, by_name=none)))


# Files and tensors


def test_there_is_no_folder(tmp_path):
    saved(tmp_path / "adapter")
    refused(tmp_path / "adaptor", "there is no folder .*did you mean 'adapter'.*hf download")


def test_the_config_is_missing_or_damaged(tmp_path):
    saved(tmp_path)
    good = (tmp_path / CONFIG).read_bytes()
    for bad in (good[:-5], b"\xff\xfe{}", b"not json", b""):
        (tmp_path / CONFIG).write_bytes(bad)
        refused(tmp_path, f"{CONFIG} is damaged")
    (tmp_path / CONFIG).write_text("[1]")
    refused(tmp_path, "it is a list, not an object of fields")
    (tmp_path / CONFIG).unlink()
    refused(tmp_path, f"holds no PEFT adapter, that is {CONFIG} and {TENSORS}; it holds {TENSORS}")


def test_the_tensors_are_missing_or_damaged(tmp_path):
    saved(tmp_path)
    good = (tmp_path / TENSORS).read_bytes()
    for bad in (good[:-1], good[: len(good) // 2], good[:4], b"", b"x" * 100, b"\x00" * 8 + good[8:]):
        (tmp_path / TENSORS).write_bytes(bad)
        refused(tmp_path, f"{TENSORS} is damaged or truncated")
    (tmp_path / TENSORS).unlink()
    refused(tmp_path, f"lacks {TENSORS}")


def test_a_pickle_is_not_read(tmp_path):
    saved(tmp_path)
    (tmp_path / TENSORS).unlink()
    torch.save({}, tmp_path / folder.PICKLE)
    told = refused(tmp_path, "a pickle, which can run any code")
    assert "save_pretrained" in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{ONE}.lora_B.weight"), f"lacks {ONE}.lora_B.weight, though the config names"),
        (lambda t: t.update({f"{ONE}.lora_B.weight": torch.zeros(3, 2)}), "has shape [3, 2] of torch.float32; [16, 2]"),
        (lambda t: t.update({f"{ONE}.lora_B.weight": torch.zeros(16, 2).int()}), "of torch.int32; [16, 2] of floating"),
        (lambda t: t.update({f"{ONE}.extra": torch.zeros(1)}), f"has {ONE}.extra, and its config does not name"),
        (
            lambda t: t.update({"base_model.model.layers.9.q_proj.lora_A.weight": torch.zeros(1)}),
            "and this backbone has no module layers.9.q_proj. Give the backbone",
        ),
        (
            lambda t: t.update({"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)}),
            "has no module layers.0.self_attn.q_proj (but model.layers.0.self_attn.q_proj)",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(420, 16)}),
            "has base_model.model.model.embed_tokens.weight, and its config does not name that module",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message, tmp_path):
    refused(with_tensors(saved(tmp_path), change), re.escape(message))


def test_a_folder_of_another_model(tmp_path):
    refused(saved(tmp_path), "lacks base_model.model.layers.0.self_attn|has no module", family="bert")
    refused(saved(tmp_path / "bert", "lora", "bert"), "has no module bert.encoder.layer.0.attention.self.query")


def test_the_models_own_embedding_may_lie_beside_an_adapter(tmp_path):
    own = zoo.build("llama").model.get_parameter("model.embed_tokens.weight").detach().clone()
    with_tensors(saved(tmp_path), lambda t: t.update({"base_model.model.model.embed_tokens.weight": own}))
    assert open_peft(tmp_path, zoo.build("llama")).parameter_count() > 0


def test_a_backbone_that_carries_deltas(tmp_path):
    saved(tmp_path)
    backbone = zoo.build("llama")
    first = open_peft(tmp_path, backbone)
    with pytest.raises(ConfigError, match="already carries deltas"):
        open_peft(tmp_path, backbone)
    first.remove()
    assert open_peft(tmp_path, backbone).deltas == first.deltas or not first.deltas


# What has no form in PEFT


WRITTEN_NOT = [
    ([Adapter()], "Adapter has no form in PEFT that computes the same; possible: LoRA, DoRA, IA3, SoftPrompt, Prefix"),
    ([LoRA(), BitFit()], "BitFit has no form in PEFT"),
    ([LoRA(gated=True)], "a gated LoRA has no form in PEFT"),
    ([Prefix(2, gated=True)], "a gated Prefix has no form in PEFT"),
    ([LoRA(), IA3()], "of the methods IA3, LoRA, and a folder of PEFT holds one of"),
    ([LoRA(), DoRA()], "of the methods DoRA, LoRA"),
    ([LoRA(), Prefix(2)], "of the methods LoRA, Prefix"),
    ([DoRA(), DoRA()], "two DoRAs at layers.0.attn.q have no form"),
    ([IA3(), IA3(at=("attn.v",), at_input=())], "two IA3s at layers.0.attn.v have no form"),
    ([SoftPrompt(2), SoftPrompt(2)], "leave gaps or overlap"),
    ([SoftPrompt(2, first=1)], "leave gaps or overlap"),
    ([Prefix(2, at=("layers[0].attn",))], "reaches layers.0.attn to layers.1.attn once each"),
    ([Prefix(2), Prefix(2)], "once each"),
]


@pytest.mark.parametrize(("deltas", "message"), WRITTEN_NOT)
def test_deltas_that_have_no_form_in_peft(deltas, message, tmp_path):
    adapted = Adapted(zoo.build("llama"), deltas)
    with pytest.raises(StoreError, match=re.escape(message)):
        save_peft(adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_dimensional_ia3s_on_parts_of_one_map(tmp_path):
    adapted = Adapted(zoo.build("gpt2"), [IA3(at=("attn.v",)), IA3(at=("attn.v",), at_input=())])
    with pytest.raises(StoreError, match="two IA3s at layers.0.attn.v"):
        save_peft(adapted, tmp_path)


@pytest.mark.parametrize(
    ("family", "deltas", "message"),
    [
        ("gpt2", [Prefix(3)], "positions begin at 3, and here at 0.*position_shift:by=3"),
        ("gpt2", [Prefix(3), PositionShift(2)], "positions begin at 3, and here at 2"),
        ("gpt2", [PositionShift(2)], "of the methods PositionShift"),
        ("gpt2", [LoRA(), PositionShift(2)], "of the methods LoRA, PositionShift"),
        ("t5", [Prefix(3)], r"reaches decoder.layers.0.attn .* choose at=\('decoder.\*.attn',\)"),
        ("t5", [Prefix(3, at=("decoder.*.attn", "cross"))], "reaches decoder.layers.0.attn"),
    ],
)
def test_a_prefix_that_stands_elsewhere(family, deltas, message, tmp_path):
    with pytest.raises(StoreError, match=message):
        save_peft(Adapted(zoo.build(family), deltas), tmp_path)


def test_nothing_to_write(tmp_path):
    adapted = Adapted(zoo.build("llama"), [LoRA()])
    with pytest.raises(ConfigError, match="there is no slot 1; this model has the slots 0 to 0"):
        save_peft(adapted, tmp_path, slot=1)
    adapted.remove()
    with pytest.raises(StoreError, match="there are no deltas to write"):
        save_peft(adapted, tmp_path)


def test_soft_tokens_in_a_template(tmp_path):
    task = Task("{text} {soft:3} It was {mask}.", {"bad": "no", "good": "yes"})
    with pytest.raises(StoreError, match="the template has soft tokens, and PEFT's stand in front of the text only"):
        save_peft(Model(zoo.build("bert"), task, [LoRA()]), tmp_path)


def test_every_other_delta_is_refused_by_name(tmp_path):
    """A new file in `deltas/` is refused, or written, without being named here."""
    forms = {"lora", "dora", "ia3", "soft_prompt", "prefix", "p_tuning", "reparametrised_prefix"}
    for name in registry.variants("deltas"):
        adapted = Adapted(zoo.build("llama"), [registry.variant("deltas", name)()])
        if name in forms:
            assert save_peft(adapted, tmp_path / name) > 0
            continue
        with pytest.raises(StoreError, match=f"{type(adapted.deltas[0]).__name__} has no form in PEFT"):
            save_peft(adapted, tmp_path / name)


# Writing


def test_a_folder_is_replaced_whole(tmp_path, monkeypatch):
    saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    adapted = Adapted(zoo.build("llama"), [LoRA(rank=3)])

    def full(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(folder, "_put", full)
        with pytest.raises(StoreError, match="cannot be written .*No space left"):
            save_peft(adapted, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_peft(adapted, tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys() == {CONFIG, TENSORS}
    assert after != before


def test_a_file_stands_where_the_folder_would(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        save_peft(Adapted(zoo.build("llama"), [LoRA()]), tmp_path / "out")


# The shortest names


def test_names_of_modules():
    among = ["a.q", "a.o", "b.q", "b.wo", "c.a.q"]
    assert names_of(["a.q", "b.q", "c.a.q"], among) == ["q"]
    assert names_of(["b.q", "b.wo"], among) == ["b.q", "wo"]
    assert names_of(["c.a.q"], among) == ["c.a.q"]
    with pytest.raises(StoreError, match="no end of a.q names it alone"):
        names_of(["a.q"], among)


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
def test_selectors_match_the_sites_and_no_others(family):
    sites = zoo.build(family).sites
    linear = [site for site in sites.values() if site.kind == "linear"]
    g = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, len(linear)):
        for _ in range(5):
            some = [linear[i] for i in torch.randperm(len(linear), generator=g)[:size].tolist()]
            found = selectors_of(some, sites)
            assert {site.name for site in sites.select(found)} == {site.name for site in some}
            assert len(found) <= len(some)


# Learned positions


LEARNED = {"bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "mpnet", "mpnet-encoder", "gpt2"}
LEARNED |= {"bert-encoder", "deberta-v2", "deberta-v3", "gpt_neo"}


@pytest.mark.parametrize("family", [*zoo.FAMILIES, *zoo.UNTABLED])
def test_learned_positions_are_a_site_where_they_are_an_embedding(family):
    """Not where they are rotations or distances, nor where a table has code of its own (BART, OPT)."""
    sites = zoo.build(family).sites
    assert ("embed.position" in sites) == (family in LEARNED)


def test_a_shift_goes_forward_and_is_stored_by_name():
    with pytest.raises(ConfigError, match="position_shift: got by=0; by >= 1 is possible"):
        PositionShift(0)
    described = registry.describe("deltas", PositionShift(4))
    assert described == {"kind": "position_shift", "gated": False, "by": 4, "at": ("embed.position",)}
    assert registry.from_description("deltas", described) == PositionShift(4)
    assert "position_shift" not in registry.variants("deltas")
