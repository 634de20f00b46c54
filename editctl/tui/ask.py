"""Ask: one prompt, what the unedited model, the head and any version say to it, and how sure each is.

Knows: which versions are asked, earlier prompts of the session, making a probe of a prompt. Refuses: to make one
unasked, and computing; a child has the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, Vertical, VerticalScroll
from textual.widgets import Input, Static

from editctl import amend
from editctl.errors import EditctlError, InvalidInput
from editctl.metrics.edits import says
from editctl.spec import SLOT, Edit, Probe, check, quoted, visible
from editctl.tui import desk
from editctl.tui.asker import Asked, Hit, Reply
from editctl.tui.dialogs import Line, Pick, Question
from editctl.tui.form import lines_of, showable
from editctl.tui.place import Place

TOP = 5
"""Next tokens that are shown."""
COLUMN = 26
"""Terminal columns that an answer takes at least."""
BASE, HEAD = "base", "@"
EMPTY = """Type a prompt; return asks the unedited model (base) and the head (@).

  esc   leaves the line for the answers; there
  v     asks one more version
  t     shows how probable an answer of yours is
  s     makes the prompt a probe of an edit"""
KINDS = {
    "locality": "what is said must stay",
    "portability": "the answer must follow from the edit",
    "paraphrase": "the new target must be said",
}


@dataclass(frozen=True)
class Answer:
    """What a version said, or why it said nothing."""

    asked: Asked
    version: str = ""
    """Its id, "" for the unedited model."""
    reply: Reply | None = None
    error: str = ""


def bar(part: float, width: int) -> str:
    """A probability as blocks."""
    eighths = round(max(0.0, min(part, 1.0)) * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def template_of(prompt: str, subject: str) -> str:
    """The prompt with {} for the subject, if it names it exactly once."""
    return prompt.replace(subject, SLOT) if subject and prompt.count(subject) == 1 else prompt


def with_probe(edit: Edit, kind: str, prompt: str, answer: str) -> Edit:
    """The edit with one more prompt that measures it.

    Args:
        kind: one of `KINDS`.
        prompt: with {} for the subject.
        answer: of a probe; a paraphrase has none.

    Raises:
        InvalidInput: it has that probe.
    """
    if kind == "paraphrase":
        return edit.model_copy(update={"paraphrases": (*edit.paraphrases, prompt)})
    probes: tuple[Probe, ...] = getattr(edit, kind)
    if any(probe.prompt == prompt for probe in probes):
        raise InvalidInput(f"{edit.id} has the {kind} probe {quoted(prompt)} already", "change it in Specs")
    return edit.model_copy(update={kind: (*probes, Probe(prompt=prompt, answer=(answer,)))})


def add_probe(edit: Edit, kind: str, prompt: str, answer: str) -> None:
    """Write one more probe into the edit's file, beside whatever else changed there.

    Raises:
        InvalidInput: it cannot be written, or the edit has it.
    """
    report = check([Path(edit.file)])
    same = [one for one in (*report.edits, *report.faulty) if one.id == edit.id]
    latest = same[0] if len(same) == 1 else edit
    amend.save(Path(edit.file), with_probe(latest, kind, prompt, answer), replacing=edit.id)


class Prompt(Input):
    """The line for the prompt."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "ask", id="ask.ask", tooltip="Ask every version that is shown"),
        Binding("up", "earlier(-1)", "earlier", id="ask.earlier", tooltip="An earlier prompt of this session"),
        Binding("down", "earlier(1)", "later", show=False, id="ask.later", tooltip="A later prompt of this session"),
        Binding("escape", "screen.leave", "answers", id="leave", tooltip="To the answers; from there back"),
    ]

    async def action_earlier(self, way: int) -> None:
        """Another prompt, if there is one; an input's own up and down would scroll it."""
        await self.app.run_action(f"earlier({way})", self.screen)

    def _on_paste(self, event: events.Paste) -> None:
        event.text = "".join(c for c in event.text if showable(c, "\n"))


class Voice(Static, can_focus=True):
    """What one version says."""

    def __init__(self, ref: str) -> None:
        super().__init__(markup=False)
        self.ref = ref


class AskPlace(Place):
    """One prompt, several versions."""

    NAME = "ask"
    CHANGES = frozenset({"save"})
    AUTO_FOCUS = "#prompt"
    ABOUT = (
        "One prompt, asked of the unedited model (base), the head (@) and any other version: what each says, its "
        "likeliest next tokens, and how probable an answer of yours is. What is not the base's answer is yellow, or "
        "green when it is yours. Where overlays lie over a version's weights, the edit that answered is named. "
        "esc leaves the line for the answers, / goes back to it."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "earlier(-1)", "earlier", show=False, id="ask.earlier", tooltip="An earlier prompt"),
        Binding("down", "earlier(1)", "later", show=False, id="ask.later", tooltip="A later prompt"),
        Binding("slash", "prompt", "prompt", key_display="/", id="ask.prompt", tooltip="Type another prompt"),
        Binding("enter", "ask", "ask", id="ask.ask", tooltip="Ask every version that is shown"),
        Binding("v", "add", "version", id="ask.add", tooltip="Ask one more version"),
        Binding("x", "remove", "remove", id="ask.remove", tooltip="Take the chosen version away"),
        Binding("t", "target", "target", id="ask.target", tooltip="Show how probable an answer is"),
        Binding("s", "save", "save", id="ask.save", tooltip="Save the prompt as a probe of an edit"),
        Binding("left", "choose(-1)", "left", show=False, id="ask.left", tooltip="The version to the left"),
        Binding("right", "choose(1)", "right", show=False, id="ask.right", tooltip="The version to the right"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._refs = [BASE, HEAD]
        self._asked: Asked | None = None
        self._answers: dict[str, Answer] = {}
        """By ref."""
        self._waiting: list[str] = []
        """Refs that are still to answer, in order; the first is being asked."""
        self._round = 0
        self._past: list[str] = []
        """Prompts of this session, oldest first."""
        self._at = 0
        self._last: Voice | None = None
        """The answer that had the focus last."""

    def body(self) -> ComposeResult:
        """The line, and the answers under it."""
        with Vertical():
            yield Prompt(placeholder="a prompt that the model continues", id="prompt", select_on_focus=False)
            yield Static(EMPTY, id="empty", markup=False)
            with VerticalScroll(id="scroll", can_focus=False), Grid(id="voices"):
                for ref in self._refs:
                    yield Voice(ref)

    # What is shown

    @property
    def _line(self) -> Prompt:
        return self.query_one("#prompt", Prompt)

    @property
    def _voices(self) -> list[Voice]:
        found = {voice.ref: voice for voice in self.query(Voice)}
        return [found[ref] for ref in self._refs if ref in found]

    @property
    def _chosen(self) -> Voice | None:
        """The answer that has the focus, else that had it last, else the last of all."""
        voices = self._voices
        if isinstance(self.focused, Voice):
            return self.focused
        return self._last if self._last in voices else voices[-1] if voices else None

    def renew(self) -> None:
        """The answers as they are now."""
        self.query_one("#empty").display = self._asked is None
        self.query_one("#scroll").display = self._asked is not None
        self._lay_out()
        for voice in self._voices:
            voice.update(self._view(voice.ref, self._width))

    @property
    def _across(self) -> int:
        """How many answers stand side by side."""
        return max(1, min(len(self._refs), self.size.width // COLUMN))

    @property
    def _width(self) -> int:
        """Terminal columns for the text of an answer."""
        return max(self.size.width // self._across - 5, 12)

    def _lay_out(self) -> None:
        self.query_one("#voices", Grid).styles.grid_size_columns = self._across

    def on_resize(self) -> None:
        """More or fewer answers fit side by side."""
        if self._voices:
            self.renew()

    def _resolved(self, ref: str) -> str:
        """The id that a ref names now, as far as is known here."""
        past = self.desk.past
        if ref == HEAD:
            return past.head.id if past.head else ""
        if ref == BASE:
            return ""
        return dict(past.view.aliases if past.view else {}).get(ref, ref)

    def _view(self, ref: str, width: int) -> RenderableType:
        """One answer."""
        from editctl.report import short

        answer, now = self._answers.get(ref), self._resolved(ref)
        shown = answer.version if answer and answer.reply else now
        title = Text(visible(ref, width), "bold", no_wrap=True, overflow="ellipsis")
        if short(shown) != ref:
            title.append(f"  {short(shown)}", "dim")
        parts: list[RenderableType] = [title]
        if ref in self._waiting:
            first = self._waiting[0] == ref
            parts.append(Text(f"{self.desk.asker.doing or 'asking'} …" if first else "waits", "dim"))
        elif answer is not None and answer.error:
            parts.append(Text("\n".join(visible(line, 1000) for line in answer.error.splitlines()), "red"))
        elif answer is None or answer.reply is None:
            parts.append(Text("not asked: return asks", "dim"))
        if answer is None or answer.reply is None or ref in self._waiting:
            return Group(*parts)
        if answer.version != now:
            parts.append(Text(f"asked at {short(answer.version)}, now {short(now)}; return asks again", "yellow"))
        parts.append(Text(visible(answer.reply.text, 2000) or "(nothing)", self._style(answer)))
        parts += _hit_lines(answer.reply.hit, width) if answer.reply.laid else []
        parts += [Text(), _chances(answer.reply, answer.asked.wanted, width)]
        return Group(*parts)

    def _style(self, answer: Answer) -> str:
        """Green for the wanted answer, yellow for one that is not the base's."""
        base = self._answers.get(BASE)
        said = answer.reply.text if answer.reply else ""
        if base is None or base.reply is None or base.asked.prompt != answer.asked.prompt or base.reply.text == said:
            return ""
        return "green" if answer.asked.wanted and says(said, answer.asked.wanted) else "yellow"

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """In the line a slash is a slash."""
        if action == "prompt" and isinstance(self.focused, Prompt):
            return False
        return super().check_action(action, parameters)

    def why_not(self, action: str) -> str:
        """As of `Place`."""
        if action in ("ask", "target") and self.desk.runner.going:
            return "a run is going on, which has the model: ask again when it has ended"
        if action in ("target", "save") and self._asked is None:
            return "nothing was asked yet: type a prompt, return asks it"
        if action == "ask" and self._asked is None and not self._line.value.strip():
            return "there is no prompt yet: / goes to the line for it"
        if action == "remove" and len(self._refs) == 1:
            return "one version must stay"
        if action == "earlier" and not self._past:
            return "nothing was asked yet in this session"
        if action == "save":
            if self._asked is not None and SLOT in self._asked.prompt:
                return "the prompt holds {}, which would stand for the subject in a probe"
            if not self._items:
                return "there is no edit that could take a probe"
            if not any(answer.reply for answer in self._answers.values()):
                return "no version has answered yet"
        return ""

    async def action_leave(self) -> None:
        """From the line to the answers, from there back."""
        chosen = self._chosen
        if self._line.has_focus and self._asked is not None and chosen is not None:
            chosen.focus()
        else:
            await super().action_leave()

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """Know which answer is chosen."""
        if isinstance(event.widget, Voice):
            self._last = event.widget

    def action_prompt(self) -> None:
        """To the line."""
        self._line.focus()

    def action_choose(self, way: int) -> None:
        """To the answer beside."""
        voices, chosen = self._voices, self._chosen
        if chosen in voices:
            voices[(voices.index(chosen) + way) % len(voices)].focus()

    def action_earlier(self, way: int) -> None:
        """An earlier or later prompt into the line; behind the latest is an empty one."""
        self._at = max(0, min(self._at + way, len(self._past)))
        self._line.value = self._past[self._at] if self._at < len(self._past) else ""
        self._line.cursor_position = len(self._line.value)

    @on(Input.Submitted, "#prompt")
    async def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if why := self.obstacle("ask"):
            self.notify(why[:1].upper() + why[1:], severity="warning", markup=False)
        else:
            self.action_ask()

    def action_ask(self) -> None:
        """Ask every version that is shown."""
        prompt = self._line.value.strip()
        if not prompt:
            return
        if self._asked is None or self._asked.prompt != prompt:
            self._asked = Asked(prompt)
        if self._past[-1:] != [prompt]:
            self._past.append(prompt)
        self._at = len(self._past)
        self.put(self._refs)

    @work(group="voices", exit_on_error=False)
    async def put(self, refs: Sequence[str]) -> None:
        """Ask some versions, one after another; a version of two names is asked once. A later round ends this one."""
        asked = self._asked
        if asked is None:
            return
        self._round += 1
        number, said = self._round, dict[str, Answer]()
        # What another round did not come to is asked in this one.
        self._waiting = [ref for ref in self._refs if ref in refs or ref in self._waiting]
        while self._waiting:
            self.update()
            ref = self._waiting[0]
            answer = said.get(self._resolved(ref))
            if answer is None:
                try:
                    version, replies = await self.desk.ask(ref, [asked], TOP)
                    answer = said[version] = Answer(asked, version, replies[0])
                except EditctlError as error:
                    answer = Answer(asked, error=f"{error.message}\n{error.hint}".strip())
            if number != self._round:
                return
            if ref in self._waiting:  # it may have been taken away meanwhile
                self._answers[ref] = answer
                self._waiting.remove(ref)
        self.update()

    @work(group="pick", exclusive=True, exit_on_error=False)
    async def action_add(self) -> None:
        """Ask one more version."""
        past = self.desk.past
        aliases = past.view.aliases if past.view else {}
        choices = [(BASE, "the unedited model"), (HEAD, "the head")]
        choices += [(name, f"alias of {version or BASE}") for name, version in aliases.items()]
        for version in past.versions:
            told = (
                "candidate" if version.id in past.candidates else "head" if version.id == self._resolved(HEAD) else ""
            )
            choices.append((version.id, "  ".join(filter(None, [version.created_at[:16], version.method, told]))))
        choices = [choice for choice in choices if choice[0] not in self._refs]
        ref = await self.app.push_screen_wait(Pick("Ask which version too?", choices, "every version is shown already"))
        if ref is None or ref in self._refs:
            return
        self._refs.append(ref)
        voice = Voice(ref)
        await self.query_one("#voices").mount(voice)
        voice.focus()
        self.update()
        if self._asked is not None and not self.why_not("ask"):
            self.put([ref])

    async def action_remove(self) -> None:
        """Take the chosen version away."""
        chosen = self._chosen
        if chosen is None or len(self._refs) == 1:
            return
        at = self._refs.index(chosen.ref)
        self._refs.remove(chosen.ref)
        self._waiting = [ref for ref in self._waiting if ref != chosen.ref]
        self._answers.pop(chosen.ref, None)
        await chosen.remove()
        self._voices[min(at, len(self._refs) - 1)].focus()
        self.update()

    @work(group="pick", exclusive=True, exit_on_error=False)
    async def action_target(self) -> None:
        """Show how probable an answer is."""
        if self._asked is None:
            return
        before = "".join(self._asked.wanted[:1])
        title = f"How probable is which answer to {quoted(self._asked.prompt, 200)}?"
        answer = await self.app.push_screen_wait(Line(title, "an answer", before))
        if answer is not None and not self.why_not("target"):
            self._asked = replace(self._asked, wanted=(answer,))
            self.put(self._refs)

    # Making a probe of it

    @property
    def _items(self) -> list[desk.Item]:
        """Edits that can take a probe."""
        return [item for item in self.desk.specs.items if item.edit.id and item.state not in (desk.GONE, desk.INVALID)]

    def _said(self, ref: str) -> str:
        """What a version said; empty if it did not answer."""
        answer = self._answers.get(ref)
        if answer is None or answer.reply is None or self._asked is None or answer.reply.prompt != self._asked.prompt:
            return ""
        return answer.reply.text.strip()

    @work(group="pick", exclusive=True, exit_on_error=False)
    async def action_save(self) -> None:
        """Ask for the edit, the kind and the answer, show what would be written, write it."""
        if self._asked is None:
            return
        prompt = self._asked.prompt
        items = {item.key: item for item in self._items}
        named = sorted(items, key=lambda key: items[key].edit.subject not in prompt)
        choices = [(key, f"{items[key].edit.prompt} → {items[key].edit.target_new}") for key in named]
        key = await self.app.push_screen_wait(Pick(f"Make {quoted(prompt)} a probe of which edit?", choices))
        if key is None:
            return
        edit = items[key].edit
        kind = await self.app.push_screen_wait(
            Pick(f"What shall it measure of {visible(edit.id)}?", list(KINDS.items()))
        )
        if kind is None:
            return
        answer = ""
        if kind != "paraphrase":
            title = "Which answer must stay?" if kind == "locality" else "Which answer must follow?"
            likely = self._said(BASE if kind == "locality" else HEAD)
            said = await self.app.push_screen_wait(Line(title, "the answer", likely))
            if said is None:
                return
            answer = said
        template = template_of(prompt, edit.subject)
        body = Text(f"{kind} of {visible(edit.id)} in {visible(edit.file, 200)}:\n\n")
        line = template if kind == "paraphrase" else lines_of([Probe(prompt=template, answer=(answer,))])
        body.append(f"  {visible(line, 3000)}", "green")
        if await self.app.push_screen_wait(Question("Add this probe?", body)) is None:
            return
        try:
            await asyncio.to_thread(add_probe, edit, kind, template, answer)
        except EditctlError as error:
            self.desk.refused(error)
        else:
            name = kind if kind == "paraphrase" else f"{kind} probe"
            self.notify(visible(f"Added the {name} to {edit.id} in {edit.file}", 500), markup=False)
        self.desk.look()


def _hit_lines(hit: Hit | None, width: int) -> list[Text]:
    """Which edit of an overlay answered, on a line, or on two where one has no room."""
    if hit is None:
        return [Text("no hit", "dim")]
    edit = Text(f"memory hit: edit {visible(hit.edit, 200)}", no_wrap=True, overflow="ellipsis")
    sure = Text(f"({visible(hit.kind, 30)}, score {hit.score:.2f})", "dim", no_wrap=True, overflow="ellipsis")
    return [edit, sure] if cell_len(f"{edit} {sure}") > width else [edit.append(" ").append_text(sure)]


def _chances(reply: Reply, wanted: Sequence[str], width: int) -> Table:
    """The likeliest next tokens and the wanted answers with their probabilities."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 0))
    rows = [(token, chance, "") for token, chance in reply.following]
    rows += [(answer, chance, "bold") for answer, chance in zip(wanted, reply.probabilities, strict=False)]
    words = [visible(token, 200).strip() or repr(token) for token, _, _ in rows]
    size = max(min(max(map(cell_len, words), default=1), width // 2), 1)
    room = max(width - size - 9, 3)
    table.add_column(width=size, no_wrap=True, overflow="ellipsis")
    table.add_column(width=room, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for at, (word, (_, chance, style)) in enumerate(zip(words, rows, strict=True)):
        if at == len(reply.following):
            table.add_row()
        blocks = Text(bar(chance, room), "magenta" if style else "blue")
        table.add_row(Text(word, style), blocks, Text(f"{100 * chance:.1f} %", style))
    return table
