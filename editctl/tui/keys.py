"""`[keys]` and `theme` of editctl.toml, held against what there is.

Knows: the names of all keys, and keys that no terminal tells apart. Refuses: what the keys do.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from textual.binding import Binding
from textual.dom import DOMNode
from textual.theme import BUILTIN_THEMES

from editctl import config as config_room
from editctl.errors import InvalidInput, Problem
from editctl.spec import visible
from editctl.tui import dialogs, form, found, heatmap, importing, place, replay, rows, tasks
from editctl.tui.app import EditctlApp, place_class
from editctl.tui.place import PLACES
from editctl.workspace import Workspace

SAME = {"ctrl+j": "return", "ctrl+m": "return", "ctrl+i": "tab", "ctrl+h": "backspace"}
"""Keys that most terminals send as another one."""
TAKEN = {"ctrl+q": "leaving", "ctrl+p": "the palette", "ctrl+c": "copying", "tab": "the next field"}
"""Keys that are the same everywhere."""


def known() -> Iterator[tuple[str, Binding]]:
    """Every key that can be given another: where it is had, and what it is."""
    places = [(name, place_class(name).BINDINGS) for name in PLACES]
    others: tuple[type[DOMNode], ...] = (EditctlApp, place.Place, place.Pane, rows.RowList, rows.Finder)
    others += (dialogs.Question, dialogs.Line, dialogs.Pick, dialogs.Viewer, form.EditForm)
    others += (tasks.Task, replay.Replay, heatmap.HeatMap)
    others += (importing.ImportForm, importing.Choice, found.Outcome)
    for where, bindings in (*places, *((one.__name__, one.BINDINGS) for one in others)):
        for binding in bindings:
            if isinstance(binding, Binding) and binding.id:
                yield where, binding


def check(space: Workspace) -> None:
    """Make sure that every name of a key and the theme exist, and that no two keys of a place are the same.

    Raises:
        InvalidInput: with file and line of each that does not.
    """
    path = space.config_path
    problems = []
    bindings = list(known())
    names = {binding.id for _, binding in bindings if binding.id}

    def problem(where: tuple[str, ...], message: str, hint: str) -> None:
        file = str(path or config_room.FILE)
        problems.append(Problem(file, config_room.line_of(path, where), message, hint))

    wanted = space.config.keys
    for name, keys in wanted.items():
        near = get_close_matches(name, names, 1)
        if name not in names:
            hint = f"did you mean {near[0]}?" if near else "`?` in the UI shows the names"
            problem(("keys", name), f"there is no key {visible(name)}", hint)
        for key in map(str.strip, keys.split(",")):
            if not key:
                problem(("keys", name), f"{visible(name)} has no key", 'write a key, for example "space" or "ctrl+t"')
            elif key in SAME:
                problem(("keys", name), f"terminals send {key} as {SAME[key]}", "choose another key")
            elif key in TAKEN:
                problem(("keys", name), f"{key} is {TAKEN[key]} everywhere", "choose another key")
    confirming = {key.strip() for key in wanted.get("question.yes", "y").split(",")}
    asking = {
        key.strip(): binding.id
        for at, binding in bindings
        if binding.id and at in PLACES and binding.action.partition("(")[0] in place_class(at).CHANGES
        for key in wanted.get(binding.id, binding.key).split(",")
    }
    for key in sorted(confirming & ({"enter"} | set(asking))):
        what = f"is the key of {asking[key]}, which asks" if key in asking else "is what no answers to"
        told = "question.yes" if "question.yes" in wanted else asking[key]
        message = f"{visible(key)} would be yes to a question and {what}"
        problem(("keys", told), message, "yes must be a key that does not ask")
    lists = {"Pane", "RowList", "Finder"}
    groups = [(where, {where, "EditctlApp", "Place", *lists}) for where in PLACES]
    groups += [(at, {at}) for at in dict.fromkeys(at for at, _ in bindings) if at not in (*PLACES, *lists)]
    for where, rooms in groups:
        taken: dict[str, str] = {}
        for at, binding in bindings:
            if at not in rooms or binding.id is None:
                continue
            for key in map(str.strip, wanted.get(binding.id, binding.key).split(",")):
                other = taken.setdefault(key, binding.id)
                if other != binding.id and (binding.id in wanted or other in wanted):
                    told = binding.id if binding.id in wanted else other
                    message = f"{visible(key)} would be {visible(other)} and {visible(binding.id)} in {where}"
                    problem(("keys", told), message, "give one of them another key")
    theme = space.config.theme
    if theme and theme not in BUILTIN_THEMES:
        near = get_close_matches(theme, BUILTIN_THEMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(BUILTIN_THEMES)}"
        problem(("theme",), f"there is no theme {visible(theme)}", hint)
    if problems:
        raise InvalidInput("the configuration of the terminal UI is not valid", problems=list(dict.fromkeys(problems)))
