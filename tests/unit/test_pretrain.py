"""Language models trained on text: what is hidden, what is scored, what is kept, and what every mistake is told."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltaprompt.backbone import Backbone, load
from deltaprompt.backbone.fingerprint import fingerprint
from deltaprompt.cli.pretrain import Lines
from deltaprompt.cli.pretrain_recipe import build
from deltaprompt.cli.recipe import read_toml
from deltaprompt.compose import Adapted
from deltaprompt.deltas.bitfit import BitFit
from deltaprompt.deltas.ln_tuning import LNTuning
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.errors import ConfigError, DataError, SiteError, TrainingError
from deltaprompt.pretrain import Pretraining, Texts, Tuned, byte_level, new_backbone, pretrain
from deltaprompt.pretrain import text as text_module
from deltaprompt.pretrain.keep import DELTA, RECORD
from deltaprompt.pretrain.objectives import Masked, Spans, objective_of, packed
from deltaprompt.pretrain.scoring import Scorer, measured
from deltaprompt.pretrain.text import streams, tokens_of
from tests import backbones_zoo, tokenizers_zoo
from tests.command import run

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "a great movie . It was great , it was terrible !",
    "great plot and terrible acting : a good film , a bad film .",
    "the text of a review is good or bad ; sports , world , business",
    "In summary the cat sat on the mat and the dog was not there",
] * 6
FAST = Pretraining(steps=12, length=16, batch_size=4, learning_rate=2e-2, warmup=2, evaluate_every=6)
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
BERT = {**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "hidden_dropout_prob": 0.3}
NEW = {"masked": ("bert", BERT), "causal": ("llama", LLAMA), "spans": ("t5", {**T5, "dropout_rate": 0.3})}


def fresh(objective: Any, **sizes: Any) -> Backbone:
    """A new tiny model with pieces of the documents."""
    architecture, own = NEW[objective]
    tokenizer = byte_level(DOCUMENTS, 400, objective)
    return new_backbone(architecture, tokenizer, {**own, **sizes}, objective=objective, device="cpu")


def trained(backbone: Backbone, p: Pretraining = FAST, **given: Any) -> Any:
    return pretrain(backbone, given.pop("train", DOCUMENTS), given.pop("dev", DOCUMENTS[:4]), pretraining=p, **given)


def weights(backbone: Backbone) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in backbone.model.named_parameters()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Told:
    """A progress that is broken off after a step, as by Ctrl-C."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.losses, self.dev = last, list[float](), list[Mapping[str, float]]()

    def start(self, total: int, what: str) -> None:
        pass

    def step(self, step: int, loss: float) -> None:
        self.losses += [] if math.isnan(loss) else [loss]
        if step == self.last:
            raise KeyboardInterrupt

    def evaluated(self, metrics: Mapping[str, float], best: bool) -> None:
        self.dev.append(metrics)

    def done(self) -> None:
        pass


# Learning


@pytest.mark.parametrize("objective", NEW)
def test_a_new_model_learns(objective: str, tmp_path: Path) -> None:
    p = dataclasses.replace(FAST, steps=60, evaluate_every=20, learning_rate=1e-2, clip=math.inf)
    run = trained(fresh(objective), p, out=tmp_path)
    assert run.history[-1]["loss"] < 0.9 * run.history[0]["loss"]
    assert run.dev["texts"]["loss"] < run.history[0]["dev"]["texts"]["loss"]
    assert run.trainable == run.parameters
    opened = load(tmp_path, device="cpu")
    assert opened.kind == {"spans": "seq2seq"}.get(objective, objective)
    assert fingerprint(opened.model) == fingerprint(run.backbone.model)
    for text in (DOCUMENTS[0], "  blanks,\nlines and Ümläute "):
        assert opened.tokenizer(text)["input_ids"] == run.backbone.tokenizer(text)["input_ids"]
        ids = opened.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert opened.tokenizer.decode(ids) == text
    assert not (tmp_path / DELTA).exists()


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "roberta"])
def test_deltas_learn_and_the_model_takes_them_up(family: str, tmp_path: Path) -> None:
    backbone = backbones_zoo.build(family)
    before = weights(backbone)
    p = dataclasses.replace(FAST, steps=60, evaluate_every=20, length=10 if family == "t5" else 16)
    run = trained(backbone, p, deltas=[LoRA(rank=4, dropout=0.1), LNTuning()], out=tmp_path)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    changed = {name for name, p in run.backbone.model.named_parameters() if not torch.equal(p, before[name])}
    assert 0 < len(changed) < len(before)
    assert all(p.requires_grad for p in backbone.model.parameters())
    learned = load_file(tmp_path / DELTA)
    assert {t.dtype for t in learned.values()} == {torch.float16}
    assert sum(t.numel() for t in learned.values()) == run.trainable
    assert "0.layers.0.attn.q.a" in learned or "0.encoder.layers.0.attn.q.a" in learned
    # the model is the old one with just the stored deltas
    old = backbones_zoo.build(family)
    adapted = Adapted(old, [LoRA(rank=4, dropout=0.1), LNTuning()])
    with torch.no_grad():
        for name, tensor in adapted.parts():
            tensor[0].copy_(learned[name])
    adapted.merge()
    assert same(weights(old), weights(load(tmp_path, device="cpu")))


def test_the_head_learns_beside_the_deltas(tmp_path: Path) -> None:
    backbone = backbones_zoo.build("bert")
    before = weights(backbone)
    p = dataclasses.replace(FAST, head=True, head_learning_rate=3e-2)
    run = trained(backbone, p, deltas=[LoRA(rank=2, at=("attn.q",))], out=tmp_path)
    changed = {name for name, p in backbone.model.named_parameters() if not torch.equal(p, before[name])}
    head = {name for name in before if name.startswith("cls.")}
    assert head < changed
    assert not any("embeddings" in name for name in changed)
    learned = load_file(tmp_path / DELTA)
    assert {name for name in learned if name.startswith("head.")} == {f"head.{name}" for name in head}
    assert all(torch.equal(weights(run.backbone)[n], learned[f"head.{n}"].float()) for n in head)


def test_it_is_what_a_plain_loop_does() -> None:
    """The steps of a loop by hand: order, what is masked, rates, weight decay, clipping."""
    given = [Tuned(LoRA(rank=2, at=("layers.*",)), 2e-2, 0.5), Tuned(BitFit(at=("layers.*",)), weight_decay=0.0)]
    p = dataclasses.replace(FAST, head=True, head_learning_rate=3e-2, seed=3, clip=0.5, beta2=0.9)
    told = Told()
    trained(backbones_zoo.build("bert"), p, deltas=given, progress=told)

    b = backbones_zoo.build("bert")
    t = b.tokenizer
    ids = [i for d in DOCUMENTS for i in (*t(d, add_special_tokens=False)["input_ids"], t.sep_token_id)]
    rows = torch.tensor(ids[: len(ids) // 14 * 14]).view(-1, 14)
    a = Adapted(b, [one.delta for one in given], seeds=[3])
    parts = dict(a.parts())
    head = [q.requires_grad_(True) for n, q in b.model.named_parameters() if n.startswith("cls.")]
    own = [[q for n, q in parts.items() if n.startswith(f"{i}.")] for i in (0, 1)]
    decays = (0.5, 0.0, 0.0)
    groups = [{"params": q, "weight_decay": d} for q, d in zip([*own, head], decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.9))
    losses = []
    for step in range(p.steps):
        epoch, i = divmod(step, len(rows) // 4)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3 * 10_000_019 + epoch))
        c = rows[order[4 * i : 4 * i + 4]]
        c = torch.cat([torch.full((4, 1), t.cls_token_id), c, torch.full((4, 1), t.sep_token_id)], 1)
        draw = torch.rand(c.shape, generator=torch.Generator().manual_seed(3 * 10_000_019 + 1_000_000 + step))
        at = (draw < 0.2) & ~torch.isin(c, torch.tensor(t.all_special_ids))
        factor = min(1.0, (step + 1) / 2) * 0.5 * (1 + math.cos(math.pi * step / 12))
        for group, highest in zip(optimizer.param_groups, (2e-2, 2e-2, 3e-2), strict=True):
            group["lr"] = highest * factor
        x = c.masked_fill(at, t.mask_token_id)
        scores = b.model(input_ids=x, attention_mask=torch.ones_like(x)).logits
        loss = cross_entropy(scores[at], c[at])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([q for group in groups for q in group["params"]], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert told.losses == pytest.approx(losses, rel=1e-5)


def test_two_batches_of_2_are_one_of_4() -> None:
    runs = []
    for size in ({"batch_size": 4}, {"batch_size": 2, "accumulate": 2}):
        told = Told()
        trained(fresh("causal"), dataclasses.replace(FAST, **size), progress=told)
        runs.append(told.losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_the_same_seed_gives_the_same_numbers_and_another_others() -> None:
    state = torch.random.get_rng_state()
    made = [weights(trained(fresh("masked"), dataclasses.replace(FAST, seed=seed)).backbone) for seed in (1, 1, 2)]
    assert same(made[0], made[1])
    assert not same(made[0], made[2])
    assert torch.equal(state, torch.random.get_rng_state())


def test_bf16(tmp_path: Path) -> None:
    told = Told()
    trained(fresh("causal"), dataclasses.replace(FAST, precision="bf16"), progress=told, out=tmp_path)
    assert told.losses[-1] < told.losses[0]
    assert load(tmp_path, device="cpu").model.dtype == torch.float32


@pytest.mark.parametrize("dropout", [False, True])
def test_a_frozen_backbones_dropout_rests_unless_asked_for(dropout: bool) -> None:
    backbone = backbones_zoo.build("bert")
    seen: list[bool] = []
    module = backbone.model.get_submodule("bert.encoder.layer.0.output.dropout")
    module.register_forward_hook(lambda module, args, output: seen.append(module.training))
    p = dataclasses.replace(FAST, steps=2, evaluate_every=1, backbone_dropout=dropout)
    trained(backbone, p, deltas=[LoRA(rank=2)], dev=[])
    assert seen[-2:] == [dropout, dropout]


def test_schedules() -> None:
    p = Pretraining(steps=10, warmup=4)
    assert [p.factor(s) for s in (0, 3, 5)] == pytest.approx([0.25, 0.5 + 0.5 * math.cos(0.3 * math.pi), 0.5], rel=1e-6)
    assert dataclasses.replace(p, schedule="linear").factor(5) == pytest.approx(0.5)
    assert dataclasses.replace(p, schedule="constant", warmup=0).factor(0) == 1.0


def test_dropouts_of_a_delta_are_functions_of_the_step() -> None:
    told = [Told(), Told()]
    for each in told:
        torch.rand(7)  # whatever the caller drew before
        trained(backbones_zoo.build("bert"), deltas=[LoRA(rank=2, dropout=0.5)], progress=each)
    assert told[0].losses == told[1].losses


# What is hidden


@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
@settings(max_examples=40, deadline=None)
def test_special_tokens_are_never_masked(seed: int, rate: float) -> None:
    tokenizer = tokenizers_zoo.build("bert")
    objective = Masked.of(tokenizer, 12, rate)
    special = torch.tensor(tokenizer.all_special_ids)
    rows = torch.randint(0, len(tokenizer), (5, 10), generator=torch.Generator().manual_seed(seed))
    rows[:, ::4] = special[torch.randint(0, len(special), (5, 3), generator=torch.Generator().manual_seed(seed))]
    hidden = objective.scored(rows, torch.Generator().manual_seed(seed))
    ids = hidden.inputs["input_ids"]
    assert not torch.isin(hidden.labels[hidden.at], special).any()
    assert (ids[hidden.at] == tokenizer.mask_token_id).all()
    assert torch.equal(ids[~hidden.at], hidden.labels[~hidden.at])
    assert torch.equal(hidden.labels[:, 1:-1], rows)
    assert (ids[:, 0] == tokenizer.cls_token_id).all()
    assert (ids[:, -1] == tokenizer.sep_token_id).all()


def test_as_many_are_masked_as_asked_for() -> None:
    rows = torch.randint(5, 190, (400, 30))
    for rate in (0.1, 0.2, 0.4):
        objective = Masked.of(tokenizers_zoo.build("bert"), 32, rate)
        hidden = objective.scored(rows, torch.Generator().manual_seed(0))
        assert float(hidden.at[:, 1:-1].float().mean()) == pytest.approx(rate, abs=0.01)
        shares = objective.for_dev().scored(rows, torch.Generator().manual_seed(0)).at[:, 1:-1].float().mean()
        assert float(shares) == pytest.approx(0.15, abs=0.01)


def test_causal_rows_score_every_token_but_the_first() -> None:
    backbone = fresh("causal")
    rows = torch.arange(40).view(4, 10)
    hidden = objective_of(backbone, Pretraining(length=10)).scored(rows, torch.Generator())
    assert torch.equal(hidden.labels[hidden.at].view(4, 9), rows[:, 1:])
    assert torch.equal(hidden.inputs["input_ids"], rows)


@given(st.integers(2, 60), st.floats(0.05, 0.6), st.floats(1.0, 5.0), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_spans_reconstruct_the_text(length: int, rate: float, span: float, seed: int) -> None:
    tokenizer = byte_level_spans()
    objective = Spans.of(tokenizer, length + 6, rate, span, tokenizer.pad_token_id)
    rows = torch.randint(300, 390, (3, objective.room), generator=torch.Generator().manual_seed(seed))
    hidden = objective.scored(rows, torch.Generator().manual_seed(seed))
    ids, said = hidden.inputs["input_ids"], hidden.labels
    assert ids.shape[1] <= length + 6
    assert bool(hidden.at.all())
    assert said.shape[1] == objective.hidden + len(objective.sentinels) + 1
    sentinels = set(objective.sentinels)
    for row, read, spoken in zip(rows.tolist(), ids.tolist(), said.tolist(), strict=True):
        assert read[-1] == spoken[-1] == tokenizer.eos_token_id
        spans: dict[int, list[int]] = {}
        for token in spoken[:-1]:
            if token in sentinels:
                spans[token] = []
                name = token
            else:
                spans[name].append(token)
        assert list(spans) == list(objective.sentinels)
        assert all(spans.values())
        assert [t for token in read[:-1] for t in spans.get(token, [token])] == row
        assert not any(a in sentinels and b in sentinels for a, b in pairwise(read))
    start = hidden.inputs["decoder_input_ids"]
    assert torch.equal(start[:, 1:], said[:, :-1])
    assert (start[:, 0] == tokenizer.pad_token_id).all()


@pytest.fixture(autouse=True, scope="module")
def _made_once() -> None:
    byte_level_spans()


def byte_level_spans(made: list[Any] = []) -> Any:  # noqa: B006  made once
    if not made:
        made.append(byte_level(DOCUMENTS, 400, "spans"))
    return made[0]


def test_spans_lie_evenly_among_all_ways() -> None:
    """Of 4 tokens with 1 span of 2: at 0, 1 or 2, a third of the time each."""
    tokenizer = byte_level_spans()
    objective = Spans(4, 2, (tokenizer.convert_tokens_to_ids("<extra_id_0>"),), tokenizer.eos_token_id, 0)
    rows = torch.tensor([300, 301, 302, 303]).repeat(3000, 1)
    said = objective.scored(rows, torch.Generator().manual_seed(0)).labels
    counts = torch.bincount(said[:, 1] - 300, minlength=3)
    assert ((counts / 3000 - 1 / 3).abs() < 0.04).all()


# Packing


@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=6), st.integers(1, 3)
)
@settings(max_examples=30, deadline=None)
def test_packing_keeps_every_token_once(documents: list[str], repeat: int) -> None:
    tokenizer = tokenizers_zoo.build("gpt2")
    stream = tokens_of(documents, tokenizer, 7)
    ids = [i for d in documents for i in (*tokenizer(d, add_special_tokens=False)["input_ids"], 7)]
    assert stream.tolist() == ids
    whole = stream.repeat(repeat)
    rows = packed(whole, 8)
    assert rows.flatten().tolist() == (ids * repeat)[: len(rows) * 8]
    assert len(ids) * repeat - rows.numel() < 8


def test_an_epoch_has_every_row_once_and_the_next_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    backbone = fresh("causal")
    objective = objective_of(backbone, FAST)
    own = type(objective).scored
    monkeypatch.setattr(type(objective), "scored", lambda self, rows, g: seen.append(rows) or own(self, rows, g))
    stream = tokens_of(DOCUMENTS, backbone.tokenizer, objective.end)
    rows = packed(stream, 16)
    epoch = len(rows) // 4
    trained(backbone, dataclasses.replace(FAST, steps=2 * epoch, evaluate_every=1000), dev=[])
    first, second = (torch.cat(seen[at : at + epoch]).tolist() for at in (0, epoch))
    assert first != second
    every = sorted(rows.tolist())
    assert sorted(first) == every or len(rows) % 4
    assert all(row in every for row in first + second)


def test_documents_in_portions_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizers_zoo.build("bert")
    whole = tokens_of(DOCUMENTS, tokenizer, 3)
    monkeypatch.setattr(text_module, "AT_ONCE", 100)
    assert torch.equal(tokens_of(DOCUMENTS, tokenizer, 3), whole)


def test_files(tmp_path: Path) -> None:
    rows = [{"body": f"document {n}"} for n in range(10)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        f.write("\n".join(json.dumps(row) for row in [*rows, {"body": " "}]))
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    with gzip.open(tmp_path / "c.txt.gz", "wt") as f:
        f.write("three")
    jsonl = Texts(str(tmp_path / "a.jsonl.gz"), text="body")
    assert jsonl.read() == [row["body"] for row in rows]
    assert dataclasses.replace(jsonl, documents=2, limit=4).read() == ["docu", "docu"]
    train, held = dataclasses.replace(jsonl, hold_out=4).parted()
    assert held == ["document 3", "document 7"]
    assert sorted(train + held) == jsonl.read()
    assert Texts(str(tmp_path / "b.txt")).read() == ["one\n\ntwo\n"]
    assert Texts(str(tmp_path / "*.txt*")).read() == ["one\n\ntwo\n", "three"]
    tokenizer = tokenizers_zoo.build("bert")
    learned, kept = streams([dataclasses.replace(jsonl, hold_out=4, repeat=3), "more", "text"], tokenizer, 3)
    assert [(s.documents, s.repeat) for s in learned] == [(8, 3), (2, 1)]
    assert [(s.documents, s.repeat) for s in kept] == [(2, 1)]
    assert torch.equal(learned[0].whole(), learned[0].tokens.repeat(3))


def test_held_out_documents_are_dev(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in DOCUMENTS))
    source = Texts(str(tmp_path / "a.jsonl"), hold_out=4)
    told = dataclasses.replace(FAST, dev_rows=3)
    run = trained(fresh("causal"), told, train=[source], dev=[source.path and Texts(source.path)], out=tmp_path / "o")
    assert list(run.dev) == [source.path, f"{source.path} (2)"]
    assert run.dev[source.path]["tokens"] == 3 * 15
    record = json.loads((tmp_path / "o" / RECORD).read_text())
    assert [(s["role"], s["documents"]) for s in record["sources"]] == [("train", 18), ("dev", 6), ("dev", 24)]
    assert record["steps"] == 12
    assert record["tokens"] == 12 * 4 * 16
    assert record["settings"]["length"] == 16


# What is scored


@pytest.mark.parametrize("objective", NEW)
def test_only_scored_positions_go_through_the_head(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = fresh(objective)
    assert backbone.head is not None
    seen: list[torch.Size] = []
    own = type(backbone.head).logits

    def logits(self: Any, states: Tensor, rows: Tensor | None = None) -> Tensor:
        seen.append(states.shape)
        return own(self, states, rows)

    monkeypatch.setattr(type(backbone.head), "logits", logits)
    rows = torch.randint(10, 200, (4, objective_of(backbone, FAST).room))
    hidden = objective_of(backbone, FAST).scored(rows, torch.Generator().manual_seed(0))
    Scorer(backbone, None)(hidden)
    assert seen == [(int(hidden.at.sum()), 16)]


@pytest.mark.parametrize("objective", NEW)
def test_scores_in_portions_give_the_same_loss_and_gradients(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = fresh(objective)
    assert backbone.head is not None
    rows = torch.randint(10, 200, (4, objective_of(backbone, FAST).room))
    hidden = objective_of(backbone, FAST).scored(rows, torch.Generator().manual_seed(0))
    most: list[int] = []
    own = type(backbone.head).logits
    monkeypatch.setattr(
        type(backbone.head), "logits", lambda self, s, rows=None: most.append(len(s)) or own(self, s, rows)
    )
    found = []
    for at_once in (None, 3):
        backbone.model.zero_grad()
        most.clear()
        loss = Scorer(backbone, None, at_once)(hidden)
        loss.backward()
        found.append((loss, [None if p.grad is None else p.grad.clone() for p in backbone.model.parameters()]))
    assert max(most) == 3
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-4)


def test_what_is_measured() -> None:
    backbone = fresh("masked")
    objective = objective_of(backbone, FAST)
    rows = torch.randint(10, 200, (9, 14), generator=torch.Generator().manual_seed(1))
    told = measured(Scorer(backbone, None).eval(), objective, rows.int(), 2, torch.no_grad)
    hidden = objective.scored(rows, torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = backbone.model(**hidden.inputs).logits[hidden.at]
    gold = hidden.labels[hidden.at]
    assert told["tokens"] == len(gold)
    assert told["loss"] == pytest.approx(float(cross_entropy(scores, gold)), rel=1e-5)
    assert told["accuracy"] == pytest.approx(float((scores.argmax(-1) == gold).float().mean()))


# Going on


P = dataclasses.replace(FAST, steps=10, evaluate_every=4, checkpoint_every=3)


def one_run(out: Path | None, resume: bool = False, progress: Any = None) -> Any:
    backbone = backbones_zoo.build("bert")
    deltas = [LoRA(rank=2, dropout=0.3)]
    p = dataclasses.replace(P, head=True)
    return trained(backbone, p, deltas=deltas, out=out, resume=resume, progress=progress)


def result(out: Path) -> tuple[bytes, bytes, Any]:
    """The bytes of the tensors that a finished run left, and its record without the time."""
    assert not (out / "checkpoint").exists()
    record = json.loads((out / RECORD).read_text())
    del record["seconds"]
    return (out / "model.safetensors").read_bytes(), (out / DELTA).read_bytes(), record


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("unbroken")
    one_run(out)
    return result(out)


@pytest.mark.parametrize("last", [1, 3, 5, 10])
def test_broken_off_and_gone_on_it_is_bitwise_the_same(last: int, tmp_path: Path, unbroken: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        one_run(tmp_path, progress=Told(last))
    assert not (tmp_path / RECORD).exists()
    told = Told()
    one_run(tmp_path, resume=True, progress=told)
    written = max(s for s in (0, 3, 6, 9) if s < last)
    assert len(told.losses) in (10 - written, 11 - written)  # the last loss is shown again
    assert result(tmp_path) == unbroken


def test_broken_off_while_it_is_kept(tmp_path: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            one_run(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    one_run(tmp_path, resume=True)
    assert result(tmp_path) == unbroken


def test_a_finished_run_is_returned_at_once(tmp_path: Path, unbroken: Any) -> None:
    first = one_run(tmp_path)
    told = Told()
    again = one_run(tmp_path, resume=True, progress=told)
    assert told.losses == []
    assert again.as_json() == json.loads(json.dumps(first.as_json()))
    assert fingerprint(again.backbone.model) == fingerprint(first.backbone.model)
    with pytest.raises(KeyboardInterrupt):  # without resume it begins anew, and what was there is no finished run
        one_run(tmp_path, progress=Told(1))
    assert not (tmp_path / RECORD).exists()


def test_other_settings_or_texts_cannot_go_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        one_run(tmp_path, progress=Told(5))
    backbone = backbones_zoo.build("bert")
    p = dataclasses.replace(P, head=True, learning_rate=1e-3)
    with pytest.raises(ConfigError, match="learning_rate was 0.02 and is now 0.001"):
        trained(backbone, p, deltas=[LoRA(rank=2, dropout=0.3)], out=tmp_path, resume=True)
    p = dataclasses.replace(P, head=True)
    with pytest.raises(ConfigError, match="texts was .* and is now"):
        trained(backbone, p, deltas=[LoRA(rank=2, dropout=0.3)], out=tmp_path, resume=True, train=DOCUMENTS[1:])


RECIPE = """
[model]
type = "llama"
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2

[tokenizer]
pieces = 400

[[data]]
path = "{file}"
hold_out = 6
repeat = 40

[pretraining]
steps = 300
length = 16
batch_size = 4
evaluate_every = 20
checkpoint_every = 10
warmup = 10
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in DOCUMENTS))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("{file}", str(tmp_path / "texts.jsonl")))
    return path


def command(*arguments: object) -> Any:
    return run("pretrain", *arguments)


def test_killed_and_gone_on_it_is_bitwise_the_same(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL, in the command."""
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, sys.path)])
    line = [sys.executable, "-m", "deltaprompt", "pretrain", str(recipe), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.DEVNULL)
    folder = tmp_path / "killed" / "checkpoint"
    for _ in range(6000):
        if folder.is_dir() and any(path.name.startswith("step-") for path in folder.iterdir()):
            break
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / RECORD).exists()
    for name, more in (("killed", ["--resume"]), ("whole", [])):
        done = command(recipe, "--out", tmp_path / name, *more)
        assert done.exit_code == 0, done.output
    for file in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# The command


def test_the_command(recipe: Path, tmp_path: Path) -> None:
    done = command(recipe, "--out", tmp_path / "o", "--steps", 50, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["steps"] == 50
    assert told["out"] == str(tmp_path / "o")
    assert "step 50/50  loss" in done.stderr
    assert "dev accuracy" in done.stderr
    assert load(tmp_path / "o", device="cpu").kind == "causal"
    shown = command(recipe, "--out", tmp_path / "o", "--steps", 50, "--resume")
    assert "is a model" in shown.stdout
    assert "tokens guessed" in shown.stdout


def test_the_command_trains_deltas_on_a_folder(recipe: Path, tmp_path: Path) -> None:
    backbone = backbones_zoo.build("bert")
    backbone.model.save_pretrained(tmp_path / "bert")
    backbone.tokenizer.save_pretrained(tmp_path / "bert")
    text = recipe.read_text()
    body = text[text.index("[[data]]") :].replace("steps = 300", "steps = 3")
    recipe.write_text(
        f'out = "{tmp_path / "o"}"\ndeltas = ["lora:rank=2", {{kind = "bitfit", learning_rate = 0.1}}]\n'
        f'[backbone]\nname = "{tmp_path / "bert"}"\nattention = "eager"\n{body}'
    )
    done = command(recipe)
    assert done.exit_code == 0, done.output
    with safe_open(tmp_path / "o" / DELTA, "pt") as f:
        told = json.loads(f.metadata()["learned"])["deltas"]
    assert [each["kind"] for each in told] == ["lora", "bitfit"]
    record = json.loads((tmp_path / "o" / RECORD).read_text())
    assert [d["learning_rate"] for d in record["settings"]["deltas"]] == [None, 0.1]


@pytest.mark.parametrize("name", ["demo-mlm", "small-causal", "small-seq2seq"])
def test_the_shipped_recipes_read(name: str) -> None:
    made = build(read_toml(ROOT / "recipes" / f"{name}.toml"))
    assert all("test.jsonl" not in source.path for source in (*made.data, *made.dev))


def test_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second a step after the 40 that were made before; dev takes 100."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    lines = Lines(100)
    lines.start(60, "pretrain")
    lines.step(40, 9.0)
    for step in range(41, 61):
        clock[0] += 1.0
        lines.step(step, 2.0)
        if step == 45:
            clock[0] += 100.0
            lines.evaluated({"accuracy": 0.5, "loss": 1.0}, True)
    lines.done()
    assert capsys.readouterr().err.splitlines() == [
        "    dev accuracy 0.5000  loss 1.0000",
        "step 50/60  loss 2.0000  100 tokens/s",
        "step 60/60  loss 2.0000  100 tokens/s",
    ]


RECIPES: list[tuple[str, str]] = [
    ("[backbonee]\nname = 'demo'", "unknown key 'backbonee' in the recipe; did you mean 'backbone'?"),
    ("[pretraining]\nsteps = 3", "either [backbone] name = …, a pretrained model to go on with, or [model]"),
    ("[backbone]\nname = 'x'\n[model]\ntype = 'llama'", "it has both"),
    ("[backbone]\nkind = 'masked'", "[backbone] is a table with the key 'name'"),
    ("[backbone]\nname = ''", "[backbone] name is empty"),
    ("[model]\ntype = 'llama'", "a new model needs a [tokenizer]: pieces = 8192"),
    ("[backbone]\nname = 'x'\n[tokenizer]\npieces = 5", "a pretrained backbone has its own tokenizer"),
    ("[model]\ntype = 'llama'\n[tokenizer]\npieces = 5\nfrom = 'x'", "[tokenizer] has one key, pieces or from"),
    ("[model]\ntype = 'llama'\n[tokenizer]\npices = 5", "did you mean 'pieces'?"),
    ("[backbone]\nname = 'x'\n[[data]]\nfile = 'a'", "[[data]] 1 is a table with the key 'path'"),
    ("[backbone]\nname = 'x'\n[[data]]\npath = 'a'\nrepeats = 3", "unknown key 'repeats' in [[data]] 1"),
    ("[backbone]\nname = 'x'\n[[data]]\npath = 'a'\nrepeat = 0", "repeat = 0 is not possible"),
    ("[backbone]\nname = 'x'\n[[data]]\npath = 'a'\nlimit = 0", "limit = 0 is not possible"),
    ("[backbone]\nname = 'x'\n[[data]]\npath = 'a'\nhold_out = 1", "hold_out = 1 is not possible: it is 2 or more"),
    ("[backbone]\nname = 'x'\n[[deltas]]\nrank = 2", "[[deltas]] 1 is a table with the key 'kind'"),
    ("[backbone]\nname = 'x'\n[[deltas]]\nkind = 'lora'\nlearning_rate = 0.0", "a delta's learning_rate = 0.0"),
    ("[backbone]\nname = 'x'\n[[deltas]]\nkind = 'lora'\nweight_decay = -1.0", "a delta's weight_decay = -1.0"),
    ("[backbone]\nname = 'x'\n[pretraining]\nlearning_rat = 2", "did you mean 'learning_rate'"),
    ("[backbone]\nname = 'x'\n[pretraining]\nsteps = 2", "nowhere to keep the model"),
]


@pytest.mark.parametrize(("text", "message"), RECIPES)
def test_recipes_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    done = command(tmp_path / "r.toml")
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.output


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps = 0 is not possible"),
        ({"length": 4}, "length = 4 is not possible"),
        ({"rate": 1.0}, "rate = 1.0 is not possible: it is a share of the tokens"),
        ({"span": 0.5}, "span = 0.5"),
        ({"objective": "electra"}, "objective = 'electra' is not possible: it is masked, causal or spans"),
        ({"schedule": "step"}, "schedule = 'step'"),
        ({"precision": "int8"}, "precision = 'int8'"),
        ({"beta2": 1.0}, "beta2 = 1.0"),
        ({"warmup": -1}, "warmup = -1"),
        ({"clip": 0}, "clip = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"head": 1}, "head = 1 is not possible: it is true or false"),
        ({"scored_at_once": 0}, "scored_at_once = 0"),
        ({"learning_rate": math.inf}, "learning_rate = inf"),
        ({"objective": "causal", "rate": 0.1}, "rate = 0.1 is for masked tokens and spans"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        Pretraining(**options)
    assert message in str(told.value)


def refused(error: type[Exception], message: str, backbone: Backbone, p: Pretraining = FAST, **given: Any) -> None:
    before = weights(backbone)
    with pytest.raises(error) as told:
        trained(backbone, p, **given)
    assert message in str(told.value)
    assert same(before, weights(backbone))
    assert all(part.requires_grad for part in backbone.model.parameters())


def test_what_does_not_go_together() -> None:
    bert, llama = backbones_zoo.build("bert"), backbones_zoo.build("llama")
    refused(ConfigError, "objective = 'causal' does not go with a backbone of kind 'masked'", bert, objective("causal"))
    refused(ConfigError, "length = 200 is more than the 64 tokens", bert, dataclasses.replace(FAST, length=200))
    refused(DataError, "rows of 14, and a step takes 4", bert, train=["a great movie"])
    refused(ConfigError, "there is no text to train on", bert, train=[])
    refused(ConfigError, "without deltas all of the model trains", bert, dataclasses.replace(FAST, head=True))
    refused(SiteError, "Prefix has no form in weights", bert, deltas=[Prefix(length=2)])
    refused(SiteError, "gated", bert, deltas=[LoRA(rank=2, gated=True)])
    refused(SiteError, "needs a bias", llama, deltas=[BitFit()])
    refused(SiteError, "matches no site", bert, deltas=[LoRA(at=("nowhere",))])
    refused(
        ConfigError,
        "has no head beside its embedding",
        backbones_zoo.build("gpt2"),
        dataclasses.replace(FAST, head=True),
        deltas=[LoRA(rank=2)],
    )
    encoder = backbones_zoo.build("bert-encoder")
    refused(ConfigError, "is of kind 'encoder', which has no head to guess tokens with", encoder)
    refused(ConfigError, "needs as many sentinels; the tokenizer has no <extra_id_0>", backbones_zoo.build("bart"))
    refused(ConfigError, "needs a cls_token", with_tokenizer("bert", "gpt2"))
    half = backbones_zoo.build("bert", torch.bfloat16)
    refused(ConfigError, "is not float32", half)


def objective(name: Any) -> Pretraining:
    return dataclasses.replace(FAST, objective=name)


def with_tokenizer(family: str, kind: str) -> Backbone:
    return dataclasses.replace(backbones_zoo.build(family), tokenizer=tokenizers_zoo.build(kind))


def test_a_loss_that_is_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = Scorer.forward
    calls: list[int] = []

    def forward(self: Scorer, scored: Any) -> Tensor:
        calls.append(0)
        return own(self, scored) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(Scorer, "forward", forward)
    backbone = backbones_zoo.build("bert")
    p = dataclasses.replace(FAST, checkpoint_every=2, head=True)
    given = {"deltas": [LoRA(rank=2)], "out": tmp_path}
    refused(TrainingError, "the loss is nan at step 5, so training stopped; the checkpoint", backbone, p, **given)
    calls.clear()
    refused(TrainingError, "nothing is kept", backbone, p, deltas=[LoRA(rank=2)])


def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Scorer, scored: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Scorer, "forward", forward)
    message = "memory ran out with batch_size = 4. Try batch_size = 2 with accumulate = 2"
    refused(TrainingError, message, backbones_zoo.build("bert"), deltas=[LoRA(rank=2)])


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "latin.txt").write_bytes("Müll".encode("latin-1"))
    for source, message in [
        (Texts(str(tmp_path / "no.txt")), "there is no file"),
        (Texts(str(tmp_path / "no*.txt")), "no file is of that pattern"),
        (Texts(str(tmp_path / "a.jsonl")), "the column 'text' holds 3; a document is text"),
        (Texts(str(tmp_path / "a.jsonl"), text="body"), "there is no column 'body'; there are text"),
        (Texts(str(tmp_path / "empty.txt")), "holds no document"),
        (Texts(str(tmp_path / "latin.txt")), "must be UTF-8 text"),
        (Texts(str(tmp_path / "no.jsonl")), "is neither a file nor"),
    ]:
        with pytest.raises(DataError) as told:
            source.read()
        assert message in str(told.value)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match="hold_out = 3 takes every 3th of its documents, and it has 1"):
        Texts(str(tmp_path / "b.txt"), hold_out=3).parted()


@pytest.mark.parametrize(
    ("architecture", "sizes", "asked", "message"),
    [
        ("lama", {}, None, "no architecture 'lama'; did you mean 'llama'"),
        (
            "llama",
            {"hiden_size": 4},
            None,
            "the config of 'llama' has no field 'hiden_size'; did you mean 'hidden_size'",
        ),
        ("llama", {"vocab_size": 4}, None, "vocab_size is the tokenizer's"),
        ("llama", {"hidden_size": "wide"}, None, "cannot be made with these sizes"),
        ("llama", {"hidden_size": 30, "num_attention_heads": 4}, None, "not a multiple of"),
        ("llama", {}, "masked", "'llama' cannot be trained for the objective 'masked'; possible: causal"),
        ("t5", {}, "causal", "possible: spans"),
        ("vit", {}, None, "it is no language model"),
    ],
)
def test_models_that_cannot_be_made(architecture: str, sizes: Any, asked: Any, message: str) -> None:
    with pytest.raises(ConfigError) as told:
        new_backbone(architecture, tokenizers_zoo.build("gpt2"), sizes, objective=asked, device="cpu")
    assert message in str(told.value)


def test_too_few_pieces() -> None:
    with pytest.raises(ConfigError, match="a vocabulary of 300 pieces is too small: 359 are"):
        byte_level(DOCUMENTS, 300, "spans")


def test_a_folder_of_a_newer_version_or_damaged(tmp_path: Path) -> None:
    one_run(tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**record, "schema": 99}))
    with pytest.raises(ConfigError, match="newer version"):
        one_run(tmp_path, resume=True)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        one_run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_learning_rate": 3e-3}, "head_learning_rate is of a head that trains; give head = true"),
        ({"objective": "masked", "span": 3.0}, "span = 3.0 is the length of spans; leave it out of the masked"),
    ],
)
def test_options_that_nothing_would_be_done_with(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pretraining(**options)


def test_options_are_checked_for_the_objective_that_a_backbone_tells() -> None:
    with pytest.raises(ConfigError, match="rate = 0.9 is for masked tokens and spans"):
        objective_of(fresh("causal"), Pretraining(rate=0.9, length=16))


def test_dev_texts_that_could_not_be_measured_by_are_said(tmp_path: Path) -> None:
    p, backbone = Pretraining(length=16, batch_size=1, steps=1), fresh("causal")
    (tmp_path / "dev.txt").write_text("a")
    with pytest.raises(DataError, match=r"dev.txt has .* tokens to measure by, and a row has"):
        trained(backbone, p, dev=[Texts(str(tmp_path / "dev.txt"))])
    with pytest.raises(ConfigError, match=r"dev.txt is all to measure by .* leave hold_out out"):
        trained(backbone, p, dev=[Texts(str(tmp_path / "dev.txt"), hold_out=2)])
