"""Hostile inputs: whatever stands in a spec, a configuration, a saved plan or on the command line, no verb crashes,
hangs, prints what acts on a terminal, or ends with an exit code that is not documented.

The inputs, the judge and the room they meet in are in `fuzzing.py`; each batch is a process of its own. A failure names
the command that makes its input again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzzing
import pytest
from fuzzing import APART, CODES, HOSTILE, KINDS, SHOWN, Outcome, judge, leaves, markup_acted, raw

from editctl.cli import cli

ROOM = Path(fuzzing.__file__)


def fuzz(*arguments: str, timeout: float = 600) -> dict[str, Any]:
    """The figures of a batch of inputs, which are printed too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOM), *arguments]
    factor = float(os.environ.get("EDITCTL_TIME_FACTOR", "1"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout * factor, env=environment)
    last = done.stderr.strip().splitlines()[-30:]
    assert done.returncode == 0, f"the process ended with {done.returncode} at the input named last:\n" + "\n".join(
        last
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    print(" ".join(arguments), {key: value for key, value in figures.items() if key != "failures"})
    return figures


def told(figures: dict[str, Any]) -> str:
    """The failures, each with the command that makes it again and the beginning of its input."""
    shown = [f"{figures['failed']} of {figures['inputs']} inputs failed, for example:"]
    for one in figures["failures"][:5]:
        shown += [f"python tests/fuzzing.py {one['input']} --show", *(f"  {wrong}" for wrong in one["wrong"])]
        shown += [f"  {key}: {str(value)[:2000]}" for key, value in one.items() if key not in ("input", "wrong")]
    return "\n".join(shown)


# ---------------------------------------------------------------------------------------------------------------------
# Random inputs


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_makes_a_verb_crash_hang_or_speak_to_the_terminal(kind: str) -> None:
    """1,500 in all, seeded."""
    figures = fuzz("--kind", kind, "--seed", "1", "--count", "375")
    assert not figures["failed"], told(figures)
    assert figures["inputs"] == 375
    assert len(figures["codes"]) >= 3, "inputs that all end alike test little"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_no_input_of_many_makes_a_verb_crash_hang_or_speak_to_the_terminal(kind: str, seed: int) -> None:
    """20,800 in all, seeded."""
    figures = fuzz("--kind", kind, "--seed", str(seed), "--count", "2600", timeout=3600)
    assert not figures["failed"], told(figures)
    assert figures["inputs"] == 2600


def test_an_input_is_the_same_each_time() -> None:
    """So a failure can be made again by its number, alone."""
    one, again, other = (fuzz("--kind", "line", "--first", first, "--count", "5") for first in ("3", "3", "4"))
    assert one["digest"] == again["digest"] != other["digest"]


@pytest.mark.parametrize(
    ("planted", "wrong"),
    [
        ("crash", "left main: ZeroDivisionError: planted"),
        ("memory", "left main: MemoryError"),
        ("code", "exit code 7"),
        ("silence", "exit code 1 without a word"),
        ("traceback", "a traceback on stdout"),
        ("escape", "raw characters on stdout: U+001B"),
        ("direction", "raw characters on stdout: U+202E"),
        ("sleep", "took "),
    ],
)
def test_a_planted_fault_is_found(planted: str, wrong: str) -> None:
    """Control: a verb that does what none may do fails the batch, and the report says what it did."""
    figures = fuzz("--kind", "planted", "--plant", planted)
    assert figures["failed"] == 1
    assert figures["failures"][0]["wrong"][0].startswith(wrong)
    assert wrong in told(figures)


@pytest.mark.parametrize("planted", ["nothing", "torch", "outside", "program", "network"])
def test_the_room_keeps_a_verb_from_models_programs_networks_and_other_folders(planted: str, tmp_path: Path) -> None:
    """Control: what would do harm is refused in a way that a verb has to cope with, and a plain verb passes."""
    figures = fuzz("--kind", "planted", "--plant", planted)
    assert not figures["failed"], told(figures)
    assert figures["codes"] == {"0" if planted == "nothing" else "1": 1}
    assert not Path("/tmp/editctl-planted").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Hostile texts in every field of every verb's output


def test_every_verb_is_shown_a_hostile_store_or_named_with_the_reason() -> None:
    """A new verb belongs in one of the two lists of `fuzzing.py`."""
    assert set(SHOWN) | set(APART) == set(leaves(cli))
    assert not set(SHOWN) & set(APART)
    assert all(reason.strip() for reason in APART.values())


def test_no_verb_prints_a_hostile_text_raw() -> None:
    """A store, specs, user and folder whose every text is hostile: each verb shows them, plain and as JSON, escaped."""
    figures = fuzz("--kind", "shown")
    assert not figures["failed"], told(figures)
    assert set(figures["seen"]) == set(SHOWN)
    assert [verb for verb, (well, _) in figures["seen"].items() if not well] == [], "a verb never went well"
    assert [verb for verb, (_, shown) in figures["seen"].items() if not shown] == [], "a verb showed nothing hostile"
    assert set(figures["codes"]) == {str(code) for code in CODES - {130}}


@pytest.mark.slow
def test_no_verb_stumbles_over_texts_of_a_megabyte() -> None:
    """The same with a text of 1 MB in every field."""
    figures = fuzz("--kind", "long", timeout=1800)
    assert not figures["failed"], told(figures)
    assert figures["inputs"] > 3 * len(SHOWN)


def test_no_verb_prints_a_hostile_argument_raw() -> None:
    """Each verb with a hostile text for each of its arguments and options, and as an option nobody has."""
    figures = fuzz("--kind", "hurt")
    assert not figures["failed"], told(figures)
    assert figures["inputs"] > 10 * len(leaves(cli))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain\n\tтекст 日本語 é [red]x[/red] \u00a0", []),
        ("\x1b[31m", ["U+001B"]),
        ("a\rb", ["U+000D"]),
        ("\x9b2J\x7f\0", ["U+0000", "U+007F", "U+009B"]),
        ("\u202e\u2066\u200e", ["U+200E", "U+202E", "U+2066"]),
        ("\u200b\ufeff\xad\u2060", ["U+00AD", "U+200B", "U+2060", "U+FEFF"]),
        ("\u2028\u2029", ["U+2028", "U+2029"]),
        ("\U000e0041", ["U+E0041"]),
        ("\ud800", ["U+D800"]),
    ],
)
def test_the_scan_finds_every_kind_of_raw_character(text: str, found: list[str]) -> None:
    """Control: alone and inside another text; line ends, tabs and letters of any script are none."""
    assert raw(text) == found
    assert raw(f"before {text} after") == found


def test_the_judge_finds_every_kind_of_fault() -> None:
    """Control: each alone; an outcome without one passes."""
    good = Outcome(2, "", "error: no\n", 0.1)
    assert judge(good) == []
    faults: list[dict[str, Any]] = [
        {"code": 9},
        {"code": None, "crash": "Boom: x"},
        {"err": ""},
        {"out": "\x1b"},
        {"seconds": 1e6},
    ]
    faults += [{"err": "Traceback (most recent call last):"}, {"err": "\u2029"}]
    assert [len(judge(good._replace(**fault))) for fault in faults] == [1] * len(faults)


def test_markup_that_acts_is_found() -> None:
    """Control: the hostile text printed as Rich would by default; printed as it is, it passes."""
    from rich.console import Console

    safe = "".join(c if c.isprintable() else "?" for c in HOSTILE)
    for escaped in (True, False):
        console = Console(file=None, width=500, markup=not escaped, emoji=not escaped, record=True, quiet=False)
        with console.capture() as capture:
            console.print(safe.replace("[/] ", ""))
        assert markup_acted(capture.get()) is not escaped


@pytest.mark.skipif(not fuzzing.SAMPLES.is_dir(), reason="the samples of real data sets are not here")
def test_hostile_texts_of_real_data_sets_are_among_the_inputs() -> None:
    """Where the samples are, their texts are drawn from."""
    assert any(raw(text) for text in fuzzing._samples())
