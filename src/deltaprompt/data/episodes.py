"""Few-shot episodes: a support set to learn from, and a query set of the same labels to be told.

- `class_episodes`: N ways, K shots, rows with one label each: exactly K of each to learn from, and Q others.
- `sentence_episodes`: N ways, K~2K shots, sentences with spans, taken greedily (Few-NERD: Ding et al. 2021).
- `read_episodes`: those of a file, as Few-NERD publishes them.

Samplers deal for ever, from their own generator: the same seed, the same episodes. Of it only `random()` is drawn,
whose sequence Python keeps across versions. No row is in the support and the query of one episode; rows of one source
with the same fields are different ones.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from random import Random
from typing import Final

from deltaprompt.data.formats import Row, rows_of
from deltaprompt.data.pairs import given_of, hold_out, said_in
from deltaprompt.data.readers import listing, texts_in
from deltaprompt.data.samplers import by_class
from deltaprompt.data.tagged import joiner_of, of_words, span_labels
from deltaprompt.data.tags import check_scheme, nth, spans_of
from deltaprompt.errors import ConfigError, DataError, nearest
from deltaprompt.types import Example

TRIES: Final = 1000  # draws of labels and sentences for one episode
FORM: Final = 'an episode is {"support": {"word": [[…]], "label": [[…]]}, "query": {…}, "types": […]}'


@dataclass(frozen=True, slots=True)
class Episode:
    """Rows to learn from, rows to be told, and the labels that both are of."""

    support: tuple[Example, ...]
    query: tuple[Example, ...]
    labels: tuple[str, ...]


def class_episodes(
    examples: Sequence[Example],
    ways: int | None = None,
    shots: int = 1,
    queries: int = 1,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    query_from: Sequence[Example] | None = None,
) -> Iterator[Episode]:
    """Episodes of `ways` labels, each with `shots` rows in the support and `queries` in the query, label by label.

    Args:
        examples: rows with one label each.
        ways: labels an episode; all where not given.
        shots: rows of each label to learn from.
        queries: rows of each label to be told.
        seed: of the draws.
        labels: to draw from; all where not given.
        query_from: rows of another source for the query (a shift of domain); the labels are then those of both. What
            is among the examples too is left out of it.

    Raises:
        DataError: there are fewer labels than ways, or a label has too few rows.
    """
    _check_numbers(ways, shots, queries, 1)
    sources = _sources(examples, query_from)
    pools = [_by_label(rows) for rows in sources]
    names = _names(ways, labels, pools)
    for pool, least in zip(pools, _needed(shots, queries, len(pools)), strict=True):
        _check_counts({name: len(pool[name]) for name in names}, "rows", shots, queries, least)
    return _classes(sources, pools, names, (ways or len(names), shots, queries), Random(seed))


def sentence_episodes(
    examples: Sequence[Example],
    ways: int | None = None,
    shots: int = 1,
    queries: int = 1,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    query_from: Sequence[Example] | None = None,
    tries: int = TRIES,
) -> Iterator[Episode]:
    """Episodes of `ways` labels, of each K to 2K spans in the support (K = `shots`) and in the query (K = `queries`).

    Sentences with spans of these labels and no others are drawn one after another, none twice. One is taken where no
    label gets more than 2K spans by it, and one of its labels has fewer than K. Where all are drawn and a label still
    lacks spans, labels are drawn anew.

    Args:
        examples: texts with spans.
        ways: labels an episode; all where not given.
        shots: spans of each label to learn from, at least.
        queries: spans of each label to be told, at least; with 0 there is no query.
        seed: of the draws.
        labels: to draw from; all where not given.
        query_from: texts of another source for the query (a shift of domain); the labels are then those of both. What
            is among the examples too is left out of it.
        tries: draws of labels for one episode.

    Raises:
        DataError: there are fewer labels than ways, or a label has too few spans; when an episode is asked for: none
            came together in all tries.
    """
    _check_numbers(ways, shots, queries, 0)
    if tries < 1:
        raise ConfigError(f"tries={tries}: an episode takes 1 try or more")
    pools = [_Sentences.of(rows) for rows in _sources(examples, query_from)]
    names = _names(ways, labels, [pool.totals for pool in pools])
    for pool, least in zip(pools, _needed(shots, queries, len(pools)), strict=True):
        _check_counts({name: pool.totals[name] for name in names}, "spans", shots, queries, least)
    return _sentences(pools, names, (ways or len(names), shots, queries), tries, Random(seed))


def read_episodes(
    path_or_name: str | os.PathLike[str], split: str | None = None, limit: int | None = None, scheme: str = "io"
) -> Iterator[Episode]:
    """The episodes of a file, one at a time, as Few-NERD publishes them.

    A row is `{"support": {"word": [[…], …], "label": [[…], …]}, "query": …, "types": […]}`.

    Args:
        path_or_name: a file in any format that `read` knows, or `hf:name`.
        split: of a dataset on the Hub.
        limit: keeps the first episodes.
        scheme: of the tags; see `read_tagged`.

    Raises:
        DataError: a row is not of that form, or a tag is of none of its types.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: a limit is 1 episode or more; leave it out to read all")
    check_scheme(scheme)
    rows = rows_of(path_or_name, split)
    first = list(islice(rows, 1))
    if not first:
        raise DataError(f"{path_or_name}: there are no episodes; at least one is needed")
    return (_episode(row, scheme) for row in islice(chain(first, rows), limit))


def limited_to(examples: Sequence[Example], labels: Sequence[str]) -> list[Example]:
    """The same texts with the spans of these labels alone: others are outside, as in Few-NERD's splits by type.

    Raises:
        DataError: no span has one of the labels.
    """
    known = span_labels(examples)
    if missing := [label for label in labels if label not in known]:
        raise DataError(f"no span has the label {missing[0]!r}{nearest(missing[0], known, limit=30)}")
    return [replace(example, spans=tuple(s for s in example.spans if s.label in labels)) for example in examples]


def split_by_label(examples: Sequence[Example], seed: int, share: float = 0.5) -> tuple[list[Example], list[Example]]:
    """(first, second): the rows of about `share` of the labels, drawn by seed, and those of all other labels."""
    if not 0 < share < 1:
        raise ConfigError(f"share={share}: the first part's share of the labels lies between 0 and 1, for example 0.5")
    names = [*_by_label(examples)]
    if len(names) < 2:
        raise DataError(f"all rows have the label {names[0]!r}; a split by labels needs two labels or more")
    count = min(max(int(share * len(names) + 0.5), 1), len(names) - 1)
    chosen = {names[i] for i in _drawn(count, len(names), Random(seed))}
    first, second = ([e for e in examples if (e.label in chosen) == side] for side in (True, False))
    return first, second


def split_by_span_label(examples: Sequence[Example], share: float = 0.5) -> tuple[list[Example], list[Example]]:
    """(first, second): texts with spans of the first labels, about `share` of them, and other texts with the others.

    No text is in both: of those with spans of both sorts the first part has about `share`, and each has the spans of
    its own labels alone.
    """
    names = span_labels(examples)
    if len(names) < 2:
        raise DataError("all spans have one label; a division by labels needs two labels or more")
    count = min(max(int(share * len(names) + 0.5), 1), len(names) - 1)
    own = frozenset(names[:count])
    sorts = [{span.label in own for span in example.spans} for example in examples]
    both = [example for example, sort in zip(examples, sorts, strict=True) if len(sort) == 2]
    shared = hold_out(both, 1 - share, 0) if len(set(map(given_of, both))) > 1 else (both, [])
    parts = []
    for side, (more, some) in zip((True, False), zip(shared, (names[:count], names[count:]), strict=True), strict=True):
        pure = [example for example, sort in zip(examples, sorts, strict=True) if sort == {side}]
        found = [*pure, *more]
        if not found:
            raise DataError(f"every text with spans of {', '.join(some)} has others too, and is in the other part")
        parts.append([replace(e, spans=tuple(s for s in e.spans if s.label in some)) for e in found])
    return parts[0], parts[1]


@dataclass(frozen=True, slots=True)
class _Sentences:
    """Texts with spans, by the labels of these."""

    rows: Sequence[Example]
    counts: Sequence[Mapping[str, int]]  # of each text: its labels and how many spans have them
    groups: Mapping[frozenset[str], Sequence[int]]  # of each set of labels: the texts that have these and no others
    totals: Mapping[str, int]  # spans of each label

    @classmethod
    def of(cls, rows: Sequence[Example]) -> _Sentences:
        counts = [Counter(span.label for span in row.spans) for row in rows]
        groups: dict[frozenset[str], list[int]] = {}
        for number, own in enumerate(counts):
            if own:
                groups.setdefault(frozenset(own), []).append(number)
        if not groups:
            raise DataError("no text has a span to sample by; read them with their tags first (read_tagged)")
        return cls(rows, counts, groups, {name: sum(own[name] for own in counts) for name in span_labels(rows)})

    def gathered(
        self, labels: Sequence[str], least: int, used: Sequence[int], chance: Random
    ) -> tuple[list[int], list[str]]:
        """Texts with `least` to 2 · `least` spans of each label, none of them used; and the labels that lack some."""
        known, gone = frozenset(labels), {*used}
        left = sorted(i for own, rows in self.groups.items() if own <= known for i in rows if i not in gone)
        have, taken = dict.fromkeys(labels, 0), list[int]()
        while left and min(have.values()) < least:
            number = left.pop(int(chance.random() * len(left)))
            own = self.counts[number].items()
            if all(have[name] + n <= 2 * least for name, n in own) and any(have[name] < least for name, _ in own):
                taken.append(number)
                have |= {name: have[name] + n for name, n in own}
        return taken, [name for name, n in have.items() if n < least]


def _sentences(
    pools: Sequence[_Sentences], names: Sequence[str], asked: tuple[int, int, int], tries: int, chance: Random
) -> Iterator[Episode]:
    ways, shots, queries = asked
    first, second = pools[0], pools[-1]
    while True:
        lacking = Counter[str]()
        for _ in range(tries):
            labels = [names[i] for i in _drawn(ways, len(names), chance)]
            support, short = first.gathered(labels, shots, (), chance)
            query, still = (
                ([], short) if short else second.gathered(labels, queries, support if first is second else (), chance)
            )
            if not still:
                rows = [tuple(pool.rows[i] for i in own) for pool, own in ((first, support), (second, query))]
                yield Episode(rows[0], rows[1], tuple(labels))
                break
            lacking.update(still)
        else:
            raise _none_came(asked, tries, lacking)


def _none_came(asked: tuple[int, int, int], tries: int, lacking: Counter[str]) -> DataError:
    (label, times), (ways, shots, queries) = lacking.most_common(1)[0], asked
    return DataError(
        f"no episode of {ways} labels with {shots} spans of each to learn from and {queries} to be told came together "
        f"in {tries} tries; most often, in {times}, {label!r} lacked some. A sentence counts only where all labels of "
        "its spans are drawn and none has more than twice as many spans; possible: fewer shots or queries, more "
        "sentences, other labels=…, or limited_to(examples, labels)"
    )


def _classes(
    sources: Sequence[Sequence[Example]],
    pools: Sequence[Mapping[str, Sequence[int]]],
    names: Sequence[str],
    asked: tuple[int, int, int],
    chance: Random,
) -> Iterator[Episode]:
    ways, shots, queries = asked
    while True:
        labels = [names[i] for i in _drawn(ways, len(names), chance)]
        drawn: tuple[list[Example], list[Example]] = ([], [])
        for name in labels:
            counts = (shots + queries,) if len(pools) == 1 else (shots, queries)
            own = [
                rows[pool[name][i]]
                for rows, pool, count in zip(sources, pools, counts, strict=True)
                for i in _drawn(count, len(pool[name]), chance)
            ]
            drawn[0].extend(own[:shots])
            drawn[1].extend(own[shots:])
        yield Episode(tuple(drawn[0]), tuple(drawn[1]), tuple(labels))


def _drawn(count: int, of: int, chance: Random) -> list[int]:
    """`count` different numbers below `of`, in the order drawn: the first swaps of a shuffle (Fisher & Yates 1938)."""
    moved, found = dict[int, int](), list[int]()
    for i in range(count):
        j = i + int(chance.random() * (of - i))
        found.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return found


def _sources(examples: Sequence[Example], query_from: Sequence[Example] | None) -> list[Sequence[Example]]:
    """The rows of the support and, where they are of another source, those of the query that are not among them."""
    if query_from is None:
        return [examples]
    known = set(map(said_in, examples))
    others = [example for example in query_from if said_in(example) not in known]
    if query_from and not others:
        raise DataError(
            f"all {len(query_from)} rows of query_from are among the examples too; give rows of another source, or "
            "leave query_from out"
        )
    return [examples, others]


def _by_label(examples: Sequence[Example]) -> Mapping[str, Sequence[int]]:
    """The numbers of the rows of each label."""
    if several := next((n for n, example in enumerate(examples, 1) if example.labels), 0):
        raise DataError(f"example {several} has several labels; rows with one label each are possible here")
    return by_class(examples)


def _names(ways: int | None, labels: Sequence[str] | None, pools: Sequence[Mapping[str, object]]) -> list[str]:
    """The labels to draw from."""
    common = [name for name in pools[0] if all(name in pool for pool in pools)]
    names = common if labels is None else [*dict.fromkeys(labels)]
    both = " of both sources" if len(pools) > 1 else ""
    if missing := [name for name in names if name not in common]:
        raise DataError(f"{missing[0]!r} is no label{both}{nearest(missing[0], common, limit=30)}")
    if len(names) < (ways or 1):
        raise DataError(
            f"{ways or 1} ways are asked for, and the labels{both} are {len(names)}: {', '.join(names):.80}"
        )
    return names


def _needed(shots: int, queries: int, pools: int) -> tuple[int, ...]:
    """Of what a label must have in each pool."""
    return (shots + queries,) if pools == 1 else (shots, queries)


def _check_counts(counts: Mapping[str, int], what: str, shots: int, queries: int, least: int) -> None:
    short = sorted((name for name in counts if counts[name] < least), key=counts.__getitem__)
    if short:
        enough = [name for name in counts if counts[name] >= least]
        others = len(short) - 1
        more = f" (and {others} more {'label has' if others == 1 else 'labels have'} too few)" if others else ""
        listed = f", or labels={enough!r:.200}" if enough else ""
        raise DataError(
            f"label {short[0]!r} has {counts[short[0]]} {what}{more}; {shots} shots and {queries} queries take "
            f"{least}; possible: fewer of them, more rows of that label{listed}"
        )


def _check_numbers(ways: int | None, shots: int, queries: int, least: int) -> None:
    if (ways is not None and ways < 1) or shots < 1 or queries < least:
        raise ConfigError(
            f"got ways={ways}, shots={shots}, queries={queries}; possible: ways >= 1, shots >= 1, queries >= {least}"
        )


def _episode(row: Row, scheme: str) -> Episode:
    if not isinstance(row.values.get("types"), list):
        raise DataError(f"{row.at}: no list of types{listing('types', row.values)}; {FORM}")
    types = texts_in(row, "types")
    support, query = (_texts(row, side, types, scheme) for side in ("support", "query"))
    return Episode(support, query, tuple(types))


def _texts(row: Row, side: str, types: Sequence[str], scheme: str) -> tuple[Example, ...]:
    """The sentences of one side of an episode."""
    words, tags = (_lists(row, f"{side}.{name}") for name in ("word", "label"))
    if len(words) != len(tags):
        raise DataError(f"{row.at}: {side} has {len(words)} lists of words and {len(tags)} of labels; {FORM}")
    joiner, found = joiner_of(words), list[Example]()
    for number, (own, named) in enumerate(zip(words, tags, strict=True), 1):
        at = f"{row.at}: {side}, sentence {number}"
        if len(own) != len(named) or not all(own):
            raise DataError(f"{at}: {len(own)} words and {len(named)} labels; each word has one, and none is empty")
        spans = spans_of(named, scheme, partial(_tag, at))
        if other := next((s.label for s in spans if s.label not in types), None):
            raise DataError(f"{at}: the label {other!r} is none of the types {', '.join(types):.80}; add it to them")
        found.append(of_words(own, spans, joiner))
    return tuple(found)


def _tag(at: str, number: int) -> str:
    return f"{at}, {nth(number)}"


def _lists(row: Row, column: str) -> list[list[str]]:
    given = row.values.get(column)
    if not isinstance(given, list):
        raise DataError(f"{row.at}: no lists in {column!r}{listing(column, row.values)}; {FORM}")
    return [texts_in(Row(f"{row.at}: {column}, list {n}", {column: one}), column) for n, one in enumerate(given, 1)]
