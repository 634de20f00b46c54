"""The verb that carries versions out of the store; `cli_import` has those that bring something in.

Knows: export. Refuses: to compute; the engine is imported inside.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from editctl import talk
from editctl.cli_import import export_specs, import_
from editctl.errors import InvalidInput
from editctl.flags import as_json, from_flags
from editctl.workspace import Workspace

if TYPE_CHECKING:
    from editctl.export import Record
    from editctl.store import Store, Version


@click.command("export")
@click.argument("ref", default="@")
@click.option("-o", "--out", required=True, type=click.Path(), help="Folder to write; it must not hold anything.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["merged", "peft", "delta"]),
    default="merged",
    help="A Hugging Face folder, a LoRA adapter, or the version itself for another store.",
)
@click.option("--rank", type=click.IntRange(1), help="Cut an adapter to this rank; what is lost is said.")
@as_json
@from_flags
@click.pass_obj
def export_(space: Workspace, /, ref: str, out: str, form: str, rank: int | None, as_json: bool, **flags: Any) -> None:
    """Write a version as other programs load it; it is read back and compared before success is said.

    merged: an ordinary Hugging Face folder. peft: a LoRA adapter made of the factors themselves. delta: the factor
    files, what was trained for them and all that is recorded, for `editctl import delta` in another workspace; edits
    that lie over the weights can go no other way.
    """
    from editctl import report

    if rank is not None and form != "peft":
        raise InvalidInput(f"--rank is for adapters, not for --format {form}", "leave --rank away")
    space = space.with_flags(**flags)
    store = space.store()
    version = store.resolve(ref)
    if version is None and form != "merged":
        raise InvalidInput("base has no edits to export", "name a version, or --format merged for the model itself")
    from editctl import export

    folder = Path(out)
    record = _record(store, version) if version else None
    if form == export.DELTA and record is not None:
        written = export.bundle(record, store.deltas_dir, store.artifacts_dir, folder)
    else:
        from editctl.engine.wear import deltas_of

        deltas = deltas_of(store, version)
        export.check_weights_alone(deltas, record)
        space = space.made_for([version])
        model = space.load()
        if form == export.PEFT and record is not None:
            written = export.adapter(model, deltas, folder, record, rank=rank)
        else:
            written = export.merged(model, deltas, folder, record, trusted=space.trusting)
    if as_json:
        talk.lines({"type": "exported", **asdict(written), "folder": str(folder)})
        return
    name = version.id if version else "base"
    facts = [f"{written.size / 2**20:.1f} MB", f"rank {written.rank}" if written.rank else ""]
    facts += [f"{100 * written.lost:.2f} % of the energy lost" if written.lost else ""]
    talk.say(f"Wrote version {name} as {form} ({', '.join(filter(None, facts))}); read back and compared.")
    click.echo(report.safe(str(folder)))


def _record(store: Store, version: Version) -> Record:
    from editctl.export import Placed, Record

    lives = store.edits(version)
    return Record(
        version,
        store.deltas(version),
        tuple(Placed(live.edit, live.delta, live.column) for live in lives),
        store.last_answers(version, [live.id for live in lives]),
        store.metrics(version),
    )


verbs = (export_, import_, export_specs)
"""What the command line adds."""
