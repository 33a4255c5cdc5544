"""The command line, as a user has it: what it prints where, its exit codes, and what it says of every mistake."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltaprompt.cli import demo
from deltaprompt.cli import fit as fit_module
from deltaprompt.cli.recipe import build, overlaid, read_toml, seeds_of
from deltaprompt.errors import ConfigError
from deltaprompt.registry import variant_of
from tests import backbones_zoo
from tests.command import fails, last_json, run, succeeds

ROOT = Path(__file__).parents[2]
REVIEWS = {
    "bad": [
        "awful film",
        "I hated it",
        "a waste of time",
        "dull and long",
        "bad acting",
        "the worst of all",
        "so boring",
        "no good",
    ],
    "good": [
        "great film",
        "I loved it",
        "a pure joy",
        "bright and quick",
        "fine acting",
        "the best of all",
        "so moving",
        "very good",
    ],
}
SHORT = ("--steps", "2", "--delta", "lora:rank=2,at=attn.q", "--device", "cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny encoder, saved as any model on disk is."""
    folder = tmp_path_factory.mktemp("tiny")
    backbone = backbones_zoo.build("bert-encoder")
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["review", "stars"])
        writer.writerows([text, label] for label, texts in REVIEWS.items() for text in texts)
    return path


@pytest.fixture(scope="module")
def adapted(tiny, reviews, tmp_path_factory) -> Path:
    """What `fit` saved of the tiny encoder."""
    out = tmp_path_factory.mktemp("out") / "adapted"
    succeeds("fit", "--data", reviews, "--text", "review", "--label", "stars", "--backbone", tiny, "--out", out, *SHORT)
    return out


def columns(reviews: Path) -> tuple[object, ...]:
    return ("--data", reviews, "--text", "review", "--label", "stars")


# fit, predict, evaluate


def test_fit_predict_evaluate_with_the_demo_backbone(reviews, tmp_path):
    out = tmp_path / "out"
    done = succeeds(
        *(
            "fit",
            *columns(reviews),
            "--test",
            reviews,
            "--out",
            out,
            "--shots",
            4,
            "--steps",
            12,
            "--device",
            "cpu",
            "--json",
        ),
        *("--describe", "bad=I hate it, it is terrible.", "--describe", "good=I love it, it is great."),
    )
    told = last_json(done)
    assert {"seeds", "test", "trainable", "bytes", "seconds", "out"} <= set(told)
    assert (told["seeds"], told["out"]) == ([0], str(out))
    assert set(told["test"]) == {"accuracy", "macro_f1"}
    assert set(told["test"]["accuracy"]) == {"mean", "std", "each"}
    assert told["bytes"] == sum(p.stat().st_size for p in out.iterdir() if p.is_file())
    assert told["test"]["accuracy"]["mean"] >= 0.8
    assert len(done.stdout.splitlines()) == 1  # all else went to standard error

    measured = last_json(
        succeeds("evaluate", out, reviews, "--text", "review", "--label", "stars", "--device", "cpu", "--json")
    )
    assert measured == {
        "accuracy": told["test"]["accuracy"]["each"][0],
        "macro_f1": measured["macro_f1"],
        "examples": 16,
    }
    lines = succeeds(
        "predict", out, "-", "--device", "cpu", "--json", stdin="I love this 😍🎬\nhorrible\n"
    ).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert [f["label"] for f in found] == ["good", "bad"]
    assert all(set(f) == {"label", "score", "scores"} for f in found)
    assert found[0]["scores"]["good"] == found[0]["score"]


def test_several_seeds_and_the_best_of_them(tiny, reviews, tmp_path):
    out = tmp_path / "seeds"
    arguments = (
        "fit",
        *columns(reviews),
        "--test",
        reviews,
        "--backbone",
        tiny,
        "--seeds",
        "0-1",
        "--shots",
        3,
        "--out",
        out,
    )
    told = last_json(succeeds(*arguments, *SHORT, "--json"))
    assert told["seeds"] == [0, 1]
    assert len(told["test"]["accuracy"]["each"]) == 2
    shown = succeeds(*arguments, *SHORT, "--resume").stdout
    assert "mean ± std" in shown
    apart = last_json(succeeds(*arguments, "--out", out.with_name("apart"), *SHORT, "--together", 1, "--json"))
    assert apart["test"] == told["test"]
    done = succeeds("predict", out, "-", stdin="fine\n")
    assert "the best on dev" in done.stderr
    assert done.stdout.count("\n") == 1


def test_the_newest_in_a_folder_answers(tiny, reviews, tmp_path):
    arguments = ("fit", *columns(reviews), "--backbone", tiny, *SHORT, "--no-dev", "--out", tmp_path)
    succeeds(*arguments, "--seeds", "0")
    assert "seed" not in succeeds("predict", tmp_path, "-", stdin="fine\n").stderr
    succeeds(*arguments, "--seeds", "5-6")
    assert "holds several seeds; this is seed-5" in succeeds("predict", tmp_path, "-", stdin="fine\n").stderr


def test_a_verbalizer_that_begins_by_chance_needs_shots(tiny, reviews):
    told = fails("fit", *columns(reviews), "--backbone", tiny, "--shots", 0, "--verbalizer", "soft")
    assert "SoftVerbalizer begins by chance and needs examples; give shots, or words" in told


def test_without_a_test_file_and_without_a_folder(tiny, reviews):
    arguments = ("fit", *columns(reviews), "--backbone", tiny, *SHORT)
    told = last_json(succeeds(*arguments, "--no-dev", "--json"))
    assert (told["test"], told["out"], told["bytes"]) == (None, None, 0)
    done = succeeds(*arguments)
    assert "not saved" in done.stdout
    assert "(encoder): template '{text}' (the default for that kind)" in done.stderr


def test_a_language_model_has_a_mask_in_its_default_template(reviews, tmp_path):
    backbone = backbones_zoo.build("gpt2")
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    done = succeeds(
        "fit",
        *columns(reviews),
        "--backbone",
        tmp_path,
        *SHORT,
        "--describe",
        "bad=bad|awful",
        "--describe",
        "good=good",
    )
    assert "'{text} Category: {mask}'" in done.stderr
    assert "LabelWords" in done.stderr


def test_rows_without_a_text_are_dropped_where_asked(tiny, reviews, tmp_path):
    holey = tmp_path / "holey.csv"
    holey.write_text(reviews.read_text() + '"",good\n')
    arguments = ("fit", "--data", holey, "--text", "review", "--label", "stars", "--backbone", tiny, *SHORT)
    assert "line 18: the field 'text' is missing" in fails(*arguments)
    assert "left out 1 of 17 rows" in succeeds(*arguments, "--drop-empty").stderr


def test_predict_reads_files_and_prints_lines(adapted, reviews, tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    lines = succeeds("predict", adapted, tmp_path / "texts.txt").stdout.splitlines()
    assert len(lines) == 2
    label, score = lines[0].split("\t")
    assert label in REVIEWS
    assert 0.5 <= float(score) <= 1
    assert len(succeeds("predict", adapted, reviews, "--text", "review", "--batch-size", 3).stdout.splitlines()) == 16


def test_evaluate_prints_a_table(adapted, reviews):
    shown = succeeds("evaluate", adapted, reviews, "--text", "review", "--label", "stars").stdout
    assert "accuracy" in shown
    assert "macro F1" in shown


def test_the_backbone_of_an_adaptation_may_have_moved(adapted, tiny, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tiny.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert succeeds("predict", adapted, "-", "--backbone", moved, stdin="x\n").stdout


# recipes


def recipe(folder: Path, reviews: Path, tiny: Path, more: str = "") -> Path:
    path = folder / "recipe.toml"
    path.write_text(f"""
seeds = "0"
{more}
[backbone]
name = '{tiny}'
device = "cpu"
[data]
train = '{reviews}'
text = "review"
label = "stars"
[task]
verbalizer = {{ kind = "prototypes", scale = 5.0 }}
[task.labels]
bad = "It is bad."
good = "It is good."
[[deltas]]
kind = "lora"
rank = 2
[training]
steps = 2
""")
    return path


def test_a_recipe_and_options_that_override_it(reviews, tiny, tmp_path):
    path = recipe(tmp_path, reviews, tiny)
    assert last_json(succeeds("fit", path, "--json"))["seeds"] == [0]
    told = last_json(succeeds("fit", path, "--json", "--seeds", "3", "--delta", "bitfit", "--out", tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert told["seeds"] == [3]
    assert [d["kind"] for d in record["deltas"]] == ["bitfit"]
    assert record["verbalizer"] == {
        "kind": "prototypes",
        "scale": 5.0,
        "descriptions": {"bad": "It is bad.", "good": "It is good."},
        "description_weight": 4.0,
    }


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"trainign": {}}, "unknown key 'trainign' in the recipe; did you mean 'training' or 'tagging'?"),
        ({"training": {"step": 3}}, "unknown key 'step' in [training]; did you mean 'steps'"),
        ({"data": {"template": "{text}"}}, "unknown key 'template' in [data]; it belongs in [task]"),
        ({"training": {"steps": "many"}}, "[training] steps: got 'many'"),
        ({"training": {"steps": 0}}, "steps = 0 is not possible"),
        ({"shots": "few"}, "shots: got 'few'"),
        ({"data": []}, "[data] is a table of names and values; got []"),
        ({"deltas": [{"rank": 3}]}, "a delta needs the key 'kind'"),
        ({"deltas": [{"kind": "lora", "rnak": 3}]}, "delta 'lora' has no option 'rnak'; did you mean 'rank'?"),
        ({"deltas": [3]}, "[[deltas]] 1 is a table with the key 'kind'; got 3"),
        ({"backbone": {"kind": "mask"}}, "[backbone] kind: got 'mask'"),
    ],
)
def test_what_a_recipe_may_not_say(tables, message):
    with pytest.raises(ConfigError) as raised:
        build(tables)
    assert message in str(raised.value)


def test_a_recipe_that_cannot_be_read(tmp_path, reviews, tiny):
    assert "unknown key 'shot' in the recipe; did you mean 'shots'" in fails(
        "fit", recipe(tmp_path, reviews, tiny, "shot = 3")
    )
    (tmp_path / "broken.toml").write_text("[data")
    assert "broken.toml is not TOML" in fails("fit", tmp_path / "broken.toml")
    assert "did you mean 'recipe.toml'" in fails("fit", tmp_path / "recpe.toml")


def test_tables_are_overlaid_key_by_key():
    under = {"data": {"train": "a", "text": "t"}, "seeds": 1}
    over = {"data": {"train": "b", "text": None}, "seeds": None, "task": {"template": "x"}}
    assert overlaid(under, over) == {"data": {"train": "b", "text": "t"}, "seeds": 1, "task": {"template": "x"}}


FITS = [path for path in sorted((ROOT / "recipes").glob("*.toml")) if f"fit recipes/{path.name}" in path.read_text()]


@pytest.mark.parametrize("path", FITS, ids=lambda p: p.stem)
def test_the_recipes_that_come_along(path):
    made = build(read_toml(path))
    assert len(made.seeds) >= 3 or made.shots == 0  # without training all seeds are alike
    assert made.deltas is not None or made.shots == 0
    assert made.data.train is not None or made.pairs is not None


@pytest.mark.parametrize("name", ["agnews", "cr", "dbpedia14"])
def test_their_labels_are_those_of_the_data(name, data_dir):
    from deltaprompt.data import labels_of, read

    made = build(read_toml(ROOT / "recipes" / f"{name}.toml"))
    assert made.task.labels is not None
    found = read(data_dir / name / "test.jsonl.gz", label=made.data.label, on_empty=lambda _: None)
    assert set(labels_of(found)) == set(made.task.labels)


# the small languages of options


@pytest.mark.parametrize(
    ("given", "seeds"),
    [("0-4", (0, 1, 2, 3, 4)), ("0,3,7", (0, 3, 7)), ("0-1, 5", (0, 1, 5)), (3, (3,)), ([1, 2], (1, 2))],
)
def test_seeds(given, seeds):
    assert seeds_of(given) == seeds


@pytest.mark.parametrize("given", ["", "a", "4-0", "1-", "0..4", "-1", ["x"], "1,,2"])
def test_what_are_no_seeds(given):
    with pytest.raises(ConfigError, match="seeds"):
        seeds_of(given)


def test_a_delta_in_one_word():
    assert variant_of("deltas", "lora") == {"kind": "lora"}
    assert variant_of("deltas", "lora:rank=16,at=attn.q+layers[2:].attn.v") == {
        "kind": "lora",
        "rank": "16",
        "at": ["attn.q", "layers[2:].attn.v"],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--delta", "lroa"), "no delta 'lroa'; did you mean 'lora'"),
        (("--delta", "lora:rank"), "'rank' is no option; write lora:option=value"),
        (("--delta", "lora:rank=x"), "delta 'lora', option rank: got 'x'"),
        (("--delta", "lora:at=attn.w"), "selector 'attn.w' matches no site"),
        (("--verbalizer", "protoypes"), "no verbalizer 'protoypes'; did you mean 'prototypes'"),
        (("--seeds", "0..4"), "'0..4' is no seed; write 0-4"),
        (("--text", "reviews"), "no column 'reviews' for the field 'text'; did you mean 'review'"),
        (("--data", "reviws.csv"), "reviws.csv"),
        (("--field", "a"), "--field 'a': this is no pair"),
        (("--describe", "a=b", "--describe", "a=c"), "--describe: 'a' is given twice"),
        (("--describe", "nowhere.toml"), "there is no file of labels 'nowhere.toml'"),
        (("--describe", "bad=x", "--describe", "goood=y"), "good"),
        (("--template", "{text"), "{text"),
        (("--backbone", "nowhere/at-all"), "no backbone 'nowhere/at-all'"),
        (("--resume",), "--resume needs --out"),
        (("--shots", "100"), "shots=100"),
    ],
)
def test_mistakes_in_options(arguments, message, reviews, tiny):
    given = dict(zip(("--data", "--text", "--label", "--backbone"), (reviews, "review", "stars", tiny), strict=True))
    given = {name: value for name, value in given.items() if name not in arguments}
    assert message in fails("fit", *(x for pair in given.items() for x in pair), "--steps", 1, *arguments)


def test_no_data_at_all():
    assert "there is no training data: give --data FILE" in fails("fit", "--backbone", "demo")


def test_a_text_in_place_of_a_file(adapted):
    assert "echo" in fails("predict", adapted, "A gem of a film.")
    assert "did you mean" in fails("predict", adapted.parent / "adaptd", "-")


def test_the_traceback_is_there_where_asked(reviews):
    done = run("fit", "--data", reviews, "--debug", "--seeds", "x")
    assert isinstance(done.exception, ConfigError)


def test_ctrl_c_says_how_to_go_on(reviews, tiny, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "_run", interrupted)
    monkeypatch.setattr(sys, "argv", ["deltaprompt", "fit", "my data.csv", "--out", "o"])
    message = fails("fit", *columns(reviews), "--out", tmp_path, code=130)
    assert message == "stopped by Ctrl-C; go on with: deltaprompt fit 'my data.csv' --out o --resume"
    assert fails("fit", *columns(reviews), code=130) == "stopped by Ctrl-C"


# inspect


def test_inspect_a_backbone(tiny):
    shown = succeeds(
        "inspect", tiny, "--delta", "lora:rank=2,at=attn.q+attn.v", "--delta", "soft_prompt:length=3"
    ).stdout
    assert "layers.0-1  2 alike, each with" in shown
    assert "✓ +64" in shown  # rank · (in + out)
    assert "rank=2, alpha=16.0, dropout=0.0" in shown
    assert "at=('attn.q', 'attn.v'), freeze_a=False): 4 sites, 256 parameters" in shown
    assert "soft_prompt" in shown


def test_inspect_as_json_counts_every_parameter(tiny):
    found = last_json(succeeds("inspect", tiny, "--json", "--delta", "bitfit"))
    at_sites = sum(group["layers"] * sum(site["parameters"] for site in group["sites"]) for group in found["groups"])
    assert found["parameters"] == at_sites + found["elsewhere"]
    assert found["parameters"] == sum(p.numel() for p in backbones_zoo.build("bert-encoder").model.parameters())
    cost = sum(group["layers"] * sum(site["costs"][0] or 0 for site in group["sites"]) for group in found["groups"])
    assert cost == found["placements"][0]["parameters"]


def test_inspect_tells_which_selector_misses(tiny):
    done = run("inspect", tiny, "--delta", "lora:at=attn.q+attn.w")
    assert done.exit_code == 2
    assert "✗ lora" in done.stdout
    assert "✓" in done.stdout  # what the other selector matches
    assert "selector 'attn.w' matches no site" in done.stderr


def test_inspect_predicts_the_memory_of_a_step(tiny):
    lora = ("--delta", "lora:rank=2,at=attn.q")
    shown = succeeds("inspect", tiny, *lora, "--memory").stdout
    assert "a training step on 16 rows of 128 tokens" not in shown  # the tiny model takes 64
    assert "a training step on 16 rows of 64 tokens" in shown
    assert "--checkpointing" in shown
    found = last_json(succeeds("inspect", tiny, *lora, "--memory", "--batch-size", 3, "--length", 9, "--json"))
    memory = found["memory"]
    assert (memory["rows"], memory["length"]) == (3, 9)
    assert memory["deltas"] == memory["gradients"] == 4 * found["placements"][0]["parameters"]
    parts = ("backbone", "deltas", "gradients", "optimizer", "kept")
    assert memory["total"] == sum(memory[part] for part in parts)
    half = last_json(succeeds("inspect", tiny, *lora, "--memory", "--dtype", "bfloat16", "--json"))["memory"]
    assert half["backbone"] < 0.6 * memory["backbone"]
    assert "memory" not in last_json(succeeds("inspect", tiny, *lora, "--json"))


def test_inspect_says_what_it_needs_to_predict_memory(tiny, adapted):
    assert "give a backbone's NAME and --delta" in fails("inspect", tiny, "--memory")
    assert "give a backbone's NAME and --delta" in fails("inspect", adapted, "--memory", "--delta", "lora")
    assert "give --memory too" in fails("inspect", tiny, "--length", "8")
    assert "1 to 64 tokens are possible" in fails("inspect", tiny, "--memory", "--delta", "lora", "--length", "65")


def test_inspect_an_adaptation(adapted):
    shown = succeeds("inspect", adapted).stdout
    assert "template: {text}" in shown
    assert "fingerprint" in shown
    assert last_json(succeeds("inspect", adapted, "--json"))["labels"] == ["bad", "good"]


# the demo, and the command as a process


def test_the_demo_in_short(tmp_path, monkeypatch):
    from deltaprompt.data import shipped
    from deltaprompt.trainer import Training, fit_seeds

    whole = shipped.load
    monkeypatch.setattr(shipped, "load", lambda split: whole(split)[:: 4 if split == "test" else 1])
    short = {"training": Training(steps=1, batch_size=4)}
    monkeypatch.setattr("deltaprompt.trainer.fit_seeds", lambda *a, **k: fit_seeds(*a, **k, **short))
    shown = succeeds("demo", "--seeds", "0", "--shots", "2", "--out", tmp_path / "demo").stdout
    assert all(row in shown for row in ("zero-shot", "frozen logistic probe", "prompt + delta"))
    assert all(text in shown for text in demo.NEW)


def test_the_command_as_a_process(adapted):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "deltaprompt", "predict", str(adapted), "-", "--device", "cpu"]
    done = subprocess.run(
        command, input="naïve 🤷 text\n\n", capture_output=True, env=env, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    text = "many of them\n" * 4_000  # whose answers are more than a pipe holds
    piped = " ".join(command) + " --json --batch-size 64 | head -n 1"
    done = subprocess.run(
        ["bash", "-c", piped], input=text, capture_output=True, env=env, encoding="utf-8", timeout=120
    )
    assert json.loads(done.stdout)["label"] in REVIEWS
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr
