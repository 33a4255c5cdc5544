"""`check(architecture, deltas)`: every law of every delta on one architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deltaprompt import registry
from deltaprompt.conformance.laws import LAWS
from deltaprompt.conformance.shrink import Architecture, tiny
from deltaprompt.conformance.subject import Subject
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import DeltaPromptError

State = Literal["passed", "refused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of one delta on one architecture."""

    model: str
    delta: str
    state: State
    reason: str = ""
    limits: tuple[str, ...] = ()  # what no delta could do on this architecture


@dataclass(frozen=True)
class Checked:
    """What became of one architecture: why it cannot be built, or its deltas' outcomes."""

    model: str
    problem: str = ""
    outcomes: tuple[Outcome, ...] = ()
    dtype: str = ""


def check(architecture: Architecture, deltas: Sequence[str]) -> Checked:
    """Builds a tiny model and checks every law of these deltas, with their default options, on it."""
    name = str(architecture)
    try:
        tiny(architecture)
    except DeltaPromptError as error:
        return Checked(name, str(error))
    outcomes: list[Outcome] = []
    subject: Subject | None = None
    dtype = ""
    for delta in deltas:
        try:
            subject = subject or Subject.of(architecture)
        except Exception as error:  # whatever a model's code raises is what became of it
            outcomes.append(Outcome(name, delta, "failed", f"sites: {_told(error)}"))
            continue
        dtype = str(subject.dtype).removeprefix("torch.")
        outcomes.append(_outcome(name, delta, subject))
        if outcomes[-1].state == "failed":
            subject = None  # it may have been left in any state
    return Checked(name, "", tuple(outcomes), dtype)


def _outcome(model: str, name: str, subject: Subject) -> Outcome:
    delta: Delta = registry.variant("deltas", name)()
    try:
        with subject.attached(delta):
            pass
    except DeltaPromptError as refusal:
        return Outcome(model, name, "refused", str(refusal))
    except Exception as error:
        return Outcome(model, name, "failed", f"attaching: {_told(error)}")
    limits: list[str] = []
    for title, law in LAWS.items():
        try:
            notes = list(law(subject, delta))
        except Exception as error:
            return Outcome(model, name, "failed", f"{title}: {_told(error)}")
        if broken := [note.text for note in notes if note.fails]:
            return Outcome(model, name, "failed", f"{title}: {broken[0]}")
        limits += [note.text for note in notes]
    return Outcome(model, name, "passed", limits=tuple(limits))


def _told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
