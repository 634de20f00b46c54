"""The table of families: who writes a batch, who reads what lies over the weights.

Knows: which room serves which settings, and in which order overlays act. Refuses: to do either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from editctl.delta import Overlay
from editctl.engine import codebook, context, hyper, lora, scope, tune, ultra
from editctl.engine.methods import Codebook, Context, Learned, Normalised, Scope, Settings
from editctl.engine.model import Model
from editctl.engine.overlay import Hit, Laid
from editctl.engine.writing import Job, Written
from editctl.errors import StoreError

if TYPE_CHECKING:
    from editctl.engine.lessons import Lesson
    from editctl.engine.training import Task

_WRITERS: dict[type, Callable[[Job], Written]] = {
    Learned: hyper.write,
    Normalised: ultra.write,
    Codebook: codebook.write,
    Scope: scope.write,
    Context: context.write,
}
_READERS: dict[str, Callable[[Model, Overlay, Path], Laid]] = {
    codebook.KIND: codebook.Book,
    scope.KIND: scope.Memory,
    context.KIND: context.Contexts,
}
TASKS: dict[str, Callable[[Model, Sequence[int], Sequence[Lesson], int], Task] | None] = {
    "ke": hyper.KeTask,
    "mend": hyper.MendTask,
    "serac": lambda model, _layers, lessons, seed: scope.ScopeTask(model, lessons, seed),
    "ike": None,
}
"""What is learned for a method that reads a trained file, from its blocks, lessons and a seed; None where it reads the
lessons themselves."""
DEFAULTS: dict[str, Mapping[str, float]] = {
    "ke": hyper.KeTask.DEFAULTS,
    "mend": hyper.MendTask.DEFAULTS,
    "serac": scope.DEFAULTS,
    "ike": {"steps": 1, "rate": 1.0},
}
"""Steps and rate of each training where none are named."""
KINDS = tuple(_READERS)
"""Kinds of overlay there are."""
_FOLLOWING = (codebook.KIND,)
"""Those whose entries were read from the weights they lie over."""


def writer_of(settings: Settings) -> Callable[[Job], Written] | None:
    """Who writes a batch of these settings; None where target vectors are solved for."""
    if settings.own is not None:
        return _WRITERS[type(settings.own)]
    if settings.tune is None:
        return None
    return lora.write if settings.tune.rank else tune.write


def follows_weights(overlay: Overlay) -> bool:
    """Whether an overlay's entries have to be made anew when the weights under it are others."""
    return overlay.kind in _FOLLOWING


def readers(model: Model, overlays: Sequence[Overlay], library: Path) -> list[Laid]:
    """What acts for these overlays: one reader for those of one kind, trained file and settings, in order.

    Raises:
        StoreError: an overlay is not what its kind reads, or a trained file is missing or spoiled.
    """
    together: dict[tuple[str, str, str], Overlay] = {}
    for overlay in overlays:
        name = (overlay.kind, overlay.artifact, repr(sorted(overlay.settings.items())))
        first = together.pop(name, None)
        together[name] = overlay if first is None else first.joined(overlay)
    made = []
    for overlay in together.values():
        try:
            made.append(_READERS[overlay.kind](model, overlay, library))
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise StoreError(
                f"an overlay is not one that {overlay.kind} reads ({type(error).__name__})",
                "restore the store from a backup, or export the version again",
            ) from error
    return made


@contextmanager
def laid(model: Model, overlays: Sequence[Overlay], library: Path) -> Iterator[None]:
    """The overlays act for the time of `with`, the last laid first.

    Raises:
        StoreError: a trained file that one needs is missing or spoiled.
    """
    if not overlays:
        yield
        return
    with ExitStack() as stack:
        made = readers(model, overlays, library)
        for one in made:
            stack.enter_context(one.on())
        before, model.laid = model.laid, (*model.laid, *made)
        try:
            yield
        finally:
            model.laid = before


def hits(model: Model, prompts: Sequence[str]) -> list[Hit | None]:
    """For each prompt what answers it in place of the model's own weights, the overlay laid last before others."""
    found: list[Hit | None] = [None] * len(prompts)
    for one in reversed(model.laid):
        found = [known or hit for known, hit in zip(found, one.hits(prompts), strict=True)]
    return found
