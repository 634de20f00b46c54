"""editctl: change what a language model knows, reviewably."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__version__ = "0.1.0"

# Threads that spin while they wait for one another starve as soon as another process wants a core: measured on 2 cores
# with a second job running, the same products took 1.8 s asleep-waiting and 52 s spinning. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(
    ref: str = "@",
    *,
    store: str | Path | None = None,
    config: str | Path | None = None,
    model: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A version as an ordinary transformers model with its tokenizer.

    Where nothing is named, the workspace's `editctl.toml` decides, as on the command line. The weights are rebuilt from
    the base and compared with what was recorded.

    Args:
        ref: a version id or a unique prefix, an alias, `@` (the head), `@-`, `@-2` or `base`.
        store: the folder of versions.
        config: the configuration file, by default `editctl.toml` in the working directory.
        model: `atlas`, a folder or a hub id; by default what the version was made for.
        device: auto, cpu, cuda or mps.
        dtype: by default what the version was made in.
        trust_remote_code: run code that the model's folder brings.

    Raises:
        StoreError: there is no such version, or its weights are not the recorded ones.
        ModelError: the model cannot be found or loaded.
    """
    from editctl.engine import wear
    from editctl.workspace import Workspace

    named = {"store": store, "config": config, "model": model, "device": device, "dtype": dtype}
    texts = {name: None if value is None else str(value) for name, value in named.items()}
    space = Workspace(**texts, trust_remote_code=trust_remote_code)
    versions = space.store()
    version = versions.resolve(ref)
    loaded = space.made_for([version]).load()
    wear.keep_on(loaded, versions, version)
    return loaded.net, loaded.tokenizer
