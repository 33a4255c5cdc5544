"""`deltaprompt predict` and `deltaprompt evaluate`: a saved adaptation at work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaprompt.cli import console, entities, options, tagging, writing
from deltaprompt.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from deltaprompt.model.generator import Generator
    from deltaprompt.model.learner import Learner
    from deltaprompt.model.model import Model
    from deltaprompt.model.tagger import Tagger
    from deltaprompt.types import Example

STDIN = "-"
BEST: dict[str, tuple[str, Callable[[Any], str]]] = {  # what a folder of several holds, and the name of the best
    "seeds.json": ("several seeds", lambda told: f"seed-{told['best_seed']}"),
    "grid.json": ("a grid", lambda told: f"{told['best']['name']}_seed-{told['best']['seed']}"),
}
BATCHES_AT_ONCE = 8  # sorted by length together; more would make a slow pipe wait longer for its first answer
Source = Annotated[
    str,
    typer.Argument(
        help="Texts to label or prompts, a file in any format that fit reads or .txt; - for standard input.",
        metavar="[FILE|-]",
    ),
]


def predict(
    folder: options.Folder,
    source: Source = STDIN,
    support: options.Support = None,
    text: options.Text = None,
    field: options.Fields = None,
    backbone: options.OtherBackbone = None,
    device: options.Device = None,
    batch_size: options.EachBatch = 32,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Label texts: one line each, the label and its probability. What learned to write or to find spans does that.

    Standard input is one text a line, or JSON lines. With --json each line is an object: label, score, and the scores
    of all labels; or the text.
    """
    from deltaprompt.cli.recipe import pairs
    from deltaprompt.data import read_texts
    from deltaprompt.model.generator import Generator
    from deltaprompt.model.tagger import Tagger

    if source != STDIN and not Path(source).expanduser().exists():
        raise DataError(_no_file(source, folder))
    model = opened(folder, backbone, device, support)
    fields = pairs(field or [], "--field")
    if isinstance(model, Generator):
        examples = writing.inputs(model, source, text, fields)
    elif isinstance(model, Tagger):
        examples = tagging.inputs(source, text, fields)
    elif source != STDIN and entities.asked_for(model.features.template.fields):
        examples = iter(entities.mentions(source, None, False, None, None))
    else:
        examples = read_texts(source, text, fields)
    at_once = 1 if source == STDIN and sys.stdin.isatty() else batch_size * BATCHES_AT_ONCE
    for some in _chunks(examples, at_once):
        for found in model.predict(some, batch_size):
            print(json.dumps(found, ensure_ascii=False) if as_json else _line(found))
        sys.stdout.flush()


def evaluate(
    context: typer.Context,
    folder: options.Folder,
    file: Annotated[str, typer.Argument(help="Labelled rows, as fit reads them.", metavar="FILE")],
    outside: options.Outside = None,
    support: options.Support = None,
    text: options.Text = None,
    label: options.Label = None,
    field: options.Fields = None,
    target: options.Target = None,
    drop_empty: options.DropEmpty = False,
    backbone: options.OtherBackbone = None,
    device: options.Device = None,
    batch_size: options.EachBatch = 32,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure a saved adaptation: accuracy and macro F1 of labels; F1 of spans; BLEU, chrF, ROUGE and loss of texts."""
    from deltaprompt.cli.data import labelled_rows, outside_rows
    from deltaprompt.cli.recipe import pairs
    from deltaprompt.model.generator import Generator
    from deltaprompt.model.tagger import Tagger

    model = opened(folder, backbone, device, support)
    _refuse(context, model, folder)
    if isinstance(model, Generator):
        writing.evaluate(model, folder, file, target, pairs(field or [], "--field"), batch_size, as_json)
        return
    if isinstance(model, Tagger):
        tagging.evaluate(model, folder, file, batch_size, as_json)
        return
    fields = model.features.template.fields
    examples = labelled_rows(file, context.params, fields)
    others = [] if outside is None else outside_rows(outside, context.params, fields)
    told = {**model.evaluate(examples, batch_size, outside=others), "examples": len(examples)}
    told |= {"outside": len(others)} if others else {}
    if as_json:
        console.print_json(told)
        return
    shown = [[called, f"{told[name]:.4f}"] for name, called in entities.shown_of(told).items()]
    shown.append(["examples", f"{len(examples):,}"])
    if others:
        shown += [["AUROC of other texts", f"{told['auroc']:.4f}"], ["other texts", f"{len(others):,}"]]
    console.output().print(console.table(["", str(folder)], shown))


def _refuse(context: typer.Context, model: Generator | Tagger | Model, folder: Path) -> None:
    """Raises where an option of `evaluate` is given that nothing would be done with."""
    from deltaprompt.model.generator import Generator
    from deltaprompt.model.tagger import Tagger

    unused: tuple[str, ...] = ("target",)
    does = "gives a text a label"
    if isinstance(model, Generator):
        does, unused = "writes texts", ("outside", "text", "label", "drop_empty")
    elif isinstance(model, Tagger):
        does, unused = "finds spans", ("outside", "text", "label", "field", "target", "drop_empty")
    for name in unused:
        if context.params[name]:
            raise ConfigError(f"--{name.replace('_', '-')} is not for {folder}, which {does}; leave it out")


def _line(found: Mapping[str, Any]) -> str:
    """An answer on one line."""
    if "entities" in found:
        return tagging.line(found)
    if "text" in found:
        return " ".join(found["text"].splitlines())
    labels = found.get("labels", [found["label"]])
    scores = ",".join(f"{found['scores'][label]:.4f}" for label in labels)
    return f"{','.join(labels)}\t{scores}"


def opened(
    folder: Path, backbone: str | None, device: str | None, support: str | None = None
) -> Model | Generator | Tagger:
    """The adaptation in a folder; of a folder of several seeds, or of a grid, the one that was best on dev.

    What learned from episodes is first told a few examples, the support.
    """
    from deltaprompt.backbone import load
    from deltaprompt.model.learner import Learner
    from deltaprompt.model.saved import describe, open_

    folder = settled(folder)
    if backbone is None:
        model = open_(folder, device=device)
    else:
        stored = describe(folder)["backbone"]
        model = open_(folder, load(backbone, kind=stored["kind"], dtype=stored["dtype"], device=device))
    if isinstance(model, Learner):
        return _told(model, folder, support)
    if support is not None:
        raise ConfigError(f"{folder} knows its labels, and needs no --support")
    return model


def _told(learner: Learner, folder: Path, support: str | None) -> Model | Tagger:
    from deltaprompt.cli.pools import rows

    if support is None:
        raise ConfigError(
            f"{folder} learned from episodes and answers once it has seen a few labelled examples; give --support FILE"
        )
    return learner.learned(rows(support, learner.episodic))


def settled(folder: Path) -> Path:
    """The folder itself, or the best one's within it, where the newest of what is there are seeds or a grid."""
    from deltaprompt.store import JSON, holds_adaptation

    found = [folder / name for name in (JSON, *BEST) if (folder / name).is_file()]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=folder / JSON)
    if newest.name == JSON:
        return folder
    what, best_in = BEST[newest.name]
    try:
        best = folder / best_in(json.loads(newest.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        beside = sorted(path.name for path in folder.iterdir() if holds_adaptation(path))
        raise ConfigError(f"{newest} is damaged; name a folder beside it{nearest('', beside)}") from error
    console.note(f"{folder} holds {what}; this is {best.name}, the best on dev")
    return best


def _no_file(source: str, folder: Path) -> str:
    """What a second argument that is no file might have meant."""
    beside = Path(source).expanduser().parent if len(source) < 256 else Path()
    files = sorted(p.name for p in beside.iterdir() if p.is_file()) if beside.is_dir() else []
    hint = nearest(source, files)
    near = hint if hint.startswith("; did you mean") else ""
    return (
        f"there is no file {source!r:.80}{near}; to label one text, pipe it in: "
        f'echo "A fine thing." | deltaprompt predict {folder} -'
    )


def _chunks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    stream = iter(examples)
    while some := list(islice(stream, size)):
        yield some
