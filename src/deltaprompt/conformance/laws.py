"""What must hold of every delta on every architecture. A law returns what breaks it, and what limits it by nature."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from deltaprompt import store
from deltaprompt.compose import Adapted, plain
from deltaprompt.conformance.snapshot import Snapshot
from deltaprompt.conformance.subject import Subject, run, shake
from deltaprompt.deltas._base import Delta, Reparametrised
from deltaprompt.errors import DeltaPromptError

STEPS = 2  # a factor whose partner starts at zero has no gradient in the first
FALL = 0.02  # the share of the loss that a step should take away
TRIES = 8  # of halving a step that goes too far
NEARLY_ZERO = 1e-12  # of the largest gradient: below it a gradient is rounding
ROUNDING = 0.0
EPSILON = 1e-3  # of finite differences


@dataclass(frozen=True)
class Note:
    """What a law says: how it is broken, or (where it does not fail) what by its nature it cannot hold for."""

    text: str
    fails: bool = True


Law = Callable[[Subject, Delta], Iterator[Note]]


@torch.no_grad()
def identity(subject: Subject, delta: Delta) -> Iterator[Note]:
    """At its start a delta changes nothing, or says that it does; moved away from it, it changes the output."""
    inputs = subject.inputs_of(delta)
    with subject.attached(delta, shaken=False) as adapted:
        start = run(adapted, subject.inputs)
        apart, rounding = _apart(start, subject.logits), ROUNDING * subject.tolerance
        if delta.identity_at_start and not apart <= rounding:
            yield Note(f"the start is no identity: the outputs differ by {apart:.2g}")
        if not delta.identity_at_start and apart <= rounding:
            yield Note("the start is the identity, and the delta says that it is none: it does not act")
        begun = run(adapted, inputs)
        moved = run(shake(adapted), inputs)
        if not torch.isfinite(moved).all():
            yield Note("the outputs are not finite")
        elif torch.equal(moved, begun):
            yield Note("no output changes when its parameters do")


def learning(subject: Subject, delta: Delta) -> Iterator[Note]:
    """Within two steps the loss falls and every parameter that can matter has a gradient; the backbone has none."""
    inputs = subject.inputs_of(delta)
    with subject.attached(delta, shaken=False) as adapted, _called(adapted) as called:
        adapted.train()
        named = dict(adapted.parts())
        largest = dict.fromkeys(named, 0.0)
        for _ in range(STEPS):
            adapted.zero_grad()
            loss = subject.loss(run(adapted, inputs))
            loss.backward()
            for name, p in named.items():
                largest[name] = max(largest[name], 0.0 if p.grad is None else float(p.grad.abs().max()))
            if any(p.grad is not None for p in adapted.model.parameters()):
                yield Note("the backbone has a gradient")
            if not _step(subject, adapted, inputs, loss.item()):
                yield Note(f"the loss does not fall from {loss.item():.6g}, whatever the size of the step")
                return
        floor = NEARLY_ZERO * max(largest.values(), default=0.0)
        without = [name for name in named if largest[name] <= floor]
        yield from _without_gradient(subject, adapted, inputs, without, called)


@torch.no_grad()
def mixed_rows(subject: Subject, delta: Delta) -> Iterator[Note]:
    """Each row of a batch in which every row has its own slot is that slot's adaptation alone."""
    inputs, index = subject.inputs_of(delta), torch.tensor([2, 0, 1, 0])
    with subject.attached(delta, slots=3) as adapted:
        alone = [run(adapted, inputs, slot) for slot in range(3)]
        if subject.close(alone[1], alone[2]):
            yield Note("slots with different parameters give the same outputs")
        if not subject.independent:
            yield Note("rows of one batch depend on one another in the model itself", fails=False)
            return
        try:
            mixed = run(adapted, inputs, index)
        except DeltaPromptError as refusal:
            yield Note(f"mixed rows are refused: {refusal}", fails=False)
            return
        for row, slot in enumerate(index.tolist()):
            if not subject.close(mixed[row], alone[slot][row]):
                apart = _apart(mixed[row], alone[slot][row])
                yield Note(f"row {row} of a mixed batch differs from its adaptation alone by {apart:.2g}")
                return


@torch.no_grad()
def saving(subject: Subject, delta: Delta) -> Iterator[Note]:
    """What is kept of a slot, written, read and put into a new adaptation, gives the same outputs."""
    inputs = subject.inputs_of(delta)
    with TemporaryDirectory() as folder:
        with subject.attached(delta, slots=2) as adapted:
            expected = run(adapted, inputs, 1)
            store.write(Path(folder), {"conformance": True}, adapted.stored(1))
        _, saved = store.read(folder)
    with subject.attached(plain(delta), shaken=False) as fresh:
        own = dict(fresh.parts())
        if own.keys() != saved.keys():
            yield Note(f"what is saved is not what is opened: {_some(sorted(own.keys() ^ saved.keys()))}")
            return
        for name, p in own.items():
            p[0] = saved[name]
        found = run(fresh, inputs)
    same = subject.close(found, expected) if isinstance(delta, Reparametrised) else torch.equal(found, expected)
    if not same:
        yield Note(f"saved and opened again, the outputs differ by {_apart(found, expected):.2g}")


def removal(subject: Subject, delta: Delta) -> Iterator[Note]:
    """After it is trained and removed, the backbone is bitwise what it was: tensors, flags, hooks and outputs."""
    with subject.attached(delta) as adapted:
        adapted.train()
        subject.loss(run(adapted, subject.inputs_of(delta))).backward()
        adapted.eval()
    left = list(subject.before.differences(Snapshot.of(subject.backbone.model)))
    if left:
        yield Note(f"removed, it leaves behind {left[0]}" + (f" and {len(left) - 1} more" if left[1:] else ""))
    if not torch.equal(subject.again(), subject.own):
        yield Note("removed, the outputs are not what they were")


LAWS: Mapping[str, Law] = {
    "identity": identity,
    "learning": learning,
    "mixed rows": mixed_rows,
    "save and open": saving,
    "exact removal": removal,
}


# Learning


@contextmanager
def _called(adapted: Adapted) -> Iterator[set[str]]:
    """The paths of the sites' modules that a pass calls."""
    called: set[str] = set()
    handles = []
    for path in {patch.site.path for patch in adapted.patches}:  # type: ignore[union-attr]
        handles.append(adapted.model.get_submodule(path).register_forward_pre_hook(lambda *_, p=path: called.add(p)))
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _step(subject: Subject, adapted: Adapted, inputs: Mapping[str, Tensor], loss: float) -> bool:
    """One step down the gradient, halved until the loss falls; whether it does."""
    named = [(p, p.grad) for _, p in adapted.parts() if p.grad is not None]
    square = sum(float(g.square().sum()) for _, g in named)
    if square == 0.0:
        return False
    size, start = FALL * loss / square, [p.detach().clone() for p, _ in named]
    for _ in range(TRIES):
        with torch.no_grad():
            for (p, g), begin in zip(named, start, strict=True):
                p.copy_(begin - size * g)
            if float(subject.loss(run(adapted, inputs))) < loss:
                return True
        size /= 4
    return False


def _without_gradient(
    subject: Subject, adapted: Adapted, inputs: Mapping[str, Tensor], names: Sequence[str], called: set[str]
) -> Iterator[Note]:
    """Tensors without a gradient: at sites that no text passes, without effect, or with one that is lost."""
    sites = {f"{p.number}.{p.site.name}.": p.site.path for p in adapted.patches}  # type: ignore[union-attr]
    passed = {n for n in names if not any(n.startswith(s) and path not in called for s, path in sites.items())}
    if unreached := [n for n in names if n not in passed]:
        yield Note(f"no text passes {_some(_roles(unreached), 8)}", fails=False)
    slopes = {n: _slope(subject, adapted, inputs, n) for n in names if n in passed}
    lost = {n: slope for n, slope in slopes.items() if slope}
    if lost:
        yield Note(
            f"the gradient is lost at {_some(list(lost))}: finite differences find {next(iter(lost.values())):.2g}"
        )
    if idle := [n for n in names if n in passed and n not in lost]:
        yield Note(f"the loss does not depend on {_some(_roles(idle), 8)}", fails=False)


@torch.no_grad()
def _slope(subject: Subject, adapted: Adapted, inputs: Mapping[str, Tensor], name: str) -> float:
    """The slope of the loss along a random direction of one tensor by finite differences; 0 where it is rounding."""
    p = dict(adapted.parts())[name]
    kept, direction = p.clone(), torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p)
    slopes = []
    for epsilon in (EPSILON, EPSILON / 2):
        ends = []
        for sign in (1, -1):
            p.copy_(kept + sign * epsilon * direction)
            ends.append(float(subject.loss(run(adapted, inputs))))
        slopes.append((ends[0] - ends[1]) / (2 * epsilon))
    p.copy_(kept)
    steady = abs(slopes[0] - slopes[1]) < abs(slopes[0]) / 4
    return slopes[0] if steady and abs(slopes[0]) > subject.tolerance else 0.0


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _roles(names: Iterable[str]) -> list[str]:
    """Stored names without the numbers of the delta and of the layer, each once: `attn.k.bias`."""
    return list(dict.fromkeys(re.sub(r"^\d+\.(.*?layers\.\d+\.)?", "", name) for name in names))


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
