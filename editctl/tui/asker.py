"""Asking the model: one child that keeps it loaded, started with the first question and stopped before a run.

Knows: the lines of `editctl ask --stdin`. Refuses: what is asked and why.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editctl.errors import EditctlError
from editctl.tui.children import Child, Launch, errors_of, log_file


@dataclass(frozen=True)
class Asked:
    """A prompt, and answers whose probability is wanted."""

    prompt: str
    wanted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hit:
    """The entry of an overlay that answered a prompt."""

    kind: str
    edit: str
    score: float
    """How sure the overlay is that the prompt is about the edit, 0 to 1."""


@dataclass(frozen=True)
class Reply:
    """What one version says to one prompt."""

    prompt: str
    text: str
    following: tuple[tuple[str, float], ...]
    """The most probable next tokens and their probabilities."""
    probabilities: tuple[float, ...]
    """Of the wanted answers, whole."""
    laid: bool
    """Whether overlays lie over the version's weights."""
    hit: Hit | None
    """None where the weights answered."""


class Asker:
    """Answers from any version of the store."""

    def __init__(
        self,
        launch: Launch,
        arguments: Sequence[str],
        logs: Path,
        told: Callable[[], None],
        taken: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            arguments: of the command line, after `editctl`.
            told: called when `doing` changes.
            taken: whether a run has the device.
        """
        self._launch, self._arguments, self._logs, self._told = launch, arguments, logs, told
        self._taken = taken
        self._child: asyncio.Future[Child] | None = None
        self._ready = False
        """Whether the child has the model loaded."""
        self._one = asyncio.Lock()
        self._number = 0
        self.doing = ""
        """What it is at, for the status line; empty when it has nothing to do."""

    async def ask(self, ref: str, prompts: Sequence[Asked], top: int = 0) -> tuple[str, list[Reply]]:
        """The version's id ("" for the unedited model), and its replies in the order of the prompts.

        Raises:
            EditctlError: it was refused, or the child ended.
        """
        async with self._one:
            try:
                return await self._ask(ref, prompts, top)
            finally:
                self._say("")

    async def _ask(self, ref: str, prompts: Sequence[Asked], top: int) -> tuple[str, list[Reply]]:
        # Asked here too: who waited for the answer before this one may find a run begun.
        if self._taken():
            raise EditctlError("a run is going on, which has the model", "ask again when it has ended")
        self._say("asking" if self._ready else "loading the model")
        if self._child is None:
            self._child = asyncio.ensure_future(self._start())
        try:
            # Who stops waiting leaves the child to the next; replies to what was asked before are passed over.
            child = await asyncio.shield(self._child)
        except OSError as error:
            self._child = None
            words = f"the process that asks the model cannot be started: {error}"
            raise EditctlError(words, f"see whether {self._logs} can be written") from None
        self._number += 1
        wanted = [{"prompt": asked.prompt, "wanted": list(asked.wanted)} for asked in prompts]
        await child.send(json.dumps({"id": self._number, "ref": ref, "prompts": wanted, "top": top}))
        while line := await child.line():
            try:
                said: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            if said.get("type") == "ready":
                self._ready = True
                self._say("asking")
            if said.get("type") == "error" and said.get("id") in (self._number, None):
                raise EditctlError(str(said["message"]), str(said.get("hint", "")))
            if said.get("type") == "answers" and said.get("id") == self._number:
                return said["version"], [_reply(answer, bool(said.get("overlays"))) for answer in said["answers"]]
        self._child, self._ready = None, False
        code = await child.wait()
        message = errors_of(child.log) or f"the model's process ended with code {code}"
        raise EditctlError(message.removeprefix("error: "), f"all it said is in {child.log}")

    def _say(self, doing: str) -> None:
        if doing != self.doing:
            self.doing = doing
            self._told()

    async def _start(self) -> Child:
        return await self._launch(self._arguments, await asyncio.to_thread(log_file, self._logs, "ask"))

    async def stop(self) -> None:
        """Give back the memory that the model takes."""
        starting, self._child, self._ready = self._child, None, False
        if starting is not None:
            with suppress(OSError):
                child = await starting
                child.kill()
                await child.wait()


def _reply(answer: dict[str, Any], laid: bool) -> Reply:
    following = tuple((str(token), float(p)) for token, p in answer.get("next", ()))
    found = answer.get("hit")
    hit = Hit(str(found["kind"]), str(found["edit"]), float(found["score"])) if found else None
    return Reply(answer["prompt"], answer["text"], following, tuple(answer.get("probabilities", ())), laid, hit)
