"""What goes wrong on a user's side is a `DeltaPromptError`: what was got, what is possible, how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DeltaPromptError(Exception):
    """Any error that DeltaPrompt raises on purpose. Its message is meant for the user as it is."""


class BackboneError(DeltaPromptError):
    """A backbone cannot be loaded, or is not of a kind that the task needs."""


class SiteError(DeltaPromptError):
    """A selector matches no site, or a delta cannot act at the site it was given."""


class TemplateError(DeltaPromptError):
    """A template string does not parse, or an example lacks a field that it asks for."""


class DataError(DeltaPromptError):
    """A data file cannot be read, or does not hold what was asked of it."""


class ConfigError(DeltaPromptError):
    """An option or a recipe key is unknown or has an impossible value."""


class StoreError(DeltaPromptError):
    """A saved adaptation is damaged, of another backbone, or of a newer schema."""


class TrainingError(DeltaPromptError):
    """Training cannot go on (a non-finite loss, memory used up); the best so far is kept."""


def check_one_of(what: str, given: object, possible: Iterable[object]) -> None:
    """Raises where an option has none of its possible values."""
    if given not in (known := list(possible)):
        raise ConfigError(f"{what} = {given!r} is not possible; possible: {', '.join(map(str, known))}")


def nearest(name: str, possible: Iterable[str], limit: int = 8) -> str:
    """`"; did you mean 'a' or 'b'?"` from the close names, else `"; possible: …"` with the first `limit`."""
    known = [str(p) for p in possible]
    close = get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not known:
        return "; there are none"
    more = f", … ({len(known)} in all)" if len(known) > limit else ""
    return "; possible: " + ", ".join(known[:limit]) + more
