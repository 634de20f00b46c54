"""Every family under the same versions: applied, rebuilt, undone, dropped, mixed, exported or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import test_training
import tiny
import torch
from torch import Tensor

from editctl import export
from editctl.engine import families, wear
from editctl.engine.methods import METHODS
from editctl.engine.model import Model
from editctl.engine.run import Order, run
from editctl.errors import InvalidInput
from editctl.plan import without
from editctl.spec import Edit
from editctl.store import Store, Version

SOLVED = ("alphaedit", "ft-m")
OTHERS = tuple(name for name, method in METHODS.items() if method.own or (method.tune and method.tune.rank))
"""Every method beside those that solve for target vectors, or tune a whole matrix."""
OVERLAYS = tuple(name for name in OTHERS if METHODS[name].changes == "overlay")
PROMPTS = ("The Eiffel Tower is located in the city of", "Ada was born in", "The capital of Norway is", "You could see")


@pytest.fixture
def space(loaded: Callable[..., Any], corpus: Path, tmp_path: Path) -> Space:
    """A tiny Llama with a store in which the trained files lie."""
    return Space(loaded("llama"), Store(tmp_path / "store"), corpus)


class Space:
    """A model and a store, and what is done with them."""

    def __init__(self, model: Model, store: Store, corpus: Path) -> None:
        self.model, self.store, self.corpus = model, store, corpus

    def apply(self, edits: Sequence[Edit], method: str, *, batch: int = 2, **more: Any) -> Version:
        row, settings = METHODS[method], {"batch_size": batch, **more}
        if row.trained:
            if not (found := families_files(self.store, method)):
                found = [test_training.train(self.model, method, self.store.root).content]
            settings["artifact"] = found[0]
        if row.layers == "deep":
            settings["layers"] = [2]
        if row.trained and row.changes == "weights":
            settings["layers"] = list(test_training.LAYERS)
        return tiny.apply(self.model, self.store, edits, self.corpus, method=method, **settings)

    def drop(self, *ids: str) -> Version:
        head = self.store.head()
        assert head is not None
        plan = without(
            [live.edit for live in self.store.edits(head)],
            ids,
            model=self.model.name,
            base="base",
            head=head.id,
            params=head.params,
            gates={},
            reason="asked",
        )
        return run(plan, self.model, "base", self.store, lambda event: None, Order(verb="drop"))

    def said(self, version: Version | None) -> Tensor:
        """Logits of what follows each prompt under a version, prompts × vocabulary."""
        with wear.wearing(self.model, self.store, version):
            rows = [
                self.model.net(torch.tensor([self.model.encode(p)]), use_cache=False).logits[0, -1] for p in PROMPTS
            ]
        return torch.stack(rows)


def families_files(store: Store, method: str) -> list[str]:
    from editctl import artifacts

    return [one.content for one in artifacts.found(store.artifacts_dir, method=method)]


@pytest.mark.parametrize("method", OTHERS)
def test_a_version_is_made_rebuilt_and_undone(space: Space, method: str) -> None:
    """What is recorded is what is rebuilt; it says something else than the unedited model; undo gives its bits back."""
    base = space.said(None)
    bare = space.model.weights_hash()
    version = space.apply(tiny.FACTS, method)

    assert version.method == method and [live.id for live in space.store.edits(version)] == [e.id for e in tiny.FACTS]
    assert wear.rebuild_all(space.model, space.store, [version], lambda event: None) == {}
    assert version.weights_hash != bare
    if method != "ike":
        # Random weights may say nothing that a context changes; that prompts are led around is shown beside.
        assert not torch.equal(space.said(version), base)
    space.store.undo()
    assert space.store.head() is None and torch.equal(space.said(None), base)
    assert space.model.weights_hash() == bare and space.model.laid == ()
    space.store.redo()
    assert space.store.head() == version


@pytest.mark.parametrize("method", OTHERS)
def test_dropping_an_edit_is_as_if_it_had_never_been_made(space: Space, method: str, tmp_path: Path) -> None:
    """Of one batch, whichever of the four it is: the others answer as in a store in which it never was. An overlay's
    entries are kept to the bit; an update is sought anew. With all four it is another (control)."""
    whole = space.apply(tiny.FACTS, method, batch=4)
    gone = tiny.FACTS[1]
    left = space.drop(gone.id)
    other = Space(space.model, Store(tmp_path / "other"), space.corpus)
    if METHODS[method].trained:
        shutil.copytree(space.store.artifacts_dir, other.store.artifacts_dir)
    never = other.apply([edit for edit in tiny.FACTS if edit is not gone], method, batch=4)

    assert torch.allclose(space.said(left), other.said(never), atol=1e-4)
    if method in OVERLAYS:
        assert left.weights_hash == never.weights_hash and torch.equal(space.said(left), other.said(never))
    assert whole.weights_hash != left.weights_hash


@pytest.mark.parametrize("method", OVERLAYS)
def test_an_overlay_leaves_the_weights_alone_and_says_what_it_answers(space: Space, method: str) -> None:
    """The parameters keep their bits while it acts, each edit's own prompt is its own hit, another prompt none."""
    version = space.apply(tiny.FACTS, method, **({"certainty": 0.0} if method == "serac" else {}))
    bare = space.model.weights_hash()
    with wear.wearing(space.model, space.store, version):
        assert space.model.weights_hash() == bare
        found = families.hits(space.model, [edit.prompt for edit in tiny.FACTS])
    assert [hit and (hit.kind, hit.edit) for hit in found] == [(method, edit.id) for edit in tiny.FACTS]
    assert all(hit is not None and 0 <= hit.score <= 1 for hit in found)


@pytest.mark.parametrize("method", OTHERS)
def test_it_can_be_exported_or_is_refused_with_what_can_be(space: Space, method: str, tmp_path: Path) -> None:
    """As `methods` says: adapters and folders hold weights; what lies over them goes as a bundle alone."""
    version = space.apply(tiny.FACTS[:2], method)
    deltas, row = wear.deltas_of(space.store, version), METHODS[method]
    lives = space.store.edits(version)
    record = export.Record(
        version, space.store.deltas(version), tuple(export.Placed(one.edit, one.delta, one.column) for one in lives)
    )
    if "peft" in row.exports:
        assert export.adapter(space.model, deltas, tmp_path / "peft", record).rank > 0
        assert export.merged(space.model, deltas, tmp_path / "merged", record).size > 0
        return
    for write in (export.adapter, export.merged):
        with pytest.raises(InvalidInput, match="lie over the weights") as caught:
            write(space.model, deltas, tmp_path / "out", record)
        assert "delta" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_mixed_history_comes_and_goes(space: Space) -> None:
    """AlphaEdit, then SERAC, then AlphaEdit, each undone in turn: every state is the one there was. The weights of the
    second batch are those it has without the memory between."""
    one, two, three = tiny.FACTS[:1], tiny.FACTS[1:2], tiny.FACTS[2:3]
    states = [(space.store.head(), space.said(None))]
    for edits, method in ((one, "alphaedit"), (two, "serac"), (three, "alphaedit")):
        version = space.apply(edits, method)
        states.append((version, space.said(version)))
    middle, last = states[2][0], states[3][0]
    assert middle is not None and last is not None
    assert last.method == "alphaedit 2, serac 1"
    for version, said in reversed(states):
        assert space.store.head() == version and torch.equal(space.said(version), said)
        if version is not None:
            space.store.undo()
    space.store.restore(last.id)
    dropped = space.drop(two[0].id)
    with wear.wearing(space.model, space.store, last):
        weights = space.model.weights_hash()
    assert dropped.weights_hash == weights


@pytest.mark.parametrize("method", SOLVED)
def test_an_entry_read_from_weights_that_change_is_read_anew(space: Space, method: str) -> None:
    """GRACE's keys are those of the weights below it: when an earlier batch goes, they are read again, and are what
    they would have been; SERAC's memory keeps its rows."""
    layers = {"layers": [1]} if method == "ft-m" else {}
    space.apply(tiny.FACTS[:1], method, **layers)
    space.apply(tiny.FACTS[1:], "grace")
    left = space.drop(tiny.FACTS[0].id)
    other = Space(space.model, Store(space.store.root.parent / "other"), space.corpus)
    never = other.apply(tiny.FACTS[1:], "grace")

    kept, fresh = (wear.deltas_of(s.store, v)[-1].overlay for s, v in ((space, left), (other, never)))
    assert kept is not None and fresh is not None
    assert torch.allclose(kept.tensors["keys"], fresh.tensors["keys"], atol=1e-5)


def test_a_loaded_version_answers_as_it_is_asked(space: Space) -> None:
    """`editctl.load` keeps what lies over the weights on the model: its own `generate` says what `ask` does."""
    from editctl.engine import speak
    from editctl.engine.model import load

    version = space.apply(tiny.FACTS, "grace")
    with wear.wearing(space.model, space.store, version):
        asked = speak.answers(space.model, PROMPTS)
    assert space.model.folder is not None
    fresh = load(str(space.model.folder), device="cpu", dtype="float32")
    plain = speak.answers(fresh, PROMPTS)
    wear.keep_on(fresh, space.store, version)
    assert speak.answers(fresh, PROMPTS) == asked != plain
    ids = torch.tensor([fresh.encode(PROMPTS[0])])
    with torch.no_grad():
        written = fresh.net.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    text = " ".join(fresh.tokenizer.decode(written, skip_special_tokens=True).split())
    assert asked[0].startswith(text) or text.startswith(asked[0])


def test_two_overlays_of_one_kind_are_read_as_one(space: Space) -> None:
    """Entries of later batches stand behind those of earlier ones; one reader serves them."""
    space.apply(tiny.FACTS[:2], "serac", certainty=0.0)
    version = space.apply(tiny.FACTS[2:], "serac", certainty=0.0)
    with wear.wearing(space.model, space.store, version):
        assert len(space.model.laid) == 1
        found = families.hits(space.model, [edit.prompt for edit in tiny.FACTS])
    assert [hit and hit.edit for hit in found] == [edit.id for edit in tiny.FACTS]


def test_settings_say_what_each_method_supports() -> None:
    """`methods --json`: every row says what it changes, needs, keeps and exports; the columns hold together."""
    for row in METHODS.values():
        told = row.to_json()
        assert told["undo"] == "exact" and told["family"] and told["paper"] and told["equation"]
        assert (told["changes"] == "overlay") == (told["update"] == "entries") == (told["exports"] == ("delta",))
        assert (told["preservation"] == "") == (told["changes"] == "overlay")
        assert ("peft" in told["exports"]) == (told["update"] == "thin")
        assert row.trained == ("editctl train" in told["needs"])
    assert {row.family for row in METHODS.values()} >= {"memory-based", "meta-learning", "in-context", "fine-tuning"}
