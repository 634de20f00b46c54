"""Files that were trained for a model, by method and name: finding them, and settling which one a run reads. No torch.

Knows: what such a file says of itself, and that one belongs to a model by content. Refuses: its tensors; the room of
each method reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editctl.engine.methods import Settings, find
from editctl.errors import InvalidInput, StoreError
from editctl.files import digest_of, header

if TYPE_CHECKING:
    from torch import Tensor, nn

KEY = "artifact"
"""Under which a file says what it is."""
DRAFT = "draft"
"""What a file is called while it is measured, and so has no content name yet."""


@dataclass(frozen=True)
class Artifact:
    """A trained file."""

    content: str
    """Its content name, which is its file's."""
    about: Mapping[str, Any]
    """What it says of itself: method, name, base (the model's content), created_at, layers, recipe, held_out, …"""

    @property
    def method(self) -> str:
        """The method that reads it."""
        return str(self.about["method"])

    @property
    def name(self) -> str:
        """What it is called; of several of one name the newest is meant."""
        return str(self.about["name"])


def found(folder: Path, *, method: str = "", base: str = "") -> list[Artifact]:
    """The trained files in a folder, newest first.

    Args:
        method: only those of this method.
        base: only those for this model, by content.
    """
    read = ((path, header(path)[1].get(KEY)) for path in folder.glob("*.safetensors") if ".part" not in path.name)
    all_ = [Artifact(path.stem, about) for path, about in read if isinstance(about, dict)]
    fitting = [one for one in all_ if method in ("", one.about.get("method")) and base in ("", one.about.get("base"))]
    return sorted(fitting, key=lambda one: (str(one.about.get("created_at")), one.content), reverse=True)


def settled(settings: Settings, base: str, folder: Path) -> Settings:
    """The settings with the content name of the trained file that a run with them reads, and the blocks it is for.

    Raises:
        InvalidInput: there is none, or none of that name.
    """
    method = find(settings.method)
    if not method.trained:
        if settings.artifact:
            raise InvalidInput(f"{settings.method} reads no trained file", "leave artifact away")
        return settings
    there, wanted = found(folder, method=settings.method, base=base), settings.artifact
    chosen = [one for one in there if wanted in ("", one.name) or (len(wanted) >= 4 and one.content.startswith(wanted))]
    if not chosen:
        named = f"named {wanted} " if wanted else ""
        others = f"there are: {', '.join(sorted({one.name for one in there}))}" if there else ""
        raise InvalidInput(
            f"{settings.method} needs a file trained for this model, and there is none {named}in {folder}",
            others or f"make one with: editctl train {settings.method} SPECS",
        )
    layers = chosen[0].about.get("layers")
    made = replace(settings, artifact=chosen[0].content)
    return replace(made, layers=tuple(layers)) if layers else made


def check(content: str, folder: Path) -> Path:
    """The file with this content name.

    Raises:
        StoreError: it is missing, or its content changed since it was written.
    """
    path = folder / f"{content}.safetensors"
    remedy = "restore it from a backup of the store"
    try:
        spoiled = digest_of(path) != content
    except FileNotFoundError:
        raise StoreError(f"the trained file {path} is missing", remedy) from None
    except OSError as error:
        raise StoreError(f"the trained file {path} cannot be read: {error.strerror}", remedy) from None
    if spoiled:
        raise StoreError(f"the trained file {path} is not what was written", remedy)
    return path


def fit(net: nn.Module, tensors: Mapping[str, Tensor], content: str) -> None:
    """Give a network the tensors of a trained file.

    Raises:
        StoreError: they are not of its shape.
    """
    try:
        net.load_state_dict(tensors)
    except RuntimeError:
        raise StoreError(
            f"the trained file {content} does not fit the network of this editctl", "train it again: editctl train"
        ) from None


def read(content: str, folder: Path, method: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a trained file and what it says of itself. Loads torch.

    Raises:
        StoreError: it is missing or spoiled, or another method's.
    """
    from editctl.delta import read_tensors

    path = check(content, folder) if content != DRAFT else folder / f"{DRAFT}.safetensors"
    tensors, about = read_tensors(path)
    if about.get(KEY, {}).get("method") != method:
        raise StoreError(f"the trained file {path} is not one of {method}", "restore the store from a backup")
    return tensors, about[KEY]
