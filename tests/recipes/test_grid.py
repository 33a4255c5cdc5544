"""`deltaprompt fit --grid …`: every cell is what a plain `deltaprompt fit` with its settings is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from deltaprompt import store
from deltaprompt.trainer import loop
from tests import backbones_zoo as zoo
from tests.command import run, succeeds

TEXTS = ("a good movie", "so bad", "good", "it was bad", "good good", "three bad movie so it", "so good", "bad movie")
TEMPLATES = ("{text} it was {mask}", "so {text} : {mask}")
RATES, SHOTS, SEEDS = (0.001, 0.02), (1, 2), (0, 1)


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of every fit here: a tiny masked model, and eight rows."""
    folder = tmp_path_factory.mktemp("tiny")
    backbone = zoo.build("bert")
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": t, "label": "ab"["bad" in t]}) + "\n" for t in TEXTS))
    files = ["--data", str(rows), "--test", str(rows), "--backbone", str(folder)]
    return [*files, "--delta", "lora:rank=2,at=attn.q", "--device", "cpu", "--steps", "3", "--batch-size", "2"]


def words(folder: Path, a: str, b: str) -> str:
    """A file of label words, the labels in reverse order."""
    path = folder / f"{a}.toml"
    path.write_text(f'b = "{b}"\na = "{a}"\n')
    return str(path)


def fit(*arguments: object) -> Any:
    return succeeds("fit", *arguments)


def fit_json(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fit(*arguments, "--json").stdout)
    return found


def same(folder: Path, other: Path) -> None:
    """Two folders keep the same tensors and metrics."""
    (record, kept), (expected_record, expected) = store.read(folder), store.read(other)
    assert kept.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(kept[name], tensor, rtol=0, atol=1e-5)
    assert record["template"] == expected_record["template"]
    assert record["verbalizer"] == expected_record["verbalizer"]


def test_every_cell_is_a_fit_of_its_own(common: list[str], tmp_path: Path) -> None:
    described = ["--describe", "a=good", "--describe", "b=bad", "--seeds", "0-1"]
    axes = ["--grid", "learning_rate=0.001,0.02", "--grid", "shots=1,2"]
    axes += [word for template in TEMPLATES for word in ("--grid", f"template={template}")]
    out = tmp_path / "grid"
    grid = (*common, *described, *axes, "--out", out, "--together", 5)
    told = fit_json(*grid)
    assert json.loads((out / "grid.json").read_text()) == told
    assert list(told) == ["grid", "best", "seeds", "seconds", "out"]
    assert list(told["grid"][0]) == ["shots", "template", "learning_rate", "dev", "test", "folders"]
    assert (told["seeds"], told["out"], len(told["grid"])) == ([0, 1], str(out), 8)
    for entry in told["grid"]:
        name = "_".join(
            [
                f"shots-{entry['shots']}",
                f"template-{TEMPLATES.index(entry['template']) + 1}",
                f"learning_rate-{entry['learning_rate']}",
            ]
        )
        assert entry["folders"] == [str(out / f"{name}_seed-{seed}") for seed in SEEDS]
        own = ["--shots", entry["shots"], "--template", entry["template"], "--lr", entry["learning_rate"]]
        alone = fit_json(*common, *described, *own, "--out", tmp_path / name)
        assert alone["test"] == entry["test"]
        for seed, folder in enumerate(entry["folders"]):
            same(Path(folder), tmp_path / name / f"seed-{seed}")
            metrics = store.describe(folder)["metrics"]
            assert metrics["dev"]["accuracy"] == entry["dev"]["accuracy"]["each"][seed]
            assert metrics["test"]["accuracy"] == entry["test"]["accuracy"]["each"][seed]
    best = max(told["grid"], key=lambda entry: (entry["dev"]["accuracy"]["mean"], -entry["dev"]["loss"]["mean"]))
    assert best.items() <= told["best"].items()

    assert fit_json(*grid, "--resume") == told  # whose seconds are those of the training that was

    done = run("predict", out, "-", stdin="so good\n")
    assert f"holds a grid; this is {told['best']['name']}_seed-{told['best']['seed']}, the best on dev" in done.stderr
    assert done.stdout.count("\n") == 1


def test_label_words_and_the_table(common: list[str], tmp_path: Path) -> None:
    first, second, out = words(tmp_path, "good", "bad"), words(tmp_path, "one", "two"), tmp_path / "out"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[grid]\nlabels = [{a = "good", b = "bad"}, {b = "two", a = "one"}]\nshots = [1, 2]\n')
    shown = fit(recipe, *common, "--grid", "shots=2", "--template", TEMPLATES[0], "--out", out)
    assert "a grid of shots (1) × labels (2): 2 cells × 1 seed, 2 at most in one pass" in shown.stderr
    lines = shown.stdout.splitlines()
    assert sum("← best" in line for line in lines) == 1
    assert "labels 1: a = good; b = bad" in lines
    assert "labels 2: b = two; a = one" in lines
    assert "test macro F1" in shown.stdout
    assert lines[-1].startswith(f"use it: deltaprompt predict {out}/shots-2_labels-")
    told = json.loads((out / "grid.json").read_text())
    files = fit_json(
        *(*common, "--shots", 2, "--template", TEMPLATES[0], "--out", tmp_path / "files"),
        *("--grid", f"labels={first}", "--grid", f"labels={second}"),
    )
    for entry, other, file in zip(told["grid"], files["grid"], (first, second), strict=True):
        assert (entry["dev"], entry["test"]) == (other["dev"], other["test"])
        alone = tmp_path / Path(file).stem
        fit(*common, "--shots", 2, "--template", TEMPLATES[0], "--labels", file, "--out", alone)
        kept, expected = store.read(other["folders"][0])[1], store.read(alone)[1]
        for name, tensor in expected.items():
            assert_close(kept[name], tensor, rtol=0, atol=1e-5)


def test_without_dev_and_test_the_first_is_named(common: list[str]) -> None:
    bare = [word for i, word in enumerate(common) if "--test" not in (word, common[i - 1])]
    arguments = (*bare, "--no-dev", "--template", TEMPLATES[0], "--grid", "learning_rate=0.001,0.02")
    shown = fit(*arguments).stdout
    assert "best: learning rate 0.001 (the first: there are no dev rows to choose by)" in shown
    assert "not saved (--out DIR saves all)" in shown
    told = fit_json(*arguments)
    assert (told["best"]["learning_rate"], told["out"], told["grid"][0]["folders"]) == (0.001, None, [])
    assert told["grid"][0]["dev"] is told["grid"][0]["test"] is None


def test_mistakes(common: list[str]) -> None:
    templates = ("--grid", f"template={TEMPLATES[0]}", "--grid", "template={soft:2} {text} {mask}")
    for arguments, message in (
        (templates, "the templates of one model have as many soft tokens each; got 0 and 2"),
        (("--grid", "shots=1,2", "--shots", 3), "shots is an axis of the grid, and is also given by itself (--shots"),
        (("--grid", "rate=1"), "unknown key 'rate' in [grid]"),
        (("--grid", "template={text"), "{text"),
    ):
        done = run("fit", *common, *arguments)
        assert done.exit_code == 2
        assert message in done.stderr


def test_a_damaged_result_names_the_folders_beside_it(common: list[str], tmp_path: Path) -> None:
    fit(*common, "--template", TEMPLATES[0], "--grid", "shots=1", "--out", tmp_path)
    (tmp_path / "grid.json").write_text("{}")
    done = run("predict", tmp_path, "-", stdin="x\n")
    assert done.exit_code == 2
    assert "grid.json is damaged; name a folder beside it; possible: shots-1_seed-0" in done.stderr


@pytest.mark.parametrize("together", [1, 8])
def test_one_that_diverges_leaves_the_others(common: list[str], tmp_path: Path, together: int) -> None:
    grid = (*common, "--template", TEMPLATES[0], "--together", together, "--out", tmp_path)
    shown = fit(*grid, "--grid", "learning_rate=1e30,0.001", "--grid", "shots=1")
    assert "shots-1_learning_rate-1e+30 failed: the " in shown.stdout
    assert "best: shots 1, learning rate 0.001" in shown.stdout
    told = json.loads((tmp_path / "grid.json").read_text())
    assert ["failed" in entry for entry in told["grid"]] == [True, False]
    assert told["grid"][0]["dev"] is None
    fit(*grid, "--grid", "learning_rate=1e30,0.001", "--grid", "shots=1", "--resume")
    again = json.loads((tmp_path / "grid.json").read_text())
    assert again["grid"] == told["grid"]
    done = run("fit", *grid, "--grid", "learning_rate=1e30", "--grid", "shots=1")
    assert done.exit_code == 2
    assert "no cell of the grid came to its end; shots-1_learning_rate-1e+30: the " in done.stderr


def test_a_seed_that_diverges_leaves_the_others(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loop.Loop._losses

    def losses(self: Any, running: Any, picked: Any) -> Any:
        found = plain(self, running, picked)
        bad = [running[course].slot == 1 for course, _, _ in picked]
        return [loss * float("nan") if out else loss for loss, out in zip(found, bad, strict=True)]

    arguments = (*common, "--template", TEMPLATES[0], "--shots", 1, "--seeds", "0-2", "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_losses", losses)
        shown = fit(*arguments).stdout
    assert "seed 1 failed: the loss is nan at step 1" in shown
    told = json.loads((tmp_path / "seeds.json").read_text())
    assert list(told["failed"]) == ["1"]
    assert len(told["test"]["accuracy"]["each"]) == 2
    assert told["best_seed"] in (0, 2)
    again = fit_json(*arguments, "--resume")
    assert "failed" not in again
    assert len(again["test"]["accuracy"]["each"]) == 3
    whole = fit_json(*arguments[:-1], tmp_path / "whole")
    assert again["test"] == whole["test"]
