"""Second moments of keys: C = E[k kᵀ] of every edited layer in one pass over a corpus, and its eigenbasis.

Knows: the corpus, the pass, the eigendecomposition, and the cache by content (model, corpus, layers, tokens). One
eigenbasis serves every method and every threshold. Refuses: facts and edits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from editctl.delta import read_tensors, write_tensors
from editctl.engine import corpus as corpus_room
from editctl.engine.model import Model, combine_digests, tensor_digest
from editctl.errors import InvalidInput
from editctl.events import Emit, Note, NullSpace, Progress, StageStarted

SEQUENCE, ROWS = 128, 16
"""Tokens a sequence and sequences a pass. Keys of early blocks hardly depend on longer contexts."""
FEW = 10
"""Tokens a key dimension below which small eigenvalues are not to be relied on."""


@dataclass(frozen=True)
class Moment:
    """The eigenbasis of one layer's second moment, C = Q diag(eigenvalues) Qᵀ."""

    basis: Tensor
    """Q, d_k × d_k, fp32, columns by rising eigenvalue."""
    eigenvalues: Tensor
    """d_k, fp64, rising, never negative."""
    seen: int
    """Tokens it is a mean over."""

    @property
    def scale(self) -> float:
        """Mean squared norm of a key, the trace of C."""
        return float(self.eigenvalues.sum())

    def null_rank(self, energy: float) -> int:
        """How many of the smallest eigenvalues together hold at most `energy` of the trace.

        Raises:
            InvalidInput: that is none or all of them; no protection and no editing are both refused.
        """
        shares = self.eigenvalues.cumsum(0) / self.eigenvalues.sum()
        rank = int((shares <= energy).sum())
        width = len(self.eigenvalues)
        if rank in (0, width):
            what = "no direction is left to edit" if rank == 0 else "every direction counts as free to edit"
            raise InvalidInput(
                f"null-space energy {energy:g} keeps {rank} of {width} directions: {what}",
                "choose another energy share, for example 0.05, or more corpus tokens",
            )
        return rank


def null_space_event(layer: int, moment: Moment, energy: float) -> NullSpace:
    """What to tell of one layer's projector."""
    rank = moment.null_rank(energy)
    inside = float(moment.eigenvalues[:rank].sum() / moment.eigenvalues.sum())
    return NullSpace(layer=layer, rank=rank, width=len(moment.eigenvalues), energy=inside)


def _sequences(model: Model, lines: Iterator[str], tokens: int) -> Iterator[list[int]]:
    """Token sequences of at most `SEQUENCE` tokens, `tokens` in all. Lines are joined so that none is tiny."""
    left, text = tokens, ""
    limit = min(SEQUENCE, model.context_length)
    for line in itertools.chain(lines, [""]):
        text = f"{text} {line}".strip()
        if (len(text) < 4 * limit and line) or not text:
            continue
        ids = model.encode(text)
        text = ""
        for start in range(0, len(ids), limit):
            piece = ids[start : start + min(limit, left)]
            yield piece
            left -= len(piece)
            if left <= 0:
                return


def moments(
    model: Model,
    layers: tuple[int, ...],
    *,
    corpus: str,
    tokens: int,
    base: str,
    folder: Path,
    emit: Emit,
    content: str = "",
) -> dict[int, Moment]:
    """The eigenbases of the layers' second moments, from the cache or from one shared pass.

    The cache is found by content: the corpus itself is opened only when something is missing.

    Args:
        corpus: path of a text file, empty for the model's own.
        tokens: most tokens to read.
        base: identity of the model, part of the cache's name.
        folder: where the cache lies.
        content: name of the corpus's content; by default what it is now.

    Raises:
        InvalidInput: the corpus is missing, not the one named, or too short.
    """
    content = content or corpus_room.content(model.name, corpus)
    facts = {"base": base, "dtype": str(model.dtype), "corpus": content, "tokens": tokens, "sequence": SEQUENCE}
    found: dict[int, Moment] = {}
    paths = {}
    for layer in layers:
        name = hashlib.sha256(json.dumps({**facts, "layer": layer}, sort_keys=True).encode()).hexdigest()[:32]
        paths[layer] = folder / f"{name}.safetensors"
        moment = _cached(paths[layer], model.blocks[layer].weight.shape[1])
        if moment is not None:
            found[layer] = moment
    missing = tuple(layer for layer in layers if layer not in found)
    if missing:
        lines = corpus_room.lines(model.name, corpus, content)
        grams, seen = _measure(model, missing, lines, tokens, emit)
        for layer, gram in grams.items():
            eigenvalues, basis = torch.linalg.eigh(gram)
            # eigh returns columns one after another; as a file gives it back, rows, products round alike.
            rows = basis.to("cpu", torch.float32).contiguous()
            moment = Moment(rows, eigenvalues.clamp_min(0).to("cpu", torch.float64), seen)
            tensors = {"basis": moment.basis, "eigenvalues": moment.eigenvalues}
            write_tensors(paths[layer], tensors, {**facts, "layer": layer, "seen": seen, "digest": _digest(tensors)})
            found[layer] = moment
    result = {layer: found[layer] for layer in layers}
    least = min(result.values(), key=lambda moment: moment.seen / len(moment.eigenvalues))
    if least.seen < FEW * len(least.eigenvalues):
        emit(
            Note(
                f"the corpus gave {least.seen} tokens for keys of width {len(least.eigenvalues)}; with fewer than "
                f"{FEW} a dimension, directions that are used may pass for free"
            )
        )
    return result


def _cached(path: Path, width: int) -> Moment | None:
    """What the cache file holds; None if it is missing or spoiled, since it can be made again."""
    try:
        tensors, about = read_tensors(path.read_bytes())
        moment = Moment(tensors["basis"], tensors["eigenvalues"], int(about["seen"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    good = moment.basis.shape == (width, width) and about.get("digest") == _digest(tensors)
    return moment if good else None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the content, so that a spoiled cache is noticed."""
    return combine_digests((name, tensor_digest(tensor)) for name, tensor in tensors.items())


@torch.no_grad()
def _measure(
    model: Model, layers: tuple[int, ...], lines: Iterator[str], tokens: int, emit: Emit
) -> tuple[dict[int, Tensor], int]:
    """C of each layer as fp64, the mean over all tokens, and how many there were."""
    where = precise_device(model.device)
    grams = {
        layer: torch.zeros(2 * (model.blocks[layer].weight.shape[1],), dtype=torch.float64, device=where)
        for layer in layers
    }
    emit(StageStarted("statistics", tokens))
    seen = 0
    sequences = _sequences(model, lines, tokens)
    while rows := list(itertools.islice(sequences, ROWS)):
        ids, mask = pad_right(rows, model.device)
        keys, _ = model.read(ids, mask, keys=layers)
        for layer in layers:
            points = keys[layer][mask.bool()].float()
            grams[layer] += (points.T @ points).to(where)
        seen += int(mask.sum())
        emit(Progress("statistics", min(seen, tokens), tokens))
    width = max(gram.shape[0] for gram in grams.values())
    if seen < width:
        raise InvalidInput(
            f"the corpus gave {seen} tokens, too few for keys of width {width}",
            "give a longer text with --corpus, or more corpus_tokens",
        )
    return {layer: gram / seen for layer, gram in grams.items()}, seen


def precise_device(device: torch.device) -> torch.device:
    """Where fp64 algebra for a device is done: on itself, but for MPS, which has no fp64, on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def pad_right(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B × T), rows filled with zeros at the end."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
