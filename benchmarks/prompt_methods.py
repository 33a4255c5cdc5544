"""`python -m benchmarks.prompt_methods`: prompts on the demo's masked LM against the frozen probe, at 0 to 16 shots.

Every cell is the test accuracy of five seeds, which draw the examples; the methods of one cell see the same ones. What
is done is kept in `--out` and not done again, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

import deltaprompt as dp
from deltaprompt.backbone import Backbone
from deltaprompt.calibrations._base import Calibration, spread
from deltaprompt.calibrations.contextualised import Contextualised
from deltaprompt.data.label_words import read_label_words
from deltaprompt.model.starting import observed, unlabelled_of
from deltaprompt.study.probe import embedded, regression
from deltaprompt.trainer import Silent
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Verbalizer
from deltaprompt.verbalizers.dect import DecT
from deltaprompt.verbalizers.knowledgeable import Knowledgeable
from deltaprompt.verbalizers.proto_verb import ProtoVerb

ROOT = Path("../shared/data")
LISTS = ROOT / "verbalizers_templates/TextClassification"
PROBES = {"frozen probe": False, "frozen probe, with the dev rows": True}  # whether it learns from these too
SHOTS, SEEDS = (0, 1, 4, 16), (0, 1, 2, 3, 4)
EVERYWHERE = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down")
HEADS = dp.Training(epochs=30, verbalizer_learning_rate=1e-2)  # of what trains on frozen states alone (DecT, ProtoVerb)
Words = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Data:
    """A data set with its template and words, fixed before any test row was looked at."""

    name: str
    template: str
    words: Words
    lists: str  # KPT's words
    order: tuple[str, ...]  # the labels, in the order of that file
    length: int = 128

    def rows(self, split: str, limit: int | None = None) -> list[dp.Example]:
        """Rows of a split, evenly spaced."""
        path, empty = ROOT / self.name / f"{split}.jsonl.gz", list[str]()
        found = dp.read(path, label="label_name", on_empty=empty.append)
        return list(found if limit is None else spread(found, limit))

    @cached_property
    def many(self) -> Words:
        """KPT's words; the class's own word first."""
        found = read_label_words(LISTS / self.lists / "knowledgeable_verbalizer.txt", self.order)
        return {
            label: (self.words[label][0], *(w for w in found[label] if w != self.words[label][0])) for label in found
        }


SENTIMENT = {"negative": ("bad", "terrible", "poor", "awful"), "positive": ("good", "great", "excellent", "wonderful")}
SETS = (
    Data(
        "agnews",
        "{mask} news: {text}",
        {
            "World": ("world", "international", "politics", "war"),
            "Sports": ("sports", "sport", "football", "baseball"),
            "Business": ("business", "economy", "market", "finance"),
            "Sci/Tech": ("technology", "science", "computer", "internet"),
        },
        "agnews",
        ("World", "Sports", "Business", "Sci/Tech"),
    ),
    Data(
        "dbpedia14",
        "{text} In this sentence, the topic is {mask}.",
        {
            "Company": ("company", "business"),
            "EducationalInstitution": ("school", "university"),
            "Artist": ("artist", "musician", "writer"),
            "Athlete": ("athlete", "player", "sports"),
            "OfficeHolder": ("politics", "politician"),
            "MeanOfTransportation": ("transportation", "ship", "aircraft"),
            "Building": ("building", "house"),
            "NaturalPlace": ("river", "lake", "mountain"),
            "Village": ("village", "town"),
            "Animal": ("animal", "species"),
            "Plant": ("plant", "flower"),
            "Album": ("album", "music"),
            "Film": ("film", "movie"),
            "WrittenWork": ("book", "novel", "newspaper"),
        },
        "dbpedia",
        (),
    ),
    Data("cr", "{text} It was {mask}.", SENTIMENT, "amazon", ("negative", "positive")),
    Data(
        "movie_reviews",
        "{text|truncate:middle} The movie was {mask}.",
        SENTIMENT,
        "imdb",
        ("negative", "positive"),
        256,
    ),
)


@dataclass(frozen=True)
class Method:
    """A way to answer."""

    name: str
    zero: bool = False  # whether it answers without examples
    soft: str = ""  # soft tokens in front of the template
    delta: bool = True  # whether LoRA trains; else the backbone is frozen and its states are kept

    def verbalizer(self, data: Data) -> Verbalizer:
        """What reads the answer."""
        if self.name.startswith("KPT"):
            return Knowledgeable(data.many)
        made: dict[str, Verbalizer] = {
            "ProtoVerb": ProtoVerb(words=data.words),
            "DecT": DecT(data.words),
            "soft verbalizer": dp.SoftVerbalizer(words=data.words),
        }
        return made.get(self.name, dp.LabelWords(data.words))

    @property
    def calibration(self) -> Calibration | None:
        """What is taken away."""
        return None if self.name in ("label words", "P-tuning + LoRA") else Contextualised()


METHODS = (
    Method("label words", zero=True),
    Method("label words, calibrated", zero=True),
    Method("KPT", zero=True),
    Method("soft verbalizer", delta=False),
    Method("ProtoVerb", delta=False),
    Method("DecT", delta=False),
    Method("P-tuning + LoRA", soft="{soft:4|lstm}"),
)


def accuracies(backbone: Backbone, data: Data, method: Method, shots: int, test: Sequence[dp.Example]) -> list[float]:
    """Of every seed; without examples of one, since nothing is drawn."""
    train = data.rows("train")
    unlabelled = unlabelled_of(train)
    seeds = SEEDS if shots else SEEDS[:1]
    task = dp.Task(
        method.soft + data.template,
        tuple(data.words),
        method.verbalizer(data),
        data.length,
        method.calibration,
    )
    deltas = [dp.LoRA(rank=8, at=EVERYWHERE)] if method.delta and shots else []
    model = dp.Model(backbone, task, deltas, seeds)
    drawn = [dp.few_shot(train, shots, seed) if shots else ([], None) for seed in seeds]
    training = dp.Training() if method.delta else HEADS
    plans = [
        dp.Plan(support, dev, training, seed, unlabelled=unlabelled)
        for seed, (support, dev) in zip(seeds, drawn, strict=True)
    ]
    try:
        dp.fit_many(model, plans, progress=Silent())
        return [measured(model, slot, test, bool(deltas or method.soft)) for slot in range(len(seeds))]
    finally:
        model.adapted.remove()


KEPT: dict[tuple[str, str, int], torch.Tensor] = {}  # of a data set's test rows, what the frozen backbone makes of them


def measured(model: dp.Model, slot: int, test: Sequence[dp.Example], moves: bool) -> float:
    """Test accuracy; where the backbone is as it was, from states that are kept. Every word is one token."""
    if moves:
        return model.evaluate(test, slot=slot)["accuracy"]
    key = (model.task.template, test[0].fields["text"], len(test))
    if key not in KEPT:
        KEPT[key] = observed(model, model.features, test, lambda at: at.hidden[:, 0, 0], slot)
    hidden = KEPT[key][:, None, None]
    assert model.backbone.head is not None
    at = AtMask(hidden, torch.ones(hidden.shape[:3], dtype=torch.bool), model.backbone.head.logits)
    with torch.inference_mode():
        found = model.reader(slot)(at, model.seats[slot][1]).argmax(-1)
    gold = torch.tensor([model.features.label_index(str(e.label)) for e in test])
    return float((found == gold).float().mean())


def probed(encoder: Backbone, data: Data, shots: int, test: Sequence[dp.Example], more: bool) -> list[float]:
    """The frozen baseline: logistic regression on mean-pooled sentence embeddings of the published encoder.

    With `more` it learns from the rows too by which other methods choose their best.
    """
    train, gold = data.rows("train"), [e.label for e in test]
    tested, each = embedded(encoder, test, data.length), list[float]()
    for seed in SEEDS:
        support, dev = dp.few_shot(train, shots, seed)
        support += dev if more else []
        each.append(
            float(regression(embedded(encoder, support, data.length), [e.label for e in support]).score(tested, gold))
        )
    return each


def cells(
    backbone: Backbone,
    encoder: Backbone,
    names: Sequence[str],
    shots: Sequence[int],
    limit: int,
    done: Mapping[str, object],
) -> Iterator[dict[str, object]]:
    """What is not done yet, measured one by one."""
    for data in (d for d in SETS if d.name in names):
        data = replace(data, order=data.order or tuple(data.words))
        test = data.rows("test", limit)
        for k in shots:
            for method in (m for m in METHODS if k or m.zero):
                if f"{data.name}/{method.name}/{k}" not in done:
                    yield told(data, method.name, k, limit, backbone, accuracies(backbone, data, method, k, test))
            for name, more in PROBES.items():
                if k and f"{data.name}/{name}/{k}" not in done:
                    yield told(data, name, k, limit, encoder, probed(encoder, data, k, test, more))


def told(
    data: Data, method: str, shots: int, limit: int, backbone: Backbone, each: Sequence[float]
) -> dict[str, object]:
    """A cell as JSON, with what it was measured on."""
    key, asked = f"{data.name}/{method}/{shots}", {"data": data.name, "method": method, "shots": shots}
    return {"key": key, **asked, "test": limit, "backbone": backbone.fingerprint, "each": each}


def known(path: Path, limit: int, backbones: Sequence[Backbone]) -> dict[str, dict[str, object]]:
    """The cells in a file that were measured on so many test rows with these backbones."""
    found, prints = dict[str, dict[str, object]](), [backbone.fingerprint for backbone in backbones]
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:  # the line at which a run was killed
            continue
        if cell["test"] == limit and cell["backbone"] in prints:
            found[cell["key"]] = cell
    return found


def table(found: Mapping[str, Mapping[str, object]], names: Sequence[str], shots: Sequence[int]) -> str:
    """Markdown: a row a number of shots and method, a column a data set and one of their mean; the best is bold."""
    lines = ["| shots | | " + " | ".join(names) + " | mean |", "| --- |" + " --- |" * (len(names) + 2)]
    for k in shots:
        rows = {
            m: [each_of(found.get(f"{name}/{m}/{k}")) for name in names] for m in (*(m.name for m in METHODS), *PROBES)
        }
        rows = {m: cells for m, cells in rows.items() if any(cells)}
        columns = [
            [statistics.fmean(cells[n]) if cells[n] else 0.0 for cells in rows.values()] for n in range(len(names))
        ]
        means = [statistics.fmean(each) if all(each) else 0.0 for each in zip(*columns, strict=True)]
        columns.append(means)
        for n, (method, cells) in enumerate(rows.items()):
            texts = [shown(cell) for cell in cells] + [f"{means[n]:.3f}" if means[n] else "–"]
            bold = [f"**{t}**" if column[n] == max(column) else t for t, column in zip(texts, columns, strict=True)]
            lines.append(f"| {k} | {method} | " + " | ".join(bold) + " |")
    return "\n".join(lines)


def each_of(cell: Mapping[str, object] | None) -> list[float]:
    """The accuracy of every seed; none where it was not measured."""
    return [] if cell is None else [float(value) for value in cell["each"]]  # type: ignore[attr-defined]


def shown(each: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    if not each:
        return "–"
    return f"{statistics.fmean(each):.3f}" + (f" ± {statistics.stdev(each):.3f}" if len(each) > 1 else "")


def main() -> None:
    """Measures what is not done, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=",".join(d.name for d in SETS), help="names, with commas between")
    parser.add_argument("--shots", default=",".join(map(str, SHOTS)), help="numbers, with commas between")
    parser.add_argument("--test", type=int, default=1000, help="test rows at most, evenly spaced")
    parser.add_argument("--out", type=Path, default=Path("out/prompt_methods.jsonl"))
    asked = parser.parse_args()
    names, shots = asked.data.split(","), [int(k) for k in asked.shots.split(",")]
    backbone, encoder = (dp.load("demo", kind=kind, device="cpu") for kind in ("masked", "encoder"))
    found = known(asked.out, asked.test, (backbone, encoder))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells(backbone, encoder, names, shots, asked.test, found):
        with asked.out.open("a") as file:
            file.write("\n" * bool(file.tell()) + json.dumps(cell))  # a line that was cut off stays one by itself
        found[str(cell["key"])] = cell
        print(cell["key"], shown(each_of(cell)), flush=True)
    print(table(found, names, shots))


if __name__ == "__main__":
    main()
