"""Templates written by an encoder-decoder (LM-BFF: Gao, Fisch & Chen 2021, arXiv 2012.15723, section 5.2).

Each training row stands with its label's word between two gaps, `{text} <X> word <Y>`; one beam over all rows finds the
fills of the gaps with the largest Σ over rows of log p. They become templates for another model: the best on the
training rows are the shortlist, unless these are tuned first, and dev chooses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from deltaprompt.backbone import Backbone
from deltaprompt.errors import ConfigError, DeltaPromptError
from deltaprompt.model import Task
from deltaprompt.model.reader import Reading
from deltaprompt.model.trainable import evaluating
from deltaprompt.search._beam import Rows, Vocabulary, set_beam
from deltaprompt.search._result import SearchResult, Table, Test, code, ranked_controls, settled
from deltaprompt.search._session import Session, Tuning, begin, check_counts, told_of
from deltaprompt.search._shape import Shape, usual_shapes
from deltaprompt.templates import parse
from deltaprompt.types import Example

LOST = "\ufffd"  # what a tokenizer writes for half a character


@dataclass(frozen=True)
class TemplateSearch:
    """Fills of two gaps around the label's word.

    Args:
        shapes: such as "{text} <X> <word> <Y>": where the gaps and the word stand; usual ones for the task's fields
            where none are given.
        beam: fills of each shape at most, and beginnings of fills that are kept at each step.
        longest: tokens in a gap at most.
        max_length: tokens of a text with its gaps at most, for the model that writes.
        shortlist: the best templates on the training rows, among which dev rows choose.
        ensemble: the best of these, whose probabilities are averaged.
        permutations: new orders of the labels that all is compared with.
        together: templates that are scored in common passes.
        batch_size: rows in one pass.
    """

    shapes: tuple[str, ...] = ()
    beam: int = 30
    longest: int = 5
    max_length: int = 128
    shortlist: int = 20
    ensemble: int = 1
    permutations: int = 100
    together: int = 16
    batch_size: int = 64

    def __post_init__(self) -> None:
        least = dict.fromkeys(("beam", "longest", "shortlist", "ensemble", "permutations", "together", "batch_size"), 1)
        check_counts(self, **least, max_length=8)


@dataclass(frozen=True)
class _Written:
    """A template, the shape that it comes from, and Σ over the training rows of log p of its words."""

    template: str
    shape: str
    score: float


def templates(
    backbone: Backbone,
    generator: Backbone,
    task: Task,
    train: Sequence[Example],
    dev: Sequence[Example],
    test: Test | None = None,
    *,
    options: TemplateSearch = TemplateSearch(),
    seed: int = 0,
    tuning: Tuning | None = None,
    out: str | Path | None = None,
    resume: bool = False,
) -> SearchResult:
    """Has an encoder-decoder write templates, and chooses the one that suits a model best.

    Args:
        backbone: the language model that the templates are for, to which nothing is attached.
        generator: an encoder-decoder with sentinels, such as T5, that writes them.
        task: whose label words stand between the gaps, and whose own template is the baseline.
        train: labelled rows, which all stand in the beam and rank the templates.
        dev: other labelled rows, which choose among the best of them.
        test: rows, or what reads them when everything is chosen; `result.measured(test)` does it later.
        options: how many, and of what shapes.
        seed: of the permutations.
        tuning: trains with each of the shortlist before dev rows choose.
        out: a folder for the journal, from which a search that was killed goes on.
        resume: goes on with the search that was broken off in `out`, to the result that it would have had.

    Raises:
        BackboneError: the generator has no sentinels.
        ConfigError: no label words, impossible shapes or options, no template that the backbone can answer, or another
            search in `out`.
        DataError: no rows, or labels that the task does not have.
    """
    began = monotonic()
    vocabulary = Vocabulary.of(generator)
    shapes = [Shape.of(source) for source in options.shapes or usual_shapes(parse(task.template), backbone.kind)]
    others = {"generator": told_of(generator, task)}
    s = begin("templates", backbone, task, train, dev, options, seed, out, resume, tuning, others)
    words = {label: own[0] for label, own in s.words().items()}
    written: list[_Written] = []
    for shape in shapes:
        make = _maker(generator, vocabulary, shape, s.train, words, options)
        written += [_Written(*one) for one in s.journal.once(f"beam {shape.source}", make)]
    fitting, left_out = _fitting(s, written)
    tasks = [dataclasses.replace(task, template=one.template) for one in fitting]
    predicted, scores = s.ranked(tasks)
    tables = [_beams(shapes, written, fitting, len(s.train)), *_left_out(left_out)]
    result = settled(s, tasks, scores, ranked_controls(s, predicted), tables, began)
    return result if test is None else result.measured(test)


def _maker(
    generator: Backbone,
    vocabulary: Vocabulary,
    shape: Shape,
    rows: Sequence[Example],
    words: dict[str, str],
    options: TemplateSearch,
) -> Any:
    """What writes the templates of one shape: (template, shape, score), the likeliest first."""

    def make() -> list[tuple[str, str, float]]:
        with evaluating(generator.model):
            read = Rows.of(generator, shape.token_ids(generator, rows, words, options.max_length))
            fills = set_beam(read.step, vocabulary, options.beam, options.longest)
        return [(shape.template(generator, fill.gaps), shape.source, fill.score) for fill in fills]

    return make


def _fitting(s: Session, written: Sequence[_Written]) -> tuple[list[_Written], list[tuple[str, str]]]:
    """Those that the backbone can answer, each once and the likeliest first; the others with the reason."""
    known: dict[str, _Written] = {}
    left_out: list[tuple[str, str]] = []
    for one in sorted(written, key=lambda one: -one.score):
        if one.template in known:
            continue
        if reason := _reason(s, one.template):
            left_out.append((one.template, reason))
        else:
            known[one.template] = one
    if not known:
        why = left_out[0][1] if left_out else "the beam came to no end"
        raise ConfigError(
            f"no template that was written suits this backbone: {why}. Try other shapes, or a longer beam"
        )
    return list(known.values()), left_out


def _reason(s: Session, template: str) -> str:
    """Why a backbone cannot answer a template; empty where it can."""
    if LOST in template:
        return "it has half a character"
    try:
        Reading.of(s.backbone, dataclasses.replace(s.task, template=template), ())
    except DeltaPromptError as error:
        return str(error).splitlines()[0]
    return ""


def _beams(shapes: Sequence[Shape], written: Sequence[_Written], fitting: Sequence[_Written], rows: int) -> Table:
    lines = []
    for shape in shapes:
        own = [one for one in written if one.shape == shape.source]
        kept = [one for one in fitting if one.shape == shape.source]
        best = max((one.score for one in own), default=0.0)
        lines.append((code(shape.source), len(own), len(kept), best / rows, code(kept[0].template) if kept else "–"))
    columns = ("shape", "written", "kept", "best log p a row", "likeliest")
    return Table("What was written", columns, tuple(lines))


def _left_out(left_out: Sequence[tuple[str, str]]) -> list[Table]:
    if not left_out:
        return []
    rows = tuple((code(template), reason) for template, reason in left_out[:5])
    return [Table(f"Left out, {len(left_out)} in all", ("template", "why"), rows)]
