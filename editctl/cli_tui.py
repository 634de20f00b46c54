"""The verb that opens the terminal UI, here or in a browser.

Knows: whether there is a terminal, and what to do without one. Refuses: what is shown; textual is imported where it
begins.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from editctl.errors import EditctlError, InvalidInput
from editctl.flags import from_flags, from_gates, from_method
from editctl.workspace import Workspace


@click.command()
@click.option("--readonly", is_flag=True, help="Only look: nothing can be changed.")
@click.option("--serve", is_flag=True, help="Open it in a browser on this machine, also through an ssh tunnel.")
@click.option("--port", type=click.IntRange(1, 65_535), help="Port of --serve (default: 8000).")
@from_gates
@from_flags
@from_method
@click.pass_obj
def tui(space: Workspace, /, readonly: bool, serve: bool, port: int | None, **flags: Any) -> None:
    """Open the terminal UI: specs, plan, run, review, history, ask."""
    if port is not None and not serve:
        raise InvalidInput("--port is for --serve", "add --serve, or leave --port away")
    if serve:
        _serve(port or 8000)
        return
    open_tui(space.with_flags(**flags), readonly=readonly)


def open_tui(space: Workspace, *, readonly: bool = False) -> None:
    """Open the UI on this terminal.

    Raises:
        InvalidInput: there is none, or the configuration names keys or a theme that do not exist.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()) and not _served():
        raise InvalidInput(
            "the terminal UI needs a terminal", "in scripts use the other verbs; `editctl -h` lists them"
        )
    from editctl.tui.app import EditctlApp

    if space.config.keys or space.config.theme:
        from editctl.tui.keys import check

        check(space)
    EditctlApp(space, readonly=readonly).run()


def _served() -> bool:
    """Whether textual-serve started this."""
    import os

    return os.environ.get("TEXTUAL_DRIVER", "") != ""


def _serve(port: int) -> None:
    """Serve the UI to browsers on this machine alone; each opens it anew."""
    try:
        from aiohttp import web
        from textual_serve.server import Server
    except ImportError:
        raise EditctlError("--serve needs textual-serve", 'pip install "editctl[serve]"') from None

    class Own(Server):
        """Answers its own page alone: a browser lets any site open a socket to this machine."""

        async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
            names = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
            if request.host not in names or request.headers.get("Origin") not in {f"http://{name}" for name in names}:
                raise web.HTTPForbidden(text="open the page that editctl serves")
            return await super().handle_websocket(request)

    words = [word for word in sys.argv[1:] if word != "--serve"]
    at = next((i for i, word in enumerate(words) if word == "--port"), None)
    words = words[:at] + words[at + 2 :] if at is not None else [w for w in words if not w.startswith("--port=")]
    command = shlex.join([sys.executable, "-m", "editctl", *words])
    click.echo(f"http://127.0.0.1:{port} (this machine only; from afar: ssh -L {port}:127.0.0.1:{port} HOST)", err=True)
    Own(command, host="127.0.0.1", port=port, title=f"editctl {Path.cwd().name}").serve()


verbs = (tui,)
"""What the command line adds."""
