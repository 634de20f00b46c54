"""Events: each travels as one line of JSON and comes back as it was."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields

import pytest

from editctl import events
from editctl.events import Event, from_line, header, json_line, silent, to_line

KINDS = Event.__subclasses__()
VALUES: dict[str, object] = {
    "str": 'Ünï "quoted"\nline\x1b[31m\u202e',
    "int": 3,
    "float": 0.125,
    "dict[str, float]": {"edit": 1.5},
    "float | None": 0.5,
    "list[str]": ["a", "\x1b"],
    "bool": True,
}


def an_event(kind: type[Event]) -> Event:
    """An event with a telling value in every field."""
    return kind(**{field.name: VALUES[str(field.type)] for field in fields(kind)})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_event_comes_back_from_its_line_as_it_was(kind: type[Event]) -> None:
    """Whatever its texts hold, the line is one line."""
    event = an_event(kind)
    line = to_line(event)
    assert "\n" not in line
    assert from_line(line) == event
    assert type(from_line(line)) is kind


def test_all_events_are_known() -> None:
    """Control for the test above: it is about the events a run sends."""
    assert {"RunStarted", "StageStarted", "TargetStep", "LayerSolved", "VersionMade"} <= {k.__name__ for k in KINDS}


def test_memory_is_told_in_megabytes() -> None:
    """Its name is the one that readers of the stream look for."""
    assert to_line(events.MemoryUsed(812.5)) == '{"type": "memory_used", "mb": 812.5}'


def test_the_type_is_the_name_in_snake_case() -> None:
    """As readers of the stream in other languages expect it."""
    assert json.loads(to_line(events.NullSpace(1, 2, 3, 0.1)))["type"] == "null_space"
    assert len({json.loads(to_line(an_event(kind)))["type"] for kind in KINDS}) == len(KINDS)


def test_keys_of_a_newer_editctl_are_ignored() -> None:
    """So an old reader follows a new writer."""
    assert from_line('{"type": "note", "message": "hi", "colour": "red"}') == events.Note("hi")


def test_a_default_may_be_left_out() -> None:
    """A field that was added with a default reads from older lines."""
    assert from_line('{"type": "stage_started", "stage": "solve", "total": 3}') == events.StageStarted("solve", 3, 0)


@pytest.mark.parametrize("line", ['{"type": "nonsense"}', "{}", "not JSON", ""])
def test_a_line_that_is_no_event_is_a_value_error(line: str) -> None:
    """Of an unknown type, without one, or no JSON at all."""
    with pytest.raises(ValueError):
        from_line(line)


def test_a_line_acts_on_no_terminal() -> None:
    """Controls, directions and what cannot be seen are escaped, other text is not; the value comes back."""
    value = {"Ünï 日本語": ["\x1b[31m\x9b2J\x7f\0", "\u202e\u200b\u2028\ufeff\xad", "\U000e0041 \U0001f600"]}
    line = json_line(value)
    assert line.isprintable() and "Ünï 日本語" in line and "\U0001f600" in line
    assert json.loads(line) == value


def test_the_unknown_type_is_named() -> None:
    """So that the reader knows what to upgrade for."""
    with pytest.raises(ValueError, match="unknown event type 'nonsense'"):
        from_line('{"type": "nonsense"}')


def test_the_header_tells_the_schema() -> None:
    """It is the first line of every stream."""
    assert json.loads(header()) == {"type": "version", "schema": events.SCHEMA}


def test_events_do_not_change() -> None:
    """They are recorded and sent at the same time."""
    with pytest.raises(FrozenInstanceError):
        events.Note("a").message = "b"  # type: ignore[misc]
    assert silent(events.Note("a")) is None
