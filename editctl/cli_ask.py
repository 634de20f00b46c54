"""The verb that asks the model: one prompt at several versions, or one request after another from standard input.

Knows: the lines that `ask --stdin` reads and writes. Refuses: to compute; the engine is imported where it asks.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import click

from editctl import talk
from editctl.errors import EditctlError, Exit, InvalidInput, StoreError
from editctl.flags import as_json, from_flags
from editctl.workspace import Workspace

if TYPE_CHECKING:
    from editctl.engine.model import Editing, Model
    from editctl.engine.overlay import Hit
    from editctl.store import Store, Version

MAX_BYTES, MAX_PROMPTS, MAX_WANTED, MAX_TOP, MAX_REF = 10_000_000, 10_000, 100, 50, 100
"""Most bytes of a request's line, prompts of it, wanted answers of a prompt, next tokens, characters of a ref."""
_EXAMPLE = 'for example {"id": 1, "prompts": [{"prompt": "The Eiffel Tower stands in", "wanted": ["Rome"]}]}'


class _Said(NamedTuple):
    """What a version says to a prompt."""

    text: str
    following: list[tuple[str, float]]
    """The likeliest next tokens."""
    probabilities: list[float]
    """Of each wanted answer."""
    hit: Hit | None
    """The entry of an overlay that answered."""

    @property
    def answered_by(self) -> dict[str, Any] | None:
        """The hit as JSON values."""
        return asdict(self.hit) if self.hit else None


@dataclass(frozen=True)
class _Request:
    """What a line asks."""

    ref: str
    prompts: list[str]
    wanted: list[list[str]]
    """For each prompt the answers whose probability is asked."""
    top: int


@click.command()
@click.argument("prompt", required=False)
@click.argument("refs", nargs=-1)
@click.option("--top", type=click.IntRange(1, MAX_TOP), default=3, help="How many next tokens to show.")
@click.option("--sent", is_flag=True, help="Show what is read instead of the prompt where an overlay says so.")
@click.option("--stdin", "from_stdin", is_flag=True, help="Answer requests, one JSON object a line, until their end.")
@as_json
@from_flags
@click.pass_obj
def ask(
    space: Workspace,
    /,
    prompt: str | None,
    refs: tuple[str, ...],
    top: int,
    sent: bool,
    from_stdin: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Ask the model, base and head side by side or at the versions named.

    Where overlays lie over a version's weights, the edit that answered is named. With --stdin the model is loaded once,
    at the first request, and each line of standard input is answered with one line.
    """
    space = space.with_flags(**flags)
    if from_stdin and prompt is not None:
        raise click.UsageError("--stdin reads the prompts; leave PROMPT away")
    if from_stdin:
        _answer_lines(space, top)
    elif prompt is None:
        raise click.UsageError("Missing argument 'PROMPT' (or --stdin, which reads requests).")
    else:
        _ask_once(space, _text(prompt), refs, top, sent, as_json)


def _ask_once(space: Workspace, prompt: str, refs: tuple[str, ...], top: int, sent: bool, as_json: bool) -> None:
    """Ask one prompt and show the answers side by side."""
    from editctl import report

    if not prompt.strip():
        raise InvalidInput("the prompt is empty", 'for example: editctl ask "The Eiffel Tower stands in"')
    store = space.store()
    asked = refs or (("base", "@") if store.head() else ("base",))
    versions = [(ref, store.resolve(ref)) for ref in asked]
    model = space.made_for([version for _, version in versions]).load()
    from editctl.engine import wear

    found: list[tuple[str, str, list[str], _Said]] = []
    for ref, version in versions:
        with wear.wearing(model, store, version) as editing:
            said = _say(model, [prompt], [[]], top)[0]
            found.append((ref, version.id if version else "", _overlays(editing), said))
    if as_json:
        rows = []
        for ref, name, overlays, said in found:
            row = {"type": "answer", "ref": ref, "version": name, "text": said.text, "next": said.following}
            rows.append({**row, "prompt": prompt, "overlays": overlays, "hit": said.answered_by})
        talk.lines(*rows)
        return
    for ref, name, overlays, said in found:
        likely = "  ".join(f"{report.safe(token, 30)} {100 * p:.1f} %" for token, p in said.following)
        click.echo(f"{report.safe(ref)} ({report.short(name)}): {report.safe(said.text)}")
        click.echo(f"    next: {likely}")
        if overlays:
            click.echo(f"    {_hit_line(said.hit)}")
        if sent and said.hit and said.hit.sent not in ("", prompt):
            # A mark before each line, so that none can pass for one of ours.
            for line in said.hit.sent.split("\n"):
                click.echo(f"    | {report.safe(line)}")


def _overlays(editing: Editing) -> list[str]:
    """The kinds of overlay that a version has, in the order in which they were laid."""
    return list(dict.fromkeys(overlay.kind for overlay in editing.overlays))


def _hit_line(hit: Hit | None) -> str:
    """Which edit of an overlay answered, and how sure it is that it was asked about."""
    from editctl import report

    if hit is None:
        return "no hit"
    return f"memory hit: edit {report.safe(hit.edit, 200)} ({report.safe(hit.kind, 30)}, score {hit.score:.2f})"


def _say(model: Model, prompts: Sequence[str], wanted: Sequence[Sequence[str]], top: int) -> list[_Said]:
    """What the model as it is says to prompts."""
    from editctl.engine import families, speak

    words = speak.answers(model, prompts)
    following = speak.next_tokens(model, prompts, top) if top else [[] for _ in prompts]
    pairs = [(prompt, answer) for prompt, answers in zip(prompts, wanted, strict=True) for answer in answers]
    found = iter(score.probability for score in speak.scores(model, pairs))
    chances = [[next(found) for _ in answers] for answers in wanted]
    return list(map(_Said, words, following, chances, families.hits(model, prompts)))


def _text(text: str) -> str:
    """Text as tokenizers take it: halves of characters, which JSON and arguments may hold, are none."""
    return text.encode("utf-8", "replace").decode()


# ---------------------------------------------------------------------------------------------------------------------
# Requests, one a line


class _Speaker:
    """Answers requests with one model: loaded at the first, and again for a version made in another dtype. The
    version asked last stays on it."""

    def __init__(self, space: Workspace, store: Store, worn: ExitStack) -> None:
        self._space = space
        self._store = store
        self._worn = worn
        self._wearing: str | None = None
        self._overlays: list[str] = []
        """Kinds of the version that is on."""
        self._model: Model | None = None
        self._base = ""
        """Content of the model that is loaded."""
        self._told = False

    def answer(self, request: _Request) -> dict[str, Any]:
        """The answers to a request.

        Raises:
            EditctlError: it cannot be answered.
        """
        version = self._store.resolve(request.ref)
        name = version.id if version else ""
        model = self._loaded(version)
        from editctl.engine import wear

        if self._wearing != name:
            self._take_off()
            self._overlays = _overlays(self._worn.enter_context(wear.wearing(model, self._store, version)))
            self._wearing = name
        said = zip(request.prompts, _say(model, request.prompts, request.wanted, request.top), strict=True)
        answers = [
            {
                "prompt": prompt,
                "text": one.text,
                "next": one.following,
                "probabilities": one.probabilities,
                "hit": one.answered_by,
            }
            for prompt, one in said
        ]
        return {"ref": request.ref, "version": name, "overlays": self._overlays, "answers": answers}

    def _loaded(self, version: Version | None) -> Model:
        """The model that a version can be asked on; the unedited one is asked in the dtype that is there."""
        if self._model is not None and self._fits(self._model, version):
            return self._model
        first = version or self._store.head()
        space = self._space
        try:
            space = self._space.made_for([first])
        except StoreError:
            if version is not None:
                raise
            # The head is of another model; the unedited one of this workspace can be asked all the same.
            first = None
        self._take_off()
        if self._model is not None:
            self._model = None
            gc.collect()
        self._base = first.base if first else space.source()[1]
        self._model = space.load()
        # From now on versions of this model alone are asked.
        self._space = self._space.with_flags(model=space.config.model)
        if not self._told:
            self._told = True
            where, dtype = str(self._model.device), str(self._model.dtype)
            talk.line({"type": "ready", "model": space.config.model, "device": where, "dtype": dtype})
        return self._model

    def _fits(self, model: Model, version: Version | None) -> bool:
        if version is None:
            return True
        given = self._space.config.dtype != "auto"
        return version.base == self._base and (given or version.dtype == str(model.dtype))

    def _take_off(self) -> None:
        self._wearing = None
        self._worn.close()


def _answer_lines(space: Workspace, top: int) -> None:
    """Answer each line of standard input with one line of standard output."""
    from editctl.events import json_line

    source = getattr(sys.stdin, "buffer", None)
    if source is None:
        raise InvalidInput("there is no standard input to read requests from", "pipe them into the command")
    store = space.store()
    talk.lines()
    # A key that ends the loop is no accident to speak of.
    with ExitStack() as worn:
        speaker = _Speaker(space, store, worn)
        try:
            for line in _lines(source):
                try:
                    reply = json_line(_reply(speaker, line, top))
                except RecursionError:
                    deep = InvalidInput("the request is nested too deeply", _EXAMPLE)
                    reply = json_line(_refusal(None, deep))
                click.echo(reply)
        except KeyboardInterrupt:
            raise SystemExit(Exit.INTERRUPTED) from None


def _lines(source: BinaryIO) -> Iterator[bytes | None]:
    """The lines that are not blank; None for each that is too long."""
    while line := source.readline(MAX_BYTES + 1):
        if len(line) > MAX_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = source.readline(MAX_BYTES)
            yield None
        elif line.strip():
            yield line


def _reply(speaker: _Speaker, line: bytes | None, top: int) -> dict[str, Any]:
    """What is answered to a line."""
    name = None
    try:
        data = _parsed(line)
        name = data.get("id")
        return {"type": "answers", "id": name, **speaker.answer(_request(data, top))}
    except EditctlError as error:
        return _refusal(name, error)


def _refusal(name: Any, error: EditctlError) -> dict[str, Any]:
    return {"type": "error", "id": name, "message": error.message, "hint": error.hint}


def _parsed(line: bytes | None) -> dict[str, Any]:
    """A line as the object it is.

    Raises:
        InvalidInput: it is none.
    """
    from editctl.spec import visible

    if line is None:
        raise InvalidInput(f"a line is longer than {MAX_BYTES // 1_000_000} MB", "ask fewer prompts at once")
    try:
        # What no JSON can say would come back as no JSON.
        data = json.loads(line.decode("utf-8-sig"), parse_constant=_number, parse_float=_number)
    except ValueError as error:
        raise InvalidInput(f"the line is not JSON: {visible(str(error), 200)}", _EXAMPLE) from None
    if not isinstance(data, dict):
        raise InvalidInput("a request is a JSON object", _EXAMPLE)
    return data


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number of JSON or too large")
    return value


def _request(data: dict[str, Any], top: int) -> _Request:
    """The request of an object.

    Raises:
        InvalidInput: it is none.
    """
    _known(data, "request", "id", "ref", "prompts", "top")
    ref, count, asked = data.get("ref", "@"), data.get("top", top), data.get("prompts")
    if not isinstance(ref, str) or len(ref) > MAX_REF:
        raise InvalidInput(f"ref is no text of at most {MAX_REF} characters", 'for example "@", "base" or a version id')
    if type(count) is not int or not 0 <= count <= MAX_TOP:
        raise InvalidInput(f"top is no whole number from 0 to {MAX_TOP}", "it says how many next tokens are shown")
    if not isinstance(asked, list):
        raise InvalidInput("prompts is no list", _EXAMPLE)
    if len(asked) > MAX_PROMPTS:
        raise InvalidInput(f"{len(asked)} prompts are more than {MAX_PROMPTS}", "ask them in several requests")
    prompts, wanted = [], []
    for number, item in enumerate(asked, 1):
        which = f"prompt {number}"
        if not isinstance(item, dict):
            raise InvalidInput(f"{which} is no JSON object", _EXAMPLE)
        _known(item, which, "prompt", "wanted")
        answers = item.get("wanted", [])
        if not isinstance(answers, list) or len(answers) > MAX_WANTED:
            raise InvalidInput(f"wanted of {which} is no list of at most {MAX_WANTED} texts", _EXAMPLE)
        texts = [item.get("prompt"), *answers]
        for text, what in zip(texts, (which, *[f"a wanted answer of {which}"] * len(answers)), strict=True):
            if not isinstance(text, str):
                raise InvalidInput(f"{what} is no text", _EXAMPLE)
            if not text.strip():
                raise InvalidInput(f"{what} is empty", _EXAMPLE)
        first, *others = map(_text, texts)
        prompts.append(first)
        wanted.append(others)
    return _Request(ref, prompts, wanted, count)


def _known(data: dict[str, Any], what: str, *names: str) -> None:
    """Make sure that an object has no other keys.

    Raises:
        InvalidInput: it has one.
    """
    from editctl.spec import visible

    if unknown := [key for key in data if key not in names]:
        raise InvalidInput(f"unknown key {visible(unknown[0])} of {what}", f"known keys: {', '.join(names)}")


verbs = (ask,)
"""What the command line adds to its group."""
