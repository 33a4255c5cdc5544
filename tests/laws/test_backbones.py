"""Laws of every backbone family: names of sites, parts of fused maps, head, states, loading, fingerprint."""

import re
import sys
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

import deltaprompt.backbone.demo as demo
import deltaprompt.backbone.naming as naming
from deltaprompt.backbone import load
from deltaprompt.backbone.families import SHAPED_LIKE, TABLES
from deltaprompt.backbone.load import kind_of, wrap
from deltaprompt.backbone.sites import Part, Sites, linear_sizes
from deltaprompt.errors import BackboneError, SiteError
from tests import backbones_zoo as zoo
from tests import tokenizers_zoo
from tests.backbones_zoo import inputs_of

ALL = [*zoo.FAMILIES, *zoo.UNTABLED]
OWN_ATTENTION = ("mpnet", "mpnet-encoder", "deberta-v2", "deberta-v3", "bloom", "gptj", "gpt_neo", "falcon")
ONLY_TABLES = re.compile(r"project|pos_")  # what lies outside of layers, and DeBERTa's maps of positions
TEXTS = ["It was a great movie .", "bad"]


@cache
def shared(family):
    """A backbone in float64 for tests that only read it."""
    return zoo.build(family, torch.float64)


def stacks(backbone):
    return ("encoder.", "decoder.") if backbone.kind == "seq2seq" else ("",)


def layer_linears(backbone):
    """Paths of all linear maps inside numbered layers."""
    inside = {id(m) for stack in backbone.base.modules() if isinstance(stack, nn.ModuleList) for m in stack.modules()}
    return {p for p, m in backbone.model.named_modules() if id(m) in inside and linear_sizes(m)}


@pytest.mark.parametrize("family", ALL)
def test_every_layer_has_every_site(family):
    backbone = shared(family)
    maps = ("q", "k", "v", "o")
    wanted = {
        f"{side}layers.{i}.{block}{part}"
        for side in stacks(backbone)
        for i in range(2)
        for block in (("attn", "cross") if side == "decoder." else ("attn",))
        for part in ("", *(f".{m}" for m in maps))
    }
    wanted |= {f"{side}layers.{i}.ffn.{m}" for side in stacks(backbone) for i in range(2) for m in ("up", "down")}
    wanted |= {f"{side}layers.{i}{block}" for side in stacks(backbone) for i in range(2) for block in ("", ".ffn")}
    wanted |= {f"{side}embed" for side in stacks(backbone)}
    wanted |= set() if backbone.head is None else {"head"}
    assert wanted <= set(backbone.sites)
    assert set(backbone.sites.layer_counts.items()) == {(side, 2) for side in stacks(backbone)}


@pytest.mark.parametrize("family", ALL)
def test_every_linear_map_of_a_layer_is_a_site(family):
    backbone = shared(family)
    assert layer_linears(backbone) <= {site.path for site in backbone.sites.values()}


@pytest.mark.parametrize("family", ALL)
def test_a_site_has_the_sizes_of_what_passes_it(family):
    backbone = shared(family)
    modules, seen, handles = dict(backbone.model.named_modules()), {}, []
    for site in backbone.sites.values():
        if site.kind in ("linear", "norm"):
            hook = partial(keep_sizes, seen, site.name)
            handles.append(modules[site.path].register_forward_hook(hook))
    with torch.no_grad():
        backbone.model(**inputs_of(backbone))
    for handle in handles:
        handle.remove()
    assert seen.keys() == {s.name for s in backbone.sites.values() if s.kind in ("linear", "norm")}
    for name, (entered, left) in seen.items():
        site = backbone.sites[name]
        assert site.inputs == entered, name
        assert site.outputs == left or site.part is not None, name


@pytest.mark.parametrize("family", ALL)
def test_parts_of_a_fused_map_cover_it_and_are_apart(family):
    backbone = shared(family)
    by_path = {}
    for site in backbone.sites.values():
        if site.part is not None:
            by_path.setdefault(site.path, []).append(site)
    for path, sites in by_path.items():
        out = linear_sizes(backbone.model.get_submodule(path))[1]
        y = torch.arange(out)
        taken = torch.cat([s.part.take(y) for s in sites])
        assert torch.equal(taken.sort().values, y), path
        assert all(s.outputs == len(s.part.take(y)) for s in sites)


def test_part_put_is_the_inverse_of_take():
    y, part = torch.randn(2, 3, 12), Part(2, 1, 3)
    new = torch.randn(2, 3, 6)
    assert torch.equal(part.take(part.put(y, new)), new)
    assert torch.equal(part.put(y, part.take(y)), y)


def keep_sizes(seen, name, module, args, y):
    seen[name] = (args[0].shape[-1], y.shape[-1])


def keep_output(outputs, path, module, args, y):
    outputs[path] = y


def received_by_attention(backbone, inputs, monkeypatch):
    """Module path -> (q, k, v) that the attention function is given."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    paths = {id(m): p for p, m in backbone.model.named_modules()}
    modelling, seen = sys.modules[type(backbone.model).__module__], {}

    def spy(inner, module, q, k, v, *args, **kw):
        seen[paths[id(module)]] = (q, k, v)
        return inner(module, q, k, v, *args, **kw)

    if backbone.model.config._attn_implementation == "eager":
        monkeypatch.setattr(modelling, "eager_attention_forward", partial(spy, modelling.eager_attention_forward))
    else:
        monkeypatch.setitem(FUNCTIONS._local_mapping, "sdpa", partial(spy, FUNCTIONS["sdpa"]))
    with torch.no_grad():
        backbone.model(**inputs)
    return seen


@pytest.mark.parametrize("family", [f for f in ALL if f not in OWN_ATTENTION])
def test_q_k_v_are_what_the_attention_receives(family, monkeypatch):
    """Up to a factor (OPT scales q), and at position 0, where rotary embeddings do nothing."""
    backbone = zoo.build(family, torch.float64)
    inputs = inputs_of(backbone)
    outputs, modules = {}, dict(backbone.model.named_modules())
    for path in {s.path for s in backbone.sites.values() if s.kind == "linear"}:
        modules[path].register_forward_hook(partial(keep_output, outputs, path))
    seen = received_by_attention(backbone, inputs, monkeypatch)
    attentions = [s for s in backbone.sites.values() if s.kind == "attn"]
    assert {s.path for s in attentions} == seen.keys()
    for attention in attentions:
        for number, part in enumerate("qkv"):
            if part != "v" and (family == "olmo2" or f"{attention.name}.{part}_norm" in backbone.sites):
                continue  # q and k are normed on the way
            got = seen[attention.path][number]  # [b, heads, s, size]
            site = backbone.sites[f"{attention.name}.{part}"]
            ours = outputs[site.path] if site.part is None else site.part.take(outputs[site.path])
            ours = ours.unflatten(-1, (got.shape[1], -1))[:, 0]  # [b, heads, size]
            assert_close(functional.normalize(ours, dim=-1), functional.normalize(got[:, :, 0], dim=-1))
            if part != "q":
                assert (attention.heads, attention.outputs) == (got.shape[1], site.outputs)


@pytest.mark.parametrize("family", [f for f in ALL if not f.endswith("-encoder")])
def test_the_head_gives_the_models_own_scores(family):
    backbone = shared(family)
    inputs, rows = inputs_of(backbone), torch.tensor([5, 0, 17, 5])
    with torch.no_grad():
        theirs = backbone.model(**inputs).logits
        states = backbone.states(inputs)
        ours = backbone.head.logits(states, None)
        some = backbone.head.logits(states, rows)
    assert states.shape[-1] == backbone.width
    assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert_close(some, theirs[..., rows], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", [f for f in ALL if not f.endswith("-encoder")])
def test_a_hook_at_the_head_is_seen_with_rows_too(family):
    backbone = zoo.build(family, torch.float64)
    states, rows = torch.randn(1, 2, backbone.width, dtype=torch.float64), torch.tensor([3, 1])
    before = backbone.head.logits(states, rows)
    backbone.head.out.register_forward_hook(lambda m, args, y: y * 2 + 1)
    with torch.no_grad():
        assert_close(backbone.head.logits(states, rows), backbone.head.logits(states, None)[..., rows])
        assert not torch.allclose(backbone.head.logits(states, rows), before)


@pytest.mark.parametrize("family", ALL)
def test_the_states_are_the_models_last_hidden_states(family):
    backbone = shared(family)
    inputs = inputs_of(backbone)
    with torch.no_grad():
        out = backbone.model(**inputs, output_hidden_states=True)
        theirs = (out.decoder_hidden_states if backbone.kind == "seq2seq" else out.hidden_states)[-1]
    if backbone.model.config.model_type == "opt" and backbone.width != theirs.shape[-1]:
        theirs = backbone.model.model.decoder.project_out(theirs)
    assert_close(backbone.states(inputs), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_guess_gives_the_sites_of_the_table(family, monkeypatch):
    backbone = shared(family)
    monkeypatch.setattr(naming, "TABLES", {})
    guessed = naming.name_sites(
        backbone.model, backbone.base, backbone.config, None if backbone.head is None else backbone.head.out
    )
    table = {n: s for n, s in backbone.sites.items() if not ONLY_TABLES.search(n) and n != "embed.position"}
    found = {n: s for n, s in guessed.items() if not ONLY_TABLES.search(n)}
    if family == "deberta-v3":
        found.pop("norm")  # of its relative positions
    assert found == table


@pytest.mark.parametrize("family", zoo.UNTABLED)
def test_families_without_a_table_are_named_too(family):
    model_type = shared(family).model.config.model_type
    assert model_type not in TABLES
    assert model_type not in SHAPED_LIKE


def test_every_table_is_tried():
    tried = {shared(family).model.config.model_type for family in zoo.FAMILIES}
    assert set(TABLES) <= tried
    assert set(SHAPED_LIKE.values()) <= set(TABLES)


SELECTED = [
    ("llama", "attn.q", ["layers.0.attn.q", "layers.1.attn.q"]),
    ("llama", "layers[1:].ffn.*", ["layers.1.ffn.down", "layers.1.ffn.gate", "layers.1.ffn.norm", "layers.1.ffn.up"]),
    ("llama", "layers[-1].attn.v", ["layers.1.attn.v"]),
    ("llama", "layers[0].attn", ["layers.0.attn"]),
    ("llama", "layers[:-1].attn.q", ["layers.0.attn.q"]),
    ("llama", "layers[::2].attn.q", ["layers.0.attn.q"]),
    ("llama", "layers.1.attn.q", ["layers.1.attn.q"]),
    ("llama", "attn", ["layers.0.attn", "layers.1.attn"]),
    ("llama", "embed", ["embed"]),
    ("llama", "head", ["head"]),
    ("llama", r"re:attn\.[qk]$", [f"layers.{i}.attn.{p}" for i in range(2) for p in "kq"]),
    ("llama", "model.layers.0.self_attn.q_proj", ["layers.0.attn.q"]),
    ("gpt2", "transformer.h.1.attn.c_attn", [f"layers.1.attn.{p}" for p in "kqv"]),
    ("t5", "decoder.*.cross.v", ["decoder.layers.0.cross.v", "decoder.layers.1.cross.v"]),
    ("t5", "encoder.layers[-1].attn.q", ["encoder.layers.1.attn.q"]),
    ("t5", "layers[-1].attn.q", ["decoder.layers.1.attn.q", "encoder.layers.1.attn.q"]),
    ("t5", "embed", ["decoder.embed", "encoder.embed"]),
]


@pytest.mark.parametrize(("family", "selector", "names"), SELECTED)
def test_a_selector_selects(family, selector, names):
    assert sorted(site.name for site in shared(family).sites.select([selector])) == names


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("atn.q", "selector 'atn.q' matches no site of this backbone; did you mean 'attn.q'"),
        ("layers[7].attn.q", "selector 'layers[7].attn.q' matches no site"),
        ("re:(", "selector 're:(' is not a regular expression"),
        ("re:nothing", "selector 're:nothing' matches no site"),
        ("layers[a].attn.q", "[a] is no index or range"),
        ("layers[].attn.q", "[] is no index or range"),
        ("layers[1:2:0].attn.q", "[1:2:0] is no index or range"),
        ("tn.q", "selector 'tn.q' matches no site"),
        ("", "selector '' matches no site"),
    ],
)
def test_a_wrong_selector_is_an_error(selector, message):
    with pytest.raises(SiteError, match=re.escape(message)):
        shared("llama").sites.select([selector])


def test_sites_are_a_mapping_whose_missing_names_are_errors():
    sites = shared("bert").sites
    assert isinstance(sites, Sites)
    assert "layers.0.attn.q" in sites
    with pytest.raises(SiteError, match="no site 'layers.0.atn.q'; did you mean 'layers.0.attn.q'"):
        sites["layers.0.atn.q"]


def test_a_model_without_word_embeddings_is_refused():
    made = zoo.model("bert-encoder")
    with pytest.raises(
        BackboneError, match="has no word embedding that DeltaPrompt can find. Possible are models that"
    ):
        naming.name_sites(made, made.encoder, made.config.to_dict(), None)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart", "bert-encoder", "roberta"])
def test_a_saved_backbone_loads_as_it_was(family, tmp_path):
    made = zoo.build(family)
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    found = load(tmp_path, device="cpu")
    assert (found.kind, found.name) == (made.kind, str(tmp_path))
    assert (list(found.sites), found.fingerprint) == (list(made.sites), made.fingerprint)
    assert_close(found.states(inputs_of(made)), made.states(inputs_of(made)))
    assert found.tokenizer(TEXTS)["input_ids"] == made.tokenizer(TEXTS)["input_ids"]
    assert not found.model.training
    assert load(tmp_path, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(tmp_path, device="cpu", attention="eager").model.config._attn_implementation == "eager"


def test_what_cannot_be_loaded_says_why(tmp_path):
    made = zoo.build("bert-encoder")
    made.model.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="has no tokenizer files"):
        load(tmp_path, device="cpu")
    made.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="lacks .* tensors of a model of kind 'masked'"):
        load(tmp_path, kind="masked", device="cpu")
    with pytest.raises(BackboneError, match="dtype 'float8' is unknown"):
        load(tmp_path, dtype="float8")
    with pytest.raises(BackboneError, match="kind 'mask' is unknown; possible: masked, causal, seq2seq, encoder"):
        load(tmp_path, kind="mask")
    with pytest.raises(BackboneError, match="cannot be loaded as a model of kind 'seq2seq'"):
        load(tmp_path, kind="seq2seq")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="cannot be loaded as a model of kind 'encoder'"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["no-such-model", "somebody/no-such-model", "/no/such/folder"])
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(BackboneError, match=re.escape(f"no backbone {name!r}")):
        load(name)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "masked"),
        ({"architectures": ["BertForPreTraining"]}, "masked"),
        ({"architectures": ["GPT2LMHeadModel"]}, "causal"),
        ({"architectures": ["LlamaForCausalLM"]}, "causal"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "seq2seq"),
        ({"architectures": ["BartModel"], "is_encoder_decoder": True}, "seq2seq"),
        ({"architectures": ["BertModel"]}, "encoder"),
        ({"architectures": None}, "encoder"),
    ],
)
def test_the_kind_is_told_by_the_architecture(config, kind):
    assert kind_of(config) == kind


def test_a_causal_backbone_gets_a_padding_token():
    tokenizer = tokenizers_zoo.KINDS["gpt2"]()
    assert tokenizer.pad_token is None
    backbone = wrap(zoo.model("gpt2"), tokenizer)
    assert backbone.tokenizer.pad_token == "<|endoftext|>"
    bare = tokenizers_zoo.KINDS["gpt2"]()
    bare.eos_token = bare.unk_token = None
    with pytest.raises(BackboneError, match="neither a padding nor an end-of-text token"):
        wrap(zoo.model("gpt2"), bare)


def test_a_model_without_a_head_must_be_named_an_encoder():
    with pytest.raises(BackboneError, match="load it with kind='encoder'"):
        wrap(zoo.model("bert-encoder"), tokenizers_zoo.build("bert"), kind="masked")


@pytest.mark.parametrize(("family", "longest"), [("bert", 64), ("roberta", 62), ("gpt2", 64), ("t5", 100_000)])
def test_the_longest_sequence_is_known(family, longest):
    backbone = zoo.build(family)
    assert backbone.max_length == longest
    if longest < 100:
        ids = torch.full((1, longest), 9)
        assert backbone.states({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fingerprint_changes_with_any_number_and_with_nothing_else(dtype):
    backbone = zoo.build("llama", dtype)
    first = backbone.fingerprint
    assert zoo.build("llama", dtype).fingerprint == first
    for p in list(backbone.model.parameters())[::3]:
        flat = p.data.view(-1)
        place = flat.numel() // 2
        kept = flat[place].clone()
        flat[place] = -kept
        assert wrap(backbone.model, backbone.tokenizer).fingerprint != first
        flat[place] = kept
        assert wrap(backbone.model, backbone.tokenizer).fingerprint == first
    p = backbone.model.get_input_embeddings().weight.data
    p[[3, 4]] = p[[4, 3]]
    assert wrap(backbone.model, backbone.tokenizer).fingerprint != first


class TestDemo:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip(demo.PACKAGE)
        demo.demo_folder.cache_clear()

    def test_it_loads(self):
        backbone = load("demo", device="cpu")
        assert (backbone.kind, backbone.width, backbone.name) == ("masked", 384, "demo")
        assert len(backbone.sites.select(["attn.q"])) == len(backbone.sites.select(["ffn.down"])) > 0

    def test_a_changed_package_is_refused(self, monkeypatch):
        monkeypatch.setattr(demo, "SHA256", "0" * 64)
        with pytest.raises(BackboneError, match="has sha256 53aa.*, the published model 0000.*install it again"):
            load("demo")

    @pytest.mark.parametrize("package", ["no_such_package", "tests.laws"])
    def test_a_missing_package_is_an_error(self, monkeypatch, package):
        monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
        with pytest.raises(BackboneError, match="which is not installed: pip install"):
            load("demo")
