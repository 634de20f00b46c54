"""The verbs that look after the store: is it whole, what can go, copies.

Knows: verify, gc, backup. Refuses: to compute; the engine is imported where a model is loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from editctl import talk
from editctl.errors import EditctlError, Exit, InvalidInput
from editctl.flags import as_json, from_flags, from_writer
from editctl.workspace import Workspace

if TYPE_CHECKING:
    from editctl.store import Fault, Store, Version


@click.command()
@click.option("--rebuild/--no-rebuild", default=True, help="Rebuild every version and compare its weights.")
@click.option("--repair", is_flag=True, help="Mend what can be mended.")
@click.option("--from", "backup", type=click.Path(file_okay=False), help="A backup to take spoiled files from.")
@from_writer
@as_json
@from_flags
@click.pass_obj
def verify(
    space: Workspace,
    /,
    rebuild: bool,
    repair: bool,
    backup: str | None,
    lock_timeout: int,
    as_json: bool,
    **flags: Any,
) -> None:
    """Check the store: database, records, factor and trained files, and every version's weights against a rebuild.

    Nothing is changed without --repair. The exit code is 1 if something is wrong and was not mended.
    """
    from editctl.store import care

    if backup is not None and not repair:
        raise InvalidInput("--from says where to take files from, but nothing is to be mended", "add --repair")
    space = space.with_flags(**flags)
    store = space.store()
    faults = care.inspect(store)
    if repair and faults:
        with store.lock("verify", lock_timeout):
            faults = care.repair(store, faults, Path(backup) if backup else None)
    left = [fault for fault in faults if not fault.repaired]
    rebuilt = 0
    if rebuild and not any(fault.what == str(store.database) for fault in left):
        wrong = list(_not_rebuilt(space, store))
        rebuilt = len(store.versions())
        faults, left = faults + wrong, left + wrong
    if as_json:
        talk.lines(
            *({"type": "fault", **asdict(fault)} for fault in faults),
            {"type": "summary", "faults": len(faults), "left": len(left), "rebuilt": rebuilt},
        )
    else:
        from editctl import report

        talk.show(report.faults_view(faults, len(store.versions()) if not left else None, rebuilt), wrap=False)
    if left:
        raise SystemExit(Exit.FAILED)


def _not_rebuilt(space: Workspace, store: Store) -> Iterator[Fault]:
    """The versions whose weights do not come out as recorded, each model loaded once in each dtype."""
    from editctl import report
    from editctl.store import Fault

    def made_of(version: Version) -> tuple[str, str, str]:
        return version.base, version.dtype, version.model

    # In the order they were made each is the one before with a little more.
    versions = store.versions()
    versions.reverse()
    versions.sort(key=made_of)
    for _, group in itertools.groupby(versions, key=made_of):
        alike = list(group)
        with report.showing_run(report.console(stderr=True)) as emit:
            try:
                model = space.made_for(alike[:1]).load()
            except EditctlError as error:
                for version in alike:
                    yield Fault(f"version {version.id}", f"cannot be rebuilt: {error.message}", error.hint)
                continue
            from editctl.engine import wear

            wrong = wear.rebuild_all(model, store, alike, emit)
        for name, found in wrong.items():
            told = found.message.removeprefix(f"version {name} ")
            told = told if told != found.message else f"cannot be rebuilt: {told}"
            yield Fault(f"version {name}", told, found.hint)


@click.command()
@from_writer
@as_json
@click.pass_obj
def gc(space: Workspace, /, lock_timeout: int, as_json: bool) -> None:
    """Remove files that no version refers to; interrupted runs leave some. What was trained stays."""
    from editctl.plan import count
    from editctl.spec import visible
    from editctl.store import care

    store = space.store()
    found = []
    # A lock would leave a folder behind.
    if store.root.exists():
        with store.lock("gc", lock_timeout):
            found = care.collect(store)
    if as_json:
        talk.lines(*({"type": "removed", "file": str(one.path), "bytes": one.bytes} for one in found))
        return
    for one in found:
        click.echo(visible(str(one.path), 10_000))
    click.echo(f"Removed {count(len(found), 'file')}, {sum(one.bytes for one in found) / 2**20:.1f} MB.")


@click.command()
@click.argument("folder", type=click.Path(file_okay=False))
@as_json
@click.pass_obj
def backup(space: Workspace, /, folder: str, as_json: bool) -> None:
    """Copy the store into FOLDER, also while it is in use; again to bring the copy up to date.

    The copy is a store: `--store FOLDER` works with it.
    """
    from editctl.plan import count
    from editctl.spec import visible
    from editctl.store import care

    store = space.store()
    copied = care.back_up(store, Path(folder))
    if as_json:
        talk.lines({"type": "backup", "folder": folder, "files": copied})
    else:
        click.echo(f"Copied the store to {visible(folder, 10_000)}: its database and {count(copied, 'new file')}.")


verbs = (verify, gc, backup)
"""What the command line adds."""
