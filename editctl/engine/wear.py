"""Versions on a model and off again, and whether what is rebuilt is what was recorded.

Knows: how a version's factor files become weights, for the time of `with`. Refuses: to make versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from editctl import delta as delta_files
from editctl.delta import Delta
from editctl.engine.families import laid
from editctl.engine.model import Editing, Model
from editctl.errors import EditctlError, StoreError
from editctl.events import Emit, Progress, StageStarted
from editctl.store import Store, Version


def deltas_of(store: Store, version: Version | None) -> list[Delta]:
    """A version's batches, read and checked."""
    return [delta_files.load(name, store.deltas_dir) for name in store.deltas(version)]


def put_on(editing: Editing, deltas: Sequence[Delta]) -> None:
    """Add batches to the weights, and what they lay over them, in order."""
    for delta in deltas:
        for module, factors in delta.modules.items():
            editing.add(module, factors)
        if delta.overlay is not None:
            editing.lay(delta.overlay)


@contextmanager
def wearing(model: Model, store: Store, version: Version | None) -> Iterator[Editing]:
    """The model with a version's weights on, and what is laid over them; the base again afterwards, bit for bit."""
    with model.editing() as editing:
        put_on(editing, deltas_of(store, version))
        with laid(model, editing.overlays, store.artifacts_dir):
            yield editing


def keep_on(model: Model, store: Store, version: Version | None) -> None:
    """Put a version on a model for good; in the dtype it was made in, it is compared with the record.

    Raises:
        StoreError: the weights are not those the version was recorded with.
    """
    editing = Editing(model)
    put_on(editing, deltas_of(store, version))
    if version is not None and version.dtype == str(model.dtype):
        check_weights(editing, version)
    # Never left, and so kept by what outlives the rest: a context that nobody keeps is left at once.
    held = laid(model, editing.overlays, store.artifacts_dir)
    held.__enter__()
    model.net._editctl_laid = held


def check_weights(editing: Editing, version: Version) -> None:
    """Make sure that the weights on the model are those a version was recorded with.

    Raises:
        StoreError: they are others.
    """
    found = editing.weights_hash()
    if found != version.weights_hash:
        raise StoreError(
            f"version {version.id} was recorded with weights {version.weights_hash}, rebuilt they are {found}",
            "the model or the store changed since; check the model folder and restore the store from a backup",
        )


def rebuild_all(model: Model, store: Store, versions: Sequence[Version], emit: Emit) -> dict[str, EditctlError]:
    """Rebuild versions and compare their weights with what was recorded: by version id, what is wrong.

    What a version shares with the one rebuilt before it stays on, so a chain costs as much as its longest version.
    """
    emit(StageStarted("rebuild", len(versions)))
    found: dict[str, EditctlError] = {}
    worn: list[str] = []
    with model.editing() as editing:
        for done, version in enumerate(versions, 1):
            names = list(store.deltas(version))
            try:
                if names[: len(worn)] != worn:
                    editing.reset()
                    worn = []
                for name in names[len(worn) :]:
                    put_on(editing, [delta_files.load(name, store.deltas_dir)])
                    worn.append(name)
                check_weights(editing, version)
            except EditctlError as error:
                found[version.id] = error
            emit(Progress("rebuild", done, len(versions)))
    return found
