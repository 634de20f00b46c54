"""What `?` shows: what a place is for, and every key it has now.

Knows: bindings. Refuses: what they do.
"""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual.binding import Binding
from textual.screen import Screen

from editctl.tui.place import Place


def help_of(screen: Screen[object], display: Callable[[Binding], str]) -> RenderableType:
    """The place in a few sentences, then its keys with the name under which `[keys]` can give each another key."""
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    table.add_column("key", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    table.add_column(Text("name in [keys]"), no_wrap=True)
    keys: dict[tuple[str, str], list[str]] = {}
    # What is had in every list comes after what is had here.
    found = sorted((active.binding for active in screen.active_bindings.values()), key=_common)
    for binding in found:
        if binding.id and not binding.system:
            what = binding.tooltip or binding.description
            keys.setdefault((what, binding.id), []).append(display(binding))
    for (what, name), shown in keys.items():
        table.add_row(Text(" ".join(dict.fromkeys(shown)), "bold"), Text(what), Text(name, "dim"))
    about = screen.ABOUT if isinstance(screen, Place) else ""
    return Group(Text(about), Text(), table)


def _common(binding: Binding) -> bool:
    return (binding.id or "").startswith(("list.", "pane."))
