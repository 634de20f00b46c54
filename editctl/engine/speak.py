"""What the model says: greedy words, and teacher-forced values of a wanted answer.

Knows: batching by equal length, so that no padding can disturb an answer. Refuses: judging; that is `metrics`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from editctl.engine.memory import in_chunks
from editctl.engine.model import Model
from editctl.engine.prompts import split_answer
from editctl.errors import InvalidInput
from editctl.events import Emit, silent
from editctl.spec import visible

ROWS = 128
NEW_TOKENS = 16
"""Most tokens of an answer."""
T = TypeVar("T")
R = TypeVar("R")


def _by_length(items: Sequence[T], length: Callable[[T], int]) -> Iterator[list[int]]:
    """Indices of items of equal length."""
    order = sorted(range(len(items)), key=lambda i: length(items[i]))
    for _, group in itertools.groupby(order, key=lambda i: length(items[i])):
        yield list(group)


def _fitting(model: Model, prompt: str, whose: str = "") -> list[int]:
    """The prompt's ids.

    Args:
        whose: what an error names beside the prompt.

    Raises:
        InvalidInput: with an answer they would be more than the model can read.
    """
    ids = model.encode(prompt)
    if len(ids) + NEW_TOKENS > model.context_length:
        raise InvalidInput(
            f"{whose}a prompt of {len(ids)} tokens leaves no room for an answer, {model.name} reads "
            f"{model.context_length}: {visible(prompt)}",
            "shorten it",
        )
    return ids


def check_lengths(model: Model, prompts: Iterable[tuple[str, str]]) -> None:
    """Make sure that every prompt, given with the id of its edit, can be asked.

    Raises:
        InvalidInput: one cannot.
    """
    for edit, prompt in prompts:
        _fitting(model, prompt, f"edit {edit}: ")


def _ends_sentence(model: Model) -> list[bool]:
    """For every token id, whether a text may end with it."""
    ends = {model.tokenizer.eos_token_id}
    pieces = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer)))
    # Byte-level tokenizers write a line end as Ċ, sentencepiece as <0x0A>.
    marks = (".", "!", "?", "\n", "Ċ", "<0x0A>")
    return [i in ends or (piece or "").endswith(marks) for i, piece in enumerate(pieces)]


@torch.no_grad()
def answers(
    model: Model,
    prompts: Sequence[str],
    at_least: Sequence[int] = (),
    tick: Callable[[int], None] = lambda n: None,
    emit: Emit = silent,
) -> list[str]:
    """Greedy words after each prompt, to the first sentence end or `NEW_TOKENS`, without the final full stop.

    Args:
        at_least: for each prompt, tokens before which a sentence end does not count, so that "St. Louis" can be said.
        tick: told how many prompts were answered.

    Raises:
        InvalidInput: a prompt is longer than the model can read.
    """
    ends = _ends_sentence(model)
    encoded = [_fitting(model, prompt) for prompt in prompts]

    def work(indices: Sequence[int]) -> list[str]:
        ids = torch.tensor([encoded[i] for i in indices], device=model.device)
        written: list[list[int]] = [[] for _ in indices]
        open_rows = set(range(len(indices)))
        extra: dict[str, Any] = {}
        for _ in range(NEW_TOKENS):
            result = model.net(input_ids=ids, use_cache=True, **extra)
            extra = {"past_key_values": result.past_key_values}
            ids = result.logits[:, -1].argmax(-1, keepdim=True)
            for row, token in enumerate(ids[:, 0].tolist()):
                if row in open_rows:
                    written[row].append(token)
                    wanted = at_least[indices[row]] if at_least else 1
                    if ends[token] and len(written[row]) >= wanted:
                        open_rows.discard(row)
            if not open_rows:
                break
        texts = [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
        tick(len(indices))
        return [" ".join(text.split()).removesuffix(".").rstrip() for text in texts]

    return _each(encoded, len, work, emit)


@torch.no_grad()
def forced(model: Model, pairs: Sequence[tuple[str, str]], emit: Emit = silent) -> list[tuple[float, float]]:
    """For each (prompt, answer): mean negative log-likelihood of the answer's tokens (nats) and the share of them
    that is the most probable token given the right ones before it."""
    encoded = [split_answer(model, prompt, answer) for prompt, answer in pairs]
    return _forced(model, encoded, lambda losses, hits: (float(losses.mean()), float(hits.float().mean())), emit)


@torch.no_grad()
def probabilities(model: Model, pairs: Sequence[tuple[str, str]], emit: Emit = silent) -> list[float]:
    """For each (prompt, answer) the probability that the prompt goes on with the answer: the product of those of all
    its tokens, each given the right ones before it.

    Raises:
        InvalidInput: a prompt and its answer are longer than the model can read.
    """
    encoded = [split_answer(model, prompt, answer) for prompt, answer in pairs]
    for (ids, _), (prompt, _) in zip(encoded, pairs, strict=True):
        if len(ids) > model.context_length:
            raise InvalidInput(
                f"a prompt and its answer of {len(ids)} tokens are more than the {model.context_length} that "
                f"{model.name} reads: {visible(prompt)}",
                "shorten them",
            )
    return _forced(model, encoded, lambda losses, _: float((-losses.double().sum()).exp()), emit)


def _forced(
    model: Model, encoded: Sequence[tuple[list[int], int]], of: Callable[[Tensor, Tensor], R], emit: Emit
) -> list[R]:
    """What `of` makes of the losses and hits of each answer's tokens.

    Args:
        encoded: ids of prompt and answer together, and where the answer begins.
    """

    def work(indices: Sequence[int]) -> list[R]:
        losses, hits = _scored(model, [encoded[i][0] for i in indices])
        starts = [max(encoded[i][1] - 1, 0) for i in indices]
        return [of(losses[row, start:], hits[row, start:]) for row, start in enumerate(starts)]

    return _each(encoded, lambda e: len(e[0]), work, emit)


@torch.no_grad()
def likelihoods(model: Model, texts: Sequence[str], emit: Emit = silent) -> list[tuple[float, int]]:
    """For each text the log-likelihood (nats) of its tokens after the first, and their number."""
    encoded = [model.encode(text)[: model.context_length] for text in texts]

    def work(indices: Sequence[int]) -> list[tuple[float, int]]:
        losses, _ = _scored(model, [encoded[i] for i in indices])
        return [(-float(row.sum()), len(row)) for row in losses]

    return _each(encoded, len, work, emit)


def _scored(model: Model, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (nats) of every token after the first, given those before it, and whether it is the most
    probable; rows × (length − 1)."""
    ids = torch.tensor(rows, device=model.device)
    logits = model.net(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses, logits.argmax(-1) == ids[:, 1:]


def _each(
    items: Sequence[T], length: Callable[[T], int], work: Callable[[Sequence[int]], list[R]], emit: Emit
) -> list[R]:
    """`work` on the indices of items of equal length, at most `ROWS` at once; the results in the items' order."""
    results: dict[int, R] = {}
    for indices in _by_length(items, length):
        results |= zip(indices, in_chunks(indices, ROWS, work, emit, "prompts"), strict=True)
    return [results[i] for i in range(len(items))]


@torch.no_grad()
def next_tokens(model: Model, prompts: Sequence[str], count: int, emit: Emit = silent) -> list[list[tuple[str, float]]]:
    """For each prompt the most probable next tokens and their probabilities.

    Raises:
        InvalidInput: a prompt is longer than the model can read.
    """
    encoded = [_fitting(model, prompt) for prompt in prompts]

    def work(indices: Sequence[int]) -> list[list[tuple[str, float]]]:
        ids = torch.tensor([encoded[i] for i in indices], device=model.device)
        top = model.net(input_ids=ids, use_cache=False).logits[:, -1].float().softmax(-1).topk(count)
        return [
            [(model.tokenizer.decode([i]), p) for i, p in zip(tokens, chances, strict=True)]
            for tokens, chances in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    return _each(encoded, len, work, emit)
