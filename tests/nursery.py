"""Children of a process that has loaded the libraries, and no model: each runs one command and dies, or fails, as told.

Forking costs milliseconds where importing torch costs seconds. Run as a script, this reads orders as lines of JSON and
answers each with one: `Nursery` is the side that gives them. In a child every call by which a command changes the disk
below its working directory is a step, and the moments before and after each are `gaps`, numbered from 0. They are found
by watching, so a step that is new is a gap that is new.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import gc
import importlib
import io
import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOM = 1 << 20
"""Bytes of a pipe: all that a child says, since it is read when the child has ended."""
DENIABLE = ("open", "write", "close", "fsync", "replace", "mkdir", "sendfile")
"""Steps that a full disk can refuse; removing and locking need no space."""
READS = re.compile(r"\s*(select|with|explain|savepoint|release|pragma(?!\s+journal_mode\s*=))", re.IGNORECASE)
"""Statements that change nothing on disk; savepoints are always inside of a transaction here."""
WRITES = re.compile(r"\s*(begin|insert|update|delete|create|alter|drop|reindex|commit)\b", re.IGNORECASE)
FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def say_little() -> None:
    """Models say one token and begin with nothing, in this process: half of a tiny run's time."""
    from editctl.engine import prompts, speak

    for module, name, value in ((speak, "NEW_TOKENS", 1), (prompts, "CONTEXT_OPENINGS", ())):
        setattr(module, name, value)


# ---------------------------------------------------------------------------------------------------------------------
# In a child


class Watch:
    """Sees every step by which this process changes the disk below a folder.

    Args:
        told: where the gaps are written, one a line, for whoever reads after this process died.
        kill: the number of the gap at which this process sends itself a signal.
        signal: which; SIGKILL by default.
        deny: the number of the step, of those a full disk can refuse, that is refused for want of space.
    """

    def __init__(
        self,
        folder: Path,
        told: int,
        *,
        kill: int | None = None,
        signal: int = signal.SIGKILL,
        deny: int | None = None,
    ) -> None:
        self.folder = os.path.realpath(folder)
        self._told, self._kill, self._signal, self._deny = told, kill, signal, deny
        self._gaps = self._deniable = 0
        self._inside = threading.local()
        self._open, self._os_open, self._connect = io.open, os.open, sqlite3.connect

    def start(self) -> None:
        """Replace the calls by which files are changed."""
        replaced = ((builtins, "open", self._opened), (io, "open", self._opened), (os, "open", self._os_opened))
        for module, name, call in (*replaced, (sqlite3, "connect", self._connected)):
            setattr(module, name, call)
        for name in ("replace", "rename", "unlink", "remove", "mkdir", "truncate"):
            setattr(os, name, self._on_path(name, getattr(os, name)))
        for module, name in ((os, "fsync"), (os, "sendfile"), (fcntl, "flock")):
            setattr(module, name, self._on_file(name, getattr(module, name)))
        sys.addaudithook(self._audit)

    def name(self, path: Any) -> str:
        """A path below the folder, numbers and hashes left away; empty for any other."""
        if isinstance(path, int):
            with suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{path}")
        try:
            full = os.path.realpath(os.fsdecode(path))
        except (TypeError, ValueError):
            return ""
        if full != self.folder and not full.startswith(self.folder + os.sep):
            return ""
        return re.sub(r"[0-9a-f]{32}|(?<=\.)\d+(?=\.)", "#", os.path.relpath(full, self.folder))

    def gap(self, text: str) -> None:
        """A moment between two changes of the disk."""
        self._gaps += 1
        if self._gaps - 1 == self._kill:
            os.kill(os.getpid(), self._signal)
        self._tell(text)

    def _tell(self, text: str) -> None:
        os.write(self._told, f"{time.perf_counter()} {text}\n".encode())

    @contextmanager
    def step(self, kind: str, name: str, refuse: Callable[[], None] | None = None) -> Iterator[None]:
        """One change of the disk."""
        if getattr(self._inside, "deep", False):
            yield
            return
        self._inside.deep = True
        try:
            self.gap(f"before {kind} {name}")
            if kind in DENIABLE:
                self._deniable += 1
                if self._deniable - 1 == self._deny:
                    if refuse is not None:
                        refuse()
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            yield
            self.gap(f"after {kind} {name}")
        finally:
            self._inside.deep = False

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """A call that changes nothing."""
        deep, self._inside.deep = getattr(self._inside, "deep", False), True
        try:
            yield
        finally:
            self._inside.deep = deep

    def _on_path(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, *others: Any, **named: Any) -> Any:
            place = self.name(others[0] if kind in ("replace", "rename") else path)
            if not place:
                return call(path, *others, **named)
            in_vain = os.path.lexists(path) == (kind == "mkdir")
            with self._aside() if in_vain else self.step(kind, place):
                return call(path, *others, **named)

        return watched

    def _on_file(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(file: Any, *others: Any) -> Any:
            place = self.name(file if isinstance(file, int) else file.fileno())
            if not place:
                return call(file, *others)
            with self.step(kind, place):
                return call(file, *others)

        return watched

    def _opened(self, file: Any, mode: str = "r", *others: Any, **named: Any) -> Any:
        place = self.name(file) if set(mode) & set("wax+") and not isinstance(file, int) else ""
        if not place:
            return self._open(file, mode, *others, **named)
        with self.step("open", place):
            return _File(self._open(file, mode, *others, **named), self, place)

    def _os_opened(self, path: Any, flags: int, *others: Any, **named: Any) -> int:
        place = self.name(path) if flags & FLAGS else ""
        if not place:
            return self._os_open(path, flags, *others, **named)
        in_vain = os.path.lexists(path) and not flags & os.O_TRUNC
        with self._aside() if in_vain else self.step("open", place):
            return self._os_open(path, flags, *others, **named)

    def _connected(self, database: Any, *others: Any, **named: Any) -> sqlite3.Connection:
        path = re.sub(r"^file://|\?.*$", "", str(database))
        place = self.name(path) if path != ":memory:" else ""
        connection: _Connection = self._connect(database, *others, factory=_Connection, **named)
        if place:
            connection.watch, connection.place = self, place
            connection.set_trace_callback(self._traced)
        return connection

    def _traced(self, statement: str) -> None:
        if WRITES.match(statement) and not getattr(self._inside, "deep", False):
            self.gap(f"unwatched {statement[:60]}")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """What Python itself reports of changes, held against what was watched."""
        if getattr(self._inside, "deep", False):
            return
        changing = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate", "os.link", "os.symlink")
        if event == "open":
            changing = isinstance(arguments[2], int) and bool(arguments[2] & FLAGS)
        if changing and (place := self.name(arguments[0])):
            self._tell(f"unwatched {event} {place}")


class _File:
    """A file that is written."""

    def __init__(self, file: Any, watch: Watch, place: str) -> None:
        self._file, self._watch, self._place = file, watch, place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        with self._watch.step("write", self._place, half):
            half()
            self._watch.gap(f"half of write {self._place}")
            rest = self._file.write(data[len(data) // 2 :])
            self._file.flush()
            return len(data) // 2 + rest

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            with self._watch.step("close", self._place):
                self._file.close()
        finally:
            self._file.close()


class _Connection(sqlite3.Connection):
    """A connection whose changes are steps; closing one that only read is none."""

    watch: Watch | None = None
    place = ""
    wrote = False

    def _step(self, text: str) -> AbstractContextManager[None]:
        if re.match(r"pragma query_only\s*=\s*on", text):
            self.watch = None
            self.set_trace_callback(None)
        if self.watch is None or READS.match(text):
            return nullcontext()
        self.wrote = True
        kind, _, rest = " ".join(text.split()).partition(" ")
        return self.watch.step(kind.lower(), f"{re.sub(r'[0-9a-f]{12,}', '#', rest)[:60]} in {self.place}".strip())

    def execute(self, sql: str, *others: Any) -> sqlite3.Cursor:
        with self._step(sql):
            return super().execute(sql, *others)

    def executemany(self, sql: str, *others: Any) -> sqlite3.Cursor:
        with self._step(sql):
            return super().executemany(sql, *others)

    def executescript(self, sql: str) -> sqlite3.Cursor:
        with self._step(sql):
            return super().executescript(sql)

    def commit(self) -> None:
        with self._step("commit"):
            super().commit()

    def backup(self, target: sqlite3.Connection, **named: Any) -> None:
        with target._step("backup") if isinstance(target, _Connection) else nullcontext():
            super().backup(target, **named)

    def close(self) -> None:
        with self._step("disconnect") if self.wrote else nullcontext():
            super().close()


def _live(order: dict[str, Any], out: int, err: int, told: int) -> NoReturn:
    """What a child does."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    code = 70
    try:
        os.chdir(order["folder"])
        if (size := order.get("file_size")) is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        exec(order.get("before", ""), {"__name__": "nursery"})
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        options = {name: order[name] for name in ("kill", "signal", "deny") if name in order}
        Watch(Path(order["folder"]), told, **options).start()
        sys.argv = ["editctl", *order["arguments"]]
        from editctl.cli import main

        try:
            exec(order["code"], {"__name__": "nursery"}) if "code" in order else main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        if order.get("modules"):
            print(json.dumps(sorted(sys.modules)))
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# The process they come from


def _bear(order: dict[str, Any]) -> dict[str, Any]:
    """Run one command in a child and tell what it left."""
    pipes = [os.pipe() for _ in range(3)]
    for reading, writing in pipes:
        fcntl.fcntl(writing, 1031, ROOM)  # F_SETPIPE_SZ, which has no name before Python 3.10
        os.set_blocking(reading, False)
    heard = [b"", b"", b""]

    def listen(pipe: int) -> None:
        with suppress(BlockingIOError):
            while part := os.read(pipes[pipe][0], ROOM):
                heard[pipe] += part

    begun = time.perf_counter()
    child = os.fork()
    if child == 0:
        _live(order, *(writing for _, writing in pipes))
    if (after := order.get("after")) is not None:
        since = None if "since" in order else begun
        while since is None and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.0003)
            listen(2)
            lines = (line.decode().split(" ", 1) for line in heard[2].splitlines())
            since = next((float(at) for at, text in lines if order["since"] in text), None)
        time.sleep(max(0.0, (since or 0.0) + after - time.perf_counter()))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - begun
    for pipe, ends in enumerate(pipes):
        os.close(ends[1])
        listen(pipe)
        os.close(ends[0])
    out, err, told = (text.decode() for text in heard)
    gaps = [line.split(" ", 1) for line in told.splitlines()]
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": out,
        "err": err,
        "gaps": [text for _, text in gaps],
        "times": [float(at) - begun for at, _ in gaps],
        "seconds": seconds,
    }


def _serve(orders: Any, answers: Any) -> None:
    import torch

    # Threads would not live on in children.
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    importlib.import_module("editctl.engine.run")
    say_little()
    for line in orders:
        order = json.loads(line)
        for name in order.get("load", ()):
            with suppress(Exception):
                importlib.import_module(name)
        # What is there now is never looked at again by the collector, so its pages stay shared.
        gc.freeze()
        alone = len(os.listdir("/proc/self/task")) == 1
        answer = {"alone": alone, **(_bear(order) if "arguments" in order else {})}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


# ---------------------------------------------------------------------------------------------------------------------
# The side that gives orders


@dataclass(frozen=True)
class Ended:
    """What a child left."""

    code: int
    """Its exit code, or minus the signal that killed it."""
    out: str
    err: str
    gaps: tuple[str, ...]
    """The gaps it came to."""
    times: tuple[float, ...]
    """When it came to each, in seconds."""
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Nursery:
    """The process that children come from, on call."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        answer = json.loads(self._process.stdout.readline())
        assert answer.pop("alone"), "a process with threads must not be forked"
        return dict(answer)

    def load(self, modules: Sequence[str]) -> None:
        """Import what children would import, once."""
        self._ask({"load": list(modules)})

    def run(self, folder: Path, *arguments: str, **order: Any) -> Ended:
        """Run a command of editctl in a folder.

        Args:
            order: `kill`: the gap to die at, by `signal`, SIGKILL unless told. `after`: seconds to be killed after,
                counted from the first gap whose name holds `since`, or from its birth. `deny`: the step that finds the
                disk full. `file_size`: most bytes of a file. `before`: code to run first. `code`: what to run instead
                of a command.
        """
        answer = self._ask({"folder": str(folder), "arguments": arguments, **order})
        return Ended(**{**answer, "gaps": tuple(answer["gaps"]), "times": tuple(answer["times"])})

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)
