"""The UI's own process: the places, what is known, what is staged, the children at work.

Knows: reading specs and store in threads when they change, keys and palette, one run at a time. Refuses: torch, SQL,
and to do in the foreground what takes long. Whatever changes the store is an operation of the store or a command of
the command line.
"""

from __future__ import annotations

import asyncio
import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import events, work
from textual.app import App
from textual.binding import Binding, BindingType
from textual.command import CommandPalette, DiscoveryHit, Hit, Hits, Provider
from textual.dom import DOMNode
from textual.worker import Worker, WorkerState

from editctl.errors import EditctlError
from editctl.plan import count
from editctl.spec import visible
from editctl.tui import children, desk
from editctl.tui.asker import Asked, Asker, Reply
from editctl.tui.course import Course
from editctl.tui.desk import Past, Specs
from editctl.tui.dialogs import Question, Viewer
from editctl.tui.help import help_of
from editctl.tui.place import PLACES, Place, plain
from editctl.tui.rows import WIDE
from editctl.tui.runner import Run, Runner

if TYPE_CHECKING:
    from textual.notifications import SeverityLevel

    from editctl.engine.cost import Expected
    from editctl.plan import Plan
    from editctl.store import Operation, Store
    from editctl.workspace import Workspace

POLL = 1.0
"""Seconds between looks at whether files or the store changed."""
UNLISTED = frozenset(
    {"pane.down", "pane.up", *(f"list.{way}" for way in ("down", "up", "page-down", "page-up", "first", "last"))}
    | {f"heat.{way}" for way in ("left", "right", "up", "down", "first", "last")}
)
"""Moving about, which the palette need not do."""
PULSE = 0.5
"""Seconds between looks at how far a run is, for the bars."""


def place_class(name: str) -> type[Place]:
    """The class of a place, by its key in `PLACES`."""
    module = import_module(f"editctl.tui.{name}")
    found: type[Place] = getattr(module, f"{PLACES[name]}Place")
    return found


@dataclass(frozen=True)
class Planned:
    """The plan of what is staged, or why there is none."""

    plan: Plan | None = None
    expected: Expected | None = None
    error: EditctlError | None = None
    staged: frozenset[str] = frozenset()
    """What was staged."""
    specs: Specs | None = None
    """What the specs were."""


class Actions(Provider):
    """The palette: everything that has a key, by category."""

    def _found(self) -> Iterator[tuple[str, str, Callable[[], Any]]]:
        seen = set()
        for active in self.screen.active_bindings.values():
            node, binding = active.node, active.binding
            if binding.id is None or binding.id in UNLISTED or binding.action in seen:
                continue
            seen.add(binding.action)
            category = binding.id.partition(".")[0] if "." in binding.id else "view"
            what = binding.tooltip or binding.description
            why = node.obstacle(binding.action) if isinstance(node, Place | EditctlApp) else ""
            more = f"{self.app.get_key_display(binding)}  {visible(why, 500)}".strip()
            # The palette reads markup, of which a backslash before each bracket leaves nothing.
            more = more.replace("[", "\\[")
            yield (f"{category}: {what}", more, partial(self.app.run_action, binding.action, node))

    async def discover(self) -> Hits:
        """Everything, before anything is typed."""
        for name, more, run in self._found():
            yield DiscoveryHit(name, run, help=more)

    async def search(self, query: str) -> Hits:
        """What fits the words."""
        matcher = self.matcher(query)
        for name, more, run in self._found():
            if (score := matcher.match(name)) > 0:
                yield Hit(score, matcher.highlight(name), run, help=more)


class Palette(CommandPalette):
    """Textual's palette, which a key that comes before its list is laid out does not end."""

    def _action_command_list(self, action: str) -> None:
        with suppress(KeyError):
            super()._action_command_list(action)


class EditctlApp(App[None]):
    """The terminal UI of a workspace."""

    TITLE = "editctl"
    # All at once: a style sheet that comes later makes everything be styled anew, 30 ms in the middle of a run.
    CSS_PATH: ClassVar[list[str]] = [  # type: ignore[assignment]
        *("app.tcss", "plan.tcss", "run.tcss", "review.tcss", "history.tcss", "ask.tcss", "form.tcss", "trace.tcss"),
        "import.tcss",
    ]
    # Each place's module is loaded when it is first shown: the first paint needs one of them.
    MODES: ClassVar[dict[str, Callable[[], Place]]] = {  # type: ignore[assignment]
        name: partial(lambda name: place_class(name)(), name) for name in PLACES
    }
    DEFAULT_MODE = "specs"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (WIDE, "-wide")]  # noqa: RUF012
    COMMANDS = App.COMMANDS | {Actions}
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(i), f"go('{name}')", title, show=False, id=f"go.{name}", tooltip=f"Go to {title}")
            for i, (name, title) in enumerate(PLACES.items(), 1)
        ),
        Binding("u", "undo", "undo", show=False, id="history.undo", tooltip="Take back the last operation"),
        Binding("ctrl+r", "redo", "redo", show=False, id="history.redo", tooltip="Take back the last undo"),
        Binding("question_mark", "help", "keys", key_display="?", id="view.help", tooltip="What this place is for"),
        Binding("q", "quit", "quit", show=False, id="view.quit", tooltip="Leave editctl"),
    ]

    def __init__(
        self,
        space: Workspace,
        *,
        readonly: bool = False,
        launch: children.Launch = children.launch,
        logs: Path | None = None,
        poll: float = POLL,
    ) -> None:
        """
        Args:
            launch: starts the commands that work for the UI.
            logs: where their words are kept; by default the user's log folder.
            poll: seconds between looks at files and store.
        """
        super().__init__()
        # Thousands of specs are many small objects without cycles. Looking for cycles among 100,000 new objects takes
        # 30 ms, among all of them far longer than a key press may.
        gc.set_threshold(20_000, 50, 100)
        self.space, self.readonly, self._poll = space, readonly, poll
        if logs is None:
            from platformdirs import user_log_path

            logs = user_log_path("editctl")
        self.specs, self.past, self.planned = Specs(), Past(), Planned()
        self._staged: dict[str, str] = {}
        """What a person staged: keys of items, and the facts that were meant."""
        self._changing = False
        """Whether a file was changed here and is not read again yet."""
        self.seen = 0
        """The newest operation that is shown."""
        self._one_change = asyncio.Lock()
        self._children: set[children.Child] = set()
        """What was started beside the run and the asker."""
        self._faults: set[str] = set()
        self.arrivals = 0
        """How often a place was gone to."""
        self.elsewhere = ""
        """Who else is changing the store; empty when nobody is."""
        self.pointed = ""
        """Key of the edit under the cursor in Specs."""
        self.reviewed: str | None = None
        """The version that Review shows; None is the newest candidate, else the head."""
        self.trouble = ""
        """Why specs or store could not be read."""
        self.runner = Runner(launch, logs, self.told)
        self.asker = Asker(launch, space.arguments("ask", "--stdin", model=True), logs, self.told, self._run_goes_on)
        self._launch, self._logs = launch, logs
        self._shelf: Any = None
        self._specs_stamp: object = None
        self._looking = self._look_again = False
        self._been: list[str] = []
        if theme := space.config.theme:
            self.theme = theme
        self.set_keymap(space.config.keys)

    # What is known

    def _run_goes_on(self) -> bool:
        return self.runner.going

    @property
    def store(self) -> Store:
        """The store of the workspace."""
        from editctl.store import Store

        return Store(Path(self.space.config.store), readonly=self.readonly)

    @property
    def spec_paths(self) -> list[Path]:
        """The workspace's spec files and folders."""
        return [Path(name) for name in self.space.config.specs]

    def on_mount(self) -> None:
        """Begin to read, after the first paint."""
        self.call_after_refresh(self._start)

    def _start(self) -> None:
        self.look()
        self.set_interval(self._poll, self.look)
        self.set_interval(PULSE, self._pulse)
        self._load_places()

    @work(group="load", thread=True)
    def _load_places(self) -> None:
        """So that the first visit of a place need not wait for its module and what that prints with."""
        import_module("editctl.report")
        for name in PLACES:
            place_class(name)

    def look(self, *, changed: bool = False) -> None:
        """See whether files or store changed, and read what did: once more if that is being done.

        Args:
            changed: whether a file was changed here; nothing is applied before it is read.
        """
        self._changing |= changed
        self._look_again = True
        if not self._looking:
            self._looking = True
            self._look_until_done()

    @work(group="look", exit_on_error=False)
    async def _look_until_done(self) -> None:
        # Never two at a time, and none is broken off: what takes longer than a poll would never be read.
        try:
            while self._look_again:
                self._look_again, changing = False, self._changing
                await self._look()
                if changing and not self._look_again:
                    self._changing = False
                    self.told()
        finally:
            self._looking = False

    async def _look(self) -> None:
        root = Path(self.space.config.store)
        stamps = (desk.stamp_of_specs, self.spec_paths), (desk.stamp_of_store, root)
        specs_stamp, store_stamp = [await asyncio.to_thread(*one) for one in stamps]
        self.elsewhere = "" if self.runner.going else await asyncio.to_thread(self._holder)
        past, trouble = self.past, self.trouble
        if store_stamp != past.stamp or not past.read or trouble:
            try:
                past, trouble = await asyncio.to_thread(desk.read_past, self.store), ""
            except EditctlError as error:
                # What was read last is still the best that is known; the next look tries again.
                trouble = f"{error.message}; {error.hint}"
                past = past if past.read else Past(read=True)
        if past is not self.past or specs_stamp != self._specs_stamp:
            try:
                self.specs = await asyncio.to_thread(self._read_specs, past)
            except EditctlError as error:
                # A record of a live edit is damaged; the specs can be read all the same.
                trouble = f"{error.message}; {error.hint}"
                self.specs = await asyncio.to_thread(self._read_specs, Past())
            self.past, self.trouble, self._specs_stamp = past, trouble, specs_stamp
            self.seen = past.operations[0].id if past.operations else 0
            self._keep_staged(self.specs)
            self.plan_again()
        self.told()

    def _holder(self) -> str:
        return self.store.holder()

    def _read_specs(self, past: Past) -> Specs:
        from editctl.spec import Shelf

        self._shelf = self._shelf or Shelf()
        return desk.read_specs(self._shelf, self.spec_paths, past.lives)

    @property
    def staged(self) -> frozenset[str]:
        """Keys of the items that are in the plan: those that were staged, as long as they can be."""
        return frozenset(self._staged) & self.specs.stageable

    @property
    def planned_now(self) -> bool:
        """Whether the plan is that of what is staged and of the files as they are."""
        return self.planned.staged == self.staged and self.planned.specs is self.specs and not self._changing

    @work(exclusive=True, group="plan", exit_on_error=False)
    async def plan_again(self) -> None:
        """Make the plan of what is staged."""
        staged, specs = self.staged, self.specs
        if not staged:
            self.planned = Planned(specs=specs)
        else:
            self.planned = await asyncio.to_thread(self._make_plan, staged, specs)
        self.told()

    def _keep_staged(self, specs: Specs) -> None:
        """Hold what was staged against specs that were read anew: an id that is another fact now is not what was
        staged, and what the model says is done."""
        items = {item.key: item for item in specs.items}
        for key, fact in list(self._staged.items()):
            item = items.get(key)
            if (item is None and not specs.problems) or (item is not None and item.state == desk.APPLIED):
                del self._staged[key]
            elif item is not None and item.fact != fact:
                del self._staged[key]
                words = f"{item.edit.id} is about something else now, so it is no longer staged: {item.edit.prompt}"
                self.notify(words, severity="warning", timeout=15)

    def _make_plan(self, staged: frozenset[str], specs: Specs) -> Planned:
        from editctl import plan as plan_room

        wanted, dropped = desk.staged_actions(specs.items, staged)
        try:
            store = self.store
            head = store.head()
            made = self.space.make_plan(wanted, head, store, prune=False)
            made = plan_room.dropping(made, [live.known for live in store.edits(head)], dropped)
            expected = self.space.expected(made, store) if made.changes else None
            return Planned(made, expected, None, staged, specs)
        except EditctlError as error:
            return Planned(error=error, staged=staged, specs=specs)

    def stage(self, keys: Sequence[str], on: bool) -> None:
        """Put items into the plan, or take them out of it."""
        facts = {item.key: item.fact for item in self.specs.items}
        for key in keys:
            if on and key in facts:
                self._staged[key] = facts[key]
            else:
                self._staged.pop(key, None)
        self.plan_again()
        self.told()

    def told(self) -> None:
        """Something is known anew: show it."""
        screen = self.screen_stack[0] if self._running and self.screen_stack else None
        if isinstance(screen, Place):
            screen.update()

    def _pulse(self) -> None:
        if self.runner.going or self.asker.doing:
            for bar in self.screen.query("PlaceBar, StatusBar"):
                bar.refresh()

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """A fault of ours is told and kept for a report; the UI goes on."""
        if event.state == WorkerState.ERROR:
            self.fault(event.worker.error)

    def fault(self, error: BaseException | None) -> None:
        """Tell a fault of ours, each once; workers tell only the place or dialog that began them."""
        words = f"A fault in editctl itself: {type(error).__name__}: {error}"
        if words in self._faults:
            return
        self._faults.add(words)
        with suppress(OSError):
            log = children.log_file(self._logs, "fault")
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            words += f"\nPlease report it with {log}"
        self.notify(words, severity="error", timeout=60)

    # The bars

    def place_mark(self, name: str) -> str:
        """What stands behind a place's name when it wants attention."""
        if name == "plan" and self.staged:
            return f"({len(self.staged)})"
        if name == "run" and self.runner.going:
            return "*"
        if name == "review" and self.past.candidates:
            return f"({len(self.past.candidates)})"
        return ""

    def where(self) -> str:
        """What is worked on."""
        head = self.past.head.id if self.past.head else "base"
        return ("read-only  " if self.readonly else "") + f"{Path(self.space.config.model).name} @ {head}"

    def status(self) -> tuple[str, str]:
        """What is going on, and its style."""
        run = self.runner.run
        if self.trouble:
            return self.trouble, "bold red"
        if run is not None and run.going:
            left = "" if run.left is None else f", about {run.left:.0f} s left"
            doing = run.outcome or run.course.doing
            return f"{run.title}: {100 * run.course.fraction:.0f} %, {doing}{left}", "bold"
        if self.elsewhere:
            return f"the store is being changed by {self.elsewhere}", "bold yellow"
        if self.asker.doing:
            return f"{self.asker.doing} …", "bold"
        if not self.specs.read:
            return "reading …", ""
        declared = len(self.specs.items) - self.specs.count(desk.GONE)
        parts = [f"{count(declared, 'edit')} in {count(len(self.specs.files), 'file')}"]
        parts += [f"{self.specs.count(state)} {state}" for state in desk.GLYPHS if self.specs.count(state)]
        parts += [count(len(self.specs.problems), "problem")] if self.specs.problems else []
        return " · ".join(parts), ""

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Dim what cannot be done."""
        return None if self.obstacle(action) else True

    def obstacle(self, action: str) -> str:
        """Why an action of every place cannot be done now; empty if it can."""
        if action in ("undo", "redo"):
            if self.readonly:
                return "opened with --readonly: nothing can be changed"
            if self.runner.going:
                return "a run is going on: wait for it, or cancel it in Run"
            if self.trouble:
                return self.trouble
            if action == "undo" and not self.past.operations:
                return "nothing was done yet"
        return ""

    async def run_action(self, action: Any, default_namespace: DOMNode | None = None, namespaces: Any = None) -> bool:
        """As Textual does; what cannot be done says why."""
        if await super().run_action(action, default_namespace, namespaces):
            return True
        node = default_namespace
        name = action.partition("(")[0] if isinstance(action, str) else ""
        if name.startswith("app."):
            node, name = self, name.removeprefix("app.")
        why = node.obstacle(name) if isinstance(node, Place | EditctlApp) else ""
        if why:
            self.notify(why[:1].upper() + why[1:], severity="warning", markup=False)
        return bool(why)

    async def action_go(self, name: str) -> None:
        """To another place."""
        if name != self.current_mode:
            self.arrivals += 1
            self._been = [*self._been[-20:], self.current_mode]
            await self.switch_mode(name)

    async def action_back(self) -> None:
        """To the place before."""
        if self._been:
            self.arrivals += 1
            await self.switch_mode(self._been.pop())

    def action_help(self) -> None:
        """Say what the place is for and what its keys do."""
        self.push_screen(Viewer("Keys", help_of(self.screen, self.get_key_display)))

    def action_command_palette(self) -> None:
        """Everything that can be done, by name."""
        if not CommandPalette.is_open(self):  # type: ignore[arg-type]
            self.push_screen(Palette(id="--command-palette"))

    def action_undo(self) -> None:
        """Take back the last operation."""
        self.change("undo", lambda store: store.undo("editctl tui: undo"), "ctrl+r brings it back")

    def action_redo(self) -> None:
        """Take back the last undo."""
        self.change("redo", lambda store: store.redo("editctl tui: redo"), "u takes it back")

    @work(group="quit", exclusive=True, exit_on_error=False)
    async def action_quit(self) -> None:  # type: ignore[override]
        """Leave; a run or another command that goes on is asked about, and what was written and not saved."""
        losses = ["A run is going on: it is cancelled, and the store stays as it is."] if self.runner.going else []
        losses += [loss for screen in self.screen_stack if (loss := getattr(screen, "loss", ""))]
        if losses:
            if await self.push_screen_wait(Question("Leave all the same?", "\n".join(losses))) is None:
                return
            await self.runner.cancel()
        await self.asker.stop()
        self.exit()

    # Doing

    def notify(
        self,
        message: str,
        *,
        title: str = "",
        severity: SeverityLevel = "information",
        timeout: float | None = None,
        markup: bool = False,
    ) -> None:
        """Say something for a while, literally: what it quotes may come from anywhere."""
        super().notify(plain(message).plain, title=title, severity=severity, timeout=timeout, markup=False)

    @work(group="change", exit_on_error=False)
    async def change(
        self,
        verb: str,
        move: Callable[[Store], Operation],
        back: str = "u takes it back",
        seen: int | None = None,
    ) -> None:
        """Do an operation of the store and say what it did; refused when another program did one that is not shown.

        Args:
            back: how it is undone.
            seen: the newest operation that the person saw when deciding; by default that which is shown now.
        """

        def guarded() -> Operation:
            from editctl.errors import StalePlan

            store = self.store
            last = next(iter(store.operations(1)), None)
            if last is not None and last.id != (self.seen if seen is None else seen):
                words = f"another program changed the store meanwhile: {last.description}"
                raise StalePlan(words, "look at it in History (5) and do this again")
            return move(store)

        try:
            async with self._one_change:
                operation = await asyncio.to_thread(guarded)
                self.seen = operation.id
        except EditctlError as error:
            self.refused(error)
        else:
            from editctl.report import short

            words = f"{operation.description[:1].upper()}{operation.description[1:]}.\nNow at {short(operation.head)}"
            self.notify(f"{words}; {back}.", title=verb, markup=False)
        self.look()

    def refused(self, error: EditctlError) -> None:
        """Say why something was not done."""
        from editctl.report import problem_lines

        self.notify(problem_lines(error).plain, severity="error", timeout=15, markup=False)

    def carry_out(
        self, title: str, course: Course, arguments: Sequence[str], verb: str, given: str = ""
    ) -> Worker[None]:
        """Start a run, show it, and say what came of it."""
        # At once: from here on nothing else begins.
        run = self.runner.begin(title, course)
        return self.run_worker(self._carry_out(run, arguments, verb, given), group="run", exit_on_error=False)

    async def _carry_out(self, run: Run, arguments: Sequence[str], verb: str, given: str) -> None:
        title, course, before = run.title, run.course, self.past.view
        await self.action_go("run")
        # Two models at once may be more than the device holds.
        await self.asker.stop()
        await self.runner.follow(run, arguments, verb, given)
        if run.course.made is None and run.code:
            with suppress(EditctlError):
                run.recorded = before is not None and await asyncio.to_thread(self.store.view) != before
        if run.complaint or (run.code and course.made is None and not run.cancelled):
            words = f"{run.outcome}\n{run.complaint}\nAll it said: {run.log}"
            self.notify(words, title=title, severity="error", timeout=30, markup=False)
        elif course.made is not None:
            if self.current_mode != "review":
                self.reviewed = course.made.version
            where = "" if self.current_mode == "review" else "\nReview (4) shows it."
            severity = "warning" if course.made.candidate else "information"
            self.notify(run.outcome + where, title=title, severity=severity, timeout=10, markup=False)  # type: ignore[arg-type]
        else:
            self.notify(run.outcome, title=title, markup=False)
        self.look()

    async def start(self, verb: str, arguments: Sequence[str]) -> children.Child:
        """Start a command that makes no version, with a log file of its own."""
        log = await asyncio.to_thread(children.log_file, self._logs, verb)
        child = await self._launch(arguments, log)
        self._children.add(child)
        return child

    async def ask(self, ref: str, prompts: Sequence[Asked], top: int = 0) -> tuple[str, list[Reply]]:
        """Ask the model; refused while a run has it.

        Raises:
            EditctlError: it was refused.
        """
        if self.runner.going:
            raise EditctlError("a run is going on, which has the model", "ask again when it has ended")
        return await self.asker.ask(ref, prompts, top)

    def read(self, title: str, body: object) -> None:
        """Show something to read."""
        self.push_screen(Viewer(title, plain(body) if isinstance(body, str) else body))

    async def on_event(self, event: events.Event) -> None:
        """Text that is pasted has no place for what acts on terminals."""
        if isinstance(event, events.Paste):
            event.text = "".join(c for c in event.text if c.isprintable() or c == "\n")
        await super().on_event(event)

    async def on_unmount(self) -> None:
        """No child outlives the UI."""
        for child in self._children:
            child.kill()
        with suppress(Exception):
            await self.runner.cancel()
        with suppress(Exception):
            await self.asker.stop()
