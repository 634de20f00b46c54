"""A spec: the facts a model should know, declared in TOML.

Knows: the file format, its JSON Schema, where in a file each value stands, every check that needs no model, and which
files need not be read again. Refuses: models, tokenizers, the store, writing, and raising for bad content; whatever a
file holds becomes problems, each with its line and a remedy.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import tomli
from pydantic import BaseModel, Field, field_validator

from editctl import toml
from editctl.errors import InvalidInput, Problem

VERSION = 1
SLOT = "{}"
MAX_FILES, MAX_BYTES, MAX_EDITS, MAX_ITEMS = 1000, 50_000_000, 10_000, 200
MAX_PROBLEMS = 1000
"""Problems told of a file, and warnings; what comes after is not read."""
MAX_PARTS, MAX_DEPTH = 16, 16
"""Parts of a dotted key, and how far inside a value lines are known; no spec has more than 6."""
LIMITS = {"id": 80, "subject": 200, "relation": 2000, "target_new": 500, "target_true": 500, "paraphrases": 2000}
LIMITS |= {"prompt": 2000, "answer": 500, "kind": 100, "tags": 100, "method": 100, "source": 10_000, "note": 10_000}
LIMITS |= {"group": 100, "generation": 2000, "references": 10_000, "essence": 10_000, "extra": 1_000_000}
"""Longest text of each field, in characters; of `extra`, as JSON."""

_ID = re.compile(r"[a-z0-9][a-z0-9._-]*")
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029"  # controls and line breaks
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # directions
    "\xad\u180e\u200b\u2060-\u2064\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # never seen; joiners spell words
    "\ud800-\udfff]"  # halves of characters, which JSON can spell and no file can hold
)
_PROSE = {"source", "note", "references", "essence"}
"""Fields that no model is asked to continue: spaces around them change nothing."""
_LONG_TEXTS = _PROSE | {"relation", "paraphrases", "prompt", "generation"}
"""Fields that may hold line breaks and tabs."""
_MAY_BE_EMPTY = {"source", "note", "essence", "target_true", "kind", "group", "method"}
REQUIRED = ("subject", "relation", "target_new")
_LISTS = ("paraphrases", "tags", "generation", "references")
"""Fields that are lists of texts."""
_PLACED = ("method", "file", "line")
"""Fields of an Edit that are not keys of its table: the first is the file's, the others say where it stands."""
_ADDED = ("generation", "references", "essence", "extra")
"""Fields that stores of earlier releases lack: empty ones stay out of the JSON and of the fingerprints of an edit."""


class Probe(BaseModel, frozen=True, extra="forbid", defer_build=True):
    """A prompt that measures an edit, and what may be answered to it."""

    prompt: str = Field(description="The text the model continues; {} stands for the edit's subject.")
    answer: tuple[str, ...] = Field(default=(), description="The continuations that count as right.")
    kind: str = Field(default="", description="What the probe tests, for example reasoning or alias.")
    group: str = Field(default="", description="Probes of one group are one question in several wordings.")


class Edit(BaseModel, frozen=True, extra="forbid", defer_build=True):
    """One fact the model should state, with the probes that measure it."""

    id: str = Field(default="", description="Name of the edit; made from the subject and the relation when absent.")
    subject: str = Field(description="What the fact is about, spelled as in running text.")
    relation: str = Field(description="The prompt with exactly one {} where the subject stands.")
    target_new: str = Field(description="How the model should continue the prompt.")
    target_true: str = Field(default="", description="How the model should continue it before the edit.")
    paraphrases: tuple[str, ...] = Field(default=(), description="Other prompts with {} that the edit must reach.")
    locality: tuple[Probe, ...] = Field(default=(), description="Prompts whose continuation the edit must not change.")
    portability: tuple[Probe, ...] = Field(default=(), description="Prompts whose answer follows from the edit.")
    source: str = Field(default="", description="Why this is so; shown in review.")
    note: str = Field(default="", description="Anything a reviewer should know.")
    tags: tuple[str, ...] = Field(default=(), description="Words to select edits by.")
    generation: tuple[str, ...] = Field(default=(), description="Openings for free text about the subject.")
    references: tuple[str, ...] = Field(
        default=(), description="Texts that free text about the subject should be like."
    )
    essence: str = Field(default="", description="A text about the subject, whose perplexity is measured.")
    extra: str = Field(default="", description="Whatever else is known of the edit, under any keys.")
    method: str = ""
    file: str = Field(default="", exclude=True)  # where the edit was declared
    line: int = Field(default=0, exclude=True)

    @property
    def prompt(self) -> str:
        """The relation about this subject."""
        return fill(self.relation, self.subject)

    @property
    def paraphrase_prompts(self) -> tuple[str, ...]:
        """The paraphrases about this subject."""
        return tuple(fill(text, self.subject) for text in self.paraphrases)

    @property
    def locality_prompts(self) -> tuple[str, ...]:
        """The prompts whose continuation must stay."""
        return tuple(fill(probe.prompt, self.subject) for probe in self.locality)

    @property
    def portability_prompts(self) -> tuple[str, ...]:
        """The prompts whose answer must follow."""
        return tuple(fill(probe.prompt, self.subject) for probe in self.portability)

    @property
    def generation_prompts(self) -> tuple[str, ...]:
        """The openings of free text about this subject."""
        return tuple(fill(text, self.subject) for text in self.generation)

    @property
    def whole(self) -> Edit:
        """Itself; of an edit in a store less is known until it is read whole."""
        return self

    @property
    def weights_fingerprint(self) -> str:
        """16 hex digits that change exactly when the weights would: subject, relation, target_new or method differ."""
        return _fingerprint({name: getattr(self, name) for name in (*REQUIRED, "method")})

    @property
    def notes_fingerprint(self) -> str:
        """16 hex digits over what is measured or remembered: all fields that neither change the weights nor name."""
        data = self.to_json()
        return _fingerprint({name: data[name] for name in data if name not in (*REQUIRED, "method", "id")})

    def to_json(self) -> dict[str, Any]:
        """All fields but `file` and `line`, as JSON values."""
        data = self.model_dump(mode="json", exclude={name for name in _ADDED if not getattr(self, name)})
        for probe in (*data["locality"], *data["portability"]):
            if not probe["group"]:
                del probe["group"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Edit:
        """The edit that `to_json` wrote; raises pydantic's ValidationError for anything else."""
        return cls.model_validate(data)

    @field_validator("extra")
    @classmethod
    def _is_a_table(cls, value: str) -> str:
        """JSON, for whoever reads an edit relies on it; `Reader` tells what is wrong with a file's."""
        if value:
            try:
                table = json.loads(value)
            except RecursionError:
                table = None
            if not isinstance(table, dict):
                raise ValueError("not the JSON text of a table")
        return value


@dataclass(frozen=True)
class Report:
    """What some spec files hold: the edits without a problem of their own, all problems and all warnings."""

    edits: tuple[Edit, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    faulty: tuple[Edit, ...] = ()
    """The other edits, as far as they could be read: what was not is empty."""


def fill(template: str, subject: str) -> str:
    """The template with the subject for {}; every other brace is an ordinary character."""
    return template.replace(SLOT, subject)


def visible(text: str, width: int = 60) -> str:
    """The text with control, direction and invisible characters escaped (\\x1b, \\u202e), cut to `width`."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: width + 1])
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def quoted(text: str, width: int = 60) -> str:
    """The text as messages show it, in quotes."""
    return f'"{visible(text, width)}"'


def check(paths: Sequence[Path]) -> Report:
    """Read spec files, and folders for their *.toml; all problems of all files at once, by file and line."""
    return Shelf().check(paths)


class Shelf:
    """Spec files that are read once: a file that did not change is not read again.

    What was read of a file stays in memory until a check no longer finds it under the paths it is given. One thread at
    a time may ask.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[_Stamp, Reader]] = {}

    def check(self, paths: Sequence[Path], texts: Mapping[str, str] | None = None) -> Report:
        """Read spec files, and folders for their *.toml; all problems of all files at once, by file and line.

        Args:
            texts: what files would hold, by path as in `Edit.file`, instead of what is on disk; files that the paths
                would name if they were there count too.
        """
        texts = texts or {}
        readers: list[Reader] = []
        problems: list[Problem] = []
        warnings: list[Problem] = []
        files = _files(paths, texts, problems, warnings)
        self._held = {real: held for real, held in self._held.items() if real in files}
        own = 0
        for real, path in files.items():
            if len(problems) + own > MAX_PROBLEMS:
                message = f"was not read, for there are more than {MAX_PROBLEMS} problems before it"
                problems.append(Problem(str(path), 1, message, "mend those first"))
                break
            name = str(path)
            reader = Reader(name, texts[name]) if name in texts else self._reader(real, path, problems)
            if reader is not None:
                readers.append(reader)
                own += len(reader.problems)
        # told apart before the edits are held against each other: what two of them dispute leaves each readable
        found = [(reader, index, edit) for reader in readers for index, edit in reader.edits]
        sound = tuple(edit for reader, index, edit in found if index not in reader.faulty)
        faulty = tuple(edit for reader, index, edit in found if index in reader.faulty)
        with suppress(_Enough):
            _check_together(found)
        for reader in readers:
            problems += reader.problems
            warnings += reader.warnings
        for some in (problems, warnings):
            some.sort(key=lambda p: (p.file, p.line))
        return Report(sound, tuple(problems), tuple(warnings), faulty)

    def _reader(self, real: str, path: Path, problems: list[Problem]) -> Reader | None:
        """The file as it was read; None, with a problem, when it has no text, and then it is tried again next time."""
        stamp = _stamp(path)  # taken before the file is read: a change in between makes it old, never new
        held, reader = self._held.pop(real, (None, None))
        if reader is not None and held == stamp:
            reader.forget_others()
        else:
            text = read(path, problems)
            reader = None if text is None else Reader(str(path), text)
        if reader is not None and stamp is not None:
            self._held[real] = stamp, reader
        return reader


def load(paths: Sequence[Path], warn: Callable[[Problem], None] = lambda warning: None) -> tuple[Edit, ...]:
    """The edits of spec files and folders; raises InvalidInput with every problem when there is one.

    Args:
        warn: told every warning when there is no problem.
    """
    report = check(paths)
    if report.problems:
        count, files = len(report.problems), len({problem.file for problem in report.problems})
        message = f"{count} problem{'s'[: count > 1]} in {files} file{'s'[: files > 1]}"
        raise InvalidInput(message, "mend the specs; nothing was done", report.problems)
    for warning in report.warnings:
        warn(warning)
    return report.edits


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 7, which editors read) of a spec file."""
    schema = Edit.model_json_schema(ref_template="#/definitions/{model}")
    probe = schema.pop("$defs")["Probe"]
    for name in _PLACED:
        del schema["properties"][name]
    for name, field in (*schema["properties"].items(), *probe["properties"].items()):
        if field["type"] == "array":
            field["maxItems"] = MAX_ITEMS
        if name == "extra":
            field["type"] = "object"
            del field["default"]
        elif name in LIMITS:
            field.get("items", field)["maxLength"] = LIMITS[name]
        else:
            text = {"type": "string", "maxLength": LIMITS["prompt"]}
            field["items"] = {"anyOf": [text, field["items"]]}
    schema["properties"]["id"]["pattern"] = f"^{_ID.pattern}$"
    answer = probe["properties"]["answer"]
    several = {key: answer.pop(key) for key in ("type", "items", "maxItems")}
    answer["anyOf"] = [{"type": "string", "maxLength": LIMITS["answer"]}, several]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "editctl spec",
        "type": "object",
        "required": ["version"],
        "additionalProperties": False,
        "properties": {
            "version": {"const": VERSION, "description": "Version of the spec format."},
            "method": {"type": "string", "description": "Method preset for the edits of this file."},
            "edit": {"type": "array", "maxItems": MAX_EDITS, "items": {"$ref": "#/definitions/Edit"}},
        },
        "definitions": {"Edit": schema, "Probe": probe},
    }


_Stamp = tuple[str, int, int, int]
"""What tells whether a file is as it was: the name it was asked by, time of change, size and inode."""


def _stamp(path: Path) -> _Stamp | None:
    """None when there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # no path has a NUL
        return None
    return str(path), found.st_mtime_ns, found.st_size, found.st_ino


def _files(
    paths: Sequence[Path], texts: Mapping[str, str], problems: list[Problem], warnings: list[Problem]
) -> dict[str, Path]:
    """The files that the paths name, each once, by real path; a folder stands for its *.toml. None when too many."""
    files: dict[str, Path] = {}
    for path in paths:
        given = {Path(name) for name in texts if name.endswith(".toml") and Path(name).parent == path}
        inside = [path]
        if given or os.path.isdir(path):
            inside = sorted(given.union(islice(path.glob("*.toml"), MAX_FILES + 1)))
        if not inside:
            warnings.append(Problem(str(path), 1, "holds no *.toml file", "its edits would all be dropped"))
        for file in inside:
            files.setdefault(str(file) if "\0" in str(file) else os.path.realpath(file), file)
        if len(files) > MAX_FILES:
            message = f"makes more than {MAX_FILES} spec files"
            problems.append(Problem(str(path), 1, message, "write more edits to a file, or name fewer files"))
            return {}
    return files


def read(path: Path, problems: list[Problem]) -> str | None:
    """The text of a file; None, with a problem, when it has none."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            hint = "split it into several files"
            problems.append(Problem(str(path), 1, f"is larger than {MAX_BYTES // 1_000_000} MB", hint))
            return None
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        problems.append(Problem(str(path), 1, "no such file", "check the path"))
    except OSError as error:
        problems.append(Problem(str(path), 1, f"cannot be read: {error.strerror}", "name a file that you may read"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8 text: byte 0x{data[error.start]:02x}"
        problems.append(Problem(str(path), line, message, "save the file as UTF-8"))
    except ValueError:  # no path has a NUL
        problems.append(Problem(str(path), 1, "no such file", "check the path"))
    return None


class NotToml(ValueError):
    """A text that is not TOML, or nests deeper than any file of editctl's; says where and what to do."""

    def __init__(self, message: str, line: int, hint: str) -> None:
        super().__init__(message)
        self.line = line
        self.hint = hint


_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\[^\n])*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+"""
_SCAN = re.compile(
    r'"{3}(?:[^"\\]++|\\.|"{1,2}(?!"))*+(?:"{3,5}|\\?\Z)'
    + r"|'{3}(?:[^']++|'{1,2}(?!'))*+(?:'{3,5}|\Z)"
    + rf"|(?P<deep>(?:{_PART}){{{MAX_PARTS}}})"
    + r'|"(?:[^"\\\n]|\\[^\n])*+"?'
    + r"""|'[^'\n]*+'?|\#[^\n]*+|[\w-]++|[^"'\#\w-]++""",
    re.S,
)
"""Any text in pieces, in linear time: strings, closed or not, comments, words, and dotted keys of too many parts."""


def parse(text: str) -> dict[str, Any]:
    """The values of a TOML text.

    Raises:
        NotToml: it is none, or a key in it has more than `MAX_PARTS` parts.
    """
    # Before anything is made of it: under a key of a thousand parts, a file of 1 MB takes a minute and 8 GB to parse.
    # A key stands on one line.
    dotted = any(line.count(".") >= MAX_PARTS for line in text.split("\n"))
    for match in _SCAN.finditer(text) if dotted else ():
        if match["deep"]:
            line = text.count("\n", 0, match.start()) + 1
            raise NotToml(f"a key has more than {MAX_PARTS} parts", line, "no key of editctl's files has that many")
    try:
        return tomli.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_toml(str(error), text) from None


def _not_toml(error: str, text: str) -> NotToml:
    """The parser's words with what they mean here."""
    found = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", error)
    line = 1 if not found else int(found[1]) if found[1] else text.rstrip().count("\n") + 1
    message = visible(error[: found.start()] if found else error.split(";")[0], 200)
    hint = "text stands in double quotes, lists in [ ]; see toml.io"
    if "overwrite" in message or "twice" in message:
        hint = "the same key stands here twice"
    elif not found:
        hint = "no key takes such a value"
    return NotToml(message, line, hint)


class _Enough(Exception):
    """A file has so many problems that no more are told."""


_Where = tuple[str | int, ...]
"""The way to a value: keys, and positions in lists, from 0."""

KEYS = tuple(name for name in Edit.model_fields if name not in _PLACED)
_NOUNS = {"paraphrases": "paraphrase", "tags": "tag", "locality": "locality probe", "portability": "portability probe"}
_NOUNS |= {"generation": "generation prompt", "references": "reference"}


class Reader:
    """One file's text on its way to edits: what could be read, and what was wrong."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.method, self.parsed = file, "", False
        self.edits: list[tuple[int, Edit]] = []
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.faulty: set[int] = set()
        self.unnamed: set[int] = set()
        self.text = text
        self.edit_lines: list[int] = []
        try:
            data = parse(text)
        except NotToml as error:
            self.problems.append(Problem(file, error.line, f"not valid TOML: {error}", error.hint))
        else:
            self.parsed = True
            with suppress(_Enough):
                self._read(data)
        self._own = len(self.problems), len(self.warnings), frozenset(self.faulty)

    def forget_others(self) -> None:
        """Tell no more than what the file by itself makes to tell, not how its edits stand to other files'."""
        problems, warnings, faulty = self._own
        del self.problems[problems:], self.warnings[warnings:]
        self.faulty = set(faulty)

    def _read(self, data: Mapping[str, Any]) -> None:
        self._unknown(data, (), ("version", "method", "edit"))
        version = data.get("version")
        if version is None:
            self.problem((), "version is missing", f"write version = {VERSION} as the first line")
        elif type(version) is not int or version != VERSION:
            message = f"version is {_told(version) or _type(version)}, which this editctl cannot read"
            self.problem(("version",), message, f"write version = {VERSION}")
        self.method = self._text(data.get("method", ""), ("method",))
        edits = data.get("edit", [])
        if not isinstance(edits, list):
            self.problem(("edit",), f"edit is {_type(edits)}, not a list of tables", "write [[edit]], in two brackets")
        elif len(edits) > MAX_EDITS:
            message = f"the file has {len(edits)} edits, at most {MAX_EDITS} are allowed"
            self.problem(("edit",), message, "split it into several files")
        else:
            self.edit_lines = _header_lines(self.text, len(edits))
            for index, raw in enumerate(edits):
                self._edit(raw, index)
            if not edits:
                self.warn((), "declares no edit", "write one as an [[edit]] table")

    @cached_property
    def lines(self) -> dict[_Where, int]:
        """The line of every place; they take longer to find than all else, and most files need none."""
        return locate(self.text) if self.parsed else {(): 1}

    def line(self, where: _Where) -> int:
        """The line of a value, or of the nearest thing around it that has one."""
        if len(where) == 2 and self.edit_lines and isinstance(where[1], int):
            return self.edit_lines[where[1]]
        while where not in self.lines:
            where = where[:-1]
        return self.lines[where]

    def problem(self, where: _Where, message: str, hint: str = "") -> None:
        """Tell a problem.

        Raises:
            _Enough: there are as many as are told already.
        """
        if where[:1] == ("edit",) and len(where) > 1:
            self.faulty.add(int(where[1]))
        full = len(self.problems) >= MAX_PROBLEMS
        if full:
            message = f"has more than {MAX_PROBLEMS} problems; what follows was not looked at"
            hint = "mend those before it first"
        self.problems.append(Problem(self.file, self.line(where), message, hint))
        if full:
            raise _Enough

    def warn(self, where: _Where, message: str, hint: str) -> None:
        """Tell a warning, unless there are as many as are told already."""
        if len(self.warnings) == MAX_PROBLEMS:
            message, hint = f"has more than {MAX_PROBLEMS} warnings; no more are told", "look at those before it first"
        if len(self.warnings) <= MAX_PROBLEMS:
            self.warnings.append(Problem(self.file, self.line(where), message, hint))

    def _unknown(self, table: Mapping[str, object], where: _Where, known: Sequence[str]) -> None:
        for key in table:
            if key not in known:
                inside = f" in {_label(where)}" if len(where) > 2 else ""
                stray = key in ("version", "method") and where
                hint = "write it above the first [[edit]]" if stray else nearest(key, known)
                self.problem((*where, key), f"unknown key {quoted(key)}{inside}", hint)

    def _text(self, value: object, where: _Where) -> str:
        """The value if it is a string, with a problem for what no such string may hold; else empty."""
        name = _field(where)
        if not isinstance(value, str):
            text = _told(value)
            hint = f"write it in quotes: {quoted(text)}" if text else "write one string in quotes"
            self.problem(where, f"{_label(where)} is {_type(value)}, not a string", hint)
            return ""
        if not value.strip():
            if value or name not in _MAY_BE_EMPTY:
                hint = "write it" if name in REQUIRED else "write it or take it out"
                self.problem(where, f"{_label(where)} is empty", hint)
            return ""
        if len(value) > LIMITS[name]:
            message = f"{_label(where)} has {len(value)} characters, at most {LIMITS[name]} are allowed"
            # Nothing more is said of it: what follows is meant for short texts, and takes long ones long.
            self.problem(where, message, "say it shorter")
            return ""
        hidden = "" if value.isprintable() else _HIDDEN.findall(value)
        if hidden := [c for c in hidden if c not in "\n\t" or name not in _LONG_TEXTS]:
            message = f"{_label(where)} contains {_hidden_name(hidden[0])} {visible(hidden[0])}: {quoted(value)}"
            self.problem(
                where, message, "take it out: readers do not see it, and a model reads it as tokens of its own"
            )
        elif name not in _PROSE and value != value.strip():
            hint = "take it out: a space at the end changes the tokens of the prompt and of its answer"
            self.problem(where, f"{_label(where)} begins or ends with a space: {quoted(value)}", hint)
        return value

    def _list(self, value: object, where: _Where) -> list[object]:
        if not isinstance(value, list):
            hint = 'write it in brackets: ["…"]' if isinstance(value, str) else "write a list in brackets: [ ]"
            self.problem(where, f"{_label(where)} is {_type(value)}, not a list", hint)
            return []
        if len(value) > MAX_ITEMS:
            message = f"{_label(where)} has {len(value)} items, at most {MAX_ITEMS} are allowed"
            self.problem(where, message, "keep those that tell most")
        return value[:MAX_ITEMS]

    def _texts(self, value: object, where: _Where) -> tuple[str, ...]:
        return tuple(self._text(item, (*where, at)) for at, item in enumerate(self._list(value, where)))

    def _probe(self, value: object, where: _Where) -> Probe:
        if isinstance(value, str):
            return Probe(prompt=self._text(value, where))
        if not isinstance(value, dict):
            hint = 'write "prompt" or { prompt = "…", answer = "…" }'
            self.problem(where, f"{_label(where)} is {_type(value)}, not a string or a table", hint)
            return Probe(prompt="")
        self._unknown(value, where, tuple(Probe.model_fields))
        if "prompt" not in value:
            self.problem(where, f"prompt of {_label(where)} is missing", 'write prompt = "…" in the table')
        answer, at = value.get("answer", []), (*where, "answer")
        return Probe(
            prompt=self._text(value["prompt"], (*where, "prompt")) if "prompt" in value else "",
            answer=self._texts(answer, at) if isinstance(answer, list) else (self._text(answer, at),),
            kind=self._text(value.get("kind", ""), (*where, "kind")),
            group=self._text(value.get("group", ""), (*where, "group")),
        )

    def _extra(self, value: object, where: _Where) -> str:
        """The table as JSON text; empty, with a problem, for what is none."""
        if not isinstance(value, dict):
            self.problem(where, f"extra is {_type(value)}, not a table", "write a table: extra = { case = 7 }")
            return ""
        try:
            text = toml.canonical(table) if isinstance(table := toml.told(value), dict) else ""
        except (ValueError, RecursionError) as error:
            message = "holds a number of too many digits" if "digits" in str(error) else visible(str(error), 200)
            self.problem(where, f"extra {message}", "write plain texts, numbers, lists and tables")
            return ""
        if not text:
            self.problem(where, "extra is not a table", "write a table: extra = { case = 7 }")
        elif len(text) > LIMITS["extra"]:
            message = f"extra has {len(text)} characters as JSON, at most {LIMITS['extra']} are allowed"
            self.problem(where, message, "keep what tells most")
            return ""
        return "" if text == "{}" else text

    def _edit(self, raw: object, index: int) -> None:
        where = ("edit", index)
        if not isinstance(raw, dict):
            self.problem(where, f"{_label(where)} is {_type(raw)}, not a table", "write an [[edit]] table")
            return
        self._unknown(raw, where, KEYS)
        values: dict[str, Any] = dict.fromkeys(REQUIRED, "")
        for name in KEYS:
            at = (*where, name)
            if name not in raw:
                if name in REQUIRED:
                    self.problem(where, f"{name} is missing", f'every edit needs {name} = "…"')
            elif name in ("locality", "portability"):
                probes = enumerate(self._list(raw[name], at))
                values[name] = tuple(self._probe(item, (*at, position)) for position, item in probes)
            elif name == "extra":
                values[name] = self._extra(raw[name], at)
            else:
                values[name] = (self._texts if name in _LISTS else self._text)(raw[name], at)
        if "id" in raw:
            if values["id"] and not _ID.fullmatch(values["id"]):
                hint = f'use a-z, 0-9, ".", "_" and "-", and begin with a letter or digit: id = "{slug(values["id"])}"'
                self.problem((*where, "id"), f"id {quoted(values['id'])} is not a plain name", hint)
        elif values["subject"] and values["relation"]:
            self.unnamed.add(index)
            values["id"] = slug(values["subject"], values["relation"])
        edit = Edit(**values, method=self.method, file=self.file, line=self.line(where))
        self.edits.append((index, edit))
        self._check_target(edit, where)
        if edit.subject and edit.relation:
            self._check_relation(edit, where)
            self._check_paraphrases(edit, where)
        for position, text in enumerate(edit.generation):
            self._slots(text, (*where, "generation", position))
        self._check_locality(edit, where)
        self._check_portability(edit, where)

    def _check_target(self, edit: Edit, where: _Where) -> None:
        for name in ("subject", "target_new"):
            if SLOT in getattr(edit, name):
                self.problem((*where, name), f"{name} contains {{}}", "{} stands for the subject, only in prompts")
        if edit.target_new and edit.target_new == edit.target_true:
            message = f"target_new and target_true are both {quoted(edit.target_new)}"
            self.problem((*where, "target_new"), message, "an edit changes something: give another target")

    def _slots(self, text: str, where: _Where) -> int:
        """How many places for the subject the prompt has, with a problem for more than one."""
        slots = text.count(SLOT)
        if slots > 1:
            hint = "keep one {}: the fact is about one subject, looked up at one place"
            self.problem(where, f"{_label(where)} has {slots} places {{}} for the subject", hint)
        return slots

    def _check_relation(self, edit: Edit, where: _Where) -> None:
        at = (*where, "relation")
        slots, named = self._slots(edit.relation, at), len(mentions(edit.subject, edit.relation))
        if slots == 1 and named:
            hint = "keep one of the two: the subject is looked up at {}"
            self.problem(at, f"relation names the subject {quoted(edit.subject)} beside {{}}", hint)
        if slots:
            return
        if named == 1:
            hint = f"write relation = {quoted(edit.relation.replace(edit.subject, SLOT, 1), 200)}"
        elif named:
            hint = f"the subject stands in it {named} times: write {{}} for one and reword the others"
        else:
            # A guess takes up to 40 ms; whoever has this many problems mends them by a rule.
            near = _near(edit.subject, edit.relation) if len(self.problems) < 100 else ""
            hint = f"did you mean {quoted(near, 200)}?" if near else "write {} where the subject stands"
        self.problem(at, "relation has no place {} for the subject", hint)

    def _check_paraphrases(self, edit: Edit, where: _Where) -> None:
        seen: dict[str, int] = {}
        for position, (text, prompt) in enumerate(zip(edit.paraphrases, edit.paraphrase_prompts, strict=True)):
            at = (*where, "paraphrases", position)
            if not text or self._slots(text, at) > 1:
                continue
            named = len(mentions(edit.subject, text))
            if prompt == edit.prompt:
                self.problem(at, f"{_label(at)} is the prompt of the edit itself", "reword it or take it out")
            elif prompt in seen:
                self.problem(at, f"{_label(at)} repeats paraphrase {seen[prompt] + 1}", "take one out")
            elif SLOT not in text and named != 1:
                count = f"names the subject {named} times" if named else "has no {} and does not name the subject"
                self.warn(at, f"{_label(at)} {count}", "write {} for the subject, unless another name of it is meant")
            seen.setdefault(prompt, position)

    def _check_locality(self, edit: Edit, where: _Where) -> None:
        seen: dict[str, int] = {}
        changed = {edit.prompt, *edit.paraphrase_prompts}
        for position, (probe, prompt) in enumerate(zip(edit.locality, edit.locality_prompts, strict=True)):
            at = (*where, "locality", position)
            if not prompt or self._slots(probe.prompt, at) > 1:
                continue
            if prompt in changed:
                hint = "a locality probe asks for what must stay: take it out"
                self.problem(at, f"{_label(at)} is a prompt that the edit changes", hint)
            elif prompt in seen:
                self.problem(at, f"{_label(at)} repeats locality probe {seen[prompt] + 1}", "take one out")
            elif SLOT not in probe.prompt and edit.subject and mentions(edit.subject, prompt):
                hint = "write {} for another fact about the subject that must stay, or move it to portability"
                self.problem(at, f"{_label(at)} is about the subject: {quoted(prompt)}", hint)
            if probe.group:
                hint = "take it out: a group counts when one of its answers is right, and locality asks for none"
                self.problem(at, f"{_label(at)} has a group", hint)
            seen.setdefault(prompt, position)

    def _check_portability(self, edit: Edit, where: _Where) -> None:
        kinds: dict[str, str] = {}
        for position, probe in enumerate(edit.portability):
            at = (*where, "portability", position)
            self._slots(probe.prompt, at)
            if probe.group and kinds.setdefault(probe.group, probe.kind) != probe.kind:
                message = f"{_label(at)} is of another kind than the rest of its group {quoted(probe.group)}"
                self.problem(at, message, "give all probes of a group one kind: together they are one question")
            if probe.prompt and not probe.answer:
                hint = 'write { prompt = "…", answer = "…" }: only an answer tells whether the edit carried over'
                self.problem(at, f"{_label(at)} has no answer", hint)


class _Judge(Reader):
    """A table that no file holds yet."""

    def __init__(self, table: Mapping[str, object]) -> None:
        super().__init__("", "")
        self.found: list[tuple[_Where, str]] = []
        self._edit(table, 0)

    def line(self, where: _Where) -> int:
        return 0

    def problem(self, where: _Where, message: str, hint: str = "") -> None:
        if where:
            self.found.append((where[2:], message))

    def warn(self, where: _Where, message: str, hint: str) -> None:
        pass


def judge(table: Mapping[str, object]) -> tuple[Edit, list[tuple[tuple[str | int, ...], str]]]:
    """The edit of a table as TOML would hold it, and what is wrong with it by itself: where in the table, and what."""
    judge = _Judge(table)
    return judge.edits[0][1], judge.found


def _check_together(found: Sequence[tuple[Reader, int, Edit]]) -> None:
    """Hold the edits of all files against each other."""
    ids: dict[str, Edit] = {}
    prompts: dict[str, Edit] = {}
    subjects: dict[str, Edit] = {}
    for reader, index, edit in found:
        where: _Where = ("edit", index)
        usable = bool(edit.subject) and edit.relation.count(SLOT) == 1
        same = prompts.setdefault(edit.prompt, edit) if usable else edit
        if same is not edit and same.target_new == edit.target_new:
            message = f"duplicate of {quoted(same.id)} at {_place(same)}"
            reader.problem(where, message, "take one out, and keep the probes of both in the other")
        elif same is not edit:
            targets = f"({quoted(same.target_new)} -> {quoted(edit.target_new)})"
            message = f"contradicts {quoted(same.id)} at {_place(same)} {targets}"
            reader.problem(where, message, "a model can be taught one of them; take the other out")
        named = ids.setdefault(edit.id, edit) if edit.id else edit
        if named is not edit and not (index in reader.unnamed and same is not edit):
            made = " (made from subject and relation)" if index in reader.unnamed else ""
            hint = 'give this edit an id of its own: id = "…"'
            message = f"id {quoted(edit.id)}{made} is taken by the edit at {_place(named)}"
            reader.problem((*where, "id"), message, hint)
        kin = subjects.setdefault(edit.subject, edit) if usable else edit
        if kin is not edit and same is edit:
            message = f"shares the subject {quoted(edit.subject)} with {quoted(kin.id)} at {_place(kin)}"
            reader.warn(where, message, "they are taught together, which is harder than one; look at both afterwards")
    for reader, index, edit in found:
        for position, prompt in enumerate(edit.locality_prompts):
            other = prompts.get(prompt, edit)
            if other is not edit and prompt != edit.prompt:
                theirs = f"the edit {quoted(other.id)} at {_place(other)}"
                message = f"locality probe {position + 1} asks what {theirs} changes"
                reader.problem(("edit", index, "locality", position), message, "take it out: its answer will not stay")


TOKEN = re.compile(
    r'"{3}(?:[^"\\]+|\\.|"{1,2}(?!"))*+"{3,5}'  # multi-line strings, which may end in quotes of their own
    r"|'{3}(?:[^']+|'{1,2}(?!'))*+'{3,5}"
    r'|"(?:[^"\\]|\\.)*+"' + r"|'[^']*'"
    r"""|\#[^\n]*|\n(?:\s|\#[^\n]*)*+|[\[\]{}=,]|[^\s\[\]{}=,"'\#.]+""",
    re.S,
)
"""The pieces of a valid TOML text: strings, a comment after a value, a line end with the empty lines and comments below
it, brackets and other signs, and words; spaces and dots lie between them."""

_HEADER = re.compile(r"""^[ \t]*\[\[[ \t]*(?:edit|"edit"|'edit')[ \t]*\]\]""", re.M)


def _header_lines(text: str, edits: int) -> list[int]:
    """The lines of the edits' headers; empty where a look at the lines alone cannot tell."""
    if '"""' in text or "'''" in text:
        return []
    found, line, seen = [], 1, 0
    for match in _HEADER.finditer(text):
        line, seen = line + text.count("\n", seen, match.start()), match.start()
        found.append(line)
    return found if len(found) == edits else []


def locate(text: str) -> dict[tuple[str | int, ...], int]:
    """The line of every key, list item and table of a TOML text that is known to be valid; tomli tells none.

    A place is the keys and positions, from 0, that lead to it. Places deeper than `MAX_DEPTH` and list items after the
    first `MAX_EDITS` are left out: their lines are those of what is around them.
    """
    lines: dict[_Where, int] = {(): 1}
    counts: dict[_Where, int] = {}
    table: _Where = ()
    key: list[str] = []
    value: _Where | None = None  # whose value comes next; None while a key is read
    opened: list[tuple[_Where, int]] = []  # lists and inline tables around: a list with its position, a table with -1
    brackets, line, seen = 0, 1, 0

    def inside(where: _Where, part: str | int) -> _Where:
        return where if len(where) > MAX_DEPTH else (*where, part)

    def found(where: _Where) -> None:
        last = where[-1] if where else ""
        if len(where) <= MAX_DEPTH and not (isinstance(last, int) and last >= MAX_EDITS):
            lines.setdefault(where, line)

    for match in TOKEN.finditer(text + "\n"):
        token, line, seen = match[0], line + text.count("\n", seen, match.start()), match.start()
        in_list = bool(opened) and opened[-1][1] >= 0
        if token[0] == "#" or (token[0] == "\n" and opened):
            continue
        if token[0] == "\n":
            if brackets:
                table = ()
                for part in key:
                    table = inside(inside(table, counts[table] - 1) if table in counts else table, part)
                    found(table)
                if brackets == 2:
                    counts[table] = counts.get(table, 0) + 1
                    table = inside(table, counts[table] - 1)
                found(table)
            key, value, brackets = [], None, 0
        elif token in "]}" and opened:
            opened.pop()
            value = ()
        elif token == ",":
            around, position = opened[-1]
            if in_list:
                opened[-1] = (around, position + 1)
            else:
                key, value = [], None
        elif in_list or value is not None:
            here: _Where = inside(*opened[-1]) if in_list else value or ()
            found(here)
            if token in "[{":
                opened.append((here, 0 if token == "[" else -1))
                key, value = [], None
        elif token == "=":
            value = opened[-1][0] if opened else table
            for part in key:
                value = inside(value, part)
                found(value)
        elif token == "[":
            brackets += 1
        elif token != "]":
            key.append(tomli.loads(f"key={token}")["key"] if token[0] in "\"'" else token)
    return lines


def _label(where: _Where) -> str:
    """What a value is called in a message: `prompt of locality probe 2`."""
    names: list[str] = []
    for part in where[2:] if where[:1] == ("edit",) and len(where) > 2 else where:
        if isinstance(part, int):
            names[-1] = f"{_NOUNS.get(names[-1], names[-1])} {part + 1}"
        else:
            names.append(part)
    return " of ".join(reversed(names))


def _field(where: _Where) -> str:
    """The key of LIMITS that a value comes under."""
    name = str(where[-2] if isinstance(where[-1], int) else where[-1])
    return "prompt" if name in ("locality", "portability") else name


def _told(value: object) -> str:
    """A value as TOML writes it; empty for lists, tables and numbers that TOML promises no place for."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict | list) or (isinstance(value, int) and abs(value) >= 2**63):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "a table"}
    return names.get(type(value), "a date or time")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not among the known ones: the one nearest to it, or which there are."""
    known = list(known)
    close = get_close_matches(name, known, 1)
    few = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f'did you mean "{close[0]}"?' if close else f"known: {few}" if known else "it has none"


def _hidden_name(character: str) -> str:
    if character in "\n\r\u2028\u2029\x85":
        return "a line break"
    if "\ud800" <= character <= "\udfff":
        return "half a character"
    if character in "\u200b\ufeff":
        return "an invisible character"
    return "a direction override" if character > "\u2029" else "a control character"


def _place(edit: Edit) -> str:
    return f"{visible(edit.file, 500)}:{edit.line}"


def mentions(subject: str, text: str) -> list[int]:
    """Where the text names the subject in whole words; letters without case belong to scripts without spaces."""
    found: list[int] = []
    at = text.find(subject)
    if at < 0:
        return found
    first, last = (c.isdigit() or c.lower() != c.upper() for c in (subject[0], subject[-1]))
    while at >= 0:
        end = at + len(subject)
        within = (first and _in_word(text[max(0, at - 1) : at])) or (last and _in_word(text[end : end + 1]))
        if not within:
            found.append(at)
        at = text.find(subject, at + 1 if within else end)
    return found


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _near(subject: str, text: str) -> str:
    """The text with {} for the words that nearly spell the subject; empty when none do."""
    words = [match.span() for match in re.finditer(r"\S+", text[:300])]
    count = len(subject.split())
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(subject.casefold())
    best, found = 0.75, ""
    for size in range(max(1, count - 1), count + 2):
        for first in range(len(words) - size + 1):
            start, end = words[first][0], words[first + size - 1][1]
            matcher.set_seq1(text[start:end].casefold())
            if matcher.quick_ratio() > best and matcher.ratio() > best:
                best, found = matcher.ratio(), text[:start] + SLOT + text[end:]
    return found


def slug(*texts: str) -> str:
    """A plain name from the words of the texts; what has no Latin letter counts by its hash."""
    parts = []
    for text in texts:
        ascii_text = unicodedata.normalize("NFKD", text.replace(SLOT, " ")).encode("ascii", "ignore").decode().lower()
        words = re.findall(r"[a-z0-9]+", ascii_text)
        parts += words or ([sha256(text.encode()).hexdigest()[:8]] if text.strip("{} ") else [])
    return "-".join(parts)[:60].strip("-")


def _fingerprint(fields: Mapping[str, Any]) -> str:
    return sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]
