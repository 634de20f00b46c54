"""What lies over the weights, as a store has it: undone, taken apart, mixed with weights, and carried elsewhere.

Whatever a kind does, all of this holds; so the overlays here are made by hand, and where one has to act, what reads it
adds one number to all that a block puts out.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_cli
import tiny
import torch
from rich.console import Console
from test_cli import Run

from editctl import delta as delta_files
from editctl import export, report
from editctl.artifacts import KEY
from editctl.cli_export import _record
from editctl.delta import Delta, Overlay
from editctl.engine import families, methods, prompts, speak, wear
from editctl.engine.model import Model
from editctl.engine.overlay import Hit
from editctl.engine.run import Order, moments_for
from editctl.engine.run import run as carry_out
from editctl.engine.source import identity
from editctl.errors import InvalidInput
from editctl.files import digest_of
from editctl.plan import make
from editctl.spec import Edit
from editctl.store import Store, Version

run = test_cli.run

TOWER, ADA, CURIE, ROME = tiny.FACTS


class Louder:
    """Adds a number to what the first block puts out while it is on; answers nothing by itself."""

    by = 1.0
    read: tuple[str, ...] = ()
    """Ids of the entries that were read last."""

    def __init__(self, model: Model, overlay: Overlay, library: Path) -> None:
        self._model = model
        type(self).read = tuple(entry["id"] for entry in overlay.entries)

    @contextmanager
    def on(self) -> Iterator[None]:
        block = self._model.blocks[0].down
        with self._model.hooked([(block, "output", lambda module, inputs, output: output + self.by)]):
            yield

    def hits(self, prompts: Sequence[str]) -> list[Hit | None]:
        return [None] * len(prompts)


@contextmanager
def louder() -> Iterator[None]:
    """Overlays of two kinds are read by what is `Louder`, whatever their own rooms do."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("ike", "grace"):
            patch.setitem(families._READERS, kind, Louder)
        yield


@pytest.fixture(autouse=True)
def _louder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(speak, "NEW_TOKENS", 2)
    monkeypatch.setattr(prompts, "CONTEXT_TOKENS", 1)
    with louder():
        yield


@pytest.fixture
def llama(loaded: Callable[..., Model]) -> Model:
    return loaded("llama")


@pytest.fixture(scope="module")
def moments(loaded: Callable[..., Model], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store where the second moments of both models have been measured."""
    store = Store(tmp_path_factory.mktemp("moments"))
    for kind in ("gpt2", "llama"):
        settings = methods.settings({"num_hidden_layers": 4}, "alphaedit", {**tiny.QUICK, "corpus": str(corpus)})
        moments_for(loaded(kind), settings, "base", store, lambda event: None)
    return store.stats_dir


@pytest.fixture
def another(moments: Path, tmp_path: Path) -> Callable[[str], Store]:
    """An empty store of a name, where nothing needs to be measured."""

    def make(name: str) -> Store:
        store = Store(tmp_path / name)
        shutil.copytree(moments, store.stats_dir)
        return store

    return make


@pytest.fixture
def store(another: Callable[[str], Store]) -> Store:
    return another("store")


def over(edits: Sequence[Edit], method: str = "ike", **settings: Any) -> Delta:
    """A batch that lays one entry an edit over the weights."""
    made = methods.settings({"num_hidden_layers": 4}, method, settings)
    entries = tuple({"id": e.id, "prompt": e.prompt, "target": e.target_new} for e in edits)
    keys = torch.tensor([[float(len(text)) for text in (e.id, e.prompt, e.target_new)] for e in edits])
    return Delta(
        tuple(e.id for e in edits),
        {},
        made.to_params(),
        places=tuple(e.prompt for e in edits),
        together=tuple((e.prompt,) for e in edits),
        overlay=Overlay(method, entries, {"keys": keys}, made.artifact, {"reach": 0.5}),
    )


def trained(library: Path, *, number: float = 1.0, tensors: dict[str, Any] | None = None, **about: Any) -> str:
    """A trained file among others; its content name."""
    told = {"method": "ike", "name": "first", "base": "base", "created_at": "2026-11-01T12:00:00+00:00", **about}
    part = library / "new"
    delta_files.write_tensors(part, tensors or {"weight": torch.full((2, 3), number)}, {KEY: told})
    content = digest_of(part)
    part.rename(library / f"{content}.safetensors")
    return content


def lay(model: Model, store: Store, edits: Sequence[Edit], corpus: Path, *, base: str = "base", **how: Any) -> Version:
    """Lay edits over a store's head by a run, as one batch."""
    delta, head = over(edits, **how), store.head()
    plan = make(
        edits,
        [live.edit for live in store.edits(head)],
        model=model.name,
        base=base,
        head=head.id if head else "",
        params={**delta.params, "corpus": str(corpus)},
    )
    return carry_out(plan, model, base, store, lambda event: None, Order(given=(delta,)))


def write(model: Model, store: Store, edits: Sequence[Edit], corpus: Path, **how: Any) -> Version:
    """Write edits into the weights, in haste."""
    return tiny.apply(model, store, edits, corpus, steps=1, **how)


def hash_of(model: Model, store: Store, version: Version | None) -> str:
    """The weights hash of a version put on now."""
    with wear.wearing(model, store, version) as editing:
        return editing.weights_hash()


def names(store: Store, version: Version | None) -> list[tuple[str, ...]]:
    """Ids of the entries of each overlay of a version."""
    deltas = wear.deltas_of(store, version)
    return [tuple(entry["id"] for entry in delta.overlay.entries) for delta in deltas if delta.overlay]


# ---------------------------------------------------------------------------------------------------------------------
# In the store


def test_an_overlay_is_undone_and_done_again(llama: Model, store: Store, corpus: Path) -> None:
    """The hash differs with it and is the base's without it; the weights are the base's bits all the while."""
    base = llama.weights_hash()
    made = lay(llama, store, [TOWER, ADA], corpus)
    assert made.weights_hash != base and hash_of(llama, store, made) == made.weights_hash
    with wear.wearing(llama, store, made):
        assert llama.weights_hash() == base and len(llama.laid) == 1
    assert store.undo().head == "" and hash_of(llama, store, store.head()) == base and llama.laid == ()
    assert store.redo().head == made.id and hash_of(llama, store, store.head()) == made.weights_hash
    assert made.norms == {}


def test_two_overlays_that_differ_have_two_hashes(llama: Model) -> None:
    """By a text, by one bit of a tensor, by a setting and by their order; the same one has the same."""
    first, second = over([TOWER]).overlay, over([ADA]).overlay
    assert first is not None and second is not None
    ways = [
        *([first], [second], [first, second], [second, first], []),
        [replace(first, tensors={"keys": first.tensors["keys"] + 2**-20})],
        [replace(first, settings={"reach": 0.25})],
    ]

    def hash_with(overlays: Sequence[Overlay]) -> str:
        with llama.editing() as editing:
            for one in overlays:
                editing.lay(one)
            return editing.weights_hash()

    assert len({hash_with(way) for way in ways}) == len(ways)
    assert hash_with([first]) == hash_with([over([TOWER]).overlay]) and hash_with([]) == llama.weights_hash()


def test_an_overlay_acts_on_answers_and_not_without_it(
    llama: Model, store: Store, another: Callable[[str], Store], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control for what follows: what is asked with it is answered otherwise, and not if it adds nothing."""
    made = lay(llama, store, [TOWER], corpus)
    assert any(answer.before != answer.after for answer in store.answers(made))
    monkeypatch.setattr(Louder, "by", 0.0)
    quiet = another("quiet")
    assert all(a.before == a.after for a in quiet.answers(lay(llama, quiet, [TOWER], corpus)))


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_one_entry_is_taken_out_and_the_others_stay(llama: Model, store: Store, corpus: Path, gone: int) -> None:
    """With their texts and rows, in order; what acts no longer knows the one that went."""
    edits = [TOWER, ADA, CURIE]
    (before,) = wear.deltas_of(store, lay(llama, store, edits, corpus))
    rest = [i for i in range(3) if i != gone]
    made = tiny.apply(llama, store, [edits[i] for i in rest], corpus, method="ike", prune=True)
    (after,) = wear.deltas_of(store, made)
    assert before.overlay is not None and after.overlay is not None
    assert after.overlay.entries == tuple(before.overlay.entries[i] for i in rest)
    assert torch.equal(after.overlay.tensors["keys"], before.overlay.tensors["keys"][rest])
    assert after.edits == tuple(edits[i].id for i in rest) == Louder.read and after.columns == (0, 1)
    assert (after.places, after.together) == tuple(tuple(t[i] for i in rest) for t in (before.places, before.together))
    assert [live.id for live in store.edits(made)] == list(after.edits)
    assert hash_of(llama, store, made) == made.weights_hash != store.versions()[1].weights_hash


def test_what_is_taken_out_leaves_what_never_had_it(
    llama: Model, store: Store, another: Callable[[str], Store], corpus: Path
) -> None:
    """The same file, by content, and the same hash; the batch beside it is not touched."""
    lay(llama, store, [TOWER, ADA, CURIE], corpus)
    lay(llama, store, [ROME], corpus)
    made = tiny.apply(llama, store, [TOWER, CURIE, ROME], corpus, method="ike", prune=True)
    never = another("never")
    lay(llama, never, [TOWER, CURIE], corpus)
    other = lay(llama, never, [ROME], corpus)
    assert store.deltas(made) == never.deltas(other) and made.weights_hash == other.weights_hash
    assert store.deltas(made)[0] != store.deltas(store.versions()[1])[0]


def test_a_batch_that_goes_whole_leaves_the_base(
    llama: Model, store: Store, another: Callable[[str], Store], corpus: Path
) -> None:
    """Dropping all that lay over the weights gives the base's hash, and the weights' own where some were edited."""
    lay(llama, store, [TOWER], corpus)
    lay(llama, store, [ADA], corpus)
    made = tiny.apply(llama, store, [TOWER], corpus, method="ike", prune=True)
    assert names(store, made) == [("tower",)]
    edited = write(llama, store, [CURIE], corpus, prune=True)
    assert names(store, edited) == []
    alone = write(llama, another("alone"), [CURIE], corpus)
    assert edited.weights_hash == alone.weights_hash


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_are_written_as_if_nothing_lay_over_them(
    loaded: Callable[..., Model], store: Store, another: Callable[[str], Store], corpus: Path, kind: str
) -> None:
    """Between two batches of weights an overlay that acts: the second batch is the same file as without it, the weights
    are the same bits, and only the hash of the whole tells. Control: written while it acts, they are others."""
    model, plain = loaded(kind), another("plain")
    for one in (store, plain):
        write(model, one, [ADA], corpus)
    lay(model, store, [TOWER], corpus)
    mixed, without = (write(model, one, [ROME], corpus) for one in (store, plain))
    first, _, second = store.deltas(mixed)
    assert (first, second) == plain.deltas(without)
    assert mixed.norms == without.norms and mixed.weights_hash != without.weights_hash
    with wear.wearing(model, store, mixed):
        weights = model.weights_hash()
    assert weights == hash_of(model, plain, without)
    assert [answer.id for answer in store.edits(mixed)] == ["ada", "tower", "rome"]
    acted = another("acted")
    write(model, acted, [ADA], corpus)
    (laid,) = (d.overlay for d in wear.deltas_of(store, mixed) if d.overlay)
    with Louder(model, laid, Path()).on():
        assert acted.deltas(write(model, acted, [ROME], corpus))[1] != second


def test_every_version_of_a_mixed_store_is_rebuilt(
    llama: Model, store: Store, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a chain, along a branch that leaves it below an overlay, and back at the chain; also in any other order.

    Control: an overlay that stays on, or goes with what a version shares with the one before, is noticed.
    """
    write(llama, store, [ADA], corpus)
    lay(llama, store, [TOWER], corpus)
    above = lay(llama, store, [CURIE], corpus)
    store.undo()
    store.undo()
    lay(llama, store, [ROME], corpus)
    store.restore(above.id)
    write(llama, store, [ROME], corpus)
    versions = store.versions()[::-1]
    assert [len(store.deltas(version)) for version in versions] == [1, 2, 3, 2, 4]
    for order in (versions, versions[::-1], [versions[i] for i in (4, 0, 3, 1, 2)]):
        assert wear.rebuild_all(llama, store, order, lambda event: None) == {}
    assert llama.laid == ()

    def forgetful(self: Any) -> None:
        self._put(self._base)
        self._masters.clear()

    with monkeypatch.context() as patch:
        patch.setattr("editctl.engine.model.Editing.reset", forgetful)
        assert wear.rebuild_all(llama, store, versions, lambda event: None).keys() == {v.id for v in versions[3:]}


def test_a_chain_reads_the_overlays_of_one_kind_together(llama: Model, store: Store, corpus: Path) -> None:
    """In order of application; of the unedited model none."""
    lay(llama, store, [TOWER, ADA], corpus)
    made = lay(llama, store, [CURIE], corpus)
    with wear.wearing(llama, store, made):
        assert len(llama.laid) == 1 and Louder.read == ("tower", "ada", "curie")
    with wear.wearing(llama, store, None):
        assert llama.laid == ()


def test_what_a_version_costs_names_what_lies_over_it(llama: Model, store: Store, corpus: Path) -> None:
    """Updates of weights first; a method that knows no blocks names none."""

    def told(version: Version) -> dict[str, str]:
        out = io.StringIO()
        view = report.version_view(version, 0, [], [], store.footprint(version), rows=0)
        Console(file=out, width=200).print(view)
        lines = (line.split(maxsplit=1) for line in out.getvalue().splitlines() if line.strip())
        return {line[0]: line[-1].strip() for line in lines}

    alone = lay(llama, store, [ROME], corpus)
    assert store.footprint(alone)[2] == ("ike",)
    assert told(alone)["factors"] == "1 file, 0.0 MB, ike" and told(alone)["method"] == "ike"
    write(llama, store, [ADA], corpus)
    lay(llama, store, [TOWER], corpus)
    made = lay(llama, store, [CURIE], corpus, method="grace", layers=[2])
    assert store.footprint(made)[2] == ("thin", "grace", "ike")
    assert told(made)["factors"].endswith(", thin, grace and ike") and told(made)["factors"].startswith("4 files, ")
    assert told(made)["method"] == "ike 2, alphaedit 1, grace 1: blocks [2]"


# ---------------------------------------------------------------------------------------------------------------------
# Elsewhere

SETTINGS = "model = {}\ndevice = 'cpu'\n"


@pytest.fixture
def sent(llama: Model, store: Store, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Version:
    """A version in the workspace one stands in, two batches that one trained file reads; a bundle of it in `out`."""
    base = identity(llama.folder)
    content = trained(store.artifacts_dir, base=base)
    lay(llama, store, [TOWER, ADA], corpus, base=base, artifact=content)
    made = lay(llama, store, [CURIE], corpus, base=base, artifact=content)
    (tmp_path / "editctl.toml").write_text(SETTINGS.format(json.dumps(str(llama.folder))))
    monkeypatch.chdir(tmp_path)
    export.bundle(_record(store, made), store.deltas_dir, store.artifacts_dir, tmp_path / "out")
    return made


def test_a_version_goes_to_another_store_with_what_reads_it(sent: Version, store: Store, run: Run) -> None:
    """By the command line, there and back: the trained file first, the same hash, and nothing wrong in the end."""
    outcome = run("--store", "other", "import", "delta", "out", "--yes", "--json")
    assert outcome.code == 0, outcome.err
    other = Store(Path("other"))
    head = other.head()
    assert head is not None and head.weights_hash == sent.weights_hash and other.deltas(head) == store.deltas(sent)
    there, here = ([p.read_bytes() for p in one.artifacts_dir.iterdir()] for one in (other, store))
    assert there == here != []
    assert "1 version rebuilt to the bit" in run("--store", "other", "verify").out
    again = run("--store", "other", "export", "-o", "again", "--format", "delta")
    assert again.code == 0, again.err
    assert export.read_bundle(Path("again")).trained == export.read_bundle(Path("out")).trained != ()
    assert run("--store", "other", "import", "delta", "again", "--yes").code == 2


def test_an_edit_that_is_live_in_another_batch_is_not_taken_over(sent: Version, store: Store, run: Run) -> None:
    """A bundle may say anything of what it holds. Control: the same bundle as it was written is taken over."""
    (below,) = (version for version in store.versions() if version.id != sent.id)
    export.bundle(_record(store, below), store.deltas_dir, store.artifacts_dir, Path("below"))
    assert run("--store", "other", "import", "delta", "below", "--yes").code == 0
    about, tower = Path("out/version.json"), TOWER.to_json()
    text = about.read_text()
    told = json.loads(text)
    told["edits"][2]["edit"] |= {name: tower[name] for name in ("subject", "relation", "target_new")}
    about.write_text(json.dumps(told))
    outcome = run("--store", "other", "import", "delta", "out", "--yes")
    assert outcome.code == 1 and "live already, in other batches" in outcome.err and "hint: " in outcome.err
    about.write_text(text)
    assert run("--store", "other", "import", "delta", "out", "--yes").code == 0


def test_a_version_that_does_not_come_out_right_is_not_recorded(sent: Version, run: Run) -> None:
    """Whatever was put beside: no version, and nothing is wrong with the store that was there."""
    about = Path("out/version.json")
    about.write_text(about.read_text().replace(sent.weights_hash, "0" * 32))
    outcome = run("--store", "other", "import", "delta", "out", "--yes")
    assert outcome.code == 1 and "the weights come to" in outcome.err
    assert Store(Path("other")).versions() == []
    assert run("--store", "other", "verify", "--no-rebuild").out.startswith("wrong: file")
    assert run("--store", "other", "gc").code == 0
    assert run("--store", "other", "verify").code == 0


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_weights_alone_are_refused_before_a_model_is_loaded(
    sent: Version, run: Run, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """With which methods' edits lie over them and how many, and the two ways out; nothing is written."""
    monkeypatch.setattr("editctl.workspace.Workspace.load", lambda self: pytest.fail("a model is loaded"))
    outcome = run("export", "-o", "folder", "--format", form)
    assert outcome.code == 2 and outcome.out == ""
    assert f"3 of 3 edits of version {sent.id} lie over the weights (ike 3)" in outcome.err
    assert "--format delta" in outcome.err and "editctl.load" in outcome.err
    assert not Path("folder").exists()


def test_some_edits_that_lie_over_the_weights_are_enough(
    llama: Model, store: Store, corpus: Path, tmp_path: Path
) -> None:
    """To be refused by both formats, each method with its count. Control: the version below them is exported."""
    below = write(llama, store, [ADA], corpus)
    lay(llama, store, [TOWER], corpus, method="grace", layers=[2])
    made = lay(llama, store, [CURIE, ROME], corpus)
    record, deltas = _record(store, made), wear.deltas_of(store, made)
    for form in (export.merged, export.adapter):
        with pytest.raises(InvalidInput, match=rf"3 of 4 edits of version {made.id} .* \(grace 1, ike 2\)") as caught:
            form(llama, deltas, tmp_path / "out", record)
        assert "--format delta" in caught.value.hint and not (tmp_path / "out").exists()
        form(llama, wear.deltas_of(store, below), tmp_path / form.__name__, _record(store, below))
