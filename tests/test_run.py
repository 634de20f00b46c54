"""Runs: a plan becomes a version whose weights can be rebuilt, taken off and made again, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FACTS, QUICK, an_edit, apply, disk_weights_hash
from torch import Tensor

from editctl import delta as delta_files
from editctl.engine import methods, statistics
from editctl.engine.methods import Settings
from editctl.engine.model import DTYPES, Model, load
from editctl.engine.run import measure, run, wearing
from editctl.engine.solve import Kernel
from editctl.errors import EditctlError, InvalidInput, StalePlan, StoreError
from editctl.events import Event, LayerSolved, NullSpace, RunStarted, StageStarted, VersionMade, from_line, silent
from editctl.plan import make
from editctl.spec import Probe
from editctl.store import Store, Version

SAMPLES = Path(os.environ.get("EDITCTL_SAMPLES", Path(__file__).parents[1].parent / "shared" / "data"))
STORIES = SAMPLES / "models" / "stories260k"


@pytest.fixture(scope="module", params=["gpt2", "llama", "stories260k"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    """Each tiny model, and a trained one of 260,000 parameters where the samples are."""
    if request.param != "stories260k":
        return folders[request.param]
    if not (STORIES / "config.json").is_file():
        pytest.skip(f"no sample model at {STORIES}")
    return STORIES


@pytest.fixture(scope="module")
def fresh(folder: Path) -> Callable[..., Model]:
    """Loads the model anew, so that nothing an earlier run did to it can help."""

    def get(dtype: str = "float32") -> Model:
        return load(str(folder), device="cpu", dtype=dtype)

    return get


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", who="me@here")


def hash_of(model: Model, store: Store, version: Version | None) -> str:
    with wearing(model, store, version) as editing:
        return editing.weights_hash()


def a_plan(model: Model, edits: Any, corpus: Path, head: str = "", base: str = "base") -> Any:
    settings = methods.settings({}, "alphaedit", {**QUICK, "corpus": str(corpus)})
    return make(edits, [], model=model.name, base=base, head=head, params=settings.to_params())


# From plan to version and back


def test_a_version_can_be_worn_by_a_model_loaded_anew_and_undone(
    fresh: Any, folder: Path, store: Store, corpus: Path
) -> None:
    """Reloaded and dressed, the model has the recorded hash; undone to base, that of the files."""
    first = apply(fresh(), store, FACTS[:2], corpus)
    second = apply(fresh(), store, FACTS, corpus)
    assert store.head() == second and second.parent == first.id
    model = fresh()
    assert hash_of(model, store, second) == second.weights_hash
    assert hash_of(model, store, first) == first.weights_hash
    base = disk_weights_hash(folder, torch.float32)
    assert len({base, first.weights_hash, second.weights_hash}) == 3
    assert store.undo().head == first.id
    assert hash_of(model, store, store.head()) == first.weights_hash
    assert store.undo().head == ""
    assert hash_of(model, store, store.head()) == model.weights_hash() == base
    assert store.redo().head == first.id
    assert hash_of(model, store, store.head()) == first.weights_hash


def test_the_same_plan_in_two_stores_makes_the_same_weights(fresh: Any, tmp_path: Path, corpus: Path) -> None:
    """And the same factor files; another seed's contexts make others."""
    made = [apply(fresh(), Store(tmp_path / name), FACTS, corpus) for name in ("one", "two")]
    assert made[0].weights_hash == made[1].weights_hash
    assert made[0].deltas == made[1].deltas
    assert apply(fresh(), Store(tmp_path / "three"), FACTS, corpus, seed=1).weights_hash != made[0].weights_hash


def test_a_run_moves_the_states_it_was_to_move(fresh: Any, store: Store, corpus: Path) -> None:
    """The teacher-forced loss of the new targets falls on average; that is what editing is for."""
    version = apply(fresh(), store, FACTS, corpus, steps=12, rate=0.5, clamp=2.0)
    answers = [a for a in store.answers(version) if a.kind == "rewrite"]
    assert len(answers) == len(FACTS)

    def assert_moved(pairs: list[tuple[float, float]]) -> None:
        assert sum(after for _, after in pairs) < sum(before for before, _ in pairs)

    assert_moved([(a.nll_before or 0, a.nll_after or 0) for a in answers])
    with pytest.raises(AssertionError):
        assert_moved([(a.nll_after or 0, a.nll_before or 0) for a in answers])


def test_half_precision_goes_on_and_off_like_any_other(fresh: Any, folder: Path, store: Store, corpus: Path) -> None:
    """In bf16, too, hashes agree after a reload and after an undo; the head refuses to be edited in fp32."""
    first = apply(fresh("bfloat16"), store, FACTS[:1], corpus)
    second = apply(fresh("bfloat16"), store, FACTS, corpus)
    model = fresh("bfloat16")
    assert hash_of(model, store, second) == second.weights_hash != first.weights_hash
    with pytest.raises(InvalidInput, match="bfloat16"):
        apply(fresh(), store, FACTS, corpus)
    store.undo()
    assert hash_of(model, store, store.head()) == first.weights_hash
    store.undo()
    assert hash_of(model, store, store.head()) == disk_weights_hash(folder, DTYPES["bfloat16"])
    assert hash_of(fresh(), store, second) != second.weights_hash


# Order of work


@pytest.fixture
def llama(loaded: Any) -> Any:
    return loaded("llama")


def solved_by_hand(
    model: Model, store: Store, settings: Settings, batches: list[list[Tensor]], module: str
) -> list[Tensor]:
    """The factors A of one layer for batches of stored keys and residuals, one after another."""
    layer = next(i for i, block in enumerate(model.blocks) if block.down_name == module)
    moments = statistics.moments(
        model,
        settings.layers,
        corpus=settings.corpus,
        tokens=settings.corpus_tokens,
        base="base",
        folder=store.stats_dir,
        emit=silent,
    )
    kernel = Kernel(moments[layer], settings.ridge, model.device)
    return [kernel.solve(keys, residuals).factor for keys, residuals in batches]


def test_later_batches_are_solved_with_the_history_of_earlier_ones(llama: Model, store: Store, corpus: Path) -> None:
    """Within one run and across two: each factor is what a kernel gives that solved what came before it."""
    apply(llama, store, FACTS[:2], corpus)
    version = apply(llama, store, FACTS, corpus)
    deltas = [delta_files.load(name, store.deltas_dir) for name in version.deltas]
    settings = Settings.from_params(deltas[0].params)
    for module in deltas[0].modules:
        batches = [[d.modules[module].keys, d.modules[module].residuals] for d in deltas]
        for delta, factor in zip(deltas, solved_by_hand(llama, store, settings, batches, module), strict=True):
            assert torch.allclose(delta.modules[module].factor, factor, rtol=1e-4, atol=1e-6)
        alone = solved_by_hand(llama, store, settings, batches[1:], module)[0]
        assert not torch.allclose(alone, deltas[1].modules[module].factor, rtol=1e-3)


@pytest.mark.parametrize("gone", range(4))
def test_dropping_one_edit_solves_the_rest_again_without_it(
    llama: Model, store: Store, corpus: Path, gone: int
) -> None:
    """What remains is a fresh kernel's answer to the stored keys and residuals; earlier batches stay as they are."""
    whole = apply(llama, store, FACTS, corpus)
    old = [delta_files.load(name, store.deltas_dir) for name in whole.deltas]
    rest = [edit for i, edit in enumerate(FACTS) if i != gone]
    version = apply(llama, store, rest, corpus, prune=True)
    assert [live.edit.id for live in store.edits(version)] == [edit.id for edit in rest]
    new = [delta_files.load(name, store.deltas_dir) for name in version.deltas]
    settings = Settings.from_params(old[0].params)
    wanted_ids = [[id for id in delta.edits if id != FACTS[gone].id] for delta in old]
    assert [list(delta.edits) for delta in new] == wanted_ids
    assert (whole.deltas[0] == version.deltas[0]) == (gone >= 2), "a batch before the change keeps its file"
    for module in old[0].modules:
        stored = []
        for delta in old:
            columns = [i for i, id in enumerate(delta.edits) if id != FACTS[gone].id]
            factors = delta.modules[module]
            stored.append([factors.keys[:, columns], factors.residuals[:, columns]])
        for found, (keys, residuals), factor in zip(
            new, stored, solved_by_hand(llama, store, settings, stored, module), strict=True
        ):
            assert torch.equal(found.modules[module].keys, keys)
            assert torch.equal(found.modules[module].residuals, residuals)
            assert torch.allclose(found.modules[module].factor, factor, rtol=1e-5, atol=1e-8)
    changed = new[gone // 2].modules["model.layers.1.mlp.down_proj"].factor
    before = old[gone // 2].modules["model.layers.1.mlp.down_proj"].factor
    column = 1 - gone % 2
    assert not torch.allclose(changed[0], before[column], rtol=1e-3), "the dropped key must matter to its neighbour"
    assert hash_of(llama, store, version) == version.weights_hash


def test_dropping_a_whole_batch_leaves_no_file_of_it_in_the_version(llama: Model, store: Store, corpus: Path) -> None:
    """Dropping everything leads back to the base weights, as a version of its own."""
    base = llama.weights_hash()
    whole = apply(llama, store, FACTS, corpus)
    version = apply(llama, store, FACTS[2:], corpus, prune=True)
    assert len(version.deltas) == 1 and version.deltas[0] not in whole.deltas
    empty = apply(llama, store, [], corpus, prune=True)
    assert empty.deltas == () and empty.weights_hash == base == hash_of(llama, store, empty)
    assert store.edits(empty) == ()


def test_replacing_an_edit_takes_the_old_one_out(llama: Model, store: Store, corpus: Path) -> None:
    """The new one stands at the end, solved last; probes changed alone leave the weights as they are."""
    first = apply(llama, store, FACTS, corpus)
    noted = [FACTS[0].model_copy(update={"note": "seen"}), *FACTS[1:]]
    second = apply(llama, store, noted, corpus)
    assert second.weights_hash == first.weights_hash and second.deltas == first.deltas
    assert store.edits(second)[0].edit.note == "seen"
    changed = [noted[0].model_copy(update={"target_new": "London"}), *FACTS[1:]]
    third = apply(llama, store, changed, corpus)
    assert [live.edit.id for live in store.edits(third)] == ["ada", "curie", "rome", "tower"]
    assert third.weights_hash != first.weights_hash
    assert [(live.delta, live.column) for live in store.edits(third)] == [
        (third.deltas[0], 0),
        (third.deltas[1], 0),
        (third.deltas[1], 1),
        (third.deltas[2], 0),
    ]
    assert hash_of(llama, store, third) == third.weights_hash


def test_a_file_of_another_method_is_solved_by_it(llama: Model, store: Store, corpus: Path) -> None:
    """In a batch of its own, whose parameters say so."""
    mixed = [FACTS[0], FACTS[1].model_copy(update={"method": "memit"}), FACTS[2]]
    version = apply(llama, store, mixed, corpus, batch_size=10)
    deltas = [delta_files.load(name, store.deltas_dir) for name in version.deltas]
    assert [(delta.edits, delta.params["method"]) for delta in deltas] == [
        (("tower",), "alphaedit"),
        (("ada",), "memit"),
        (("curie",), "alphaedit"),
    ]
    assert hash_of(llama, store, version) == version.weights_hash


def test_methods_make_different_weights_from_the_same_plan(llama: Model, tmp_path: Path, corpus: Path) -> None:
    """Each of the table."""
    made = {
        name: apply(llama, Store(tmp_path / name), FACTS, corpus, method=name).weights_hash for name in methods.METHODS
    }
    assert len(set(made.values())) == len(methods.METHODS)


def test_what_happened_is_recorded_and_told(llama: Model, store: Store, corpus: Path) -> None:
    """Events in order, the version last; the store keeps them without the passing progress."""
    told: list[Event] = []
    version = apply(llama, store, FACTS, corpus, emit=told.append)
    assert isinstance(told[0], RunStarted) and told[0].edits == 4 and told[0].batches == 2
    assert isinstance(told[-1], VersionMade) and told[-1].weights_hash == version.weights_hash
    stages = [event.stage for event in told if isinstance(event, StageStarted)]
    assert stages == ["statistics", "before", "target", "solve", "target", "solve", "after", "commit"]
    assert [(e.batch, e.layer) for e in told if isinstance(e, LayerSolved)] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert sorted(e.layer for e in told if isinstance(e, NullSpace)) == [1, 2]
    recorded = [from_line(line) for line in store.events(version)]
    assert recorded and all(event in told for event in recorded)
    assert all(json.loads(line)["type"] != "progress" for line in store.events(version))
    names = {(metric.name, metric.protocol): metric.n for metric in store.metrics(version)}
    assert names["reliability", "generated"] == 4 and names["locality", "generated"] == 2
    assert version.params["layers"] == [1, 2] and set(version.libraries) >= {"torch", "transformers"}


def test_words_before_are_those_from_before_each_edit_was_first_applied(
    llama: Model, store: Store, corpus: Path
) -> None:
    """So drift adds up over versions: edits that stay keep what was said before them, new ones are held to the head."""
    first = apply(llama, store, FACTS[:2], corpus)
    second = apply(llama, store, FACTS, corpus)
    old, new = {edit.id for edit in FACTS[:2]}, {edit.id for edit in FACTS[2:]}
    recorded = store.answers(second)
    against_base, against_first = (measure(llama, store, second, other, silent) for other in (None, first))
    for mine, reference in ((old, against_base), (new, against_first)):
        assert [a for a in recorded if a.edit in mine] == [a for a in reference if a.edit in mine]
    assert [a for a in recorded if a.edit in old] != [a for a in against_first if a.edit in old]


def test_a_probe_added_to_a_live_edit_is_held_to_the_unedited_model(llama: Model, store: Store, corpus: Path) -> None:
    """The words from before the edit are those of base, not of the version that already has it."""
    apply(llama, store, FACTS[:2], corpus)
    probed = FACTS[0].model_copy(update={"locality": (Probe(prompt="In the summer Marie Curie worked in"),)})
    version = apply(llama, store, [probed, FACTS[1]], corpus)
    recorded = {a.prompt: a for a in store.answers(version)}
    against_base = {a.prompt: a for a in measure(llama, store, version, None, silent)}
    assert recorded == against_base


def test_a_store_whose_weights_cannot_be_rebuilt_is_told(loaded: Any, folders: Any, store: Store, corpus: Path) -> None:
    """A missing factor file, a changed one, or a changed model underneath."""
    model = loaded("llama")
    version = apply(model, store, FACTS, corpus)
    other = load(str(folders["llama"]), device="cpu")
    with torch.no_grad():
        other.net.model.norm.weight[0] += 1
    with pytest.raises(StoreError, match=version.id):
        measure(other, store, version, None, silent)
    path = store.deltas_dir / f"{version.deltas[0]}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = model.weights_hash()
    with pytest.raises(StoreError):
        hash_of(model, store, version)
    path.unlink()
    with pytest.raises(StoreError):
        hash_of(model, store, version)
    assert model.weights_hash() == before


# What goes wrong


def places_to_stop(llama: Model, store: Store, corpus: Path) -> list[int]:
    """Numbers of the events at which a run may be interrupted: first and last of each kind, up to the commit."""
    kinds: dict[str, list[int]] = {}
    count = 0

    def note(event: Event) -> None:
        nonlocal count
        kinds.setdefault(type(event).__name__, []).append(count)
        count += 1

    copy = shutil.copytree(store.root, store.root.with_name("rehearsal"))
    apply(llama, Store(copy), FACTS, corpus, emit=note)
    last = {"VersionMade"}  # told when all is done
    return sorted({at for name, places in kinds.items() if name not in last for at in (places[0], places[-1])})


def test_a_run_that_is_interrupted_changes_nothing(llama: Model, store: Store, corpus: Path) -> None:
    """At whatever event: the head stays, the model has its base weights, the lock is free, the next run succeeds."""
    first = apply(llama, store, FACTS[:1], corpus)
    base = llama.weights_hash()
    for stop in places_to_stop(llama, store, corpus):
        count = 0

        def interrupt(event: Event, stop: int = stop) -> None:
            nonlocal count
            if count == stop:
                raise KeyboardInterrupt
            count += 1

        with pytest.raises(KeyboardInterrupt):
            apply(llama, store, FACTS, corpus, emit=interrupt)
        assert store.head() == first and store.versions() == [first]
        assert llama.weights_hash() == base
        with Store(store.root).lock("test"):
            pass
    assert apply(llama, store, FACTS, corpus).parent == first.id


def test_a_stale_plan_does_nothing(llama: Model, store: Store, corpus: Path) -> None:
    """For another head or another base; the store stays as it was."""
    plan = a_plan(llama, FACTS[:1], corpus)
    version = run(plan, llama, "base", store, silent)
    with pytest.raises(StalePlan):
        run(plan, llama, "base", store, silent)
    with pytest.raises(StalePlan):
        run(a_plan(llama, FACTS[1:2], corpus, head=version.id), llama, "other", store, silent)
    assert store.versions() == [version]


def test_a_head_that_moved_during_the_run_is_not_overwritten(llama: Model, store: Store, corpus: Path) -> None:
    """Whoever commits first wins; the other learns that its plan is stale."""
    plan = a_plan(llama, FACTS[:1], corpus)
    rival: list[Version] = []

    def meanwhile(event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == "commit" and not rival:
            rival.append(None)  # type: ignore[arg-type]
            rival[0] = run(
                a_plan(load(llama.name, device="cpu"), FACTS[1:2], corpus), load(llama.name), "base", store, silent
            )

    with pytest.raises(StalePlan):
        run(plan, llama, "base", store, meanwhile)
    assert store.versions() == rival == [store.head()]


def test_layers_that_the_model_lacks_are_told(llama: Model, store: Store, corpus: Path) -> None:
    """Before anything is computed, as an error for the user: a plan may be older than the model."""
    settings = methods.settings({}, "alphaedit", {**QUICK, "layers": [1, 9], "corpus": str(corpus)})
    plan = make(FACTS, [], model=llama.name, base="base", head="", params=settings.to_params())
    with pytest.raises(EditctlError):
        run(plan, llama, "base", store, silent)
    assert store.head() is None


def test_an_edit_longer_than_the_model_can_read_is_told(llama: Model, store: Store, corpus: Path) -> None:
    """With its id."""
    long = an_edit("endless", relation="{} " + "and the river " * 40 + "is")
    with pytest.raises(InvalidInput, match="endless"):
        apply(llama, store, [FACTS[1], long], corpus)
    assert store.head() is None
