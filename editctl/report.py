"""Plans, versions, differences and runs as Rich text; knows nothing of what they mean.

Every text that comes from a spec, a model or a file goes through `safe` and into a `Text`, never into markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from editctl import events
from editctl.artifacts import Artifact
from editctl.engine.cost import Expected
from editctl.engine.methods import Method
from editctl.errors import EditctlError, InvalidInput
from editctl.events import Emit, Event
from editctl.figures import MetricsView
from editctl.metrics import gates
from editctl.metrics.gates import Failure
from editctl.metrics.values import GENERATED, KINDS, LOCALITY, PARAPHRASE, PORTABILITY, REWRITE, Answer, Metric
from editctl.plan import ADD, DROP, GLYPHS, KEEP, REMEASURE, REPLACE, Live, Plan, count
from editctl.spec import Edit, visible
from editctl.store import BASE, Fault, Operation, Version

Norms = Mapping[str, tuple[float, float]]
"""By edited module, Frobenius norms of the whole update and of the weight."""
STYLES = {ADD: "green", REPLACE: "yellow", REMEASURE: "cyan", DROP: "red", KEEP: "dim"}
SHORT = {REWRITE: "edit", PARAPHRASE: "para", LOCALITY: "keep", PORTABILITY: "port"}
SHOWN = 100
"""Answers shown of a kind where there may be very many."""
CHANGES = 200
"""Changes of a plan that are listed."""
FAILED = 20
"""Edits named under a gate."""
WIDTH = 120
"""Columns when the output is not a terminal."""


def console(*, stderr: bool = False) -> Console:
    """Standard output or error; colour only on terminals, none with NO_COLOR. Strings are no markup."""
    plain: dict[str, Any] = {"stderr": stderr, "highlight": False, "markup": False, "emoji": False}
    found = Console(**plain)
    return found if found.is_terminal else Console(**plain, width=WIDTH)


def safe(text: str, width: int = 10_000) -> str:
    """Text from outside with control characters escaped."""
    return visible(text, width)


def short(version: str) -> str:
    """How a version id or hash is shown."""
    return safe(version[:12]) or "base"


def problem_lines(error: EditctlError) -> Text:
    """An error as it is shown: the message, its problems, the hint."""
    text = Text()
    if isinstance(error, InvalidInput):
        for problem in error.problems:
            text.append(safe(str(problem)) + "\n")
            if problem.hint:
                text.append(f"  hint: {safe(problem.hint)}\n", "dim")
    text.append("error", "bold red").append(f": {safe(error.message)}")
    if error.hint:
        text.append("\nhint", "bold").append(f": {safe(error.hint)}")
    return text


def plan_view(plan: Plan, summary: str = "") -> RenderableType:
    """The glyph list and the summary line, by default the plan's own; edits that stay are counted, not listed."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(width=1)
    table.add_column(no_wrap=True, max_width=32)
    table.add_column(overflow="fold")
    changes = [action for action in plan.actions if action.kind != KEEP]
    for action in changes[:CHANGES]:
        fact = _fact(action.edit, action.old if action.kind == REPLACE else None)
        if action.reason:
            fact.append(f"  ({safe(action.reason)})", "dim")
        table.add_row(Text(GLYPHS[action.kind], STYLES[action.kind]), Text(safe(action.edit.id)), fact)
    if len(changes) > CHANGES:
        table.add_row("", "", Text(f"… and {len(changes) - CHANGES} more (editctl plan --json)", "dim"))
    last = Text(summary, "bold") if summary else plan_summary(plan)
    return Group(table, last) if table.rows else last


def plan_summary(plan: Plan) -> Text:
    """How many of what, and what is live beside the specs."""
    lines = Text()
    if plan.outside:
        lines.append(f"{count(plan.outside, 'applied edit')} not in these specs (kept; --prune drops them)\n", "dim")
    return lines.append(plan.summary(), "bold")


def _fact(edit: Edit, old: Edit | None) -> Text:
    """The prompt, what it was answered, what it shall be answered."""
    was = old.target_new if old and old.prompt == edit.prompt else edit.target_true
    if was == edit.target_new:
        was = ""
    text = Text(safe(edit.prompt, 70) + " ")
    if was:
        text.append(safe(was, 30), "red").append(" → ")
    return text.append(safe(edit.target_new, 30), "green")


def answers_view(answers: Sequence[Answer], limit: int | None = None) -> Table:
    """One row an edit: what the model said to its prompt before and after, and how its other prompts fared."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", width=1)
    table.add_column("prompt", ratio=5, overflow="fold")
    table.add_column("before", ratio=2, overflow="fold")
    table.add_column("after", ratio=2, overflow="fold")
    for kind in KINDS[1:]:
        table.add_column(SHORT[kind], justify="right", no_wrap=True)
    rewrites = [a for a in answers if a.kind == REWRITE]
    by_edit: dict[str, list[Answer]] = {}
    for answer in answers:
        by_edit.setdefault(answer.edit, []).append(answer)
    for answer in rewrites[:limit]:
        mine = by_edit[answer.edit]
        counts = []
        for kind in KINDS[1:]:
            asked = [a for a in mine if a.kind == kind]
            good = sum(a.ok for a in asked)
            counts.append(Text(f"{good}/{len(asked)}" if asked else "-", "" if good == len(asked) else "yellow"))
        table.add_row(
            Text("✓", "green") if answer.ok else Text("✗", "red"),
            Text(safe(answer.prompt)),
            Text(safe(answer.before, 60)),
            Text(safe(answer.after, 60), "green" if answer.ok else "red"),
            *counts,
        )
    _more(table, len(rewrites), limit)
    return table


def moved_view(answers: Sequence[Answer], limit: int | None) -> Table:
    """Prompts whose answer is not what it should be, in the model's own words."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head, ratio in (("kind", 2), ("prompt", 6), ("wanted", 2), ("before", 2), ("after", 2)):
        table.add_column(head, ratio=ratio, overflow="fold")
    for a in answers[:limit]:
        wanted = a.before if a.kind == LOCALITY else " | ".join(a.wanted)
        said = (Text(safe(text, 60)) for text in (wanted, a.before, a.after))
        table.add_row(Text(safe(a.kind)), Text(safe(a.prompt)), *said)
    _more(table, len(answers), limit)
    return table


def _more(table: Table, there: int, limit: int | None) -> None:
    """A last row that says how much was left out."""
    if limit is not None and there > limit:
        table.add_row("", Text(f"… and {there - limit} more (editctl show --all)", "dim"))


def version_view(
    version: Version,
    edits: int,
    answers: Sequence[Answer],
    metrics: Sequence[Metric],
    footprint: tuple[int, int, Sequence[str]],
    *,
    rows: int | None,
    reviews: Sequence[Operation] = (),
    candidate: bool = False,
) -> RenderableType:
    """A version: where it comes from, what it changes, what was measured.

    Args:
        edits: how many are live in it.
        footprint: number and bytes of its factor files, and the kinds of update and overlay in them.
        rows: answers shown of each kind; None shows all, 0 none and nothing about them.
        reviews: what was accepted and rejected of it.
    """
    head = Table(box=None, pad_edge=False, show_header=False)
    head.add_column(style="bold")
    head.add_column(overflow="fold")
    ridge, space = dict(version.params["ridge"]), version.params["null_space"]
    numbers = [k.rstrip("_") + ("" if v is True else f" {v:g}") for k, v in ridge.items() if v]
    numbers += [f"null space by {space['rule']} {space['value']:g}"] if space else []
    # Some overlays lie over no block in particular.
    blocks = f"blocks {layers}" if (layers := version.params["layers"]) else ""
    how = "; ".join(filter(None, [", ".join(numbers), blocks]))
    files, size, kinds = footprint
    listed = " and ".join(filter(None, [", ".join(kinds[:-1]), *kinds[-1:]]))
    factors = [count(files, "file"), f"{size / 2**20:.1f} MB", *filter(None, [listed])]
    facts = {
        "version": version.id + (" (a candidate: it waits for review)" if candidate else ""),
        "parent": short(version.parent),
        "made": f"{version.created_at} by {version.who}",
        "model": f"{version.model} ({version.base}), {version.dtype}",
        "method": f"{version.method}: {how}" if how else version.method,
        "weights": version.weights_hash,
        "edits": str(edits),
        "factors": ", ".join(factors),
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in version.seconds.items()),
        "peak memory": f"{version.peak_mb:.0f} MB",
    }
    if version.norms:
        facts["update ÷ weight"] = ", ".join(f"{u / w:.4f}" if w else "-" for u, w in version.norms.values())
    for name, value in facts.items():
        head.add_row(name, Text(safe(value)))
    for review in reviews:
        head.add_row(Text(safe(f"{review.verb}ed")), review_line(review))
    if failed := gates.failures(version.gates, metrics, answers, edits):
        head.add_row("gates", gates_view(failed))
    elif version.gates:
        passed = ", ".join(f"{name} {wanted:g}" for name, wanted in version.gates.items())
        head.add_row("gates", Text(safe(f"passed: {passed}"), "green"))
    if rows == 0:
        return Group(head, Text(), MetricsView(metrics))
    parts: list[RenderableType] = [head, Text(), answers_view(answers, rows), Text()]
    missed = sorted((a for a in answers if not a.ok and a.kind != REWRITE), key=lambda a: KINDS.index(a.kind))
    if missed:
        title = Text(f"{count(len(missed), 'other answer')} not as wanted:", "bold")
        parts += [title, moved_view(missed, rows), Text()]
    return Group(*parts, MetricsView(metrics))


def review_line(review: Operation) -> Text:
    """Who decided what, and why."""
    what = f"{', '.join(review.edits)}: " if review.edits else ""
    return Text(safe(f"{what}{review.note or 'no note'} ({review.who}, {review.at})"))


def gates_view(failed: Sequence[Failure]) -> Text:
    """Gates that were not passed, each with the edits that failed it."""
    text = Text()
    for one in failed:
        text.append(f"✗ {safe(str(one))}\n", "red")
        for edit in one.edits[:FAILED]:
            text.append(f"    {safe(edit)}\n")
        if len(one.edits) > FAILED:
            text.append(f"    … and {len(one.edits) - FAILED} more\n", "dim")
    text.right_crop(1)
    return text


def faults_view(faults: Sequence[Fault], versions: int | None, rebuilt: int) -> Text:
    """What is wrong with a store.

    Args:
        versions: how many it has, if nothing is wrong any more.
        rebuilt: how many of them were rebuilt.
    """
    text = Text()
    for fault in faults:
        text.append("mended" if fault.repaired else "wrong", "green" if fault.repaired else "bold red")
        text.append(f": {safe(fault.what)} {safe(fault.wrong)}\n")
        if not fault.repaired:
            text.append(f"  hint: {safe(fault.remedy)}\n", "dim")
    if versions is not None:
        built = f"{count(versions, 'version')} {'rebuilt to the bit' if rebuilt else 'not rebuilt'}"
        text.append(f"ok: database, records and files are whole; {built}")
    else:
        left = sum(not fault.repaired for fault in faults)
        text.append(f"{count(left, 'thing')} wrong", "bold red")
    return text


def log_view(operations: Sequence[Operation]) -> Table:
    """Operations, newest first, with the aliases of versions; older ones are counted."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("op", "verb", "head", "when", "who", "what"):
        table.add_column(title, overflow="fold")
    names: dict[str, list[str]] = {}
    for name, version in operations[0].aliases.items() if operations else ():
        names.setdefault(version, []).append(name)
    for i, op in enumerate(operations):
        head = Text(short(op.head))
        for name in names.pop(op.head, ()):
            head.append(f"\n{safe(name)}", "cyan")
        what = Text(safe(op.description))
        if op.note:
            what.append(f"\n“{safe(op.note)}”", "italic")
        if op.command:
            what.append(f"\n{safe(op.command)}", "dim")
        mark = "@ " if i == 0 else "  "
        table.add_row(f"{mark}{op.id}", Text(safe(op.verb)), head, Text(safe(op.at)), Text(safe(op.who)), what)
    if not operations:
        table.add_row("@ 0", "-", BASE, "", "", "nothing was applied yet")
    elif older := operations[-1].id - 1:
        table.add_row("", "", "", "", "", Text(f"… and {older} older (editctl log --all)", "dim"))
    return table


def diff_view(
    names: tuple[str, str],
    edits: tuple[Mapping[str, Live], Mapping[str, Live]],
    answers: Sequence[tuple[str, Answer]],
    metrics: tuple[Sequence[Metric], Sequence[Metric]],
    norms: tuple[Norms, Norms],
) -> RenderableType:
    """What differs between two versions: facts, answers to the same prompts, metrics, sizes of the updates.

    Args:
        answers: those that are not what they were, each with what it was.
    """
    # A prompt has one answer at a time; ids may have been given to other facts.
    old, new = ({edit.prompt: edit for edit in side.values()} for side in edits)
    lines = Text().append(f"{safe(names[0])} → {safe(names[1])}\n", "bold")
    for name in dict.fromkeys((*old, *new)):
        was, now = old.get(name), new.get(name)
        if now is None and was is not None:
            lines.append("- ", "red").append_text(_fact(was.whole, None)).append("\n")
        elif now is not None and (was is None or was.weights_fingerprint != now.weights_fingerprint):
            lines.append("+ " if was is None else "~ ", "green" if was is None else "yellow")
            lines.append_text(_fact(now.whole, was.whole if was else None)).append("\n")
    if answers:
        lines.append(f"{count(len(answers), 'answer')} changed:\n", "bold")
    for words, a in answers[:SHOWN]:
        lines.append(f"  {safe(a.kind)}: {safe(a.prompt)} ").append(safe(words, 60), "red").append(" → ")
        lines.append(safe(a.after, 60) + "\n", "green")
    if len(answers) > SHOWN:
        lines.append(f"  … and {len(answers) - SHOWN} more (editctl diff --json)\n", "dim")
    if not old and not new:
        lines.append("the same edits on both sides\n")
    parts: list[RenderableType] = [lines, MetricsView(metrics[1], metrics[0])]
    parts += [Text(), norms_view(norms)] if any(norms) else []
    return Group(*parts)


def norms_view(norms: tuple[Norms, Norms]) -> Table:
    """By edited module, the size of the update before and after, and of the weight that carries it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("module", "‖update‖ before", "after", "‖weight‖ before", "after"):
        table.add_column(head, justify="left" if head == "module" else "right")
    for module in dict.fromkeys((*norms[0], *norms[1])):
        # Without an update the weight is the other side's without its update, whose norm nobody measured.
        (old, was), (new, now) = (side.get(module, (0.0, None)) for side in norms)
        sizes = ("-" if size is None else f"{size:.3f}" for size in (was, now))
        table.add_row(Text(safe(module)), f"{old:.4f}", f"{new:.4f}", *sizes)
    return table


def expected_line(expected: Expected) -> Text:
    """What a run will probably take."""
    gigabytes = expected.bytes / 2**30
    memory = f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{expected.bytes / 2**20:.0f} MB"
    return Text(
        f"Expected: about {expected.seconds:.0f} s and at most {memory} of memory ({safe(expected.basis)}).", "dim"
    )


def methods_view(methods: Sequence[Method]) -> RenderableType:
    """The table of methods by family: what each changes and needs, how one edit is dropped and how preservation acts;
    under it what it does, its equation and its paper. It has room in 80 columns."""
    size = max((len(method.name) for method in methods), default=0)

    def row(name: str, facts: Sequence[str], *below: Text, style: str = "") -> Table:
        cells = Table.grid(padding=(0, 2, 0, 0))
        for width in (7, 21, 12, 19):
            cells.add_column(width=width)
        cells.add_row(*(Text(fact, style) for fact in facts))
        whole = Table.grid(padding=(0, 2, 0, 0))
        whole.add_column(width=size, no_wrap=True)
        whole.add_column(overflow="fold")
        whole.add_row(Text(name, "bold"), Group(cells, *below))
        return whole

    parts: list[RenderableType] = [row("method", ("changes", "needs", "drop", "null space"), style="bold")]
    for family in dict.fromkeys(method.family for method in methods):
        parts.append(Rule(Text(family), align="left", style="dim"))
        for method in (one for one in methods if one.family == family):
            facts = (method.changes, method.needs, method.drop, method.preservation or "-")
            below = (Text(method.summary), Text(method.equation, "cyan"), Text(method.paper, "dim"))
            parts.append(row(method.name, facts, *below))
    return Group(*parts)


def trained_line(artifact: Artifact) -> str:
    """A trained file in a line: method, name, content, day, and what the model said of edits it was not trained on."""
    method, name, at = (safe(str(artifact.about.get(key, "")), 30) for key in ("method", "name", "created_at"))
    held = artifact.about.get("held_out")
    shares = {
        str(metric.get("name")): metric.get("value")
        for metric in (held if isinstance(held, list) else ())
        if isinstance(metric, dict) and metric.get("protocol") == GENERATED and not metric.get("axis")
    }
    known = ((kind, shares.get(kind)) for kind in ("reliability", "locality"))
    told = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in known if isinstance(share, float))
    return "  ".join([method, name, short(artifact.content), at[:10], f"held out: {told}" if told else "not measured"])


def markdown_table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Rows of equal keys as the lines of a Markdown table."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join("---" for _ in heads) + "|"]
    lines += ["| " + " | ".join(safe(str(row[head])) for head in heads) + " |" for row in rows]
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# A run as it happens

TITLES = {
    "load": "Loading the model",
    "statistics": "Measuring which directions knowledge uses",
    "before": "Asking before",
    "target": "Optimising targets",
    "solve": "Writing layers",
    "after": "Asking after",
    "checks": "Checking what is beside answers",
    "commit": "Recording the version",
    "rebuild": "Rebuilding versions",
    "train": "Training",
    "trace": "Tracing",
}


def event_line(event: Event) -> str | None:
    """One plain line for events worth a line where there is no terminal."""
    if isinstance(event, events.RunStarted):
        return f"Editing {event.model} on {event.device} ({event.dtype}) with {event.method}: {event.edits} edits"
    if isinstance(event, events.StageStarted):
        # A batch is one line, not one a stage of it.
        return None if event.stage == "solve" else TITLES[event.stage] + (f" (batch {event.batch})" * bool(event.batch))
    if isinstance(event, events.NullSpace):
        share = 100 * event.energy
        return f"  block {event.layer}: {event.rank} of {event.width} directions are free ({share:.1f} % of the energy)"
    if isinstance(event, events.TrainStep):
        parts = ", ".join(f"{name} {value:.4g}" for name, value in event.parts.items())
        return f"  step {event.step} of {event.total}: {parts}"
    if isinstance(event, events.Note):
        return f"note: {event.message}"
    if isinstance(event, events.GateFailed):
        return f"gate {Failure(event.gate, event.wanted, event.value, tuple(event.edits))}"
    return None


@contextmanager
def showing_run(err: Console) -> Iterator[Emit]:
    """An `Emit` that shows a run on standard error: bars with time left on a terminal, plain lines elsewhere."""
    if not err.is_terminal:

        def print_line(event: Event) -> None:
            if line := event_line(event):
                err.print(Text(safe(line)))

        yield print_line
        return
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )
    with progress:
        task = progress.add_task("Starting", total=None)
        edits = progress.add_task("Batches of edits", total=None, visible=False)

        def show(event: Event) -> None:
            if isinstance(event, events.StageStarted):
                progress.reset(task, description=TITLES[event.stage], total=event.total or None)
                if event.stage == "target":
                    progress.update(edits, visible=True, completed=event.batch - 1)
            elif isinstance(event, events.Progress):
                progress.update(task, completed=event.done, total=event.total)
            elif isinstance(event, events.TargetStep):
                text = f"Optimising targets (loss {event.loss:.2f}, {event.active} left)"
                progress.update(task, completed=event.step, description=text)
            elif isinstance(event, events.LayerSolved):
                progress.advance(task)
            elif isinstance(event, events.RunStarted):
                progress.update(edits, total=event.batches)
            if (
                line := event_line(event)
                if isinstance(event, events.NullSpace | events.Note | events.GateFailed | events.TrainStep)
                else None
            ):
                err.print(Text(safe(line)))

        yield show
