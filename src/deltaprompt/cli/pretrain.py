"""`deltaprompt pretrain`: a language model from a recipe and texts."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from deltaprompt.cli import console, options
from deltaprompt.errors import ConfigError

if TYPE_CHECKING:
    from deltaprompt.backbone import Backbone
    from deltaprompt.cli.pretrain_recipe import PretrainRecipe
    from deltaprompt.pretrain import Pretrained

EVERY = 50  # steps between lines where nobody watches a bar


def pretrain(
    recipe: options.PretrainFile,
    out: options.Out = None,
    resume: options.Resume = False,
    steps: options.Steps = None,
    device: options.Device = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Train a language model on text: masked, causal or spans; deltas on a frozen backbone, or a whole new model."""
    from deltaprompt.cli.pretrain_recipe import build, with_steps
    from deltaprompt.cli.recipe import read_toml
    from deltaprompt.trainer.accelerated import is_main

    chosen = with_steps(build(read_toml(recipe)), steps)
    chosen = dataclasses.replace(chosen, out=out or chosen.out, device=device or chosen.device)
    if chosen.out is None:
        raise ConfigError("there is nowhere to keep the model: give --out DIR, or out = DIR in the recipe")
    with console.resumable(chosen.out, resume):
        run = _run(chosen, resume)
    if not is_main():  # of several processes (torchrun) one speaks
        return
    if as_json:
        console.print_json(run.as_json() | {"out": chosen.out})
    else:
        _show(run, chosen.out)


def _run(recipe: PretrainRecipe, resume: bool) -> Pretrained:
    from deltaprompt.pretrain import pretrain

    backbone = _backbone(recipe)
    p = recipe.pretraining
    trains = " + ".join(type(t.delta).__name__ for t in recipe.deltas) or "all parameters"
    console.note(f"{backbone.name}: {backbone.kind}, {trains}, {p.steps} steps of {p.rows} rows of {p.length}")
    return pretrain(
        backbone,
        recipe.data,
        recipe.dev,
        deltas=recipe.deltas,
        pretraining=p,
        out=recipe.out,
        resume=resume,
        progress=None if sys.stderr.isatty() else Lines(p.rows * p.length),
    )


def _backbone(recipe: PretrainRecipe) -> Backbone:
    """The model to train: loaded, or new with the tokenizer that is asked for."""
    from deltaprompt.backbone import load
    from deltaprompt.cli.pretrain_recipe import New
    from deltaprompt.pretrain import byte_level, new_backbone, training_documents
    from deltaprompt.pretrain.fresh import objective_for, tokenizer_from
    from deltaprompt.pretrain.objectives import KIND_FOR

    b, p = recipe.backbone, recipe.pretraining
    if not isinstance(b, New):
        kind = None if p.objective is None else KIND_FOR[p.objective]
        return load(
            b.name,
            kind=kind,
            device=recipe.device,
            attention=b.attention,
            revision=b.revision,
            new_head=b.new_head,
        )
    objective = objective_for(b.type, p.objective)
    if recipe.tokenizer.source is not None:
        tokenizer = tokenizer_from(recipe.tokenizer.source)
    else:
        tokenizer = byte_level(training_documents(recipe.data), recipe.tokenizer.pieces or 0, objective)
    return new_backbone(
        b.type, tokenizer, b.sizes, objective=objective, attention=b.attention, device=recipe.device, seed=p.seed
    )


class Lines:
    """A line on standard error now and then, for logs: the mean loss since the last and tokens a second."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens  # of a step
        self.total = 0
        self.losses: list[float] = []
        self.spent = 0.0  # seconds in the steps since the last line
        self.clock: float | None = None  # None until it is told where the run begins

    def start(self, total: int, what: str) -> None:
        """Nothing is told yet."""
        self.total, self.losses, self.spent, self.clock = total, [], 0.0, None

    def step(self, step: int, loss: float) -> None:
        """A line every so many steps."""
        now = time.perf_counter()
        if self.clock is None:
            self.clock = now
            return
        self.losses.append(loss)
        self.spent, self.clock = self.spent + now - self.clock, now
        if step % EVERY and step != self.total:
            return
        mean, speed = math.fsum(self.losses) / len(self.losses), len(self.losses) * self.tokens / self.spent
        console.note(f"step {step}/{self.total}  loss {mean:.4f}  {speed:,.0f} tokens/s", "")
        self.losses, self.spent = [], 0.0

    def evaluated(self, metrics: Mapping[str, float], best: bool) -> None:
        """A line for dev, whose time does not count."""
        console.note(f"    dev accuracy {metrics['accuracy']:.4f}  loss {metrics['loss']:.4f}", "")
        self.clock = time.perf_counter()

    def done(self) -> None:
        """Nothing more is told."""


def _show(run: Pretrained, out: str) -> None:
    body = [
        [name, f"{told['accuracy']:.4f}", f"{told['loss']:.4f}", f"{told['tokens']:,.0f}"]
        for name, told in run.dev.items()
    ]
    screen = console.output()
    if body:
        screen.print(console.table(["dev", "accuracy", "loss", "tokens guessed"], body))
    screen.print(
        f"loss {run.loss:.4f} after {run.steps:,} steps, {run.tokens:,} tokens, {run.seconds / 60:.1f} minutes; "
        f"{run.trainable:,} of {run.parameters:,} parameters trained",
        markup=False,
        soft_wrap=True,
    )
    screen.print(f"{out} is a model: dp.load({out!r}), --backbone {shlex.quote(out)}", markup=False, soft_wrap=True)
