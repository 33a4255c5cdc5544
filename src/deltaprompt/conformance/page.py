"""What a run of the conformance proof found, as a page of Markdown."""

from __future__ import annotations

from deltaprompt.conformance.summary import COLUMNS, Summary, versions


def page(summary: Summary) -> str:
    """The page."""
    ran = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [
        "# Conformance",
        "",
        f"{summary.built} of {len(summary.checked)} architectures built; with {ran}.",
        "",
        _row(COLUMNS),
        _row(["---"] * len(COLUMNS)),
        *map(_row, summary.rows()),
        "",
    ]
    return "\n".join(lines)


def _row(cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"  # type: ignore[call-overload]
