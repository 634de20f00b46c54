"""A record of a benchmark on its way to an edit: what it says, what a spec can hold of it, and what is left.

Knows: how a prompt becomes a relation with {}, which texts a spec refuses, and that nothing of a record is lost: a
value has a home in the edit, exactly as it stood, or stays where it was under `extra`. Refuses: what the fields of a
format mean, and records that cannot be edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from editctl import spec
from editctl.spec import MAX_ITEMS, SLOT, Edit, quoted

Path = tuple[str | int, ...]
"""The way to a value of a record: keys, and positions in lists."""


class Refused(Exception):
    """A record cannot be an edit: a reason of few words, which is counted, and what exactly is wrong."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Asked(NamedTuple):
    """A probe as the record words it."""

    prompt: str
    answers: Sequence[str] = ()
    kind: str = ""
    group: str = ""


class Aside(NamedTuple):
    """Something of a record that is no part of the edit but stays under `extra`."""

    reason: str
    message: str


Check = Callable[[Edit, Any], bool]
"""Whether an edit holds a value of the record exactly as it stood."""


@dataclass
class Piece:
    """What one record gave to an edit."""

    record: int
    rest: dict[str, Any]
    homes: list[tuple[Path, Check]] = field(default_factory=list)


@dataclass
class Draft:
    """The parts of an edit, in the words of its record."""

    piece: Piece
    subject: str = ""
    relation: str = ""
    target_new: str = ""
    target_true: str = ""
    relation_id: str = ""
    """What the benchmark calls the relation: two facts of one subject under it contradict each other."""
    paraphrases: list[str] = field(default_factory=list)
    locality: list[Asked] = field(default_factory=list)
    portability: list[Asked] = field(default_factory=list)
    generation: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    aim: str = ""
    """Which of zsRE's two targets this is; empty where there is no choice."""
    asides: list[Aside] = field(default_factory=list)
    others: list[Piece] = field(default_factory=list)
    """Of records that say the same."""

    def value(self, path: Path) -> Any:
        """What stands there; None if nothing does."""
        found: Any = self.piece.rest
        for part in path:
            if isinstance(part, int):
                found = found[part] if isinstance(found, list) and part < len(found) else None
            else:
                found = found.get(part) if isinstance(found, dict) else None
        return found

    def need(self, *path: str | int) -> str:
        """A text without which there is no edit.

        Raises:
            Refused: there is none.
        """
        value = self.value(path)
        if value is None:
            raise Refused("field missing", f"{_name(path)} is missing")
        text = _text(value)
        if text is None:
            raise Refused("field of another type", f"{_name(path)} is {_kind(value)}, not a text")
        return text

    def text(self, *path: str | int) -> str:
        """A text that may be absent; another value stays aside."""
        value = self.value(path)
        text = _text(value)
        if text is None and value is not None:
            self.aside("field of another type", f"{_name(path)} is {_kind(value)}, not a text")
        return text or ""

    def texts(self, *path: str | int) -> list[str]:
        """A list of texts, or a text alone; lists in it are opened, other values stay aside."""
        value = self.value(path)
        found = list(flat(value))
        if len(found) < _leaves(value):
            self.aside("field of another type", f"{_name(path)} holds more than texts")
        return found

    def items(self, *path: str | int) -> list[tuple[Path, Any]]:
        """The items of a list that may be absent, each with its path; another value stays aside."""
        value = self.value(path)
        if value is not None and not isinstance(value, list):
            self.aside("field of another type", f"{_name(path)} is {_kind(value)}, not a list")
        return [((*path, at), item) for at, item in enumerate(value)] if isinstance(value, list) else []

    def aside(self, reason: str, message: str) -> None:
        """Something that is no part of the edit."""
        self.asides.append(Aside(reason, message))

    def home(self, path: Path, check: Check) -> None:
        """Say how to tell that the edit holds the value exactly."""
        self.piece.homes.append((path, check))

    def fact(
        self, subject: Path, prompt: Path, target_new: Path, target_true: Path = (), *, template: bool = False
    ) -> None:
        """The four texts of the edit, with their homes.

        Args:
            template: the prompt may have {} for the subject already.

        Raises:
            Refused: one is missing, or the prompt does not name the subject once.
        """
        self.subject = self.need(*subject).strip()
        self.relation = relation(self.need(*prompt), self.subject, template=template)
        self.target_new = self.need(*target_new).strip()
        self.target_true = self.text(*target_true).strip() if target_true else ""
        self.home(subject, lambda edit, value: edit.subject == value)
        self.home(prompt, lambda edit, value: value in (edit.relation, edit.prompt))
        self.home(target_new, lambda edit, value: edit.target_new == value)
        if target_true:
            self.home(target_true, lambda edit, value: edit.target_true == value)

    def reworded(self, *path: str | int) -> None:
        """A text or a list of texts as paraphrases."""
        self.paraphrases += self.texts(*path)
        self.home(path, lambda edit, value: among(value, edit.paraphrase_prompts))

    def written(self, *path: str | int) -> None:
        """A text or a list of texts as openings of free text."""
        self.generation += self.texts(*path)
        self.home(path, lambda edit, value: among(value, edit.generation_prompts))

    def probe(self, where: str, prompt: Path, answer: Path, kind: str = "") -> Asked | None:
        """A probe of `locality` or `portability`, when the record has one; its values have no home yet."""
        if self.value(prompt) is None:
            return None
        made = Asked(self.text(*prompt), self.texts(*answer), kind)
        getattr(self, where).append(made)
        return made

    def asked(self, where: str, prompt: Path, answer: Path, kind: str = "") -> None:
        """A probe of `locality` or `portability`, when the record has one, with the homes of its values."""
        made = self.probe(where, prompt, answer, kind)
        if made is None:
            return
        wanted = made.prompt, tuple(made.answers)
        self.home(prompt, lambda edit, value: self.alone(where, made) and value in getattr(edit, f"{where}_prompts"))
        self.home(
            answer, lambda edit, value: self.alone(where, made) and _plainly(value) and wanted in said(edit, where)
        )

    def alone(self, where: str, probe: Asked) -> bool:
        """Whether no other probe becomes one with it: which said what would be in the edit no more."""
        return sum(_one(where, other) == _one(where, probe) for other in getattr(self, where)) == 1

    def absorb(self, other: Draft) -> None:
        """Take over what another draft of the same edit asks, and its record."""
        self.paraphrases += [text for text in other.paraphrases if text not in self.paraphrases]
        self.locality += [probe for probe in other.locality if probe not in self.locality]
        self.portability += [probe for probe in other.portability if probe not in self.portability]
        self.generation += [text for text in other.generation if text not in self.generation]
        self.tags += [tag for tag in other.tags if tag not in self.tags]
        self.target_true = self.target_true or other.target_true
        self.asides += other.asides
        self.others += [other.piece, *other.others]

    def check(self) -> None:
        """See that a spec can hold the edit itself.

        Raises:
            Refused: it cannot.
        """
        table = {"subject": self.subject, "relation": self.relation, "target_new": self.target_new}
        _, problems = spec.judge(table | {"target_true": self.target_true})
        _drop(dict.fromkeys(("target_true",), ""), problems, [])

    def fit(self) -> tuple[Edit, list[Aside]]:
        """What a spec can hold of it, without a name, and what it cannot; after `check`."""
        asides = list(self.asides)
        table: dict[str, Any] = {"subject": self.subject, "relation": self.relation, "target_new": self.target_new}
        table |= {"target_true": self.target_true, "tags": self.tags}
        table["paraphrases"] = self._prompts(self.paraphrases, asides)
        table["generation"] = self._prompts(self.generation, asides)
        for name in ("locality", "portability"):
            probes = _united(name, getattr(self, name), asides)
            kept = [probe for probe in probes if self._holds_no_slot(probe.prompt, asides)]
            table[name] = [
                {"prompt": slotted(probe.prompt, self.subject), "answer": [text.strip() for text in probe.answers]}
                | {key: value for key, value in (("kind", probe.kind), ("group", probe.group)) if value}
                for probe in kept
            ]
        while True:
            edit, problems = spec.judge(table)
            if not problems:
                return edit, asides
            _drop(table, problems, asides)

    def _prompts(self, texts: Iterable[str], asides: list[Aside]) -> list[str]:
        return [slotted(text, self.subject) for text in texts if self._holds_no_slot(text, asides)]

    def _holds_no_slot(self, text: str, asides: list[Aside]) -> bool:
        if SLOT in text:
            asides.append(Aside("holds {}", f"a prompt holds {{}}, which would stand for the subject: {quoted(text)}"))
        return SLOT not in text


def _one(where: str, probe: Asked) -> tuple[str, ...]:
    """What probes have in common that become one: the prompt; for portability, kind and group too."""
    prompt = probe.prompt.strip()
    return (prompt, probe.kind, probe.group) if where == "portability" else (prompt,)


def _united(where: str, probes: Sequence[Asked], asides: list[Aside]) -> list[Asked]:
    """Probes of one prompt as one, with the answers of all."""
    found: dict[tuple[str, ...], Asked] = {}
    for probe in probes:
        key = _one(where, probe)
        known = found.setdefault(key, probe)
        if known is not probe:
            more = [text for text in probe.answers if text not in known.answers]
            found[key] = known._replace(answers=[*known.answers, *more])
            if not more:
                asides.append(Aside("repeated", f"a {where} probe stands there twice: {quoted(probe.prompt)}"))
    return list(found.values())


_REASONS = (
    (" is empty", "empty"),
    (" characters, at most ", "too long"),
    (" items, at most ", "too many"),
    (" contains {}", "holds {}"),
    (" contains ", "hidden character"),
    (" repeats ", "repeated"),
    (" is the prompt of the edit itself", "repeated"),
    (" is a prompt that the edit changes", "asks for what changes"),
    (" has no answer", "no answer"),
    (" are both ", "no change"),
    (" places {}", "holds {}"),
    (" beside {}", "subject twice"),
)
"""What of a problem's message tells the reason that is counted."""


def _drop(table: dict[str, Any], problems: Sequence[tuple[Path, str]], asides: list[Aside]) -> None:
    """Take what is wrong out of the table.

    Raises:
        Refused: without it there is no edit.
    """
    gone: set[Path] = set()
    for where, message in problems:
        # what is wrong is told before the texts it is about
        told = message.partition(': "')[0]
        reason = next((reason for mark, reason in _REASONS if mark in told), "not valid")
        name = str(where[0])
        if name in spec.REQUIRED:
            by_field = reason in ("empty", "too long", "hidden character")
            raise Refused(f"{reason}: {name.partition('_')[0]}" if by_field else reason, message)
        if where[-1] == "prompt":
            where = where[:-1]
        elif reason == "too many":
            where = (*where, MAX_ITEMS)
        gone.add(where)
        asides.append(Aside(reason, message))
    # what is within an item before the item, and the last item first: positions hold until they are used
    for where in sorted(gone, key=lambda where: (len(where), [p for p in where if isinstance(p, int)]), reverse=True):
        holder: Any = table
        for part in where[:-1]:
            holder = holder[part]
        if where[-1] == MAX_ITEMS:
            del holder[MAX_ITEMS:]
        else:
            del holder[where[-1]]


def relation(prompt: str, subject: str, *, template: bool = False) -> str:
    """The prompt with {} for the one place where it names the subject.

    Args:
        template: it may have that {} already.

    Raises:
        Refused: it names it in no or in several places, or only in other letter case or within a longer word: nobody
            can tell at which word such a fact is looked up.
    """
    prompt = prompt.strip()
    if not subject:
        raise Refused("empty: subject", "the subject is empty")
    if not prompt:
        raise Refused("empty: prompt", "the prompt is empty")
    slots = prompt.count(SLOT)
    places = spec.mentions(subject, prompt)
    if template and slots == 1 and not places:
        return prompt
    if slots:
        raise Refused("holds {}", f"the prompt holds {slots} places {{}} and names the subject {len(places)} times")
    if len(places) == 1:
        return prompt[: places[0]] + SLOT + prompt[places[0] + len(subject) :]
    shown = f"the subject {quoted(subject)}, the prompt {quoted(prompt, 200)}"
    if places:
        raise Refused("subject twice", f"the prompt names the subject {len(places)} times: {shown}")
    if subject in prompt:
        raise Refused("subject within a word", f"the subject stands only within a longer word: {shown}")
    if subject.casefold() in prompt.casefold():
        raise Refused("subject in other letters", f"the prompt spells the subject in other letter case: {shown}")
    raise Refused("subject absent", f"the prompt does not name the subject: {shown}")


def slotted(text: str, subject: str) -> str:
    """The text with {} for the first place where it names the subject in whole words; filled it is the text again."""
    text = text.strip()
    places = spec.mentions(subject, text)
    return text[: places[0]] + SLOT + text[places[0] + len(subject) :] if places else text


def left(piece: Piece, edit: Edit) -> dict[str, Any]:
    """What of a record the edit does not hold exactly; keys and lists stand as they did."""
    gone = {path for path, check in piece.homes if _held(piece.rest, path, check, edit)}
    return _without(piece.rest, gone) if gone else piece.rest


def _held(rest: dict[str, Any], path: Path, check: Check, edit: Edit) -> bool:
    found: Any = rest
    for part in path:
        try:
            found = found[part]
        except (KeyError, IndexError, TypeError):
            return False
    return check(edit, found)


def _without(value: Any, gone: set[Path], path: Path = ()) -> Any:
    """The value without what is gone; what holds nothing any more goes too."""
    if not any(where[: len(path)] == path for where in gone):
        return value
    if isinstance(value, list):
        made = [_without(item, gone, (*path, at)) for at, item in enumerate(value)]
        # an item that the edit holds wholly leaves {}; null and 0 are no such thing
        return [] if all(item in ({}, []) and item != old for item, old in zip(made, value, strict=True)) else made
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, item in value.items():
        where = (*path, name)
        if where not in gone:
            left = _without(item, gone, where)
            if left == item or left:
                kept[name] = left
    return kept


def among(value: Any, texts: Sequence[Any]) -> bool:
    """Whether a text is one of them, or a list stands among them in a row."""
    if isinstance(value, str):
        return value in texts
    if not isinstance(value, list):
        return False
    return any(list(texts[at : at + len(value)]) == value for at in range(len(texts) - len(value) + 1))


def said(edit: Edit, where: str) -> list[tuple[str, tuple[str, ...]]]:
    """Prompts and answers of `locality` or `portability`."""
    prompts = edit.locality_prompts if where == "locality" else edit.portability_prompts
    probes = edit.locality if where == "locality" else edit.portability
    return [(prompt, probe.answer) for prompt, probe in zip(prompts, probes, strict=True)]


def flat(value: Any) -> Iterable[str]:
    """The texts of a value, lists opened; whole numbers count as texts."""
    if isinstance(value, list):
        for item in value:
            yield from flat(item)
    elif (text := _text(value)) is not None:
        yield text


def _plainly(value: Any) -> bool:
    """Whether a list of answers says no more than its texts in their order: no lists side by side in it."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _leaves(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_leaves, value))
    return int(value is not None)


def _text(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _kind(value: Any) -> str:
    kinds: Mapping[type, str] = {bool: "a boolean", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null" if value is None else "a text")


def _name(path: Path) -> str:
    return spec.visible(".".join(str(part + 1) if isinstance(part, int) else part for part in path), 100)
