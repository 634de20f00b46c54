"""Rows as values, and the questions that take more than one row to answer.

Knows: SQL over an open database: refs, chains of versions, the line of operations. Refuses: files, locks, transactions.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from editctl.errors import StoreError
from editctl.metrics.values import Answer, Metric
from editctl.store.records import BASE, CANDIDATE, Evidence, LiveEdit, Operation, Stored, Version, View

if TYPE_CHECKING:
    from sqlite_utils import Database

_AT = re.compile(r"@(?:-([0-9]{0,6}))?")
_ID = re.compile(r"[0-9a-f]{1,12}")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHORTEST_PREFIX = 4


def plain(value: Any) -> Any:
    """A value as one column holds it: containers as JSON, keys in the order given."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else value


def _check(row: dict[str, Any]) -> None:
    """Make sure that a row of versions or operations has all its values.

    Raises:
        ValueError: a damaged page took one.
    """
    if None in row.values():
        raise ValueError("a value is missing")


# ---------------------------------------------------------------------------------------------------------------------
# Versions


def _version(row: dict[str, Any]) -> Version:
    _check(row)
    parsed = {name: json.loads(row[name]) for name in ("params", "libraries", "seconds", "norms", "gates")}
    parsed["norms"] = {module: (update, weight) for module, (update, weight) in parsed["norms"].items()}
    return Version(**{f.name: parsed.get(f.name, row[f.name]) for f in fields(Version)})


def versions(db: Database) -> list[Version]:
    """All, newest first."""
    return [_version(row) for row in db.table("versions").rows_where(order_by="number desc")]


def find(db: Database, version: str) -> Version | None:
    """The version of this id."""
    return next((_version(row) for row in db.table("versions").rows_where("id = ?", [version])), None)


_CHAIN = """
with recursive chain(id, number, parent, kept, upto, depth) as (
    select id, number, parent, kept, 1 << 60, 0 from versions where id = :version
    union all
    select v.id, v.number, v.parent, v.kept, min(chain.upto, chain.kept), depth + 1
    from chain join versions v on v.id = chain.parent and v.number < chain.number
)
"""
"""A version and all below it, each older than the one above, so that rows changed by hand make no circle; `upto` is how
many of its live edits the version at the top still has at the front."""
_PLACES = 'from chain join version_edits place on place."version" = chain.id and place.position < chain.upto'


def places(db: Database, version: str) -> list[tuple[str, str, int]]:
    """(digest of the edit, factor file, column) of all that is live in a version, in order of application."""
    sql = f'{_CHAIN} select place.edit, place.delta, place."column" {_PLACES} order by place.position'
    found: list[tuple[str, str, int]] = db.execute(sql, {"version": version}).fetchall()
    return found


_STORED = "e.id, e.prompt, e.weights_fingerprint, e.notes_fingerprint, e.digest, e.json"


def live(db: Database, version: str) -> tuple[LiveEdit, ...]:
    """All that is live in a version, in order of application."""
    place = 'place.delta, place."column", place.position'
    sql = f"{_CHAIN} select {_STORED}, {place} {_PLACES} join edits e on e.digest = place.edit"
    found = db.execute(sql, {"version": version}).fetchall()
    # Rows are near their places already, which SQLite does not know: of 100,000 it takes 0.25 s longer to sort them.
    found.sort(key=itemgetter(8))
    return tuple(LiveEdit(Stored._make(row[:6]), row[6], row[7]) for row in found)


def near(db: Database, version: str, names: Iterable[str]) -> tuple[tuple[LiveEdit, ...], int]:
    """The live edits of a version that have one of these ids or prompts, in order, and how many others there are."""
    wanted = "(select value from json_each(:names))"
    sql = f"select {_STORED} from edits e where e.prompt in {wanted} or e.id in {wanted}"
    known = {row[4]: Stored._make(row) for row in db.execute(sql, {"names": json.dumps(list(names))})}
    there = places(db, version)
    found = tuple(LiveEdit(known[d], delta, column) for d, delta, column in there if d in known)
    return found, len(there) - len(found)


def live_count(db: Database, version: str) -> int:
    """How many edits are live in a version."""
    found = db.execute(f"{_CHAIN} select count(*) {_PLACES}", {"version": version}).fetchone()
    return int(found[0])


def differing(db: Database, old: str, new: str) -> tuple[tuple[LiveEdit, ...], tuple[LiveEdit, ...]]:
    """The live edits that only one of two versions has as they are, weights aside: of the old, of the new."""
    sides = (places(db, old), places(db, new))
    before, after = ({digest for digest, _, _ in side} for side in sides)
    sql = f"select {_STORED} from edits e where e.digest in (select value from json_each(?))"
    known = {row[4]: Stored._make(row) for row in db.execute(sql, [json.dumps(sorted(before ^ after))])}
    first, second = (tuple(LiveEdit(known[d], delta, c) for d, delta, c in side if d in known) for side in sides)
    return first, second


def deltas(db: Database, version: str) -> tuple[str, ...]:
    """Names of a version's factor files in order of application."""
    sql = f"{_CHAIN} select place.delta {_PLACES} group by place.delta order by min(place.position)"
    return tuple(row[0] for row in db.execute(sql, {"version": version}))


def details(db: Database, table: str, version: str) -> list[dict[str, Any]]:
    """The version's own rows of a table in their order, without the two columns that place them."""
    rows = db.table(table).rows_where('"version" = ?', [version], order_by="position")
    return [{k: v for k, v in row.items() if k not in ("version", "position")} for row in rows]


def answer(row: dict[str, Any]) -> Answer:
    """A row of `answers`."""
    lists = {name: tuple(json.loads(row[name])) for name in ("wanted", "argmax_before")}
    return Answer(**{**row, **lists, "ok": bool(row["ok"])})


def metric(row: dict[str, Any]) -> Metric:
    """A row of `metrics`."""
    value = math.nan if row["value"] is None else row["value"]  # SQLite keeps NaN as NULL
    return Metric(**{**row, "value": value, "higher_is_better": bool(row["higher_is_better"])})


def last_answers(db: Database, version: str, edits: Sequence[str]) -> tuple[Answer, ...]:
    """What was said to the prompts of these edits when they were last asked, at the version or below it."""
    names = ", ".join(f'a."{f.name}"' for f in fields(Answer))
    sql = f"""{_CHAIN}, asked as (
        select a.edit, min(depth) as depth from chain join answers a on a."version" = chain.id
        where a.edit in (select value from json_each(:edits)) group by a.edit)
    select {names} from asked join chain on chain.depth = asked.depth
    join answers a on a."version" = chain.id and a.edit = asked.edit order by chain.depth desc, a.position"""
    found = db.query(sql, {"version": version, "edits": json.dumps(list(edits))})
    return tuple(answer(row) for row in found)


def evidence(
    db: Database, version: str | None = None, kind: str | None = None, limit: int | None = None
) -> list[Evidence]:
    """What was found out about a version, or about any, newest first."""
    wanted = {name: value for name, value in (("version", version), ("kind", kind)) if value is not None}
    where = " and ".join(f'"{name}" = :{name}' for name in wanted) or "1"
    found = db.table("evidence").rows_where(where, wanted, order_by="rowid desc", limit=limit)
    return [Evidence(**{**row, "data": json.loads(row["data"])}) for row in found]


# ---------------------------------------------------------------------------------------------------------------------
# Operations


def operation_row(operation: Operation) -> dict[str, Any]:
    """An operation as its row, but for the seal."""
    return {name: plain(value) for name, value in asdict(operation).items()}


def operations(db: Database, limit: int | None = None) -> list[Operation]:
    """The operations, newest first."""
    found = []
    for row in db.table("operations").rows_where(order_by="id desc", limit=limit):
        _check(row)
        row.pop("seal")
        lists = {name: tuple(json.loads(row[name])) for name in ("edits", "candidates")}
        found.append(Operation(**{**row, **lists, "aliases": json.loads(row["aliases"])}))
    return found


def view(db: Database, operation: int | None = None) -> View:
    """What is so now, or was so after an operation."""
    if operation is None:
        return next((op.view for op in operations(db, 1)), View())
    return next((op.view for op in operations(db) if op.id == operation), View())


def line(db: Database) -> tuple[list[Operation], list[tuple[int, Operation]]]:
    """As `line_of` of all operations."""
    return line_of(operations(db))


def line_of(operations: Sequence[Operation]) -> tuple[list[Operation], list[tuple[int, Operation]]]:
    """The operations in effect, oldest first, and what is undone as (the undo's id, what it undid), last undone last.

    An undo moves an operation from the one to the other and a redo moves it back, so neither is ever in effect itself;
    anything else starts a new line.

    Args:
        operations: all of them, newest first.
    """
    done: list[Operation] = []
    undone: list[tuple[int, Operation]] = []
    for operation in reversed(operations):
        if operation.verb == "undo":
            undone.append((operation.id, done.pop()))
        elif operation.verb == "redo":
            done.append(undone.pop()[1])
        else:
            done.append(operation)
            undone.clear()
    return done, undone


# ---------------------------------------------------------------------------------------------------------------------
# Refs


def check_alias(name: str) -> None:
    """Make sure that a name cannot be mistaken for another ref.

    Raises:
        StoreError: it could.
    """
    if not _ALIAS.fullmatch(name):
        raise StoreError(
            f"`{name}` cannot be an alias",
            "use up to 64 letters, digits, dots, dashes and underscores, the first a letter or digit",
        )
    if name in (BASE, CANDIDATE) or _ID.fullmatch(name.lower()):
        raise StoreError(f"`{name}` cannot be an alias: it could be a version", "choose a name like `stable`")


def resolve(db: Database, ref: str) -> Version | None:
    """The version a ref names; None is the unedited model.

    Raises:
        StoreError: nothing, or more than one version, has that name.
    """
    if match := _AT.fullmatch(ref):
        return _below(db, ref, steps=0 if ref == "@" else int(match[1] or 1))
    if ref == BASE:
        return None
    aliases = view(db).aliases
    if ref in aliases:
        return find(db, aliases[ref])
    prefix = ref.lower()
    if not _ID.fullmatch(prefix):
        raise StoreError(f"`{ref}` is neither a version nor an alias", look(db, ref))
    if len(prefix) < _SHORTEST_PREFIX:
        raise StoreError(f"`{ref}` is too short for a version", f"give at least {_SHORTEST_PREFIX} digits of its id")
    found = [_version(row) for row in db.table("versions").rows_where("id like ?", [f"{prefix}%"], order_by="number")]
    if not found:
        raise StoreError(f"no version begins with `{ref}`", look(db, ref))
    if len(found) > 1:
        raise StoreError(
            f"`{ref}` begins {len(found)} versions",
            "give more digits: " + ", ".join(f"{version.id} ({version.created_at})" for version in found),
        )
    return found[0]


def _below(db: Database, ref: str, steps: int) -> Version | None:
    chain = [*_chain(db, view(db).head), ""]
    if steps >= len(chain):
        farthest = f"`@-{len(chain) - 1}`" if len(chain) > 1 else "`@`"
        raise StoreError(f"`{ref}` goes beyond base", f"the unedited model is {farthest} here, or `base`")
    return find(db, chain[steps])


def look(db: Database, ref: str = "") -> str:
    """Where to look for what was not found: the names nearest to it, else the command that lists all."""
    names = [*view(db).aliases, BASE, *(str(row["id"]) for row in db.table("versions").rows_where(select="id"))]
    near = difflib.get_close_matches(ref, names)
    return f"did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else "`editctl log` lists the versions"


def depth(db: Database, version: str, ancestor: str) -> int:
    """Steps from a version down to one below it ("" for the unedited model); -1 if that is not below it."""
    return next((i for i, name in enumerate([*_chain(db, version), ""]) if name == ancestor), -1)


def _chain(db: Database, version: str) -> list[str]:
    """Ids of a version and all below it, downwards."""
    return [row[0] for row in db.execute(f"{_CHAIN} select id from chain order by depth", {"version": version})]
