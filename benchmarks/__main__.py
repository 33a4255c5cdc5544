"""`make bench`: every benchmark, one table of ratios, `benchmarks/results.json` and a picture, `results.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import delta_steps, kept_layers, many, memory, prompt_classification, shared_prefix, train_many
from benchmarks.paired import Pair
from benchmarks.plot import plot


def table(pairs: list[Pair]) -> Table:
    """Ratios with their range; above 1 we are faster, or smaller."""
    columns = ("benchmark", "ours", "peer", "", "peer / ours", "range")
    made = Table(*columns, title="Side by side, paired in one process")
    for p in pairs:
        sizes = (f"{p.ours:.1f}", f"{p.peer:.1f}", p.unit)
        made.add_row(p.name, *sizes, f"{p.ratio:.2f}×", f"{p.low:.2f} to {p.high:.2f}")
    return made


def show(pairs: list[Pair]) -> None:
    """Prints the table."""
    Console().print(table(pairs))


def main() -> None:
    """Runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds, and no file is written")
    quick = parser.parse_args().quick
    rounds = {"base": 2, "mini": 5} if quick else {"base": 9, "mini": 41}
    pairs = [
        *prompt_classification.run(rounds),
        *delta_steps.run(rounds),
        *memory.run(rounds),
        *kept_layers.run(rounds),
        *train_many.run(rounds),
        *many.run(rounds),
        *shared_prefix.run(rounds),
    ]
    show(pairs)
    if quick:
        return
    out = Path(__file__).parent / "results.json"
    out.write_text(json.dumps({p.name: p.as_json() for p in pairs}, indent=1) + "\n")
    plot(pairs, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
