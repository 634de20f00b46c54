"""Files that are there whole or not at all, and names by content.

Knows: atomic writes that outlast a power cut, and the heads of safetensors files. Refuses: to know what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

PART = ".part"
"""What the name of a file that is still being written ends in."""


def digest_of(path: Path) -> str:
    """Content name of a file: the first 32 hexadecimal digits of its SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either there whole or not at all, and stays when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file its name; the name is on disk too when this returns."""
    os.replace(temporary, path)
    # A folder cannot be opened on Windows, where the file system keeps names safe by itself.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of a safetensors file by name, and the JSON values about them; both empty if it is none of editctl's."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(min(size, path.stat().st_size)))
        return tensors, json.loads(tensors.pop("__metadata__")["editctl"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, {}
