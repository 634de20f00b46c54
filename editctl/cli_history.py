"""The verbs that look at the history of versions and move in it.

Knows: log, show, diff, undo, redo, restore. Refuses: to compute; rich and sqlite-utils are imported inside the verbs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from editctl import talk
from editctl.cli_run import alone, told, version_report
from editctl.flags import as_json, from_writer
from editctl.workspace import Workspace

if TYPE_CHECKING:
    from editctl.store import Operation, Store


@click.command()
@click.option("-n", "count", type=click.IntRange(1, 10**9), help="Only the newest N.")
@click.option("--all", "everything", is_flag=True, help="Every operation, not the newest hundred.")
@as_json
@click.pass_obj
def log(space: Workspace, /, count: int | None, everything: bool, as_json: bool) -> None:
    """List operations, newest first: who, when, what, why, and where the head went. With --json all of them."""
    from editctl import report

    store = space.store()
    operations = store.operations(count or (None if everything or as_json else report.SHOWN))
    if as_json:
        talk.lines(*({"type": "operation", **asdict(op)} for op in operations))
    else:
        talk.show(report.log_view(operations))


@click.command()
@click.argument("ref", default="@")
@click.option("--all", "everything", is_flag=True, help="Every answer, not the first hundred.")
@as_json
@click.pass_obj
def show(space: Workspace, /, ref: str, everything: bool, as_json: bool) -> None:
    """Show a version: what its run asked, before and after, its metrics, its reviews.

    REF is a version id or a unique prefix, an alias, @ (the head), @-, @-2 or base.
    """
    from editctl import report

    store = space.store()
    version = store.resolve(ref)
    found = store.evidence(version.id if version else "")
    if as_json:
        talk.lines(
            {"type": "record", **(asdict(version) if version else {"id": ""})},
            *({"type": "edit", **live.edit.to_json()} for live in store.edits(version)),
            *({"type": "answer", **asdict(answer)} for answer in store.answers(version)),
            *({"type": "metric", **asdict(metric)} for metric in store.metrics(version)),
            *({"type": "review", **asdict(review)} for review in (store.reviews(version) if version else ())),
            *({"type": "evidence", **asdict(one)} for one in found),
        )
        return
    if version is None:
        click.echo("base: the unedited model, no edits")
    else:
        talk.show(version_report(store, version, rows=None if everything else report.SHOWN))
    if found:
        from editctl import heat

        talk.show(heat.evidence_view(found))


@click.command()
@click.argument("old", default="@-")
@click.argument("new", default="@")
@as_json
@click.pass_obj
def diff(space: Workspace, /, old: str, new: str, as_json: bool) -> None:
    """Compare two versions: facts, answers to the same prompts, metrics, sizes of the updates."""
    from editctl import report

    store = space.store()
    found = store.compare(store.resolve(old), store.resolve(new))
    ids = (found.old.id if found.old else "", found.new.id if found.new else "")
    if as_json:
        talk.lines(
            {
                "type": "diff",
                "old": ids[0],
                "new": ids[1],
                "added": found.added,
                "removed": found.removed,
                "changed": found.changed,
                "answers": [asdict(answer) | {"was": was} for was, answer in found.moved],
                "metrics": [[asdict(m) for m in side] for side in found.metrics],
                "norms": found.norms,
            }
        )
        return
    names = (report.short(ids[0]), report.short(ids[1]))
    talk.show(report.diff_view(names, found.facts, found.moved, found.metrics, found.norms))


def _moved(space: Workspace, verb: str, as_json: bool, lock_timeout: int, move: Callable[[Store], Operation]) -> None:
    """Move the head and say where it is now."""
    store = space.store()
    with alone(store, verb, lock_timeout):
        told(move(store), as_json)


@click.command()
@from_writer
@as_json
@click.pass_obj
def undo(space: Workspace, /, lock_timeout: int, as_json: bool) -> None:
    """Take back the last operation; again to go further back."""
    _moved(space, "undo", as_json, lock_timeout, lambda store: store.undo(talk.command()))


@click.command()
@from_writer
@as_json
@click.pass_obj
def redo(space: Workspace, /, lock_timeout: int, as_json: bool) -> None:
    """Take back the last undo."""
    _moved(space, "redo", as_json, lock_timeout, lambda store: store.redo(talk.command()))


@click.command()
@click.argument("ref")
@from_writer
@as_json
@click.pass_obj
def restore(space: Workspace, /, ref: str, lock_timeout: int, as_json: bool) -> None:
    """Move the head to any version, or to where it was after an operation (op:N)."""
    _moved(space, "restore", as_json, lock_timeout, lambda store: store.restore(ref, talk.command()))


verbs = (log, show, diff, undo, redo, restore)
"""What the command line adds to its group."""
