"""Drift, general ability, efficiency: what edits do to the rest of a model, and what they cost."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editctl.engine.model import load
from editctl.errors import InvalidInput
from editctl.metrics.ability import Ability, Canary, ability, change, suite
from editctl.metrics.drift import RANK, Drift, States, drift, prompts, states
from editctl.metrics.efficiency import efficiency
from editctl.metrics.harness import harness
from editctl.metrics.units import written
from editctl.metrics.values import Metric


@contextmanager
def noisy(tensors: list[Tensor], size: float) -> Iterator[None]:
    """Weights with noise of so many of their standard deviations."""
    kept, generator = [tensor.clone() for tensor in tensors], torch.Generator().manual_seed(0)
    try:
        for tensor in tensors:
            tensor += size * tensor.std() * torch.randn(tensor.shape, generator=generator)
        yield
    finally:
        for tensor, old in zip(tensors, kept, strict=True):
            tensor.copy_(old)


# Drift


def of(hidden: list[list[float]], ends: tuple[int, ...]) -> States:
    return States(torch.tensor(hidden, dtype=torch.float64), ends)


def test_a_shift_is_relative_to_the_length_of_the_state() -> None:
    """By hand: (3, 4) moved by (0, 1) is a fifth, (0, 2) by (2, 0) is one, (1, 0) stays; rows 1 and 2 end texts."""
    found = drift(of([[3, 4], [0, 2], [1, 0]], (1, 2)), of([[3, 5], [2, 2], [1, 0]], (1, 2)))
    assert found.last == pytest.approx((1.0, 0.0))
    assert (found.mean, found.largest, found.tokens) == (pytest.approx(0.4), pytest.approx(1.0), 3)
    assert found.angle is None, "two dimensions have no five directions"


def turned(degrees: float) -> tuple[States, States]:
    """States whose principal plane, of the first two axes, is turned about the first towards the third."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 4, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 5.0, 0.1, 0.1])
    rows, angle = rows - rows.mean(0), math.radians(degrees)
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    rows = rows @ axes.T
    turn = torch.eye(4, dtype=torch.float64)
    turn[1, 1] = turn[2, 2] = math.cos(angle)
    turn[1, 2], turn[2, 1] = math.sin(angle), -math.sin(angle)
    return States(rows + 3.0, (199,)), States(rows @ turn + 7.0, (199,))


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 0.5, 30.0, 44.9, 60.0, 89.9, 90.0])
def test_the_angle_is_the_one_the_principal_plane_was_turned_by(degrees: float) -> None:
    """Small and right ones too; where the cloud of states lies does not matter, nor a turn within the plane."""
    before, after = turned(degrees)
    found = drift(before, after, rank=2).angle
    assert found == pytest.approx(degrees, abs=1e-7)
    mirrored = States(after.hidden.flip(0), after.ends)
    assert drift(before, mirrored, rank=2).angle == pytest.approx(degrees, abs=1e-7)
    # Control: three directions hold the whole of what was turned.
    assert degrees in (0.0, 1e-6) or drift(before, after, rank=3).angle != pytest.approx(degrees, abs=0.1)


def test_states_are_those_of_plain_passes_without_the_first_position(model: Any) -> None:
    """Sentences of several lengths in one call; each alone is the same. One word is left out where there is no start
    token."""
    texts = ["The Eiffel Tower is located in the city of Paris.", "Ada was born in London", "Rome was not built"]
    found = states(model, texts, 2)
    rows = []
    for text in texts:
        ids = torch.tensor([model.encode(text)])
        # Of four blocks the input of the last is the output of the third; transformers lists inputs first.
        rows.append(model.net(input_ids=ids, output_hidden_states=True).hidden_states[3][0, 1:])
    assert torch.allclose(found.hidden, torch.cat(rows).double(), atol=1e-5)
    assert found.ends == tuple(torch.tensor([len(row) for row in rows]).cumsum(0).sub(1).tolist())
    still = Drift((0.0,) * 3, 0.0, 0.0, len(found.hidden), pytest.approx(0.0), 2)
    assert drift(found, states(model, texts, 2)) == still
    assert len(states(model, ["R"], 2).ends) == (len(model.encode("R")) > 1)


def test_drift_grows_with_the_change_of_the_weights_and_only_from_there_up(model: Any) -> None:
    """Blocks below see nothing of it. With weights that are no numbers it is none either."""
    texts = prompts()[:20]
    before = states(model, texts, 2)
    found = []
    for size in (0.01, 0.1, 1.0):
        with noisy([model.blocks[2].weight], size):
            found.append(drift(before, states(model, texts, 2)))
            assert torch.equal(states(model, texts, 1).hidden, states(model, texts, 1).hidden)
    assert 0 < found[0].mean < found[1].mean < found[2].mean
    assert found[0].angle is not None and found[2].angle is not None and found[0].angle < found[2].angle
    assert all(one.mean < one.largest and max(one.last) <= one.largest for one in found)
    below = states(model, texts, 1)
    with noisy([model.blocks[2].weight], 1.0):
        assert drift(below, states(model, texts, 1)).largest == 0.0
    with noisy([model.blocks[2].weight], math.nan):
        broken = drift(before, states(model, texts, 2))
    assert math.isnan(broken.mean) and math.isnan(broken.largest) and broken.angle is not None
    assert math.isnan(broken.angle) and broken.metrics()[0].low is None


def test_drift_tells_protocol_direction_and_counts() -> None:
    """Of one prompt there is no interval, of none no metric; states of other texts are refused."""
    before, after = turned(30.0)
    names = [(m.name, m.axis, m.n, m.protocol, m.higher_is_better) for m in drift(before, after, rank=2).metrics()]
    assert names == [
        ("drift", "", 1, "hidden states after block 0", False),
        ("drift", "all tokens", 200, "hidden states after block 0", False),
        ("drift", "largest", 200, "hidden states after block 0", False),
        ("drift angle", "", 200, "hidden states after block 0", False),
    ]
    assert drift(before, after).metrics()[0].low is None
    two = drift(of([[1, 0], [1, 0]], (0, 1)), of([[1, 1], [1, 3]], (0, 1))).metrics()[0]
    assert (two.value, two.low) == (pytest.approx(2.0), 0.0)
    nothing = States(torch.zeros(0, 1, dtype=torch.float64), ())
    assert drift(nothing, nothing).metrics() == ()
    with pytest.raises(ValueError, match="other texts"):
        drift(before, nothing)


def test_the_fixed_prompts_are_ordinary_and_more_than_the_directions() -> None:
    """A hundred different ones."""
    assert len(set(prompts())) == 100 > RANK


def test_a_block_that_is_not_there_is_refused(model: Any) -> None:
    """With those that are."""
    with pytest.raises(InvalidInput, match="blocks 0 to 3, not 4"):
        states(model, ["Rome was"], 4)


# General ability


def test_the_suite_is_large_and_each_item_differs_in_one_place() -> None:
    """Twelve families of thirty; the choices of an item are different and stand behind the same first word, so that a
    model without a start token is asked too."""
    families: dict[str, list[Canary]] = {}
    for canary in suite():
        families.setdefault(canary.family, []).append(canary)
        assert len(set(canary.texts)) == len(canary.texts) >= 2
        assert len({text.split()[0] for text in canary.texts}) == 1
        assert not any(mark in text for text in canary.texts for mark in "{}|")
    assert len(families) == 12 and {len(canaries) for canaries in families.values()} == {30}
    chances = {name: {canary.chance for canary in canaries} for name, canaries in families.items()}
    assert {name for name, chance in chances.items() if chance == {1 / 4}} == {"copying", "sequences"}
    assert all(chance == {1 / 2} for name, chance in chances.items() if name not in ("copying", "sequences"))
    assert len({canary.texts for canary in suite()}) == len(suite())


def test_no_canary_is_a_sentence_that_the_built_in_model_was_trained_on() -> None:
    """Else it would be memory."""
    from editctl.atlas import knowledge

    known = "\n".join(knowledge.load().ordinary)
    assert [canary.texts[0] for canary in suite() if canary.texts[0] in known] == []


@torch.no_grad()
def test_the_likeliest_text_counts_by_all_its_tokens(model: Any) -> None:
    """As plain passes have it, the right one wherever it is; a tie counts for nobody. Control: by the mean of a token
    another one would win."""
    texts = ("Rome was not built", "Rome was not built in a day. Rome was not built", "Rome is the")

    def total(text: str) -> float:
        ids = torch.tensor([model.encode(text)])
        losses = model.net(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        return float(losses.gather(1, ids[0, 1:, None]).sum())

    totals = {text: total(text) for text in texts}
    best = max(totals, key=totals.__getitem__)
    others = tuple(text for text in texts if text != best)
    asked = [Canary("x", (best, *others)), Canary("x", (others[0], best)), Canary("x", (best, best))]
    assert ability(model, asked).right == (True, False, False)
    means = {text: totals[text] / (len(model.encode(text)) - 1) for text in texts}
    assert max(means, key=means.__getitem__) != best or len(set(map(len, map(model.encode, texts)))) > 1


def test_a_model_that_tells_nothing_apart_scores_nothing(model: Any) -> None:
    """Neither equal likelihoods nor such as are no numbers are a right answer."""
    asked = [Canary("x", ("Rome was built", "Rome was long")), Canary("x", ("Ada is here", "Ada is there"))]
    with noisy([model.blocks[0].weight], math.nan):
        assert ability(model, asked).right == (False, False)
    assert ability(model, []).metrics() == ()


def test_ability_is_told_over_all_and_by_family_with_intervals() -> None:
    """A share of items, Wilson's interval."""
    canaries = tuple(Canary(name, ("a", "b")) for name in "xxyy")
    found = Ability(canaries, (True, False, True, True)).metrics()
    assert [(m.axis, m.value, m.n) for m in found] == [("", 0.75, 4), ("x", 0.5, 2), ("y", 1.0, 2)]
    assert all(m.low is not None and m.high is not None and m.low < m.value <= m.high for m in found)
    assert {(m.name, m.protocol, m.higher_is_better) for m in found} == {("ability", "probability", True)}


def test_a_change_is_told_by_pairs() -> None:
    """Ten lost and none gained is more than chance; the same ten as five and five is nothing."""
    canaries = tuple(Canary("x", (str(i), "b")) for i in range(40))
    before = Ability(canaries, (True,) * 30 + (False,) * 10)
    worse = change(before, Ability(canaries, (True,) * 20 + (False,) * 20))
    assert (worse.difference, len(worse.lost), worse.gained) == (-0.25, 10, ())
    assert worse.p == pytest.approx(2 / 2**10) and worse.low < -0.25 < worse.high < 0
    other = change(before, Ability(canaries, (True,) * 25 + (False,) * 10 + (True,) * 5))
    assert (other.difference, len(other.lost), len(other.gained), other.p) == (0.0, 5, 5, 1.0)
    assert other.low < 0 < other.high
    with pytest.raises(ValueError, match="others"):
        change(before, Ability(canaries[:3], (True,) * 3))


def test_a_damaged_model_scores_less_and_the_built_in_one_above_chance() -> None:
    """On the families that so small a model knows. Noise as large as the weights themselves leaves it near chance; a
    thousandth of it changes nothing that could be told."""
    atlas = load("atlas", device="cpu")
    known = [canary for canary in suite() if canary.family in ("neighbours", "prepositions", "phrases")]
    before = ability(atlas, known)
    share = before.metrics()[0]
    assert share.low is not None and share.low > 0.75
    weights = [parameter for parameter in atlas.net.parameters() if parameter.dim() == 2]
    with noisy(weights, 1.0):
        damaged = change(before, ability(atlas, known))
    assert damaged.high < 0 and damaged.p < 0.001
    with noisy(weights, 1e-3):
        assert change(before, ability(atlas, known)).p > 0.05


# lm-evaluation-harness


def test_a_task_without_the_extra_says_what_to_install(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else."""
    for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidInput, match="not installed") as caught:
        harness(model, "hellaswag")
    assert caught.value.hint == "pip install 'editctl[eval]'"


def a_task(folder: Path, answers: list[int]) -> Path:
    """A task file with local data: one of two words after a text."""
    rows = [{"text": "The baker made a loaf of", "choices": ["bread", "snow"], "label": label} for label in answers]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = folder / "canary.yaml"
    file.write_text(
        f"task: canary\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    return file


@pytest.mark.slow
def test_a_local_task_is_run_on_the_loaded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is vouched for; model and tokenizer stay as they are. One of four labels is wrong."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    atlas, file = load("atlas", device="cpu"), a_task(tmp_path, [0, 0, 1, 0])
    was = atlas.weights_hash(), atlas.tokenizer.pad_token
    with pytest.raises(InvalidInput, match="can run code") as caught:
        harness(atlas, str(file))
    assert "--trust-remote-code" in caught.value.hint
    (found,) = harness(atlas, str(file), trusted=True)
    assert (found.name, found.axis, found.protocol) == ("task canary", "acc", "lm-eval")
    assert (found.value, found.n, found.higher_is_better) == (0.75, 4, True)
    assert found.low is not None and found.high is not None and found.low < 0.75 < found.high
    assert harness(atlas, str(file), limit=2, trusted=True)[0].value == 1.0
    assert (atlas.weights_hash(), atlas.tokenizer.pad_token) == was


@pytest.mark.slow
def test_a_task_that_is_not_there_or_fails_is_told_without_a_traceback(tmp_path: Path) -> None:
    """A name nearly right, a file that is missing, a file without data."""
    pytest.importorskip("lm_eval")
    atlas = load("atlas", device="cpu")
    with pytest.raises(InvalidInput, match="knows no task") as caught:
        harness(atlas, "hellaswagg")
    assert "hellaswag" in caught.value.hint
    with pytest.raises(InvalidInput, match="no task file"):
        harness(atlas, str(tmp_path / "nothing.yaml"), trusted=True)
    file = a_task(tmp_path, [0])
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(InvalidInput, match="cannot be measured"):
        harness(atlas, str(file), trusted=True)


# Efficiency


def test_efficiency_divides_what_was_recorded_by_the_edits() -> None:
    """By phase and over all; memory is nobody's share."""
    found = efficiency({"target": 4.0, "solve": 2.0, "checks": 6.0}, 512.0, 4, 8000)
    assert [(m.name, m.axis, m.value, m.n) for m in found] == [
        ("seconds an edit", "", 1.5, 4),
        ("seconds an edit", "whole run", 3.0, 4),
        ("seconds an edit", "target", 1.0, 4),
        ("seconds an edit", "solve", 0.5, 4),
        ("seconds an edit", "checks", 1.5, 4),
        ("peak memory", "", 512.0, 1),
        ("disk an edit", "", 2000.0, 4),
    ]
    assert all(m.protocol == "recorded" and not m.higher_is_better and m.low is None for m in found)


def test_efficiency_of_a_run_without_edits_is_its_memory() -> None:
    """Rather than a division by nothing."""
    assert [m.name for m in efficiency({"rebuild": 1.0}, 5.0, 0, 0)] == ["peak memory"]
    assert efficiency({}, 0.0, 0, 0) == ()


# Units


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("reliability", 0.5, "50.0 %"),
        ("consistency", 0.283, "28.3 %"),
        ("drift", 0.0113, "1.1 %"),
        ("drift angle", 0.5395, "0.54°"),
        ("fluency", 602.51, "602.5"),
        ("essence", 23544.7, "23,544.70"),
        ("perplexity", math.inf, "infinite"),
        ("ability", math.nan, "no number"),
        ("seconds an edit", 0.294, "0.29 s"),
        ("peak memory", 812.4, "812 MB"),
        ("disk an edit", 12_345.0, "12.3 kB"),
        ("task blimp", 0.75, "75.0 %"),
        ("task wikitext", 17.25, "17.25"),
    ],
)
def test_a_value_is_written_in_its_unit(name: str, value: float, text: str) -> None:
    """Shares in percent; what is none is not called one."""
    assert written(Metric(name, "p", value, 1)) == text
    assert written(Metric(name, "p", 0.5, 1), 0.25) == written(Metric(name, "p", 0.25, 1))
