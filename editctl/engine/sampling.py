"""Texts that a model writes freely: seeded top-k sampling, many openings at once.

Knows: how a token is drawn, so that a text depends on its opening, the seed and the weights alone, not on what else is
written beside it. Refuses: judging; that is `metrics`.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from editctl.engine.memory import in_chunks
from editctl.engine.model import Model
from editctl.errors import InvalidInput
from editctl.events import Emit, silent
from editctl.spec import visible

ROWS = 128
LENGTH = 100
"""Tokens of a text, its opening included (ROME's evaluation code)."""
TOP = 5
"""Tokens that are drawn from: the most probable ones (ROME's evaluation code)."""


@torch.no_grad()
def sampled(
    model: Model,
    openings: Sequence[str],
    *,
    seed: int = 0,
    length: int = LENGTH,
    tick: Callable[[int], None] = lambda n: None,
    emit: Emit = silent,
) -> list[str | None]:
    """For each opening a text that begins with it, each token drawn from the `TOP` most probable ones in proportion.

    Nothing ends a text before `length`, an end-of-text token neither; special tokens are not part of what is returned.
    Each text has random numbers of its own, made from the seed, its opening and how many times the same opening came
    before it. So texts do not change with those written beside them, but where rounding of the logits decides.

    Args:
        length: tokens of a text, its opening and start token included; at most what the model reads.
        tick: told how many texts are done.

    Returns:
        The texts; None where the probabilities of a token were no numbers.

    Raises:
        InvalidInput: an opening leaves no room for a token.
    """
    length = min(length, model.context_length)
    encoded = [model.encode(opening) for opening in openings]
    for ids, opening in zip(encoded, openings, strict=True):
        if not 0 < len(ids) < length:
            raise InvalidInput(
                f"an opening of {len(ids)} tokens cannot be gone on with to {length}: {visible(opening)}",
                "shorten it" if ids else f"{model.name} has no start token: give it a word",
            )
    seen: Counter[str] = Counter()
    seeds = []
    for opening in openings:
        seeds.append(f"{seed} {seen[opening]} {opening}")
        seen[opening] += 1

    def work(indices: Sequence[int]) -> list[str | None]:
        # All rows grow together from the shortest opening on; where a row's own opening goes on, that is what it says.
        rows = [encoded[i][: len(encoded[indices[0]])] for i in indices]
        dice, broken = [random.Random(seeds[i]) for i in indices], [False] * len(indices)
        ids, extra = torch.tensor(rows, device=model.device), dict[str, Any]()
        for place in range(len(rows[0]), length):
            result = model.net(input_ids=ids, use_cache=True, **extra)
            extra = {"past_key_values": result.past_key_values}
            best = result.logits[:, -1].float().softmax(-1).topk(min(TOP, result.logits.shape[-1]))
            tokens, chances = best.indices.tolist(), best.values.double().tolist()
            for row, i in enumerate(indices):
                if place < len(encoded[i]):
                    rows[row].append(encoded[i][place])
                    continue
                draw, reach = dice[row].random(), list(itertools.accumulate(chances[row]))
                broken[row] |= not reach[-1] > 0
                rows[row].append(tokens[row][min(bisect.bisect_right(reach, draw * reach[-1]), len(reach) - 1)])
            ids = torch.tensor([row[-1:] for row in rows], device=model.device)
        tick(len(indices))
        texts = [model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return [None if bad else text for bad, text in zip(broken, texts, strict=True)]

    order = sorted(range(len(openings)), key=lambda i: len(encoded[i]))
    texts = dict(zip(order, in_chunks(order, ROWS, work, emit, "texts"), strict=True))
    return [texts[i] for i in range(len(openings))]
