"""`deltaprompt demo`: from 8 customer messages a class to one small file, against what works without a delta."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaprompt.cli import console, options

if TYPE_CHECKING:
    from deltaprompt.backbone import Backbone
    from deltaprompt.trainer import SeedsResult
    from deltaprompt.types import Example

TEMPLATE = "A customer writes: {text}"
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
Row = Sequence[str]


def demo(
    seeds: Annotated[str, typer.Option("--seeds", help="Such as 0-2.", metavar="SEEDS")] = "0-2",
    shots: Annotated[int, typer.Option("--shots", help="Examples of each class.", min=2, metavar="K")] = 8,
    out: Annotated[Path, typer.Option("--out", help="The folder that keeps what is learned.", metavar="DIR")] = Path("out/demo"),
    debug: options.Debug = False,
) -> None:
    """Adapt the small built-in backbone to sorting customer messages, and compare."""
    from deltaprompt.backbone import load
    from deltaprompt.cli.recipe import seeds_of
    from deltaprompt.data import shipped

    chosen = seeds_of(seeds)
    train, test, backbone = shipped.load("train"), shipped.load("test"), load("demo", device="cpu")
    console.note(f"{len(test)} customer messages to sort into {len(DESCRIPTIONS)} classes, {shots} examples of each to learn from")
    rows = [_zero_shot(backbone, test), _probe(backbone, train, test, shots, chosen)]
    result = _delta(backbone, train, test, shots, chosen, out)
    trained = [_scored(result.test, len(chosen)), f"{result.best.trainable:,}", console.size(result.best.bytes)]
    rows.append(["prompt + delta", *trained[0], *trained[1:], f"{result.seconds:.1f}"])
    columns = ["", "accuracy", "macro F1", "trained parameters", "file", "seconds"]
    seen = f"{shots} examples a class, {len(chosen)} seed{'s' * (len(chosen) > 1)}"
    console.output().print(console.table(columns, rows, f"{len(test)} test messages; {seen}"))
    _use(out)


def _scored(test: object, seeds: int) -> list[str]:
    from collections.abc import Mapping

    assert isinstance(test, Mapping)
    return [console.plus_minus(test[metric], seeds) for metric in ("accuracy", "macro_f1")]
