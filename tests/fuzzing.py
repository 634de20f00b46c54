"""Hostile inputs for the command line, and a judge of what it makes of them.

Run as a program it is a workplace of its own: a process without torch, network, other programs and places to write but
one folder, in which `editctl.cli.main` meets one input after another. Each follows from its seed, kind and number:

    python tests/fuzzing.py --kind line --first 0 --count 100 --seed 1
    python tests/fuzzing.py --kind spec --first 17 --count 1 --show     (input 17 again, and all that was printed)
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.abc
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import click

from editctl.importers.names import NAMES as FORMATS

ROOT = Path(__file__).parents[1]
SAMPLES = Path(os.environ.get("EDITCTL_SAMPLES", ROOT / "../shared/data")) / "malformed"
PATIENCE = 5 * float(os.environ.get("EDITCTL_TIME_FACTOR", "1"))
"""Seconds that one input may take; EDITCTL_TIME_FACTOR stretches it on a busy or slow machine."""
CODES = {0, 1, 2, 3, 4, 5, 130}
"""Exit codes that are documented."""
MEMORY = 3 << 30
"""Bytes that a process of fuzzing may use: an input of 1 MB that needs more is a bug."""
KINDS = ("spec", "config", "plan", "line")

# ---------------------------------------------------------------------------------------------------------------------
# Judging


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int | None
    """Exit code; None when something else than SystemExit left `main`."""
    out: str
    err: str
    seconds: float
    crash: str = ""
    """The traceback of what left `main`."""


def raw(text: str) -> list[str]:
    """Characters that act on a terminal or deceive a reader: controls, directions, invisible ones, line separators."""
    bad = {c for c in set(text) - {"\n", "\t"} if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    return sorted(f"U+{ord(c):04X}" for c in bad)


def judge(outcome: Outcome) -> list[str]:
    """What is wrong with how a command ended and with what it printed; nothing when all is well."""
    wrong = []
    if outcome.crash:
        wrong.append(f"left main: {outcome.crash.strip().splitlines()[-1][:300]}")
    elif outcome.code not in CODES:
        wrong.append(f"exit code {outcome.code}")
    elif outcome.code and not (outcome.out or outcome.err):
        wrong.append(f"exit code {outcome.code} without a word")
    for name, text in (("out", outcome.out), ("err", outcome.err)):
        if "Traceback" in text:
            wrong.append(f"a traceback on std{name}")
        if found := raw(text):
            wrong.append(f"raw characters on std{name}: {' '.join(found)}")
    if outcome.seconds > PATIENCE:
        wrong.append(f"took {outcome.seconds:.1f} s")
    return wrong


class Late(BaseException):
    """A command that takes too long."""


def call(arguments: Sequence[str], main: Callable[[], object], typed: bytes = b"") -> Outcome:
    """What `main` does with a command line, in this process, with streams as strict as a terminal's."""
    given = io.TextIOWrapper(io.BytesIO(typed), "utf-8")
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    before = sys.argv, sys.stdin, sys.stdout, sys.stderr
    sys.argv, sys.stdin, sys.stdout, sys.stderr = ["editctl", *arguments], given, out, err
    code: int | None = 0
    crash, begun = "", time.perf_counter()

    def late(*_: object) -> None:
        raise Late(f"no end after {2 * PATIENCE:.0f} s")

    ours = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 2 * PATIENCE)
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0) if isinstance(end.code, int | None) else None
        crash = "" if code is not None else f"SystemExit({end.code!r})"
    except BaseException:
        code, crash = None, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, ours)
        sys.argv, sys.stdin, sys.stdout, sys.stderr = before
    seconds = time.perf_counter() - begun
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.detach().getvalue().decode())
    return Outcome(code, texts[0], texts[1], seconds, crash)


# ---------------------------------------------------------------------------------------------------------------------
# The room


class _NoModels(importlib.abc.MetaPathFinder):
    """Ends every way that leads to a model, a screen or a download where it imports its library."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in ("torch", "transformers", "textual"):
            from editctl.errors import ModelError

            raise ModelError(f"fuzzing loads no {name}", "run it elsewhere")
        if name == "datasets":
            raise ImportError(name)


def _inside(path: object, room: str) -> bool:
    """Whether a path lies in the room; paths that no file has count as inside, for the command to stumble over."""
    if isinstance(path, int) or path is None:
        return True
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]
        return text == os.devnull or os.path.realpath(text).startswith(room)
    except (ValueError, TypeError):
        return True


def lock_up(room: Path) -> None:
    """From now on this process writes only into the room, and reaches neither programs nor the network."""
    root = os.path.realpath(room)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changing = {"os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.symlink"}
    changing |= {"os.rename", "os.link", "shutil.rmtree", "shutil.move", "shutil.copyfile", "shutil.copytree"}
    outward = ("subprocess.", "os.exec", "os.posix_spawn", "os.system", "os.fork", "pty.", "webbrowser.", "socket.")

    def guard(event: str, values: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = values
            denied = bool(flags & writing) and not _inside(path, root)
        elif event in changing:
            paths = [value for value in values if isinstance(value, str | bytes | os.PathLike)]
            of_folder = values[-1] if event != "os.truncate" and isinstance(values[-1], int) else -1
            if of_folder >= 0:
                paths = [f"/proc/self/fd/{of_folder}/{os.fsdecode(path)}" for path in paths]
            denied = not all(_inside(path, root) for path in (paths if event == "os.rename" else paths[-1:]))
        elif event == "sqlite3.connect":
            name = os.fsdecode(values[0]) if isinstance(values[0], str | bytes) else ""
            place = name.removeprefix("file://").partition("?")[0]
            if name != ":memory:" and not _inside(place, root):
                raise sqlite3.OperationalError("unable to open database file")
            denied = False
        else:
            denied = event.startswith(outward) and event not in ("socket.__new__", "socket.gethostname")
        if denied:
            raise PermissionError(13, "Permission denied", str(values[0]))

    sys.addaudithook(guard)
    sys.meta_path.insert(0, _NoModels())
    sys.dont_write_bytecode = True


def prepare(room: Path) -> None:
    """Everything a process of fuzzing needs to be harmless, quick and the same each time."""
    home = room / "home"
    home.mkdir(parents=True)
    tempfile.tempdir = str(room)
    for name in [name for name in os.environ if name.startswith(("EDITCTL_", "HF_", "XDG_", "LC_"))]:
        if name not in ("EDITCTL_SAMPLES", "EDITCTL_TIME_FACTOR"):
            del os.environ[name]
    os.environ |= {"HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(home)}
    os.environ |= {"TMPDIR": str(room), "COLUMNS": "120", "TERM": "dumb", "LOGNAME": "ada", "EDITOR": "false"}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lock_up(room)
    from editctl.engine import source

    source.identity = cache(source.identity)  # a hash of 20 MB each time would be most of the work
    socket.setdefaulttimeout(1)


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile texts

CONTROLS = [chr(c) for c in (*range(32), *range(127, 160))]
DECEPTIVE = list("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
INVISIBLE = list("\xad\u200b\u200c\u200d\u2028\u2029\u2060\u2064\ufeff\ufff9\ufffb\U000e0001\U000e0041\U000e007f")
MARKUP = ["[red]x[/red]", "[/]", "[bold", "[link=http://e]y[/link]", ":smile:", "[[", "]]", "[@click=app.quit]z[/]"]
MARKUP += ["$x"]
SEQUENCES = ["\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\x1bc", "\x1b[8m", "\x1bP+q\x1b\\", "\r\x1b[K", "\x08\x08"]
STRANGE = [
    "é",
    "e\u0301",
    "日本語",
    "🏴\U000e0067\U000e007f",
    "ß",
    "İ",
    "ﬁ",
    "\U0010ffff",
    "\ufffd",
    "ا",
    "א",
    "\u0e33",
]
STRANGE += ["a" * 300]
CODE = ["%s", "{}", "{0}", "{x!r}", "{{}}", "${HOME}", "`id`", "$(id)", "'", '"', "\\", "\\u0000", "--", "-", "="]
CODE += ["..", "~", "/"]
WORDS = ["Rome", "Paris", "The Eiffel Tower", "{} is in", "a", " ", "", "\n", "\t", "1", "null", "None", "nan"]
WORDS += ["base", "@"]
POOLS = [CONTROLS, DECEPTIVE, INVISIBLE, MARKUP, SEQUENCES, STRANGE, CODE, WORDS]


@cache
def _samples() -> list[str]:
    """Texts of real data sets that were made to hurt; none where they are not."""
    found: list[str] = []

    def strings(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            for key, item in value.items():
                found.append(key)
                strings(item)
        elif isinstance(value, list):
            for item in value:
                strings(item)

    for path in sorted(SAMPLES.glob("*.json")) if SAMPLES.is_dir() else []:
        text = path.read_bytes().decode("utf-8", "replace")
        found.append(text[:4000])
        try:
            strings(json.loads(text, strict=False))
        except ValueError:
            continue
    return sorted({text for text in found if len(text) < 20_000})


def hostile(rng: random.Random) -> str:
    """A short text that is no text a user would write on purpose."""
    if _samples() and rng.random() < 0.1:
        return rng.choice(_samples())
    return "".join(rng.choice(rng.choice(POOLS)) for _ in range(rng.randint(1, 6)))


def long_text(rng: random.Random, size: int) -> str:
    """About so many characters, of one kind or another."""
    unit = rng.choice(["a", "a ", "é", "\\", '"', "[", "{}", "a.", "\n", "#\n", "1,", "\x1b", "0", hostile(rng) or "a"])
    return unit * (size // len(unit))


# ---------------------------------------------------------------------------------------------------------------------
# TOML

SCALARS = ["1", "-1", "0", "1.5", "nan", "inf", "-inf", "true", "false", "1979-05-27", "07:32:00"]
SCALARS += ["1979-05-27T07:32:00Z"]
SCALARS += ["[]", "{}", '""', "''", '""""""', "[1, 2]", '["a"]', "{ a = 1 }", '{ prompt = "x" }', "[[1]]", "9" * 30]
SCALARS += ["1e999"]
SCALARS += ["0x" + "f" * 40, "0o7", "0b1", "+1", "1_000", "-0", "1979-13-45", "24:00:00", '"\\u0000"', '"\\ud800"']
SCALARS += ['"\\e[31m"']
TOKENS = ["[[edit]]", "[edit]", "[[edit", "]]", "[", "]", "{", "}", "=", ",", ".", '"', "'", '"""', "'''", "#", "\n"]
TOKENS += ["\r\n", "\\"]
TOKENS += ["version", "edit", "subject", "relation", "locality", "{}", " = ", "edit.x = 1", "a.b.c = 1"]
TOKENS += ["\n[settings]\n", "\x00"]
FIELDS = ["id", "subject", "relation", "target_new", "target_true", "paraphrases", "locality", "portability", "source"]
FIELDS += ["note", "tags", "method", "version", "edit", "prompt", "answer", "kind", "x", ""]


def quoted(rng: random.Random, text: str) -> str:
    """A text as one of TOML's strings, often the wrong one."""
    style = rng.randrange(6)
    if style == 0:
        return f"'{text}'"
    if style == 1:
        return f'"""{text}"""'
    if style == 2:
        return f'"{text}"'
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'


def a_value(rng: random.Random, depth: int = 0) -> str:
    """A value of any type, in TOML."""
    pick = rng.random()
    if pick < 0.45 or depth > 3:
        return quoted(rng, rng.choice(["The Louvre", "{} is in", "Rome", "{} {}", hostile(rng), hostile(rng)]))
    if pick < 0.65:
        return rng.choice(SCALARS)
    if pick < 0.85:
        return "[" + ", ".join(a_value(rng, depth + 1) for _ in range(rng.randint(0, 4))) + "]"
    pairs = (f"{rng.choice(FIELDS) or 'k'} = {a_value(rng, depth + 1)}" for _ in range(rng.randint(0, 3)))
    return "{ " + ", ".join(pairs) + " }"


def a_spec(rng: random.Random) -> str:
    """A spec with every kind of value at every place, or here and there."""
    wild = rng.choice([0.0, 0.02, 0.1, 0.5])
    lines = ["version = " + (a_value(rng) if rng.random() < wild / 2 else "1")]
    if rng.random() < wild:
        lines.append("method = " + rng.choice(['"memit"', '"rome"', a_value(rng)]))
    for number in range(rng.randint(1, 5)):
        good = {"subject": f'"Thing {number}"', "relation": '"{} is in"', "target_new": '"Rome"'}
        more = {
            "note": quoted(rng, rng.choice([*MARKUP, *STRANGE])),
            "tags": '["a"]',
            "locality": '["The Louvre is in"]',
        }
        lines.append("\n[[edit]]")
        for name, value in (good | more).items():
            if rng.random() > wild:
                lines.append(f"{name} = {a_value(rng) if rng.random() < wild else value}")
        while rng.random() < wild:
            lines.append(f"{rng.choice(FIELDS) or quoted(rng, hostile(rng))} = {a_value(rng)}")
    return "\n".join(lines) + "\n"


def _shipped(rng: random.Random) -> str:
    """A few edits of a spec that ships."""
    text = rng.choice(_shipped_texts())
    head, *edits = text.split("[[edit]]")
    return head + "".join(f"[[edit]]{edit}" for edit in rng.sample(edits, min(len(edits), rng.randint(1, 4))))


@cache
def _shipped_texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((ROOT / "specs").glob("*.toml"))]


def deep(rng: random.Random) -> str:
    """Something nested far deeper than anyone nests."""
    n = rng.choice([15, 17, 100, 399, 401, 1000, 1000, 5000])
    inner, name = rng.choice(["1", "", '"a"']), rng.choice(["x", "version", "edit", "settings.x", "model"])
    return rng.choice(
        [
            f"{name} = " + "[" * n + inner + "]" * n,
            f"{name} = " + "{a = " * n + (inner or "1") + "}" * n,
            f"{name}" + ".a" * n + " = 1",
            "[" + ".".join([name] * n) + "]\n" + "k = 1\n",
            "[[" + ".".join([name] * n) + "]]\n" + "".join(f"k{i} = 1\n" for i in range(n)),
            f"{name} = " + "[" * n,
            f"{name} = " + "{a." * n,
            f"{name} = " + ("{" + ".".join(["a"] * 15) + " = ") * min(n, 390) + "1" + "}" * min(n, 390),
            f"{name} = {{" + ", ".join(f"a{i} = [" * 3 + "]" * 3 for i in range(n)) + "}",
        ]
    )


def big(rng: random.Random, size: int) -> str:
    """About so many characters of one construct of TOML."""
    name = rng.choice(["x", "version", "subject", "note", "model", "tags"])
    n = size // 10
    return rng.choice(
        [
            f'{name} = "{long_text(rng, size)}"',
            f"{name} = '''{long_text(rng, size)}'''",
            f"# {long_text(rng, size)}",
            f"{'k' * size} = 1",
            f'"{long_text(rng, size)}" = 1',
            f"{name} = 0x" + "f" * size,
            f"{name} = " + "9" * size,
            f"{name} = 1." + "9" * size,
            f"{name} = [" + "1, " * (size // 3) + "]",
            f"{name} = [" + '"a", ' * (size // 5) + "]",
            "\n".join(f"k{i} = 1" for i in range(n)),
            "[[edit]]\n" * n,
            "\n".join(f"[t{i}]" for i in range(n)),
            "\n" * size,
            ".".join("a" * n),
            f"{name} = {{" + ", ".join(f"k{i} = 1" for i in range(n)) + "}",
            long_text(rng, size),
        ]
    )


def mutated(rng: random.Random, data: bytes, extra: Callable[[random.Random], str] | None = None) -> bytes:
    """The bytes with a few changes of the kinds that editors, mergers, attackers and broken disks make."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        at = rng.randint(0, len(data))
        to = min(len(data), at + rng.randint(1, 40))
        lines = data.split(b"\n")
        begun = data.rfind(b"\n", 0, at) + 1
        match rng.randrange(18):
            case 0:
                flipped = bytearray(data)
                for _ in range(rng.randint(1, 8)):
                    if flipped:
                        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
                data = bytes(flipped)
            case 1 | 2:
                data = data[:at] + rng.choice(TOKENS).encode() + data[at:]
            case 3:
                data = data[:at] + data[to:]
            case 4:
                data = data[:to] + data[at:to] * rng.randint(1, 5) + data[to:]
            case 5 | 6:
                number = rng.randrange(len(lines))
                key, equals, _ = lines[number].partition(b"=")
                if equals:
                    lines[number] = key + b"= " + a_value(rng).encode("utf-8", "surrogatepass")
                    data = b"\n".join(lines)
            case 7 | 8:
                data = data[:at] + hostile(rng).encode("utf-8", "surrogatepass") + data[at:]
            case 9:
                text = "".join(f"\\U{ord(c):08x}" for c in hostile(rng)[:20])
                data = data.replace(rng.choice([b"Rome", b"The ", b"is", b'"']), b'"' + text.encode() + b'"', 1)
            case 10:
                number = rng.randrange(len(lines))
                lines.insert(rng.randrange(len(lines) + 1), lines[number])
                data = b"\n".join(lines)
            case 11:
                data = data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b" "]))
            case 12:
                data = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x00"]) + data
            case 13:
                broken = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80", b"\x80" * 9]
                data = data[:at] + rng.choice(broken) + data[at:]
            case 14:
                data = data[:at]
            case 15:
                data = data[:begun] + deep(rng).encode() + b"\n" + data[begun:]
            case 16:
                more = (extra or a_spec)(rng)
                data = data + b"\n" + more.encode("utf-8", "surrogatepass")
            case _:
                size = 1_000_000 if rng.random() < 0.1 else rng.choice([300, 3000, 30_000])
                data = data[:begun] + big(rng, size).encode("utf-8", "surrogatepass") + b"\n" + data[begun:]
    return data


def spec_bytes(rng: random.Random) -> bytes:
    """A spec file."""
    pick = rng.random()
    if pick < 0.01:
        return rng.choice([b"", b"\n", b"\x00", b"{", b"version = 1", rng.randbytes(200), b"version = 1\nedit = []"])
    text = _shipped(rng) if pick < 0.5 else a_spec(rng)
    data = text.encode("utf-8", "surrogatepass")
    return data if pick > 0.7 else mutated(rng, data)


CONFIG = """model = "atlas"
device = "cpu"
dtype = "float32"
method = "memit"
store = "store"
specs = ["specs"]

[settings]
steps = 3
layers = [1, 2]
preserve = "null-space"
"""
SETTINGS = ["lambda", "l2", "history", "steps", "layers", "post", "corpus", "energy", "preserve", "published", "rect"]
SETTINGS += ["seed"]
SETTINGS += ["batch_size", "spread", "keys", "corpus_tokens", "quantile", "objective", "rounds", "joint", "method"]
SETTINGS += ["dtype"]


def a_config(rng: random.Random) -> str:
    """A configuration with every kind of value at every key."""
    keys = ["model", "device", "dtype", "method", "store", "specs", "gates", "settings.x", "x"]
    keys += ["theme", "keys", "keys.x"]
    lines = [f"{key} = {a_value(rng)}" for key in rng.sample(keys, rng.randint(0, 4))]
    lines += ["[settings]", *(f"{name} = {a_value(rng)}" for name in rng.sample(SETTINGS, rng.randint(0, 4)))]
    return "\n".join(lines) + "\n"


def config_bytes(rng: random.Random) -> bytes:
    """A configuration file."""
    text = a_config(rng) if rng.random() < 0.5 else CONFIG
    data = text.encode("utf-8", "surrogatepass")
    return data if rng.random() < 0.2 else mutated(rng, data, a_config)


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def a_json(rng: random.Random, depth: int = 0) -> Any:
    """A value of any type, in JSON."""
    pick = rng.randrange(12)
    plain: list[Any] = [None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", "add", "x", [], {}]
    if pick < 6 or depth > 2:
        return rng.choice(plain)
    if pick < 9:
        return hostile(rng) + rng.choice([*[""] * 20, "\ud800", "\0"])
    if pick < 11:
        return [a_json(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {hostile(rng): a_json(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _like(rng: random.Random, value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([0, 1, -1, 7, value + 1, 2**63, 10**400])
    if isinstance(value, float):
        return rng.choice([0.0, -1.0, 1e308, 1e-308, 0.5, value / 2])
    if isinstance(value, str):
        return rng.choice([hostile(rng), value + "x", ""])
    if isinstance(value, list):
        return rng.choice([value[1:], value * 2, [*value, *value[:1]]])
    return dict(list(value.items())[1:]) if isinstance(value, dict) else value


def plan_bytes(rng: random.Random, saved: bytes) -> bytes:
    """A saved plan, changed with or without a fingerprint that says otherwise."""
    pick = rng.random()
    if pick < 0.35:
        data = mutated(rng, saved)
        return data if rng.random() < 0.3 else b"{" + data.lstrip(b"{")
    if pick < 0.38:
        n = rng.choice([900, 2000, 100_000])
        deepened = rng.choice([b'{"a":' * n + b"1" + b"}" * n, b"{" + b'"a":' + b"[" * n, b'{"a": ' + b"9" * n + b"}"])
        return rng.choice([deepened, b'{"fingerprint": "x", ' + deepened[1:], b"{" * n])
    body = json.loads(saved)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(_places(body))
        if rng.random() < 0.2:
            if isinstance(container, dict):
                container.pop(key, None)
            elif key < len(container):
                container.pop(key)
        elif isinstance(container, dict) or key < len(container):
            container[key] = _like(rng, container[key]) if rng.random() < 0.6 else a_json(rng)
    if isinstance(body, dict) and rng.random() < 0.8:
        body.pop("fingerprint", None)
        text = json.dumps(body, sort_keys=True, ensure_ascii=False)
        body["fingerprint"] = sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    return json.dumps(body).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def verbs(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below one, groups included, by the words that lead to it."""
    yield path, command
    if isinstance(command, click.Group):
        for name, below in sorted(command.commands.items()):
            yield from verbs(below, (*path, name))


REFS = ["@", "@-", "@-2", "@-999999", "base", "stable", "candidate", "op:1", "op:0", "op:99999999999", "0000"]
REFS += ["f" * 12, "zzzz"]
PATHS = ["specs", "specs/a.toml", "specs/b.toml", ".", "missing.toml", "folder.toml", "empty.toml", "plan.json"]
PATHS += ["link.toml"]
PATHS += ["editctl.toml", "binary.bin", "store", "store/editctl.db", "/", "/dev/null", "out/x", "x" * 300]
PATHS += ["specs/../specs"]
NUMBERS = ["0", "1", "2", "-1", "3.5", "nan", "inf", "1e400", "9" * 20, "9" * 5000, "1,2", "1,2,3", "1,,2", "٣"]
NUMBERS += ["1_0", "0x10"]
NAMES = ["atlas", "gpt2", "nobody/nothing", "../atlas", "float32", "auto", "cpu", "cuda", "memit", "rome"]
NAMES += ["alphaedit", "none"]
TEXTS = ["The Eiffel Tower is in", "hf:x", "hf:x:y", "text.txt", "json", "yaml", "stable", "a note", "steps=3"]
TEXTS += ["l2=nan", "="]


def argument(rng: random.Random, parameter: click.Parameter, known: Sequence[str]) -> str:
    """A value for an option or argument, mostly of the kind it wants."""
    pick = rng.random()
    if pick < 0.15:
        return hostile(rng)
    if pick < 0.2:
        setting = rng.choice(SETTINGS)
        return f"{setting}={rng.choice([a_value(rng), hostile(rng), *NUMBERS])}"
    if isinstance(parameter.type, click.Choice) and pick < 0.8:
        return str(rng.choice(list(parameter.type.choices)))
    if isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType) and pick < 0.9:
        return rng.choice(NUMBERS if pick < 0.4 else ["1", "2", "50", "9" * 9, "9" * 18, "9" * 20, "9" * 400])
    if isinstance(parameter.type, click.Path) and pick < 0.8:
        return rng.choice(PATHS)
    return rng.choice([*REFS, *PATHS, *NAMES, *TEXTS, *NUMBERS, *known])


def a_line(rng: random.Random, root: click.Command, known: Sequence[str]) -> list[str]:
    """A command line: of any verb, with some of its options and arguments, sometimes bent."""
    path, command = rng.choice([(path, command) for path, command in verbs(root) if path])
    words: list[str] = []
    for parameter in root.params:
        if rng.random() < 0.08 and isinstance(parameter, click.Option):
            words += [parameter.opts[0], *([] if parameter.is_flag else [argument(rng, parameter, known)])]
    words += path
    for parameter in rng.sample(command.params, len(command.params)):
        if isinstance(parameter, click.Option):
            if rng.random() < min(0.5, 2.5 / len(command.params)):
                name = rng.choice(parameter.opts)
                value = argument(rng, parameter, known)
                glued = name.startswith("--") and rng.random() < 0.3
                words += [name] if parameter.is_flag else [f"{name}={value}"] if glued else [name, value]
        elif parameter.required or rng.random() < 0.6:
            words += [argument(rng, parameter, known) for _ in range(rng.randint(1, 3 if parameter.nargs < 0 else 1))]
    if rng.random() < 0.3:
        words.append("--json")
    if rng.random() < 0.2:
        words.append("--yes")
    if rng.random() < 0.3:
        words = bent(rng, words)
    return [sendable(word) for word in words]


def bent(rng: random.Random, words: list[str]) -> list[str]:
    """The words with a few lost, doubled, swapped, damaged or strange ones."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(words))
        one = rng.randrange(len(words)) if words else 0
        match rng.randrange(8):
            case 0:
                words = words[:one] + words[one + 1 :]
            case 1:
                words = words[:at] + words[one : one + 1] + words[at:]
            case 2:
                rng.shuffle(words)
            case 3 if words:
                damaged = mutated(rng, words[one].encode("utf-8", "surrogateescape"))
                words[one] = damaged[:2000].decode("utf-8", "surrogateescape")
            case 4:
                words.insert(
                    at, rng.choice(["--", "-h", "--help", "--version", "-n", "--json", "-", "--no", "-xyz", "--="])
                )
            case 5:
                words.insert(at, rng.choice(["--", "-", ""]) + hostile(rng))
            case 6:
                words.insert(at, long_text(rng, 100_000))
            case _:
                words.insert(at, os.fsdecode(rng.randbytes(12)))
    return words


def sendable(word: str) -> str:
    """The word as an operating system can hand it over: no NUL, no half of a character but bytes that are no text."""
    return os.fsdecode(word.encode("utf-8", "replace" if not _escaped(word) else "surrogateescape")).replace("\0", "␀")


def _escaped(word: str) -> bool:
    try:
        word.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# A workspace


def make_workspace(folder: Path, main: Callable[[], object], text: str = "plain") -> None:
    """A workspace with specs, a saved plan, odd files, and a store of versions that no model was loaded for.

    Args:
        text: what every field of the store holds that holds texts.
    """
    (folder / "specs").mkdir(parents=True)
    for name, id_ in (("a", "edit-1"), ("b", "b")):
        edit = f'[[edit]]\nid = "{id_}"\nsubject = "Thing {name}"\nrelation = "{{}} is in"\ntarget_new = "Rome"\n'
        (folder / f"specs/{name}.toml").write_text(f"version = 1\n{edit}")
    (folder / "folder.toml").mkdir()
    (folder / "empty.toml").touch()
    (folder / "text.txt").write_text("The Eiffel Tower stands in Paris.\n" * 20)
    (folder / "binary.bin").write_bytes(bytes(range(256)))
    (folder / "link.toml").symlink_to("link.toml")
    with working_in(folder):
        for made in ("for the store", "on what the store has"):
            outcome = call(["plan", "specs", "--prune", "-o", "plan.json"], main)
            if judge(outcome) or outcome.code:
                raise AssertionError(f"no plan {made}: {outcome}")
            if not Path("store").exists():
                fill_store(folder / "store", json.loads(Path("plan.json").read_text(encoding="utf-8")), text)


def fill_store(folder: Path, plan: dict[str, Any], text: str) -> None:
    """Three versions of the model that a plan was made for, a candidate on them, an alias, a review."""
    from editctl.metrics.values import KINDS as QUESTIONS
    from editctl.metrics.values import Answer, Metric
    from editctl.spec import Edit, Probe
    from editctl.store import Draft, LiveEdit, Store

    # A clock that stands still, so that the versions' ids are the same each time.
    store = Store(folder, who=text, now=lambda: datetime(2026, 8, 1, tzinfo=UTC))
    store.deltas_dir.mkdir(parents=True)
    names = [sha256(bytes([number])).hexdigest()[:32] for number in range(4)]
    for number, name in enumerate(names):
        (store.deltas_dir / f"{name}.safetensors").write_bytes(bytes([number]))
    word = text.replace("\0", "").strip()[: len(WORD)]
    (store.deltas_dir / f"{word.replace('/', '|')}.safetensors").touch()
    probes = (Probe(prompt=f"Probe {text}", answer=(text,), kind=text),)
    params = {**plan["params"], "corpus": text, "corpus_content": text}
    note = json.dumps({"type": "note", "message": text})
    head, lives = "", []
    for number in range(4):
        named: dict[str, Any] = {"id": f"{word}-{number}", "subject": f"{text} {number}", "relation": f"{{}} {text}"}
        named |= {"method": "", "line": 1, "extra": json.dumps({text: [text]})}
        edit = filled(Edit, text, **named, locality=probes, portability=probes)
        answers = tuple(filled(Answer, text, edit=edit.id, kind=kind, ok=number == 1) for kind in QUESTIONS)
        metrics = (filled(Metric, text, name="reliability", protocol="generated"), filled(Metric, text))
        gates = {"reliability": 0.9} if number == 3 else {}
        lives.append(LiveEdit(edit, names[number], 0))
        made = {"parent": head, "base": plan["base"], "params": params, "gates": gates, "edits": tuple(lives)}
        draft = filled(Draft, text, **made, answers=answers, metrics=metrics, events=(note,))
        held = {"hold": text} if number == 3 else {}
        version = store.commit(draft, command=text, note=text, expected_head=head, **held)
        head = head if held else version.id
    store.accept("@", note=text, edits=(f"{word}-2",), command=text)
    store.set_alias("stable", "@-", text)


def filled(cls: Any, text: str, **given: Any) -> Any:
    """An instance of a dataclass or model with the text in every field that holds texts, whatever fields it has."""
    import dataclasses

    kinds = (
        {f.name: str(f.type) for f in dataclasses.fields(cls) if f.init}
        if dataclasses.is_dataclass(cls)
        else {name: str(kind) for name, kind in cls.__annotations__.items()}
    )
    values: dict[str, Any] = {
        "str": text,
        "tuple[str, ...]": (text,),
        "list[str]": [text],
        "dict[str, str]": {text: text},
        "dict[str, float]": {text: 0.5},
        "dict[str, tuple[float, float]]": {text: (1.0, 2.0)},
        "tuple[Probe, ...]": (),
        "tuple[int, ...]": (1,),
        "str | None": text,
        "float": 0.5,
        "float | None": 0.5,
        "int": 1,
        "bool": False,
    }
    unknown = {name: kind for name, kind in kinds.items() if name not in given and kind not in values}
    if unknown:
        raise TypeError(f"{cls.__name__} has fields of new kinds, say what to fill them with: {unknown}")
    return cls(**{name: values[kind] for name, kind in kinds.items() if name not in given}, **given)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


@dataclass
class Figures:
    """What a number of inputs came to."""

    inputs: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    codes: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    """What tells whether two batches were the same inputs with the same ends."""
    failed: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, shown: dict[str, Any], outcome: Outcome, wrong: Sequence[str] = ()) -> None:
        """Judge one outcome; of the failures the first twenty are kept."""
        self.inputs += 1
        met = repr((self.digest, shown.get("line"), shown.get("data"), outcome.code))
        self.digest = sha256(met.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self.codes[str(outcome.code)] += 1
        self.slowest = max(self.slowest, outcome.seconds)
        if wrong := [*judge(outcome), *wrong]:
            self.failed += 1
            if len(self.failures) < 20:
                self.failures.append({"input": name, "wrong": wrong, **shown, "crash": outcome.crash[-3000:]})


SPEC_LINES = [["validate", "x.toml"], ["validate", "x.toml", "--json"], ["validate", "specs", "x.toml"]]
SPEC_LINES += [["plan", "x.toml"]]
SPEC_LINES += [["plan", "x.toml", "--json"], ["plan", "specs", "x.toml", "--prune", "-o", "out.json"]]
SPEC_LINES += [["apply", "x.toml", "--yes"]]
CONFIG_LINES = [["validate"], ["plan"], ["log"], ["show"], ["methods"], ["info"], ["plan", "--json"]]
CONFIG_LINES += [["apply", "--yes"]]
PLAN_LINES = [["apply", "x.json"], ["apply", "x.json", "--yes"], ["apply", "x.json", "--json"], ["validate", "x.json"]]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether anything in a folder was written."""
    found = [Path(root, name) for root, folders, files in os.walk(folder) for name in (*folders, *files)]
    there = {path: path.lstat() for path in found}
    return {str(path): (0, 0) if path.is_dir() else (s.st_size, s.st_mtime_ns) for path, s in there.items()}


@contextmanager
def fresh(workspace: Path) -> Iterator[None]:
    """Work in a copy of the workspace, which is used again when nothing in it was written."""
    here = workspace.with_name("here")
    if not here.exists():
        shutil.copytree(workspace, here, symlinks=True)
    before = contents(here)
    try:
        with working_in(here):
            yield
    finally:
        if contents(here) != before:
            shutil.rmtree(here)


def meet(
    kind: str, seed: int, number: int, workspace: Path, main: Callable[[], object]
) -> tuple[dict[str, Any], Outcome]:
    """Input number so and so of a kind: what it is, and what came of it in a copy of the workspace."""
    from editctl.cli import cli

    rng = random.Random(f"{seed} {kind} {number}")
    data, name = b"", ""
    if kind == "spec":
        data, name, line = spec_bytes(rng), "x.toml", rng.choice(SPEC_LINES)
    elif kind == "config":
        data, name, line = config_bytes(rng), "editctl.toml", rng.choice(CONFIG_LINES)
    elif kind == "plan":
        data, name, line = plan_bytes(rng, _saved(workspace)), "x.json", rng.choice(PLAN_LINES)
    else:
        line = a_line(rng, cli, ["x.toml", "specs", *_versions(workspace)])
    with fresh(workspace):
        if name:
            Path(name).write_bytes(data)
        outcome = call(line, main)
        if name:
            Path(name).unlink(missing_ok=True)
    shown = {"line": line} | ({"file": name, "data": repr(data[:1500]), "bytes": len(data)} if name else {})
    return shown, outcome


HOSTILE = "[bold]mrk[/bold][/] [link=http://e]y[/link] :smile: \x1b[31m\x1b]0;t\x07\x9b2J\r\b\x7f\0 \u202eolleh\u2066"
HOSTILE += "\u200b\u200d\u2028\u2029\ufeff\xad\U000e0041 日本 {0} %s \n\t"
"""One text with everything that acts on a terminal, a reader or a library that prints."""
WORD = HOSTILE.replace("\0", "").strip()
"""The same as an argument."""
NAME = WORD.replace("/", "|")
"""The same as the name of a file."""
FILE_NAME = NAME + ".toml"
SHOWN: dict[str, list[list[str]]] = {
    "accept": [["accept"], ["accept", "@", "--edit", WORD + "-2", "-m", WORD]],
    "alias": [["alias"], ["alias", "new"], ["alias", WORD]],
    "apply": [
        ["apply", "specs", "--yes", "-m", WORD],
        ["apply", "specs"],
        ["apply", "plan.json"],
        ["restore", "@-"],
        ["apply", "plan.json"],
    ],
    "ask": [["ask", WORD], ["ask", WORD, "@-", "base", "--top", "5", "--sent"], ["ask", "--stdin"]],
    "backup": [["backup", NAME]],
    "diff": [["diff"], ["diff", "base", "@"], ["diff", "@", "base"], ["diff", "@", "candidate"]],
    "drop": [["drop", WORD + "-2", "--yes", "-m", WORD], ["drop", WORD]],
    "export-specs": [["export-specs", FILE_NAME, "-o", NAME], ["export-specs", FILE_NAME, "-o", NAME]],
    "gc": [["gc"]],
    "import file": [["import", "bench.json", "-o", "new.toml", "--yes"], ["import", NAME, "-o", "new.toml"]],
    "info": [["info"]],
    "log": [["log"], ["log", "--all"], ["log", "-n", "2"]],
    "measure": [["measure"], ["measure", "@-"]],
    "plan": [["plan", "specs", "--prune"], ["plan", FILE_NAME], ["plan", "bad.toml"], ["plan", "-o", NAME]],
    "redo": [["undo"], ["redo"]],
    "reject": [["reject"], ["reject", "@", "--edit", WORD + "-2", "--yes", "-m", WORD]],
    "replay": [["replay", WORD + "-2", "--yes", "-m", WORD]],
    "restore": [["restore", "@-"], ["restore", WORD]],
    "show": [["show"], ["show", "--all"], ["show", "candidate", "--all"], ["show", "@-"], ["show", WORD]],
    "squash": [["squash", "--yes"]],
    "trace": [
        ["trace", FILE_NAME, "--samples", "2"],
        ["trace", FILE_NAME, "--edit", WORD],
        ["trace", "{" + NAME + "} is in", "--answer", WORD, "--use"],
        ["trace", WORD, "--subject", WORD],
        ["show", "base"],
    ],
    "undo": [["undo"]],
    "validate": [["validate", FILE_NAME], ["validate", "bad.toml"], ["validate", "specs", WORD]],
    "verify": [["verify"], ["verify", "--repair"], ["verify", "--no-rebuild"]],
}
"""By verb, command lines that show a store and specs full of hostile texts, in this order in one workspace."""
REQUESTS: list[Any] = [
    {"id": HOSTILE, "prompts": [{"prompt": HOSTILE, "wanted": [HOSTILE]}]},
    {"id": {HOSTILE: [HOSTILE]}, "ref": "base", "prompts": [{"prompt": HOSTILE}], "top": 0},
    {"ref": HOSTILE[:90], "prompts": []},
    {"prompts": [{"prompt": "x", HOSTILE: 1}]},
    {HOSTILE: 1},
    HOSTILE,
]
"""What `ask --stdin` reads, the last ones no requests."""
APART = {
    "export": "writes files and prints their folder and sizes",
    "import delta": "prints the plan and the version that apply prints, from a folder that export wrote",
    **{f"import {name}": "prints what `import file` prints" for name in FORMATS},
    "methods": "prints constants, and lines of trained files that tests/test_cli.py makes hostile",
    "model inspect": "prints names and sizes of a loaded model's modules",
    "model statistics": "prints names and numbers of a loaded model's modules",
    "schema": "prints a constant",
    "study families": "prints numbers of a run that needs a model",
    "study methods": "prints numbers of a run that needs a model",
    "study prepare": "prints numbers of a training",
    "study projection": "prints numbers of a run that needs a model",
    "study ratio": "prints numbers of a run that needs a model",
    "study runtime": "prints numbers of a run that needs a model",
    "study sequential": "prints numbers of a run that needs a model",
    "study specs": "prints numbers of a run that needs a model",
    "study subjects": "prints numbers of a run that needs a model",
    "train": "prints numbers of a training that needs a model, and the name it was given",
    "tui": "needs a terminal; tests/test_tui.py shows it hostile texts",
}
"""The other verbs, with the reason; what they say about hostile arguments is looked at all the same."""


def leaves(root: click.Command) -> dict[str, click.Command]:
    """The verbs that do something, by the words that lead to them."""
    return {" ".join(path): command for path, command in verbs(root) if not isinstance(command, click.Group)}


def pretend(text: str) -> None:
    """Stand-ins for the rooms of the engine that hold a model: whatever they say is `text`."""
    from contextlib import nullcontext
    from types import ModuleType, SimpleNamespace

    import editctl.engine
    from editctl import events
    from editctl.errors import ModelError
    from editctl.metrics.values import Metric
    from editctl.workspace import Workspace

    def run(plan: object, model: object, base: str, store: Any, emit: Callable[[object], None], order: object) -> Any:
        for kind in events.Event.__subclasses__():
            emit(filled(kind, text, **({"stage": "after"} if "stage" in kind.__dataclass_fields__ else {})))
        # One verb ends as if its version had not passed a gate.
        return store.resolve("candidate" if isinstance(order, dict) and order.get("verb") == "replay" else "@")

    rooms: dict[str, dict[str, Any]] = {
        "run": {"run": run, "Order": lambda **order: order},
        "checks": {"Wanted": lambda *wanted: wanted, "PERPLEXITY": "perplexity"},
        "measuring": {
            "measure": lambda model, store, version, *others: (store.answers(version), (filled(Metric, text),) * 2),
        },
        "speak": {
            "answers": lambda model, prompts: [text for _ in prompts],
            "next_tokens": lambda model, prompts, top: [[(text, 0.5)] * top for _ in prompts],
            "scores": lambda model, pairs: [SimpleNamespace(probability=0.5) for _ in pairs],
        },
        "trace": {"trace": lambda model, cases, **options: [traced(case, text) for case in cases]},
        "wear": {
            "wearing": lambda model, store, version: nullcontext(SimpleNamespace(overlays=())),
            "rebuild_all": lambda model, store, versions, emit: {v.id: ModelError(text, text) for v in versions[:1]},
        },
    }
    for name, holds in rooms.items():
        room = ModuleType(f"editctl.engine.{name}")
        room.__dict__.update(holds)
        sys.modules[room.__name__] = room
        setattr(editctl.engine, name, room)
    setattr(Workspace, "load", lambda self: SimpleNamespace(device=text, dtype=text))  # noqa: B010


def traced(case: Any, text: str) -> Any:
    """A trace of a prompt that is all hostile."""
    from editctl.metrics.effects import KINDS, Trace, roles

    effects = dict.fromkeys(KINDS, ((0.0, 0.5, -0.1),) * 4)
    texts = {"edit": case.edit, "prompt": case.prompt, "subject": case.subject, "answer": text, "token": text}
    numbers = {"clean": 0.9, "corrupted": 0.1, "window": 3, "samples": 2, "seed": 0, "noise": 0.5}
    return Trace(**texts, **numbers, tokens=(text,) * 4, roles=roles(4, 1, 3), effects=effects)


def markup_acted(text: str) -> bool:
    """Whether the marked word of `HOSTILE` was printed without its markup, or a name for a picture as the picture."""
    return "😄" in text or any(
        not text[: at.start()].endswith("[bold]") and not text[at.end() :].startswith(("[/bold]", "[|bold]"))
        for at in re.finditer("mrk", text)
    )


def show_all(
    kind: str, root: click.Command, workspace: Path, main: Callable[[], object]
) -> tuple[Figures, dict[str, list[bool]]]:
    """Every line of `SHOWN`, plain and as JSON; and by verb, whether it ever went well and showed the hostile text."""
    from editctl.store import Store

    good = 'version = 1\n[[edit]]\nid = "a"\nsubject = "[bold]mrk[/bold]"\n'
    good += 'relation = "[/] {} :smile:"\ntarget_new = "[bold]mrk"\n'
    bad = good.replace("mrk", "".join(f"\\U{ord(c):08x}" for c in HOSTILE)) + f"'{MARKUP[0]}' = 1\n"
    with working_in(workspace):
        Path(FILE_NAME).write_text(good, encoding="utf-8")
        Path("bad.toml").write_text(bad, encoding="utf-8")
        asked = {"prompt": "[/] [bold]mrk :smile:", "subject": "[bold]mrk"}
        asked |= {"ground_truth": "x", "rephrase_prompt": HOSTILE}
        bench = [{**asked, "target_new": "[bold]mrk"}, {**asked, "target_new": HOSTILE, "case_id": HOSTILE}]
        Path("bench.json").write_text(json.dumps(bench), encoding="utf-8")
    figures = Figures()
    seen: dict[str, list[bool]] = {}
    for name, command in leaves(root).items():
        options = {option for parameter in command.params for option in parameter.opts}
        more = ["--model", "atlas"] if "--model" in options else []
        for form in ([], ["--json"]) if "--json" in options and name in SHOWN else ([],):
            with fresh(workspace):
                for line in SHOWN.get(name, ()):
                    words = [*line, *form, *([] if "plan.json" in line or line[0] not in name else more)]
                    lines = [*map(json.dumps, REQUESTS), HOSTILE] if "--stdin" in line else []
                    outcome = call(words, main, "\n".join(lines).encode())
                    said = outcome.out + outcome.err
                    wrong = ["markup acted"] if markup_acted(said) and not (form or lines) else []
                    figures.add(f"--kind {kind}", {"line": words, "said": ascii(said[-2000:])}, outcome, wrong)
                    well = seen.setdefault(name, [False, False])
                    well[0] |= outcome.code in (0, 4)
                    well[1] |= "[bold]mrk" in said
    with fresh(workspace), Store(Path("store"), who=HOSTILE).lock(HOSTILE):
        outcome = call(["undo"], main)
        figures.add(f"--kind {kind}", {"line": ["undo"], "said": ascii(outcome.err[-2000:])}, outcome)
    return figures, seen


def hurt_all(root: click.Command, workspace: Path, main: Callable[[], object]) -> Figures:
    """Every verb with a hostile text for each of its arguments and options, and for those of the whole program."""
    figures = Figures()
    for path, command in verbs(root):
        needed = [word for p in command.params if isinstance(p, click.Argument) and p.required for word in ["x"]]
        lines = [[*path, f"--{WORD}"], [*path, WORD, WORD, WORD, WORD], [*path, f"-{WORD[0]}"]]
        lines += [["--store", WORD, *path, *needed], ["--config", WORD, *path, *needed]]
        for parameter in command.params:
            if isinstance(parameter, click.Argument):
                lines.append([*path, *([WORD] * len(needed) or [WORD])])
            elif isinstance(parameter, click.Option) and parameter.is_flag:
                lines.append([*path, f"{parameter.opts[0]}={WORD}"])
            else:
                pairs = [f"steps={WORD}", f"{WORD}=1"] if parameter.multiple else []
                lines += [[*path, *needed, parameter.opts[0], value] for value in (WORD, *pairs)]
        for words in lines:
            with fresh(workspace):
                outcome = call(words, main)
            said = outcome.out + outcome.err
            wrong = ["markup acted"] if markup_acted(said) and "--json" not in words else []
            figures.add("--kind hurt", {"line": words, "said": ascii(said[-2000:])}, outcome, wrong)
    return figures


@cache
def _saved(workspace: Path) -> bytes:
    return (workspace / "plan.json").read_bytes()


@cache
def _versions(workspace: Path) -> tuple[str, ...]:
    from editctl.store import Store

    return tuple(version.id for version in Store(workspace / "store").versions())


def _hostile(kind: str, room: Path, main: Callable[[], object]) -> dict[str, Any]:
    """The figures of a workspace where folder, user and every text of the store are hostile."""
    from editctl.cli import cli

    global PATIENCE
    PATIENCE *= 4 if kind == "long" else 1  # all it reads and prints is 200 MB
    workspace = room / FILE_NAME / "workspace"
    os.environ["LOGNAME"] = WORD
    text = HOSTILE + "a " * 500_000 if kind == "long" else HOSTILE
    make_workspace(workspace, main, text)
    if kind == "hurt":
        return hurt_all(cli, workspace, main).__dict__
    pretend(text)
    shown, seen = show_all(kind, cli, workspace, main)
    return {**shown.__dict__, "seen": seen}


def plant(name: str) -> None:
    """A verb that does what none may do, for the judge to find."""
    from editctl.cli import cli

    global PATIENCE
    PATIENCE = 0.2 if name == "sleep" else PATIENCE

    def planted() -> None:
        sys.stdout.write(
            {"escape": "\x1b[31m", "direction": "\u202e", "traceback": "Traceback (most recent"}.get(name, "")
        )
        if name == "crash":
            raise ZeroDivisionError("planted")
        if name == "code":
            raise SystemExit(7)
        if name == "silence":
            raise SystemExit(1)
        if name == "sleep":
            time.sleep(0.3)
        if name == "memory":
            bytearray(MEMORY)
        if name == "torch":
            import torch  # noqa: F401
        if name == "outside":
            Path("/tmp/editctl-planted").write_text("x")
        if name == "program":
            subprocess.run(["true"], check=True)
        if name == "network":
            socket.create_connection(("127.0.0.1", 9))

    cli.add_command(click.Command("planted", callback=planted))


def run(main: Callable[[], object]) -> None:
    """The program: inputs by kind and number, their figures as JSON on standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=[*KINDS, "planted", "shown", "long", "hurt"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--plant", default="nothing")
    parser.add_argument("--show", action="store_true", help="print what each input printed, on standard error")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="editctl-fuzz-") as folder:
        room = Path(folder)
        prepare(room)
        begun = time.perf_counter()
        if given.kind in ("shown", "long", "hurt"):
            print(json.dumps({**_hostile(given.kind, room, main), "seconds": time.perf_counter() - begun}))
            return
        workspace = room / "workspace"
        make_workspace(workspace, main)
        figures = Figures()
        if given.kind == "planted":
            plant(given.plant)
            with working_in(workspace):
                figures.add(given.plant, {}, call(["planted"], main))
        for number in range(given.first, given.first + given.count if given.kind != "planted" else given.first):
            # Named before it is met: a crash of the interpreter itself is the last one named.
            print(number, file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(6 * PATIENCE, exit=True)
            shown, outcome = meet(given.kind, given.seed, number, workspace, main)
            figures.add(f"--kind {given.kind} --seed {given.seed} --first {number} --count 1", shown, outcome)
            if given.show:
                print(json.dumps(shown), outcome, outcome.crash, sep="\n", file=sys.stderr)
        faulthandler.cancel_dump_traceback_later()
        figures.seconds = time.perf_counter() - begun
        print(json.dumps(figures.__dict__, ensure_ascii=True))


if __name__ == "__main__":
    from editctl.cli import main as _main

    run(_main)
