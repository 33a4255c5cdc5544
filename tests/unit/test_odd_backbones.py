"""Backbones whose base, arguments or kind are not like others'."""

import pytest
import torch
from torch.testing import assert_close

from deltaprompt.backbone import load
from deltaprompt.backbone.load import kind_of, takes, wrap
from deltaprompt.compose import Adapted
from deltaprompt.conformance import shrink
from deltaprompt.deltas.loreft import LoReFT
from deltaprompt.errors import SiteError
from tests import backbones_zoo as zoo
from tests import tokenizers_zoo
from tests.backbones_zoo import inputs_of


def find(name):
    return next(a for a in shrink.known() if str(a) == name)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["VoxtralForConditionalGeneration"]}, "causal"),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "is_encoder_decoder": False}, "causal"),
        ({"architectures": ["T5GemmaForConditionalGeneration"], "is_encoder_decoder": True}, "seq2seq"),
        ({"architectures": ["FlaubertWithLMHeadModel"]}, "masked"),
        ({"architectures": ["ReformerModelWithLMHead"]}, "causal"),
    ],
)
def test_the_kind_is_told_by_the_architecture(config, kind):
    assert kind_of(config) == kind


def test_a_speech_model_that_goes_on_with_a_text_is_causal(tmp_path):
    backbone = shrink.backbone(find("seq2seq:glmasr"))
    assert backbone.kind == "causal"
    assert backbone.base is backbone.model.model
    assert all("audio" not in site.path for site in backbone.sites.values())
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    found = load(tmp_path, device="cpu")
    assert (found.kind, list(found.sites)) == ("causal", list(backbone.sites))


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_encoder_decoder_as_an_encoder_is_its_encoder(family):
    model, tokenizer = zoo.model(family), tokenizers_zoo.build(zoo.FAMILIES[family][2])
    backbone = wrap(model, tokenizer, kind="encoder")
    inputs = {n: t for n, t in inputs_of(zoo.build(family)).items() if not n.startswith("decoder")}
    assert backbone.base is model.get_encoder()
    assert backbone.head is None
    assert {"embed", "layers.0.attn.q", "layers.1.ffn"} <= set(backbone.sites)
    assert not any("cross" in name for name in backbone.sites)
    with torch.no_grad():
        assert_close(backbone.states(inputs), model.get_encoder()(**inputs).last_hidden_state)
    assert backbone.width == 16


def test_the_base_of_a_model_that_does_not_name_it_is_the_child_with_the_words():
    backbone = shrink.backbone(find("causal:llama4_text"))
    assert backbone.base is backbone.model.model
    assert wrap(backbone.model, backbone.tokenizer, kind="encoder").base is backbone.model.model


def test_a_base_that_calls_its_input_otherwise_is_run_by_its_model():
    architecture = find("masked:perceiver")
    backbone = shrink.backbone(architecture)
    inputs = shrink.inputs_for(backbone.model, architecture)
    assert not takes(backbone.base, "input_ids")
    with torch.no_grad():
        assert_close(backbone.head.logits(backbone.states(inputs)), backbone.model(**inputs).logits)
    assert not backbone.base._forward_hooks


@pytest.mark.parametrize(
    "name", ["causal:falcon_mamba", "causal:bart", "masked:fnet", "causal:xlnet", "causal:reformer"]
)
def test_any_base_takes_what_features_give(name):
    """A mask and positions, where padding is in front; a cache is asked for where there is one."""
    architecture = find(name)
    backbone = shrink.backbone(architecture)
    inputs = shrink.inputs_for(backbone.model, architecture, "left")
    mask = inputs["attention_mask"]
    with torch.no_grad():
        states = backbone.states(inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)})
    assert states.shape == (2, 8, backbone.width)
    assert states.isfinite().all()


def test_a_decoder_that_asks_for_its_masks_is_run_by_its_model():
    architecture = find("seq2seq:fsmt")
    backbone = shrink.backbone(architecture)
    inputs = shrink.inputs_for(backbone.model, architecture)
    with torch.no_grad():
        theirs = backbone.model(**inputs, use_cache=False).logits
        assert_close(backbone.head.logits(backbone.states(inputs)), theirs)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"multi_query": True, "new_decoder_architecture": False}, {"q": (1, 0, 16), "k": (1, 16, 4), "v": (1, 20, 4)}),
        ({"multi_query": False, "new_decoder_architecture": False}, {"q": (4, 0, 4), "k": (4, 4, 4), "v": (4, 8, 4)}),
        (
            {"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2},
            {"q": (2, 0, 8), "k": (2, 8, 4), "v": (2, 12, 4)},
        ),
    ],
)
def test_falcon_keeps_its_queries_in_three_ways(options, parts):
    import transformers

    config = transformers.FalconConfig(vocab_size=320, **zoo.WIDTHS, **options)
    with zoo.quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.FalconForCausalLM(config).eval()
    sites = wrap(model, tokenizers_zoo.build("gpt2")).sites
    found = {p: sites[f"layers.1.attn.{p}"].part for p in "qkv"}
    assert {p: (part.groups, part.start, part.size) for p, part in found.items()} == parts


def test_a_fused_map_whose_parts_cannot_be_told_is_one_site(monkeypatch):
    from deltaprompt.backbone import fused

    monkeypatch.setattr(fused, "_parts_of", lambda *args: None)
    sites = zoo.build("bloom").sites
    assert (sites["layers.0.attn.qkv"].inputs, sites["layers.0.attn.qkv"].outputs) == (16, 48)
    assert sites["layers.0.attn.qkv"].part is None
    assert "layers.0.attn.q" not in sites


def test_a_fused_map_is_whole_where_the_model_cannot_run():
    with torch.device("meta"):
        model = zoo.model("bloom")
    from deltaprompt.backbone.naming import name_sites

    sites = name_sites(model, model.base_model, model.config.to_dict(), None)
    assert "layers.1.attn.qkv" in sites


def test_telling_parts_leaves_nothing_behind():
    model, state = zoo.model("bloom").train(), torch.get_rng_state()
    wrap(model, tokenizers_zoo.build("gpt2"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_whose_inputs_are_computed_again_from_its_outputs_takes_no_delta_behind_it():
    backbone = shrink.backbone(find("masked:reformer"))
    with pytest.raises(SiteError, match="LoReFT cannot act on what leaves a layer of ReformerForMaskedLM"):
        Adapted(backbone, [LoReFT()])
    assert Adapted(backbone, [LoReFT(at=("ffn",))]).patches
