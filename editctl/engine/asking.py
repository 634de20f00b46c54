"""Asking a model all the questions of some edits, and putting two versions' words side by side.

Knows: which text is asked once for many questions, and what is recorded of it. Refuses: to decide what a good answer
is; `metrics` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from editctl.engine import speak
from editctl.engine.model import Model
from editctl.engine.prompts import Request
from editctl.engine.recall import Recall
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
class Scored:
    """Teacher-forced values of one question; None without a wanted answer, or without a rival."""

    nll: float | None = None
    """Mean negative log-likelihood of the likeliest accepted answer, nats a token."""
    accuracy: float | None = None
    """Highest token accuracy of an accepted answer."""
    argmax: tuple[int, ...] = ()
    """At each token of the first accepted answer the most probable one."""
    rival: float | None = None
    """As `nll`, of the rival."""


@dataclass(frozen=True)
class Said:
    """What a version says to all questions."""

    words: Mapping[Question, str]
    scored: Mapping[Question, Scored]

    def __or__(self, other: Said) -> Said:
        return Said({**self.words, **other.words}, {**self.scored, **other.scored})


def ask_all(
    model: Model,
    questions: Sequence[Question],
    stage: str,
    emit: Emit,
    recall: Recall | None = None,
    *,
    scored: bool = True,
) -> Said:
    """Greedy words to every question, and scores of its accepted answers and its rival. Equal texts are asked once.

    Args:
        recall: what the model said before; only for the unedited one.
        scored: whether scores are wanted beside words.
    """
    # A sentence end within a wanted answer ("St. Louis") must not cut what the model says.
    start = len(model.encode(""))
    least = {a: len(model.encode(a)) - start if set(a) & set(".!?") else 1 for q in questions for a in q.wanted}
    asked = {q: (q.prompt, max((least[answer] for answer in q.wanted), default=1)) for q in questions}
    words = {key: recall.words(*key) if recall else None for key in asked.values()}
    pairs = dict.fromkeys((q.prompt, answer) for q in questions for answer in (*q.wanted, q.rival) if answer and scored)
    scores = {pair: recall.score(*pair) if recall else None for pair in pairs}
    asks = _asks([key for key, said in words.items() if said is None], [p for p, s in scores.items() if s is None])
    emit(StageStarted(stage, len(asks)))
    done = 0

    def tick(n: int) -> None:
        nonlocal done
        done += n
        emit(Progress(stage, done, len(asks)))

    heard = list(zip(asks, speak.hear(model, asks, tick, emit), strict=True))
    fresh = {(ask.prompt, ask.at_least): one.words for ask, one in heard if ask.at_least}
    measured = {
        (ask.prompt, answer): score for ask, one in heard for answer, score in zip(ask.answers, one.scores, strict=True)
    }
    if recall is not None and asks:
        recall.keep(fresh, measured)
    spoken = {key: said for key, said in words.items() if said is not None} | fresh
    known = {pair: score for pair, score in scores.items() if score is not None} | measured
    none = Scored()
    return Said({q: spoken[asked[q]] for q in questions}, {q: _scored(q, known) if scored else none for q in questions})


def _asks(said: Sequence[tuple[str, int]], scored: Sequence[tuple[str, str]]) -> list[speak.Ask]:
    """One ask a prompt where that will do, so that progress counts prompts."""
    answers: dict[str, list[str]] = {}
    for prompt, answer in scored:
        answers.setdefault(prompt, []).append(answer)
    asks = [speak.Ask(prompt, tuple(answers.pop(prompt, ())), at_least) for prompt, at_least in said]
    return asks + [speak.Ask(prompt, tuple(some), 0) for prompt, some in answers.items()]


def _scored(question: Question, known: Mapping[tuple[str, str], speak.Score]) -> Scored:
    found = [known[question.prompt, answer] for answer in question.wanted]
    rival = known[question.prompt, question.rival].nll if question.rival else None
    if not found:
        return Scored(rival=rival)
    return Scored(min(s.nll for s in found), max(s.accuracy for s in found), found[0].argmax, rival)


def answers_of(
    questions: Sequence[Question], before: Said, after: Said, soon: Mapping[Question, str] = MappingProxyType({})
) -> tuple[Answer, ...]:
    """Both versions' words side by side, judged.

    Args:
        soon: what was said right after an edit's own batch.
    """
    result = []
    for q in questions:
        was, now, old, new = before.words[q], after.words[q], before.scored[q], after.scored[q]
        answer = Answer(
            q.edit,
            q.kind,
            q.prompt,
            q.wanted,
            was,
            now,
            edit_metrics.judge(q, was, now),
            nll_before=old.nll,
            nll_after=new.nll,
            forced_before=old.accuracy,
            forced_after=new.accuracy,
            axis=q.axis,
            group=q.group,
            rival=q.rival,
            nll_rival_before=old.rival,
            nll_rival_after=new.rival,
            argmax_before=old.argmax,
            forced_same=_same(old.argmax, new.argmax),
            soon=soon.get(q),
        )
        result.append(answer)
    return tuple(result)


def _same(old: Sequence[int], new: Sequence[int]) -> float | None:
    """Share of places with the same token; None where one side is not known."""
    if not old or len(old) != len(new):
        return None
    return sum(a == b for a, b in zip(old, new, strict=True)) / len(old)
