"""`deltaprompt demo`: from 8 customer messages a class to one small file, against what works without a delta."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaprompt.cli import console, options

if TYPE_CHECKING:
    from deltaprompt.backbone import Backbone
    from deltaprompt.types import Example

TEMPLATE = "A customer writes: {text}"  # chosen on rows of the training pool that no seed trains on
DESCRIPTIONS = {  # what one would tell a new colleague; written before any result was looked at
    "account": "The message is about signing in, a password, personal details or the security of a customer's account.",
    "billing": "The message is about an invoice, a charge, a price, a payment or a subscription fee.",
    "delivery": "The message is about shipping, a courier, or a parcel that is late, lost or damaged on its way.",
    "praise": "The message is a compliment: a happy customer says thank you and loves the product or the service.",
    "returns": "The message is about sending an item back, exchanging it or getting a refund for it.",
    "technical": "The message is about an error, a bug, or a device, app or website that does not work properly.",
}
NEW = (
    "My statement shows the yearly fee twice, could you look into that?",
    "The thermostat loses its wifi every night around two and only comes back when I unplug it.",
    "Honestly the nicest people I have ever had on a helpline. You made my week!",
)
COLUMNS = ("", "accuracy", "macro F1", "trained parameters", "file", "seconds")
Scores = Mapping[str, Mapping[str, Any]]
Supports = Mapping[int, tuple[Sequence["Example"], Sequence["Example"]]]


def demo(
    seeds: Annotated[str, typer.Option("--seeds", help="Such as 0-2.", metavar="SEEDS")] = "0-2",
    shots: Annotated[int, typer.Option("--shots", help="Examples of each class.", min=2, metavar="K")] = 8,
    out: Annotated[Path, typer.Option("--out", help="The folder that keeps what is learned.", metavar="DIR")] = Path(
        "out/demo"
    ),
    debug: options.Debug = False,
) -> None:
    """Adapt the small built-in backbone to sorting customer messages, and compare."""
    from deltaprompt.backbone import load
    from deltaprompt.cli.recipe import seeds_of
    from deltaprompt.data import few_shot, shipped

    pool, test, backbone = shipped.load("train"), shipped.load("test"), load("demo", kind="encoder", device="cpu")
    supports = {seed: few_shot(pool, shots, seed) for seed in seeds_of(seeds)}
    console.note(f"customer messages, {len(DESCRIPTIONS)} classes, {shots} examples of each to learn from")
    rows = [
        _zero_shot(backbone, test),
        _probe(backbone, supports, test),
        _prompt_and_delta(backbone, supports, test, out),
    ]
    title = f"{len(test)} test messages, {len(supports)} seed{'s' * (len(supports) > 1)}"
    console.output().print(console.table(COLUMNS, rows, title))
    _predict_new(out)


def _zero_shot(backbone: Backbone, test: Sequence[Example]) -> list[str]:
    """No example at all: the class whose description is nearest."""
    from deltaprompt.model import Task, adapt
    from deltaprompt.verbalizers.label_descriptions import LabelDescriptions

    begun = time.perf_counter()
    model = adapt(backbone, Task("{text}", DESCRIPTIONS, LabelDescriptions(DESCRIPTIONS)))
    found = model.evaluate(test)
    model.adapted.remove()
    spent = time.perf_counter() - begun
    return ["zero-shot, descriptions", f"{found['accuracy']:.3f}", f"{found['macro_f1']:.3f}", "0", "–", f"{spent:.1f}"]


def _probe(backbone: Backbone, supports: Supports, test: Sequence[Example]) -> list[str]:
    """A logistic regression on frozen embeddings of the same examples."""
    from sklearn.metrics import accuracy_score, f1_score

    from deltaprompt.study.probe import embedded, regression
    from deltaprompt.trainer.seeds import told

    begun = time.perf_counter()
    gold, each = [e.label for e in test], list[tuple[float, float]]()
    tested = embedded(backbone, test)
    for train, _ in supports.values():
        fitted = regression(embedded(backbone, train), [e.label for e in train])
        found = fitted.predict(tested)
        each.append((accuracy_score(gold, found), f1_score(gold, found, average="macro")))
    spent, width = time.perf_counter() - begun, tested.shape[1]
    scores = {
        name: told(values) for name, values in zip(("accuracy", "macro_f1"), zip(*each, strict=True), strict=True)
    }
    return ["frozen logistic probe", *_cells(scores), f"{len(DESCRIPTIONS) * (width + 1):,}", "–", f"{spent:.1f}"]


def _prompt_and_delta(backbone: Backbone, supports: Supports, test: Sequence[Example], out: Path) -> list[str]:
    """A prompt, LoRA on every linear map, and prototypes that start from the descriptions and the examples."""
    from deltaprompt.defaults import deltas_for
    from deltaprompt.model import Model, Task
    from deltaprompt.trainer import fit_seeds

    task, deltas = Task(TEMPLATE, DESCRIPTIONS), deltas_for(backbone)
    result = fit_seeds(
        lambda seeds: Model(backbone, task, deltas, seeds),
        lambda seed: supports[seed],
        test,
        seeds=tuple(supports),
        out=out,
    )
    size = console.size(result.best.bytes)
    return ["prompt + delta", *_cells(result.test), f"{result.best.trainable:,}", size, f"{result.seconds:.1f}"]


def _cells(scores: Scores) -> list[str]:
    return [console.plus_minus(scores[metric], len(scores[metric]["each"])) for metric in ("accuracy", "macro_f1")]


def _predict_new(out: Path) -> None:
    """Opens what was saved, and labels messages that nobody has labelled."""
    from deltaprompt.cli.predict import opened

    model, screen = opened(out, None, "cpu"), console.output()
    screen.print(f"three new messages, with the file in {out}:", markup=False)
    for text, found in zip(NEW, model.predict(NEW), strict=True):
        screen.print(f"  {found['label']:10} {found['score']:.2f}  {text}", markup=False, soft_wrap=True)
    screen.print(f'your own: echo "Where is my parcel?" | deltaprompt predict {out} -', markup=False, soft_wrap=True)
