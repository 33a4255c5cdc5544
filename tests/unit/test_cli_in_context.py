"""In-context learning from the command line: nothing trains, seeds draw what is shown, what is saved answers alike."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from deltaprompt.cli.recipe import build, read_toml
from deltaprompt.features import Features
from deltaprompt.templates import parse
from tests.command import fails, last_json, succeeds
from tests.laws.test_demonstrations import backbone_of
from tests.unit.test_cli import REVIEWS

ROOT = Path(__file__).parents[2]
SHOWN = ("--template", "{demos:4}{text} : {mask}\n", "--labels", "bad=bad", "--labels", "good=good", "--device", "cpu")


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    backbone = backbone_of("llama")
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows([text, label] for label, texts in REVIEWS.items() for text in texts)
    return path


def test_seeds_show_other_examples_and_nothing_trains(causal, reviews, tmp_path):
    asked = ("--data", reviews, "--test", reviews, "--backbone", causal, *SHOWN, "--delta", "none")
    done = succeeds("fit", *asked, "--seeds", "0-2", "--out", tmp_path, "--calibration", "contextual", "--json")
    told = last_json(done)
    assert told["trainable"] == 0
    assert len(told["test"]["accuracy"]["each"]) == 3
    records = [json.loads((tmp_path / f"seed-{seed}" / "adaptation.json").read_text()) for seed in range(3)]
    shown = [[(row["fields"]["text"], row["label"]) for row in record["demonstrations"]] for record in records]
    assert len({tuple(each[:4]) for each in shown}) == 3
    for each in shown:
        assert [label for _, label in each[:4]].count("good") == 2
        assert all(text in REVIEWS[label] for text, label in each)
    scored = succeeds("evaluate", tmp_path / "seed-1", reviews, "--device", "cpu", "--json")
    assert last_json(scored)["accuracy"] == told["test"]["accuracy"]["each"][1]
    again = succeeds(
        "fit", *asked, "--seeds", "0-2", "--out", tmp_path, "--calibration", "contextual", "--json", "--resume"
    )
    assert last_json(again)["test"] == told["test"]


def test_too_few_rows(causal, reviews):
    said = fails("fit", "--data", reviews, "--backbone", causal, *SHOWN, "--delta", "none", "--shots", "1", "--no-dev")
    assert "the template shows 4 demonstrations, and 2 labelled examples that differ were given" in said


def test_the_recipe_is_one_whose_template_fits():
    recipe = build(read_toml(ROOT / "recipes" / "in-context.toml"))
    assert recipe.deltas == ()
    template = parse(recipe.task.template or "")
    assert template.demos is not None
    tokenizer = backbone_of("llama").tokenizer
    Features(tokenizer, template, "causal", 512, tuple(recipe.task.labels or ()), soft_base=len(tokenizer))
