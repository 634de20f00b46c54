"""Where a model comes from, and its identity by content. Loads no torch, so that a plan needs none.

Knows: `atlas`, local folders, hub ids, the local cache, a hub that cannot be reached, and which code a model brings.
Refuses: loading; code that a model names but does not bring.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from editctl import atlas
from editctl.errors import ModelError

IDENTITY_FILES = (
    *("*.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*.py"),
)
"""What decides a model's answers; their content is the model's identity."""
HUB_PATIENCE = 1.0
"""Seconds to find out whether the model hub can be reached at all."""


def locate(name: str) -> Path:
    """The folder of a model given as `atlas`, a local folder, or a hub id.

    A hub id is looked for in the local cache first, then fetched.

    Raises:
        ModelError: there is no such folder, or the hub has to be asked and cannot be reached.
    """
    if name == atlas.NAME:
        return atlas.FOLDER
    nowhere = ModelError(f"there is no folder {name}", "give `atlas`, a local folder or a hub id such as gpt2")
    if "\0" in name:  # which no path has, and the system's calls raise of
        raise nowhere
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name} is not a model folder: it has no config.json", "give a Hugging Face model folder")
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise nowhere
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.txt", "tokenizer.model", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except HFValidationError:
        raise nowhere from None
    except (LocalEntryNotFoundError, OSError):
        pass
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    if offline or not hub_reachable():
        why = "HF_HUB_OFFLINE is set" if offline else "the model hub cannot be reached"
        raise ModelError(
            f"model {name} is neither a folder here nor in the local cache, and {why}",
            "give a local folder, or --model atlas for the built-in model",
        )
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"model {name} could not be fetched: {reason}", "check the name and your access") from error


def hub_reachable() -> bool:
    """Whether the hub's port answers, or the proxy's; name resolution alone may hang for long, so a thread does it."""
    proxies = (os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    address = next(filter(None, proxies), None) or os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    place = urlsplit(address if "//" in address else f"//{address}")
    name, port = place.hostname or "", place.port or 443
    answered: list[bool] = []

    def knock() -> None:
        try:
            socket.create_connection((name, port), timeout=HUB_PATIENCE).close()
            answered.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    return bool(answered)


def identity(folder: Path, *, trusted: bool = False) -> str:
    """Content hash (32 hexadecimal digits) of a model folder's weights, configuration, tokenizer and code.

    Args:
        trusted: the model's own code is run. That makes another model of the same files, since transformers may have
            a class of its own for them.
    """
    total = hashlib.sha256(b"run" if trusted and _references(folder) else b"")
    for path in sorted({p for pattern in IDENTITY_FILES for p in folder.glob(pattern)}):
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return total.hexdigest()[:32]


def code(folder: Path) -> tuple[str, ...]:
    """Names of the files of code in a model folder; none when no configuration there names any to be run.

    Raises:
        ModelError: it names code that is not in the folder, so that its identity would not hold it.
    """
    references = _references(folder)
    for reference in references:
        module, dot, _ = reference.partition(".")
        if not (dot and re.fullmatch(r"[\w-]+", module) and (folder / f"{module}.py").is_file()):
            raise ModelError(
                f"{folder} names code that is not in it ({reference})",
                "put the file into the folder; code from elsewhere is never run",
            )
    return tuple(sorted(path.name for path in folder.glob("*.py"))) if references else ()


def _references(folder: Path) -> list[str]:
    """The classes that a model and its tokenizer ask to have loaded from code, as MODULE.CLASS or REPOSITORY--…"""
    found: list[Any] = []
    for name in ("config.json", "tokenizer_config.json"):
        with suppress(OSError, ValueError, AttributeError):
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map")
            for value in named.values() if isinstance(named, dict) else [named]:
                found += value if isinstance(value, list) else [value]
    return [reference for reference in found if isinstance(reference, str)]


def configuration(folder: Path) -> dict[str, Any]:
    """The model folder's config.json.

    Raises:
        ModelError: it is not JSON.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{folder / 'config.json'} cannot be read: {error}", "give a Hugging Face model folder"
        ) from None
    return config
