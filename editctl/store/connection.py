"""Getting at the database file: opening it, saying what is wrong with it, and being the only writer.

Knows: connections, the lock and who holds it. Refuses: what the tables mean.
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editctl.errors import Locked, StoreError
from editctl.store.schema import STEPS, migrations

if TYPE_CHECKING:
    from sqlite_utils import Database

_REMEDIES = {
    sqlite3.SQLITE_NOTADB: ("is not an SQLite database", "move it away, or restore it from a backup of the store"),
    sqlite3.SQLITE_CORRUPT: ("is damaged", "restore it from a backup of the store; the factor files are apart from it"),
    sqlite3.SQLITE_BUSY: ("is busy", "another program holds it open for writing; close that program and try again"),
    sqlite3.SQLITE_FULL: ("cannot grow: the disk is full", "free some space and try again; nothing was changed"),
    sqlite3.SQLITE_READONLY: ("cannot be written", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", "check the permissions of the file and its folder"),
    sqlite3.SQLITE_IOERR: ("cannot be read or written", "see whether the disk is full, and check its file system"),
}
"""What is wrong with the database file and what to do, by SQLite's primary result code; any other is a bug."""

_MISREAD = (sqlite3.Error, ValueError, LookupError, TypeError, AttributeError)
"""What becomes of reading rows that a damaged page has changed; anywhere else a bug."""


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


class Connection:
    """One store folder's database and lock.

    A store that was never written reads as empty and leaves no trace on disk; the first commit makes it. Each call
    opens the database and closes it again (a millisecond or two), so any thread may call.
    """

    def __init__(
        self, root: Path, *, readonly: bool = False, now: Callable[[], datetime] = utc_now, who: str = ""
    ) -> None:
        self.root = Path(root)
        self.database = self.root / "editctl.db"
        self.readonly = readonly
        self._now = now
        self._who = who or user_at_host()
        self._holder: int | None = None
        """The thread that holds the lock through this object."""

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
        # Who only looks whether it is taken holds it for an instant.
        lock = FileLock(self.root / "lock", timeout=timeout or 0.05)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire(poll_interval=0.01 if not timeout else 0.05)
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

    def busy(self) -> bool:
        """Whether another process is writing, as far as can be told."""
        path = self.root / "lock"
        if self._holder == threading.get_ident() or not path.exists():
            return False
        from filelock import FileLock, Timeout

        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return True
        except OSError:  # where nobody may write
            return False
        lock.release()
        return False

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
            mode = "mode=ro" if self._logged() else "immutable=1"
        try:
            with ExitStack() as stack:
                try:
                    db = stack.enter_context(self._open(mode))
                except StoreError:
                    # On a full disk none can be made either.
                    if mode != "mode=rw" or self._logged():
                        raise
                    db = stack.enter_context(self._open("immutable=1"))
                if self._behind(db):
                    renewed = stack.enter_context(self._open(""))
                    db.conn.backup(renewed.conn)
                    migrations().apply(renewed)
                    db = renewed
                db.execute("pragma query_only = on")
                yield db
        except _MISREAD as error:
            raise self._misread(error) from error

    @contextmanager
    def _writing(self, verb: str, *, create: bool = False) -> Iterator[Database]:
        """The lock and one transaction, which an exception rolls back."""
        if not create and not self.readonly and not self.database.exists():
            raise StoreError(
                f"the store {self.root} is empty: `{verb}` has nothing to work on",
                "`editctl apply` makes the first version",
            )
        with self.lock(verb):
            try:
                with self._open("mode=rwc") as db:
                    db.enable_wal()
                    # A transaction that begins by reading cannot wait when it comes to write, and a reader that opens
                    # the database holds it for a moment.
                    db.execute("begin immediate")
                    try:
                        migrations().apply(db)
                        yield db
                        db.execute("commit")
                    except BaseException:
                        db.rollback()
                        raise
            except _MISREAD as error:
                from editctl.store import care

                if self.database.exists() and care.damage(self):
                    raise self._misread(error) from error
                raise

    def _logged(self) -> bool:
        """Whether SQLite's log holds something that may not be in the database file."""
        log = self.database.with_name(f"{self.database.name}-wal")
        return log.exists() and log.stat().st_size > 0

    def _behind(self, db: Database) -> bool:
        """Whether a database was written by an earlier editctl."""
        return len(migrations().applied(db)) < len(STEPS)

    @contextmanager
    def _open(self, mode: str) -> Iterator[Database]:
        """A connection; without a mode to an empty database in memory. Troubles with the file become StoreError."""
        from sqlite_utils import Database

        connection: sqlite3.Connection | None = None
        try:
            uri = f"{self.database.absolute().as_uri()}?{mode}" if mode else ":memory:"
            connection = sqlite3.connect(uri, uri=True)
            db = Database(connection)
            if unknown := {m.name for m in migrations().applied(db)} - {step.__name__ for step in STEPS}:
                raise StoreError(
                    f"the store {self.root} was written by a newer editctl (it has {', '.join(sorted(unknown))})",
                    "upgrade editctl: `pip install --upgrade editctl`",
                )
            yield db
        except sqlite3.DatabaseError as error:
            raise self._trouble(error) from error
        finally:
            if connection is not None:
                connection.close()

    def _misread(self, error: Exception) -> StoreError:
        """What a row means that cannot be read."""
        what = f"{type(error).__name__}: {error}"
        return StoreError(
            f"the store's database {self.database} holds what cannot be read ({what})", "`editctl verify` tells more"
        )

    def _trouble(self, error: sqlite3.Error) -> Exception:
        """What a trouble of SQLite means to the user; the error itself if it is a bug."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the upper bits tell kinds of the same trouble apart
        if code not in _REMEDIES:
            return error
        trouble, remedy = _REMEDIES[code]
        return StoreError(f"the store's database {self.database} {trouble}", remedy)


def _holder(note: Path) -> str:
    try:
        holder: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        return f"`{holder['verb']}` of {holder['who']} (pid {holder['pid']}) since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # between taking the lock and saying so
        return "another process"
