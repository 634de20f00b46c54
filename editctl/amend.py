"""How one edit of a spec file is added, changed or taken out without losing a comment.

Knows: where the table of an edit begins and ends, which comments go with it, and how an edit is written in TOML.
Refuses: to write what does not read back with every other edit as it was, to guess which of two edits of one id is
meant, and to tell what is wrong with an edit, which `spec` does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from editctl import toml
from editctl.errors import InvalidInput, Problem
from editctl.spec import (
    KEYS,
    REQUIRED,
    TOKEN,
    VERSION,
    Edit,
    NotToml,
    Probe,
    Reader,
    nearest,
    parse,
    quoted,
    read,
    slug,
)


def save(path: Path, edit: Edit, replacing: str = "") -> None:
    """Add the edit to the file, made if absent, or replace the one whose id is `replacing`; the rest stays as it is.

    Raises:
        InvalidInput: the file cannot be changed, lacks `replacing`, already has the id or is of another method, or the
            edit has a problem of its own.
    """
    path = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    known, edit = _known(path), _named(edit)
    if edit.id != replacing and any(old.id == edit.id for _, old in known.edits):
        raise InvalidInput(f"{path} already has an edit {quoted(edit.id)}", "give the new one another id")
    after, at = _with(path, known, edit, replacing)
    # read back before the file is touched: what the writer gets wrong costs a message, never an edit
    reread = Reader(str(path), after)
    if at in reread.faulty or edit.to_json() not in [new.to_json() for index, new in reread.edits if index == at]:
        raise InvalidInput(
            f"{path} cannot hold the edit as it is", "mend the edit, or change the file in an editor", reread.problems
        )
    _replace(path, after.encode())


def text_with(path: Path, edit: Edit, replacing: str = "") -> str:
    """What the file would hold after `save`, whatever problems the edit has; nothing is written.

    Raises:
        InvalidInput: the file cannot be changed, lacks `replacing` or is of another method.
    """
    path = Path(os.path.realpath(path))
    return _with(path, _known(path), _named(edit), replacing)[0]


def remove(path: Path, edit_id: str) -> None:
    """Take the edit out of the file, and the comment directly above it; every other comment stays, on its own line.

    Raises:
        InvalidInput: the file cannot be changed, lacks the edit or does not write it as an [[edit]] table.
    """
    path = Path(os.path.realpath(path))
    known = _known(path)
    at, _ = _found(path, known, edit_id)
    table = _table(known.text, at)
    after = None if table is None else _without(known.text, table)
    # read back before the file is touched, as in `save`
    if after is None or not _keeps_others(known.text, after, at, left=0):
        raise InvalidInput(f"{path} does not hold the edit in a table of its own", "take it out in an editor")
    _replace(path, after.encode())


def head(method: str = "") -> str:
    """How a file begins; what follows is one `table` after another, an empty line before each."""
    return f"version = {toml.text(VERSION)}\n" + (f"method = {toml.text(method)}\n" if method else "")


def table(edit: Edit) -> str:
    """The edit as an [[edit]] table, without what the format assumes anyway."""
    return "[[edit]]\n" + "".join(f"{name} = {_value(edit, name)}\n" for name in _written(edit))


def _written(edit: Edit) -> list[str]:
    """The keys that a table of the edit needs."""
    own_id = edit.id != slug(edit.subject, edit.relation)
    return [name for name in KEYS if name in REQUIRED or (getattr(edit, name) and (name != "id" or own_id))]


def _value(edit: Edit, name: str) -> str:
    """The TOML text of one key's value."""
    value = getattr(edit, name)
    if name == "extra":
        return toml.text(toml.held(json.loads(value)) if value else {})
    return toml.lines([_plain(item) for item in value]) if isinstance(value, tuple) else toml.text(value)


def _plain(item: str | Probe) -> Any:
    """An item of a list, a probe as a text where its prompt is all it has."""
    if isinstance(item, str):
        return item
    fields = {name: part for name, part in item.model_dump().items() if part or name == "prompt"}
    if len(item.answer) == 1:
        fields["answer"] = item.answer[0]
    return fields if len(fields) > 1 else item.prompt


def _named(edit: Edit) -> Edit:
    return edit if edit.id else edit.model_copy(update={"id": slug(edit.subject, edit.relation)})


def _known(path: Path) -> Reader:
    """The file as it stands; one that is not there is an empty one."""
    problems: list[Problem] = []
    text = read(path, problems) if path.exists() else ""
    known = Reader(str(path), text or "")
    if text is None or not known.parsed:
        raise InvalidInput(f"{path} cannot be changed", "mend it first", problems + known.problems)
    return known


def _found(path: Path, known: Reader, edit_id: str) -> tuple[int, Edit]:
    """The edit of this id, with its position among all of the file."""
    found = [(at, edit) for at, edit in known.edits if edit_id and edit.id == edit_id]
    if not found:
        hint = nearest(edit_id, [edit.id for _, edit in known.edits if edit.id])
        raise InvalidInput(f"{path} has no edit {quoted(edit_id)}", hint)
    if len(found) > 1:
        message = f"{path} has {len(found)} edits {quoted(edit_id)}"
        raise InvalidInput(message, "give each an id of its own in an editor")
    return found[0]


def _with(path: Path, known: Reader, edit: Edit, replacing: str) -> tuple[str, int]:
    """The text of the file with the edit in place of the replaced one, or at its end, and the edit's position there."""
    replaced = _found(path, known, replacing) if replacing else None
    if known.text and edit.method != known.method:
        told = f"the method {quoted(known.method)}" if known.method else "no method of its own"
        raise InvalidInput(f"{path} is for {told}", "save the edit to a file of its own")
    before = known.text or head(edit.method)
    at = replaced[0] if replaced else len(_values(before)[1])
    after = _changed(before, edit, replaced)
    if after is None or not _keeps_others(before, after, at, left=1):
        raise InvalidInput(f"{path} cannot hold the edit as it is", "change the file in an editor")
    return after, at


def _values(text: str) -> tuple[dict[str, Any], list[Any]]:
    """The values of a file beside its edits, and its edits; what is called so and is no list is beside them."""
    data = parse(text)
    return data, data.pop("edit") if isinstance(data.get("edit"), list) else []


def _keeps_others(before: str, after: str, at: int, left: int) -> bool:
    """Whether all stays but the edit at a position, in whose place 0 or 1 are left."""
    try:
        (data, edits), (new_data, new_edits) = _values(before), _values(after)
    except NotToml:
        return False
    return new_data == data and new_edits[:at] == edits[:at] and new_edits[at + left :] == edits[at + 1 :]


class _Table(NamedTuple):
    """Where the table of an edit stands: its comment, its header, and the comment or header after it."""

    begin: int
    header: int
    end: int


_OWN = re.compile(r"""\[\[[ \t]*(?:edit|"edit"|'edit')[ \t]*\]\]""")
_INSIDE = re.compile(r"""\[\[?[ \t]*(?:edit|"edit"|'edit')[ \t]*\.""")


def _table(text: str, at: int) -> _Table | None:
    """The table of the edit at a position; None when the edits are written in another way."""
    count, depth, last = 0, 0, ""
    begin = header = -1
    for match in TOKEN.finditer("\n" + text):
        token, start = match[0], match.start() - 1
        if token == "[" and not depth and last[:1] == "\n" and not _INSIDE.match(text, start):
            *lines, indent = last.split("\n")[1:]
            above = takewhile(lambda line: line.lstrip().startswith("#"), reversed(lines))
            before = start - len(indent) - sum(len(line) + 1 for line in above)
            if header >= 0:
                return _Table(begin, header, before)
            if _OWN.match(text, start):
                if count == at:
                    begin, header = before, start
                count += 1
        depth += (token in "[{") - (token in "]}")
        last = token
    return _Table(begin, header, len(text)) if header >= 0 else None


def _without(text: str, table: _Table) -> str:
    """The text with nothing of the table but its comments, and no more empty lines than the rest needs."""
    above, own, below = text[: table.begin], text[table.header : table.end], text[table.end :]
    between = _comments(own)
    if between:
        # an empty line, lest the next edit takes the comment for its own
        between += "\n\n" if below else "\n"
    elif not below:
        above = above[: _last_word(above)]
    elif above and _last_word(above) == len(above) and _last_word(own) < len(own):
        between = "\n"
    return above + _line_ends(between, text) + below


def _last_word(text: str) -> int:
    """Where the empty lines at the end of a text begin."""
    end = text.find("\n", len(text.rstrip(" \t\r\n")))
    return len(text) if end < 0 else end + 1


def _comments(table: str) -> str:
    """The comments in the text of a table, each on a line, with an empty line where some stood between two."""
    lines: list[str] = []
    for match in TOKEN.finditer(table):
        if match[0][0] in "#\n":
            # behind the last line end stands a comment that ends the file, or what indents the next token
            *whole, rest = (line.strip(" \t\r") for line in match[0].split("\n"))
            lines += whole[1:] + [rest] * bool(rest)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _line_ends(made: str, text: str) -> str:
    """What was made, with line ends as the text has them."""
    return re.sub(r"(?<!\r)\n", "\r\n", made) if "\r\n" in text else made


def _changed(before: str, edit: Edit, replaced: tuple[int, Edit] | None) -> str | None:
    """The text of a file with the edit in place of the replaced one, or at its end; None when it cannot be written."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError
    from tomlkit.items import AoT, Table

    written = _written(edit)
    try:
        if replaced is None:
            above, below = before.rstrip("\r\n"), ""
            made = "\n\n" + table(edit)
        else:
            index, old = replaced
            place = _table(before, index)
            # tomlkit takes 2.5 s for a file of 10,000 edits, so it is given no more than the one
            first, last = (place.begin, place.end) if place else (0, len(before))
            above, below = before[:first], before[last:]
            document = tomlkit.parse(before[first:last])
            found = document["edit"][0 if place else index]
            added = [name for name in written if name not in found]
            for name in KEYS:
                if name in added or (name in found and getattr(edit, name) != getattr(old, name)):
                    found[name] = tomlkit.value(_value(edit, name))
                    if not getattr(edit, name) and name not in REQUIRED:
                        del found[name]
            # tomlkit puts new keys below the comments and blank lines that lead to the next edit
            body = found.value.body
            kept = [entry for entry in body if entry[0] is None or entry[0].key not in added]
            plain = [at for at, (key, item) in enumerate(kept, 1) if key and not isinstance(item, Table | AoT)]
            new = [entry for entry in body if entry[0] is not None and entry[0].key in added]
            body[:] = kept[: max(plain, default=0)] + new + kept[max(plain, default=0) :]
            made = tomlkit.dumps(document)
    except (TOMLKitError, ValueError, RecursionError):
        return None
    # half a character cannot be written; in its place stands a question mark
    return (above + _line_ends(made, before) + below).encode(errors="replace").decode()


def _replace(path: Path, data: bytes) -> None:
    """Write the file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}", "name a file that you may write") from error
    finally:
        temporary.unlink(missing_ok=True)
