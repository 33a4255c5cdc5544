"""Laws of naming by structure: what a site is called is what the model does there, on a spread of architectures."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from unittest.mock import patch

import pytest
import torch
from torch import nn

from deltaprompt.backbone.blocks import calls_attention
from deltaprompt.backbone.sites import is_norm, linear_sizes
from deltaprompt.conformance import shrink

SPREAD = (
    "masked:convbert",  # convolutions beside attention
    "masked:fnet",  # no attention
    "masked:funnel",  # blocks of layers, and a decoder without cross-attention
    "masked:luke",
    "masked:mobilebert",  # four feed-forward blocks in a layer
    "masked:modernvbert",  # text beside pictures
    "masked:reformer",  # queries that are keys
    "masked:xlm",  # lists side by side
    "causal:bailing_hybrid",  # attention that is a recurrence
    "causal:bamba",
    "causal:bloom",  # fused head by head
    "causal:blt",  # four stacks
    "causal:codegen",  # fused as q, v, k
    "causal:cpmant",
    "causal:dbrx",  # several heads share keys
    "causal:deepseek_v3",  # latent attention
    "causal:deepseek_v4",
    "causal:falcon",
    "causal:falcon_h1",  # attention and a mixer side by side
    "causal:falcon_mamba",
    "causal:gemma3",  # text beside pictures
    "causal:gemma3n_text",
    "causal:glm4",  # four norms in an order of their own
    "causal:gpt_bigcode",
    "causal:gpt_neox_japanese",
    "causal:granitemoehybrid",
    "causal:hrm_text",  # two stacks
    "causal:jamba",
    "causal:jetmoe",  # experts in attention
    "causal:kimi_linear",
    "causal:lfm2_moe",
    "causal:llama4_text",  # a router that is a linear map
    "causal:longcat_flash",  # two sub-layers in a layer
    "causal:minimax",
    "causal:moshi",
    "causal:mpt",
    "causal:nemotron_h",
    "causal:persimmon",
    "causal:phi4_multimodal",
    "causal:qwen3_next",
    "causal:recurrent_gemma",
    "causal:rwkv",
    "causal:xlnet",
    "causal:xlstm",
    "causal:zamba2",
    "seq2seq:encoder-decoder",
    "seq2seq:fsmt",
    "seq2seq:led",
    "seq2seq:nllb-moe",  # experts that are modules
    "seq2seq:prophetnet",
    "seq2seq:switch_transformers",
    "seq2seq:t5gemma",
)
HEADLESS = ("causal:prophetnet", "seq2seq:prophetnet")  # they predict several tokens at once
SET_APART = re.compile(r"norm|adapter|indexer|compressor")


@dataclass
class Run:
    """What was seen in a forward pass, by module path."""

    order: list[str] = field(default_factory=list)  # of modules as they were called, first calls only
    entered: dict[str, object] = field(default_factory=dict)  # the last first argument
    left: dict[str, object] = field(default_factory=dict)
    attention: dict[str, tuple] = field(default_factory=dict)  # q, k, v that the attention function got


@cache
def named(name: str):
    """A tiny backbone that is only read, and inputs for it."""
    architecture = next(a for a in shrink.known() if str(a) == name)
    model = shrink.tiny(architecture)
    with shrink._quiet():
        kind = "encoder" if name in HEADLESS else architecture.kind
        backbone = shrink.wrap(model, shrink.tokenizer_for(model), kind=kind, name=name)
    inputs = shrink.inputs_for(model, architecture)
    return backbone, inputs


@cache
def ran(name: str) -> Run:
    backbone, inputs = named(name)
    return watch(backbone.model, inputs)


def watch(model: nn.Module, inputs: dict) -> Run:
    """A forward pass of the whole model, seen through hooks."""
    run, handles = Run(), []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(entering, run, path), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(leaving, run, path)))
    try:
        with torch.no_grad(), spied(model, run):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return run


def entering(run, path, module, args, kwargs):
    if path not in run.entered:
        run.order.append(path)
    run.entered[path] = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)


def leaving(run, path, module, args, output):
    run.left[path] = output


@contextmanager
def spied(model: nn.Module, run: Run) -> Iterator[None]:
    """Within it every q, k, v that goes to transformers' attention functions is noted."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    paths = {id(m): p for p, m in model.named_modules()}

    def spy(inner, module, q, k, v, *args, **kw):
        run.attention[paths[id(module)]] = (q, k, v)
        return inner(module, q, k, v, *args, **kw)

    files = {type(m).__module__ for m in model.modules()}
    eager = [vars(sys.modules[f]) for f in files if "eager_attention_forward" in vars(sys.modules[f])]
    patches = [patch.dict(f, {"eager_attention_forward": partial(spy, f["eager_attention_forward"])}) for f in eager]
    patches.append(patch.dict(FUNCTIONS._local_mapping, {"sdpa": partial(spy, FUNCTIONS["sdpa"])}))
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def layers_of(backbone) -> dict[str, nn.Module]:
    """Path -> module of the layers that are sites."""
    found = {s.path: backbone.model.get_submodule(s.path) for s in backbone.sites.values() if s.kind == "layer"}
    assert found
    return found


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", SPREAD)
def test_every_map_and_norm_of_a_layer_is_a_site(name):
    backbone, _ = named(name)
    assert unnamed(backbone) == []


def unnamed(backbone) -> list[str]:
    paths = {site.path for site in backbone.sites.values() if site.kind in ("linear", "norm")}
    inside = {id(m) for s in backbone.sites.values() if re.search(r"layers\.\d+", s.name)
              for m in backbone.model.get_submodule(layer_path(s.path)).modules()}  # fmt: skip
    return [p for p, m in backbone.model.named_modules()
            if id(m) in inside and (linear_sizes(m) or is_norm(m)) and p not in paths]  # fmt: skip


def layer_path(path: str) -> str:
    """The path up to the first number: a layer, or one of XLM's."""
    return re.match(r"(.*?\.\d+)(\.|$)", path)[1]


@pytest.mark.parametrize("name", SPREAD)
def test_a_site_has_the_sizes_of_what_passes_it(name):
    backbone, _ = named(name)
    assert wrong_sizes(backbone, ran(name)) == []


def wrong_sizes(backbone, run: Run) -> list[str]:
    wrong = []
    for site in backbone.sites.values():
        if site.path not in run.left or site.kind == "attn":
            continue
        entry = run.entered[site.entry or site.path]
        left = first(run.left[site.path])
        if site.kind == "embed":
            ok = left.shape[-1] == site.outputs
        elif not isinstance(left, torch.Tensor):
            ok = False
        else:
            ok = site.kind == "norm" or (entry is not None and entry.shape[-1] == site.inputs)
            ok = ok and (site.part is not None or left.shape[-1] == site.outputs)
        if not ok:
            wrong.append(f"{site.name}: {getattr(entry, 'shape', None)} -> {getattr(left, 'shape', None)}, {site}")
    return wrong


@pytest.mark.parametrize("name", SPREAD)
def test_attention_sites_are_what_calls_attention(name):
    backbone, _ = named(name)
    assert wrong_attention(backbone, ran(name)) == []


def wrong_attention(backbone, run: Run) -> list[str]:
    sites = {s.path: s for s in backbone.sites.values() if s.kind == "attn"}
    text = [p for p in run.attention if any(p.startswith(f"{s}.") or p == s for s in all_layers(backbone))]
    wrong = [f"{path} calls attention and is no site" for path in text if path not in sites]
    for path in set(text) & set(sites):
        _, k, v = run.attention[path]
        site = sites[path]
        got = (k.shape[1], k.shape[1] * k.shape[-1], v.shape[1] * v.shape[-1])
        if (site.heads, site.outputs, site.values) != got:
            wrong.append(f"{site}: {got}")
    for path, site in sites.items():
        if path in run.left and path not in run.attention and calls_attention(backbone.model.get_submodule(path)):
            wrong.append(f"{site.name} did not call attention")
    return wrong


def all_layers(backbone) -> set[str]:
    return {layer_path(s.path) for s in backbone.sites.values() if re.search(r"layers\.\d+", s.name)}


@pytest.mark.parametrize("name", SPREAD)
def test_q_k_v_are_what_attention_gets_as_such(name):
    backbone, _ = named(name)
    assert wrong_queries(backbone, ran(name)) == []


def wrong_queries(backbone, run: Run) -> list[str]:
    """At position 0, where rotations do nothing: each map gives what is most like its own role, norms aside."""
    wrong = []
    for site in [s for s in backbone.sites.values() if s.kind == "attn" and s.path in run.attention]:
        got = dict(zip("qkv", (t[:, :, 0].flatten(1) for t in run.attention[site.path]), strict=True))
        for role in "qkv":
            own = backbone.sites.by_name.get(f"{site.name}.{role}")
            if own is None or own.path not in run.left or run.left[own.path].ndim != 3:
                continue
            y = run.left[own.path][:, 0] if own.part is None else own.part.take(run.left[own.path][:, 0])
            alike = {
                r: abs(float(torch.cosine_similarity(y, t, dim=1)[0])) for r, t in got.items() if t.shape == y.shape
            }
            if role in alike and max(alike, key=alike.get) != role:
                wrong.append(f"{own.name}: {alike}")
    return wrong


@pytest.mark.parametrize("name", SPREAD)
def test_layers_give_their_states_first(name):
    backbone, _ = named(name)
    assert wrong_layers(backbone, ran(name)) == []


def wrong_layers(backbone, run: Run) -> list[str]:
    wrong = []
    for site in backbone.sites.values():
        if site.kind == "layer" and site.path in run.left:
            y = first(run.left[site.path])
            if not isinstance(y, torch.Tensor) or not y.is_floating_point() or y.shape[-1] != site.outputs:
                wrong.append(f"{site}: {type(run.left[site.path])} {getattr(y, 'shape', None)}")
    return wrong


@pytest.mark.parametrize("name", SPREAD)
def test_every_stack_reads_text(name):
    backbone, _ = named(name)
    assert wrong_stacks(backbone, ran(name)) == []


def wrong_stacks(backbone, run: Run) -> list[str]:
    """Of every stack some layer ran: towers for pictures and sound are no part of the names."""
    stacks = set(backbone.sites.layer_counts)
    reading = {
        s.name.rpartition("layers.")[0] for s in backbone.sites.values() if s.kind == "layer" and s.path in run.left
    }
    plain = {s for s in stacks if not any(x.kind == "layer" and x.name.startswith(s) for x in backbone.sites.values())}
    return sorted(stacks - reading - plain)  # those without layers of their own: XLM's lists, attention by itself


@pytest.mark.parametrize("name", SPREAD)
def test_norms_stand_where_they_are_called(name):
    backbone, _ = named(name)
    assert wrong_norms(backbone, ran(name)) == []


def wrong_norms(backbone, run: Run) -> list[str]:
    """norm before post_norm, and those of attention before those of the feed-forward block, as they run."""
    wrong, at = [], {path: i for i, path in enumerate(run.order)}
    mixing = ["attn.norm", "mixer.norm", "attn.post_norm", "mixer.post_norm"]
    order = [*mixing, "cross.norm", "cross.post_norm", "ffn.norm", "ffn.post_norm"]
    for layer in {m[0] for n in backbone.sites if (m := re.match(r".*layers\.\d+", n))}:
        present = [f"{layer}.{role}" for role in order if f"{layer}.{role}" in backbone.sites]
        places = [at[backbone.sites[n].path] for n in present if backbone.sites[n].path in at]
        if places != sorted(places):
            wrong.append(f"{layer}: {present} run as {places}")
    return wrong


@pytest.mark.parametrize("name", SPREAD)
def test_parts_are_what_attention_uses_as_q_k_v(name):
    backbone, inputs = named(name)
    assert wrong_parts(backbone, inputs) == []


def wrong_parts(backbone, inputs) -> list[str]:
    """Changing k of a token that is alone, or q of the first of two, changes nothing later; changing v does, and k."""
    wrong = []
    for stem in sorted({n.rpartition(".")[0] for n, s in backbone.sites.items() if s.part and n.endswith(".v")})[:2]:
        q, k, v = (backbone.sites[f"{stem}.{p}"] for p in "qkv")
        alone = {s.name[-1]: moved(backbone, s, f"{stem}.o", 1) for s in (q, k, v)}
        first_of_two = {s.name[-1]: moved(backbone, s, f"{stem}.o", 2) for s in (q, k, v)}
        if not (alone["v"] > 1e-4 > 1e-6 > max(alone["q"], alone["k"])):
            wrong.append(f"{stem} alone: {alone}")
        if not (min(first_of_two["v"], first_of_two["k"]) > 1e-7 and first_of_two["q"] == 0):
            wrong.append(f"{stem} of two: {first_of_two}")
    return wrong


def moved(backbone, site, out: str, tokens: int) -> float:
    """How far what enters the output map at the last token moves when a part's columns do at the first."""
    entered, model = [], backbone.model
    ids = torch.arange(5, 5 + tokens)[None]

    def change(module, args, y):
        flat = y.reshape(tokens, -1)
        part = site.part.take(flat)
        noise = torch.zeros_like(part)
        noise[0] = torch.linspace(-1, 1, part.shape[-1]) + 0.5
        return site.part.put(flat, part + noise).reshape(y.shape)

    for hook in (None, change):
        handles = [model.get_submodule(backbone.sites[out].path).register_forward_pre_hook(
            lambda m, args: entered.append(args[0].reshape(tokens, -1)[-1].clone()))]  # fmt: skip
        if hook is not None:
            handles.append(model.get_submodule(site.path).register_forward_hook(hook))
        with torch.no_grad():
            backbone.base(input_ids=ids, attention_mask=torch.ones_like(ids))
        for handle in handles:
            handle.remove()
    return float((entered[1] - entered[0]).abs().max())


@pytest.mark.parametrize("name", SPREAD)
def test_the_gate_is_the_half_that_is_activated(name):
    backbone, _ = named(name)
    assert wrong_gates(backbone, ran(name)) == []


def wrong_gates(backbone, run: Run) -> list[str]:
    """The activation of a gated block gets its gate, never what is called up (Gemma 3n: some of the gate)."""
    wrong = []
    for gate in [s for n, s in backbone.sites.items() if re.search(r"(ffn|shared|experts\.\d+)\.gate$", n)]:
        up = backbone.sites[gate.name.removesuffix("gate") + "up"]
        holder = gate.path.rpartition(".")[0]
        for act in [p for p in run.entered if re.fullmatch(re.escape(holder) + r"\.\w*act\w*", p)]:
            y = first(run.left[up.path])
            if torch.equal(run.entered[act], up.part.take(y) if up.part else y):
                wrong.append(f"{act} gets {up.name}")
    return wrong


@pytest.mark.parametrize("name", SPREAD)
def test_mixers_are_entered_at_in_and_left_at_out(name):
    backbone, _ = named(name)
    assert wrong_mixers(backbone) == []


def wrong_mixers(backbone) -> list[str]:
    """A mixer has out, and in or q, k, v; in reads states as wide as out gives."""
    wrong = []
    for layer in {n[: n.index(".mixer.")] for n in backbone.sites if ".mixer." in n}:
        linear = {n.removeprefix(f"{layer}.mixer."): s for n, s in backbone.sites.items()
                  if n.startswith(f"{layer}.mixer.") and s.kind == "linear"}  # fmt: skip
        if not linear:
            continue
        enters = [linear[n].inputs for n in ("in", "q", "k", "v") if n in linear]
        if "out" not in linear or not enters or set(enters) != {linear["out"].outputs}:
            wrong.append(f"{layer}: {[(n, s.inputs, s.outputs) for n, s in linear.items()]}")
    return wrong


@pytest.mark.parametrize("name", [n for n in SPREAD if n not in HEADLESS])
def test_states_and_head_give_the_models_own_logits(name):
    backbone, inputs = named(name)
    assert wrong_scores(backbone, inputs) == []


def wrong_scores(backbone, inputs) -> list[str]:
    rows = torch.tensor([3, 0, 5])
    options = {"use_cache": False} if backbone.kind == "seq2seq" else {}  # FSMT is not causal with it
    with torch.no_grad():
        theirs = backbone.model(**inputs, **options).logits
        states = backbone.states(inputs)
        ours, some = backbone.head.logits(states), backbone.head.logits(states, rows)
    wrong = [] if states.shape[-1] == backbone.width else [f"width {backbone.width}: {states.shape}"]
    close = partial(torch.allclose, rtol=1e-4, atol=1e-4)
    if ours.shape != theirs.shape or not close(ours, theirs):
        wrong.append(f"logits: {ours.shape} {theirs.shape}")
    if not close(some, theirs[..., rows]):
        wrong.append("logits of some rows")
    return wrong


@pytest.mark.parametrize("name", SPREAD)
def test_any_model_is_an_encoder(name):
    backbone, inputs = named(name)
    assert wrong_encoder(backbone, inputs) == []


def wrong_encoder(backbone, inputs) -> list[str]:
    encoder = shrink.wrap(backbone.model, backbone.tokenizer, kind="encoder")
    with torch.no_grad():
        states = encoder.states({n: t for n, t in inputs.items() if not n.startswith("decoder")})
    right = states.shape[-1] == encoder.width and len(states) == len(inputs["input_ids"])
    wrong = [] if right and encoder.head is None else [f"{states.shape}, width {encoder.width}"]
    return wrong if "embed" in encoder.sites else [*wrong, "no embed"]


@pytest.mark.parametrize("name", SPREAD)
def test_the_word_embedding_is_embed(name):
    backbone, inputs = named(name)
    assert wrong_embedding(backbone, inputs) == []


def wrong_embedding(backbone, inputs) -> list[str]:
    """Every id of the text enters the site where ids become vectors (CPM-Ant adds others, XLNet turns them)."""
    site, read = backbone.sites[backbone.input_embedding], []
    embedding = backbone.model.get_submodule(site.path)
    handle = embedding.register_forward_pre_hook(lambda m, args: read.extend(args[0].flatten().tolist()))
    with torch.no_grad():
        backbone.model(**inputs)
    handle.remove()
    ids = set(inputs["input_ids"].flatten().tolist())
    return [] if site.kind == "embed" and ids <= set(read) else [f"{site} reads {sorted(set(read))}"]
