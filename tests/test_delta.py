"""Factor files: what is written comes back, and factors become weights with the same bits whichever way."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editctl import delta as delta_module
from editctl.delta import Delta, Factors, compose, digest, load, read_tensors, save, write_tensors
from editctl.errors import StoreError


def some_factors(n: int, d_in: int = 12, d_out: int = 8, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Factors(random(d_in, n), random(d_out, n), random(n, d_in))


def a_delta(n: int = 3, seed: int = 0, d_in: int = 12, d_out: int = 8) -> Delta:
    modules = {f"model.layers.{i}.mlp.down": some_factors(n, d_in, d_out, seed=seed + i) for i in (2, 10)}
    return Delta(tuple(f"édit-{i}" for i in range(n)), modules, {"layers": [2, 10], "ridge": {"l2": 0.02}})


def assert_same(one: Delta, other: Delta) -> None:
    assert one.edits == other.edits and one.params == other.params and one.modules.keys() == other.modules.keys()
    for name, factors in one.modules.items():
        for part in ("keys", "residuals", "factor"):
            assert torch.equal(getattr(factors, part), getattr(other.modules[name], part)), f"{name} {part}"


# Composition


BASE = torch.randn(700, 513, generator=torch.Generator().manual_seed(1))
"""Large enough that its rows are taken in more than one slice."""
UPDATES = [some_factors(n, 513, 700, seed=n) for n in (3, 1, 4)]


def one_by_one() -> Tensor:
    weight = BASE
    for update in UPDATES:
        weight = compose(weight, [update])
    return weight


def by_matrix_products() -> Tensor:
    weight = BASE.clone()
    for update in UPDATES:
        weight += update.residuals @ update.factor
    return weight


def test_updates_added_one_by_one_give_the_bits_of_all_at_once() -> None:
    """A version rebuilt from the base equals the one that grew; a sum of matrix products has other bits."""
    whole = compose(BASE, UPDATES)
    assert torch.equal(whole, one_by_one())
    assert not torch.equal(whole, by_matrix_products())


def test_a_batch_split_by_edit_gives_the_same_bits() -> None:
    """Term by term means that where one batch ends and the next begins does not matter."""
    split = [
        Factors(u.keys[:, i : i + 1], u.residuals[:, i : i + 1], u.factor[i : i + 1])
        for u in UPDATES
        for i in range(u.factor.shape[0])
    ]
    assert torch.equal(compose(BASE, UPDATES), compose(BASE, split))


def test_the_order_of_updates_is_part_of_the_result() -> None:
    """Control for the two above: fp32 addition does not commute over many terms, so equality there is no accident."""
    assert not torch.equal(compose(BASE, UPDATES), compose(BASE, UPDATES[::-1]))


def test_slicing_rows_changes_no_bit() -> None:
    """Any band of rows, composed alone, equals the same rows of the whole; a band of other rows does not."""
    whole = compose(BASE, UPDATES)
    rows = (1 << 18) // BASE.shape[1]
    assert 1 < rows < BASE.shape[0], "the base must need more than one slice"
    for start, end in itertools.pairwise((0, 1, rows - 1, rows + 1, BASE.shape[0])):
        band = [Factors(u.keys, u.residuals[start:end], u.factor) for u in UPDATES]
        assert torch.equal(compose(BASE[start:end], band), whole[start:end])
    shifted = [Factors(u.keys, u.residuals[1:2], u.factor) for u in UPDATES]
    assert not torch.equal(compose(BASE[:1], shifted), whole[:1])


def assert_is_the_product(weight: Tensor, updates: list[Factors]) -> None:
    exact = BASE.double() + sum(u.residuals.double() @ u.factor.double() for u in updates)
    assert float((weight.double() - exact).norm() / exact.norm()) < 1e-6


def test_composition_is_base_plus_the_products() -> None:
    """To single precision it equals W + Σ R A in float64; with a term missing it does not."""
    assert_is_the_product(compose(BASE, UPDATES), UPDATES)
    with pytest.raises(AssertionError):
        assert_is_the_product(compose(BASE, UPDATES[:2]), UPDATES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_composition_starts_from_any_dtype_and_leaves_the_base_alone(dtype: torch.dtype) -> None:
    """The result is fp32 whatever the base is, and the base keeps its bits."""
    base = BASE.to(dtype)
    before = base.clone()
    weight = compose(base, UPDATES)
    assert weight.dtype == torch.float32 and torch.equal(base, before)
    assert torch.equal(weight, compose(base.float(), UPDATES))


def test_no_updates_leave_the_base_as_it_is() -> None:
    """The unedited model is the empty list."""
    composed = compose(BASE, [])
    assert torch.equal(composed, BASE) and composed.data_ptr() != BASE.data_ptr()


# Files


def test_a_delta_comes_back_as_it_was(tmp_path: Path) -> None:
    """Edits, parameters and every tensor survive the file; another delta is told apart."""
    name = save(a_delta(), tmp_path)
    assert_same(load(name, tmp_path), a_delta())
    with pytest.raises(AssertionError):
        assert_same(load(name, tmp_path), a_delta(seed=1))


def test_the_same_content_has_the_same_name(tmp_path: Path) -> None:
    """Order of modules and parameters does not count, nor does saving twice; one changed number does."""
    delta = a_delta()
    turned = Delta(delta.edits, dict(reversed(delta.modules.items())), dict(reversed(delta.params.items())))
    name = save(delta, tmp_path)
    assert save(turned, tmp_path) == save(delta, tmp_path / "elsewhere") == name
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [f"{name}.safetensors"]
    delta.modules["model.layers.2.mlp.down"].keys[0, 0] += 1e-3
    assert save(delta, tmp_path) != name


def test_a_file_is_named_by_the_hash_of_its_bytes(tmp_path: Path) -> None:
    """Anyone can check a store with sha256sum."""
    name = save(a_delta(), tmp_path)
    assert digest((tmp_path / f"{name}.safetensors").read_bytes()) == name and len(name) == 32


def test_strided_and_half_precision_factors_are_written_as_plain_fp32(tmp_path: Path) -> None:
    """Transposed views and bf16 tensors come back as fp32 of the same values."""
    plain = some_factors(3)
    odd = Factors(plain.keys.T.contiguous().T, plain.residuals.bfloat16(), plain.factor.double())
    back = load(save(Delta(("a", "b", "c"), {"m": odd}, {}), tmp_path), tmp_path).modules["m"]
    assert torch.equal(back.keys, plain.keys) and torch.equal(back.factor, plain.factor)
    assert back.residuals.dtype == torch.float32 and torch.equal(back.residuals, plain.residuals.bfloat16().float())


@pytest.mark.parametrize("place", [0, 60, -1], ids=["size", "header", "tensor"])
def test_a_changed_byte_is_noticed(tmp_path: Path, place: int) -> None:
    """Wherever it lies, the load is refused and says which file; the untouched file loads."""
    name = save(a_delta(), tmp_path)
    path = tmp_path / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=name):
        load(name, tmp_path)
    data[place] ^= 1
    path.write_bytes(data)
    assert_same(load(name, tmp_path), a_delta())


def test_a_missing_or_cut_file_is_refused(tmp_path: Path) -> None:
    """With a StoreError that has a remedy, not with a traceback."""
    with pytest.raises(StoreError, match="missing") as caught:
        load("0" * 32, tmp_path)
    assert caught.value.hint
    name = save(a_delta(), tmp_path)
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StoreError):
        load(name, tmp_path)


@pytest.mark.parametrize(("n", "d_in", "d_out"), [(1, 64, 16), (20, 256, 64), (100, 80, 32)])
def test_a_file_stays_within_its_bound(tmp_path: Path, n: int, d_in: int, d_out: int) -> None:
    """2 (d_in + d_out) · layers · 4 bytes an edit and 4 KiB; a format with a full update would not fit."""
    delta = a_delta(n, d_in=d_in, d_out=d_out)
    size = (tmp_path / f"{save(delta, tmp_path)}.safetensors").stat().st_size
    layers = len(delta.modules)

    def assert_thin(size: int) -> None:
        assert size <= 2 * (d_in + d_out) * layers * 4 * n + 4096

    assert_thin(size)
    if n < 20:
        with pytest.raises(AssertionError):
            assert_thin(size + layers * 4 * d_in * d_out)


def test_a_failed_write_leaves_nothing_under_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill before the rename leaves the folder without a half file of that name."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(delta_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(a_delta(), tmp_path)
    assert list(tmp_path.glob("*.safetensors")) == []
    monkeypatch.undo()
    assert_same(load(save(a_delta(), tmp_path), tmp_path), a_delta())


def test_tensors_and_their_metadata_come_back(tmp_path: Path) -> None:
    """The general reader and writer, which the statistics cache uses."""
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1.5], dtype=torch.float64)}
    write_tensors(tmp_path / "deep" / "file.safetensors", tensors, {"layer": "2"})
    found, metadata = read_tensors((tmp_path / "deep" / "file.safetensors").read_bytes())
    assert metadata == {"layer": "2"} and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert found["b"].dtype == torch.float64
