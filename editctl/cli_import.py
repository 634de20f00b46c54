"""The verbs that bring in what was made elsewhere, and the one that writes specs as others have them.

Knows: import, export-specs. Refuses: to compute; the engine and the importers are imported inside.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from editctl import talk
from editctl.cli_run import Asked, carry_out, confirm, makes_version
from editctl.errors import InvalidInput, StoreError
from editctl.flags import as_json, from_yes, options, specs_argument
from editctl.importers.names import ALIASES, NAMES, TARGETS, WITH_TARGET, name_of
from editctl.workspace import Workspace

if TYPE_CHECKING:
    from editctl.importers.work import Row, Survey

TOLD = 20
"""Records that are told of one by one; `--json` tells all."""


class _Formats(click.Group):
    """A group whose verbs are formats, and which takes a file alone as one whose format is to be detected."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = ["file", *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = name_of(args[0]) or args[0]
        if name not in self.commands:
            if len(args) > 1 and not args[1].startswith("-"):
                from editctl.spec import nearest, quoted

                known = [*NAMES, *ALIASES, "delta"]
                raise InvalidInput(f"no format {quoted(args[0])}", nearest(args[0], known))
            return "file", self.commands["file"], args
        return name, self.commands[name], args[1:]


@click.group("import", cls=_Formats)
def import_() -> None:
    """Bring in a benchmark as specs, or a version of another store.

    `editctl import FILE -o specs/NAME.toml` detects the format; `editctl import FORMAT FILE -o …` names it.
    """


def _importing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of all formats."""
    decorate = options(
        click.argument("file", type=click.Path()),
        click.option("-o", "--out", type=click.Path(), help="Spec file to write, or a folder for it."),
        click.option("--dry-run", is_flag=True, help="Tell what would be imported, and write nothing."),
        click.option("--limit", type=click.IntRange(1), help="Read so many records from the first."),
        click.option("--strict", is_flag=True, help="Write nothing if a record cannot be an edit."),
        from_yes,
        as_json,
    )
    return decorate(click.pass_obj(function))


_with_target = click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    help="What zsRE's edits aim at: " + "; ".join(f"{name}: {what}" for name, what in TARGETS.items()) + ".",
)


@import_.command("file")
@_with_target
@_importing
def import_file(space: Workspace, /, **flags: Any) -> None:
    """Turn a benchmark's file into specs; its format is detected. The word `file` may be left away."""
    _import("", **flags)


def _add(name: str, what: str) -> None:
    """A verb that imports one format."""

    def verb(space: Workspace, /, **flags: Any) -> None:
        _import(name, **flags)

    made = _importing(verb)
    made = _with_target(made) if name in WITH_TARGET else made
    import_.command(name, help=f"Turn a file into specs: {what}.")(made)


for _name, _what in NAMES.items():
    _add(_name, _what)


def _import(
    form: str,
    /,
    file: str,
    out: str | None,
    dry_run: bool,
    limit: int | None,
    strict: bool,
    yes: bool,
    as_json: bool,
    target: str = "",
) -> None:
    """Look at the file, tell what it holds, write the specs.

    Raises:
        InvalidInput: it is none of a benchmark, holds no edit, or with `strict` a record that is none; or it is not
            said where the specs go.
    """
    from editctl.importers.work import Importer
    from editctl.plan import count
    from editctl.report import safe

    path = _spec_path(out, Path(file)) if out else None
    if path is None and not dry_run:
        raise InvalidInput("it is not said where the specs go", "name a spec file or a folder with -o")
    importer = Importer(Path(file), form, target=target or "", limit=limit)
    name = importer.format.name
    if as_json:
        said = {"format": name, "detected": importer.detected, "target": importer.target or None}
        talk.lines({"type": "importing", "file": file, **said})
    else:
        _say(f"{file} is {name} ({'detected' if importer.detected else 'as named'}): {NAMES[name]}")
        if importer.target:
            _say(f"its edits aim at {TARGETS[importer.target]}")
    rows = _Rows(as_json)
    survey = importer.look(rows.tell)
    if not survey.records:
        raise InvalidInput(f"{file} holds no record", "name a benchmark's file")
    if not survey.edits or (strict and survey.refused):
        refused = f"{sum(survey.refused.values())} of {count(survey.records, 'record')}"
        advice = "without --strict the others are imported" if survey.edits else importer.advice()
        problems = [row.problem(file) for row in rows.first]
        raise InvalidInput(f"{refused} in {file} cannot be edits", f"nothing was written; {advice}", problems)
    written: list[tuple[Path, int]] = []
    gone: list[Path] = []

    def may(replaced: list[Path], deleted: list[Path]) -> None:
        _may_change(replaced, deleted, yes)
        gone.extend(deleted)

    if path is not None and not dry_run:
        written = importer.write(path, rows.tell, may)
    if as_json:
        for part, edits in written:
            talk.line({"type": "file", "path": str(part), "edits": edits})
        for part in gone:
            talk.line({"type": "deleted", "path": str(part)})
        counts = {"records": survey.records, "edits": survey.edits, "merged": survey.merged}
        talk.line({"type": "summary", **counts, "refused": dict(survey.refused), "asides": dict(survey.asides)})
        return
    rows.say()
    for text in _summary(survey, "can be imported" if dry_run else "imported"):
        _say(text)
    for part in gone:
        _say(f"deleted {part}, a part of an earlier import")
    for part, _ in written:
        click.echo(safe(str(part)))


def _spec_path(out: str, file: Path) -> Path:
    """Where the specs go.

    Raises:
        InvalidInput: the name is none of a spec file.
    """
    path = Path(out)
    if path.is_dir() or out.endswith(("/", os.sep)):
        return path / f"{file.stem}.toml"
    if path.suffix != ".toml":
        raise InvalidInput(f"{out} is no name of a spec file", "name a file that ends in .toml, or a folder")
    return path


def _may_change(replaced: list[Path], deleted: list[Path], yes: bool) -> None:
    """Ask before files are replaced or deleted.

    Raises:
        InvalidInput: there is no terminal to ask on.
    """
    from editctl.report import safe

    doing = [
        (*words, ", ".join(map(str, files))) for words, files in ((_REPLACE, replaced), (_DELETE, deleted)) if files
    ]
    if not doing or yes:
        return
    asked = " and ".join(f"{verb} {names}" for verb, _, names in doing)
    try:
        confirm(safe(f"{asked[0].upper()}{asked[1:]}?"))
    except InvalidInput:
        told = " and ".join(f"{names} would be {done}" for _, done, names in doing)
        hint = f"pass --yes to {' and '.join(verb for verb, _, _ in doing)}, or name another file with -o"
        raise InvalidInput(f"{told}, and there is no terminal to ask on", hint) from None


_REPLACE, _DELETE = ("replace", "replaced"), ("delete", "deleted")


class _Rows:
    """Tells what is not imported: the first of it on a terminal, all of it as JSON."""

    def __init__(self, as_json: bool) -> None:
        self.as_json, self.count = as_json, 0
        self.first: list[Row] = []

    def tell(self, row: Row) -> None:
        """One record, or something of one."""
        from editctl.spec import MAX_PROBLEMS

        if self.as_json:
            kind = "aside" if row.aside else "refused"
            talk.line({"type": kind, **{name: value for name, value in asdict(row).items() if name != "aside"}})
        self.count += 1
        if self.count <= MAX_PROBLEMS:
            self.first.append(row)

    def say(self) -> None:
        """Say the first of them, and how many more there are."""
        for row in self.first[:TOLD]:
            case = f" (case {row.case})" if row.case else ""
            what = f"record {row.record}{case}: {'kept under extra: ' if row.aside else ''}{row.message}"
            _say(f"  line {row.line}, {what}")
        if self.count > TOLD:
            _say(f"  … and {self.count - TOLD} more; --json tells all")


def _say(text: str) -> None:
    """Talk that is not wrapped, whatever is in it."""
    from editctl import report

    report.console(stderr=True).print(report.safe(text), soft_wrap=True)


def _summary(survey: Survey, done: str) -> list[str]:
    """What came of the records, counted."""
    from editctl.plan import count

    good, edits = survey.records - sum(survey.refused.values()), count(survey.edits, "edit")
    said = [f"{good} of {count(survey.records, 'record')} {done} as {edits}"]
    if survey.merged:
        said[0] += f"; {survey.merged} more said what an earlier record says"
    for title, reasons in (("not imported", survey.refused), ("kept under extra", survey.asides)):
        if reasons:
            said.append(f"{title}: {', '.join(f'{number} {reason}' for reason, number in reasons.most_common())}")
    return said


@import_.command()
@click.argument("folder", type=click.Path())
@makes_version
def delta(asked: Asked, /, folder: str) -> None:
    """Take over a version that `export --format delta` wrote in another workspace.

    It must be made for the same model, and for the unedited one or on top of what the head has. Its weights are
    rebuilt and compared, its prompts are asked here, and it is held to the gates like any other. What was trained for
    it comes with it, and later edits here may be made with that too.
    """
    from editctl import export, report
    from editctl import plan as plan_room
    from editctl.delta import load
    from editctl.store import care

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
        if len(plan.of(plan_room.ADD, plan_room.REPLACE)) < len(new):
            raise StoreError(
                "some of the version's edits are live already, in other batches",
                "`editctl restore base` first, or apply its edits from specs",
            )
        if not asked.as_json:
            talk.say(report.plan_view(plan))
        if not asked.yes:
            confirm("Take these edits over?")
        given = tuple(load(name, Path(folder) / export.DELTAS) for name in record.deltas[len(below) :])
        care.take_in(store, [Path(folder) / export.TRAINED / f"{name}.safetensors" for name in record.trained])
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


@click.command("export-specs")
@specs_argument
@click.option("-o", "--out", required=True, type=click.Path(dir_okay=False), help="JSON file to write.")
@from_yes
@as_json
@click.pass_obj
def export_specs(space: Workspace, /, specs: tuple[str, ...], out: str, yes: bool, as_json: bool) -> None:
    """Write specs as CounterFact's original JSON, for other tools.

    What was imported from such a file comes out as it went in, as JSON values.
    """
    from editctl.importers import counterfact
    from editctl.plan import count
    from editctl.report import safe

    edits = space.edits(specs)
    path = Path(out)
    if path.exists() and not yes:
        confirm(safe(f"Replace {path}?"))
    counterfact.write(edits, path)
    left = counterfact.left_behind(edits)
    if as_json:
        talk.lines({"type": "exported", "file": out, "records": len(edits), "left_behind": dict(left)})
        return
    if left:
        told = ", ".join(count(number, what) for what, number in left.items())
        talk.say(f"CounterFact has no place for {told}; they are in the specs alone")
    talk.say(f"Wrote {count(len(edits), 'record')}")
    click.echo(safe(out))
