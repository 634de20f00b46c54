"""The values measuring yields: an answer to one prompt, a metric over many.

Knows: their fields and the one reading of them. Refuses: models and tensors; these values travel to the store and to
both faces, which load no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

REWRITE, PARAPHRASE, LOCALITY, PORTABILITY = KINDS = ("rewrite", "paraphrase", "locality", "portability")
"""The kinds of prompt an edit is measured on, in the order they are shown."""
GENERATED, TEACHER_FORCED = "generated", "teacher-forced"
"""How an answer is had: the model's own greedy words, or token by token after the wanted ones."""


@dataclass(frozen=True)
class Answer:
    """What the model says to one prompt of one edit, before and after."""

    edit: str
    """Id of the edit."""
    kind: str
    """One of `KINDS`."""
    prompt: str
    wanted: tuple[str, ...]
    """Acceptable answers; for locality the answer before the edit decides, not these."""
    before: str
    """Greedy words before the edit was first applied, cut at the first sentence end; for a probe added to a live edit
    the unedited model's."""
    after: str
    ok: bool
    """Rewrite, paraphrase, portability: `after` begins with a wanted answer. Locality: `after` equals `before`."""
    nll_before: float | None = None
    """Teacher-forced mean negative log-likelihood of the first wanted answer, nats a token; None without one."""
    nll_after: float | None = None
    forced_before: float | None = None
    """Teacher-forced token accuracy of the first wanted answer, 0 to 1; None without one."""
    forced_after: float | None = None


@dataclass(frozen=True)
class Metric:
    """One number over many answers, with the protocol that made it."""

    name: str
    """reliability, generalization, locality, portability, …"""
    protocol: str
    """`GENERATED` or `TEACHER_FORCED`."""
    value: float
    n: int
    """How many prompts it is a mean over."""
    higher_is_better: bool = True
