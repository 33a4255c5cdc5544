"""`fit`: the one training loop, on accelerate. Stops early on dev, keeps the best, goes on after a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from deltaprompt.model import Model
from deltaprompt.trainer import failures
from deltaprompt.trainer.accelerated import accelerator_for, is_main, optimizer_for, prepared, recomputed
from deltaprompt.trainer.checkpoint import Checkpoints, hold_back_weights
from deltaprompt.trainer.kept import Kept, finished
from deltaprompt.trainer.measure import measured
from deltaprompt.trainer.order import Order, chance_kept, draw_from, mixed
from deltaprompt.trainer.progress import Progress, usual
from deltaprompt.trainer.run import Run, State
from deltaprompt.trainer.settings import check, settings_of
from deltaprompt.trainer.training import Training
from deltaprompt.types import Batch, Example


def fit(
    model: Model,
    train: Sequence[Example],
    dev: Sequence[Example] | None = None,
    *,
    training: Training = Training(),  # noqa: B008  frozen
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    what: str = "fit",
) -> Run:
    """Trains a model's deltas and verbalizer in place; it is then as it was where dev was best (without dev: last).

    Args:
        model: of one adaptation. A verbalizer that starts from examples is given its start first.
        train: labelled examples.
        dev: labelled examples to choose by: the best accuracy, and of equal ones the lowest loss.
        training: how.
        seed: of the order of rows and of dropout. The same seed gives the same numbers, bitwise on a CPU.
        out: a folder; the best so far is always in it, and while training goes on, `out/checkpoint`.
        resume: goes on with the run that was broken off in `out`, to the result that it would have had. Begins at the
            beginning where there is none, and returns at once where it is finished.
        progress: a bar on a terminal where not given.
        what: what the bar calls this run.

    Raises:
        ConfigError: nothing trains, or a run to resume had other settings or data.
        TrainingError: a non-finite loss, or not enough memory. The best so far is in the model, and in `out`.
    """
    check(model, train, dev)
    folder = None if out is None else Path(out)
    settings = {} if folder is None else settings_of(model, train, dev, training, seed)
    checkpoints = None if folder is None else Checkpoints(folder, settings)
    if checkpoints is not None and resume and checkpoints.newest() is None:
        before = finished(model, checkpoints, is_main())
        if before is not None:
            if is_main():
                checkpoints.clear()  # what is left where it was killed while it did so
            return before
    with chance_kept(model.device), recomputed(model, training.checkpointing):
        loop = Loop(model, training, seed, checkpoints, progress or usual())
        with failures.of_memory(training):
            loop.begin(train, dev, resume)
        return loop.run(what)


class Loop:
    """One training run."""

    def __init__(
        self, model: Model, training: Training, seed: int, checkpoints: Checkpoints | None, shown: Progress
    ) -> None:
        self.model = model
        self.training = training
        self.seed = seed
        self.checkpoints = checkpoints
        self.kept = None if checkpoints is None else Kept(checkpoints.out, checkpoints.settings)
        self.shown = shown
        self.accelerator = accelerator_for(model, training.precision)
        self.module, self.optimizer = prepared(self.accelerator, model, optimizer_for(model, training))
        self.main = self.accelerator.is_main_process
        self.bytes = 0

    def begin(self, train: Sequence[Example], dev: Sequence[Example] | None, resume: bool) -> None:
        """The rows, and where to start from: a checkpoint, or the beginning."""
        t = self.training
        self.rows = self.model.encode(train)
        self.dev = self.model.encode(dev) if dev else []
        self.order = Order([row.length for row in self.rows], t.batch_size, t.accumulate, self.seed)
        self.total = t.total(self.order.epoch)
        self.state = State(dict(self.model.parts()))
        self.accelerator.register_for_checkpointing(self.state)
        hold_back_weights(self.accelerator)
        if self.checkpoints is not None and resume and self.checkpoints.load(self.accelerator):
            return
        self.model.start(train, batch_size=t.batch_size)
        self.state.keep()
        if self.checkpoints is not None:
            if self.main:
                self.checkpoints.clear()
            self.accelerator.wait_for_everyone()
            self.checkpoints.write(self.accelerator, 0)

    def run(self, what: str) -> Run:
        """Trains to the end; whatever breaks it off, the best so far is then in the model."""
        state, begun = self.state, time.perf_counter() - self.state.seconds
        if self.main:
            self.shown.start(self.total, what)
            self.shown.step(state.step, state.losses[-1] if state.losses else math.nan)
        self._modes()
        try:
            with failures.of_memory(self.training, self._kept):
                while state.step < self.total and not state.stopped:
                    self._one_step()
                    state.seconds = time.perf_counter() - begun
                    self._after_step()
        finally:
            state.restore()
            self.model.eval()
            self.shown.done()
        run = self._result()
        self.model.settle()
        self._save(run)
        if self.checkpoints is not None and self.main:
            self.checkpoints.clear()
        self.accelerator.wait_for_everyone()
        return replace(run, bytes=self.bytes)

    def _modes(self) -> None:
        self.model.train()
        if not self.training.backbone_dropout:
            self.model.adapted.model.eval()

    def _one_step(self) -> None:
        """One optimizer step; the loss is the mean over its rows, however they are divided into batches."""
        step, t = self.state.step, self.training
        batches = self.order.batches(step)
        draw_from(mixed(self.seed, step, self.accelerator.process_index), self.accelerator.device)
        self._set_rates(step)
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.accelerator.device)
        for number, (batch, share) in enumerate(self._shares(batches), 1):
            last = number == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                part = self.module(batch)["loss"] * share
                self.accelerator.backward(part)
            loss += part.detach()
        norm = self.accelerator.clip_grad_norm_(list(self.state.parts.values()), t.clip)
        value = float(self.accelerator.reduce(loss, "mean"))
        failures.check_finite(value, float(norm), step + 1, self.accelerator.scaler, self._kept)
        self.optimizer.step()
        self.state.step += 1
        self.state.losses.append(value)

    def _shares(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Batch, float]]:
        """This process's rows of every batch, and their share of the loss; where it has none, a row of no weight."""
        a, rows = self.accelerator, sum(map(len, batches))
        for batch in batches:
            own = batch[a.process_index :: a.num_processes]
            share = len(own) * a.num_processes / rows
            yield self._collated(own or batch[:1]), share

    def _collated(self, numbers: Sequence[int]) -> Batch:
        return self.model.features.collate([self.rows[i] for i in numbers]).to(self.model.device)

    def _set_rates(self, step: int) -> None:
        t = self.training
        highest = (t.learning_rate, t.verbalizer_learning_rate)
        for group, rate in zip(self.optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * t.rate(step, self.total)

    def _after_step(self) -> None:
        """Shows, evaluates and writes what is due."""
        state, t, epoch = self.state, self.training, self.order.epoch
        if self.main:
            self.shown.step(state.step, state.losses[-1])
        at_end = state.step == self.total
        if at_end or state.step % t.evaluate_every(epoch) == 0:
            self._evaluate()
        if self.checkpoints is not None and (at_end or state.step % (t.checkpoint_every or epoch) == 0):
            self.checkpoints.write(self.accelerator, state.step)

    def _evaluate(self) -> None:
        state, t = self.state, self.training
        metrics = measured(self.accelerator.unwrap_model(self.module), self.dev, t.batch_size) if self.dev else {}
        rate = t.learning_rate * t.rate(state.step - 1, self.total)
        entry = {"step": state.step, "epoch": self._epochs(), "loss": math.fsum(state.losses) / len(state.losses)}
        state.history.append({**entry, "learning_rate": rate, "dev": metrics})
        state.losses = []
        better = state.take(metrics)
        if metrics and self.main:
            self.shown.evaluated(metrics, better)
        if better:
            self._save()
        if t.patience is not None and state.waited >= t.patience:
            state.stopped = "early"

    def _epochs(self) -> float:
        return round(self.state.step / self.order.epoch, 3)

    def _save(self, run: Run | None = None) -> None:
        """The model as it is, with the run's record where it is finished."""
        if self.kept is not None and self.main:
            self.bytes = self.kept.write(self.model, self.state.best, run)

    def _result(self) -> Run:
        s = self.state
        stopped, trainable = s.stopped or "done", self.model.parameter_count()
        return Run(s.step, self._epochs(), s.best_step, s.best, s.history, s.seconds, stopped, trainable)

    def _kept(self) -> str:
        """What is kept when training breaks off."""
        state, place = self.state, "" if self.checkpoints is None else f" and in {self.checkpoints.out}"
        if state.best_step == 0:
            return "nothing was better than the start, which is back in the model"
        dev = f" (dev accuracy {state.best['accuracy']:.3f})" if state.best else ""
        return f"the best so far, of step {state.best_step}{dev}, is kept in the model{place}"
