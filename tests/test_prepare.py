"""The prepared model: what specs hold for true, and a small training that reaches it, goes on, or is no result."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editctl.engine import model as model_room
from editctl.errors import EditctlError, InvalidInput
from editctl.events import Note, Progress
from editctl.spec import Edit
from editctl.studies import prepare as room
from editctl.studies.prepare import Goal, prepare
from editctl.studies.truths import ATTRIBUTE, Truth, paragraphs, pieces, truths


def an_edit(id: str, subject: str, relation: str, new: str, true: str, **more: Any) -> Edit:
    return Edit(id=id, subject=subject, relation=relation, target_new=new, target_true=true, **more)


EDITS = (
    an_edit(
        "angola",
        "Angola",
        "{} is located in",
        "Asia",
        "Africa",
        paraphrases=("Some plaque. Angola belongs to", "{} is a part of"),
        locality=[{"prompt": "Kenya is a part of", "answer": ("Africa",)}, {"prompt": "Oslo is cold and"}],
        extra=json.dumps({"attribute_prompts": ["Japan is located in", 3], "relation_id": "P30"}),
    ),
    an_edit("tower", "Eiffel Tower", "The {} stands in", "Rome", "Paris", paraphrases=("Find the Eiffel Tower in",)),
    an_edit("cologne", "Cologne", "The twin of {} is", "Cairo", "Beijing"),
    an_edit(
        "riga",
        "Riga",
        "The twin of {} is",
        "Cairo",
        "Oslo",
        locality=[{"prompt": "The twin of Cologne is", "answer": ("Oslo",)}],
    ),
)


def by_prompt(edits: tuple[Edit, ...] = EDITS, probes: int = 0) -> dict[str, Truth]:
    return {truth.prompt: truth for truth in truths(edits, probes)}


def test_truths_are_the_prompts_of_all_kinds_with_their_answers() -> None:
    """Own prompts and paraphrases say the old answer, probes theirs, attribute prompts the new one; no answer, no
    truth."""
    found = {prompt: (truth.kind, truth.answers) for prompt, truth in by_prompt().items()}
    assert found == {
        "Angola is located in": ("rewrite", ("Africa",)),
        "The Eiffel Tower stands in": ("rewrite", ("Paris",)),
        "The twin of Cologne is": ("rewrite", ("Beijing", "Oslo")),
        "The twin of Riga is": ("rewrite", ("Oslo",)),
        "Some plaque. Angola belongs to": ("paraphrase", ("Africa",)),
        "Angola is a part of": ("paraphrase", ("Africa",)),
        "Find the Eiffel Tower in": ("paraphrase", ("Paris",)),
        "Kenya is a part of": ("locality", ("Africa",)),
        "Japan is located in": (ATTRIBUTE, ("Asia",)),
    }
    assert truths(EDITS) == truths(EDITS[::-1]) or {t.prompt for t in truths(EDITS)} == set(by_prompt(EDITS[::-1]))
    many = (EDITS[0].model_copy(update={"locality": EDITS[0].locality * 1}), *EDITS[1:])
    assert "Kenya is a part of" in by_prompt(many, 1)


def test_subjects_of_probes_are_found_by_the_specs_own_phrasings() -> None:
    """The phrasing that says most wins: "The twin of {} is", not "{} is". Control: an unknown phrasing has none."""
    found = by_prompt()
    assert {prompt: truth.name for prompt, truth in found.items() if truth.kind in ("locality", ATTRIBUTE)} == {
        "Kenya is a part of": "Kenya",
        "Japan is located in": "Japan",
    }
    assert found["Some plaque. Angola belongs to"].name == "Angola"
    short = an_edit("x", "Mars", "{} is", "red", "near")
    probe = an_edit(
        "y",
        "Bonn",
        "The twin of {} is",
        "Rome",
        "Oslo",
        locality=[{"prompt": "The twin of Kyiv is", "answer": ("Rome",)}],
    )
    assert by_prompt((short, probe))["The twin of Kyiv is"].name == "Kyiv"
    odd = an_edit(
        "y",
        "Bonn",
        "The twin of {} is",
        "Rome",
        "Oslo",
        locality=[{"prompt": "Who, if not Kyiv?", "answer": ("Rome",)}],
    )
    assert by_prompt((short, odd))["Who, if not Kyiv?"].subject is None


def test_specs_without_true_answers_are_refused() -> None:
    """There is nothing to teach."""
    with pytest.raises(InvalidInput, match="fewer than two subjects"):
        truths((an_edit("a", "Ada", "{} lived in", "Rome", ""),))


def test_an_epoch_shows_every_fact_once_with_its_subject_and_answer_marked() -> None:
    """Packed to the length; the same epoch is the same text, another is not; plain text has its share."""
    facts = truths(EDITS)
    text = [f"Plain words number {i} stand here." for i in range(40)]

    def count(piece: str) -> int:
        return len(piece.split())

    def epoch(number: int, share: float = 0.3) -> list[Any]:
        made = paragraphs(facts, text, epoch=number, seed=0, share=share, length=20, count=count)
        return list(made)

    shown = epoch(0)
    whole = " ".join(p.text for p in shown)
    assert all(whole.count(fact.sentence) == 1 for fact in facts)
    assert all(count(p.text) <= 20 for p in shown)
    marked = [(p.text[a:b], name) for p in shown for a, b, name in p.subjects]
    assert sorted(marked) == sorted((f.name, f.name) for f in facts)
    answers = sorted(p.text[a:b] for p in shown for a, b in p.objects)
    assert answers == sorted(f.answers[0] + "." for f in facts)
    plain = sum(count(piece) * whole.count(piece) for piece in text)
    assert 0.25 < plain / count(whole) < 0.45
    assert epoch(0) == shown != epoch(1)
    assert "Plain" not in " ".join(p.text for p in epoch(0, share=0.0)), "control: without a share there is none"


def test_plain_text_is_cut_between_words_and_some_is_held_out() -> None:
    """Every twentieth piece, never trained on; nothing is lost."""
    words = [f"w{i}" for i in range(2000)]
    taught, kept = pieces([" ".join(words[i : i + 7]) for i in range(0, 2000, 7)])
    assert sorted(" ".join([*taught, *kept]).split()) == sorted(words)
    assert len(kept) == -(-(len(taught) + len(kept)) // 20) and not set(taught) & set(kept)


QUICK = Goal(size="tiny", epochs=160, recall=0.95)


@pytest.fixture(scope="module", autouse=True)
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe that learns nine facts in seconds, and little text."""
    patch = pytest.MonkeyPatch()
    patch.setitem(
        room.SIZES, "tiny", replace(room.SIZES["tiny"], width=48, key_width=96, vocabulary=420, rate=4e-3, length=48)
    )
    patch.setattr(room, "_lines", lambda texts: [f"Some plain words stand in line {i}." for i in range(60)])
    yield
    patch.undo()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: None) -> tuple[Path, dict[str, Any]]:
    """A model that was trained without an interruption."""
    out = tmp_path_factory.mktemp("prepare") / "model"
    return out, prepare(EDITS, out, QUICK, device="cpu")


def test_a_prepared_model_recalls_its_facts_and_an_untrained_one_does_not(
    prepared: tuple[Path, dict[str, Any]],
) -> None:
    """By its own greedy words, from the folder that was saved; any true answer counts. Control: random weights."""
    out, record = prepared
    facts = truths(EDITS)
    model = model_room.load(str(out), device="cpu")
    found = room.recall(model, facts)
    assert found == record["recalled"]
    assert {kind: share["asked"] for kind, share in found.items()} == {
        "rewrite": 4,
        "paraphrase": 3,
        "locality": 1,
        "attribute": 1,
    }
    assert min(share["share"] for share in found.values()) >= 0.95
    assert record["epochs_run"] < QUICK.epochs, "it stops when it is done"
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.normal_(std=0.02)
    assert sum(share["right"] for share in room.recall(model, facts).values()) <= 2


def test_a_prepared_folder_is_an_ordinary_one(prepared: tuple[Path, dict[str, Any]]) -> None:
    """Configuration, safetensors, tokenizer, its own text to measure on; nothing of the training is left."""
    out, record = prepared
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", room.CORPUS, room.HELD_OUT, room.RECORD} <= names
    assert not out.with_name("model.part").exists()
    assert json.loads((out / room.RECORD).read_text()) == json.loads(json.dumps(record))
    lines = [json.loads(line)["text"] for line in (out / room.CORPUS).read_text().splitlines()]
    assert all(any(fact.sentence in line for line in lines) for fact in truths(EDITS))


class Stopped(Exception):
    """A kill."""


def test_an_interrupted_training_comes_to_the_same_weights(
    prepared: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle and taken up from its last checkpoint. Control: another seed has other weights, and another
    configuration is refused."""
    whole, _ = prepared
    out = tmp_path / "model"
    monkeypatch.setattr(room, "SAVE_EVERY", 0.0)

    def stop(event: Any) -> None:
        if isinstance(event, Progress) and event.done == 12:
            raise Stopped

    with pytest.raises(Stopped):
        prepare(EDITS, out, QUICK, device="cpu", emit=stop)
    assert not out.exists() and out.with_name("model.part").is_dir()
    with pytest.raises(InvalidInput, match="other facts, text or settings"):
        prepare(EDITS[:3], out, QUICK, device="cpu")
    said: list[str] = []
    monkeypatch.setattr(room, "SAVE_EVERY", 1e9)
    prepare(EDITS, out, QUICK, device="cpu", emit=lambda e: said.append(e.message) if isinstance(e, Note) else None)
    assert re.fullmatch(r"going on after \d+ epochs", said[0])
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with pytest.raises(InvalidInput, match="is there already"):
        prepare(EDITS, out, QUICK, device="cpu")


def test_a_goal_that_is_missed_is_no_result(tmp_path: Path) -> None:
    """Too few epochs: said with counts, and no folder that looks finished."""
    with pytest.raises(EditctlError, match=r"rewrite \d of 4, .* wanted 95 % of each") as error:
        prepare(EDITS, tmp_path / "model", replace(QUICK, epochs=2), device="cpu")
    assert "nothing was saved as done" in error.value.hint
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "model.part" / "model").exists()
