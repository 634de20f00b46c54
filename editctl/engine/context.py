"""Edits in front of a prompt: the edit that a prompt is about, and demonstrations of what such an edit means (IKE).

Zheng et al. 2023, Can We Edit Factual Knowledge by In-Context Learning?, section 3: a demonstration is a lesson's fact
as the new one, and a prompt with the answer that it should then have. Of three kinds there are one `copy` (the fact's
own prompt) to three `update` (a rewording; the new answer too) to four `retain` (a prompt that must not change; its old
answer). There is one a lesson, of the lessons most alike, the most alike last; then come the edit and the prompt.

    New Fact: {lesson's prompt} {new answer}
    Prompt: {prompt} {answer}

    New Fact: {edit's prompt} {target}
    Prompt: {prompt that is asked}

Which demonstrations an edit has is decided when it is written, and they are kept with it. Two things differ from the
paper. Where a network compares its sentences, here words do: by the cosine of TF-IDF vectors over words and pairs of
neighbouring words. And where each of its prompts is given the one edit that it tests, here a prompt is given the edit
whose subject it names, or most of it, so it is not given one that it names otherwise. Knows: demonstrations, and which
edit a text is about. Refuses: how a text is led around the model; `overlay` knows.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editctl import artifacts
from editctl.delta import Overlay
from editctl.engine.memory import in_chunks
from editctl.engine.methods import Context
from editctl.engine.model import Model
from editctl.engine.overlay import Detour, Detours
from editctl.engine.prompts import join
from editctl.engine.speak import NEW_TOKENS
from editctl.engine.writing import Job, Written
from editctl.events import Progress, StageStarted, silent
from editctl.metrics.consistency import Weights, terms
from editctl.spec import mentions

KIND = "ike"
KINDS = ("retain", "update", "retain", "copy", "update", "retain", "update", "retain")
"""Of which kind the demonstrations are, over and over; the first is that of the most alike lesson."""
ROWS = 32
"""Texts, each with its context, in one pass."""


def write(job: Job) -> Written:
    """A batch as entries that hold their demonstrations, taken from the lessons of a trained file.

    Raises:
        StoreError: the trained file is missing or spoiled.
    """
    settings = job.settings.own
    assert isinstance(settings, Context)
    lessons: list[dict[str, Any]] = artifacts.read(job.settings.artifact, job.library, KIND)[1]["lessons"]
    facts = [join(lesson["prompt"], lesson["target"]) for lesson in lessons]
    # By the lessons alone, so that what an edit is given does not depend on others.
    weigh = weighing(facts)
    vectors = [weigh(fact) for fact in facts]
    job.emit(StageStarted("target", len(job.requests), job.number))
    entries = []
    for done, request in enumerate(job.requests, 1):
        own = weigh(join(request.prompt, request.target))
        order = sorted(range(len(lessons)), key=lambda i: (-cosine(own, vectors[i]), i))
        shown = demonstrations([lessons[i] for i in order], settings.demonstrations)
        fact = {"id": request.id, "subject": request.subject, "prompt": request.prompt, "target": request.target}
        entries.append({**fact, "demonstrations": shown})
        job.emit(Progress("target", done, len(job.requests)))
    return Written(overlay=Overlay(KIND, tuple(entries), settings={"nearness": settings.nearness}))


# ---------------------------------------------------------------------------------------------------------------------
# Demonstrations


def demonstrations(lessons: Iterable[Mapping[str, Any]], most: int) -> list[str]:
    """At most so many demonstrations, in the order in which they are read.

    Args:
        lessons: the most alike first. One that has nothing for the kind that is due waits for its own.
    """
    left, found = list(lessons), list[str]()
    for number, kind in enumerate(itertools.islice(itertools.cycle(KINDS), most)):
        for place, lesson in enumerate(left):
            pairs = _pairs(lesson, kind)
            if pairs:
                asked, answer = pairs[number % len(pairs)]
                found.append(f"{_fact(lesson['prompt'], lesson['target'])} {join(asked, answer)}\n\n")
                del left[place]
                break
    return found[::-1]


def _pairs(lesson: Mapping[str, Any], kind: str) -> list[tuple[str, str]]:
    """What a lesson has for a kind of demonstration: prompts, each with its answer."""
    if kind == "copy":
        return [(lesson["prompt"], lesson["target"])]
    if kind == "update":
        return [(text, lesson["target"]) for text in lesson["rewordings"]]
    return [(text, answer) for text, answer in lesson["stays"]]


def _fact(prompt: str, target: str) -> str:
    """A new fact, up to where the prompt goes on from."""
    return f"New Fact: {join(prompt, target)}\nPrompt:"


# ---------------------------------------------------------------------------------------------------------------------
# Likeness

Vector = Mapping[str, float]
"""By word, and by pair of neighbouring words, its weight in a text; of length 1, or empty for a text without words."""


def weighing(documents: Iterable[str]) -> Callable[[str], Vector]:
    """What makes a text's TF-IDF vector; words and pairs that many of the documents have count little."""
    weights = Weights.of(map(_with_pairs, documents))

    def vector(text: str) -> Vector:
        found = weights.vector(_with_pairs(text))
        length = math.hypot(*found.values())
        return {word: value / length for word, value in found.items()}

    return vector


def cosine(one: Vector, other: Vector) -> float:
    """How alike two texts are, 0 to 1."""
    return min(1.0, math.fsum(value * other[word] for word, value in one.items() if word in other))


def share(part: Vector, whole: Vector) -> float:
    """How much of a text another one has in it, 0 to 1: the squared weights of its words that are there."""
    return min(1.0, math.fsum(value**2 for word, value in part.items() if word in whole))


def _with_pairs(text: str) -> str:
    """A text's words and, as words of their own, its pairs of neighbouring words."""
    words = terms(text)
    return " ".join([*words, *(f"{one}_{other}" for one, other in itertools.pairwise(words))])


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Contexts(Detours):
    """The model itself, with the most alike edit and its demonstrations in front of a text (see `Laid`)."""

    kind = KIND

    def __init__(self, model: Model, overlay: Overlay, library: Path) -> None:
        """
        Args:
            library: where trained files lie; it reads none.
        """
        super().__init__(model)
        self._entries = overlay.entries
        self._nearness = float(overlay.settings["nearness"])
        prompts = [str(entry["prompt"]) for entry in self._entries]
        shown = dict.fromkeys(text for entry in self._entries for text in entry["demonstrations"])
        self._weigh = weighing([*prompts, *shown])
        self._prompts = [self._weigh(prompt) for prompt in prompts]
        self._subjects = [self._weigh(str(entry["subject"])) for entry in self._entries]
        self._prefixes: dict[tuple[int, int], tuple[int, ...]] = {}
        seam = (*model.encode("Prompt:"), *self._own(model.encode("A")))
        # Most tokenizers begin a text without the space that stands before a word within one.
        self._gap = "" if model.tokenizer.decode(seam).endswith(": A") else " "

    def find(self, texts: Sequence[tuple[int, ...]]) -> list[Detour | None]:
        """The edit whose subject a text names most fully, of several the one whose prompt is most alike, or the last.
        None that is named less than `nearness`, or for which the model cannot read enough."""
        return [self._found(ids) for ids in texts]

    def _found(self, ids: tuple[int, ...]) -> Detour | None:
        text = self.model.tokenizer.decode(ids, skip_special_tokens=True)
        own = self._weigh(text)
        named = [
            # Scripts without spaces have no words to share.
            1.0 if mentions(str(entry["subject"]), text) else share(subject, own)
            for entry, subject in zip(self._entries, self._subjects, strict=True)
        ]
        most = max(named, default=0.0)
        if not named or most < self._nearness:
            return None
        among = (i for i, value in enumerate(named) if value == most)
        best = max(among, key=lambda i: (cosine(own, self._prompts[i]), i))
        room = self.model.context_length - NEW_TOKENS - len(self._own(ids))
        every = range(len(self._entries[best]["demonstrations"]) + 1)
        prefix = next((made for less in every if len(made := self._prefix(best, less)) <= room), None)
        return None if prefix is None else Detour(str(self._entries[best]["id"]), most, prefix)

    def _prefix(self, number: int, less: int) -> tuple[int, ...]:
        """What is read in front of a text, without so many of the first demonstrations."""
        if (number, less) not in self._prefixes:
            entry = self._entries[number]
            shown = "".join(entry["demonstrations"][less:])
            ids = self.model.encode(f"{shown}{_fact(entry['prompt'], entry['target'])}{self._gap}")
            self._prefixes[number, less] = tuple(ids)
        return self._prefixes[number, less]

    def read(self, ids: Tensor, keep: int) -> Tensor:
        """See `Detours`; of a text that has outgrown what the model reads, the end."""
        few = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(self._inner).parameters else {}

        def work(rows: Sequence[Tensor]) -> list[Tensor]:
            made: Tensor = self._inner(input_ids=torch.stack(list(rows)), use_cache=False, **few).logits
            return list(made[:, -keep:])

        return torch.stack(in_chunks(ids[:, -self.model.context_length :].unbind(), ROWS, work, silent, "contexts"))
