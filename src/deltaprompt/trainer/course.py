"""One adaptation that trains: all that is its own in a pass that others share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaprompt.errors import DataError
from deltaprompt.features import Encoded
from deltaprompt.model.trainable import Trainable
from deltaprompt.trainer.accelerated import optimizer_for
from deltaprompt.trainer.kept import Kept
from deltaprompt.trainer.objective import objective_of
from deltaprompt.trainer.order import Order, mixed
from deltaprompt.trainer.plan import Plan
from deltaprompt.trainer.run import Run, State, headline
from deltaprompt.types import Example


class Course:
    """One adaptation that trains: its rows and their order, its tensors, optimizer and rates, its best so far.

    Its tensors are views of one slot of the model's, so that an ordinary optimizer steps this slot and no other.

    Args:
        model: of one slot or several.
        slot: its own.
        plan: what it is trained on, and how.
        kept: its folder, if it has one.
        encode: examples as token ids, of a slot.
    """

    def __init__(
        self,
        model: Trainable,
        slot: int,
        plan: Plan,
        kept: Kept | None,
        encode: Callable[[Sequence[Example], int], list[Encoded]],
    ) -> None:
        self.model = model
        self.slot = slot
        self.plan = plan
        self.kept = kept
        self.training = plan.training
        self.rows = encode(plan.train, slot)
        self.dev = encode(plan.dev, slot) if plan.dev else []
        for name, given, rows in (("training", plan.train, self.rows), ("dev", plan.dev, self.dev)):
            if given and not rows:
                raise DataError(
                    f"nothing is left of the {len(given)} {name} examples: each is too long, or has no word"
                )
        t = plan.training
        lengths, classes = [row.length for row in self.rows], [row.label for row in self.rows]
        self.order = Order(lengths, t.batch_size, t.accumulate, plan.seed, classes, t.per_class)
        self.total = t.total(self.order.epoch)
        self.loss = torch.zeros(())
        self.bytes = 0

    def begin(self, accelerator: Any) -> None:
        """Its tensors where they are now, and what a checkpoint has of it."""
        own = self.model.slot_parts(self.slot)
        self.parts = {name: nn.Parameter(tensor.data[at]) for name, tensor, at in own}
        optimizer = optimizer_for(self.parts, self.training)
        self.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=accelerator.num_processes > 1)
        self.state = State(self.parts)
        accelerator.register_for_checkpointing(self.state)

    def start(self) -> None:
        """A verbalizer is given its start and a calibration is measured; that is the best so far."""
        objective_of(self.model).start(self.slot, self.plan)
        self.state.keep()

    # A step

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.state.step < self.total and not self.state.stopped and not self.state.failed

    def batches(self) -> list[list[Encoded]]:
        """Its rows in the step to come, in the batches that it would have alone."""
        return [[self.rows[i] for i in batch] for batch in self.order.batches(self.state.step)]

    def chance(self, process: int = 0) -> int:
        """The seed of what the step to come draws."""
        return mixed(self.plan.seed, self.state.step, process)

    def ready(self, device: torch.device) -> None:
        """No gradient and no loss yet, and the rates of the step to come."""
        t = self.training
        highest = (t.learning_rate, t.verbalizer_learning_rate)
        for group, rate in zip(self.optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * t.rate(self.state.step, self.total)
        self.loss = torch.zeros((), device=device)

    def take(self) -> list[Tensor]:
        """Its tensors, each with its own part of the model's gradient."""
        for name, tensor, at in self.model.slot_parts(self.slot):
            self.parts[name].grad = None if tensor.grad is None else tensor.grad[at]
        return list(self.parts.values())

    def step(self, loss: float) -> None:
        """The optimizer's step."""
        self.optimizer.step()
        self.state.step += 1
        self.state.losses.append(loss)

    # What it comes to

    def evaluation_due(self) -> bool:
        """Whether dev is looked at after the step that was made."""
        step = self.state.step
        return step == self.total or step % self.training.evaluate_every(self.order.epoch) == 0

    def solve(self) -> None:
        """A verbalizer that is solved is solved again, on what deltas have learned, where that is measured or kept."""
        if self.dev or self.state.step == self.total:
            objective_of(self.model).solve(self.slot, self.plan)

    def take_evaluation(self, metrics: dict[str, float]) -> bool:
        """Metrics on dev (none without) into the history; true where they are the best. It may stop."""
        state, t = self.state, self.training
        rate = t.learning_rate * t.rate(state.step - 1, self.total)
        entry = {"step": state.step, "epoch": self._epochs(), "loss": math.fsum(state.losses) / len(state.losses)}
        state.history.append({**entry, "learning_rate": rate, "dev": metrics})
        state.losses = []
        better = state.take(metrics)
        if t.patience is not None and state.waited >= t.patience:
            state.stopped = "early"
        return better

    def save(self, run: Run | None = None) -> None:
        """The slot as it is, with the run's record where it is finished."""
        if self.kept is not None:
            self.bytes = self.kept.write(self.model, self.slot, self.state.best, run)

    def result(self) -> Run:
        """What it came to."""
        s, trainable = self.state, self.model.parameter_count(self.slot)
        stopped = "failed" if s.failed else s.stopped or "done"
        return Run(
            s.step, self._epochs(), s.best_step, s.best, s.history, s.seconds, stopped, trainable, failed=s.failed
        )

    def best_so_far(self) -> str:
        """What is kept when training breaks off."""
        state, place = self.state, "" if self.kept is None else f" and in {self.kept.out}"
        if state.best_step == 0:
            return "nothing was better than the start, which is back in the model"
        dev = f" (dev {headline(state.best)})" if state.best else ""
        return f"the best so far, of step {state.best_step}{dev}, is kept in the model{place}"

    def _epochs(self) -> float:
        return round(self.state.step / self.order.epoch, 3)
