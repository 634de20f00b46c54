"""The table of methods, and the settings a run is made with. Loads no torch.

Knows: what tells one method from another, and the published settings of known models. Adding a closed-form method is
one row. Refuses: computing.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from editctl.errors import InvalidInput


@dataclass(frozen=True)
class Ridge:
    """The numbers of the constrained ridge problem in `solve`, by which closed-form methods differ."""

    lambda_: float
    """λ, weight of the second moment of preserved keys: as many preserved tokens against one edit."""
    l2: float
    """ρ as a share of the mean squared key norm tr(C), so that one value serves all models."""
    energy: float | None
    """Share of the second moment's trace that may be edited (its null space); None: no projection."""
    history: bool
    """Whether the outputs at the keys of earlier edits are kept."""


@dataclass(frozen=True)
class TargetSettings:
    """How target vectors are optimised; sizes are relative to the hidden state."""

    steps: int = 25
    """Most gradient steps."""
    rate: float = 0.2
    """Adam's step as a share of the hidden state's root mean square."""
    clamp: float = 0.75
    """Largest change as a share of the hidden state's norm."""
    decay: float = 0.02
    """Weight of the squared relative size of the change."""
    kl: float = 0.0625
    """Weight of the KL divergence at the bare subject."""
    stop: float = 0.05
    """NLL of the target, nats a token, at which a request is done."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    family: str
    ridge: Ridge
    equation: str
    paper: str
    summary: str


PRESERVE = ("null-space", "none")
"""What the setting `preserve` may be: write only into the directions preserved keys hardly use, or anywhere."""
ENERGY = 0.1
"""Share of the second moment's trace that counts as hardly used."""

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "alphaedit",
            "locate-then-edit",
            Ridge(lambda_=0.0, l2=0.005, energy=ENERGY, history=True),
            "D = R KᵀP (K_p K_pᵀ P + K Kᵀ P + ρ I)⁻¹",
            "Fang et al. 2025, AlphaEdit, eq. 11",
            "writes only into the null space of preserved keys; keeps earlier edits",
        ),
        Method(
            "memit",
            "locate-then-edit",
            Ridge(lambda_=100.0, l2=0.0, energy=None, history=False),
            "D = R Kᵀ (λ C + K Kᵀ)⁻¹",
            "Meng et al. 2023, MEMIT, eq. 14",
            "weighs preserved keys against the edits; forgets earlier batches, as published",
        ),
        Method(
            "memit-history",
            "locate-then-edit",
            Ridge(lambda_=100.0, l2=0.0, energy=None, history=True),
            "D = R Kᵀ (λ C + K_p K_pᵀ + K Kᵀ)⁻¹",
            "Meng et al. 2023, MEMIT, eq. 14, with the keys of earlier batches in C",
            "MEMIT that keeps earlier edits",
        ),
    )
}


@dataclass(frozen=True)
class Profile:
    """Settings known for a family of models."""

    layers: tuple[int, ...]
    target: TargetSettings = TargetSettings()
    lambda_: float | None = None


# Layers as published (Meng et al. 2023, Fang et al. 2025, code); by model type, number of blocks and hidden width.
PROFILES: dict[tuple[str, int, int], Profile] = {
    ("llama", 7, 160): Profile((1, 2, 3)),  # atlas: the blocks whose keys its training shapes
    ("gpt2", 48, 1600): Profile((13, 14, 15, 16, 17), TargetSettings(steps=20), 20000),
    ("gptj", 28, 4096): Profile((3, 4, 5, 6, 7, 8), lambda_=15000),
    ("llama", 32, 4096): Profile((4, 5, 6, 7, 8), lambda_=15000),
    ("qwen2", 28, 3584): Profile((4, 5, 6, 7, 8), lambda_=15000),
}


def profile_of(config: Mapping[str, Any]) -> Profile:
    """The profile of a model by its config.json; unknown models get blocks at the usual relative depth."""
    blocks = _blocks(config)
    width = int(config.get("hidden_size") or config.get("n_embd") or 0)
    known = PROFILES.get((str(config.get("model_type", "")), blocks, width))
    if known is not None:
        return known
    first = max(0, min(round(blocks * 0.125), blocks - 2))
    last = max(first, min(round(blocks * 0.25), blocks - 2))
    return Profile(tuple(range(first, last + 1)))


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights a plan leads to, beside model, history and edits."""

    method: str
    layers: tuple[int, ...]
    ridge: Ridge
    target: TargetSettings = field(default_factory=TargetSettings)
    batch_size: int = 100
    corpus: str = ""
    """Text file of the second moments; empty is the model's own."""
    corpus_content: str = ""
    """Name of that text's content when the plan was made."""
    corpus_tokens: int = 100_000
    seed: int = 0
    dtype: str = "auto"
    """What the weights are loaded as."""

    def to_params(self) -> dict[str, Any]:
        """As JSON values, for plans and versions."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Settings:
        """Back from `to_params`."""
        values = dict(params)
        values["layers"] = tuple(values["layers"])
        values["ridge"] = Ridge(**values["ridge"])
        values["target"] = TargetSettings(**values["target"])
        return cls(**values)


FIXED = ("method", "ridge", "target", "corpus_content", "dtype")
"""Fields of `Settings` that no override names."""


def _ridge(method: Method, model_lambda: float | None) -> Ridge:
    """The method's problem with the model's own λ, where the method has one and the model's is known."""
    if model_lambda is None or not method.ridge.lambda_:
        return method.ridge
    return replace(method.ridge, lambda_=model_lambda)


def _blocks(config: Mapping[str, Any]) -> int:
    """Number of decoder blocks by config.json, 0 if it does not say."""
    return int(next((config[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if config.get(key)), 0))


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        InvalidInput: there is none.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        raise InvalidInput(
            f"unknown method {name}", f"did you mean {near[0]}?" if near else f"one of: {', '.join(METHODS)}"
        )
    return METHODS[name]


def settings(config: Mapping[str, Any], method: str, overrides: Mapping[str, Any]) -> Settings:
    """Settings of a method on a model: preset, then the model's profile, then overrides by field name.

    Raises:
        InvalidInput: an override names no setting, or has the wrong kind of value.
    """
    profile, blocks = profile_of(config), _blocks(config)
    ridge = _ridge(find(method), profile.lambda_)
    result = Settings(method, profile.layers, ridge, profile.target)
    places: dict[str, str] = {}
    for name, cls in (("ridge", Ridge), ("target", TargetSettings), ("", Settings)):
        places.update({f.name.rstrip("_"): name for f in fields(cls) if f.name not in FIXED})
    # The switch comes after the share it may switch off.
    for key, value in sorted(overrides.items(), key=lambda item: item[0] == "preserve"):
        if key == "preserve":
            if value not in PRESERVE:
                raise InvalidInput(f"preserve = {value!r} is not valid", f"one of: {', '.join(PRESERVE)}")
            energy = (result.ridge.energy or ENERGY) if value == "null-space" else None
            result = replace(result, ridge=replace(result.ridge, energy=energy))
            continue
        if key not in places:
            known = sorted([*places, "preserve"])
            near = difflib.get_close_matches(key, known, 1)
            raise InvalidInput(
                f"unknown setting {key}", f"did you mean {near[0]}?" if near else f"one of: {', '.join(known)}"
            )
        place, attribute = places[key], "lambda_" if key == "lambda" else key
        holder = getattr(result, place) if place else result
        value = _fit(key, value, getattr(holder, attribute), blocks)
        changed = replace(holder, **{attribute: value})
        result = changed if not place else Settings.from_params({**result.to_params(), place: asdict(changed)})
    return result


def _fit(key: str, value: Any, present: Any, blocks: int) -> Any:
    """The value in the kind the setting has.

    Raises:
        InvalidInput: it has another kind, or names blocks the model lacks.
    """
    if key == "layers":
        if not isinstance(value, list | tuple) or not value or any(type(v) is not int for v in value):
            raise InvalidInput("layers must be a list of block numbers", "for example layers = [1, 2, 3]")
        if blocks and not all(0 <= v < blocks for v in value):
            raise InvalidInput(f"layers {list(value)} are not all among the model's blocks 0 to {blocks - 1}")
        return tuple(sorted(set(value)))
    if key == "energy":
        present = 0.0
    good = isinstance(value, str) if isinstance(present, str) else isinstance(value, int | float)
    if isinstance(present, bool):
        good = isinstance(value, bool)
    elif isinstance(present, int):
        good = type(value) is int
    elif isinstance(present, float):
        good = type(value) in (int, float)
    number = not isinstance(value, str | bool)
    least = 1 if key in ("batch_size", "corpus_tokens") else 0
    if not good or (number and not (math.isfinite(value) and least <= value < 2**63)):
        raise InvalidInput(f"{key} = {value!r} is not valid", f"its present value is {present!r}")
    return float(value) if isinstance(present, float) else value
