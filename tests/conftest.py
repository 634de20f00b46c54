"""Models that many tests share, made once a session; torch is loaded only by tests that ask for one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Matrices of 32 columns gain nothing from threads, and on a busy machine threads that wait for each other cost a
# hundred times the work; torch reads this when it is first loaded.
os.environ["OMP_NUM_THREADS"] = "1"
# Where transformers copies code that models bring; it too is read once.
_COPIES = tempfile.TemporaryDirectory(prefix="editctl-modules-")
os.environ["HF_MODULES_CACHE"] = _COPIES.name

KINDS = ("gpt2", "llama")


@pytest.fixture(autouse=True, scope="session")
def _unchecked() -> None:
    """What is measured beside answers takes ten times as long as a run of a tiny model; tests that want it say so."""
    from editctl import config

    config.AFTER_RUN = ()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the tiny models by kind."""
    import tiny

    root = tmp_path_factory.mktemp("models")
    return {"gpt2": tiny.tiny_gpt2(root / "gpt2"), "llama": tiny.tiny_llama(root / "llama")}


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> Callable[..., Any]:
    """Loads a tiny model by kind and dtype; the same object each time it is asked for."""
    from editctl.engine.model import load

    known: dict[tuple[str, str], Any] = {}

    def get(kind: str, dtype: str = "float32") -> Any:
        if (kind, dtype) not in known:
            known[kind, dtype] = load(str(folders[kind]), device="cpu", dtype=dtype)
        return known[kind, dtype]

    return get


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, loaded: Callable[..., Any]) -> Any:
    """Each tiny model in float32."""
    return loaded(request.param)


@pytest.fixture(params=KINDS)
def precise(request: pytest.FixtureRequest, loaded: Callable[..., Any]) -> Any:
    """Each tiny model in float64."""
    return loaded(request.param, "float64")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text file to measure second moments on."""
    import tiny

    return tiny.corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")
