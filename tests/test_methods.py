"""Methods and settings: what the table says, what a profile adds, what an override may change."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from editctl.engine.methods import (
    ENERGY,
    METHODS,
    PROFILES,
    Profile,
    Ridge,
    Settings,
    TargetSettings,
    find,
    profile_of,
    settings,
)
from editctl.errors import InvalidInput

TINY = {"model_type": "llama", "num_hidden_layers": 8, "hidden_size": 64}
GPT2_XL = {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600}


def test_each_row_is_the_method_of_its_paper() -> None:
    """AlphaEdit projects, damps and remembers; MEMIT weighs and forgets; its sequel weighs and remembers."""
    alpha, memit, sequel = (METHODS[name].ridge for name in ("alphaedit", "memit", "memit-history"))
    assert alpha.energy is not None and alpha.history and alpha.lambda_ == 0 < alpha.l2
    assert memit.energy is None and not memit.history and memit.l2 == 0 < memit.lambda_
    assert sequel == Ridge(memit.lambda_, memit.l2, memit.energy, history=True) != memit
    assert all(name == method.name and method.paper and method.summary for name, method in METHODS.items())


def test_an_unknown_method_is_told_with_the_nearest() -> None:
    """Or with all, when none is near."""
    assert find("memit").name == "memit"
    with pytest.raises(InvalidInput, match="alpaedit") as caught:
        find("alpaedit")
    assert "alphaedit" in caught.value.hint
    with pytest.raises(InvalidInput) as caught:
        find("zzz")
    assert all(name in caught.value.hint for name in METHODS)


@pytest.mark.parametrize("key", PROFILES, ids=str)
def test_known_models_have_layers_that_they_have(key: tuple[str, int, int]) -> None:
    """In order, each once, none the last: something must be left to read the target."""
    kind, blocks, width = key
    profile = profile_of({"model_type": kind, "num_hidden_layers": blocks, "hidden_size": width})
    assert profile == PROFILES[key]
    assert (
        list(profile.layers) == sorted(set(profile.layers))
        and 0 <= profile.layers[0] <= profile.layers[-1] < blocks - 1
    )


@pytest.mark.parametrize("blocks", range(1, 100))
def test_unknown_models_get_layers_that_they_have(blocks: int) -> None:
    """Of any depth; from two blocks on never the last."""
    layers = profile_of({"num_hidden_layers": blocks, "hidden_size": 7}).layers
    assert layers and all(0 <= layer < blocks for layer in layers)
    assert blocks == 1 or layers[-1] < blocks - 1


def test_gpt2_names_its_sizes_otherwise_and_is_known_all_the_same() -> None:
    """n_layer and n_embd count as num_hidden_layers and hidden_size; the profile's λ replaces the preset's."""
    made = settings(GPT2_XL, "memit", {})
    assert made.layers == (13, 14, 15, 16, 17) and made.ridge.lambda_ == 20000
    assert settings(GPT2_XL, "alphaedit", {}).ridge.lambda_ == 0, "a method without λ is given none"
    assert profile_of({**GPT2_XL, "n_embd": 1601}) != profile_of(GPT2_XL)


GOOD: dict[str, tuple[Any, Any]] = {
    "layers": ([3, 1, 1], (1, 3)),
    "lambda": (2, 2.0),
    "l2": (0.5, 0.5),
    "energy": (0.123, 0.123),
    "history": (False, False),
    "steps": (3, 3),
    "rate": (1, 1.0),
    "clamp": (0.5, 0.5),
    "decay": (0.0, 0.0),
    "kl": (0.1, 0.1),
    "stop": (0.2, 0.2),
    "batch_size": (7, 7),
    "corpus": ("a.txt", "a.txt"),
    "corpus_tokens": (9, 9),
    "seed": (5, 5),
}


def value_of(made: Settings, key: str) -> Any:
    if key == "lambda":
        return made.ridge.lambda_
    return next(getattr(h, key) for h in (made.ridge, made.target, made) if hasattr(h, key))


@pytest.mark.parametrize("key", GOOD)
def test_an_override_changes_its_setting_and_no_other(key: str) -> None:
    """Each in the kind it has."""
    value, wanted = GOOD[key]
    plain, made = settings(TINY, "alphaedit", {}), settings(TINY, "alphaedit", {key: value})
    found = value_of(made, key)
    assert found == wanted and type(found) is type(wanted)
    assert value_of(plain, key) != wanted
    for other in GOOD:
        if other != key:
            assert value_of(made, other) == value_of(plain, other)


def test_preserve_switches_the_projection_on_and_off() -> None:
    """On any method, with the share that is given beside it; nothing else of the problem changes."""
    for method in METHODS:
        plain = settings(TINY, method, {}).ridge
        off = settings(TINY, method, {"preserve": "none"}).ridge
        on = settings(TINY, method, {"preserve": "null-space"}).ridge
        assert off.energy is None and on.energy == ENERGY
        assert replace(off, energy=plain.energy) == plain == replace(on, energy=plain.energy)
    assert settings(TINY, "memit", {"preserve": "null-space", "energy": 0.2}).ridge.energy == 0.2
    assert settings(TINY, "memit", {"energy": 0.2, "preserve": "null-space"}).ridge.energy == 0.2
    with pytest.raises(InvalidInput, match="preserve"):
        settings(TINY, "memit", {"preserve": "everything"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", []),
        ("layers", [8]),
        ("layers", [-1]),
        ("layers", [1.0]),
        ("layers", [True]),
        ("layers", 3),
        ("layers", "1,2"),
        ("lambda", "many"),
        ("lambda", -1),
        ("lambda", True),
        ("l2", float("nan")),
        ("lambda", float("inf")),
        ("energy", True),
        ("energy", -0.1),
        ("energy", "some"),
        ("history", 1),
        ("history", "yes"),
        ("steps", 1.5),
        ("steps", -1),
        ("steps", True),
        ("batch_size", "all"),
        ("batch_size", 0),
        ("corpus", 5),
        ("seed", None),
    ],
)
def test_a_value_that_cannot_be_is_refused(key: str, value: Any) -> None:
    """Of the wrong kind, out of range, or no number at all; the message names the setting."""
    with pytest.raises(InvalidInput, match=key):
        settings(TINY, "alphaedit", {key: value})


def test_an_unknown_setting_is_told_with_the_nearest() -> None:
    """Method and the inner names are none."""
    with pytest.raises(InvalidInput, match="batchsize") as caught:
        settings(TINY, "alphaedit", {"batchsize": 3})
    assert "batch_size" in caught.value.hint
    for key in ("method", "ridge", "target", "lambda_"):
        with pytest.raises(InvalidInput, match=key):
            settings(TINY, "alphaedit", {key: 3})


def test_settings_survive_json() -> None:
    """As they must in a plan and in a factor file; a changed number comes back changed."""
    made = settings(TINY, "alphaedit", {"layers": [1, 2], "steps": 3, "energy": 0.1})
    back = Settings.from_params(json.loads(json.dumps(made.to_params())))
    assert back == made and hash(back) == hash(made)
    assert Settings.from_params({**made.to_params(), "seed": 1}) != made
    assert isinstance(back.ridge, Ridge) and isinstance(back.target, TargetSettings)


def test_a_profile_is_a_value() -> None:
    """Two models may share one."""
    assert Profile((1, 2)) == Profile((1, 2)) != Profile((1, 3))
