"""What the model says: greedy words, and teacher-forced scores of answers.

Knows: reading every prompt once for all that is asked of it, and batching by equal length, so that no padding can
disturb an answer. Refuses: judging; that is `metrics`.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

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
LOGITS = 2**26
"""Most logits of a pass that needs those of all places: 256 MiB in fp32."""
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


def check_lengths(model: Model, asked: Iterable[tuple[str, str, Iterable[str]]]) -> None:
    """Make sure that every prompt, given with the id of its edit, can be asked, and its answers be scored.

    Raises:
        InvalidInput: one cannot.
    """
    for edit, prompt, answers in asked:
        whose = f"edit {edit}: "
        _fitting(model, prompt, whose)
        for answer in filter(None, answers):
            _split(model, prompt, answer, whose)


def _split(model: Model, prompt: str, answer: str, whose: str = "") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that are read and ids of the answer, which go on from there.

    Raises:
        InvalidInput: they are more than the model can read, or the answer has none.
    """
    whole, start = split_answer(model, prompt, answer)
    if len(whole) > model.context_length:
        raise InvalidInput(
            f"{whose}a prompt and its answer of {len(whole)} tokens are more than the {model.context_length} that "
            f"{model.name} reads: {visible(prompt)}",
            "shorten them",
        )
    # Before the first token of a text nothing stands that could predict it.
    start = max(start, 1)
    if whole == model.encode(prompt):
        raise InvalidInput(f"{whose}the answer {visible(answer)!r} has no tokens of its own", "give another answer")
    return tuple(whole[:start]), tuple(whole[start:])


_ENDS: WeakKeyDictionary[Model, frozenset[int]] = WeakKeyDictionary()


def _ends_sentence(model: Model) -> frozenset[int]:
    """The ids a text may end with. Of a large vocabulary they take a quarter of a second to find."""
    if model not in _ENDS:
        _ENDS[model] = _sentence_ends(model)
    return _ENDS[model]


def _sentence_ends(model: Model) -> frozenset[int]:
    ends = {model.tokenizer.eos_token_id}
    pieces = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer)))
    # Byte-level tokenizers write a line end as Ċ, sentencepiece as <0x0A>.
    marks = (".", "!", "?", "\n", "Ċ", "<0x0A>")
    return frozenset(i for i, piece in enumerate(pieces) if i in ends or (piece or "").endswith(marks))


@dataclass(frozen=True)
class Ask:
    """What is asked of one prompt."""

    prompt: str
    answers: tuple[str, ...] = ()
    """Answers to be scored."""
    at_least: int = 1
    """Tokens before which a sentence end does not count, so that "St. Louis" can be said; 0 asks for no words."""


@dataclass(frozen=True)
class Score:
    """How the model takes an answer, teacher-forced: each token given the right ones before it."""

    losses: tuple[float, ...]
    """Negative log-likelihood of each token, nats."""
    argmax: tuple[int, ...]
    """The most probable token at the place of each."""
    hits: int
    """How many of those are the answer's own."""

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats a token."""
        return sum(self.losses) / len(self.losses)

    @property
    def accuracy(self) -> float:
        """Share of the tokens that are the most probable one, 0 to 1."""
        return self.hits / len(self.losses)

    @property
    def probability(self) -> float:
        """That the prompt goes on with the answer: the product of its tokens' probabilities."""
        return math.exp(-sum(self.losses))


@dataclass(frozen=True)
class Heard:
    """What came of one `Ask`."""

    words: str
    """Greedy words to the first sentence end or `NEW_TOKENS`, without the final full stop; "" if none were asked."""
    scores: tuple[Score, ...]
    """One an answer."""


@dataclass
class _Stem:
    """A text that is read once, whatever goes on from it."""

    ids: tuple[int, ...]
    said: list[int] = field(default_factory=list)
    """For each time words are asked of it, the tokens before which a sentence end does not count."""
    tails: list[tuple[int, ...]] = field(default_factory=list)
    """Answers' ids that go on from it."""


@torch.no_grad()
def hear(
    model: Model, asks: Sequence[Ask], tick: Callable[[int], None] = lambda n: None, emit: Emit = silent
) -> list[Heard]:
    """Words after each prompt and scores of its answers, every prompt read once.

    Args:
        tick: told how many prompts were heard.

    Raises:
        InvalidInput: a prompt, with an answer, is longer than the model can read.
    """
    stems: dict[tuple[int, ...], _Stem] = {}
    wanted: list[tuple[_Stem, list[tuple[_Stem, int]]]] = []
    asked: Counter[tuple[int, ...]] = Counter()
    for ask in asks:
        ids = tuple(_fitting(model, ask.prompt) if ask.at_least else model.encode(ask.prompt))
        own, found = stems.get(ids) or _Stem(ids), []
        asked[ids] += 1
        if ask.at_least:
            # A text that only answers go on from is read where they begin.
            stems[ids] = own
            if ask.at_least not in own.said:
                own.said.append(ask.at_least)
        for answer in ask.answers:
            read, tail = _split(model, ask.prompt, answer)
            # A token that spans the seam begins before the prompt ends: the answer then goes on from another text.
            stem = stems.setdefault(read, own if read == ids else _Stem(read))
            found.append((stem, len(stem.tails)))
            stem.tails.append(tail)
        wanted.append((own, found))
    ends = _ends_sentence(model)
    texts = list(stems.values())
    results: dict[tuple[int, ...], _Found] = {}

    def work(indices: Sequence[int]) -> list[_Found]:
        found = _heard(model, [texts[i] for i in indices], ends, emit)
        tick(sum(asked[texts[i].ids] for i in indices))
        return found

    for indices in _by_length(texts, lambda stem: len(stem.ids)):
        chunks = in_chunks(indices, ROWS, work, emit, "prompts")
        results |= {texts[i].ids: found for i, found in zip(indices, chunks, strict=True)}
    heard = []
    for ask, (own, found) in zip(asks, wanted, strict=True):
        words = results[own.ids][0][own.said.index(ask.at_least)] if ask.at_least else ""
        heard.append(Heard(words, tuple(results[stem.ids][1][place] for stem, place in found)))
    return heard


_Found = tuple[list[str], list[Score]]
"""Of one stem: the words for each time they are asked, and the score of each tail."""


def _heard(model: Model, stems: Sequence[_Stem], ends: Set[int], emit: Emit) -> list[_Found]:
    """Greedy words after stems of equal length, and scores of their tails."""
    ids = torch.tensor([stem.ids for stem in stems], device=model.device)
    logits, cache = _next(model, ids, None)
    places = [(row, tail) for row, stem in enumerate(stems) for tail in stem.tails]
    # Of similar length, so that few steps are taken for rows that are at their end.
    order = sorted(range(len(places)), key=lambda i: len(places[i][1]))

    def work(chosen: Sequence[int]) -> list[Score]:
        return _scores(model, logits, cache, [places[i] for i in chosen])

    scores = dict(zip(order, in_chunks(order, ROWS, work, emit, "answers"), strict=True))
    by_row: list[list[Score]] = [[] for _ in stems]
    for i, (row, _) in enumerate(places):
        by_row[row].append(scores[i])
    asked = [(row, least) for row, stem in enumerate(stems) for least in stem.said]
    words: list[list[str]] = [[] for _ in stems]
    for (row, _), tokens in zip(asked, _greedy(model, logits, cache, asked, ends), strict=True):
        text = model.tokenizer.decode(tokens, skip_special_tokens=True)
        words[row].append(" ".join(text.split()).removesuffix(".").rstrip())
    return list(zip(words, by_row, strict=True))


def _next(model: Model, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits of what follows the last token, rows × vocabulary, and the cache with the tokens in it."""
    extra = {} if cache is None else {"past_key_values": cache}
    # Of a long prompt, logits of all places are the largest tensor.
    if "logits_to_keep" in inspect.signature(model.net.forward).parameters:
        extra["logits_to_keep"] = 1
    result = model.net(input_ids=ids, use_cache=True, **extra)
    return result.logits[:, -1], result.past_key_values


def _rows(cache: Any, rows: Sequence[int], device: torch.device) -> Any:
    """A copy of a cache with these rows, which may be named more than once."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        # Layers with a state keep their tensors in lists.
        vars(layer).update({name: value[:] for name, value in vars(layer).items() if isinstance(value, list)})
    chosen.reorder_cache(torch.tensor(rows, device=device))
    return chosen


def _scores(model: Model, logits: Tensor, cache: Any, places: Sequence[tuple[int, tuple[int, ...]]]) -> list[Score]:
    """Scores of tails, each with the row it goes on from; one token a step, as every kind of cache allows."""
    losses: list[list[float]] = [[] for _ in places]
    argmax: list[list[int]] = [[] for _ in places]
    steps = max(len(tail) for _, tail in places)
    rows = [row for row, _ in places]
    here = logits[rows]
    branch = _rows(cache, rows, model.device) if steps > 1 else None
    for step in range(steps):
        tokens = torch.tensor([tail[min(step, len(tail) - 1)] for _, tail in places], device=model.device)
        step_losses = functional.cross_entropy(here.float(), tokens, reduction="none").tolist()
        for i, (loss, best) in enumerate(zip(step_losses, here.argmax(-1).tolist(), strict=True)):
            if step < len(places[i][1]):
                losses[i].append(loss)
                argmax[i].append(best)
        if step + 1 < steps:
            here, branch = _next(model, tokens[:, None], branch)
    return [
        Score(tuple(loss), tuple(best), sum(a == b for a, b in zip(best, tail, strict=True)))
        for loss, best, (_, tail) in zip(losses, argmax, places, strict=True)
    ]


def _greedy(
    model: Model, logits: Tensor, cache: Any, asked: Sequence[tuple[int, int]], ends: Set[int]
) -> list[list[int]]:
    """The most probable tokens one after another, to the first that ends a sentence or `NEW_TOKENS`.

    Args:
        asked: row of the logits and tokens before which a sentence end does not count.
    """
    written: list[list[int]] = [[] for _ in asked]
    if not asked:
        return written
    rows, here = [row for row, _ in asked], list(range(len(asked)))
    logits, cache = logits[rows], _rows(cache, rows, model.device)
    for step in range(NEW_TOKENS):
        ids = logits.argmax(-1)
        going = []
        for place, (i, token) in enumerate(zip(here, ids.tolist(), strict=True)):
            written[i].append(token)
            if not (token in ends and len(written[i]) >= asked[i][1]):
                going.append(place)
        if not going or step + 1 == NEW_TOKENS:
            break
        if len(going) < len(here):
            cache.reorder_cache(torch.tensor(going, device=model.device))
            ids, here = ids[going], [here[place] for place in going]
        logits, cache = _next(model, ids[:, None], cache)
    return written


def answers(
    model: Model,
    prompts: Sequence[str],
    at_least: Sequence[int] = (),
    tick: Callable[[int], None] = lambda n: None,
    emit: Emit = silent,
) -> list[str]:
    """Greedy words after each prompt; as `hear`."""
    asks = [Ask(prompt, (), at_least[i] if at_least else 1) for i, prompt in enumerate(prompts)]
    return [heard.words for heard in hear(model, asks, tick, emit)]


def scores(model: Model, pairs: Sequence[tuple[str, str]], emit: Emit = silent) -> list[Score]:
    """The score of each (prompt, answer); as `hear`."""
    return [heard.scores[0] for heard in hear(model, [Ask(p, (answer,), 0) for p, answer in pairs], emit=emit)]


@torch.no_grad()
def likelihoods(
    model: Model, texts: Sequence[str], emit: Emit = silent, most: int | None = None
) -> list[tuple[float, int]]:
    """For each text the log-likelihood (nats) of its tokens after the first, and their number.

    Args:
        most: tokens of a text that are read; None for as many as the model can.
    """
    limit = min(most or model.context_length, model.context_length)
    encoded = [model.encode(text)[:limit] for text in texts]

    def work(indices: Sequence[int]) -> list[tuple[float, int]]:
        # All are of one length; a model without a start token has nothing to read of an empty text.
        if len(encoded[indices[0]]) < 2:
            return [(0.0, 0)] * len(indices)
        ids = torch.tensor([encoded[i] for i in indices], device=model.device)
        logits = model.net(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return [(-float(row.sum()), len(row)) for row in losses]

    # Logits of all places are the largest tensor, and are needed in fp32 beside it.
    vocabulary = model.net.get_output_embeddings().weight.shape[0]
    results: dict[int, tuple[float, int]] = {}
    for indices in _by_length(encoded, len):
        rows = max(1, min(ROWS, LOGITS // (vocabulary * max(1, len(encoded[indices[0]])))))
        results |= zip(indices, in_chunks(indices, rows, work, emit, "texts"), strict=True)
    return [results[i] for i in range(len(encoded))]


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
        top = _next(model, ids, None)[0].float().softmax(-1).topk(count)
        return [
            [(model.tokenizer.decode([i]), p) for i, p in zip(tokens, chances, strict=True)]
            for tokens, chances in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    return _each(encoded, len, work, emit)
