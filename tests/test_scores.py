"""Golden cases of the metrics of answers: counted by hand, each beside what it would be if it were done wrongly."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tiny import an_edit

from editctl.engine.asking import answers_of, ask_all
from editctl.engine.model import Model
from editctl.engine.speak import scores
from editctl.events import silent
from editctl.metrics.edits import forgotten, hit, questions, summary
from editctl.metrics.values import (
    GENERATED,
    LOCALITY,
    PARAPHRASE,
    PORTABILITY,
    PROBABILITY,
    REWRITE,
    TEACHER_FORCED,
    Answer,
    Metric,
)


def told(edit: str, kind: str, *, ok: bool = False, **more: Any) -> Answer:
    return Answer(edit, kind, f"{edit} {kind} {more}", ("Rome",), "Paris", "Rome" if ok else "Bern", ok, **more)


def values(*answers: Answer) -> dict[tuple[str, str, str], tuple[float, int]]:
    return {metric.key: (metric.value, metric.n) for metric in summary(answers)}


def the(metrics: tuple[Metric, ...], name: str, protocol: str) -> Metric:
    (found,) = (m for m in metrics if (m.name, m.protocol, m.axis) == (name, protocol, ""))
    return found


def compared(edit: str, kind: str, new: float, old: float) -> Answer:
    """An answer of which the wanted one has probability `new` a token, its rival `old`."""
    return told(edit, kind, nll_after=-math.log(new), nll_rival_after=-math.log(old))


CASES = (
    compared("a", REWRITE, 0.6, 0.2),
    compared("b", REWRITE, 0.1, 0.3),
    compared("a", PARAPHRASE, 0.5, 0.4),
    compared("a", PARAPHRASE, 0.2, 0.4),
    compared("b", PARAPHRASE, 0.3, 0.1),
    compared("b", PARAPHRASE, 0.9, 0.05),
    compared("a", LOCALITY, 0.8, 0.1),
    compared("b", LOCALITY, 0.1, 0.1),
)


def test_probability_scores_are_those_of_rome_by_hand() -> None:
    """ES 1/2, PS 3/4, NS 1/2 (a tie is no success), S their harmonic mean, magnitudes differences of probabilities."""
    found = values(*CASES)
    assert found["reliability", PROBABILITY, ""] == (0.5, 2)
    assert found["generalization", PROBABILITY, ""] == (0.75, 4)
    assert found["locality", PROBABILITY, ""] == (0.5, 2)
    assert found["score", PROBABILITY, ""] == (pytest.approx(3 / (2 + 4 / 3 + 2)), 2)
    assert found["reliability magnitude", PROBABILITY, ""] == (pytest.approx((0.4 - 0.2) / 2), 2)
    assert found["generalization magnitude", PROBABILITY, ""] == (pytest.approx((0.1 - 0.2 + 0.2 + 0.85) / 4), 4)
    assert found["locality magnitude", PROBABILITY, ""] == (pytest.approx(0.35), 2)
    mean_of_three = (0.5 + 0.75 + 0.5) / 3
    assert found["score", PROBABILITY, ""][0] != pytest.approx(mean_of_three), "an arithmetic mean would be this"


def test_a_harmonic_mean_with_a_zero_is_zero() -> None:
    """Instead of a division by it."""
    none = (compared("a", REWRITE, 0.1, 0.2), compared("a", PARAPHRASE, 0.2, 0.1), compared("a", LOCALITY, 0.2, 0.1))
    assert values(*none)["score", PROBABILITY, ""] == (0.0, 1)


def test_the_score_needs_all_three() -> None:
    """Of two of them it would be another number under the same name."""
    assert ("score", PROBABILITY, "") not in values(*(a for a in CASES if a.kind != LOCALITY))
    more = [told(f"e{n}", REWRITE, ok=True) for n in range(5)]
    assert values(*CASES, *more)["score", PROBABILITY, ""][1] == 2, "edits without them are not counted"


def test_a_metric_whose_probe_is_absent_is_absent() -> None:
    """No rival: no probability. No wanted answer: nothing teacher-forced. No paraphrase: no generalization."""
    assert values(told("a", REWRITE, ok=True)) == {("reliability", GENERATED, ""): (1.0, 1)}
    assert values(told("a", REWRITE, ok=True, nll_after=1.0)) == {("reliability", GENERATED, ""): (1.0, 1)}
    found = values(told("a", LOCALITY, ok=True, forced_after=1.0))
    assert found == {("locality", GENERATED, ""): (1.0, 1)}, "what it is forced to says nothing of what it was before"


def test_every_paraphrase_is_one_value_of_its_own() -> None:
    """Three of one edit, one of another: 2 of 4, not the mean of two means (1/3 + 1)/2, nor the first of each."""
    answers = [
        told("a", PARAPHRASE, ok=True, forced_after=1.0),
        told("a", PARAPHRASE, forced_after=0.5, nll_before=1.0),
        told("a", PARAPHRASE, forced_after=0.0, nll_before=2.0),
        told("b", PARAPHRASE, ok=True, forced_after=0.9),
    ]
    found = values(*answers)
    assert found["generalization", GENERATED, ""] == (0.5, 4)
    assert found["generalization", TEACHER_FORCED, ""] == (pytest.approx(2.4 / 4), 4)


def test_wordings_of_one_question_count_once_and_any_will_do() -> None:
    """Three wordings of one multi-hop question, one answered; another record's are another question."""
    hop = {"axis": "multi-hop", "group": "record-1"}
    answers = [
        told("a", PORTABILITY, forced_after=0.0, **hop),
        told("a", PORTABILITY, ok=True, forced_after=0.5, **hop),
        told("a", PORTABILITY, forced_after=0.25, **hop),
        told("a", PORTABILITY, forced_after=0.0, axis="multi-hop", group="record-2"),
        told("b", PORTABILITY, forced_after=1.0, axis="alias"),
        told("b", PORTABILITY, ok=True, forced_after=1.0, axis="alias", nll_before=0.5),
    ]
    found = values(*answers)
    assert found["portability", GENERATED, ""] == (0.5, 4)
    assert found["portability", GENERATED, "multi-hop"] == (0.5, 2)
    assert found["portability", GENERATED, "alias"] == (0.5, 2)
    assert found["portability", TEACHER_FORCED, "multi-hop"] == (0.25, 2)
    assert values(*(a for a in answers if a.group != "record-1"))["portability", GENERATED, ""] == (1 / 3, 3)


def test_locality_is_what_stayed_in_each_protocol() -> None:
    """Words as before; most probable tokens as before, right or wrong; the neighbour's answer above the new target."""
    probe = told("a", LOCALITY, ok=False, forced_after=0.0, forced_same=0.75, nll_after=0.1, nll_rival_after=0.2)
    found = values(probe)
    assert found["locality", GENERATED, ""] == (0.0, 1)
    assert found["locality", TEACHER_FORCED, ""] == (0.75, 1)
    assert found["locality", PROBABILITY, ""] == (1.0, 1)
    assert [hit(probe, p) for p in (GENERATED, TEACHER_FORCED, PROBABILITY)] == [False, False, True]
    assert hit(told("a", REWRITE), PROBABILITY) is None


def test_what_was_said_right_after_and_is_no_more_is_forgotten() -> None:
    """Of three that were right after their batch one is lost; one that never was is not lost, and one that was found
    again is none of them."""
    answers = [
        told("kept", REWRITE, ok=True, soon="Rome"),
        told("lost", REWRITE, soon="Rome, of course"),
        told("never", REWRITE, soon="Bern"),
        told("found", REWRITE, ok=True, soon="Bern"),
        told("last", REWRITE, ok=True),
        told("held", REWRITE, ok=True, soon="Rome"),
    ]
    assert forgotten(answers) == ("lost",)
    assert values(*answers)["retention", GENERATED, ""] == (pytest.approx(2 / 3), 3)
    assert ("retention", GENERATED, "") not in values(told("last", REWRITE, ok=True))


def test_prompts_of_one_edit_are_not_independent() -> None:
    """Ten that fall together leave a wider interval than ten edits of one prompt each; both hold the value."""
    together = [told(edit, LOCALITY, ok=edit == "a", nll_before=float(i)) for edit in "ab" for i in range(10)]
    apart = [told(f"{edit}{i}", LOCALITY, ok=edit == "a") for edit in "ab" for i in range(10)]
    wide, narrow = (the(summary(some), "locality", GENERATED) for some in (together, apart))
    assert wide.value == narrow.value == 0.5 and wide.n == narrow.n == 20
    assert None not in (wide.low, wide.high, narrow.low, narrow.high)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low) > 0  # type: ignore[operator]
    assert narrow.low < 0.5 < narrow.high  # type: ignore[operator]


def test_the_interval_of_a_magnitude_is_around_it() -> None:
    """One edit of many prompts beside ten of one: the mean of all prompts, not of the edits."""
    answers = [compared("big", LOCALITY, 0.5, 0.5) for _ in range(100)]
    answers += [compared(f"e{n}", LOCALITY, 0.95, 0.05) for n in range(10)]
    found = the(summary(answers), "locality magnitude", PROBABILITY)
    assert found.value == pytest.approx(9 / 110) and found.low is not None and found.high is not None
    assert -1 <= found.low < found.value < found.high <= 1


def test_a_wording_that_is_no_number_makes_its_question_none() -> None:
    """In whatever order; left out it would make the rest look better."""
    for values_ in ((math.nan, 0.2), (0.2, math.nan)):
        some = [told("a", PORTABILITY, forced_after=v, group="g") for v in values_]
        (found,) = (m for m in summary(some) if m.protocol == TEACHER_FORCED)
        assert math.isnan(found.value)


def test_a_score_that_is_no_number_has_no_interval() -> None:
    """And does not become one on the way."""
    (broken,) = (m for m in summary([told("a", REWRITE, forced_after=math.nan)]) if m.protocol == TEACHER_FORCED)
    assert math.isnan(broken.value) and broken.low is None and broken.high is None


# From the model to the number


def test_tokens_of_targets_are_found_whatever_stands_around_them(model: Model) -> None:
    """A target of several tokens, a space before it or at the prompt's end, a start token, the side of the padding."""
    prompt, target = "The capital of Norway is", "the city of London"
    plain = scores(model, [(prompt, target)])[0]
    length = len(model.encode(f"{prompt} {target}")) - len(model.encode(prompt))
    assert len(plain.losses) == len(plain.argmax) == length > 2
    spaced = scores(model, [(prompt + " ", target)])[0]
    assert spaced.losses == pytest.approx(plain.losses, rel=1e-4)
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        padded = scores(model, [("Rome", "is"), (prompt, target), (prompt + " surely and always", target)])[1]
        assert padded.losses == pytest.approx(plain.losses, rel=1e-4)
    first = scores(model, [(prompt, target.split()[0])])[0]
    assert plain.losses[0] == pytest.approx(first.losses[0], rel=1e-4)
    assert plain.nll == pytest.approx(sum(plain.losses) / length)
    assert plain.probability == pytest.approx(math.exp(-sum(plain.losses)))
    assert plain.nll != pytest.approx(first.nll, rel=1e-2), "one token of it is another number"


def test_any_accepted_answer_will_do(model: Model) -> None:
    """The alias the model says most readily is the one that is scored, wherever it stands in the list."""
    names = ("the city of London", "is")
    nlls = [score.nll for score in scores(model, [("The capital of Norway is", name) for name in names])]
    edit = an_edit(portability=[{"prompt": "The capital of Norway is", "answer": names, "kind": "alias"}])
    turned = an_edit(portability=[{"prompt": "The capital of Norway is", "answer": names[::-1], "kind": "alias"}])
    for one in (edit, turned):
        asked = questions(one)
        said = ask_all(model, asked, "before", silent)
        (probe,) = (a for a in answers_of(asked, said, said) if a.kind == PORTABILITY)
        assert probe.nll_after == pytest.approx(min(nlls), rel=1e-4) and probe.axis == "alias"
    assert max(nlls) != pytest.approx(min(nlls), rel=1e-2)


def test_rivals_are_the_other_target(model: Model) -> None:
    """target_true for the edit's own prompts, target_new for a neighbour; without either there is none."""
    edit = an_edit(
        target_true="Paris",
        paraphrases=("{} stands in",),
        locality=[{"prompt": "The Louvre is in", "answer": ["Paris"]}, {"prompt": "{} is"}],
    )
    asked = questions(edit)
    assert [(q.kind, q.rival) for q in asked] == [
        (REWRITE, "Paris"),
        (PARAPHRASE, "Paris"),
        (LOCALITY, "Rome"),
        (LOCALITY, ""),
    ]
    said = ask_all(model, asked, "before", silent)
    answers = answers_of(asked, said, said)
    (wanted,) = scores(model, [("The Louvre is in", "Rome")])
    assert answers[2].nll_rival_after == pytest.approx(wanted.nll, rel=1e-4)
    assert [a.forced_same for a in answers] == [1.0, 1.0, 1.0, None]
    assert questions(an_edit(locality=[{"prompt": "Rome is", "answer": ["Rome"]}]))[-1].rival == "", "it is its own"
