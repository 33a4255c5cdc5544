"""`Summary`: what a run of the conformance proof found, as totals, as JSON and as a page."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from deltaprompt.conformance.check import Checked, Outcome, State
from deltaprompt.conformance.shrink import MAPPINGS

PACKAGES = ("deltaprompt", "torch", "transformers")
SIGN = {"passed": "passed", "refused": "refused", "failed": "failed"}


@dataclass(frozen=True)
class Summary:
    """All that was found, in the order of the architectures."""

    deltas: tuple[str, ...]
    checked: tuple[Checked, ...]

    @property
    def built(self) -> int:
        """Architectures of which a tiny model was built and run."""
        return sum(not c.problem for c in self.checked)

    def outcomes(self, state: State, delta: str | None = None, kind: str = "") -> list[Outcome]:
        """The outcomes of one state, of one delta or all, of one kind of architecture or all."""
        every = (o for c in self.checked for o in c.outcomes)
        return [o for o in every if o.state == state and delta in (None, o.delta) and o.model.startswith(kind)]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        listed = {s: [[o.model, o.delta, o.reason] for o in self.outcomes(s)] for s in ("failed", "refused")}
        return {
            "known": len(self.checked),
            "built": self.built,
            "passed": {delta: len(self.outcomes("passed", delta)) for delta in self.deltas},
            **listed,
            "can_act": {delta: self.built - len(self.outcomes("refused", delta)) for delta in self.deltas},
            "limits": [[o.model, o.delta, limit] for o in self.outcomes("passed") for limit in o.limits],
            "not_built": [[c.model, c.problem] for c in self.checked if c.problem],
            "float32": [c.model for c in self.checked if c.dtype == "float32"],
            "versions": versions(),
        }

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A row a delta: passed, refused and failed in all, then passed of those it can act on by kind."""
        for delta in self.deltas:
            counts = (str(len(self.outcomes(state, delta))) for state in ("passed", "refused", "failed"))
            kinds = (self._share(delta, kind) for kind in MAPPINGS)
            yield delta, *counts, *kinds

    def _share(self, delta: str, kind: str) -> str:
        passed, failed = (len(self.outcomes(s, delta, f"{kind}:")) for s in ("passed", "failed"))
        return f"{passed}/{passed + failed}"


COLUMNS = ("delta", "passed", "refused", "failed", *MAPPINGS)


def versions() -> dict[str, str]:
    """What ran."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def in_order(checked: Sequence[Checked], names: Sequence[str]) -> tuple[Checked, ...]:
    """What was found, in the order of the architectures' names."""
    place = {name: n for n, name in enumerate(names)}
    return tuple(sorted(checked, key=lambda c: place[c.model]))
