"""From a benchmark's file to spec files.

Knows: which format a file is of, which records repeat or contradict an earlier one, how edits are named, and where
files end. The file is read twice, so that memory holds an index and never the records: once to learn what can be
imported, and once to write it. Refuses: what fields mean (`formats`), what a spec can hold (`draft`), and to speak.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from editctl import amend, toml
from editctl.errors import InvalidInput, Problem
from editctl.files import PART, put_in_place
from editctl.importers.draft import Aside, Draft, Piece, Refused, left
from editctl.importers.formats import FORMATS, Format, Reading, aims, detect
from editctl.importers.names import ALIASES, ALT, NAMES, WITH_TARGET, name_of
from editctl.importers.stream import Record, records, unreadable
from editctl.spec import LIMITS, MAX_EDITS, MAX_ITEMS, Edit, nearest, quoted, slug, visible

MAX_PART = 40_000_000
"""Bytes of a spec file before another is begun; readers take 50 MB."""
LOOKED_AT = 100
"""Records in which a format is looked for."""
_DEPTH = 60


@dataclass(frozen=True)
class Row:
    """A record that was not imported, or something of a record that stayed aside."""

    record: int
    line: int
    case: str
    reason: str
    message: str
    aside: bool = False

    def problem(self, file: str) -> Problem:
        """As problems are told."""
        case = f" (case {self.case})" if self.case else ""
        return Problem(file, self.line, f"record {self.record}{case}: {self.message}")


Tell = Callable[[Row], None]
May = Callable[[list[Path], list[Path]], None]
"""Told the files that will be replaced and those that will be deleted; raises if they may not."""


@dataclass
class Survey:
    """What a file holds."""

    records: int = 0
    edits: int = 0
    merged: int = 0
    """Edits of records that say what an earlier record says, and became one with it."""
    refused: Counter[str] = field(default_factory=Counter)
    """Records that cannot be edits, by reason."""
    asides: Counter[str] = field(default_factory=Counter)
    """Probes and fields that stayed under `extra`, by reason; known when the edits were made."""


@dataclass
class _Index:
    """What earlier records said; texts by their hash."""

    prompts: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Prompt to target, record and order of the edit."""
    facts: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Subject and relation to target and record."""
    loads: Counter[int] = field(default_factory=Counter)
    """Questions that wait with an edit, by its order."""
    sizes: Counter[int] = field(default_factory=Counter)
    """Characters that an edit will keep under `extra`, by its order."""


@dataclass
class _Kept:
    """A record that is imported."""

    record: Record
    case: str
    parts: list[tuple[int, Draft, bool]]
    """Order of the edit, what the record says of it, and whether it is the first to."""
    shared: Draft | None = None
    home: int = 0
    """Order of the edit that keeps what is shared: the last of the record, when all others are written before."""


class Importer:
    """One benchmark file.

    Raises:
        InvalidInput: the file is no regular one, of no known format, or of several; or a target is named where none
            can be chosen.
    """

    def __init__(self, path: Path, form: str = "", *, target: str = "", limit: int | None = None) -> None:
        self.path, self.limit = path, limit
        self.detected = not form
        self.stamp = _stamp(path)
        self.format = _named(form) if form else self._detected()
        aimed = self._aims()
        if target and not aimed:
            told = self.format.name + (" on CounterFact's records" if self.format.name in WITH_TARGET else "")
            raise InvalidInput(f"--target is for zsRE, and {path} is {told}", "leave --target away")
        self.target = (target or ALT) if aimed else ""
        """What edits of zsRE's records aim at; empty where there are none."""
        self.survey = Survey()
        self._prompts: dict[int, tuple[int, int, int]] = {}
        self._last: dict[int, int] = {}

    def look(self, tell: Tell = lambda row: None) -> Survey:
        """Learn what can be imported.

        Args:
            tell: told every record that cannot be an edit.

        Raises:
            InvalidInput: the file is not JSON.
        """
        self.survey, self._last, index = Survey(), {}, _Index()
        for kept in self._kept(index, self.survey, tell):
            for order, _, first in kept.parts:
                self.survey.edits += first
                self.survey.merged += not first
                if not first:
                    self._last[order] = kept.record.number
            if kept.shared is not None:
                self._last[kept.home] = kept.record.number
        self._prompts = index.prompts
        return self.survey

    def edits(self, tell: Tell = lambda row: None) -> Iterator[Edit]:
        """The edits in order, after `look`.

        Args:
            tell: told what stayed aside.
        """
        waiting: dict[int, tuple[Record, str, Draft]] = {}
        taken: set[int] = set()
        next_order = 0
        self.survey.asides.clear()
        for kept in self._kept(_Index(), Survey(), lambda row: None):
            for order, draft, first in kept.parts:
                if first:
                    waiting[order] = kept.record, kept.case, draft
                else:
                    waiting[order][2].absorb(draft)
            if kept.shared is not None:
                waiting[kept.home][2].absorb(kept.shared)
            if kept.record.loose:
                aside = Aside("raw control characters", "its texts hold control characters that JSON wants escaped")
                waiting[kept.parts[0][0]][2].asides.append(aside)
            while next_order in waiting and self._last.get(next_order, 0) <= kept.record.number:
                record, case, draft = waiting.pop(next_order)
                edit, asides = self._finished(next_order, draft, case, taken)
                for aside in asides:
                    self.survey.asides[aside.reason] += 1
                    tell(Row(record.number, record.line, case, aside.reason, aside.message, aside=True))
                yield edit
                next_order += 1

    def write(
        self, out: Path, tell: Tell = lambda row: None, may: May = lambda replaced, deleted: None
    ) -> list[tuple[Path, int]]:
        """Write all edits, and take away the parts of an earlier import of that name; all files or none.

        Args:
            tell: told what stayed aside.
            may: asked when all is written but nothing in its place yet; what it raises leaves the files as they are.

        Returns:
            The files, with the number of edits in each.

        Raises:
            InvalidInput: the file changed since `look`.
        """
        head = f"# {visible(self.path.name, 200)}, imported as {self.format.name}\n{amend.head()}"
        with _Parts(out, head) as parts:
            self._see_it_is_the_same()
            for edit in self.edits(tell):
                parts.add(amend.table(edit))
            self._see_it_is_the_same()
            return parts.put_in_place(may)

    def _see_it_is_the_same(self) -> None:
        if _stamp(self.path) != self.stamp:
            raise InvalidInput(f"{self.path} changed while it was read", "import it again")

    def _aims(self) -> bool:
        """Whether there is a target to choose: LEME has CounterFact's records as well as zsRE's."""
        if self.format.name != "leme":
            return self.format.name in WITH_TARGET
        return any(aims(record.value) for record in islice(records(self.path, _is_record), self.limit))

    def advice(self) -> str:
        """What to do when no record is an edit."""
        if self.detected:
            return "look at what is said of each"
        with suppress(InvalidInput):
            return f"its records look like {self._detected().name}"
        return f"its records are not {self.format.name}'s"

    def _detected(self) -> Format:
        keys: list[str] = []
        for record in islice(records(self.path, _is_record), LOOKED_AT):
            if not isinstance(record.value, dict):
                continue
            found = detect(record.value)
            if len(found) > 1:
                raise InvalidInput(f"{self.path} may be {' or '.join(found)}", f"name one: import {found[0]} FILE")
            if found:
                return FORMATS[found[0]]
            keys = keys or [visible(key, 40) for key in record.value]
        told = f"its records have {', '.join(keys[:8])}" if keys else "it holds no objects"
        raise InvalidInput(
            f"{self.path} is of no known format: {told}", f"formats that can be imported: {', '.join(FORMATS)}"
        )

    def _kept(self, index: _Index, survey: Survey, tell: Tell) -> Iterator[_Kept]:
        """The records that are imported, with what the index knows of their edits."""
        orders = 0
        for record in islice(records(self.path, _is_record), self.limit):
            survey.records += 1
            case = _case(record)
            try:
                reading = self._read(record)
                for draft in reading.drafts:
                    draft.check()
                kept = self._placed(_Kept(record, case, []), reading, index, orders)
            except Refused as refused:
                survey.refused[refused.reason] += 1
                tell(Row(record.number, record.line, case, refused.reason, refused.message))
                continue
            orders += sum(first for _, _, first in kept.parts)
            yield kept

    def _read(self, record: Record) -> Reading:
        if record.flaw:
            raise Refused("key twice", record.flaw)
        if not isinstance(record.value, dict):
            raise Refused("no record", "it is no object")
        if _deep(record.value):
            raise Refused("nests too deep", f"it nests deeper than {_DEPTH} levels")
        # a character is at most six in the JSON of a spec
        if record.size > LIMITS["extra"] // 6 and len(toml.canonical(record.value)) > LIMITS["extra"]:
            raise Refused("too long: record", f"it has more than {LIMITS['extra']} characters")
        value = record.value
        if record.name and record.name not in map(str, value.values()):
            value = {"record name": record.name, **value}
        return self.format.reading(record.number, value, self.target)

    def _placed(self, kept: _Kept, reading: Reading, index: _Index, orders: int) -> _Kept:
        """Tell each edit's order; the index learns it when the whole record is sound.

        Raises:
            Refused: an edit repeats or contradicts an earlier one, or there is no room for what it asks.
        """
        number = kept.record.number
        prompts: dict[int, tuple[int, int, int]] = {}
        facts: dict[int, tuple[int, int]] = {}
        fresh = 0
        for draft in reading.drafts:
            prompt = draft.relation.replace("{}", draft.subject)
            target, key = hash(draft.target_new), hash(prompt)
            fact = hash((draft.subject, draft.relation_id)) if draft.relation_id else None
            known = index.prompts.get(key) or prompts.get(key)
            held = known or (index.facts.get(fact) or facts.get(fact) if fact is not None else None)
            if held is not None and held[0] != target:
                about = prompt if known else f"{draft.subject} ({draft.relation_id})"
                raise Refused("conflict", f"contradicts record {held[1]}: another target for {quoted(about, 200)}")
            if known is not None and not self.format.merges:
                raise Refused("repeated", f"repeats the edit of record {known[1]}: {quoted(prompt, 200)}")
            order = known[2] if known else orders + fresh
            fresh += known is None
            kept.parts.append((order, draft, known is None))
            prompts.setdefault(key, (target, number, order))
            if fact is not None:
                facts.setdefault(fact, (target, number))
        if reading.shared is not None:
            kept.shared = reading.shared
            kept.home = self._home(kept, index)
            index.loads[kept.home] += len(reading.shared.portability)
            index.sizes[kept.home] += _size(reading.shared)
        for order, draft, first in kept.parts:
            index.loads[order] += len(draft.portability) if first else 0
            index.sizes[order] += _size(draft) if self.format.merges else 0
        index.prompts.update({key: value for key, value in prompts.items() if key not in index.prompts})
        index.facts.update({key: value for key, value in facts.items() if key not in index.facts})
        return kept

    def _home(self, kept: _Kept, index: _Index) -> int:
        """The last edit of the record that has room for its questions, or the last."""
        assert kept.shared is not None
        more, size = len(kept.shared.portability), _size(kept.shared)
        found = sorted({order for order, _, _ in kept.parts}, reverse=True)
        for order in found:
            if index.loads[order] + more <= MAX_ITEMS and index.sizes[order] + size <= LIMITS["extra"]:
                return order
        for order in found:
            if index.sizes[order] + size <= LIMITS["extra"]:
                return order
        raise Refused("no room", f"its {len(found)} edits keep as much of other records as a spec can hold")

    def _finished(self, order: int, draft: Draft, case: str, taken: set[int]) -> tuple[Edit, list[Aside]]:
        """The edit with its name, its source and what is left of its records."""
        edit, asides = draft.fit()
        locality = []
        for probe, prompt in zip(edit.locality, edit.locality_prompts, strict=True):
            other = self._prompts.get(hash(prompt))
            if other is None or other[2] == order:
                locality.append(probe)
            else:
                message = f"a locality probe asks what record {other[1]} changes: {quoted(prompt)}"
                asides.append(Aside("asks for what changes", message))
        edit = edit.model_copy(update={"locality": tuple(locality)})
        pieces = [draft.piece, *draft.others]
        kept: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            kept[piece.record] = {**kept.get(piece.record, {}), **left(piece, edit)}
        extra: Mapping[str, Any] = {"records": list(kept.values())} if self.format.merges else kept[draft.piece.record]
        name = own = slug(edit.subject, edit.relation)
        number = draft.piece.record
        while hash(name) in taken:
            name, number = f"{own}-{number}", number + 1
        taken.add(hash(name))
        made = {
            "id": name,
            "source": self._source(pieces, case, draft.aim),
            "extra": toml.canonical(extra) if extra else "",
        }
        return edit.model_copy(update=made), asides

    def _source(self, pieces: Sequence[Piece], case: str, target: str) -> str:
        numbers = sorted({piece.record for piece in pieces})
        told = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
        aim = f", target {target}" if target else ""
        one = f" (case {case})" if case and len(numbers) == 1 else ""
        return f"{visible(self.path.name, 200)}, record{'s'[: len(numbers) > 1]} {told}{one}{aim}"


_HEAD = re.compile(rf"# .+, imported as ({'|'.join(map(re.escape, NAMES))})")
"""The first line of what an import wrote."""


def _part(out: Path, number: int) -> Path:
    return out.with_name(f"{out.stem}-{number:03}.toml")


def _imported(path: Path) -> bool:
    """Whether an import wrote the file."""
    try:
        with path.open("rb") as file:
            first = file.readline(2000)
    except OSError:
        return False
    return _HEAD.fullmatch(first.decode(errors="replace").rstrip()) is not None


def existing(out: Path) -> list[Path]:
    """What an import of this name may replace or delete: the file, and parts from 001 on up to the first absent one."""
    found = [out]
    while (path := _part(out, len(found))).exists():
        found.append(path)
    return [path for path in found if path.exists()]


class _Parts:
    """Spec files on their way: written beside their places, and put there when all are whole."""

    def __init__(self, out: Path, head: str) -> None:
        self.out, self.head = out, head
        self.done: list[tuple[Path, int]] = []
        self.file: Any = None
        self.count = self.bytes = 0

    def __enter__(self) -> _Parts:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        for path, _count in self.done:
            path.unlink(missing_ok=True)

    def add(self, table: str) -> None:
        data = f"\n{table}".encode()
        if self.file is None or self.count == MAX_EDITS or self.bytes + len(data) > MAX_PART:
            self._close()
            path = self.out.with_name(f"{self.out.name}.{os.getpid()}.{len(self.done)}{PART}")
            self.done.append((path, 0))
            self.file = path.open("wb")
            self.bytes = self.file.write(self.head.encode())
        self.bytes += self.file.write(data)
        self.count += 1

    def _close(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.done[-1] = self.done[-1][0], self.count
        self.file, self.count = None, 0

    def put_in_place(self, may: May) -> list[tuple[Path, int]]:
        self._close()
        several = len(self.done) > 1
        places = [_part(self.out, number) if several else self.out for number in range(1, len(self.done) + 1)]
        deleted = [path for path in existing(self.out) if path not in places and _imported(path)]
        may([path for path in places if path.exists()], deleted)
        placed = []
        for path, (part, count) in zip(places, self.done, strict=True):
            put_in_place(part, path)
            placed.append((path, count))
        self.done = []
        for path in deleted:
            path.unlink(missing_ok=True)
        return placed


def _named(form: str) -> Format:
    name = name_of(form)
    if not name:
        raise InvalidInput(f"no format {quoted(form)}", nearest(form, [*NAMES, *ALIASES]))
    return FORMATS[name]


def _is_record(value: Mapping[str, Any]) -> bool:
    return bool(detect(value)) or any(key in _FIRST_KEYS for key in value)


_FIRST_KEYS = {
    "case_id",
    "requested_rewrite",
    "edit",
    "portability",
    "locality",
    "id",
    "coupled_prompts_and_properties",
}
"""Keys of records whose values may be objects themselves, or that records begin with."""


def _case(record: Record) -> str:
    """What the benchmark calls the record."""
    value = record.value if isinstance(record.value, dict) else {}
    for key in ("case_id", "id", "known_id"):
        if isinstance(value.get(key), str | int):
            return visible(str(value[key]), 60)
    return visible(record.name, 60)


def _deep(value: Any) -> bool:
    """Whether a value nests deeper than any benchmark's does."""
    level: Iterable[Any] = [value]
    for _ in range(_DEPTH):
        level = [
            item
            for one in level
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _size(draft: Draft) -> int:
    return len(toml.canonical(draft.piece.rest))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # no path has a NUL
        if str(path) == "-":
            raise _passing(path) from error
        raise unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise _passing(path)
    return found.st_mtime_ns, found.st_size


def _passing(path: Path) -> InvalidInput:
    """What is said of a pipe, a terminal or a device."""
    return InvalidInput(f"{path} is no regular file, and an import is read twice", "save it to a file, and name that")
