"""The command line of generation: fit from options and recipes, what predict prints, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaprompt.cli.recipe import build, overlaid, read_toml
from deltaprompt.errors import ConfigError
from deltaprompt.model.generation import Chat, Generation
from deltaprompt.store import describe
from tests import backbones_zoo as zoo
from tests.command import fails, succeeds

ROOT = Path(__file__).parents[2]
SHORT = ("--steps", "2", "--delta", "lora:rank=2,at=attn.q", "--device", "cpu")
ROWS = [
    {"source": f"name : {name} | kind : {kind}", "target": text.format(name), "kind": kind}
    for name in ("A", "B", "C", "D", "E")
    for kind, text in (("pub", "{} is a pub ."), ("pub", "a pub is {} ."), ("bar", "{} is no pub ."))
]
TALKS = [
    {"id": str(n), "data": ["a film ?", "a great movie", "was it good ?", "yes", "no ?"][: 4 + n % 2]} for n in range(6)
]


def saved(folder: Path, family: str) -> Path:
    backbone = zoo.build(family)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("tiny"), "gpt2")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def adapted(tiny, rows, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "adapted"
    asked = ("--generate", "{source} =>", "--target", "target", "--max-length", "60")
    done = succeeds("fit", "--data", rows, *asked, "--backbone", tiny, "--out", out, "--test", rows, *SHORT)
    assert "texts after '{source} =>', LoRA, 15 rows" in done.stderr
    assert "test BLEU" in done.stdout
    return out


def test_what_fit_kept(adapted):
    record = describe(adapted)
    assert record["generation"]["template"] == "{source} =>"
    assert record["generation"]["max_length"] == 60
    assert record["training"]["finished"]
    assert {"bleu", "chrf", "rougeL", "loss"} <= record["metrics"]["test"].keys()
    assert record["metrics"]["dev"].keys() == {"loss", "perplexity"}


def test_predict_prints_a_text_a_line(adapted, rows):
    printed = succeeds("predict", adapted, rows).stdout.splitlines()
    assert len(printed) == len(ROWS)
    told = [json.loads(line) for line in succeeds("predict", adapted, rows, "--json").stdout.splitlines()]
    assert [" ".join(one["text"].splitlines()) for one in told] == printed
    lines = succeeds("predict", adapted, "-", stdin="".join(row["source"] + "\n" for row in ROWS)).stdout.splitlines()
    assert lines == printed
    other = succeeds("predict", adapted, rows, "--text", "kind", "--json").stdout
    assert other != succeeds("predict", adapted, rows, "--json").stdout


def test_evaluate_and_inspect(adapted, rows):
    told = json.loads(succeeds("evaluate", adapted, rows, "--json").stdout)
    assert told["examples"] == 10  # of 15 rows, those that give the same together
    assert told["loss"] > 0
    assert "perplexity" in succeeds("evaluate", adapted, rows, "--target", "target").stdout
    assert "max_target" in succeeds("inspect", adapted).stdout
    assert "no column 'text'" in fails("evaluate", adapted, rows, "--target", "text")


def test_seeds_in_one_pass_and_resume(tiny, rows, tmp_path):
    asked = ("fit", "--data", rows, "--generate", "{source}", "--backbone", tiny, "--out", tmp_path / "o", *SHORT)
    done = succeeds(*asked, "--seeds", "0-1", "--test", rows, "--json")
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["test"]["bleu"]["each"]) == 2
    assert (tmp_path / "o" / "seed-1" / "adaptation.json").is_file()
    again = json.loads(succeeds(*asked, "--seeds", "0-1", "--test", rows, "--json", "--resume").stdout.splitlines()[-1])
    assert again["test"] == told["test"]
    assert succeeds("predict", tmp_path / "o", rows).stdout
    shown = succeeds(*asked, "--seeds", "0-1", "--test", rows, "--resume").stdout
    assert "mean ± std" in shown


def test_a_recipe_tells_seen_from_unseen(tiny, rows, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in ROWS if row["kind"] == "pub"))
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[backbone]\nname = "{tiny}"\n[data]\ntrain = "{train}"\ntest = "{rows}"\nseen = "kind"\nhold_out = false\n'
        '[generation]\ntemplate = "{source} =>"\nmax_target = 8\n[training]\nsteps = 1\n'
    )
    told = json.loads(succeeds("fit", recipe, "--json").stdout.splitlines()[-1])
    assert {"bleu_seen", "bleu_unseen"} <= told["test"].keys()
    assert "unseen" in succeeds("fit", recipe).stdout


def test_conversations(rows, tmp_path):
    backbone = saved(tmp_path / "chat", "qwen2")
    data = tmp_path / "talks.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in TALKS))
    out = tmp_path / "out"
    done = succeeds("fit", "--data", data, "--chat", "--backbone", backbone, "--out", out, "--test", data, *SHORT)
    assert "texts in conversations" in done.stderr
    assert describe(out)["generation"]["kind"] == "chat"
    assert len(succeeds("predict", out, "-", stdin="a film ?\nwas it good ?\n").stdout.splitlines()) == 2
    assert len(succeeds("predict", out, data).stdout.splitlines()) == len(TALKS)
    assert "neither of the columns messages and data" in fails("fit", "--data", rows, "--chat", "--backbone", backbone)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"generation": {"template": "{x}"}, "task": {"template": "{text}"}},
            "[generation] asks for texts, so [task] has",
        ),
        ({"generation": {"template": "{x}"}, "grid": {"learning_rate": [1e-3]}}, "so [grid] has no meaning"),
        ({"generation": {"template": "{x}"}, "shots": 4}, "so shots has no meaning"),
        ({"generation": {"template": "{x}"}, "chat": {}}, "so [chat] has no meaning; leave one of them out"),
        ({"chat": {}, "data": {"text": "x"}}, "[chat] asks for texts, so text in [data] has no meaning"),
        (
            {"data": {"target": "x"}},
            "target in [data] is of texts that are written: give [generation] too (--generate)",
        ),
        ({"generation": {}}, "[generation] template"),
        ({"generation": {"templat": "{x}"}}, "unknown key 'templat' in [generation]; did you mean 'template'"),
        ({"task": {"packed": True}}, "unknown key 'packed' in [task]; it belongs in [chat]"),
    ],
)
def test_recipes_that_are_refused(given, message):
    with pytest.raises(ConfigError) as told:
        build(given)
    assert message in str(told.value)


def test_options_that_are_refused(tiny, rows):
    both = ("fit", "--data", rows, "--backbone", tiny, "--generate", "{source}")
    assert "so [task] has no meaning" in fails(*both, "--describe", "a=b")
    assert "give one of them" in fails(*both, "--chat")
    assert "generation needs a causal model" in fails("fit", "--data", rows, "--generate", "{source}")


def test_options_go_over_a_recipe():
    under = {"generation": {"template": "{a}", "max_target": 9}}
    made = build(overlaid(under, {"generation": {"template": "{b}", "max_length": None}}))
    assert made.generation == Generation("{b}", max_target=9)
    assert build({"chat": {"packed": True}}).generation == Chat(packed=True)


@pytest.mark.parametrize("name", ["e2e", "webnlg"])
def test_the_recipes_that_are_shipped_fit_a_model_of_their_kind(name):
    recipe = build(read_toml(ROOT / "recipes" / f"{name}.toml"))
    assert isinstance(recipe.generation, Generation)
    assert recipe.deltas is not None
    assert {"attn.q", "ffn.gate", "ffn.down"} <= {name for delta in recipe.deltas for name in delta.selectors()}
