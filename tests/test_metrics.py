"""Metrics: one rule says whether words count as an answer, and each number says how it came about."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import an_edit

from editctl.metrics.edits import Question, judge, normal, questions, says, summary
from editctl.metrics.values import KINDS, LOCALITY, PARAPHRASE, PORTABILITY, REWRITE, Answer

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
        Question("tower", LOCALITY, "The Louvre is in", ("Paris",)),
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
