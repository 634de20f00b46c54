"""Plans: what has to be done is exactly what differs, and carrying it out leaves nothing to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from editctl.errors import Exit, InvalidInput, StalePlan
from editctl.plan import ADD, DROP, GLYPHS, KEEP, REMEASURE, REPLACE, Plan, check_fresh, load, make, save, without
from editctl.spec import Edit


def an_edit(id: str = "tower", **changes: Any) -> Edit:
    values = {"id": id, "subject": f"The {id}", "relation": "{} is in", "target_new": "Rome"}
    return Edit(**{**values, **changes})


def a_plan(edits: Sequence[Edit], live: Sequence[Edit] = (), *, prune: bool = False) -> Plan:
    params = {"method": "alphaedit", "layers": [1, 2], "ridge": {"l2": 0.02, "energy": None}}
    return make(edits, live, model="atlas", base="b" * 32, head="h" * 12, params=params, prune=prune)


def kinds(plan: Plan) -> list[tuple[str, str, str]]:
    return [(action.kind, action.edit.id, action.old.id if action.old else "") for action in plan.actions]


A, B, C = an_edit("a"), an_edit("b"), an_edit("c")


def test_what_is_not_live_is_added() -> None:
    """In the order of the specs."""
    plan = a_plan([B, A])
    assert kinds(plan) == [(ADD, "b", ""), (ADD, "a", "")]
    assert plan.changes and plan.summary() == "Plan: 2 to add, 0 to replace, 0 to drop, 0 to keep."


def test_what_is_live_as_wanted_is_kept() -> None:
    """Where it was declared does not count; nothing is left to do."""
    plan = a_plan([A.model_copy(update={"file": "elsewhere.toml", "line": 9}), B], [A, B])
    assert kinds(plan) == [(KEEP, "a", ""), (KEEP, "b", "")]
    assert not plan.changes and plan.summary() == "Nothing to do: 2 edits up to date."


@pytest.mark.parametrize("field", ["subject", "relation", "target_new", "method"])
def test_what_would_change_the_weights_replaces(field: str) -> None:
    """And the reason names the field."""
    new = an_edit("a", **{field: "{} elsewhere"})
    plan = a_plan([new, B], [A, B])
    assert kinds(plan) == [(REPLACE, "a", "a"), (KEEP, "b", "")]
    assert plan.actions[0].reason == f"{field} changed" and plan.actions[0].old == A


@pytest.mark.parametrize(
    "change",
    [
        {"paraphrases": ("{} stands in",)},
        {"locality": [{"prompt": "The Louvre is in"}]},
        {"portability": [{"prompt": "{}'s country is", "answer": ["Italy"]}]},
        {"note": "checked"},
        {"source": "a book"},
        {"tags": ("x",)},
        {"target_true": "Paris"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_only_measures_or_remembers_is_measured_again(change: dict[str, Any]) -> None:
    """The weights stay."""
    plan = a_plan([an_edit("a", **change)], [A])
    assert kinds(plan) == [(REMEASURE, "a", "a")]
    assert plan.changes and "1 to measure again" in plan.summary()


def test_a_new_name_for_the_same_fact_is_measured_again() -> None:
    """Nothing is solved for it."""
    plan = a_plan([C.model_copy(update={"id": "see"})], [C])
    assert kinds(plan) == [(REMEASURE, "see", "c")] and "c" in plan.actions[0].reason


def test_a_fact_that_contradicts_a_live_one_replaces_it() -> None:
    """Though it has another name: a model cannot say two things to one prompt."""
    plan = a_plan([C.model_copy(update={"id": "new", "target_new": "Oslo"})], [C])
    assert kinds(plan) == [(REPLACE, "new", "c")] and "contradicts" in plan.actions[0].reason
    assert plan.outside == 0


def test_what_is_not_in_the_specs_stays_unless_pruned() -> None:
    """It is named either way."""
    plan = a_plan([A], [A, B])
    assert kinds(plan) == [(KEEP, "a", "")] and plan.outside == 1 and not plan.changes
    pruned = a_plan([A], [A, B], prune=True)
    assert kinds(pruned) == [(KEEP, "a", ""), (DROP, "b", "")] and pruned.outside == 0 and pruned.changes


def test_every_kind_has_a_sign_of_its_own() -> None:
    """For the eye that runs down the list."""
    assert set(GLYPHS) == {ADD, REPLACE, REMEASURE, DROP, KEEP} and len(set(GLYPHS.values())) == len(GLYPHS)


# Taking out


def without_some(*ids: str, live: Sequence[Edit] = (A, B, C)) -> Plan:
    named: dict[str, Any] = {"model": "atlas", "base": "b" * 32, "head": "h" * 12, "params": {"seed": 3}}
    return without(live, ids, **named, gates={"locality": 0.5}, reason="wrong")


def test_what_is_taken_out_is_dropped_and_the_rest_stays() -> None:
    """In the order in which it was named, each once; under the gates and with the settings given."""
    plan = without_some("c", "a", "c")
    assert kinds(plan) == [(DROP, "c", ""), (DROP, "a", "")] and plan.outside == 1
    assert [action.edit for action in plan.actions] == [C, A]
    assert {action.reason for action in plan.actions} == {"wrong"}
    assert (plan.head, plan.params, plan.gates) == ("h" * 12, {"seed": 3}, {"locality": 0.5})
    assert contents(carried_out(plan, [A, B, C])) == contents([B])
    nothing = without_some()
    assert not nothing.changes and nothing.outside == 3


@pytest.mark.parametrize(
    ("name", "live", "hint"),
    [("towr", ("tower", "bridge"), "did you mean tower?"), ("zzz", ("tower",), "`editctl show` lists"), ("a", (), "")],
)
def test_what_is_not_live_cannot_be_taken_out(name: str, live: tuple[str, ...], hint: str) -> None:
    """Exit code 2, with what was probably meant, even beside one that is."""
    with pytest.raises(InvalidInput, match=f"there is no live edit {name}") as caught:
        without_some(*live[:1], name, live=[an_edit(id) for id in live])
    assert caught.value.exit_code == Exit.USAGE and hint in caught.value.hint


# Carrying out


def carried_out(plan: Plan, live: Sequence[Edit]) -> list[Edit]:
    """The edits that are live after the plan, by the engine's own bookkeeping but without weights."""
    from editctl.engine.run import _kept
    from editctl.store import LiveEdit

    kept = _kept(plan, [LiveEdit(edit, "one-file", i) for i, edit in enumerate(live)])
    return [one.edit for lives in kept.values() for one in lives] + [a.edit for a in plan.of(ADD, REPLACE)]


def contents(edits: Sequence[Edit]) -> set[str]:
    return {json.dumps(edit.to_json(), sort_keys=True) for edit in edits}


SMALL = st.builds(
    an_edit,
    st.sampled_from("abcd"),
    subject=st.sampled_from(["X", "Y", "Z"]),
    target_new=st.sampled_from(["Rome", "Oslo"]),
    note=st.sampled_from(["", "n"]),
)
CONSISTENT = st.lists(SMALL, max_size=4, unique_by=(lambda edit: edit.id, lambda edit: edit.prompt))
"""Edits as the checks of specs let them through: names and prompts differ."""


@settings(max_examples=200, deadline=None)
@given(wanted=CONSISTENT, live=CONSISTENT, prune=st.booleans())
def test_a_plan_carried_out_leaves_what_was_wanted_and_nothing_to_do(
    wanted: list[Edit], live: list[Edit], prune: bool
) -> None:
    """Every wanted edit is live, no two live edits share a name or contradict, and the next plan keeps everything."""
    plan = a_plan(wanted, live, prune=prune)
    after = carried_out(plan, live)
    assert contents(wanted) <= contents(after), "a wanted edit was lost"
    assert len({edit.id for edit in after}) == len(after), "two live edits have one name"
    assert len({edit.prompt for edit in after}) == len(after), "two live edits answer one prompt"
    if prune:
        assert contents(after) == contents(wanted)
    again = a_plan(wanted, after, prune=prune)
    assert not again.changes, again.summary()


def test_a_name_that_moves_to_another_fact_loses_neither() -> None:
    """`a` is renamed to `c`, and a new fact takes the name `a`: both are live afterwards."""
    renamed, other = A.model_copy(update={"id": "c"}), an_edit("a", subject="Something else")
    assert contents(carried_out(a_plan([renamed, other], [A]), [A])) == contents([renamed, other])


def test_an_edit_that_comes_to_contradict_another_live_one_replaces_it_too() -> None:
    """`a` is changed to ask what the live `b`, no longer in the specs, answers otherwise."""
    moved = an_edit("a", subject=B.subject, target_new="Oslo")
    assert contents(carried_out(a_plan([moved], [A, B]), [A, B])) == contents([moved])


# Files


def test_a_saved_plan_comes_back(tmp_path: Path) -> None:
    """With everything that will be done; text in any script survives."""
    live = [A, B, C]
    edits = [an_edit("a", target_new="東京 \x1b[31m"), B.model_copy(update={"note": "ü"}), an_edit("new")]
    plan = a_plan(edits, live, prune=True)
    assert {action.kind for action in plan.actions} == {REPLACE, REMEASURE, ADD, DROP}
    save(plan, tmp_path / "plan.json")
    assert load(tmp_path / "plan.json") == plan
    assert load(tmp_path / "plan.json") != replace(plan, head="other")


@pytest.mark.parametrize(
    ("old", "new"),
    [("Rome", "Oslo"), ('"l2": 0.02', '"l2": 0.03'), ('"add"', '"keep"'), ("h" * 12, "g" * 12), ("b" * 32, "c" * 32)],
)
def test_a_plan_changed_by_hand_is_refused(tmp_path: Path, old: str, new: str) -> None:
    """It was reviewed as it was; the untouched file loads, and so does one that was only laid out anew."""
    path = tmp_path / "plan.json"
    save(a_plan([A]), path)
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text)))
    assert load(path) == a_plan([A])
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InvalidInput, match="changed after it was saved"):
        load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "{}", '{"fingerprint": "x"}', "\udcff"])
def test_what_is_no_plan_is_refused(tmp_path: Path, content: str) -> None:
    """Without a traceback."""
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InvalidInput, match=r"plan\.json"):
        load(path)
    with pytest.raises(InvalidInput, match=r"missing\.json"):
        load(tmp_path / "missing.json")


def test_a_plan_carries_its_gates(tmp_path: Path) -> None:
    """To the bit, and not to be lowered afterwards; what is no number is no gate."""
    path = tmp_path / "plan.json"
    plan = replace(a_plan([A]), gates={"reliability": 0.1 + 0.2, "locality": 1})
    save(plan, path)
    assert load(path) == plan and load(path).gates["reliability"] == 0.1 + 0.2
    assert load(path) != a_plan([A])
    text = path.read_text()
    path.write_text(text.replace("0.30000000000000004", "0.2"))
    with pytest.raises(InvalidInput, match="changed after it was saved"):
        load(path)
    save(replace(a_plan([A]), gates={"reliability": True}), path)
    with pytest.raises(InvalidInput, match="a gate is no number"):
        load(path)


def forged(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A saved plan that was changed, with the fingerprint of what it became."""
    path = tmp_path / "plan.json"
    save(a_plan([A, an_edit("b", note="n")], [B]), path)
    body = json.loads(path.read_text())
    del body["fingerprint"]
    change(body)
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    path.write_text(json.dumps({**body, "fingerprint": sha256(text.encode()).hexdigest()[:16]}))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda body: None, ""),
        (lambda body: body.pop("params"), "it has no params"),
        (lambda body: body.update(head=3), "a text is missing"),
        (lambda body: body.update(outside=-1), "a text is missing"),
        (lambda body: body.update(params=[]), "its settings are none"),
        (lambda body: body.update(methods={"memit": 1}), "its settings are none"),
        (lambda body: body.update(gates={"reliability": "x"}), "a gate is no number"),
        (lambda body: body.update(gates={"reliabilty": 1}), "there is no metric reliabilty"),
        (lambda body: body["actions"][0].update(kind="eat"), "an edit shall be eat"),
        (lambda body: body["actions"][0].update(kind="replace"), "replace without the one it stands in for"),
        (lambda body: body["actions"][0]["edit"].update(relation="is in"), "the edit a lacks its subject"),
        (lambda body: body["actions"][0]["edit"].update(method="memit"), "the settings of memit are missing"),
        (lambda body: body["actions"][0]["edit"].update(tags=[1]), "tags of an edit: input should be a valid string"),
        (lambda body: body.update(actions=7), "is not a saved plan"),
    ],
)
def test_a_plan_that_was_forged_is_refused_where_it_makes_no_sense(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    """A fingerprint keeps off accidents, not people; the message is a line."""
    path = forged(tmp_path, change)
    if not said:
        load(path)
        return
    with pytest.raises(InvalidInput) as caught:
        load(path)
    assert said in caught.value.message.replace("0.of", "of") and "\n" not in caught.value.message


def test_a_plan_too_large_or_too_deep_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both when it is read and when it is written."""
    path = tmp_path / "plan.json"
    path.write_text('{"a": ' * 50_000)
    with pytest.raises(InvalidInput, match="not a saved plan"):
        load(path)
    with pytest.raises(InvalidInput, match="no such file"):
        load(Path("a\0b"))
    save(a_plan([A]), path)
    monkeypatch.setattr("editctl.plan.MAX_BYTES", 100)
    with pytest.raises(InvalidInput, match="larger than"):
        load(path)
    with pytest.raises(InvalidInput, match="larger than"):
        save(a_plan([A]), path)


def test_a_stale_plan_is_refused() -> None:
    """For another model or another head; the fresh one passes."""
    plan = a_plan([A])
    check_fresh(plan, base="b" * 32, head="h" * 12)
    with pytest.raises(StalePlan, match="another model"):
        check_fresh(plan, base="c" * 32, head="h" * 12)
    with pytest.raises(StalePlan, match="the head is now base") as caught:
        check_fresh(plan, base="b" * 32, head="")
    assert caught.value.exit_code == Exit.STALE
