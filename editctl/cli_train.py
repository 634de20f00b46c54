"""The verb that trains what a method reads.

Knows: which edits are taught and which are held out, and how training is told. Refuses: to compute; torch and
transformers are imported inside.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import click

from editctl import talk
from editctl.errors import InvalidInput
from editctl.flags import as_json, from_flags, specs_argument
from editctl.workspace import Workspace


@click.command()
@click.argument("method")
@specs_argument
@click.option("--name", default="", help="What it is called (default: the method); the newest of a name is meant.")
@click.option("--steps", type=click.IntRange(1), help="Steps of training (default: the method's own).")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Size of a step (default: the method's own).")
@click.option("--held-out", type=click.FloatRange(0, 0.9), default=0.1, show_default=True, help="Share of subjects.")
@click.option("--seed", type=int, default=0, help="Of the split, of what is drawn and of the first weights.")
@as_json
@from_flags
@click.pass_obj
def train(
    space: Workspace,
    /,
    method: str,
    specs: tuple[str, ...],
    name: str,
    steps: int | None,
    rate: float | None,
    held_out: float,
    seed: int,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train what METHOD reads, on edits of SPECS with their paraphrases and locality probes.

    Some subjects are held out, and the result says how edits of those fare. Without SPECS made-up edits of the built-in
    model are taught. A training that was interrupted goes on where it was.
    """
    from editctl import report
    from editctl.engine.methods import METHODS, find
    from editctl.events import StageStarted

    if not find(method).trained:
        trained = ", ".join(name for name, row in METHODS.items() if row.trained)
        raise InvalidInput(f"{method} reads nothing that is trained", f"one of: {trained}")
    from editctl.engine import families, lessons, training
    from editctl.studies import session

    space = space.with_flags(**flags)
    settings = session.settings_maker(space, trained=False)(method)
    taught, kept = lessons.split(session.taught(space, specs, seed), held_out, seed)
    if as_json:
        talk.lines()
    with nullcontext(talk.echo) if as_json else report.showing_run(report.console(stderr=True)) as emit:
        emit(StageStarted("load", 0))
        model = space.load()
        model.check_editable(settings.layers)
        make, defaults = families.TASKS[method], families.DEFAULTS[method]
        known = lessons.lessons(model, taught, emit)
        course = training.Course(
            settings=settings,
            base=space.source()[1],
            model=space.config.model,
            name=name or method,
            schedule=training.Schedule(steps or int(defaults["steps"]), rate or defaults["rate"]),
            seed=seed,
            share=held_out,
            taught=known,
            held_out=session.one_each(kept, training.MEASURED),
        )
        task = make(model, settings.layers, known, seed) if make else None
        made = training.train(model, course, task, space.store().root, emit)
    if as_json:
        told = {key: value for key, value in made.about.items() if key != "lessons"}
        talk.line({"type": "trained", "artifact": made.content, **told})
        return
    for row in report.markdown_table(training.table(made)):
        talk.say(row)
    measured = f"measured on {len(course.held_out)} of subjects it never saw"
    talk.say(f"Trained {report.safe(made.name)} ({method}) on {len(known)} edits, {measured}.")
    talk.say(f"Use it: editctl apply SPECS --method {method} --set artifact={report.safe(made.name)}")
    click.echo(made.content)


verbs = (train,)
"""What the command line adds."""
