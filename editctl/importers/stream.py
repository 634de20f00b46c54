"""The records of a JSON file, one after another, without the file in memory.

Knows: a list of records, an object from names to records, a record alone and a line for each; which line a record
begins in, and what is wrong with a file that is none of these. Refuses: what the fields of a record mean.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Mapping
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, NamedTuple

from editctl.errors import InvalidInput, Problem
from editctl.spec import quoted

MAX_RECORD = 32_000_000
"""Characters of the largest record; a list that never ends would otherwise be read into memory as one."""
_WINDOW = 1 << 20
_NEAR = 12
"""Characters before the end of what was read in which an error may mean no more than that something was cut."""
_SPACE = re.compile(r"[ \t\r\n]*")


class Record(NamedTuple):
    """One value of the file, and where it stands."""

    number: int
    """From 1."""
    line: int
    value: Any
    flaw: str = ""
    """Why it cannot be relied on: a key that stands twice, say."""
    name: str = ""
    """Its name, in an object from names to records."""
    loose: bool = False
    """Whether its texts hold control characters as they are, which JSON wants escaped."""
    size: int = 0
    """Characters of its JSON."""


def records(path: Path, is_record: Callable[[Mapping[str, Any]], bool]) -> Iterator[Record]:
    """The records of a file in order.

    Args:
        is_record: tells a record from an object whose values are records.

    Raises:
        InvalidInput: the file cannot be read, or is not JSON; with line and column.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:  # no path has a NUL
        raise unreadable(path, error) from error
    with file:
        yield from _Source(path, file).records(is_record)


def unreadable(path: Path, error: Exception) -> InvalidInput:
    """What is said of a file that is not there or not to be read."""
    told = getattr(error, "strerror", None) or "no such file"
    return InvalidInput(f"{path} cannot be read: {told}", "name a file that you may read")


class _Source:
    """A window of text that moves over the file."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        self.decode = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False
        self.mark, self.mark_line, self.mark_column = 0, 1, 1
        self.doubled = ""
        self.strict, self.loose = (
            JSONDecoder(strict=strict, object_pairs_hook=self._table) for strict in (True, False)
        )

    def records(self, is_record: Callable[[Mapping[str, Any]], bool]) -> Iterator[Record]:
        first = self.peek()
        if not first:
            raise self.wrong("the file is empty", "name a file that holds records")
        if first == "[":
            self.at += 1
            yield from self.items()
        elif first == "{":
            yield from self.objects(is_record)
        else:
            begin = quoted(self.text[self.at : self.at + 20])
            raise self.wrong(
                f"no JSON list or object of records; it begins with {begin}", "name a benchmark's JSON file"
            )
        if self.peek():
            raise self.wrong("more text follows where the records end", "the file may be two files in one")

    def items(self) -> Iterator[Record]:
        """The values of a list whose bracket was read."""
        number = 0
        while True:
            token = self.peek()
            if token == "]" and not number:
                break
            number += 1
            yield self.record(number)
            token = self.peek()
            if token != ",":
                break
            self.at += 1
            if self.peek() == "]":
                raise self.wrong("a comma before the end of the list", "take it out")
        if token != "]":
            raise self.cut(token, "the list")
        self.at += 1

    def objects(self, is_record: Callable[[Mapping[str, Any]], bool]) -> Iterator[Record]:
        """A record alone, one a line, or names and records."""
        start, line = self.at, self.line()
        key, value = self.first_pair()
        named = isinstance(value, dict) and not is_record({key: value}) and is_record(value)
        self.at = start
        if named:
            self.at += 1
            yield from self.pairs()
            return
        number = 0
        while self.peek() == "{":
            number += 1
            yield self.record(number)
        if number == 1 and self.peek() == ",":
            raise self.wrong(
                "records without brackets around them", "write [ before the first and ] after the last", line
            )

    def first_pair(self) -> tuple[str, Any]:
        """The first key and its value; the window still holds them afterwards."""
        start = self.at
        self.at += 1
        token = self.peek(start)
        if token != '"':
            return "", None
        key, _ = self.value(start)
        if self.peek(start) != ":":
            return "", None
        self.at += 1
        return key, self.value(start)[0]

    def pairs(self) -> Iterator[Record]:
        """The values of an object whose brace was read, with their names."""
        number = 0
        names: set[str] = set()
        while True:
            token = self.peek()
            if token != '"':
                raise self.cut(token, "the object")
            number += 1
            name = self.value()[0]
            if self.peek() != ":":
                raise self.cut(self.peek(), "the object")
            self.at += 1
            made = self.record(number)
            flaw = made.flaw or (f"the name {quoted(name)} stands twice" if name in names else "")
            names.add(name)
            yield made._replace(name=name, flaw=flaw)
            token = self.peek()
            if token != ",":
                break
            self.at += 1
        if token != "}":
            raise self.cut(token, "the object")
        self.at += 1

    def record(self, number: int) -> Record:
        self.peek()
        line, self.doubled = self.line(), ""
        value, loose = self.value()
        size = self.at - self.mark
        flaw = f"the key {quoted(self.doubled)} stands twice in it" if self.doubled else ""
        return Record(number, line, value, flaw, loose=loose, size=size)

    def value(self, keep: int | None = None) -> tuple[Any, bool]:
        """The next value, and whether it holds control characters that JSON wants escaped.

        Args:
            keep: what of the window must stay, from here on.
        """
        self.peek(keep)
        decoder, control = self.strict, None
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except JSONDecodeError as error:
                if error.msg.startswith("Invalid control character") and decoder is self.strict:
                    decoder, control = self.loose, self.broken(error)
                    continue
                cut = error.pos >= len(self.text) - _NEAR or error.msg.startswith("Unterminated string")
                if not (cut and self.more(keep)):
                    raise control or self.broken(error) from None
            except RecursionError:
                raise self.wrong("nests too deep", "no benchmark's records nest deeper than a few levels") from None
            except ValueError as error:
                if "digits" not in str(error):
                    raise
                raise self.wrong("a number has too many digits", "write it in quotes") from None
            else:
                # a number near the end of the window may go on behind it
                near = _NEAR if isinstance(value, int | float) else 0
                if end < len(self.text) - near or not self.more(keep):
                    self.at = end
                    return value, decoder is self.loose

    def peek(self, keep: int | None = None) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more(keep):
                return ""

    def more(self, keep: int | None = None) -> bool:
        """Read on; False, with the window as it was, at the end of the file."""
        if self.ended:
            return False
        if len(self.text) - self.at > MAX_RECORD:
            raise self.wrong(f"a record is longer than {MAX_RECORD // 1_000_000} million characters", "split the file")
        # twice as much each time, lest a long record be parsed from its begin a hundred times
        data = self.file.read(max(_WINDOW, len(self.text) - self.at))
        try:
            text = self.decode.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.place(len(self.text))[0] + error.object.count(b"\n", 0, error.start)
            byte = error.object[error.start]
            raise self.wrong(f"not UTF-8 text: byte 0x{byte:02x}", "save the file as UTF-8 JSON", line) from None
        self.ended = not data
        if keep is None and data:
            self.line()
            self.text, self.at, self.mark = self.text[self.at :], 0, 0
        self.text += text
        return bool(data)

    def place(self, position: int) -> tuple[int, int]:
        """Line and column of a position in the window that is not before the last one asked for by `line`."""
        lines = self.text.count("\n", self.mark, position)
        if not lines:
            return self.mark_line, self.mark_column + position - self.mark
        return self.mark_line + lines, position - self.text.rindex("\n", self.mark, position)

    def line(self) -> int:
        """The line of the next character; what is before it is not looked at again."""
        self.mark_line, self.mark_column = self.place(self.at)
        self.mark = self.at
        return self.mark_line

    def _table(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [key for key, _ in pairs]
            self.doubled = next(key for at, key in enumerate(names) if key in names[:at])
        return table

    def broken(self, error: JSONDecodeError) -> InvalidInput:
        line, column = self.place(error.pos)
        hint = "the file is cut short; get it again" if self.ended and error.pos >= len(self.text) - _NEAR else ""
        if error.msg.startswith("Unterminated string"):
            hint = "the file ends within a text; get it again"
        return self.wrong(
            f"not valid JSON: {error.msg} (column {column})", hint or "mend it there, or get it again", line
        )

    def cut(self, token: str, what: str) -> InvalidInput:
        if not token:
            return self.wrong(f"the file ends within {what}", "it is cut short; get it again")
        line, column = self.place(self.at)
        return self.wrong(
            f"not valid JSON: {quoted(token)} where {what} should go on or end (column {column})", "mend it there", line
        )

    def wrong(self, message: str, hint: str, line: int | None = None) -> InvalidInput:
        problem = Problem(str(self.path), line or self.place(self.at)[0], message, hint)
        return InvalidInput(f"{self.path} cannot be imported", "nothing was written", [problem])
