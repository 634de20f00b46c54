"""Methods and settings: what the table says, what a profile adds, what an override may change."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from editctl.engine.methods import (
    FIXED,
    METHODS,
    NULL_SPACE,
    PROFILES,
    NullSpace,
    Profile,
    Ridge,
    Settings,
    TargetSettings,
    Tune,
    Write,
    find,
    profile_of,
    settings,
)
from editctl.errors import InvalidInput

TINY = {"model_type": "llama", "num_hidden_layers": 8, "hidden_size": 64}
LLAMA = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096}
GPT2_XL = {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600}
MEDIUM = {"model_type": "gpt2", "n_layer": 24, "n_embd": 1024}
TUNED = {name for name, method in METHODS.items() if method.tune is not None}
OTHERS = {
    "ke": "meta-learning",
    "mend": "meta-learning",
    "ultraedit": "training-free",
    "serac": "memory-based",
    "grace": "memory-based",
    "ike": "in-context",
}
"""Families of the methods that neither solve for target vectors nor tune."""

# ---------------------------------------------------------------------------------------------------------------------
# The table

# λ at 15000 for MEMIT, ρ, history, met exactly, null space, blocks of a Llama of 32.
NUMBERS: dict[str, tuple[float, bool, bool, bool, bool, tuple[int, ...]]] = {
    "alphaedit": (0, True, True, False, True, (4, 5, 6, 7, 8)),
    "memit": (15000, False, False, False, False, (4, 5, 6, 7, 8)),
    "memit-history": (15000, False, True, False, False, (4, 5, 6, 7, 8)),
    "rome": (15000, False, False, True, False, (5,)),
    "r-rome": (15000, False, False, True, False, (5,)),
    "emmet": (10000, False, False, False, False, (5,)),
    "pmet": (15000, False, False, False, False, (4, 5, 6, 7, 8)),
    "encore": (15000, True, True, False, False, (4, 5, 6, 7, 8)),
    "betaedit": (3000, True, True, False, True, (4, 5, 6, 7, 8)),
    "blue": (0, True, True, False, True, (4, 8)),
    "nse": (15000, False, True, False, False, (4, 5, 6, 7, 8)),
    "rect": (15000, False, False, False, False, (4, 5, 6, 7, 8)),
    "prune": (15000, False, False, False, False, (4, 5, 6, 7, 8)),
    "nas": (0, True, True, False, True, (4, 5, 6, 7, 8)),
    "sphere": (0, True, True, False, True, (4, 5, 6, 7, 8)),
    "ft": (0, False, False, False, False, (21,)),
    "ft-l": (0, False, False, False, False, (21,)),
    "ft-m": (0, False, False, False, False, (21,)),
    "locft-bf": (0, False, False, False, False, (21,)),
    "lora": (0, False, False, False, False, (29, 30, 31)),
    "ke": (0, False, False, False, False, (29, 30, 31)),
    "mend": (0, False, False, False, False, (29, 30, 31)),
    "ultraedit": (0, False, False, False, False, (29, 30, 31)),
    "serac": (0, False, False, False, False, ()),
    "grace": (0, False, False, False, False, (21,)),
    "ike": (0, False, False, False, False, ()),
}
BESIDE: dict[str, dict[str, Any]] = {
    "rome": {"keys": "rome"},
    "r-rome": {"keys": "mean"},
    "pmet": {"spread": "root", "site": "mlp"},
    "encore": {"confirm": 2},
    "betaedit": {"refresh": 1000},
    "blue": {"spread": "full"},
    "nse": {"neurons": 0.8, "rounds": 2, "near": 0.1, "on_base": True},
    "rect": {"post": ("rect",)},
    "prune": {"post": ("prune",)},
    "nas": {"anchor": True},
    "sphere": {"post": ("sphere",)},
}
"""What a row sets beside the numbers of its ridge."""
SAID = ("needs", "changes", "preservation", "update", "drop", "exports", "undo")
"""What a row says of itself beside its fields."""


@pytest.mark.parametrize("name", METHODS)
def test_each_row_is_the_method_of_its_paper(name: str) -> None:
    """The numbers of its ridge, its blocks, and what it does otherwise than the plain way; nothing else."""
    made = settings(LLAMA, name, {})
    lambda_, damped, history, hard, projected, layers = NUMBERS[name]
    assert made.ridge == Ridge(made.ridge.lambda_, made.ridge.l2, history, hard)
    assert made.ridge.lambda_ == pytest.approx(lambda_) and (made.ridge.l2 > 0) == damped
    assert made.null_space == (NULL_SPACE if projected else None) and made.layers == layers
    plain = Settings(name, (), made.ridge).named()
    different = {key: value for key, value in made.named().items() if key in plain and value != plain[key]}
    assert different == {**({"layers": layers} if layers else {}), **BESIDE.get(name, {})}


def test_the_table_holds_every_method_once_and_no_two_alike() -> None:
    """Names are keys, and each row differs from every other in what it does."""
    assert METHODS.keys() == NUMBERS.keys()
    assert all(name == method.name for name, method in METHODS.items())
    # What a trained file does differs by the file.
    done = {replace(settings(LLAMA, name, {}), method="", artifact=METHODS[name].trained * name) for name in METHODS}
    assert len(done) == len(METHODS)
    assert settings(LLAMA, "ft", {"objective": "target"}) == replace(settings(LLAMA, "ft-m", {}), method="ft")


def test_the_fine_tuning_rows_differ_in_objective_and_bound() -> None:
    """FT and FT-L ask from the prompt's last position, FT-L within a box; FT-M as the target is spoken."""
    ft, bounded, spoken = (settings(LLAMA, name, {}).tune for name in ("ft", "ft-l", "ft-m"))
    assert ft == Tune(objective="last") and spoken == Tune(objective="target") and bounded is not None
    assert bounded.box > 0 and replace(bounded, box=0.0) == ft


@pytest.mark.parametrize("name", METHODS)
def test_a_row_says_as_json_what_it_is(name: str) -> None:
    """Family, equation, paper, what it needs and how it keeps to a null space, in words; and every field of the row."""
    row = json.loads(json.dumps(METHODS[name].to_json()))
    assert {f.name for f in fields(METHODS[name])} | {*SAID} == row.keys()
    for part in ("name", "family", "equation", "paper", "summary", "needs", "preservation"):
        assert isinstance(row[part], str) and (row[part] or (part == "preservation" and row["changes"] == "overlay"))
    family = "fine-tuning" if name in TUNED else "locate-then-edit"
    assert row["family"] == OTHERS.get(name, family) and "20" in row["paper"]
    if name in OTHERS:
        return
    assert any(part in row["equation"] for part in ("D", "W", "AlphaEdit", "FT"))
    where = dict.fromkeys(("nse", "rect", "sphere", "lora"), "the finished update is projected")
    usual = "every step is projected" if name in TUNED else "in the solve"
    assert row["preservation"] == where.get(name, usual)


def test_only_what_solves_needs_second_moments_without_a_null_space() -> None:
    """What the row says agrees with what a run measures."""
    for name, method in METHODS.items():
        solves = name not in TUNED and name not in OTHERS
        assert ("second moments" in method.needs) == solves
        assert settings(TINY, name, {}).needs_moments == solves
        assert settings(TINY, name, {"preserve": "null-space"}).needs_moments == bool(method.preservation)
        assert settings(TINY, name, {"preserve": "none"}).needs_moments == solves


def test_an_unknown_method_is_told_with_the_nearest() -> None:
    """Or with all, when none is near."""
    assert find("memit").name == "memit"
    with pytest.raises(InvalidInput, match="alpaedit") as caught:
        find("alpaedit")
    assert "alphaedit" in caught.value.hint
    with pytest.raises(InvalidInput) as caught:
        find("zzz")
    assert all(name in caught.value.hint for name in METHODS)


# ---------------------------------------------------------------------------------------------------------------------
# Profiles and blocks


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


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_its_blocks_in_every_model(name: str) -> None:
    """Known or not, of any depth: `all` of the profile, the `single` one, both `ends`, the `deep` one, the `upper`
    three, or `none`."""
    rule = METHODS[name].layers
    models = [{"model_type": t, "num_hidden_layers": b, "hidden_size": w} for t, b, w in PROFILES]
    models += [{"num_hidden_layers": blocks} for blocks in range(1, 60)]
    for config in models:
        profile, blocks = profile_of(config), int(str(config["num_hidden_layers"]))
        layers = settings(config, name, {}).layers
        assert all(0 <= layer < max(blocks - (rule != "upper"), 1) for layer in layers)
        if rule == "all":
            assert layers == profile.layers
        elif rule == "single":
            assert layers == (profile.layers[-1] if profile.single is None else profile.single,)
        elif rule == "ends":
            assert set(layers) == {profile.layers[0], profile.layers[-1]} and list(layers) == sorted(set(layers))
        elif rule == "upper":
            assert layers == tuple(range(blocks))[-3:]
        elif rule == "none":
            assert layers == ()
        else:
            assert len(layers) == 1 and (blocks < 6 or 0.5 < layers[0] / blocks < 0.75)


def test_blocks_of_known_models_are_the_published_ones() -> None:
    """ROME's block of GPT-2 XL is 17 and of Llama 5, FT's of Llama 21; atlas has its own three."""
    assert settings(GPT2_XL, "rome", {}).layers == (17,) and settings(LLAMA, "rome", {}).layers == (5,)
    assert settings(MEDIUM, "r-rome", {}).layers == (8,) and settings(LLAMA, "ft-m", {}).layers == (21,)
    atlas = {"model_type": "llama", "num_hidden_layers": 7, "hidden_size": 160}
    assert {n: settings(atlas, n, {}).layers for n in ("memit", "emmet", "blue", "ft")} == {
        "memit": (1, 2, 3),
        "emmet": (3,),
        "blue": (1, 3),
        "ft": (5,),
    }


def test_gpt2_names_its_sizes_otherwise_and_is_known_all_the_same() -> None:
    """n_layer and n_embd count as num_hidden_layers and hidden_size; the profile's λ scales each row's own."""
    made = settings(GPT2_XL, "memit", {})
    assert made.layers == (13, 14, 15, 16, 17) and made.ridge.lambda_ == 20000
    assert settings(GPT2_XL, "betaedit", {}).ridge.lambda_ == pytest.approx(4000)
    assert settings(GPT2_XL, "alphaedit", {}).ridge.lambda_ == 0, "a method without λ is given none"
    assert profile_of({**GPT2_XL, "n_embd": 1601}) != profile_of(GPT2_XL)


def test_published_settings_are_those_of_the_papers() -> None:
    """Absolute, with what the method itself changes, and open to overrides; refused where none are known."""
    made = settings(MEDIUM, "encore", {"published": True}).target
    assert made == TargetSettings(25, 0.5, 3.0, 0.5, confirm=2, published=True)
    assert settings(MEDIUM, "encore", {"published": True, "steps": 7}).target == replace(made, steps=7)
    assert settings(GPT2_XL, "memit", {"published": True}).target.steps == 20
    plain = settings(MEDIUM, "encore", {}).target
    assert plain == settings(MEDIUM, "encore", {"published": False}).target != made and not plain.published
    with pytest.raises(InvalidInput, match="published") as caught:
        settings(TINY, "memit", {"published": True})
    assert "published" in caught.value.hint
    for wrong in ("yes", 1, None):
        with pytest.raises(InvalidInput, match="published") as caught:
            settings(MEDIUM, "memit", {"published": wrong})
        assert "true" in caught.value.hint


# ---------------------------------------------------------------------------------------------------------------------
# Overrides


GOOD: dict[str, tuple[Any, Any]] = {
    "layers": ([3, 1, 1], (1, 3)),
    "lambda": (2, 2.0),
    "l2": (0.5, 0.5),
    "history": (False, False),
    "hard": (True, True),
    "spread": ("root", "root"),
    "keys": ("mean", "mean"),
    "site": ("mlp", "mlp"),
    "post": (["sphere", "rect"], ("sphere", "rect")),
    "rect": (1, 1.0),
    "sphere_energy": (0.3, 0.3),
    "sphere": (0.0, 0.0),
    "neurons": (0.7, 0.7),
    "rounds": (2, 2),
    "near": (0.3, 0.3),
    "refresh": (10, 10),
    "steps": (3, 3),
    "rate": (1, 1.0),
    "clamp": (0.5, 0.5),
    "decay": (0.0, 0.0),
    "kl": (0.1, 0.1),
    "stop": (0.2, 0.2),
    "confirm": (3, 3),
    "anchor": (True, True),
    "joint": (False, False),
    "on_base": (True, True),
    "artifact": ("mine", "mine"),
    "batch_size": (7, 7),
    "corpus": ("a.txt", "a.txt"),
    "corpus_tokens": (9, 9),
    "seed": (5, 5),
}
GOOD_TUNING: dict[str, tuple[Any, Any]] = {
    "epochs": (3, 3),
    "tune_rate": (1, 1.0),
    "tune_stop": (0.5, 0.5),
    "objective": ("target", "target"),
    "box": (0.01, 0.01),
    "minibatch": (5, 5),
    "ending": (True, True),
    "rank": (4, 4),
    "layers": ([3], (3,)),
}


def test_every_setting_has_a_name() -> None:
    """All fields of the parts but those that are chosen otherwise; those of fine-tuning only for methods that tune."""
    parts = (Ridge, Write, TargetSettings, Settings)
    every = {f.name.rstrip("_") for part in parts for f in fields(part)} - {*FIXED, "published"}
    every -= {"ridge", "null_space", "write", "target", "tune", "own"}
    assert settings(TINY, "alphaedit", {}).named().keys() == every == GOOD.keys()
    assert settings(TINY, "ft", {}).named().keys() == every | GOOD_TUNING.keys()
    assert {f.name for f in fields(Tune)} | {"layers"} == GOOD_TUNING.keys()


@pytest.mark.parametrize(
    ("method", "key"),
    [("alphaedit", key) for key in GOOD] + [("ft", key) for key in GOOD_TUNING],
    ids=lambda part: str(part),
)
def test_an_override_changes_its_setting_and_no_other(method: str, key: str) -> None:
    """Each in the kind it has."""
    value, wanted = (GOOD_TUNING if method == "ft" else GOOD)[key]
    plain, made = settings(TINY, method, {}).named(), settings(TINY, method, {key: value}).named()
    assert made[key] == wanted != plain[key] and type(made[key]) is type(wanted)
    assert {name: made[name] for name in made if name != key} == {name: plain[name] for name in plain if name != key}


def test_several_overrides_are_all_made() -> None:
    """In whatever order, in different parts and twice in one."""
    changes: dict[str, Any] = {"steps": 3, "rate": 0.1, "lambda": 5.0, "post": ["rect"], "seed": 4, "energy": 0.2}
    made = settings(TINY, "memit", changes)
    assert made == settings(TINY, "memit", dict(reversed(changes.items())))
    assert (made.target.steps, made.target.rate, made.ridge.lambda_, made.seed) == (3, 0.1, 5.0, 4)
    assert made.write.post == ("rect",) and made.null_space == NullSpace("energy", 0.2)
    assert changes["energy"] == 0.2, "what was given is left alone"


@pytest.mark.parametrize("name", METHODS)
def test_preserve_switches_the_projection_on_and_off(name: str) -> None:
    """On any method; nothing else of the problem changes."""
    plain = settings(TINY, name, {})
    off = settings(TINY, name, {"preserve": "none"})
    on = settings(TINY, name, {"preserve": "null-space"})
    assert off.null_space is None and on.null_space == (NULL_SPACE if METHODS[name].preservation else None)
    assert replace(off, null_space=plain.null_space) == plain == replace(on, null_space=plain.null_space)


@pytest.mark.parametrize("rule", ["energy", "quantile", "threshold"])
def test_a_rank_rule_sets_the_null_space(rule: str) -> None:
    """With or without the switch beside it, as a float; switched off it counts for nothing."""
    for method in ("memit", "alphaedit", "ft"):
        for changes in ({rule: 1}, {rule: 1, "preserve": "null-space"}, {"preserve": "null-space", rule: 1}):
            made = settings(TINY, method, changes).null_space
            assert made == NullSpace(rule, 1.0) and isinstance(made.value, float)
        assert settings(TINY, method, {rule: 1, "preserve": "none"}).null_space is None
    assert settings(TINY, "alphaedit", {rule: 0.3}).null_space != NULL_SPACE


def test_two_rank_rules_are_refused() -> None:
    """They would contradict each other; the remedy is to name one."""
    with pytest.raises(InvalidInput, match="energy and threshold") as caught:
        settings(TINY, "alphaedit", {"energy": 0.1, "threshold": 0.02})
    assert "one" in caught.value.hint


BAD: list[tuple[str, Any]] = [
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
    ("lambda", float("inf")),
    ("lambda", 10**400),
    ("l2", float("nan")),
    ("energy", True),
    ("energy", -0.1),
    ("energy", "some"),
    ("quantile", float("nan")),
    ("threshold", [0.02]),
    ("preserve", "everything"),
    ("preserve", True),
    ("preserve", ["none"]),
    ("history", 1),
    ("history", "yes"),
    ("hard", 0),
    ("spread", "odd"),
    ("spread", 1),
    ("keys", "plain"),
    ("site", ["mlp"]),
    ("post", "rect"),
    ("post", ["rekt"]),
    ("post", [["rect"]]),
    ("post", ["rect", "rect"]),
    ("post", {"rect": 1}),
    ("rect", 1.5),
    ("sphere", 2),
    ("sphere_energy", 1.01),
    ("neurons", -0.1),
    ("neurons", 2),
    ("rounds", 0),
    ("refresh", 1.5),
    ("anchor", 1),
    ("steps", 1.5),
    ("steps", -1),
    ("steps", True),
    ("steps", 10**400),
    ("steps", 2**63),
    ("batch_size", "all"),
    ("batch_size", 0),
    ("corpus_tokens", 0),
    ("corpus", 5),
    ("seed", None),
    ("epochs", 0),
    ("epochs", 2.5),
    ("tune_rate", -0.1),
    ("objective", "first"),
    ("objective", True),
    ("box", "tight"),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=lambda part: str(part)[:20])
def test_a_value_that_cannot_be_is_refused(key: str, value: Any) -> None:
    """Of the wrong kind, out of range, or no number at all; the message names the setting, the rest a remedy."""
    with pytest.raises(InvalidInput, match=key) as caught:
        settings(TINY, "ft" if key in GOOD_TUNING and key != "layers" else "alphaedit", {key: value})
    assert caught.value.hint or "0 to 7" in caught.value.message


def test_a_choice_is_told_with_the_others() -> None:
    """Every setting that is one of a few names says which."""
    for method, key, choices in (
        ("memit", "spread", ("even", "root", "full")),
        ("memit", "keys", ("mixed", "mean", "rome")),
        ("memit", "site", ("block", "mlp")),
        ("ft", "objective", ("target", "last")),
        ("memit", "preserve", ("null-space", "none")),
    ):
        for choice in choices:
            settings(TINY, method, {key: choice})
        with pytest.raises(InvalidInput) as caught:
            settings(TINY, method, {key: "other"})
        assert all(choice in caught.value.hint for choice in choices)
    with pytest.raises(InvalidInput, match="rect, prune, sphere") as caught:
        settings(TINY, "memit", {"post": ["other"]})
    assert "post =" in caught.value.hint


@pytest.mark.parametrize("name", sorted(TUNED - {"lora"}))
def test_fine_tuning_has_one_block(name: str) -> None:
    """Two are refused with an example; methods that solve take any number."""
    assert settings(TINY, name, {"layers": [2]}).layers == (2,)
    with pytest.raises(InvalidInput, match="one block") as caught:
        settings(TINY, name, {"layers": [1, 2]})
    assert "layers" in caught.value.hint
    assert settings(TINY, "rome", {"layers": [1, 2]}).layers == (1, 2)


def test_an_unknown_setting_is_told_with_the_nearest() -> None:
    """Or with all of them; the method and the inner names are none, nor are those of another family."""
    for key, near in (("batchsize", "batch_size"), ("quantiles", "quantile"), ("preserves", "preserve")):
        with pytest.raises(InvalidInput, match=key) as caught:
            settings(TINY, "alphaedit", {key: 3})
        assert near in caught.value.hint
    for key in ("method", "ridge", "target", "write", "tune", "null_space", "lambda_", "corpus_content", "dtype"):
        with pytest.raises(InvalidInput, match=key):
            settings(TINY, "ft", {key: 3})
    with pytest.raises(InvalidInput, match="xyzzy") as caught:
        settings(TINY, "alphaedit", {"xyzzy": 3})
    known = [*GOOD, "energy", "quantile", "threshold", "preserve", "published"]
    assert all(name in caught.value.hint.split(": ")[1].split(", ") for name in known)
    with pytest.raises(InvalidInput, match="epochs"):
        settings(TINY, "alphaedit", {"epochs": 3})


@pytest.mark.parametrize("name", METHODS)
def test_settings_survive_json(name: str) -> None:
    """As they must in a plan and in a factor file; a changed number comes back changed."""
    for changes in ({}, {"preserve": "null-space"}, {"threshold": 0.02, "steps": 3, "post": ["rect", "prune"]}):
        made = settings(TINY, name, changes)
        back = Settings.from_params(json.loads(json.dumps(made.to_params())))
        assert back == made and hash(back) == hash(made)
        assert back.to_params() == made.to_params() == json.loads(json.dumps(made.to_params()))
        assert Settings.from_params({**made.to_params(), "seed": 1}) != made
        assert isinstance(back.ridge, Ridge) and isinstance(back.write, Write)
        assert isinstance(back.target, TargetSettings) and isinstance(back.tune, Tune) == (name in TUNED)
        assert isinstance(back.null_space, NullSpace) == (made.null_space is not None)
        other = {**asdict(made.ridge), "l2": 0.7}
        assert Settings.from_params({**made.to_params(), "ridge": other}) != made


@pytest.mark.parametrize(
    "change",
    [
        {"method": "nonsense"},
        {"layers": 3},
        {"layers": []},
        {"ridge": {}},
        {"ridge": {"lambda_": "x", "l2": 0.0, "history": True, "hard": False}},
        {"null_space": {"rule": "all", "value": 1.0}},
        {"null_space": {"rule": "energy", "value": 10**400}},
        {"write": {"post": [[]]}},
        {"target": {"steps": 1.5}},
        {"target": []},
        {"tune": {"epochs": 0}},
        {"batch_size": 0},
        {"corpus": 7},
        {"xyzzy": 1},
    ],
    ids=str,
)
def test_settings_that_no_run_has_are_refused(change: dict[str, Any]) -> None:
    """A plan may have been written by anyone."""
    params = settings(TINY, "alphaedit", {}).to_params()
    Settings.from_params(params)
    with pytest.raises(InvalidInput, match="not the settings of a run"):
        Settings.from_params({**params, **change})


def test_a_profile_is_a_value() -> None:
    """Two models may share one."""
    assert Profile((1, 2)) == Profile((1, 2)) != Profile((1, 3))
