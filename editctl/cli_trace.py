"""The verb that traces: where in the model the answer to a prompt passes.

Knows: which prompts a command line names, what is kept of their traces, what is printed of them. Refuses: to compute;
torch, rich, sqlite-utils and matplotlib are imported inside the verb.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from editctl import talk
from editctl.errors import EditctlError, InvalidInput
from editctl.flags import as_json, from_flags, from_writer
from editctl.metrics.kinds import KINDS, SAMPLES
from editctl.workspace import Workspace

if TYPE_CHECKING:
    from editctl.events import Emit
    from editctl.metrics.effects import Case, Proposal, Summary, Trace
    from editctl.spec import Edit
    from editctl.store import Store, Version

MARKED = re.compile(r"\{([^{}]+)\}")
"""The subject in a prompt on the command line."""
EXAMPLE = 'for example editctl trace "{The Eiffel Tower} stands in", or name it with --subject'


@dataclass(frozen=True)
class _Keeper:
    """Where traces go."""

    store: Store
    version: Version | None
    timeout: int
    about: dict[str, Any]
    """Which model they are of."""

    def keep(self, kind: str, edit: str, data: dict[str, Any]) -> None:
        """Record one with its version; each as soon as it is there, so that what is interrupted loses nothing."""
        with self.store.lock("trace", self.timeout):
            self.store.add_evidence(self.version.id if self.version else "", kind, edit, {**self.about, **data})


@click.command()
@click.argument("what", nargs=-1, metavar="[SPEC... | PROMPT]")
@click.option("--edit", "ids", multiple=True, metavar="ID", help="Only this edit of the specs; again for more.")
@click.option("--subject", help="The words of PROMPT that are corrupted, if no {} marks them.")
@click.option("--answer", help="The answer to PROMPT that is traced (default: the model's own).")
@click.option("--ref", default="@", help="Version that is traced (default: the head, or base).")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), help="Restore only this; again for more.")
@click.option("--samples", type=click.IntRange(1, 200), default=SAMPLES, help="Draws of noise.")
@click.option("--window", type=click.IntRange(1, 1000), help="Blocks whose MLPs or attention are restored together.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, help="Of the noise.")
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Draw the heat map into a file (.svg or .png).")
@click.option("--use", is_flag=True, help="Write the proposed blocks to the configuration's settings.")
@from_writer
@as_json
@from_flags
@click.pass_obj
def trace(
    space: Workspace,
    /,
    what: tuple[str, ...],
    ids: tuple[str, ...],
    subject: str | None,
    answer: str | None,
    ref: str,
    kinds: tuple[str, ...],
    out: str | None,
    use: bool,
    lock_timeout: int,
    as_json: bool,
    samples: int,
    window: int | None,
    seed: int,
    **flags: Any,
) -> None:
    """Show where in the model an answer passes: corrupt the subject, put one state back, see what returns.

    SPECs are spec files and folders, by default the workspace's. A PROMPT marks its subject: "{The Eiffel Tower} stands
    in". Each trace is kept as evidence with the version.
    """
    space = space.with_flags(**flags)
    edits: Sequence[Edit] = ()
    if _is_prompt(what, subject, answer):
        if ids:
            raise click.UsageError("--edit names an edit of specs, and a PROMPT has none.")
        cases = [_case(what, subject, answer)]
    else:
        edits = _chosen(space.edits(what), ids)
        cases = [_of_edit(edit) for edit in edits]
    if out:
        from editctl import plots

        plots.check(Path(out))
    store = space.store()
    version = store.resolve(ref)
    space = space.made_for([version])
    count = space.usual()
    keeper = _Keeper(store, version, lock_timeout, {"model": space.config.model, "base": space.source()[1]})
    if as_json:
        talk.lines()
    from editctl.metrics.effects import AVERAGES, TRACE, summary

    traces: list[Trace] = []
    options: dict[str, Any] = {"samples": samples, "window": window, "seed": seed, "kinds": kinds or KINDS}
    with _emitting(as_json) as emit:
        for one in _traced(space, keeper, cases, options, emit):
            made = _named(one, edits[len(traces)]) if edits else one
            keeper.keep(TRACE, made.edit, made.to_json())
            traces.append(made)
            if as_json:
                talk.line({"type": "trace", **made.to_json(), "total": round(made.total, 6), "counts": made.counts})
    found = summary(traces, count)
    if len(traces) > 1:
        keeper.keep(AVERAGES, "", found.to_json())
    if as_json:
        for average in found.averages:
            talk.line({"type": "average", **average.to_json()})
        talk.line({"type": "proposal", **found.proposal.to_json()})
    else:
        _show(traces, found)
        name = version.id if version else "base"
        talk.say(f"Kept as evidence with {name}: editctl show {name}")
    if out:
        _draw(Path(out), traces, found)
    if use:
        _use(space, found.proposal, as_json)


# ---------------------------------------------------------------------------------------------------------------------
# What is traced


def _is_prompt(what: Sequence[str], subject: str | None, answer: str | None) -> bool:
    """Whether the arguments are a prompt: what is said of one is, and one text that is no path."""
    if subject is not None or answer is not None:
        return True
    return len(what) == 1 and not what[0].endswith(".toml") and not os.path.exists(what[0])


def _case(what: Sequence[str], subject: str | None, answer: str | None) -> Case:
    """The prompt to trace.

    Raises:
        InvalidInput: it does not say what its subject is, or there is no prompt.
    """
    from editctl.metrics.effects import Case
    from editctl.spec import quoted

    if len(what) != 1:
        raise InvalidInput("--subject and --answer are of one PROMPT", EXAMPLE)
    # Halves of characters, which arguments may hold, are no text to a tokenizer.
    prompt, subject, answer = ((text or "").encode("utf-8", "replace").decode() for text in (what[0], subject, answer))
    if subject:
        if prompt.count(subject) != 1:
            message = f"{quoted(subject)} stands {prompt.count(subject)} times in {quoted(prompt, 200)}"
            raise InvalidInput(message, "mark the one that is meant with braces: {" + subject + "}")
        start = prompt.index(subject)
        return Case("", prompt, start, start + len(subject), answer)
    marks = list(MARKED.finditer(prompt))
    if len(marks) != 1 or not marks[0][1].strip():
        raise InvalidInput(f"{quoted(prompt, 200)} is no spec file, and no prompt with one subject marked", EXAMPLE)
    start, end = marks[0].span()
    return Case("", prompt[:start] + marks[0][1] + prompt[end:], start, end - 2, answer)


def _chosen(edits: Sequence[Edit], ids: Sequence[str]) -> list[Edit]:
    """The edits of these ids, by default all.

    Raises:
        InvalidInput: there is no edit, or none of an id.
    """
    from editctl.spec import nearest, quoted

    if not edits:
        raise InvalidInput("there are no edits in these specs", EXAMPLE)
    known = {edit.id: edit for edit in edits}
    for name in ids:
        if name not in known:
            raise InvalidInput(f"these specs have no edit {quoted(name)}", nearest(name, list(known)))
    return [known[name] for name in dict.fromkeys(ids)] or list(edits)


def _of_edit(edit: Edit) -> Case:
    """The prompt of an edit, its subject corrupted."""
    from editctl.metrics.effects import Case
    from editctl.spec import SLOT

    start = edit.relation.index(SLOT)
    return Case(edit.id, edit.prompt, start, start + len(edit.subject))


def _traced(
    space: Workspace, keeper: _Keeper, cases: Sequence[Case], options: dict[str, Any], emit: Emit
) -> Iterator[Trace]:
    """Trace on the version's weights."""
    from editctl.engine import trace as room
    from editctl.engine import wear
    from editctl.events import StageStarted

    emit(StageStarted("load", 0))
    model = space.load()
    with wear.wearing(model, keeper.store, keeper.version):
        yield from room.trace(model, cases, emit=emit, **options)


def _named(found: Trace, edit: Edit) -> Trace:
    """The trace with the answer as the edit spells it, if that is what the model says."""
    from editctl.metrics.edits import says

    return next(
        (replace(found, answer=a) for a in (edit.target_true, edit.target_new) if says(found.answer, [a])), found
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is made of it


def _emitting(as_json: bool) -> AbstractContextManager[Emit]:
    """Events as data, or as a bar."""
    from editctl import report

    return nullcontext(talk.echo) if as_json else report.showing_run(report.console(stderr=True))


def _show(traces: Sequence[Trace], found: Summary) -> None:
    from editctl import heat

    talk.show(heat.trace_view(traces[0]) if len(traces) == 1 else heat.averages_view(traces, found.averages))
    talk.show(heat.proposal_line(found.proposal))


def _draw(path: Path, traces: Sequence[Trace], found: Summary) -> None:
    from editctl import heat, plots, report

    plots.heatmap(path, **heat.picture(traces, found.averages))
    talk.say(f"Drew {report.safe(str(path))}")


def _use(space: Workspace, proposal: Proposal, as_json: bool) -> None:
    """Write the proposed blocks to the configuration.

    Raises:
        EditctlError: there are none.
        InvalidInput: the file cannot take them, or is about another model.
    """
    from editctl import config, report
    from editctl.spec import quoted

    if not proposal.layers:
        raise EditctlError(f"no blocks are proposed: {proposal.why}", "trace more edits, or set layers by hand")
    path = space.config_path or Path(config.FILE)
    layers, edited = list(proposal.layers), config.load(space.config_path).model
    if edited != space.config.model:
        raise InvalidInput(
            f"{report.safe(str(path))} edits {quoted(edited)}, the blocks are of {quoted(space.config.model)}",
            "name that model in the file first; nothing was written",
        )
    config.put(path, ("settings", "layers"), layers)
    if as_json:
        talk.line({"type": "written", "file": str(path), "layers": layers})
    else:
        talk.say(f"Wrote layers = {layers} to [settings] of {report.safe(str(path))}")


verbs = (trace,)
"""What the command line adds to its group."""
