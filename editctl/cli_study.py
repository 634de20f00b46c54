"""`editctl study …`: controlled experiments, their tables printed.

Knows: the verbs of the group, what each compares. Refuses: to compute; torch, transformers, rich and sqlite-utils are
imported inside the verbs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from editctl import talk
from editctl.flags import as_json, from_corpus, from_flags, options, specs_argument
from editctl.workspace import Workspace


@click.group()
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
        talk.lines()
    with report.showing_run(report.console(stderr=True)) as emit:
        for row in trials(Bench(model, base, space.store(), emit), settings):
            rows.append(row)
            if as_json:
                talk.line({"type": "row", **row})
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
        talk.lines(*({"type": "row", **row} for row in (*rows, *sizes)))
        return
    for table in (rows, sizes):
        for line in report.markdown_table(table) if table else ():
            click.echo(line)
        click.echo()
