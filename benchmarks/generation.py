"""`python -m benchmarks.generation out/small-causal`: data-to-text, as it is, by prefix, by LoRA, and fully fine-tuned.

Each method trains on the same rows, for as many epochs, at its own learning rate; with --tune at the one of three that
is best on dev with the first seed. Where all of a backbone trains it is a copy, and trains by the same loss, batches,
schedule and choice of the best epoch. The table and what was asked are also written to benchmarks/generation.json. The
defaults take some hours on two CPU cores with a model of 7 M parameters; --tune doubles it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import deltaprompt as dp
from deltaprompt.backbone import Backbone
from deltaprompt.backbone.load import wrap
from deltaprompt.data import grouped, hold_out, told_apart
from deltaprompt.deltas._base import Delta
from deltaprompt.model.text_metrics import signatures
from deltaprompt.trainer.order import Order, draw_from, mixed

DATA = Path(__file__).parents[2] / "shared" / "data"
EVERYWHERE = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")
RATES = {"prefix": 0.5, "lora": 3e-3, "full": 1e-3}
SHOWN = {
    "bleu": "BLEU",
    "bleu_seen": "seen",
    "bleu_unseen": "unseen",
    "chrf": "chrF",
    "rougeL": "ROUGE-L",
    "loss": "loss",
}


@dataclass(frozen=True)
class Data:
    """A data set: what is asked, and its rows."""

    name: str
    generation: dp.Generation
    train: Sequence[dp.Example]
    dev: Sequence[dp.Example]
    test: Sequence[dp.Example]


@dataclass(frozen=True)
class Result:
    """What a method came to on a data set, a seed each."""

    data: str
    method: str
    trained: int
    share: float  # of the backbone's parameters
    rate: float
    seconds: float  # of training, a seed
    each: list[dict[str, float]]


def e2e(rows: int, tested: int) -> Data:
    """E2E: rows of nine tenths of the tables of the official dev part to train on."""
    train, dev = hold_out(dp.read_pairs(DATA / "e2e_nlg" / "dev.jsonl.gz"), 0.1, seed=0)
    test = grouped(dp.read_pairs(DATA / "e2e_nlg" / "test.jsonl.gz"))
    asked = dp.Generation("{source} =>", max_length=256, max_target=96)
    return Data("E2E", asked, spread(train, rows), dev, spread(test, tested))


def webnlg(rows: int, tested: int) -> Data:
    """WebNLG 2017: one text of each training row, so that many tables are seen."""
    folder = DATA / "webnlg2017"
    train, dev, test = (
        dp.read_pairs(folder / f"{part}.jsonl.gz", target="references") for part in ("train", "dev", "test")
    )
    asked = dp.Generation("{triples} =>", max_length=384, max_target=128)
    some = [replace(example, references=example.references[:1]) for example in spread(train, rows)]
    return Data("WebNLG", asked, some, spread(dev, 300), spread(told_apart(test, train, "category"), tested))


def spread(rows: Sequence[dp.Example], count: int) -> list[dp.Example]:
    """So many rows, evenly from all of them."""
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else list(rows)


Trained = tuple[list[dp.Generator], list[float], int]  # a generator a seed, their dev losses, the numbers that trained


def by_deltas(deltas: Sequence[Delta]) -> Callable[[Backbone, Data, dp.Training, Sequence[int]], Trained]:
    """All seeds in one pass."""

    def train(backbone: Backbone, data: Data, training: dp.Training, seeds: Sequence[int]) -> Trained:
        model = dp.Generator(backbone, data.generation, deltas, seeds)
        runs = dp.fit_many(model, [dp.Plan(data.train, data.dev, training, seed) for seed in seeds])
        return [model], [run.best["loss"] for run in runs], runs[0].trainable

    return train


def in_full(backbone: Backbone, data: Data, training: dp.Training, seeds: Sequence[int]) -> Trained:
    """All weights of a copy, seed after seed: AdamW, the loss and the batches that deltas have, the best epoch kept."""
    models, losses = [], []
    for seed in seeds:
        own = wrap(copy.deepcopy(backbone.model), backbone.tokenizer, kind=backbone.kind)
        model = dp.generator(own, data.generation)
        losses.append(trained_in_full(model, data, training, seed))
        models.append(model)
    return models, losses, sum(p.numel() for p in backbone.model.parameters())


def trained_in_full(model: dp.Generator, data: Data, training: dp.Training, seed: int) -> float:
    """Trains the backbone in place; the best loss on dev, whose weights it then has."""
    weights = list(model.backbone.model.requires_grad_(True).parameters())
    rows, dev = model.encode(data.train), model.encode(data.dev)
    order = Order([row.length for row in rows], training.batch_size, training.accumulate, seed)
    optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=training.weight_decay)
    total, best, kept = training.total(order.epoch), float("inf"), model.backbone.model.state_dict()
    for step in range(total):
        draw_from(mixed(seed, step, 0), model.device)
        optimizer.param_groups[0]["lr"] = training.learning_rate * training.rate(step, total)
        optimizer.zero_grad()
        batches = [[rows[i] for i in part] for part in order.batches(step)]
        tokens = sum(row.weight for batch in batches for row in batch)
        for batch in batches:
            loss = model(model.collate(batch).to(model.device))["loss"]
            (loss * (sum(row.weight for row in batch) / tokens)).backward()
        torch.nn.utils.clip_grad_norm_(weights, training.clip)
        optimizer.step()
        if (step + 1) % order.epoch == 0 and (found := model.measure(dev)["loss"]) < best:
            best, kept = found, copy.deepcopy(model.backbone.model.state_dict())
    model.backbone.model.load_state_dict(kept)
    model.backbone.model.requires_grad_(False)
    return best


METHODS: dict[str, Callable[[Backbone, Data, dp.Training, Sequence[int]], Trained]] = {
    "prefix": by_deltas([dp.Prefix(length=60)]),
    "lora": by_deltas([dp.LoRA(rank=8, at=(*EVERYWHERE, "head")), dp.LNTuning()]),
    "full": in_full,
}


def measured(backbone: Backbone, data: Data, method: str, epochs: int, seeds: Sequence[int], tune: bool) -> Result:
    """Trains by one method at its rate, and measures every seed on test."""
    parameters = sum(p.numel() for p in backbone.model.parameters())
    if method == "untuned":
        model = dp.generator(backbone, data.generation)
        each = [dict(model.evaluate(data.test, batch_size=32))]
        model.adapted.remove()
        return Result(data.name, method, 0, 0.0, 0.0, 0.0, each)
    plain = dp.Training(epochs=epochs, batch_size=16, warmup=0.05, patience=None)
    rate = tuned(backbone, data, method, plain, seeds[:1]) if tune else RATES[method]
    clock = time.perf_counter()
    models, _, trained = METHODS[method](backbone, data, replace(plain, learning_rate=rate), seeds)
    seconds = (time.perf_counter() - clock) / len(seeds)
    places = [(model, slot) for model in models for slot in range(model.adapted.slots)]
    each = [dict(model.evaluate(data.test, batch_size=32, slot=slot)) for model, slot in places]
    free(models)
    return Result(data.name, method, trained, trained / parameters, rate, seconds, each)


def tuned(backbone: Backbone, data: Data, method: str, plain: dp.Training, seeds: Sequence[int]) -> float:
    """The method's rate, a third of it or three times it: the lowest loss on dev."""
    dev: dict[float, float] = {}
    for rate in (RATES[method] / 3, RATES[method], RATES[method] * 3):
        models, losses, _ = METHODS[method](backbone, data, replace(plain, learning_rate=rate), seeds)
        dev[rate] = losses[0]
        free(models)
    return min(dev, key=lambda rate: dev[rate])


def free(models: Sequence[dp.Generator]) -> None:
    """Takes the deltas off the backbone."""
    for model in models:
        model.adapted.remove()


def table(results: Sequence[Result]) -> Table:
    """A line a data set and method: mean ± sample standard deviation over the seeds."""
    made = Table("data", "method", *SHOWN.values(), "trained", "share", "rate", "seconds a seed")
    for r in results:
        cells = [cell([own[name] for own in r.each]) if name in r.each[0] else "–" for name in SHOWN]
        made.add_row(r.data, r.method, *cells, f"{r.trained:,}", f"{r.share:.2%}", f"{r.rate:g}", f"{r.seconds:.0f}")
    return made


def cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def main() -> None:
    """Runs what is asked for, prints the table after every line, and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backbone", help="a folder or a name")
    parser.add_argument("--data", nargs="+", default=["e2e", "webnlg"], choices=["e2e", "webnlg"])
    parser.add_argument("--methods", nargs="+", default=["untuned", *METHODS], choices=["untuned", *METHODS])
    parser.add_argument("--rows", type=int, default=1500, help="training rows")
    parser.add_argument("--tested", type=int, default=300, help="test tables, evenly from all")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--tune", action="store_true", help="three learning rates")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "generation.json")
    asked = parser.parse_args()
    backbone = dp.load(asked.backbone)
    results: list[Result] = []
    measures: dict[str, dict[str, str]] = {}
    for name in asked.data:
        data = {"e2e": e2e, "webnlg": webnlg}[name](asked.rows, asked.tested)
        measures[data.name] = signatures([example.references for example in data.test])
        for method in asked.methods:
            results.append(measured(backbone, data, method, asked.epochs, range(asked.seeds), asked.tune))
            Console(width=160).print(table(results[-1:]))
    Console(width=160).print(table(results))
    told: dict[str, Any] = {name: value for name, value in vars(asked).items() if name != "out"}
    print(json.dumps(measures, indent=1))
    asked.out.write_text(json.dumps({**told, "sacrebleu": measures, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
