"""Flags that several verbs of the command line share.

Knows: their names and help. Refuses: what they mean; `workspace` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from editctl.errors import InvalidInput

specs_argument = click.argument("specs", nargs=-1, type=click.Path())
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
from_writer = click.option(
    "--lock-timeout", type=click.IntRange(0, 86_400), default=0, help="Seconds to wait for another writer."
)
"""The flag of the verbs that change the store."""
from_note = click.option("-m", "--note", default="", help="Why; kept in the log.")
from_yes = click.option("--yes", is_flag=True, help="Do not ask.")
from_gates = click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="METRIC=SHARE",
    help="What the version must reach to become the head, for example reliability=0.95; again for more.",
)
"""The flag of the verbs that make a version."""


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


from_trust = click.option("--trust-remote-code", is_flag=True, help="Run code that the model's folder brings.")
_model = (
    click.option("--model", help="`atlas`, a model folder or a hub id."),
    click.option("--dtype", help="auto, float32, bfloat16 or float16."),
    from_trust,
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
