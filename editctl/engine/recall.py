"""What the unedited model said, kept so that it is asked once.

Knows: a file a model content, dtype, device and library, of JSON lines that are only added to. Refuses: versions; what
they say is recorded with them. A line that is damaged or cut is asked again; a folder that cannot be written is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from editctl.engine.model import Model
from editctl.engine.speak import NEW_TOKENS, Score
from editctl.files import write_atomically

LIBRARIES = ("editctl", "torch", "transformers", "tokenizers")
"""What decides what a model says to a text, and what of it is kept."""
T = TypeVar("T")
_Words = tuple[str, int]
_Scored = tuple[str, str]


class Recall:
    """The words and scores of one unedited model.

    Args:
        folder: where the files lie.
        of: what decides what the model says: its content, dtype, device, libraries.
    """

    def __init__(self, folder: Path, of: Mapping[str, str]) -> None:
        self._head = json.dumps({**of, "new_tokens": NEW_TOKENS}, sort_keys=True)
        self._path = folder / f"{sha256(self._head.encode()).hexdigest()[:16]}.jsonl"
        self._words: dict[_Words, str] = {}
        self._scores: dict[_Scored, Score] = {}
        self._values: dict[str, Any] = {}
        self._read = self._foreign = False

    @classmethod
    def of(cls, model: Model, base: str, root: Path) -> Recall:
        """What the unedited model of content `base` said in the workspace whose store is `root`, on such a device."""
        about = {"base": base, "dtype": str(model.dtype), "device": model.device.type}
        return cls(root / "said", about | {name: version(name) for name in LIBRARIES})

    def words(self, prompt: str, at_least: int) -> str | None:
        """What was said to a prompt, as `speak.Ask` has it; None if it was not asked."""
        self._load()
        return self._words.get((prompt, at_least))

    def score(self, prompt: str, answer: str) -> Score | None:
        """The score of an answer; None if it was not asked."""
        self._load()
        return self._scores.get((prompt, answer))

    def value(self, name: str, of: object, find: Callable[[], T]) -> T:
        """A JSON value found out about the model before, or else now.

        Args:
            of: what it depends on beside the model.
        """
        key = sha256(json.dumps([name, of]).encode()).hexdigest()
        self._load()
        if key not in self._values:
            self._values[key] = find()
            self._add([{"key": key, "value": self._values[key]}])
        found: T = self._values[key]
        return found

    def keep(self, words: Mapping[_Words, str], scores: Mapping[_Scored, Score]) -> None:
        """Add what was said."""
        self._load()
        lines: list[dict[str, Any]] = [{"prompt": p, "least": n, "words": text} for (p, n), text in words.items()]
        lines += [
            {"prompt": p, "answer": a, "losses": s.losses, "argmax": s.argmax, "hits": s.hits}
            for (p, a), s in scores.items()
        ]
        self._take(lines)
        self._add(lines)

    def _add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._foreign:
                # What has another head, as an empty file on a disk that was full, is of no use to anybody.
                write_atomically(self._path, self._head.encode())
                self._foreign = False
            begin = b"" if self._path.exists() else self._head.encode()
            # One write to the end of the file: what two processes add at once stands one after the other. A line that
            # was cut by a full disk ends here.
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, begin + b"\n" + data)
            finally:
                os.close(handle)

    def _load(self) -> None:
        if self._read:
            return
        self._read = True
        with suppress(OSError):
            lines = self._path.read_bytes().split(b"\n")
            self._foreign = lines[0] != self._head.encode()
            if not self._foreign:
                self._take(_whole(lines[1:]))

    def _take(self, lines: Iterable[Mapping[str, Any]]) -> None:
        for line in lines:
            with suppress(KeyError, TypeError):
                if "key" in line:
                    self._values[line["key"]] = line["value"]
                elif "words" in line:
                    self._words[line["prompt"], line["least"]] = line["words"]
                else:
                    score = Score(tuple(line["losses"]), tuple(line["argmax"]), line["hits"])
                    self._scores[line["prompt"], line["answer"]] = score


def _whole(lines: Iterable[bytes]) -> Iterable[Mapping[str, Any]]:
    """The lines that are JSON objects."""
    for line in lines:
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found
