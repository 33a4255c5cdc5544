"""A training run that is killed at any point, again and again, ends with the very bytes of one that was not.

The kills are real (SIGKILL). A server process, this module run by itself, has everything imported and forks a child for
every run, so that a kill costs a fraction of a second; `DELTAPROMPT_KILLS` sets their number.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaprompt import store
from deltaprompt.deltas.lora import LoRA
from deltaprompt.errors import ConfigError
from deltaprompt.model import Task, adapt
from deltaprompt.trainer import Run, Training, fit
from deltaprompt.types import Example
from deltaprompt.verbalizers.soft import SoftVerbalizer
from tests import backbones_zoo

KILLS = int(os.environ.get("DELTAPROMPT_KILLS", "24"))
WORDS = {"good": ("great",), "bad": ("terrible",)}
TEXTS = {
    "good": ["a great movie", "a good film", "great plot", "a great film", "good acting"],
    "bad": ["terrible acting", "a bad film", "terrible movie", "bad plot", "a terrible bad movie"],
}
TRAIN = [Example({"text": text}, label) for label, texts in TEXTS.items() for text in texts]
TRAINING = Training(epochs=4, batch_size=2, accumulate=2, learning_rate=1e-2)  # 3 steps an epoch, the last of one batch


def run(out: Path, resume: bool, training: Training = TRAINING, backbone: Any = None, **changed: Any) -> Run:
    """One run on a tiny model with dropout in its delta."""
    backbone = backbone or backbones_zoo.build("bert")
    task = Task("{text} It was {mask}.", WORDS, SoftVerbalizer())
    model = adapt(backbone, task, [LoRA(rank=2, dropout=changed.pop("dropout", 0.3))])
    options = {"train": TRAIN, "dev": TRAIN[::3], "seed": 5} | changed
    train, dev = options.pop("train"), options.pop("dev")
    try:
        return fit(model, train, dev, training=training, out=out, resume=resume, **options)
    finally:
        model.adapted.remove()


def result(out: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the tensors that a finished run left, and its record without the times."""
    record, _ = store.read(out)
    assert record["training"]["finished"]
    assert sorted(path.name for path in out.iterdir()) == [store.JSON, store.TENSORS]
    told = {name: value for name, value in record["training"]["run"].items() if name != "seconds"}
    return (out / store.TENSORS).read_bytes(), told


# The server


def serve() -> None:
    """For every line of JSON forks a child that runs, kills it in time, and answers with how it ended."""
    torch.set_num_threads(1)
    backbone = backbones_zoo.build("bert")
    import accelerate  # noqa: F401
    import sklearn.metrics  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                die_at(asked["operation"])
                run(Path(asked["out"]), asked["resume"], backbone=backbone)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if asked["after"] is not None:
            killer = threading.Timer(asked["after"], os.kill, (child, signal.SIGKILL))
            killer.start()
        begun = time.perf_counter()
        _, status = os.waitpid(child, 0)
        if asked["after"] is not None:
            killer.cancel()
            killer.join()
        print(
            json.dumps({"killed": os.WIFSIGNALED(status), "status": status, "seconds": time.perf_counter() - begun}),
            flush=True,
        )


def die_at(operation: int | None) -> None:
    """This process kills itself as it begins the file operation of that number."""
    left = [operation]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and "killed" in str(args[0])
        if left[0] is None or not (opened or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")):
            return
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


class Server:
    """The other end of `serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, out: Path, resume: bool, after: float | None = None, operation: int | None = None) -> dict[str, Any]:
        """Runs in `out`, killed after so many seconds, or at the file operation of that number."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(
            json.dumps({"out": str(out), "resume": resume, "after": after, "operation": operation}) + "\n"
        )
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert answer["killed"] or answer["status"] == 0
        return answer


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    command = [sys.executable, "-W", "error", "-m", "tests.recipes.test_resume"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Server(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def reference(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[bytes, dict[str, Any]], float]:
    """What an undisturbed run leaves, and how long it takes."""
    out = tmp_path_factory.mktemp("reference")
    seconds = server.ask(out, resume=False)["seconds"]
    return result(out), seconds


def opens(out: Path) -> None:
    """What is saved so far, if anything, is whole."""
    if store.holds_adaptation(out):
        store.read(out)


def test_killed_at_random_times(server: Server, reference: Any, tmp_path: Path) -> None:
    expected, seconds = reference
    chance, kills, number = random.Random(0), 0, 0
    while kills < KILLS:
        out = tmp_path / f"killed-{(number := number + 1)}"
        resume = False
        while server.ask(out, resume, after=chance.uniform(0.02, 1.1) * seconds)["killed"]:
            opens(out)
            kills, resume = kills + 1, True
            assert kills < KILLS + 100, "it does not get to the end"
        assert result(out) == expected


def test_killed_at_file_operations(server: Server, reference: Any, tmp_path: Path) -> None:
    expected, _ = reference
    chance, operations = random.Random(1), [1]
    whole = tmp_path / "killed"
    step = 64
    while server.ask(whole, resume=False, operation=step)["killed"]:
        step *= 2
    operations = sorted(chance.sample(range(1, step), min(KILLS, step - 1)))
    killed = 0
    for operation in operations:
        out = tmp_path / f"killed-{operation}"
        if server.ask(out, resume=False, operation=operation)["killed"]:
            killed += 1
            opens(out)
            server.ask(out, resume=True, operation=operation // 3 + 1)  # and once more, on the way back
            opens(out)
            server.ask(out, resume=True)
        assert result(out) == expected
    assert killed > len(operations) // 3


# What resume means, in this process


@pytest.fixture
def broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a run was broken off in its third epoch."""
    from deltaprompt.trainer import loop

    plain = loop.Loop._one_step

    def one_step(self: loop.Loop, running: Any) -> None:
        if self.made == 8:
            raise KeyboardInterrupt
        plain(self, running)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_one_step", one_step)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", resume=False)
    return tmp_path / "out"


def test_goes_on_from_the_newest_checkpoint(broken_off: Path, tmp_path: Path) -> None:
    assert [path.name for path in (broken_off / "checkpoint").iterdir()] == ["step-6"]
    biggest = max((broken_off / "checkpoint" / "step-6").iterdir(), key=lambda path: path.stat().st_size)
    assert biggest.stat().st_size < 40_000  # no backbone in it
    seen: list[int] = []

    class Told:
        def start(self, total: int, what: str) -> None: ...
        def step(self, step: int, loss: float) -> None:
            seen.append(step)

        def evaluated(self, metrics: Any, best: bool) -> None: ...
        def done(self) -> None: ...

    went_on = run(broken_off, resume=True, progress=Told())
    assert seen == [6, 7, 8, 9, 10, 11, 12]
    whole = run(tmp_path / "whole", resume=True)  # nothing to resume: from the beginning
    assert result(broken_off) == result(tmp_path / "whole")
    assert replace(went_on, seconds=0, bytes=0) == replace(whole, seconds=0, bytes=0)


def test_half_written_checkpoints_are_ignored_and_removed(broken_off: Path) -> None:
    for name in (".part", ".gone"):
        (broken_off / "checkpoint" / name).mkdir()
        (broken_off / "checkpoint" / name / "optimizer.bin").write_bytes(b"half")
    run(broken_off, resume=True)
    result(broken_off)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path, resume=False)
    before = result(tmp_path)
    again = run(tmp_path, resume=True)
    assert again == first
    assert result(tmp_path) == before


def test_without_resume_it_starts_anew(broken_off: Path, tmp_path: Path) -> None:
    run(broken_off, resume=False, seed=6)
    run(tmp_path / "other", resume=False, seed=6)
    assert result(broken_off) == result(tmp_path / "other")


@pytest.mark.parametrize("finished", [False, True], ids=["broken off", "finished"])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"training": replace(TRAINING, learning_rate=2e-2)}, "learning_rate was 0.01 and is now 0.02"),
        ({"seed": 6}, "seed was 5 and is now 6"),
        ({"train": TRAIN[1:]}, "train was 10 examples"),
        ({"dev": None}, "and is now 0 examples"),
        ({"dropout": 0.0}, "deltas was"),
    ],
    ids=["rate", "seed", "train", "dev", "delta"],
)
def test_other_settings_are_refused(broken_off: Path, changed: dict[str, Any], told: str, finished: bool) -> None:
    if finished:
        run(broken_off, resume=True)
    with pytest.raises(ConfigError, match="cannot go on with the run in") as e:
        run(broken_off, **({"resume": True} | changed))
    assert told in str(e.value)
    assert "Set it back, or start without resume" in str(e.value)
    assert str(e.value).count(" was ") == 1


def test_how_often_checkpoints_are_written_may_change(broken_off: Path, tmp_path: Path) -> None:
    run(broken_off, resume=True, training=replace(TRAINING, checkpoint_every=1))
    run(tmp_path / "whole", resume=False)
    assert result(broken_off) == result(tmp_path / "whole")


if __name__ == "__main__":
    serve()
