"""Second moments of keys: C = E[k kᵀ] of every edited layer in one pass over a corpus, and its eigenbasis.

Knows: the pass and how it goes on after an interruption, the model's own samples, the eigendecomposition, rank rules,
and the cache by content (weights that decide the keys, tokenizer, corpus, tokens). One eigenbasis serves every method
and every rule. Refuses: facts and edits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as library_version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from editctl.delta import read_tensors, write_tensors
from editctl.engine import corpus as corpus_room
from editctl.engine import methods
from editctl.engine.model import PROBE, Model, combine_digests, tensor_digest
from editctl.engine.source import IDENTITY_FILES
from editctl.errors import InvalidInput
from editctl.events import Emit, Note, NullSpace, Progress, StageStarted

SEQUENCE, ROWS = 128, 16
"""Tokens a sequence and sequences a pass. Keys of early blocks hardly depend on longer contexts."""
WRITTEN = 4 * ROWS
"""Samples written at once: a step of a few tokens costs hardly less than one of many."""
TILE = 2048
"""Columns of a tile of the Gram matrix. Narrower keys, atlas's 1280 among them, are one product, as if untiled."""
SAVE_EVERY = 120.0
"""Seconds of a pass that a killed process loses at most."""
FEW = 10
"""Tokens a key dimension below which small eigenvalues are not to be relied on."""


@dataclass(frozen=True)
class Moment:
    """The eigenbasis of one layer's second moment, C = Q diag(eigenvalues) Qᵀ."""

    basis: Tensor
    """Q, d_k × d_k, fp32, columns by rising eigenvalue."""
    eigenvalues: Tensor
    """d_k, fp64, rising, never negative, in the keys' squared units."""
    seen: int
    """Tokens it is a mean over."""
    file: Path | None = None
    """Where it is kept."""
    cached: bool = False
    """Whether it was found there, not measured now."""

    @property
    def scale(self) -> float:
        """Mean squared norm of a key, the trace of C."""
        return float(self.eigenvalues.sum())

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the eigenvalues' shares, 1 to d_k (Roy and Vetterli 2007)."""
        shares = self.eigenvalues[self.eigenvalues > 0] / self.eigenvalues.sum()
        return float((-(shares * shares.log()).sum()).exp())

    def spectrum(self, points: int = 10) -> list[float]:
        """Shares of the trace that the smallest 1/points, 2/points, … of all directions hold; the last is 1."""
        shares = self.eigenvalues.cumsum(0) / self.eigenvalues.sum()
        width = len(shares)
        ends = [_part(i / points, width) for i in range(1, points + 1)]
        return [float(shares[end - 1]) if end else 0.0 for end in ends]

    def null_rank(self, rule: methods.NullSpace) -> int:
        """How many eigenvectors, smallest eigenvalue first, the rule leaves free to edit.

        energy: as many as together hold at most `value` of the trace. quantile: ⌊value · d_k⌋. threshold: those with
        an eigenvalue below `value`, the τ of AlphaEdit (Fang et al. 2025, code), which depends on the keys' units.

        Raises:
            InvalidInput: that is none or all of them; no protection and no editing are both refused.
        """
        width = len(self.eigenvalues)
        if rule.rule == "energy":
            rank = int((self.eigenvalues.cumsum(0) / self.eigenvalues.sum() <= rule.value).sum())
        elif rule.rule == "quantile":
            rank = min(_part(rule.value, width), width)
        else:
            rank = int((self.eigenvalues < rule.value).sum())
        if rank in (0, width):
            what = "no direction is left to edit" if rank == 0 else "every direction counts as free to edit"
            example = {"energy": "0.05", "quantile": "0.5"}.get(rule.rule, f"{float(self.eigenvalues.median()):.3g}")
            raise InvalidInput(
                f"null-space {rule.rule} {rule.value:g} keeps {rank} of {width} directions: {what}",
                f"choose another {rule.rule}, for example {example}, or more corpus tokens",
            )
        return rank


def _part(share: float, width: int) -> int:
    """⌊share · width⌋, where 0.29 · 100 is 29."""
    return math.floor(share * width + 1e-9)


def null_space_event(layer: int, moment: Moment, rule: methods.NullSpace) -> NullSpace:
    """What to tell of one layer's projector."""
    rank = moment.null_rank(rule)
    inside = float(moment.eigenvalues[:rank].sum() / moment.eigenvalues.sum())
    return NullSpace(layer=layer, rank=rank, width=len(moment.eigenvalues), energy=inside)


# ---------------------------------------------------------------------------------------------------------------------
# What decides a layer's keys

_DIGESTS: WeakKeyDictionary[Model, dict[str, bytes]] = WeakKeyDictionary()
"""Digests of the parameters of loaded models as they were first seen."""


def _deciding(model: Model, layers: Sequence[int]) -> dict[int, list[str]]:
    """For each layer, names of the parameters on which its keys can depend.

    These are all but those of modules that a forward pass first calls at the layer's down-projection or later.
    """
    ids = torch.tensor([model.encode(PROBE)], device=model.device)
    called: dict[nn.Module, None] = {}

    def note(module: nn.Module, _args: object) -> None:
        called.setdefault(module)

    holders = [m for m in model.net.modules() if next(m.parameters(recurse=False), None) is not None]
    with torch.no_grad(), model.hooked([(m, "input", note) for m in holders]):
        model.net(input_ids=ids, use_cache=False)
    order = list(called)
    names = {}
    for layer in layers:
        place = order.index(model.blocks[layer].down)
        early, late = (
            {id(p) for m in part for p in m.parameters(recurse=False)} for part in (order[:place], order[place:])
        )
        names[layer] = [name for name, p in model.net.named_parameters() if id(p) not in late - early]
    return names


class _Base:
    """The hashes of a model's weights that decide its keys.

    They are those of when the model was first seen, so that edits worn since neither hide a measurement nor are taken
    for the base.
    """

    def __init__(self, model: Model) -> None:
        self._known = _DIGESTS.setdefault(model, {})
        self._parameters = dict(model.net.named_parameters())
        self._fresh: set[str] = set()

    def digest(self, names: Iterable[str]) -> str:
        """One hash of the parameters named."""
        return combine_digests((name, self._digest(name)) for name in names)

    def _digest(self, name: str) -> bytes:
        if name not in self._known:
            self._known[name] = tensor_digest(self._parameters[name])
            self._fresh.add(name)
        return self._known[name]

    def check(self, names: Iterable[str]) -> None:
        """Make sure that the weights are still the base's.

        Raises:
            RuntimeError: they are not; the caller asks for second moments while edits are worn.
        """
        for name in set(names) - self._fresh:
            if tensor_digest(self._parameters[name]) != self._known[name]:
                raise RuntimeError(f"second moments are of the unedited model, and {name} is edited")


def _reading(model: Model, base: str) -> str:
    """Hash of what beside the weights decides the keys of a text: configuration and tokenizer."""
    if model.folder is None:
        return base
    total = hashlib.sha256()
    for path in sorted({p for pattern in IDENTITY_FILES for p in model.folder.glob(pattern)}):
        if path.suffix != ".safetensors":
            total.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return total.hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------------------
# Text as rows of tokens


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


def _read_batches(model: Model, lines: Iterator[str], tokens: int, skip: int) -> Iterator[list[list[int]]]:
    """Batches of `ROWS` rows of a text, the first `skip` left out."""
    sequences = itertools.islice(_sequences(model, lines, tokens), skip * ROWS, None)
    while rows := list(itertools.islice(sequences, ROWS)):
        yield rows


def _written_batches(model: Model, seed: int, tokens: int, skip: int) -> Iterator[list[list[int]]]:
    """Batches of `ROWS` samples, the first `skip` left out. Rows written together have a seed of their own."""
    limit = min(SEQUENCE, model.context_length)
    for number in itertools.count(skip * ROWS // WRITTEN):
        left = tokens - number * WRITTEN * limit
        if left <= 0:
            return
        rows = samples(model, (seed << 32) + number, min(WRITTEN, math.ceil(left / limit)), min(limit, left))
        for start in range(0, len(rows), ROWS):
            if number * WRITTEN + start >= skip * ROWS:
                yield [row[: left - i * limit] for i, row in enumerate(rows[start : start + ROWS], start)]


@torch.no_grad()
def samples(model: Model, seed: int, rows: int, length: int) -> list[list[int]]:
    """Texts the model writes itself, rows × length token ids, drawn from its own distribution (temperature 1).

    They begin with the start token, which counts as one of `length`, or with the end-of-text token if there is none.
    Drawn on the CPU, so that every device draws alike from the same probabilities.

    Raises:
        InvalidInput: the tokenizer has neither.
    """
    words = model.tokenizer
    first = next((token for token in (words.bos_token_id, words.eos_token_id) if token is not None), None)
    if first is None:
        raise InvalidInput(
            f"{model.name} needs a corpus: it has neither a start nor an end token to write its own text from",
            'name a UTF-8 text file: --corpus FILE, or corpus = "FILE" under [settings] in editctl.toml',
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, 1), first, device=model.device)
    written = [ids]
    extra: dict[str, Any] = {}
    for _ in range(length - 1):
        result = model.net(input_ids=ids, use_cache=True, **extra)
        extra = {"past_key_values": result.past_key_values}
        chances = result.logits[:, -1].float().softmax(-1).cpu()
        ids = torch.multinomial(chances, 1, generator=generator).to(model.device)
        written.append(ids)
    found: list[list[int]] = torch.cat(written, dim=1).tolist()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Gram matrices


class Gram:
    """Σ k kᵀ over batches of keys: the tiles of its upper triangle, fp64.

    Each tile knows how many batches it holds, so that a batch counts once even when adding it was interrupted.
    """

    def __init__(self, width: int, where: torch.device) -> None:
        self.width = width
        self.tiles: dict[str, tuple[Tensor, int]] = {}
        """Sum and number of batches, by `ROW.COLUMN` of the tile's first entry."""
        for i, j in itertools.combinations_with_replacement(range(0, width, TILE), 2):
            shape = (min(TILE, width - i), min(TILE, width - j))
            self.tiles[f"{i}.{j}"] = (torch.zeros(shape, dtype=torch.float64, device=where), 0)

    def add(self, points: Tensor, number: int) -> None:
        """Add batch `number`, counted from 0, to the tiles that lack it.

        Args:
            points: keys, N × width; their products are rounded in their dtype.
        """
        for name, (total, batches) in self.tiles.items():
            if batches == number:
                i, j = map(int, name.split("."))
                product = points[:, i : i + TILE].T @ points[:, j : j + TILE]
                self.tiles[name] = (total + product.to(total.device), number + 1)

    def full(self) -> Tensor:
        """The sum, width × width."""
        whole = next(iter(self.tiles.values()))[0].new_empty(self.width, self.width)
        for name, (total, _) in self.tiles.items():
            i, j = map(int, name.split("."))
            height, width = total.shape
            if i != j:
                whole[j : j + width, i : i + height] = total.T
            whole[i : i + height, j : j + width] = total
        return whole


class _Pass:
    """What a pass has seen so far of the layers it is for, kept in a file a layer when it is interrupted."""

    def __init__(self, grams: dict[int, Gram], files: Mapping[int, Path]) -> None:
        self.grams = grams
        self._files = files
        begun = [self._load(layer) for layer in grams]
        self.batches, self.seen = min(begun)
        """Batches that every tile holds, and tokens in them."""
        self._kept, self._saved = self.batches, time.monotonic()

    def add(self, keys: Mapping[int, Tensor], mask: Tensor) -> None:
        """Add one batch.

        Args:
            keys: by layer, B × T × d_k.
            mask: B × T, 1 where there is a token.
        """
        for layer, gram in self.grams.items():
            gram.add(keys[layer][mask.bool()].float(), self.batches)
        self.batches, self.seen = self.batches + 1, self.seen + int(mask.sum())
        if time.monotonic() - self._saved >= SAVE_EVERY:
            self._save()

    def finish(self, layer: int) -> Tensor:
        """C of a layer, the mean over all tokens, d_k × d_k, fp64."""
        return self.grams[layer].full() / self.seen

    def drop(self, layer: int) -> None:
        """The layer is done with: forget it and its file."""
        del self.grams[layer]
        self._files[layer].unlink(missing_ok=True)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever ends what is done inside, the pass goes on from here another time."""
        try:
            yield
        except BaseException:
            if self.batches > self._kept:
                self._save()
            raise

    def _save(self) -> None:
        for layer, gram in self.grams.items():
            tensors = {name: total for name, (total, _) in gram.tiles.items()}
            held = {name: batches for name, (_, batches) in gram.tiles.items()}
            _write(
                self._files[layer], tensors, {"rows": ROWS, "batches": self.batches, "seen": self.seen, "held": held}
            )
        self._kept, self._saved = self.batches, time.monotonic()

    def _load(self, layer: int) -> tuple[int, int]:
        """Take up a layer's file; batches and tokens it holds, none if it is missing, spoiled or of other tiles."""
        found = _read(self._files[layer])
        if found is None:
            return 0, 0
        (tensors, about), tiles = found, self.grams[layer].tiles
        shapes = {name: total.shape for name, (total, _) in tiles.items()}
        if about.get("rows") != ROWS or {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            return 0, 0
        for name, (zero, _) in tiles.items():
            tiles[name] = (tensors[name].to(zero.device), about["held"][name])
        return about["batches"], about["seen"]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Write tensors and JSON values about them with a hash of both, so that a spoiled file is noticed."""
    write_tensors(path, tensors, {**about, "digest": _digest(tensors, about)})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `_write` wrote; None if it is missing or spoiled, since it can be made again."""
    try:
        tensors, about = read_tensors(path)
        good = about.pop("digest") == _digest(tensors, about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None
    return (tensors, about) if good else None


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> str:
    digests = [(name, tensor_digest(tensor)) for name, tensor in tensors.items()]
    return combine_digests([*digests, ("", json.dumps(about, sort_keys=True).encode())])


def _cached(path: Path, width: int) -> Moment | None:
    """What a layer's file holds, if that fits the layer."""
    found = _read(path)
    if found is None or found[0]["basis"].shape != (width, width):
        return None
    tensors, about = found
    return Moment(tensors["basis"], tensors["eigenvalues"], about["seen"], path, cached=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def moments(
    model: Model,
    layers: Sequence[int],
    *,
    corpus: str,
    tokens: int,
    base: str,
    folder: Path,
    emit: Emit,
    content: str = "",
) -> dict[int, Moment]:
    """The eigenbases of the layers' second moments on the unedited model, from the cache or from one shared pass.

    The cache is found by content: the corpus itself is opened only when something is missing. A layer's entry is named
    by the weights that decide its keys, not by the whole model's, so a model that differs only above a layer shares
    it; the model's own samples depend on all weights. An interrupted pass leaves `.part.safetensors` files, and the
    next call for the same content goes on from there and comes to the same bits.

    Args:
        corpus: what `editctl.engine.corpus.content` takes.
        tokens: most tokens to read.
        base: identity of the model, kept with the result; names the files only of a model without a folder.
        folder: where the cache lies.
        content: name of the corpus's content; by default what it is now.

    Raises:
        InvalidInput: the corpus is missing, not the one named, or too short.
        RuntimeError: a measurement is needed while edits are worn.
    """
    content = content or corpus_room.content(model.name, corpus)
    seed = corpus_room.sampled(model.name, corpus)
    if seed is not None:
        emit(Note("no corpus was given: measuring on text the model writes itself; a real text is better"))
    shared = {
        "reading": _reading(model, base),
        "dtype": str(model.dtype),
        "corpus": content,
        "tokens": tokens,
        "sequence": SEQUENCE,
    }
    weights = _Base(model)
    # What the model writes depends on all its weights.
    everything = [name for name, _ in model.net.named_parameters()]
    deciding = dict.fromkeys(layers, everything) if seed is not None else _deciding(model, layers)
    facts = {layer: {**shared, "weights": weights.digest(deciding[layer]), "layer": layer} for layer in layers}
    paths = {layer: folder / f"{_name(facts[layer])}.safetensors" for layer in layers}
    found = {
        layer: moment
        for layer in layers
        if (moment := _cached(paths[layer], model.blocks[layer].weight.shape[1])) is not None
    }
    if missing := [layer for layer in layers if layer not in found]:
        weights.check({name for layer in missing for name in deciding[layer]})
        lines = corpus_room.lines(model.name, corpus, content)

        def batches(skip: int) -> Iterator[list[list[int]]]:
            if seed is not None:
                return _written_batches(model, seed, tokens, skip)
            return _read_batches(model, lines, tokens, skip)

        provenance = {"model": model.name, "base": base, "source": corpus, "libraries": _libraries()}
        about = {layer: {**facts[layer], **provenance, "module": model.blocks[layer].down_name} for layer in missing}
        found |= _measure(model, {layer: paths[layer] for layer in missing}, about, batches, tokens, emit)
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


def _name(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _libraries() -> dict[str, str]:
    """Versions of what decides the arithmetic."""
    return {name: library_version(name) for name in ("torch", "transformers")}


@torch.no_grad()
def _measure(
    model: Model,
    files: Mapping[int, Path],
    about: Mapping[int, Mapping[str, object]],
    batches: Callable[[int], Iterator[list[list[int]]]],
    tokens: int,
    emit: Emit,
) -> dict[int, Moment]:
    """The moments of some layers, measured in one pass and written to their files.

    Args:
        about: what is written beside each layer's.
        batches: batches of rows of tokens, after as many as it is told to leave out.
    """
    where = precise_device(model.device)
    emit(StageStarted("statistics", tokens))
    grams = {layer: Gram(model.blocks[layer].weight.shape[1], where) for layer in files}
    state = _Pass(grams, {layer: path.with_suffix(".part.safetensors") for layer, path in files.items()})
    if state.batches:
        emit(Note(f"going on after {state.seen} tokens, where an earlier measurement was interrupted"))
        emit(Progress("statistics", min(state.seen, tokens), tokens))
    with state.kept():
        for rows in batches(state.batches):
            ids, mask = pad_right(rows, model.device)
            keys, _ = model.read(ids, mask, keys=list(files))
            state.add(keys, mask)
            emit(Progress("statistics", min(state.seen, tokens), tokens))
    width = max(gram.width for gram in grams.values())
    if state.seen < width:
        for layer in files:
            state.drop(layer)
        raise InvalidInput(
            f"the corpus gave {state.seen} tokens, too few for keys of width {width}",
            "give a longer text with --corpus, or more corpus_tokens",
        )
    found = {}
    with state.kept():
        for layer, path in files.items():
            eigenvalues, basis = torch.linalg.eigh(state.finish(layer))
            # eigh returns columns one after another; as a file gives it back, rows, products round alike.
            rows_first = basis.to("cpu", torch.float32).contiguous()
            moment = Moment(rows_first, eigenvalues.clamp_min(0).to("cpu", torch.float64), state.seen, path)
            tensors = {"basis": moment.basis, "eigenvalues": moment.eigenvalues}
            _write(path, tensors, {**about[layer], "seen": state.seen})
            state.drop(layer)
            found[layer] = moment
    return found


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
