"""The verbs that decide about versions and take edits out of them.

Knows: accept, reject, alias, drop, replay, squash. Refuses: to compute; the engine is imported where a run begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from editctl import talk
from editctl.cli_run import Asked, alone, carry_out, confirm, makes_version, told
from editctl.errors import InvalidInput, StoreError
from editctl.flags import as_json, from_note, from_writer
from editctl.workspace import Workspace

if TYPE_CHECKING:
    from editctl.plan import Plan
    from editctl.store import Store, Version


@click.command()
@click.argument("ref", default="candidate")
@click.option("--edit", "edits", multiple=True, metavar="ID", help="Only say that this edit is good; again for more.")
@from_note
@from_writer
@as_json
@click.pass_obj
def accept(space: Workspace, /, ref: str, edits: tuple[str, ...], note: str, lock_timeout: int, as_json: bool) -> None:
    """Make a candidate the head, or record that some of its edits were found good.

    REF is the candidate, by default the newest.
    """
    store = space.store()
    with alone(store, "accept", lock_timeout):
        told(store.accept(ref, note=note, edits=edits, command=talk.command()), as_json)


@click.command()
@click.argument("ref", default="candidate")
@click.option("--edit", "edits", multiple=True, metavar="ID", help="Take this edit out; again for more.")
@makes_version
def reject(asked: Asked, /, ref: str, edits: tuple[str, ...]) -> None:
    """Close a candidate, or take edits out of a version and solve the rest again.

    Without --edit the candidate REF (by default the newest) is closed and stays in the store. With --edit a version
    without these edits is made from REF, a candidate or the head; it is measured and held to the gates like any other.
    """
    store = asked.space.store()
    with alone(store, "reject", asked.lock_timeout):
        if not edits:
            told(store.reject(ref, note=asked.note, command=talk.command()), asked.as_json)
            return
        version = store.resolve(ref)
        if version is None or (version != store.head() and version.id not in store.view().candidates):
            raise StoreError(f"{ref} is neither the head nor a candidate", "`editctl restore` goes to it first")
        _without(asked, store, version, edits, "rejected", verb="reject")


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@makes_version
def drop(asked: Asked, /, ids: tuple[str, ...]) -> None:
    """Take live edits out: the rest of their batches is solved again from what is stored, without a gradient."""
    store = asked.space.store()
    with alone(store, "drop", asked.lock_timeout):
        _without(asked, store, _head(store), ids, "dropped", verb="drop")


@click.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@makes_version
def replay(asked: Asked, /, ids: tuple[str, ...]) -> None:
    """Take live edits out and do anew all that came after them, as if they had never been."""
    store = asked.space.store()
    with alone(store, "replay", asked.lock_timeout):
        _without(asked, store, _head(store), ids, "left away", verb="replay", replay=True)


@click.command()
@click.argument("since", default="base")
@makes_version
def squash(asked: Asked, /, since: str) -> None:
    """Fold the batches of all versions after SINCE (default: base) into one solve.

    The edits stay what they are. Neighbouring batches of the same settings become one; those whose method cannot be
    solved from what is stored are sought anew together.
    """
    store = asked.space.store()
    with alone(store, "squash", asked.lock_timeout):
        head, below = _head(store), store.resolve(since)
        if store.steps_down(head, below) < 0:
            raise InvalidInput(f"{since} is not below the head", "`editctl log` shows what the head was made from")
        names = store.deltas(head)
        kept = 0
        for old, new in zip(store.deltas(below), names, strict=False):
            if old != new:
                break
            kept += 1
        if len(names) - kept < 2:
            raise InvalidInput(f"there are not two batches to fold after {since}", "name an earlier version")
        space = asked.space.made_for([head])
        plan = _plan(space, store, head, ())
        if not asked.yes:
            confirm(f"Fold the last {len(names) - kept} of {len(names)} batches?")
        carry_out(space, store, plan, plan.base, as_json=asked.as_json, verb="squash", note=asked.note, fold=kept)


@click.command()
@click.argument("name", required=False)
@click.argument("ref", required=False)
@click.option("--delete", is_flag=True, help="Remove the alias.")
@from_writer
@as_json
@click.pass_obj
def alias(
    space: Workspace, /, name: str | None, ref: str | None, delete: bool, lock_timeout: int, as_json: bool
) -> None:
    """List the aliases, or let NAME stand for the version REF (default: the head) from now on."""
    from editctl import report

    store = space.store()
    if name is not None:
        if delete and ref is not None:
            raise InvalidInput("--delete takes a name alone", "leave the version away")
        with alone(store, "alias", lock_timeout):
            told(store.set_alias(name, None if delete else ref or "@", talk.command()), as_json)
        return
    if delete:
        raise InvalidInput("--delete needs the name of an alias", "`editctl alias` lists them")
    aliases = store.view().aliases
    if as_json:
        talk.lines(*({"type": "alias", "name": key, "version": version} for key, version in aliases.items()))
    for key, version in aliases.items() if not as_json else ():
        click.echo(f"{report.safe(key):20s} {report.short(version)}")


def _head(store: Store) -> Version:
    head = store.head()
    if head is None:
        raise InvalidInput("the head is the unedited model: there are no edits", "`editctl apply` makes some")
    return head


def _plan(space: Workspace, store: Store, version: Version, ids: Sequence[str], reason: str = "") -> Plan:
    """The plan that takes edits out of a version, with the settings it was made with; the space is made for it."""
    from editctl import plan

    return plan.without(
        [live.known for live in store.edits(version)],
        ids,
        model=space.config.model,
        base=version.base,
        head=version.id,
        params={**version.params, "dtype": space.config.dtype},
        gates=space.config.gates,
        reason=reason,
    )


def _without(asked: Asked, store: Store, version: Version, ids: Sequence[str], reason: str, **order: Any) -> None:
    """Make a version without some edits."""
    from editctl import report

    space = asked.space.made_for([version])
    plan = _plan(space, store, version, ids, reason)
    if not asked.as_json:
        taken, left = len(plan.actions), plan.outside
        talk.say(report.plan_view(plan, f"Plan: {taken} to take out, {left} to keep."))
    if not asked.yes:
        confirm("Take these edits out?")
    carry_out(space, store, plan, plan.base, as_json=asked.as_json, note=asked.note, **order)


verbs = (accept, reject, alias, drop, replay, squash)
"""What the command line adds."""
