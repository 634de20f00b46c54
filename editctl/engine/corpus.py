"""The text whose keys are preserved: its lines, and a name of its content. Loads no torch.

Knows: text files, JSON lines, Hugging Face datasets, atlas's own paragraphs, and which models have to write their own
text. Nothing is read whole into memory. Refuses: tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from editctl import atlas
from editctl.engine import source
from editctl.errors import InvalidInput

ATLAS_SEED = 1
SAMPLES_SEED = 0
JSON_LINES = (".jsonl", ".json-lines")
HUB = "hf:"
CHUNK = 1 << 20
"""Bytes read at once to name a file's content."""
LONGEST = 1 << 16
"""Characters of a line given at once; a text without line ends comes in pieces of that size."""


def sampled(model: str, corpus: str) -> int | None:
    """The seed of the model's own samples, if they are what `corpus` names; None if it names a text."""
    return None if corpus or model == atlas.NAME else SAMPLES_SEED


def content(model: str, corpus: str) -> str:
    """A name of the corpus's content, so that a plan notices when it changes.

    Args:
        corpus: path of a UTF-8 text file, path of a file of JSON lines (.jsonl or .json-lines), `hf:NAME[:CONFIG]` for
            a dataset of the hub or a local folder of one, or empty: atlas's paragraphs for atlas, for any other model
            samples that it writes itself.

    Raises:
        InvalidInput: the text cannot be read, or the hub cannot be asked for it.
    """
    if "\0" in corpus:  # which no path has, and the system's calls raise of
        raise InvalidInput(f"there is no corpus {corpus}", "give a UTF-8 text file or JSON lines (.jsonl)")
    if corpus.startswith(HUB):
        return _hub_content(*_hub_name(corpus))
    if corpus:
        prefix = "jsonl-" if _is_json_lines(corpus) else ""
        return prefix + _file_content(corpus)
    seed = sampled(model, corpus)
    return f"atlas-{ATLAS_SEED}" if seed is None else f"samples-{seed}"


def lines(model: str, corpus: str, expected: str) -> Iterator[str]:
    """The texts of the corpus, read as they are asked for; none if the model writes its own.

    Args:
        expected: what `content` said when the plan was made.

    Raises:
        InvalidInput: the text cannot be read, or is not what it was; at once, or when a line is reached that is wrong.
    """
    if content(model, corpus) != expected:
        raise InvalidInput(
            f"the corpus {corpus} is not the one the plan was made with", "put that text back, or run plan again"
        )
    if corpus.startswith(HUB):
        return _hub_lines(*_hub_name(corpus))
    if corpus:
        return _json_lines(corpus) if _is_json_lines(corpus) else _text_lines(corpus)
    if sampled(model, corpus) is not None:
        return iter(())
    from editctl.atlas import corpus as paragraphs
    from editctl.atlas import knowledge

    return (paragraph.text for paragraph in paragraphs.paragraphs(knowledge.load(), ATLAS_SEED))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _is_json_lines(corpus: str) -> bool:
    return Path(corpus).suffix in JSON_LINES


def _file_content(corpus: str) -> str:
    """The first 16 hexadecimal digits of the file's SHA-256.

    Raises:
        InvalidInput: it cannot be read or is not UTF-8.
    """
    total, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    try:
        with Path(os.path.expanduser(corpus)).open("rb") as file:
            while chunk := file.read(CHUNK):
                decoder.decode(chunk)
                total.update(chunk)
        decoder.decode(b"", final=True)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"the corpus {corpus} cannot be read: {error}",
            f"give a UTF-8 text file, JSON lines (.jsonl), or {HUB}NAME for a dataset of the hub",
        ) from None
    return total.hexdigest()[:16]


def _text_lines(corpus: str) -> Iterator[str]:
    """Lines without white space around them; longer ones than `LONGEST` in pieces, cut between words."""
    with Path(os.path.expanduser(corpus)).open(encoding="utf-8") as file:
        rest = ""
        while piece := file.readline(LONGEST):
            whole = piece.endswith("\n")
            piece, rest = rest + piece, ""
            if not whole:
                head, space, tail = piece.rpartition(" ")
                if space:
                    piece, rest = head, tail
            if line := piece.strip():
                yield line
        if rest:
            yield rest


def _json_lines(corpus: str) -> Iterator[str]:
    """The text of each line.

    Raises:
        InvalidInput: a line is not a JSON object with a text; names file and line.
    """
    with Path(os.path.expanduser(corpus)).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InvalidInput(
                    f"{corpus}:{number}: not JSON: {error}", 'every line must be an object such as {"text": "…"}'
                ) from None
            if text := _text_of(row, f"{corpus}:{number}"):
                yield text


def _text_of(row: Any, place: str) -> str:
    """The field `text` of one row.

    Raises:
        InvalidInput: there is none, or it is no text.
    """
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        there = f"its fields are {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else "it is no object"
        raise InvalidInput(
            f"{place}: no text under the field text; {there}", 'name the field that holds the text "text"'
        )
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    text: str = row["text"].encode("utf-8", "replace").decode()
    return text.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


def _hub_name(corpus: str) -> tuple[str, str | None]:
    """Name and configuration of `hf:NAME[:CONFIG]`."""
    name, _, config = corpus.removeprefix(HUB).partition(":")
    return name, config or None


def _hub_content(name: str, config: str | None) -> str:
    """A name for what a dataset holds: by its revision on the hub, by its files if it is a local folder.

    Raises:
        InvalidInput: the library is missing, or the hub cannot be asked.
    """
    _library()
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        revision = _folder_content(folder)
        name = ""
    else:
        revision = _revision(name)
    return "hf-" + hashlib.sha256(json.dumps([name, config, revision]).encode()).hexdigest()[:16]


def _folder_content(folder: Path) -> str:
    """Hash of the files of a folder, by name and content."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{found}\0".encode())
    return total.hexdigest()


def _revision(name: str) -> str:
    """The commit a dataset of the hub is at.

    Raises:
        InvalidInput: the hub cannot be reached, or has no such dataset.
    """
    remedy = "give a text file or JSON lines, or a local folder of the dataset: hf:FOLDER"
    if not source.hub_reachable():
        raise InvalidInput(f"the dataset {name} is no local folder, and the model hub cannot be reached", remedy)
    from huggingface_hub import HfApi

    with _asking(name):
        return str(HfApi().dataset_info(name).sha)


def _hub_lines(name: str, config: str | None) -> Iterator[str]:
    """The texts of a dataset's training split, streamed.

    Raises:
        InvalidInput: it cannot be read, or has no texts.
    """
    folder = Path(os.path.expanduser(name))
    where = {"path": str(folder)} if os.path.isdir(folder) else {"path": name, "revision": _revision(name)}
    datasets = _library()
    with _asking(name):
        rows = iter(datasets.load_dataset(**where, name=config, split="train", streaming=True))
    for number in itertools.count(1):
        with _asking(name):
            row = next(rows, None)
        if row is None:
            return
        if text := _text_of(row, f"row {number} of the dataset {name}"):
            yield text


def _library() -> Any:
    """The optional library `datasets`.

    Raises:
        InvalidInput: it is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise InvalidInput(
            "datasets of the hub need the library `datasets`", "pip install 'editctl[datasets]'"
        ) from None


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """Whatever the library or the hub refuses, as an error that names the dataset.

    Raises:
        InvalidInput: one of them refused.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidInput(
            f"the dataset {name} cannot be read: {reason}", "check its name, its configuration and your access"
        ) from None
