"""The loaded model: its editable modules are found by what they do, and its weights always come back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builds
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from editctl.delta import Factors
from editctl.engine import source
from editctl.engine.model import DTYPES, Model, load, outline
from editctl.errors import InvalidInput, ModelError

STRAIGHT = [name for name, build in builds.BUILDS.items() if build.kind == "straight"]


@pytest.fixture(scope="module")
def built() -> Callable[[str], Model]:
    """Makes a tiny model of an architecture in memory, once."""
    words = tiny.tokenizer(bos=False)
    known: dict[str, Model] = {}

    def get(kind: str) -> Model:
        if kind not in known:
            known[kind] = Model(builds.BUILDS[kind].net(), words, name=kind)
        return known[kind]

    return get


def a_push(model: Model, layer: int, seed: int = 0, size: float = 1.0) -> Factors:
    """A rank-one update of a block's down-projection."""
    d_out, d_in = model.blocks[layer].weight.shape
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.zeros(d_in, 1),
        torch.randn(d_out, 1, generator=generator) * size,
        torch.randn(1, d_in, generator=generator) * size,
    )


def ids_of(model: Model, *more: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts of uneven length, or those given, padded on the right; with their mask."""
    rows = [
        torch.tensor(model.encode(text)) for text in more or ("The Eiffel Tower is located in the city of", "Rome was")
    ]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), mask


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.net.named_parameters()}


def assert_same_weights(model: Model, wanted: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.net.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


# What can be edited


@pytest.mark.parametrize("kind", STRAIGHT)
def test_an_update_adds_its_product_to_the_blocks_output(built: Any, kind: str) -> None:
    """Writing R A moves the output of the block by R A k, k being what `read` gives: orientation and key match."""
    model, layer = built(kind), 1
    ids, mask = ids_of(model)
    there = mask.bool()
    keys, before = model.read(ids, mask, keys=[layer], outputs=[layer])
    update = a_push(model, layer)
    with model.editing() as editing:
        editing.add(model.blocks[layer].down_name, update)
        _, after = model.read(ids, mask, outputs=[layer])

    def assert_moved_by(factors: Factors) -> None:
        wanted = keys[layer].view(*ids.shape, -1)[there] @ (factors.residuals @ factors.factor).T
        moved = (after[layer] - before[layer])[there]
        assert float((moved - wanted).norm() / wanted.norm()) < 1e-3

    assert_moved_by(update)
    with pytest.raises(AssertionError):
        assert_moved_by(a_push(model, layer, seed=1))


@pytest.mark.parametrize("kind", builds.BUILDS)
def test_keys_are_read_in_batches_of_uneven_texts(built: Any, kind: str) -> None:
    """Two prompts at once give the keys that each gives alone."""
    model = built(kind)
    texts = ["The Eiffel Tower", "In Oslo"]
    ids, mask = ids_of(model, *texts)
    assert not mask.all()
    keys, outputs = model.read(ids, mask, keys=[1], outputs=[2])
    assert keys[1].shape == (*ids.shape, model.blocks[1].weight.shape[1]) and outputs[2].shape == (*ids.shape, 32)
    for i, text in enumerate(texts):
        length = int(mask[i].sum())
        alone, states = model.read(*ids_of(model, text), keys=[1], outputs=[2])
        assert torch.allclose(keys[1][i, :length], alone[1][0], rtol=1e-4, atol=1e-4)
        assert torch.allclose(outputs[2][i, :length], states[2][0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(keys[1][0, 0], keys[1][1, 0], rtol=1e-2)


def test_reading_stops_at_the_last_block_asked_for(model: Model) -> None:
    """Blocks above are not run, and what was read equals what a whole pass shows."""
    ran: list[int] = []
    hooks = [(block.module, "output", lambda _m, _a, _o, i=i: ran.append(i)) for i, block in enumerate(model.blocks)]
    ids, mask = ids_of(model)
    with model.hooked(hooks):
        _, outputs = model.read(ids, mask, keys=[0], outputs=[1])
    assert ran == [0, 1]
    with torch.no_grad():
        states = model.net(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert torch.equal(outputs[1], states[2]) and not torch.equal(outputs[1], states[1])


def test_factors_for_another_architecture_are_refused(loaded: Any) -> None:
    """A module that is not there is named."""
    with pytest.raises(ModelError, match=r"transformer\.h\.0"), loaded("llama").editing() as editing:
        editing.add("transformer.h.0.mlp.c_proj", a_push(loaded("gpt2"), 0))


# Editing and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_editing_gives_the_base_back_bit_for_bit(loaded: Any, kind: str, dtype: str) -> None:
    """Inside, the weights are others; after `with`, every parameter has its old bits."""
    model = loaded(kind, dtype)
    before = weights_of(model)
    with model.editing() as editing:
        for seed in range(3):
            editing.add(model.blocks[1].down_name, a_push(model, 1, seed))
        editing.add(model.blocks[2].down_name, a_push(model, 2))
        with pytest.raises(AssertionError):
            assert_same_weights(model, before)
    assert_same_weights(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_editing_gives_the_base_back_whatever_ends_it(model: Model, error: type[BaseException]) -> None:
    """An exception passes through and finds the weights restored."""
    before = weights_of(model)
    with pytest.raises(error), model.editing() as editing:
        editing.add(model.blocks[1].down_name, a_push(model, 1))
        raise error
    assert_same_weights(model, before)


def test_taking_an_update_off_by_subtraction_would_not_do(model: Model) -> None:
    """Control: W + D − D is not W, which is why the base is kept."""
    before = weights_of(model)
    with model.editing() as editing:
        push = a_push(model, 1)
        editing.add(model.blocks[1].down_name, push)
        editing.add(model.blocks[1].down_name, Factors(push.keys, -push.residuals, push.factor))
        with pytest.raises(AssertionError):
            assert_same_weights(model, before)
        editing.reset()
        assert_same_weights(model, before)


def test_small_updates_add_up_in_half_precision(loaded: Any) -> None:
    """The fp32 master grows though each step alone is rounded away in bf16."""
    model = loaded("llama", "bfloat16")
    name = model.blocks[1].down_name
    small = a_push(model, 1, size=0.01)
    weight = model.blocks[1].weight
    with model.editing() as editing:
        before = weight.float().clone()
        naive = before.bfloat16()
        for _ in range(64):
            editing.add(name, small)
            naive = (naive.float() + small.residuals @ small.factor).bfloat16()
        wanted = before + 64 * (small.residuals @ small.factor)

        def off(found: torch.Tensor) -> float:
            return float((found.float() - wanted).norm() / (wanted - before).norm())

        lost = float((wanted.bfloat16().float() - wanted).norm() / (wanted - before).norm())
        assert off(weight) < lost * 1.01 < off(naive)


def test_a_hash_tells_edited_from_base(model: Model) -> None:
    """Inside it differs and depends on the update; outside it is the base's again, by either way of asking."""
    base = model.weights_hash()
    found = []
    for seed in (0, 1, 0):
        with model.editing() as editing:
            assert editing.weights_hash() == base
            editing.add(model.blocks[1].down_name, a_push(model, 1, seed))
            found.append(editing.weights_hash())
            assert found[-1] == model.weights_hash()
    assert found[0] == found[2] != found[1] and base not in found
    assert model.weights_hash() == base


def test_a_hash_taken_while_edited_does_not_outlive_the_edit(model: Model) -> None:
    """After hashing the whole edited model, a session that changes something else still sees the base beneath."""
    base = model.weights_hash()
    with model.editing() as editing:
        editing.add(model.blocks[1].down_name, a_push(model, 1))
        model.weights_hash()
    with model.editing() as editing:
        assert editing.weights_hash() == base
        editing.add(model.blocks[2].down_name, a_push(model, 2))
        assert editing.weights_hash() == model.weights_hash()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loaded_base_hashes_as_its_files_do(folders: Any, loaded: Any, kind: str, dtype: str) -> None:
    """With the dtype taken into account: the same files in another dtype, or changed by one number, hash otherwise."""
    model = loaded(kind, dtype)
    assert model.weights_hash() == tiny.disk_weights_hash(folders[kind], DTYPES[dtype])
    other = "bfloat16" if dtype == "float32" else "float32"
    assert model.weights_hash() != tiny.disk_weights_hash(folders[kind], DTYPES[other])


def test_one_changed_number_on_disk_changes_the_hash(folders: Any, tmp_path: Path) -> None:
    """And the identity of the folder, which a plan is bound to."""
    folder = shutil.copytree(folders["llama"], tmp_path / "copy")
    assert source.identity(folder) == source.identity(folders["llama"])
    assert tiny.disk_weights_hash(folder) == tiny.disk_weights_hash(folders["llama"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert tiny.disk_weights_hash(folder) != tiny.disk_weights_hash(folders["llama"])
    assert source.identity(folder) != source.identity(folders["llama"])


# Loading


def test_a_model_that_is_nowhere_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing answers, long before a name lookup would give up; and at once when told to stay offline."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")  # an address that is reserved and never answers
    import huggingface_hub  # noqa: F401 (its import is not what is timed)

    begun = time.perf_counter()
    with pytest.raises(ModelError, match="no-such-org/no-such-model") as caught:
        load("no-such-org/no-such-model", device="cpu")
    assert time.perf_counter() - begun < 2.5
    assert "atlas" in caught.value.hint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    begun = time.perf_counter()
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        load("no-such-org/no-such-model", device="cpu")
    assert time.perf_counter() - begun < 0.5


def test_a_folder_that_is_no_model_is_told(tmp_path: Path) -> None:
    """Without config.json, with one that is no JSON, or with a path that leads nowhere."""
    with pytest.raises(ModelError, match=r"config\.json"):
        load(str(tmp_path), device="cpu")
    with pytest.raises(ModelError, match="no folder"):
        load(str(tmp_path / "not" / "there"), device="cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError):
        load(str(tmp_path), device="cpu")
    with pytest.raises(ModelError, match=r"config\.json"):
        source.configuration(tmp_path)


@pytest.mark.parametrize("kind", ["GPT-2", "Qwen 2, 2.5"])
def test_a_model_without_a_tokenizer_is_told(tmp_path: Path, kind: str) -> None:
    """Also where transformers would make one up that knows no words."""
    builds.BUILDS[kind].net().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(str(tmp_path), device="cpu")
    assert caught.value.hint
    assert outline(str(tmp_path)).tokenizer is None


@pytest.mark.parametrize("spoil", ["weights missing", "weights cut", "tokenizer missing"])
def test_a_model_with_a_broken_file_is_told(folders: Any, tmp_path: Path, spoil: str) -> None:
    """As a ModelError with a hint, whichever library stumbles over it."""
    folder = shutil.copytree(folders["llama"], tmp_path / "copy")
    weights = folder / "model.safetensors"
    if spoil == "weights missing":
        weights.unlink()
    elif spoil == "weights cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    with pytest.raises(ModelError) as caught:
        load(str(folder), device="cpu")
    assert caught.value.hint


def test_a_device_that_is_not_there_is_told(folders: Any) -> None:
    """With those that are; an unknown one likewise."""
    absent = "cuda" if not torch.cuda.is_available() else "mps"
    for device in (absent, "abacus"):
        with pytest.raises(InvalidInput, match=device) as caught:
            load(str(folders["llama"]), device=device)
        assert "cpu" in caught.value.hint


def test_an_unknown_dtype_is_told(folders: Any) -> None:
    """With the known ones."""
    with pytest.raises(InvalidInput, match="int8") as caught:
        load(str(folders["llama"]), device="cpu", dtype="int8")
    assert "bfloat16" in caught.value.hint
    assert load(str(folders["llama"]), device="cpu").dtype == torch.float32
