"""Carrying a plan out on a terminal or as JSON, and telling what came of it.

Knows: the order of load, run and report, and the exit code of a version that waits for review. Refuses: to compute; the
engine is imported where a run begins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from editctl import flags, talk
from editctl.errors import Exit, InvalidInput
from editctl.flags import from_flags, from_gates, from_note, from_writer, from_yes, options
from editctl.workspace import Workspace

if TYPE_CHECKING:
    from editctl.plan import Plan
    from editctl.store import Operation, Store, Version


SUMMARY = 20
"""Answers shown of a kind after a run; `show` has more."""


@dataclass(frozen=True)
class Asked:
    """What is asked of every verb that makes a version without specs."""

    space: Workspace
    yes: bool
    note: str
    lock_timeout: int
    as_json: bool


def makes_version(function: Callable[..., None]) -> Callable[..., None]:
    """The flags of such verbs, given to them as one."""

    @wraps(function)
    def command(
        space: Workspace,
        /,
        *,
        yes: bool,
        note: str,
        gates: tuple[str, ...],
        lock_timeout: int,
        as_json: bool,
        **rest: Any,
    ) -> None:
        named = {name: rest.pop(name) for name in ("model", "dtype", "device", "trust_remote_code")}
        function(Asked(space.with_flags(gates=gates, **named), yes, note, lock_timeout, as_json), **rest)

    decorate = options(from_yes, from_note, from_gates, from_writer, flags.as_json, from_flags)
    return decorate(click.pass_obj(command))


def alone(store: Store, verb: str, timeout: int) -> AbstractContextManager[None]:
    """Be the only writer; where nothing was ever written a lock would leave a folder behind."""
    return store.lock(verb, timeout) if store.database.exists() else nullcontext()


def told(operation: Operation, as_json: bool) -> None:
    """Say what an operation did and where the head is now."""
    from editctl import report

    if as_json:
        talk.lines({"type": "operation", **asdict(operation)})
    else:
        click.echo(report.safe(operation.description))
        click.echo(f"Now at: {report.short(operation.head)}")


def confirm(question: str) -> None:
    """Ask on a terminal; the answer that goes on is a word, not the key that asked.

    Raises:
        InvalidInput: there is no terminal to ask on.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        verb = click.get_current_context().info_name
        raise InvalidInput(f"{verb} needs confirmation and there is no terminal to ask on", "pass --yes")
    if click.prompt(f"{question} Only yes goes on", default="no", err=True).strip().lower() != "yes":
        raise click.Abort


def carry_out(space: Workspace, store: Store, plan: Plan, base: str, *, as_json: bool, **order: Any) -> None:
    """Load the model, carry the plan out, tell what came of it; a version that waits for review ends with exit code 4.

    Args:
        base: content of the model's folder now.
        order: fields of the engine's `Order`.
    """
    from editctl import report
    from editctl.engine import run
    from editctl.events import StageStarted

    if as_json:
        talk.lines()
    with nullcontext(talk.echo) if as_json else report.showing_run(report.console(stderr=True)) as emit:
        emit(StageStarted("load", 0))
        model = space.with_flags(dtype=plan.params["dtype"]).load()
        config = space.config
        wanted = run.Order(command=talk.command(), recheck=config.recheck, checks=tuple(config.checks), **order)
        version = run.run(plan, model, base, store, emit, wanted)
    candidate = version.id in store.view().candidates
    if as_json:
        for metric in store.metrics(version):
            talk.line({"type": "metric", **asdict(metric)})
    else:
        talk.say(version_report(store, version, rows=SUMMARY))
        if candidate:
            talk.say(
                f"Version {version.id} is a candidate; the head stays where it was.\n"
                f"Decide: editctl accept {version.id}, editctl reject {version.id}, "
                f"or editctl reject {version.id} --edit ID to go on without an edit"
            )
        else:
            talk.say(f"Made version {version.id}. Back again: editctl undo")
        click.echo(version.id)
    if candidate:
        raise SystemExit(Exit.GATE)


def version_report(store: Store, version: Version, *, rows: int | None) -> object:
    """A version in full, for a terminal."""
    from editctl import report

    return report.version_view(
        version,
        store.count(version),
        store.answers(version),
        store.metrics(version),
        store.footprint(version),
        rows=rows,
        reviews=store.reviews(version),
        candidate=version.id in store.view().candidates,
    )
