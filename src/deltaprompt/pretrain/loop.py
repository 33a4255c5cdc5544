"""The loop of steps, on accelerate: the same whatever kills it, wherever it goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaprompt.pretrain.objectives import Objective
from deltaprompt.pretrain.pretraining import Pretraining
from deltaprompt.pretrain.scoring import Scorer, measured
from deltaprompt.trainer import failures
from deltaprompt.trainer.accelerated import accelerator_for
from deltaprompt.trainer.checkpoint import Checkpoints, hold_back_weights
from deltaprompt.trainer.order import draw_from, mixed
from deltaprompt.trainer.progress import Progress
from deltaprompt.trainer.run import put

SEEDS, HIDING = 10_000_019, 1_000_000  # apart: seeds of runs; within one, of epochs' orders and of what steps hide


@dataclass(frozen=True)
class Group:
    """Tensors with a learning rate and a weight decay of their own."""

    parts: Mapping[str, nn.Parameter]
    learning_rate: float
    weight_decay: float


@dataclass
class State:
    """Where a run stands: with the optimizer, all that a later step depends on."""

    parts: Mapping[str, nn.Parameter]  # what trains, live
    step: int = 0
    losses: list[float] = field(default_factory=list)  # since the last evaluation
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """For accelerate, which writes it to disk."""
        return {**vars(self), "parts": {name: p.detach() for name, p in self.parts.items()}}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """From disk; what trains is overwritten in place."""
        put(stored["parts"], self.parts)
        vars(self).update({name: value for name, value in stored.items() if name != "parts"})


class Loop:
    """A run: its rows, what trains, and where it stands.

    Args:
        scorer: the model.
        objective: what it learns to guess.
        rows: of the training texts [n, room], and of each dev text by name.
        groups: what trains.
        p: how.
        checkpoints: where it goes on from, if anywhere.
        shown: what is told while it goes on.
    """

    def __init__(
        self,
        scorer: Scorer,
        objective: Objective,
        rows: tuple[Tensor, Mapping[str, Tensor]],
        groups: Sequence[Group],
        p: Pretraining,
        checkpoints: Checkpoints | None,
        shown: Progress,
    ) -> None:
        self.scorer, self.objective, self.p = scorer, objective, p
        self.rows, self.dev = rows
        self.groups, self.checkpoints, self.shown = groups, checkpoints, shown
        self.device = next(scorer.parameters()).device
        self.accelerator = accelerator_for(self.device, p.precision)
        several = self.accelerator.num_processes > 1
        self.module = self.accelerator.prepare(scorer, device_placement=[several])
        self.main = self.accelerator.is_main_process
        told = [{"params": list(g.parts.values()), "weight_decay": g.weight_decay} for g in groups]
        optimizer = torch.optim.AdamW(told, lr=0.0, betas=(0.9, p.beta2))
        self.optimizer = self.accelerator.prepare_optimizer(optimizer, device_placement=several)
        self.state = State({name: part for group in groups for name, part in group.parts.items()})
        self.accelerator.register_for_checkpointing(self.state)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    @property
    def epoch(self) -> int:
        """Steps of one pass over the rows; the last rows that make no whole step wait for the next."""
        return len(self.rows) // self.p.rows

    def begin(self, resume: bool) -> None:
        """From the newest checkpoint where that is asked for and there is one, else from the beginning."""
        hold_back_weights(self.accelerator)
        if self.checkpoints is None or (resume and self.checkpoints.load(self.accelerator)):
            return
        if self.main:
            self.checkpoints.clear()
        self.accelerator.wait_for_everyone()

    def run(self, what: str, frozen: Callable[[], None]) -> None:
        """To the last step.

        Args:
            what: the run's name.
            frozen: puts a frozen backbone into the mode that it trains in, where there is one.
        """
        state, clock = self.state, time.perf_counter()
        if self.main:
            self.shown.start(self.p.steps, what)
            self.shown.step(state.step, state.losses[-1] if state.losses else math.nan)
        self.scorer.train()
        frozen()
        try:
            while state.step < self.p.steps:
                loss = self._one_step()
                now = time.perf_counter()
                state.seconds, clock = state.seconds + now - clock, now
                if self.main:
                    self.shown.step(state.step, loss)
                self._after_step(frozen)
        finally:
            self.scorer.eval()
            if self.main:
                self.shown.done()

    # A step

    def _one_step(self) -> float:
        """One optimizer step: the mean loss of what its rows hide, whichever passes and processes share them."""
        step, a, p = self.state.step, self.accelerator, self.p
        draw_from(mixed(p.seed, step, a.process_index), self.device)
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = own.learning_rate * p.factor(step)
        hidden = self.objective.scored(self._picked(step).long(), self._chance(HIDING + step))
        each = max(int(hidden.at.sum()), 1)
        mine = hidden.rows(a.process_index, None, a.num_processes)
        total = torch.zeros((), device=self.device)
        for first in range(0, len(mine.at), p.batch_size):
            last = first + p.batch_size >= len(mine.at)
            with nullcontext() if last else a.no_sync(self.module):
                loss = self.module(mine.rows(first, first + p.batch_size).to(self.device)) / each
                a.backward(loss * a.num_processes)
            total += loss.detach()
        norm = a.clip_grad_norm_(list(self.state.parts.values()), p.clip)
        value = float(a.reduce(total, "sum"))
        failures.check_finite(value, float(norm), step + 1, a.scaler, self._kept)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.state.losses.append(value)
        return value

    def _picked(self, step: int) -> Tensor:
        """The rows of a step [rows, room]: an epoch goes through them in an order of its own."""
        epoch, at = divmod(step, self.epoch)
        if self._order[0] != epoch:
            self._order = epoch, torch.randperm(len(self.rows), generator=self._chance(epoch))
        return self.rows[self._order[1][at * self.p.rows : (at + 1) * self.p.rows]]

    def _chance(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.p.seed * SEEDS + number)

    # After it

    def _after_step(self, frozen: Callable[[], None]) -> None:
        """Evaluates and writes what is due."""
        step, p = self.state.step, self.p
        if step % p.evaluate_every == 0 or step == p.steps:
            with self._evaluating(frozen):
                self._evaluate()
        if self.checkpoints is None:
            return
        if step % (p.checkpoint_every or p.evaluate_every) == 0 or step == p.steps:
            self.checkpoints.write(self.accelerator, step)

    def _evaluate(self) -> None:
        """Looks at dev, and begins a new line of the history."""
        state, a, size = self.state, self.accelerator, self.p.batch_size
        asked = self.objective.for_dev()
        dev = {name: measured(self.scorer, asked, rows, size, a.autocast) for name, rows in self.dev.items()}
        rate = self.groups[0].learning_rate * self.p.factor(state.step - 1)
        loss = math.fsum(state.losses) / len(state.losses)
        best = max((mean(entry["dev"])["accuracy"] for entry in state.history if entry["dev"]), default=-1.0)
        state.history.append({"step": state.step, "loss": loss, "learning_rate": rate, "dev": dev})
        state.losses = []
        if dev and self.main:
            self.shown.evaluated(mean(dev), mean(dev)["accuracy"] > best)

    @contextmanager
    def _evaluating(self, frozen: Callable[[], None]) -> Iterator[None]:
        self.scorer.eval()
        yield
        self.scorer.train()
        frozen()

    def _kept(self) -> str:
        """What is kept when training breaks off."""
        newest = None if self.checkpoints is None else self.checkpoints.newest()
        return "nothing is kept" if newest is None else f"the checkpoint {newest} is as it was before"


def mean(dev: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several dev texts as one, by their tokens."""
    tokens = max(sum(told["tokens"] for told in dev.values()), 1.0)
    return {
        name: sum(told[name] * told["tokens"] for told in dev.values()) / tokens for name in ("accuracy", "loss")
    } | {"tokens": tokens}
