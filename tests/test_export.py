"""Exports: what other programs load gives the version's answers, and what is written wrong is caught when read back."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors import safe_open
from test_overlays import lay, louder, over, trained
from torch import Tensor

from editctl import atlas, export
from editctl import delta as delta_files
from editctl.cli_export import _record
from editctl.delta import Delta, Factors
from editctl.engine import methods
from editctl.engine.model import Model, load
from editctl.errors import EditctlError, InvalidInput, ModelError, StoreError
from editctl.export import Placed, Record, adapter, bundle, card, merged, read_bundle
from editctl.metrics.values import Answer, Metric
from editctl.spec import visible
from editctl.store import Store

# What peft and transformers say of each other, and of an adapter that is wrong on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
]

KINDS = ("gpt2", "llama")
NONE = Path("no trained files")
TEXTS = ("The Eiffel Tower is located in the city of", "Ada was born in", "The quick brown fox ran over")

# Weak enough a ridge that updates are large, as PRUNE and the controls need them.
OVERRIDES: dict[str, dict[str, Any]] = {"ft-m": {"layers": [1]}, "prune": {"lambda": 0.01}, "nse": {"lambda": 0.01}}

OWN_CONFIGURATION = """from transformers import LlamaConfig


class TurnedConfig(LlamaConfig):
    model_type = "turned"
"""
OWN_CODE = """from transformers import LlamaForCausalLM

from .configuration import TurnedConfig


class Turned(LlamaForCausalLM):
    config_class = TurnedConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = -found.logits
        return found
"""


@dataclass(frozen=True)
class Made:
    """A version, its batches and the model it belongs to."""

    model: Model
    deltas: list[Delta]
    record: Record
    files: Path
    """The folder with the factor files."""

    @property
    def prompts(self) -> list[str]:
        return [*TEXTS, *(placed.edit.prompt for placed in self.record.edits)]

    def answers_of(self, net: Any) -> list[Tensor]:
        with torch.no_grad():
            return [net(torch.tensor([self.model.encode(text)])).logits for text in self.prompts]

    def worn(self) -> list[Tensor]:
        """Logits of the version as editctl wears it."""
        with self.model.editing() as editing:
            for delta in self.deltas:
                for module, factors in delta.modules.items():
                    editing.add(module, factors)
            return self.answers_of(self.model.net)


@pytest.fixture(scope="module")
def made(loaded: Callable[..., Model], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Versions of the tiny models by kind, method and dtype; two batches of two edits each."""
    known: dict[tuple[str, ...], Made] = {}

    def get(kind: str, method: str = "alphaedit", dtype: str = "float32") -> Made:
        if (kind, method, dtype) not in known:
            model, store = loaded(kind, dtype), Store(tmp_path_factory.mktemp("store"))
            version = tiny.apply(model, store, tiny.FACTS, corpus, method=method, **OVERRIDES.get(method, {}))
            edits = tuple(Placed(live.edit, live.delta, live.column) for live in store.edits(version))
            names = tuple(dict.fromkeys(placed.delta for placed in edits))
            deltas = [delta_files.load(name, store.deltas_dir) for name in names]
            record = Record(version, names, edits, store.answers(version), store.metrics(version))
            known[kind, method, dtype] = Made(model, deltas, record, store.deltas_dir)
        return known[kind, method, dtype]

    return get


def apart(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


def loaded_by_transformers(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def nothing_left(folder: Path) -> bool:
    """Neither the export nor a trace of its making."""
    return not folder.exists() and (not folder.parent.exists() or list(folder.parent.iterdir()) == [])


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_export_answers_as_the_version(made: Callable[..., Made], kind: str, tmp_path: Path) -> None:
    """Loaded by transformers, bit for bit; the base answers otherwise by far."""
    one = made(kind)
    written = merged(one.model, one.deltas, tmp_path / "out", one.record)
    net = loaded_by_transformers(written.folder)
    assert apart(one.answers_of(net), one.worn()) == 0
    assert apart(one.answers_of(one.model.net), one.worn()) > 0.1
    words = transformers.AutoTokenizer.from_pretrained(written.folder)
    assert all(words(text)["input_ids"] == one.model.encode(text) for text in one.prompts)
    assert written.size == sum(path.stat().st_size for path in written.folder.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["alphaedit", "prune", "nse"])
def test_an_adapter_answers_as_the_version(made: Callable[..., Made], kind: str, method: str, tmp_path: Path) -> None:
    """Loaded by peft, merged by peft, and by transformers from the adapter's folder alone; also with low-rank parts."""
    from peft import PeftModel

    one = made(kind, method)
    more = [f.left is not None for delta in one.deltas for f in delta.modules.values()]
    assert any(more) == (method == "nse" or (method, kind) == ("prune", "gpt2"))
    folder = adapter(one.model, one.deltas, tmp_path / "out", one.record).folder
    worn = one.worn()
    beside = PeftModel.from_pretrained(loaded_by_transformers(one.model.folder), folder)
    assert apart(one.answers_of(beside), worn) < 1e-5
    assert apart(one.answers_of(loaded_by_transformers(folder)), worn) < 1e-5
    assert apart(one.answers_of(beside.merge_and_unload()), worn) < 1e-5
    assert apart(one.answers_of(one.model.net), worn) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_says_what_it_is_made_of(made: Callable[..., Made], kind: str, tmp_path: Path) -> None:
    """The factors themselves under full module paths, one rank, no scale; where it comes from in the metadata."""
    one = made(kind)
    written = adapter(one.model, one.deltas, tmp_path / "out", one.record)
    config = json.loads((written.folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == written.rank == 4 and written.lost == 0
    modules = [one.model.blocks[layer].down_name for layer in (1, 2)]
    assert config["target_modules"] == modules and config["fan_in_fan_out"] == (kind == "gpt2")
    assert config["base_model_name_or_path"] == str(one.model.folder) and "revision" not in config
    with safe_open(written.folder / "adapter_model.safetensors", "pt") as file:
        about = file.metadata()
        left = file.get_tensor(f"base_model.model.{modules[0]}.lora_B.weight")
        right = file.get_tensor(f"base_model.model.{modules[0]}.lora_A.weight")
        assert len(file.keys()) == 4
    assert torch.equal(left, torch.cat([delta.modules[modules[0]].residuals for delta in one.deltas], 1))
    assert torch.equal(right, torch.cat([delta.modules[modules[0]].factor for delta in one.deltas]))
    version = one.record.version
    assert about["version"] == version.id and about["weights_hash"] == version.weights_hash
    assert about["base"] == version.base and about["method"] == "alphaedit" and about["who"] == version.who


def test_modules_of_smaller_rank_are_padded_with_zeros(made: Callable[..., Made], tmp_path: Path) -> None:
    """A module edited by one batch alone has the rank of the others, and its update stays its own."""
    one = made("llama")
    first, second = (one.model.blocks[layer].down_name for layer in (1, 2))
    deltas = [one.deltas[0], replace(one.deltas[1], modules={second: one.deltas[1].modules[second]})]
    written = adapter(one.model, deltas, tmp_path / "out", one.record)
    found = safetensors.torch.load_file(written.folder / "adapter_model.safetensors")
    left, right = (found[f"base_model.model.{first}.lora_{side}.weight"] for side in "BA")
    assert left.shape[1] == right.shape[0] == written.rank == 4
    assert not left[:, 2:].any() and not right[2:].any() and left[:, :2].any()
    other = replace(one, deltas=deltas)
    assert apart(one.answers_of(loaded_by_transformers(written.folder)), other.worn()) < 1e-5
    assert apart(one.worn(), other.worn()) > 0.01


def test_a_merged_export_in_bfloat16_has_the_weights_hash_of_its_version(
    made: Callable[..., Made], tmp_path: Path
) -> None:
    """Written in the version's dtype, as the files alone say; in fp32 it would have another hash."""
    one = made("llama", dtype="bfloat16")
    written = merged(one.model, one.deltas, tmp_path / "out", one.record)
    assert tiny.disk_weights_hash(written.folder) == one.record.version.weights_hash
    assert tiny.disk_weights_hash(written.folder, torch.float32) != one.record.version.weights_hash
    assert json.loads((written.folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_unedited_model_can_be_merged_but_makes_no_adapter(made: Callable[..., Made], tmp_path: Path) -> None:
    """Tied weights are written once; there is nothing to put in an adapter."""
    one = made("gpt2")
    written = merged(one.model, [], tmp_path / "out")
    assert tiny.disk_weights_hash(written.folder) == tiny.disk_weights_hash(one.model.folder)
    assert "unedited" in (written.folder / "README.md").read_text()
    with pytest.raises(InvalidInput, match="no updates") as caught:
        adapter(one.model, [], tmp_path / "none", one.record)
    assert "merged" in caught.value.hint and not (tmp_path / "none").exists()


def test_the_model_is_left_as_it_was(made: Callable[..., Made], tmp_path: Path) -> None:
    """Exporting wears the version and takes it off again, bit for bit."""
    one = made("gpt2")
    before = one.model.weights_hash()
    merged(one.model, one.deltas, tmp_path / "out", one.record)
    assert one.model.weights_hash() == before != one.record.version.weights_hash


def test_how_to_generate_is_kept(made: Callable[..., Made], tmp_path: Path) -> None:
    """Also a temperature for not sampling, which transformers reads but calls invalid."""
    one = made("llama")
    source = shutil.copytree(one.model.folder, tmp_path / "in")
    given = {"temperature": 0.6, "do_sample": False, "eos_token_id": 7}
    (source / "generation_config.json").write_text(json.dumps(given))
    written = merged(load(str(source), device="cpu"), one.deltas, tmp_path / "out", one.record)
    kept = json.loads((written.folder / "generation_config.json").read_text())
    assert {name: kept[name] for name in given} == given


def test_code_that_a_model_brings_goes_with_it(made: Callable[..., Made], tmp_path: Path) -> None:
    """Where it was trusted; what is loaded from the export answers as that code has it."""
    one = made("llama")
    source = shutil.copytree(one.model.folder, tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "turned", "architectures": ["Turned"]}
    config["auto_map"] = {"AutoConfig": "configuration.TurnedConfig", "AutoModelForCausalLM": "own.Turned"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "configuration.py").write_text(OWN_CONFIGURATION)
    (source / "own.py").write_text(OWN_CODE)
    model = load(str(source), device="cpu", trusted=True)
    one = replace(one, model=model)
    written = merged(model, one.deltas, tmp_path / "out", one.record, trusted=True)
    assert (written.folder / "own.py").read_text() == OWN_CODE
    assert (written.folder / "configuration.py").read_text() == OWN_CONFIGURATION
    net = loaded_by_transformers(written.folder, trust_remote_code=True)
    assert apart(one.answers_of(net), one.worn()) == 0
    assert apart([-logits for logits in one.answers_of(net)], made("llama").worn()) == 0


def test_the_base_is_named_so_that_other_programs_find_it(made: Callable[..., Made], tmp_path: Path) -> None:
    """The built-in model by its folder, a hub id by itself with the commit it was read at."""
    one = made("llama")
    net, words = one.model.net, one.model.tokenizer

    def named(name: str, folder: Path) -> dict[str, Any]:
        model = Model(net, words, name=name, folder=folder)
        out = tmp_path / name.replace("/", "-")
        adapter(model, one.deltas, out, one.record)
        return json.loads((out / "adapter_config.json").read_text())

    assert named("atlas", atlas.FOLDER)["base_model_name_or_path"] == str(atlas.FOLDER)
    hub = named("someone/something", Path("/cache/models--someone--something/snapshots/0123abcd"))
    assert (hub["base_model_name_or_path"], hub["revision"]) == ("someone/something", "0123abcd")
    assert (
        "from_pretrained('someone/something', revision='0123abcd'"
        in (tmp_path / "someone-something/README.md").read_text()
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is written wrong is caught

Files = tuple[dict[str, Any], dict[str, Tensor]]


def other_alpha(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["lora_alpha"] = 2 * config["r"]


def no_prefix(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


def sides_swapped(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        tensors[key], tensors[other] = tensors[other].T.contiguous(), tensors[key].T.contiguous()


def sides_renamed(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        tensors[key], tensors[other] = tensors[other], tensors[key]


def module_without_factors(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".1." in key]:
        del tensors[key]


def module_not_named(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del config["target_modules"][0]


def module_of_another_name(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["target_modules"][0] += "x"


def modules_exchanged(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".1." in key]:
        other = key.replace(".1.", ".2.")
        tensors[key], tensors[other] = tensors[other], tensors[key]


def one_more_module(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    more = [target.replace(".1.", ".0.") for target in config["target_modules"] if ".1." in target]
    config["target_modules"] += more
    for key in [key for key in tensors if ".1." in key]:
        tensors[key.replace(".1.", ".0.")] = tensors[key].clone()


def rank_without_alpha(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["rank_pattern"] = dict.fromkeys(config["target_modules"], 4)


def another_scale_by_rank(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["use_rslora"] = True


def another_rank(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["r"] = config["lora_alpha"] = 3


def one_number_changed(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    next(tensors[key] for key in sorted(tensors) if "lora_B" in key)[0, 0] += 0.01


def not_a_number(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    next(tensors[key] for key in sorted(tensors) if "lora_B" in key)[0, 0] = float("nan")


def half_precision(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key in tensors:
        tensors[key] = tensors[key].half()


FAULTS = [
    *(other_alpha, no_prefix, sides_swapped, sides_renamed, module_without_factors, module_not_named),
    *(module_of_another_name, modules_exchanged, one_more_module, rank_without_alpha, another_scale_by_rank),
    *(another_rank, one_number_changed, not_a_number, half_precision),
]


def spoil(folder: Path, fault: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Write an adapter's files again with a fault in them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    fault(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def nothing(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Written again without a fault."""


@pytest.fixture
def badly_written(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes adapters be written with a fault."""
    write = export._write_adapter

    def use(fault: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
        def spoiled(folder: Path, *arguments: Any) -> None:
            write(folder, *arguments)
            spoil(folder, fault)

        monkeypatch.setattr(export, "_write_adapter", spoiled)

    return use


@pytest.mark.parametrize("rank", [None, 1], ids=["whole", "cut"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_an_adapter_written_wrong_is_refused_and_leaves_nothing(
    made: Callable[..., Made], badly_written: Callable[..., None], fault: Any, rank: int | None, tmp_path: Path
) -> None:
    """Most of these load elsewhere without a word and give other answers."""
    one = made("llama")
    badly_written(fault)
    with pytest.raises(StoreError, match="not what was meant") as caught:
        adapter(one.model, one.deltas, tmp_path / "out", one.record, rank=rank)
    assert caught.value.hint and nothing_left(tmp_path / "out")


def test_an_adapter_written_again_without_a_fault_is_taken(
    made: Callable[..., Made], badly_written: Callable[..., None], tmp_path: Path
) -> None:
    """Control: it is the fault that is refused, not the writing."""
    one = made("llama")
    badly_written(nothing)
    assert adapter(one.model, one.deltas, tmp_path / "out", one.record).folder.is_dir()


@pytest.mark.parametrize("fault", [other_alpha, no_prefix, another_scale_by_rank], ids=lambda fault: fault.__name__)
def test_the_faults_that_are_caught_are_those_that_peft_does_not_notice(
    made: Callable[..., Made], fault: Any, tmp_path: Path
) -> None:
    """peft loads them, at most with a warning, and the answers are not the version's."""
    from peft import PeftModel

    one = made("llama")
    folder = adapter(one.model, one.deltas, tmp_path / "out", one.record).folder
    spoil(folder, nothing)
    right = PeftModel.from_pretrained(loaded_by_transformers(one.model.folder), folder)
    assert apart(one.answers_of(right), one.worn()) < 1e-5
    spoil(folder, fault)
    wrong = PeftModel.from_pretrained(loaded_by_transformers(one.model.folder), folder)
    assert apart(one.answers_of(wrong), one.worn()) > 0.01


def test_names_that_also_match_other_modules_are_caught(
    made: Callable[..., Made], badly_written: Callable[..., None], tmp_path: Path
) -> None:
    """PEFT matches by suffix: GPT-2's `1.mlp.c_proj` alone is one module, `c_proj` all, attention's among them."""

    def suffix(target: str) -> Callable[..., None]:
        def fault(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
            config["target_modules"] = [target, *config["target_modules"]]
            for layer in range(4):
                for path in ("mlp.c_proj", "attn.c_proj"):
                    for side in "AB":
                        key = f"base_model.model.transformer.h.{layer}.{path}.lora_{side}.weight"
                        width = 128 if (path, side) == ("mlp.c_proj", "A") else 32
                        tensors.setdefault(key, torch.ones((4, width) if side == "A" else (width, 4)))

        return fault

    one = made("gpt2")
    badly_written(suffix("1.mlp.c_proj"))
    adapter(one.model, one.deltas, tmp_path / "right", one.record)
    badly_written(suffix("c_proj"))
    with pytest.raises(StoreError, match=r"h\.0\.attn\.c_proj would be changed"):
        adapter(one.model, one.deltas, tmp_path / "wrong", one.record)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_merged_export_written_wrong_is_refused_and_leaves_nothing(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, file: str, tmp_path: Path
) -> None:
    """One number of the weights, one word of the tokenizer, a configuration that nothing can be loaded by."""
    one = made("llama")
    write = type(one.model.tokenizer).save_pretrained

    def spoiled(self: Any, folder: Path, **options: Any) -> Any:
        write(self, folder, **options)
        path = Path(folder) / file
        if file.endswith(".safetensors"):
            tensors = safetensors.torch.load_file(path)
            tensors["model.layers.3.mlp.down_proj.weight"][0, 0] += 1e-3
            safetensors.torch.save_file(tensors, path, {"format": "pt"})
        elif file == "tokenizer.json":
            content = json.loads(path.read_text())
            words, (a, b) = content["model"]["vocab"], ("e", "i")
            words[a], words[b] = words[b], words[a]
            path.write_text(json.dumps(content))
        else:
            path.write_text("{}")

    monkeypatch.setattr(type(one.model.tokenizer), "save_pretrained", spoiled)
    with pytest.raises(StoreError, match="not what was meant"):
        merged(one.model, one.deltas, tmp_path / "out", one.record)
    assert nothing_left(tmp_path / "out")


def test_weights_that_are_not_the_versions_are_not_exported(made: Callable[..., Made], tmp_path: Path) -> None:
    """A batch too few, and the right batches on the model in another dtype; nothing is written."""
    one, half = made("llama"), made("llama", dtype="bfloat16")
    with pytest.raises(StoreError, match="rebuilt") as caught:
        merged(one.model, one.deltas[:1], tmp_path / "out", one.record)
    assert "backup" in caught.value.hint
    with pytest.raises(InvalidInput, match=r"made in torch\.float32") as caught:
        merged(half.model, one.deltas, tmp_path / "out", one.record)
    assert "--dtype float32" in caught.value.hint and nothing_left(tmp_path / "out")


@pytest.mark.parametrize("write", [merged, adapter])
def test_updates_of_another_model_are_refused(made: Callable[..., Made], write: Any, tmp_path: Path) -> None:
    """By the names of its modules, and by their shapes where the names agree."""
    one = made("llama")
    with pytest.raises(ModelError, match="has no module"):
        write(made("gpt2").model, one.deltas, tmp_path / "out", one.record)
    module = one.model.blocks[1].down_name
    narrow = Factors(torch.ones(79, 1), torch.ones(32, 1), torch.ones(1, 79))
    with pytest.raises(ModelError, match=r"32 × 80, its update 32 × 79"):
        write(one.model, [Delta(("a",), {module: narrow}, {})], tmp_path / "out", one.record)
    assert nothing_left(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def of_rank(model: Model, columns: int, layers: tuple[int, ...] = (1, 2), **parts: Any) -> Delta:
    """A batch of random updates with sizes that fall off."""
    generator = torch.Generator().manual_seed(columns)
    modules = {}
    for layer in layers:
        d_out, d_in = model.blocks[layer].weight.shape
        sizes = 0.9 ** torch.arange(columns)
        left = torch.randn(d_out, columns, generator=generator) * sizes
        right = torch.randn(columns, d_in, generator=generator)
        modules[model.blocks[layer].down_name] = Factors(torch.zeros(d_in, columns), 0.01 * left, right)
    return Delta((), modules, {})


def energy_lost(update: Tensor, rank: int) -> float:
    """By the singular values of the whole matrix."""
    energy = torch.linalg.svdvals(update.double()).square()
    return float(energy[rank:].sum() / energy.sum())


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_a_cut_adapter_is_the_nearest_of_its_rank_and_tells_what_was_lost(
    made: Callable[..., Made], rank: int, tmp_path: Path
) -> None:
    """As a full decomposition has it; the note of the card says it too, and one column fewer would lose more."""
    one = made("llama")
    delta = of_rank(one.model, 24)
    written = adapter(one.model, [delta], tmp_path / "out", one.record, rank=rank)
    updates = {module: factors.update() for module, factors in delta.modules.items()}
    lost = max(energy_lost(update, rank) for update in updates.values())
    assert written.rank == rank and written.lost == pytest.approx(lost, rel=1e-4)
    assert written.lost < max(energy_lost(update, rank - 1) for update in updates.values()) * 0.99
    found = safetensors.torch.load_file(written.folder / "adapter_model.safetensors")
    for module, update in updates.items():
        left, right = (found[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
        left_out = (update - left @ right).double().square().sum() / update.double().square().sum()
        assert float(left_out) == pytest.approx(energy_lost(update, rank), rel=1e-3)
        assert float(left.norm()) == pytest.approx(float(right.norm()), rel=1e-4)
    text = (written.folder / "README.md").read_text()
    assert f"cut to rank {rank}, which lost up to {100 * lost:.2g} %" in text


@pytest.mark.parametrize("method", ["rect", "ft-m"])
def test_updates_without_thin_factors_need_a_rank(made: Callable[..., Made], method: str, tmp_path: Path) -> None:
    """Sparse and dense ones are refused with both remedies; at the full rank they lose nothing, at a lower one some."""
    one = made("llama", method)
    (kind,) = {factors.kind for delta in one.deltas for factors in delta.modules.values()}
    with pytest.raises(InvalidInput, match=kind) as caught:
        adapter(one.model, one.deltas, tmp_path / "out", one.record)
    assert "--format merged" in caught.value.hint and "--rank N" in caught.value.hint
    assert nothing_left(tmp_path / "out") and kind in ("sparse", "dense")
    full = adapter(one.model, one.deltas, tmp_path / "full", one.record, rank=32)
    assert full.lost == 0
    assert apart(one.answers_of(loaded_by_transformers(full.folder)), one.worn()) < 1e-5
    cut = adapter(one.model, one.deltas, tmp_path / "cut", one.record, rank=1)
    by_module: dict[str, Tensor] = {}
    for delta in one.deltas:
        for module, factors in delta.modules.items():
            by_module[module] = by_module.get(module, 0) + factors.update()
    assert cut.lost == pytest.approx(max(energy_lost(u, 1) for u in by_module.values()), rel=1e-4) and cut.lost > 1e-3
    found = safetensors.torch.load_file(cut.folder / "adapter_model.safetensors")
    for module, update in by_module.items():
        left, right = (found[f"base_model.model.{module}.lora_{side}.weight"] for side in "BA")
        left_out = (update - left @ right).double().square().sum() / update.double().square().sum()
        assert float(left_out) == pytest.approx(energy_lost(update, 1), rel=1e-3)
    assert apart(one.answers_of(loaded_by_transformers(cut.folder)), one.worn()) > 1e-4


def test_more_columns_than_servers_accept_are_refused_with_what_cutting_would_lose(
    made: Callable[..., Made], tmp_path: Path
) -> None:
    """One more than the limit is too many, the limit itself is not; a rank above it is refused as well."""
    one = made("llama")
    batches = [of_rank(one.model, 12), of_rank(one.model, 9)]
    lost = max(energy_lost(sum(b.modules[m].update() for b in batches), 20) for m in batches[0].modules)
    with pytest.raises(InvalidInput, match=r"rank 21; .* at most 20") as caught:
        adapter(one.model, batches, tmp_path / "out", one.record, most=20)
    assert "--format merged" in caught.value.hint
    assert f"--rank 20, which would lose {100 * lost:.2g} %" in caught.value.hint and lost > 0
    for rank in (0, -1, 21):
        with pytest.raises(InvalidInput, match=f"rank {rank} "):
            adapter(one.model, batches, tmp_path / "out", one.record, rank=rank, most=20)
    assert nothing_left(tmp_path / "out")
    assert adapter(one.model, batches, tmp_path / "all", one.record, most=21).rank == 21


def test_the_limit_is_what_common_servers_accept(made: Callable[..., Made], tmp_path: Path) -> None:
    """513 columns are refused by default; a matrix of 32 rows has rank 32, so that cutting to 512 loses nothing."""
    one = made("llama")
    with pytest.raises(InvalidInput, match=r"rank 513; .* at most 512") as caught:
        adapter(one.model, [of_rank(one.model, 513)], tmp_path / "out", one.record)
    assert "lose 0 %" in caught.value.hint
    cut = adapter(one.model, [of_rank(one.model, 513)], tmp_path / "out", one.record, rank=512)
    assert cut.lost == 0 and cut.rank <= 80


def test_a_rank_that_is_large_enough_changes_nothing(made: Callable[..., Made], tmp_path: Path) -> None:
    """The factors are written as they are, not a decomposition of them."""
    one = made("gpt2")
    plain = adapter(one.model, one.deltas, tmp_path / "plain", one.record)
    ranked = adapter(one.model, one.deltas, tmp_path / "ranked", one.record, rank=4)
    cut = adapter(one.model, one.deltas, tmp_path / "cut", one.record, rank=3)
    files = [safetensors.torch.load_file(w.folder / "adapter_model.safetensors") for w in (plain, ranked, cut)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0]) and ranked.lost == 0
    assert (plain.rank, ranked.rank, cut.rank) == (4, 4, 3) and cut.lost > 0


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def all_formats(one: Made, folder: Path) -> list[Callable[[], Any]]:
    return [
        lambda: merged(one.model, one.deltas, folder, one.record),
        lambda: adapter(one.model, one.deltas, folder, one.record),
        lambda: bundle(one.record, one.files, NONE, folder),
    ]


FORMATS = pytest.mark.parametrize("which", [0, 1, 2], ids=["merged", "peft", "delta"])


@FORMATS
def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_taken(
    made: Callable[..., Made], which: int, tmp_path: Path
) -> None:
    """Also a file of that name, and a link; what is there stays as it is."""
    one = made("gpt2")
    full, file, link, empty = (tmp_path / name for name in ("full", "file", "link", "empty"))
    full.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    link.symlink_to(empty)
    for place in (full, file, link, Path("/")):
        with pytest.raises(InvalidInput, match="there already") as caught:
            all_formats(one, place)[which]()
        assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "link"]
    assert (full / "mine").read_text() == file.read_text() == "mine" and list(empty.iterdir()) == []
    all_formats(one, empty)[which]()
    assert (empty / "README.md").is_file()
    all_formats(one, tmp_path / "new" / "deep")[which]()
    assert (tmp_path / "new" / "deep" / "README.md").is_file()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@FORMATS
def test_a_disk_that_is_full_leaves_nothing_and_says_so(made: Callable[..., Made], which: int, tmp_path: Path) -> None:
    """Whichever library writes the file that does not fit; folders made on the way go too."""
    one = made("gpt2")
    folder = tmp_path / "made" / "on" / "the way"
    for size in (0, 400, 3000):
        with files_of_at_most(size), pytest.raises(EditctlError, match="cannot be written") as caught:
            all_formats(one, folder)[which]()
        assert caught.value.hint and not isinstance(caught.value, InvalidInput) and list(tmp_path.iterdir()) == []
    with files_of_at_most(10_000_000):
        all_formats(one, folder)[which]()
    assert (folder / "README.md").is_file()


@FORMATS
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=type)
def test_what_fails_at_the_last_moment_leaves_nothing(
    made: Callable[..., Made], which: int, error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder appears whole, in one rename, or not at all."""
    one = made("gpt2")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises((EditctlError, KeyboardInterrupt)) as caught:
        all_formats(one, tmp_path / "out")[which]()
    assert nothing_left(tmp_path / "out")
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)


def test_a_tokenizer_that_does_not_fit_is_said_like_any_other_file(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The library that writes it raises a bare Exception."""
    one = made("gpt2")
    with pytest.raises(Exception, match="No space left") as bare:
        one.model.tokenizer.backend_tokenizer.save("/dev/full")
    assert type(bare.value) is Exception
    full = lambda *_, **__: one.model.tokenizer.backend_tokenizer.save("/dev/full")  # noqa: E731
    monkeypatch.setattr(type(one.model.tokenizer), "save_pretrained", full)
    with pytest.raises(EditctlError, match="cannot be written: No space left"):
        merged(one.model, one.deltas, tmp_path / "out", one.record)
    assert nothing_left(tmp_path / "out")


def test_what_a_killed_export_left_is_cleared_away(made: Callable[..., Made], tmp_path: Path) -> None:
    """A folder of an earlier process of the same number does not get into the export."""
    one = made("gpt2")
    left = tmp_path / f".out.part-{os.getpid()}"
    left.mkdir()
    (left / "stray").write_text("x")
    adapter(one.model, one.deltas, tmp_path / "out", one.record)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------------------------------------------
# Bundles


def test_a_bundle_comes_back_as_it_was(made: Callable[..., Made], tmp_path: Path) -> None:
    """Version, edits with their places, answers, metrics, and the factors byte for byte; no other version is equal."""
    one = made("llama")
    written = bundle(one.record, one.files, NONE, tmp_path / "out")
    back = read_bundle(written.folder)
    assert back == one.record != made("gpt2").record
    assert back.edits[2].edit == tiny.FACTS[2] and back.edits[2].column == one.record.edits[2].column
    for name in back.deltas:
        copied = (written.folder / "deltas" / f"{name}.safetensors").read_bytes()
        assert copied == (one.files / f"{name}.safetensors").read_bytes()
    assert sorted(p.name for p in written.folder.iterdir()) == ["README.md", "deltas", "version.json"]


@pytest.mark.parametrize("method", ["nse", "rect", "ft-m"])
def test_updates_of_every_kind_travel(made: Callable[..., Made], method: str, tmp_path: Path) -> None:
    """With low-rank parts, with a mask, and dense."""
    one = made("llama", method)
    bundle(one.record, one.files, NONE, tmp_path / "out")
    assert read_bundle(tmp_path / "out") == one.record


def test_numbers_that_are_none_travel(made: Callable[..., Made], tmp_path: Path) -> None:
    """A metric over nothing is not a number, and a perplexity may be infinite."""
    one = made("llama")
    odd = tuple(Metric("odd", "generated", value, 0) for value in (float("nan"), float("inf"), -0.0, 1e-300))
    bundle(replace(one.record, metrics=odd), one.files, NONE, tmp_path / "out")
    assert [repr(m.value) for m in read_bundle(tmp_path / "out").metrics] == ["nan", "inf", "-0.0", "1e-300"]


def test_a_bundle_of_a_factor_file_that_is_missing_or_changed_is_not_written(
    made: Callable[..., Made], tmp_path: Path
) -> None:
    """The store's own fault, said as such."""
    one = made("llama")
    files = shutil.copytree(one.files, tmp_path / "files")
    path = files / f"{one.record.deltas[0]}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="not what was written"):
        bundle(one.record, files, NONE, tmp_path / "out")
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        bundle(one.record, files, NONE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_than_can_be_read_back_is_not_written(
    made: Callable[..., Made], whole_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bundle one byte too large is refused with what to use instead; one of the size that is allowed is written."""
    one = made("llama")
    size = (whole_bundle / "version.json").stat().st_size
    monkeypatch.setattr(export, "LARGEST", size - 1)
    with pytest.raises(InvalidInput, match=f"takes {size} bytes") as caught:
        bundle(one.record, one.files, NONE, tmp_path / "out")
    assert "merged" in caught.value.hint and nothing_left(tmp_path / "out")
    monkeypatch.setattr(export, "LARGEST", size)
    bundle(one.record, one.files, NONE, tmp_path / "out")


def test_a_bundle_whose_copy_went_wrong_is_refused_and_leaves_nothing(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is read back before success is said."""
    one = made("llama")

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:-100])

    monkeypatch.setattr("shutil.copyfile", half)
    with pytest.raises(StoreError, match="not what was meant"):
        bundle(one.record, one.files, NONE, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(export, "read_bundle", lambda folder: replace(one.record, metrics=()))
    with pytest.raises(StoreError, match=r"version\.json says something else"):
        bundle(one.record, one.files, NONE, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


@dataclass
class Bundle:
    """A bundle to tamper with."""

    folder: Path

    @property
    def about(self) -> Path:
        return self.folder / "version.json"

    @property
    def factors(self) -> list[Path]:
        return sorted(self.folder.glob("deltas/*"))

    def change(self, value: Any, *where: str | int) -> None:
        """Put a value somewhere in the JSON; `...` takes it out."""
        document = json.loads(self.about.read_text())
        at = document
        for step in where[:-1]:
            at = at[step]
        if value is ...:
            del at[where[-1]]
        else:
            at[where[-1]] = value
        self.about.write_text(json.dumps(document))

    def delta(self, which: int = 0) -> Delta:
        """What a factor file holds, by default the first."""
        return delta_files.load(json.loads(self.about.read_text())["deltas"][which], self.folder / "deltas")

    def rename(self, data: bytes, which: int = 0) -> None:
        """Put other bytes in place of a factor file, by default the first, under their own name."""
        old = json.loads(self.about.read_text())["deltas"][which]
        (self.folder / f"deltas/{old}.safetensors").unlink()
        new = delta_files.digest(data)
        (self.folder / f"deltas/{new}.safetensors").write_bytes(data)
        self.about.write_text(self.about.read_text().replace(old, new))

    def solve(self, **parts: Any) -> None:
        """Change the factors of one module of the first file."""
        delta = self.delta()
        module, factors = next(iter(delta.modules.items()))
        changed = {name: part(factors) if callable(part) else part for name, part in parts.items()}
        self.rename(replace(delta, modules={**delta.modules, module: replace(factors, **changed)}).to_bytes())

    def tell(self, which: int = 0, **about: Any) -> None:
        """Change what a factor file says of itself, by default the first."""
        self.rename(replace(self.delta(which), **about).to_bytes(), which)

    def lay(self, **parts: Any) -> None:
        """Change the overlay of the last factor file."""
        overlay = self.delta(-1).overlay
        assert overlay is not None
        self.tell(-1, overlay=replace(overlay, **parts))

    def say(self, **parts: Any) -> None:
        """Change what that file says of its overlay, to whatever can be said in JSON."""
        name = json.loads(self.about.read_text())["deltas"][-1]
        tensors, about = delta_files.read_tensors(self.folder / f"deltas/{name}.safetensors")
        about["overlay"] |= parts
        self.rename(safetensors.torch.save(tensors, {"editctl": json.dumps(about)}), -1)

    def enter(self, **values: Any) -> None:
        """Change the first entry of that overlay."""
        first, *rest = self.delta(-1).overlay.entries
        self.lay(entries=({**first, **values}, *rest))

    def train(self, content: str | bytes) -> None:
        """Have all batches need another trained file than the one they need: bytes, or one that lies there."""
        (old,) = json.loads(self.about.read_text())["trained"]
        new = content if isinstance(content, str) else delta_files.digest(content)
        if isinstance(content, bytes):
            (self.folder / f"artifacts/{new}.safetensors").write_bytes(content)
        for which in (1, 2):
            delta = self.delta(which)
            over = replace(delta.overlay, artifact=new)
            self.tell(which, params={**delta.params, "artifact": new}, overlay=over)
        self.about.write_text(self.about.read_text().replace(old, new))

    def retrain(self, **about: Any) -> None:
        """Have them need one that says something else of itself."""
        self.train(trained(self.folder / "artifacts", number=2.0, **about))

    @property
    def trained(self) -> Path:
        """The trained file."""
        (name,) = json.loads(self.about.read_text())["trained"]
        return self.folder / f"artifacts/{name}.safetensors"

    def write(self, tensors: dict[str, Tensor], about: Any) -> None:
        """Put a safetensors file of one's own in place of the first."""
        self.rename(safetensors.torch.save(tensors, {"editctl": json.dumps(about)}))

    def link(self, path: Path) -> None:
        """Move a file or folder out and link to it."""
        outside = self.folder.parent / f"outside-{path.name}"
        shutil.move(path, outside)
        path.symlink_to(outside)


def to_itself(b: Bundle) -> None:
    b.about.unlink()
    b.about.symlink_to(b.about)


def a_pipe(b: Bundle) -> None:
    b.about.unlink()
    os.mkfifo(b.about)


def a_pipe_of_factors(b: Bundle) -> None:
    path = b.factors[0]
    path.unlink()
    os.mkfifo(path)


def flipped(b: Bundle) -> None:
    data = bytearray(b.factors[0].read_bytes())
    data[-1] ^= 1
    b.factors[0].write_bytes(data)


def halves(f: Factors) -> Tensor:
    return f.residuals[: f.residuals.shape[0] // 2]


def swapped(b: Bundle) -> None:
    edits = json.loads(b.about.read_text())["edits"]
    b.change(edits[2:] + edits[:2], "edits")


NAN = float("nan")
ABOUT = {"format": 1, "edits": [], "params": {}, "columns": [], "places": [], "together": [], "found": {}}
TAMPERED: dict[str, tuple[Callable[[Bundle], Any], str]] = {
    "no JSON at all": (lambda b: b.about.write_text("version = 1"), "Invalid JSON"),
    "empty": (lambda b: b.about.write_text(""), "Invalid JSON"),
    "bytes": (lambda b: b.about.write_bytes(b"\xff\xfe\x00"), "Invalid JSON"),
    "nested deeply": (lambda b: b.about.write_text("[" * 100_000), "Invalid JSON"),
    "a list": (lambda b: b.about.write_text("[]"), "version.json"),
    "a lone surrogate": (lambda b: b.about.write_text('{"format": "\\ud800"}'), "Invalid JSON"),
    "no JSON file": (lambda b: b.about.unlink(), "no file version.json"),
    "a folder for the JSON": (lambda b: (b.about.unlink(), b.about.mkdir()), "no file version.json"),
    "a pipe": (a_pipe, "no file version.json"),
    "a later format": (lambda b: b.change(2, "format"), "format that this editctl does not know"),
    "a format as text": (lambda b: b.change("1", "format"), "format that this editctl does not know"),
    "no format": (lambda b: b.change(..., "format"), "format: Field required"),
    "too large": (lambda b: b.about.write_bytes(b" " * 300_001), "at most 300000"),
    "no version": (lambda b: b.change(..., "version"), "version"),
    "a version that is a list": (lambda b: b.change([], "version"), "version"),
    "a number for a text": (lambda b: b.change(3, "version", "method"), "version.method"),
    "a text for a number": (lambda b: b.change("3", "version", "seed"), "version.seed"),
    "a version's id that is a path": (lambda b: b.change("../../x", "version", "id"), "version's id"),
    "a parent that is a path": (lambda b: b.change("/etc", "version", "parent"), "parent's id"),
    "a hash that is none": (lambda b: b.change("0" * 31, "version", "weights_hash"), "weights hash"),
    "an unknown dtype": (lambda b: b.change("torch.int4", "version", "dtype"), "dtype"),
    "a huge seed": (lambda b: b.change(2**70, "version", "seed"), "seed"),
    "a date that is none": (lambda b: b.change("yesterday", "version", "created_at"), "date"),
    "an answer of no kind": (lambda b: b.change("evil", "answers", 0, "kind"), "unknown kind"),
    "a huge count": (lambda b: b.change(2**70, "metrics", 0, "n"), "count"),
    "no settings": (lambda b: b.change({}, "version", "params"), "settings"),
    "settings of another kind": (lambda b: b.change([], "version", "params", "ridge"), "settings"),
    "a name that leads out": (lambda b: b.change("../../etc/passwd", "deltas", 0), "32 hexadecimal digits"),
    "an absolute name": (lambda b: b.change("/etc/passwd", "deltas", 0), "32 hexadecimal digits"),
    "a name and a line end": (lambda b: b.change("a" * 32 + "\n", "deltas", 0), "32 hexadecimal digits"),
    "a name in capitals": (lambda b: b.change("A" * 32, "deltas", 0), "32 hexadecimal digits"),
    "a file named twice": (lambda b: b.change(b.factors[0].stem, "deltas", 0) or twice(b), "named twice"),
    "a file that is missing": (lambda b: b.factors[0].unlink(), "no file deltas/"),
    "a file that is not named": (lambda b: b.change("a" * 32, "edits", 0, "delta"), "not named"),
    "a link out to the JSON": (lambda b: b.link(b.about), "leads out"),
    "a link out to a file": (lambda b: b.link(b.factors[0]), "leads out"),
    "a link out to all files": (lambda b: b.link(b.folder / "deltas"), "leads out"),
    "a link to itself": (to_itself, "leads out|no file"),
    "a pipe of factors": (a_pipe_of_factors, "no file deltas/"),
    "a changed byte": (flipped, "not what was written"),
    "a cut file": (lambda b: b.factors[0].write_bytes(b.factors[0].read_bytes()[:-9]), "not what was written"),
    "an edit with an unknown key": (lambda b: b.change(1, "edits", 0, "edit", "evil"), "edits.0.edit.evil"),
    "an edit without a subject": (lambda b: b.change(..., "edits", 0, "edit", "subject"), "edits.0.edit.subject"),
    "an edit that is a text": (lambda b: b.change("x", "edits", 0, "edit"), "edits.0.edit"),
    "an edit with an empty subject": (lambda b: b.change(" ", "edits", 0, "edit", "subject"), "no subject"),
    "an edit with an empty target": (lambda b: b.change("", "edits", 0, "edit", "target_new"), "no target_new|or no"),
    "an edit without a place": (lambda b: b.change("no place", "edits", 0, "edit", "relation"), "without one {}"),
    "an edit with two places": (lambda b: b.change("{} {}", "edits", 0, "edit", "relation"), "without one {}"),
    "an edit with a long text": (lambda b: b.change("x" * 600, "edits", 0, "edit", "target_new"), "more than 500"),
    "an edit with a hostile id": (lambda b: b.change("\x1b[2J", "edits", 0, "edit", "id"), r"\\x1b\[2J"),
    "two edits of one id": (lambda b: b.change("ada", "edits", 0, "edit", "id"), "the same id"),
    "a column that is not there": (lambda b: b.change(7, "edits", 0, "column"), "does not hold all edits"),
    "a column below none": (lambda b: b.change(-1, "edits", 0, "column"), "does not hold all edits"),
    "a column that is true": (lambda b: b.change(True, "edits", 0, "column"), "edits.0.column"),
    "answers of another type": (lambda b: b.change(["x"], "answers"), "answers.0"),
    "an answer without words": (lambda b: b.change(None, "answers", 0, "after"), "answers.0.after"),
    "a metric over a text": (lambda b: b.change("many", "metrics", 0, "n"), "metrics.0.n"),
    "bytes for factors": (lambda b: b.rename(b"nothing of the kind"), "no factor file"),
    "factors of another program": (lambda b: b.rename(safetensors.torch.save({"a": torch.ones(1)})), "format"),
    "factors that say a list": (lambda b: b.write({"m.keys": torch.ones(1, 1)}, []), "no factor file"),
    "factors that say little": (lambda b: b.write({"m.keys": torch.ones(1, 1)}, {"format": 1}), "no factor file"),
    "factors without residuals": (lambda b: b.write({"m.keys": torch.ones(1, 1)}, ABOUT), "no factor file"),
    "factors with an unknown part": (lambda b: b.write({"m.evil": torch.ones(1, 1)}, ABOUT), "no factor file"),
    "factors of nothing": (lambda b: b.tell(modules={}), "does not hold all edits"),
    "factors that nest deeply": (lambda b: b.rename(nested()), "no factor file"),
    "factors in half precision": (lambda b: b.rename(halved(b)), "not matrices in fp32"),
    "factors of other shapes": (lambda b: b.solve(residuals=halves, left=lambda f: torch.ones(3, 1)), "do not fit"),
    "too few rows": (lambda b: b.solve(factor=lambda f: f.factor[:1]), "do not fit"),
    "one side of a low-rank part": (lambda b: b.solve(left=lambda f: f.residuals.clone()), "do not fit"),
    "factors that are no numbers": (lambda b: b.solve(residuals=lambda f: f.residuals * NAN), "not finite"),
    "a mask of another size": (lambda b: b.solve(mask=torch.ones(3, dtype=torch.uint8)), "mask"),
    "a dense update of another size": (lambda b: b.solve(dense=torch.ones(2, 2)), "do not fit"),
    "columns that are not there": (lambda b: b.tell(edits=("a", "b", "c"), columns=(0, 1, 9)), "all columns"),
    "columns that are lists": (lambda b: b.tell(columns=([0], [1])), "a column each"),
    "fewer columns than edits": (lambda b: b.tell(columns=(0,)), "a column each"),
    "places that are numbers": (lambda b: b.tell(places=(1, 2)), "not a text"),
    "more places than columns": (lambda b: b.tell(places=("a", "b", "c")), "for each place"),
    "findings that are no numbers": (lambda b: b.tell(found={"anchor": "far"}), "not in numbers"),
    "findings that are nothing": (lambda b: b.tell(found={"anchor": None}), "not in numbers"),
    "findings that are not finite": (lambda b: b.tell(found={"means": [1.0, float("inf")]}), "not in numbers"),
    "findings that are too large": (lambda b: b.tell(found={"means": [10**400]}), "not in numbers"),
    "findings with a text in them": (lambda b: b.tell(found={"means": {"1": [1.0, "x"]}}), "not in numbers"),
    "findings that nest deeply": (lambda b: b.tell(found={"means": [[[[1.0]]]]}), "not in numbers"),
    "an edit less": (lambda b: b.change(..., "edits", 1), "not said to lie there"),
    "edits in another order": (swapped, "in the order"),
    "a trained file of nobody": (lambda b: b.change(["a" * 32], "trained"), "no file artifacts/"),
    "an overlay beside weights": (lambda b: b.tell(overlay=over(tiny.FACTS[:2]).overlay), "its method writes"),
    "weights of an overlay's method": (lambda b: b.tell(params=over(tiny.FACTS[:2]).params), "its method writes"),
    "solved by no method": (lambda b: b.tell(params={"method": "evil"}), "settings"),
}


def twice(b: Bundle) -> None:
    document = json.loads(b.about.read_text())
    document["deltas"].append(document["deltas"][0])
    b.about.write_text(json.dumps(document))


def nested() -> bytes:
    return safetensors.torch.save({"m.keys": torch.ones(1)}, {"editctl": "[" * 100_000})


def halved(b: Bundle, which: int = 0) -> bytes:
    name = json.loads(b.about.read_text())["deltas"][which]
    path = b.folder / f"deltas/{name}.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    return safetensors.torch.save({k: t.half() for k, t in safetensors.torch.load_file(path).items()}, about)


@pytest.fixture(scope="module")
def whole_bundle(made: Callable[..., Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that nobody tampers with."""
    one = made("llama")
    return bundle(one.record, one.files, NONE, tmp_path_factory.mktemp("bundle") / "whole").folder


@pytest.mark.parametrize("how", TAMPERED)
def test_a_bundle_that_was_tampered_with_is_refused(
    made: Callable[..., Made], whole_bundle: Path, monkeypatch: pytest.MonkeyPatch, how: str, tmp_path: Path
) -> None:
    """With what is wrong and a remedy, never a traceback, and no byte that a terminal obeys; whole it is read."""
    copy = Bundle(shutil.copytree(whole_bundle, tmp_path / "bundle"))
    monkeypatch.setattr(export, "LARGEST", 300_000)
    assert read_bundle(copy.folder) == made("llama").record
    tamper, message = TAMPERED[how]
    tamper(copy)
    with pytest.raises((InvalidInput, StoreError), match=message) as caught:
        read_bundle(copy.folder)
    assert caught.value.hint and str(caught.value).isprintable()
    assert str(copy.folder) in caught.value.message and len(caught.value.message) < 1000


@pytest.fixture(scope="module")
def beside(
    loaded: Callable[..., Model], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Record, Path, Path]:
    """The record of a version with a batch of weights and two that lie over them, which one trained file reads; its
    store, and a bundle that nobody tampers with."""
    model, store = loaded("llama"), Store(tmp_path_factory.mktemp("store"))
    with louder():
        tiny.apply(model, store, tiny.FACTS[:1], corpus, steps=1)
        content = trained(store.artifacts_dir, layers=[1])
        lay(model, store, tiny.FACTS[1:2], corpus, artifact=content)
        version = lay(model, store, tiny.FACTS[2:], corpus, artifact=content)
    record = _record(store, version)
    folder = tmp_path_factory.mktemp("bundle") / "laid"
    return record, store.root, bundle(record, store.deltas_dir, store.artifacts_dir, folder).folder


def test_what_reads_an_overlay_travels_with_it(beside: tuple[Record, Path, Path]) -> None:
    """Named and byte for byte; the record is otherwise what it was. Of weights alone nothing travels beside."""
    record, root, folder = beside
    back = read_bundle(folder)
    assert replace(back, trained=()) == record and len(back.trained) == 1
    (file,) = (folder / "artifacts").iterdir()
    assert file.stem == back.trained[0] and file.read_bytes() == (root / "artifacts" / file.name).read_bytes()
    delta = delta_files.load(back.deltas[-1], folder / "deltas")
    assert delta.overlay is not None and [entry["id"] for entry in delta.overlay.entries] == ["curie", "rome"]


def test_what_a_batch_was_written_with_travels_too(made: Callable[..., Made], tmp_path: Path) -> None:
    """Also where reading its weights does not need it, so that it can be sought anew elsewhere."""
    one, files = made("llama"), tmp_path / "files"
    library = tmp_path / "library"
    content = trained(library, method="mend")
    params = methods.settings({"num_hidden_layers": 4}, "mend", {"artifact": content}).to_params()
    names = [delta_files.save(replace(delta, params=params), files) for delta in one.deltas]
    where = dict(zip(one.record.deltas, names, strict=True))
    edits = tuple(replace(placed, delta=where[placed.delta]) for placed in one.record.edits)
    record = replace(one.record, deltas=tuple(names), edits=edits)
    bundle(record, files, library, tmp_path / "out")
    assert read_bundle(tmp_path / "out") == replace(record, trained=(content,))


def test_a_bundle_of_a_trained_file_that_is_missing_or_changed_is_not_written(
    beside: tuple[Record, Path, Path], tmp_path: Path
) -> None:
    """The store's own fault, said as such."""
    record, root, _ = beside
    library = shutil.copytree(root / "artifacts", tmp_path / "library")
    (file,) = library.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"trained file .* not what was written"):
        bundle(record, root / "deltas", library, tmp_path / "out")
    file.unlink()
    with pytest.raises(StoreError, match=r"trained file .* missing") as caught:
        bundle(record, root / "deltas", library, tmp_path / "out")
    assert "backup" in caught.value.hint and not (tmp_path / "out").exists()


def test_a_bundle_of_before_there_were_trained_files_is_read(
    made: Callable[..., Made], whole_bundle: Path, tmp_path: Path
) -> None:
    """It names none, and is what it was."""
    copy = Bundle(shutil.copytree(whole_bundle, tmp_path / "bundle"))
    copy.change(..., "trained")
    assert read_bundle(copy.folder) == made("llama").record


def test_what_was_found_out_in_lists_of_numbers_travels(whole_bundle: Path, tmp_path: Path) -> None:
    """Nested up to three deep, in dicts or lists, empty ones too."""
    copy = Bundle(shutil.copytree(whole_bundle, tmp_path / "bundle"))
    copy.tell(found={"anchor": 2, "means": [0.5, -1], "by block": {"1": [[1.0, 2.0], [3.0]], "2": []}, "none": {}})
    assert read_bundle(copy.folder).deltas[0] != read_bundle(whole_bundle).deltas[0]


def fewer_rows(b: Bundle) -> None:
    b.lay(tensors={name: tensor[:1] for name, tensor in b.delta(-1).overlay.tensors.items()})


LAID: dict[str, tuple[Callable[[Bundle], Any], str]] = {
    "a hostile name": (lambda b: b.change("../" * 9 + "etc/x", "trained", 0), "trained file's name is not 32"),
    "a name that is no text": (lambda b: b.change(7, "trained", 0), "trained.0"),
    "a name twice": (lambda b: b.change([b.trained.stem] * 2, "trained"), "named twice"),
    "a trained file that is not named": (lambda b: b.change([], "trained"), "trained file that is not named"),
    "a trained file that nobody needs": (
        lambda b: b.change([b.trained.stem, trained(b.folder / "artifacts", number=5.0)], "trained"),
        "no batch needs it",
    ),
    "no trained file": (lambda b: b.trained.unlink(), "no file artifacts/"),
    "a changed trained file": (lambda b: b.trained.write_bytes(b.trained.read_bytes()[:-1]), "not what was written"),
    "a trained file that is too large": (lambda b: b.trained.write_bytes(bytes(10_001)), "at most 10000"),
    "a link out to the trained file": (lambda b: b.link(b.trained), "leads out"),
    "a pipe of training": (lambda b: (os.mkfifo(f"{b.trained}p"), os.replace(f"{b.trained}p", b.trained)), "no file"),
    "training by bytes": (lambda b: b.train(b"nothing of the kind"), "no trained file"),
    "training by another program": (lambda b: b.train(safetensors.torch.save({"a": torch.ones(1)})), "no trained file"),
    "training that is a factor file": (lambda b: b.train(b.factors[0].read_bytes()), "no trained file"),
    "training for another method": (lambda b: b.retrain(method="serac"), "for this model and the method"),
    "training for a list of methods": (lambda b: b.retrain(method=["ike"]), "for this model and the method"),
    "training for another model": (lambda b: b.retrain(base="0" * 32), "for this model and the method"),
    "training without a name": (lambda b: b.retrain(name=None), "what it is called"),
    "training at no time": (lambda b: b.retrain(created_at="zzzz"), "when it was made"),
    "training for blocks of text": (lambda b: b.retrain(layers=["1"]), "not numbers of blocks"),
    "training for blocks that are a number": (lambda b: b.retrain(layers=3), "not numbers of blocks"),
    "training in half precision": (lambda b: b.retrain(tensors={"w": torch.ones(1).half()}), "not in fp32"),
    "a trained file elsewhere": (
        lambda b: b.tell(-1, params={**b.delta(-1).params, "artifact": "../" * 9 + "etc/x"}),
        "not those of a method",
    ),
    "a reader elsewhere": (lambda b: b.lay(artifact="../" * 9 + "etc/x"), "trained file that is not named"),
    "a reader that is a list": (lambda b: b.lay(artifact=[1]), "not keys and values"),
    "an unknown kind": (lambda b: b.lay(kind="\x1b[2J"), "kind that this editctl does not know"),
    "a kind that is a list": (lambda b: b.lay(kind=["ike"]), "kind that this editctl does not know"),
    "entries that are texts": (lambda b: b.say(entries=["a", "b"]), "not keys and values"),
    "entries that are a text": (lambda b: b.say(entries="ab"), "not keys and values"),
    "entries that are nothing": (lambda b: b.say(entries=None), "no factor file"),
    "settings that are a list": (lambda b: b.say(settings=[1]), "not keys and values"),
    "an entry less": (lambda b: b.lay(entries=b.delta(-1).overlay.entries[:1]), "an entry for each edit"),
    "an entry of another edit": (lambda b: b.enter(id="ada"), "an entry for each edit"),
    "an entry of no edit": (lambda b: b.enter(id=None), "an entry for each edit"),
    "entries the other way round": (lambda b: b.tell(-1, columns=(1, 0)), "does not hold|an entry for each edit"),
    "no places": (lambda b: b.tell(-1, places=()), "an entry for each place"),
    "prompts of one": (lambda b: b.tell(-1, together=(("a",),)), "an entry for each place"),
    "an entry with no number": (lambda b: b.enter(score=NAN), "not finite"),
    "a setting without end": (lambda b: b.lay(settings={"radius": float("inf")}), "not finite"),
    "an entry that is too long": (lambda b: b.enter(prompt="x" * 1_000_001), "more than 1000000 characters"),
    "rows of one": (fewer_rows, "a row for each entry"),
    "a tensor without rows": (lambda b: b.lay(tensors={"keys": torch.tensor(1.0)}), "a row for each entry"),
    "an overlay in bytes": (lambda b: b.lay(tensors={"keys": torch.ones(2, 3, dtype=torch.uint8)}), "not in fp32"),
    "an overlay in half precision": (lambda b: b.rename(halved(b, -1), -1), "not in fp32"),
    "an overlay that is no number": (lambda b: b.lay(tensors={"keys": torch.full((2, 3), NAN)}), "not finite"),
    "an overlay of another width": (lambda b: b.lay(tensors={"keys": torch.ones(2, 4)}), "does not fit those before"),
    "an overlay of other tensors": (lambda b: b.lay(tensors={"values": torch.ones(2, 3)}), "does not fit those before"),
    "an overlay of weights": (lambda b: b.tell(-1, params=b.delta(0).params), "something else than its method writes"),
    "an overlay that is nothing": (lambda b: b.tell(-1, overlay=None), "does not hold all edits"),
}


@pytest.mark.parametrize("how", LAID)
def test_a_bundle_whose_overlay_was_tampered_with_is_refused(
    beside: tuple[Record, Path, Path], monkeypatch: pytest.MonkeyPatch, how: str, tmp_path: Path
) -> None:
    """With what is wrong and a remedy, never a traceback; whole it is read."""
    copy = Bundle(shutil.copytree(beside[2], tmp_path / "bundle"))
    monkeypatch.setattr(export, "LARGEST_TRAINED", 10_000)
    assert read_bundle(copy.folder).deltas == beside[0].deltas
    tamper, message = LAID[how]
    tamper(copy)
    with pytest.raises((InvalidInput, StoreError), match=message) as caught:
        read_bundle(copy.folder)
    assert caught.value.hint and str(caught.value).isprintable()
    assert str(copy.folder) in caught.value.message and len(caught.value.message) < 1000


def test_an_overlay_that_was_rewritten_without_a_fault_is_read(
    beside: tuple[Record, Path, Path], tmp_path: Path
) -> None:
    """Control for the above, by the same means: another text, other numbers, another trained file; other settings need
    not fit those before."""
    copy = Bundle(shutil.copytree(beside[2], tmp_path / "bundle"))
    copy.enter(prompt="x" * 1000, score=0.5)
    copy.lay(tensors={"keys": torch.ones(2, 3)})
    copy.retrain(name="second")
    assert read_bundle(copy.folder).trained != read_bundle(beside[2]).trained
    copy.lay(tensors={"keys": torch.ones(2, 4)}, settings={"reach": 0.25})
    assert read_bundle(copy.folder).edits[-1].edit == tiny.FACTS[3]


def test_a_rewritten_bundle_without_a_fault_is_read(whole_bundle: Path, tmp_path: Path) -> None:
    """Control for the above: changing the files by the same means, to what is allowed, is no fault."""
    copy = Bundle(shutil.copytree(whole_bundle, tmp_path / "bundle"))
    copy.change("say so", "edits", 0, "edit", "note")
    copy.solve(residuals=lambda f: 2 * f.residuals)
    copy.tell(places=())
    back = read_bundle(copy.folder)
    assert back.edits[0].edit.note == "say so"


def test_an_edit_of_a_bundle_stands_in_no_file(whole_bundle: Path, tmp_path: Path) -> None:
    """A place in a spec that it claims is dropped, since messages would point there."""
    copy = Bundle(shutil.copytree(whole_bundle, tmp_path / "bundle"))
    copy.change("/etc/passwd", "edits", 0, "edit", "file")
    copy.change(3, "edits", 0, "edit", "line")
    assert (read_bundle(copy.folder).edits[0].edit.file, read_bundle(copy.folder).edits[0].edit.line) == ("", 0)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    """No folder, a file, an empty folder."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty"):
        with pytest.raises(InvalidInput) as caught:
            read_bundle(tmp_path / name)
        assert "--format delta" in caught.value.hint


def test_links_within_a_bundle_are_followed(made: Callable[..., Made], whole_bundle: Path, tmp_path: Path) -> None:
    """As a cache of downloads has them; also when the bundle itself is reached by a link."""
    copy = Bundle(shutil.copytree(whole_bundle, tmp_path / "bundle"))
    inside = copy.folder / "blob"
    shutil.move(copy.factors[0], inside)
    (copy.folder / "deltas" / f"{delta_files.digest(inside.read_bytes())}.safetensors").symlink_to("../blob")
    (tmp_path / "link").symlink_to(copy.folder)
    assert read_bundle(tmp_path / "link") == made("llama").record


# ---------------------------------------------------------------------------------------------------------------------
# The model card

HOSTILE = (
    "a | b || c",
    "`tick` ``two`` `",
    "<script>alert(1)</script><img src=x onerror=y>",
    "[click](http://evil.example) ![i](x) https://evil.example www.evil.example me@evil.example",
    "line\nbreak\r\n# heading\n\n---\n",
    "\x1b[31mred\u202eevil\u200b",
    "*bold* _it_ ~~no~~ $x$ \\| \\",
    " spaces ",
    "&lt;b&gt; &#124;",
    "|",
    "",
)


def with_texts(record: Record, *texts: str) -> Record:
    """The record with one edit and one answer whose every text is one of these, in turn."""
    first = [texts[i % len(texts)] for i in range(5)]
    edit = tiny.an_edit(first[0], subject="", relation=first[1], target_new=first[2])
    answer = Answer(first[0], "rewrite", first[1], (), first[3], first[4], True)
    return replace(record, edits=(Placed(edit, "", 0),), answers=(answer,), metrics=record.metrics[:1])


def rendered(text: str) -> Any:
    """The tokens of a card's Markdown as a strict reader of GitHub's flavour has them, front matter left out."""
    return MarkdownIt("gfm-like").parse(text.split("---\n", 2)[2])


def cells_of(tokens: Any, head: str) -> list[list[str]]:
    """The rows of the table whose head begins with a word, each cell as the text that is shown."""
    rows: list[list[str]] = []
    for i, token in enumerate(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("td_open", "th_open"):
            rows[-1].append("".join(child.content for child in tokens[i + 1].children))
    start = next(i for i, row in enumerate(rows) if row[0] == head)
    return [row for row in rows[start + 1 :] if len(row) == len(rows[start])]


def kinds(tokens: Any) -> set[str]:
    return {t.type for token in tokens for t in (token, *(token.children or ()))}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_as_they_are_and_do_nothing(made: Callable[..., Made], text: str) -> None:
    """No HTML, no link, no emphasis, no further cell; what a terminal would obey is escaped."""
    one = with_texts(made("llama").record, text)
    made_card = card(one, model=text or "m", format="peft", base=(text, text), notes=[text])
    assert all(line.isprintable() for line in made_card.splitlines())
    tokens = rendered(made_card)
    allowed = {"inline", "text", "code_inline", "heading_open", "heading_close", "paragraph_open", "fence", "hr"}
    shown = {kind for kind in kinds(tokens) if not kind.startswith(("table", "thead", "tbody", "tr_", "td_", "th_"))}
    assert shown <= {*allowed, "paragraph_close", "text_special"} and "code_inline" in shown
    ((id_, prompt, target, before, after, right),) = cells_of(tokens, "edit")
    assert {id_, prompt, target, before, after} == {visible(text, 500) or "–"} and right == "yes"
    assert sum(token.type == "heading_open" for token in tokens) == 4
    front = yaml.safe_load(made_card.split("---\n")[1])
    assert front["base_model"] == visible(text or "m", 500) and front["library_name"] == "peft"


def test_the_reader_of_cards_sees_what_is_not_escaped() -> None:
    """Control: the same texts written plainly make HTML, links and more cells."""
    table = "---\n---\n| edit | b |\n| --- | --- |\n| {} | x |\n"
    assert "link_open" in kinds(rendered(table.format(HOSTILE[3])))
    assert "html_inline" in kinds(rendered(table.format(HOSTILE[2])))
    assert cells_of(rendered(table.format(HOSTILE[0])), "edit") != [[HOSTILE[0], "x"]]


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab|`\\ *_<>&[]()~!#-\n\té\u202e"), max_size=24))
def test_every_text_stands_in_its_cell_as_it_is(text: str) -> None:
    """Whatever it is made of, and the next cell is the next text."""
    record = Record.__new__(Record)
    values = {"version": None, "deltas": (), "metrics": (), "answers": ()}
    edit = tiny.an_edit("id", subject="", relation=text, target_new="next")
    for name, value in {**values, "edits": (Placed(edit, "", 0),)}.items():
        object.__setattr__(record, name, value)
    table = "\n".join(["---", "---", *export._edit_table(record, {})])
    ((_, prompt, target, *_),) = cells_of(rendered(table), "edit")
    assert (prompt, target) == (visible(text, 500) or "–", "next")


def test_the_card_says_which_edits_are_overlays(beside: tuple[Record, Path, Path], whole_bundle: Path) -> None:
    """In the last column of their rows, and once in words what that means; of weights alone neither is said."""
    text = (beside[2] / "README.md").read_text()
    tokens = rendered(text)
    assert [row[-1] for row in cells_of(tokens, "edit")] == ["weights", *["overlay (ike)"] * 3]
    assert "lies in" in text and "editctl.load" in text
    assert "overlay" not in (whole_bundle / "README.md").read_text()


def test_the_card_lists_every_edit_and_every_metric(made: Callable[..., Made]) -> None:
    """With what was said before and after, protocol, count and direction; of another version it says otherwise."""
    record = made("gpt2").record
    perplexity = Metric("perplexity", "teacher-forced", 12.3456, 7, higher_is_better=False)
    record = replace(record, metrics=(*record.metrics, perplexity))
    tokens = rendered(card(record, model="m", format="merged"))
    rows = cells_of(tokens, "edit")
    own = {answer.edit: answer for answer in record.answers if answer.kind == "rewrite"}
    assert [row[:3] for row in rows] == [[e.id, e.prompt, e.target_new] for e in (p.edit for p in record.edits)]
    assert [row[3:] for row in rows] == [
        [visible(own[id].before) or "–", visible(own[id].after) or "–", "yes" if own[id].ok else "no"]
        for id in (row[0] for row in rows)
    ]
    metrics = cells_of(tokens, "metric")
    assert len(metrics) == len(record.metrics) > 2
    assert metrics[-1] == ["perplexity", "teacher-forced", "12.35", "7", "lower"]
    assert metrics[0][4] == "higher" and metrics[0][1] == "generated"
    for told in (record.version.id, record.version.weights_hash, record.version.created_at):
        assert told in card(record, model="m", format="merged")
        assert told not in card(None, model="m", format="merged")


@pytest.mark.parametrize("which", [0, 1], ids=["merged", "peft"])
def test_the_code_in_the_card_loads_the_export(made: Callable[..., Made], which: int, tmp_path: Path) -> None:
    """Run as it stands, with the folder's path filled in, it gives the version's answers."""
    one = made("gpt2")
    folder = all_formats(one, tmp_path / "out")[which]().folder
    text = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace(export.HERE, str(folder))
    names: dict[str, Any] = {}
    exec(code, names)
    assert apart(one.answers_of(names["model"].eval()), one.worn()) < 1e-5
    assert names["tokenizer"](TEXTS[0])["input_ids"] == one.model.encode(TEXTS[0])


def test_the_command_in_a_bundles_card_is_one(whole_bundle: Path) -> None:
    """The command line has a verb of that name that takes a folder."""
    from editctl.cli_export import import_

    text = (whole_bundle / "README.md").read_text()
    program, verb, kind, folder = re.search(r"```sh\n(.*?)\n```", text, re.S)[1].split()
    assert (program, verb, folder) == ("editctl", import_.name, export.HERE)
    assert next(parameter.name for parameter in import_.commands[kind].params) == "folder"
