"""Keys and residuals of one stage of the layer-by-layer write.

Knows: that the key of a request at a layer is half its key in the plain prompt and half the mean over contexts (Meng
et al. 2023, eq. 19 and code), and that the residual left for the last layer is spread over the layers still to come
(eq. 20). Refuses: solving.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editctl.engine.model import Model
from editctl.engine.prompts import Request, rows
from editctl.engine.statistics import pad_right

CHUNK = 256
"""Texts in one forward pass."""


@torch.no_grad()
def keys_and_states(
    model: Model, layer: int, last: int, requests: Sequence[Request], contexts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Keys K (d_k × n) at `layer` and plain-prompt hidden states (d × n) at the output of block `last`.

    Only tokens up to the lookup position are read, and only blocks up to `last`.
    """
    texts = [text for request in requests for text in rows(model, request, contexts)]
    found_keys, found_states = [], []
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]
        ids, mask = pad_right([list(t.ids[: t.lookup + 1]) for t in part], model.device)
        keys, outputs = model.read(ids, mask, keys=[layer], outputs=[last])
        at = (torch.arange(len(part)), torch.tensor([t.lookup for t in part]))
        found_keys.append(keys[layer][at].float())
        found_states.append(outputs[last][at].float())
    keys_by_text = torch.cat(found_keys).view(len(requests), len(contexts), -1)
    mixed = keys_by_text[:, 0]
    if len(contexts) > 1:
        mixed = (mixed + keys_by_text[:, 1:].mean(1)) / 2
    states = torch.cat(found_states).view(len(requests), len(contexts), -1)[:, 0]
    return mixed.T, states.T


def residual_share(targets: Tensor, states: Tensor, stage: int, stages: int) -> Tensor:
    """R (d × n) for stage 0, 1, … of `stages`: what is still missing, divided by the layers still to be written."""
    return (targets - states) / (stages - stage)
