"""Runs: a plan becomes a version whose weights can be rebuilt, taken off and made again, bit for bit."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import FACTS, QUICK, an_edit, apply, disk_weights_hash
from torch import Tensor

from editctl import delta as delta_files
from editctl import report
from editctl.delta import Delta, Factors
from editctl.engine import measuring, methods, prompts, speak, statistics, target
from editctl.engine.asking import Said, request_of
from editctl.engine.checks import Wanted
from editctl.engine.methods import METHODS, POST, PRESERVE, Settings
from editctl.engine.model import DTYPES, Model, load
from editctl.engine.run import Order, run
from editctl.engine.solve import Kernel, Projector
from editctl.engine.statistics import Moment
from editctl.engine.target import optimise
from editctl.engine.wear import deltas_of, wearing
from editctl.errors import EditctlError, InvalidInput, StalePlan, StoreError
from editctl.events import (
    Event,
    LayerSolved,
    MemoryUsed,
    Note,
    NullSpace,
    RunStarted,
    StageStarted,
    TargetStep,
    VersionMade,
    from_line,
    silent,
)
from editctl.metrics.edits import questions
from editctl.metrics.values import LOCALITY, REWRITE, Answer
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


def measure(*arguments: Any) -> tuple[Answer, ...]:
    return measuring.measure(*arguments, Wanted())[0]


def say_little(patch: pytest.MonkeyPatch) -> None:
    """Models say and begin with few words, where a test listens to none of it: half of a run's time."""
    patch.setattr(speak, "NEW_TOKENS", 2)
    patch.setattr(prompts, "CONTEXT_TOKENS", 4)


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    say_little(monkeypatch)


@pytest.fixture(scope="module")
def moments(loaded: Any, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the second moments that runs on the tiny Llama need."""
    store = Store(tmp_path_factory.mktemp("moments"))
    moments_of(loaded("llama"), store, methods.settings({}, "alphaedit", {**QUICK, "corpus": str(corpus)}))
    return store.stats_dir


@pytest.fixture
def ready(moments: Path, store: Store, few_words: None) -> Store:
    """A store that has measured the tiny Llama already."""
    shutil.copytree(moments, store.stats_dir)
    return store


def hash_of(model: Model, store: Store, version: Version | None) -> str:
    with wearing(model, store, version) as editing:
        return editing.weights_hash()


def a_plan(model: Model, edits: Any, corpus: Path, head: str = "", base: str = "base") -> Any:
    settings = methods.settings({}, "alphaedit", {**QUICK, "corpus": str(corpus)})
    return make(edits, [], model=model.name, base=base, head=head, params=settings.to_params())


# From plan to version and back


def test_a_version_can_be_worn_by_a_model_loaded_anew_and_undone(
    fresh: Any, folder: Path, store: Store, corpus: Path, few_words: None
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


def test_the_same_plan_in_two_stores_makes_the_same_weights(
    fresh: Any, tmp_path: Path, corpus: Path, few_words: None
) -> None:
    """And the same factor files; another seed's contexts make others."""
    stores = [Store(tmp_path / name) for name in ("one", "two")]
    made = [apply(fresh(), store, FACTS, corpus) for store in stores]
    files = [store.deltas(version) for store, version in zip(stores, made, strict=True)]
    assert made[0].weights_hash == made[1].weights_hash
    assert files[0] == files[1]
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


def test_half_precision_goes_on_and_off_like_any_other(
    fresh: Any, folder: Path, store: Store, corpus: Path, few_words: None
) -> None:
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


def moments_of(model: Model, store: Store, settings: Settings, layers: Sequence[int] = ()) -> Mapping[int, Moment]:
    """The second moments a run with these settings has used."""
    return statistics.moments(
        model,
        layers or settings.layers,
        corpus=settings.corpus,
        tokens=settings.corpus_tokens,
        base="base",
        folder=store.stats_dir,
        emit=silent,
    )


def a_kernel(model: Model, store: Store, settings: Settings, module: str) -> Kernel:
    """The kernel of one module before any edit."""
    layer = next(i for i, block in enumerate(model.blocks) if block.down_name == module)
    moment = moments_of(model, store, settings)[layer]
    return Kernel(moment, settings.ridge, settings.null_space, model.device, settings.write)


def solved_by_hand(
    model: Model, store: Store, settings: Settings, batches: list[list[Tensor]], module: str
) -> list[Tensor]:
    """The factors A of one layer for batches of stored keys and residuals, one after another."""
    kernel = a_kernel(model, store, settings, module)
    return [kernel.solve(keys, residuals).factor for keys, residuals in batches]


def test_later_batches_are_solved_with_the_history_of_earlier_ones(
    llama: Model, store: Store, corpus: Path, few_words: None
) -> None:
    """Within one run and across two: each factor is what a kernel gives that solved what came before it."""
    apply(llama, store, FACTS[:2], corpus)
    version = apply(llama, store, FACTS, corpus)
    deltas = [delta_files.load(name, store.deltas_dir) for name in store.deltas(version)]
    settings = Settings.from_params(deltas[0].params)
    for module in deltas[0].modules:
        batches = [[d.modules[module].keys, d.modules[module].residuals] for d in deltas]
        for delta, factor in zip(deltas, solved_by_hand(llama, store, settings, batches, module), strict=True):
            assert torch.allclose(delta.modules[module].factor, factor, rtol=1e-4, atol=1e-6)
        alone = solved_by_hand(llama, store, settings, batches[1:], module)[0]
        assert not torch.allclose(alone, deltas[1].modules[module].factor, rtol=1e-3)


@pytest.mark.parametrize("gone", range(4))
def test_dropping_one_edit_solves_the_rest_again_without_it(
    llama: Model, store: Store, corpus: Path, gone: int, few_words: None
) -> None:
    """What remains is a fresh kernel's answer to the stored keys and residuals; earlier batches stay as they are."""
    whole = apply(llama, store, FACTS, corpus)
    old = [delta_files.load(name, store.deltas_dir) for name in store.deltas(whole)]
    rest = [edit for i, edit in enumerate(FACTS) if i != gone]
    told: list[Event] = []
    version = apply(llama, store, rest, corpus, prune=True, emit=told.append)
    assert not any(isinstance(event, TargetStep | Note) for event in told), "no gradient is needed"
    assert [live.edit.id for live in store.edits(version)] == [edit.id for edit in rest]
    new = [delta_files.load(name, store.deltas_dir) for name in store.deltas(version)]
    settings = Settings.from_params(old[0].params)
    wanted_ids = [[id for id in delta.edits if id != FACTS[gone].id] for delta in old]
    assert [list(delta.edits) for delta in new] == wanted_ids
    assert (store.deltas(whole)[0] == store.deltas(version)[0]) == (gone >= 2), (
        "a batch before the change keeps its file"
    )
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


def test_dropping_a_whole_batch_leaves_no_file_of_it_in_the_version(
    llama: Model, store: Store, corpus: Path, few_words: None
) -> None:
    """Dropping everything leads back to the base weights, as a version of its own."""
    base = llama.weights_hash()
    whole = apply(llama, store, FACTS, corpus)
    version = apply(llama, store, FACTS[2:], corpus, prune=True)
    assert len(store.deltas(version)) == 1 and store.deltas(version)[0] not in store.deltas(whole)
    empty = apply(llama, store, [], corpus, prune=True)
    assert store.deltas(empty) == () and empty.weights_hash == base == hash_of(llama, store, empty)
    assert store.edits(empty) == ()


def test_replacing_an_edit_takes_the_old_one_out(llama: Model, store: Store, corpus: Path, few_words: None) -> None:
    """The new one stands at the end, solved last; probes changed alone leave the weights as they are."""
    first = apply(llama, store, FACTS, corpus)
    noted = [FACTS[0].model_copy(update={"note": "seen"}), *FACTS[1:]]
    second = apply(llama, store, noted, corpus)
    assert second.weights_hash == first.weights_hash and store.deltas(second) == store.deltas(first)
    assert store.edits(second)[0].edit.note == "seen"
    changed = [noted[0].model_copy(update={"target_new": "London"}), *FACTS[1:]]
    third = apply(llama, store, changed, corpus)
    assert [live.edit.id for live in store.edits(third)] == ["ada", "curie", "rome", "tower"]
    assert third.weights_hash != first.weights_hash
    assert [(live.delta, live.column) for live in store.edits(third)] == [
        (store.deltas(third)[0], 0),
        (store.deltas(third)[1], 0),
        (store.deltas(third)[1], 1),
        (store.deltas(third)[2], 0),
    ]
    assert hash_of(llama, store, third) == third.weights_hash


def test_a_file_of_another_method_is_solved_by_it(llama: Model, store: Store, corpus: Path, few_words: None) -> None:
    """In a batch of its own, whose parameters say so."""
    mixed = [FACTS[0], FACTS[1].model_copy(update={"method": "memit"}), FACTS[2]]
    version = apply(llama, store, mixed, corpus, batch_size=10)
    deltas = [delta_files.load(name, store.deltas_dir) for name in store.deltas(version)]
    assert [(delta.edits, delta.params["method"]) for delta in deltas] == [
        (("tower",), "alphaedit"),
        (("ada",), "memit"),
        (("curie",), "alphaedit"),
    ]
    assert hash_of(llama, store, version) == version.weights_hash


def test_after_each_stage_begins_the_memory_is_told(llama: Model, store: Store, corpus: Path) -> None:
    """The most so far, so it never falls and the version has no less; after nothing else is it told."""
    told: list[Event] = []
    version = apply(llama, store, FACTS, corpus, emit=told.append)
    after = [type(event) for event, before in zip(told[1:], told, strict=False) if isinstance(before, StageStarted)]
    used = [event.mb for event in told if isinstance(event, MemoryUsed)]
    assert after == [MemoryUsed] * 8 and len(used) == 8
    assert used[0] > 50 and used == sorted(used) and used[-1] <= version.peak_mb


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
    assert {"progress", "memory_used"}.isdisjoint(json.loads(line)["type"] for line in store.events(version))
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
        pairs = zip(recorded, reference, strict=True)
        assert all(a.before == b.before for a, b in pairs if a.edit in mine)
    assert [a.before for a in recorded if a.edit in old] != [a.before for a in against_first if a.edit in old]
    assert all(a.after == b.after for a, b in zip(recorded, against_base, strict=True))


def test_what_was_said_right_after_a_batch_is_recorded(llama: Model, store: Store, corpus: Path) -> None:
    """Of the batches before the last, in the words of the weights of then; a later version knows it of all that is
    there, from the version that made it."""
    half = apply(llama, store, FACTS[:2], corpus)
    then = {a.edit: a.after for a in store.answers(half) if a.kind == REWRITE}
    assert all(a.soon is None for a in store.answers(half)), "nothing was written since"
    later = apply(llama, store, FACTS, corpus)
    soon = {a.edit: a.soon for a in store.answers(later) if a.kind == REWRITE}
    assert soon == {**then, FACTS[2].id: None, FACTS[3].id: None}
    assert all(a.soon is None for a in store.answers(later) if a.kind != REWRITE)
    other = Store(store.root.with_name("at-once"), who="me@here")
    at_once = apply(llama, other, FACTS, corpus)
    assert {a.edit: a.soon for a in other.answers(at_once) if a.kind == REWRITE} == soon
    reasked = {a.edit: a.soon for a in measure(llama, store, later, None, silent) if a.kind == REWRITE}
    assert reasked == soon
    unasked = apply(llama, store, [*FACTS, RIVER], corpus, order=Order(recheck=0))
    assert [a.edit for a in store.answers(unasked) if a.kind == REWRITE] == [RIVER.id]
    reasked = {a.edit: a.soon for a in measure(llama, store, unasked, None, silent) if a.kind == REWRITE}
    assert set(reasked) == {edit.id for edit in (*FACTS, RIVER)} and reasked.pop(RIVER.id) is None
    assert {name: reasked[name] for name in then} == then and None not in reasked.values()


def test_a_probe_added_to_a_live_edit_is_held_to_the_unedited_model(llama: Model, store: Store, corpus: Path) -> None:
    """The words from before the edit are those of base, not of the version that already has it."""
    apply(llama, store, FACTS[:2], corpus)
    probed = FACTS[0].model_copy(update={"locality": (Probe(prompt="In the summer Marie Curie worked in"),)})
    version = apply(llama, store, [probed, FACTS[1]], corpus)
    recorded = {a.prompt: a for a in store.answers(version)}
    against_base = {a.prompt: a for a in measure(llama, store, version, None, silent)}
    assert recorded == against_base


def test_a_store_whose_weights_cannot_be_rebuilt_is_told(
    loaded: Any, folders: Any, store: Store, corpus: Path, few_words: None
) -> None:
    """A missing factor file, a changed one, or a changed model underneath."""
    model = loaded("llama")
    version = apply(model, store, FACTS, corpus)
    other = load(str(folders["llama"]), device="cpu")
    with torch.no_grad():
        other.net.model.norm.weight[0] += 1
    with pytest.raises(StoreError, match=version.id):
        measure(other, store, version, None, silent)
    path = store.deltas_dir / f"{store.deltas(version)[0]}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    before = model.weights_hash()
    with pytest.raises(StoreError):
        hash_of(model, store, version)
    path.unlink()
    with pytest.raises(StoreError):
        hash_of(model, store, version)
    assert model.weights_hash() == before


# Facts of one subject

TOWER, ADA, CURIE, ROME = FACTS
RIVER = an_edit("river", relation="{} stands near the", target_new="road", paraphrases=(), locality=())
SEEN = an_edit("seen", relation="You could see {} from the", target_new="city", paraphrases=(), locality=())


def parts_of(delta: Delta) -> Sequence[Factors]:
    return list(delta.modules.values())


def notes(told: Sequence[Event], words: str = "sought anew") -> list[str]:
    return [event.message for event in told if isinstance(event, Note) and words in event.message]


def test_facts_of_one_subject_share_a_column_where_their_prompts_begin_alike(
    llama: Model, ready: Store, corpus: Path
) -> None:
    """One vector is sought for all of them and becomes one column a place; kept apart, each fact has its own."""
    edits = [TOWER, RIVER, SEEN, ADA]
    version = apply(llama, ready, edits, corpus, batch_size=4)
    (shared,) = deltas_of(ready, version)
    assert [live.column for live in ready.edits(version)] == list(shared.columns) == [0, 0, 1, 2]
    assert shared.places == (TOWER.subject, f"You could see {TOWER.subject}", "Ada")
    family = tuple(edit.prompt for edit in edits[:3])
    assert shared.together == (family, family, (ADA.prompt,))
    for part in parts_of(shared):
        assert part.keys.shape[1] == part.residuals.shape[1] == part.factor.shape[0] == 3
    assert hash_of(load(llama.name, device="cpu"), ready, version) == version.weights_hash
    ready.undo()
    other = apply(llama, ready, edits, corpus, batch_size=4, joint=False)
    (apart,) = deltas_of(ready, other)
    assert [live.column for live in ready.edits(other)] == list(apart.columns) == [0, 1, 2, 3]
    assert apart.together == tuple((edit.prompt,) for edit in edits)
    for part in parts_of(apart):
        assert torch.allclose(part.keys[:, 0], part.keys[:, 1], rtol=1e-4, atol=1e-6), "one place has one key"
        assert not torch.allclose(part.residuals[:, 0], part.residuals[:, 1], rtol=1e-2)
    assert hash_of(load(llama.name, device="cpu"), ready, other) == other.weights_hash != version.weights_hash


@pytest.mark.parametrize(
    ("later", "settings", "together", "taken"),
    [
        (RIVER, {}, (RIVER.prompt, TOWER.prompt), True),
        (SEEN, {}, (SEEN.prompt, TOWER.prompt), False),
        (RIVER, {"joint": False}, (RIVER.prompt,), False),
    ],
    ids=["same place", "another place", "kept apart"],
)
def test_a_later_fact_of_a_subject_takes_over_the_column_of_its_place(
    llama: Model, ready: Store, corpus: Path, later: Any, settings: Any, together: tuple[str, ...], taken: bool
) -> None:
    """Its target was made for the earlier fact too, so the earlier key leaves the history of this and later solves;
    where the place is another, or the target is the new fact's alone, it stays."""
    edits = [TOWER, ADA]
    for added in ([], [later, CURIE], [ROME]):
        edits = [*edits, *added]
        version = apply(llama, ready, edits, corpus, **settings)
    first, second, third = deltas_of(ready, version)
    assert second.together[0] == together
    for module in first.modules:
        apart = {}
        for columns in ([0, 1], [1]):
            kernel = a_kernel(llama, ready, Settings.from_params(first.params), module)
            kernel.absorb(first.modules[module].keys[:, columns])
            apart[len(columns) == 1] = [
                float((kernel.solve(part.keys, part.residuals).factor - part.factor).norm() / part.factor.norm())
                for part in (second.modules[module], third.modules[module])
            ]
        assert max(apart[taken]) < 1e-4
        assert apart[not taken][0] > 1e-3, "whether the earlier key is in the history must matter"
    assert hash_of(load(llama.name, device="cpu"), ready, version) == version.weights_hash


@pytest.mark.parametrize("gone", [ADA, RIVER, CURIE], ids=lambda edit: edit.id)
def test_a_column_is_out_of_the_history_just_while_another_stands_for_it(
    llama: Model, ready: Store, corpus: Path, gone: Any
) -> None:
    """Whatever else goes, and until the one that took over goes itself. All of it is solved again without gradients."""
    edits = [TOWER, ADA]
    for added in ([], [RIVER, CURIE], [ROME]):
        edits = [*edits, *added]
        whole = apply(llama, ready, edits, corpus)
    told: list[Event] = []
    rest = [edit for edit in edits if edit != gone]
    version = apply(llama, ready, rest, corpus, prune=True, emit=told.append)
    assert not any(isinstance(event, TargetStep | Note) for event in told)
    old, new = deltas_of(ready, whole), deltas_of(ready, version)
    assert [delta.edits for delta in new] == [tuple(id for id in delta.edits if id != gone.id) for delta in old]
    taken = gone is not RIVER
    for module in new[0].modules:
        for n, (was, now) in enumerate(zip(old, new, strict=True)):
            columns = [was.edits.index(id) for id in now.edits]
            part, stored = now.modules[module], was.modules[module]
            assert torch.equal(part.keys, stored.keys[:, columns])
            assert torch.equal(part.residuals, stored.residuals[:, columns])
            apart = []
            for without in (taken, not taken):
                kernel = a_kernel(llama, ready, Settings.from_params(now.params), module)
                for earlier in new[:n]:
                    held = [i for i, id in enumerate(earlier.edits) if not (without and id == TOWER.id)]
                    kernel.absorb(earlier.modules[module].keys[:, held])
                factor = kernel.solve(part.keys, part.residuals).factor
                apart.append(float((factor - part.factor).norm() / part.factor.norm()))
            assert apart[0] < 1e-4
            assert n == 0 or apart[1] > 1e-4, "whether the key is in the history must matter"
    assert hash_of(load(llama.name, device="cpu"), ready, version) == version.weights_hash


LONDON = TOWER.model_copy(update={"target_new": "London"})


@pytest.mark.parametrize(
    ("batches", "wanted", "together"),
    [
        ([[TOWER, RIVER]], [RIVER], [(RIVER.prompt,)]),
        ([[TOWER, ADA], [RIVER]], [ADA, RIVER], [(ADA.prompt,), (RIVER.prompt,)]),
        (
            [[TOWER, ADA], [RIVER]],
            [LONDON, ADA, RIVER],
            [(ADA.prompt,), (RIVER.prompt,), (LONDON.prompt, RIVER.prompt)],
        ),
    ],
    ids=["of the same batch", "of an earlier batch", "replaced"],
)
def test_a_batch_is_sought_anew_when_a_fact_its_targets_were_made_for_goes(
    llama: Model, ready: Store, corpus: Path, batches: Any, wanted: Any, together: Any
) -> None:
    """And the run says so; a fact that no target was made for goes without."""
    edits: list[Any] = []
    for batch in batches:
        edits = [*edits, *batch]
        whole = apply(llama, ready, edits, corpus)
    told: list[Event] = []
    version = apply(llama, ready, wanted, corpus, prune=True, emit=told.append)
    assert notes(told) == notes(told, "1 edit sought anew") and len(notes(told)) == 1
    new = len([edit for edit in wanted if edit is LONDON])
    assert {event.batch for event in told if isinstance(event, TargetStep)} == {0, *range(1, new + 1)}
    deltas = deltas_of(ready, version)
    assert [prompts for delta in deltas for prompts in delta.together] == together
    assert sorted(live.edit.id for live in ready.edits(version)) == sorted(edit.id for edit in wanted)
    assert hash_of(load(llama.name, device="cpu"), ready, version) == version.weights_hash
    sought = next(delta for delta in deltas if RIVER.id in delta.edits)
    before = next(delta for delta in deltas_of(ready, whole) if RIVER.id in delta.edits)
    column = before.columns[before.edits.index(RIVER.id)]
    for one, other in zip(parts_of(sought), parts_of(before), strict=True):
        assert not torch.allclose(one.residuals[:, 0], other.residuals[:, column], rtol=1e-3)
    ready.undo()
    told.clear()
    apply(llama, ready, [edit for edit in edits if edit is not ADA], corpus, prune=True, emit=told.append)
    assert notes(told) == []


@pytest.mark.parametrize(
    ("method", "settings"),
    [("ft-m", {"layers": [1]}), ("nse", {}), ("rome", {"post": ["rect"]})],
    ids=["ft-m", "nse", "rome with rect"],
)
def test_batches_that_leave_nothing_to_solve_again_from_are_sought_anew(
    llama: Model, ready: Store, tmp_path: Path, corpus: Path, method: str, settings: Any
) -> None:
    """When one of their edits goes, or an earlier batch changes, but not when an edit is added: that keeps their files.
    What is sought anew is what it would be had the edit that goes never been there."""
    told: list[Event] = []

    def applied(place: Store, edits: Sequence[Any], **flags: Any) -> Version:
        told.clear()
        return apply(llama, place, edits, corpus, method=method, emit=told.append, **settings, **flags)

    first = applied(ready, FACTS[:2])
    second = applied(ready, FACTS[:3])
    assert ready.deltas(second)[0] == ready.deltas(first)[0] and notes(told) == []
    third = applied(ready, FACTS[1:3], prune=True)
    assert len(notes(told)) == 2
    assert hash_of(load(llama.name, device="cpu"), ready, third) == third.weights_hash
    other = Store(tmp_path / "other")
    applied(other, [ADA])
    alone = applied(other, [ADA, CURIE])
    assert ready.deltas(third) == other.deltas(alone) and third.weights_hash == alone.weights_hash
    assert not set(ready.deltas(third)) & set(ready.deltas(second)), "what goes must matter to what stays"


def test_what_is_sought_anew_records_the_seed_it_was_sought_with(
    llama: Model, ready: Store, tmp_path: Path, corpus: Path
) -> None:
    """That of the run, whose contexts it was spoken in; what stays as it was keeps its own."""
    apply(llama, ready, FACTS[:2], corpus, method="nse", seed=1)
    apply(llama, ready, FACTS[:3], corpus, method="nse", seed=2)
    assert [delta.params["seed"] for delta in deltas_of(ready, ready.head())] == [1, 2]
    anew = apply(llama, ready, [ADA], corpus, method="nse", prune=True)
    other = Store(tmp_path / "other")
    alone = apply(llama, other, [ADA], corpus, method="nse")
    assert [delta.params["seed"] for delta in deltas_of(ready, anew)] == [0]
    assert ready.deltas(anew) == other.deltas(alone)


@pytest.mark.parametrize(("method", "alike"), [("rome", True), ("r-rome", True), ("alphaedit", False)])
def test_what_is_written_alone_keeps_its_bits_when_a_neighbour_goes(
    llama: Model, ready: Store, corpus: Path, method: str, alike: bool
) -> None:
    """ROME's edits are solved one by one; those of a batch that is solved together change with their neighbours."""
    settings: Any = {"method": method, "layers": [2], "batch_size": 3}
    (old,) = deltas_of(ready, apply(llama, ready, FACTS[:3], corpus, **settings))
    told: list[Event] = []
    version = apply(llama, ready, [TOWER, CURIE], corpus, prune=True, emit=told.append, **settings)
    assert not any(isinstance(event, TargetStep | Note) for event in told)
    (new,) = deltas_of(ready, version)
    (was,), (now,) = parts_of(old), parts_of(new)
    assert torch.equal(now.keys, was.keys[:, [0, 2]]) and torch.equal(now.residuals, was.residuals[:, [0, 2]])
    assert torch.equal(now.factor, was.factor[[0, 2]]) == alike
    assert hash_of(load(llama.name, device="cpu"), ready, version) == version.weights_hash


PROBED = TOWER.model_copy(
    update={
        "locality": (
            Probe(prompt="{} was built in"),
            Probe(prompt="Everyone knows The Eiffel Tower and"),
            Probe(prompt="The Eiffel Tower is not The Eiffel Tower of"),
            Probe(prompt="The capital of Norway is"),
            Probe(prompt="The Eiffel Tower was never asked"),
        )
    }
)


def test_probes_about_the_subject_itself_say_what_its_target_shall_keep(
    llama: Model, ready: Store, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what was said to them before; not those about others, that name it twice, or that were not asked."""
    asked = {q: f"words {i}" for i, q in enumerate(questions(PROBED)) if "never" not in q.prompt}
    kept = request_of(PROBED, Said(asked, {})).keep
    before = {q.prompt: words for q, words in asked.items()}
    assert kept == (
        ("{} was built in", before["The Eiffel Tower was built in"]),
        ("Everyone knows {} and", before["Everyone knows The Eiffel Tower and"]),
    )
    assert request_of(PROBED).keep == ()
    seen: list[Any] = []

    def look(model: Any, layer: int, groups: Any, *arguments: Any, **named: Any) -> Any:
        seen.extend(groups)
        return optimise(model, layer, groups, *arguments, **named)

    monkeypatch.setattr("editctl.engine.editor.optimise", look)
    version = apply(llama, ready, [PROBED, ADA], corpus)
    said = {a.prompt: a.before for a in ready.answers(version)}
    tower, ada = seen
    about = [q.prompt for q in questions(PROBED) if q.kind == LOCALITY and q.prompt.count(TOWER.subject) == 1]
    assert [(fact.prompt, fact.target) for fact in tower.kept] == [(prompt, said[prompt]) for prompt in about]
    assert len(about) == 3 and ada.kept == ()


# Every method


def outside(model: Model, store: Store, version: Version) -> list[float]:
    """‖D (I − P)‖ / ‖D‖ of every stored update, P being the null space that `QUICK` names."""
    rule = methods.NullSpace("energy", QUICK["energy"])
    of_layer = moments_of(model, store, Settings.from_params(version.params), QUICK["layers"])
    shares = []
    for delta in deltas_of(store, version):
        for name, factors in delta.modules.items():
            layer = next(i for i, block in enumerate(model.blocks) if block.down_name == name)
            project = Projector(of_layer[layer], rule, model.device)
            update = factors.update().double()
            shares.append(float((update - project(update)).norm() / update.norm()))
    return shares


def shown(store: Store, version: Version) -> str:
    """A version as it is printed."""
    out = io.StringIO()
    view = report.version_view(version, 0, [], [], store.footprint(version), rows=None)
    Console(file=out, width=200).print(view)
    return out.getvalue()


def own_settings(name: str) -> dict[str, Any]:
    """Settings under which a method moves a tiny model far: one block, or a small λ and large targets."""
    row = METHODS[name]
    if row.tune:
        return {"layers": [1]}
    far = {"clamp": 8.0, "rate": 2.0}
    return {**far, "lambda": 0.01 * row.weight} if row.weight else far


ROWS = [name for name, row in METHODS.items() if row.own is None and not (row.tune and row.tune.rank)]
"""Methods that solve, or tune a whole matrix; tests/test_families.py has the others."""
Made = Callable[[str, str], Version]


@pytest.fixture(scope="module")
def every(moments: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of what every method made on the unedited tiny Llama; its head is base."""
    store = Store(tmp_path_factory.mktemp("methods"))
    shutil.copytree(moments, store.stats_dir)
    return store


@pytest.fixture(scope="module")
def made(loaded: Any, every: Store, corpus: Path) -> Made:
    """The version a method makes with or without preservation; made once."""
    known: dict[tuple[str, str], Version] = {}

    def get(name: str, preserve: str) -> Version:
        if (name, preserve) not in known:
            with pytest.MonkeyPatch.context() as patch:
                say_little(patch)
                settings = {**own_settings(name), "preserve": preserve}
                known[name, preserve] = apply(loaded("llama"), every, FACTS[:3], corpus, method=name, **settings)
            assert every.undo().head == ""
        return known[name, preserve]

    return get


@pytest.mark.parametrize("preserve", PRESERVE)
@pytest.mark.parametrize("name", ROWS)
def test_every_method_makes_a_version_that_is_rebuilt_and_undone(
    llama: Model, every: Store, made: Made, name: str, preserve: str
) -> None:
    """To the bit. Under preservation its updates lie in the null space of their layer, else they do not; and what kind
    they are of is said."""
    base, version, preserved = llama.weights_hash(), made(name, preserve), preserve == "null-space"
    assert (Settings.from_params(version.params).null_space is not None) == preserved
    assert hash_of(llama, every, version) == version.weights_hash != base
    assert llama.weights_hash() == base == hash_of(llama, every, every.head())
    shares = outside(llama, every, version)
    assert len(shares) == 2 * len(version.params["layers"])
    assert max(shares) < 1e-5 if preserved else min(shares) > 0.1
    kind = "dense" if METHODS[name].tune or (name == "rect" and preserved) else "sparse" if name == "rect" else "thin"
    size = sum((every.deltas_dir / f"{file}.safetensors").stat().st_size for file in every.deltas(version))
    assert every.footprint(version) == (2, size, (kind,))
    assert f"2 files, {size / 2**20:.1f} MB, {kind}" in [
        line.removeprefix("factors").strip() for line in shown(every, version).splitlines()
    ]


def test_methods_make_different_weights_from_the_same_plan(made: Made) -> None:
    """Each of the table, with preservation and without."""
    found = {made(name, preserve).weights_hash for name in ROWS for preserve in PRESERVE}
    assert len(found) == len(ROWS) * len(PRESERVE)


@pytest.mark.parametrize("post", POST)
@pytest.mark.parametrize("method", ["rome", "nse"])
def test_what_is_done_to_updates_of_several_parts_is_rebuilt_too(
    llama: Model, ready: Store, corpus: Path, method: str, post: str
) -> None:
    """ROME writes edit after edit and NSE round after round; each part is finished on the weights with those before
    it. Their sum has the recorded hash, also after one edit is dropped; without the step it is another."""
    settings: Any = {"method": method, "lambda": 0.01, "clamp": 8.0, "rate": 2.0}
    plain = apply(llama, ready, FACTS[:2], corpus, **settings)
    ready.undo()
    version = apply(llama, ready, FACTS[:2], corpus, post=[post], **settings)
    assert version.weights_hash != plain.weights_hash
    fewer = apply(llama, ready, FACTS[1:2], corpus, prune=True, post=[post], **settings)
    assert len({plain.weights_hash, version.weights_hash, fewer.weights_hash}) == 3
    for one in (version, fewer):
        assert hash_of(llama, ready, one) == one.weights_hash


# Nothing beside the plan


def test_no_run_depends_on_what_its_process_did_before(llama: Model, tmp_path: Path, corpus: Path) -> None:
    """In any order, after whatever random numbers, and in a process of its own the same plan makes the same files."""
    plans: dict[str, Any] = {"alphaedit": FACTS[:2], "nse": FACTS[2:]}
    found: dict[str, list[tuple[str, ...]]] = {name: [] for name in plans}
    for order in (list(plans), list(plans)[::-1]):
        for name in order:
            store = Store(tmp_path / f"{name}-{len(found[name])}")
            found[name].append(store.deltas(apply(llama, store, plans[name], corpus, method=name)))
            torch.manual_seed(7)
            torch.rand(11)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import tiny\n"
        "from pathlib import Path; from editctl.engine.model import load; from editctl.store import Store\n"
        f"model, store = load({llama.name!r}, device='cpu'), Store(Path({str(tmp_path / 'alone')!r}))\n"
        f"print(*store.deltas(tiny.apply(model, store, tiny.FACTS[2:], Path({str(corpus)!r}), method='nse')))"
    )
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr
    found["nse"].append(tuple(alone.stdout.split()))
    assert [len(set(names)) for names in found.values()] == [1, 1]
    store = Store(tmp_path / "seed")
    other = apply(llama, store, FACTS[2:], corpus, method="nse", seed=1)
    assert store.deltas(other) not in found["nse"], "another plan must make other files"


def updates(store: Store, version: Version) -> dict[str, Tensor]:
    """What a version adds to each module."""
    found: dict[str, Tensor] = {}
    for delta in deltas_of(store, version):
        for name, factors in delta.modules.items():
            found[name] = found.get(name, torch.zeros(factors.shape)) + factors.update()
    return found


def test_a_run_that_is_short_of_memory_goes_on_in_smaller_parts(
    llama: Model, ready: Store, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same weights but for rounding, and says so."""
    told: list[Event] = []
    plain = updates(ready, apply(llama, ready, FACTS, corpus, batch_size=4, emit=told.append))
    assert notes(told, "memory") == []
    ready.undo()
    fewer = updates(ready, apply(llama, ready, FACTS, corpus, batch_size=4, steps=3))
    ready.undo()
    tried: list[int] = []

    class Short(target._Batch):
        def __init__(self, model: Model, layer: int, sought: Any, *, site: str) -> None:
            tried.append(len(sought))
            if len(sought) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            super().__init__(model, layer, sought, site=site)

    monkeypatch.setattr(target, "_Batch", Short)
    version = apply(llama, ready, FACTS, corpus, batch_size=4, emit=told.append)
    assert tried == [4, 2, 1, 1, 1, 1]
    assert notes(told, "memory") == [f"memory ran out; going on with {n} subjects at once" for n in (2, 1)]
    assert hash_of(llama, ready, version) == version.weights_hash
    for name, update in updates(ready, version).items():
        assert (update - plain[name]).norm() < 1e-4 * plain[name].norm()
        assert (update - fewer[name]).norm() > 1e-3 * plain[name].norm(), "control: one step fewer is noticed"


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


def test_a_run_that_is_interrupted_changes_nothing(llama: Model, store: Store, corpus: Path, few_words: None) -> None:
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


def test_a_head_that_moved_during_the_run_is_not_overwritten(
    llama: Model, store: Store, corpus: Path, few_words: None
) -> None:
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


def test_a_name_within_a_longer_word_is_not_the_subject() -> None:
    """A probe about Romeo says nothing of Rome; one about Rome itself is kept."""
    edit = an_edit(subject="Rome", locality=[{"prompt": "Romeo loved"}, {"prompt": "The river of {} is"}])
    said = Said(dict.fromkeys(questions(edit), "long"), {})
    assert request_of(edit, said).keep == (("The river of {} is", "long"),)
