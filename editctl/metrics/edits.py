"""Reliability, generalization, locality and portability: which prompts, judged how.

Knows: the questions of an edit and the one rule by which an answer counts. Protocol: the model's own greedy words;
teacher-forced values go by their own names. Refuses: models; it is given words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from editctl.metrics.values import (
    GENERATED,
    KINDS,
    LOCALITY,
    PARAPHRASE,
    PORTABILITY,
    REWRITE,
    TEACHER_FORCED,
    Answer,
    Metric,
)
from editctl.spec import Edit, fill

NAMES = {REWRITE: "reliability", PARAPHRASE: "generalization", LOCALITY: "locality", PORTABILITY: "portability"}
"""The metric each kind of prompt yields."""


@dataclass(frozen=True)
class Question:
    """One prompt of one edit."""

    edit: str
    kind: str
    prompt: str
    wanted: tuple[str, ...]


def questions(edit: Edit) -> list[Question]:
    """All prompts of an edit: its own, every paraphrase, every probe."""
    asked = [Question(edit.id, REWRITE, edit.prompt, (edit.target_new,))]
    asked += [Question(edit.id, PARAPHRASE, fill(p, edit.subject), (edit.target_new,)) for p in edit.paraphrases]
    asked += [Question(edit.id, LOCALITY, fill(p.prompt, edit.subject), p.answer) for p in edit.locality]
    asked += [Question(edit.id, PORTABILITY, fill(p.prompt, edit.subject), p.answer) for p in edit.portability]
    return asked


def normal(text: str) -> str:
    """Compatibility form, single spaces, no case, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(". ")


def says(text: str, wanted: Sequence[str]) -> bool:
    """Whether a text begins with one of the wanted answers, as whole words."""
    said = normal(text)
    for answer in map(normal, wanted):
        rest = said[len(answer) :]
        # "10.5" does not say 10.
        goes_on = rest[:1].isalnum() or (rest[:1] in (".", ",") and rest[1:2].isdigit())
        if answer and said.startswith(answer) and not goes_on:
            return True
    return False


def judge(question: Question, before: str, after: str) -> bool:
    """Locality: the same words as before. All others: the words begin with a wanted answer."""
    if question.kind == LOCALITY:
        return normal(before) == normal(after)
    return says(after, question.wanted)


def summary(answers: Sequence[Answer]) -> tuple[Metric, ...]:
    """One metric a kind that was asked, generated and, where an answer is wanted, teacher-forced.

    Locality has no teacher-forced value: it asks for the words from before, not for a wanted answer.
    """
    metrics = []
    for kind in KINDS:
        chosen = [a for a in answers if a.kind == kind]
        if chosen:
            metrics.append(Metric(NAMES[kind], GENERATED, sum(a.ok for a in chosen) / len(chosen), len(chosen)))
        scores = [a.forced_after for a in chosen if a.forced_after is not None and kind != LOCALITY]
        if scores:
            metrics.append(Metric(NAMES[kind], TEACHER_FORCED, sum(scores) / len(scores), len(scores)))
    return tuple(metrics)
