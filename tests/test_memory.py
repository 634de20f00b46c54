"""Work in chunks: all of it is done and in order, in smaller pieces when memory runs out, and told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from editctl.engine import keys, target
from editctl.engine.keys import Stage, Staged
from editctl.engine.memory import in_chunks, ran_out
from editctl.engine.methods import TargetSettings
from editctl.engine.model import Model
from editctl.engine.prompts import Request, groups
from editctl.engine.target import Target, optimise
from editctl.errors import ModelError
from editctl.events import Event, Note, silent

ERRORS: dict[str, Callable[[], BaseException]] = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CUDA, silent": torch.OutOfMemoryError,
    "CPU": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    "CPU on Windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "MPS": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    "Python": MemoryError,
}
OTHERS = [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory"), KeyError("x")]


@pytest.fixture(autouse=True)
def no_sweeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep through all of torch's objects takes longer than all else here, and nothing here needs one."""
    monkeypatch.setattr("editctl.engine.memory.gc", SimpleNamespace(collect=lambda: 0))


def squares(most: int, error: Callable[[], BaseException], seen: list[int]) -> Callable[[Sequence[int]], list[int]]:
    """Work that runs out of memory for more than `most` items, and notes how many it was given."""

    def work(items: Sequence[int]) -> list[int]:
        seen.append(len(items))
        if len(items) > most:
            raise error()
        return [item**2 for item in items]

    return work


@pytest.mark.parametrize("name", ERRORS)
def test_running_out_of_memory_is_recognised(name: str) -> None:
    """On every device, with and without words."""
    assert ran_out(ERRORS[name]())


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    """And they pass through, at once and unchanged."""
    seen: list[int] = []
    assert not ran_out(error)
    with pytest.raises(type(error)) as caught:
        in_chunks(range(8), 4, squares(0, lambda: error, seen), silent, "subjects")
    assert caught.value is error and seen == [4]


@pytest.mark.parametrize(
    ("items", "size", "seen"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 5, [2]), (0, 5, []), (3, 1, [1, 1, 1])]
)
def test_chunks_hold_at_most_their_size_and_results_are_in_order(items: int, size: int, seen: list[int]) -> None:
    """Nothing is told when nothing runs out."""
    told: list[Event] = []
    found: list[int] = []
    work = squares(100, MemoryError, found)
    assert in_chunks(range(items), size, work, told.append, "subjects") == [i**2 for i in range(items)]
    assert found == seen and told == []


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize(
    ("items", "size", "most", "seen", "notes"),
    [
        (8, 8, 2, [8, 4, 2, 2, 2, 2], [4, 2]),
        (7, 5, 2, [5, 3, 2, 2, 2, 1], [3, 2]),
        (3, 32, 1, [3, 2, 1, 1, 1], [2, 1]),
    ],
)
def test_chunks_shrink_when_memory_runs_out(
    name: str, items: int, size: int, most: int, seen: list[int], notes: list[int]
) -> None:
    """By halves of what was tried, once told each time; what is done is not done again, and the order stays."""
    told: list[Event] = []
    found: list[int] = []
    result = in_chunks(range(items), size, squares(most, ERRORS[name], found), told.append, "subjects")
    assert result == [i**2 for i in range(items)]
    assert found == seen
    assert told == [Note(f"memory ran out; going on with {n} subjects at once") for n in notes]


def test_memory_may_run_out_late() -> None:
    """The results from before are kept, and only the piece that failed is tried again."""
    tried: list[list[int]] = []

    def work(items: Sequence[int]) -> list[int]:
        tried.append(list(items))
        if 6 in items and len(items) > 1:
            raise MemoryError
        return [item**2 for item in items]

    assert in_chunks(range(8), 4, work, silent, "subjects") == [i**2 for i in range(8)]
    assert tried == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5], [6, 7], [6], [7]]


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("items", [1, 5])
def test_one_item_too_large_is_an_error_with_its_reason(name: str, items: int) -> None:
    """It says what does not fit, why, and what to do; a single item is not tried twice."""
    seen: list[int] = []
    with pytest.raises(ModelError, match="one of the subjects alone: ") as caught:
        in_chunks(range(items), 4, squares(0, ERRORS[name], seen), silent, "subjects")
    reason = str(ERRORS[name]()) or type(ERRORS[name]()).__name__
    assert reason in str(caught.value) and "smaller dtype" in caught.value.hint
    assert seen == ([1] if items == 1 else [4, 2, 1])


def test_what_failed_is_let_go_before_the_next_try() -> None:
    """The traceback of the failed pass holds its tensors, so it must be gone."""
    held: list[bool] = []

    class Large:
        alive = 0

        def __init__(self) -> None:
            Large.alive += 1

        def __del__(self) -> None:
            Large.alive -= 1

    def work(items: Sequence[int]) -> list[int]:
        held.append(Large.alive > 0)
        large = Large()
        if len(items) > 1:
            raise MemoryError
        assert large
        return list(items)

    in_chunks(range(4), 4, work, silent, "subjects")
    assert len(held) > 4 and not any(held)


# In the rooms that use it


CONTEXTS = ("", "The dog ran away. ")
REQUESTS = (
    Request("tower", "{} is located in the city of", "The Eiffel Tower", "Rome"),
    Request("rome", "{} was not built in", "Rome", "London by night"),
    Request("ada", "In the summer, {}'s machine was moved to", "Ada Lovelace", "Berlin"),
    Request("curie", "People say that {}, of the river, lived in", "Marie Curie", "the city of Oslo"),
    Request("the", "{} is", "The", "a"),
)
SETTINGS = TargetSettings(steps=4, rate=0.5, clamp=1.5, decay=0.02, kl=0.0625, stop=0.0)


def scarce(room: Any, name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A room whose batches of more than `most` run out of memory."""
    made = getattr(room, name)

    def limited(model: Model, *args: Any, **kwargs: Any) -> Any:
        if len(next(value for value in args if isinstance(value, list))) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return made(model, *args, **kwargs)

    monkeypatch.setattr(room, name, limited)


def test_targets_are_the_same_when_memory_runs_out(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For more than two groups at once: within 1e-6, each in its place; and the user is told."""
    model, told = loaded("llama", "float64"), list[Event]()

    def sought() -> list[Target]:
        return optimise(model, 2, groups(REQUESTS), CONTEXTS, SETTINGS, emit=told.append)

    whole = sought()
    assert not any(isinstance(event, Note) for event in told)
    scarce(target, "_Batch", 2, monkeypatch)
    found = sought()
    notes = [event.message for event in told if isinstance(event, Note)]
    assert notes == [f"memory ran out; going on with {n} subjects at once" for n in (3, 2)]

    def off(others: Sequence[Target]) -> float:
        return max(float((a.change - b.change).norm() / b.change.norm()) for a, b in zip(others, whole, strict=True))

    assert off(found) < 1e-6
    assert off(found[::-1]) > 1e-3
    scarce(target, "_Batch", 0, monkeypatch)
    with pytest.raises(ModelError, match="subjects alone: CUDA out of memory"):
        sought()


def test_stages_are_the_same_when_memory_runs_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the later ones, which resume from what the smaller pieces kept."""
    told: list[Event] = []

    def stages() -> list[Stage]:
        staged = Staged(model, REQUESTS, CONTEXTS, 2, told.append)
        return [staged.stage(layer) for layer in (0, 1, 2)]

    whole = stages()
    assert told == []
    scarce(keys, "_Part", 2, monkeypatch)
    found = stages()
    assert told == [Note(f"memory ran out; going on with {n} places at once") for n in (3, 2)]
    for some, all_ in zip(found, whole, strict=True):
        for field in fields(Stage):
            torch.testing.assert_close(getattr(some, field.name), getattr(all_, field.name), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(getattr(some, field.name).flip(1), getattr(all_, field.name), rtol=1e-2)
