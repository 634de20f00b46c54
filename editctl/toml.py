"""Values as TOML writes them, and JSON values that TOML has no place for.

Knows: the text of a value, and how null, numbers of any size, halves of characters and very deep values survive in a
TOML file: as a table with the one key `json`, whose text is the value's JSON. Refuses: files, and what a value means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from json.encoder import encode_basestring
from typing import Any

MAX_DEPTH = 12
"""How deep tables and lists nest before a value is written as JSON text; readers of TOML stop at some depth."""

_AS_JSON = "json"
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_HALVES = re.compile("[\ud800-\udfff]")


def text(value: Any) -> str:
    """The TOML text, on one line, of a string, number, boolean, list or mapping of such."""
    if isinstance(value, str):
        # JSON's escapes are TOML's, save that TOML also wants DEL escaped
        return encode_basestring(value).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "nan" if value != value else repr(value)
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{key(name)} = {text(item)}" for name, item in value.items())
        return f"{{{pairs}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text, value))}]"
    return str(value)


def lines(values: list[Any]) -> str:
    """The TOML text of a list, an item a line when there are several."""
    if len(values) < 2:
        return text(values)
    return "[\n" + "".join(f"    {text(value)},\n" for value in values) + "]"


def key(name: str) -> str:
    """A key as TOML writes it, in quotes where it needs them."""
    return name if _BARE.fullmatch(name) else text(name)


def canonical(value: Any) -> str:
    """The one JSON text of a value: keys in order, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def held(value: Any, depth: int = 0) -> Any:
    """A JSON value as values that TOML has."""
    if isinstance(value, dict):
        bare = not any(_HALVES.search(name) for name in value) and set(value) != {_AS_JSON}
        if bare and depth < MAX_DEPTH:
            return {name: held(item, depth + 1) for name, item in value.items()}
    elif isinstance(value, list):
        if depth < MAX_DEPTH:
            return [held(item, depth + 1) for item in value]
    elif isinstance(value, str):
        if not _HALVES.search(value):
            return value
    elif isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    return {_AS_JSON: canonical(value)}


def told(value: Any, depth: int = 0) -> Any:
    """The JSON value that `held` made TOML values of; dates and times become their text.

    Raises:
        ValueError: the text under a lone key `json` is none, or tables and lists nest deeper than `MAX_DEPTH`.
    """
    if isinstance(value, dict | list) and depth > MAX_DEPTH:
        raise ValueError(f"nests deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        if set(value) == {_AS_JSON} and isinstance(value[_AS_JSON], str):
            try:
                return json.loads(value[_AS_JSON])
            except (ValueError, RecursionError):
                raise ValueError("holds a table with the one key json whose text is not JSON") from None
        return {name: told(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [told(item, depth + 1) for item in value]
    return value.isoformat() if isinstance(value, date | datetime | time) else value
