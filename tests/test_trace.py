"""Causal tracing: every cell is what a pass of its own gives, averages are what they are by hand, and on the built-in
model the fact passes where its training put it.
"""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import builds
import pytest
import tiny
import torch
from rich.console import Console
from torch import Tensor

from editctl import heat
from editctl.atlas import knowledge
from editctl.config import load as load_config
from editctl.engine import trace as room
from editctl.engine.model import Model, load
from editctl.errors import InvalidInput, ModelError
from editctl.events import Event, Note, Progress, silent
from editctl.metrics.effects import (
    ATTENTION,
    AVERAGES,
    BEFORE,
    FIRST,
    FURTHER,
    KINDS,
    LAST,
    MIDDLE,
    MLP,
    NEXT,
    STATE,
    SUBJECT,
    TRACE,
    Average,
    Case,
    Summary,
    Trace,
    averages,
    propose,
    roles,
    summary,
    window_of,
)
from editctl.store import Store

PROMPTS = ("{Ada} was born", "In {Marie Curie} lived", "the tower of {Paris}")
"""With a subject at the very beginning, in the middle, and at the end."""
NASTY = "[red]x[/red] [/] \x1b[31m\x1b]0;title\x07\u202eolleh 日本語 :smile:"


def marked(text: str, edit: str = "", answer: str = "") -> Case:
    """A case with its subject in braces."""
    start, end = text.index("{"), text.index("}") - 1
    return Case(edit, text.replace("{", "").replace("}", ""), start, end, answer)


def traced(model: Model, *cases: Case, emit: Any = silent, **options: Any) -> list[Trace]:
    return list(room.trace(model, cases, emit=emit, **options))


# ---------------------------------------------------------------------------------------------------------------------
# Every cell in a pass of its own


@torch.no_grad()
def plainly(model: Model, found: Trace, kind: str, *, window: int = 1) -> list[list[float]]:
    """Indirect effects as the paper's code makes them: for each cell whole passes, of which the first row is clean and
    every other has noise on the subject's embeddings; restored states are copied from the first."""
    ids = model.encode(found.prompt)
    inside = [at for at, role in enumerate(found.roles) if role in (FIRST, MIDDLE, SUBJECT)]
    if found.prompt.endswith(found.subject):
        inside.append(len(ids) - 1)
    width = model.net.get_input_embeddings().weight.shape[1]
    draws = torch.randn(found.samples, len(inside), width, generator=torch.Generator().manual_seed(0), dtype=float)

    def corrupt(_m: Any, _a: Any, out: Tensor) -> Tensor:
        changed = out.clone()
        changed[1:, inside] += (found.noise * draws).to(out)
        return changed

    def restore(token: int) -> Callable[..., Any]:
        def hook(_m: Any, _a: Any, out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            rows = hidden.clone().view(found.samples + 1, len(ids), -1)
            rows[1:, token] = rows[0, token]
            rows = rows.view_as(hidden)
            return (rows, *out[1:]) if isinstance(out, tuple) else rows

        return hook

    def modules(block: int) -> Any:
        here = model.blocks[block]
        return {STATE: here.module, MLP: here.down, ATTENTION: model.attention_of(block)}[kind]

    def chance(hooks: list[Any]) -> float:
        with model.hooked([(model.net.get_input_embeddings(), "output", corrupt), *hooks]):
            logits = model.net(input_ids=torch.tensor([ids] * (found.samples + 1)), use_cache=False).logits[:, -1]
        return float(logits.softmax(-1)[1:, int(logits[0].argmax())].mean())

    low, blocks = chance([]), len(model.blocks)
    assert low == pytest.approx(found.corrupted, abs=1e-6)

    def spread(middle: int) -> range:
        return range(max(0, middle - window // 2), min(blocks, middle + -(-window // 2)))

    def effect(token: int, middle: int) -> float:
        return chance([(modules(block), "output", restore(token)) for block in spread(middle)]) - low

    return [[effect(token, middle) for middle in range(blocks)] for token in range(len(ids))]


def off(rows: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """The largest difference."""
    return float((torch.tensor(rows, dtype=float) - torch.tensor(others, dtype=float)).abs().max())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_cell_is_what_a_pass_of_its_own_gives(precise: Model, prompt: str) -> None:
    """All kinds at once, cells in batches that resume where something was restored: to the last digits in float64."""
    (found,) = traced(precise, marked(prompt), samples=3, window=2)
    other_noise, other_window = (
        traced(precise, marked(prompt), samples=3, **{"window": 2, **other})[0].effects
        for other in ({"seed": 1}, {"window": 3})
    )
    for kind in KINDS:
        plain = plainly(precise, found, kind, window=1 if kind == STATE else 2)
        assert off(found.effects[kind], plain) < 1e-10
        # Controls: other noise, another window and a token beside are not the same.
        assert off(other_noise[kind], plain) > 1e-4
        assert kind == STATE or off(other_window[kind], plain) > 1e-6
        assert off([*plain[1:], plain[0]], plain) > 1e-4


@cache
def build(name: str) -> Model:
    return Model(builds.BUILDS[name].net().double(), tiny.tokenizer(bos=False), name=name)


COARSE = {"MPT": 1e-5, "GPT-Neo": 1e-5, "Gemma 2": 1e-5}
"""These compute something of attention or norms in float32 whatever the type of the weights."""


@pytest.mark.parametrize("name", ["OPT", "MPT", "GPT-Neo", "Falcon 7B (parallel, multi-query)", "Gemma 2"])
def test_other_architectures_are_traced_as_exactly(name: str) -> None:
    """Flattened positions, parallel attention added in place, places told by the cache, norms after the MLP."""
    model = build(name)
    (found,) = traced(model, marked(PROMPTS[1]), samples=2, window=2)
    for kind in KINDS:
        plain = plainly(model, found, kind, window=1 if kind == STATE else 2)
        assert off(found.effects[kind], plain) < COARSE.get(name, 1e-9)
        assert max(abs(value) for row in plain for value in row) > 1e-3


def test_tokens_before_the_subject_have_no_effect_and_the_last_state_has_all(precise: Model) -> None:
    """Nothing is corrupted before the subject; what the last block puts out at the last token is the answer."""
    (found,) = traced(precise, marked(PROMPTS[1]), samples=2)
    before = [rows[at] for rows in found.effects.values() for at, r in enumerate(found.roles) if r == BEFORE]
    assert before and {value for row in before for value in row} == {0.0}
    *others, last = (row[-1] for row in found.effects[STATE])
    assert last == pytest.approx(found.total, abs=1e-12)
    assert max(map(abs, others)) < 1e-12


def test_a_trace_is_the_same_again_alone_or_among_others(precise: Model) -> None:
    """The noise follows from the seed and the prompt's shape alone; another seed is another noise."""
    cases, how = [marked(prompt) for prompt in PROMPTS], {"samples": 2, "kinds": [MLP]}
    together = traced(precise, *cases, **how)
    assert traced(precise, *cases, **how) == together
    assert [traced(precise, case, **how)[0] for case in cases] == together
    other = traced(precise, cases[0], **how, seed=1)[0]
    assert other.clean == together[0].clean and other.corrupted != together[0].corrupted


def test_few_rows_at_once_give_the_same(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens to restore do not influence each other, so memory that runs out changes nothing but the pace."""
    model, case, notes = loaded("llama", "float64"), marked(PROMPTS[0]), list[Event]()
    how: dict[str, Any] = {"samples": 4, "kinds": [MLP]}
    (whole,) = traced(model, case, **how)
    monkeypatch.setattr(room, "ROWS", 1)
    (single,) = traced(model, case, **how)
    monkeypatch.undo()
    restored, failed = room._Runs._restored, list[int]()

    def short(self: Any, kind: str, blocks: range, tokens: Sequence[int]) -> list[float]:
        if len(tokens) > 2 and blocks[0] == 2:
            failed.append(len(tokens))
            raise MemoryError
        return restored(self, kind, blocks, tokens)

    monkeypatch.setattr(room._Runs, "_restored", short)
    (halved,) = traced(model, case, **how, emit=notes.append)
    assert failed and [event for event in notes if isinstance(event, Note)]
    for other in (single, halved):
        assert off(whole.effects[MLP], other.effects[MLP]) < 1e-12


def test_nothing_is_left_on_the_model(precise: Model) -> None:
    """No hook, no patched block, no other weight."""
    case, before = marked(PROMPTS[1]), precise.weights_hash()
    ids = torch.tensor([precise.encode(case.prompt)])
    logits = precise.net(input_ids=ids).logits
    traced(precise, case, samples=2)
    assert precise.weights_hash() == before
    assert torch.equal(precise.net(input_ids=ids).logits, logits)


def test_the_noise_is_three_deviations_of_the_embeddings(precise: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tokens' entries, whatever the size of the parts they are summed in."""
    weight = precise.net.get_input_embeddings().weight[: len(precise.tokenizer)]
    wanted = 3 * float(weight.double().std(correction=0))
    assert room.noise_scale(precise) == pytest.approx(wanted, rel=1e-12)
    monkeypatch.setattr(room, "PART", 7)
    assert room.noise_scale(precise) == pytest.approx(wanted, rel=1e-12)


def test_an_answer_that_is_asked_for_is_traced_by_its_first_token(precise: Model) -> None:
    """Not the model's own; its probability is that of the plain pass."""
    case = marked(PROMPTS[1], answer="Warsaw")
    (found,) = traced(precise, case, samples=2, kinds=[STATE])
    whole, prompt = precise.encode(f"{case.prompt} Warsaw"), precise.encode(case.prompt)
    token = whole[len(prompt)]
    chances = precise.net(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert (found.answer, found.token) == ("Warsaw", precise.tokenizer.decode([token]))
    assert found.clean == pytest.approx(float(chances[token]), rel=1e-9)
    assert int(chances.argmax()) != token
    assert set(found.effects) == {STATE}


def test_tokens_are_told_from_the_seams_also_without_offsets(precise: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow tokenizer gives no offsets; what both find is the subject."""
    case = marked(PROMPTS[1])
    first, end = room.span(precise, case.prompt, case.start, case.end)
    text = precise.tokenizer.decode(precise.encode(case.prompt)[first:end])
    assert text.strip() == "Marie Curie"
    monkeypatch.setattr(type(precise.tokenizer), "is_fast", property(lambda self: False))
    assert room.span(precise, case.prompt, case.start, case.end) == (first, end)


def test_what_cannot_be_traced_is_refused(precise: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is too long, and attention that was not found: with what to do."""
    with pytest.raises(InvalidInput, match="more than the 128"):
        traced(precise, marked("{Ada} " + "was " * 200, answer="born"))
    monkeypatch.setattr(Model, "attention_of", lambda self, layer: None if layer else self.blocks[0].down)
    with pytest.raises(ModelError, match="attention writes in block 1") as refused:
        traced(precise, marked(PROMPTS[0]), samples=1)
    assert "--kind state --kind mlp" in refused.value.hint
    assert traced(precise, marked(PROMPTS[0]), samples=1, kinds=[STATE, MLP])


def test_progress_is_told(precise: Model) -> None:
    """One step a prompt."""
    told: list[Event] = []
    traced(precise, *map(marked, PROMPTS), samples=1, kinds=[STATE], emit=told.append)
    assert [(e.done, e.total) for e in told if isinstance(e, Progress) and e.stage == "trace"] == [
        (1, 3),
        (2, 3),
        (3, 3),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Roles, averages, proposals by hand


@pytest.mark.parametrize(
    ("tokens", "start", "end", "wanted"),
    [
        (7, 1, 4, [BEFORE, FIRST, MIDDLE, SUBJECT, NEXT, FURTHER, LAST]),
        (3, 0, 1, [SUBJECT, NEXT, LAST]),
        (2, 0, 1, [SUBJECT, LAST]),
        (4, 1, 3, [BEFORE, FIRST, SUBJECT, LAST]),
        (3, 1, 3, [BEFORE, FIRST, LAST]),
        (1, 0, 1, [LAST]),
    ],
)
def test_the_roles_of_tokens(tokens: int, start: int, end: int, wanted: list[str]) -> None:
    """Each token has one; a prompt's last is its last, whatever else it is."""
    assert list(roles(tokens, start, end)) == wanted


@pytest.mark.parametrize(("blocks", "wanted"), [(1, 1), (2, 2), (7, 3), (12, 3), (24, 5), (28, 6), (48, 10), (80, 10)])
def test_the_window_is_the_papers_share_of_the_depth(blocks: int, wanted: int) -> None:
    """10 of 48 blocks; never more than there are, and at least 3 where there are."""
    assert window_of(blocks) == wanted


def a_trace(edit: str = "a", clean: float = 0.9, corrupted: float = 0.1, **changes: Any) -> Trace:
    """Six tokens (one before, a subject of three, two after) and three blocks; MLPs count at the subject's last."""
    states = [[0.0] * 3, [0.1] * 3, [0.3, 0.2, 0.1], [0.8, 0.7, 0.6], [0.0] * 3, [0.0, 0.1, 0.8]]
    mlps = [[0.0] * 3] * 3 + [[0.2, 0.6, 0.0], [0.0] * 3, [0.0] * 3]
    values: dict[str, Any] = {
        "edit": edit,
        "prompt": "In A B C is there",
        "subject": "A B C",
        "answer": "Rome",
        "token": " Rome",
        "tokens": ("In", " A", " B", " C", " is", " there"),
        "roles": roles(6, 1, 4),
        "clean": clean,
        "corrupted": corrupted,
        "effects": {STATE: tuple(map(tuple, states)), MLP: tuple(map(tuple, mlps))},
        "window": 2,
        "samples": 3,
        "seed": 0,
        "noise": 0.5,
    }
    return Trace(**{**values, **changes})


def test_averages_by_hand() -> None:
    """Prompts with the same weight, tokens of one role averaged within each; Student's interval over prompts."""
    one = a_trace()
    other = replace(one, edit="b", effects={STATE: tuple(tuple(v / 2 for v in row) for row in one.effects[STATE])})
    found = {(a.kind, a.role): a for a in averages([one, other])}
    last = found[STATE, SUBJECT]
    assert (last.n, found[MLP, SUBJECT].n) == (2, 1)
    assert last.means == pytest.approx((0.6, 0.525, 0.45))
    # t(1) is 12.706; the values 0.8 and 0.4 lie 0.2 from their mean, so s/√n is 0.2.
    assert (last.lows[0], last.highs[0]) == pytest.approx((0.6 - 12.7062 * 0.2, 0.6 + 12.7062 * 0.2), abs=1e-4)
    assert found[MLP, SUBJECT].lows == (None, None, None)
    assert (STATE, FURTHER) not in found and BEFORE not in {role for _, role in found}
    two = replace(one, roles=(BEFORE, FIRST, MIDDLE, MIDDLE, SUBJECT, LAST))
    (middle,) = [a for a in averages([two]) if (a.kind, a.role) == (STATE, MIDDLE)]
    assert middle.means == pytest.approx((0.55, 0.45, 0.35)) and middle.n == 1


def test_prompts_whose_subject_hardly_matters_are_left_out() -> None:
    """Less than a tenth of p taken away; one just above counts."""
    low, enough = a_trace("low", 0.9, 0.82), a_trace("enough", 0.9, 0.8)
    assert (low.counts, enough.counts) == (False, True)
    assert {a.n for a in averages([low, enough])} == {1}
    assert averages([low]) == ()


def an_average(means: Sequence[float], low: float | None = 0.1, **changes: Any) -> Average:
    values = {"kind": MLP, "role": SUBJECT, "n": 9, "means": tuple(means)}
    values |= {"lows": (low,) * len(means), "highs": (None,) * len(means)}
    return Average(**{**values, **changes})


@pytest.mark.parametrize(
    ("means", "count", "layers"),
    [
        ([0.1, 0.5, 0.4, 0.1, 0.0], 2, (1, 2)),
        ([0.1, 0.5, 0.0, 0.4, 0.4, 0.0], 2, (3, 4)),
        ([0.1, 0.2, 0.3, 0.9], 1, (2,)),
        ([0.1, 0.2, 0.3, 0.9], 9, (0, 1, 2)),
        ([0.5, 0.1], 1, (0,)),
    ],
)
def test_the_proposed_blocks_are_neighbours_with_the_highest_mean(
    means: list[float], count: int, layers: tuple[int, ...]
) -> None:
    """Never the last block, and no more than there are."""
    found = propose([an_average([1.0] * len(means), role=FIRST), an_average(means)], count)
    assert found.layers == layers
    assert found.effect == pytest.approx(sum(means[at] for at in layers) / len(layers))
    assert found.n == 9


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], "no prompt that counts"),
        ([an_average([0.5, 0.5], role=FIRST)], "no prompt that counts"),
        ([an_average([0.5, 0.5], kind=STATE)], "no prompt that counts"),
        ([an_average([0.5, 0.4, 0.3], low=-0.1)], "more than chance"),
        ([an_average([-0.5, 0.0, 0.3], low=None)], "more than chance"),
        ([an_average([0.5])], "more than chance"),
    ],
)
def test_where_nothing_stands_out_nothing_is_proposed(given: list[Average], why: str) -> None:
    """With the reason."""
    found = propose(given, 1)
    assert found.layers == () and why in found.why and found.effect is None


def test_traces_travel_as_json() -> None:
    """And what is none is refused, whatever it is; keys of a later version are no harm."""
    one = a_trace()
    data = json.loads(json.dumps(one.to_json()))
    assert Trace.from_json({**data, "model": "atlas", "more": 1}) == one
    without = {name: value for name, value in data.items() if name != "roles"}
    ragged = {**data, "effects": {STATE: [[0.1], [0.2, 0.3]]}}
    wrong = [{}, without, ragged, {**data, "tokens": [1, 2]}, {**data, "effects": 3}, {**data, "clean": "x"}]
    wrong += [{**data, name: value} for name in ("clean", "window") for value in (float("nan"), 1e400, True, 7.5)]
    wrong += [{**data, "roles": ["x"]}, {**data, "prompt": None}, {**data, "effects": {STATE: [["x"] * 3] * 6}}]
    for value in wrong:
        with pytest.raises(ValueError):
            Trace.from_json(value)


def test_what_traces_add_up_to_travels_as_json() -> None:
    """The same way; what is none is refused."""
    found = summary([a_trace("one"), a_trace("two", corrupted=0.2), a_trace("weak", corrupted=0.89)], 2)
    assert (found.edits, found.left_out, found.proposal.layers) == (("one", "two"), 1, (0, 1))
    data = json.loads(json.dumps(found.to_json()))
    assert Summary.from_json({**data, "model": "atlas"}) == found
    average = data["averages"][0]
    wrong: list[Any] = [{}, {**data, "edits": [1]}, {**data, "averages": 3}, {**data, "proposal": {"layers": 1}}]
    broken = [{**average, "kind": "x"}, {**average, "means": []}, {**average, "lows": [None]}, {**average, "n": "x"}]
    for value in [*wrong, *({**data, "averages": [one]} for one in [*broken, None])]:
        with pytest.raises(ValueError):
            Summary.from_json(value)


# ---------------------------------------------------------------------------------------------------------------------
# The built-in model


@cache
def atlas() -> Model:
    return load("atlas", device="cpu")


def facts(count: int) -> list[tuple[str, str, int]]:
    """Phrasings never seen for their fact, subjects, where they stand; those with words before and after."""
    known = [fact for fact in knowledge.load().single() if len(fact.subject.split()) > 1]
    random.Random(0).shuffle(known)
    pairs = [(phrasing, fact.subject) for fact in known for phrasing in fact.asked]
    found = [(p.replace("{}", s), s, p.index("{}")) for p, s in pairs if p[0] != "{" and len(p.split("{}")[1]) > 5]
    return found[:count]


def early_site(count: int, samples: int) -> None:
    """The claim and its controls, on so many facts."""
    asked = facts(count)
    subjects = [Case(s, prompt, at, at + len(s)) for prompt, s, at in asked]
    # Its first word in the subject's stead.
    unrelated = [Case(s, prompt, 0, prompt.index(" ")) for prompt, s, at in asked]
    found = traced(atlas(), *subjects, samples=samples, kinds=[STATE, MLP])
    means = {(a.kind, a.role): a.means for a in averages(found)}
    counted = [trace.total for trace in found if trace.counts]
    total = sum(counted) / len(counted)
    assert len(counted) > 0.9 * count and total > 0.75
    # Early: one state at the subject's last token, after any of the first blocks, brings most of the answer back, and
    # the MLPs there do.
    early = range(4)
    assert min(means[STATE, SUBJECT][block] for block in early) > 0.6 * total
    assert max(means[MLP, SUBJECT][block] for block in early) > 0.6 * total
    # Control: the same put back at any other token does nothing there.
    for role in (FIRST, MIDDLE, NEXT, FURTHER, LAST):
        assert max(means[STATE, role][block] for block in early) < 0.15 * total, role
        assert max(means[MLP, role][block] for block in early) < 0.15 * total, role
    # Late: the last token, after the last block.
    assert means[STATE, LAST][-1] == pytest.approx(total, abs=0.02)
    assert means[STATE, SUBJECT][-1] < 0.02
    assert set(propose(averages(found), 3).layers) <= set(early)
    # Control: corrupting another word takes nothing away, so that there is nothing to put back.
    beside = traced(atlas(), *unrelated, samples=samples, kinds=[STATE])
    assert sum(trace.total for trace in beside) / count < 0.1 * total
    assert sum(trace.counts for trace in beside) < 0.1 * count
    highest = [max(value for row in trace.effects[STATE] for value in row) for trace in beside]
    assert sum(highest) / count < 0.1 * total


def test_facts_of_the_built_in_model_pass_the_subjects_last_token_early() -> None:
    """On six facts; corrupting or restoring anything else does not show it."""
    early_site(6, 2)


@pytest.mark.slow
def test_the_early_site_on_many_facts() -> None:
    """On two hundred, with the paper's ten samples."""
    early_site(200, 10)


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def rendered(renderable: Any, width: int = 80, **options: Any) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False, emoji=False, **options).print(renderable)
    return out.getvalue().splitlines()


def wide_trace(blocks: int) -> Trace:
    """One effect, of 0.8 at the subject's last token in block 2; half as much beside it."""
    rows = [[0.0] * blocks for _ in range(6)]
    rows[3][2], rows[3][3] = 0.8, 0.4
    return a_trace(effects={STATE: tuple(map(tuple, rows))})


def test_a_heat_map_has_tokens_below_each_other_and_blocks_beside() -> None:
    """Numbers in points of p, readable without any colour; tokens before the subject are left out."""
    lines = rendered(heat.trace_view(wide_trace(7)))
    assert lines[0] == "a: In A B C is there → Rome"
    assert "p(' Rome') 90.0 %, with the subject corrupted 10.0 %: total effect 80.0 points" in " ".join(lines[1:3])
    begin = next(i for i, line in enumerate(lines) if "highest at" in line)
    assert lines[begin].split()[:-2] == [str(block) for block in range(7)]
    shown = {line.split()[0]: line.split()[1:] for line in lines[begin + 1 : begin + 6]}
    assert shown["C*"] == ["0", "0", "80", "40", "0", "0", "0", "2:", "80.0"]
    assert list(shown) == ["A*", "B*", "C*", "is", "there"] and set(shown["is"][:7]) == {"0"}


@pytest.mark.parametrize("blocks", [4, 7, 24, 48, 61, 130])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_heat_map_fits_its_columns_whatever_the_depth(blocks: int, width: int) -> None:
    """Shades where numbers have no room, bands where shades have none; every block of every row is there once."""
    rows = [heat.Row(name, values) for name, values in zip("abcdef", wide_trace(blocks).effects[STATE], strict=True)]
    lines = rendered(heat.Heat(rows, 0.8), width)
    assert max(map(len, lines)) <= width
    told = "".join(line.removesuffix("  2: 80.0").removeprefix("d ") for line in lines if line.startswith("d "))
    if "█" in told:
        cell = told.count("█")
        assert told == "".join(sign * cell for sign in "  █░" + " " * (blocks - 4))
    else:
        assert told.split() == ["0", "0", "80", "40", *["0"] * (blocks - 4)]


def test_shades_tell_effects_apart_by_themselves() -> None:
    """Equal steps of the largest; what takes away has none, and no number is what cannot be counted."""
    assert [heat.level(value, 1.0) for value in (0.0, 0.05, 0.2, 0.45, 0.7, 0.95, 1.0)] == [0, 0, 1, 2, 3, 5, 5]
    assert {heat.level(value, 1.0) for value in (-1.0, float("nan"))} == {0} == {heat.level(1.0, 0.0)}
    assert len(heat.SHADES) == len(heat.STYLES) == 6


def test_colour_adds_nothing_that_the_numbers_do_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal with NO_COLOR the letters are the same."""
    from rich.text import Text

    coloured = rendered(heat.trace_view(wide_trace(7)), force_terminal=True, color_system="truecolor")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = rendered(heat.trace_view(wide_trace(7)), force_terminal=True)
    assert [Text.from_ansi(line).plain for line in coloured] == [Text.from_ansi(line).plain for line in plain]
    assert any("48;2" in line for line in coloured) and not any("48;" in line for line in plain)


def test_averages_are_shown_with_their_prompts_and_intervals() -> None:
    """Which count, and what is proposed; 80 columns are enough."""
    traces = [a_trace("first"), a_trace("second", corrupted=0.2), a_trace("weak", 0.9, 0.85)]
    found = averages(traces)
    lines = rendered(heat.averages_view(traces, found))
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "2 of 3 prompts count; in 1 corrupting the subject takes less than a tenth of p away" in " ".join(
        text.split()
    )
    row = next(line for line in lines if line.startswith("last subject token"))
    assert row.split()[3:6] == ["80", "70", "60"] and row.endswith("0: 80.0 [80.0, 80.0] ×2")
    assert rendered(heat.proposal_line(propose(found, 2)))[0].startswith("Proposed: blocks 0, 1, the 2 neighbouring")
    assert rendered(heat.proposal_line(propose((), 2)))[0].startswith("No blocks are proposed: no prompt that counts")


def test_texts_from_outside_are_shown_literally() -> None:
    """Edits, prompts, tokens and answers with markup and escape sequences act on nothing, in text and in pictures."""
    evil = a_trace(NASTY, prompt=NASTY, answer=NASTY, token=NASTY, tokens=(NASTY,) * 6, subject=NASTY)
    for view in (heat.trace_view(evil), heat.averages_view([evil, evil], averages([evil, evil]))):
        text = "\n".join(rendered(view, 200))
        assert "[red]x[/red]" in text and "\\x1b" in text
        assert {c for c in text if not c.isprintable()} <= {"\n"}


def test_a_picture_has_the_kinds_below_each_other() -> None:
    """Tokens of one prompt, roles of several; an empty row between."""
    one = heat.picture([a_trace()], averages([a_trace()]))
    assert (len(one["rows"]), one["rows"][:2], one["rows"][6]) == (13, ["state  In", "state  A*"], "")
    assert one["columns"] == ["0", "1", "2"] and [len(row) for row in one["values"]] == [3] * 13
    many = heat.picture([a_trace(), a_trace("b")], averages([a_trace(), a_trace("b")]))
    assert many["rows"][0] == "state  first subject token ×2" and many["title"] == "Average indirect effects"


# ---------------------------------------------------------------------------------------------------------------------
# The command

SPEC = """version = 1

[[edit]]
id = "tower"
subject = "the Eiffel Tower"
relation = "Everyone knows that {} is in"
target_new = "Rome"
target_true = "Paris"

[[edit]]
id = "bolero"
subject = "Bolero"
relation = "{} belongs among the finest musical works of"
target_new = "Johann Strauss"
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `editctl trace` in this process, in a workspace with a spec: exit code, output, talk."""
    from editctl.cli import main

    monkeypatch.chdir(tmp_path)
    Path("specs").mkdir()
    Path("specs/a.toml").write_text(SPEC)
    monkeypatch.setattr("editctl.workspace.Workspace.load", lambda space: atlas())

    def call(*arguments: str, verb: str = "trace") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["editctl", verb, *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return call


def lines_of(out: str) -> list[Any]:
    first, *rest = [json.loads(line) for line in out.splitlines()]
    assert first == {"type": "version", "schema": 1}
    return rest


def test_a_spec_is_traced_kept_and_its_blocks_used(run: Run) -> None:
    """All edits as JSON lines; evidence with the unedited model, which `show` mentions; layers in the configuration."""
    Path("editctl.toml").write_text('# mine\nmethod = "alphaedit"  # best\n\n[settings]\n# few\nsteps = 3\n')
    code, out, err = run("--json", "--samples", "2", "--kind", "mlp", "--kind", "state", "--use", "-o", "heat.svg")
    assert code == 0, err
    lines = lines_of(out)
    traces = [line for line in lines if line["type"] == "trace"]
    assert [(t["edit"], t["answer"], t["counts"]) for t in traces] == [
        ("tower", "Paris", True),
        ("bolero", "Maurice Ravel", True),
    ]
    assert Trace.from_json(traces[0]).subject == "the Eiffel Tower" and set(traces[0]["effects"]) == {STATE, MLP}
    assert {line["stage"] for line in lines if line["type"] == "progress"} >= {"trace"}
    found = [line for line in lines if line["type"] == "average"]
    assert {(a["kind"], a["role"]) for a in found} >= {(MLP, SUBJECT), (STATE, LAST)}
    *_, proposal, written = lines
    assert (proposal["type"], proposal["n"]) == ("proposal", 2)
    assert written == {"type": "written", "file": "editctl.toml", "layers": proposal["layers"]}
    text = Path("editctl.toml").read_text()
    assert "# mine" in text and "# best" in text and "# few" in text
    assert load_config().settings == {"steps": 3, "layers": proposal["layers"]} and len(proposal["layers"]) == 3
    assert b"Eiffel" not in Path("heat.svg").read_bytes() and b"last subject token" in Path("heat.svg").read_bytes()
    kept = Store(Path("store")).evidence("")
    assert [(one.kind, one.edit) for one in kept] == [(AVERAGES, ""), (TRACE, "bolero"), (TRACE, "tower")]
    assert Trace.from_json(kept[-1].data) == Trace.from_json(traces[0]) and kept[0].data["model"] == "atlas"
    _, out, _ = run("base", verb="show")
    assert "tower → Paris: total effect" in out and "2 prompts, proposed: blocks" in out
    _, out, _ = run("base", "--json", verb="show")
    assert [line["kind"] for line in lines_of(out) if line["type"] == "evidence"] == [AVERAGES, TRACE, TRACE]


def test_a_prompt_is_traced_with_its_subject_marked_or_named(run: Run) -> None:
    """The same trace both ways, shown as a heat map; other braces are ordinary text."""
    asked = ("--samples", "1", "--kind", "mlp")
    code, out, err = run("Everyone knows that {the Eiffel Tower} is in", *asked)
    assert code == 0 and "Everyone knows that the Eiffel Tower is in → Paris" in out and "Tower*" in out
    assert "Kept as evidence with base" in err
    assert run("Everyone knows that the Eiffel Tower is in", "--subject", "the Eiffel Tower", *asked)[1] == out
    code, out, _ = run("specs/a.toml", "--edit", "tower", "--json", *asked)
    (one,) = [line for line in lines_of(out) if line["type"] == "trace"]
    assert (one["edit"], one["prompt"]) == ("tower", "Everyone knows that the Eiffel Tower is in")
    assert not Path("editctl.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["The Eiffel Tower is in"], 2, "no prompt with one subject marked"),
        (["{A} and {B} are in"], 2, "no prompt with one subject marked"),
        (["{ } is in"], 2, "no prompt with one subject marked"),
        (["A is A", "--subject", "A"], 2, "stands 2 times"),
        (["A is in", "--subject", "B"], 2, "stands 0 times"),
        (["--subject", "B"], 2, "are of one PROMPT"),
        (["{A} is in", "--edit", "tower"], 2, "--edit names an edit of specs"),
        (["missing.toml"], 2, "no such file"),
        (["--edit", "towre"], 2, "no edit"),
        (["specs", "-o", "heat.jpeg"], 2, "no picture's name"),
        (["--ref", "nobody"], 1, "nobody"),
        (["--kind", "heads"], 2, "heads"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(
    run: Run, arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a remedy, and nothing is recorded."""
    monkeypatch.setattr("editctl.workspace.Workspace.load", lambda space: pytest.fail("a model was loaded"))
    found, out, err = run(*arguments)
    assert found == code and said in err and not out
    assert not Path("store/editctl.db").exists()


def test_blocks_are_not_used_where_none_are_proposed(run: Run) -> None:
    """The trace is shown and kept, the configuration stays as it was."""
    code, out, err = run("{Everyone} knows that the Eiffel Tower is in", "--samples", "1", "--kind", "state", "--use")
    assert code == 1 and "hardly matters" in out and "no blocks are proposed" in err
    assert not Path("editctl.toml").exists()
    assert len(Store(Path("store")).evidence()) == 1


def test_a_version_is_traced_on_its_own_weights(run: Run, loaded: Any, tmp_path: Path, corpus: Path) -> None:
    """The evidence stands with it; the unedited model has none of it."""
    model = loaded("llama")
    store = Store(Path("store"))
    version = tiny.apply(model, store, tiny.FACTS[:1], corpus)
    case = marked("In the summer, {The Eiffel Tower} stands in")
    from editctl.engine import wear

    with wear.wearing(model, store, version):
        (edited,) = traced(model, case, samples=2, kinds=[MLP])
    (plain,) = traced(model, case, samples=2, kinds=[MLP])
    assert off(edited.effects[MLP], plain.effects[MLP]) > 1e-6
    store.add_evidence(version.id, TRACE, "tower", edited.to_json())
    assert not store.evidence("") and [one.edit for one in store.evidence(version.id)] == ["tower"]
