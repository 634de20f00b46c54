"""The two factors of a gradient: what enters a down-projection, and how the loss falls with what it puts out.

The gradient of a loss for the weight (d_out × d_in) is Σ_t g_t u_tᵀ over the tokens, u_t being the map's input and g_t
the gradient at its output, so its rank is at most the number of tokens. Knows: one forward and one backward pass for
all blocks asked for. Refuses: to change anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from editctl.engine.memory import in_chunks
from editctl.engine.model import Model
from editctl.engine.prompts import Request, Row, row
from editctl.engine.statistics import pad_right
from editctl.events import Emit, silent

ROWS = 32
"""Requests in one pass."""
NEGLIGIBLE = 0.1
"""Share of the largest ‖g‖ of an edit at a block below which a token's term is left away."""


@dataclass(frozen=True)
class Slope:
    """The gradient of one request's loss, mean nats a token of its target."""

    parts: dict[int, tuple[Tensor, Tensor]]
    """By block: u (T × d_in) and g (T × d_out) of the tokens whose g is not negligible, fp32."""
    keys: dict[int, Tensor]
    """By block: u at the subject's last token, d_in, fp32."""
    said: tuple[int, ...]
    """The most probable token at the place of each of the target's."""
    target: tuple[int, ...]
    prompt: tuple[int, ...]
    """Token ids."""
    loss: float


def slopes(
    model: Model, layers: Sequence[int], requests: Sequence[Request], emit: Emit = silent, rows: int = ROWS
) -> list[Slope]:
    """The slope of every request at these blocks, on the weights the model wears.

    Args:
        rows: requests in one pass; numbers of one pass differ in the last bits from those of another size.
    """
    tokenized = [row(model, request, "") for request in requests]
    return in_chunks(tokenized, rows, lambda part: _slopes(model, layers, part), emit, "requests")


def _slopes(model: Model, layers: Sequence[int], rows: Sequence[Row]) -> list[Slope]:
    ids, mask = pad_right([list(r.ids[:-1]) for r in rows], model.device)
    inputs: dict[int, Tensor] = {}
    pushes: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[..., Tensor]:
        def note(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[layer] = args[0].detach()
            pushes[layer] = torch.zeros_like(output, requires_grad=True)
            return output + pushes[layer]

        return note

    hooks = [(model.blocks[layer].down, "output", hook(layer)) for layer in layers]
    with model.hooked(hooks), torch.enable_grad():
        logits = model.net(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        spans = [slice(r.answer - 1, len(r.ids) - 1) for r in rows]
        targets = [torch.tensor(r.target, device=model.device) for r in rows]
        losses = [
            functional.cross_entropy(logits[i, s], t) for i, (s, t) in enumerate(zip(spans, targets, strict=True))
        ]
        found = torch.autograd.grad(torch.stack(losses).sum(), [pushes[layer] for layer in layers])
    result = []
    for i, one in enumerate(rows):
        length, parts, keys = len(one.ids) - 1, {}, {}
        for layer, slope in zip(layers, found, strict=True):
            # OPT flattens its positions before the MLP.
            u = inputs[layer].reshape(*ids.shape, -1)[i, :length].float()
            g = slope.reshape(*ids.shape, -1)[i, :length].float()
            sizes = g.norm(dim=1)
            kept = sizes > NEGLIGIBLE * sizes.max()
            parts[layer], keys[layer] = (u[kept], g[kept]), u[one.lookup]
        said = tuple(logits[i, spans[i]].argmax(-1).tolist())
        result.append(Slope(parts, keys, said, one.target, one.ids[: one.answer], float(losses[i].detach())))
    return result
