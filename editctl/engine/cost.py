"""What a run will need, before anything is loaded: memory, disk and time. Loads no torch.

Knows: sizes by config.json and by what is stored, and how long the last run of this model took. Refuses: measuring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editctl.engine.methods import Settings

SINGLE = 4
"""Bytes of an fp32 number."""
WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LIBRARIES = 450 * 2**20
"""Bytes that Python with torch and transformers takes before any model, measured on Linux."""
ROWS, SUFFIX = 32 * 7, 8
"""Rows optimised at once, and tokens of each from the subject's last on, as they usually are."""
RATE = {"cpu": 3e10, "mps": 1e12, "cuda": 3e13}
"""FLOP/s where nothing was measured yet: what an ordinary device of that kind does on such short rows."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that decide what editing it costs."""

    blocks: int
    hidden: int
    key: int
    """Width of the keys, d_k."""
    vocabulary: int
    weights: int
    """Bytes of the weights on disk."""

    @property
    def matrix(self) -> int:
        """Numbers in one edited matrix."""
        return self.hidden * self.key


def shape_of(config: Mapping[str, Any], folder: Path) -> Shape:
    """Sizes by config.json, under whatever names it has them; 0 where it does not say."""
    inner = config.get("text_config")
    flat = {**config, **(inner if isinstance(inner, Mapping) else {})}

    def first(*names: str) -> int:
        return int(next((flat[name] for name in names if isinstance(flat.get(name), int)), 0))

    hidden = first("hidden_size", "n_embd", "d_model")
    key = first("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff") or 4 * hidden
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    blocks = first("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    return Shape(blocks, hidden, key, first("vocab_size"), weights)


@dataclass(frozen=True)
class State:
    """Bytes the engine holds beside the model for all edited blocks, after some edits."""

    projector: int
    """At most: the null space or its complement, whichever is thinner."""
    history: int
    factors: int
    """Keys, residuals and factors, on disk."""
    masters: int
    """fp32 copies of the edited matrices."""
    moments: int
    """Eigenbases of the second moments, on disk."""
    reference: int
    """What the AlphaEdit repository holds for the same: P and K_p K_pᵀ, dense."""

    @property
    def held(self) -> int:
        """Projector and history; keys, residuals and factors are mapped from disk where they are used."""
        return self.projector + self.history


def state(shape: Shape, layers: int, edits: int, settings: Settings) -> State:
    """The engine's state for `layers` edited blocks and `edits` edits, one column each, at most."""
    key, hidden = shape.key, shape.hidden
    # λ > 0 needs the whole eigenbasis; without it the projector's thinner side has at most half of the columns.
    columns = key if settings.ridge.lambda_ else key // 2
    if not settings.ridge.lambda_ and settings.null_space is None:
        columns = 0
    history = min(edits, key) if settings.ridge.history else 0
    # L grows to d_k / 2 columns and is then replaced by S, d_k × d_k.
    history = key if history > key // 2 else history
    return State(
        projector=layers * key * columns * SINGLE,
        history=layers * key * history * SINGLE,
        factors=layers * edits * (2 * key + hidden) * SINGLE,
        masters=layers * shape.matrix * SINGLE,
        moments=layers * key * key * SINGLE,
        reference=layers * 2 * key * key * SINGLE,
    )


@dataclass(frozen=True)
class Pace:
    """What an earlier run of the same model took."""

    version: str
    edits: int
    """Solved for."""
    asked: int
    """Prompts answered before and after."""
    seconds: Mapping[str, float]
    """By phase."""


@dataclass(frozen=True)
class Expected:
    """What a run will probably take."""

    bytes: int
    """Most memory at once."""
    seconds: float
    basis: str
    """What the time is judged by."""


def expected(shape: Shape, settings: Settings, new: int, asked: int, device: str, last: Pace | None) -> Expected:
    """Memory and time of a run.

    Args:
        new: edits to solve for.
        asked: prompts that will be answered, before and after.
        device: where it runs; `auto` counts as the CPU.
        last: the run the time is judged by, where there was one.
    """
    where = device.partition(":")[0] if device != "auto" else "cpu"
    width = WIDTHS.get(settings.dtype, SINGLE if where == "cpu" else 2)
    # Weights are stored in half precision unless they are small; loading them as fp32 on the CPU doubles them.
    weights = shape.weights * (2 if width == SINGLE else 1)
    layers, engine = len(settings.layers), state(shape, len(settings.layers), new, settings)
    above = max(shape.blocks - max(settings.layers, default=shape.blocks) - 1, 1)
    passing = ROWS * SUFFIX * above * (8 * shape.hidden + 4 * shape.key) * SINGLE
    head = ROWS * 2 * shape.vocabulary * SINGLE * 3
    spare = layers * shape.matrix * width
    memory = LIBRARIES + weights + engine.masters + spare + engine.moments + engine.held + max(passing, head)
    if last is not None and last.edits and last.asked:
        editing = sum(last.seconds.get(phase, 0.0) for phase in ("target", "keys", "solve", "write"))
        asking = last.seconds.get("before", 0.0) + last.seconds.get("after", 0.0)
        seconds = new * editing / last.edits + asked * asking / last.asked + last.seconds.get("checks", 0.0)
        return Expected(memory, seconds, f"at the pace of version {last.version[:12]}")
    parameters = shape.weights / 2
    block = max(parameters - shape.vocabulary * shape.hidden, 0) / max(shape.blocks, 1)
    # Forward and backward through the blocks above, and the head at about one position a row.
    step = 4 * 7 * (SUFFIX / 2 * above * block + shape.vocabulary * shape.hidden)
    rate = RATE.get(where, RATE["cpu"])
    seconds = (new * step * settings.passes + 2 * asked * 16 * 2 * parameters) / rate
    return Expected(memory, seconds, f"assuming {rate:.0e} FLOP/s")
