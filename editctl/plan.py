"""What has to be done so that the model knows what the specs say: a pure comparison of edits with the head.

Knows: actions, conflicts with what is live, fingerprints, and when a saved plan is stale. Refuses: files of specs,
models, the store; it is given values and returns a value.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from editctl.errors import InvalidInput, StalePlan
from editctl.metrics.gates import check as check_gates
from editctl.spec import SLOT, Edit

SCHEMA = 2
STDIN = Path("-")
"""The path that stands for standard input."""
MAX_BYTES = 100_000_000
"""Most bytes of a saved plan."""
ADD, REPLACE, REMEASURE, DROP, KEEP = "add", "replace", "remeasure", "drop", "keep"
GLYPHS = {ADD: "+", REPLACE: "~", REMEASURE: "?", DROP: "-", KEEP: "="}


class Live(Protocol):
    """What a comparison has to know of a live edit; it is read whole only where it changes."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def prompt(self) -> str:
        """Its prompt, the subject filled in."""

    @property
    def weights_fingerprint(self) -> str:
        """As of `spec.Edit`."""

    @property
    def notes_fingerprint(self) -> str:
        """As of `spec.Edit`."""

    @property
    def whole(self) -> Edit:
        """The edit."""


@dataclass(frozen=True)
class Action:
    """What happens to one edit."""

    kind: str
    """A key of `GLYPHS`."""
    edit: Edit
    """As it shall be; for a drop as it is."""
    old: Edit | None = None
    """What it replaces or is re-recorded over."""
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """An exact contract: this base, this head, these parameters, these actions."""

    model: str
    base: str
    """Content hash of the model's folder."""
    head: str
    """Version id the plan was made for, "" for the unedited model."""
    params: Mapping[str, Any]
    """The run's settings."""
    actions: tuple[Action, ...]
    outside: int = 0
    """How many live edits are not in the specs and are kept."""
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of the methods that spec files name for their own edits."""
    gates: Mapping[str, float] = field(default_factory=dict)
    """What the version is held to before the head moves to it, by metric."""

    def params_of(self, method: str) -> Mapping[str, Any]:
        """The settings of an edit's method, "" being the run's."""
        return self.methods[method] if method else self.params

    def of(self, *kinds: str) -> tuple[Action, ...]:
        """The actions of these kinds, in order."""
        return tuple(action for action in self.actions if action.kind in kinds)

    @property
    def changes(self) -> bool:
        """Whether carrying the plan out would make a new version."""
        return bool(self.of(ADD, REPLACE, REMEASURE, DROP))

    def summary(self) -> str:
        """One line."""
        if not self.changes:
            return f"Nothing to do: {count(len(self.actions), 'edit')} up to date."
        n = Counter(action.kind for action in self.actions)
        parts = [f"{n[ADD]} to add", f"{n[REPLACE]} to replace", f"{n[DROP]} to drop"]
        if n[REMEASURE]:
            parts.append(f"{n[REMEASURE]} to measure again")
        parts.append(f"{n[KEEP]} to keep")
        return f"Plan: {', '.join(parts)}."

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with the fingerprint over all of them."""
        body = {
            "type": "plan",
            "schema": SCHEMA,
            "model": self.model,
            "base": self.base,
            "head": self.head,
            "params": dict(self.params),
            "methods": {name: dict(params) for name, params in self.methods.items()},
            "gates": dict(self.gates),
            "actions": [
                {
                    "kind": action.kind,
                    "edit": action.edit.to_json(),
                    "old": action.old.to_json() if action.old else None,
                    "reason": action.reason,
                }
                for action in self.actions
            ],
            "outside": self.outside,
        }
        return {**body, "fingerprint": _fingerprint(body)}


def make(
    edits: Sequence[Edit],
    live: Sequence[Live],
    *,
    model: str,
    base: str,
    head: str,
    params: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    gates: Mapping[str, float] | None = None,
    prune: bool = False,
    others: int = 0,
) -> Plan:
    """Compare the wanted edits with the live ones.

    An edit that is not live but contradicts a live one (same prompt, another target) replaces it.

    Args:
        others: live edits beside `live`, none of which has the id or the prompt of a wanted one.
    """
    by_id = {edit.id: edit for edit in live}
    by_prompt = {edit.prompt: edit for edit in live}
    wanted_prompts = {edit.prompt for edit in edits}
    actions: list[Action] = []
    drops: dict[str, Action] = {}
    taken: set[str] = set()
    for edit in edits:
        # One prompt can have one live answer, so the prompt decides what an edit stands in for. Its own id does only
        # when no other wanted edit stands in for the live edit of that id.
        old, named = by_prompt.get(edit.prompt), by_id.get(edit.id)
        if named is not None and named is not old and named.prompt not in wanted_prompts:
            if old is None:
                old = named
            else:
                drops[named.id] = Action(DROP, named.whole, reason=f"{edit.id} now stands in for {old.id}")
        if old is None:
            actions.append(Action(ADD, edit))
            continue
        taken.add(old.id)
        actions.append(_compare(edit, old))
    if prune:
        rest = (edit for edit in live if edit.id not in taken)
        drops = {edit.id: drops.get(edit.id) or Action(DROP, edit.whole, reason="not in the specs") for edit in rest}
    actions += drops.values()
    taken |= drops.keys()
    outside = others + sum(edit.id not in taken for edit in live)
    return Plan(model, base, head, params, tuple(actions), outside, methods or {}, gates or {})


def dropping(plan: Plan, live: Sequence[Live], ids: Sequence[str], reason: str = "not in the specs") -> Plan:
    """The plan, and these live edits dropped too, but for those it speaks of already."""
    spoken = {edit.id for action in plan.actions for edit in (action.edit, action.old) if edit is not None}
    wanted = set(ids) - spoken
    drops = tuple(Action(DROP, edit.whole, reason=reason) for edit in live if edit.id in wanted)
    return replace(plan, actions=(*plan.actions, *drops), outside=plan.outside - len(drops))


def without(
    live: Sequence[Live],
    ids: Sequence[str],
    *,
    model: str,
    base: str,
    head: str,
    params: Mapping[str, Any],
    gates: Mapping[str, float],
    reason: str,
) -> Plan:
    """The plan that takes these edits out of the live ones and keeps the rest.

    Raises:
        InvalidInput: an edit is not live.
    """
    by_id = {edit.id: edit for edit in live}
    for name in ids:
        if name not in by_id:
            near = get_close_matches(name, by_id, 1)
            hint = f"did you mean {near[0]}?" if near else "`editctl show` lists the live edits"
            raise InvalidInput(f"there is no live edit {name}", hint)
    actions = tuple(Action(DROP, by_id[name].whole, reason=reason) for name in dict.fromkeys(ids))
    return Plan(model, base, head, params, actions, len(by_id) - len(actions), gates=gates)


def _compare(edit: Edit, live: Live) -> Action:
    if edit.weights_fingerprint == live.weights_fingerprint and edit.id == live.id:
        if edit.notes_fingerprint == live.notes_fingerprint:
            return Action(KEEP, edit)
        return Action(REMEASURE, edit, live.whole, "probes or notes changed")
    old = live.whole
    if edit.weights_fingerprint != old.weights_fingerprint:
        fields = [f for f in ("subject", "relation", "target_new", "method") if getattr(edit, f) != getattr(old, f)]
        reason = "contradicts the live edit " + old.id if edit.id != old.id else ", ".join(fields) + " changed"
        return Action(REPLACE, edit, old, reason)
    return Action(REMEASURE, edit, old, f"was called {old.id}")


def check_fresh(plan: Plan, *, base: str, head: str) -> None:
    """Refuse a plan made for another model or another head.

    Raises:
        StalePlan: it was.
    """
    if plan.base != base:
        raise StalePlan(f"the plan was made for another model (content {plan.base}, now {base})", "run plan again")
    if plan.head != head:
        raise StalePlan(
            f"the plan was made at version {plan.head or 'base'}, the head is now {head or 'base'}", "run plan again"
        )


def save(plan: Plan, path: Path) -> None:
    """Write the plan as JSON.

    Raises:
        InvalidInput: the file cannot be written, or the plan is larger than `MAX_BYTES`.
    """
    data = (json.dumps(plan.to_json(), ensure_ascii=False, indent=1) + "\n").encode()
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"the plan is larger than {MAX_BYTES // 1_000_000} MB", "plan fewer spec files at once")
    try:
        path.write_bytes(data)
    except OSError as error:
        raise InvalidInput(f"the plan cannot be saved: {error}", "name a file in a folder that exists") from None


def load(path: Path) -> Plan:
    """Read a saved plan, from standard input if the path is `STDIN`.

    Raises:
        InvalidInput: it is not a plan, is larger than `MAX_BYTES`, or was changed by hand.
    """
    remedy = "make one with `editctl plan -o FILE`"
    try:
        with nullcontext(sys.stdin.buffer) if path == STDIN else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: no path has a NUL
        reason = getattr(error, "strerror", None) or "no such file"
        raise InvalidInput(f"the plan {path} cannot be read: {reason}", remedy) from None
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{path} is larger than {MAX_BYTES // 1_000_000} MB", "plan fewer spec files at once")
    try:
        body = json.loads(data.decode("utf-8"))
        fingerprint = body.pop("fingerprint")
        if body["schema"] != SCHEMA or fingerprint != _fingerprint(body):
            raise InvalidInput(f"{path} was changed after it was saved", "run plan -o again")
        return _from_body(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"{path} is not a saved plan{_reason(error)}", remedy) from None


def _from_body(body: Mapping[str, Any]) -> Plan:
    """The plan that `Plan.to_json` told.

    Raises:
        InvalidInput: a gate is none.
        ValueError: a value is of a kind that no plan has; so do KeyError, TypeError and AttributeError say.
    """
    named = {name: body[name] for name in ("model", "base", "head", "params", "methods", "gates")}
    outside, params, methods, gates = body["outside"], named["params"], named["methods"], named["gates"]
    texts = [named["model"], named["base"], named["head"]]
    actions = []
    for action in body["actions"]:
        edit, old, reason = action["edit"], action["old"], action["reason"]
        made = Action(action["kind"], Edit.from_json(edit), Edit.from_json(old) if old else None, reason)
        if made.kind not in GLYPHS or (made.old is None) == (made.kind in (REPLACE, REMEASURE)):
            raise ValueError(f"an edit shall be {made.kind}{'' if old else ' without the one it stands in for'}")
        if made.edit.relation.count(SLOT) != 1 or not (made.edit.subject and made.edit.target_new):
            raise ValueError(f"the edit {made.edit.id} lacks its subject, the place {SLOT} for it, or its target")
        texts.append(reason)
        actions.append(made)
    if not all(isinstance(text, str) for text in texts) or type(outside) is not int or outside < 0:
        raise ValueError("a text is missing")
    if not all(isinstance(settings, dict) for settings in (params, gates, methods, *methods.values())):
        raise ValueError("its settings are none")
    if not all(type(wanted) in (int, float) for wanted in gates.values()):
        raise ValueError("a gate is no number")
    check_gates(gates)
    if unknown := {action.edit.method for action in actions if action.kind != DROP} - {"", *methods}:
        raise ValueError(f"the settings of {', '.join(sorted(unknown))} are missing")
    return Plan(**named, actions=tuple(actions), outside=outside)


def _reason(error: Exception) -> str:
    """What was found wrong, in a line; nothing where only a program could make sense of it."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = "".join(f"{part} of " for part in reversed(first["loc"]))
        return f": {place}an edit: {first['msg'].lower()}"
    if isinstance(error, UnicodeError):
        return ": it is not UTF-8 text"
    if isinstance(error, KeyError):
        return f": it has no {error.args[0]}"
    return f": {error}" if isinstance(error, ValueError) else ""


def _fingerprint(body: Mapping[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def count(n: int, noun: str) -> str:
    """A number with its noun, in the plural where it has one."""
    return f"{n} {noun}{'' if n == 1 else 's'}"
