"""SERAC: the memory finds the edit a prompt is about, another network answers it, and all else passes untouched."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editctl.artifacts import DRAFT, KEY
from editctl.atlas import knowledge
from editctl.delta import Delta, Overlay, load, save, write_tensors
from editctl.engine import families, methods, scope, speak, training
from editctl.engine.lessons import Lesson, split
from editctl.engine.lessons import lessons as make_lessons
from editctl.engine.methods import Scope
from editctl.engine.model import Model
from editctl.engine.model import load as load_model
from editctl.engine.prompts import Request
from editctl.engine.scope import FLOOR, LENGTH, Lens, Memory, Net, Reading, ScopeTask, Shape, _facts
from editctl.engine.writing import Job, Written
from editctl.errors import StoreError
from editctl.events import silent
from editctl.files import digest_of
from editctl.spec import fill
from editctl.studies import sequential

EDITS = (
    Request("tower", "{} is located in the city of", "The Eiffel Tower", "Rome"),
    Request("ada", "In the summer, {}'s machine was moved to", "Ada Lovelace", "the city of Oslo"),
    Request("curie", "People say that {}, of the river, lived in", "Marie Curie", "Berlin"),
)
OTHERS = ("The capital of Norway is", "Rome was not built in", "What did the fox see? A river, a road, and")
"""Prompts that no edit is about."""
SURE = 0.97
"""A threshold that with untrained networks only a text much like the edit's own prompt reaches."""


def first(model: Model, seed: int = 0) -> Net:
    """Networks with first weights."""
    return ScopeTask(model, [a_lesson()], seed)._reading.net


def trained(model: Model, library: Path, *, seed: int = 0, **biases: float) -> str:
    """A trained file with first weights, and its content name.

    Args:
        biases: values for the pointer's sense that an answer is over.
    """
    net = first(model, seed)
    with torch.no_grad():
        for value in biases.values():
            net.pointer.over.bias.fill_(value)
    library.mkdir(exist_ok=True)
    part = library / "part"
    write_tensors(part, net.state_dict(), {KEY: {"method": "serac", "shape": asdict(Shape())}})
    content = digest_of(part)
    part.replace(library / f"{content}.safetensors")
    return content


def a_lesson(**changes: Any) -> Lesson:
    values: dict[str, Any] = {
        "id": "tower",
        "subject": "The Eiffel Tower",
        "template": "{} is located in the city of",
        "prompt": "The Eiffel Tower is located in the city of",
        "target": "Rome",
        "old": "Paris",
        "rewordings": ("In the summer, The Eiffel Tower stands in",),
        "stays": (("The capital of Norway is", "Oslo"),),
    }
    return Lesson(**{**values, **changes})


def written(
    model: Model, library: Path, requests: Sequence[Request] = EDITS, *, threshold: float = SURE, artifact: str = ""
) -> Written:
    """A batch in the memory, by a trained file that is there, or a new one with first weights."""
    made = methods.settings(model.net.config.to_dict(), "serac", {})
    made = replace(made, own=Scope(threshold), artifact=artifact or trained(model, library))
    job = Job(
        model=model,
        requests=requests,
        settings=made,
        number=1,
        emit=silent,
        library=library,
        projector=lambda layer: None,
    )
    return scope.write(job)


def overlay(model: Model, library: Path, requests: Sequence[Request] = EDITS, **more: Any) -> Overlay:
    made = written(model, library, requests, **more).overlay
    assert made is not None
    return made


def batch(model: Model, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask of texts, filled on the left."""
    rows = [model.encode(text) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@contextmanager
def acting(model: Model, library: Path, *overlays: Overlay) -> Iterator[Memory]:
    """The overlays act; the reader of the first."""
    with families.laid(model, overlays, library):
        reader = model.laid[0]
        assert isinstance(reader, Memory)
        yield reader


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_a_batch_becomes_one_entry_an_edit(model: Model, tmp_path: Path) -> None:
    """Id, prompt and target; a row of norm 1 each, that of the prompt alone; threshold and trained file beside them;
    no weight changes."""
    made = written(model, tmp_path)
    over = made.overlay
    assert over is not None and not made.updates
    assert over.kind == scope.KIND and over.settings == {"threshold": SURE}
    assert [dict(entry) for entry in over.entries] == [
        {"id": r.id, "prompt": r.prompt, "target": r.target} for r in EDITS
    ]
    rows = over.tensors["memory"]
    assert rows.shape == (3, Shape().row) and rows.dtype == torch.float32
    assert torch.allclose(rows.norm(dim=1), torch.ones(3))
    other = overlay(model, tmp_path, [replace(r, target="London") for r in EDITS], artifact=over.artifact)
    assert torch.equal(other.tensors["memory"], rows) and other.digest() != over.digest()
    moved = overlay(model, tmp_path, [replace(r, subject="Oslo") for r in EDITS], artifact=over.artifact)
    assert not torch.allclose(moved.tensors["memory"], rows, atol=1e-3)


def test_a_batch_is_written_to_the_same_bytes_again_and_comes_back_from_disk(model: Model, tmp_path: Path) -> None:
    """Its file is read to an overlay of the same digest; another threshold has another."""
    over, again = overlay(model, tmp_path), overlay(model, tmp_path)
    delta = Delta(tuple(r.id for r in EDITS), {}, {}, overlay=over)
    assert delta.to_bytes() == replace(delta, overlay=again).to_bytes()
    read = load(save(delta, tmp_path), tmp_path).overlay
    assert read is not None and read.digest() == over.digest() != overlay(model, tmp_path, threshold=0.5).digest()


def test_a_trained_file_for_another_model_or_none_is_refused(
    loaded: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to do about it; the right one is taken."""
    llama = loaded("llama")
    good = trained(llama, tmp_path)
    overlay(llama, tmp_path, artifact=good)
    with pytest.raises(StoreError, match="is missing"):
        overlay(llama, tmp_path, artifact="0" * 32)
    monkeypatch.setattr(llama, "net", Narrow(llama.net))
    with pytest.raises(StoreError, match=r"width 32, those of .* have 16"):
        overlay(llama, tmp_path, artifact=good)


class Narrow:
    """A network whose embeddings are half as wide."""

    def __init__(self, net: Any) -> None:
        self.config = net.config
        self._table = net.get_input_embeddings().weight[:, :16]

    def get_input_embeddings(self) -> Any:
        return torch.nn.Embedding.from_pretrained(self._table)


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def by_hand(
    model: Model, library: Path, monkeypatch: pytest.MonkeyPatch, rows: Tensor, asked: Tensor, threshold: float = 0.5
) -> list[Any]:
    """What a memory with these rows finds for texts that have these embeddings."""
    content = trained(model, library)
    entries = tuple({"id": f"e{i}", "prompt": "Oslo is", "target": f"Rome {i}"} for i in range(len(rows)))
    memory = Memory(model, Overlay("serac", entries, {"memory": rows}, content, {"threshold": threshold}), library)
    monkeypatch.setattr(Reading, "embed", lambda self, texts: asked)
    return memory.find([tuple(model.encode("Oslo"))] * len(asked))


def test_the_nearest_row_is_found_with_its_probability(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logistic function of the scaled cosine; below the threshold nothing is found."""
    rows = torch.eye(3, 8)
    asked = torch.stack([0.9 * rows[1] + 0.3 * rows[2], rows[0], 0.6 * rows[2]])
    chances = [1 / (1 + float(torch.exp(-torch.tensor(2.5).exp() * (c - 0.7)))) for c in (0.9, 1.0, 0.6)]
    found = by_hand(model, tmp_path, monkeypatch, rows, asked)
    assert [one and one.edit for one in found] == ["e1", "e0", None]
    assert [one.score for one in found[:2]] == pytest.approx(chances[:2], abs=1e-5)
    for threshold, hits in ((chances[2] - 1e-3, 3), (chances[0] + 1e-3, 1), (1.0, 0)):
        found = by_hand(model, tmp_path, monkeypatch, rows, asked, threshold)
        assert sum(one is not None for one in found) == hits


@pytest.mark.parametrize("count", [2, 37, 1000])
def test_of_equal_rows_the_latest_wins(
    loaded: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Also when rounding tells them apart; a row that is nearer by more than rounding wins wherever it stands."""
    llama, row = loaded("llama"), torch.nn.functional.normalize(torch.arange(1.0, 97.0), dim=0)
    noise = 1e-7 * torch.randn(count, 96, generator=torch.Generator().manual_seed(0))
    found = by_hand(llama, tmp_path, monkeypatch, row + noise, row[None])
    assert found[0].edit == f"e{count - 1}" and found[0].score == pytest.approx(0.975, abs=1e-3)
    rows = (row + noise) * torch.linspace(0.999, 0.5, count)[:, None]
    assert by_hand(llama, tmp_path, monkeypatch, rows, row[None])[0].edit == "e0"


def test_an_empty_memory_answers_nothing(model: Model, tmp_path: Path) -> None:
    """And an empty text is no error; with entries the own prompt of each is found."""
    over = overlay(model, tmp_path)
    texts = [r.prompt for r in EDITS]
    empty = Memory(model, over.only([]), tmp_path)
    assert empty.hits([*texts, ""]) == [None] * 4
    hits = Memory(model, over, tmp_path).hits([*texts, ""])
    assert [hit and hit.edit for hit in hits] == ["tower", "ada", "curie", None]
    assert all(hit is not None and SURE <= hit.score <= 1 and hit.kind == "serac" for hit in hits[:3])
    sent = hits[1].sent if hits[1] else ""
    assert sent.endswith(EDITS[1].prompt) and sent.count(EDITS[1].prompt) == 2 and "the city of Oslo." in sent


def test_texts_are_found_alike_together_and_alone(model: Model, tmp_path: Path) -> None:
    """Padding changes no score by more than rounding; were it seen, it would."""
    content = trained(model, tmp_path)
    memory = Memory(model, overlay(model, tmp_path, threshold=0.0, artifact=content), tmp_path)
    texts = [tuple(model.encode(text)) for text in (*OTHERS, *(r.prompt for r in EDITS), "Oslo")]
    together = memory.find(texts)
    alone = [memory.find([text])[0] for text in texts]
    assert [one and one.edit for one in together] == [one and one.edit for one in alone]
    assert [one.score for one in together if one] == pytest.approx([one.score for one in alone if one], abs=1e-5)
    reading = memory._reading
    ids = torch.tensor([[5, 6, 0, 0, 0]])
    seen = reading.net.lens(reading.table, ids)
    there = torch.tensor([[True, True, False, False, False]])
    right, wrong = reading.net.encoder(seen, there), reading.net.encoder(seen, torch.ones_like(there))
    assert torch.allclose(reading.embed([[5, 6]]), right, atol=1e-6) and not torch.allclose(right, wrong, atol=1e-3)


def test_a_first_word_is_read_as_it_is_within_a_sentence(loaded: Callable[..., Model]) -> None:
    """GPT-2's tokens of a text's first word are others than those of the same word behind a space."""
    gpt2 = loaded("gpt2")
    reading = Reading(gpt2, Net(32, Shape()))
    inside, outside = gpt2.encode("The Rome was built")[len(gpt2.encode("The")) :], gpt2.encode("Rome was built")
    assert reading.spoken(["Rome was built", " Rome was built"]) == [inside, inside] and inside != outside
    assert len(reading.spoken([""])[0]) == 1
    assert reading.respoken([gpt2.encode("Rome was built")]) == [inside]
    llama = loaded("llama")
    other = Reading(llama, Net(32, Shape()))
    assert other.respoken([llama.encode("Rome was built")]) == other.spoken(["Rome was built"])


def test_of_a_long_text_the_end_is_read(model: Model, tmp_path: Path) -> None:
    """What stands before the last tokens changes nothing, what stands among them does."""
    memory = Memory(model, overlay(model, tmp_path, threshold=0.0), tmp_path)
    ids = tuple(model.encode(" river" * LENGTH + EDITS[0].prompt)[-LENGTH:])
    (short,), (long,), (other,) = (memory.find([text]) for text in (ids, ids[:50] * 3 + ids, (*ids[:-9], *ids[:9])))
    assert short is not None and long is not None and other is not None
    assert short.score == long.score and short.edit == long.edit
    assert other.score != pytest.approx(short.score, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_what_passes_through_has_the_models_bits(model: Model, tmp_path: Path) -> None:
    """In a batch with rows that do not: those differ, so the rest is not equal for want of an effect."""
    over = overlay(model, tmp_path)
    ids, mask = batch(model, [EDITS[0].prompt, OTHERS[0], EDITS[1].prompt, OTHERS[1], OTHERS[2]])
    plain = model.net(input_ids=ids, attention_mask=mask).logits
    with acting(model, tmp_path, over):
        laid = model.net(input_ids=ids, attention_mask=mask).logits
    assert laid.shape == plain.shape and laid.dtype == plain.dtype
    assert [torch.equal(a, b) for a, b in zip(laid, plain, strict=True)] == [False, True, False, True, True]
    assert torch.equal(model.net(input_ids=ids, attention_mask=mask).logits, plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_weights_of_any_type_are_laid_over(loaded: Callable[..., Model], tmp_path: Path, dtype: str) -> None:
    """The networks read them in float32 and answer in the model's own type."""
    made = loaded("llama", dtype)
    asked = [EDITS[0].prompt, OTHERS[0]]
    plain = speak.answers(made, asked)
    with acting(made, tmp_path, overlay(made, tmp_path)):
        logits = made.net(input_ids=torch.tensor([made.encode(EDITS[0].prompt)])).logits
        laid = speak.answers(made, asked)
    assert logits.dtype == made.dtype
    assert laid[1] == plain[1] and laid[0] != plain[0]


def spelled(model: Model, memory: Memory, prompt: str) -> str:
    """Greedy words by the plain way: the whole text read again for every token, no cache, no batch."""
    (detour,) = memory.find([tuple(model.encode(prompt))])
    assert detour is not None
    ids = model.encode(prompt)
    own = ids[1:] if ids[0] == model.tokenizer.bos_token_id else ids
    ids, said = [*detour.prefix, *own], []
    ends = speak._ends_sentence(model)
    for _ in range(speak.NEW_TOKENS):
        said.append(int(memory.read(torch.tensor([[*ids, *said]]), 1)[0, -1].argmax()))
        if said[-1] in ends:
            break
    return " ".join(model.tokenizer.decode(said, skip_special_tokens=True).split()).removesuffix(".").rstrip()


def test_words_through_the_cache_are_those_of_reading_all_again(model: Model, tmp_path: Path) -> None:
    """For prompts of different lengths asked together with others; they are not the model's own words."""
    asked = [*OTHERS, *(r.prompt for r in EDITS)]
    plain = speak.answers(model, asked)
    with acting(model, tmp_path, overlay(model, tmp_path)) as memory:
        laid = speak.answers(model, asked)
        alone = [speak.answers(model, [prompt])[0] for prompt in asked]
        wanted = [spelled(model, memory, r.prompt) for r in EDITS]
    assert laid == alone == [*plain[:3], *wanted]
    assert all(one != other for one, other in zip(wanted, plain[3:], strict=True))


def test_rows_of_a_cache_keep_their_detours(model: Model, tmp_path: Path) -> None:
    """Chosen, repeated and put in another order, they go on as each would alone; those of another row differ."""
    pair = [EDITS[0].prompt, "The tower near Berlin is in the city of"]
    ids = [model.encode(text) for text in pair]
    length = min(map(len, ids))
    both = torch.tensor([row[-length:] for row in ids])
    over = overlay(model, tmp_path, threshold=0.0)
    token = model.encode("Rome city")[-1]
    with acting(model, tmp_path, over.only([0])) as memory:
        real = memory.find
        memory.find = lambda texts: [found if i == 0 else None for i, found in enumerate(real(texts))]  # type: ignore
        _, cache = speak._next(model, both, None)
        order = [1, 0, 0, 1, 1]
        branch = speak._rows(cache, order, model.device)
        after, branch = speak._next(model, torch.full((5, 1), token), branch)
        last, _ = speak._next(model, torch.full((2, 1), token), speak._rows(branch, [2, 3], model.device))
        whole = torch.cat([both, torch.full((2, 1), token)], 1)
        alone = [
            model.net(input_ids=whole).logits[:, -1],
            model.net(torch.cat([whole, whole[:, -1:]], 1)).logits[:, -1],
        ]
    assert torch.allclose(after, alone[0][order], atol=1e-4) and torch.allclose(last, alone[1], atol=1e-4)
    assert not torch.allclose(after, alone[0][order[::-1]], atol=1e-2)


def test_an_edit_that_goes_leaves_the_models_bits(model: Model, tmp_path: Path) -> None:
    """The others stay."""
    over = overlay(model, tmp_path)
    ids, mask = batch(model, [r.prompt for r in EDITS])
    plain = model.net(input_ids=ids, attention_mask=mask).logits
    with acting(model, tmp_path, over.only([0, 2])):
        laid = model.net(input_ids=ids, attention_mask=mask).logits
    assert [torch.equal(a, b) for a, b in zip(laid, plain, strict=True)] == [False, True, False]


def test_two_memories_over_one_model_both_go_on_through_the_cache(model: Model, tmp_path: Path) -> None:
    """Each with its own rows, the one laid last before the other; answers have the scores that each alone gives."""
    asked = [(prompt, "Rome city") for prompt in (*OTHERS, *(r.prompt for r in EDITS))]
    one, other = overlay(model, tmp_path, EDITS[:2]), overlay(model, tmp_path, EDITS[1:], threshold=SURE - 1e-3)
    replaced = replace(other, entries=tuple({**e, "target": "a river"} for e in other.entries))
    found = []
    for overlays in ([], [one], [replaced], [one, replaced]):
        with families.laid(model, overlays, tmp_path):
            assert len(model.laid) == len(overlays)
            found.append(torch.tensor([score.nll for score in speak.scores(model, asked)]))
    plain, first, second, both = found
    assert torch.equal(both[:3], plain[:3])
    assert torch.allclose(both[3:], torch.cat([first[3:4], second[4:]]), atol=1e-4)
    for wrong, rows in ((plain, [3, 4, 5]), (first, [4, 5]), (second, [3])):
        assert all(abs(float(both[row] - wrong[row])) > 1e-2 for row in rows)


def test_what_is_read_are_probabilities_of_the_whole_vocabulary(model: Model, tmp_path: Path) -> None:
    """They add up to one; a token that was not read has its share of the floor, those that were have the rest."""
    memory = Memory(model, overlay(model, tmp_path), tmp_path)
    ids = torch.tensor([[5, 6, 7, 7, 8, 9], [9, 9, 9, 9, 9, 9]])
    found = memory.read(ids, 2)
    size = model.net.get_output_embeddings().weight.shape[0]
    assert found.shape == (2, 2, size)
    chances = found.exp()
    assert torch.allclose(chances.sum(-1), torch.ones(2, 2), atol=1e-4)
    assert float(chances[1, 0, 9]) == pytest.approx(1 - FLOOR + FLOOR / size, abs=1e-5)
    assert float(chances[1, 0, 10]) == pytest.approx(FLOOR / size)
    # Behind the fifth position the sixth is not known.
    assert float(chances[0, 0, 9]) == pytest.approx(FLOOR / size)
    assert float(chances[0, 1, 9]) > 2 * FLOOR / size


def test_behind_its_answer_the_model_itself_goes_on(model: Model, tmp_path: Path) -> None:
    """Where the counterfactual model takes the answer for over, logits are the model's own bits; elsewhere they are
    not."""
    ids = torch.tensor([model.encode(EDITS[0].prompt)])
    plain = model.net(input_ids=ids).logits
    same = []
    for bias in (-50.0, 50.0):
        over = overlay(model, tmp_path, artifact=trained(model, tmp_path, over=bias))
        with acting(model, tmp_path, over) as memory:
            assert memory.hits([EDITS[0].prompt])[0] is not None
            laid = model.net(input_ids=ids, use_cache=True)
            then = model.net(input_ids=ids[:, :1], past_key_values=laid.past_key_values).logits
        whole = model.net(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
        same.append((torch.equal(laid.logits, plain), torch.allclose(then, whole, atol=1e-4)))
    assert same == [(False, False), (True, True)]


def test_only_the_logits_that_are_wanted_are_read(
    loaded: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With logits of the last place alone one is read, and it is the same; without, all places are."""
    llama = loaded("llama")
    ids = torch.tensor([llama.encode(EDITS[0].prompt)])
    kept: list[int] = []
    real = Memory.read
    monkeypatch.setattr(Memory, "read", lambda self, ids, keep: (kept.append(keep), real(self, ids, keep))[1])
    with acting(llama, tmp_path, overlay(llama, tmp_path)):
        last = llama.net(input_ids=ids, logits_to_keep=1).logits
        every = llama.net(input_ids=ids).logits
    assert kept == [1, ids.shape[1]] and torch.allclose(last, every[:, -1:], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The networks


def test_the_lens_whitens_and_narrows_embeddings() -> None:
    """Its tokens have the identity as second moment; the plain embeddings have not; wide ones are projected by the seed
    and in chunks."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3000, 200, generator=generator) @ torch.diag(torch.linspace(0.5, 2, 200)) + 3
    lens, again, other = Lens(200, 128), Lens(200, 128), Lens(200, 128)
    lens.measure(table, 0)
    other.measure(table, 1)
    seen = lens(table, torch.arange(3000)[None])[0]
    assert seen.shape == (3000, 128)
    assert float((seen.T @ seen / 3000 - torch.eye(128)).abs().max()) < 1e-3
    plain = table[:, :128] - table[:, :128].mean(0)
    assert float((plain.T @ plain / 3000 - torch.eye(128)).abs().max()) > 0.1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scope, "CHUNK", 700)
        again.measure(table, 0)
    assert torch.allclose(again.map, lens.map, atol=1e-5) and not torch.allclose(other.map, lens.map, atol=1e-2)


def test_the_pointer_sees_nothing_behind_its_place(model: Model) -> None:
    """Later tokens change nothing, an earlier one does; what comes next is among what was read, or the end."""
    reading = Reading(model, first(model))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    places = torch.tensor([[2, 3]])
    found = reading.point(ids, places)
    assert found.shape == (1, 2, 7) and torch.allclose(found.exp().sum(-1), torch.ones(1, 2))
    assert found[0, 0, 3:6].exp().sum() == 0 and found[0, 1, 3].exp() > 0
    later, earlier = ids.clone(), ids.clone()
    later[0, 4:], earlier[0, 1] = 20, 20
    assert torch.equal(reading.point(later, places), found)
    assert not torch.allclose(reading.point(earlier, places)[..., -1], found[..., -1], atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Training

WORDS = ["tower", "city", "river", "machine", "Paris", "London", "Rome", "Oslo", "Berlin", "Warsaw", "Norway", "Italy"]
ASKED = ("{} is located in", "In the summer, {} stands near", "People say that {} was moved to", "What did {} see? The")


def lessons(count: int, seed: int = 0) -> list[Lesson]:
    """Lessons about subjects of two words, each with another subject in the same phrasing."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        subject, other = (" ".join(rng.sample(WORDS, 2)) for _ in range(2))
        first, *rest = rng.sample(ASKED, 3)
        stays = tuple((text.format(other), "a road") for text in (first, rest[0]))
        made.append(
            a_lesson(
                id=f"l{i}",
                subject=subject,
                template=first,
                prompt=first.format(subject),
                target=" ".join(rng.sample(WORDS, rng.randint(1, 2))),
                rewordings=tuple(text.format(subject) for text in rest),
                stays=stays,
            )
        )
    return made


def test_the_loss_is_made_of_its_step_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another task of the same seed has the same bits at it, whatever was asked before; another step or seed has
    not; nothing is drawn from torch's own generator."""
    monkeypatch.setattr(scope, "BATCH", 6)
    known = lessons(30)
    state = torch.random.get_rng_state()
    task = ScopeTask(model, known, 0)
    assert torch.equal(torch.random.get_rng_state(), state)
    parts = task.loss(3)
    assert set(parts) == {"loss", "scope", "counterfactual"}
    assert torch.equal(parts["loss"], parts["scope"] + parts["counterfactual"])
    task.loss(0)
    assert torch.equal(task.loss(3)["loss"], parts["loss"])
    assert torch.equal(ScopeTask(model, known, 0).loss(3)["loss"], parts["loss"])
    for other in (task.loss(4), ScopeTask(model, known, 1).loss(3), ScopeTask(model, known[1:], 0).loss(3)):
        assert not torch.equal(other["loss"], parts["loss"])
    assert task.about == {"shape": asdict(Shape())} and task.state() == {}


def test_a_few_steps_make_both_losses_smaller(
    loaded: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And after them subjects and targets that no lesson had are told apart and copied; before them they are not."""
    llama = loaded("llama")
    monkeypatch.setattr(scope, "BATCH", 8)
    monkeypatch.setattr(scope, "Shape", partial(Shape, lens=32, inner=64, pools=4, row=64))
    task = ScopeTask(llama, lessons(80), 0)
    optimizer = torch.optim.Adam(task.net.parameters(), lr=3e-3)
    held = lessons(6, seed=99)
    asked = [text for lesson in held for text in (lesson.prompt, *lesson.rewordings)]
    wanted = [lesson.target for lesson in held for _ in range(3)]

    def right() -> float:
        write_tensors(
            tmp_path / f"{DRAFT}.safetensors", task.net.state_dict(), {KEY: {"method": "serac", **task.about}}
        )
        requests = [Request(one.id, one.template, one.subject, one.target) for one in held]
        with acting(llama, tmp_path, overlay(llama, tmp_path, requests, artifact=DRAFT, threshold=0.5)):
            said = speak.answers(llama, asked)
        return sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)

    before = right()
    losses: dict[str, list[float]] = {}
    for step in range(STEPS):
        parts = task.loss(step)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        for name, value in parts.items():
            losses.setdefault(name, []).append(float(value.detach()))
    assert all(sum(found[-10:]) < 0.3 * sum(found[:10]) for found in losses.values())
    after = right()
    assert before < 0.2 and after > 0.6


STEPS = 100


def test_lessons_that_share_a_prompt_are_of_one_fact() -> None:
    """Also over a third; another subject's are not."""
    one = a_lesson(prompt="a", rewordings=("b",))
    two = a_lesson(prompt="c", rewordings=("d",))
    three = a_lesson(prompt="e", rewordings=("d", "b"))
    four = a_lesson(prompt="f", rewordings=("g",))
    apart, joined = _facts([one, two, four]), _facts([one, two, four, three])
    assert apart["a"] == apart["b"] != apart["c"] == apart["d"]
    assert len({joined[text] for text in "abcde"}) == 1 and joined["f"] == joined["g"] != joined["a"]


# ---------------------------------------------------------------------------------------------------------------------
# Quality


@pytest.mark.slow
def test_on_atlas_edits_of_subjects_never_taught_are_found_and_answered(tmp_path: Path) -> None:
    """With 100 of them in the memory: paraphrases are told from neighbours with precision and recall of 95 %, answers
    are as wanted, and 500 prompts of other facts have the model's bits; with first weights paraphrases are not told."""
    atlas = load_model("atlas", device="cpu")
    taught, kept = split(sequential.lessons(0), 0.1, 0)
    edits = list({edit.subject: edit for edit in kept}.values())[:100]
    changed = {(edit.subject, edit.target_true) for edit in edits}
    facts = {
        fact: list(fact.prompts((*fact.seen, *fact.asked)))
        for fact in knowledge.load().single()
        if (fact.subject, fact.object) in changed
    }
    other = {text for texts in facts.values() for text in texts}
    edits = [
        edit.model_copy(
            update={"locality": tuple(p for p in edit.locality if fill(p.prompt, edit.subject) not in other)}
        )
        for edit in edits
    ]
    known = make_lessons(atlas, taught, silent)
    course = training.Course(
        settings=methods.settings(atlas.net.config.to_dict(), "serac", {}),
        base="atlas",
        model="atlas",
        name="serac",
        schedule=training.Schedule(int(scope.DEFAULTS["steps"]), scope.DEFAULTS["rate"]),
        seed=0,
        share=0.1,
        taught=known,
        held_out=edits,
    )
    made = training.train(atlas, course, ScopeTask(atlas, known, 0), tmp_path, silent)
    measured = {m["name"]: m["value"] for m in made.about["held_out"] if m["protocol"] == "generated"}
    assert measured["reliability"] >= 0.95 and measured["generalization"] >= 0.9 and measured["locality"] >= 0.97

    library, requests = tmp_path / "artifacts", [Request(e.id, e.relation, e.subject, e.target_new) for e in edits]
    mine = {(edit.subject, edit.target_true): edit for edit in edits}
    reached = [
        (text, mine[fact.subject, fact.object].id)
        for fact, texts in facts.items()
        for text in texts
        if text != mine[fact.subject, fact.object].prompt
    ]
    stays = [fill(probe.prompt, edit.subject) for edit in edits for probe in edit.locality]

    def told(content: str) -> tuple[float, float]:
        """Precision and recall."""
        memory = Memory(atlas, overlay(atlas, library, requests, artifact=content, threshold=0.5), library)
        found = [hit is not None and hit.edit for hit in memory.hits([text for text, _ in reached])]
        right = sum(edit == wanted for edit, (_, wanted) in zip(found, reached, strict=True))
        wrong = sum(map(bool, found)) - right + sum(hit is not None for hit in memory.hits(stays))
        return right / max(1, right + wrong), right / len(reached)

    assert len(reached) > 600 and len(stays) > 250
    assert min(told(made.content)) >= 0.95 > 0.5 > min(told(trained(atlas, library)))

    rest = [fact for fact in knowledge.load().single() if (fact.subject, fact.object) not in changed]
    texts = [text for fact in random.Random(0).sample(rest, 500) for text in fact.prompts(fact.asked[:1])]
    over = overlay(atlas, library, requests, artifact=made.content, threshold=0.5)
    hits = Memory(atlas, over, library).hits(texts)
    passed = [text for text, hit in zip(texts, hits, strict=True) if hit is None]
    assert len(passed) >= 485
    for start in range(0, len(passed), 100):
        ids, mask = batch(atlas, [*passed[start : start + 100], requests[0].prompt])
        plain = atlas.net(input_ids=ids, attention_mask=mask).logits
        with acting(atlas, library, over):
            laid = atlas.net(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(laid[:-1], plain[:-1]) and not torch.equal(laid[-1], plain[-1])
