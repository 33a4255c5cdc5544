"""One search on several draws of rows: means and standard deviations over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from deltaprompt.search._result import Answer, Cell, Metrics, SearchResult, Table, answers_table, by_name, prompts_told


@dataclass(frozen=True)
class Draws:
    """The results of one search, each on rows and with a seed of its own."""

    results: tuple[SearchResult, ...]

    def as_json(self) -> dict[str, Any]:
        """What the answers came to over the seeds, and every result."""
        return {
            "search": self.results[0].search,
            "seeds": [result.session.seed for result in self.results],
            "answers": [{"name": own[0].name, **_over(own)} for own in by_name(self.results)],
            "runs": [result.as_json() for result in self.results],
        }

    def markdown(self) -> str:
        """The result of one, or what several have in common."""
        if len(self.results) == 1:
            return self.results[0].markdown()
        common = [averaged([r.tables[n] for r in self.results]) for n in range(len(self.results[0].tables))]
        tables = [answers_table(self.results), self._chosen(), *(table for table in common if table is not None)]
        return "\n\n".join(table.markdown() for table in tables)

    def _chosen(self) -> Table:
        prompts = prompts_told([result.task for result in self.results])
        rows: list[tuple[Cell, ...]] = []
        for result, prompt in zip(self.results, prompts, strict=True):
            told = [result.controls[name] for name in ("best", "null", "permuted")]
            rows.append((str(result.session.seed), prompt, *told, result.shortlist[0].dev.accuracy))
        columns = ("seed", "chosen", "best on train", "null", "permuted", "dev of the chosen")
        return Table("What each draw chose", columns, tuple(rows))


def averaged(tables: Sequence[Table]) -> Table | None:
    """The mean of tables cell by cell, rows by their first cell; None where they differ in more than numbers."""
    first = tables[0]
    each = [{row[0]: row for row in table.rows} for table in tables]
    if any(rows.keys() != each[0].keys() for rows in each):
        return None
    lines = []
    for key, row in each[0].items():
        columns = [[rows[key][n] for rows in each] for n in range(len(row))]
        if any(isinstance(cells[0], str) and len(set(cells)) > 1 for cells in columns):
            return None
        lines.append(tuple(_mean(cells) for cells in columns))
    return Table(f"{first.title}, mean of {len(tables)} seeds", first.columns, tuple(lines))


def _mean(cells: Sequence[Cell]) -> Cell:
    if len(set(cells)) == 1:
        return cells[0]
    return mean(float(cell) for cell in cells)


def _told(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0, "each": list(values)}


def _over(own: Sequence[Answer]) -> dict[str, Any]:
    """What one answer came to over the draws."""
    each: dict[str, list[Metrics]] = {
        "dev": [{"accuracy": a.dev.accuracy} for a in own],
        "tuned_dev": [{"accuracy": a.tuned.accuracy} for a in own if a.tuned is not None],
        "test": [a.test for a in own if a.test is not None],
        "tuned_test": [a.tuned_test for a in own if a.tuned_test is not None],
    }
    return {
        name: {metric: _told([m[metric] for m in metrics]) for metric in metrics[0]}
        for name, metrics in each.items()
        if metrics
    }
