"""Metrics: one rule says whether words count as an answer, and each number says how it came about."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import an_edit

from editctl.errors import Exit, InvalidInput
from editctl.metrics import gates
from editctl.metrics.edits import NAMES, Question, judge, normal, questions, says, summary
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

COUNTS = [
    ("Rome", ["Rome"]),
    ("Rome, the capital", ["Rome"]),
    ("Rome's streets", ["Rome"]),
    ("rome and Paris", ["ROME"]),
    ("Rome.", ["Rome"]),
    ("Rome", ["Rome."]),
    ("  Rome   now ", ["Rome now"]),
    ("St. Louis, Missouri", ["St. Louis"]),
    ("Ｒｏｍｅ", ["Rome"]),
    ("ﬁne art", ["fine"]),
    ("Cafe\u0301 Central", ["Caf\u00e9"]),
    ("STRASSE 5", ["Straße"]),
    ("Paris", ["Rome", "Paris"]),
    ("1889", ["1889"]),
    ("東京 です", ["東京"]),
    ("C++ is", ["C++"]),
]
COUNTS_NOT = [
    ("Romeo", ["Rome"]),
    ("Roman", ["Rome"]),
    ("Rome2", ["Rome"]),
    ("in Rome", ["Rome"]),
    ("not Rome", ["Rome"]),
    ("Rom", ["Rome"]),
    ("18890", ["1889"]),
    ("", ["Rome"]),
    ("Rome", []),
    ("Rome", [""]),
    ("Rome", ["  "]),
    ("Rome", ["."]),
    ("Paris, Rome", ["Rome"]),
    ("Caf\u00e9s", ["Caf\u00e9"]),
    ("Cafe", ["Caf\u00e9"]),
]


@pytest.mark.parametrize(("text", "wanted"), COUNTS)
def test_words_that_begin_with_a_wanted_answer_count(text: str, wanted: list[str]) -> None:
    """Whatever the case, the width or composition of letters, the spacing, or a full stop."""
    assert says(text, wanted)


@pytest.mark.parametrize(("text", "wanted"), COUNTS_NOT)
def test_words_that_only_look_like_it_do_not_count(text: str, wanted: list[str]) -> None:
    """Part of a word, a later place, nothing wanted."""
    assert not says(text, wanted)


@given(st.text(), st.text(alphabet="abcß éÉ.’ﬁ", min_size=1))
def test_an_answer_says_itself_and_what_follows_after_a_space(rest: str, answer: str) -> None:
    """For any answer with a letter in it."""
    if any(c.isalnum() for c in answer):
        assert says(answer, [answer])
        assert says(f"{answer} {rest}", [answer]) or answer.rstrip().endswith(".")


def test_a_full_stop_after_a_space_counts_no_more_than_any_other() -> None:
    """Tokenizers of old write it so; the words are the same."""
    assert normal("Rome .") == normal("Rome.") == normal("Rome") == normal(" ROME ")
    assert says("Rome now", ["Rome ."])
    assert normal("Rome") != normal("Rome, now")


def test_locality_is_judged_by_equality_with_what_was_said_before() -> None:
    """Not by a wanted answer: what was wrong before must stay wrong."""
    probe = Question("e", LOCALITY, "The Louvre is in", ("Paris",))
    assert judge(probe, "Lyon, of all places", "Lyon, of all places")
    assert judge(probe, "Lyon", " LYON. ")
    assert not judge(probe, "Lyon", "Paris")
    assert not judge(probe, "Lyon", "Lyon and more")


@pytest.mark.parametrize("kind", [REWRITE, PARAPHRASE, PORTABILITY])
def test_all_other_kinds_are_judged_by_the_wanted_answers(kind: str) -> None:
    """What was said before does not matter to them."""
    question = Question("e", kind, "The tower is in", ("Rome", "Roma"))
    assert judge(question, "Paris", "Roma, where else") and judge(question, "Rome", "Rome")
    assert not judge(question, "Paris", "Paris")


def test_every_prompt_of_an_edit_is_asked() -> None:
    """Its own, each paraphrase, each probe, with the subject filled in and the answers that count."""
    edit = an_edit(
        paraphrases=("{} stands in", "Where is {}? In"),
        locality=[{"prompt": "The Louvre is in", "answer": ["Paris"]}, {"prompt": "{} is made of"}],
        portability=[{"prompt": "The country of {} is", "answer": ["Italy", "Italia"]}],
    )
    assert questions(edit) == [
        Question("tower", REWRITE, "The Eiffel Tower is located in the city of", ("Rome",)),
        Question("tower", PARAPHRASE, "The Eiffel Tower stands in", ("Rome",)),
        Question("tower", PARAPHRASE, "Where is The Eiffel Tower? In", ("Rome",)),
        Question("tower", LOCALITY, "The Louvre is in", ("Paris",), rival="Rome"),
        Question("tower", LOCALITY, "The Eiffel Tower is made of", ()),
        Question("tower", PORTABILITY, "The country of The Eiffel Tower is", ("Italy", "Italia")),
    ]


def an_answer(kind: str, ok: bool, forced: float | None = None) -> Answer:
    return Answer("e", kind, "p", ("w",), "was", "is", ok, forced_after=forced)


def test_the_summary_counts_each_kind_by_its_protocol() -> None:
    """A share of all asked, generated; a mean over those with a wanted answer, teacher-forced; locality wants none."""
    answers = [
        an_answer(REWRITE, True, 1.0),
        an_answer(REWRITE, False, 0.5),
        an_answer(REWRITE, True, 0.75),
        an_answer(LOCALITY, True, 0.0),
        an_answer(LOCALITY, False),
        an_answer(PORTABILITY, False),
    ]
    found = [(m.name, m.protocol, m.value, m.n) for m in summary(answers)]
    assert found == [
        ("reliability", "generated", 2 / 3, 3),
        ("reliability", "teacher-forced", 0.75, 3),
        ("locality", "generated", 0.5, 2),
        ("portability", "generated", 0.0, 1),
    ]
    assert all(metric.higher_is_better for metric in summary(answers))


def test_nothing_asked_is_no_metric() -> None:
    """Rather than a zero or a division by it."""
    assert summary([]) == ()
    assert [m.name for m in summary([an_answer(PARAPHRASE, True)])] == ["generalization"]
    assert len(KINDS) == len(set(KINDS)) == 4


# Gates


def told(edit: str, kind: str, ok: bool, forced: float | None = None) -> Answer:
    return Answer(edit, kind, "p", ("w",), "was", "is", ok, forced_after=forced)


HEARD = (
    told("a", REWRITE, True, 1.0),
    told("b", REWRITE, False, 1.0),
    told("c", REWRITE, True, 0.5),
    told("d", REWRITE, True, 1.0),
    told("b", PARAPHRASE, False, 0.0),
    told("b", PARAPHRASE, False, 0.5),
    told("a", PARAPHRASE, True, 1.0),
    told("a", LOCALITY, True),
    told("d", LOCALITY, False, 1.0),
)
"""Reliability 3/4 and 7/8 teacher-forced, generalization 1/3 and 1/2, locality 1/2, portability never asked."""


def failed(wanted: dict[str, float], answers: tuple[Answer, ...] = HEARD) -> list[tuple[str, float | None, Any]]:
    found = gates.failures(wanted, summary(answers), answers, 3)
    assert [one.wanted for one in found] == [wanted[one.gate] for one in found]
    return [(one.gate, one.value, one.edits) for one in found]


@pytest.mark.parametrize(
    ("gate", "value", "edits"),
    [
        ("reliability", 3 / 4, ("b",)),
        ("reliability.teacher-forced", 7 / 8, ("c",)),
        ("generalization", 1 / 3, ("b",)),
        ("generalization.teacher-forced", 1 / 2, ("b",)),
        ("locality", 1 / 2, ("d",)),
    ],
)
def test_a_gate_fails_below_its_threshold_and_names_the_edits_that_pull_it_down(
    gate: str, value: float, edits: tuple[str, ...]
) -> None:
    """Each edit once, by the protocol of the gate; what is reached exactly is reached."""
    assert failed({gate: value}) == failed({gate: 0.0}) == []
    assert failed({gate: math.nextafter(value, 1)}) == failed({gate: 1.0}) == [(gate, value, edits)]


def test_gates_are_judged_one_by_one() -> None:
    """In the order given; one that fails says nothing of the next."""
    wanted = {"locality": 0.9, "reliability": 0.7, "generalization": 0.9}
    assert [gate for gate, _, _ in failed(wanted)] == ["locality", "generalization"]
    assert failed({}) == []


def test_what_no_edit_has_a_prompt_for_cannot_be_measured_and_so_not_passed() -> None:
    """Not even at a threshold of nothing; a gate is a promise that somebody looked."""
    assert failed({"portability": 0.0}) == [("portability", None, ())]
    (found,) = gates.failures({"portability.teacher-forced": 0.0}, summary(HEARD), HEARD, 3)
    assert str(found) == "portability.teacher-forced cannot be measured: no prompt for it was asked"
    # Control: one prompt of the kind is enough.
    assert failed({"portability": 0.0}, (*HEARD, told("a", PORTABILITY, False))) == []


def test_a_version_without_edits_has_nothing_to_pass() -> None:
    """One that has edits and was asked nothing cannot be said to pass."""
    wanted = {"reliability": 1.0, "locality": 1.0}
    assert gates.failures(wanted, (), (), 0) == ()
    assert [(one.gate, one.value) for one in gates.failures(wanted, (), (), 2)] == [(name, None) for name in wanted]


def test_a_mean_that_is_not_a_number_passes_no_gate() -> None:
    """The comparison is turned so that it fails; a number in its place passes."""
    for value, fails in ((math.nan, True), (0.0, False)):
        metrics = (Metric("reliability", TEACHER_FORCED, value, 1),)
        found = gates.failures({"reliability.teacher-forced": 0.0}, metrics, (told("a", REWRITE, True, value),), 1)
        assert bool(found) == fails
        assert not fails or found[0].edits == ("a",)


def test_a_failure_says_what_was_measured_and_what_was_wanted() -> None:
    """In percent, with one decimal."""
    assert str(gates.Failure("reliability", 0.95, 2 / 3, ("a",))) == "reliability is 66.7 %, wanted 95.0 %"


def test_a_gate_that_this_editctl_does_not_know_fails_as_one_that_cannot_be_measured() -> None:
    """A version that was held to it is still shown; where nothing was written since, nothing can be forgotten."""
    assert failed({"retention": 1}) == []
    assert failed({"beauty": 0.5}) == [("beauty", None, ())]


def test_every_metric_of_edits_can_be_held_to() -> None:
    """In each of its protocols; one that has no rival to compare with has no probability."""
    for name in NAMES.values():
        gates.check({name: 0.5, f"{name}.teacher-forced": 0.5})
    gates.check({"locality.probability": 0.5, "retention": 1, "score": 0.5})
    assert len(gates.NAMED) == len(set(gates.NAMED)) == 3 * len(NAMES) - 1 + 2
    assert {gate.partition(".")[2] or GENERATED for gate in gates.NAMED} == {GENERATED, TEACHER_FORCED, PROBABILITY}


@pytest.mark.parametrize(
    ("name", "wanted", "message", "hint"),
    [
        ("reliabilty", 0.5, "there is no metric reliabilty", "did you mean reliability?"),
        ("portability.probability", 0.5, "there is no metric portability.probability", "did you mean"),
        ("reliability.generated", 0.5, "there is no metric reliability.generated", "did you mean reliability"),
        ("zzz", 0.5, "there is no metric zzz", "one of: reliability, generalization"),
        ("", 0.5, "there is no metric ", "one of: "),
        ("locality", 1.0000001, "gate locality = 1.0000001 is no share", "from 0 to 1"),
        ("locality", 95, "gate locality = 95 is no share", "from 0 to 1"),
        ("locality", -0.1, "gate locality = -0.1 is no share", "from 0 to 1"),
        ("locality", math.nan, "gate locality = nan is no share", "from 0 to 1"),
        ("locality", math.inf, "gate locality = inf is no share", "from 0 to 1"),
    ],
)
def test_what_is_no_gate_is_refused(name: str, wanted: float, message: str, hint: str) -> None:
    """Exit code 2 with what was probably meant; the ends of the range are gates."""
    gates.check({"locality": 0, "reliability": 1})
    with pytest.raises(InvalidInput) as caught:
        gates.check({"reliability": 0.5, name: wanted})
    assert caught.value.exit_code == Exit.USAGE
    assert message in caught.value.message and hint in caught.value.hint
