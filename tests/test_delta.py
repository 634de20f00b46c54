"""Factor files: what is written comes back, and factors become weights with the same bits whichever way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from editctl import delta as delta_module
from editctl.delta import (
    Delta,
    Factors,
    after,
    beside,
    compose,
    digest,
    load,
    pack,
    read_tensors,
    save,
    unpack,
    write_tensors,
)
from editctl.errors import StoreError


def some_factors(n: int, d_in: int = 12, d_out: int = 8, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Factors(random(d_in, n), random(d_out, n), random(n, d_in))


def a_delta(n: int = 3, seed: int = 0, d_in: int = 12, d_out: int = 8) -> Delta:
    modules = {f"model.layers.{i}.mlp.down": some_factors(n, d_in, d_out, seed=seed + i) for i in (2, 10)}
    return Delta(tuple(f"édit-{i}" for i in range(n)), modules, {"layers": [2, 10], "ridge": {"l2": 0.02}})


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


THIN = ("thin", "with a low-rank part")
D_OUT, D_IN = 7, 9
"""Of small updates: 63 entries, not a multiple of 8."""
KINDS = (*THIN, "sparse", "sparse with a low-rank part", "dense")

PAIRS = list(itertools.product(KINDS, repeat=2))


def of_kind(kind: str, n: int = 3, seed: int = 0, d_out: int = D_OUT, d_in: int = D_IN) -> Factors:
    """Factors with the parts that this kind has."""
    factors = some_factors(n, d_in, d_out, seed)
    if "low-rank" in kind:
        factors = replace(factors, left=random(d_out, 2, seed=seed + 100), right=random(2, d_in, seed=seed + 101))
    if "sparse" in kind:
        factors = replace(factors, mask=pack(random(d_out, d_in, seed=seed + 102) > 0.3))
    if kind == "dense":
        factors = replace(factors, dense=random(d_out, d_in, seed=seed + 103))
    return factors


def whole(factors: Factors) -> Tensor:
    """The update written out in float64, entry by entry of what each part means."""
    if factors.dense is not None:
        return factors.dense.double()
    total = factors.residuals.double() @ factors.factor.double()
    if factors.left is not None and factors.right is not None:
        total = total + factors.left.double() @ factors.right.double()
    if factors.mask is not None:
        bits = [byte >> (7 - i) & 1 for byte in factors.mask.tolist() for i in range(8)]
        total = total * torch.tensor(bits[: total.numel()]).view(total.shape)
    return total


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> None:
    assert one.shape == other.shape
    assert float((one.double() - other.double()).norm() / other.double().norm()) < tolerance


def assert_same(one: Delta, other: Delta) -> None:
    for name in ("edits", "params", "columns", "places", "together", "found"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.modules.keys() == other.modules.keys()
    for module, factors in one.modules.items():
        assert factors.tensors().keys() == other.modules[module].tensors().keys()
        for part, tensor in factors.tensors().items():
            found = other.modules[module].tensors()[part]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), f"{module} {part}"


# ---------------------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_with_updates_of_any_kind_is_the_base_plus_what_they_mean(kind: str) -> None:
    """To single precision against float64, and bit for bit one after another as at once; each part counts."""
    base, updates = BASE[:D_OUT, :D_IN], [of_kind(kind, seed=seed) for seed in (1, 20, 40)]
    composed = compose(base, updates)
    assert_close(composed, base.double() + sum(whole(update) for update in updates))
    again = base
    for update in updates:
        again = compose(again, [update])
    assert torch.equal(composed, again)
    for part in set(updates[0].tensors()) - {"keys"}:
        spoiled = replace(updates[0], **{part: torch.zeros_like(updates[0].tensors()[part])})
        same = torch.equal(composed, compose(base, [spoiled, *updates[1:]]))
        assert same == (kind == "dense" and part != "dense"), f"the update of kind {kind} must depend on its {part}"


def test_a_mask_over_many_slices_leaves_the_other_entries_their_bits() -> None:
    """Where the bit is 0 the weight is the base's, where it is 1 that of the whole update."""
    mask = random(*BASE.shape, seed=9) > 0
    masked = replace(UPDATES[0], mask=pack(mask))
    composed = compose(BASE, [masked])
    assert torch.equal(composed, torch.where(mask, compose(BASE, UPDATES[:1]), BASE))
    assert not torch.equal(composed, compose(BASE, [replace(UPDATES[0], mask=pack(~mask))]))


# ---------------------------------------------------------------------------------------------------------------------
# Updates as values


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_what_its_parts_mean(kind: str) -> None:
    """Whole, times a matrix and in norm it is the same update, in the kind its parts say."""
    factors, tall = of_kind(kind), random(D_IN, 4, seed=55)
    exact = whole(factors)
    assert factors.kind == ("thin" if kind in THIN else kind.split()[0]) and factors.shape == (D_OUT, D_IN)
    assert factors.update().dtype == torch.float32
    assert_close(factors.update(), exact)
    assert_close(factors.times(tall), exact @ tall.double())
    assert factors.norm() == pytest.approx(float(exact.norm()), rel=1e-5)
    other = whole(of_kind(kind, seed=1))
    for found, wanted in ((factors.update(), other), (factors.times(tall), other @ tall.double())):
        with pytest.raises(AssertionError):
            assert_close(found, wanted)
    assert factors.norm() != pytest.approx(float(other.norm()), rel=1e-3)


def test_the_norm_of_a_thin_update_survives_terms_that_nearly_cancel() -> None:
    """Two columns that are almost opposite leave little; the norm is that of what is left."""
    factors = some_factors(1)
    residuals = torch.cat([factors.residuals, -factors.residuals], dim=1)
    row = torch.cat([factors.factor, factors.factor * (1 + 2**-10)])
    nearly = Factors(factors.keys.repeat(1, 2), residuals, row)
    assert nearly.norm() == pytest.approx(float(whole(nearly).norm()), rel=1e-5)
    assert nearly.norm() < 0.01 * factors.norm()


def written(base: Tensor, parts: Sequence[Factors]) -> Tensor:
    for part in parts:
        base = compose(base, [part])
    return base


@pytest.mark.parametrize("kinds", PAIRS, ids=" beside ".join)
def test_updates_at_different_columns_become_one(kinds: tuple[str, str]) -> None:
    """Their columns stand side by side, the update is the sum, and thin ones give the bits they gave one by one."""
    first, second = of_kind(kinds[0], 2, 1), of_kind(kinds[1], 3, 30)
    made = beside([first, second])
    assert torch.equal(made.keys, torch.cat([first.keys, second.keys], 1))
    assert torch.equal(made.residuals, torch.cat([first.residuals, second.residuals], 1))
    assert_close(made.update(), whole(first) + whole(second))
    assert made.kind == ("thin" if kinds == ("thin", "thin") else "dense")
    if made.kind == "thin":
        base = BASE[:D_OUT, :D_IN]
        assert torch.equal(compose(base, [made]), written(base, [first, second]))
        assert not torch.equal(compose(base, [beside([second, first])]), written(base, [first, second]))
    with pytest.raises(AssertionError):
        assert_close(made.update(), whole(first) + whole(replace(second, residuals=-second.residuals, dense=None)))


@pytest.mark.parametrize("kinds", PAIRS, ids=" after ".join)
def test_updates_at_the_same_columns_become_one(kinds: tuple[str, str]) -> None:
    """Keys and residuals are those of the first, the update is the sum, and what is thin stays so, with its bits."""
    first, second = of_kind(kinds[0], 3, 1), of_kind(kinds[1], 3, 30)
    made = after([first, second])
    assert torch.equal(made.keys, first.keys) and torch.equal(made.residuals, first.residuals)
    assert_close(made.update(), whole(first) + whole(second))
    thin = set(kinds) <= set(THIN)
    assert made.kind == ("thin" if thin else "dense")
    if thin:
        base = BASE[:D_OUT, :D_IN]
        assert torch.equal(compose(base, [made]), written(base, [first, second]))
        assert not torch.equal(compose(base, [after([second, first])]), written(base, [first, second]))
    with pytest.raises(AssertionError):
        assert_close(made.update(), whole(first) - whole(second))


def test_three_rounds_become_one_update() -> None:
    """Low-rank parts of each round keep their place in the order, so the bits are those of the rounds."""
    parts = [of_kind(kind, 3, seed) for kind, seed in (("thin", 1), ("with a low-rank part", 30), ("thin", 60))]
    made, base = after(parts), BASE[:D_OUT, :D_IN]
    assert made.left is not None and made.left.shape == (D_OUT, 3 + 2 + 3)
    assert torch.equal(compose(base, [made]), written(base, parts))
    assert not torch.equal(compose(base, [made]), written(base, [parts[0], parts[2], parts[1]]))


@pytest.mark.parametrize("join", [beside, after])
@pytest.mark.parametrize("kind", KINDS)
def test_one_update_alone_is_itself(join: Any, kind: str) -> None:
    """No copy, no other kind."""
    factors = of_kind(kind)
    assert join([factors]) is factors


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (3, 5), (7, 9), (16, 3), (1, 17), (40, 41)], ids=str)
def test_masks_survive_as_bits(shape: tuple[int, int]) -> None:
    """⌈entries / 8⌉ bytes, row by row, highest bit first, whether or not 8 divides them; each bit is its own."""
    mask = random(*shape, seed=sum(shape)) > 0
    bits, count = pack(mask), mask.numel()
    assert bits.dtype == torch.uint8 and len(bits) == -(-count // 8)
    assert torch.equal(unpack(bits, shape), mask) and unpack(bits, shape).dtype == torch.bool
    text = "".join(str(int(bit)) for bit in mask.flatten().tolist()).ljust(8 * len(bits), "0")
    assert bytes(bits.tolist()) == int(text, 2).to_bytes(len(bits), "big")
    for i in range(0, count, 7):
        other = mask.clone()
        other.view(-1)[i] ^= True
        assert not torch.equal(pack(other), bits) and torch.equal(unpack(pack(other), shape), other)


def test_full_and_empty_masks_are_all_and_nothing() -> None:
    """All ones is the whole update, all zeros none of it."""
    factors = of_kind("thin")
    ones, zeros = (replace(factors, mask=pack(torch.full((D_OUT, D_IN), value, dtype=torch.bool))) for value in (1, 0))
    assert torch.equal(ones.update(), factors.update()) and not zeros.update().any() and zeros.norm() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_update_comes_back_byte_for_byte(tmp_path: Path, kind: str) -> None:
    """All parts, none more; saved again it has the same name, and composes to the same bits."""
    delta = Delta(("a", "b", "c"), {"x.y": of_kind(kind), "x.z": of_kind("thin", seed=9)}, {})
    name = save(delta, tmp_path)
    back = load(name, tmp_path)
    assert_same(back, delta)
    assert save(back, tmp_path / "again") == name and back.to_bytes() == delta.to_bytes()
    base = BASE[:D_OUT, :D_IN]
    assert torch.equal(compose(base, [back.modules["x.y"]]), compose(base, [delta.modules["x.y"]]))
    for part, tensor in of_kind(kind).tensors().items():
        changed = tensor.clone()
        changed.view(-1)[0] += 1
        spoiled = {**delta.modules, "x.y": replace(delta.modules["x.y"], **{part: changed})}
        assert save(replace(delta, modules=spoiled), tmp_path) != name


def test_what_is_said_about_a_batch_comes_back(tmp_path: Path) -> None:
    """Columns, places, the prompts of each column and what was found; each of them is part of the name."""
    told: dict[str, Any] = {
        "columns": (0, 1, 0),
        "places": ("The Eiffel Tower", "Zürich"),
        "together": (("The Eiffel Tower is in", "The Eiffel Tower stands in"), ("Zürich is",)),
        "found": {"anchor": 1.25},
    }
    delta = Delta(("a", "b", "c"), {"m": some_factors(2)}, {"method": "nas"}, **told)
    name = save(delta, tmp_path)
    assert_same(load(name, tmp_path), delta)
    plain = replace(delta, columns=(0, 1, 2), places=(), together=(), found={})
    for key, value in told.items():
        other = replace(plain, **{key: value})
        assert save(other, tmp_path) != save(plain, tmp_path)
        assert_same(load(save(other, tmp_path), tmp_path), other)


def test_edits_have_columns_of_their_own_unless_told(tmp_path: Path) -> None:
    """Edit i has column i by default, in memory and from the file; columns that are named stay."""
    delta = Delta(("a", "b", "c"), {"m": some_factors(3)}, {})
    assert delta.columns == load(save(delta, tmp_path), tmp_path).columns == (0, 1, 2)
    assert Delta(("a", "b", "c"), {"m": some_factors(2)}, {}, columns=(1, 0, 1)).columns == (1, 0, 1)
    assert Delta((), {}, {}).columns == ()


def test_a_file_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a later editctl wrote, and one that it did not write at all; its own loads."""
    name = save(a_delta(), tmp_path)
    load(name, tmp_path)
    monkeypatch.setattr(delta_module, "FORMAT", 3)
    later = save(a_delta(), tmp_path)
    monkeypatch.undo()
    foreign = safetensors.torch.save({"m.keys": torch.ones(2)}, {"format": "pt"})
    (tmp_path / f"{digest(foreign)}.safetensors").write_bytes(foreign)
    for other in (later, digest(foreign)):
        with pytest.raises(StoreError, match="format") as caught:
            load(other, tmp_path)
        assert caught.value.hint


def test_a_delta_comes_back_as_it_was(tmp_path: Path) -> None:
    """Edits, parameters and every tensor survive the file; another delta is told apart."""
    name = save(a_delta(), tmp_path)
    assert_same(load(name, tmp_path), a_delta())
    with pytest.raises(AssertionError):
        assert_same(load(name, tmp_path), a_delta(seed=1))


def test_the_same_content_has_the_same_name(tmp_path: Path) -> None:
    """Order of modules and parameters does not count, nor does saving twice; one changed number does."""
    delta = a_delta()
    turned = Delta(delta.edits, dict(reversed([*delta.modules.items()])), dict(reversed([*delta.params.items()])))
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

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(a_delta(), tmp_path)
    assert list(tmp_path.glob("*.safetensors")) == []
    monkeypatch.undo()
    assert_same(load(save(a_delta(), tmp_path), tmp_path), a_delta())


def test_tensors_and_their_metadata_come_back(tmp_path: Path) -> None:
    """The general reader and writer, which the statistics cache uses; foreign and cut files are told apart."""
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1.5], dtype=torch.float64)}
    path = tmp_path / "deep" / "file.safetensors"
    write_tensors(path, tensors, {"layer": "2"})
    found, metadata = read_tensors(path)
    assert metadata == {"layer": "2"} and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert found["b"].dtype == torch.float64
    foreign, cut = tmp_path / "foreign", tmp_path / "cut"
    foreign.write_bytes(safetensors.torch.save({"b": tensors["b"]}, {"format": "pt"}))
    with pytest.raises(KeyError):
        read_tensors(foreign)
    cut.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(safetensors.SafetensorError):
        read_tensors(cut)
