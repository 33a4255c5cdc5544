"""The store: what is written is read, every damage has its message, and no crash leaves half an adaptation."""

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltaprompt import store
from deltaprompt.errors import StoreError
from deltaprompt.store import JSON, PENDING, TENSORS, describe, read, write

RECORD = {
    "labels": ["sehr schlecht", "très bon", "很好"],
    "template": 'Text: {text}\n\t"It" was {mask}.',
    "deltas": [{"kind": "lora", "rank": 8, "alpha": 0.1, "at": ["attn.q"]}],
    "training": {"seed": 2**40, "best": None, "done": True, "losses": [1.5, -0.0, 1e-300]},
}
ROOT = Path(__file__).resolve().parents[2]


def weights(version=0.0):
    return {"a": torch.full((3, 2), float(version)), "b.c": torch.arange(5, dtype=torch.float64) + version}


def saved(folder, version=0):
    write(folder, {"version": version, "padding": "x" * (version % 7)}, weights(version))
    return folder


def version_in(folder):
    """The version that a folder holds; the record and the tensors must be of the same."""
    record, tensors = read(folder)
    assert set(tensors) == {"a", "b.c"}
    for name, tensor in weights(record["version"]).items():
        assert torch.equal(tensors[name], tensor)
    return record["version"]


def everything(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


# What is written is read


def test_what_is_written_is_read(tmp_path):
    size = write(tmp_path / "made" / "here", RECORD, weights())
    record, tensors = read(tmp_path / "made" / "here")
    assert {key: record[key] for key in RECORD} == RECORD
    assert record["schema"] == store.SCHEMA
    assert all(torch.equal(tensors[name], t) and tensors[name].dtype == t.dtype for name, t in weights().items())
    assert tensors.keys() == weights().keys()
    assert describe(tmp_path / "made" / "here") == record
    assert everything(tmp_path / "made" / "here") == [JSON, TENSORS]
    assert size == sum(p.stat().st_size for p in (tmp_path / "made" / "here").iterdir())


def test_the_bytes_do_not_depend_on_the_order_of_keys(tmp_path):
    write(tmp_path / "a", RECORD, weights())
    write(tmp_path / "b", dict(reversed(RECORD.items())), dict(reversed(weights().items())))
    for name in (JSON, TENSORS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_tuples_become_lists_and_no_tensors_are_possible(tmp_path):
    write(tmp_path, {"labels": ("a", "b")}, {})
    assert read(tmp_path)[0]["labels"] == ["a", "b"]
    assert read(tmp_path)[1] == {}


def test_views_shared_and_non_contiguous_tensors_are_kept(tmp_path):
    t = torch.arange(12.0).reshape(3, 4)
    given = {"turned": t.T, "row": t[1], "same": t, "bf16": t.bfloat16(), "trained": torch.nn.Parameter(t)}
    write(tmp_path, {}, given)
    assert all(torch.equal(tensor, given[name]) for name, tensor in read(tmp_path)[1].items())


def test_a_later_one_takes_the_place_of_an_earlier_one_beside_other_files(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for version in range(3):
        assert version_in(saved(tmp_path, version)) == version
        assert everything(tmp_path) == [JSON, TENSORS, "checkpoints", "notes.txt"]


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert version_in(saved("here", 4)) == 4
    assert version_in(saved(".", 5)) == 5


# What cannot be stored


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": [0.0, float("nan")]}, r"record\['a'\]\[1\] is nan, which JSON has no form for; store None"),
        ({"a": {"b": float("-inf")}}, r"record\['a'\]\['b'\] is -inf"),
        ({"a": {1: 2}}, r"record\['a'\] has the key 1; only strings are possible"),
        ({"a": torch.zeros(1)}, r"record\['a'\] is a Tensor; possible: text, numbers, bool, None, lists and mappings"),
        ({"a": {"set"}}, r"record\['a'\] is a set; possible"),
        (
            {"schema": 1, "tensors": {}},
            "the store itself writes the keys schema, tensors of a record; give yours",
        ),
        ({"a": "\ud800"}, "a text with half a character in it"),
    ],
)
def test_a_record_that_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path, record, message):
    saved(tmp_path, 7)
    with pytest.raises(StoreError, match=message):
        write(tmp_path, record, {})
    assert version_in(tmp_path) == 7
    assert everything(tmp_path) == [JSON, TENSORS]


@pytest.mark.parametrize("inside", ["", "a/b"])
def test_a_file_in_place_of_a_folder_is_refused(tmp_path, inside):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="cannot be a folder: .*file is a file; give another name, or remove it"):
        write(tmp_path / "file" / inside, RECORD, {})
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_of_the_disk_leaves_what_was_there(tmp_path, monkeypatch):
    saved(tmp_path, 7)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StoreError, match="cannot be written .*No space left.*; mend that and save again, nothing saved is lost"
    ):
        saved(tmp_path, 8)
    assert version_in(tmp_path) == 7
    assert everything(tmp_path) == [JSON, TENSORS]


def test_foreign_files_where_a_save_is_under_way_are_an_error(tmp_path):
    saved(tmp_path, 7)
    (tmp_path / PENDING).mkdir()
    (tmp_path / PENDING / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"\.pending holds files that are not of an adaptation; remove it"):
        saved(tmp_path, 8)
    assert version_in(tmp_path) == 7


# What is wrong has its own message


def test_no_folder_names_the_close_ones(tmp_path):
    saved(tmp_path / "sentiment")
    with pytest.raises(StoreError, match="there is no folder .*sentimnt; did you mean 'sentiment'?"):
        read(tmp_path / "sentimnt")
    with pytest.raises(StoreError, match="there is no folder"):
        describe(tmp_path / "not" / "there")


def test_a_file_is_no_folder(tmp_path):
    saved(tmp_path)
    with pytest.raises(StoreError, match="adaptation.json is a file; give the folder that holds adaptation.json and"):
        read(tmp_path / JSON)


def test_a_folder_without_an_adaptation_says_what_it_holds(tmp_path):
    with pytest.raises(StoreError, match="holds no adaptation, .*; it holds nothing"):
        read(tmp_path)
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(StoreError, match="holds no adaptation, .*; it holds train.csv"):
        read(tmp_path)


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_missing_file_is_named(tmp_path, name):
    (saved(tmp_path) / name).unlink()
    with pytest.raises(StoreError, match=f"lacks {name}, one of the two files of an adaptation. Restore"):
        read(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path):
    (saved(tmp_path) / JSON).unlink()
    (tmp_path / JSON).mkdir()
    with pytest.raises(StoreError, match="adaptation.json cannot be read .*Is a directory"):
        read(tmp_path)


def test_every_truncation_is_found(tmp_path):
    saved(tmp_path)
    for name, message in (
        (JSON, "adaptation.json is damaged"),
        (TENSORS, "safetensors is truncated: it has"),
    ):
        whole = (tmp_path / name).read_bytes()
        for length in range(len(whole)):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(StoreError, match=message):
                read(tmp_path)
        (tmp_path / name).write_bytes(whole + b"\n")
        with pytest.raises(StoreError, match="is damaged or was edited|is not the file that was saved"):
            read(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert version_in(tmp_path) == 0


def test_every_changed_byte_is_found(tmp_path):
    write(tmp_path, RECORD, weights())
    chance = random.Random(0)
    for name, message in ((JSON, "adaptation.json"), (TENSORS, "safetensors is not the file that was saved with")):
        whole = (tmp_path / name).read_bytes()
        for at in range(len(whole)):
            changed = bytearray(whole)
            changed[at] ^= chance.randrange(1, 256)
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(StoreError, match=message):
                read(tmp_path)
        (tmp_path / name).write_bytes(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(": ", ":", 1),
        lambda text: text.replace('"alpha": 0.1', '"alpha": 0.10'),
        lambda text: text.replace('"alpha": 0.1', '"alpha": 1e999'),
        lambda text: text.replace('"alpha": 0.1', '"alpha": NaN'),
        lambda text: text.replace("très", "tr\\u00e8s"),
        lambda text: text.replace("très", "\\ud800"),
        lambda text: text.replace('"rank": 8', '"rank": 9'),
        lambda text: text.replace('"rank": 8', '"rank": 8, "rank": 8'),
        lambda text: text.replace('"rank": 8', f'"rank": {"9" * 5000}'),
        lambda text: text.rstrip(),
        lambda text: "\ufeff" + text,
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: text.replace('"schema": 1', '"schema": true'),
        lambda text: text.replace('"schema": 1', '"schema": "1"'),
    ],
)
def test_an_edited_record_is_found(tmp_path, change):
    write(tmp_path, RECORD, weights())
    text = (tmp_path / JSON).read_text()
    assert change(text) != text
    (tmp_path / JSON).write_text(change(text))
    for reading in (read, describe):
        with pytest.raises(StoreError, match="adaptation.json is damaged or was edited: .* Restore both files"):
            reading(tmp_path)


def test_files_of_two_adaptations_do_not_pass_for_one(tmp_path):
    saved(tmp_path / "a", 1)
    saved(tmp_path / "b", 2)
    shutil.copy(tmp_path / "b" / TENSORS, tmp_path / "a")
    with pytest.raises(StoreError, match="is not the file that was saved with adaptation.json: its sha256 is"):
        read(tmp_path / "a")


def test_a_newer_schema_is_told_from_damage(tmp_path):
    saved(tmp_path)
    stored = json.loads((tmp_path / JSON).read_text()) | {"schema": store.SCHEMA + 1, "new": {}}
    (tmp_path / JSON).write_text(json.dumps(stored))
    with pytest.raises(StoreError, match="has schema 2, and this version of DeltaPrompt knows schemas up to 1. Up"):
        describe(tmp_path)


# No crash leaves half an adaptation

CALLS = ("mkdir", "fsync", "rename", "replace", "rmdir", "unlink")


class Killed(BaseException):
    """Stands for SIGKILL: from the n-th change of the disk on, the process does nothing any more."""


def killed_at(step, monkeypatch, folder, version):
    """Saves, killed before its `step`-th change of the disk (a file not yet synced is half there); whether it was."""
    done = 0

    def counted(name):
        call = (lambda _: None) if name == "fsync" else vars(os)[name]  # real syncs are slow, and change nothing here

        def made(*args, **options):
            nonlocal done
            done += 1
            if done < step:
                return call(*args, **options)
            if done == step and name == "fsync" and stat.S_ISREG(os.fstat(args[0]).st_mode):
                os.truncate(args[0], os.fstat(args[0]).st_size // 2)
            raise Killed

        return made

    with monkeypatch.context() as patched:
        for name, call in {name: counted(name) for name in CALLS}.items():
            patched.setattr(os, name, call)
        try:
            saved(folder, version)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("first", [True, False], ids=["the first save", "a later save"])
def test_a_crash_at_every_step_leaves_the_old_or_the_new(tmp_path, monkeypatch, first):
    seen = []
    for step in range(1, 100):
        folder = tmp_path / str(step)
        if not first:
            saved(folder, 1)
        if not killed_at(step, monkeypatch, folder, 2):
            break
        if first and 2 not in seen and not store.holds_adaptation(folder):
            seen.append(None)
        else:
            seen.append(version_in(folder))
        assert version_in(saved(folder, 3)) == 3
        assert everything(folder) == [JSON, TENSORS]
    assert step < 99
    old = None if first else 1
    assert seen == sorted(seen, key=[old, 2].index), "once the new one is there it stays"
    assert seen.count(old) >= 4
    assert seen.count(2) >= 4


def test_a_crash_while_finishing_an_earlier_crash(tmp_path, monkeypatch):
    committed = next(s for s in range(1, 100) if crashed(tmp_path / f"try {s}", monkeypatch, s) == 2)
    for first in (committed, committed + 2, committed + 3):  # neither, one, both of the files moved into place
        for second in range(1, 100):
            folder = tmp_path / f"{first} {second}"
            assert crashed(folder, monkeypatch, first) == 2
            again = killed_at(second, monkeypatch, folder, 3)
            assert version_in(folder) in (2, 3)
            if not again:
                break
            assert version_in(saved(folder, 4)) == 4
            assert everything(folder) == [JSON, TENSORS]


def test_what_counts_is_on_disk_first(tmp_path, monkeypatch):
    """Both files and their folder before the commit, the commit before the moves: for a power failure."""
    saved(tmp_path)
    events, real = [], {name: vars(os)[name] for name in ("rename", "replace")}

    def synced(handle):
        events.append("file" if stat.S_ISREG(os.fstat(handle).st_mode) else "folder")

    def noted(name):
        return lambda *paths, **options: (events.append(name), real[name](*paths, **options))[1]

    monkeypatch.setattr(os, "fsync", synced)
    for name in real:
        monkeypatch.setattr(os, name, noted(name))
    saved(tmp_path, 1)
    assert events == ["file", "file", "folder", "rename", "folder", "replace", "replace", "folder"]


def crashed(folder, monkeypatch, step):
    saved(folder, 1)
    assert killed_at(step, monkeypatch, folder, 2)
    return version_in(folder)


def test_a_reader_between_the_two_files_tries_again(tmp_path, monkeypatch):
    """A writer that is at work after every file that is read, for some times: the reader gets one whole version."""
    saved(tmp_path, 1)
    real, left = store._current, list(range(2, 9))

    def current(folder, name):
        found = real(folder, name)
        if left and name == JSON:
            saved(folder, left.pop(0))
        return found

    monkeypatch.setattr(store, "_current", current)
    assert version_in(tmp_path) == 8


def test_a_folder_that_is_written_all_the_time_is_an_error(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    real, versions = store._current, iter(range(2, 1000))

    def current(folder, name):
        found = real(folder, name)
        if name == JSON:
            saved(folder, next(versions))
        return found

    monkeypatch.setattr(store, "_current", current)
    monkeypatch.setattr(store, "TRIES", 5)
    with pytest.raises(StoreError, match="is written all the time, so that it cannot be read; wait"):
        read(tmp_path)


def test_a_second_writer_is_told(tmp_path, monkeypatch):
    """One writer finds another's half-made folder, takes it for a dead one's, and removes it."""
    real = store._commit

    def overtaken(new, folder):
        monkeypatch.setattr(store, "_commit", real)
        saved(folder, 9)
        real(new, folder)

    monkeypatch.setattr(store, "_commit", overtaken)
    with pytest.raises(StoreError, match="another process saved in .* at the same time; give each a folder of its own"):
        saved(tmp_path, 8)
    assert version_in(tmp_path) == 9
    assert everything(tmp_path) == [JSON, TENSORS]


PROCESSES = """
import mmap, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from deltaprompt.errors import StoreError
from tests.unit.test_store import saved, version_in

mode, folder, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
done = mmap.mmap(-1, 8)  # the last version that a writer has finished


def forked(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as e:
        print(repr(e), flush=True)
        os._exit(1)
    os._exit(0)


os.fsync = lambda _: None  # slow, and a killed process loses nothing that the kernel has


def write_on():
    version = int.from_bytes(done[:], "little")
    while True:
        version += 1
        saved(folder, version)
        done[:] = version.to_bytes(8, "little")


def write_beside():
    while True:
        try:
            saved(folder, random.randrange(1000))
        except StoreError as e:
            assert "another process" in str(e), e


def read_on():
    end, last = time.monotonic() + times, 0
    while time.monotonic() < end:
        found = version_in(folder)
        assert mode == "beside" or found >= last, (found, last)
        last = found


def stop(pid):
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "it ended by itself"


saved(folder, 0)
chance, advanced = random.Random(0), 0
if mode == "kill":
    for _ in range(times):
        before = done[:]
        writer = forked(write_on)
        while done[:] == before:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.01))
        stop(writer)
        last = int.from_bytes(done[:], "little")
        found = version_in(folder)
        assert found in (last, last + 1), (found, last)
        advanced += found - last
        done[:] = found.to_bytes(8, "little")
    print("versions:", found, "of which committed but not finished:", advanced, flush=True)
else:
    writers = [forked(write_on if mode == "read" else write_beside) for _ in range(1 if mode == "read" else 2)]
    readers = [forked(read_on) for _ in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in readers] == [0, 0]
    for pid in writers:
        stop(pid)
saved(folder, 1_000_000)
assert version_in(folder) == 1_000_000
assert sorted(p.name for p in folder.iterdir()) == ["adaptation.json", "adaptation.safetensors"], list(folder.iterdir())
print("well", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize(
    ("mode", "times"), [("kill", 200), ("read", 2), ("beside", 2)], ids=["killed 200 times", "readers", "two writers"]
)
def test_processes_that_are_killed_or_work_at_once(tmp_path, mode, times):
    """`times` kills, or seconds. After a kill the version is the last that was finished, or the one being written."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-c", PROCESSES, mode, str(tmp_path / "saved"), str(times)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("well\n"), run.stdout
