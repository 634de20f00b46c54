"""What is shown: every text from outside is data, at any width, with markup, escape sequences and all."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from editctl import events, figures, report
from editctl.engine.cost import Expected
from editctl.engine.methods import METHODS
from editctl.errors import InvalidInput, Problem, StoreError
from editctl.metrics.values import LOCALITY, PARAPHRASE, PORTABILITY, REWRITE, Answer, Metric
from editctl.plan import Plan, make
from editctl.spec import Edit
from editctl.store import Fault, Operation, Version

FOOTPRINT = (1, 3 * 2**19, ("thin",))
NASTY = "[red]x[/red] [/] [link=http://e]y[/link]\x1b[31m\x1b]0;title\x07\x9b31m\r\x08\u202eolleh 日本語 :smile:"
LONG = "word " * 60


def an_edit(number: int = 0, **changes: Any) -> Edit:
    values = {"id": f"fact-{number}", "subject": f"Subject {number}", "relation": "{} lies in", "target_new": "Rome"}
    return Edit(**{**values, **changes})


def nasty_edit(**changes: Any) -> Edit:
    return an_edit(9, subject=NASTY, target_new=NASTY, target_true=NASTY, note=NASTY, source=NASTY, **changes)


def a_plan(*edits: Edit, live: tuple[Edit, ...] = (), prune: bool = False) -> Plan:
    return make(edits, live, model="atlas", base="b", head="", params={}, prune=prune)


def a_version(**changes: Any) -> Version:
    values: dict[str, Any] = {
        "parent": "",
        "base": "b" * 32,
        "model": "atlas",
        "dtype": "torch.float32",
        "method": "alphaedit",
        "params": {
            "layers": [1, 2],
            "ridge": {"lambda_": 0.0, "l2": 0.005, "history": True, "hard": False},
            "null_space": {"rule": "energy", "value": 0.1},
        },
        "seed": 0,
        "weights_hash": "w" * 32,
        "libraries": {},
        "seconds": {"edit": 1.25},
        "peak_mb": 512.0,
        "id": "0123456789ab",
        "created_at": "2026-08-01T12:00:00+00:00",
        "who": "ada@lab",
    }
    return Version(**{**values, **changes})


def an_operation(**changes: Any) -> Operation:
    values: dict[str, Any] = {
        "id": 1,
        "parent": 0,
        "verb": "apply",
        "head_before": "",
        "head": "0123456789ab",
        "at": "2026-08-01T12:00:00+00:00",
        "who": "ada@lab",
        "command": "editctl apply",
        "undoes": 0,
        "description": "version 0123456789ab with 1 edit",
    }
    return Operation(**{**values, **changes})


def answers_about(edit: Edit, *, ok: bool, words: str) -> list[Answer]:
    kinds = (REWRITE, PARAPHRASE, LOCALITY, PORTABILITY)
    return [Answer(edit.id, kind, f"{edit.prompt} ({kind})", (edit.target_new,), words, words, ok) for kind in kinds]


def rendered(renderable: Any, width: int = 80, *, colour: bool = False) -> str:
    """As a terminal or, without colour, a file receives it."""
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colour, color_system="truecolor" if colour else None).print(
        renderable
    )
    return out.getvalue()


def raw_controls(text: str) -> set[str]:
    """Control and invisible characters that are no line ends, once Rich's own colour codes are taken out."""
    return {c for c in re.sub(r"\x1b\[[0-9;]*m", "", text) if not c.isprintable()} - {"\n"}


# ---------------------------------------------------------------------------------------------------------------------
# Texts from outside


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("[red]x[/red]", "[red]x[/red]"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("two\nlines\t", "two\\nlines\\t"),
        ("\x9b31m\x07", "\\x9b31m\\x07"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("日本語 é", "日本語 é"),
    ],
)
def test_control_characters_are_escaped_and_others_are_left_alone(text: str, shown: str) -> None:
    """Colours, titles, line ends and direction marks come out as words about themselves."""
    assert report.safe(text) == shown


def test_a_long_text_is_cut_with_a_mark() -> None:
    """And the cut counts what is shown."""
    assert report.safe("x" * 50, 10) == "x" * 9 + "…"
    assert len(report.safe("\x1b" * 50, 10)) == 10


VIEWS: dict[str, Callable[[], Any]] = {
    "a plan that adds": lambda: report.plan_view(a_plan(nasty_edit(), an_edit(1, id="long", subject=LONG.strip()))),
    "a plan that replaces": lambda: report.plan_view(
        a_plan(nasty_edit(), live=(nasty_edit().model_copy(update={"target_new": "Oslo" + NASTY}),))
    ),
    "a plan that drops": lambda: report.plan_view(a_plan(live=(nasty_edit(),), prune=True)),
    "a plan that measures again": lambda: report.plan_view(a_plan(nasty_edit(tags=("t",)), live=(nasty_edit(),))),
    "a version": lambda: report.version_view(
        a_version(who=NASTY, model=NASTY),
        1,
        answers_about(nasty_edit(), ok=False, words=NASTY + LONG),
        [Metric(NASTY, "generated", 0.5, 2)],
        (1, 2048, ("thin",)),
        rows=None,
    ),
    "a version that waits": lambda: report.version_view(
        a_version(gates={"reliability": 0.9, NASTY: 0.5}),
        1,
        answers_about(nasty_edit(id=NASTY), ok=False, words="x"),
        [Metric("reliability", "generated", 0.5, 2)],
        FOOTPRINT,
        rows=1,
        reviews=[an_operation(verb="accept", note=NASTY, edits=(NASTY,), who=NASTY)],
        candidate=True,
    ),
    "a difference": lambda: report.diff_view(
        ("base", "0123456789ab"),
        ({"a": nasty_edit(id="a")}, {"a": nasty_edit(id="a", tags=("x",)), "b": nasty_edit(id="b")}),
        [(NASTY, answer) for answer in answers_about(nasty_edit(), ok=False, words=NASTY + "!")],
        ([Metric("reliability", "generated", 0.5, 2)], [Metric("reliability", "generated", 1.0, 2)]),
        ({NASTY: (0.5, 2.0)}, {NASTY: (0.25, 2.0)}),
    ),
    "a log": lambda: report.log_view(
        [
            an_operation(
                who=NASTY, command=f"apply {NASTY}", description=NASTY, note=NASTY, aliases={NASTY: "0123456789ab"}
            )
        ]
    ),
    "faults": lambda: report.faults_view([Fault(NASTY, NASTY, NASTY), Fault(NASTY, LONG, NASTY, True)], None, 0),
    "problems": lambda: report.problem_lines(
        InvalidInput(NASTY, NASTY, [Problem("[red].toml", 3, NASTY, NASTY), Problem("b.toml", 1, LONG)])
    ),
}


@pytest.mark.parametrize("colour", [False, True], ids=["file", "terminal"])
@pytest.mark.parametrize("width", [80, 20])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_shows_markup_as_it_is_and_no_raw_control_character(name: str, width: int, colour: bool) -> None:
    """At the usual width of a terminal and at one that is far too small."""
    text = rendered(VIEWS[name](), width, colour=colour)
    assert raw_controls(text) == set()
    if not colour:
        assert "\x1b" not in text
    if width == 80:
        assert "[red]x" in text.replace("\n", "")


def test_the_look_for_raw_control_characters_finds_them() -> None:
    """Control: markup and escapes that are not made safe do get through Rich."""
    assert raw_controls(rendered(Text(f"a{NASTY}b"), 200)) >= {"\x1b", "\u202e"}
    assert "[red]" not in rendered("[red]x[/red]")


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def test_a_plan_lists_a_glyph_an_edit_and_counts_what_stays() -> None:
    """Edits that are up to date are in the summary alone."""
    live = tuple(an_edit(n) for n in range(4))
    wanted = (an_edit(0), an_edit(1, target_new="Oslo"), an_edit(2, tags=("new",)), an_edit(7, target_true="Bern"))
    text = rendered(report.plan_view(a_plan(*wanted, live=live, prune=True)), 120)
    lines = text.splitlines()
    assert [line[0] for line in lines[:-1]] == ["~", "?", "+", "-"]
    assert "Subject 1 lies in Rome → Oslo  (target_new changed)" in lines[0]
    assert "(probes or notes changed)" in lines[1]
    assert "Subject 7 lies in Bern → Rome" in lines[2]
    assert "(not in the specs)" in lines[3]
    assert lines[-1] == "Plan: 1 to add, 1 to replace, 1 to drop, 1 to measure again, 1 to keep."


def test_live_edits_outside_the_specs_are_counted_and_kept() -> None:
    """With the flag that would drop them."""
    text = rendered(report.plan_view(a_plan(an_edit(0), live=(an_edit(0), an_edit(1)))))
    assert "1 applied edit not in these specs (kept; --prune drops them)" in text
    assert "Nothing to do: 1 edit up to date." in text


# ---------------------------------------------------------------------------------------------------------------------
# Versions and differences


def test_a_version_shows_each_edit_before_and_after_and_how_its_other_prompts_fared() -> None:
    """And every prompt that did not come out as wanted, in the model's words."""
    edit = an_edit(1, target_true="Bern")
    said = [
        Answer(edit.id, REWRITE, edit.prompt, ("Rome",), "Bern", "Rome", True),
        Answer(edit.id, PARAPHRASE, "Where is Subject 1? In", ("Rome",), "Bern", "Rome", True),
        Answer(edit.id, PARAPHRASE, "Find Subject 1 in", ("Rome",), "Bern", "Oslo", False),
    ]
    metrics = [Metric("reliability", "generated", 1.0, 1), Metric("generalization", "generated", 0.5, 2)]
    text = rendered(report.version_view(a_version(), 1, said, metrics, FOOTPRINT, rows=None), 110)
    row = next(line for line in text.splitlines() if line.startswith("✓"))
    assert re.search(r"Subject 1 lies in +Bern +Rome +1/2 +- +-", row)
    assert "1 other answer not as wanted" in text or "1 other answer is not as wanted" in text
    assert re.search(r"paraphrase +Find Subject 1 in +Rome +Bern +Oslo", text)
    assert re.search(r"generalization +50\.0 % +- +2", text)
    assert "l2 0.005" in text and "lambda" not in text, "what is zero is not said"


@pytest.mark.parametrize(
    ("footprint", "said"),
    [
        (FOOTPRINT, "1 file, 1.5 MB, thin"),
        ((0, 0, ()), "0 files, 0.0 MB"),
        ((2, 7 * 2**20, ("dense", "thin")), "2 files, 7.0 MB, dense and thin"),
    ],
)
def test_a_version_says_what_it_costs_on_disk(footprint: Any, said: str) -> None:
    """In files, bytes and the kinds of update in them."""
    assert told("factors", a_version(), footprint=footprint) == [said]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, "alphaedit: l2 0.005, history, null space by energy 0.1; blocks [1, 2]"),
        ({"null_space": None}, "alphaedit: l2 0.005, history; blocks [1, 2]"),
        ({"null_space": None, "ridge": {"lambda_": 0.0, "hard": False}}, "alphaedit: blocks [1, 2]"),
        ({"null_space": None, "ridge": {"lambda_": 1.5, "hard": True}}, "alphaedit: lambda 1.5, hard; blocks [1, 2]"),
    ],
)
def test_a_version_names_its_method_by_its_numbers(params: dict[str, Any], said: str) -> None:
    """Those that are not zero, then the null space, then the blocks."""
    assert told("method", a_version(params={**a_version().params, **params})) == [said]


def told(name: str, version: Version, *, footprint: Any = FOOTPRINT, **more: Any) -> list[str]:
    """What stands beside a name in the head of a version's view, a line each."""
    given: dict[str, Any] = {"edits": 1, "answers": [], "metrics": [], "rows": None, **more}
    found, here = [], False
    for line in rendered(report.version_view(version, footprint=footprint, **given), 110).splitlines():
        here = line.startswith(name) or (here and line.startswith(" "))
        if here:
            found.append(line[len(name) :].strip() if line.startswith(name) else line.strip())
    return found


def test_a_version_says_how_many_edits_it_has_and_how_large_its_updates_are() -> None:
    """The update beside the weight that carries it, block by block; nothing where nothing was measured."""
    norms = {"m.1": (0.5, 20.0), "m.2": (0.003, 30.0)}
    version = a_version(norms=norms)
    assert told("edits", version, edits=1234) == ["1234"]
    assert told("update ÷ weight", version) == ["0.0250, 0.0001"]
    assert told("update ÷ weight", a_version()) == []


def test_a_version_shows_its_reviews_and_that_it_waits() -> None:
    """Who decided what, when and why; one that was decided does not wait."""
    reviews = [
        an_operation(verb="accept", edits=("fact-1", "fact-2"), note="read the source"),
        an_operation(verb="reject", who="bob@lab"),
    ]
    at = "2026-08-01T12:00:00+00:00"
    assert told("accepted", a_version(), reviews=reviews) == [f"fact-1, fact-2: read the source (ada@lab, {at})"]
    assert told("rejected", a_version(), reviews=reviews) == [f"no note (bob@lab, {at})"]
    assert told("version", a_version(), candidate=True) == ["0123456789ab (a candidate: it waits for review)"]
    assert told("version", a_version()) == ["0123456789ab"]
    assert told("accepted", a_version()) == told("rejected", a_version()) == []


def test_a_version_names_the_gates_it_passed_or_failed_and_the_edits_that_failed() -> None:
    """The same numbers against two thresholds; of very many edits the first twenty."""
    said = [Answer(f"fact-{n}", REWRITE, f"p{n}", ("Rome",), "Bern", "Rome", n < 3) for n in range(30)]
    metrics = [Metric("reliability", "generated", 0.1, 30)]

    def gates(answers: list[Answer], **wanted: float) -> list[str]:
        return told("gates", a_version(gates=wanted), answers=answers, metrics=metrics)

    assert gates(said, reliability=0.1) == ["passed: reliability 0.1"]
    assert gates(said[:5], reliability=0.95, locality=0.5) == [
        "✗ reliability is 10.0 %, wanted 95.0 %",
        "fact-3",
        "fact-4",
        "✗ locality cannot be measured: no prompt for it was asked",
    ]
    many = gates(said, reliability=0.95)
    assert many[1:21] == [f"fact-{n}" for n in range(3, 23)] and many[21:] == ["… and 7 more"]
    assert gates(said) == []


@pytest.mark.parametrize(("rows", "shown"), [(None, 30), (30, 30), (29, 29), (2, 2)])
def test_a_version_of_very_many_edits_shows_the_first(rows: int | None, shown: int) -> None:
    """Of the edits and of the other answers alike, with how many are left out and how to see them."""
    said = [Answer(f"fact-{n}", REWRITE, f"prompt {n}", ("Rome",), "Bern", "Rome", True) for n in range(30)]
    said += [Answer(f"fact-{n}", PARAPHRASE, f"other {n}", ("Rome",), "Bern", "Oslo", False) for n in range(30)]
    text = rendered(report.version_view(a_version(), 30, said, [], FOOTPRINT, rows=rows), 110)
    for kind in ("prompt", "other"):
        assert len(re.findall(rf"\b{kind} \d+\b", text)) == shown
    assert text.count(f"… and {30 - shown} more (editctl show --all)") == (2 if shown < 30 else 0)
    assert "30 other answers not as wanted:" in text


# ---------------------------------------------------------------------------------------------------------------------
# Methods and expectations


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_methods_says_what_each_is_needs_and_how_it_preserves(width: int) -> None:
    """By family, a rule before each: in columns what a method changes and needs, how an edit is dropped and what
    preservation does; under them what it does, its equation and its paper. Nothing is wider than the screen or cut."""
    head, *lines = rendered(report.methods_view(list(METHODS.values())), width).splitlines()
    starts = [head.index(word) for word in ("changes", "needs", "drop", "null space")]
    assert max(cell_len(line.rstrip()) for line in lines) <= width and "…" not in head
    rules = [number for number, line in enumerate(lines) if "───" in line]
    assert [lines[number].split()[0] for number in rules] == list(dict.fromkeys(m.family for m in METHODS.values()))
    rows = [number for number, line in enumerate(lines) if line[:1] != " " and number not in rules]
    assert [lines[number].split()[0] for number in rows] == list(METHODS)
    for number, method in zip(rows, METHODS.values(), strict=True):
        end = min(other for other in [*rows, *rules, len(lines)] if other > number)
        block = lines[number:end]
        assert lines[max(rule for rule in rules if rule < number)].startswith(f"{method.family} ")
        facts = (method.changes, method.needs, method.drop, method.preservation or "-")
        for fact, start, stop in zip(facts, starts, [*starts[1:], None], strict=True):
            assert " ".join(" ".join(line[start:stop] for line in block).split()).startswith(fact), method.name
        below = " ".join(" ".join(line[starts[0] :] for line in block).split())
        assert below.endswith(" ".join(f"{method.summary} {method.equation} {method.paper}".split())), method.name
    alone = rendered(report.methods_view([METHODS["ft"]]), width)
    assert "every step is" in alone and "MEMIT" not in alone


@pytest.mark.parametrize(
    ("size", "seconds", "said"),
    [(700 * 2**20, 3.4, "about 3 s and at most 700 MB"), (3 * 2**30, 61.0, "about 61 s and at most 3.0 GB")],
)
def test_an_expectation_is_one_line(size: int, seconds: float, said: str) -> None:
    """With what it is judged by."""
    text = report.expected_line(Expected(size, seconds, "at the pace of version abc")).plain
    assert text == f"Expected: {said} of memory (at the pace of version abc)."


def test_a_difference_shows_facts_answers_and_how_metrics_changed() -> None:
    """Left is old, right is new."""
    old, new = an_edit(1), an_edit(1, target_new="Oslo")
    moved = [("Rome", Answer("fact-1", REWRITE, old.prompt, ("Oslo",), "Bern", "Oslo", True))]
    metrics = ([Metric("reliability", "generated", 1.0, 4)], [Metric("reliability", "generated", 0.75, 4)])
    names, edits = ("base", "abc"), ({"fact-1": old, "gone": an_edit(2)}, {"fact-1": new, "more": an_edit(3)})
    norms = ({"m.1": (0.5, 20.0)}, {"m.1": (0.625, 20.5), "m.2": (0.125, 30.0)})
    lines = rendered(report.diff_view(names, edits, moved, metrics, norms), 110).splitlines()
    assert lines[:6] == [
        "base → abc",
        "~ Subject 1 lies in Rome → Oslo",
        "- Subject 2 lies in Rome",
        "+ Subject 3 lies in Rome",
        "1 answer changed:",
        "  rewrite: Subject 1 lies in Rome → Oslo",
    ]
    assert any("75.0 % (-25.0)" in line for line in lines)
    assert [line.split() for line in lines if line.startswith("m.")] == [
        ["m.1", "0.5000", "0.6250", "20.000", "20.500"],
        ["m.2", "0.0000", "0.1250", "-", "30.000"],
    ]


def test_a_difference_without_one_says_so_and_shows_no_empty_table() -> None:
    """Neither facts, answers nor sizes; a version that another fact is in does not say so."""
    same = "the same edits on both sides"
    text = rendered(report.diff_view(("base", "base"), ({}, {}), [], ([], []), ({}, {})))
    assert same in text and "changed" not in text and "module" not in text
    text = rendered(report.diff_view(("base", "abc"), ({}, {"a": an_edit(1)}), [], ([], []), ({}, {})))
    assert same not in text and "+ Subject 1 lies in Rome" in text


def test_a_difference_of_very_many_answers_shows_the_first_hundred() -> None:
    """And how to see the rest."""
    moved = [("Rome", Answer(f"f{n}", REWRITE, f"prompt {n}", ("Oslo",), "Bern", "Oslo", True)) for n in range(103)]
    for there, left in ((103, 3), (100, 0)):
        text = rendered(report.diff_view(("a", "b"), ({}, {}), moved[:there], ([], []), ({}, {})))
        assert len(re.findall(r"rewrite: prompt \d+", text)) == 100 and f"{there} answers changed:" in text
        assert ("… and 3 more (editctl diff --json)" in text) == bool(left)


@pytest.mark.parametrize(("before", "higher", "style"), [(0.5, True, "32"), (1.0, True, "31"), (0.5, False, "31")])
def test_a_metric_that_changed_says_by_how_much_and_whether_for_the_better(
    before: float, higher: bool, style: str
) -> None:
    """Green is better, whichever way that is; without a change no number stands in brackets."""
    sides = [Metric("m", "generated", value, 4, higher) for value in (before, 0.75)]
    change = f"({100 * (0.75 - before):+.1f})"
    text = rendered(figures.MetricsView(sides[1:], sides[:1]), colour=True)
    assert f"\x1b[{style}m {change}" in text
    assert "(" not in rendered(figures.MetricsView(sides[1:], sides[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# The log, and what is wrong with a store


def test_the_log_tells_why_who_when_and_by_which_command() -> None:
    """The newest is marked; without a note or a command there is no line for it."""
    operations = [
        an_operation(id=2, verb="undo", head="", who="bob@lab", command="", description="undid operation 1 (apply)"),
        an_operation(note="the source was read"),
    ]
    lines = [" ".join(line.split()) for line in rendered(report.log_view(operations), 140).splitlines()]
    assert lines[1:] == [
        "@ 2 undo base 2026-08-01T12:00:00+00:00 bob@lab undid operation 1 (apply)",
        "1 apply 0123456789ab 2026-08-01T12:00:00+00:00 ada@lab version 0123456789ab with 1 edit",
        "“the source was read”",
        "editctl apply",
    ]
    assert "nothing was applied yet" in rendered(report.log_view([]))


def test_the_log_names_versions_by_their_aliases_and_counts_what_is_older() -> None:
    """As they are now, each beside the newest operation that led to its version."""
    now = {"stable": "0123456789ab", "clean": "", "gone": "f" * 12}
    operations = [
        an_operation(id=5, verb="alias", aliases=now),
        an_operation(id=4, verb="undo", head="", aliases={"old": ""}),
        an_operation(id=3, head="0123456789ab"),
    ]
    lines = [" ".join(line.split()) for line in rendered(report.log_view(operations), 140).splitlines()]
    assert [line for line in lines if line in ("stable", "clean", "gone", "old")] == []
    text = "\n".join(lines)
    assert text.index("@ 5 alias") < text.index("stable editctl apply") < text.index("4 undo base")
    assert text.index("4 undo base") < text.index("clean editctl apply") < text.index("3 apply")
    assert text.count("stable") == 1 and "gone" not in text and "old\n" not in text
    assert lines[-1] == "… and 2 older (editctl log --all)"
    assert "older" not in rendered(report.log_view([*operations[:1], an_operation(id=1)]))


@pytest.mark.parametrize(
    ("faults", "versions", "rebuilt", "lines"),
    [
        ([], 2, 2, ["ok: database, records and files are whole; 2 versions rebuilt to the bit"]),
        ([], 1, 0, ["ok: database, records and files are whole; 1 version not rebuilt"]),
        (
            [Fault("file x", "is lost", "find it")],
            None,
            0,
            ["wrong: file x is lost", "  hint: find it", "1 thing wrong"],
        ),
        (
            [Fault("file x", "is lost", "find it", True), Fault("version v", "is odd", "ask"), Fault("y", "z", "w")],
            None,
            3,
            [
                "mended: file x is lost",
                "wrong: version v is odd",
                "  hint: ask",
                "wrong: y z",
                "  hint: w",
                "2 things wrong",
            ],
        ),
        (
            [Fault("file x", "is lost", "find it", True)],
            3,
            3,
            ["mended: file x is lost", "ok: database, records and files are whole; 3 versions rebuilt to the bit"],
        ),
    ],
)
def test_what_is_wrong_with_a_store_is_told_a_line_each(
    faults: list[Fault], versions: int | None, rebuilt: int, lines: list[str]
) -> None:
    """With a remedy where nothing was mended, and one line for the whole."""
    assert rendered(report.faults_view(faults, versions, rebuilt)).splitlines() == lines


def test_a_table_of_a_study_is_markdown() -> None:
    """So that it can be pasted into a page."""
    rows = [{"method": "alphaedit", "edits": 3}, {"method": "me\x1bmit", "edits": 4}]
    assert report.markdown_table(rows) == [
        "| method | edits |",
        "|---|---|",
        "| alphaedit | 3 |",
        "| me\\x1bmit | 4 |",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Errors and runs


def test_an_error_shows_its_problems_then_itself_then_its_hint() -> None:
    """As a compiler does, so that editors can jump to the lines."""
    error = InvalidInput("1 problem in 1 file", "mend it", [Problem("a.toml", 3, "wrong", "right")])
    lines = rendered(report.problem_lines(error)).splitlines()
    assert lines == ["a.toml:3: wrong", "  hint: right", "error: 1 problem in 1 file", "hint: mend it"]
    assert rendered(report.problem_lines(StoreError("gone"))).splitlines() == ["error: gone"]


def test_a_run_away_from_a_terminal_is_told_in_plain_lines() -> None:
    """Stages, free directions and notes; steps and progress would flood a log."""
    out = io.StringIO()
    with report.showing_run(Console(file=out, width=120)) as emit:
        emit(events.RunStarted("atlas", "cpu", "float32", "alphaedit", 2, 1, 0))
        emit(events.StageStarted("target", 25, 1))
        emit(events.MemoryUsed(7777.5))
        emit(events.TargetStep(1, 1, 2.5, 2))
        emit(events.Progress("target", 1, 25))
        emit(events.NullSpace(2, 700, 1280, 0.099))
        emit(events.Note(NASTY))
        emit(events.GateFailed("reliability", 0.95, 0.5, ["fact-1"]))
    text = out.getvalue()
    assert "gate reliability is 50.0 %, wanted 95.0 %\n" in text
    assert "Editing atlas on cpu (float32) with alphaedit: 2 edits" in text
    assert "block 2: 700 of 1280 directions are free (9.9 % of the energy)" in text
    assert "note: [red]x[/red]" in text
    assert raw_controls(text) == set()
    assert "2.5" not in text and "7777" not in text


@pytest.mark.parametrize("stage", ["load", "statistics", "before", "target", "solve", "after", "commit", "rebuild"])
def test_a_run_on_a_terminal_shows_every_stage_without_failing(stage: str) -> None:
    """Bars, losses and notes go to the terminal; a note's own escapes do not."""
    out = io.StringIO()
    with report.showing_run(Console(file=out, width=80, force_terminal=True)) as emit:
        emit(events.RunStarted("atlas", "cpu", "float32", "alphaedit", 2, 2, 0))
        emit(events.StageStarted(stage, 3, 1))
        emit(events.MemoryUsed(7777.5))
        emit(events.Progress(stage, 3, 3))
        emit(events.TargetStep(1, 1, 2.5, 2))
        emit(events.LayerSolved(1, 2, 0.5, 10.0, 0.1))
        emit(events.Note(NASTY))
        emit(events.GateFailed(NASTY, 0.95, None, []))
        emit(events.VersionMade("v", "p", "w", {}, 1.0))
    assert "\x1b[31m\x1b]0;title" not in out.getvalue() and "7777" not in out.getvalue()
    assert "note: [red]x[/red]" in out.getvalue()


# What is measured


def test_counts_of_different_protocols_are_told_apart() -> None:
    """And the part of a metric stands under it; what has no value is a dash."""
    metrics = [
        Metric("locality", "generated", 0.9, 156, low=0.8, high=0.95),
        Metric("locality", "probability", 1.0, 106),
        Metric("portability", "generated", 0.5, 10),
        Metric("portability", "generated", 0.25, 4, axis="[red]alias"),
    ]
    text = rendered(figures.MetricsView(metrics))
    assert re.search(r"locality +90\.0 % 80–95 +- +100\.0 % +156/106\n", text)
    assert re.search(r"portability +50\.0 % +- +- +10\n  \[red\]alias +25\.0 % +- +- +4\n", text)


def test_what_is_no_share_says_its_unit_direction_and_what_it_was_before() -> None:
    """Parts only where they are asked for; a value that is no number is said."""
    metrics = [
        Metric("perplexity", "teacher-forced", 25.126, 30, False),
        Metric("perplexity", "teacher-forced", 24.9, 30, False, "was"),
        Metric("drift", "hidden states", 0.02, 100, False, "", 0.01, 0.03),
        Metric("drift", "hidden states", 0.5, 900, False, "largest"),
        Metric("fluency", "sampled", math.nan, 3),
    ]
    text, whole = (rendered(figures.MetricsView(metrics, parts=parts)) for parts in (False, True))
    assert re.search(r"perplexity +25\.13 +24\.90 +lower +30 +teacher-forced", text)
    assert re.search(r"drift +2\.0 % 1\.0 %–3\.0 % +- +lower +100", text)
    assert re.search(r"fluency +no number +- +higher +3", text)
    assert "largest" not in text and re.search(r"  largest +50\.0 % +- +lower +900", whole)
    assert "was" not in whole, "it is a column, not a row"


def test_a_narrow_pane_has_every_number_and_protocol_on_one_line() -> None:
    """Without intervals, for which there is no room; at 76 columns they are there."""
    kinds = ("generated", "teacher-forced", "probability")
    metrics = [
        Metric("generalization", kind, 1.0, n, low=0.9, high=1.0)
        for kind, n in zip(kinds, (100, 100, 101), strict=True)
    ]
    narrow, wide = (rendered(figures.MetricsView(metrics), width).splitlines() for width in (53, 76))
    assert narrow[-1].split() == ["generalization", *["100.0", "%"] * 3, "100/101"] and len(narrow) == 3
    assert [line.split() for line in narrow[:2]] == [
        ["teacher-", "proba-"],
        ["metric", "generated", "forced", "bility", "prompts"],
    ]
    assert len(wide) == 2 and wide[1].count("90–100") == 3


def test_the_retention_curve_names_what_is_forgotten() -> None:
    """In order of application; without a batch after any edit there is none."""

    def told(n: int, soon: str | None, ok: bool) -> Answer:
        return Answer(f"fact-{n}[b]", REWRITE, "p", ("Rome",), "Bern", "Rome" if ok else "Bern", ok, soon=soon)

    answers = [told(n, "Rome", n != 3) for n in range(20)] + [told(20, None, True)]
    text = rendered(figures.retention_view(answers))
    assert re.search(r"1–2 +100\.0 % +100\.0 %\n3–4 +100\.0 % +50\.0 %\n", text)
    assert "forgotten: fact-3[b]" in text and "19–20" in text and "21" not in text
    assert rendered(figures.retention_view([told(0, None, True)])).strip() == ""


def test_what_could_not_be_measured_is_said_with_the_reason() -> None:
    """Instead of a zero or nothing; what was measured is not among it."""
    metrics = [Metric(name, "generated", 1.0, 2) for name in ("reliability", "locality")]
    text = rendered(figures.unmeasured_line(metrics, ("generation",)), 500)
    assert "generalization (no edit has paraphrases)" in text and "probabilities (no edit names target_true)" in text
    assert "fluency (no edit has openings" in text and "locality" not in text
    assert "essence" not in text, "it was not asked for"
