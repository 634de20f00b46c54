"""A store of 5,000 versions and 100,000 edits answers at once; `pytest -m slow tests/test_scale.py -s` prints how fast.

The store is written by the code that commits versions, in one transaction: what it holds is what 5,000 runs would
leave, each with 20 new edits and 20 others asked again. Only the factor files are made up.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from editctl import atlas
from editctl.engine import methods, source
from editctl.metrics import edits as edit_metrics
from editctl.metrics.values import Answer
from editctl.spec import Edit
from editctl.store import Draft, LiveEdit, Store, View, rows
from editctl.store.schema import version_seal

EACH = 20
"""New edits of a version, and others asked again."""
PATIENCE = 2.0 * float(os.environ.get("EDITCTL_TIME_FACTOR", "1"))
"""Seconds a command may take."""


def an_edit(number: int) -> Edit:
    return Edit(
        id=f"fact-{number}",
        subject=f"Subject {number}",
        relation="{} is located in the city of",
        target_new="Rome",
        target_true="Paris",
        paraphrases=("{} stands in", "The city where {} can be found is"),
        locality=({"prompt": "The Louvre is located in the city of"}, {"prompt": f"Neighbour {number} lies in"}),  # type: ignore[arg-type]
    )


def a_factor_file(folder: Path, number: int) -> str:
    """A file of the right form that nothing else has the content of."""
    about = json.dumps({"__metadata__": {"editctl": json.dumps({"number": number})}}).encode()
    content = struct.pack("<Q", len(about)) + about
    name = hashlib.sha256(content).hexdigest()[:32]
    (folder / f"{name}.safetensors").write_bytes(content)
    return name


def fill(store: Store, versions: int) -> list[Edit]:
    """Commit versions one on another and return what is live in the last."""
    store.deltas_dir.mkdir(parents=True)
    base = source.identity(atlas.FOLDER)
    params = methods.settings(source.configuration(atlas.FOLDER), "alphaedit", {}).to_params()
    live: list[Edit] = []
    parent = ""
    with pytest.MonkeyPatch.context() as patch, store._writing("apply", create=True) as db:
        # Comparing with the parent's list for each of 5,000 versions takes many minutes: rows of what is new are
        # written as if nothing were below them, then moved to their place.
        patch.setattr(rows, "places", lambda db, version: [])
        for number in range(versions):
            name = a_factor_file(store.deltas_dir, number)
            new = [an_edit(number * EACH + i) for i in range(EACH)]
            again = live[:: max(1, len(live) // EACH)][:EACH]
            answers = tuple(
                Answer(edit.id, q.kind, q.prompt, q.wanted, "Paris", "Rome", True, 4.2, 0.1, 0.0, 1.0)
                for edit in (*again, *new)
                for q in edit_metrics.questions(edit)
            )
            draft = Draft(
                parent=parent,
                base=base,
                model="atlas",
                dtype="torch.float32",
                method="alphaedit",
                params=params,
                seed=0,
                weights_hash=f"{number:032x}",
                libraries={},
                seconds={"solve": 1.0},
                peak_mb=500.0,
                norms={"model.layers.1.mlp.down_proj": (1.0, 2.0)},
                answers=answers,
                metrics=edit_metrics.summary(answers),
                events=('{"type": "note", "message": "made up"}',),
                edits=tuple(LiveEdit(edit, name, i) for i, edit in enumerate(new)),
            )
            version = store._insert(db, draft)
            db.table("versions").update(version.id, {"kept": len(live)})
            # Upwards, so that no two rows meet on the way.
            for place in reversed(range(EACH)):
                db.execute(
                    'update version_edits set position = ? where "version" = ? and position = ?',
                    [len(live) + place, version.id, place],
                )
            db.table("versions").update(version.id, {"seal": version_seal(db, version.id)})
            view = View(version.id, (), {"stable": parent})
            store._record(db, "apply", view, "editctl apply", f"version {version.id}", about=version.id)
            parent = version.id
            live += new
    return live


def specs(path: Path, edits: int) -> Path:
    """A spec file of live edits of which one in twenty has another target, and as many new ones."""
    lines = ["version = 1"]
    for number in range(edits):
        edit = an_edit(number if number % 20 else 10**6 + number)
        target = "Oslo" if number % 20 == 1 else edit.target_new
        probes = ", ".join(f'{{ prompt = "{probe.prompt}" }}' for probe in edit.locality)
        lines.append(
            f'[[edit]]\nid = "{edit.id}"\nsubject = "{edit.subject}"\nrelation = "{edit.relation}"\n'
            f'target_new = "{target}"\ntarget_true = "Paris"\nparaphrases = {json.dumps(list(edit.paraphrases))}\n'
            f"locality = [{probes}]\n"
        )
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def seconds(workspace: Path, *arguments: str) -> tuple[float, str]:
    """Best of three, since other work on the machine only ever adds; and what was said."""
    taken, said = [], ""
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "editctl", *arguments], cwd=workspace, capture_output=True, text=True, check=False
        )
        taken.append(time.perf_counter() - begun)
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
    return min(taken), said


def test_a_small_store_made_so_is_whole(tmp_path: Path) -> None:
    """What the measured store holds is what commits make: it passes every check and reads back."""
    from editctl.store import care

    store = Store(tmp_path / "store")
    live = fill(store, 4)
    assert care.inspect(store) == []
    assert [one.edit for one in store.edits(store.head())] == live == [an_edit(i) for i in range(80)]
    assert [len(store.edits(version)) for version in store.versions()] == [80, 60, 40, 20]
    assert [len(store.deltas(version)) for version in store.versions()] == [4, 3, 2, 1]


@pytest.mark.slow
def test_a_store_of_5000_versions_and_100000_edits_answers_in_under_two_seconds(tmp_path: Path) -> None:
    """Each command in a process of its own, imports and all."""
    begun = time.perf_counter()
    store = Store(tmp_path / "store")
    fill(store, 5000)
    size = store.database.stat().st_size / 2**20
    print(f"\nmade in {time.perf_counter() - begun:.0f} s; database {size:.0f} MB")
    file = specs(tmp_path / "many.toml", 10_000)
    table = {
        "log": ("log",),
        "log -n 20": ("log", "-n", "20"),
        "plan with 10,000 specs": ("plan", str(file)),
        "show": ("show",),
        "show of version 2,500": ("show", store.versions()[2500].id),
        "diff @-2 @": ("diff", "@-2", "@"),
        "undo": ("undo",),
        "redo": ("redo",),
    }
    taken = {}
    for name, arguments in table.items():
        taken[name], said = seconds(tmp_path, *arguments)
        print(f"{name:25s} {taken[name]:.2f} s")
        if name.startswith("plan"):
            assert "500 to add, 500 to replace, 0 to drop, 9000 to keep" in said
    assert max(taken.values()) < PATIENCE, taken
