"""The record of what was done: versions, operations, metrics, answers, events, aliases, and the lock.

Knows: the only SQL of the project, one SQLite file in WAL mode, so readers never wait for a writer; and who may write.
Refuses: to change or forget a version once committed, to let two processes write, tensors, models, terminals.

The head is moved by operations alone. An operation records where the head went; undo and redo append operations that
move it back and forth along the line of what was done, as jj's operation log does, so nothing is ever lost:

    apply a, apply b, undo      head a, redo would bring b
    … apply c                   head c, a new line: redo has nothing to bring; b is still there for `restore`
    … undo, undo                head a, then base: an undo never takes back another undo
"""

from __future__ import annotations

import difflib
import getpass
import hashlib
import json
import math
import os
import re
import secrets
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editctl.errors import Locked, StalePlan, StoreError
from editctl.metrics.values import Answer, Metric

if TYPE_CHECKING:
    from sqlite_utils import Database, Migrations

    from editctl.spec import Edit

BASE = "base"
"""What the unedited model is called in refs; in rows and fields it is the empty string."""

_AT = re.compile(r"@(?:-([0-9]{0,6}))?")
_ID = re.compile(r"[0-9a-f]{1,12}")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OPERATION = re.compile(r"op:([0-9]{1,9})")
_SHORTEST_PREFIX = 4


@dataclass(frozen=True)
class LiveEdit:
    """One edit of a version and where its rank-one term lies."""

    edit: Edit
    delta: str
    """Name of the factor file that holds its column."""
    column: int


@dataclass(frozen=True, kw_only=True)
class _Made:
    """How the weights of a version came to be."""

    parent: str
    """The version below, "" for the unedited model."""
    base: str
    """Content hash of the unedited model and its tokenizer."""
    model: str
    """The model as the user named it."""
    dtype: str
    method: str
    params: dict[str, Any]
    seed: int
    deltas: tuple[str, ...]
    """Names of the factor files in order of application."""
    weights_hash: str
    libraries: dict[str, str]
    """Library versions by name."""
    seconds: dict[str, float]
    """Wall-clock seconds by stage."""
    peak_mb: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Draft(_Made):
    """A version that is not committed yet, with all that is recorded beside it."""

    edits: tuple[LiveEdit, ...] = field(repr=False)
    """Everything live in the version, in order of application."""
    answers: tuple[Answer, ...] = field(default=(), repr=False)
    metrics: tuple[Metric, ...] = ()
    events: tuple[str, ...] = field(default=(), repr=False)
    """The run's events, one JSON line each."""


@dataclass(frozen=True, kw_only=True)
class Version(_Made):
    """A committed version; it never changes."""

    id: str
    """The first 12 hexadecimal digits of the SHA-256 of everything in its row."""
    created_at: str
    """ISO 8601, UTC."""
    who: str
    """user@host"""


@dataclass(frozen=True)
class Operation:
    """One movement of the head."""

    id: int
    """1, 2, 3 …"""
    parent: int
    """The operation before, 0 for none."""
    verb: str
    """apply, undo, redo or restore."""
    head_before: str
    head: str
    """Version id, "" for the unedited model."""
    at: str
    who: str
    command: str
    undoes: int
    """Undo: the operation whose effect it took back. Redo: the undo it took back. Else 0."""
    description: str


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


_STEPS: tuple[Callable[[Database], None], ...] = (m001_initial,)
"""The schema, one step after another; a released step never changes."""


@cache
def _migrations() -> Migrations:
    from sqlite_utils import Migrations

    migrations = Migrations("editctl")
    for step in _STEPS:
        migrations()(step)
    return migrations


_REMEDIES = {
    sqlite3.SQLITE_NOTADB: ("is not an SQLite database", "move it away, or restore it from a backup of the store"),
    sqlite3.SQLITE_CORRUPT: ("is damaged", "restore it from a backup of the store; the factor files are apart from it"),
    sqlite3.SQLITE_BUSY: ("is busy", "another program holds it open for writing; close that program and try again"),
    sqlite3.SQLITE_FULL: ("cannot grow: the disk is full", "free some space and try again; nothing was changed"),
    sqlite3.SQLITE_READONLY: ("cannot be written", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_IOERR: ("cannot be read or written", "check the disk and the file system it lies on"),
}
"""What is wrong with the database file and what to do, by SQLite's primary result code; any other is a bug."""


def _header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of a safetensors file by name, and the JSON values about them; both empty if it is none of editctl's."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(min(size, path.stat().st_size)))
        return tensors, json.loads(tensors.pop("__metadata__")["editctl"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, {}


def utc_now() -> datetime:
    """The time now, in UTC."""
    return datetime.now(UTC)


def user_at_host() -> str:
    """Who is at the keyboard, as user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # containers run under numbers that no passwd file names
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


class Store:
    """The versions and operations under one folder.

    A store that was never written reads as empty and leaves no trace on disk; the first commit makes it. Each call
    opens the database and closes it again (a millisecond or two), so any thread may call.
    """

    def __init__(
        self,
        root: Path,
        *,
        readonly: bool = False,
        now: Callable[[], datetime] = utc_now,
        who: str = "",
    ) -> None:
        self.root = Path(root)
        self.database = self.root / "editctl.db"
        self.readonly = readonly
        self._now = now
        self._who = who or user_at_host()
        self._holder: int | None = None
        """The thread that holds the lock through this object."""

    @property
    def deltas_dir(self) -> Path:
        """Where the factor files lie, `NAME.safetensors` each."""
        return self.root / "deltas"

    @property
    def stats_dir(self) -> Path:
        """Where the second moments of keys are cached."""
        return self.root / "stats"

    def measured(self, base: str) -> list[dict[str, Any]]:
        """The second moments of a model's keys that are in the cache: what each says of itself, blocks in order."""
        found = (_header(path)[1] for path in self.stats_dir.glob("*.safetensors") if ".part" not in path.name)
        return sorted((about for about in found if about.get("base") == base), key=lambda about: int(about["layer"]))

    def footprint(self, version: Version) -> tuple[int, tuple[str, ...]]:
        """Bytes of a version's factor files, and the kinds of update in them: thin, sparse or dense."""
        total, kinds = 0, set()
        for name in version.deltas:
            path = self.deltas_dir / f"{name}.safetensors"
            if not path.is_file():
                continue
            total += path.stat().st_size
            parts = {key.rpartition(".")[2] for key in _header(path)[0]}
            kinds.add("dense" if "dense" in parts else "sparse" if "mask" in parts else "thin")
        return total, tuple(sorted(kinds))

    # Reading

    def head(self) -> Version | None:
        """The version the model is at; None is the unedited model."""
        with self._reading() as db:
            return _find(db, _head(db))

    def versions(self) -> list[Version]:
        """All versions, newest first."""
        with self._reading() as db:
            return [_version(row) for row in db.table("versions").rows_where(order_by="number desc")]

    def resolve(self, ref: str) -> Version | None:
        """The version a ref names; None is the unedited model.

        Refs: `@` the head, `@-` the version below it, `@-2` two below, `base`, an alias, a version id or a prefix of at
        least 4 digits that only one version has.

        Raises:
            StoreError: nothing, or more than one version, has that name.
        """
        with self._reading() as db:
            return _resolve(db, ref)

    def edits(self, version: Version | None) -> tuple[LiveEdit, ...]:
        """What is live in the version, in order of application."""
        from editctl.spec import Edit

        with self._reading() as db:
            places = _of(db, "version_edits", version)
            wanted = 'digest in (select edit from version_edits where "version" = ?)'
            rows = db.table("edits").rows_where(wanted, [version.id if version else ""])
            edits = {row["digest"]: Edit.from_json(json.loads(row["json"])) for row in rows}
            return tuple(LiveEdit(edits[row["edit"]], row["delta"], row["column"]) for row in places)

    def answers(self, version: Version | None) -> tuple[Answer, ...]:
        """What the model said when the version was measured; a score that was not a number comes back as None."""
        with self._reading() as db:
            return tuple(_answer(row) for row in _of(db, "answers", version))

    def metrics(self, version: Version | None) -> tuple[Metric, ...]:
        """The version's metrics."""
        with self._reading() as db:
            return tuple(_metric(row) for row in _of(db, "metrics", version))

    def events(self, version: Version | None) -> tuple[str, ...]:
        """The JSON lines of the run that made the version."""
        with self._reading() as db:
            return tuple(row["line"] for row in _of(db, "events", version))

    def operations(self, limit: int | None = None) -> list[Operation]:
        """The operations, newest first."""
        with self._reading() as db:
            return _operations(db, limit)

    def aliases(self) -> dict[str, str]:
        """Version id by alias, "" for the unedited model."""
        with self._reading() as db:
            return _aliases(db)

    # Writing

    def commit(self, draft: Draft, *, verb: str = "apply", command: str = "", expected_head: str) -> Version:
        """Record the draft as a version and move the head to it, all or nothing.

        Raises:
            StalePlan: the head is not `expected_head` any more.
            StoreError: a factor file or the parent is not in the store.
            Locked: another process is writing.
        """
        with self._writing(verb, create=True) as db:
            if (head := _head(db)) != expected_head:
                raise StalePlan(
                    f"the head is {head or BASE}, but this was made for {expected_head or BASE}",
                    "another command moved the head in the meantime; run `editctl plan` again",
                )
            if draft.parent and _find(db, draft.parent) is None:
                raise StoreError(f"the parent version {draft.parent} is not in the store {self.root}", _look(db))
            for name in dict.fromkeys((*draft.deltas, *(live.delta for live in draft.edits))):
                if not (path := self.deltas_dir / f"{name}.safetensors").is_file():
                    raise StoreError(
                        f"the factor file {path} is missing; nothing was recorded",
                        "run the command again, or restore the file from a backup of the store",
                    )
            row = {
                **{f.name: _plain(getattr(draft, f.name)) for f in fields(_Made)},
                "number": db.table("versions").count + 1,
                "created_at": self._time(),
                "who": self._who,
            }
            row["id"] = _digest(row)[:12]
            db.table("versions").insert(row)
            self._insert_details(db, row["id"], draft)
            n = len(draft.edits)
            self._record(db, verb, row["id"], command, f"version {row['id']} with {n} edit{'' if n == 1 else 's'}")
            return _version(row)

    def undo(self, command: str = "") -> Operation:
        """Move the head back over the last operation that is in effect.

        Raises:
            StoreError: the head is where the store began.
        """
        with self._writing("undo") as db:
            done, undone = _line(db)
            if not done:
                raise StoreError(
                    "nothing to undo: the head is where the store began",
                    "`editctl redo` comes forward again" if undone else "`editctl apply` makes the first version",
                )
            last = done[-1]
            return self._record(
                db, "undo", last.head_before, command, f"undid operation {last.id} ({last.verb})", undoes=last.id
            )

    def redo(self, command: str = "") -> Operation:
        """Move the head forward over the operation that was undone last.

        Raises:
            StoreError: nothing is undone, or another operation came after the undo.
        """
        with self._writing("redo") as db:
            _, undone = _line(db)
            if not undone:
                raise StoreError(
                    "nothing to redo: the last operation is not an undo, or all that was undone is redone",
                    "`editctl restore op:N` goes to the head of any operation, also one undone earlier",
                )
            undo, undid = undone[-1]
            return self._record(
                db, "redo", undid.head, command, f"redid operation {undid.id} ({undid.verb})", undoes=undo
            )

    def restore(self, ref: str, command: str = "") -> Operation:
        """Move the head to any version, or to where it was after operation N (`op:N`).

        Raises:
            StoreError: there is no such version or operation, or the head is there already.
        """
        with self._writing("restore") as db:
            if match := _OPERATION.fullmatch(ref):
                heads = {operation.id: operation.head for operation in _operations(db)}
                number = int(match[1])
                if number not in heads:
                    raise StoreError(f"there is no operation {number}", "`editctl log` lists the operations")
                head = heads[number]
            else:
                version = _resolve(db, ref)
                head = version.id if version else ""
            if head == _head(db):
                # Recording it would end the line of undone operations and give undo something without effect.
                raise StoreError(f"the head is at {head or BASE} already", "`editctl log` lists where else it can go")
            return self._record(db, "restore", head, command, f"restored {ref}: {head or BASE}")

    def set_alias(self, name: str, ref: str) -> None:
        """Let `name` stand for the version that `ref` names now; an alias of that name moves.

        Raises:
            StoreError: the name could be mistaken for another ref, or nothing has the name `ref`.
        """
        if not _ALIAS.fullmatch(name):
            raise StoreError(
                f"`{name}` cannot be an alias",
                "use up to 64 letters, digits, dots, dashes and underscores, the first a letter or digit",
            )
        if name == BASE or _ID.fullmatch(name.lower()):
            raise StoreError(f"`{name}` cannot be an alias: it could be a version", "choose a name like `stable`")
        with self._writing("alias") as db:
            version = _resolve(db, ref)
            db.table("aliases").upsert({"name": name, "version": version.id if version else ""}, pk="name")

    # The lock

    @contextmanager
    def lock(self, verb: str, timeout: float = 0) -> Iterator[None]:
        """Be the only writer, across processes, inside `with`. Free to take again in the thread that holds it.

        Args:
            verb: what the holder does, told to those who find the lock taken.
            timeout: seconds to wait for it; negative waits without limit.

        Raises:
            Locked: another process, or another `Store` on this folder, still holds it.
            StoreError: the store is read-only, or its folder cannot be written.
        """
        if self.readonly:
            raise StoreError(
                f"the store {self.root} is open read-only; `{verb}` would change it", "open it for writing"
            )
        if self._holder == threading.get_ident():
            yield
            return
        from filelock import FileLock, Timeout

        note = self.root / "lock.json"
        lock = FileLock(self.root / "lock", timeout=timeout)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            holder = {"id": secrets.token_hex(6), "verb": verb, "who": self._who, "pid": os.getpid()}
            part = note.with_suffix(".part")
            part.write_text(json.dumps({**holder, "since": self._time()}), encoding="utf-8")
            os.replace(part, note)
        except Timeout:
            raise Locked(
                f"the store is being changed by {_holder(note)}",
                "wait for it to end, or wait up to a number of seconds with --lock-timeout",
            ) from None
        except OSError as error:
            lock.release()
            raise StoreError(
                f"the store {self.root} cannot be written: {error.strerror}",
                "check the permissions of the folder, or name another store",
            ) from None
        self._holder = threading.get_ident()
        try:
            yield
        finally:
            self._holder = None
            note.unlink(missing_ok=True)
            lock.release()

    # Inside

    def _time(self) -> str:
        return self._now().astimezone(UTC).isoformat(timespec="seconds")

    @contextmanager
    def _reading(self) -> Iterator[Database]:
        mode = "mode=rw"
        if not self.database.exists():
            mode = ""
        elif not os.access(self.root, os.W_OK):
            # Reading a WAL database makes two small files beside it, which vanish on closing. Where none can be made,
            # join those of a writer or, when nobody writes, do without.
            mode = "mode=ro" if self.database.with_name("editctl.db-wal").exists() else "immutable=1"
        with self._open(mode) as db:
            db.execute("pragma query_only = on")
            yield db

    @contextmanager
    def _writing(self, verb: str, *, create: bool = False) -> Iterator[Database]:
        """The lock and one transaction, which an exception rolls back."""
        if not create and not self.readonly and not self.database.exists():
            raise StoreError(
                f"the store {self.root} is empty: `{verb}` has nothing to work on",
                "`editctl apply` makes the first version",
            )
        with self.lock(verb), self._open("mode=rwc") as db:
            db.enable_wal()
            _migrations().apply(db)
            with db.atomic():
                yield db

    @contextmanager
    def _open(self, mode: str) -> Iterator[Database]:
        """A connection; without a mode to an empty database in memory. Troubles with the file become StoreError."""
        from sqlite_utils import Database

        connection: sqlite3.Connection | None = None
        try:
            uri = f"{self.database.absolute().as_uri()}?{mode}" if mode else ":memory:"
            connection = sqlite3.connect(uri, uri=True)
            db = Database(connection)
            if unknown := {m.name for m in _migrations().applied(db)} - {step.__name__ for step in _STEPS}:
                raise StoreError(
                    f"the store {self.root} was written by a newer editctl (it has {', '.join(sorted(unknown))})",
                    "upgrade editctl: `pip install --upgrade editctl`",
                )
            yield db
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bits tell kinds of the same trouble apart
            if code not in _REMEDIES:
                raise
            trouble, remedy = _REMEDIES[code]
            raise StoreError(f"the store's database {self.database} {trouble}", remedy) from error
        finally:
            if connection is not None:
                connection.close()

    def _insert_details(self, db: Database, version: str, draft: Draft) -> None:
        def insert(table: str, rows: Iterable[dict[str, Any]]) -> None:
            db.table(table).insert_all({"version": version, "position": i, **row} for i, row in enumerate(rows))

        edits = [live.edit.to_json() for live in draft.edits]
        digests = [_digest(data) for data in edits]
        rows = (
            {
                "digest": digest,
                "id": live.edit.id,
                "weights_fingerprint": live.edit.weights_fingerprint,
                "notes_fingerprint": live.edit.notes_fingerprint,
                "json": _plain(data),
            }
            for digest, data, live in zip(digests, edits, draft.edits, strict=True)
        )
        db.table("edits").insert_all(rows, pk="digest", ignore=True)
        places = zip(digests, draft.edits, strict=True)
        insert("version_edits", ({"edit": d, "delta": live.delta, "column": live.column} for d, live in places))
        insert("answers", ({k: _plain(v) for k, v in asdict(answer).items()} for answer in draft.answers))
        insert("metrics", (asdict(metric) for metric in draft.metrics))
        insert("events", ({"line": line} for line in draft.events))

    def _record(self, db: Database, verb: str, head: str, command: str, description: str, undoes: int = 0) -> Operation:
        last = _operations(db, 1)
        parent, head_before = (last[0].id, last[0].head) if last else (0, "")
        operation = Operation(
            id=parent + 1,
            parent=parent,
            verb=verb,
            head_before=head_before,
            head=head,
            at=self._time(),
            who=self._who,
            command=command,
            undoes=undoes,
            description=description,
        )
        db.table("operations").insert(asdict(operation))
        return operation


def _digest(value: object) -> str:
    """SHA-256 of the value's JSON, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value as one column holds it: containers as JSON, keys in the order given."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else value


def _version(row: dict[str, Any]) -> Version:
    parsed = {name: json.loads(row[name]) for name in ("params", "deltas", "libraries", "seconds")}
    parsed["deltas"] = tuple(parsed["deltas"])
    return Version(**{f.name: parsed.get(f.name, row[f.name]) for f in fields(Version)})


def _answer(row: dict[str, Any]) -> Answer:
    return Answer(**{**row, "wanted": tuple(json.loads(row["wanted"])), "ok": bool(row["ok"])})


def _metric(row: dict[str, Any]) -> Metric:
    value = math.nan if row["value"] is None else row["value"]  # SQLite keeps NaN as NULL
    return Metric(**{**row, "value": value, "higher_is_better": bool(row["higher_is_better"])})


def _find(db: Database, version: str) -> Version | None:
    return next((_version(row) for row in db.table("versions").rows_where("id = ?", [version])), None)


def _of(db: Database, table: str, version: Version | None) -> list[dict[str, Any]]:
    """The version's rows of a table in their order, without the two columns that place them."""
    rows = db.table(table).rows_where('"version" = ?', [version.id if version else ""], order_by="position")
    return [{k: v for k, v in row.items() if k not in ("version", "position")} for row in rows]


def _operations(db: Database, limit: int | None = None) -> list[Operation]:
    return [Operation(**row) for row in db.table("operations").rows_where(order_by="id desc", limit=limit)]


def _head(db: Database) -> str:
    return next((operation.head for operation in _operations(db, 1)), "")


def _line(db: Database) -> tuple[list[Operation], list[tuple[int, Operation]]]:
    """The operations in effect, oldest first, and what is undone as (the undo's id, what it undid), last undone last.

    An undo moves an operation from the one to the other and a redo moves it back, so neither is ever in effect itself;
    anything else starts a new line.
    """
    done: list[Operation] = []
    undone: list[tuple[int, Operation]] = []
    for operation in reversed(_operations(db)):
        if operation.verb == "undo":
            undone.append((operation.id, done.pop()))
        elif operation.verb == "redo":
            done.append(undone.pop()[1])
        else:
            done.append(operation)
            undone.clear()
    return done, undone


def _aliases(db: Database) -> dict[str, str]:
    return {row["name"]: row["version"] for row in db.table("aliases").rows_where(order_by="name")}


def _resolve(db: Database, ref: str) -> Version | None:
    if match := _AT.fullmatch(ref):
        return _below(db, ref, steps=0 if ref == "@" else int(match[1] or 1))
    if ref == BASE:
        return None
    aliases = _aliases(db)
    if ref in aliases:
        return _find(db, aliases[ref])
    prefix = ref.lower()
    if not _ID.fullmatch(prefix):
        raise StoreError(f"`{ref}` is neither a version nor an alias", _look(db, ref))
    if len(prefix) < _SHORTEST_PREFIX:
        raise StoreError(f"`{ref}` is too short for a version", f"give at least {_SHORTEST_PREFIX} digits of its id")
    found = [_version(row) for row in db.table("versions").rows_where("id like ?", [f"{prefix}%"], order_by="number")]
    if not found:
        raise StoreError(f"no version begins with `{ref}`", _look(db, ref))
    if len(found) > 1:
        raise StoreError(
            f"`{ref}` begins {len(found)} versions",
            "give more digits: " + ", ".join(f"{version.id} ({version.created_at})" for version in found),
        )
    return found[0]


def _below(db: Database, ref: str, steps: int) -> Version | None:
    version = _find(db, _head(db))
    for taken in range(steps):
        if version is None:
            farthest = f"`@-{taken}`" if taken else "`@`"
            raise StoreError(f"`{ref}` goes beyond base", f"the unedited model is {farthest} here, or `base`")
        version = _find(db, version.parent)
    return version


def _look(db: Database, ref: str = "") -> str:
    """Where to look for what was not found: the names nearest to it, else the command that lists all."""
    names = [*_aliases(db), BASE, *(str(row["id"]) for row in db.table("versions").rows_where(select="id"))]
    near = difflib.get_close_matches(ref, names)
    return f"did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else "`editctl log` lists the versions"


def _holder(note: Path) -> str:
    try:
        holder = json.loads(note.read_text(encoding="utf-8"))
        return f"`{holder['verb']}` of {holder['who']} (pid {holder['pid']}) since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # between taking the lock and saying so
        return "another process"
