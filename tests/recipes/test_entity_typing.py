"""The recipes of entity typing, end to end on 40 real rows with a tiny model: from the file to labels on the screen."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import transformers

from deltaprompt.cli.recipe import build, read_toml
from deltaprompt.data.linked import Linked
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.model.saved import describe, open_
from tests import tokenizers_zoo
from tests.backbones_zoo import BERT
from tests.command import last_json, run, succeeds

ROOT = Path(__file__).parents[2]
QUICK = ("--device", "cpu", "--batch-size", "8")
TRAIN = ("--steps", "3", "--delta", "lora:rank=2,at=attn.q")
ONCE = ("--epochs", "1", "--delta", "lora:rank=2,at=attn.q")
LOOSE = {"loose_macro_f1", "loose_micro_f1", "loose_macro_precision", "loose_micro_recall"}
FEW_NERD = "".join(
    f"The\tO\n{name}\t{kind}\n{verb}\tO\n.\tO\n\n"
    for verb in ("was", "is", "had", "saw", "and", "sat")
    for name, kind in (("cat", "other-livingthing"), ("Bo", "person-actor"), ("Lee", "person-other"))
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny masked model that knows every byte."""
    tokenizer = tokenizers_zoo.build("roberta")
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": 2}
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), **ends, **{**BERT, "max_position_embeddings": 1026, "type_vocab_size": 1}
    )
    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(data_dir, tmp_path_factory):
    """The first 40 rows of each file that the recipes name, under the same names."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("open_entity/general9_train", "open_entity/general9_test", "agnews/train"):
        with gzip.open(data_dir / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
            rows = [next(stream) for _ in range(40)]
        path = folder / f"{name}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress("".join(rows).encode()))
    types = folder / "open_entity/general9_types.txt"
    types.write_text((data_dir / "open_entity/general9_types.txt").read_text())
    return folder


@pytest.fixture
def recipe(data, tmp_path):
    """A recipe on these rows, its window wide enough for a model that reads bytes."""

    def made(name):
        text = (ROOT / "recipes" / f"{name}.toml").read_text().replace("../shared/data", str(data))
        text = text.replace("max_length = 256", "max_length = 1000").replace('"0-4"', "[0, 1]").replace("out/", "")
        path = tmp_path / f"{name}.toml"
        path.write_text(text.replace(f'out = "{name}"', f'out = "{tmp_path / "out"}"'))
        return path

    return made


def result(*arguments):
    return last_json(succeeds(*arguments, "--json"))


def test_supervised_from_a_recipe_to_predictions(recipe, tiny, data, tmp_path):
    told = result("fit", recipe("plet"), "--backbone", tiny, *QUICK, *ONCE, "--shots", "2")
    assert told["seeds"] == [0, 1]
    assert told["test"].keys() >= LOOSE
    assert told["trainable"] > 9
    best = tmp_path / "out" / f"seed-{told['best_seed']}"
    assert describe(best)["several"] is True
    test = data / "open_entity/general9_test.jsonl.gz"
    shown = succeeds("evaluate", tmp_path / "out", test, "--label", "labels", "--drop-empty", "--device", "cpu").stdout
    assert "loose macro F1" in shown
    lines = succeeds("predict", tmp_path / "out", test, "--device", "cpu").stdout.splitlines()
    assert len(lines) == 40  # with or without a type
    types = {*(data / "open_entity/general9_types.txt").read_text().split()}
    for line in lines:
        labels, scores = (side.split(",") for side in line.split("\t"))
        assert {*labels} <= types
        assert len(labels) == len(scores)
    one = json.loads(succeeds("predict", tmp_path / "out", test, "--json", "--device", "cpu").stdout.splitlines()[0])
    assert one["labels"][0] == one["label"]
    assert one["scores"].keys() == types


def test_the_table_of_a_fit_has_the_loose_scores(recipe, tiny):
    shown = succeeds("fit", recipe("plet"), "--backbone", tiny, *QUICK, *ONCE, "--shots", "1", "--seeds", "0").stdout
    assert "loose" in shown
    assert "micro" in shown


def test_zero_shot_trains_nothing_and_is_calibrated(recipe, tiny, tmp_path):
    told = result("fit", recipe("plet-zero-shot"), "--backbone", tiny, *QUICK, "--calibration", "contextualised")
    assert told["test"].keys() >= LOOSE
    model = open_(tmp_path / "out")
    assert model.chosen == ()
    assert not model.scorer.tensors["odds"].any()
    assert model.scorer.tensors["prior"].any()


def test_pairs_train_without_labels(recipe, tiny, tmp_path):
    done = succeeds("fit", recipe("plet-self-supervised"), "--backbone", tiny, *QUICK, *TRAIN, "--json")
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["test"].keys() >= LOOSE
    assert "names in them are told by their capitals" in done.stderr
    assert "pairs of sentences" in done.stderr
    kept = describe(tmp_path / "out/seed-0")
    assert kept["training"]["settings"]["task"].endswith(", of pairs")
    assert kept["training"]["run"]["best"].keys() == {"accuracy", "loss"}
    again = run("fit", recipe("plet-self-supervised"), "--backbone", tiny, *QUICK, *TRAIN, "--json", "--resume")
    assert json.loads(again.stdout.splitlines()[-1])["test"] == told["test"]


def test_a_file_of_few_nerds_form_is_typed_by_paths(tiny, tmp_path):
    rows = tmp_path / "rows.txt"
    rows.write_text(FEW_NERD)
    template = "{left}{mention|keep}{right} {mention} is a {mask}"
    options = ("--template", template, "--verbalizer", "hierarchical:of=leaf", "--backbone", tiny, *QUICK, *TRAIN)
    told = result(
        "fit", "--data", rows, "--test", rows, "--shots", "2", "--no-dev", "--out", tmp_path / "out", *options
    )
    assert told["test"].keys() >= LOOSE
    stored = describe(tmp_path / "out")
    assert stored["labels"] == ["other-livingthing", "person-actor", "person-other"]
    assert "several" not in stored
    assert stored["verbalizer"]["words"] == {}  # the names say them
    lines = succeeds("predict", tmp_path / "out", rows, "--device", "cpu").stdout.splitlines()
    assert len(lines) == 18
    assert all(line.split("\t")[0] in stored["labels"] for line in lines)


def test_several_labels_of_any_rows_need_the_option(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"a b {i}", "label": ["x", "y"][: 1 + i % 2]}) for i in range(8)))
    options = ("--data", rows, "--test", rows, "--backbone", tiny, *QUICK, *TRAIN)
    labels = ("--labels", "x=good", "--labels", "y=bad", "--template", "{text} is {mask}")
    wrong = run("fit", *options, *labels)
    assert wrong.exit_code != 0
    assert "an example has several labels, x, y, and the task gives one; give it several" in wrong.stderr
    assert result("fit", *options, *labels, "--several")["test"].keys() >= LOOSE


def test_what_a_recipe_of_pairs_cannot_have(recipe, tiny, tmp_path):
    asked = read_toml(recipe("plet-self-supervised"))
    assert build(asked).pairs == Linked(most=8000)
    with pytest.raises(ConfigError, match="unknown key 'negative' in \\[pairs\\]; did you mean 'negatives'"):
        build({**asked, "pairs": {"negative": 1}})
    for more, message in (
        (("--shots", "2"), "[pairs] trains without labels; leave [grid] and shots out"),
        (("--template", "{text} is {mask}"), "[pairs] are of entity rows"),
    ):
        done = run("fit", recipe("plet-self-supervised"), "--backbone", tiny, *QUICK, *more)
        assert done.exit_code != 0
        assert message in " ".join(done.stderr.split())


def test_a_file_of_types_that_is_none():
    from deltaprompt.cli.entities import types_in

    with pytest.raises(DataError, match="the file of types cannot be read"):
        types_in("nowhere.txt")
