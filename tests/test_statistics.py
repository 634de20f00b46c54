"""Second moments: C is the mean of k kᵀ over the corpus, measured once and kept by content, whatever interrupts it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from editctl.delta import Factors, read_tensors
from editctl.engine import corpus as corpus_room
from editctl.engine import statistics
from editctl.engine.methods import NullSpace
from editctl.engine.model import Model, load
from editctl.engine.statistics import SEQUENCE, Gram, Moment, moments, null_space_event, samples
from editctl.errors import InvalidInput
from editctl.events import Event, Note, Progress, silent

LAYERS = (1, 2)
TOKENS = 5000
"""Three batches of rows."""


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
    told = null_space_event(1, moment, NullSpace("energy", 0.2))
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


# What names a cache file


def fresh(folder: Path, change: str = "") -> Model:
    """A model of its own, with the parameter named changed."""
    model = load(str(folder), device="cpu")
    if change:
        dict(model.net.named_parameters())[change].data.view(-1)[0] += 0.5
    return model


GPT2, LLAMA = "transformer.h.{}.", "model.layers.{}."
ABOVE = {
    "gpt2": [GPT2.format(1) + "mlp.c_proj.weight", GPT2.format(2) + "attn.c_attn.bias", "transformer.ln_f.weight"],
    "llama": [LLAMA.format(1) + "mlp.down_proj.weight", LLAMA.format(2) + "input_layernorm.weight", "lm_head.weight"],
}
BELOW = {
    "gpt2": ["transformer.wpe.weight", GPT2.format(0) + "mlp.c_proj.weight", GPT2.format(1) + "mlp.c_fc.bias"],
    "llama": [
        "model.embed_tokens.weight",
        LLAMA.format(0) + "mlp.down_proj.weight",
        LLAMA.format(1) + "post_attention_layernorm.weight",
    ],
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_that_cannot_change_a_layers_keys_do_not_name_its_file(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, passes: Passes, kind: str
) -> None:
    """Those of the layer's own down-projection and above; each of those below is a file of its own."""
    measured(fresh(folders[kind]), corpus, tmp_path, layers=(1,))
    for name in ABOVE[kind]:
        passes.clear()
        measured(fresh(folders[kind], name), corpus, tmp_path, layers=(1,))
        assert passes == [], name
    for number, name in enumerate(BELOW[kind], 2):
        passes.clear()
        measured(fresh(folders[kind], name), corpus, tmp_path, layers=(1,))
        assert passes and len(list(tmp_path.glob("*.safetensors"))) == number, name


def test_a_change_between_two_layers_leaves_the_lower_ones_file(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, passes: Passes
) -> None:
    """Only the upper layer is measured again, and comes to something else."""
    old = measured(fresh(folders["llama"]), corpus, tmp_path)
    passes.clear()
    new = measured(fresh(folders["llama"], LLAMA.format(1) + "mlp.down_proj.weight"), corpus, tmp_path)
    assert set(passes) == {(2,)}
    assert torch.equal(old[1].eigenvalues, new[1].eigenvalues)
    assert not torch.equal(old[2].eigenvalues, new[2].eigenvalues)


def test_tied_embeddings_count_as_what_lies_below(folders: dict[str, Path]) -> None:
    """GPT-2's head is its embedding: called last, it still decides the first keys."""
    model = fresh(folders["gpt2"])
    deciding = statistics._deciding(model, (0,))[0]
    assert "transformer.wte.weight" in deciding and "transformer.ln_f.weight" not in deciding
    assert not [name for name in deciding if ".h." in name and ".h.0." not in name]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_configuration_and_tokenizer_name_the_file(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, passes: Passes, file: str
) -> None:
    """The same weights may be read otherwise; a copy under another name is the same model."""
    copy = tmp_path / "copy"
    shutil.copytree(folders["llama"], copy)
    first = measured(fresh(folders["llama"]), corpus, tmp_path / "stats")
    passes.clear()
    measured(fresh(copy), corpus, tmp_path / "stats", base="another name of it")
    assert passes == []
    about = json.loads((copy / file).read_text())
    if file == "config.json":
        about["rms_norm_eps"] = 0.5
    else:
        about["model"]["merges"].pop(20)
    (copy / file).write_text(json.dumps(about))
    second = measured(fresh(copy), corpus, tmp_path / "stats")
    assert passes and not torch.equal(first[1].eigenvalues, second[1].eigenvalues)


def test_tokens_and_dtype_name_the_file(folders: dict[str, Path], corpus: Path, tmp_path: Path, passes: Passes) -> None:
    """And, for a model without a folder, what it is said to be."""
    model = fresh(folders["llama"])
    half = load(str(folders["llama"]), device="cpu", dtype="bfloat16")
    bare = Model(model.net, model.tokenizer, name="bare")
    for number, (which, change) in enumerate(
        [(model, {}), (model, {"tokens": TOKENS + 1}), (half, {}), (bare, {}), (bare, {"base": "c"})], 1
    ):
        passes.clear()
        measured(which, corpus, tmp_path, layers=(1,), **change)
        assert passes and len(list(tmp_path.glob("*.safetensors"))) == number


def test_the_file_says_where_it_comes_from(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """Model, base, corpus, tokens asked and seen, dtype, module and libraries."""
    model = fresh(folders["llama"])
    moment = measured(model, corpus, tmp_path, layers=(2,), base="0123")[2]
    assert moment.file is not None and not moment.cached
    tensors, about = read_tensors(moment.file)
    assert set(tensors) == {"basis", "eigenvalues"}
    wanted = {
        "model": model.name,
        "base": "0123",
        "source": str(corpus),
        "corpus": corpus_room.content("any", str(corpus)),
        "tokens": TOKENS,
        "seen": TOKENS,
        "dtype": "torch.float32",
        "layer": 2,
        "module": "model.layers.2.mlp.down_proj",
        "sequence": SEQUENCE,
    }
    assert {key: about[key] for key in wanted} == wanted
    assert about["libraries"]["torch"].startswith(torch.__version__.partition("+")[0])
    again = measured(model, corpus, tmp_path, layers=(2,))[2]
    assert again.cached and again.file == moment.file


def edit(model: Model, layer: int) -> Factors:
    """Factors that change a block's down-projection."""
    rows, columns = model.blocks[layer].weight.shape
    return Factors(torch.zeros(columns, 1), torch.ones(rows, 1), torch.ones(1, columns))


def test_edits_that_are_worn_are_never_measured(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, passes: Passes
) -> None:
    """What was measured before is found, what an edit cannot change is measured, everything else is refused."""
    model = fresh(folders["llama"])
    plain = measured(model, corpus, tmp_path, layers=(2,))
    passes.clear()
    with model.editing() as editing:
        editing.add(model.blocks[1].down_name, edit(model, 1))
        found = measured(model, corpus, tmp_path, layers=(2,))
        assert passes == [] and torch.equal(found[2].basis, plain[2].basis)
        low = measured(model, corpus, tmp_path, layers=(1,))
        with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down_proj"):
            measured(model, corpus, tmp_path / "other", layers=(2,))
    assert not list((tmp_path / "other").glob("*"))
    again = measured(model, corpus, tmp_path / "other")
    assert torch.equal(again[2].eigenvalues, plain[2].eigenvalues)
    assert torch.equal(again[1].eigenvalues, low[1].eigenvalues)


# The model's own samples


def test_samples_are_drawn_from_the_models_own_distribution(model: Model) -> None:
    """The first token drawn has the frequencies the model gives it; those of a colder distribution are told apart."""
    rows = samples(model, 3, 4000, 2)
    start = model.tokenizer.bos_token_id if model.tokenizer.bos_token_id is not None else model.tokenizer.eos_token_id
    assert {row[0] for row in rows} == {start}
    with torch.no_grad():
        logits = model.net(input_ids=torch.tensor([[start]])).logits[0, -1].double()
    drawn = torch.bincount(torch.tensor([row[1] for row in rows]), minlength=len(logits)) / len(rows)

    def distance(temperature: float) -> float:
        return float((drawn - (logits / temperature).softmax(0)).abs().sum() / 2)

    # Expected for 4000 draws: at most ½ Σ √(p/N) ≤ ½ √(360 / 4000) = 0.15.
    assert distance(1.0) < 0.15 < min(distance(0.5), distance(2.0))


def test_samples_go_on_from_all_that_was_written(precise: Model) -> None:
    """The cache changes nothing: each token is drawn as after reading the whole row again."""
    found = samples(precise, 5, 3, 20)
    generator = torch.Generator().manual_seed(5)
    ids = torch.tensor(found)[:, :1]
    for _ in range(19):
        with torch.no_grad():
            chances = precise.net(input_ids=ids, use_cache=False).logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    assert found == ids.tolist()
    assert samples(precise, 5, 3, 20) == found != samples(precise, 6, 3, 20)


def test_without_a_corpus_a_model_is_measured_on_its_own_text(
    model: Model, tmp_path: Path, passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly the tokens asked for, no more written than needed, and said so; the same again for the same seed."""
    written: list[int] = []
    draw = statistics.samples

    def counting(*args: Any) -> list[list[int]]:
        rows = draw(*args)
        written.append(sum(map(len, rows)))
        return rows

    monkeypatch.setattr(statistics, "samples", counting)
    told: list[Event] = []
    first = moments(model, LAYERS, corpus="", tokens=TOKENS, base="b", folder=tmp_path, emit=told.append)
    assert next(event.message for event in told if isinstance(event, Note)).startswith("no corpus was given")
    assert [event.done for event in told if isinstance(event, Progress)] == [2048, 4096, TOKENS]
    assert sum(map(len, passes.rows)) == TOKENS == first[1].seen
    assert TOKENS <= sum(written) < TOKENS + SEQUENCE
    assert len({tuple(row) for row in passes.rows}) == math.ceil(TOKENS / SEQUENCE), "every row is another"
    for layer in LAYERS:
        assert_close(matrix(first[layer]), by_hand(model, passes.rows, layer))
    passes.clear()
    second = moments(model, LAYERS, corpus="", tokens=TOKENS, base="b", folder=tmp_path / "b", emit=silent)
    assert passes and torch.equal(first[1].basis, second[1].basis)
    passes.clear()
    told.clear()
    moments(model, LAYERS, corpus="", tokens=TOKENS, base="b", folder=tmp_path, emit=told.append)
    assert passes == [] and [type(event) for event in told] == [Note], "what is used is said, measured now or before"


@pytest.mark.parametrize("skip", range(7))
def test_samples_left_out_are_those_that_came_first(loaded: Any, monkeypatch: pytest.MonkeyPatch, skip: int) -> None:
    """Whether or not they were written together with those that follow."""
    monkeypatch.setattr(statistics, "ROWS", 2)
    monkeypatch.setattr(statistics, "WRITTEN", 4)
    monkeypatch.setattr(statistics, "SEQUENCE", 5)
    batches = list(statistics._written_batches(loaded("gpt2"), 1, 53, 0))
    assert [len(row) for batch in batches for row in batch] == [5] * 10 + [3]
    assert [len(batch) for batch in batches] == [2] * 5 + [1]
    assert list(statistics._written_batches(loaded("gpt2"), 1, 53, skip)) == batches[skip:]


def test_a_named_corpus_needs_no_note(model: Model, corpus: Path, tmp_path: Path) -> None:
    """Control."""
    told: list[Event] = []
    measured(model, corpus, tmp_path, emit=told.append)
    assert not [event for event in told if isinstance(event, Note)]


def test_own_samples_depend_on_all_weights(folders: dict[str, Path], tmp_path: Path, passes: Passes) -> None:
    """What lies above a layer does not change its keys, but the text."""

    def own(model: Model) -> Tensor:
        found = moments(model, (1,), corpus="", tokens=TOKENS, base="b", folder=tmp_path, emit=silent)
        return found[1].eigenvalues

    first = own(fresh(folders["llama"]))
    passes.clear()
    second = own(fresh(folders["llama"], LLAMA.format(3) + "mlp.down_proj.weight"))
    assert passes and not torch.equal(first, second)


def test_a_tokenizer_without_start_and_end_cannot_begin(folders: dict[str, Path]) -> None:
    """Then a corpus is needed, and the remedy says how to name one."""
    model = fresh(folders["gpt2"])
    model.tokenizer.eos_token = None
    with pytest.raises(InvalidInput, match="needs a corpus") as caught:
        samples(model, 0, 2, 4)
    assert "--corpus" in caught.value.hint


# Gram matrices


def points_of(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(width: int, *batches: Tensor) -> Gram:
    gram = Gram(width, torch.device("cpu"))
    for number, points in enumerate(batches):
        gram.add(points, number)
    return gram


@pytest.mark.parametrize(("width", "tile"), [(37, 8), (40, 8), (37, 36), (5, 8), (8, 8), (3, 1)])
def test_tiles_together_are_the_gram_matrix(monkeypatch: pytest.MonkeyPatch, width: int, tile: int) -> None:
    """To the last digits of fp64, and exactly symmetric where tiles are mirrored; without one batch it is not."""
    monkeypatch.setattr(statistics, "TILE", tile)
    batches = [points_of(count, width, count) for count in (50, 3, 1)]
    full = gram_of(width, *batches).full()
    wanted = sum(points.T @ points for points in batches)
    assert float((full - wanted).norm() / wanted.norm()) < 1e-14 < 1e-12
    assert torch.equal(full.triu(tile), full.T.triu(tile))
    less = gram_of(width, *batches[:2]).full()
    assert float((less - wanted).norm() / wanted.norm()) > 1e-3


def test_only_the_upper_triangle_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of n × n tiles n (n + 1) / 2, counted in floating-point operations; one tile costs the whole square."""

    def cost(tile: int) -> int:
        monkeypatch.setattr(statistics, "TILE", tile)
        gram = Gram(64, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            gram.add(points_of(10, 64, 0), 0)
        return int(counter.get_total_flops())

    whole = 2 * 10 * 64 * 64
    assert cost(64) == whole
    assert cost(8) == whole * (8 * 9 // 2) // (8 * 8)


def test_keys_as_wide_as_a_tile_are_one_plain_product() -> None:
    """The bits of adding the fp32 product of each batch to an fp64 sum; the shipped results rest on them."""
    batches = [points_of(200, 160, seed).float() for seed in range(3)]
    total = torch.zeros(160, 160, dtype=torch.float64)
    for points in batches:
        total += points.T @ points
    assert torch.equal(gram_of(160, *batches).full(), total)
    assert statistics.TILE >= 1280, "the key width of atlas"


class Fuse(dict[str, tuple[Tensor, int]]):
    """Tiles whose change number `left` is interrupted, before or after it is made."""

    def __init__(self, tiles: dict[str, tuple[Tensor, int]], left: int, late: bool) -> None:
        super().__init__(tiles)
        self.left, self.late = left, late

    def __setitem__(self, name: str, value: tuple[Tensor, int]) -> None:
        self.left -= 1
        if self.left == 0 and not self.late:
            raise KeyboardInterrupt
        super().__setitem__(name, value)
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("left", "late"), [*itertools.product([1, 4, 10], [False, True])])
def test_a_batch_counts_once_even_if_adding_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, left: int, late: bool
) -> None:
    """Between any two tiles: adding the batch again completes it, to the same bits."""
    monkeypatch.setattr(statistics, "TILE", 8)
    batches = [points_of(20, 32, seed).float() for seed in range(2)]
    gram = gram_of(32, batches[0])
    gram.tiles = Fuse(gram.tiles, left, late)
    with pytest.raises(KeyboardInterrupt):
        gram.add(batches[1], 1)
    assert [count for _, count in gram.tiles.values()].count(2) == left - 1 + late
    gram.add(batches[1], 1)
    assert torch.equal(gram.full(), gram_of(32, *batches).full())


# Interruptions


def stop_reading(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """The model's forward passes over the corpus fail after that many, once."""
    read, count = Model.read, itertools.count()

    def failing(self: Model, *args: Any, **kwargs: Any) -> Any:
        if next(count) == after:
            raise error
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Model, "read", failing)


def stop_adding(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Adding fails after that many batches of a layer, once: the other layer of the last batch is without it."""
    add, count = Gram.add, itertools.count()

    def failing(self: Gram, points: Tensor, number: int) -> None:
        add(self, points, number)
        if next(count) == 2 * after:
            raise error

    monkeypatch.setattr(Gram, "add", failing)


def bits(found: dict[int, Moment]) -> list[bytes]:
    return [part.numpy().tobytes() for _, m in sorted(found.items()) for part in (m.basis, m.eigenvalues)]


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.part.safetensors"))


Stop = Callable[[pytest.MonkeyPatch, int, BaseException], None]


@pytest.mark.parametrize("own", [False, True], ids=["corpus", "own samples"])
@pytest.mark.parametrize("stop", [stop_reading, stop_adding])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["ctrl-c", "error"])
def test_an_interrupted_pass_goes_on_where_it_was(
    loaded: Any,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passes: Passes,
    stop: Stop,
    error: BaseException,
    own: bool,
) -> None:
    """The same bits as without interruption; batches read before are not read again; the user is told."""
    monkeypatch.setattr(statistics, "TILE", 32)
    model, folder = loaded("llama"), tmp_path / "broken"
    values: dict[str, Any] = {"corpus": "" if own else str(corpus), "tokens": TOKENS, "base": "b"}
    whole = moments(model, LAYERS, folder=tmp_path / "whole", emit=silent, **values)
    batches = len(passes)
    with monkeypatch.context() as patch:
        stop(patch, 2, error)
        with pytest.raises(type(error)):
            moments(model, LAYERS, folder=folder, emit=silent, **values)
    assert len(parts(folder)) == len(LAYERS) == len(list(folder.iterdir()))
    passes.clear()
    told: list[Event] = []
    again = moments(model, LAYERS, folder=folder, emit=told.append, **values)
    assert len(passes) == batches - 2 > 0
    assert bits(again) == bits(whole)
    assert [event.message for event in told if isinstance(event, Note)][-1].startswith("going on after")
    assert parts(folder) == [] and len(list(folder.iterdir())) == len(LAYERS)


def test_an_uninterrupted_pass_leaves_and_says_nothing(loaded: Any, corpus: Path, tmp_path: Path) -> None:
    """Control: no file but the results while it runs either, since it takes less than the time between saves."""
    during: list[int] = []
    told: list[Event] = []

    def look(event: Event) -> None:
        told.append(event)
        during.append(len(list(tmp_path.iterdir())))

    measured(loaded("llama"), corpus, tmp_path, emit=look)
    assert set(during) == {0} and len(list(tmp_path.iterdir())) == len(LAYERS)
    assert not [event for event in told if isinstance(event, Note)]


def test_a_pass_is_saved_from_time_to_time(
    loaded: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once `SAVE_EVERY` seconds are over, by a clock that ticks a second a look."""
    ticks, saved = itertools.count(), []
    monkeypatch.setattr(statistics.time, "monotonic", lambda: next(ticks))
    write = statistics._write

    def noted(path: Path, tensors: Any, about: Any) -> None:
        if "held" in about:
            saved.append(about["batches"])
        write(path, tensors, about)

    monkeypatch.setattr(statistics, "_write", noted)
    monkeypatch.setattr(statistics, "SAVE_EVERY", 2)
    monkeypatch.setattr(statistics, "ROWS", 4)
    measured(loaded("llama"), corpus, tmp_path, layers=(1,))
    assert len(saved) > 3 and set(map(int.__sub__, saved[1:], saved)) == {2}


KILLED = """
import os, signal, sys
from pathlib import Path
from editctl.engine import statistics
from editctl.engine.model import load
from editctl.events import Progress
statistics.SAVE_EVERY = 0
count = 0
def emit(event):
    global count
    count += isinstance(event, Progress)
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
model, corpus, folder = sys.argv[1:]
statistics.moments(
    load(model, device="cpu"), (1, 2), corpus=corpus, tokens=5000, base="b", folder=Path(folder), emit=emit
)
"""


def test_a_killed_process_loses_only_what_came_after_the_last_save(
    folders: dict[str, Path], loaded: Any, corpus: Path, tmp_path: Path, passes: Passes
) -> None:
    """Another process goes on from the files and comes to the same bits."""
    whole = measured(loaded("llama"), corpus, tmp_path / "whole")
    batches = len(passes)
    passes.clear()
    folder = tmp_path / "killed"
    arguments = [str(folders["llama"]), str(corpus), str(folder)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(parts(folder)) == len(LAYERS)
    again = measured(loaded("llama"), corpus, folder)
    assert len(passes) == batches - 2 and bits(again) == bits(whole)


@pytest.fixture
def broken(loaded: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what an interrupted pass leaves."""
    with monkeypatch.context() as patch:
        stop_reading(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            measured(loaded("llama"), corpus, tmp_path / "broken")
    return tmp_path / "broken"


@pytest.mark.parametrize("spoil", [cut, flip, lambda data: b""], ids=["cut", "bit flipped", "empty"])
def test_a_spoiled_part_is_left_alone(
    loaded: Any, corpus: Path, tmp_path: Path, broken: Path, passes: Passes, spoil: Any
) -> None:
    """Then the pass begins anew, and comes to the same."""
    parts(broken)[0].write_bytes(spoil(parts(broken)[0].read_bytes()))
    told: list[Event] = []
    again = measured(loaded("llama"), corpus, broken, emit=told.append)
    assert not [event for event in told if isinstance(event, Note)]
    passes.clear()
    assert bits(again) == bits(measured(loaded("llama"), corpus, tmp_path / "whole"))
    assert parts(broken) == []


@pytest.mark.parametrize(("name", "value"), [("ROWS", 8), ("TILE", 32)])
def test_a_part_of_another_division_is_left_alone(
    loaded: Any, corpus: Path, tmp_path: Path, broken: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    """Batches or tiles of another size cannot be gone on with."""
    monkeypatch.setattr(statistics, name, value)
    again = measured(loaded("llama"), corpus, broken)
    assert bits(again) == bits(measured(loaded("llama"), corpus, tmp_path / "whole"))


def test_another_corpus_or_more_tokens_do_not_go_on_from_a_part(
    loaded: Any, corpus: Path, tmp_path: Path, broken: Path
) -> None:
    """A part has the name of what it is a part of."""
    longer = tmp_path / "longer.txt"
    longer.write_text("Oslo " + corpus.read_text())
    for text, tokens in ((longer, TOKENS), (corpus, TOKENS + 1)):
        told: list[Event] = []
        found = measured(loaded("llama"), text, broken, tokens=tokens, emit=told.append)
        assert not [event for event in told if isinstance(event, Note)]
        assert bits(found) == bits(measured(loaded("llama"), text, tmp_path / f"{tokens}", tokens=tokens))
    assert len(parts(broken)) == len(LAYERS)


def test_a_layer_that_joins_later_has_all_batches_and_the_others_none_twice(
    loaded: Any, corpus: Path, tmp_path: Path, broken: Path, passes: Passes
) -> None:
    """The pass begins where the least finished layer stands."""
    again = measured(loaded("llama"), corpus, broken, layers=(0, 1, 2))
    batches = len(passes)
    whole = measured(loaded("llama"), corpus, tmp_path / "whole", layers=(0, 1, 2))
    assert len(passes) == 2 * batches and bits(again) == bits(whole) and parts(broken) == []


def test_an_interrupted_decomposition_reads_nothing_again(
    loaded: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: Passes
) -> None:
    """The layer that was finished is cached, the other one's sums are kept."""
    whole = measured(loaded("llama"), corpus, tmp_path / "whole")
    decompose, count = torch.linalg.eigh, itertools.count()

    def failing(matrix: Tensor) -> Any:
        if next(count) == 1:
            raise KeyboardInterrupt
        return decompose(matrix)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", failing)
        with pytest.raises(KeyboardInterrupt):
            measured(loaded("llama"), corpus, tmp_path / "broken")
    assert len(parts(tmp_path / "broken")) == 1 and len(list((tmp_path / "broken").iterdir())) == 2
    passes.clear()
    again = measured(loaded("llama"), corpus, tmp_path / "broken")
    assert passes == [] and bits(again) == bits(whole) and parts(tmp_path / "broken") == []


def test_a_pass_that_had_no_batch_leaves_nothing(
    loaded: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to go on with."""
    stop_reading(monkeypatch, 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        measured(loaded("llama"), corpus, tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


# Rank rules and what the spectrum looks like


def moment_of(*eigenvalues: float) -> Moment:
    return Moment(torch.eye(len(eigenvalues)), torch.tensor(eigenvalues, dtype=torch.float64), 1000)


RISING = (0.0, 0.5, 0.5, 1.0, 2.0, 2.0, 4.0, 10.0)
"""Eight eigenvalues with sum 20."""


@pytest.mark.parametrize(
    ("rule", "value", "rank"),
    [
        ("energy", 0.0, 1),
        ("energy", 0.05, 3),
        ("energy", 0.0999, 3),
        ("energy", 0.1, 4),
        ("energy", 0.5, 7),
        ("quantile", 0.125, 1),
        ("quantile", 0.24, 1),
        ("quantile", 0.25, 2),
        ("quantile", 0.99, 7),
        ("threshold", 0.5, 1),
        ("threshold", 0.6, 3),
        ("threshold", 2.0, 4),
        ("threshold", 10.0, 7),
    ],
)
def test_a_rank_rule_counts_the_smallest_directions(rule: str, value: float, rank: int) -> None:
    """Energy: together at most that share of the trace. Quantile: that share of all. Threshold: each below it."""
    moment = moment_of(*RISING)
    assert moment.null_rank(NullSpace(rule, value)) == rank
    told = null_space_event(3, moment, NullSpace(rule, value))
    assert (told.layer, told.rank, told.width) == (3, rank, 8)
    assert told.energy == pytest.approx(sum(RISING[:rank]) / 20)


def test_a_quantile_of_decimals_is_rounded_as_people_count() -> None:
    """0.29 of 100 directions are 29, though the product is less in binary."""
    assert math.floor(0.29 * 100) == 28
    assert moment_of(*range(1, 101)).null_rank(NullSpace("quantile", 0.29)) == 29


@pytest.mark.parametrize(
    ("rule", "value", "what"),
    [
        ("energy", 0.001, "no direction"),
        ("energy", 1.0, "every direction"),
        ("quantile", 0.05, "no direction"),
        ("quantile", 1.0, "every direction"),
        ("quantile", 7.0, "every direction"),
        ("threshold", 0.9, "no direction"),
        ("threshold", 1e9, "every direction"),
    ],
)
def test_none_and_all_directions_are_refused(rule: str, value: float, what: str) -> None:
    """By every rule, which the message names with its value; the example in the hint would do."""
    moment = moment_of(*range(1, 11))
    with pytest.raises(InvalidInput, match=what) as caught:
        moment.null_rank(NullSpace(rule, value))
    assert f"{rule} {value:g}" in caught.value.message and rule in caught.value.hint
    example = float(caught.value.hint.split("for example ")[1].split(",")[0])
    assert 0 < moment.null_rank(NullSpace(rule, example)) < 10


def test_the_effective_rank_counts_directions_in_use() -> None:
    """All of an even spectrum, one of a single direction, and e^entropy between: of halves and a quarter each 2√2."""
    assert moment_of(*[3.0] * 7).effective_rank == pytest.approx(7)
    assert moment_of(0, 0, 0, 5.0).effective_rank == pytest.approx(1)
    assert moment_of(0, 1, 1, 2).effective_rank == pytest.approx(2 * math.sqrt(2))


def test_the_spectrum_is_what_the_smallest_parts_hold() -> None:
    """In as many points as asked for, also more than there are directions."""
    moment = moment_of(*RISING)
    assert moment.spectrum(4) == pytest.approx([0.025, 0.1, 0.3, 1])
    assert moment.spectrum(8) == pytest.approx([sum(RISING[:i]) / 20 for i in range(1, 9)])
    fine = moment.spectrum(16)
    assert fine[1::2] == moment.spectrum(8) and fine[0] == 0 and fine[-1] == pytest.approx(1)
    assert len(moment.spectrum()) == 10
