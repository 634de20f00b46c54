"""Arguments in, exit code out.

stdout is data, stderr is talk. Knows: verbs, flags, confirmation. Refuses: to compute; torch, transformers, rich,
sqlite-utils and textual are imported inside the verbs that need them, so that `--help` and `validate` stay fast.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from editctl import __version__
from editctl.cli_model import model as model_group
from editctl.errors import EditctlError, Exit, InvalidInput
from editctl.flags import as_json, from_corpus, from_flags, from_method, from_model, options
from editctl.workspace import Workspace

if TYPE_CHECKING:
    from editctl.events import Event
    from editctl.store import Store


def _say(text: object) -> None:
    """Talk: standard error."""
    from editctl import report

    report.console(stderr=True).print(text)


def _show(renderable: object) -> None:
    """Data: standard output."""
    from editctl import report

    report.console().print(renderable)


def _lines(*values: object) -> None:
    """JSON, one value a line, after the stream's header."""
    from editctl.events import header

    click.echo(header())
    for value in values:
        click.echo(json.dumps(value, ensure_ascii=False))


def _command() -> str:
    """The command line as typed, for the record."""
    return shlex.join(["editctl", *sys.argv[1:]]).encode("utf-8", "replace").decode()


specs_argument = click.argument("specs", nargs=-1, type=click.Path())


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="editctl")
@click.option("--store", help="Folder of versions (default: store).")
@click.option("--config", help="Configuration file (default: editctl.toml).")
@click.pass_context
def cli(context: click.Context, store: str | None, config: str | None) -> None:
    """Change what a language model knows: declare facts, plan, apply, measure, undo."""
    context.obj = Workspace(store=store, config=config)
    if context.invoked_subcommand is None:
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
        _lines(
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
    """List the editing methods, and the settings of the one in use."""
    from editctl import report
    from editctl.engine import source
    from editctl.engine.methods import METHODS, settings

    if as_json:
        _lines(*({"type": "method", **method.to_json()} for method in METHODS.values()))
        return
    _show(report.methods_view(list(METHODS.values())))
    click.echo("\nSettings of the default method on the model in use; change them with --set or under [settings]:")
    folder, _ = space.source()
    made = settings(source.configuration(folder), space.config.method, space.config.settings)
    for name, value in made.named().items():
        click.echo(f"  {name:15s} {json.dumps(value)}")
    space_rule = made.null_space
    click.echo(f"  {'preserve':15s} " + (f"{space_rule.rule} {space_rule.value:g}" if space_rule else "none"))


@cli.command()
@specs_argument
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Save the plan as an exact contract.")
@click.option("--prune", is_flag=True, help="Drop applied edits that are not in the specs.")
@click.option("--detailed-exitcode", is_flag=True, help="Exit 0 without changes, 1 on errors, 2 with changes.")
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
        _lines(made.to_json(), *([{"type": "expected", **asdict(likely)}] if likely else []))
    else:
        _show(report.plan_view(made))
        if likely:
            _show(report.expected_line(likely))
        if out:
            _say(f"Saved the plan to {report.safe(out)}; editctl apply {report.safe(out)} does exactly that.")
    if detailed_exitcode and made.changes:
        raise SystemExit(2)


@cli.command()
@specs_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--prune", is_flag=True, help="Drop applied edits that are not in the specs.")
@click.option("--lock-timeout", type=click.IntRange(0), default=0, help="Seconds to wait for another writer.")
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
    lock_timeout: int,
    as_json: bool,
    **flags: Any,
) -> None:
    """Make the model know what the specs say; the version id is printed last.

    Instead of specs one saved plan (plan -o FILE) may be given: it is carried out as it stands, or refused as stale.
    """
    from editctl import plan as plan_room
    from editctl import report
    from editctl.events import StageStarted, header

    space = space.with_flags(**flags)
    store = space.store()
    contract = plan_room.load(Path(specs[0])) if len(specs) == 1 and _is_plan(Path(specs[0])) else None
    if contract is not None:
        decided = ("model", "dtype", "method", "preserve", "batch_size", "layers", "corpus", "set")
        if prune or any(flags[name] not in (None, ()) for name in decided):
            raise InvalidInput("a saved plan already decides what is done and how", "leave the other flags away")
        space = space.with_flags(model=contract.model)
    wanted = () if contract else space.edits(specs)
    with store.lock("apply", lock_timeout):
        head = store.head()
        made = contract or space.make_plan(wanted, head, store, prune=prune)
        _, base = space.source()
        plan_room.check_fresh(made, base=base, head=head.id if head else "")
        if as_json:
            click.echo(header())
        else:
            _say(report.plan_summary(made) if yes or contract else report.plan_view(made))
            if made.changes:
                _say(report.expected_line(space.expected(made, store)))
            if head is not None and made.of(plan_room.KEEP) and head.params != made.params:
                _say("Live edits were made with other settings (editctl show) and are kept as they are.")
        if not made.changes:
            if as_json:
                click.echo(json.dumps({"type": "nothing_to_do", "version": made.head}))
            return
        if not (yes or contract):
            _confirm()
        from editctl.engine import run

        with nullcontext(_echo) if as_json else report.showing_run(report.console(stderr=True)) as emit:
            emit(StageStarted("load", 0))
            model = space.with_flags(dtype=made.params["dtype"]).load()
            version = run.run(made, model, base, store, emit, command=_command())
    if as_json:
        for metric in store.metrics(version):
            click.echo(json.dumps({"type": "metric", **asdict(metric)}))
        return
    edits = [live.edit for live in store.edits(version)]
    _say(
        report.version_view(
            version, edits, store.answers(version), store.metrics(version), store.footprint(version), everything=False
        )
    )
    _say(f"Made version {version.id}. Back again: editctl undo")
    click.echo(version.id)


def _echo(event: Event) -> None:
    """An event as a line of data."""
    from editctl.events import to_line

    click.echo(to_line(event))


def _is_plan(path: Path) -> bool:
    """Whether a file is JSON, as saved plans are; no TOML begins with a brace."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1) == b"{"


def _confirm() -> None:
    """Ask on a terminal; the answer that goes on is a word, not the key that asked.

    Raises:
        InvalidInput: there is no terminal to ask on.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InvalidInput("apply needs confirmation and there is no terminal to ask on", "pass --yes")
    if click.prompt("Apply these changes? Only yes goes on", default="no", err=True).strip().lower() != "yes":
        raise click.Abort


@cli.command()
@click.option("-n", "count", type=click.IntRange(1), help="Only the newest N.")
@as_json
@click.pass_obj
def log(space: Workspace, /, count: int | None, as_json: bool) -> None:
    """List operations, newest first: who, when, what, and where the head went."""
    from editctl import report

    store = space.store()
    operations = store.operations(count)
    if as_json:
        _lines(*({"type": "operation", **asdict(op)} for op in operations))
    else:
        head = store.head()
        _show(report.log_view(operations, head.id if head else ""))


@cli.command()
@click.argument("ref", default="@")
@as_json
@click.pass_obj
def show(space: Workspace, /, ref: str, as_json: bool) -> None:
    """Show a version: its edits, what the model said before and after, its metrics.

    REF is a version id or a unique prefix, @ (the head), @-, @-2 or base.
    """
    from editctl import report

    store = space.store()
    version = store.resolve(ref)
    edits = [live.edit for live in store.edits(version)]
    answers, metrics = store.answers(version), store.metrics(version)
    if as_json:
        _lines(
            {"type": "record", **(asdict(version) if version else {"id": ""})},
            *({"type": "edit", **edit.to_json()} for edit in edits),
            *({"type": "answer", **asdict(answer)} for answer in answers),
            *({"type": "metric", **asdict(metric)} for metric in metrics),
        )
    elif version is None:
        click.echo("base: the unedited model, no edits")
    else:
        _show(report.version_view(version, edits, answers, metrics, store.footprint(version), everything=True))


@cli.command()
@click.argument("old", default="@-")
@click.argument("new", default="@")
@as_json
@click.pass_obj
def diff(space: Workspace, /, old: str, new: str, as_json: bool) -> None:
    """Compare two versions: facts, answers to the same prompts, metrics."""
    from editctl import report

    store = space.store()
    versions = (store.resolve(old), store.resolve(new))
    before, after = ({live.edit.id: live.edit for live in store.edits(v)} for v in versions)
    answers = (store.answers(versions[0]), store.answers(versions[1]))
    metrics = (store.metrics(versions[0]), store.metrics(versions[1]))
    if as_json:
        changed = [n for n in after if n in before and before[n].to_json() != after[n].to_json()]
        _lines(
            {
                "type": "diff",
                "old": versions[0].id if versions[0] else "",
                "new": versions[1].id if versions[1] else "",
                "added": [n for n in after if n not in before],
                "removed": [n for n in before if n not in after],
                "changed": changed,
                "metrics": [[asdict(m) for m in side] for side in metrics],
            }
        )
        return
    names = tuple(report.short(v.id) if v else "base" for v in versions)
    _show(report.diff_view((names[0], names[1]), (before, after), answers, metrics))


def _moved(space: Workspace, as_json: bool, move: Callable[[Store], Any]) -> None:
    """Move the head and say where it is now."""
    from editctl import report

    operation = move(space.store())
    if as_json:
        _lines({"type": "operation", **asdict(operation)})
    else:
        click.echo(f"{report.safe(operation.description)}")
        click.echo(f"Now at: {report.short(operation.head)}")


@cli.command()
@as_json
@click.pass_obj
def undo(space: Workspace, /, as_json: bool) -> None:
    """Take back the last operation; again to go further back."""
    _moved(space, as_json, lambda store: store.undo(_command()))


@cli.command()
@as_json
@click.pass_obj
def redo(space: Workspace, /, as_json: bool) -> None:
    """Take back the last undo."""
    _moved(space, as_json, lambda store: store.redo(_command()))


@cli.command()
@click.argument("ref")
@as_json
@click.pass_obj
def restore(space: Workspace, /, ref: str, as_json: bool) -> None:
    """Move the head to any version, or to where it was after an operation (op:N)."""
    _moved(space, as_json, lambda store: store.restore(ref, _command()))


@cli.command()
@click.argument("prompt")
@click.argument("refs", nargs=-1)
@click.option("--top", type=click.IntRange(1, 50), default=3, help="How many next tokens to show.")
@as_json
@from_flags
@click.pass_obj
def ask(space: Workspace, /, prompt: str, refs: tuple[str, ...], top: int, as_json: bool, **flags: Any) -> None:
    """Ask the model, base and head side by side or at the versions named."""
    from editctl import report, spec

    prompt = prompt.encode("utf-8", "replace").decode()
    if not prompt.strip():
        raise InvalidInput("the prompt is empty", 'for example: editctl ask "The Eiffel Tower stands in"')
    space = space.with_flags(**flags)
    store = space.store()
    asked = refs or (("base", "@") if store.head() else ("base",))
    versions = [(ref, store.resolve(ref)) for ref in asked]
    model = space.load_for([version for _, version in versions])
    from editctl.engine import run, speak

    found = []
    for ref, version in versions:
        with run.wearing(model, store, version):
            words = speak.answers(model, [prompt])[0]
            found.append((ref, version.id if version else "", words, speak.next_tokens(model, prompt, top)))
    if as_json:
        rows = [{"type": "answer", "ref": r, "version": v, "text": w, "next": n} for r, v, w, n in found]
        _lines(*({**row, "prompt": prompt} for row in rows))
        return
    for ref, name, words, following in found:
        likely = "  ".join(f"{spec.visible(token, 30)} {100 * p:.1f} %" for token, p in following)
        click.echo(f"{ref} ({report.short(name)}): {report.safe(words)}")
        click.echo(f"    next: {likely}")


@cli.command()
@click.argument("ref", default="@")
@click.option("--against", default="base", help="Version the answers are compared with.")
@as_json
@from_flags
@click.pass_obj
def measure(space: Workspace, /, ref: str, against: str, as_json: bool, **flags: Any) -> None:
    """Rebuild a version, check its weights hash, and ask all its prompts again."""
    from editctl import report

    space = space.with_flags(**flags)
    store = space.store()
    version, other = store.resolve(ref), store.resolve(against)
    if version is None:
        raise InvalidInput("base has no edits to measure", "name a version that has some")
    model = space.load_for([version, other])
    from editctl.engine import run

    with report.showing_run(report.console(stderr=True)) as emit:
        answers = run.measure(model, store, version, other, emit)
    from editctl.metrics import edits as edit_metrics

    metrics = edit_metrics.summary(answers)
    if as_json:
        _lines(
            *({"type": "answer", **asdict(answer)} for answer in answers),
            *({"type": "metric", **asdict(metric)} for metric in metrics),
        )
        return
    _show(report.answers_view(answers))
    _show(report.metrics_view(metrics))


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
        _lines({"type": "info", **facts})
        return
    from editctl.spec import visible

    for name, value in facts.items():
        click.echo(f"{name:14s} {visible(value, 10_000)}")


cli.add_command(model_group)


@cli.group()
def study() -> None:
    """Run a controlled experiment and print its table. Nothing is recorded in the store but second moments."""


def _from_study(function: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of all studies."""
    for option in reversed(
        (
            click.option("--method", "names", multiple=True, help="Methods to compare; again for more."),
            click.option("--set", "set", multiple=True, metavar="NAME=VALUE", help="Override a setting."),
        )
    ):
        function = option(function)
    return as_json(from_flags(from_corpus(function)))


_drawn = options(
    click.option("--batch", type=click.IntRange(1), default=20, help="Edits solved together."),
    click.option("--unrelated", type=click.IntRange(0), default=400, help="Unrelated facts asked before and after."),
    click.option("--seed", type=int, default=0, help="Which edits."),
)
"""The flags of studies on made-up edits."""


def _run_study(space: Workspace, as_json: bool, trials: Callable[[Any, Callable[..., Any]], Any]) -> None:
    """Run `trials(bench, settings)` and print one table; a row a trial, each a mapping from column to value.

    `settings` makes settings of a method's name and overrides that the command line's own beat.
    """
    from editctl import report
    from editctl.engine import methods, source
    from editctl.studies.bench import Bench

    config = space.config
    folder, base = space.source()
    shape = source.configuration(folder)
    model, rows = space.load(), []

    def settings(name: str, **overrides: Any) -> Any:
        return methods.settings(shape, name, {**overrides, **config.settings})

    if as_json:
        _lines()
    with report.showing_run(report.console(stderr=True)) as emit:
        for row in trials(Bench(model, base, space.store(), emit), settings):
            rows.append(row)
            if as_json:
                click.echo(json.dumps({"type": "row", **row}, ensure_ascii=False))
    if not as_json:
        for line in report.markdown_table(rows):
            click.echo(line)


@study.command()
@_drawn
@click.option("--edits", type=click.IntRange(1), default=200, help="How many.")
@_from_study
@click.pass_obj
def sequential(
    space: Workspace,
    /,
    edits: int,
    batch: int,
    unrelated: int,
    seed: int,
    names: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Many made-up edits of the built-in model, batch after batch, all measured at the end."""
    from editctl.studies import sequential as room

    space = space.with_flags(**flags)
    made = room.make(edits, unrelated, seed)
    chosen = names or ("alphaedit", "memit", "memit-history")
    _run_study(
        space, as_json, lambda bench, settings: (bench.trial(settings(name), *made, batch=batch) for name in chosen)
    )


@study.command("methods")
@_drawn
@click.option("--edits", type=click.IntRange(1), default=300, help="How many.")
@_from_study
@click.pass_obj
def study_methods(
    space: Workspace,
    /,
    edits: int,
    batch: int,
    unrelated: int,
    seed: int,
    names: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Every method with and without null-space preservation, in sequential batches on the built-in model."""
    from editctl.engine.methods import METHODS, PRESERVE
    from editctl.studies import sequential as room

    space = space.with_flags(**flags)
    made, kept = room.make(edits, unrelated, seed)
    _run_study(
        space,
        as_json,
        lambda bench, settings: (
            bench.trial(chosen, made, kept, batch=batch, text=room.ordinary())
            for chosen in [settings(name, preserve=switch) for name in names or METHODS for switch in PRESERVE]
        ),
    )


@study.command("subjects")
@click.option("--subjects", type=click.IntRange(1), default=150, help="Subjects with two edits each.")
@click.option("--batch", type=click.IntRange(1), default=50, help="Edits solved together.")
@click.option("--seed", type=int, default=0, help="Which edits.")
@_from_study
@click.pass_obj
def study_subjects(
    space: Workspace, /, subjects: int, batch: int, seed: int, names: tuple[str, ...], as_json: bool, **flags: Any
) -> None:
    """Two edits a subject with one target vector or one each, in one batch or one after the other."""
    from editctl.studies import subjects as room

    space = space.with_flags(**flags)
    first, second, kept = room.make(subjects, seed)
    # Sizes that part no pair, and every pair.
    orders = {
        "same batch": ([edit for pair in zip(first, second, strict=True) for edit in pair], batch + batch % 2),
        "later batch": ([*first, *second], min(batch, subjects)),
    }
    _run_study(
        space,
        as_json,
        lambda bench, settings: (
            {"target": "shared" if joint else "one each", "second edit": order}
            | bench.trial(settings(name, joint=joint), edits, kept, batch=size)
            for name in names or ("alphaedit",)
            for order, (edits, size) in orders.items()
            for joint in (True, False)
        ),
    )


@study.command("specs")
@specs_argument
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Batch sizes; default all at once, 5.")
@_from_study
@click.pass_obj
def study_specs(
    space: Workspace,
    /,
    specs: tuple[str, ...],
    batches: tuple[int, ...],
    names: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Specs in one batch and in small ones, every method on the unedited model."""
    space = space.with_flags(**flags)
    edits = space.edits(specs)
    chosen = names or ("alphaedit", "memit", "memit-history")
    sizes = batches or (len(edits), 5)
    _run_study(
        space,
        as_json,
        lambda bench, settings: (
            bench.trial(settings(name), edits, {}, batch=size) for name in chosen for size in sizes
        ),
    )


@study.command("runtime")
@click.option("--edits", type=click.IntRange(1), default=100, help="Requests in the batch.")
@click.option(
    "--plain", "plain_edits", type=click.IntRange(1), default=6, help="Of these, timed on the plain path too."
)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Batch sizes of the engine alone.")
@click.option("--shape", default="gpt2-124m", help="Random weights of this shape: gpt2-124m or llama-8b.")
@click.option("--counterfact", default="", help="Requests from a file in CounterFact's format.")
@from_flags
@from_corpus
@as_json
@click.pass_obj
def study_runtime(
    space: Workspace,
    /,
    edits: int,
    plain_edits: int,
    batches: tuple[int, ...],
    shape: str,
    counterfact: str,
    as_json: bool,
    **flags: Any,
) -> None:
    """Seconds and FLOPs an edit by phase: the engine against full passes, one request at a time."""
    from editctl import report
    from editctl.studies import runtime

    space = space.with_flags(**flags)
    with report.showing_run(report.console(stderr=True)) as emit:
        rows, sizes = runtime.measured(
            space, shape, counterfact, edits=edits, plain_edits=plain_edits, batches=batches, emit=emit
        )
    if as_json:
        _lines(*({"type": "row", **row} for row in (*rows, *sizes)))
        return
    for table in (rows, sizes):
        for line in report.markdown_table(table) if table else ():
            click.echo(line)
        click.echo()


def main() -> None:
    """Entry point: the one place where errors become messages and exit codes."""
    try:
        cli(standalone_mode=False)
    except EditctlError as error:
        from editctl import report

        # Never wrapped: editors and scripts look for file:line.
        report.console(stderr=True).print(report.problem_lines(error), soft_wrap=True)
        raise SystemExit(error.exit_code) from None
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        raise SystemExit(Exit.USAGE) from None
    except click.ClickException as error:
        error.show()
        detailed = "--detailed-exitcode" in sys.argv
        raise SystemExit(Exit.FAILED if detailed else Exit.USAGE) from None
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted; the head is where it was.", err=True)
        raise SystemExit(Exit.INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of a pipe left; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(Exit.FAILED) from None
