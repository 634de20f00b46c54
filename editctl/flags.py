"""Flags that several verbs of the command line share.

Knows: their names and help. Refuses: what they mean; `workspace` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from editctl.errors import InvalidInput

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")


def _numbers(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Block numbers with commas between.

    Raises:
        InvalidInput: they are not.
    """
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise InvalidInput(f"--layers {value} is no list of blocks", "for example --layers 1,2,3") from None


def options(*given: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds options in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(given):
            function = option(function)
        return function

    return decorate


_model = (
    click.option("--model", help="`atlas`, a model folder or a hub id."),
    click.option("--dtype", help="auto, float32, bfloat16 or float16."),
)
from_model = options(*_model)
"""The flags that say which model."""
from_flags = options(*_model, click.option("--device", help="auto, cpu, cuda or mps."))
"""The flags of the verbs that load a model."""
from_corpus = options(
    click.option("--layers", callback=_numbers, metavar="N,N,…", help="Blocks to edit (default: the model's own)."),
    click.option("--corpus", help="Text file, JSON lines or hf:NAME[:CONFIG] whose keys are preserved."),
)
"""The flags that say what is measured."""
from_method = options(
    click.option("--method", help="A method of `editctl methods`."),
    click.option("--preserve", type=click.Choice(["null-space", "none"]), help="Switch the projection on or off."),
    click.option("--batch-size", type=click.IntRange(1), help="Edits solved together."),
    from_corpus,
    click.option("--set", "set", multiple=True, metavar="NAME=VALUE", help="Override a setting of the method."),
)
"""The flags that say how to edit."""
