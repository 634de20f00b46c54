"""The verbs that carry versions out of the store and into it.

Knows: export and import. Refuses: to compute; the engine is imported inside.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from editctl import talk
from editctl.cli_run import Asked, carry_out, confirm, makes_version
from editctl.errors import InvalidInput, StoreError
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
    files with all that is recorded, for `editctl import delta` in another workspace.
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
        written = export.bundle(record, store.deltas_dir, folder)
    else:
        from editctl.engine.wear import deltas_of

        space = space.made_for([version])
        model, deltas = space.load(), deltas_of(store, version)
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


@click.group("import")
def import_() -> None:
    """Bring in what was made elsewhere."""


@import_.command()
@click.argument("folder", type=click.Path())
@makes_version
def delta(asked: Asked, /, folder: str) -> None:
    """Take over a version that `export --format delta` wrote in another workspace.

    It must be made for the same model, and for the unedited one or on top of what the head has. Its weights are
    rebuilt and compared, its prompts are asked here, and it is held to the gates like any other.
    """
    from editctl import export, report
    from editctl import plan as plan_room
    from editctl.delta import load

    space, store = asked.space, asked.space.store()
    record = export.read_bundle(Path(folder))
    made = record.version
    _, base = space.source()
    if made.base != base:
        raise StoreError(
            f"the version was made for another model ({made.model}, content {made.base})",
            f"{space.config.model} has content {base}; name the right one with --model",
        )
    with store.lock("import", asked.lock_timeout):
        head = store.head()
        below = store.deltas(head)
        if record.deltas[: len(below)] != below:
            raise StoreError(
                "the version does not stand on what the head has",
                "`editctl restore base` first, or apply its edits from specs",
            )
        new = [placed.edit for placed in record.edits if placed.delta not in below]
        live = [one.known for one in store.edits(head)]
        plan = plan_room.make(
            new,
            live,
            model=space.config.model,
            base=base,
            head=head.id if head else "",
            params=made.params,
            gates=space.config.gates,
        )
        if not plan.changes:
            raise InvalidInput("the head has all of this already", "`editctl show` lists its edits")
        if not asked.as_json:
            talk.say(report.plan_view(plan))
        if not asked.yes:
            confirm("Take these edits over?")
        given = tuple(load(name, Path(folder) / export.DELTAS) for name in record.deltas[len(below) :])
        space = space.with_flags(dtype=made.dtype.removeprefix("torch."))
        carry_out(
            space,
            store,
            plan,
            base,
            as_json=asked.as_json,
            verb="import",
            note=asked.note,
            given=given,
            weights_hash=made.weights_hash,
        )


verbs = (export_, import_)
"""What the command line adds."""
