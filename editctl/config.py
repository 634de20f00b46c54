"""A workspace's `editctl.toml`: which model, how to edit it, where the store is.

Knows: the file's keys and their defaults. A flag of the command line beats the file, a spec's own `method` beats both
for its edits. Refuses: to know what the settings mean; `engine.methods` does.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tomli
from pydantic import BaseModel, Field, ValidationError

from editctl.errors import InvalidInput, Problem

FILE = "editctl.toml"


class Config(BaseModel, frozen=True, extra="forbid", strict=True):
    """The keys of `editctl.toml`; every one may be left out."""

    model: str = Field(default="atlas", description="`atlas`, a local model folder or a hub id.")
    device: str = Field(default="auto", description="auto, cpu, cuda or mps.")
    dtype: str = Field(default="auto", description="auto, float32, bfloat16 or float16.")
    method: str = Field(default="alphaedit", description="A method of `editctl methods`.")
    store: str = Field(default="store", description="Folder of versions and factors.")
    specs: list[str] = Field(default=["specs"], description="Spec files and folders used when none are named.")
    settings: dict[str, Any] = Field(default={}, description="Overrides of the method's settings, by name.")


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
    try:
        text = place.read_text(encoding="utf-8")
        return Config.model_validate(tomli.loads(text))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{place} cannot be read: {error}", "give a UTF-8 TOML file") from None
    except tomli.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        problem = Problem(str(place), int(line[1]) if line else 1, f"not TOML: {error}")
        raise InvalidInput(f"{place} is not valid", problems=[problem]) from None
    except ValidationError as error:
        problems = [_problem(place, text, item["loc"], item["msg"]) for item in error.errors()]
        raise InvalidInput(f"{place} is not valid", problems=problems) from None


def _problem(place: Path, text: str, where: tuple[int | str, ...], message: str) -> Problem:
    key = str(where[0])
    found = re.search(rf"^[ \t]*\[?{re.escape(key)}\b", text, re.MULTILINE)
    line = text.count("\n", 0, found.start()) + 1 if found else 1
    if key in Config.model_fields:
        return Problem(str(place), line, f"{key}: {message.lower()}")
    near = get_close_matches(key, Config.model_fields, 1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(Config.model_fields)}"
    return Problem(str(place), line, f"unknown key {key}", hint)
