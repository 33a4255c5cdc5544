"""The conformance command: what it is asked for, its workers, and what it prints and writes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deltaprompt import registry
from deltaprompt.conformance import workers
from deltaprompt.conformance.check import Checked, Outcome
from deltaprompt.conformance.choose import SPREAD, chosen_deltas, chosen_models
from deltaprompt.conformance.page import page
from deltaprompt.conformance.shrink import Architecture, known
from deltaprompt.conformance.summary import Summary, grouped, in_order, versions
from deltaprompt.errors import ConfigError
from tests.command import run

FOUND = (
    Checked("masked:vit", "no tiny ViTModel"),
    Checked(
        "causal:llama",
        outcomes=(
            Outcome("causal:llama", "bitfit", "passed", limits=("no text passes attn.x.bias",)),
            Outcome("causal:llama", "prefix", "passed"),
        ),
        dtype="float64",
    ),
    Checked(
        "causal:mpt",
        outcomes=(
            Outcome("causal:mpt", "bitfit", "failed", "learning: a|b"),
            Outcome("causal:mpt", "prefix", "refused", "MptForCausalLM takes none at layers.0.attn"),
        ),
        dtype="float32",
    ),
)
SUMMARY = Summary(("bitfit", "prefix"), FOUND)


# What it is asked for


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("causal:llama", {"causal:llama"}),
        ("llama, masked:bert", {"causal:llama", "masked:bert"}),
        ("bert", {"masked:bert", "causal:bert"}),
        ("seq2seq:t5*", {"seq2seq:t5", "seq2seq:t5gemma", "seq2seq:t5gemma2"}),
        ("spread", set(SPREAD)),
        ("seq2seq", {str(a) for a in known() if a.kind == "seq2seq"}),
        ("all", {str(a) for a in known()}),
    ],
)
def test_models_are_chosen_by_name(text: str, expected: set[str]) -> None:
    assert {str(a) for a in chosen_models(text)} == expected


def test_the_spread_is_forty_architectures() -> None:
    assert len(SPREAD) == len(set(SPREAD)) == 40


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ConfigError, match="'causal:lama' is no text architecture .* did you mean 'causal:llama'"):
        chosen_models("causal:lama")
    with pytest.raises(ConfigError, match="'lorra' is no delta; did you mean 'lora'"):
        chosen_deltas("lora,lorra")
    assert chosen_deltas("prefix, lora,lora") == ["prefix", "lora"]
    assert chosen_deltas("all") == sorted(registry.variants("deltas"))


# Its workers


class Surprise(Architecture):
    """An architecture that does something to the worker that is given it."""

    def __init__(self, kind: str, what: Any, *args: Any) -> None:
        super().__init__("masked", kind, "")
        object.__setattr__(self, "does", (what, args))

    def __reduce__(self) -> Any:
        return vars(self)["does"]


def test_a_worker_that_dies_or_hangs_is_one_architecture_s_failure() -> None:
    llama = next(a for a in known() if str(a) == "causal:llama")
    asked = [Surprise("dies", os._exit, 3), llama, Surprise("hangs", time.sleep, 600)]
    found = {c.model: c for c in workers.checked(asked, ["ia3", "bitfit"], workers=2, limit=60.0)}
    reasons = {name: [o.reason for o in c.outcomes] for name, c in found.items()}
    assert reasons == {
        "masked:dies": ["worker: its process ended with exit code 3"] * 2,
        "causal:llama": ["", ""],
        "masked:hangs": ["worker: not done within 60 seconds"] * 2,
    }


def test_no_worker_is_left_where_the_caller_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    start = workers._start
    monkeypatch.setattr(workers, "_start", lambda *args: started.append(start(*args)) or started[-1])
    running = workers.checked([Surprise("dies", os._exit, 0), Surprise("hangs", time.sleep, 600)], ["lora"], workers=2)
    assert next(running).outcomes[0].state == "failed"
    running.close()
    assert [worker.process.is_alive() for worker in started] == [False, False]


# What it found


def test_the_summary_as_json() -> None:
    found = SUMMARY.as_json()
    assert {key: found[key] for key in ("known", "built", "passed", "failed")} == {
        "known": 3,
        "built": 2,
        "passed": {"bitfit": 1, "prefix": 1},
        "failed": [["causal:mpt", "bitfit", "learning: a|b"]],
    }
    assert found["can_act"] == {"bitfit": 2, "prefix": 1}
    assert found["refused"] == [["causal:mpt", "prefix", "MptForCausalLM takes none at layers.0.attn"]]
    assert found["not_built"] == [["masked:vit", "no tiny ViTModel"]]
    assert found["limits"] == [["causal:llama", "bitfit", "no text passes attn.x.bias"]]
    assert found["float32"] == ["causal:mpt"]
    assert found["versions"] == versions()
    assert json.loads(json.dumps(found)) == found


def test_rows_count_what_passed_of_what_can_act() -> None:
    assert list(SUMMARY.rows()) == [
        ("bitfit", "1", "0", "1", "0/0", "1/2", "0/0"),
        ("prefix", "1", "1", "0", "0/0", "1/1", "0/0"),
    ]


def test_reasons_that_differ_in_names_only_are_listed_together() -> None:
    [most, other] = grouped(
        [
            ("a", "lora", "something else"),
            ("b", "lora", "BertForMaskedLM has none at layers.0.attn; did you mean 'x'?"),
            ("c", "ia3", "GPT2LMHeadModel has none at layers.1.attn; possible: y"),
        ]
    )
    assert (most.reason, most.models, most.deltas) == (
        "the model has none at layers.*.attn",
        ("b", "c"),
        ("lora", "ia3"),
    )
    assert other.models == ("a",)


def test_the_order_is_that_of_the_names() -> None:
    assert in_order(FOUND[::-1], [c.model for c in FOUND]) == FOUND


def test_the_page_lists_everything() -> None:
    text = page(SUMMARY, "deltaprompt conformance")
    for shown in (
        "2 of 3 architectures can be built and run",
        "| bitfit | 1 | 0 | 1 | 0/0 | 1/2 | 0/0 |",
        r"| causal:mpt | bitfit | learning: a\|b |",
        "- prefix: the model takes none at layers.*.attn",
        "- bitfit: no text passes attn.x.bias",
        "| masked:vit | no tiny ViTModel |",
        "**exact removal**: After it is trained and removed",
        versions()["transformers"],
    ):
        assert shown in text
    assert "None." in page(Summary((), ()), "")


def told(*args: str) -> Any:
    return run("conformance", *args)


def test_the_command_checks_one_architecture_in_a_worker() -> None:
    run = told("--models", "causal:llama", "--deltas", "ia3", "--workers", "1", "--json")
    found = json.loads(run.stdout)
    assert run.exit_code == 0
    assert (found["known"], found["built"], found["passed"], found["failed"]) == (1, 1, {"ia3": 1}, [])


def test_the_command_prints_a_table_and_writes_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def checked(architectures: Sequence[Architecture], deltas: Sequence[str], count: int) -> Iterator[Checked]:
        assert deltas == ["bitfit", "prefix"]
        yield from (c for c in FOUND[::-1] if c.model in map(str, architectures))

    monkeypatch.setattr(workers, "checked", checked)
    run = told("--models", "llama,mpt", "--deltas", "bitfit,prefix", "--out", str(tmp_path / "page.md"))
    assert run.exit_code == 0
    for shown in (
        "2 architectures, 2 built",
        "failed  bitfit on causal:mpt: learning: a|b",
        "refused  prefix on causal:mpt",
    ):
        assert shown in run.stdout
    assert (
        "deltaprompt conformance --models llama,mpt --deltas bitfit,prefix --out" in (tmp_path / "page.md").read_text()
    )


def test_the_command_names_what_is_possible() -> None:
    run = told("--models", "causal:lama")
    assert run.exit_code == 2
    assert "did you mean 'causal:llama'" in run.stderr


def test_a_page_that_cannot_be_written_is_told_before_the_run(tmp_path: Path) -> None:
    run = told("--models", "causal:llama", "--out", str(tmp_path / "missing" / "page.md"))
    assert run.exit_code == 2
    assert "there is no folder" in run.stderr
