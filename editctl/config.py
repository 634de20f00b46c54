"""A workspace's `editctl.toml`: which model, how to edit it, where the store is.

Knows: the file's keys and their defaults. A flag of the command line beats the file, a spec's own `method` beats both
for its edits. Refuses: to know what the settings mean; `engine.methods` does.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from editctl.errors import InvalidInput, Problem
from editctl.files import write_atomically
from editctl.metrics.values import CHECKS
from editctl.spec import NotToml, locate, parse, visible

FILE = "editctl.toml"
MAX_BYTES, MAX_ITEMS, MAX_TEXT, MAX_PROBLEMS = 1_000_000, 1000, 4096, 100
"""Most bytes of the file, items of a list, characters of a text (what Linux takes for a path), and problems told."""
MAX_BITS = 512
"""Longest whole number, which still is a float and can be printed; what is too much for a setting the setting says."""


AFTER_RUN: tuple[str, ...] = CHECKS
"""What is measured beside answers when the file does not say."""


class Config(BaseModel, frozen=True, extra="forbid", strict=True):
    """The keys of `editctl.toml`; every one may be left out."""

    model: str = Field(default="atlas", description="`atlas`, a local model folder or a hub id.")
    device: str = Field(default="auto", description="auto, cpu, cuda or mps.")
    dtype: str = Field(default="auto", description="auto, float32, bfloat16 or float16.")
    method: str = Field(default="alphaedit", description="A method of `editctl methods`.")
    store: str = Field(default="store", description="Folder of versions and factors.")
    specs: list[str] = Field(default=["specs"], description="Spec files and folders used when none are named.")
    settings: dict[str, Any] = Field(default={}, description="Overrides of the method's settings, by name.")
    gates: dict[str, float] = Field(default={}, description="What a version must reach to become the head, by metric.")
    recheck: int = Field(default=1000, ge=0, description="How many of the edits that stay are asked again by a run.")
    checks: list[str] = Field(
        default_factory=lambda: list(AFTER_RUN), description=f"What is measured beside answers: {', '.join(CHECKS)}."
    )
    theme: str = Field(default="", description="Theme of the terminal UI.")
    keys: dict[str, str] = Field(default={}, description="Keys of the terminal UI, by the name that `?` shows.")


def load(path: Path | None = None) -> Config:
    """The workspace's configuration; defaults when the file is not there.

    Args:
        path: the file; by default `editctl.toml` in the working directory, which may be missing.

    Raises:
        InvalidInput: the file cannot be read or holds something unknown; names the line.
    """
    place = path or Path(FILE)
    if path is None and not place.is_file():
        return Config()
    text = _read(place)
    try:
        data = parse(text)
    except NotToml as error:
        raise _invalid(place, [Problem(str(place), error.line, f"not TOML: {error}", error.hint)]) from None
    lines = locate(text)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise _invalid(place, [_problem(place, lines, e["loc"], e["msg"]) for e in _first(error)]) from None
    if unknown := next((name for name in config.checks if name not in CHECKS), None):
        message, hint = f"no check is called {visible(unknown)}", f"one of: {', '.join(CHECKS)}"
        raise _invalid(place, [Problem(str(place), lines.get(("checks",), 1), message, hint)])
    problems = []
    for name in sorted(config.model_fields_set):
        value = getattr(config, name)
        for key, part in value.items() if isinstance(value, dict) else [("", value)]:
            where = (name, key) if key else (name,)
            if wrong := unfit(part):
                told = visible(".".join(where))
                problems.append(Problem(str(place), lines.get(where, 1), f"{told} {wrong}", _meaning(name)))
    if problems:
        raise _invalid(place, problems[:MAX_PROBLEMS])
    return config


def line_of(path: Path | None, where: tuple[str, ...]) -> int:
    """The line of a value in the configuration, for who knows what it means; 1 if it stands nowhere.

    Args:
        path: as `load` takes it.
        where: the keys that lead to it.
    """
    try:
        text = _read(path or Path(FILE))
        parse(text)
    except (InvalidInput, NotToml):
        return 1
    return locate(text).get(where, 1)


def put(path: Path, where: tuple[str, str], value: Any) -> None:
    """Set one value in a table of a configuration file, made if absent; all other values and the comments stay.

    Raises:
        InvalidInput: the file cannot be read, is not TOML or cannot take the value.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    place = Path(os.path.realpath(path))  # a link stays a link
    text, (table, key) = (_read(path) if path.exists() else ""), where
    try:
        before = parse(text)
    except NotToml as error:
        raise _invalid(path, [Problem(str(path), error.line, f"not TOML: {error}", error.hint)]) from None
    old = before.get(table, {})
    try:
        document = tomlkit.parse(text)
        document.setdefault(table, tomlkit.table())[key] = value
        made = tomlkit.dumps(document)
        made = re.sub(r"(?<!\r)\n", "\r\n", made) if "\r\n" in text else made
        # Read back before the file is touched: what the writer gets wrong costs a message, never a value.
        good = parse(made) == {**before, table: {**old, key: value}}
    except (TOMLKitError, NotToml, ValueError, TypeError, RecursionError):
        good = False
    if not good:
        raise InvalidInput(f"{path} cannot take {key} = {value} as it is", f"write it under [{table}] in an editor")
    mode = place.stat().st_mode if place.exists() else None
    write_atomically(place, made.encode())
    if mode is not None:
        place.chmod(mode)


def unfit(value: object) -> str:
    """Why a value can be none of the configuration's, whatever its name; empty if it can."""
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        return f"has {len(value)} items, at most {MAX_ITEMS} are allowed"
    for item in value if isinstance(value, list) else [value]:
        if type(item) not in (bool, int, float, str):
            return "is neither a text, a number, true or false, nor a list of such"
        if isinstance(item, int) and item.bit_length() > MAX_BITS:
            return "is far too large a number"
        if isinstance(item, str) and len(item) > MAX_TEXT:
            return f"has {len(item)} characters, at most {MAX_TEXT} are allowed"
        if isinstance(item, str) and any(ord(c) < 32 or 127 <= ord(c) < 160 for c in item):
            return "contains a control character"
    return ""


def _read(place: Path) -> str:
    """The file's text.

    Raises:
        InvalidInput: there is none.
    """
    try:
        with place.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InvalidInput(f"{place} is larger than {MAX_BYTES // 1_000_000} MB", "a configuration is a few lines")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        problem = Problem(str(place), line, f"not UTF-8 text: byte 0x{byte:02x}", "save the file as UTF-8")
        raise InvalidInput(f"{place} cannot be read", "give a UTF-8 TOML file", [problem]) from None
    except (OSError, ValueError) as error:  # ValueError: no path has a NUL
        reason = getattr(error, "strerror", None) or "no such file"
        raise InvalidInput(f"{place} cannot be read: {reason}", "give a UTF-8 TOML file") from None


def _invalid(place: Path, problems: list[Problem]) -> InvalidInput:
    return InvalidInput(f"{place} is not valid", problems=problems)


def _first(error: ValidationError) -> list[Any]:
    return error.errors(include_url=False, include_context=False, include_input=False)[:MAX_PROBLEMS]


def _problem(
    place: Path, lines: dict[tuple[str | int, ...], int], where: tuple[int | str, ...], message: str
) -> Problem:
    key = str(where[0])
    line = lines.get(where, lines.get((key,), 1))
    if key in Config.model_fields:
        return Problem(str(place), line, f"{key}: {message.lower()}", _meaning(key))
    near = get_close_matches(key, Config.model_fields, 1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(Config.model_fields)}"
    return Problem(str(place), line, f"unknown key {visible(key)}", hint)


def _meaning(key: str) -> str:
    return f"{key}: {Config.model_fields[key].description}"
