"""A comparison as Markdown for people, as tidy CSV and as JSON for programs."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from deltaprompt.study.bootstrap import DRAWS, Difference
from deltaprompt.study.comparison import Comparison, Figure, Range, Total
from deltaprompt.study.data import called

NEAR, SIGNS, NOTHING = "≈", {1: "▲", -1: "▼", 0: ""}, "–"
CALLED = {"accuracy": "accuracy", "macro_f1": "macro F1"}


# Markdown


def markdown(c: Comparison) -> str:
    """A row a method, a column a data set and number of shots, then what is over all; a legend, and failures.

    Where a data set has texts that belong to none of its labels, a second table has how well these are told apart.
    """
    heads = [CALLED[c.metric], *(f"{data}, {called(k)}" for data, k in c.columns), "mean"]
    heads += [f"mean − {c.baseline} [95 %]"] if c.baseline is not None else []
    heads += ["CPU-seconds", "trained", "bytes"]
    rows = [[total.method, *(_shown(c.at(total.method, *column)) for column in c.columns)] for total in c.totals]
    rows = [row + _over_all(c, total) for row, total in zip(rows, c.totals, strict=True)]
    return "\n".join([*_lines(heads, rows), "", _legend(c), *_outside(c), *_failures(c)])


def _lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, its first column text and the others numbers."""
    return [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)]), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _shown(f: Figure) -> str:
    """Mean ± standard deviation, and what is marked there."""
    if f.mean is None:
        return "failed" if f.failed else NOTHING
    told = f"{f.mean:.3f}" + (f" ± {f.std:.3f}" if len(f.cells) > 1 else "")
    some = f"({len(f.cells)} of {len(f.cells) + len(f.failed)} seeds)" if f.failed else ""
    sign = SIGNS[f.difference.sign] if f.difference is not None else ""
    return _joined(_bold(told, f.best), NEAR if f.near else "", sign, some)


def _over_all(c: Comparison, t: Total) -> list[str]:
    some = "" if t.whole or t.mean is None else f"({t.figures} of {t.asked})"
    mean = NOTHING if t.mean is None else _joined(_bold(f"{t.mean:.3f}", t.best), NEAR if t.near else "", some)
    own = [_difference(t)] if c.baseline is not None else []
    return [mean, *own, _seconds(t.cpu_seconds), _range(t.trainable), _range(t.bytes)]


def _difference(t: Total) -> str:
    if (d := t.difference) is None:
        return NOTHING
    some = f"({t.compared} of {t.asked})" if t.compared < t.asked else ""
    return _joined(f"{_signed(d.mean)} [{_signed(d.low)}, {_signed(d.high)}]", SIGNS[d.sign], some)


def _seconds(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return NOTHING
    return f"{value:,.{2 if value < 1 else 1 if value < 100 else 0}f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _range(values: Range | None) -> str:
    if values is None:
        return NOTHING
    return f"{values[0]:,}" if values[0] == values[1] else f"{values[0]:,} to {values[1]:,}"


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _joined(*parts: str) -> str:
    return " ".join(filter(None, parts))


def _legend(c: Comparison) -> str:
    """What the marks mean, and what was measured on what."""
    rows = ", ".join(f"{name} {count:,}" for name, count in c.test_rows.items())
    several = f"Mean ± sample standard deviation over {len(c.seeds)} seeds. " if len(c.seeds) > 1 else ""
    told = f"{several}Test rows: {rows}. **Bold**: the best; {NEAR}: within one standard error of the best."
    if c.baseline is not None:
        told += (
            f" {SIGNS[1]} {SIGNS[-1]}: better, worse than {c.baseline}: the 95 % interval of the paired bootstrap "
            f"({DRAWS:,} draws of test rows and seeds) is on one side of 0."
        )
    return f"{told} CPU-seconds: of training one adaptation, mean over all cells."


def _outside(c: Comparison) -> list[str]:
    """The second table and what it says; nothing where no data set has texts outside."""
    if not c.outside:
        return []
    columns = [column for column in c.columns if column[0] in c.outside]
    rows = [[total.method] for total in c.totals]
    for column in columns:
        figures = [c.at(total.method, *column) for total in c.totals]
        best = max((statistics.fmean(f.aurocs) for f in figures if _told(f)), default=None)
        for row, f in zip(rows, figures, strict=True):
            row.append(_auroc(f, _told(f) and statistics.fmean(f.aurocs) == best))
    heads = ["AUROC", *(f"{data}, {called(k)}" for data, k in columns)]
    counts = ", ".join(f"{name} {count:,}" for name, count in c.outside.items())
    legend = (
        "AUROC: the share of pairs of a test row and a text that belongs to none of the labels in which the former has "
        f"the higher score, ties counting half; chance is 0.5. Such texts: {counts}."
    )
    return ["", *_lines(heads, rows), "", legend]


def _told(f: Figure) -> bool:
    """Whether every seed says how well texts outside are told apart."""
    return f.whole and len(f.aurocs) == len(f.cells)


def _auroc(f: Figure, best: bool) -> str:
    """Mean ± standard deviation."""
    if not (own := f.aurocs):
        return "failed" if f.failed and not f.cells else NOTHING
    told = f"{statistics.fmean(own):.3f}" + (f" ± {statistics.stdev(own):.3f}" if len(own) > 1 else "")
    asked = len(f.cells) + len(f.failed)
    return _joined(_bold(told, best), f"({len(own)} of {asked} seeds)" if len(own) < asked else "")


def _failures(c: Comparison) -> list[str]:
    """A line for every figure and reason."""
    lines = []
    for f in c.figures:
        for why in dict.fromkeys(f.failed.values()):
            seeds = [str(seed) for seed, own in f.failed.items() if own == why]
            named = f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"
            lines.append(f"Failed: {f.method} on {f.data}, {called(f.shots)}, {named}: {why}")
    return ["", *lines] if lines else []


# For programs


def csv_of(c: Comparison) -> str:
    """A row a method, data set and number of shots, with all figures; what is not known is empty."""
    rows = [row_of(f) for f in c.figures]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _plain(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | Mapping) else value


def row_of(f: Figure) -> dict[str, Any]:
    """A figure by name."""
    first = f.cells[0] if f.cells else None
    return {
        "method": f.method,
        "data": f.data,
        "shots": f.shots,
        "metric": f.metric,
        "mean": f.mean,
        "std": f.std if f.cells else None,
        "error": f.error if f.cells else None,
        "each": f.each,
        "seeds": [cell.key.seed for cell in f.cells],
        **_of(f.difference),
        "best": f.best,
        "near": f.near,
        "accuracy": _mean([cell.accuracy for cell in f.cells]),
        "macro_f1": _mean([cell.macro_f1 for cell in f.cells]),
        "auroc": _mean(f.aurocs),
        "cpu_seconds": _mean([cell.cpu_seconds for cell in f.cells]),
        "trainable": first.trainable if first else None,
        "bytes": first.bytes if first else None,
        "test_rows": first.key.test_rows if first else None,
        "backbone": first.key.backbone if first else None,
        "failed": {str(seed): why for seed, why in f.failed.items()} or None,
    }


def _of(d: Difference | None) -> dict[str, float | None]:
    """A difference by name."""
    if d is None:
        return dict.fromkeys(("difference", "low", "high", "p"))
    return {"difference": d.mean, "low": d.low, "high": d.high, "p": d.p}


def _mean(each: Sequence[float]) -> float | None:
    return sum(each) / len(each) if each else None


def as_json(c: Comparison) -> dict[str, Any]:
    """All of it."""
    return {
        "metric": c.metric,
        "baseline": c.baseline,
        "seeds": list(c.seeds),
        "test_rows": dict(c.test_rows),
        "outside": dict(c.outside),
        "figures": [row_of(f) for f in c.figures],
        "totals": [_total(t) for t in c.totals],
    }


def _total(t: Total) -> dict[str, Any]:
    return {
        "method": t.method,
        "mean": t.mean,
        "error": t.error,
        "figures": t.figures,
        "asked": t.asked,
        **_of(t.difference),
        "compared": t.compared,
        "best": t.best,
        "near": t.near,
        "cpu_seconds": t.cpu_seconds,
        "trainable": t.trainable and list(t.trainable),
        "bytes": t.bytes and list(t.bytes),
    }
