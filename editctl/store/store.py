"""What was done: versions are committed, the head moves, and everything can be looked up.

Knows: what may be recorded and what each operation does to the view. Refuses: to change or forget a version once
committed, tensors, models, terminals.

The view (head, candidates, aliases) is changed by operations alone. An operation records the view it left; undo and
redo append operations that move it back and forth along the line of what was done, as jj's operation log does, so
nothing is ever lost:

    apply a, apply b, undo      head a, redo would bring b
    … apply c                   head c, a new line: redo has nothing to bring; b is still there for `restore`
    … undo, undo                head a, then base: an undo never takes back another undo
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editctl.errors import StalePlan, StoreError
from editctl.files import header
from editctl.metrics.values import Answer, Metric
from editctl.store import rows
from editctl.store.connection import Connection, _holder
from editctl.store.records import (
    BASE,
    CANDIDATE,
    Difference,
    Draft,
    Evidence,
    LiveEdit,
    Operation,
    Stored,
    Version,
    View,
    _Made,
)
from editctl.store.rows import plain
from editctl.store.schema import digest, evidence_id, operation_seal, version_seal

if TYPE_CHECKING:
    from sqlite_utils import Database

_OPERATION = re.compile(r"op:([0-9]{1,9})")


class Store(Connection):
    """The versions and operations under one folder."""

    @property
    def deltas_dir(self) -> Path:
        """Where the factor files lie, `NAME.safetensors` each."""
        return self.root / "deltas"

    @property
    def stats_dir(self) -> Path:
        """Where the second moments of keys are cached."""
        return self.root / "stats"

    @property
    def artifacts_dir(self) -> Path:
        """Where the files that were trained lie."""
        return self.root / "artifacts"

    def measured(self, base: str) -> list[dict[str, Any]]:
        """The second moments of a model's keys that are in the cache: what each says of itself, blocks in order."""
        found = (header(path)[1] for path in self.stats_dir.glob("*.safetensors") if ".part" not in path.name)
        return sorted((about for about in found if about.get("base") == base), key=lambda about: int(about["layer"]))

    def footprint(self, version: Version) -> tuple[int, int, tuple[str, ...]]:
        """How many factor files a version has, their bytes, and the kinds of update in them: thin, sparse and dense
        ones of the weights, then those of overlays."""
        total, kinds, overlays, names = 0, set(), set(), self.deltas(version)
        for name in names:
            path = self.deltas_dir / f"{name}.safetensors"
            if not path.is_file():
                continue
            total += path.stat().st_size
            tensors, about = header(path)
            parts = {key.rpartition(".")[2] for key in tensors}
            if over := about.get("overlay"):
                overlays.add(over["kind"])
            else:
                kinds.add("dense" if "dense" in parts else "sparse" if "mask" in parts else "thin")
        return len(names), total, (*sorted(kinds), *sorted(overlays))

    # Reading

    def view(self) -> View:
        """Head, candidates and aliases as they are now."""
        with self._reading() as db:
            return rows.view(db)

    def head(self) -> Version | None:
        """The version the model is at; None is the unedited model."""
        with self._reading() as db:
            return rows.find(db, rows.view(db).head)

    def versions(self) -> list[Version]:
        """All versions, newest first."""
        with self._reading() as db:
            return rows.versions(db)

    def resolve(self, ref: str) -> Version | None:
        """The version a ref names; None is the unedited model.

        Refs: `@` the head, `@-` the version below it, `@-2` two below, `base`, an alias, a version id or a prefix of at
        least 4 digits that only one version has.

        Raises:
            StoreError: nothing, or more than one version, has that name.
        """
        with self._reading() as db:
            return rows.resolve(db, ref)

    def edits(self, version: Version | None) -> tuple[LiveEdit, ...]:
        """What is live in the version, in order of application."""
        with self._reading() as db:
            return rows.live(db, version.id if version else "")

    def near(self, version: Version | None, names: Iterable[str]) -> tuple[tuple[LiveEdit, ...], int]:
        """The live edits of a version that have one of these ids or prompts, in order, and how many others there are;
        reading all of very many takes longer than comparing them."""
        with self._reading() as db:
            return rows.near(db, version.id if version else "", names)

    def count(self, version: Version) -> int:
        """How many edits are live in the version."""
        with self._reading() as db:
            return rows.live_count(db, version.id)

    def differing(self, old: Version | None, new: Version | None) -> tuple[tuple[LiveEdit, ...], tuple[LiveEdit, ...]]:
        """The live edits that only one of two versions has as they are, weights aside: of the old, of the new."""
        with self._reading() as db:
            return rows.differing(db, old.id if old else "", new.id if new else "")

    def compare(self, old: Version | None, new: Version | None) -> Difference:
        """What differs between two versions: facts, answers to the same prompts, metrics, sizes of the updates."""
        before, after = ({live.id: live.known for live in side} for side in self.differing(old, new))
        answers = self.answers(new)
        earlier = self.last_answers(old, list({answer.edit for answer in answers}))
        said = {(a.kind, a.prompt): a.after for a in earlier}
        # Of an edit that the old version lacks, what was said before it was applied is known.
        were = [(said.get((a.kind, a.prompt), a.before), a) for a in answers]
        return Difference(
            old=old,
            new=new,
            facts=(before, after),
            moved=tuple((was, answer) for was, answer in were if was != answer.after),
            metrics=(self.metrics(old), self.metrics(new)),
            norms=(old.norms if old else {}, new.norms if new else {}),
        )

    def deltas(self, version: Version | None) -> tuple[str, ...]:
        """Names of the version's factor files in order of application."""
        with self._reading() as db:
            return rows.deltas(db, version.id if version else "")

    def answers(self, version: Version | None) -> tuple[Answer, ...]:
        """What the model said when the version was made; a score that was not a number comes back as None."""
        return tuple(rows.answer(row) for row in self._details("answers", version))

    def last_answers(self, version: Version | None, edits: Sequence[str]) -> tuple[Answer, ...]:
        """What was said to the prompts of these edits when they were last asked, at the version or below it."""
        with self._reading() as db:
            return rows.last_answers(db, version.id if version else "", edits)

    def metrics(self, version: Version | None) -> tuple[Metric, ...]:
        """The version's metrics."""
        return tuple(rows.metric(row) for row in self._details("metrics", version))

    def events(self, version: Version | None) -> tuple[str, ...]:
        """The JSON lines of the run that made the version."""
        return tuple(row["line"] for row in self._details("events", version))

    def evidence(self, version: str | None = None, kind: str | None = None) -> list[Evidence]:
        """What was found out about a version ("" for the unedited model), or about any; newest first."""
        with self._reading() as db:
            return rows.evidence(db, version, kind)

    def _details(self, table: str, version: Version | None) -> list[dict[str, Any]]:
        with self._reading() as db:
            return rows.details(db, table, version.id if version else "")

    def operations(self, limit: int | None = None) -> list[Operation]:
        """The operations, newest first."""
        with self._reading() as db:
            return rows.operations(db, limit)

    def reviews(self, version: Version) -> list[Operation]:
        """What was accepted and rejected of a version, oldest first; what was undone does not count."""
        with self._reading() as db:
            done, _ = rows.line(db)
        return [op for op in done if op.verb in ("accept", "reject") and op.about == version.id]

    def steps_down(self, version: Version, ancestor: Version | None) -> int:
        """Versions between a version and one below it (None for the unedited model); -1 if that is not below it."""
        with self._reading() as db:
            return rows.depth(db, version.id, ancestor.id if ancestor else "")

    def holder(self) -> str:
        """Who else is changing the store now: verb, user, host, process, since when; "" when nobody is.

        A note that a killed process left says nothing: whether the lock is taken decides. Asked often where nobody
        writes, it costs a look for the note.
        """
        note = self.root / "lock.json"
        return _holder(note) if note.exists() and self.busy() else ""

    # Writing

    def commit(
        self,
        draft: Draft,
        *,
        expected_head: str,
        verb: str = "apply",
        command: str = "",
        note: str = "",
        instead_of: str = "",
        without: Sequence[str] = (),
        hold: str = "",
    ) -> Version:
        """Record the draft as a version and move the head to it, all or nothing.

        Args:
            instead_of: the version that the draft was made from by a review, which closes it if it is a candidate.
            without: ids of the edits that the review took out.
            hold: why the version must wait for review; then it becomes a candidate and the head stays.

        Raises:
            StalePlan: the head is not `expected_head` any more.
            StoreError: a factor file, a trained file that one needs, or the parent is not in the store.
            Locked: another process is writing.
        """
        with self._writing(verb, create=True) as db:
            view = rows.view(db)
            if view.head != expected_head:
                raise StalePlan(
                    f"the head is {view.head or BASE}, but this was made for {expected_head or BASE}",
                    "another command moved the head in the meantime; run `editctl plan` again",
                )
            if draft.parent and rows.find(db, draft.parent) is None:
                raise StoreError(f"the parent version {draft.parent} is not in the store {self.root}", rows.look(db))
            for name in dict.fromkeys(live.delta for live in draft.edits):
                if not (path := self.deltas_dir / f"{name}.safetensors").is_file():
                    raise StoreError(
                        f"the factor file {path} is missing; nothing was recorded",
                        "run the command again, or restore the file from a backup of the store",
                    )
                for content in trained_files(path):
                    if not (trained := self.artifacts_dir / f"{content}.safetensors").is_file():
                        raise StoreError(
                            f"the trained file {trained} is missing, which {path} needs; nothing was recorded",
                            "restore it from a backup of the store",
                        )
            version = self._insert(db, draft)
            n = len(draft.edits)
            description = f"version {version.id} with {n} edit{'' if n == 1 else 's'}"
            description += f", without {', '.join(without)}" if without else ""
            view = _closed(view, instead_of)
            if hold:
                description += f", a candidate: {hold}"
                aliases = {**view.aliases, CANDIDATE: version.id}
                view = replace(view, candidates=(*view.candidates, version.id), aliases=aliases)
            else:
                view = replace(view, head=version.id)
            about = instead_of or version.id
            self._record(db, verb, view, command, description, note=note, about=about, edits=tuple(without))
            return version

    def add_evidence(self, version: str, kind: str, edit: str, data: Mapping[str, Any]) -> Evidence:
        """Keep what was found out about a version ("" for the unedited model); the view stays as it is.

        Raises:
            StoreError: there is no such version.
            Locked: another process is writing.
        """
        with self._writing(kind, create=True) as db:
            if version and rows.find(db, version) is None:
                raise StoreError(f"the version {version} is not in the store {self.root}", rows.look(db))
            row = {"version": version, "kind": kind, "edit": edit, "data": plain(dict(data))}
            row |= {"at": self._time(), "who": self._who}
            last = next(iter(rows.evidence(db, limit=1)), None)
            db.table("evidence").insert({"id": evidence_id(row, last.id if last else ""), **row})
            return rows.evidence(db, limit=1)[0]

    def accept(
        self, ref: str = CANDIDATE, *, note: str = "", edits: Sequence[str] = (), command: str = ""
    ) -> Operation:
        """Make a candidate the head, or record that some of its edits were found good.

        Raises:
            StoreError: it is no candidate, or has no such edits.
            StalePlan: the head is not the version that the candidate was made on any more.
        """
        with self._writing("accept") as db:
            version, view = self._reviewed(db, ref, edits), rows.view(db)
            if edits:
                description = f"accepted {', '.join(edits)} of version {version.id}"
                more = {"note": note, "about": version.id, "edits": tuple(edits)}
                return self._record(db, "accept", view, command, description, **more)
            _check_candidate(version, view)
            if version.parent != view.head:
                raise StalePlan(
                    f"candidate {version.id} was made on {version.parent or BASE}, the head is now {view.head or BASE}",
                    "apply the specs again on the head, or go back with `editctl restore` first",
                )
            view = replace(_closed(view, version.id), head=version.id)
            return self._record(
                db, "accept", view, command, f"accepted version {version.id}", note=note, about=version.id
            )

    def reject(self, ref: str = CANDIDATE, *, note: str = "", command: str = "") -> Operation:
        """Take a candidate from those that wait for review; it stays in the store.

        Raises:
            StoreError: it is no candidate.
        """
        with self._writing("reject") as db:
            version, view = self._reviewed(db, ref, ()), rows.view(db)
            _check_candidate(version, view)
            view = _closed(view, version.id)
            return self._record(
                db, "reject", view, command, f"rejected version {version.id}", note=note, about=version.id
            )

    def undo(self, command: str = "") -> Operation:
        """Take back the last operation that is in effect.

        Raises:
            StoreError: nothing is in effect.
        """
        with self._writing("undo") as db:
            done, undone = rows.line(db)
            if not done:
                raise StoreError(
                    "nothing to undo: the head is where the store began",
                    "`editctl redo` comes forward again" if undone else "`editctl apply` makes the first version",
                )
            last = done[-1]
            view = rows.view(db, last.parent)
            return self._record(db, "undo", view, command, f"undid operation {last.id} ({last.verb})", undoes=last.id)

    def redo(self, command: str = "") -> Operation:
        """Do again what was undone last.

        Raises:
            StoreError: nothing is undone, or another operation came after the undo.
        """
        with self._writing("redo") as db:
            _, undone = rows.line(db)
            if not undone:
                raise StoreError(
                    "nothing to redo: the last operation is not an undo, or all that was undone is redone",
                    "`editctl restore op:N` goes to the head of any operation, also one undone earlier",
                )
            undo, undid = undone[-1]
            description = f"redid operation {undid.id} ({undid.verb})"
            return self._record(db, "redo", undid.view, command, description, undoes=undo)

    def restore(self, ref: str, command: str = "") -> Operation:
        """Move the head to any version, or to where it was after operation N (`op:N`); aliases stay.

        Raises:
            StoreError: there is no such version or operation, it was never accepted, or the head is there already.
        """
        with self._writing("restore") as db:
            view = rows.view(db)
            if match := _OPERATION.fullmatch(ref):
                heads = {operation.id: operation.head for operation in rows.operations(db)}
                number = int(match[1])
                if number not in heads:
                    raise StoreError(f"there is no operation {number}", "`editctl log` lists the operations")
                head = heads[number]
            else:
                version = rows.resolve(db, ref)
                head = version.id if version else ""
                if head and head not in {operation.head for operation in rows.operations(db)}:
                    raise StoreError(
                        f"version {head} was never accepted, so the head cannot go there",
                        f"`editctl accept {head}` makes a candidate the head",
                    )
            if head == view.head:
                # Recording it would end the line of undone operations and give undo something without effect.
                raise StoreError(f"the head is at {head or BASE} already", "`editctl log` lists where else it can go")
            # It may wait again, its acceptance being undone; no head waits.
            view = replace(_closed(view, head), head=head)
            return self._record(db, "restore", view, command, f"restored {ref}: {head or BASE}")

    def set_alias(self, name: str, ref: str | None, command: str = "") -> Operation:
        """Let `name` stand for the version that `ref` names now, or for none; an alias of that name moves.

        Raises:
            StoreError: the name could be mistaken for another ref, nothing has the name `ref`, or nothing changes.
        """
        rows.check_alias(name)
        with self._writing("alias") as db:
            view = rows.view(db)
            aliases = {key: version for key, version in view.aliases.items() if key != name}
            if ref is None:
                description = f"removed the alias {name}"
            else:
                version = rows.resolve(db, ref)
                aliases[name] = version.id if version else ""
                description = f"{name} now stands for {aliases[name] or BASE}"
            if aliases == view.aliases:
                raise StoreError(
                    f"the alias {name} is not there"
                    if ref is None
                    else f"{name} stands for {aliases[name] or BASE} already",
                    "`editctl alias` lists the aliases",
                )
            return self._record(db, "alias", replace(view, aliases=aliases), command, description)

    # Inside

    def _insert(self, db: Database, draft: Draft) -> Version:
        """The rows of a version."""
        places = [(_edit_digest(live), live.delta, live.column) for live in draft.edits]
        alike = (a == b for a, b in zip(rows.places(db, draft.parent), places, strict=False))
        row = {
            **{f.name: plain(getattr(draft, f.name)) for f in fields(_Made)},
            "number": db.table("versions").count + 1,
            "kept": sum(1 for _ in itertools.takewhile(bool, alike)),
            "created_at": self._time(),
            "who": self._who,
        }
        # Of the edits too, since two drafts may have one row: a version whose notes alone changed. What the parent has
        # stands in the parent's name.
        row["id"] = version = digest([row, places[row["kept"] :]])[:12]
        db.table("versions").insert({**row, "seal": ""})

        def insert(table: str, items: Iterable[Mapping[str, Any]], first: int = 0) -> None:
            db.table(table).insert_all(
                {"version": version, "position": i, **item} for i, item in enumerate(items, first)
            )

        kept = row["kept"]
        edits = (
            {
                "digest": name,
                "id": live.id,
                "weights_fingerprint": live.known.weights_fingerprint,
                "notes_fingerprint": live.known.notes_fingerprint,
                "json": plain(live.edit.to_json()),
                "prompt": live.known.prompt,
            }
            for (name, _, _), live in zip(places[kept:], draft.edits[kept:], strict=True)
            if not isinstance(live.known, Stored)
        )
        db.table("edits").insert_all(edits, pk="digest", ignore=True)
        insert("version_edits", ({"edit": n, "delta": d, "column": c} for n, d, c in places[kept:]), kept)
        insert("answers", ({k: plain(v) for k, v in asdict(answer).items()} for answer in draft.answers))
        insert("metrics", (asdict(metric) for metric in draft.metrics))
        insert("events", ({"line": line} for line in draft.events))
        db.table("versions").update(version, {"seal": version_seal(db, version)})
        found = rows.find(db, version)
        assert found is not None
        return found

    def _record(self, db: Database, verb: str, view: View, command: str, description: str, **more: Any) -> Operation:
        last = next(iter(rows.operations(db, 1)), None)
        operation = Operation(
            id=last.id + 1 if last else 1,
            parent=last.id if last else 0,
            verb=verb,
            head_before=last.head if last else "",
            head=view.head,
            at=self._time(),
            who=self._who,
            command=command,
            undoes=more.pop("undoes", 0),
            description=description,
            candidates=view.candidates,
            aliases=dict(view.aliases),
            **more,
        )
        row = rows.operation_row(operation)
        seal = db.table("operations").get(last.id)["seal"] if last else ""
        db.table("operations").insert({**row, "seal": operation_seal(row, seal)})
        return operation

    def _reviewed(self, db: Database, ref: str, edits: Sequence[str]) -> Version:
        """The version that a review is about.

        Raises:
            StoreError: there is none, or it has no such edits.
        """
        if ref == CANDIDATE and CANDIDATE not in rows.view(db).aliases:
            raise StoreError("no version waits for review", "`editctl log` lists what was done")
        version = rows.resolve(db, ref)
        if version is None:
            raise StoreError("the unedited model needs no review", "name a version")
        if unknown := set(edits) - {live.id for live in rows.live(db, version.id)}:
            raise StoreError(
                f"version {version.id} has no edit {', '.join(sorted(unknown))}",
                f"`editctl show {ref}` lists its edits",
            )
        return version


def trained_files(path: Path) -> list[str]:
    """Content names of the trained files that a factor file was written with, and is read by."""
    about = header(path)[1]
    named = (about.get("params", {}).get("artifact"), (about.get("overlay") or {}).get("artifact"))
    return list(dict.fromkeys(filter(None, named)))


def _edit_digest(live: LiveEdit) -> str:
    return live.known.digest if isinstance(live.known, Stored) else digest(live.known.to_json())


def _closed(view: View, version: str) -> View:
    """The view without a candidate and the aliases that made it one."""
    if version not in view.candidates:
        return view
    candidates = tuple(name for name in view.candidates if name != version)
    aliases = {key: name for key, name in view.aliases.items() if key != CANDIDATE}
    if candidates:
        aliases[CANDIDATE] = candidates[-1]
    return View(view.head, candidates, aliases)


def _check_candidate(version: Version, view: View) -> None:
    """Make sure that a version waits for review.

    Raises:
        StoreError: it does not.
    """
    if version.id not in view.candidates:
        what = "is the head" if version.id == view.head else "is no candidate"
        raise StoreError(
            f"version {version.id} {what}: there is nothing to decide",
            "`editctl undo` takes the last operation back, `editctl reject REF --edit ID` takes edits out",
        )
