"""`editctl study …`: controlled experiments, their tables printed, their results kept.

Knows: the verbs of the group, what each compares. Refuses: to compute; torch, transformers, rich and sqlite-utils are
imported inside the verbs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from editctl import talk
from editctl.errors import InvalidInput
from editctl.flags import as_json, from_corpus, from_flags, options, specs_argument
from editctl.metrics.values import CHECKS
from editctl.workspace import Workspace

if TYPE_CHECKING:
    from editctl.engine.methods import Settings
    from editctl.studies.bench import Mark, Trial
    from editctl.studies.session import Matter
    from editctl.studies.tables import Pictures, Result


@click.group()
def study() -> None:
    """Run a controlled experiment and print its tables. Nothing is recorded in the store but second moments and what
    the unedited model says."""


_compared = options(
    click.option("--method", "names", multiple=True, help="Methods to compare; again for more."),
    click.option("--set", "set", multiple=True, metavar="NAME=VALUE", help="Override a setting."),
    from_corpus,
    from_flags,
    as_json,
)
"""The flags of all studies of methods."""
_kept = options(
    click.option(
        "-o",
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for results, tables and plots; a study that was interrupted goes on there.",
    ),
    click.option(
        "--check",
        "checks",
        type=click.Choice(CHECKS),
        multiple=True,
        default=CHECKS[:3],
        show_default=True,
        help="What is measured beside answers; again for more.",
    ),
    click.option("--text", "texts", multiple=True, help="Text file or JSON lines for perplexity; again for more."),
)
"""The flags of studies that can go on."""
_drawn = options(
    click.option("--edits", type=click.IntRange(1), help="How many: the first of the specs, or made-up ones."),
    click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Edits solved together."),
    click.option("--unrelated", type=click.IntRange(0), default=400, help="Unrelated facts beside made-up edits."),
    click.option("--seed", type=int, default=0, help="Which made-up edits."),
    click.option("--probes", type=click.IntRange(0), default=0, help="Locality probes an edit, at most; 0 for all."),
)
"""The flags that say which edits."""


_OF_MATTER = ("specs", "edits", "unrelated", "seed", "probes", "checks", "texts")
"""Flags that say what a study is about."""


class _Study:
    """One study: its matter, its settings and how it is told."""

    def __init__(self, space: Workspace, name: str, made: int, given: dict[str, Any]) -> None:
        """
        Args:
            made: made-up edits where no specs are named.
            given: the verb's flags; what `Workspace.with_flags` does not know is taken out.
        """
        from editctl.studies import session

        self._as_json: bool = given.pop("as_json")
        self._out: Path | None = given.pop("out", None)
        drawn = {key: given.pop(key) for key in _OF_MATTER if key in given}
        self.space, self._name = space.with_flags(**given), name
        self.matter: Matter = session.matter(self.space, made=made, **drawn)
        self.settings: Callable[..., Settings] = session.settings_maker(self.space)

    def trial(
        self, settings: Settings, batch: int, *, every: int = 0, labels: Mapping[str, object] | None = None
    ) -> Trial:
        """A trial on all edits of the study."""
        from editctl.studies.bench import Trial

        of = self.matter
        return Trial(settings=settings, edits=of.edits, batch=batch, kept=of.kept, every=every, labels=labels or {})

    def run(
        self,
        trials: Sequence[Trial],
        *,
        rest: Callable[[Result], Iterable[Trial]] | None = None,
        total: int = 0,
        lenient: bool = False,
        x: Callable[[Result, Mark], float] | None = None,
        xlabel: str = "edits",
        name: Callable[[Result], str] | None = None,
        concluded: Callable[[Sequence[Result]], Mapping[str, Any]] = lambda results: {},
        told: Callable[[Mapping[str, Any]], Sequence[str]] = lambda found: (),
        **more: object,
    ) -> None:
        """Run the trials, print their rows or tables, and keep them.

        Args:
            rest: further trials that depend on the result of each.
            total: edits of all of them, where `rest` adds some.
            x: the place of a mark in the plots; by default the edits written.
            name: of a curve; by default what tells the trials apart.
            concluded: what the study finds beside the rows, as JSON values; `told` puts it in lines.
            more: what else decides the numbers.
        """
        from editctl import report
        from editctl.studies import session, tables

        config = session.about(self.space, self._name, self.matter, trials, **more)
        results: list[Result] = []

        def asked_for() -> Iterable[Trial]:
            for trial in trials:
                yield trial
                if rest is not None:
                    yield from rest(results[-1])

        total = total or sum(len(trial.edits) for trial in trials)
        if self._as_json:
            talk.lines()
        with report.showing_run(report.console(stderr=True)) as emit:
            for result in session.results(
                self.space, config, self.matter, asked_for(), self._out, emit, total=total, lenient=lenient
            ):
                results.append(result)
                for row in result.rows() if self._as_json else ():
                    talk.line({"type": "row", **row})
        found = concluded(results)
        lines = told(found)
        if self._as_json:
            for key, value in found.items():
                talk.line({"type": key, "value": value})
        else:
            for line in tables.markdown(results, lines):
                click.echo(line)
        if self._out is not None:
            self._write(results, config, found, lines, x, xlabel, name)

    def _write(
        self,
        results: Sequence[Result],
        config: Mapping[str, Any],
        found: Mapping[str, Any],
        lines: Sequence[str],
        x: Callable[[Result, Mark], float] | None,
        xlabel: str,
        name: Callable[[Result], str] | None,
    ) -> None:
        from editctl.studies import tables

        assert self._out is not None
        pictures = tables.curves(results, x or (lambda _, mark: mark.edits), name or tables.short_names(results))
        values = {**config, **found, "rows": [row for result in results for row in result.rows()]}
        self._keep(values, tables.markdown(results, lines), pictures, xlabel)

    def _keep(self, values: Mapping[str, Any], lines: Sequence[str], pictures: Pictures, xlabel: str) -> None:
        from editctl.studies import tables

        assert self._out is not None
        wrong = tables.write(self._out, values, lines, pictures, xlabel)
        if wrong:
            talk.say(wrong)
        talk.say(f"wrote {self._out}: {tables.RESULTS}, {tables.TABLE}" + ("" if wrong else f", {tables.PLOTS}"))

    def time(self, settings: Sequence[Settings], batches: Sequence[int], repeat: int) -> None:
        """Time batches of the study's edits under every one of the settings, and print and keep the rows."""
        from editctl import report
        from editctl.studies import session, timing

        config = session.about(self.space, self._name, self.matter, [], repeat=repeat, batches=list(batches))
        config["trials"] = [one.to_params() for one in settings]
        with report.showing_run(report.console(stderr=True)) as emit:
            spent = timing.measure(self.space, self.matter.edits, settings, batches, repeat, self._out, config, emit)
        rows = timing.rows(spent)
        if self._as_json:
            talk.lines(*({"type": "row", **row} for row in rows))
        else:
            for line in report.markdown_table(timing.table(rows)):
                click.echo(line)
        if self._out is not None:
            lines = report.markdown_table(timing.table(rows))
            self._keep({**config, "rows": rows}, lines, timing.curves(rows), "edits solved together")


@study.command()
@specs_argument
@_drawn
@click.option("--every", type=click.IntRange(1), help="Edits from one point of the curves to the next.")
@_kept
@_compared
@click.pass_obj
def sequential(
    space: Workspace, /, batches: tuple[int, ...], every: int | None, names: tuple[str, ...], **given: Any
) -> None:
    """Many edits, batch after batch, measured as they add up: curves of every metric. Without SPECS made-up edits of
    the built-in model."""
    one = _Study(space, "sequential", 200, given)
    one.run(
        [
            one.trial(one.settings(name), batch, every=every or 0)
            for batch in batches or (20,)
            for name in names or ("alphaedit", "memit", "memit-history")
        ],
        every=every,
    )


@study.command("methods")
@specs_argument
@_drawn
@_kept
@_compared
@click.pass_obj
def study_methods(space: Workspace, /, batches: tuple[int, ...], names: tuple[str, ...], **given: Any) -> None:
    """One set of specs under every method as it is shipped, in sequential batches; those that read a trained file
    where they are named."""
    from editctl.engine.methods import METHODS

    one = _Study(space, "methods", 300, given)
    chosen = names or [name for name, method in METHODS.items() if not method.trained]
    one.run([one.trial(one.settings(name), batch) for batch in batches or (20,) for name in chosen])


@study.command("families")
@click.option("--edits", type=click.IntRange(1), default=100, show_default=True, help="Held-out edits, one a subject.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Edits written together (default 20).")
@click.option("--every", type=click.IntRange(1), help="Edits from one point of the curves to the next.")
@click.option("--unrelated", type=click.IntRange(0), default=200, help="Facts of other subjects that should stay.")
@click.option(
    "--alone", is_flag=True, help="Each batch (default 1) on the unedited model, instead of one after another."
)
@click.option("--seed", type=int, default=0, help="Which made-up edits; that of the trainings.")
@_kept
@_compared
@click.pass_obj
def study_families(
    space: Workspace, /, batches: tuple[int, ...], every: int | None, alone: bool, names: tuple[str, ...], **given: Any
) -> None:
    """Every method of every family on the same edits, of subjects that no training has seen: the methods that read a
    trained file with the newest of the store (`editctl train`), and how long that took."""
    from dataclasses import replace

    from editctl import artifacts
    from editctl.engine.methods import METHODS, find
    from editctl.studies import session

    chosen = names or tuple(METHODS)
    drawn = {key: given.pop(key) for key in ("edits", "unrelated", "seed")}
    one = _Study(space, "families", 1, {**given, "edits": 1})
    about = {key: given[key] for key in ("checks", "texts")}
    one.matter = session.unseen(one.space, **drawn, **about)
    trained = {found.content: found.about for found in artifacts.found(one.space.store().artifacts_dir)}

    def labels(settings: Settings) -> dict[str, object]:
        method = find(settings.method)
        seconds = trained[settings.artifact]["seconds"] if method.trained else 0
        return {"family": method.family, "changes": method.changes, "drop": method.drop, "trained, s": f"{seconds:.0f}"}

    one.run(
        [
            replace(one.trial(made, batch, every=every or 0, labels=labels(made)), alone=alone)
            for batch in batches or (1 if alone else 20,)
            for made in map(one.settings, chosen)
        ],
        every=every,
        alone=alone,
    )


@study.command("projection")
@specs_argument
@_drawn
@_kept
@_compared
@click.pass_obj
def study_projection(space: Workspace, /, batches: tuple[int, ...], names: tuple[str, ...], **given: Any) -> None:
    """Every method with and without null-space preservation, in sequential batches; those that read a trained file
    where they are named."""
    from editctl.engine.methods import METHODS, PRESERVE

    one = _Study(space, "projection", 300, given)
    one.run(
        [
            one.trial(one.settings(name, preserve=switch), batch)
            for batch in batches or (20,)
            for name in names
            or [name for name, method in METHODS.items() if method.preservation and not method.trained]
            for switch in PRESERVE
        ]
    )


@study.command("ratio")
@specs_argument
@_drawn
@click.option(
    "--share",
    "shares",
    type=click.IntRange(1, 100),
    multiple=True,
    help="Percent of the corpus; again for more (default 1, 2, 5, 10, 25, 50, 100).",
)
@_kept
@_compared
@click.pass_obj
def study_ratio(
    space: Workspace,
    /,
    batches: tuple[int, ...],
    shares: tuple[int, ...],
    names: tuple[str, ...],
    **given: Any,
) -> None:
    """The share of preserved-knowledge data against the rank of the null space and the scores: how small a corpus is
    safe."""
    from editctl.studies import ratio

    one = _Study(space, "ratio", 200, given)
    chosen = sorted({*(shares or ratio.SHARES), 100})
    for name in names:
        if not one.settings(name).needs_moments:
            raise InvalidInput(f"{name} uses no preserved-knowledge data", "name a method that does: editctl methods")
    wholes = [
        ratio.whole(one.trial(one.settings(name), batch))
        for batch in batches or (20,)
        for name in names or ("alphaedit",)
    ]

    def rest(result: Result) -> Iterable[Trial]:
        if result.trial.heads[ratio.SHARE] != 100 or not result.marks:
            return ()
        return ratio.parts(result.trial, chosen, ratio.seen(result))

    def concluded(results: Sequence[Result]) -> dict[str, Any]:
        groups: dict[str, list[Result]] = {}
        for result in results:
            groups.setdefault(f"{result.trial.settings.method}, batch {result.trial.batch}", []).append(result)
        return {"smallest safe corpus, percent": {key: ratio.smallest_safe(some) for key, some in groups.items()}}

    def told(found: Mapping[str, Any]) -> list[str]:
        values = next(iter(found.values()))
        return [ratio.RULE, "", *(f"{key}: {ratio.spelled(share)}" for key, share in values.items())]

    one.run(
        wholes,
        rest=rest,
        total=len(one.matter.edits) * len(wholes) * len(chosen),
        lenient=True,
        x=lambda result, _: float(str(result.trial.heads[ratio.SHARE])),
        xlabel="share of the corpus, percent",
        name=lambda result: f"{result.trial.settings.method}, batch {result.trial.batch}",
        concluded=concluded,
        told=told,
        shares=chosen,
    )


@study.command("subjects")
@click.option("--subjects", type=click.IntRange(1), default=150, help="Subjects with two edits each.")
@click.option("--batch", type=click.IntRange(1), default=50, help="Edits solved together.")
@click.option("--seed", type=int, default=0, help="Which edits.")
@_compared
@click.pass_obj
def study_subjects(
    space: Workspace, /, subjects: int, batch: int, seed: int, names: tuple[str, ...], **given: Any
) -> None:
    """Two edits a subject with one target vector or one each, in one batch or one after the other."""
    from dataclasses import replace

    from editctl.studies import subjects as room

    one = _Study(space, "subjects", 1, given)
    first, second, kept = room.make(subjects, seed)
    # Sizes that part no pair, and every pair.
    orders = {
        "same batch": ([edit for pair in zip(first, second, strict=True) for edit in pair], batch + batch % 2),
        "later batch": ([*first, *second], min(batch, subjects)),
    }
    one.run(
        [
            replace(
                one.trial(
                    one.settings(name, joint=joint),
                    size,
                    labels={"target": "shared" if joint else "one each", "second edit": order},
                ),
                edits=tuple(edits),
                kept=kept,
            )
            for name in names or ("alphaedit",)
            for order, (edits, size) in orders.items()
            for joint in (True, False)
        ]
    )


@study.command("specs")
@specs_argument
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Batch sizes; default all at once, 5.")
@_kept
@_compared
@click.pass_obj
def study_specs(space: Workspace, /, batches: tuple[int, ...], names: tuple[str, ...], **given: Any) -> None:
    """Specs in one batch and in small ones, every method on the unedited model."""
    from editctl.config import load

    one = _Study(space, "specs", 0, {**given, "specs": given["specs"] or tuple(load(space.config_path).specs)})
    sizes = batches or (len(one.matter.edits), 5)
    chosen = names or ("alphaedit", "memit", "memit-history")
    one.run([one.trial(one.settings(name), size) for name in chosen for size in sizes])


@study.command("prepare")
@specs_argument
@click.option(
    "-o", "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The model folder to make."
)
@click.option(
    "--text", "texts", multiple=True, help="Plain text to train on: a text file or JSON lines; again for more."
)
@click.option(
    "--size", type=click.Choice(["tiny", "small", "medium"]), default="small", help="0.4, 6 or 26 M parameters."
)
@click.option("--epochs", type=click.IntRange(1), default=60, help="Most times that every fact is shown.")
@click.option(
    "--recall", type=click.FloatRange(0, 1), default=0.95, help="Share of each kind of prompt to be recalled."
)
@click.option("--probes", type=click.IntRange(0), default=0, help="Locality and attribute prompts an edit; 0 for all.")
@click.option("--seed", type=int, default=0, help="Of the weights and the order of the text.")
@click.option("--device", default="auto", help="auto, cpu, cuda or mps.")
@as_json
@click.pass_obj
def study_prepare(
    space: Workspace,
    /,
    specs: tuple[str, ...],
    out: Path,
    texts: tuple[str, ...],
    device: str,
    as_json: bool,
    **goal: Any,
) -> None:
    """Train a small decoder on what the specs hold for true, and plain text, until it recalls it: a model on which a
    benchmark means something."""
    from editctl import report
    from editctl.studies import prepare

    edits = space.edits(specs)
    with report.showing_run(report.console(stderr=True)) as emit:
        record = prepare.prepare(edits, out, prepare.Goal(**goal), texts=texts, device=device, emit=emit)
    rows = [{"prompts": kind, **found} for kind, found in record["recalled"].items()]
    if as_json:
        talk.lines(*({"type": "recall", **row} for row in rows), {"type": "prepared", "model": str(out), **record})
        return
    for line in report.markdown_table(rows):
        click.echo(line)
    talk.say(f"wrote {out}: {record['parameters']:,} parameters, {record['epochs_run']} epochs; edit it with")
    talk.say(f"  --model {out} --corpus {out / prepare.CORPUS}")


@study.command("runtime")
@specs_argument
@click.option("--edits", type=click.IntRange(1), default=100, help="Requests in the batch.")
@click.option(
    "--plain", "plain_edits", type=click.IntRange(1), default=6, help="Of these, timed on the plain path too."
)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Batch sizes.")
@click.option("--repeat", type=click.IntRange(1), default=5, help="With SPECS: how often each batch is timed.")
@click.option("--shape", default="gpt2-124m", help="Without SPECS: random weights of gpt2-124m or llama-8b.")
@click.option("--counterfact", default="", help="Without SPECS: requests from a file in CounterFact's format.")
@_kept
@_compared
@click.pass_obj
def study_runtime(
    space: Workspace,
    /,
    specs: tuple[str, ...],
    edits: int,
    plain_edits: int,
    batches: tuple[int, ...],
    repeat: int,
    shape: str,
    counterfact: str,
    names: tuple[str, ...],
    **given: Any,
) -> None:
    """Seconds an edit by phase: with SPECS methods beside each other, each several times; without, the engine against
    full passes, one request at a time, on a model of a large shape."""
    from editctl import report
    from editctl.studies import runtime

    if specs:
        one = _Study(space, "runtime", 0, {**given, "specs": specs})
        chosen = [one.settings(name) for name in names or ("alphaedit", "memit", "memit-history")]
        one.time(chosen, batches or (1, 10, 100), repeat)
        return
    if names or given["out"]:
        raise InvalidInput("--method and -o are of methods beside each other", "name the SPECS they are timed on")
    as_json, flags = given.pop("as_json"), {k: v for k, v in given.items() if k not in ("out", "checks", "texts")}
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
