"""The tables and how a store of an earlier editctl becomes one of this.

Knows: one step a released schema; a released step never changes. Refuses: to read or write rows otherwise.

An edit lives through many versions unchanged, so a version keeps only the rows of `version_edits` that differ from its
parent's: the first `kept` places are the parent's own. A chain of n versions that add edits keeps n rows, not n².
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlite_utils import Database, Migrations


def m001_initial(db: Database) -> None:
    """All tables; `position` is an item's place within its version, from 0."""

    def create(
        name: str, columns: Mapping[str, type], pk: str | tuple[str, ...], *foreign_keys: tuple[str, ...]
    ) -> None:
        db.table(name).create(columns, pk=pk, foreign_keys=foreign_keys, strict=True)

    made = {"parent": str, "base": str, "model": str, "dtype": str, "method": str, "params": str, "seed": int}
    made |= {"deltas": str, "weights_hash": str, "libraries": str, "seconds": str, "peak_mb": float, "note": str}
    create("versions", {"id": str, "number": int, **made, "created_at": str, "who": str}, "id")
    db.table("versions").create_index(["number"], unique=True)
    # An edit lives through many versions unchanged: its text is kept once, under its content's digest.
    edit = {"digest": str, "id": str, "weights_fingerprint": str, "notes_fingerprint": str, "json": str}
    create("edits", edit, "digest")
    place = {"version": str, "position": int}
    in_place = ("version", "position")
    of_version = ("version", "versions", "id")
    live = {**place, "edit": str, "delta": str, "column": int}
    create("version_edits", live, in_place, of_version, ("edit", "edits", "digest"))
    answer = {"edit": str, "kind": str, "prompt": str, "wanted": str, "before": str, "after": str, "ok": int}
    scores = {"nll_before": float, "nll_after": float, "forced_before": float, "forced_after": float}
    create("answers", {**place, **answer, **scores}, in_place, of_version)
    metric = {"name": str, "protocol": str, "value": float, "n": int, "higher_is_better": int}
    create("metrics", {**place, **metric}, in_place, of_version)
    create("events", {**place, "line": str}, in_place, of_version)
    operation = {"id": int, "parent": int, "verb": str, "head_before": str, "head": str, "at": str, "who": str}
    create("operations", {**operation, "command": str, "undoes": int, "description": str}, "id")
    create("aliases", {"name": str, "version": str}, "name")


def m002_views(db: Database) -> None:
    """Operations hold whole views, versions only what their parent lacks, and both carry seals."""
    versions, operations, live = db.table("versions"), db.table("operations"), db.table("version_edits")
    # transform() rewrites the whole table, and one call does it once.
    versions.transform(drop={"deltas", "note"})
    for name, default in {"kept": 0, "norms": "{}", "gates": "{}", "seal": ""}.items():
        versions.add_column(name, type(default), not_null_default=default)
    defaults = {"note": "", "about": "", "edits": "[]", "candidates": "[]", "aliases": "{}", "seal": ""}
    for name, empty in defaults.items():
        operations.add_column(name, str, not_null_default=empty)
    db.table("edits").add_column("prompt", str, not_null_default="")
    for row in list(db.table("edits").rows):
        data = json.loads(row["json"])
        prompt = data["relation"].replace("{}", data["subject"])
        db.table("edits").update(row["digest"], {"prompt": prompt})
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in live.rows_where(order_by='"version", position'):
        rows.setdefault(row["version"], []).append(row)
    for row in list(versions.rows_where(order_by="number")):
        above, own = rows.get(row["parent"], []), rows.get(row["id"], [])
        alike = (all(a[key] == b[key] for key in ("edit", "delta", "column")) for a, b in zip(above, own, strict=False))
        kept = sum(1 for _ in itertools.takewhile(bool, alike))
        live.delete_where('"version" = ? and position < ?', [row["id"], kept])
        versions.update(row["id"], {"kept": kept})
    # When each was set is not known, and undo left them alone: every operation has all.
    aliases = {row["name"]: row["version"] for row in db.table("aliases").rows_where(order_by="name")}
    for row in list(operations.rows_where(select="id")):
        operations.update(row["id"], {"aliases": json.dumps(aliases, ensure_ascii=False)})
    db.table("aliases").drop()
    db.table("answers").create_index(["edit"])
    for column in ("id", "prompt"):
        db.table("edits").create_index([column])
    for row in list(versions.rows_where(order_by="number", select="id")):
        versions.update(row["id"], {"seal": version_seal(db, row["id"])})
    seal = ""
    for row in list(operations.rows_where(order_by="id")):
        seal = operation_seal(row, seal)
        operations.update(row["id"], {"seal": seal})


def m003_measures(db: Database) -> None:
    """Answers and metrics say more of how they came to be; evidence is kept beside versions."""
    whole = [row["id"] for row in db.table("versions").rows if version_seal(db, row["id"]) == row["seal"]]
    texts = {"answers": {"axis": "", "group": "", "rival": "", "argmax_before": "[]"}, "metrics": {"axis": ""}}
    numbers = {"answers": ("nll_rival_before", "nll_rival_after", "forced_same"), "metrics": ("low", "high")}
    for table, columns in texts.items():
        for name, empty in columns.items():
            db.table(table).add_column(name, str, not_null_default=empty)
        for name in numbers[table]:
            db.table(table).add_column(name, float)
    db.table("answers").add_column("soon", str)
    kept = {"id": str, "version": str, "kind": str, "edit": str, "data": str, "at": str, "who": str}
    db.table("evidence").create(kept, pk="id", strict=True)
    db.table("evidence").create_index(["version"])
    # A record that was damaged before must not look whole now.
    for version in whole:
        db.table("versions").update(version, {"seal": version_seal(db, version)})


STEPS: tuple[Callable[[Database], None], ...] = (m001_initial, m002_views, m003_measures)


@cache
def migrations() -> Migrations:
    """All steps, for sqlite-utils to apply in order."""
    from sqlite_utils import Migrations

    found = Migrations("editctl")
    for step in STEPS:
        found()(step)
    return found


def digest(value: object) -> str:
    """SHA-256 of the value's JSON, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


DETAILS = ("version_edits", "answers", "metrics", "events")
"""The tables that hold what is recorded beside a version."""


def version_seal(db: Database, version: str) -> str:
    """Digest of a version's row and everything recorded beside it, as it lies on disk."""
    total = hashlib.sha256()
    for row in db.table("versions").rows_where("id = ?", [version]):
        total.update(digest({k: v for k, v in row.items() if k != "seal"}).encode())
    for table in DETAILS:
        total.update(table.encode())
        for row in db.table(table).rows_where('"version" = ?', [version], order_by="position"):
            total.update(digest(row).encode())
    own = 'version_edits p join edits e on e.digest = p.edit where p."version" = ? order by p.position'
    for row in db.query(f"select e.* from {own}", [version]):
        total.update(digest(row).encode())
    return total.hexdigest()


def evidence_id(row: Mapping[str, Any], before: str) -> str:
    """Name of a piece of evidence after its content and the name of the one before it, of which it tells if it goes."""
    return digest([before, {k: v for k, v in row.items() if k != "id"}])[:12]


def operation_seal(row: Mapping[str, Any], before: str) -> str:
    """Digest of an operation and of the seal before it: none can be changed, taken out of the middle or slipped in."""
    return digest([before, {k: v for k, v in row.items() if k != "seal"}])
