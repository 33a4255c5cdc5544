"""Ten epochs of AG News, 16 examples a class, on the demo backbone: what frozen layers make of a text kept, or not.

The same run is made with and without, in turns: with deltas in the top 2 of 6 layers, with prototypes alone, with a
head alone. All of `fit` is timed. Without the AG News files the texts are made up, of about their lengths.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import deltaprompt as dp
from benchmarks.paired import Pair, pair, turns
from deltaprompt.deltas._base import Delta
from deltaprompt.verbalizers._base import Verbalizer

DATA = Path(__file__).parents[2] / "shared" / "data" / "agnews" / "train.jsonl.gz"
LABELS = ("World", "Sports", "Business", "Sci/Tech")
SHOTS, EPOCHS, WORDS, ROUNDS = 16, 10, 40, 3
TOP: tuple[Delta, ...] = (dp.LoRA(8, 16.0, at=("layers[4:].attn.*", "layers[4:].ffn.*")),)
CASES: dict[str, tuple[Sequence[Delta], Verbalizer]] = {
    "deltas in the top 2 of 6 layers": (TOP, dp.Prototypes()),
    "prototypes alone": ((), dp.Prototypes()),
    "a head alone": ((), dp.SoftVerbalizer()),
}


def rows() -> list[dp.Example]:
    """AG News, or made-up texts."""
    if DATA.exists():
        return dp.read(DATA, label="label_name")
    chance = random.Random(0)
    words = ["market", "team", "court", "software", "the", "of", "said", "on", "Monday", "new"]
    texts = (" ".join(chance.choices(words, k=WORDS)) for _ in range(400))
    return [dp.Example({"text": text}, LABELS[n % 4]) for n, text in enumerate(texts)]


def runs_of(case: str) -> tuple[dict[str, Callable[[], object]], dict[str, dp.Run]]:
    """One call trains a new model, keeping or not; the last runs by the same names."""
    backbone, (train, dev) = dp.load("demo", kind="encoder", device="cpu"), dp.few_shot(rows(), SHOTS, 0)
    deltas, verbalizer = CASES[case]
    task = dp.Task("{text}", dict.fromkeys(LABELS, ()), verbalizer, max_length=128)
    done: dict[str, dp.Run] = {}

    def trained(name: str) -> Callable[[], object]:
        def run() -> object:
            model = dp.adapt(backbone, task, deltas)
            done[name] = dp.fit(model, train, dev, training=dp.Training(epochs=EPOCHS, keep=name == "ours"))
            return model.adapted.remove

        return run

    return {name: trained(name) for name in ("ours", "without")}, done


def apart(a: dp.Run, b: dp.Run) -> float:
    """The largest difference of two runs' losses, in training and on dev."""

    def losses(run: dp.Run) -> Iterator[float]:
        for entry in run.history:
            yield from (entry["loss"], entry["dev"]["loss"])

    return max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True))


def run(rounds: dict[str, int]) -> list[Pair]:
    """All pairs."""
    pairs = []
    for case in CASES:
        runs, done = runs_of(case)
        times = turns(runs, min(rounds["base"], ROUNDS))
        pairs.append(pair(f"{EPOCHS} epochs, {case}: kept against not kept", times["ours"], times["without"]))
        print(f"{case}: losses apart by at most {apart(done['ours'], done['without']):.1e}")
    return pairs


if __name__ == "__main__":
    for each in run({"base": 3}):
        print(
            f"{each.name}: {each.ours:.0f} ms, {each.peer:.0f} ms, {each.ratio:.2f} ({each.low:.2f} to {each.high:.2f})"
        )
