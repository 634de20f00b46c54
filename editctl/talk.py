"""What the verbs say: data on standard output, talk on standard error.

Knows: the two streams, JSON lines, the command as typed. Refuses: what is said; rich is imported where it is printed.
"""

from __future__ import annotations

import math
import shlex
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from editctl.events import Event


def say(text: object) -> None:
    """Talk: standard error."""
    from editctl import report

    report.console(stderr=True).print(text)


def show(renderable: object, *, wrap: bool = True) -> None:
    """Data: standard output; unwrapped where scripts look for whole lines."""
    from editctl import report

    report.console().print(renderable, soft_wrap=not wrap)


def lines(*values: object) -> None:
    """JSON, one value a line, after the stream's header."""
    from editctl.events import header

    click.echo(header())
    for value in values:
        line(value)


def line(value: object) -> None:
    """One more value as a line of JSON; a number that is none is null."""
    from editctl.events import json_line

    click.echo(json_line(_spelled(value)))


def _spelled(value: object) -> object:
    """The value with None for what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _spelled(part) for key, part in value.items()}
    return [_spelled(part) for part in value] if isinstance(value, list | tuple) else value


def command() -> str:
    """The command line as typed, for the record."""
    return shlex.join(["editctl", *sys.argv[1:]]).encode("utf-8", "replace").decode()


def echo(event: Event) -> None:
    """An event as a line of data."""
    from editctl.events import to_line

    click.echo(to_line(event))
