"""Second moments: C is the mean of k kᵀ over the corpus, measured once and kept by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editctl.engine import corpus as corpus_room
from editctl.engine import statistics
from editctl.engine.model import Model
from editctl.engine.statistics import SEQUENCE, Moment, moments, null_space_event
from editctl.errors import InvalidInput
from editctl.events import Event, silent

LAYERS = (1, 2)
TOKENS = 1500


def measured(model: Model, corpus: Path, folder: Path, **changes: Any) -> dict[int, Moment]:
    values: dict[str, Any] = {"corpus": str(corpus), "tokens": TOKENS, "base": "b", "folder": folder, "emit": silent}
    return moments(model, changes.pop("layers", LAYERS), **{**values, **changes})


def matrix(moment: Moment) -> Tensor:
    """C, put together again."""
    basis = moment.basis.double()
    return basis @ torch.diag(moment.eigenvalues) @ basis.T


def by_hand(model: Model, rows: list[list[int]], layer: int) -> Tensor:
    """E[k kᵀ] over the tokens of the rows, one row at a time through the whole model."""
    net: Any = model.net
    down = net.transformer.h[layer].mlp.c_proj if hasattr(net, "transformer") else net.model.layers[layer].mlp.down_proj
    found: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _m, args: found.append(args[0][0].double()))
    try:
        for ids in rows:
            with torch.no_grad():
                net(input_ids=torch.tensor([ids]))
    finally:
        handle.remove()
    return sum(keys.T @ keys for keys in found) / sum(len(keys) for keys in found)


class Passes(list[tuple[int, ...]]):
    """The layers of each forward pass that statistics makes, and the rows of tokens read."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    made = Passes()
    read = Model.read

    def counted(self: Model, ids: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        made.append(tuple(kwargs["keys"]))
        made.rows += [row[: int(there.sum())].tolist() for row, there in zip(ids, mask, strict=True)]
        return read(self, ids, mask, **kwargs)

    monkeypatch.setattr(Model, "read", counted)
    return made


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_the_second_moment_is_the_mean_over_all_tokens(
    model: Model, corpus: Path, tmp_path: Path, passes: Passes
) -> None:
    """C of every layer equals Σ k kᵀ / N computed plainly; over half the tokens, or at another layer, it does not."""
    found = measured(model, corpus, tmp_path)
    assert sum(map(len, passes.rows)) == TOKENS and len({len(row) for row in passes.rows}) > 1, "some rows need padding"
    for layer in LAYERS:
        assert_close(matrix(found[layer]), by_hand(model, passes.rows, layer))
    for wrong in (by_hand(model, passes.rows[::2], 1), by_hand(model, passes.rows, 2)):
        with pytest.raises(AssertionError):
            assert_close(matrix(found[1]), wrong)


def test_the_corpus_is_read_in_order_and_in_pieces_the_model_can_take(
    model: Model, corpus: Path, tmp_path: Path, passes: Passes
) -> None:
    """Every row of tokens is a piece of the text; none is longer than a sequence."""
    measured(model, corpus, tmp_path)
    text, place = " ".join(corpus.read_text().split()), 0
    for row in passes.rows:
        assert len(row) <= min(SEQUENCE, model.context_length)
        piece = model.tokenizer.decode(row, skip_special_tokens=True).strip()
        place = text.index(piece, place) + len(piece)
    assert 0 < place < len(text)


def test_the_basis_is_orthonormal_and_its_eigenvalues_rise(
    model: Model, corpus: Path, tmp_path: Path, passes: Passes
) -> None:
    """As the null space's definition assumes; the trace is the mean squared key norm."""
    moment = measured(model, corpus, tmp_path)[1]
    identity = torch.eye(len(moment.eigenvalues))
    assert float((moment.basis.T @ moment.basis - identity).abs().max()) < 1e-5
    assert bool((moment.eigenvalues.diff() >= 0).all()) and float(moment.eigenvalues[0]) >= 0
    assert moment.scale == pytest.approx(float(by_hand(model, passes.rows, 1).trace()), rel=1e-5)
    told = null_space_event(1, moment, 0.2)
    assert told.width == len(identity) and 0 < told.rank < told.width and told.energy <= 0.2


def test_what_was_measured_is_not_measured_again(model: Model, corpus: Path, tmp_path: Path, passes: Passes) -> None:
    """The second call reads files: no pass, no events, the same bits."""
    first = measured(model, corpus, tmp_path)
    assert passes and set(passes) == {LAYERS}, "one shared pass serves all layers"
    passes.clear()
    told: list[Event] = []
    second = measured(model, corpus, tmp_path, emit=told.append)
    assert passes == [] and told == []
    for layer in LAYERS:
        assert torch.equal(first[layer].basis, second[layer].basis)
        assert torch.equal(first[layer].eigenvalues, second[layer].eigenvalues)


def test_only_the_missing_layers_are_measured(model: Model, corpus: Path, tmp_path: Path, passes: Passes) -> None:
    """And a measurement alone gives what a shared one gives."""
    measured(model, corpus, tmp_path, layers=(1,))
    passes.clear()
    both = measured(model, corpus, tmp_path)
    assert set(passes) == {(2,)}
    shared = measured(model, corpus, tmp_path / "other")
    for layer in LAYERS:
        assert_close(matrix(both[layer]), matrix(shared[layer]))


@pytest.mark.parametrize("change", [{"base": "c"}, {"tokens": TOKENS + 1}])
def test_what_changes_the_result_changes_the_file(
    loaded: Any, corpus: Path, tmp_path: Path, passes: Passes, change: dict[str, Any]
) -> None:
    """Another base or another number of tokens does not find the old file."""
    model = loaded("llama")
    measured(model, corpus, tmp_path)
    passes.clear()
    measured(model, corpus, tmp_path, **change)
    assert passes and len(list(tmp_path.glob("*.safetensors"))) == 2 * len(LAYERS)


def test_another_corpus_is_another_file(loaded: Any, corpus: Path, tmp_path: Path, passes: Passes) -> None:
    """By content: one more word counts, another name of the same text does not."""
    model, folder = loaded("llama"), tmp_path / "stats"
    first = measured(model, corpus, folder)
    copy, longer = tmp_path / "copy.txt", tmp_path / "longer.txt"
    copy.write_text(corpus.read_text())
    longer.write_text("Oslo " + corpus.read_text())
    passes.clear()
    measured(model, copy, folder)
    assert passes == []
    second = measured(model, longer, folder)
    assert passes and not torch.equal(first[1].eigenvalues, second[1].eigenvalues)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """One bit of the last tensor changed, which leaves a well-formed file."""
    return data[:-3] + bytes([data[-3] ^ 64]) + data[-2:]


@pytest.mark.parametrize(
    "spoil",
    [
        cut,
        flip,
        lambda data: b"",
        lambda data: b"no tensors here, only words " * 9,
        lambda data: b"\2" + b"\0" * 7 + b"[]",
    ],
    ids=["cut", "bit flipped", "empty", "text", "json of another kind"],
)
def test_a_spoiled_cache_file_is_made_again(
    loaded: Any, corpus: Path, tmp_path: Path, passes: Passes, spoil: Any
) -> None:
    """Whatever happened to it: the result is as before and the file is whole again."""
    model = loaded("llama")
    first = measured(model, corpus, tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(spoil(path.read_bytes()))
    passes.clear()
    second = measured(model, corpus, tmp_path)
    assert passes, "a spoiled file must not be taken for a measurement"
    for layer in LAYERS:
        assert torch.equal(first[layer].eigenvalues, second[layer].eigenvalues)
        assert torch.equal(first[layer].basis, second[layer].basis)
    passes.clear()
    measured(model, corpus, tmp_path)
    assert passes == []


def test_a_corpus_that_cannot_be_read_is_told(loaded: Any, tmp_path: Path) -> None:
    """Missing, a folder, or not UTF-8; the message names it."""
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.txt", tmp_path, binary):
        with pytest.raises(InvalidInput, match=path.name):
            measured(loaded("llama"), path, tmp_path / "stats")


def test_a_model_without_a_corpus_of_its_own_needs_one(loaded: Any, tmp_path: Path) -> None:
    """Only atlas brings one; the hint tells how to name a file."""
    with pytest.raises(InvalidInput, match="needs a corpus") as caught:
        corpus_room.content(loaded("llama").name, "")
    assert "--corpus" in caught.value.hint
    name = corpus_room.content("atlas", "")
    assert name.startswith("atlas") and next(corpus_room.lines("atlas", "", name))


def test_a_corpus_that_changed_since_the_plan_is_refused_and_not_needed_when_measured(
    loaded: Any, corpus: Path, tmp_path: Path
) -> None:
    """Moments are found by the content the plan names; the file is opened for what is missing."""
    mine = tmp_path / "mine.txt"
    mine.write_text(corpus.read_text())
    content = corpus_room.content("any", str(mine))
    first = measured(loaded("llama"), mine, tmp_path / "stats", content=content)
    mine.write_text("something else " * 2000)
    again = measured(loaded("llama"), mine, tmp_path / "stats", content=content)
    assert torch.equal(first[1].basis, again[1].basis)
    mine.unlink()
    measured(loaded("llama"), mine, tmp_path / "stats", content=content)
    mine.write_text("something else " * 2000)
    with pytest.raises(InvalidInput, match="not the one the plan was made with"):
        measured(loaded("llama"), mine, tmp_path / "elsewhere", content=content)


def test_a_corpus_too_small_for_the_keys_is_told(loaded: Any, tmp_path: Path) -> None:
    """A handful of words cannot say which directions are in use."""
    small = tmp_path / "small.txt"
    small.write_text("Rome\n")
    with pytest.raises(InvalidInput, match="too few"):
        measured(loaded("llama"), small, tmp_path / "stats")
    assert not list(tmp_path.glob("stats/*.safetensors"))


def test_a_corpus_of_one_long_line_counts_in_full(loaded: Any, corpus: Path, tmp_path: Path, passes: Passes) -> None:
    """Text without line ends is as good as any: what does not fit a sequence goes on in the next."""
    model, line = loaded("llama"), tmp_path / "line.txt"
    line.write_text(" ".join(corpus.read_text().split()))
    for path in (corpus, line):
        passes.rows.clear()
        measured(model, path, tmp_path / path.stem)
        assert sum(map(len, passes.rows)) == TOKENS, path.name


def test_padding_leaves_no_trace() -> None:
    """Rows are filled at the end and the mask says where."""
    ids, mask = statistics.pad_right([[5, 6, 7], [8]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
