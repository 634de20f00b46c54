"""Target vectors: what the hidden state at a subject's last token should be for the model to say the new target.

Knows: one optimiser for all groups of a batch at once. Groups are independent: the loss is their sum, each has its own
learning rate and stops on its own, after which its rows leave the batch. Refuses: keys and weights.

For each group of facts about one subject a change δ of block z's output at the subject's last token minimises (Meng et
al. 2023, eq. 16, with the KL term of Meng et al. 2022, eq. 4; sizes relative to the hidden state h₀ so that one setting
serves all models)

    sum over facts of the mean over contexts of NLL(target)
    + kl · KL(p_δ ‖ p_0 at the bare subject) + decay · ‖δ‖² / ‖h₀‖²

by Adam with step `rate` · RMS(h₀), δ held within `clamp` · ‖h₀‖, until the NLL of every new fact falls below `stop`.
Facts that were written before and answers that shall stay may end no worse than they began. One vector that has to say
m ≤ `MOST` things has √m of the radius and m times the steps: a bound for one leaves no room for several.

What a change of block z cannot reach is not computed: positions before the subject's last token are read once and kept
as attention cache, blocks up to z are read once, the head is asked only where a target or the KL is. All exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from editctl.engine.memory import in_chunks
from editctl.engine.methods import TargetSettings
from editctl.engine.model import Model
from editctl.engine.passes import Beginnings, after, end, head_at, resuming, taps
from editctl.engine.prompts import Group, Row, row, subject_row
from editctl.events import Emit, TargetStep

BETAS, EPSILON = (0.9, 0.999), 1e-8
CHUNK = 32
"""Groups optimised together; bounds the activations in memory."""
MOST = 3
"""Facts and kept answers of a group up to which its radius and its steps grow."""


@dataclass(frozen=True)
class Target:
    """The result for one group."""

    change: Tensor
    """δ, d, fp32: of the block's output, or of its down-projection's where a norm or the method puts it there."""
    nll: float
    """NLL of the new targets under δ, mean over facts and contexts, nats a token."""
    steps: int


@dataclass(frozen=True)
class _Text:
    """One row of a batch."""

    row: Row
    context: int
    """Number of the context it begins with."""
    fact: int
    """Number of the group's fact it speaks; -1 for a bare subject."""
    share: float
    """Its weight in the mean over the fact's contexts."""


@dataclass(frozen=True)
class _Sought:
    """A group as rows."""

    texts: tuple[_Text, ...]
    """The first fact without context comes first."""
    new: tuple[bool, ...]
    """Which of its facts are new."""
    bare: int
    """The row whose first position ends the bare subject."""

    @property
    def width(self) -> int:
        """Most tokens of a row from the subject's last on."""
        return max(len(text.row.ids) - text.row.lookup for text in self.texts)


def _rows_of(model: Model, group: Group, contexts: Sequence[str]) -> _Sought:
    spoken = [(fact, contexts) for fact in group.facts] + [(fact, contexts[:1]) for fact in group.kept]
    texts = [
        _Text(row(model, fact, context), j, i, 1 / len(some))
        for i, (fact, some) in enumerate(spoken)
        for j, context in enumerate(some)
    ]
    subject = subject_row(model, group.subject)
    # A prompt that begins with the subject has the bare subject in it.
    begin = (i for i, text in enumerate(texts) if text.row.ids[: text.row.lookup + 1] == subject.ids)
    bare = next(begin, len(texts))
    if bare == len(texts):
        texts.append(_Text(subject, 0, -1, 0.0))
    return _Sought(tuple(texts), tuple(i < group.new for i in range(len(spoken))), bare)


class _Batch:
    """All rows of some groups, and what of a pass over them no step changes."""

    def __init__(self, model: Model, layer: int, sought: Sequence[_Sought], *, site: str) -> None:
        self.model, self.layer, self.site = model, layer, site
        self.response = model.response(layer)
        device = model.device
        texts = [text for one in sought for text in one.texts]
        rows = [text.row for text in texts]
        starts = [sum(len(one.texts) for one in sought[:g]) for g in range(len(sought))]
        facts = [sum(len(one.new) for one in sought[:g]) for g in range(len(sought))]
        self.group = torch.tensor([g for g, one in enumerate(sought) for _ in one.texts], device=device)
        """Of each row."""
        self.first = torch.tensor(starts, device=device)
        self.bare = torch.tensor([start + one.bare for start, one in zip(starts, sought, strict=True)], device=device)
        """The row of each group at whose first position the KL is taken."""
        self.group_of_fact = torch.tensor([g for g, one in enumerate(sought) for _ in one.new], device=device)
        self.is_new = torch.tensor([new for one in sought for new in one.new], device=device)

        @contextmanager
        def no_head(_name: str) -> Iterator[None]:
            with taps(model, {(len(model.blocks) - 1, "output"): end}):
                yield

        begun = Beginnings(
            model, [r.ids for r in rows], [text.context for text in texts], [r.lookup for r in rows]
        ).read(no_head)
        # The last token of a row is only ever predicted; a row of a bare subject predicts nothing and keeps its own.
        inputs = [r.ids[r.lookup : max(len(r.ids) - 1, r.lookup + 1)] for r in rows]
        width = max(len(ids) for ids in inputs)
        ids = torch.tensor([[*own, *[0] * (width - len(own))] for own in inputs], device=device)
        # What pads a row comes after all of its tokens, which do not see it.
        self.window = after(begun, ids, torch.ones_like(ids))
        first_fact = [facts[g] for g, one in enumerate(sought) for _ in one.texts]
        asked = [
            (
                i,
                text.row.answer - 1 - text.row.lookup + k,
                token,
                first_fact[i] + text.fact,
                text.share / len(text.row.target),
            )
            for i, text in enumerate(texts)
            if text.fact >= 0
            for k, token in enumerate(text.row.target)
        ]
        *columns, shares = zip(*asked, strict=True)
        self.at_row, self.at_column, self.label, self.fact = (torch.tensor(c, device=device) for c in columns)
        self._read()
        self.weight = torch.tensor(shares, dtype=self.origin.dtype, device=device)

    @torch.no_grad()
    def _read(self) -> None:
        """What no step changes: the state from which blocks above go on, and what the bare subject leads to."""
        z, seen = self.layer, dict[str, Tensor]()
        shape = self.window.ids.shape

        def note(name: str) -> Callable[[Tensor], None]:
            return lambda value: seen.__setitem__(name, value.reshape(*shape, -1))

        places = {(z, "input"): note("input"), (z, "output"): note("output"), (z, "write"): note("write")}
        with taps(self.model, places) as found, head_at(self.model, self.bare * shape[1]):
            logits = self.window.call(self.model)[0]
        self.tuples = found.tuples
        self.calm = _precise(logits).log_softmax(-1)
        self.state = seen["input" if self.site == "mlp" else "output"]
        self.resume = z if self.site == "mlp" else z + 1
        self.write = _precise(seen["write"][:, 0])
        normed = self.site == "block" and self.response.kind == "normed"
        origin = _precise(seen["write" if normed else "output"][self.first, 0])
        self.origin = origin[:, None].repeat(1, 2 if self.site == "mlp" else 1, 1)
        """What the changes are relative to, groups × parts × d: one part, or attention's and the MLP's."""
        self.window = self.window.above(self.resume)

    def keep(self, active: Tensor, dropped: Tensor) -> None:
        """Drop the rows of groups that are done.

        Args:
            active: mask of all groups.
            dropped: which of those that were active until now are not any more.
        """
        chosen = active[self.group]
        number = chosen.cumsum(0) - 1
        staying = chosen[self.at_row]
        self.at_row = number[self.at_row[staying]]
        for name in ("at_column", "label", "fact", "weight"):
            setattr(self, name, getattr(self, name)[staying])
        self.bare, self.calm = number[self.bare[~dropped]], self.calm[~dropped]
        self.group, self.write = self.group[chosen], self.write[chosen]
        self.state, self.window = self.state[chosen], self.window.rows(chosen)

    def logits(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Of every asked target token, and of every bare subject, given changes (groups × parts × d); at least fp32."""
        width = self.window.ids.shape[1]
        flat = torch.cat([self.at_row * width + self.at_column, self.bare * width])
        mine = delta[self.group]
        state = self.state

        def push(change: Tensor) -> Callable[[Tensor], Tensor]:
            def add(hidden: Tensor) -> Tensor:
                grown = hidden.reshape(*self.window.ids.shape, -1)
                first = grown[:, :1] + change[:, None].to(grown.dtype)
                return torch.cat([first, grown[:, 1:]], dim=1).reshape(hidden.shape)

            return add

        with ExitStack() as stack:
            if self.site == "mlp":
                places = {(self.layer, "attention"): push(mine[:, 0]), (self.layer, "write"): push(mine[:, 1])}
                stack.enter_context(taps(self.model, places))
            else:
                moved = mine[:, 0]
                if self.response.kind == "normed":
                    moved = self.response.moved(self.write, moved)
                state = push(moved)(state)
            stack.enter_context(resuming(self.model, self.resume, state, tuples=self.tuples))
            stack.enter_context(head_at(self.model, flat))
            logits = _precise(self.window.call(self.model)[0])
        return logits[: len(self.label)], logits[len(self.label) :]


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def optimise(
    model: Model,
    layer: int,
    groups: Sequence[Group],
    contexts: Sequence[str],
    settings: TargetSettings,
    *,
    emit: Emit,
    batch: int = 0,
    site: str = "block",
) -> list[Target]:
    """Target vectors of all groups at block `layer`, on the weights the model wears.

    Args:
        contexts: what each prompt is spoken after, the empty one first.
        batch: number that events carry.
        site: `block`, or `mlp` for a change of the MLP's output alone, found with one of attention's beside it (PMET,
            Li et al. 2024, eq. 11).

    Returns:
        One target a group, in order.
    """

    # Rows are padded to the longest of their chunk.
    sought = [_rows_of(model, group, contexts) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: sought[i].width)

    def work(part: Sequence[int]) -> list[Target]:
        state = _Batch(model, layer, [sought[i] for i in part], site=site)
        return _descend(state, len(part), settings, emit, batch)

    found = in_chunks(order, CHUNK, work, emit, "subjects")
    return [target for _, target in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def _descend(state: _Batch, n: int, settings: TargetSettings, emit: Emit, batch: int) -> list[Target]:
    device, origin = state.model.device, state.origin
    norm = origin.norm(dim=2, keepdim=True)
    rate = torch.full_like(norm, settings.rate) if settings.published else settings.rate * norm / origin.shape[2] ** 0.5
    groups, new = state.group_of_fact, state.is_new
    news = groups[new].bincount(minlength=n)
    several = groups.bincount(minlength=n).clamp_max(MOST)
    radius = settings.clamp * several.to(norm).sqrt()[:, None, None] * norm
    most = settings.steps * several

    delta = torch.zeros_like(origin)
    momentum, variance = torch.zeros_like(origin), torch.zeros_like(origin)
    nll = torch.full((len(groups),), float("inf"), dtype=origin.dtype, device=device)
    limit = torch.full_like(nll, settings.stop)
    confirmed = torch.zeros(n, dtype=torch.long, device=device)
    taken = torch.zeros(n, dtype=torch.long)
    active = torch.ones(n, dtype=torch.bool, device=device)
    for step in range(int(most.max()) + 1):
        delta.requires_grad_(True)
        logits, bare = state.logits(delta)
        per_token = functional.cross_entropy(logits, state.label, reduction="none")
        losses = torch.zeros_like(nll).index_add(0, state.fact, per_token * state.weight)
        calm = bare.log_softmax(-1)
        drift = (calm.exp() * (calm - state.calm)).sum(1)
        with torch.no_grad():
            nll = torch.where(active[groups], losses, nll)
            if step == 0:
                limit = torch.where(new, limit, torch.maximum(limit, nll + settings.stop))
            late = torch.zeros(n, dtype=torch.bool, device=device)
            late[groups[nll >= limit]] = True
            if settings.confirm:
                missed = torch.zeros_like(late)
                missed[groups[state.fact[logits.argmax(-1) != state.label]]] = True
                confirmed += active & ~missed
                late &= confirmed < settings.confirm
            before, active = active, active & late
            spoken = torch.zeros(n, dtype=nll.dtype, device=device).index_add(0, groups[new], nll[new]) / news
        emit(TargetStep(batch, step, float(spoken.mean()), int(active.sum())))
        active = active & (step < most)
        if not active.any():
            break
        size = (delta / norm) ** 2
        decay = (size.sum(2) + 1e-30).sqrt() / norm[..., 0] if settings.published else size
        total = losses.sum() + settings.kl * drift.sum() + settings.decay * decay.sum()
        (gradient,) = torch.autograd.grad(total, delta)
        with torch.no_grad():
            taken += active.cpu()
            momentum = BETAS[0] * momentum + (1 - BETAS[0]) * gradient
            variance = BETAS[1] * variance + (1 - BETAS[1]) * gradient**2
            # All active groups have taken the same number of steps, so one bias correction serves them.
            m = momentum / (1 - BETAS[0] ** (step + 1))
            v = variance / (1 - BETAS[1] ** (step + 1))
            moved = delta - rate * m / (v.sqrt() + EPSILON)
            moved *= (radius / moved.norm(dim=2, keepdim=True).clamp_min(1e-30)).clamp_max(1)
            delta = torch.where(active[:, None, None], moved, delta.detach())
            if (dropped := ~active[before]).any():
                state.keep(active, dropped)
    # Of attention's change and the MLP's, the last is what is written.
    change = delta.detach()[:, -1].float()
    return [Target(change[i], float(spoken[i]), int(taken[i])) for i in range(n)]
