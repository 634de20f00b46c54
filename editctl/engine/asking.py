"""Asking a model all the questions of some edits, and putting two versions' words side by side.

Knows: which text is asked once for many questions, and what is recorded of it. Refuses: to decide what a good answer
is; `metrics` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from editctl.engine import speak
from editctl.engine.model import Model
from editctl.engine.prompts import Request
from editctl.events import Emit, Progress, StageStarted
from editctl.metrics import edits as edit_metrics
from editctl.metrics.edits import Question
from editctl.metrics.values import LOCALITY, Answer
from editctl.spec import SLOT, Edit


def request_of(edit: Edit, before: Said | None = None) -> Request:
    """The fact of an edit, with the locality probes about its own subject and what was said to them before."""
    words = before.words if before else {}
    # As words of its own: Romeo is not about Rome.
    named = re.compile(rf"(?<!\w){re.escape(edit.subject)}(?!\w)")
    keep = [
        (named.sub(lambda _: SLOT, question.prompt), words[question])
        for question in edit_metrics.questions(edit)
        if question.kind == LOCALITY and len(named.findall(question.prompt)) == 1 and words.get(question)
    ]
    return Request(edit.id, edit.relation, edit.subject, edit.target_new, tuple(keep))


@dataclass(frozen=True)
class Said:
    """What a version says to all questions."""

    words: Mapping[Question, str]
    forced: Mapping[Question, tuple[float | None, float | None]]
    """Teacher-forced NLL and token accuracy of the first wanted answer; None without one."""

    def __or__(self, other: Said) -> Said:
        return Said({**self.words, **other.words}, {**self.forced, **other.forced})


def ask_all(model: Model, questions: Sequence[Question], stage: str, emit: Emit) -> Said:
    """Greedy words to every question, and teacher-forced values of wanted answers. Equal questions are asked once."""
    # A sentence end within a wanted answer ("St. Louis") must not cut what the model says.
    start = len(model.encode(""))
    least = {a: len(model.encode(a)) - start if set(a) & set(".!?") else 1 for q in questions for a in q.wanted}
    asked = {q: (q.prompt, max((least[answer] for answer in q.wanted), default=1)) for q in questions}
    different = list(dict.fromkeys(asked.values()))
    pairs = list(dict.fromkeys((q.prompt, q.wanted[0]) for q in questions if q.wanted))
    emit(StageStarted(stage, len(different)))
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        emit(Progress(stage, done, len(different)))

    words = speak.answers(model, [prompt for prompt, _ in different], [n for _, n in different], tick, emit)
    by_prompt = dict(zip(different, words, strict=True))
    forced = dict(zip(pairs, speak.forced(model, pairs, emit), strict=True))
    none = (None, None)
    return Said(
        {q: by_prompt[asked[q]] for q in questions},
        {q: forced[q.prompt, q.wanted[0]] if q.wanted else none for q in questions},
    )


def answers_of(questions: Sequence[Question], before: Said, after: Said) -> tuple[Answer, ...]:
    """Both versions' words side by side, judged."""
    result = []
    for q in questions:
        was, now, old, new = before.words[q], after.words[q], before.forced[q], after.forced[q]
        ok = edit_metrics.judge(q, was, now)
        result.append(Answer(q.edit, q.kind, q.prompt, q.wanted, was, now, ok, old[0], new[0], old[1], new[1]))
    return tuple(result)
