"""Reliability, generalization, locality, portability and retention: which prompts, judged how.

Knows: the questions of an edit, the rule by which an answer counts in each of three protocols, and that no two of them
share a number. Refuses: models; it is given words and likelihoods.

    generated       the model's own greedy words begin with an accepted answer; locality: they are the words from before
    teacher-forced  share of an accepted answer's tokens that are the most probable ones, each given the right ones
                    before it; locality: share of them at which the most probable token is the one from before
    probability     whether an accepted answer is likelier, by mean log-likelihood a token, than its rival (ES, PS and
                    NS of Meng et al. 2022, ROME, section 3.4): target_new against target_true, for locality the
                    neighbour's own answer against target_new
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from editctl.metrics.intervals import clustered, clustered_mean
from editctl.metrics.values import (
    GENERATED,
    KINDS,
    LOCALITY,
    PARAPHRASE,
    PORTABILITY,
    PROBABILITY,
    REWRITE,
    TEACHER_FORCED,
    Answer,
    Metric,
)
from editctl.spec import Edit, fill

NAMES = {REWRITE: "reliability", PARAPHRASE: "generalization", LOCALITY: "locality", PORTABILITY: "portability"}
"""The metric each kind of prompt yields."""
SCORE, RETENTION = "score", "retention"
_COMPARED = (REWRITE, PARAPHRASE, LOCALITY)
"""The kinds that the score is of."""
MAGNITUDE = " magnitude"
"""Added to a metric's name: not whether the answer is likelier than its rival, but by how much."""
PROTOCOLS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(NAMES.values(), (GENERATED, TEACHER_FORCED, PROBABILITY)),
        NAMES[PORTABILITY]: (GENERATED, TEACHER_FORCED),
        RETENTION: (GENERATED,),
        SCORE: (PROBABILITY,),
    }
)
"""The protocols each share is measured in; `GENERATED` is meant where none is named and it is one of them."""


@dataclass(frozen=True)
class Question:
    """One prompt of one edit."""

    edit: str
    kind: str
    prompt: str
    wanted: tuple[str, ...]
    axis: str = ""
    """What a portability probe tests."""
    group: str = ""
    """Questions of one group of one edit are one question in several wordings."""
    rival: str = ""
    """The answer the first wanted one is compared with, "" for none."""


def questions(edit: Edit) -> list[Question]:
    """All prompts of an edit: its own, every paraphrase, every probe."""
    new, old = (edit.target_new,), edit.target_true
    asked = [Question(edit.id, REWRITE, edit.prompt, new, rival=old)]
    asked += [Question(edit.id, PARAPHRASE, text, new, rival=old) for text in edit.paraphrase_prompts]
    for probe in edit.locality:
        # What holds for a neighbour and is the new target has no rival in it.
        rival = edit.target_new if probe.answer and not says(edit.target_new, probe.answer) else ""
        prompt = fill(probe.prompt, edit.subject)
        asked.append(Question(edit.id, LOCALITY, prompt, probe.answer, probe.kind, probe.group, rival))
    for probe in edit.portability:
        prompt = fill(probe.prompt, edit.subject)
        asked.append(Question(edit.id, PORTABILITY, prompt, probe.answer, probe.kind, probe.group))
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
    """What the answers come to, each number by the protocol that made it; what nothing was asked for is absent.

    Wordings of one question are one value, that of the best. Intervals take the edits for independent and the prompts
    of one edit for alike. Portability also by axis. `SCORE` is the harmonic mean of ES, PS and NS, where all three are.
    """
    metrics = []
    for kind in KINDS:
        chosen = [a for a in answers if a.kind == kind]
        parts = {"": chosen}
        if kind == PORTABILITY:
            axes = sorted({a.axis for a in chosen} - {""})
            parts |= {axis: [a for a in chosen if a.axis == axis] for axis in axes}
        for axis, some in parts.items():
            for protocol in PROTOCOLS[NAMES[kind]]:
                values = _values(some, _RULES[protocol])
                if values:
                    metrics.append(_share(NAMES[kind], protocol, values, axis))
            gaps = _values(some, _magnitude)
            if gaps:
                metrics.append(_mean(NAMES[kind] + MAGNITUDE, gaps))
    compared = {m.name: m.value for m in metrics if m.protocol == PROBABILITY}
    parts_of_it = [compared.get(NAMES[kind]) for kind in _COMPARED]
    if None not in parts_of_it:
        harmonic = 3 / sum(1 / v for v in parts_of_it if v) if all(parts_of_it) else 0.0
        having = [{a.edit for a in answers if a.kind == k and _likelier(a) is not None} for k in _COMPARED]
        metrics.append(Metric(SCORE, PROBABILITY, harmonic, len(set.intersection(*having))))
    held = [a for a in answers if a.kind == REWRITE and a.soon is not None and says(a.soon, a.wanted)]
    if held:
        metrics.append(_share(RETENTION, GENERATED, {a.edit: [float(a.ok)] for a in held}, ""))
    return tuple(metrics)


def forgotten(answers: Iterable[Answer]) -> tuple[str, ...]:
    """Ids of the edits that the model stated right after their batch was written and does not state any more."""
    lost = (a for a in answers if a.kind == REWRITE and a.soon is not None and says(a.soon, a.wanted) and not a.ok)
    return tuple(dict.fromkeys(a.edit for a in lost))


def hit(answer: Answer, protocol: str) -> bool | None:
    """Whether an answer counts in full in a protocol; None where it has no value in it."""
    value = _RULES[protocol](answer)
    return None if value is None else value >= 1


def _generated(answer: Answer) -> float | None:
    return float(answer.ok)


def _forced(answer: Answer) -> float | None:
    return answer.forced_same if answer.kind == LOCALITY else answer.forced_after


def _likelier(answer: Answer) -> float | None:
    if answer.nll_after is None or answer.nll_rival_after is None:
        return None
    return float(answer.nll_after < answer.nll_rival_after)


def _magnitude(answer: Answer) -> float | None:
    """exp(−nll) of the accepted answer less that of its rival: geometric means of the tokens' probabilities."""
    if answer.nll_after is None or answer.nll_rival_after is None:
        return None
    return math.exp(-answer.nll_after) - math.exp(-answer.nll_rival_after)


_Rule = Callable[[Answer], float | None]
_RULES: Mapping[str, _Rule] = MappingProxyType({GENERATED: _generated, TEACHER_FORCED: _forced, PROBABILITY: _likelier})


def _values(answers: Iterable[Answer], rule: _Rule) -> dict[str, list[float]]:
    """By edit one value a question, the best of its wordings; without those that have none."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for number, answer in enumerate(answers):
        value = rule(answer)
        if value is not None:
            own = found.setdefault(answer.edit, {})
            question = (answer.group, "") if answer.group else ("", str(number))
            best = own.get(question, -math.inf)
            # One that is no number stays: the best of a question is not known then.
            own[question] = best if math.isnan(best) or value <= best else value
    return {edit: list(values.values()) for edit, values in found.items()}


def _share(name: str, protocol: str, values: Mapping[str, Sequence[float]], axis: str) -> Metric:
    flat = [value for own in values.values() for value in own]
    mean = math.fsum(flat) / len(flat)
    low, high = clustered(list(values.values())) if math.isfinite(mean) else (None, None)
    return Metric(name, protocol, mean, len(flat), axis=axis, low=low, high=high)


def _mean(name: str, values: Mapping[str, Sequence[float]]) -> Metric:
    """A mean of differences of probabilities."""
    flat = [value for own in values.values() for value in own]
    low, high = clustered_mean(list(values.values()), -1.0, 1.0)
    return Metric(name, PROBABILITY, math.fsum(flat) / len(flat), len(flat), low=low, high=high)
