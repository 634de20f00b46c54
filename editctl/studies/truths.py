"""What a benchmark takes for true: every prompt of its specs with the answer it should have before any edit.

Knows: which prompts of an edit state a true fact, where their subjects stand, what is said when two records answer one
prompt differently, and how facts and plain text are packed into paragraphs. Refuses: tokens and models.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from editctl.atlas.corpus import Paragraph
from editctl.errors import InvalidInput
from editctl.metrics.values import LOCALITY, PARAPHRASE, REWRITE
from editctl.spec import SLOT, Edit, fill

ATTRIBUTE = "attribute"
"""A prompt about another subject for which the edit's new target is true (CounterFact's attribute prompts)."""
KINDS = (REWRITE, PARAPHRASE, LOCALITY, ATTRIBUTE)
"""Kinds of prompt; where two records answer one prompt differently, the earlier kind decides what is taught."""
ATTRIBUTES = "attribute_prompts"
"""The key under which an edit's `extra` holds them."""
PIECE = 200
"""Characters of plain text that stand together."""
HELD_OUT = 20
"""Of so many pieces of plain text one is kept from training, for perplexity."""


@dataclass(frozen=True)
class Truth:
    """One prompt with its answers."""

    kind: str
    prompt: str
    answers: tuple[str, ...]
    """The first is taught; any counts, since a benchmark may hold two true ones ("is a twin city of")."""
    subject: tuple[int, int] | None = None
    """Where in the prompt the subject stands, in characters; None if nobody knows."""

    @property
    def name(self) -> str:
        """The subject, or nothing."""
        return self.prompt[slice(*self.subject)] if self.subject else ""

    @property
    def sentence(self) -> str:
        """Prompt and answer as they are taught."""
        return f"{self.prompt} {self.answers[0]}."


def truths(edits: Sequence[Edit], probes: int = 0) -> list[Truth]:
    """All true facts of the specs, sorted by kind and prompt, each prompt once.

    Args:
        probes: at most so many locality and so many attribute prompts an edit; 0 for all of them.

    Raises:
        InvalidInput: fewer than two subjects have a true answer.
    """
    most = probes or None
    shapes = _shapes(edits)
    found: dict[str, Truth] = {}
    for kind in KINDS:
        for edit in edits:
            for truth in _of(edit, kind, shapes, most):
                known = found.setdefault(truth.prompt, truth)
                if known is not truth:
                    answers = tuple(dict.fromkeys((*known.answers, *truth.answers)))
                    found[truth.prompt] = replace(known, answers=answers, subject=known.subject or truth.subject)
    if len({truth.name for truth in found.values() if truth.name}) < 2:
        raise InvalidInput(
            f"of {len(edits)} edits fewer than two subjects have a true answer",
            "give specs with target_true, or locality probes with answers",
        )
    return sorted(found.values(), key=lambda truth: (KINDS.index(truth.kind), truth.prompt))


def _of(edit: Edit, kind: str, shapes: dict[str, list[str]], most: int | None) -> Iterator[Truth]:
    """The facts of one kind that an edit states."""
    if kind == REWRITE and edit.target_true:
        yield _about(kind, edit.relation, edit.subject, edit.target_true)
    elif kind == PARAPHRASE and edit.target_true:
        for paraphrase in edit.paraphrases:
            yield _about(kind, paraphrase, edit.subject, edit.target_true)
    elif kind == LOCALITY:
        for probe in edit.locality[:most]:
            if probe.answer:
                prompt = fill(probe.prompt, edit.subject)
                yield Truth(kind, prompt, tuple(probe.answer), _find(prompt, shapes))
    elif kind == ATTRIBUTE:
        for prompt in _attributes(edit)[:most]:
            yield Truth(kind, prompt, (edit.target_new,), _find(prompt, shapes))


def _attributes(edit: Edit) -> list[str]:
    """The prompts under `extra` for which the new target is true."""
    extra = json.loads(getattr(edit, "extra", "") or "{}")
    given = extra.get(ATTRIBUTES, []) if isinstance(extra, dict) else []
    return [text for text in given if isinstance(text, str)] if isinstance(given, list) else []


def _about(kind: str, phrasing: str, subject: str, answer: str) -> Truth:
    """A phrasing with {} or with the subject written out; of several mentions the last is the one asked about."""
    prompt = fill(phrasing, subject)
    start = phrasing.index(SLOT) if kind == REWRITE else prompt.rfind(subject)
    return Truth(kind, prompt, (answer,), (start, start + len(subject)) if start >= 0 else None)


def _shapes(edits: Iterable[Edit]) -> dict[str, list[str]]:
    """What stands before a subject, by what stands after it, in the specs' own prompts; longest first."""
    found: dict[str, set[str]] = {}
    for edit in edits:
        told = [_about(REWRITE, edit.relation, edit.subject, "")]
        for truth in told + [_about(PARAPHRASE, phrasing, edit.subject, "") for phrasing in edit.paraphrases]:
            if truth.subject is None:
                continue
            start, end = truth.subject
            # A paraphrase may have an unrelated sentence before it.
            before = re.split(r"(?<=[.!?])\s|\n", truth.prompt[:start])[-1]
            found.setdefault(truth.prompt[end:], set()).add(before)
    return {after: sorted(befores, key=lambda text: (-len(text), text)) for after, befores in found.items()}


def _find(prompt: str, shapes: dict[str, list[str]]) -> tuple[int, int] | None:
    """Where the subject of another prompt of the benchmark stands, by the phrasing that says most of it."""
    best: tuple[int, int] | None = None
    for end in range(1, len(prompt) + 1):
        for before in shapes.get(prompt[end:], ()):
            start = len(before)
            if start < end and prompt.startswith(before):
                if best is None or end - start < best[1] - best[0]:
                    best = (start, end)
                break
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Text


def pieces(lines: Iterable[str]) -> tuple[list[str], list[str]]:
    """Plain text in pieces of about `PIECE` characters, cut between words: what is trained on, and what is held out."""
    taught: list[str] = []
    kept: list[str] = []
    words: list[str] = []
    size = number = 0
    for line in (*lines, ""):
        for word in line.split():
            words.append(word)
            size += len(word) + 1
            if size >= PIECE:
                (taught if number % HELD_OUT else kept).append(" ".join(words))
                words, size, number = [], 0, number + 1
    if words:
        (taught if number % HELD_OUT else kept).append(" ".join(words))
    return taught or kept, kept


def paragraphs(
    facts: Sequence[Truth],
    text: Sequence[str],
    *,
    epoch: int,
    seed: int,
    share: float,
    length: int,
    count: Callable[[str], int],
) -> Iterator[Paragraph]:
    """One epoch: every fact once, among plain text, packed into paragraphs of at most `length` tokens.

    The same epoch and seed give the same paragraphs, so training can go on after any epoch.

    Args:
        share: of all tokens that are plain text; it is taken up where the epoch before left it.
        count: tokens of a sentence within a paragraph.
    """
    order = list(text)
    random.Random(seed).shuffle(order)
    rng = random.Random(f"{seed}-{epoch}")
    sizes = {piece: count(piece) for piece in order}
    wanted = share / (1 - share) * sum(count(fact.sentence) for fact in facts) if order else 0.0
    items: list[Truth | str] = list(facts)
    place = round(epoch * wanted / max(1, sum(sizes.values())) * len(order))
    while wanted > 0:
        piece = order[place % len(order)]
        items.append(piece)
        wanted, place = wanted - sizes[piece], place + 1
    rng.shuffle(items)
    paragraph, room = Paragraph(), length
    for item in items:
        size = sizes[item] if isinstance(item, str) else count(item.sentence)
        if size > room and paragraph.text:
            yield paragraph
            paragraph, room = Paragraph(), length
        room -= size
        if isinstance(item, str):
            paragraph.add(item)
            continue
        start = paragraph.add(item.sentence)
        if item.subject:
            paragraph.subjects.append((start + item.subject[0], start + item.subject[1], item.name))
        answer = start + len(item.prompt) + 1
        paragraph.objects.append((answer, answer + len(item.answers[0]) + 1))
    if paragraph.text:
        yield paragraph
