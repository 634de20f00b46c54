"""The values measuring yields: an answer to one prompt, a metric over many.

Knows: their fields and the one reading of them. Refuses: models and tensors; these values travel to the store and to
both faces, which load no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

REWRITE, PARAPHRASE, LOCALITY, PORTABILITY = KINDS = ("rewrite", "paraphrase", "locality", "portability")
"""The kinds of prompt an edit is measured on, in the order they are shown."""
GENERATED, TEACHER_FORCED, PROBABILITY = PROTOCOLS = ("generated", "teacher-forced", "probability")
"""How an answer is judged: by the model's own greedy words; token by token after the wanted ones; by whether the wanted
answer is likelier than its rival."""


CHECKS = ("drift", "perplexity", "ability", "essence", "generation")
"""What is measured beside answers: hidden states, ordinary text, canaries, texts about the subjects, and texts that the
model writes about them (fluency and consistency)."""


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
    axis: str = ""
    """What a portability probe tests: reasoning, alias, …"""
    group: str = ""
    """Prompts of one group are one question in several wordings: it is answered when any of them is."""
    rival: str = ""
    """The answer that the first wanted one is compared with: target_true, for locality target_new."""
    nll_rival_before: float | None = None
    """As `nll_before`, of the rival."""
    nll_rival_after: float | None = None
    argmax_before: tuple[int, ...] = ()
    """At each token of the first wanted answer, the token that was the most probable one before."""
    forced_same: float | None = None
    """Share of those tokens that are the same after, 0 to 1; None without a wanted answer."""
    soon: str | None = None
    """Rewrite: greedy words right after the batch that wrote the edit; None where nothing was written since."""


@dataclass(frozen=True)
class Metric:
    """One number over many answers, with the protocol that made it. Only values of one name, protocol and axis may be
    compared, and no two of different protocols averaged."""

    name: str
    """reliability, generalization, locality, portability, …"""
    protocol: str
    """`GENERATED`, `TEACHER_FORCED` or `PROBABILITY`; a metric that is none of answers names its own."""
    value: float
    n: int
    """How many prompts, questions or edits it is of."""
    higher_is_better: bool = True
    axis: str = ""
    """The part of the prompts it is of, "" for all: for portability what they test."""
    low: float | None = None
    """95 % interval; None where none is known."""
    high: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What another value must have the same to be compared with it."""
        return self.name, self.protocol, self.axis


def before_of(axis: str) -> str:
    """The axis of what a metric was before, where it is of the model and not of a change; no phase or family is called
    so."""
    return f"was, {axis}" if axis else "was"
