"""`python -m benchmarks.episodes`: learning to learn from few examples of entities, slots and relations.

Every cell is a method on a task; seeds are those of training, and the test episodes are the same for all methods and
seeds. What is done is kept in `--out` and not done again, so that a run that was stopped goes on.

- CrossNER, a domain left out: episodes of the four others train, those of the fifth test. That is another domain; of
  its types (person, location, …) about half are also among theirs. WikiGold: all of CrossNER trains.
- SNIPS: sentences with half of the 39 slots train, other sentences with the other slots test.
- FewRel, Wikipedia: 8 of the 16 relations of the file with labels train, the other 8 test, so that 8 ways are the most.
  PubMed: all 16 train, and PubMed's 10 test.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import deltaprompt as dp
from deltaprompt.backbone import Backbone
from deltaprompt.data import (
    class_episodes,
    read_relations,
    read_tagged,
    sentence_episodes,
    span_labels,
    split_by_label,
)
from deltaprompt.data.episodes import Episode, split_by_span_label
from deltaprompt.data.tagged import word_tags
from deltaprompt.model.transitions import Moves
from deltaprompt.study.data import digest_of
from deltaprompt.trainer import Silent, fit_seeds
from deltaprompt.verbalizers._base import Verbalizer

ROOT = Path("../shared/data")
DOMAINS = ("ai", "literature", "music", "politics", "science")
ASKED = "{text} {head} is the {mask} of {tail}."  # of relations; chosen on 8 relations that are not tested here
EVERYWHERE = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down")
BATCH = 4
Pool = Sequence[dp.Example]


@dataclass(frozen=True)
class Pools:
    """Rows to train on and to measure on."""

    train: Pool
    test: Pool
    spans: bool


@dataclass(frozen=True)
class Method:
    """What starts from the support, and whether deltas learn."""

    name: str
    verbalizer: Verbalizer
    trained: bool = True
    structured: bool = False  # with how often tags follow one another in the training rows


SPHERE = {"unit": True, "scale": 20.0}
OF_SPANS = (
    Method("nearest neighbour, frozen", dp.NNShot(), trained=False),
    Method("StructShot, frozen", dp.NNShot(), trained=False, structured=True),
    Method("ProtoNet, frozen", dp.ProtoNet(**SPHERE), trained=False),
    Method("ProtoNet + LoRA", dp.ProtoNet(**SPHERE)),
    Method("HyperProto + LoRA", dp.HyperProto(**SPHERE)),
)
OF_TEXTS = (
    Method("spherical prototypes, frozen", dp.Prototypes(), trained=False),
    Method("ProtoNet, frozen", dp.ProtoNet(**SPHERE), trained=False),
    Method("spherical prototypes + LoRA", dp.Prototypes()),
    Method("ProtoNet + LoRA", dp.ProtoNet(**SPHERE)),
    Method("HyperProto + LoRA", dp.HyperProto(**SPHERE)),
)


@cache
def tagged(name: str, *parts: str) -> Pool:
    """The rows of a data set's parts, or with "crossner" those of domains."""
    if name == "crossner":
        parts = tuple(f"{domain}_{part}" for domain in parts for part in ("train", "dev", "test"))
    return [row for part in parts for row in read_tagged(ROOT / name / f"{part}.jsonl.gz")]


def left_out(domain: str) -> Pools:
    """CrossNER without a domain, and that domain."""
    return Pools(tagged("crossner", *(d for d in DOMAINS if d != domain)), tagged("crossner", domain), spans=True)


def snips() -> Pools:
    """Sentences of SNIPS with half of the slots, and others with the other slots."""
    return Pools(*split_by_span_label(tagged("snips", "train")), spans=True)


def wikigold() -> Pools:
    """All of CrossNER, and WikiGold."""
    return Pools(tagged("crossner", *DOMAINS), tagged("wikigold", "train", "test"), spans=True)


@cache
def relations(name: str) -> Pool:
    """FewRel's rows."""
    return read_relations(ROOT / "fewrel" / f"{name}.jsonl.gz")


def wiki() -> Pools:
    """Half of the relations, and the others."""
    return Pools(*split_by_label(relations("val_wiki"), 0), spans=False)


def pubmed() -> Pools:
    """All relations of Wikipedia's sentences, and those of PubMed."""
    return Pools(relations("val_wiki"), relations("val_pubmed"), spans=False)


TASKS: Mapping[str, tuple[Callable[[], Pools], tuple[tuple[int, int], ...]]] = {  # the pools, and (ways, shots)
    **{f"CrossNER {domain}": (lambda domain=domain: left_out(domain), ((5, 5), (5, 1))) for domain in DOMAINS},
    "SNIPS": (snips, ((5, 5),)),
    "WikiGold": (wikigold, ((4, 5),)),
    "FewRel wiki": (wiki, ((5, 1), (5, 5), (8, 1), (8, 5))),
    "FewRel PubMed": (pubmed, ((5, 1), (5, 5), (10, 1), (10, 5))),
}


def dealt(pool: Pool, spans: bool, ways: int, shots: int, count: int, seed: int) -> list[Episode]:
    """Episodes of a pool; one query of each label."""
    draws = sentence_episodes if spans else class_episodes
    return list(islice(draws(pool, ways, shots, 1, seed), count))


def result(
    backbone: Backbone, method: Method, pools: Pools, ways: int, shots: int, asked: argparse.Namespace
) -> dict[str, Any]:
    """What a method comes to; a frozen one trains nothing, and one seed stands for all."""
    moves = Moves.counted(word_tags(row, "io") for row in pools.train) if method.structured else None
    template = "{text}" if pools.spans else ASKED
    episodic = dp.Episodic(template, method.verbalizer, pools.spans, max_length=128, moves=moves)
    train = asked.train if method.trained else 0
    least = min(ways, len(span_labels(pools.train)) if pools.spans else len({row.label for row in pools.train}))
    training = dp.Training(epochs=1, batch_size=BATCH, learning_rate=5e-4)
    seeds = range(asked.seeds) if method.trained else range(1)
    begun = time.process_time()
    found = fit_seeds(
        lambda seeds: dp.Learner(backbone, episodic, [dp.LoRA(rank=8, at=EVERYWHERE)] if train else [], seeds),
        lambda seed: (dealt(pools.train, pools.spans, least, shots, max(train, 1), 1 + seed), None),
        dealt(pools.test, pools.spans, ways, shots, asked.test, 0),
        seeds=seeds,
        training=training,
        together=1,
        progress=Silent(),
    )
    metric = "f1" if pools.spans else "accuracy"
    ends = {name: found.test[name]["mean"] for name in ("low", "high")}
    return {"each": found.test[metric]["each"], **ends, "cpu_seconds": time.process_time() - begun}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: of spans and of relations a row a method, a column a task."""
    parts = []
    for methods, spans in ((OF_SPANS, True), (OF_TEXTS, False)):
        names = [(t, k) for t, (_, asked) in TASKS.items() if t.startswith("FewRel") != spans for k in asked]
        heads = [f"{task}, {ways} × {shots}" for task, (ways, shots) in names]
        lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
        for method in methods:
            cells = [shown(found.get(f"{task}/{ways}x{shots}/{method.name}")) for task, (ways, shots) in names]
            lines.append(f"| {method.name} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def shown(cell: Mapping[str, Any] | None) -> str:
    """The mean of the seeds, their standard deviation, and the mean interval of the episodes."""
    if cell is None:
        return "–"
    each = cell["each"]
    spread = f" ± {statistics.stdev(each):.3f}" if len(each) > 1 else ""
    return f"{statistics.fmean(each):.3f}{spread} [{cell['low']:.3f}, {cell['high']:.3f}]"


def kept(path: Path) -> Iterator[dict[str, Any]]:
    """The cells in a file; a line that a kill cut off is none."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def main() -> None:
    """Measures what is not done, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, with commas between")
    parser.add_argument("--train", type=int, default=400, help="episodes to train on")
    parser.add_argument("--test", type=int, default=1000, help="episodes to measure on")
    parser.add_argument("--seeds", type=int, default=5, help="of training")
    parser.add_argument("--out", type=Path, default=Path("out/episodes.jsonl"))
    asked = parser.parse_args()
    settings = {name: vars(asked)[name] for name in ("train", "test", "seeds")}
    settings["digest"] = digest_of([ASKED, repr(OF_SPANS), repr(OF_TEXTS), str(BATCH)])
    found = {cell["key"]: cell for cell in kept(asked.out) if cell["settings"] == settings}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    backbones = {kind: dp.load("demo", kind=kind, device="cpu") for kind in ("encoder", "masked")}
    for name in asked.tasks.split(","):
        make, shapes = TASKS[name]
        pools = make()
        for ways, shots in shapes:
            for method in OF_SPANS if pools.spans else OF_TEXTS:
                key = f"{name}/{ways}x{shots}/{method.name}"
                if key in found:
                    continue
                backbone = backbones["encoder" if pools.spans else "masked"]
                cell = {"key": key, "settings": settings, **result(backbone, method, pools, ways, shots, asked)}
                with asked.out.open("a") as file:
                    file.write("\n" + json.dumps(cell))  # a line that was cut off stays one by itself
                found[key] = cell
                print(key, shown(cell), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
