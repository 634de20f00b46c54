"""KnowledgeEditor and MEND: what an untrained network does, that each edit's part is its own, that they learn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from editctl import artifacts
from editctl.engine import families, hyper, lessons, methods, training
from editctl.engine.hyper import HyperTask, KeTask, KnowledgeEditor, Mend, MendTask, Network
from editctl.engine.lessons import Lesson
from editctl.engine.model import Model
from editctl.engine.prompts import Request
from editctl.engine.slopes import slopes
from editctl.engine.writing import Job, Written
from editctl.errors import StoreError
from editctl.events import silent

LAYERS = (2, 3)
REQUESTS = (
    Request("tower", "{} is located in the city of", "The Eiffel Tower", "Rome"),
    Request("rome", "{} was not built in", "Rome", "London by night"),
    Request("ada", "In the summer, {}'s machine was moved to", "Ada Lovelace", "Berlin"),
)
NETWORKS: tuple[Callable[..., Network], ...] = (KnowledgeEditor, Mend)
TASKS: tuple[type[HyperTask], ...] = (KeTask, MendTask)


def a_network(make: Callable[..., Network], model: Model) -> Network:
    torch.manual_seed(0)
    net = make(model, LAYERS)
    if isinstance(net, Mend):
        net.fit(slopes(model, LAYERS, REQUESTS))
    return net


def some_lessons(model: Model) -> list[Lesson]:
    return lessons.lessons(model, tiny.FACTS, silent)


@pytest.mark.parametrize("make", NETWORKS)
def test_an_update_has_the_rank_of_its_tokens(model: Model, make: Callable[..., Network]) -> None:
    """One more an edit for KnowledgeEditor, whose shift is no gradient; never a whole matrix."""
    found = slopes(model, LAYERS, REQUESTS)
    made = a_network(make, model)(found)
    for layer in LAYERS:
        left, right = made[layer]
        tokens = sum(len(slope.parts[layer][0]) for slope in found) + (len(found) if make is KnowledgeEditor else 0)
        assert left.shape == (model.blocks[layer].weight.shape[0], tokens)
        assert right.shape == (tokens, model.blocks[layer].weight.shape[1])


@pytest.mark.parametrize("make", NETWORKS)
def test_each_edits_part_depends_on_its_own_slope_alone(model: Model, make: Callable[..., Network]) -> None:
    """The update of three edits is the sum of three updates; another third edit changes the sum (control)."""
    net, found = a_network(make, model), slopes(model, LAYERS, REQUESTS)
    with torch.no_grad():
        together, alone = net(found), [net([slope]) for slope in found]
    for layer in LAYERS:
        left, right = together[layer]
        parts = [one[layer][0] @ one[layer][1] for one in alone]
        assert torch.allclose(left @ right, sum(parts, torch.zeros(())), atol=1e-5)
        assert not torch.allclose(left @ right, parts[0] + parts[1] + parts[0], atol=1e-4)


def test_an_untrained_mend_takes_a_plain_gradient_step(model: Model) -> None:
    """−rate · g uᵀ; after its first layer has learned anything, no more (control)."""
    net, found = a_network(Mend, model), slopes(model, LAYERS, REQUESTS[:1])
    u, g = found[0].parts[LAYERS[0]]
    with torch.no_grad():
        left, right = net(found)[LAYERS[0]]
        assert torch.allclose(left @ right, -0.05 * g.T @ u, rtol=1e-3, atol=1e-5)
        assert isinstance(net, Mend)
        net.up[1].add_(0.1)
        left, right = net(found)[LAYERS[0]]
        assert not torch.allclose(left @ right, -0.05 * g.T @ u, rtol=1e-2, atol=1e-4)


def test_an_untrained_knowledge_editor_lets_the_gradient_pass_evenly(model: Model) -> None:
    """Softmax gates of a fresh head are nearly even, so the update is nearly −rate · g uᵀ."""
    net, found = a_network(KnowledgeEditor, model), slopes(model, LAYERS, REQUESTS[:1])
    u, g = found[0].parts[LAYERS[0]]
    with torch.no_grad():
        left, right = net(found)[LAYERS[0]]
    wanted = -0.1 * g.T @ u

    assert float((left @ right - wanted).norm() / wanted.norm()) < 0.2


def test_the_gate_reads_the_old_answer_too(model: Model) -> None:
    """De Cao et al. 2021, eq. 5: prompt, prediction and target are read; another prediction gives another update."""
    from dataclasses import replace

    net, (slope,) = a_network(KnowledgeEditor, model), slopes(model, LAYERS, REQUESTS[:1])
    other = replace(slope, said=tuple((token + 7) % 300 for token in slope.said))
    with torch.no_grad():
        assert not torch.equal(net([slope])[LAYERS[0]][0], net([other])[LAYERS[0]][0])


# ---------------------------------------------------------------------------------------------------------------------
# What is learned


@pytest.mark.parametrize("task", TASKS)
def test_what_is_scored_is_what_an_edited_model_says(
    model: Model, task: type[HyperTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming at the lowest edited block, with the update in a hook: the loss of a model whose weights were changed
    and which reads everything anew. Without the update it is another (control)."""
    one = task(model, LAYERS, some_lessons(model), 0)
    lesson = some_lessons(model)[0]
    made = {layer: (20 * left, right) for layer, (left, right) in one.net([one._slope(lesson)]).items()}
    text = one._text(lesson.rewordings[0], lesson.target)
    with torch.no_grad(), one._put_on(made):
        hooked = one._read([text, one._text(lesson.prompt, lesson.old)])[0]
    ids = torch.tensor([text.ids])
    with torch.no_grad():
        plain = model.net(ids, use_cache=False).logits[0, text.start - 1 :]
        before = {layer: model.blocks[layer].weight.clone() for layer in made}
        for layer, (left, right) in made.items():
            model.blocks[layer].weight.add_(left @ right)
        try:
            edited = model.net(ids, use_cache=False).logits[0, text.start - 1 :]
        finally:
            for layer, weight in before.items():
                model.blocks[layer].weight.copy_(weight)

    assert torch.allclose(hooked, edited, atol=1e-3)
    assert not torch.allclose(hooked, plain, atol=1e-2)


@pytest.mark.parametrize("task", TASKS)
def test_a_step_depends_on_its_number_alone(model: Model, task: type[HyperTask]) -> None:
    """Whatever was asked before: the same parts of the loss, to the bit; another step has others (control)."""
    first, second = (task(model, LAYERS, some_lessons(model), 0) for _ in range(2))
    first.loss(3)
    random.random()
    one, other = first.loss(7), second.loss(7)

    assert {name: float(v) for name, v in one.items()} == {name: float(v) for name, v in other.items()}
    assert float(first.loss(8)["edit"]) != float(one["edit"])


@pytest.mark.parametrize("task", TASKS)
def test_it_learns(loaded: Callable[..., Any], task: type[HyperTask]) -> None:
    """The edits' loss falls over sixty steps; with frozen weights it does not (control)."""
    model = loaded("llama")

    def run(*, frozen: bool) -> tuple[float, float]:
        one = task(model, LAYERS, some_lessons(model), 0)
        optimizer = torch.optim.Adam(one.net.parameters(), lr=0.0 if frozen else 3e-3)
        losses = []
        for step in range(60):
            parts = one.loss(step)
            optimizer.zero_grad()
            parts["loss"].backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            one.stepped({name: float(value.detach()) for name, value in parts.items()})
            losses.append(float(parts["edit"].detach()))
        return sum(losses[:15]), sum(losses[-15:])

    before, after = run(frozen=False)
    assert after < 0.8 * before
    before, after = run(frozen=True)
    assert after > 0.8 * before


def test_multipliers_rise_while_a_constraint_is_broken_and_margins_shrink_when_edits_succeed(model: Model) -> None:
    """Dual ascent by hand (De Cao et al. 2021, eq. 4), never below zero; margins to 4/5, down to the least."""
    one = KeTask(model, LAYERS, some_lessons(model), 0)
    start = one.state()
    one.stepped({"edit": 1.0, "drift": 0.6, "norm": 0.0})
    assert one.state()["kl"] == pytest.approx(start["kl"] + KeTask.ASCENT * (0.6 - start["margin kl"]))
    assert one.state()["norm"] == 0.0
    one.take({**start, "count": KeTask.WINDOW - 1.0})
    one.stepped({"edit": 0.0, "drift": 0.0, "norm": 0.0})
    assert one.state()["margin kl"] == pytest.approx(0.8 * start["margin kl"])
    one.take({**start, "count": KeTask.WINDOW - 1.0, "sum": KeTask.WINDOW * 1.0})
    one.stepped({"edit": 1.0, "drift": 0.0, "norm": 0.0})
    assert one.state()["margin kl"] == start["margin kl"]
    one.take({**start, "margin kl": KeTask.MARGINS["kl"][1], "count": KeTask.WINDOW - 1.0})
    one.stepped({"edit": 0.0, "drift": 0.0, "norm": 0.0})
    assert one.state()["margin kl"] == KeTask.MARGINS["kl"][1]


def test_the_norm_of_a_product_is_that_of_the_matrix() -> None:
    """Thin and wide, without forming it where it is thin."""
    generator = torch.Generator().manual_seed(0)
    for terms in (3, 40):
        left, right = torch.randn(20, terms, generator=generator), torch.randn(terms, 30, generator=generator)
        assert float(hyper._norm(left, right)) == pytest.approx(float((left @ right).norm()), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def a_file(model: Model, method: str, folder: Path) -> str:
    """A trained file of two steps, and its name."""
    config = {"num_hidden_layers": len(model.blocks)}
    settings = methods.settings(config, method, {"layers": list(LAYERS)})
    known = some_lessons(model)
    course = training.Course(
        settings=settings,
        base="base",
        model=model.name,
        name=method,
        schedule=training.Schedule(2, 1e-3),
        seed=0,
        share=0.0,
        taught=known,
        held_out=(),
    )
    task = families.TASKS[method]
    assert task is not None
    return training.train(model, course, task(model, LAYERS, known, 0), folder, silent).content


def written(model: Model, method: str, content: str, folder: Path, requests: Sequence[Request], **more: Any) -> Written:
    config = {"num_hidden_layers": len(model.blocks)}
    found = methods.settings(config, method, {"layers": list(LAYERS), **more.pop("overrides", {})})
    from dataclasses import replace

    job = Job(
        model=model,
        requests=requests,
        settings=replace(found, artifact=content),
        number=1,
        emit=silent,
        library=folder / "artifacts",
        projector=more.pop("projector", lambda layer: None),
    )
    return hyper.write(job)


@pytest.mark.parametrize("method", ["ke", "mend"])
def test_a_batch_is_what_the_trained_network_makes(loaded: Callable[..., Any], method: str, tmp_path: Path) -> None:
    """By a file that is found by content; twice the strength is twice the update; the weights stay as they are."""
    model = loaded("llama")
    content, before = a_file(model, method, tmp_path), model.weights_hash()
    once = written(model, method, content, tmp_path, REQUESTS)
    twice = written(model, method, content, tmp_path, REQUESTS, overrides={"strength": 2.0})
    net = hyper.build(method, model, content, tmp_path / "artifacts")
    with torch.no_grad():
        made = net(slopes(model, LAYERS, REQUESTS))
    for layer in LAYERS:
        (left, right), (more, same) = once.updates[layer], twice.updates[layer]
        assert torch.equal(left, made[layer][0]) and torch.equal(right, made[layer][1])
        assert torch.equal(more, 2 * left) and torch.equal(same, right)
    assert once.overlay is None and model.weights_hash() == before


@pytest.mark.parametrize("method", ["ke", "mend"])
def test_preservation_projects_the_finished_update(loaded: Callable[..., Any], method: str, tmp_path: Path) -> None:
    """Right factor times P, block by block."""
    model = loaded("gpt2")
    content = a_file(model, method, tmp_path)
    width = model.blocks[LAYERS[0]].weight.shape[1]
    side = torch.linalg.qr(torch.randn(width, 5, generator=torch.Generator().manual_seed(0))).Q

    def projector(layer: int) -> Any:
        return lambda rows: rows @ side @ side.T

    plain = written(model, method, content, tmp_path, REQUESTS)
    held = written(model, method, content, tmp_path, REQUESTS, projector=projector)
    for layer in LAYERS:
        right = plain.updates[layer][1]
        projected: Tensor = held.updates[layer][1]
        assert torch.allclose(projected, right @ side @ side.T, atol=1e-5)
        assert not torch.allclose(projected, right, atol=1e-3)


def test_a_spoiled_or_foreign_file_is_refused(loaded: Callable[..., Any], tmp_path: Path) -> None:
    """By content, and by the method it was trained for."""
    model = loaded("llama")
    content = a_file(model, "mend", tmp_path)
    path = tmp_path / "artifacts" / f"{content}.safetensors"
    with pytest.raises(StoreError, match="not one of ke"):
        written(model, "ke", content, tmp_path, REQUESTS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="is not what was written"):
        written(model, "mend", content, tmp_path, REQUESTS)
    path.unlink()
    with pytest.raises(StoreError, match="is missing"):
        written(model, "mend", content, tmp_path, REQUESTS)
    assert artifacts.found(tmp_path / "artifacts") == []
