"""The verb that measures a version again.

Knows: what can be asked for. Refuses: to compute; the engine is imported inside.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from editctl import talk
from editctl.errors import InvalidInput
from editctl.flags import as_json, from_flags
from editctl.metrics.values import CHECKS
from editctl.workspace import Workspace

NONE = "none"


@click.command()
@click.argument("ref", default="@")
@click.option("--against", default="base", help="Version the answers are compared with.")
@click.option(
    "--check",
    "checks",
    multiple=True,
    type=click.Choice([*CHECKS, NONE]),
    help="What is measured beside answers; again for more. Default: `checks` in editctl.toml, or all.",
)
@click.option("--text", default="", help="Text to measure perplexity on, named as a corpus is.")
@click.option("--ability", "tasks", multiple=True, help="A task of lm-evaluation-harness, or a task file.")
@as_json
@from_flags
@click.pass_obj
def measure(
    space: Workspace,
    /,
    ref: str,
    against: str,
    checks: tuple[str, ...],
    text: str,
    tasks: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Rebuild a version, check its weights hash, ask all its prompts again, and measure what is beside them."""
    from editctl import figures, report

    space = space.with_flags(**flags)
    store = space.store()
    version, other = store.resolve(ref), store.resolve(against)
    if version is None:
        raise InvalidInput("base has no edits to measure", "name a version that has some")
    space = space.made_for([version, other])
    from editctl.engine import corpus, measuring
    from editctl.engine.checks import PERPLEXITY, Wanted
    from editctl.metrics import edits as edit_metrics

    named = checks or tuple(space.config.checks)
    name = space.config.model
    texts = tuple(corpus.lines(name, text, content := corpus.content(name, text))) if text else ()
    if text and not texts:
        raise InvalidInput(f"{text} holds no text to measure perplexity on", "name another with --text")
    told = f"{text} {content}" if text else ""
    named = (*(check for check in named if check != NONE), *([PERPLEXITY] if text else []))
    wanted = Wanted(named, texts, told, tasks, space.trusting)
    model = space.load()
    with report.showing_run(report.console(stderr=True)) as emit:
        answers, metrics = measuring.measure(model, store, version, other, emit, wanted)
    if as_json:
        talk.lines(
            {"type": "measured", "version": version.id, "against": other.id if other else "", "checks": list(named)},
            *({"type": "answer", **asdict(answer)} for answer in answers),
            *({"type": "metric", **asdict(metric)} for metric in metrics),
            {"type": "forgotten", "edits": list(edit_metrics.forgotten(answers))},
        )
        return
    talk.show(report.answers_view(answers))
    talk.show(figures.MetricsView(metrics, parts=True))
    talk.show(figures.retention_view(answers))
    talk.show(figures.unmeasured_line(metrics, named))


verbs = (measure,)
"""What the command line adds."""
