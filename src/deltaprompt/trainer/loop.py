"""The one training loop, on accelerate: one adaptation or several in every pass, stopped early, the best kept."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from deltaprompt.errors import TrainingError
from deltaprompt.features import Encoded
from deltaprompt.model.trainable import Trainable
from deltaprompt.trainer import failures
from deltaprompt.trainer.accelerated import accelerator_for, prepared
from deltaprompt.trainer.checkpoint import Checkpoints, hold_back_weights
from deltaprompt.trainer.course import Course
from deltaprompt.trainer.objective import objective_of
from deltaprompt.trainer.order import draw_from
from deltaprompt.trainer.passes import MOST, Pass, apart, by_length, common, cost_of, weight_of
from deltaprompt.trainer.progress import Progress
from deltaprompt.trainer.run import Metrics, Run
from deltaprompt.trainer.streams import Shares, Streams
from deltaprompt.types import Batch


class Loop:
    """A training run of one course, or of several: each step is one of every course that goes on, in common passes.

    The loss of a pass is the sum of the courses' own, and each reads tensors of its own: their gradients do not mix.
    """

    def __init__(
        self, model: Trainable, courses: Sequence[Course], checkpoints: Checkpoints | None, shown: Progress
    ) -> None:
        self.model = model
        self.objective = objective_of(model)
        self.courses = courses
        self.several = len(courses) > 1
        self.draws = self.objective.draws
        self.whole = self.objective.whole([course.slot for course in courses])
        self.training = courses[0].training  # whose precision is that of all
        self.checkpoints = checkpoints
        self.shown = shown
        self.accelerator = accelerator_for(model.device, self.training.precision)
        self.module = prepared(self.accelerator, model)
        self.main = self.accelerator.is_main_process

    def begin(self, resume: bool) -> None:
        """Where to start from: a checkpoint, or the beginning."""
        for course in self.courses:
            course.begin(self.accelerator)
        hold_back_weights(self.accelerator)
        if self.checkpoints is not None and resume and self.checkpoints.load(self.accelerator):
            return
        for course in self.courses:
            course.start()
        if self.checkpoints is not None:
            if self.main:
                self.checkpoints.clear()
            self.accelerator.wait_for_everyone()
            self.checkpoints.write(self.accelerator, 0)

    def run(self, what: str) -> list[Run]:
        """Trains to the end; whatever breaks it off, the best so far is then in the model."""
        if self.main:
            last = [course.state.losses[-1] for course in self.courses if course.state.losses]
            self.shown.start(max(course.total for course in self.courses), what)
            self.shown.step(self.made, statistics.fmean(last) if last else math.nan)
        self._modes()
        try:
            with failures.of_memory(self.training, self._kept, len(self.courses)):
                self._steps()
        finally:
            for course in self.courses:
                course.state.restore()
            self.model.eval()
            self.shown.done()
        return [course.result() for course in self.courses]

    def finish(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that came to their end are kept as finished; where one did, no checkpoint is left."""
        done = list[Run]()
        for course, run in zip(self.courses, runs, strict=True):
            if self.main and not course.state.failed:
                course.save(run)
            done.append(replace(run, bytes=course.bytes))
        if self.checkpoints is not None and self.main and not all(run.failed for run in runs):
            self.checkpoints.clear()
        self.accelerator.wait_for_everyone()
        return done

    @property
    def made(self) -> int:
        """Steps made; courses that ended made fewer."""
        return max(course.state.step for course in self.courses)

    def _modes(self) -> None:
        self.model.train()
        if not self.training.backbone_dropout:
            self.model.adapted.model.eval()

    def _steps(self) -> None:
        clock = time.perf_counter()
        while running := [course for course in self.courses if course.running]:
            self._one_step(running)
            now = time.perf_counter()
            for course in running:
                course.state.seconds += (now - clock) / len(running)
            clock = now
            self._after_step(running)

    # A step

    def _one_step(self, running: Sequence[Course]) -> None:
        """One optimizer step of each; a course's loss is the mean over its rows, however they make batches."""
        device, passes = self.accelerator.device, self._passes(running)
        seeds = [course.chance(self.accelerator.process_index) for course in running]
        streams = Streams(seeds, device) if self.several and self.draws else None
        if streams is None:
            draw_from(seeds[0], device)
        for _, tensor in self.model.parts():
            tensor.grad = None
        for course in running:
            course.ready(device)
        for done, picked in enumerate(passes, 1):
            last = done == len(passes)
            with nullcontext() if last else self.accelerator.no_sync(self.module), self._chance(streams, picked):
                parts = [
                    loss * share for loss, (_, _, share) in zip(self._losses(running, picked), picked, strict=True)
                ]
                self.accelerator.backward(parts[0] if len(parts) == 1 else torch.stack(parts).sum())
            for part, (number, _, _) in zip(parts, picked, strict=True):
                running[number].loss += part.detach()
        for course in running:
            self._end_step(course)

    def _end_step(self, course: Course) -> None:
        """Clips and steps; a course whose loss is no number stops, and others go on."""
        norm = self.accelerator.clip_grad_norm_(course.take(), course.training.clip)
        value = float(self.accelerator.reduce(course.loss, "mean"))
        scaler = self.accelerator.scaler
        try:
            failures.check_finite(value, float(norm), course.state.step + 1, scaler, course.best_so_far)
        except TrainingError as e:
            course.state.failed = str(e)
            return
        course.step(value)

    def _passes(self, running: Sequence[Course]) -> list[Pass]:
        """The passes of the step to come; of several courses whose deltas draw nothing, by length."""
        passes = common([list(self._shares(course.batches())) for course in running])
        if not self.several:
            return passes
        sorts = [self.objective.sort(course.slot, course.rows[0]) for course in running]
        passes = [part for whole in passes for part in apart(whole, sorts)]
        if self.draws or self.whole:
            return passes
        device = self.accelerator.device.type
        cost, most = cost_of(self.model.backbone.width, device), MOST.get(device, MOST["cuda"])
        return [part for whole in passes for part in by_length(whole, cost, most)]

    def _shares(self, batches: Sequence[list[Encoded]]) -> Iterator[tuple[list[Encoded], float]]:
        """This process's rows of every batch, and their share of the loss; where it has none, a row of no weight."""
        a, whole = self.accelerator, sum(map(weight_of, batches))
        for batch in batches:
            own = batch[a.process_index :: a.num_processes]
            yield own or batch[:1], weight_of(own) * a.num_processes / whole

    def _chance(self, streams: Streams | None, picked: Pass) -> AbstractContextManager[None]:
        """What dropout is drawn from in a pass."""
        if streams is None:
            return nullcontext()
        shares = Shares.of([rows for _, rows, _ in picked], self.objective.left)
        return streams.over([course for course, _, _ in picked], shares)

    def _losses(self, running: Sequence[Course], picked: Pass) -> list[Tensor]:
        """The mean loss of each course's rows, from one pass."""
        batch = self._collated([row for _, rows, _ in picked for row in rows])
        if not self.several:
            return [self.module(batch, running[0].slot)["loss"]]
        sizes = [len(rows) for _, rows, _ in picked]
        slots = torch.tensor([running[course].slot for course, _, _ in picked]).repeat_interleave(torch.tensor(sizes))
        return list(self.module(batch, slots.to(self.model.device), sizes)["losses"].unbind())

    def _collated(self, rows: Sequence[Encoded]) -> Batch:
        return self.model.collate(rows).to(self.model.device)

    # After it

    def _after_step(self, running: Sequence[Course]) -> None:
        """Shows, evaluates and writes what is due."""
        going = [course for course in running if not course.state.failed]
        if self.main and going:
            self.shown.step(self.made, statistics.fmean(float(course.loss) for course in going))
        self._evaluate([course for course in going if course.evaluation_due()])
        if self.checkpoints is None or not going:
            return
        every = min(c.training.checkpoint_every or c.order.epoch for c in self.courses)
        if self.made == max(course.total for course in self.courses) or self.made % every == 0:
            self.checkpoints.write(self.accelerator, self.made)

    def _evaluate(self, courses: Sequence[Course]) -> None:
        """Looks at dev; of several courses the bar tells the mean of their bests."""
        module, better, seen = self.accelerator.unwrap_model(self.module), False, list[Metrics]()
        for course in courses:
            t = course.training
            course.solve()
            metrics = self.model.measure(course.dev, t.batch_size, course.slot, module) if course.dev else {}
            seen += [metrics] if metrics else []
            if course.take_evaluation(metrics):
                better = True
                if self.main:
                    course.save()
        if seen and self.main:
            told = [course.state.best for course in self.courses if course.state.best] if self.several else seen
            self.shown.evaluated({name: statistics.fmean(m[name] for m in told) for name in told[0]}, better)

    def _kept(self) -> str:
        """What is kept when training breaks off."""
        if not self.several:
            return self.courses[0].best_so_far()
        return "; ".join(f"{course.plan.called}: {course.best_so_far()}" for course in self.courses)
