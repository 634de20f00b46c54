"""Looking after a store: what is wrong with it, what can be mended, what nothing refers to, and copies of it.

Knows: every promise that the database and the files beside it make. Refuses: weights; whether they can be rebuilt is
`engine.wear`'s to say.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from editctl.errors import EditctlError, InvalidInput, StoreError
from editctl.files import PART, digest_of, put_in_place
from editctl.spec import Edit
from editctl.store import rows
from editctl.store.connection import Connection
from editctl.store.records import Fault
from editctl.store.schema import digest, evidence_id, operation_seal, version_seal
from editctl.store.store import Store, trained_files

if TYPE_CHECKING:
    from sqlite_utils import Database

_Any = TypeVar("_Any", bound=Connection)
BACKUP = "restore the store from a backup"
LEFT = "is not part of any version"


@dataclass(frozen=True)
class Leftover:
    """A file that nothing refers to."""

    path: Path
    bytes: int


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong


def inspect(store: Store) -> list[Fault]:
    """Everything that is wrong with a store's database and files, weights aside."""
    if faults := damage(store):
        # Of a database that is damaged, what it does not name may be needed all the same.
        return faults + _looked(store, _spoiled)
    faults, left = _looked(store, _spoiled), _leftovers(store)
    # Asked only then: who asks has the lock for a moment, in which nobody can begin to write.
    if left and store.busy():
        # A run that is not at its end has files that no version names yet.
        return faults
    # A run that came to its end in between has named its files, or taken them away.
    named = _named(store) if left else set()
    left = [one for one in left if one.path.name not in named and one.path.exists()]
    return faults + [Fault(f"file {one.path}", LEFT, "`editctl gc` removes it") for one in left]


def damage(store: Connection) -> list[Fault]:
    """What is wrong with the database."""
    faults = _looked(store, _sound) + _looked(store, _sealed) + _looked(store, _joined)
    unique = {(fault.what, fault.wrong): fault for fault in faults}
    return list(unique.values())


def _looked(store: _Any, look: Callable[[_Any, Database], Iterator[Fault]]) -> list[Fault]:
    """What one look at the database finds, all of it as it was at one moment."""
    faults: list[Fault] = []
    if store.database.exists():
        try:
            with store._reading() as db:
                db.execute("begin")
                faults += look(store, db)
        except EditctlError as error:
            faults.append(Fault(str(store.database), error.message, error.hint))
    return faults


def _sound(store: Connection, db: Database) -> Iterator[Fault]:
    """SQLite's own checks."""
    for (message,) in db.execute("pragma integrity_check(20)"):
        if message != "ok":
            yield Fault(str(store.database), str(message), BACKUP)
    for table, row, other, _ in db.execute("pragma foreign_key_check"):
        yield Fault(f"row {row} of {table}", f"refers to a row of {other} that is not there", BACKUP)


def _sealed(store: Connection, db: Database) -> Iterator[Fault]:
    """Whether every row says what it said when it was written."""
    for row in db.table("edits").rows:
        if not _as_recorded(row):
            yield Fault(f"edit {row['id']}", "is not what was recorded", BACKUP)
    last = ""
    for row in db.table("evidence").rows_where(order_by="rowid"):
        if evidence_id(row, last) != row["id"]:
            yield Fault(f"evidence {row['id']}", "is not what was recorded, or one before it is gone", BACKUP)
        last = row["id"]
    for row in list(db.table("versions").rows_where(select="id, seal")):
        if version_seal(db, row["id"]) != row["seal"]:
            yield Fault(f"version {row['id']}", "its record is not what was committed", BACKUP)
    seal = ""
    for number, row in enumerate(list(db.table("operations").rows_where(order_by="id")), 1):
        if row["id"] != number or row["seal"] != operation_seal(row, seal):
            yield Fault(f"operation {row['id']}", "is not what was recorded, or one before it is gone", BACKUP)
        seal = row["seal"]


def _as_recorded(row: dict[str, Any]) -> bool:
    """Whether an edit's text has its digest, and the columns beside it say what the text says."""
    try:
        data = json.loads(row["json"])
        edit = Edit.from_json(data)
    except ValueError:
        return False
    said = {name: getattr(edit, name) for name in ("id", "prompt", "weights_fingerprint", "notes_fingerprint")}
    return digest(data) == row["digest"] and all(row[name] == value for name, value in said.items())


def _joined(store: Connection, db: Database) -> Iterator[Fault]:
    """Whether every version that is referred to is there, and what made each is told."""
    versions = rows.versions(db)
    known = {version.id for version in versions} | {""}
    for made in versions:
        if made.parent not in known:
            yield Fault(f"version {made.id}", f"its parent {made.parent} is not there", BACKUP)
    told = {""}
    for op in rows.operations(db):
        named = {op.head, op.head_before, op.about, *op.candidates, *op.aliases.values()}
        for version in sorted(named - known):
            yield Fault(f"operation {op.id}", f"names version {version}, which is not there", BACKUP)
        told |= named
    for version in sorted(known - told):
        yield Fault(f"version {version}", "the operation that made it is gone", BACKUP)


def _spoiled(store: Store, db: Database) -> Iterator[Fault]:
    """Whether the factor files that versions name, the trained files that those need, and all other trained files are
    there as they were written."""
    users: dict[str, list[str]] = {}
    for name, version in db.execute('select delta, "version" from version_edits group by delta, "version"'):
        users.setdefault(name, []).append(version)
    trained: dict[str, list[str]] = {path.stem: [] for path in sorted(store.artifacts_dir.glob("*.safetensors"))}
    for name, versions in users.items():
        path = store.deltas_dir / f"{name}.safetensors"
        if wrong := _wrong_with(path):
            yield Fault(f"factor file {path}", f"{wrong}; {_needed_by(versions)}", BACKUP)
            continue
        for content in trained_files(path):
            trained.setdefault(content, []).extend(versions)
    for content, versions in trained.items():
        path = store.artifacts_dir / f"{content}.safetensors"
        if wrong := _wrong_with(path):
            remedy = BACKUP if versions else f"{BACKUP}, or remove the file"
            yield Fault(f"trained file {path}", f"{wrong}; {_needed_by(versions)}", remedy)


def _wrong_with(path: Path) -> str:
    """What is wrong with a file that is named by its content; empty when nothing is."""
    if not path.is_file():
        return "is missing"
    try:
        return "" if digest_of(path) == path.stem else "is not what was written"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _needed_by(versions: list[str]) -> str:
    return f"version {min(versions)} and those built on it need it" if versions else "no version needs it"


def _beside(store: Store) -> list[Leftover]:
    """Files that a version may refer to, and those that runs leave behind which do not come to an end."""
    found = [path for path in store.deltas_dir.glob("*") if path.is_file()]
    # What was trained took minutes to hours, so it is kept whether a version refers to it or not.
    for folder in (store.stats_dir, store.artifacts_dir):
        found += [path for path in folder.glob(f"*{PART}") if path.is_file()]
    found += [path for path in store.root.glob(f"*{PART}*") if path.is_file()]
    leftovers = []
    for path in sorted(found):
        with suppress(FileNotFoundError):  # whoever was writing it is done
            leftovers.append(Leftover(path, path.stat().st_size))
    return leftovers


def _leftovers(store: Store) -> list[Leftover]:
    """Files that nothing refers to."""
    # Listed before the database is read: a file that is named in between is none that nothing refers to.
    beside = _beside(store)
    named = _named(store)
    return [one for one in beside if one.path.name not in named]


def _named(store: Store) -> set[str]:
    """Names of the files that versions refer to."""
    with store._reading() as db:
        return {f"{row[0]}.safetensors" for row in db.execute("select distinct delta from version_edits")}


# ---------------------------------------------------------------------------------------------------------------------
# What can be done about it


def repair(store: Store, faults: list[Fault], backup: Path | None) -> list[Fault]:
    """The faults, those marked that are gone: indexes, files a backup has, files nothing refers to are mended.

    Args:
        backup: a copy of the store that `back_up` made.

    Raises:
        Locked: another process is writing.
        StoreError: the store cannot be written.
    """
    with store.lock("verify"), _troubles(store.root):
        if any("index" in fault.wrong for fault in faults):
            _reindex(store)
        told = {(fault.what, fault.wrong) for fault in faults}
        if backup is not None and _from_backup(backup, faults):
            # A factor file that is there again may need a trained one.
            more = [fault for fault in _looked(store, _spoiled) if (fault.what, fault.wrong) not in told]
            _from_backup(backup, more)
            faults = faults + more
            told |= {(fault.what, fault.wrong) for fault in more}
        if not damage(store):
            _remove_leftovers(store)
        left = inspect(store)
        still = {(fault.what, fault.wrong) for fault in left}
        mended = [replace(fault, repaired=(fault.what, fault.wrong) not in still) for fault in faults]
        return mended + [fault for fault in left if (fault.what, fault.wrong) not in told]


def _from_backup(backup: Path, faults: list[Fault]) -> bool:
    """Take the files that are spoiled or missing from a backup; whether it had one of them."""
    found = False
    for fault in faults:
        kind, _, name = fault.what.partition(" file ")
        if kind in ("factor", "trained"):
            path = Path(name)
            found |= _taken_over(backup / path.parent.name / path.name, path)
    return found


def _remove_leftovers(store: Store) -> list[Leftover]:
    found = _leftovers(store)
    for one in found:
        one.path.unlink(missing_ok=True)
    return found


@contextmanager
def _troubles(folder: Path) -> Iterator[None]:
    """Troubles with files as StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written: {error.strerror}",
            "free some space, or check the permissions of the folder",
        ) from None


def _taken_over(source: Path, path: Path) -> bool:
    """Copy a file whose content has its name; whether it had it."""
    if not source.is_file():
        return False
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, part)
        if digest_of(part) != path.stem:
            return False
        with part.open("rb") as file:
            os.fsync(file.fileno())
        put_in_place(part, path)
        return True
    finally:
        part.unlink(missing_ok=True)


def _reindex(store: Store) -> None:
    with suppress(EditctlError, sqlite3.Error), store._writing("verify") as db:
        db.execute("reindex")


def collect(store: Store) -> list[Leftover]:
    """Remove the files that nothing refers to and say which they were.

    Raises:
        Locked: another process is writing: its files may not be named yet.
        StoreError: the database is damaged, so that what it refers to is not known, or a file cannot be removed.
    """
    with store.lock("gc"), _troubles(store.root):
        if faults := damage(store):
            raise StoreError(
                f"nothing was removed: {faults[0].what} {faults[0].wrong}, so what is needed is not known",
                "`editctl verify` tells more",
            )
        return _remove_leftovers(store)


# ---------------------------------------------------------------------------------------------------------------------
# Copies


def back_up(store: Store, folder: Path) -> int:
    """Copy the store into a folder, also while it is written to, and return how many factor and trained files were
    copied.

    The copy is a store. A folder that holds an earlier copy is brought up to date.

    Raises:
        InvalidInput: the folder holds something else, or a store that went on by itself.
        StoreError: there is nothing to copy, or a factor or trained file is missing or spoiled.
    """
    if not store.database.exists():
        raise StoreError(f"the store {store.root} is empty: there is nothing to copy", "apply something first")
    target = Store(folder)
    with _troubles(folder):
        if folder.exists() and folder.samefile(store.root):
            raise InvalidInput(f"{folder} is the store itself", "name another folder")
        if folder.exists() and not target.database.exists() and any(map(_foreign, folder.iterdir())):
            raise InvalidInput(f"{folder} holds something else than a store", "name a new folder")
        with target.lock("backup"):
            return _copy(store, target)


_HELPERS = ("-wal", "-shm", "-journal")
"""What SQLite adds to the name of a database for files that belong to it while it is open."""


def _foreign(path: Path) -> bool:
    """Whether a file or folder is none of those that a copy begins with, where it was interrupted."""
    return path.name not in ("deltas", "artifacts", "lock", "lock.json") and PART not in path.name


def _copy(store: Store, target: Store) -> int:
    target.deltas_dir.mkdir(parents=True, exist_ok=True)
    part = target.root / f"{target.database.name}{PART}"
    copy: sqlite3.Connection | None = None
    try:
        for helper in ("", *_HELPERS):
            part.with_name(part.name + helper).unlink(missing_ok=True)
        with store._reading() as db:
            copy = sqlite3.connect(part)
            try:
                db.conn.backup(copy)
            except sqlite3.OperationalError as error:  # damage of the source is another kind
                raise target._trouble(error) from None
        if target.database.exists() and (strange := _unknown_operation(target, copy)):
            raise InvalidInput(
                f"{target.root} is a store that went on by itself: this one has no operation {strange}",
                "name a new folder",
            )
        # The copy alone says what belongs to it: the store may have gone on.
        copy.execute("pragma journal_mode = delete")
        names = [row[0] for row in copy.execute("select distinct delta from version_edits")]
        copied = _brought(store.deltas_dir, target.deltas_dir, names, "factor")
        trained = {path.stem for path in store.artifacts_dir.glob("*.safetensors")}
        for name in names:
            trained.update(trained_files(target.deltas_dir / f"{name}.safetensors"))
        copied += _brought(store.artifacts_dir, target.artifacts_dir, sorted(trained), "trained")
        copy.close()
        for helper in _HELPERS:
            target.database.with_name(target.database.name + helper).unlink(missing_ok=True)
        put_in_place(part, target.database)
        return copied
    except sqlite3.Error as error:
        raise target._trouble(error) from None
    finally:
        if copy is not None:
            copy.close()
        part.unlink(missing_ok=True)


def _brought(source: Path, target: Path, names: Iterable[str], kind: str) -> int:
    """Copy files that are not there yet and return how many they were.

    Raises:
        StoreError: one is missing or spoiled.
    """
    new = [f"{name}.safetensors" for name in names if not (target / f"{name}.safetensors").is_file()]
    for name in new:
        if not _taken_over(source / name, target / name):
            raise StoreError(f"the {kind} file {source / name} is missing or spoiled", "`editctl verify` tells more")
    return len(new)


def take_in(store: Store, files: Iterable[Path]) -> None:
    """Put files that were trained elsewhere among the store's own, each under the name of its content.

    Raises:
        Locked: another process is writing.
        StoreError: one is missing, is not what its name says, or cannot be written.
    """
    with store.lock("import"), _troubles(store.root):
        for file in files:
            target = store.artifacts_dir / file.name
            if _wrong_with(target) and not _taken_over(file, target):
                raise StoreError(f"the trained file {file} is missing or spoiled", "export the version again")


def _unknown_operation(target: Store, copy: sqlite3.Connection) -> int:
    """The number of the target's last operation if the copy does not have it, else 0."""
    with target._reading() as db:
        last: list[dict[str, Any]] = list(db.query("select id, seal from operations order by id desc limit 1"))
    if not last:
        return 0
    found = copy.execute("select seal from operations where id = ?", [last[0]["id"]]).fetchone()
    return 0 if found and found[0] == last[0]["seal"] else int(last[0]["id"])
