"""Arguments in, exit code out.

stdout is data, stderr is talk. Knows: verbs, flags, confirmation. Refuses: to compute; torch, transformers, rich,
sqlite-utils and textual are imported inside the verbs that need them, so that `--help` and `validate` stay fast.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click

from editctl import (
    __version__,
    cli_ask,
    cli_care,
    cli_export,
    cli_history,
    cli_measure,
    cli_review,
    cli_trace,
    cli_train,
    cli_tui,
    talk,
)
from editctl.cli_model import model as model_group
from editctl.cli_run import carry_out, confirm
from editctl.cli_study import study as study_group
from editctl.errors import EditctlError, Exit, InvalidInput, StalePlan
from editctl.flags import (
    as_json,
    from_flags,
    from_gates,
    from_method,
    from_model,
    from_note,
    from_writer,
    from_yes,
    specs_argument,
)
from editctl.workspace import Workspace


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="editctl")
@click.option("--store", help="Folder of versions (default: store).")
@click.option("--config", help="Configuration file (default: editctl.toml).")
@click.pass_context
def cli(context: click.Context, store: str | None, config: str | None) -> None:
    """Change what a language model knows: declare facts, plan, apply, measure, undo."""
    context.obj = Workspace(store=store, config=config)
    if context.invoked_subcommand is None and sys.stdin.isatty() and sys.stdout.isatty():
        cli_tui.open_tui(context.obj)
    elif context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@specs_argument
@as_json
@click.pass_obj
def validate(space: Workspace, /, specs: tuple[str, ...], as_json: bool) -> None:
    """Check spec files without loading a model."""
    from editctl import spec
    from editctl.plan import count

    found = spec.check([Path(p) for p in specs or space.config.specs])
    if as_json:
        talk.lines(
            *({"type": "problem", **p.to_json()} for p in found.problems),
            *({"type": "warning", **p.to_json()} for p in found.warnings),
            {"type": "summary", "edits": len(found.edits), "problems": len(found.problems)},
        )
    else:
        for kind, problems in (("", found.problems), ("warning: ", found.warnings)):
            for problem in problems:
                click.echo(kind + spec.visible(str(problem), 10_000))
                if problem.hint:
                    click.echo(f"  hint: {spec.visible(problem.hint, 10_000)}")
        if not found.problems:
            files = len({edit.file for edit in found.edits})
            click.echo(f"ok: {count(len(found.edits), 'edit')} in {count(files, 'file')}")
    if found.problems:
        raise SystemExit(Exit.USAGE)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of spec files, for editors."""
    from editctl import spec

    click.echo(json.dumps(spec.json_schema(), indent=2, ensure_ascii=False))


@cli.command()
@as_json
@click.pass_obj
def methods(space: Workspace, /, as_json: bool) -> None:
    """List the editing methods, the settings of the one in use, and what was trained for the model."""
    from editctl import artifacts, report
    from editctl.engine import source
    from editctl.engine.methods import METHODS, settings

    if as_json:
        talk.lines(*({"type": "method", **method.to_json()} for method in METHODS.values()))
        return
    talk.show(report.methods_view(list(METHODS.values())))
    click.echo("\nSettings of the default method on the model in use; change them with --set or under [settings]:")
    folder, base = space.source()
    made = settings(source.configuration(folder), space.config.method, space.config.settings)
    for name, value in made.named().items():
        click.echo(f"  {name:15s} {json.dumps(value)}")
    space_rule = made.null_space
    click.echo(f"  {'preserve':15s} " + (f"{space_rule.rule} {space_rule.value:g}" if space_rule else "none"))
    if trained := artifacts.found(space.store().artifacts_dir, base=base):
        click.echo("\nTrained files for the model in use, newest first:")
    for one in trained:
        click.echo(f"  {report.trained_line(one)}")


@cli.command()
@specs_argument
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Save the plan as an exact contract.")
@click.option("--prune", is_flag=True, help="Drop applied edits that are not in the specs.")
@click.option("--detailed-exitcode", is_flag=True, help="Exit 0 without changes, 1 on errors, 2 with changes.")
@from_gates
@as_json
@from_model
@from_method
@click.pass_obj
def plan(
    space: Workspace,
    /,
    specs: tuple[str, ...],
    out: str | None,
    prune: bool,
    detailed_exitcode: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Show what apply would do. Loads no model."""
    from editctl import plan as plan_room
    from editctl import report

    try:
        space = space.with_flags(**flags)
        store = space.store()
        made = space.make_plan(space.edits(specs), store.head(), store, prune=prune)
        if out:
            plan_room.save(made, Path(out))
    except (EditctlError, OSError) as error:
        if detailed_exitcode and isinstance(error, EditctlError):
            error.exit_code = Exit.FAILED
        raise
    likely = space.expected(made, store) if made.changes else None
    if as_json:
        talk.lines(made.to_json(), *([{"type": "expected", **asdict(likely)}] if likely else []))
    else:
        talk.show(report.plan_view(made))
        if likely:
            talk.show(report.expected_line(likely))
        if out:
            talk.say(f"Saved the plan to {report.safe(out)}; editctl apply {report.safe(out)} does exactly that.")
    if detailed_exitcode and made.changes:
        raise SystemExit(2)


@cli.command()
@specs_argument
@from_yes
@click.option("--prune", is_flag=True, help="Drop applied edits that are not in the specs.")
@from_note
@from_gates
@from_writer
@as_json
@from_flags
@from_method
@click.pass_obj
def apply(
    space: Workspace,
    /,
    specs: tuple[str, ...],
    yes: bool,
    prune: bool,
    note: str,
    lock_timeout: int,
    as_json: bool,
    **flags: Any,
) -> None:
    """Make the model know what the specs say; the version id is printed last.

    Instead of specs one saved plan (plan -o FILE, or - for standard input) may be given: it is carried out as it
    stands, or refused as stale.
    """
    from editctl import plan as plan_room
    from editctl import report

    space = space.with_flags(**flags)
    store = space.store()
    contract = plan_room.load(Path(specs[0])) if len(specs) == 1 and _is_plan(Path(specs[0])) else None
    if contract is not None:
        decided = ("model", "dtype", "method", "preserve", "batch_size", "layers", "corpus", "set", "gates")
        if prune or any(flags[name] not in (None, ()) for name in decided):
            raise InvalidInput("a saved plan already decides what is done and how", "leave the other flags away")
        space = space.with_flags(model=contract.model)
    wanted = () if contract else space.edits(specs)
    with store.lock("apply", lock_timeout):
        head = store.head()
        made = contract or space.make_plan(wanted, head, store, prune=prune)
        _, base = space.source()
        if contract and contract.base != base and (remedy := space.untrusted(contract.base)):
            raise StalePlan("the plan was made for the same model but for its own code, run or not", remedy)
        plan_room.check_fresh(made, base=base, head=head.id if head else "")
        if not as_json:
            talk.say(report.plan_summary(made) if yes or contract else report.plan_view(made))
            if made.changes:
                talk.say(report.expected_line(space.expected(made, store)))
            if head is not None and made.of(plan_room.KEEP) and head.params != made.params:
                talk.say("Live edits were made with other settings (editctl show) and are kept as they are.")
        if not made.changes:
            if as_json:
                talk.lines({"type": "nothing_to_do", "version": made.head})
            return
        if not (yes or contract):
            confirm("Apply these changes?")
        carry_out(space, store, made, base, as_json=as_json, note=note)


def _is_plan(path: Path) -> bool:
    """Whether a file is JSON, as saved plans are; no TOML begins with a brace. Standard input is always one."""
    from editctl.plan import STDIN

    if path == STDIN:
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"{"


@cli.command()
@as_json
@from_flags
@click.pass_obj
def info(space: Workspace, /, as_json: bool, **flags: Any) -> None:
    """Print versions of what is installed, the paths in use, the model and the head."""
    import platform
    from importlib.metadata import version as installed

    space = space.with_flags(**flags)
    config, store = space.config, space.store()
    folder, base = space.source()
    head = store.head()
    facts = {
        "editctl": __version__,
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "transformers", "safetensors", "textual")},
        "workspace": str(Path.cwd()),
        "store": str(store.root.resolve()),
        "model": config.model,
        "model folder": str(folder),
        "model content": base,
        "method": config.method,
        "head": head.id if head else "base",
    }
    if as_json:
        talk.lines({"type": "info", **facts})
        return
    from editctl.spec import visible

    for name, value in facts.items():
        click.echo(f"{name:14s} {visible(value, 10_000)}")


for _rooms in (cli_ask, cli_measure, cli_trace, cli_train, cli_history, cli_review, cli_care, cli_export, cli_tui):
    for _verb in _rooms.verbs:
        cli.add_command(_verb)
for _group in (model_group, study_group):
    cli.add_command(_group)


def main() -> None:
    """Entry point: the one place where errors become messages and exit codes."""
    try:
        cli(prog_name="editctl", standalone_mode=False)
    except EditctlError as error:
        _fail(error)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        raise SystemExit(Exit.USAGE) from None
    except click.ClickException as error:
        from editctl.spec import visible

        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(f"{error.ctx.get_usage()}\nTry '{error.ctx.command_path} -h' for help.\n", err=True)
        click.echo(f"Error: {visible(error.format_message(), 10_000)}", err=True)
        detailed = "--detailed-exitcode" in sys.argv
        raise SystemExit(Exit.FAILED if detailed else Exit.USAGE) from None
    except (KeyboardInterrupt, click.Abort):
        # It may come after a commit too.
        click.echo("Interrupted; nothing is half recorded, and `editctl log` says where the head is.", err=True)
        raise SystemExit(Exit.INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of a pipe left; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(Exit.FAILED) from None
    except OSError as error:
        if error.errno is None:
            raise
        # A name too long, a folder in a file's place, a full disk: nothing of ours, wherever it is met.
        told = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        _fail(EditctlError(told, "check the path, its permissions and the disk"))


def _fail(error: EditctlError) -> NoReturn:
    """Say what is wrong and what to do, and end with its exit code."""
    from editctl import report

    # Never wrapped: editors and scripts look for file:line.
    report.console(stderr=True).print(report.problem_lines(error), soft_wrap=True)
    raise SystemExit(error.exit_code) from None
