"""`Summary`: what a run of the conformance proof found: its totals, its lists, and JSON."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from deltaprompt.conformance.check import Checked, Outcome, State
from deltaprompt.conformance.shrink import MAPPINGS

PACKAGES = ("deltaprompt", "torch", "transformers")
COLUMNS = ("delta", "passed", "refused", "failed", *MAPPINGS)
OWN = (  # what is of one architecture or one delta in a reason, and what it is called where several are listed as one
    (r"\b[A-Z]\w*(ForMaskedLM|ForCausalLM|LMHeadModel|ForConditionalGeneration|ForPreTraining|Model)\b", "the model"),
    (r"\b\d+\.(?=\S*layers\.)", ""),  # the number of the delta
    (r"layers\.\d+", "layers.*"),
    (r"\b[a-z]+_[A-Za-z_.]*?(?=layers\.)", ""),
    (r"(did you mean|possible:).*", ""),
)


@dataclass(frozen=True)
class Group:
    """What several architectures or deltas have in common."""

    reason: str
    models: tuple[str, ...]
    deltas: tuple[str, ...]


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

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A row a delta: passed, refused and failed in all; then by kind, passed of those where it can act."""
        for delta in self.deltas:
            counts = (str(len(self.outcomes(state, delta))) for state in ("passed", "refused", "failed"))
            yield delta, *counts, *(self._share(delta, kind) for kind in MAPPINGS)

    def _share(self, delta: str, kind: str) -> str:
        passed, failed = (len(self.outcomes(state, delta, f"{kind}:")) for state in ("passed", "failed"))
        return f"{passed}/{passed + failed}"

    def refusals(self) -> list[Group]:
        """Why deltas are refused, what is alike together."""
        return grouped((o.model, o.delta, o.reason) for o in self.outcomes("refused"))

    def limits(self) -> list[Group]:
        """What no delta could do on an architecture, what is alike together."""
        return grouped((o.model, o.delta, limit) for o in self.outcomes("passed") for limit in o.limits)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        failed, refused = (
            [[o.model, o.delta, o.reason] for o in self.outcomes(state)] for state in ("failed", "refused")
        )
        return {
            "known": len(self.checked),
            "built": self.built,
            "passed": {delta: len(self.outcomes("passed", delta)) for delta in self.deltas},
            "failed": failed,
            "refused": refused,
            "can_act": {delta: self.built - len(self.outcomes("refused", delta)) for delta in self.deltas},
            "limits": [[o.model, o.delta, limit] for o in self.outcomes("passed") for limit in o.limits],
            "not_built": [[c.model, c.problem] for c in self.checked if c.problem],
            "float32": self.float32(),
            "versions": versions(),
        }

    def float32(self) -> list[str]:
        """The architectures that do not run in float64."""
        return [c.model for c in self.checked if c.dtype == "float32"]


def grouped(found: Iterable[tuple[str, str, str]]) -> list[Group]:
    """Groups of (model, delta, reason) whose reasons differ in names only, the largest first."""
    models: dict[str, dict[str, None]] = {}
    deltas: dict[str, dict[str, None]] = {}
    for model, delta, reason in found:
        alike = _alike(reason)
        models.setdefault(alike, {})[model] = None
        deltas.setdefault(alike, {})[delta] = None
    groups = [Group(reason, tuple(models[reason]), tuple(deltas[reason])) for reason in models]
    return sorted(groups, key=lambda group: -len(group.models))


def _alike(reason: str) -> str:
    for pattern, name in OWN:
        reason = re.sub(pattern, name, reason)
    return reason.strip("; `")


def versions() -> Mapping[str, str]:
    """What ran."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def in_order(checked: Sequence[Checked], names: Sequence[str]) -> tuple[Checked, ...]:
    """What was found, in the order of the architectures' names."""
    place = {name: n for n, name in enumerate(names)}
    return tuple(sorted(checked, key=lambda c: place[c.model]))
