"""Target vectors: what the hidden state at a subject's last token should be for the model to say the new target.

Knows: one optimiser for all requests of a batch at once. Requests are independent: the loss is their sum, each has its
own learning rate and stops on its own, after which its rows leave the batch. Refuses: keys and weights.

For each request a change δ of block z's output at the lookup position minimises (Meng et al. 2023, eq. 16, with the
KL term of Meng et al. 2022, eq. 4; sizes relative to the hidden state h₀ so that one setting serves all models)

    mean over contexts of NLL(target) + kl · KL(p_δ ‖ p_0 at the bare subject) + decay · ‖δ‖² / ‖h₀‖²

by Adam with step `rate` · RMS(h₀), δ held within `clamp` · ‖h₀‖, until the NLL falls below `stop`.

Only the positions from the lookup on pass through the model; what lies before them is read once and kept as its
attention cache. That is exact: nothing before the lookup position can see the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from editctl.engine.methods import TargetSettings
from editctl.engine.model import Model, first_tensor, with_first
from editctl.engine.prompts import Request, Row, rows, subject_row
from editctl.events import Emit, TargetStep

BETAS, EPSILON = (0.9, 0.999), 1e-8
CHUNK = 32
"""Requests optimised together; bounds the activations in memory."""


@dataclass(frozen=True)
class Target:
    """The result for one request."""

    vector: Tensor
    """z = h₀ + δ, d, fp32."""
    nll: float
    """NLL of the target under z, mean over contexts, nats a token."""
    steps: int


class _Batch:
    """The rows still being optimised, with the attention cache of what lies before their lookup positions."""

    def __init__(self, model: Model, texts: Sequence[Row], owner: Sequence[int]) -> None:
        device = model.device
        self.owner = torch.tensor(owner, device=device)
        prefix = max(r.lookup for r in texts)
        # The last token of a row is only ever predicted; a row of a bare subject predicts nothing and keeps its own.
        inputs = [r.ids[r.lookup : max(len(r.ids) - 1, r.lookup + 1)] for r in texts]
        width = max(len(i) for i in inputs)
        before = torch.zeros(len(texts), prefix, dtype=torch.long)
        self.prefix_mask = torch.zeros(len(texts), prefix, dtype=torch.long)
        self.ids = torch.zeros(len(texts), width, dtype=torch.long)
        self.labels = torch.full((len(texts), width), -100)
        for i, (text, tokens) in enumerate(zip(texts, inputs, strict=True)):
            if text.lookup:
                before[i, -text.lookup :] = torch.tensor(text.ids[: text.lookup])
                self.prefix_mask[i, -text.lookup :] = 1
            self.ids[i, : len(tokens)] = torch.tensor(tokens)
            if text.target:
                start = text.answer - 1 - text.lookup
                self.labels[i, start : start + len(text.target)] = torch.tensor(text.target)
        lookups = torch.tensor([r.lookup for r in texts])
        self.positions = (lookups[:, None] + torch.arange(width)).to(device)
        self.ids, self.labels = self.ids.to(device), self.labels.to(device)
        self.prefix_mask = self.prefix_mask.to(device)
        self.cache: list[tuple[Tensor, Tensor]] = []
        if prefix:
            self._read_prefix(model, before.to(device))

    @torch.no_grad()
    def _read_prefix(self, model: Model, before: Tensor) -> None:
        positions = (self.prefix_mask.cumsum(1) - 1).clamp_min(0)
        result = model.net(
            input_ids=before, attention_mask=self.prefix_mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        # Padding attends to nothing and may hold NaN, which a zero attention weight would not remove.
        there = self.prefix_mask.bool()[:, None, :, None]
        self.cache = [
            (torch.where(there, layer.keys, 0), torch.where(there, layer.values, 0))
            for layer in result.past_key_values.layers
        ]

    def keep(self, chosen: Tensor) -> None:
        """Drop the rows not chosen."""
        self.owner, self.ids, self.labels = self.owner[chosen], self.ids[chosen], self.labels[chosen]
        self.positions, self.prefix_mask = self.positions[chosen], self.prefix_mask[chosen]
        self.cache = [(k[chosen], v[chosen]) for k, v in self.cache]

    def logits(self, model: Model) -> Tensor:
        """B × width × vocabulary, in fp32."""
        from transformers import DynamicCache

        extra: dict[str, Any] = {}
        if self.cache:
            extra["past_key_values"] = DynamicCache(self.cache)
        mask = torch.cat([self.prefix_mask, torch.ones_like(self.ids)], dim=1)
        result = model.net(
            input_ids=self.ids, attention_mask=mask, position_ids=self.positions, use_cache=bool(self.cache), **extra
        )
        logits: Tensor = result.logits
        return logits if logits.dtype == torch.float64 else logits.float()


def optimise(
    model: Model,
    layer: int,
    requests: Sequence[Request],
    contexts: Sequence[str],
    settings: TargetSettings,
    *,
    emit: Emit,
    batch: int = 0,
) -> list[Target]:
    """Target vectors of all requests at the output of block `layer`, on the weights the model wears.

    Args:
        contexts: what each prompt is spoken after, the empty one first.
        batch: number that events carry.

    Returns:
        One target a request, in order, vectors of the hidden width d.
    """
    if len(requests) > CHUNK:
        parts = [requests[start : start + CHUNK] for start in range(0, len(requests), CHUNK)]
        found = (optimise(model, layer, part, contexts, settings, emit=emit, batch=batch) for part in parts)
        return [target for targets in found for target in targets]
    texts: list[Row] = []
    owner: list[int] = []
    plain: list[bool] = []
    bare: list[bool] = []
    for i, request in enumerate(requests):
        for j, text in enumerate((*rows(model, request, contexts), subject_row(model, request.subject))):
            texts.append(text)
            owner.append(i)
            plain.append(j == 0)
            bare.append(j == len(contexts))
    state = _Batch(model, texts, owner)
    is_bare = torch.tensor(bare, device=model.device)
    n, module = len(requests), model.blocks[layer].module
    captured: list[Tensor] = []

    def capture(_module: nn.Module, _args: object, output: Any) -> None:
        captured.append(first_tensor(output)[:, 0].detach())

    with torch.no_grad(), model.hooked([(module, "output", capture)]):
        first = state.logits(model)
    calm = first[is_bare, 0].log_softmax(-1)
    # The plain row of each request comes in order, so this is n × d. Optimisation runs at least in fp32.
    origin = captured[0][torch.tensor(plain, device=model.device)]
    origin = origin if origin.dtype == torch.float64 else origin.float()
    norm = origin.norm(dim=1, keepdim=True)
    step_size = settings.rate * norm / origin.shape[1] ** 0.5

    delta = torch.zeros_like(origin)
    momentum, variance = torch.zeros_like(origin), torch.zeros_like(origin)
    nll = torch.full((n,), float("inf"), dtype=origin.dtype, device=model.device)
    taken = torch.zeros(n, dtype=torch.long)
    active = torch.ones(n, dtype=torch.bool, device=model.device)
    for step in range(settings.steps + 1):
        delta.requires_grad_(True)

        def push(_module: nn.Module, _args: object, output: Any, delta: Tensor = delta) -> Any:
            hidden = first_tensor(output)
            change = torch.zeros_like(hidden)
            change[:, 0] = delta[state.owner].to(hidden.dtype)
            return with_first(output, hidden + change)

        with model.hooked([(module, "output", push)]):
            logits = state.logits(model)
        per_token = functional.cross_entropy(
            logits.flatten(0, 1), state.labels.flatten(), ignore_index=-100, reduction="none"
        ).view(state.labels.shape)
        counted = (state.labels != -100).sum(1).clamp_min(1)
        per_row = per_token.sum(1) / counted
        speaking = ~is_bare
        losses = torch.zeros_like(nll).index_add(0, state.owner[speaking], per_row[speaking]) / len(contexts)
        new = logits[is_bare, 0].log_softmax(-1)
        drift = (new.exp() * (new - calm)).sum(1)
        nll = torch.where(active, losses.detach(), nll)
        active &= nll >= settings.stop
        emit(TargetStep(batch, step, float(nll.mean()), int(active.sum())))
        if step == settings.steps or not active.any():
            break
        total = losses.sum() + settings.kl * drift.sum() + settings.decay * ((delta / norm) ** 2).sum()
        (gradient,) = torch.autograd.grad(total, delta)
        with torch.no_grad():
            taken += active.cpu()
            momentum = BETAS[0] * momentum + (1 - BETAS[0]) * gradient
            variance = BETAS[1] * variance + (1 - BETAS[1]) * gradient**2
            # All active requests have taken the same number of steps, so one bias correction serves them.
            m = momentum / (1 - BETAS[0] ** (step + 1))
            v = variance / (1 - BETAS[1] ** (step + 1))
            moved = delta - step_size * m / (v.sqrt() + EPSILON)
            moved *= (settings.clamp * norm / moved.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
            delta = torch.where(active[:, None], moved, delta.detach())
            staying = active[state.owner]
            if not staying.all():
                calm = calm[active[state.owner[is_bare]]]
                state.keep(staying)
                is_bare = is_bare[staying]
    vectors = (origin + delta.detach()).float()
    return [Target(vectors[i], float(nll[i]), int(taken[i])) for i in range(n)]
