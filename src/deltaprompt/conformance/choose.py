"""Which architectures and which deltas a run of the conformance proof is about."""

from __future__ import annotations

from fnmatch import fnmatchcase

from deltaprompt import registry
from deltaprompt.conformance.shrink import MAPPINGS, Architecture, known
from deltaprompt.errors import ConfigError, nearest

SPREAD: tuple[str, ...] = (
    "masked:bert",
    "causal:llama",
    "seq2seq:t5",
)


def chosen_models(text: str) -> list[Architecture]:
    """Architectures by `all`, `spread`, kinds, types, `kind:type` and patterns with `*`, joined by commas.

    Raises:
        ConfigError: a name is none of these.
    """
    every = known()
    wanted: set[str] = set()
    for name in (piece.strip() for piece in text.split(",")):
        found = {str(a) for a in every if _is_meant(name, a)}
        if not found:
            possible = [*map(str, every), *(a.model_type for a in every)]
            raise ConfigError(
                f"--models {name!r} is no text architecture of the installed transformers{nearest(name, possible)}"
            )
        wanted |= found
    return [a for a in every if str(a) in wanted]


def _is_meant(name: str, architecture: Architecture) -> bool:
    if name in ("all", "spread"):
        return name == "all" or str(architecture) in SPREAD
    if name in MAPPINGS:
        return architecture.kind == name
    return fnmatchcase(str(architecture) if ":" in name else architecture.model_type, name)


def chosen_deltas(text: str) -> list[str]:
    """Names of deltas by `all` or names joined by commas.

    Raises:
        ConfigError: there is no delta of that name.
    """
    possible = sorted(registry.variants("deltas"))
    if text == "all":
        return possible
    names = list(dict.fromkeys(piece.strip() for piece in text.split(",")))
    for name in names:
        if name not in possible:
            raise ConfigError(f"--deltas {name!r} is no delta{nearest(name, possible)}")
    return names
