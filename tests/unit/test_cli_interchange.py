"""`deltaprompt export` and `deltaprompt import`, as a user has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaprompt.compose import Adapted
from deltaprompt.deltas.lora import LoRA
from deltaprompt.interchange import save_peft
from deltaprompt.model import Task, adapt
from tests import backbones_zoo
from tests.command import fails, succeeds

TASK = Task("{text} It was {mask}.", {"bad": ("no", "not"), "good": "yes"})
LABELS = ("--labels", "bad=no|not", "--labels", "good=yes")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A tiny causal model, saved as any model on disk is."""
    folder = tmp_path_factory.mktemp("gpt2")
    backbone = backbones_zoo.build("gpt2")
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(gpt2, tmp_path_factory) -> Path:
    """An adaptation of it with a LoRA, whose rank and scale differ between modules."""
    from deltaprompt.backbone import load

    out = tmp_path_factory.mktemp("adapted")
    adapt(load(gpt2, device="cpu"), TASK, [LoRA(rank=2), LoRA(rank=3, at=("ffn.up",))]).save(out)
    return out


def test_there_and_back(gpt2, adapted, tmp_path):
    done = succeeds("export", adapted, tmp_path / "peft")
    assert done.stdout.startswith(f"LORA for {gpt2}, ")
    assert f"in {tmp_path / 'peft'}" in done.stdout
    assert "put this template around each text: {text} It was {mask}." in done.stderr
    assert "read its answer at {mask}: no|not = bad, yes = good" in done.stderr
    assert "for engines that read no patterns (vLLM), add --uniform" in done.stderr
    made = ("--template", TASK.template, *LABELS, "--device", "cpu", "--out", tmp_path / "back")
    done = succeeds("import", tmp_path / "peft", *made)
    assert f"LORA on {gpt2}: " in done.stdout
    assert f"use it: deltaprompt predict {tmp_path / 'back'} FILE" in done.stdout
    first, second = (
        succeeds("predict", folder, "-", "--device", "cpu", "--json", stdin="a film\nthe best\n").stdout
        for folder in (adapted, tmp_path / "back")
    )
    for line, again in zip(first.splitlines(), second.splitlines(), strict=True):
        assert json.loads(line)["score"] == pytest.approx(json.loads(again)["score"], abs=1e-6)
    assert json.loads(succeeds("inspect", tmp_path / "back", "--json").stdout)["training"]["peft_type"] == "LORA"


def test_as_json(gpt2, adapted, tmp_path):
    told = json.loads(succeeds("export", adapted, tmp_path / "peft", "--uniform", "--json").stdout)
    assert told == {
        "out": str(tmp_path / "peft"),
        "bytes": sum(p.stat().st_size for p in (tmp_path / "peft").iterdir()),
        "method": "LORA",
        "template": TASK.template,
        "labels": {"bad": ["no", "not"], "good": ["yes"]},
    }
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {}, {})  # q and v have an A each
    arguments = ("import", tmp_path / "peft", "--template", TASK.template, *LABELS, "--device", "cpu", "--json")
    told = json.loads(succeeds(*arguments, "--backbone", gpt2, "--out", tmp_path / "back").stdout)
    assert told.keys() == {"out", "bytes", "method", "parameters"}
    assert told["bytes"] == sum(p.stat().st_size for p in (tmp_path / "back").iterdir() if p.is_file())


def test_a_uniform_export_says_nothing_of_patterns(adapted, tmp_path):
    assert "--uniform" not in succeeds("export", adapted, tmp_path, "--uniform").stderr


def test_an_encoders_adaptation_has_no_label_words(tmp_path):
    from deltaprompt.backbone import load

    backbone = backbones_zoo.build("bert-encoder")
    backbone.model.save_pretrained(tmp_path / "bert")
    backbone.tokenizer.save_pretrained(tmp_path / "bert")
    task = Task("{text}", {"bad": "it is bad", "good": "it is good"})
    adapt(load(tmp_path / "bert", device="cpu"), task, [LoRA(rank=2)]).save(tmp_path / "adapted")
    done = succeeds("export", tmp_path / "adapted", tmp_path / "peft")
    assert "read its answer" not in done.stderr
    made = ("--labels", "bad=it is bad", "--labels", "good=it is good", "--device", "cpu")
    succeeds("import", tmp_path / "peft", *made, "--out", tmp_path / "back")
    assert len(succeeds("predict", tmp_path / "back", "-", stdin="fine\n").stdout.splitlines()) == 1


def test_what_is_missing_is_said(gpt2, adapted, tmp_path):
    save_peft(Adapted(backbones_zoo.build("gpt2"), [LoRA(rank=2)]), tmp_path / "peft")
    peft = tmp_path / "peft"
    out = ("--out", tmp_path / "out")
    assert "name it: --out DIR" in fails("import", peft, *LABELS)
    assert "--labels good=great" in fails("import", peft, *out)
    assert "no backbone 'gpt2'" in fails("import", peft, *LABELS, *out)
    config = json.loads((peft / "adapter_config.json").read_text())
    (peft / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "does not name the model that it is of; name it: --backbone NAME" in fails("import", peft, *LABELS, *out)
    assert "there is no folder" in fails("import", tmp_path / "nowhere", *LABELS, *out)
    assert "there is no folder" in fails("export", tmp_path / "nowhere", tmp_path / "x")
    assert "holds no PEFT adapter" in fails("import", adapted, *LABELS, *out)
    done = ("import", peft, "--backbone", gpt2, *LABELS, *out, "--verbalizer", "label_word")
    assert "did you mean 'label_words'" in fails(*done)
    assert not (tmp_path / "out").exists()


def test_an_adaptation_without_a_form_in_peft(gpt2, tmp_path):
    from deltaprompt.backbone import load
    from deltaprompt.deltas.adapter import Adapter

    adapt(load(gpt2, device="cpu"), TASK, [Adapter()]).save(tmp_path / "adapted")
    assert "Adapter has no form in PEFT" in fails("export", tmp_path / "adapted", tmp_path / "peft")
