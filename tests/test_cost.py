"""What a run will need: sizes by config.json, the engine's state by formula, time by the last run or by assumption."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import BUILDS, DEPTH, SIZE, WIDTH
from torch import Tensor

from editctl.delta import Factors
from editctl.engine.cost import Pace, Shape, State, expected, shape_of, state
from editctl.engine.methods import METHODS, Settings, settings
from editctl.engine.solve import Kernel
from editctl.engine.statistics import Moment

LLAMA = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096}
LLAMA |= {"intermediate_size": 14336, "vocab_size": 128256}
EIGHT = Shape(blocks=32, hidden=4096, key=14336, vocabulary=128256, weights=16_060_000_000)
KEY = 14336
CPU = torch.device("cpu")


def made(method: str, **changes: Any) -> Settings:
    return settings(LLAMA, method, changes)


def of_method(method: str, edits: int, **changes: Any) -> State:
    """The state of the published blocks of Llama 3 8B."""
    chosen = made(method, **changes)
    return state(EIGHT, len(chosen.layers), edits, chosen)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("name", BUILDS)
def test_sizes_are_read_from_every_architectures_configuration(name: str, tmp_path: Path) -> None:
    """Whatever it calls them; bytes are those of the safetensors files alone."""
    (tmp_path / "a.safetensors").write_bytes(bytes(70))
    (tmp_path / "b.safetensors").write_bytes(bytes(7))
    (tmp_path / "tokenizer.json").write_bytes(bytes(1000))
    build = BUILDS[name]
    assert shape_of(build.config().to_dict(), tmp_path) == Shape(DEPTH, WIDTH, build.width, SIZE, 77)


def test_a_size_that_is_not_said_is_nothing(tmp_path: Path) -> None:
    """And one that is null falls back to four times the hidden width."""
    assert shape_of({}, tmp_path) == Shape(0, 0, 0, 0, 0)
    assert shape_of({"n_embd": 8, "n_inner": None}, tmp_path).key == 32
    assert shape_of({"n_embd": 8, "n_inner": 12}, tmp_path).key == 12


# ---------------------------------------------------------------------------------------------------------------------
# The engine's state


def test_the_state_of_alphaedit_on_llama_3_8b() -> None:
    """Five blocks, 2000 edits, by hand: at most half of P's columns, one column an edit, three thin matrices."""
    assert of_method("alphaedit", 2000) == State(
        projector=5 * KEY * (KEY // 2) * 4,
        history=5 * KEY * 2000 * 4,
        factors=5 * 2000 * (2 * KEY + 4096) * 4,
        masters=5 * 4096 * KEY * 4,
        moments=5 * KEY * KEY * 4,
        reference=5 * 2 * KEY * KEY * 4,
    )


@pytest.mark.parametrize(
    ("method", "edits", "third"),
    [("alphaedit", 2000, True), ("alphaedit", 2300, True), ("alphaedit", 3000, False), ("memit", 2000, False)],
)
def test_alphaedit_holds_at_most_a_third_of_the_reference_for_two_thousand_edits(
    method: str, edits: int, third: bool
) -> None:
    """Of dense P and K_p K_pᵀ. Control: a thousand edits more, or MEMIT's λ, which needs the whole basis, take more."""
    found = of_method(method, edits)
    assert found.held == found.projector + found.history
    assert (3 * found.held <= found.reference) == third


def test_history_never_takes_more_than_a_square() -> None:
    """Past half the key width the update of S replaces its columns; without history there is nothing to hold."""
    sizes = [of_method("alphaedit", n).history / (5 * KEY * 4) for n in (0, 1, KEY // 2, KEY // 2 + 1, 10 * KEY)]
    assert sizes == [0, 1, KEY // 2, KEY, KEY]
    assert of_method("memit", 2000).history == 0 < of_method("memit-history", 2000).history


def test_what_needs_no_basis_holds_none() -> None:
    """A ridge alone, and fine-tuning; with preservation both do."""
    assert of_method("alphaedit", 10, preserve="none").projector == 0
    assert of_method("ft", 10).projector == 0 < of_method("ft", 10, preserve="null-space").projector


def matrices(kernel: Kernel) -> list[Tensor]:
    """Those that a kernel and its projector keep."""
    values = [*vars(kernel).values(), *(vars(kernel.projector).values() if kernel.projector else ())]
    return [value for value in values if isinstance(value, Tensor) and value.dim() == 2]


def held_by(kernel: Kernel) -> int:
    """Bytes of the matrices a kernel keeps."""
    return sum(matrix.nbytes for matrix in matrices(kernel))


def a_moment() -> Moment:
    return Moment(torch.eye(WIDE), torch.linspace(0.1, 1, WIDE, dtype=torch.float64), 1000)


def some_keys(edits: int) -> Tensor:
    return torch.randn(WIDE, edits, generator=torch.Generator().manual_seed(0))


WIDE = 48
SMALL = Shape(blocks=4, hidden=6, key=WIDE, vocabulary=100, weights=1)


@pytest.mark.parametrize("edits", [0, 5, WIDE // 2, WIDE // 2 + 1, 2 * WIDE])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("method", ["alphaedit", "memit", "memit-history", "encore", "betaedit", "sphere", "rome"])
def test_a_kernel_holds_what_the_formula_says(method: str, quantile: float, edits: int) -> None:
    """At most, and just that when the null space is half of the directions or none is kept to."""
    chosen = made(method, **({"quantile": quantile} if METHODS[method].null_space else {}))
    kernel = Kernel(a_moment(), chosen.ridge, chosen.null_space, CPU, replace(chosen.write, refresh=0))
    kernel.absorb(some_keys(edits))
    limit = state(SMALL, 1, edits, chosen).held
    assert held_by(kernel) <= limit
    if chosen.null_space is None or (quantile == 0.5 and not chosen.ridge.lambda_):
        assert held_by(kernel) == limit


def test_the_count_of_a_kernels_matrices_notices_a_dense_projector() -> None:
    """Control: were P kept as it is, alphaedit would not be within its bound."""
    chosen = made("alphaedit", quantile=0.5)
    kernel = Kernel(a_moment(), chosen.ridge, chosen.null_space, CPU)
    assert kernel.projector is not None
    kernel.projector._side = torch.eye(WIDE)
    assert held_by(kernel) > state(SMALL, 1, 0, chosen).held


def test_columns_that_a_square_has_replaced_are_let_go() -> None:
    """Not only out of reach: the memory behind them is free."""
    chosen = made("alphaedit", quantile=0.5)
    kernel = Kernel(a_moment(), chosen.ridge, chosen.null_space, CPU)
    kernel.absorb(some_keys(WIDE))
    behind = {matrix.untyped_storage().data_ptr(): matrix.untyped_storage().nbytes() for matrix in matrices(kernel)}
    assert sum(behind.values()) == held_by(kernel)


@pytest.mark.parametrize("edits", [1, 7])
def test_thin_factors_take_on_disk_what_the_formula_says(edits: int) -> None:
    """Keys, residuals and factors in fp32; two blocks take twice that."""
    factors = Factors(torch.zeros(WIDE, edits), torch.zeros(6, edits), torch.zeros(edits, WIDE))
    size = sum(tensor.nbytes for tensor in factors.tensors().values())
    assert [state(SMALL, layers, edits, made("alphaedit")).factors for layers in (1, 2)] == [size, 2 * size]


# ---------------------------------------------------------------------------------------------------------------------
# What a run will take

PACE = Pace(
    "0123456789abcdef", 10, 40, {"target": 6.0, "keys": 2.0, "solve": 1.0, "write": 1.0, "before": 3.0, "after": 1.0}
)


@pytest.mark.parametrize(
    ("new", "asked", "seconds"), [(0, 0, 0), (10, 0, 10), (0, 40, 4), (10, 40, 14), (200, 80, 208)]
)
def test_time_is_that_of_the_last_run_an_edit_and_a_prompt(new: int, asked: int, seconds: float) -> None:
    """Edits cost what targets, keys, solve and write did; prompts what asking before and after did; loading and
    statistics do not count."""
    pace = replace(PACE, seconds={**PACE.seconds, "statistics": 99.0, "commit": 99.0})
    found = expected(EIGHT, made("alphaedit"), new, asked, "cpu", pace)
    assert found.seconds == pytest.approx(seconds)
    assert found.basis == "at the pace of version 0123456789ab"


@pytest.mark.parametrize("last", [None, replace(PACE, edits=0), replace(PACE, asked=0)])
def test_without_a_run_that_edited_time_is_assumed(last: Pace | None) -> None:
    """From the model's size and the device's speed; more of either kind of work takes longer."""

    def seconds(new: int = 10, asked: int = 10, device: str = "cpu", **changes: Any) -> float:
        found = expected(EIGHT, made("alphaedit", **changes), new, asked, device, last)
        assert found.basis.startswith("assuming ") and found.basis.endswith(" FLOP/s")
        return found.seconds

    assert 0 < seconds() < seconds(new=20) and seconds() < seconds(asked=20) and seconds() < seconds(steps=50)
    assert seconds(device="cuda") < seconds() / 100 and seconds(device="auto") == seconds()
    assert seconds(device="cuda:1") == seconds(device="cuda")
    # The optimisation of one edit reads about 42 rows a step: minutes on a CPU, under a second on a GPU.
    assert 60 < seconds(asked=0) / 10 < 3600 and 0.05 < seconds(asked=0, device="cuda") / 10 < 5


def test_memory_counts_weights_masters_moments_state_and_a_pass() -> None:
    """In bf16 an 8B model needs its weights once, in fp32 twice; more edits and more blocks need more."""

    def memory(new: int = 100, device: str = "cuda", **changes: Any) -> int:
        dtype = changes.pop("dtype", "bfloat16")
        chosen = replace(made("alphaedit", **changes), dtype=dtype)
        return expected(EIGHT, chosen, new, 10, device, None).bytes

    needs = of_method("alphaedit", 100)
    least = EIGHT.weights + needs.masters + needs.moments + needs.held
    assert least < memory() < 2 * least
    assert memory(dtype="float32") - memory() > EIGHT.weights
    assert memory(dtype="auto") == memory() and memory(dtype="auto", device="cpu") == memory(dtype="float32")
    assert memory(new=1100) - memory() == 5 * KEY * 1000 * 4
    assert memory(layers=[4]) < memory()


def test_judging_what_a_run_needs_loads_no_torch(tmp_path: Path) -> None:
    """A plan shows it, and a plan needs none."""
    code = "import sys, editctl.engine.cost; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
