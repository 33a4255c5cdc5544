"""What a run of the conformance proof found, as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deltaprompt.conformance.laws import LAWS
from deltaprompt.conformance.summary import COLUMNS, Group, Summary, versions

INTRODUCTION = """\
# Conformance

<!-- Written by a command, see below; not by hand. -->

Of every text architecture that transformers knows (masked, causal and encoder-decoder language models) a tiny random
model is made from nothing but its config, its parts are named, and every delta is attached with its default options and
trained. Then these laws must hold:

{laws}

A delta is refused where it says before any training that it cannot act, and why. Models run in float64 ({float32} of
them, whose own code does not run there, in float32); outputs that should be equal may differ by {tolerances} of the
largest logit, and at the start and after removal they may not differ at all.

```sh
{command}
```

Ran with {versions}: {built} of {known} architectures can be built and run.
"""


def page(summary: Summary, command: str) -> str:
    """The page; `command` is what was run."""
    laws = "\n".join(f"- **{name}**: {(law.__doc__ or '').splitlines()[0]}" for name, law in LAWS.items())
    introduction = INTRODUCTION.format(
        laws=laws,
        float32=len(summary.float32()),
        tolerances="10⁻⁵ (10⁻³)",
        command=command,
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
        built=summary.built,
        known=len(summary.checked),
    )
    return "\n".join([introduction, *_table(COLUMNS, summary.rows()), "", *_lists(summary)])


def _lists(summary: Summary) -> Iterator[str]:
    yield "The last three columns: passed, of those where the delta can act.\n"
    yield "## Failures\n"
    failed = summary.outcomes("failed")
    yield from _table(("architecture", "delta", "law and reason"), ((o.model, o.delta, o.reason) for o in failed))
    yield "\n## Not built\n"
    missing = ((c.model, c.problem) for c in summary.checked if c.problem)
    yield from _table(("architecture", "reason"), missing)
    yield "\n## Refusals\n"
    yield from _groups(summary.refusals())
    yield "\n## What no delta can do there\n"
    yield "Tensors that the text does not reach, or whose effect cancels out (a bias of all keys moves all scores of a"
    yield "softmax alike), as finite differences confirm; and architectures whose rows cannot be told apart.\n"
    yield from _groups(summary.limits())


def _groups(groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        yield f"- {', '.join(group.deltas)}: {group.reason}"
        yield f"  ({len(group.models)}: {', '.join(group.models)})"
    if not groups:
        yield "None."


def _table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    found = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    if not found:
        yield "None."
        return
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    yield from (f"| {' | '.join(row)} |" for row in found)
