"""What has to be done so that the model knows what the specs say: a pure comparison of edits with the head.

Knows: actions, conflicts with what is live, fingerprints, and when a saved plan is stale. Refuses: files of specs,
models, the store; it is given values and returns a value.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from editctl.errors import InvalidInput, StalePlan
from editctl.spec import Edit

SCHEMA = 1
ADD, REPLACE, REMEASURE, DROP, KEEP = "add", "replace", "remeasure", "drop", "keep"
GLYPHS = {ADD: "+", REPLACE: "~", REMEASURE: "?", DROP: "-", KEEP: "="}


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
    outside: tuple[str, ...] = ()
    """Ids of live edits that are not in the specs and are kept."""
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of the methods that spec files name for their own edits."""

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
            "actions": [
                {
                    "kind": action.kind,
                    "edit": action.edit.to_json(),
                    "old": action.old.to_json() if action.old else None,
                    "reason": action.reason,
                }
                for action in self.actions
            ],
            "outside": list(self.outside),
        }
        return {**body, "fingerprint": _fingerprint(body)}


def make(
    edits: Sequence[Edit],
    live: Sequence[Edit],
    *,
    model: str,
    base: str,
    head: str,
    params: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    prune: bool = False,
) -> Plan:
    """Compare the wanted edits with the live ones.

    An edit that is not live but contradicts a live one (same prompt, another target) replaces it.
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
                drops[named.id] = Action(DROP, named, reason=f"{edit.id} now stands in for {old.id}")
        if old is None:
            actions.append(Action(ADD, edit))
            continue
        taken.add(old.id)
        actions.append(_compare(edit, old))
    if prune:
        rest = (edit for edit in live if edit.id not in taken)
        drops = {edit.id: drops.get(edit.id) or Action(DROP, edit, reason="not in the specs") for edit in rest}
    actions += drops.values()
    taken |= drops.keys()
    outside = tuple(edit.id for edit in live if edit.id not in taken)
    return Plan(model, base, head, params, tuple(actions), outside, methods or {})


def _compare(edit: Edit, old: Edit) -> Action:
    if edit.weights_fingerprint != old.weights_fingerprint:
        fields = [f for f in ("subject", "relation", "target_new", "method") if getattr(edit, f) != getattr(old, f)]
        reason = "contradicts the live edit " + old.id if edit.id != old.id else ", ".join(fields) + " changed"
        return Action(REPLACE, edit, old, reason)
    if edit.id != old.id:
        return Action(REMEASURE, edit, old, f"was called {old.id}")
    if edit.notes_fingerprint != old.notes_fingerprint:
        return Action(REMEASURE, edit, old, "probes or notes changed")
    return Action(KEEP, edit, old)


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
        InvalidInput: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(plan.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"the plan cannot be saved: {error}", "name a file in a folder that exists") from None


def load(path: Path) -> Plan:
    """Read a saved plan.

    Raises:
        InvalidInput: it is not a plan, or was changed by hand.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        fingerprint = body.pop("fingerprint")
        if body["schema"] != SCHEMA or fingerprint != _fingerprint(body):
            raise InvalidInput(f"{path} was changed after it was saved", "run plan -o again")
        actions = tuple(
            Action(
                kind=action["kind"],
                edit=Edit.from_json(action["edit"]),
                old=Edit.from_json(action["old"]) if action["old"] else None,
                reason=action["reason"],
            )
            for action in body["actions"]
        )
        return Plan(
            body["model"], body["base"], body["head"], body["params"], actions, tuple(body["outside"]), body["methods"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} is not a saved plan: {error}", "make one with `editctl plan -o FILE`") from None


def _fingerprint(body: Mapping[str, Any]) -> str:
    return sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def count(n: int, noun: str) -> str:
    """A number with its noun, in the plural where it has one."""
    return f"{n} {noun}{'' if n == 1 else 's'}"
