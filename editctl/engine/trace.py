"""Causal tracing: where between subject and answer a fact passes (Meng et al. 2022, ROME, section 2).

Knows: three runs of a prompt (clean; corrupted, with noise on the subject's embeddings; corrupted, with one cell put
back to its clean value) and how to make those of all cells at once. Refuses: to judge what comes out; `metrics.effects`
does.

Four facts make the savings exact: tokens before the subject are never corrupted, so they are read once and restoring
them changes nothing; blocks below the first restored one see nothing of it, so a pass resumes there; rows do not
influence each other; the head is asked only at the last token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from editctl.engine import speak
from editctl.engine.memory import in_chunks
from editctl.engine.model import Model
from editctl.engine.passes import Window, after, head_at, resuming, taps
from editctl.engine.prompts import split_answer
from editctl.errors import InvalidInput, ModelError
from editctl.events import Emit, Progress, StageStarted
from editctl.metrics.effects import ATTENTION, KINDS, MLP, SAMPLES, STATE, Case, Trace, roles, window_of
from editctl.spec import quoted

SIGMAS = 3.0
"""Standard deviation of the noise in those of the embeddings (ROME, section 2.1)."""
ROWS = 256
"""Rows of one forward pass: tokens to restore × samples of noise."""
PART = 4096
"""Tokens whose embeddings are held at once."""
_TAPS = {MLP: "write", ATTENTION: "attention"}


@torch.no_grad()
def noise_scale(model: Model) -> float:
    """Standard deviation of the noise: `SIGMAS` times that of all entries of the embeddings of all tokens.

    ROME's code takes the tokens of the subjects at hand; all tokens make a prompt's trace independent of what is traced
    beside it.
    """
    embed, count, total, square = model.net.get_input_embeddings(), 0, 0.0, 0.0
    for begin in range(0, len(model.tokenizer), PART):
        ids = torch.arange(begin, min(begin + PART, len(model.tokenizer)), device=model.device)
        values = embed(ids).cpu().double()
        count, total, square = count + values.numel(), total + float(values.sum()), square + float(values.pow(2).sum())
    return SIGMAS * math.sqrt(square / count - (total / count) ** 2)


def trace(
    model: Model,
    cases: Sequence[Case],
    *,
    kinds: Sequence[str] = KINDS,
    window: int | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    emit: Emit,
) -> Iterator[Trace]:
    """Trace prompts one after another on the weights the model wears.

    The noise of a prompt follows from the seed and its shape alone, so a trace does not depend on what is traced
    beside it, and another run gives the same.

    Args:
        kinds: what to restore.
        window: blocks restored together; by default `window_of` the model's.
        samples: how many draws of noise are averaged over.

    Raises:
        InvalidInput: a prompt is longer than the model can read.
        ModelError: attention is to be restored and what it writes cannot be found.
    """
    window = window or window_of(len(model.blocks))
    scale = noise_scale(model)
    said = iter(speak.answers(model, [case.prompt for case in cases if not case.answer], emit=emit))
    emit(StageStarted("trace", len(cases)))
    for done, case in enumerate(cases, 1):
        run = _Runs(model, case, samples, seed, scale, emit)
        effects = {kind: run.effects(kind, 1 if kind == STATE else window) for kind in kinds}
        texts = tuple(model.tokenizer.decode([token]) for token in run.ids)
        yield Trace(
            edit=case.edit,
            prompt=case.prompt,
            subject=case.subject,
            answer=case.answer or next(said),
            token=model.tokenizer.decode([run.answer]),
            tokens=texts,
            roles=roles(len(texts), *run.span),
            clean=run.clean,
            corrupted=run.corrupted,
            effects=effects,
            window=window,
            samples=samples,
            seed=seed,
            noise=scale,
        )
        emit(Progress("trace", done, len(cases)))


def span(model: Model, prompt: str, start: int, end: int) -> tuple[int, int]:
    """The tokens, in `encode(prompt)`, that hold the characters start..end: the first, and the one after the last."""
    last = model.subject_last(prompt, start, end)
    if model.tokenizer.is_fast:
        offsets = model.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
        if inside:
            return inside[0], last + 1
    whole, before = model.encode(prompt), model.encode(prompt[:start])
    first = next((i for i, (a, b) in enumerate(zip(whole, before, strict=False)) if a != b), len(before))
    return min(first, last), last + 1


class _Runs:
    """The three runs of one prompt.

    Only the tokens from the subject on are run; those before lie in the cache.
    """

    @torch.no_grad()
    def __init__(self, model: Model, case: Case, samples: int, seed: int, scale: float, emit: Emit) -> None:
        self._model, self._samples, self._emit = model, samples, emit
        self.ids = model.encode(case.prompt)
        if case.answer:
            whole, seam = split_answer(model, case.prompt, case.answer)
            self.ids, self.answer = whole[:seam], whole[seam]
        if not self.ids:
            raise InvalidInput(f"no token of {quoted(case.prompt)} is without a part of the answer", "ask more of it")
        if len(self.ids) > model.context_length:
            raise InvalidInput(
                f"a prompt of {len(self.ids)} tokens is more than the {model.context_length} that {model.name} reads: "
                f"{quoted(case.prompt)}",
                "shorten it",
            )
        first, end = span(model, case.prompt, case.start, case.end)
        # A token that spans the seam between prompt and answer counts as answer.
        self.span = min(first, len(self.ids) - 1), min(end, len(self.ids))
        ids = torch.tensor([self.ids], device=model.device)
        head, rest = ids[:, : self.span[0]], ids[:, self.span[0] :]
        before = after(None, head, torch.ones_like(head)).fill(model) if self.span[0] else None
        self._window = after(before, rest, torch.ones_like(rest))
        generator = torch.Generator().manual_seed(seed)
        width = model.net.get_input_embeddings().weight.shape[-1]
        noise = torch.randn(samples, self.span[1] - self.span[0], width, generator=generator, dtype=torch.float64)
        # MPS knows no float64.
        self._noise = (scale * noise).to(model.dtype).to(model.device)
        self._clean: dict[tuple[int, str], Tensor] = {}
        self._dirty: dict[int, Tensor] = {}
        blocks = range(len(model.blocks))
        kept = {(block, kind): partial(self._note, (block, kind)) for block in blocks for kind in ("output", "write")}
        with taps(model, kept) as found:
            chances = self._chances(self._window)
        self._tuples = found.tuples
        if not case.answer:
            self.answer = int(chances[0].argmax())
        self.clean = float(chances[0, self.answer])
        states = {(block, "output"): partial(self._keep, block) for block in blocks}
        with taps(model, states), self._corrupting(1):
            self.corrupted = float(self._chances(self._repeated(1))[:, self.answer].cpu().double().mean())
        if not math.isfinite(self.clean + self.corrupted):
            raise ModelError(f"{model.name} gives no probabilities for {quoted(case.prompt)}", "try --dtype float32")

    def _note(self, place: tuple[int, str], value: Tensor) -> None:
        # Falcon adds attention's output in place to what its down-projection put out.
        self._clean[place] = value.reshape(1, self._length, -1).clone()

    def _keep(self, block: int, value: Tensor) -> None:
        self._dirty[block] = value.clone()

    @property
    def _length(self) -> int:
        return self._window.ids.shape[1]

    def _repeated(self, cells: int) -> Window:
        """All samples of so many cells."""
        return self._window.rows(torch.zeros(cells * self._samples, dtype=torch.long, device=self._model.device))

    def _chances(self, window: Window) -> Tensor:
        """Probabilities of the next token after each row, rows × vocabulary, in float32 at least."""
        rows = len(window.ids)
        last = torch.arange(1, rows + 1, device=self._model.device) * self._length - 1
        with head_at(self._model, last):
            logits = window.call(self._model)[0]
        return (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)

    @contextmanager
    def _corrupting(self, cells: int) -> Iterator[None]:
        """Passes over all samples of so many cells have noise on the subject's embeddings."""

        def add(_module: object, _args: object, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[:, : self._noise.shape[1]] += self._noise.repeat(cells, 1, 1)
            return changed

        with self._model.hooked([(self._model.net.get_input_embeddings(), "output", add)]):
            yield

    def effects(self, kind: str, window: int) -> tuple[tuple[float, ...], ...]:
        """The indirect effect of restoring each token (rows) at each window of blocks (columns, by its middle)."""
        blocks = len(self._model.blocks)
        if kind == ATTENTION:
            for block in range(blocks):
                if self._model.attention_of(block) is None:
                    raise ModelError(
                        f"what attention writes in block {block} of {self._model.name} was not found",
                        f"leave it out: --kind {STATE} --kind {MLP}",
                    )
            places = {(block, "attention"): partial(self._note, (block, "attention")) for block in range(blocks)}
            with torch.no_grad(), taps(self._model, places):
                self._chances(self._window)
        columns = []
        for middle in range(blocks):
            first, end = max(0, middle - window // 2), min(blocks, middle + (window + 1) // 2)
            work = partial(self._restored, kind, range(first, end))
            cells = max(1, ROWS // self._samples)
            restored = in_chunks(range(self._length), cells, work, self._emit, "restored tokens")
            columns.append([0.0] * self.span[0] + [p - self.corrupted for p in restored])
        return tuple(zip(*columns, strict=True))

    @torch.no_grad()
    def _restored(self, kind: str, blocks: range, tokens: Sequence[int]) -> list[float]:
        """Mean p(answer) for each token at which the blocks' outputs of a kind are put back to the clean ones."""
        rows = torch.arange(len(tokens) * self._samples, device=self._model.device)
        places = torch.tensor(tokens, device=self._model.device).repeat_interleave(self._samples)

        def restore(block: int, name: str, value: Tensor) -> Tensor:
            # OPT flattens its positions before the MLP.
            changed = value.reshape(len(rows), self._length, -1).clone()
            changed[rows, places] = self._clean[block, name][0, places]
            return changed.view_as(value)

        start = blocks[0] + 1 if kind == STATE else blocks[0]
        puts: Mapping[tuple[int, str], Callable[[Tensor], Tensor]] = {}
        if kind != STATE:
            puts = {(block, _TAPS[kind]): partial(restore, block, _TAPS[kind]) for block in blocks}
        with ExitStack() as stack:
            if start:
                hidden = self._dirty[start - 1].repeat(len(tokens), 1, 1)
                if kind == STATE:
                    hidden = restore(blocks[0], "output", hidden)
                stack.enter_context(resuming(self._model, start, hidden, tuples=self._tuples))
            else:
                stack.enter_context(self._corrupting(len(tokens)))
            stack.enter_context(taps(self._model, puts))
            chances = self._chances(self._repeated(len(tokens)).above(start))
        return chances[:, self.answer].cpu().double().view(len(tokens), self._samples).mean(1).tolist()
