"""Prompts as token ids: where the subject ends, where the answer begins, and the contexts an edit is spoken in.

Knows: tokenization at the seams. Works on ids throughout; text is never decoded and encoded again. Refuses: forward
passes, but for sampling the contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from editctl.engine.model import Model
from editctl.errors import ModelError

CONTEXT_OPENINGS = ("The", "Therefore", "Because", "I", "You")
CONTEXT_TOKENS = 10
CONTEXT_TOP_K = 5


@dataclass(frozen=True)
class Row:
    """One text of one request, tokenized."""

    ids: tuple[int, ...]
    """Prompt and target."""
    lookup: int
    """Position of the subject's last token."""
    answer: int
    """Position of the target's first token."""

    @property
    def target(self) -> tuple[int, ...]:
        """The target's token ids."""
        return self.ids[self.answer :]


@dataclass(frozen=True)
class Request:
    """One fact to write: the subject's place in a prompt and what shall follow."""

    id: str
    template: str
    """Relation with exactly one {}."""
    subject: str
    target: str
    keep: tuple[tuple[str, str], ...] = ()
    """Templates about the subject, each with the answer that shall stay."""

    @property
    def prompt(self) -> str:
        """The template with the subject in its place."""
        return self.template.replace("{}", self.subject)

    @property
    def place(self) -> str:
        """The prompt up to the end of the subject: what the key depends on."""
        return self.template[: self.template.index("{}")] + self.subject


@dataclass(frozen=True)
class Group:
    """Facts of one subject, for which one target vector is sought."""

    subject: str
    facts: tuple[Request, ...]
    """Spoken after every context: the `new` ones first, then those that were written before."""
    new: int
    kept: tuple[Request, ...] = ()
    """Answers that shall stay, spoken without context."""

    @property
    def places(self) -> tuple[str, ...]:
        """The different places of the new facts; each becomes a column."""
        return tuple(dict.fromkeys(fact.place for fact in self.facts[: self.new]))


def groups(requests: Sequence[Request], earlier: Sequence[Request] = (), *, joint: bool = True) -> list[Group]:
    """Requests by subject, in order of first mention; without `joint` each for itself.

    Args:
        earlier: facts that were written before and still hold, in order; of one prompt the last holds.
    """
    if not joint:
        return [Group(request.subject, (request,), 1) for request in requests]
    found: dict[str, list[Request]] = {}
    for request in requests:
        found.setdefault(request.subject, []).append(request)
    result = []
    for subject, new in found.items():
        prompts = {request.prompt for request in new}
        held = {request.prompt: request for request in earlier if request.subject == subject}
        old = [request for prompt, request in held.items() if prompt not in prompts]
        prompts |= held.keys()
        kept = {(template, answer): request.id for request in (*new, *old) for template, answer in request.keep}
        stay = [Request(id, template, subject, answer) for (template, answer), id in kept.items()]
        result.append(Group(subject, (*new, *old), len(new), tuple(r for r in stay if r.prompt not in prompts)))
    return result


def join(prompt: str, answer: str) -> str:
    """Prompt and answer with exactly the one space between them that the prompt may already have."""
    return prompt + answer if prompt[-1:].isspace() else f"{prompt} {answer}"


def split_answer(model: Model, prompt: str, answer: str) -> tuple[list[int], int]:
    """Ids of prompt and answer together, and where the answer begins.

    That is the first position at which they differ from the prompt's own ids, so a token that spans the seam counts
    as answer.
    """
    whole = model.encode(join(prompt, answer))
    alone = model.encode(prompt)
    start = 0
    while start < min(len(whole), len(alone)) and whole[start] == alone[start]:
        start += 1
    # A tokenizer that ends every text with a token of its own leaves one more common id.
    return whole, min(start, len(whole) - 1)


def row(model: Model, request: Request, context: str) -> Row:
    """The request's prompt and target after a context (text ending in a space, or empty).

    Raises:
        ModelError: the text is longer than the model can read.
    """
    ids, answer = split_answer(model, context + request.prompt, request.target)
    start = len(context) + request.template.index("{}")
    lookup = model.subject_last(context + request.prompt, start, start + len(request.subject))
    if len(ids) > model.context_length:
        raise ModelError(
            f"edit {request.id} has {len(ids)} tokens, more than the {model.context_length} {model.name} can read",
            "shorten the relation or the target",
        )
    return Row(tuple(ids), min(lookup, answer - 1), answer)


def subject_row(model: Model, subject: str) -> Row:
    """The bare subject, at whose last token the KL term is taken; what follows it cannot be seen from there."""
    ids = model.encode(f"{subject} is a")
    lookup = model.subject_last(f"{subject} is a", 0, len(subject))
    return Row(tuple(ids[: lookup + 1]), lookup, lookup + 1)


@torch.no_grad()
def sample_contexts(model: Model, seed: int) -> tuple[str, ...]:
    """The empty context, then one short text for each opening, written by the model itself.

    Top-k sampling (Meng et al. 2023, code) with a seeded generator on the CPU, so that every device draws alike.
    """
    generator = torch.Generator().manual_seed(seed)
    contexts = [""]
    for opening in CONTEXT_OPENINGS:
        ids = torch.tensor([model.encode(opening)], device=model.device)
        for _ in range(CONTEXT_TOKENS):
            top = model.net(input_ids=ids, use_cache=False).logits[0, -1].float().topk(CONTEXT_TOP_K)
            drawn = torch.multinomial(top.values.softmax(0).cpu(), 1, generator=generator)
            ids = torch.cat([ids, top.indices[drawn.to(model.device)][None]], dim=1)
        text = model.tokenizer.decode(ids[0], skip_special_tokens=True)
        contexts.append(" ".join(text.split()).rstrip(".,;:!? ") + ". ")
    return tuple(contexts)


def rows(model: Model, request: Request, contexts: Sequence[str]) -> tuple[Row, ...]:
    """One row a context, the plain one first."""
    return tuple(row(model, request, context) for context in contexts)
