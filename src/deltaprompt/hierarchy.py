"""Labels in a hierarchy: type paths such as `/person/artist/actor`, and Few-NERD's `person-artist/author`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Way = tuple[str, ...]  # from the top of the hierarchy down to a type


def way(label: str) -> Way:
    """The way down to a type: `/a/b/c` is split at every "/"; `a-b/c` is split at its first "-", into coarse and fine.

    A label of neither form is a type by itself.
    """
    if label.startswith("/"):
        return tuple(part for part in label.split("/") if part) or (label,)
    coarse, _, fine = label.partition("-")
    return (coarse, fine) if coarse and fine else (label,)


def are_paths(labels: Iterable[str]) -> bool:
    """Whether labels are type paths: all of them begin with "/", or all are `coarse-fine` and some share the coarse."""
    names = list(labels)
    if names and all(name.startswith("/") for name in names):
        return True
    ways = [way(name) for name in names]
    return all(len(one) == 2 for one in ways) and 0 < len({one[0] for one in ways}) < len(ways)


def ancestors(labels: Iterable[str]) -> Mapping[str, frozenset[Way]]:
    """Of each label the types that it says: those of its path, itself among them; where labels are no paths itself."""
    names = list(labels)
    if not are_paths(names):
        return {name: frozenset({(name,)}) for name in names}
    return {name: frozenset(way(name)[:n] for n in range(1, len(way(name)) + 1)) for name in names}
