"""What is measured of a version after it was made.

Knows: which weights are on while what is asked. Refuses: to judge, which `metrics` does, and to record.
"""

from __future__ import annotations

from editctl.engine.asking import answers_of, ask_all
from editctl.engine.checks import Checks, Wanted
from editctl.engine.model import Model
from editctl.engine.recall import Recall
from editctl.engine.wear import check_weights, wearing
from editctl.events import Emit
from editctl.metrics import edits as edit_metrics
from editctl.metrics.efficiency import efficiency
from editctl.metrics.values import REWRITE, Answer, Metric
from editctl.store import BASE, Store, Version


def measure(
    model: Model,
    store: Store,
    version: Version,
    other: Version | None,
    emit: Emit,
    wanted: Wanted,
) -> tuple[tuple[Answer, ...], tuple[Metric, ...]]:
    """Ask all prompts of a version's edits, of `other` and of the version itself, and check what is beside them.

    Raises:
        StoreError: the rebuilt weights are not those the version was recorded with.
    """
    lives = store.edits(version)
    questions = [q for live in lives for q in edit_metrics.questions(live.edit)]
    known = Recall.of(model, version.base, store.root) if other is None else None
    beside = Checks(wanted, [live.edit for live in lives], emit)
    blocks = [model.blocks.index(model.block_of(module)) for one in (version, other) if one for module in one.norms]
    layer = max(blocks, default=len(model.blocks) - 1)
    with wearing(model, store, other):
        before = ask_all(model, questions, "before", emit, known)
        first = beside.side(model, layer, known)
    with wearing(model, store, version) as editing:
        check_weights(editing, version)
        after = ask_all(model, questions, "after", emit)
        second = beside.side(model, layer)
    recorded = store.last_answers(version, [live.id for live in lives])
    # Nothing was written after the last batch; what no later run asked, the version that made the edit did.
    latest = {live.id for live in lives if live.delta == lives[-1].delta}
    told = {(a.edit, a.prompt): a.after if a.soon is None else a.soon for a in recorded if a.kind == REWRITE}
    own = [q for q in questions if q.kind == REWRITE and q.edit not in latest]
    soon = {q: told[q.edit, q.prompt] for q in own if (q.edit, q.prompt) in told}
    answers = answers_of(questions, before, after, soon)
    return answers, (*edit_metrics.summary(answers), *beside.compare(first, second), *cost_of(store, version))


def cost_of(store: Store, version: Version) -> tuple[Metric, ...]:
    """What the run that made a version took, an edit that it wrote."""
    below = set(store.deltas(store.resolve(version.parent or BASE)))
    own = [live for live in store.edits(version) if live.delta not in below]
    files = {live.delta: store.deltas_dir / f"{live.delta}.safetensors" for live in own}
    size = sum(path.stat().st_size for path in files.values() if path.is_file())
    return efficiency(version.seconds, version.peak_mb, len(own), size)
