"""An engine that follows a script: the children of the UI, in this process, without a model.

It speaks the lines that `editctl apply --json` and `editctl ask --stdin` speak, and makes real versions in a real store
whose factor files hold nothing. What the model says is a rule: a live edit's target to its prompt and its paraphrases,
else what was true, else "nobody knows".
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from editctl import events, plan
from editctl.cli import cli
from editctl.errors import EditctlError, Exit
from editctl.files import digest_of
from editctl.metrics import edits as edit_metrics
from editctl.metrics import effects, gates
from editctl.metrics.edits import Question
from editctl.metrics.values import REWRITE, Answer
from editctl.plan import DROP, REMEASURE, REPLACE, Plan
from editctl.spec import Edit, load
from editctl.store import Draft, LiveEdit, Store, Version
from editctl.workspace import Workspace

UNKNOWN = "nobody knows"
STUBBORN = "Atlantis"
"""A target that the model never learns to say."""
NOON = datetime(2026, 8, 1, 12, tzinfo=UTC)


def said(question: Question, lives: Sequence[Edit]) -> str:
    """What the model says when these edits are live."""
    for edit in lives:
        if question.prompt in (edit.prompt, *edit.paraphrase_prompts):
            return UNKNOWN if edit.target_new == STUBBORN else edit.target_new
    if question.kind in (REWRITE, "paraphrase"):
        return next((edit.target_true for edit in lives if edit.prompt == question.prompt), "") or UNKNOWN
    return question.wanted[0] if question.wanted else UNKNOWN


class Engine:
    """Starts scripted children and remembers what they were asked to do."""

    def __init__(self, root: Path, clock: Callable[[], datetime] = lambda: NOON) -> None:
        self.store = Store(root, now=clock, who="ada@lab")
        self.started: list[list[str]] = []
        """The arguments of each child."""
        self.hold: asyncio.Event | None = None
        """While it is not set, a run stands still after its first batch of targets."""
        self.dies: str = ""
        """What the next run says before it dies; empty lets it live."""
        self.patience = 0.0
        """Seconds between two lines."""
        self.faults: list[Exception] = []
        """What went wrong in the script itself; its child ended with code 1."""

    async def launch(self, arguments: Sequence[str], log: Path) -> Scripted:
        """As of `children.Launch`."""
        self.started.append(list(arguments))
        log.write_text("$ editctl " + " ".join(arguments) + "\n", encoding="utf-8")
        return Scripted(self, arguments, log)

    @property
    def runs(self) -> list[list[str]]:
        """The arguments of the children that were to make versions or files."""
        return [arguments for arguments in self.started if "--stdin" not in arguments]

    def lives(self, version: Version | None) -> list[Edit]:
        """The edits of a version."""
        return [live.edit for live in self.store.edits(version)]

    def make(self, made: Plan, *, verb: str = "apply", note: str = "") -> Version:
        """Carry a plan out as the engine would."""
        view = self.store.view()
        origin = self.store.resolve(made.head or "base")
        reviewed = origin is not None and origin.id in view.candidates
        parent = origin.parent if origin and reviewed else made.head
        plan.check_fresh(replace(made, head=parent), base=made.base, head=view.head)
        gone = {action.old.id for action in made.of(REPLACE) if action.old}
        gone |= {action.edit.id for action in made.of(DROP)}
        changed = {action.old.id: action.edit for action in made.of(REMEASURE) if action.old}
        lives = [live for live in self.store.edits(origin) if live.id not in gone]
        lives = [LiveEdit(changed.get(live.id, live.known), live.delta, live.column) for live in lives]
        new = [action.edit for action in made.of(plan.ADD, REPLACE)]
        if new:
            name = self.factor(f"{made.head} {[edit.id + edit.target_new for edit in new]}")
            lives += [LiveEdit(edit, name, column) for column, edit in enumerate(new)]
        before, after = self.lives(origin if not reviewed else self.store.resolve(parent or "base")), []
        after = [live.edit for live in lives]
        answers = []
        known = self.store.last_answers(origin, [edit.id for edit in after])
        first = {(answer.edit, answer.kind, answer.prompt): answer.before for answer in known}
        for edit in after:
            for question in edit_metrics.questions(edit):
                was, now = said(question, before), said(question, after)
                was = first.get((edit.id, question.kind, question.prompt), was)
                if question.kind == REWRITE and was == UNKNOWN and edit.target_true:
                    was = edit.target_true
                good = edit_metrics.judge(question, was, now)
                scores = (2.5, 0.125, 0.0, 1.0) if question.wanted else (None, None, None, None)
                fields = (edit.id, question.kind, question.prompt, question.wanted, was, now, good)
                answers.append(Answer(*fields, *scores))
        metrics = edit_metrics.summary(answers)
        failed = gates.failures(made.gates, metrics, answers, len(lives))
        draft = Draft(
            parent=parent,
            base=made.base,
            model="atlas",
            dtype="torch.float32",
            method="alphaedit",
            params={**made.params, "dtype": "float32"},
            seed=0,
            weights_hash=hashlib.sha256(repr(sorted(edit.id for edit in after)).encode()).hexdigest()[:32],
            libraries={"editctl": "0.1.0"},
            seconds={"statistics": 1.0, "before": 0.5, "edit": 2.0, "after": 0.5, "commit": 0.1},
            peak_mb=612.0,
            norms={"transformer.h.1.mlp.c_proj": (0.25, 31.5)},
            gates=dict(made.gates),
            edits=tuple(lives),
            answers=tuple(answers),
            metrics=metrics,
            events=tuple(events.to_line(event) for event in script(made) if not isinstance(event, events.Progress)),
        )
        return self.store.commit(
            draft,
            expected_head=parent,
            verb=verb,
            command="editctl tui",
            note=note,
            instead_of=made.head if verb == "reject" else "",
            without=[action.edit.id for action in made.of(DROP)] if verb != "apply" else (),
            hold="; ".join(map(str, failed)),
        )

    def factor(self, content: str) -> str:
        """A factor file of that content, under its name."""
        self.store.deltas_dir.mkdir(parents=True, exist_ok=True)
        part = self.store.deltas_dir / "new"
        part.write_text(content, encoding="utf-8")
        name = digest_of(part)
        part.rename(self.store.deltas_dir / f"{name}.safetensors")
        return name

    def plan_of(self, *edits: Edit, gates: dict[str, float] | None = None, drop: Sequence[str] = ()) -> Plan:
        """A plan from the head to these edits."""
        head = self.store.head()
        space = Workspace(store=str(self.store.root), config=None)
        made = replace(space.make_plan(edits, head, self.store, prune=False), gates=gates or {})
        return plan.dropping(made, [live.known for live in self.store.edits(head)], drop)


def script(made: Plan) -> list[events.Event]:
    """What a run tells, in order."""
    edits = len(made.of(plan.ADD, REPLACE))
    told: list[events.Event] = [
        events.StageStarted("load", 0),
        events.RunStarted("atlas", "cpu", "torch.float32", "alphaedit", edits, 1 if edits else 0, len(made.of(DROP))),
        events.StageStarted("statistics", 1000),
        events.MemoryUsed(512.0),
        events.Progress("statistics", 1000, 1000),
        events.NullSpace(1, 200, 256, 0.1),
        events.StageStarted("before", 12),
        events.Progress("before", 12, 12),
    ]
    if edits:
        told.append(events.StageStarted("target", edits, 1))
        told += [events.TargetStep(1, step, 4.0 * 0.7**step, max(edits - step // 5, 0)) for step in range(20)]
        told.append(events.StageStarted("solve", 2, 1))
        told += [events.LayerSolved(1, layer, 0.25, 31.5, 0.02) for layer in (1, 2)]
    return [*told, events.StageStarted("after", 12), events.StageStarted("commit", 0)]


class Scripted:
    """One child."""

    def __init__(self, engine: Engine, arguments: Sequence[str], log: Path) -> None:
        self.engine, self.arguments, self.log = engine, list(arguments), log
        self._lines: asyncio.Queue[str] = asyncio.Queue()
        self._given: list[str] = []
        self._code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self._loaded = False
        if "--stdin" not in self.arguments and "-" not in self.arguments:
            self._task = asyncio.create_task(self._work(""))

    async def line(self) -> str:
        """As of `children.Child`."""
        return await self._lines.get()

    async def send(self, line: str) -> None:
        """As of `children.Child`."""
        if "--stdin" in self.arguments:
            await self._answer(line)
        elif line:
            self._given.append(line)
        elif self._task is None:
            self._task = asyncio.create_task(self._work("\n".join(self._given)))

    def interrupt(self) -> None:
        """As of `children.Child`."""
        if not self._code.done():
            if self._task is not None:
                self._task.cancel()
            self._end(Exit.INTERRUPTED)

    def kill(self) -> None:
        """As of `children.Child`."""
        if not self._code.done():
            if self._task is not None:
                self._task.cancel()
            self._end(-9)

    async def wait(self) -> int:
        """As of `children.Child`."""
        return await asyncio.shield(self._code)

    def _end(self, code: int) -> None:
        self._lines.put_nowait("")
        if not self._code.done():
            self._code.set_result(int(code))

    def _complain(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    async def _work(self, given: str) -> None:
        try:
            await self._carry_out(given)
        except EditctlError as error:
            self._complain(f"error: {error.message}\nhint: {error.hint}")
            self._end(error.exit_code)
        except Exception as error:
            self.engine.faults.append(error)
            self._complain(f"error: {error!r}")
            self._end(1)

    async def _carry_out(self, given: str) -> None:
        engine, words = self.engine, self.arguments
        verb = next(word for word in words if word in VERBS)
        at = words.index(verb)
        note = words[words.index("--note") + 1] if "--note" in words else ""
        if verb == "apply":
            made = plan._from_body({k: v for k, v in json.loads(given).items() if k != "fingerprint"})
        elif verb in ("reject", "drop", "replay"):
            named = [words[i + 1] for i, word in enumerate(words) if word == "--edit"]
            version = engine.store.resolve(words[at + 1] if verb == "reject" else "@")
            assert version is not None
            ids = named or [word for word in words[at + 1 :] if not word.startswith("-") and word != note]
            lives = [live.known for live in engine.store.edits(version)]
            kept: dict[str, Any] = {"model": "atlas", "base": version.base, "params": version.params}
            made = plan.without(lives, ids, head=version.id, gates=version.gates, reason="rejected", **kept)
        elif verb == "trace":
            await self._trace(words[at + 1 :])
            return
        elif verb == "export-specs" or (verb == "import" and words[at + 1] != "delta"):
            await self._really(words)
            return
        else:
            self._lines.put_nowait(f"{verb}: all is well")
            self._end(Exit.OK)
            return
        with engine.store.lock(verb):
            for event in script(made):
                if engine.patience:
                    await asyncio.sleep(engine.patience)
                self._lines.put_nowait(events.to_line(event))
                if isinstance(event, events.TargetStep) and event.step == 10:
                    if engine.dies:
                        self._complain(engine.dies)
                        engine.dies = ""
                        self._end(-11)
                        return
                    if engine.hold is not None:
                        await engine.hold.wait()
            version = engine.make(made, verb=verb, note=note)
        waits = version.id in engine.store.view().candidates
        last = events.VersionMade(version.id, version.parent, version.weights_hash, {"edit": 2.0}, 612.0, waits)
        self._lines.put_nowait(events.to_line(last))
        self._end(Exit.GATE if waits else Exit.OK)

    async def _really(self, words: Sequence[str]) -> None:
        """Do what needs no model as users have it."""
        if self.engine.hold is not None:
            await self.engine.hold.wait()
        done = CliRunner().invoke(cli, list(words))
        for line in done.stdout.splitlines():
            self._lines.put_nowait(line)
        for problem in getattr(done.exception, "problems", ()):
            self._complain(f"{problem}\n  hint: {problem.hint}")
        if isinstance(done.exception, Exception):
            raise done.exception
        self._complain(done.stderr)
        self._end(done.exit_code)

    async def _trace(self, words: Sequence[str]) -> None:
        """Trace an edit, or all and what they add up to, on a model of seven blocks."""
        engine = self.engine
        version = engine.store.resolve(words[words.index("--ref") + 1])
        ids = [words[at + 1] for at, word in enumerate(words) if word == "--edit"]
        known = [edit for edit in load([Path("specs")]) if not ids or edit.id in ids]
        live = {edit.id for edit in engine.lives(version)}
        traces = [traced(edit, edit.target_new if edit.id in live else edit.target_true or UNKNOWN) for edit in known]
        for done, trace in enumerate(traces, 1):
            if engine.hold is not None:
                await engine.hold.wait()
            engine.store.add_evidence(version.id if version else "", effects.TRACE, trace.edit, trace.to_json())
            more = {"total": trace.total, "counts": trace.counts}
            self._lines.put_nowait(json.dumps({"type": "trace", **trace.to_json(), **more}))
            self._lines.put_nowait(events.to_line(events.Progress("trace", done, len(traces))))
        if len(traces) > 1:
            found = effects.summary(traces, 3).to_json()
            engine.store.add_evidence(version.id if version else "", effects.AVERAGES, "", found)
        self._end(Exit.OK)

    async def _answer(self, line: str) -> None:
        if not line:
            self._end(Exit.OK)
            return
        asked = json.loads(line)
        if not self._loaded:
            self._loaded = True
            self._lines.put_nowait(json.dumps({"type": "version", "schema": 1}))
            self._lines.put_nowait(json.dumps({"type": "ready", "model": "atlas", "device": "cpu", "dtype": "float32"}))
        try:
            version = self.engine.store.resolve(asked["ref"])
        except EditctlError as error:
            trouble = {"type": "error", "id": asked["id"], "message": error.message, "hint": error.hint}
            self._lines.put_nowait(json.dumps(trouble))
            return
        lives = self.engine.lives(version)
        answers = []
        for one in asked["prompts"]:
            wanted = tuple(one.get("wanted", ()))
            words = said(Question("", REWRITE, one["prompt"], wanted), lives)
            if words == UNKNOWN and len(wanted) > 1:
                words = wanted[1]
            following = [[f" {words}", 0.75], [" Paris", 0.125], [" London", 0.0625]][: asked["top"]]
            chances = [0.9 if target == words else 0.05 for target in wanted]
            answers.append({"prompt": one["prompt"], "text": words, "next": following, "probabilities": chances})
        found = {"type": "answers", "id": asked["id"], "ref": asked["ref"], "version": version.id if version else ""}
        self._lines.put_nowait(json.dumps({**found, "answers": answers}))


def traced(edit: Edit, answer: str) -> effects.Trace:
    """A trace with an early site at the subject's last token and a late one at the prompt's."""
    start = edit.relation.index("{}")
    words = [edit.relation[:start], *edit.subject.split(), *edit.relation[start + 2 :].split()]
    tokens = [word for word in words if word.strip()]
    first = 1 if edit.relation[:start].strip() else 0
    roles = effects.roles(len(tokens), first, first + len(edit.subject.split()))

    def cell(kind: str, role: str, block: int) -> float:
        if role == effects.SUBJECT:
            early = {effects.STATE: 0.9, effects.MLP: 0.75, effects.ATTENTION: 0.1}[kind]
            return early * (1 - abs(block - 2) / 6) if block < 6 else 0.0
        late = role == effects.LAST and kind != effects.MLP and block > 4
        return 0.875 if late else 0.125 if role == effects.FIRST and block < 3 else -0.03125 * (block % 2)

    rows = {kind: tuple(tuple(cell(kind, role, b) for b in range(7)) for role in roles) for kind in effects.KINDS}
    texts = {"edit": edit.id, "prompt": edit.prompt, "subject": edit.subject, "answer": answer, "token": f" {answer}"}
    numbers = {"clean": 0.96875, "corrupted": 0.0625, "window": 3, "samples": 10, "seed": 0, "noise": 0.318}
    return effects.Trace(**texts, **numbers, tokens=tuple(tokens), roles=roles, effects=rows)


VERBS = (
    "apply",
    "reject",
    "drop",
    "replay",
    "squash",
    "export",
    "verify",
    "measure",
    "gc",
    "backup",
    "import",
    "export-specs",
    "trace",
)
