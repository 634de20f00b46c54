"""Specs as CounterFact's original JSON.

Knows: which of CounterFact's fields an edit holds, and that what an import left under `extra` counts as long as it says
what the edit says now. Refuses: other formats, and to guess what the format has no place for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from editctl import spec
from editctl.files import write_atomically
from editctl.importers.draft import Refused, said
from editctl.importers.formats import FORMATS
from editctl.spec import Edit


def records(edits: Sequence[Edit]) -> Iterator[dict[str, Any]]:
    """The edits as CounterFact's records, in order; an edit without a case_id of its own gets one that is free."""
    asked = {edit.prompt for edit in edits}
    made = [_record(edit, asked) for edit in edits]
    taken: set[int] = set()
    for record in made:
        case = record.get("case_id")
        if isinstance(case, int) and not isinstance(case, bool) and case not in taken:
            taken.add(case)
        else:
            record.pop("case_id", None)
    free = (number for number in range(len(made) + len(taken) + 1) if number not in taken)
    for record in made:
        yield record if "case_id" in record else {"case_id": next(free), **record}


def write(edits: Sequence[Edit], path: Path) -> None:
    """Write the records as one JSON list, a record a line; all of it or nothing."""
    lines = (json.dumps(record) for record in records(edits))
    write_atomically(path, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def left_behind(edits: Iterable[Edit]) -> Counter[str]:
    """What the format has no place for, counted."""
    found: Counter[str] = Counter()
    for edit in edits:
        found["portability probe"] += len(edit.portability)
        found["reference"] += len(edit.references)
        found["essence"] += bool(edit.essence)
        found["note"] += bool(edit.note)
        true = (edit.target_true,) if edit.target_true else ()
        found["locality answer"] += sum(probe.answer not in ((), true) for probe in edit.locality)
    return +found


def _record(edit: Edit, asked: set[str]) -> dict[str, Any]:
    """What is left of the record an edit came from, with what the edit says."""
    rewrite = {"prompt": edit.relation, "subject": edit.subject}
    own: dict[str, Any] = {
        "requested_rewrite": {
            **rewrite,
            "target_new": {"str": edit.target_new},
            "target_true": {"str": edit.target_true},
        },
        "paraphrase_prompts": list(edit.paraphrase_prompts),
        "neighborhood_prompts": list(edit.locality_prompts),
        "generation_prompts": list(edit.generation_prompts),
    }
    extra = json.loads(edit.extra) if edit.extra else {}
    if isinstance(extra.get("records"), list):
        extra = extra["records"][0] if extra["records"] and isinstance(extra["records"][0], dict) else {}
    whole = _joined(own, extra)
    return {"attribute_prompts": [], **(whole if _says(whole, edit, asked) else _joined(extra, own))}


def _joined(below: Any, above: Any) -> Any:
    """One value over another: where both are objects, key by key."""
    if isinstance(below, dict) and isinstance(above, dict):
        both = {key: _joined(below[key], above[key]) if key in below else above[key] for key in above}
        return {**below, **both}
    return above


def _says(record: dict[str, Any], edit: Edit, asked: set[str]) -> bool:
    """Whether the record says what the edit says, but for probes that other edits change: no import keeps those."""
    counterfact = FORMATS["counterfact"]
    try:
        [draft] = counterfact.reading(0, record, "").drafts
        draft.check()
    except Refused:
        return False
    again, _ = draft.fit()
    names = (*spec.REQUIRED, "target_true", "paraphrases", "generation")
    if any(getattr(again, name) != getattr(edit, name) for name in names):
        return False
    mine = [(prompt, answer) for prompt, answer in said(again, "locality") if prompt not in asked]
    return mine == said(edit, "locality")
