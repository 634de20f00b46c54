"""The text whose keys are preserved: its lines, and a name of its content. Loads no torch.

Knows: text files, and atlas's own paragraphs. Refuses: tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from editctl import atlas
from editctl.errors import InvalidInput

ATLAS_SEED = 1


def content(model: str, corpus: str) -> str:
    """A name of the corpus's content, so that a plan notices when it changes.

    Args:
        corpus: path of a UTF-8 text file; empty means atlas's own paragraphs, which only atlas has.

    Raises:
        InvalidInput: the file cannot be read, or none is given for a model that brings none.
    """
    if corpus:
        return hashlib.sha256(_read(corpus).encode()).hexdigest()[:16]
    if model == atlas.NAME:
        return f"atlas-{ATLAS_SEED}"
    raise InvalidInput(
        f"{model} needs a corpus to measure which directions its knowledge uses",
        'name a UTF-8 text file: --corpus FILE, or corpus = "FILE" under [settings] in editctl.toml; 1 MB of prose is '
        "a start",
    )


def lines(model: str, corpus: str, expected: str) -> Iterator[str]:
    """The texts of the corpus.

    Args:
        expected: what `content` said when the plan was made.

    Raises:
        InvalidInput: the file cannot be read, or is not what it was.
    """
    if content(model, corpus) != expected:
        raise InvalidInput(
            f"the corpus {corpus} is not the one the plan was made with", "put that text back, or run plan again"
        )
    if corpus:
        return (line.strip() for line in _read(corpus).splitlines() if line.strip())
    from editctl.atlas import corpus as paragraphs
    from editctl.atlas import knowledge

    return (paragraph.text for paragraph in paragraphs.paragraphs(knowledge.load(), ATLAS_SEED))


def _read(corpus: str) -> str:
    try:
        return Path(corpus).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the corpus {corpus} cannot be read: {error}", "give a UTF-8 text file") from None
