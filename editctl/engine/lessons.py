"""What a method is trained on: edits with their rewordings and what must stay, and the edits that are held out.

Knows: how edits of specs become lessons, and that a subject is either taught or held out. Refuses: to train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from editctl.engine import speak
from editctl.engine.model import Model
from editctl.errors import InvalidInput
from editctl.events import Emit, Progress, StageStarted
from editctl.spec import Edit, fill


@dataclass(frozen=True)
class Lesson:
    """One edit and what it should and should not reach; prompts have their subject filled in."""

    id: str
    subject: str
    template: str
    """The prompt with {} in the subject's place."""
    prompt: str
    target: str
    old: str
    """What the unedited model says to the prompt."""
    rewordings: tuple[str, ...]
    """Other prompts that the edit must reach."""
    stays: tuple[tuple[str, str], ...]
    """Prompts that it must not reach, each with what the unedited model says."""

    @property
    def statement(self) -> str:
        """The edit as a sentence."""
        return f"{self.prompt} {self.target}."


def split(edits: Sequence[Edit], share: float, seed: int) -> tuple[list[Edit], list[Edit]]:
    """Edits that are taught and edits that are held out; all edits of a subject are on one side.

    Args:
        share: of the subjects that are held out, 0 to 1.

    Raises:
        InvalidInput: one of the two would be empty.
    """

    def out(edit: Edit) -> bool:
        return int(sha256(f"{seed}|{edit.subject}".encode()).hexdigest()[:8], 16) < share * 2**32

    taught, kept = [e for e in edits if not out(e)], [e for e in edits if out(e)]
    if not taught or (share and not kept):
        raise InvalidInput(
            f"{len(edits)} edits are too few to hold {100 * share:g} % of their subjects out of training",
            "name more specs, or another --held-out",
        )
    return taught, kept


def lessons(model: Model, edits: Sequence[Edit], emit: Emit) -> list[Lesson]:
    """The edits as lessons; what must stay is what the model says now."""
    plain = [
        (
            edit,
            tuple(dict.fromkeys(fill(text, edit.subject) for text in edit.paraphrases)),
            tuple(dict.fromkeys(fill(probe.prompt, edit.subject) for probe in edit.locality)),
        )
        for edit in edits
    ]
    asked = list(dict.fromkeys(text for edit, _, stays in plain for text in (edit.prompt, *stays)))
    emit(StageStarted("before", len(asked)))
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        emit(Progress("before", done, len(asked)))

    said = dict(zip(asked, speak.answers(model, asked, tick=tick), strict=True))
    return [
        Lesson(
            edit.id,
            edit.subject,
            edit.relation,
            edit.prompt,
            edit.target_new,
            said[edit.prompt] or edit.target_true,
            rewordings or (edit.prompt,),
            tuple((text, said[text]) for text in stays if said[text]),
        )
        for edit, rewordings, stays in plain
    ]
