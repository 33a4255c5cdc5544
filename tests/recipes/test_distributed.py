"""Two processes train as one does: the deltas the same in both (DDP), the backbone whole or spread over them (FSDP2).

The processes are real, on a CPU and with gloo: this module, run by torchrun, is what each of them does. PyTorch's own
launcher is used since accelerate's starts one process on a CPU whatever it is asked for.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaprompt import store
from deltaprompt.backbone import Backbone, load
from deltaprompt.backbone.layers import is_spread, spread
from deltaprompt.compose import Adapted
from deltaprompt.deltas._base import Shared
from deltaprompt.errors import ConfigError, SiteError
from deltaprompt.model import Model, Task, adapt
from deltaprompt.model.saved import open_
from deltaprompt.trainer import Run, Training, fit, loop
from deltaprompt.trainer.accelerated import FSDP
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo
from tests.adapted_zoo import DELTAS, made

pytestmark = pytest.mark.slow
LIMIT = 240  # seconds; a tenth of it is usual
FAMILIES = {"bert": DELTAS, "llama": ["lora", "prefix"], "t5": ["lora", "prefix"]}
CASES = [(family, name) for family, names in FAMILIES.items() for name in names]
WORDS = {"good": ("great",), "bad": ("terrible",)}
TEXTS = {
    "good": ["a great movie", "a good film", "great plot", "a great film", "good acting"],
    "bad": ["terrible acting", "a bad film", "terrible movie", "bad plot", "a terrible bad movie"],
}
ROWS = [Example({"text": text}, label) for label, texts in TEXTS.items() for text in texts]
TRAINING = Training(epochs=2, batch_size=3, accumulate=2, learning_rate=1e-2, clip=0.5)  # steps of 6 and of 4 rows


def model_on(backbone: Backbone, name: str) -> Model:
    return adapt(backbone, Task("{text} It was {mask}.", WORDS, SoftVerbalizer()), [made(name)])


def trained(folder: Path, family: str, name: str, out: Path | None = None, **options: Any) -> tuple[Model, Run]:
    """A model after its training; the backbone is read from the disk, as every process reads it."""
    model = model_on(load(folder / family, device="cpu"), name)
    training = options.pop("training", TRAINING)
    return model, fit(model, ROWS, ROWS[::3], training=training, seed=3, out=out, **options)


def told(model: Model, run: Run) -> dict[str, Any]:
    """What is compared of a run: its losses on both sets, what it learned, and what it then says."""
    return {
        "losses": [[entry["loss"], entry["dev"]["loss"]] for entry in run.history],
        "dev": [entry["dev"]["accuracy"] for entry in run.history],
        "learned": float(sum(p.detach().double().square().sum() for _, p in model.parts())),
        "says": [said["scores"]["good"] for said in model.predict([e.fields["text"] for e in ROWS])],
    }


@contextmanager
def broken_off(at: int) -> Iterator[None]:
    """Within it a run breaks off after that step, in every process."""
    own = loop.Loop._after_step

    def after(self: Any, running: Any) -> None:
        own(self, running)
        if self.made == at:
            raise KeyboardInterrupt

    loop.Loop._after_step = after  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop.Loop._after_step = own  # type: ignore[method-assign]


# What each of the processes does


def main(folder: Path) -> None:
    """All of it, once with the backbone whole and once with it spread."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for way in ("whole", "spread"):
        os.environ[FSDP] = str(way == "spread").lower()
        found[way] = {f"{family} {name}": told(*trained(folder, family, name)) for family, name in CASES}
        found[way] |= {"resumed": resumed(folder, folder / way), "command": command(folder, folder / way / "cli")}
    found["spread"] |= spread_over(folder)
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))


def resumed(folder: Path, out: Path) -> dict[str, Any]:
    """A run that breaks off, and goes on; another is left as it broke off, for one process to go on with."""
    training = Training(**vars(TRAINING) | {"checkpoint_every": 1})
    for place in ("here", "left"):
        try:
            with broken_off(2):
                trained(folder, "bert", "lora", out / place, training=training)
        except KeyboardInterrupt:
            continue
    torch.distributed.barrier()
    model, run = trained(folder, "bert", "lora", out / "here", training=training, resume=True)
    again = fit(model, ROWS, ROWS[::3], training=training, seed=3, out=out / "here", resume=True)
    return {**told(model, run), "again": again.history == run.history}


def command(folder: Path, out: Path) -> str:
    """What the command line prints."""
    from deltaprompt.cli import main

    said = StringIO()
    data = ["--data", str(folder / "rows.csv"), "--dev", str(folder / "rows.csv"), "--test", str(folder / "rows.csv")]
    how = ["--backbone", str(folder / "llama"), "--delta", "lora:rank=2", "--steps", "3", "--checkpointing"]
    sys.argv = ["deltaprompt", "fit", *data, *how, "--seeds", "0,1", "--device", "cpu", "--out", str(out), "--json"]
    with redirect_stdout(said), suppress(SystemExit):
        main()
    return said.getvalue()


def spread_over(folder: Path) -> dict[str, Any]:
    """What a spread backbone keeps here, and what it carries and refuses."""
    model, _ = trained(folder, "llama", "lora", folder / "kept")
    backbone, whole = model.backbone, load(folder / "llama", device="cpu")
    numbers = sum(p.to_local().numel() for p in backbone.model.model.layers.parameters())
    same = backbone.fingerprint == whole.fingerprint
    model.adapted.remove()
    again = model_on(backbone, "dora")  # which starts from the weights that it finds
    start = float(next(p for n, p in again.parts() if n.endswith("magnitude")).detach().sum())
    run = fit(again, ROWS, training=Training(steps=1))
    try:
        again.adapted.merge()
    except SiteError as error:
        refused = str(error)
    asked = model_on(load(folder / "llama", device="cpu"), "lora")
    spread(asked.backbone.model, torch.device("cpu"), asked.backbone.fingerprint)
    asked.predict(["a film"])  # in inference mode, before anything has a gradient
    return {
        "asked": told(asked, fit(asked, ROWS, ROWS[::3], training=TRAINING, seed=3)),
        "share": numbers / sum(p.numel() for p in whole.model.model.layers.parameters()),
        "same": same and is_spread(backbone.model),
        "again": run.steps == 1,
        "start": start,
        "refused": refused,
    }


# What they found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backbones and the rows on the disk."""
    folder = tmp_path_factory.mktemp("distributed")
    for family in FAMILIES:
        backbone = backbones_zoo.build(family)
        backbone.model.save_pretrained(folder / family)
        backbone.tokenizer.save_pretrained(folder / family)
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((e.fields["text"], e.label) for e in ROWS)])
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What the two processes found."""
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root / "src"), str(root)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        __file__,
        str(folder),
    ]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"two processes did not end within {LIMIT} s: {process.communicate()[0][-4000:]}")
    assert process.returncode == 0, said[-4000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


ways = pytest.mark.parametrize("way", ["whole", "spread"])


def close(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Losses and scores to 1e-6."""
    pairs = zip(sum(found["losses"], found["says"]), sum(expected["losses"], expected["says"]), strict=True)
    return found["dev"] == expected["dev"] and all(abs(a - b) < 1e-6 for a, b in pairs)


@ways
@pytest.mark.parametrize(("family", "name"), CASES)
def test_two_processes_learn_what_one_learns(family, name, way, found, folder):
    here, there = (each[way][f"{family} {name}"] for each in found)
    assert here == there
    assert close(here, told(*trained(folder, family, name)))


@ways
def test_a_run_of_two_processes_goes_on_in_two_or_in_one(way, found, folder):
    uninterrupted = told(*trained(folder, "bert", "lora"))
    for each in found:
        assert close(each[way]["resumed"], uninterrupted)
        assert each[way]["resumed"]["again"]  # a run that is finished is not trained again
    training = Training(**vars(TRAINING) | {"checkpoint_every": 1})
    left = folder / way / "left"
    assert [path.name for path in (left / "checkpoint").iterdir()] == ["step-2"]
    assert close(told(*trained(folder, "bert", "lora", left, training=training, resume=True)), uninterrupted)
    assert {path.name for path in (folder / way / "here").iterdir()} == {store.JSON, store.TENSORS}


@ways
def test_the_command_line_speaks_and_writes_once(way, found, folder):
    said, silent = (each[way]["command"] for each in found)
    result = json.loads(said)
    assert silent == ""
    assert result["seeds"] == [0, 1]
    out = folder / way / "cli"
    opened = open_(out / "seed-0", device="cpu")
    assert opened.evaluate(ROWS) == store.describe(out / "seed-0")["metrics"]["test"]
    assert result["test"]["accuracy"]["each"][0] == opened.evaluate(ROWS)["accuracy"]


def test_what_is_spread_is_a_half_in_each_and_saved_as_if_whole(found, folder):
    model, _ = trained(folder, "llama", "lora")
    magnitude = next(p for n, p in model_on(load(folder / "llama", device="cpu"), "dora").parts() if "magnitude" in n)
    for each in found:
        assert each["spread"]["share"] == pytest.approx(0.5, abs=0.02)
        assert each["spread"]["same"]
        assert each["spread"]["again"]
        assert each["spread"]["asked"] == each["spread"]["llama lora"]
        assert each["spread"]["start"] == pytest.approx(float(magnitude.detach().sum()), abs=1e-4)
        assert "the backbone is spread over processes, each of which has a share" in each["spread"]["refused"]
    opened = open_(folder / "kept", device="cpu")
    texts = [e.fields["text"] for e in ROWS]
    for a, b in zip(opened.predict(texts), model.predict(texts), strict=True):
        assert a["scores"]["good"] == pytest.approx(b["scores"]["good"], abs=1e-6)


def test_some_deltas_share_tensors():
    """So that the deltas above hold every way in which tensors are kept."""
    backbone = backbones_zoo.build("bert")
    shared = [name for name in DELTAS if isinstance(made(name), Shared)]
    assert all(dict(Adapted(backbone, [made(name)]).commons[0].tensors) for name in shared)
    assert shared


def test_what_cannot_be_spread_is_refused():
    for model, reason in (
        (torch.nn.Linear(2, 2), "it has no layers"),
        (backbones_zoo.build("bert").model, "quantised"),
    ):
        for p in model.parameters():
            p.requires_grad_(False)
        if reason == "quantised":
            next(model.parameters()).data = torch.zeros(2, dtype=torch.int8)
        with pytest.raises(ConfigError, match=rf"cannot be spread over processes \(FSDP\): .*{reason}.* Train it with"):
            spread(model, torch.device("cpu"), "")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
