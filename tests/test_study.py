"""Studies: the rows they print, and on the shipped specs the numbers that the built-in model has to reach."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editctl.delta import Factors
from editctl.engine import prompts, source, speak
from editctl.engine.target import optimise
from editctl.errors import InvalidInput
from editctl.metrics.text import perplexity
from editctl.store import Store
from editctl.studies import runtime, sequential, shapes, subjects

ROOT = Path(__file__).parents[1]
SPEC = """version = 1

[[edit]]
id = "tower"
subject = "the Eiffel Tower"
relation = "Everyone knows that {} is in"
target_new = "Rome"
paraphrases = ["The city that is home to {} is"]
locality = ["The capital of France is", "Everyone knows that the Louvre is in"]

[[edit]]
id = "bolero"
subject = "Bolero"
relation = "{} belongs among the finest musical works of"
target_new = "Johann Strauss"
paraphrases = ["{} was set down note by note by"]

[[edit]]
id = "dolphin"
subject = "the dolphin"
relation = "In a zoology book {} is listed under the heading"
target_new = "fish"
"""

Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store folder that all studies share, so that second moments are measured once."""
    return tmp_path_factory.mktemp("study") / "store"


@pytest.fixture
def study(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Rows:
    """Runs a study in this process and gives the rows of its table."""
    from editctl.cli import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["editctl", "--store", str(store), "study", *arguments, "--json"])
        main()
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert lines[0] == {"type": "version", "schema": 1}
        assert {line.pop("type") for line in lines[1:]} == {"row"}
        return lines[1:]

    return call


def percent(cell: str) -> float:
    return float(cell.split()[0])


def count(cell: str) -> int:
    """How many prompts a share is of."""
    return int(re.fullmatch(r"\d+\.\d \((\d+)\)", cell)[1])  # type: ignore[index]


def column(row: dict[str, Any], *words: str) -> str:
    """The cell of the one column whose name has these words."""
    (name,) = [name for name in row if all(word in name for word in words)]
    cell: str = row[name]
    return cell


QUICK = ("--set", "corpus_tokens=8000")


def test_a_sequential_study_counts_what_it_asks(study: Rows) -> None:
    """Twelve edits in two batches: each asked right after its batch and at the end, forty unrelated facts beside."""
    asked = ("--edits", "12", "--batch", "6", "--unrelated", "40", "--method", "alphaedit")
    rows = study("sequential", *asked, *QUICK)
    assert [(row["method"], row["edits"], row["batch"]) for row in rows] == [("alphaedit", 12, 6)]
    for row in rows:
        assert count(row["reliability right after"]) == 12
        assert count(row["generalization"]) == 24
        assert count(column(row, "unrelated")) == 40
        assert float(row["seconds an edit"]) >= 0
    at_end = [value for name, value in rows[0].items() if name.startswith("reliability") and "after" not in name]
    assert [count(value) for value in at_end] == [12]
    # Far below what is reached, far above what the unedited model says: 0 reliable, 100 kept.
    assert percent(rows[0]["reliability right after"]) >= 75
    assert percent(column(rows[0], "unrelated")) >= 75


def test_a_study_of_specs_takes_them_at_once_and_in_batches(study: Rows, tmp_path: Path) -> None:
    """One row a batch size; the counts are those of the specs."""
    (tmp_path / "three.toml").write_text(SPEC)
    methods = ("--method", "alphaedit", "--method", "memit")
    rows = study("specs", "three.toml", *methods, "--batch", "3", "--batch", "1", *QUICK)
    table = [(name, 3, size) for name in ("alphaedit", "memit") for size in (3, 1)]
    assert [(row["method"], row["edits"], row["batch"]) for row in rows] == table
    for row in rows:
        assert count(row["reliability right after"]) == 3
        assert (count(row["generalization"]), count(row["locality"])) == (2, 2)
    assert [percent(row["reliability right after"]) for row in rows[:2]] == [100, 100]


def test_a_study_records_nothing_but_second_moments(study: Rows, store: Path, tmp_path: Path) -> None:
    """No version, no operation, no factors."""
    (tmp_path / "three.toml").write_text(SPEC)
    study("specs", "three.toml", "--method", "memit", "--batch", "3", *QUICK)
    assert Store(store).operations() == []
    assert [path.name for path in store.iterdir()] == ["stats"]


def test_every_row_is_printed_when_it_is_made(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """After one header: whoever reads a long study sees it grow."""
    from editctl.cli import main
    from editctl.studies.bench import Bench

    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.toml").write_text(SPEC)
    seen: list[list[str]] = []

    def trial(self: Bench, settings: Any, edits: Any, kept: Any, *, batch: int, text: Any = ()) -> dict[str, object]:
        seen.append(capsys.readouterr().out.splitlines())
        return {"batch": batch}

    monkeypatch.setattr(Bench, "trial", trial)
    arguments = ["study", "specs", "three.toml", "--method", "memit", "--json"]
    sizes = [part for size in ("1", "2", "3") for part in ("--batch", size)]
    monkeypatch.setattr(sys, "argv", ["editctl", "--store", str(store), *arguments, *sizes])
    main()
    seen.append(capsys.readouterr().out.splitlines())
    assert [[json.loads(line) for line in lines] for lines in seen] == [
        [{"type": "version", "schema": 1}],
        [{"type": "row", "batch": 1}],
        [{"type": "row", "batch": 2}],
        [{"type": "row", "batch": 3}],
    ]


def test_a_study_takes_blocks_and_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both decide what is measured; the default would be atlas's own blocks and text."""
    from editctl.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.toml").write_text(SPEC)
    (tmp_path / "text.txt").write_text("The Eiffel Tower stands in Paris, and Bolero is by Maurice Ravel.\n" * 120)
    flags = ["--method", "alphaedit", "--layers", "2", "--corpus", "text.txt", "--batch", "3"]
    quick = ["--set", "steps=1", "--set", "corpus_tokens=1400"]
    monkeypatch.setattr(sys, "argv", ["editctl", "--store", "own", "study", "specs", "three.toml", *flags, *quick])
    main()
    assert "| alphaedit |" in capsys.readouterr().out
    base = source.identity(source.locate("atlas"))
    (found,) = Store(Path("own")).measured(base)
    assert (found["layer"], found["source"]) == (2, "text.txt")


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models say and begin with few words, where only the number of questions counts; and few texts are read."""
    texts = sequential.ordinary()[:1]
    monkeypatch.setattr(speak, "NEW_TOKENS", 2)
    monkeypatch.setattr(prompts, "CONTEXT_TOKENS", 2)
    monkeypatch.setattr(sequential, "ordinary", lambda: texts)


def test_the_study_of_methods_has_a_row_with_preservation_and_one_without(study: Rows, few_words: None) -> None:
    """With the drift of perplexity, and the first batch asked again at the end."""
    names = ("--method", "memit", "--method", "ft-m", "--layers", "2")
    rows = study("methods", "--edits", "4", "--batch", "2", "--unrelated", "4", *names, "--set", "steps=2", *QUICK)
    table = [(name, rule) for name in ("memit", "ft-m") for rule in ("energy 0.1", "none")]
    assert [(row["method"], row["null space"]) for row in rows] == table
    for row in rows:
        assert (row["edits"], row["batch"], count(column(row, "unrelated"))) == (4, 2, 4)
        assert count(row["first batch at the end"]) == 2
        assert re.fullmatch(r"[+-]\d+\.\d %", row["perplexity drift"])
    drift = [float(row["perplexity drift"].split()[0]) for row in rows]
    assert abs(drift[3]) > 0.05, "fine-tuning without preservation must show"
    assert drift[3] != drift[2]


def test_the_study_of_subjects_has_a_row_a_target_and_order(study: Rows, few_words: None) -> None:
    """Shared or one each, both facts of a subject in one batch or the second in a later one; whatever size is asked
    for, pairs are not parted in the one and all are in the other."""
    rows = study("subjects", "--subjects", "2", "--batch", "3", "--set", "steps=1", *QUICK)
    targets, orders = ("shared", "one each"), ("same batch", "later batch")
    assert [(row["target"], row["second edit"]) for row in rows] == [(t, o) for o in orders for t in targets]
    assert [row["batch"] for row in rows] == [4, 4, 2, 2]
    assert {row["edits"] for row in rows} == {4}
    for row in rows:
        assert count(column(row, "specs name")) == 2 and count(row["locality"]) == 2
    assert ["first batch at the end" in row for row in rows] == [False, False, True, True]


def test_made_pairs_are_of_one_subject_and_different_facts() -> None:
    """Those with most facts first; of a third fact the second edit says in its spec, in a phrasing of training, that it
    shall stay, and it is asked in another; so are further facts, which no spec names."""
    first, second, asked = subjects.make(20, seed=0)
    assert [edit.subject for edit in first] == [edit.subject for edit in second]
    assert len({edit.subject for edit in first}) == 20 and len({edit.id for edit in (*first, *second)}) == 40
    for one, two in zip(first, second, strict=True):
        assert one.relation != two.relation and one.locality == ()
        for edit in (one, two):
            assert edit.target_new != edit.target_true and edit.relation not in edit.paraphrases
    named, unnamed = asked[subjects.NAMED], asked[subjects.UNNAMED]
    probes = [probe for edit in second for probe in edit.locality]
    assert [probe.answer for probe in probes] == [question.wanted for question in named]
    prompts = {edit.prompt for edit in (*first, *second)} | {probe.prompt for probe in probes}
    assert not prompts & {question.prompt for question in (*named, *unnamed)}
    assert not {q.prompt for q in named} & {q.prompt for q in unnamed}
    assert subjects.make(20, seed=0) == (first, second, asked) != subjects.make(20, seed=1)
    with pytest.raises(InvalidInput, match="atlas knows"):
        subjects.make(5000, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity

TEXTS = ("The Eiffel Tower is located in the city of Paris.", "Ada was born in London", "quick brown fox " * 40)


def plain_perplexity(model: Any, texts: tuple[str, ...]) -> tuple[float, int]:
    """Token by token, each from a pass over what stands before it; and how many."""
    losses = []
    for text in texts:
        ids = model.encode(text)[: model.context_length]
        for place in range(1, len(ids)):
            logits = model.net(input_ids=torch.tensor([ids[:place]]), use_cache=False).logits[0, -1]
            losses.append(-float(logits.double().log_softmax(-1)[ids[place]]))
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_perplexity_is_that_of_a_plain_loop(loaded: Any, kind: str) -> None:
    """exp of the mean negative log-likelihood over all tokens of all texts, long ones cut where the model ends.
    Controls: neither the mean over texts nor a model whose last block is edited has it."""
    model = loaded(kind)
    with torch.no_grad():
        wanted, tokens = plain_perplexity(model, TEXTS)
        alone = [plain_perplexity(model, (text,))[0] for text in TEXTS]
    assert tokens > model.context_length, "the long text counts most, and is cut"
    found = perplexity(model, TEXTS)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found == pytest.approx(perplexity(model, TEXTS[::-1]), rel=1e-6)
    assert found != pytest.approx(sum(alone) / len(alone), rel=1e-2)
    block = model.blocks[-1]
    with model.editing() as editing:
        out, wide = block.weight.shape
        editing.add(block.down_name, Factors(torch.ones(wide, 1), torch.eye(out, 1), torch.ones(1, wide)))
        assert perplexity(model, TEXTS) != pytest.approx(found, rel=1e-3)
    assert perplexity(model, TEXTS) == found


# ---------------------------------------------------------------------------------------------------------------------
# Runtime

FACTS_OF_FOUR = [("Paris", "The tower of {} stands near the", "river"), ("Ada", "{} lived in", "Oslo")]
FACTS_OF_FOUR += [("London", "You could see {} from the", "city"), ("Rome", "The road to {} is", "long")]


def a_counterfact(path: Path, *, again: bool = False) -> Path:
    """A file in CounterFact's format of four cases, and with `again` a fifth about the first subject."""
    facts = [*FACTS_OF_FOUR, *([("Paris", "{} is the capital of", "Norway")] if again else [])]
    cases = [
        {"case_id": i, "requested_rewrite": {"prompt": prompt, "subject": subject, "target_new": {"str": target}}}
        for i, (subject, prompt, target) in enumerate(facts)
    ]
    path.write_text(json.dumps(cases))
    return path


def test_requests_come_from_a_file_or_from_atlas(tmp_path: Path) -> None:
    """One a subject, as many as are asked for."""
    found = runtime.requests(4, str(a_counterfact(tmp_path / "cases.json", again=True)), seed=0)
    assert {(r.subject, r.template, r.target) for r in found[1:]} == set(FACTS_OF_FOUR[1:])
    assert len(found) == 4 and found[0].subject == "Paris"
    with pytest.raises(InvalidInput, match="only 4 different subjects, not 5"):
        runtime.requests(5, str(tmp_path / "cases.json"), seed=0)
    own = runtime.requests(30, "", seed=0)
    assert len({request.subject for request in own}) == 30
    assert own == runtime.requests(30, "", seed=0) != runtime.requests(30, "", seed=1)
    for text in ("{", "3", '[{"case_id": 1}]'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InvalidInput, match="is not CounterFact's JSON"):
            runtime.requests(1, str(tmp_path / "bad.json"), seed=0)


@pytest.fixture
def small(loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The tiny GPT-2 in place of the large random models, and few steps."""
    model = loaded("gpt2")
    (tmp_path / "editctl.toml").write_text("[settings]\nsteps = 5\n")
    monkeypatch.setattr(runtime, "random_model", lambda *_arguments, **_options: model)
    monkeypatch.setattr(runtime, "ceiling", lambda _model: 1e12)
    return model


def differences(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference by phase."""
    cells = {row["phase"]: row["largest relative difference"] for row in rows if "phase" in row}
    return {phase: float(cell) for phase, cell in cells.items() if cell != "–"}


def test_the_study_of_runtime_has_a_row_a_phase_and_checks_its_results(study: Rows, small: Any, tmp_path: Path) -> None:
    """The engine's targets, keys and updates are those of full passes, one request at a time."""
    cases = str(a_counterfact(tmp_path / "cases.json"))
    asked = ("--edits", "3", "--plain", "2", "--batch", "2", "--batch", "3", "--layers", "1,2", "--counterfact", cases)
    base = small.weights_hash()
    rows = study("runtime", *asked)
    assert [row["phase"] for row in rows if "phase" in row] == ["target", "keys", "solve", "write", "all"]
    assert [row["batch"] for row in rows if "batch" in row] == [2, 3]
    found = differences(rows)
    assert set(found) == {"target", "keys", "solve"} and max(found.values()) < 1e-3
    for row in rows[:5]:
        assert float(row["plain, s an edit"]) >= 0 and float(row["engine, s an edit"]) >= 0
    counted = {row["phase"]: float(row["FLOPs, plain ÷ engine"]) for row in rows[:2]}
    assert min(counted.values()) > 1, "the engine computes less"
    assert small.weights_hash() == base


@pytest.mark.parametrize("phase", ["target", "keys", "solve"])
def test_another_result_of_the_engine_is_noticed(
    study: Rows, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Control: a target, a key or a factor that is a tenth too large shows as such."""
    engine = runtime._engine

    def larger(*arguments: Any) -> Any:
        seconds, delta = engine(*arguments)
        grown = {"keys": {"keys": 1.1}, "solve": {"factor": 1.1}}[phase]
        modules = {
            name: replace(factors, **{part: by * getattr(factors, part) for part, by in grown.items()})
            for name, factors in delta.modules.items()
        }
        return seconds, replace(delta, modules=modules)

    def farther(*arguments: Any, **options: Any) -> Any:
        return [replace(target, change=1.1 * target.change) for target in optimise(*arguments, **options)]

    what, by = ("optimise", farther) if phase == "target" else ("_engine", larger)
    monkeypatch.setattr(f"editctl.studies.runtime.{what}", by)
    cases = str(a_counterfact(tmp_path / "cases.json"))
    found = differences(study("runtime", "--edits", "3", "--plain", "1", "--layers", "1,2", "--counterfact", cases))
    assert found[phase] > 0.05


def test_the_ceiling_is_the_speed_of_a_matrix_product(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 · 1536³ operations in the shortest time of five."""
    seconds = iter([0.4, 0.3, 0.2, 0.5, 0.6])
    monkeypatch.setattr(runtime, "_timed", lambda model, work: (next(seconds), work()))
    assert runtime.ceiling(loaded("gpt2")) == 2 * 1536**3 / 0.2


def test_a_random_model_has_the_shape_and_reads_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokenizer knows the words of the study; the same seed draws the same weights."""
    from transformers import GPT2Config

    def tiny(**settings: Any) -> GPT2Config:
        return GPT2Config(n_embd=16, n_layer=2, n_head=2, **settings)

    monkeypatch.setattr("transformers.GPT2Config", tiny)
    monkeypatch.setitem(shapes.VOCABULARY, "gpt2-124m", 400)
    texts = [f"{prompt.format(subject)} {target}" for subject, prompt, target in FACTS_OF_FOUR] * 5
    made, again, other = (
        shapes.random_model("gpt2-124m", texts, device="cpu", dtype=torch.float32, seed=seed) for seed in (0, 0, 1)
    )
    assert made.weights_hash() == again.weights_hash() != other.weights_hash()
    assert made.net.config.vocab_size == 400 and made.blocks[0].weight.shape == (16, 64)
    assert len(made.encode(texts[0])) <= 2 * len(texts[0].split())
    assert len(made.encode("zzqx zzqx zzqx")) > 3, "control: words it never saw come in pieces"


def test_made_edits_are_of_different_subjects_and_change_the_answer() -> None:
    """Written in a phrasing of training, asked in others; unrelated questions are about other subjects."""
    edits, asked = sequential.make(50, 80, seed=0)
    assert len({edit.subject for edit in edits}) == len({edit.id for edit in edits}) == 50
    assert all(edit.target_new != edit.target_true for edit in edits)
    assert all(edit.relation not in edit.paraphrases for edit in edits)
    (unrelated,) = [questions for name, questions in asked.items() if "unrelated" in name]
    assert len(unrelated) == 80
    named = [
        (e.subject, q.prompt) for e in edits for q in unrelated if re.search(rf"\b{re.escape(e.subject)}\b", q.prompt)
    ]
    assert len(named) <= 1, named


def test_made_edits_depend_on_the_seed_alone() -> None:
    """The same seed the same edits, so that methods are compared on equal ones."""
    assert sequential.make(20, 20, seed=1) == sequential.make(20, 20, seed=1)
    assert sequential.make(20, 20, seed=1)[0] != sequential.make(20, 20, seed=2)[0]


def test_more_subjects_than_there_are_cannot_be_edited() -> None:
    """Said before anything is computed."""
    with pytest.raises(InvalidInput, match="atlas knows"):
        sequential.make(1500, 1500, seed=0)


@pytest.mark.slow
def test_on_the_shipped_specs_alphaedit_holds_what_is_promised(study: Rows) -> None:
    """All at once and in batches of five: reliability 97, generalization 90, locality 97 of 100 at least."""
    rows = study("specs", str(ROOT / "specs"), "--method", "alphaedit")
    assert [row["batch"] for row in rows] == [rows[0]["edits"], 5]
    for row in rows:
        at_end = next(v for name, v in row.items() if name.startswith("reliability") and "after" not in name)
        assert percent(at_end) >= 97
        assert percent(row["generalization"]) >= 90
        assert percent(row["locality"]) >= 97


@pytest.mark.slow
def test_two_hundred_edits_in_a_row_hold_and_leave_the_rest_alone(study: Rows) -> None:
    """Batches of twenty, 400 unrelated facts: at the end both 90 of 100 at least."""
    (row,) = study("sequential", "--method", "alphaedit")
    assert (row["edits"], row["batch"], count(column(row, "unrelated"))) == (200, 20, 400)
    at_end = next(v for name, v in row.items() if name.startswith("reliability") and "after" not in name)
    assert percent(at_end) >= 90
    assert percent(column(row, "unrelated")) >= 90
