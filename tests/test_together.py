"""Several processes at one store: those that write do so one after another and lose nothing, those that read neither
wait nor see anything half done.

Run as a script this file is the process that they come from: it has loaded the libraries, so that a child, which is a
fork of it, begins with its command and not with importing torch.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest

PATIENCE = float(os.environ.get("EDITCTL_TIME_FACTOR", "1"))
SLOWEST = 5.0 * PATIENCE
"""Seconds a reading may take on a machine whose cores are all taken; alone it takes hundredths."""
CONFIGURATION = """model = {model}
store = "store"
[settings]
layers = [1, 2]
steps = 4
energy = 0.2
corpus = {corpus}
corpus_tokens = 3000
"""
SPEC = """version = 1
[[edit]]
id = "fact-{number}"
subject = "Subject {number}"
relation = "{{}} lies in the city of"
target_new = "Rome"
"""

# ---------------------------------------------------------------------------------------------------------------------
# The process that children come from


def _said(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit code and output of a command in this process."""
    from editctl.cli import main

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["editctl", *arguments]
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            import traceback

            code = 70
            traceback.print_exc()
    return code, out.getvalue(), err.getvalue()


def _note_locks(held: list[tuple[float, float]]) -> None:
    """Note from when to when this process holds the lock of a store."""
    from editctl.store.connection import Connection

    take = Connection.lock

    @contextlib.contextmanager
    def noted(self: Connection, *arguments: Any, **named: Any) -> Iterator[None]:
        again = self._holder is not None
        with take(self, *arguments, **named):
            since = time.perf_counter()
            try:
                yield
            finally:
                if not again:
                    held.append((since, time.perf_counter()))

    Connection.lock = noted  # type: ignore[method-assign]


def _write(order: dict[str, Any], start: int) -> dict[str, Any]:
    """Run a command as soon as all may, or as soon as a file is there."""
    held: list[tuple[float, float]] = []
    _note_locks(held)
    os.read(start, 1)
    while order["after"] and not Path(order["after"]).exists():
        time.sleep(0.001)
    code, out, err = _said(order["arguments"])
    return {"code": code, "out": out, "err": err, "pid": os.getpid(), "held": held}


def _read(order: dict[str, Any], stop: Path) -> list[dict[str, Any]]:
    """Run the commands in turn until told to stop, then once more."""
    readings = []
    last = False
    while not last:
        last = stop.exists()
        for arguments in order["read"]:
            begun = time.perf_counter()
            code, out, err = _said(arguments)
            ended = time.perf_counter()
            readings.append({"verb": arguments[0], "code": code, "out": out, "err": err, "when": (begun, ended)})
            # So that those who write have a core to themselves.
            time.sleep(0.05)
    return readings


def _child(order: dict[str, Any], number: int, start: int, stop: Path) -> NoReturn:
    code = 1
    try:
        result = _read(order, stop) if "read" in order else _write(order, start)
        Path(f"child-{number}.json").write_text(json.dumps(result), encoding="utf-8")
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _crowd(folder: str, orders: Sequence[dict[str, Any]]) -> list[Any]:
    """Carry out all orders at once, each in a child; readers stop when the last writer has ended."""
    os.chdir(folder)
    stop = Path(folder) / "stop"
    waiting, starting = os.pipe()
    children: dict[int, int] = {}
    for number, order in enumerate(orders):
        child = os.fork()
        if child == 0:
            os.close(starting)
            _child(order, number, waiting, stop)
        children[child] = number
    os.close(waiting)
    # Every child that waits for a byte now comes to the end of the pipe.
    os.close(starting)
    writers = {child for child, number in children.items() if "read" not in orders[number]}
    for child in sorted(writers) + sorted(children.keys() - writers):
        _, status = os.waitpid(child, 0)
        assert status == 0, f"child {children[child]} ended with {status}"
        writers.discard(child)
        if not writers:
            stop.touch()
    return [json.loads(Path(f"child-{number}.json").read_text(encoding="utf-8")) for number in range(len(orders))]


def _serve(model: str) -> None:
    import torch

    # Threads would not live on in children.
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    from editctl import cli, report
    from editctl.engine import model as model_room
    from editctl.engine import prompts, run, speak, wear
    from editctl.store import care

    assert cli and report and run and wear and care
    speak.NEW_TOKENS, prompts.CONTEXT_OPENINGS = 1, ()
    model_room.load(model, device="cpu")
    for line in sys.stdin:
        gc.freeze()
        assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
        print(json.dumps(_crowd(**json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
    raise SystemExit


# ---------------------------------------------------------------------------------------------------------------------
# The side of the tests


class Crowds:
    """Runs orders in a process of its own, on call."""

    def __init__(self, model: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, str(model)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )

    def __call__(self, folder: Path, orders: Sequence[dict[str, Any]]) -> list[Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"folder": str(folder), "orders": orders}) + "\n")
        answer = self._process.stdout.readline()
        assert answer, "the process that children come from has ended"
        return list(json.loads(answer))

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def crowd(folders: dict[str, Path]) -> Iterator[Crowds]:
    if not hasattr(os, "fork") or not Path("/proc/self/task").is_dir():
        pytest.skip("children are forked, and threads counted, as Linux does it")
    made = Crowds(folders["llama"])
    yield made
    made.close()


@pytest.fixture
def place(tmp_path: Path, folders: dict[str, Path], corpus: Path) -> Path:
    """A workspace on the tiny Llama whose store was never written."""
    text = CONFIGURATION.format(model=json.dumps(str(folders["llama"])), corpus=json.dumps(str(corpus)))
    (tmp_path / "editctl.toml").write_text(text, encoding="utf-8")
    for number in range(8):
        (tmp_path / f"{number}.toml").write_text(SPEC.format(number=number), encoding="utf-8")
    return tmp_path


def a_draft() -> Any:
    """A version of nothing."""
    from editctl.store import Draft

    named: dict[str, Any] = {"parent": "", "base": "b", "model": "m", "dtype": "d", "method": "m", "weights_hash": "w"}
    empty: dict[str, Any] = {"params": {}, "libraries": {}, "seconds": {}}
    return Draft(**named, **empty, seed=0, peak_mb=0.0, edits=())


READER = {"read": [["log", "--json"], ["show", "--json"]]}


def applying(number: int, *flags: str, after: str = "") -> dict[str, Any]:
    """The order to apply one of the specs."""
    return {"arguments": ["apply", f"{number}.toml", "--yes", *flags], "after": after}


def lines_of(text: str, kind: str) -> list[Any]:
    """The JSON lines of a kind."""
    return [line for line in map(json.loads, text.splitlines()) if line["type"] == kind]


def assert_whole(place: Path, folders: dict[str, Path], numbers: set[int]) -> Any:
    """Just these edits are live, each brought by the version and the operation after the one before, nothing is wrong,
    and all weights can be rebuilt; the versions, oldest first."""
    from editctl.engine.model import load
    from editctl.engine.wear import rebuild_all
    from editctl.events import silent
    from editctl.store import Store, care

    store = Store(place / "store")
    versions, operations = store.versions()[::-1], store.operations()[::-1]
    names = ["", *(version.id for version in versions)]
    assert [version.parent for version in versions] == names[:-1]
    assert [(op.id, op.verb, op.head_before, op.head) for op in operations] == [
        (number, "apply", *pair) for number, pair in enumerate(itertools.pairwise(names), 1)
    ]
    assert {live.id for live in store.edits(store.head())} == {f"fact-{number}" for number in numbers}
    assert [len(store.edits(version)) for version in versions] == list(range(1, len(versions) + 1))
    assert len(versions) == len(numbers)
    assert care.inspect(store) == []
    assert rebuild_all(load(str(folders["llama"]), device="cpu"), store, versions, silent) == {}
    return versions


def assert_apart(held: Sequence[Sequence[float]]) -> None:
    """No two held the lock at the same time."""
    times = sorted(map(tuple, held))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(times)), times


def assert_read(readings: Sequence[Any], versions: Sequence[Any], held: Sequence[Sequence[float]]) -> None:
    """All readings succeeded, soon, while others wrote, and each found the store as it was after some operation."""
    assert [reading for reading in readings if reading["code"] or reading["err"]] == []
    assert max(ended - begun for begun, ended in (reading["when"] for reading in readings)) < SLOWEST
    meanwhile = [r for r in readings if any(a <= r["when"][0] and r["when"][1] <= b for a, b in held)]
    assert len(meanwhile) >= 2 * len(held), "readers wait for nobody who writes"
    names = ["", *(version.id for version in versions)]
    seen = []
    for reading in readings:
        if reading["verb"] == "log":
            operations = lines_of(reading["out"], "operation")
            assert [operation["id"] for operation in operations] == list(range(len(operations), 0, -1))
            assert [operation["head"] for operation in operations] == names[len(operations) : 0 : -1]
            seen.append(len(operations))
        else:
            (record,) = lines_of(reading["out"], "record")
            seen.append(names.index(record["id"]))
            assert len(lines_of(reading["out"], "edit")) == seen[-1]
    assert seen == sorted(seen) and seen[-1] == len(versions)


@pytest.mark.parametrize("writers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_that_apply_at_once_wait_for_each_other(
    crowd: Crowds, place: Path, folders: dict[str, Path], writers: int
) -> None:
    """With patience all of them end well, whoever comes first; two read all the while, from before the first commit."""
    orders = [READER, READER, *(applying(number, "--lock-timeout", "120") for number in range(writers))]
    first, second, *written = crowd(place, orders)
    assert [one["code"] for one in written] == [0] * writers, [one["err"] for one in written]
    versions = assert_whole(place, folders, set(range(writers)))
    assert {one["out"].split()[-1] for one in written} == {version.id for version in versions}
    held = [when for one in written for when in one["held"]]
    assert len(held) == writers
    assert_apart(held)
    for readings in (first, second):
        assert_read(readings, versions, held)


def test_a_store_is_not_wrong_because_somebody_writes(crowd: Crowds, place: Path) -> None:
    """`verify` finds nothing while a run has written files that no version names yet; its last reading is after it."""
    flags = ("--yes", "--set", "batch_size=1", "--set", "steps=20")
    writer = {"arguments": ["apply", *(f"{number}.toml" for number in range(8)), *flags], "after": ""}
    readings, written = crowd(place, [{"read": [["verify", "--no-rebuild", "--json"]]}, writer])
    ((since, until),) = written["held"]
    meanwhile = [r for r in readings if since <= r["when"][0] and r["when"][1] <= until]
    assert written["code"] == 0 and len(meanwhile) > 3
    assert [reading for reading in readings if reading["code"] or reading["err"]] == []


def test_a_writer_waits_for_whoever_holds_the_database_for_a_moment(tmp_path: Path) -> None:
    """As a reader does that is the first to open it: a run of hours must not end there."""
    from editctl.store import Store

    store = Store(tmp_path)
    store.commit(a_draft(), expected_head="")
    other = sqlite3.connect(store.database, isolation_level=None, check_same_thread=False)
    other.execute("begin immediate")
    timer = threading.Timer(0.3, lambda: other.execute("rollback"))
    timer.start()
    operation = store.undo()
    timer.join()
    other.close()
    assert operation.id == 2 and store.head() is None


HOLDER = re.compile(r"the store is being changed by `apply` of (\S+@\S+) \(pid (\d+)\) since (\S+)")


@pytest.mark.parametrize("writers", [2, 8])
def test_processes_without_patience_say_who_holds_the_store(
    crowd: Crowds, place: Path, folders: dict[str, Path], writers: int
) -> None:
    """Who comes while another writes ends with exit code 3, names the holder, and leaves no trace."""
    from editctl.store import Store, user_at_host

    first = applying(0, "--set", "steps=60")
    orders = [first, *(applying(number, after="store/lock.json") for number in range(1, writers))]
    written = crowd(place, orders)
    winners = {number for number, one in enumerate(written) if one["code"] == 0}
    losers = [one for one in written if one["code"] == 3]
    assert len(winners) + len(losers) == writers and 0 in winners and losers
    pids = {written[number]["pid"] for number in winners}
    for one in losers:
        found = HOLDER.search(one["err"])
        assert found, one["err"]
        assert found[1] == user_at_host() and int(found[2]) in pids
        assert datetime.fromisoformat(found[3]).tzinfo is not None
        assert "--lock-timeout" in one["err"] and one["out"] == ""
    versions = assert_whole(place, folders, winners)
    assert {version.id for version in versions} == {written[number]["out"].split()[-1] for number in winners}
    assert [path.name for path in Store(place / "store").root.glob("*.json")] == []
