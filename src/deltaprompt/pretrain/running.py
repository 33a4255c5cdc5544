"""`pretrain`: a language model trained on text, by deltas on a frozen backbone or all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaprompt import registry
from deltaprompt.backbone import Backbone, load
from deltaprompt.backbone.fingerprint import fingerprint
from deltaprompt.backbone.load import wrap
from deltaprompt.backbone.new_head import head_parameters
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Delta
from deltaprompt.errors import ConfigError, DataError
from deltaprompt.pretrain.keep import Pretrained, as_run, as_setting, described, keep, kept, small
from deltaprompt.pretrain.loop import Group, Loop
from deltaprompt.pretrain.objectives import Objective, objective_of, packed
from deltaprompt.pretrain.pretraining import Pretraining
from deltaprompt.pretrain.scoring import Scorer
from deltaprompt.pretrain.text import Stream, Texts, streams
from deltaprompt.trainer import Progress, Training, failures
from deltaprompt.trainer.accelerated import is_main
from deltaprompt.trainer.checkpoint import Checkpoints
from deltaprompt.trainer.order import chance_kept
from deltaprompt.trainer.possible import RATE, rate
from deltaprompt.trainer.progress import usual


@dataclass(frozen=True)
class Tuned:
    """A delta with a learning rate and a weight decay of its own; those of the run where not given."""

    delta: Delta
    learning_rate: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not rate(self.learning_rate):
            raise ConfigError(f"a delta's learning_rate = {self.learning_rate!r} is not possible: it is {RATE}")
        if self.weight_decay is not None and not (self.weight_decay == 0 or rate(self.weight_decay)):
            raise ConfigError(f"a delta's weight_decay = {self.weight_decay!r} is not possible: it is 0 or above")


def pretrain(
    backbone: Backbone,
    train: Sequence[Texts | str],
    dev: Sequence[Texts | str] = (),
    *,
    deltas: Sequence[Delta | Tuned] = (),
    pretraining: Pretraining = Pretraining(),  # noqa: B008  frozen
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    what: str = "pretrain",
) -> Pretrained:
    """Trains a language model on text.

    Args:
        backbone: a masked, causal or encoder-decoder language model. Its weights take up what is learned, and what is
            broken off by an error leaves a frozen one as it was.
        train: files of texts, or texts. Each file is cut into rows by itself; what is left at its end is left out.
        dev: texts to measure by, beside those that files of `train` hold out.
        deltas: what trains on the frozen backbone; with none, all its parameters do.
        pretraining: how.
        out: the folder that keeps the model (`deltaprompt.load` opens it), the record, and with deltas what they
            learned alone; while training goes on, `out/checkpoint`.
        resume: goes on with the run that was broken off in `out`, to the result that it would have had. Begins at the
            beginning where there is none, and returns at once where it is finished.
        progress: a bar on a terminal where not given.
        what: what the bar calls this run.

    Raises:
        ConfigError: what is asked for does not go together, or a run to resume had other settings or texts.
        DataError: a file cannot be read, or has too little text for a step.
        SiteError: a delta has no form in the backbone's weights, or finds no site.
        TrainingError: a non-finite loss, or not enough memory.
    """
    p, folder = pretraining, None if out is None else Path(out)
    objective = objective_of(backbone, p)
    rows, dev_rows, sources = _texts(backbone, objective, train, dev, p)
    tuned = [delta if isinstance(delta, Tuned) else Tuned(delta) for delta in deltas]
    settings = _settings(backbone, objective, p, tuned, rows, dev_rows)
    checkpoints = None if folder is None else Checkpoints(folder, settings)
    if folder is not None and checkpoints is not None and (before := _finished(folder, checkpoints, resume)):
        return as_run(before, load(folder, kind=backbone.kind, device=backbone.model.device))
    with chance_kept(backbone.model.device), _training(backbone, tuned, p) as (adapted, groups):
        with failures.of_memory(Training(batch_size=p.batch_size, accumulate=p.accumulate)):
            scorer = Scorer(backbone, adapted, p.scored_at_once)
            loop = Loop(scorer, objective, (rows, dev_rows), groups, p, checkpoints, progress or usual())
            loop.begin(resume)
            loop.run(what, _mode(backbone, adapted, p))
        learned = _taken_up(adapted, groups)
    run = _result(backbone, folder, loop)
    if folder is not None and checkpoints is not None and loop.main:
        keep(folder, run, learned, [t.delta for t in tuned], settings, sources)
        checkpoints.clear()
    loop.accelerator.wait_for_everyone()
    return run


def _result(backbone: Backbone, folder: Path | None, loop: Loop) -> Pretrained:
    """What a run came to."""
    name = "" if folder is None else str(folder)
    return Pretrained(
        wrap(backbone.model, backbone.tokenizer, kind=backbone.kind, name=name),
        loop.state.step,
        loop.state.step * loop.p.rows * loop.objective.room,
        sum(part.numel() for part in loop.state.parts.values()),
        sum(part.numel() for part in backbone.model.parameters()),
        loop.state.seconds,
        loop.state.history,
    )


# Its texts


def _texts(
    backbone: Backbone, objective: Objective, train: Sequence[Texts | str], dev: Sequence[Texts | str], p: Pretraining
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Any]]]:
    """Training rows [n, room], the rows of each dev text by name, and what the record tells of them all."""
    if not train:
        raise ConfigError("there is no text to train on: give files ([[data]] path = …) or texts")
    if odd := next((t for t in dev if isinstance(t, Texts) and t.hold_out is not None), None):
        raise ConfigError(f"{odd.path} is all to measure by ([[dev]]); leave hold_out out, or train on it ([[data]])")
    learned, held = streams(train, backbone.tokenizer, objective.end)
    measured, _ = streams(dev, backbone.tokenizer, objective.end)
    each = [packed(stream.whole(), objective.room) for stream in learned]
    rows = torch.cat(each)
    if len(rows) < p.rows:
        tokens = sum(len(stream.whole()) for stream in learned)
        raise DataError(
            f"the texts have {tokens} tokens, which make {len(rows)} rows of {objective.room}, and a step takes "
            f"{p.rows}; give more text, repeat it, or make rows or batches smaller"
        )
    dev_rows: dict[str, Tensor] = {}
    for stream in (*held, *measured):
        some = _spread(packed(stream.whole(), objective.room), p.dev_rows)
        if not len(some):
            raise DataError(
                f"{stream.name} has {len(stream.tokens)} tokens to measure by, and a row has {objective.room}; give "
                "more text, or make rows shorter"
            )
        dev_rows[_free(stream.name, dev_rows)] = some
    told = [_told(stream, own, "train") for stream, own in zip(learned, each, strict=True)]
    told += [_told(stream, stream.tokens.view(-1, 1), "dev") for stream in (*held, *measured)]
    return rows, dev_rows, told


def _told(stream: Stream, rows: Tensor, role: str) -> dict[str, Any]:
    found = {"path": stream.name, "role": role, "documents": stream.documents, "tokens": len(stream.tokens)}
    return found | ({"repeat": stream.repeat, "rows": len(rows)} if role == "train" else {})


def _spread(rows: Tensor, most: int) -> Tensor:
    """So many rows at most, evenly from the first to the last."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, dtype=torch.float64).long()]


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """A name, numbered where it is taken."""
    number = 1
    while (found := name if number == 1 else f"{name} ({number})") in taken:
        number += 1
    return found


# What trains


@contextmanager
def _training(
    backbone: Backbone, tuned: Sequence[Tuned], p: Pretraining
) -> Iterator[tuple[Adapted | None, list[Group]]]:
    """What trains, in groups, and what carries the deltas; after an error a frozen backbone is as it was."""
    model = backbone.model
    if not tuned:
        yield None, _all_parameters(model, p)
        return
    head = head_parameters(model) if p.head else {}
    if p.head and not head:
        raise ConfigError(f"{type(model).__name__} has no head beside its embedding to train; leave out head")
    before = {name: part.detach().clone() for name, part in head.items()}
    adapted = Adapted(backbone, [t.delta for t in tuned], seeds=[p.seed])
    try:
        adapted.merge()  # an error now, and not after the training, where a delta has no form in weights
        adapted.unmerge()
        for part in head.values():
            part.requires_grad_(True)
        yield adapted, _delta_groups(adapted, tuned, head, p)
    except BaseException:
        with torch.no_grad():
            for name, part in head.items():
                part.copy_(before[name])
        raise
    finally:
        adapted.remove()


def _all_parameters(model: nn.Module, p: Pretraining) -> list[Group]:
    """Matrices with weight decay, and vectors without."""
    model.requires_grad_(True)
    if p.head:
        raise ConfigError("head = true is for deltas on a frozen backbone; without deltas all of the model trains")
    if odd := next((name for name, part in model.named_parameters() if part.dtype != torch.float32), None):
        raise ConfigError(
            f"{odd} is not float32, in which small steps are not lost; load the backbone in float32 and give "
            "precision = 'bf16'"
        )
    named = {f"model.{name}": part for name, part in model.named_parameters()}
    matrices = {name: part for name, part in named.items() if part.ndim > 1}
    vectors = {name: part for name, part in named.items() if part.ndim <= 1}
    groups = [Group(matrices, p.learning_rate, p.weight_decay), Group(vectors, p.learning_rate, 0.0)]
    return [group for group in groups if group.parts]


def _delta_groups(
    adapted: Adapted, tuned: Sequence[Tuned], head: Mapping[str, nn.Parameter], p: Pretraining
) -> list[Group]:
    """A group a delta, then the head."""
    parts = {name: part for name, part in adapted.parts() if part.requires_grad}
    groups: list[Group] = []
    for number, t in enumerate(tuned):
        own = {f"delta.{name}": part for name, part in parts.items() if name.startswith(f"{number}.")}
        highest = p.learning_rate if t.learning_rate is None else t.learning_rate
        groups.append(Group(own, highest, p.weight_decay if t.weight_decay is None else t.weight_decay))
    highest = p.learning_rate if p.head_learning_rate is None else p.head_learning_rate
    groups.append(Group({f"head.{name}": part for name, part in head.items()}, highest, 0.0))
    return [group for group in groups if group.parts]


def _mode(backbone: Backbone, adapted: Adapted | None, p: Pretraining) -> Callable[[], None]:
    """Puts a frozen backbone, whose own dropout rests, into the mode that it trains in."""

    def rest() -> None:
        if adapted is not None and not p.backbone_dropout:
            backbone.model.eval()

    return rest


@torch.no_grad()
def _taken_up(adapted: Adapted | None, groups: Sequence[Group]) -> dict[str, Tensor]:
    """What trained, in 16 bits; the backbone's weights have then taken up just that."""
    if adapted is None:
        return {}
    head = {name: part for group in groups for name, part in group.parts.items() if name.startswith("head.")}
    for tensor in (*dict(adapted.parts()).values(), *head.values()):
        tensor.copy_(small(tensor))
    learned = {name: small(tensor) for name, tensor in (*adapted.stored().items(), *head.items())}
    adapted.merge()
    return {name: tensor.detach().cpu() for name, tensor in learned.items()}


# Going on


def _settings(
    backbone: Backbone,
    objective: Objective,
    p: Pretraining,
    tuned: Sequence[Tuned],
    rows: Tensor,
    dev_rows: Mapping[str, Tensor],
) -> dict[str, Any]:
    """All that a run's result depends on."""
    deltas = [{**registry.describe("deltas", t.delta), **_own(t)} for t in tuned]
    return {
        **described(p),
        "objective": objective.kind,
        "backbone": backbone.name,
        "fingerprint": fingerprint(backbone.model),
        "deltas": as_setting(deltas),
        "texts": _digest([rows]),
        "dev texts": _digest(list(dev_rows.values())),
    }


def _own(t: Tuned) -> dict[str, Any]:
    return {"learning_rate": t.learning_rate, "weight_decay": t.weight_decay}


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _finished(folder: Path, checkpoints: Checkpoints, resume: bool) -> dict[str, Any] | None:
    """The record of the run that is finished in a folder, where that is asked for; else the folder is begun anew."""
    record = kept(folder) if resume and checkpoints.newest() is None else None
    if record is not None:
        checkpoints.same(record["settings"])
        return record
    if is_main() and not resume:
        (folder / "pretraining.json").unlink(missing_ok=True)
    return None
