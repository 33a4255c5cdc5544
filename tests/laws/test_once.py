"""Frozen work done once gives the losses and tensors of frozen work done again, or is not done once and says why."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaprompt.backbone import Backbone
from deltaprompt.deltas._base import Delta
from deltaprompt.deltas.lora import LoRA
from deltaprompt.deltas.prefix import Prefix
from deltaprompt.deltas.soft_prompt import SoftPrompt
from deltaprompt.model import Model, Task, adapt, shelf
from deltaprompt.model.below import Below, below
from deltaprompt.model.once import Once
from deltaprompt.trainer import Run, Training, fit
from deltaprompt.trainer.progress import Silent
from deltaprompt.types import Example
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.prototypes import Prototypes
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo

WORDS = {"good": ("great",), "bad": ("terrible",)}
TEXTS = ["a great movie", "terrible acting", "a good film", "a bad film", "good acting, a good great plot", "bad plot"]
TRAIN = [Example({"text": text}, ("good", "bad")[n % 2]) for n, text in enumerate(TEXTS)]
DEV = [Example({"text": text}, ("good", "bad")[n % 2]) for n, text in enumerate(["good plot", "a terrible bad film"])]
EPOCHS = Training(epochs=4, batch_size=2, learning_rate=1e-2)
UPPER = LoRA(rank=2, at=("layers[1:].attn.*", "layers[1:].ffn.*"), dropout=0.2)
EITHER = [[UPPER], []]
EXACT = 1e-11  # in float64


class Told(Silent):
    """Keeps what the progress line says; `broken` at a step."""

    def __init__(self, broken: int | None = None) -> None:
        self.what, self.broken = "", broken

    def start(self, total: int, what: str) -> None:
        self.what = what

    def step(self, step: int, loss: float) -> None:
        if step == self.broken:
            raise KeyboardInterrupt


def make(backbone: Backbone, deltas: Sequence[Delta], verbalizer: Any = None, template: str = "") -> Model:
    template = template or ("{text} It was" if backbone.kind == "causal" else "{text} It was {mask}.")
    return adapt(backbone, Task(template, WORDS, verbalizer or Prototypes()), deltas)


def trained(model: Model, training: Training = EPOCHS, **options: Any) -> tuple[Run, dict[str, Tensor], str]:
    """A run, the tensors that it came to, and what the progress line said."""
    told = Told()
    try:
        run = fit(model, TRAIN, DEV, training=training, progress=told, what="", **options)
        return run, {name: t.detach().clone() for name, t in model.parts()}, told.what
    finally:
        model.adapted.remove()


def losses(run: Run) -> list[float]:
    return [loss for entry in run.history for loss in (entry["loss"], entry["dev"]["loss"])]


def assert_same(a: tuple[Run, dict[str, Tensor], str], b: tuple[Run, dict[str, Tensor], str], atol: float) -> None:
    torch.testing.assert_close(losses(a[0]), losses(b[0]), atol=atol, rtol=0)
    for name, tensor in a[1].items():
        torch.testing.assert_close(tensor, b[1][name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama", "mpnet-encoder", "gpt_neo"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return backbones_zoo.build(request.param, torch.float64)


@pytest.fixture(scope="module")
def bert() -> Backbone:
    return backbones_zoo.build("bert", torch.float64)


# The same


@pytest.mark.parametrize("deltas", EITHER, ids=["upper layers", "no delta"])
def test_the_same_as_without(backbone: Backbone, deltas: Sequence[Delta]) -> None:
    kept = trained(make(backbone, deltas))
    assert_same(kept, trained(make(backbone, deltas), replace(EPOCHS, keep=False)), EXACT)
    assert kept[2] == (", its lowest layer kept" if deltas else ", the backbone's states kept")


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_is_run_once_where_deltas_are_in_the_decoder(family: str) -> None:
    backbone = backbones_zoo.build(family, torch.float64)
    deltas = [LoRA(rank=2, at=("decoder.*.attn.q", "decoder.*.cross.v"))]
    kept = trained(make(backbone, deltas))
    assert_same(kept, trained(make(backbone, deltas), replace(EPOCHS, keep=False)), EXACT)
    assert kept[2] == ", its encoder's states kept"


def test_float32_to_a_millionth() -> None:
    backbone, usual = backbones_zoo.build("bert"), replace(EPOCHS, learning_rate=1e-3)  # rounding grows with the rate
    kept = trained(make(backbone, [UPPER]), usual)
    plain = trained(make(backbone, [UPPER]), replace(usual, keep=False))
    torch.testing.assert_close(losses(kept[0]), losses(plain[0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("change", [{"checkpointing": True}, {"accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_with_other_options(bert: Backbone, change: dict[str, Any]) -> None:
    training = replace(EPOCHS, **change)
    kept = trained(make(bert, [UPPER]), training)
    tolerance = 1e-2 if "precision" in change else EXACT
    assert_same(kept, trained(make(bert, [UPPER]), replace(training, keep=False)), tolerance)
    assert kept[2] == ", its lowest layer kept"


@pytest.mark.parametrize("verbalizer", [LabelWords(WORDS), SoftVerbalizer()], ids=["label words", "head"])
def test_with_other_verbalizers(bert: Backbone, verbalizer: Any) -> None:
    deltas = [UPPER] if isinstance(verbalizer, LabelWords) else []
    without = trained(make(bert, deltas, verbalizer), replace(EPOCHS, keep=False))
    assert_same(trained(make(bert, deltas, verbalizer)), without, EXACT)


@pytest.mark.parametrize("deltas", EITHER, ids=["upper layers", "no delta"])
def test_frozen_layers_see_every_text_once(bert: Backbone, deltas: Sequence[Delta]) -> None:
    seen = list[int]()
    model = make(bert, deltas)
    layer = bert.model.get_submodule(bert.sites["layers.0"].path).get_submodule("attention.self.query")
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    trained(model)
    handle.remove()
    looks = 3 if not deltas else 5  # which part lies below is seen on one text, alone and beside another
    assert sum(seen) == len(TRAIN) + len(DEV) + looks


def test_afterwards_nothing_is_left_on_the_backbone(bert: Backbone) -> None:
    model = make(bert, [UPPER])
    fit(model, TRAIN, training=EPOCHS)
    assert model.once is None
    assert not any("forward" in vars(module) for module in bert.model.modules())
    model.adapted.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bert.model.modules())


def test_a_run_that_was_broken_off_comes_to_the_same(bert: Backbone, tmp_path: Path) -> None:
    whole = trained(make(bert, [UPPER]), seed=3)
    model = make(bert, [UPPER])
    with pytest.raises(KeyboardInterrupt):
        fit(model, TRAIN, DEV, training=EPOCHS, seed=3, out=tmp_path / "out", progress=Told(broken=8))
    model.adapted.remove()
    again = trained(make(bert, [UPPER]), seed=3, out=tmp_path / "out", resume=True)
    assert losses(again[0]) == losses(whole[0])
    assert all(torch.equal(tensor, whole[1][name]) for name, tensor in again[1].items())


# Where it is kept


@pytest.mark.parametrize("deltas", EITHER, ids=["upper layers", "no delta"])
@pytest.mark.parametrize("disk", [0.5, 0.0], ids=["on the disk", "nowhere"])
def test_beyond_the_memory(
    bert: Backbone, deltas: Sequence[Delta], disk: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = trained(make(bert, deltas), replace(EPOCHS, keep=False))
    monkeypatch.setattr(shelf, "MEMORY", 1000)
    monkeypatch.setattr(shelf, "OF_DISK", disk)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert_same(trained(make(bert, deltas)), without, EXACT)
    assert not list(tmp_path.iterdir())


def test_a_run_broken_off_leaves_no_file(bert: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, closed, files = make(bert, [UPPER]), list[bool](), list[Any]()

    class Looks(Told):
        def step(self, step: int, loss: float) -> None:
            assert isinstance(model.once, Once)
            files.append(model.once.shelf._file)
            closed.append(bool(list(tmp_path.iterdir())))  # a file with a name would outlive a kill
            super().step(step, loss)

    with pytest.raises(KeyboardInterrupt):
        fit(model, TRAIN, DEV, training=EPOCHS, progress=Looks(broken=5))
    assert closed
    assert not any(closed)
    assert files[-1].closed
    assert model.once is None
    model.adapted.remove()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory", [0, 1 << 20], ids=["disk", "memory"])
def test_a_shelf_gives_back_what_it_was_given(dtype: torch.dtype, memory: int) -> None:
    kept = shelf.Shelf(memory)
    given = {bytes([n]): torch.randn(5, n, 3).to(dtype).transpose(0, 1) for n in range(4)}
    for key, tensor in given.items():
        kept.put(key, tensor)
    assert all(torch.equal(kept[key], tensor) for key, tensor in given.items())
    assert b"other" not in kept
    kept.close()


def test_a_disk_that_others_fill_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = shelf.Shelf(0)
    monkeypatch.setattr(shelf.tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b", buffering=0))  # noqa: SIM115
    for key in (b"first", b"second"):
        kept.put(key, torch.ones(3))
        assert key not in kept
    kept.close()


# Where it is off


@pytest.mark.parametrize(
    ("deltas", "template", "change", "said"),
    [
        ([LoRA(rank=2)], "", {}, ""),
        ([UPPER], "", {"keep": False}, ""),
        ([UPPER], "", {"epochs": 1}, ""),
        ([UPPER], "", {"backbone_dropout": True}, ", nothing kept: the backbone's dropout is on"),
        ([SoftPrompt(3), UPPER], "", {}, ", nothing kept: SoftPrompt acts at embed"),
        ([UPPER], "{soft:2} {text} It was {mask}.", {}, ", nothing kept: SoftPrompt acts at embed"),
        ([UPPER, Prefix(2)], "", {}, ""),
    ],
    ids=["first layer", "not asked for", "one epoch", "dropout", "virtual tokens", "soft tokens", "prefix"],
)
def test_off_and_why(bert: Backbone, deltas: Sequence[Delta], template: str, change: dict[str, Any], said: str) -> None:
    assert trained(make(bert, deltas, template=template), replace(EPOCHS, **change))[2] == said


def test_off_where_layers_give_each_other_more_than_states() -> None:
    backbone = backbones_zoo.build("t5")
    _, _, said = trained(make(backbone, [LoRA(rank=2, at=("encoder.layers[1:].attn.q",))]))
    assert said == ", nothing kept: its layers give each other more than each text's own states"


def test_off_where_answers_need_keys_and_values() -> None:
    backbone = backbones_zoo.build("gpt2")
    model = adapt(
        backbone, Task("{text} It was", WORDS, LabelWords({"good": ("great plot",), "bad": ("bad",)})), [UPPER]
    )
    assert trained(model)[2] == ", nothing kept: answers of several tokens need its keys and values"


@pytest.mark.parametrize("deltas", EITHER, ids=["upper layers", "no delta"])
@pytest.mark.parametrize("mixed", ["rows", "padding"])
def test_off_where_rows_or_padding_are_mixed_in(deltas: Sequence[Delta], mixed: str) -> None:
    backbone = backbones_zoo.build("bert")
    model = make(backbone, deltas)
    axis = {"rows": 0, "padding": 1}[mixed]
    layer = backbone.model.get_submodule(backbone.sites["layers.0"].path)
    layer.register_forward_hook(lambda module, args, output: output + 0.1 * output.mean(axis, keepdim=True))
    assert not isinstance(below(model, model.encode(TRAIN[:1])), Below)
    assert trained(model)[2] == ", nothing kept: its layers give each other more than each text's own states"
