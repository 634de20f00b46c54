"""A version as something other programs load: written, read back and compared before success is said.

Knows: the ordinary Hugging Face folder, the PEFT LoRA adapter, the bundle that carries a version and all that is
recorded of it to another store, and the model card in each. Everything is written beside its place and moved there when
it is known to be right. Refuses: the store, terminals, folders that hold something, ranks that servers do not take,
what lies over the weights where only weights have a place, and whatever a bundle says that was not checked.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import FailFast, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from editctl import __version__, atlas
from editctl import delta as delta_files
from editctl.artifacts import KEY, check
from editctl.delta import Delta, Factors, Overlay, compose
from editctl.engine.families import KINDS as OVERLAYS
from editctl.engine.methods import METHODS, Settings
from editctl.engine.model import DTYPES, PROBE, Model, load
from editctl.engine.source import code
from editctl.engine.wear import check_weights, put_on
from editctl.errors import EditctlError, InvalidInput, ModelError, StoreError
from editctl.files import digest_of
from editctl.metrics.values import KINDS, REWRITE, Answer, Metric
from editctl.plan import count
from editctl.spec import LIMITS, SLOT, Edit, visible
from editctl.store import Version

FORMATS = MERGED, PEFT, DELTA = ("merged", "peft", "delta")
MOST = 512
"""The largest rank that common servers take (vLLM's `max_lora_rank`)."""
TOLERANCE = 1e-5
"""Relative Frobenius error up to which what was read back counts as what was meant; fp32 alone errs by 1e-7."""
FORMAT: Literal[1] = 1
"""Of a bundle."""
ABOUT, DELTAS, TRAINED, CARD = "version.json", "deltas", "artifacts", "README.md"
LARGEST = 200_000_000
"""Bytes of a bundle's JSON; measured: 10 000 edits with 13 answers each have 72 MB."""
LARGEST_TRAINED = 4 * 2**30
"""Bytes of a trained file of a bundle; MEND's networks for blocks as wide as GPT-J's have 0.6 GB each."""
LONGEST = 1_000_000
"""Characters of what an overlay keeps of one edit, as JSON; 16 demonstrations of the longest prompts have 80 000."""


@dataclass(frozen=True)
class Placed:
    """An edit and where its term of the update lies."""

    edit: Edit
    delta: str
    """Name of the factor file."""
    column: int


@dataclass(frozen=True)
class Record:
    """A version and all that is recorded of it."""

    version: Version
    deltas: Annotated[tuple[str, ...], FailFast()]
    """Names of the factor files in order of application."""
    edits: Annotated[tuple[Placed, ...], FailFast()]
    answers: Annotated[tuple[Answer, ...], FailFast()] = ()
    metrics: Annotated[tuple[Metric, ...], FailFast()] = ()
    trained: Annotated[tuple[str, ...], FailFast()] = ()
    """Content names of the trained files that its batches are read by, or were written with; `bundle` fills it in."""


@dataclass(frozen=True)
class Written:
    """What was written, and found right."""

    folder: Path
    format: str
    size: int
    """Bytes."""
    rank: int = 0
    """Of an adapter."""
    lost: float = 0.0
    """Of an adapter cut to a rank: the largest share of a module's energy (sum of squares) that was lost, 0 to 1."""


# ---------------------------------------------------------------------------------------------------------------------
# Weights alone


def check_weights_alone(deltas: Sequence[Delta], record: Record | None) -> None:
    """Make sure that a version is its weights and nothing beside them, as folders for other programs hold it.

    Args:
        record: of the version that the deltas make.

    Raises:
        InvalidInput: some of its edits lie over the weights.
    """
    laid: Counter[str] = Counter()
    for delta in deltas:
        if delta.overlay is not None:
            laid[str(delta.params.get("method", delta.overlay.kind))] += len(delta.edits)
    if not laid:
        return
    whole = sum(len(delta.edits) for delta in deltas)
    which = f"version {record.version.id}" if record else "the version"
    told = ", ".join(f"{name} {n}" for name, n in sorted(laid.items()))
    raise InvalidInput(
        f"{laid.total()} of {count(whole, 'edit')} of {which} lie over the weights ({told}), "
        "which neither a Hugging Face folder nor an adapter can hold",
        "use --format delta for another store, or editctl.load in Python, which has them act",
    )


# ---------------------------------------------------------------------------------------------------------------------
# A Hugging Face folder


def merged(
    model: Model, deltas: Sequence[Delta], folder: Path, record: Record | None = None, *, trusted: bool = False
) -> Written:
    """Write the model with its updates as an ordinary Hugging Face folder in the model's dtype.

    It is loaded again on the CPU, which takes the model's memory a second time.

    Args:
        record: of the version that the deltas make; None for the unedited model.
        trusted: the model was loaded with code of its own, which then goes with it.

    Raises:
        InvalidInput: the folder holds something, edits lie over the weights, or the version was made in another dtype.
        ModelError: the deltas were made for another model.
        StoreError: the weights are not those of the version, or not what was read back.
        EditctlError: the folder cannot be written.
    """
    check_weights_alone(deltas, record)
    _by_module(model, deltas)
    if record is not None and record.version.dtype != str(model.dtype):
        version = record.version
        raise InvalidInput(
            f"version {version.id} was made in {version.dtype}, the model is loaded in {model.dtype}",
            f"pass --dtype {_plain(version.dtype)}",
        )
    with _beside(folder) as part:
        with model.editing() as editing:
            put_on(editing, deltas)
            if record is not None:
                check_weights(editing, record.version)
            wanted = editing.weights_hash()
            _save_model(model, part, trusted)
        _write_card(part, card(record, model=model.name, format=MERGED))
        prompts = [placed.edit.prompt for placed in record.edits] if record else []
        _check_model(part, model, wanted, [PROBE, *prompts], trusted)
        size = _size(part)
    return Written(folder, MERGED, size)


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _save_model(model: Model, folder: Path, trusted: bool) -> None:
    """Weights, configuration and tokenizer as transformers writes them."""
    try:
        model.net.save_pretrained(folder, max_shard_size="5GB")
        model.tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises a bare Exception when a disk is full
        raise OSError(_reason(error)) from error
    if trusted and model.folder is not None:
        for name in code(model.folder):
            shutil.copyfile(model.folder / name, folder / name)


def _check_model(folder: Path, model: Model, wanted: str, texts: Sequence[str], trusted: bool) -> None:
    """Load a folder anew and compare the hash of its weights, and the tokens of some texts.

    Raises:
        StoreError: they differ, or it cannot be loaded.
    """
    try:
        again = load(str(folder), device="cpu", dtype=_plain(model.dtype), trusted=trusted)
    except ModelError as error:
        raise _wrong(f"it cannot be loaded: {error.message}") from error
    if (found := again.weights_hash()) != wanted:
        raise _wrong(f"its weights have the hash {found}, the version's {wanted}")
    for text in texts:
        if again.encode(text) != model.encode(text):
            raise _wrong(f'its tokenizer reads "{visible(text)}" as other tokens')


# ---------------------------------------------------------------------------------------------------------------------
# An adapter


@dataclass(frozen=True)
class _Thin:
    """An update as left · right."""

    left: Tensor
    """d_out × r."""
    right: Tensor
    """r × d_in."""
    lost: float | None = None
    """Share of its energy that was cut off; None when it is whole."""


def adapter(
    model: Model,
    deltas: Sequence[Delta],
    folder: Path,
    record: Record,
    *,
    rank: int | None = None,
    most: int = MOST,
) -> Written:
    """Write a version's updates as a PEFT LoRA adapter: the factors themselves, padded with zeros to one rank.

    Args:
        rank: cut the updates to this rank where they have more, by singular values; None cuts nothing.
        most: the largest rank to write.

    Raises:
        InvalidInput: there is nothing to write, the rank is too large, the updates have no thin factors, edits lie over
            the weights, or the folder holds something.
        ModelError: the deltas were made for another model.
        StoreError: what was read back is not what was meant.
        EditctlError: the folder cannot be written.
    """
    check_weights_alone(deltas, record)
    parts = _by_module(model, deltas)
    if not parts:
        raise InvalidInput(
            f"version {record.version.id} has no updates to make an adapter of", "use --format merged for the model"
        )
    if rank is None:
        _check_thin(parts, most)
    elif not 1 <= rank <= most:
        raise InvalidInput(f"rank {rank} is not between 1 and {most}, what common servers accept", f"use --rank {most}")
    thin = {module: _cut(updates, rank or most) for module, updates in parts.items()}
    width = max(t.left.shape[1] for t in thin.values())
    lost = max(t.lost or 0.0 for t in thin.values())
    notes = [
        f"The metrics were measured on merged weights in {_plain(model.dtype)}. Beside the base weights, an adapter "
        "answers as they do up to rounding."
    ]
    if any(t.lost is not None for t in thin.values()):
        notes.append(
            f"The updates were cut to rank {width}, which lost up to {_percent(lost)} of a module's energy; the "
            "metrics are those of the whole updates."
        )
    with _beside(folder) as part:
        _write_adapter(part, model, thin, width, _provenance(record.version))
        _check_adapter(part, model, {module: _meant(parts[module], thin[module]) for module in parts})
        _write_card(part, card(record, model=model.name, format=PEFT, base=_base(model), notes=notes))
        size = _size(part)
    return Written(folder, PEFT, size, width, lost)


def _by_module(model: Model, deltas: Sequence[Delta]) -> dict[str, list[Factors]]:
    """Updates by module, in order of application; ModelError when they were made for another model."""
    parts: dict[str, list[Factors]] = {}
    for delta in deltas:
        for module, factors in delta.modules.items():
            if factors.shape != (shape := tuple(model.block_of(module).weight.shape)):
                raise ModelError(
                    f"{module} of {model.name} is {shape[0]} × {shape[1]}, its update "
                    f"{factors.shape[0]} × {factors.shape[1]}",
                    "the version was made for another model",
                )
            parts.setdefault(module, []).append(factors)
    return parts


def _check_thin(parts: Mapping[str, Sequence[Factors]], most: int) -> None:
    """Raise InvalidInput for updates that have no thin factors, or more columns than `most`."""
    kinds = sorted({f.kind for updates in parts.values() for f in updates} - {"thin"})
    if kinds:
        raise InvalidInput(
            f"the version has {' and '.join(kinds)} updates, which no adapter can hold as they are",
            f"use --format merged, or --rank N (at most {most}) for the nearest adapter of rank N",
        )
    columns = max(_side_by_side(updates)[0].shape[1] for updates in parts.values())
    if columns > most:
        lost = max(_cut(updates, most).lost or 0.0 for updates in parts.values())
        raise InvalidInput(
            f"the adapter would have rank {columns}; common servers accept at most {most}",
            f"use --format merged, or --rank {most}, which would lose {_percent(lost)} of the updates' energy",
        )


def _side_by_side(updates: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Thin updates as one product: d_out × r and r × d_in."""
    left, right = zip(*(term for f in updates for term in f.terms), strict=True)
    return torch.cat(left, dim=1), torch.cat(right)


def _cut(updates: Sequence[Factors], rank: int) -> _Thin:
    """The updates of a module as one product, its largest singular values alone where it has more than `rank` columns.

    Of thin updates only a matrix as wide as their columns is decomposed.
    """
    if all(f.kind == "thin" for f in updates):
        left, right = _side_by_side(updates)
        if left.shape[1] <= rank:
            return _Thin(left, right)
        tall, upper = torch.linalg.qr(left.double())
        wide, lower = torch.linalg.qr(right.double().T)
        u, sizes, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        energy, u, rows = sizes.square(), tall @ u[:, :rank], (sizes[:, None] * v)[:rank] @ wide.T
    else:
        whole = compose(torch.zeros(updates[0].shape), updates).double()
        # Measured at 1024 × 3584: 0.6 s, the singular values of the matrix itself 4.4 s.
        energy, u = torch.linalg.eigh(whole @ whole.T)
        energy, u = energy.flip(0).clamp_min(0), u.flip(1)[:, :rank]
        rows = u.T @ whole
    tiny = torch.finfo(torch.float64).tiny
    lost = energy[rank:].sum() / energy.sum().clamp_min(tiny)
    root = rows.norm(dim=1).sqrt().clamp_min(tiny)
    return _Thin((u * root).float(), (rows / root[:, None]).float(), float(lost))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _provenance(version: Version) -> dict[str, str]:
    """Where an adapter comes from, as its metadata says it."""
    about = {name: getattr(version, name) for name in ("base", "weights_hash", "method", "dtype", "created_at", "who")}
    return {"version": version.id, **about, "editctl": __version__}


def _base(model: Model) -> tuple[str, str]:
    """What the base model is loaded by in other programs: a hub id with its revision, or a folder."""
    if model.name == atlas.NAME:
        return str(atlas.FOLDER), ""
    given = Path(model.name).expanduser()
    if given.is_dir():
        return str(given.resolve()), ""
    cached = model.folder is not None and model.folder.parent.name == "snapshots"
    return model.name, model.folder.name if model.folder is not None and cached else ""


def _key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def _write_adapter(
    folder: Path, model: Model, thin: Mapping[str, _Thin], rank: int, provenance: Mapping[str, str]
) -> None:
    base, revision = _base(model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **({"revision": revision} if revision else {}),
        "r": rank,
        # Equal to r: other programs multiply the update by lora_alpha / r.
        "lora_alpha": rank,
        "target_modules": sorted(thin),
        "fan_in_fan_out": all(model.block_of(module).transposed for module in thin),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    tensors = {}
    for module, t in thin.items():
        missing = rank - t.left.shape[1]
        tensors[_key(module, "A")] = torch.nn.functional.pad(t.right, (0, 0, 0, missing)).contiguous()
        tensors[_key(module, "B")] = torch.nn.functional.pad(t.left, (0, missing)).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt", **provenance})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _meant(updates: Sequence[Factors], thin: _Thin) -> Callable[[], Tensor]:
    """The update that an adapter has to make of a module, d_out × d_in, fp64, worked out when it is asked for.

    That of the version batch by batch; where it was cut, what was left of it.
    """

    def products() -> Tensor:
        if thin.lost is not None:
            return thin.left.double() @ thin.right.double()
        total = torch.zeros(updates[0].shape, dtype=torch.float64)
        for f in updates:
            for left, right in f.terms:
                total += left.double() @ right.double()
        return total

    return products


def _check_adapter(folder: Path, model: Model, meant: Mapping[str, Callable[[], Tensor]]) -> None:
    """Read an adapter as PEFT does and compare what it would do to every module with what is meant.

    Raises:
        StoreError: they differ, in the update of a module or in which modules are changed.
    """
    try:
        found = _read_adapter(folder, [name for name, _ in model.net.named_modules()])
    except (KeyError, TypeError, ValueError, ArithmeticError, SafetensorError) as error:
        raise _wrong(f"the adapter cannot be read back: {_reason(error)}") from error
    for module in sorted(found.keys() ^ meant.keys()):
        raise _wrong(f"{module} would {'be changed, which is not edited' if module in found else 'not be changed'}")
    for module, wanted in meant.items():
        scale, left, right = found[module]
        target = wanted()
        if (left.shape[0], right.shape[1]) != target.shape:
            raise _wrong(f"the factors of {module} do not have its shape")
        size = target.norm().clamp_min(torch.finfo(target.dtype).tiny)
        off = float((scale * (left.double() @ right.double()) - target).norm() / size)
        if not off <= TOLERANCE:
            raise _wrong(f"the update of {module} would be another (relative error {off:.1e})")


_ADDED = (
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "exclude_modules"),
    *("layers_to_transform", "layer_replication", "target_parameters", "trainable_token_indices"),
)
"""Settings of PEFT that change what an adapter does, none of which it needs."""


def _read_adapter(folder: Path, names: Iterable[str]) -> dict[str, tuple[float, Tensor, Tensor]]:
    """What PEFT would do with an adapter: by module s, B (d_out × r) and A (r × d_in), where the update is s · B · A.

    Raises:
        KeyError, TypeError, ValueError, ArithmeticError, SafetensorError: PEFT would not read it, or in another way.
    """
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    if config["peft_type"] != "LORA" or config.get("bias", "none") != "none" or any(map(config.get, _ADDED)):
        raise ValueError("it is more than a plain LoRA adapter")
    rank, targets = config["r"], config["target_modules"]
    result = {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
        for name in names:
            if not any(name == target or name.endswith(f".{target}") for target in targets):
                continue
            prefix = f"base_model.model.{name}"
            # PEFT goes on without a key that it misses; B is then zero.
            if f"{prefix}.lora_B.weight" in keys:
                left, right = (file.get_tensor(f"{prefix}.lora_{side}.weight") for side in "BA")
                if left.shape[1] != rank or right.shape[0] != rank:
                    raise ValueError(
                        f"the factors of {name} have {left.shape[1]} and {right.shape[0]} terms, not {rank}"
                    )
                result[name] = (config["lora_alpha"] / rank, left, right)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# A bundle


def bundle(record: Record, deltas: Path, library: Path, folder: Path) -> Written:
    """Write a version with its factor files, the trained files that those need, and all that is recorded of it.

    Args:
        deltas: the folder with the factor files.
        library: the folder with the trained files.

    Raises:
        InvalidInput: the folder holds something, or more is recorded than could be read.
        StoreError: a factor or trained file is missing or changed, or what was read back is not what was meant.
        EditctlError: the folder cannot be written.
    """
    trained: dict[str, None] = {}
    over: dict[str, str] = {}
    for name in record.deltas:
        delta = delta_files.load(name, deltas)
        trained |= dict.fromkeys(_needs(delta))
        if delta.overlay is not None:
            over[name] = delta.overlay.kind
    record = replace(record, trained=tuple(trained))
    text = _to_json(record)
    if (size := len(text.encode())) > LARGEST:
        raise InvalidInput(
            f"what is recorded of the version takes {size} bytes, at most {LARGEST} can be read back",
            "use --format merged or --format peft",
        )
    for name in record.trained:
        check(name, library)
    with _beside(folder) as part:
        for source, under, names in ((deltas, DELTAS, record.deltas), (library, TRAINED, record.trained)):
            for name in names:
                (part / under).mkdir(exist_ok=True)
                shutil.copyfile(source / f"{name}.safetensors", part / under / f"{name}.safetensors")
        (part / ABOUT).write_text(text, "utf-8")
        _write_card(part, card(record, model=record.version.model, format=DELTA, over=over))
        try:
            found = read_bundle(part)
        except EditctlError as error:
            raise _wrong(error.message) from error
        if _to_json(found) != text:
            raise _wrong(f"{ABOUT} says something else")
        size = _size(part)
    return Written(folder, DELTA, size)


def _needs(delta: Delta) -> list[str]:
    """Content names of the trained files that a batch was written with, and is read by."""
    named = (delta.params.get("artifact"), delta.overlay.artifact if delta.overlay else "")
    return list(dict.fromkeys(str(name) for name in named if name))


@dataclass(frozen=True, kw_only=True)
class _Document(Record):
    """A bundle's JSON."""

    format: Literal[1]


@cache
def _documents() -> TypeAdapter[_Document]:
    return TypeAdapter(_Document)


def _to_json(record: Record) -> str:
    values = {f.name: getattr(record, f.name) for f in fields(Record)}
    plain = _documents().dump_python(_Document(format=FORMAT, **values))
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def read_bundle(folder: Path) -> Record:
    """What a bundle holds; factor files lie in `deltas/` under it and the trained files that they need in `artifacts/`,
    each with the content that its name says.

    A bundle comes from anywhere: sizes, names, types and the shapes of all factors are checked, and no path leads out.

    Raises:
        InvalidInput: the folder is no bundle, or what it says cannot be.
        StoreError: a factor or trained file is missing, or is not what its name says.
    """
    if not folder.is_dir():
        raise InvalidInput(f"there is no folder {folder}", _NAME_A_BUNDLE)
    root = folder.resolve()
    about = _inside(root, ABOUT)
    if (size := about.stat().st_size) > LARGEST:
        raise InvalidInput(f"{about} has {size} bytes, at most {LARGEST} are read", _EXPORT_AGAIN)
    try:
        document = _documents().validate_json(about.read_bytes(), strict=True)
    except OSError as error:
        raise InvalidInput(f"{about} cannot be read: {error.strerror}", "name a folder that you may read") from error
    except ValidationError as error:
        raise _not_valid(about, error) from None
    edits = tuple(Placed(_undeclared(p.edit), p.delta, p.column) for p in document.edits)
    values = {f.name: getattr(document, f.name) for f in fields(Record)}
    record = Record(**{**values, "edits": edits})
    if fault := _fault_of_record(record):
        raise InvalidInput(f"{about}: {fault}", _EXPORT_AGAIN)
    laid: dict[str, dict[str, tuple[int, ...]]] = {}
    methods: dict[str, set[str]] = {name: set() for name in record.trained}
    for name in record.deltas:
        path = _inside(root, f"{DELTAS}/{name}.safetensors")
        columns = [placed.column for placed in record.edits if placed.delta == name]
        delta = _load(name, path.parent)
        if fault := _fault_of_delta(delta, columns) or _fault_beside(delta.overlay, laid):
            raise InvalidInput(f"{path}: {fault}", _EXPORT_AGAIN)
        for content in _needs(delta):
            if content not in methods:
                raise InvalidInput(f"{path}: it needs a trained file that is not named", _EXPORT_AGAIN)
            methods[content].add(str(delta.params["method"]))
    for name, users in methods.items():
        path = _inside(root, f"{TRAINED}/{name}.safetensors")
        if (size := path.stat().st_size) > LARGEST_TRAINED:
            raise InvalidInput(f"{path} has {size} bytes, at most {LARGEST_TRAINED} are read", _EXPORT_AGAIN)
        if fault := _fault_of_trained(*_load_trained(path), users, record.version.base):
            raise InvalidInput(f"{path}: {fault}", _EXPORT_AGAIN)
    return record


_NAME_A_BUNDLE = "name a folder that `editctl export --format delta` wrote"
_EXPORT_AGAIN = "it is damaged, or editctl did not write it: export the version again"


def _inside(root: Path, name: str) -> Path:
    """A file of a bundle; InvalidInput when it is missing, no plain file, or elsewhere."""
    path = root / name
    try:
        elsewhere = not path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # links in a circle
        elsewhere = True
    if elsewhere:
        raise InvalidInput(f"{path} leads out of the bundle", _EXPORT_AGAIN)
    if not path.is_file():
        raise InvalidInput(f"{root} has no file {name}", _NAME_A_BUNDLE)
    return path


def _not_valid(path: Path, error: ValidationError) -> InvalidInput:
    """The first thing wrong with a bundle's JSON, without the values it came with."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    if any(one["loc"] == ("format",) for one in found) and found[0]["type"] != "missing":
        return InvalidInput(f"{path} has a format that this editctl does not know", "upgrade editctl")
    where = visible(".".join(map(str, found[0]["loc"])), 200)
    return InvalidInput(f"{path}: {where + ': ' if where else ''}{visible(found[0]['msg'], 200)}", _EXPORT_AGAIN)


def _undeclared(edit: Edit) -> Edit:
    """The edit without a place in a spec, of which a bundle has none."""
    return edit.model_copy(update={"file": "", "line": 0})


_DIGITS = re.compile(r"[0-9a-f]{32}")
_VERSION = re.compile(r"[0-9a-f]{1,64}")
_EDIT = re.compile(r"[a-z0-9][a-z0-9._-]*")


def _fault_of_record(record: Record) -> str:
    """What cannot be in a record whose types are right; empty when there is nothing."""
    version, files, names = record.version, set(record.deltas), [placed.edit.id for placed in record.edits]
    order = [name for name, _ in groupby(placed.delta for placed in record.edits)]
    faults = {
        "the version's id is not one": not _VERSION.fullmatch(version.id),
        "the parent's id is not one": version.parent != "" and not _VERSION.fullmatch(version.parent),
        "the weights hash is not one": not _DIGITS.fullmatch(version.weights_hash),
        "the dtype is not known": _plain(version.dtype) not in DTYPES,
        "the seed is out of range": not 0 <= version.seed < 2**63,
        "the date is not one": not _is_date(version.created_at),
        "the settings are not those of a method": not _are_settings(version.params),
        "a factor file's name is not 32 hexadecimal digits": not all(map(_DIGITS.fullmatch, record.deltas)),
        "a factor file is named twice": len(files) < len(record.deltas),
        "a trained file's name is not 32 hexadecimal digits": not all(map(_DIGITS.fullmatch, record.trained)),
        "a trained file is named twice": len(set(record.trained)) < len(record.trained),
        "an edit lies in a factor file that is not named": any(p.delta not in files for p in record.edits),
        "its edits do not stand in the order of the factor files": order != list(record.deltas),
        "two edits have the same id": len(set(names)) < len(names),
        "an answer is of an unknown kind": any(answer.kind not in KINDS for answer in record.answers),
        "a metric's count is out of range": any(not 0 <= metric.n < 2**63 for metric in record.metrics),
    }
    faults |= {f'edit "{visible(p.edit.id)}" {fault}': True for p in record.edits if (fault := _fault_of_edit(p.edit))}
    return next((fault for fault, there in faults.items() if there), "")


def _fault_of_edit(edit: Edit) -> str:
    """What no spec could have declared."""
    probes = (*edit.locality, *edit.portability)
    prompts = (*edit.paraphrases, *(probe.prompt for probe in probes))
    answers = [answer for probe in probes for answer in probe.answer]
    names = ("id", "subject", "relation", "target_new", "target_true", "method", "source", "note")
    texts = [(name, getattr(edit, name)) for name in names]
    texts += [("prompt", prompt) for prompt in prompts] + [("answer", answer) for answer in answers]
    if long := [name for name, text in texts if len(text) > LIMITS[name]]:
        return f"has a {long[0]} of more than {LIMITS[long[0]]} characters"
    if not _EDIT.fullmatch(edit.id):
        return "has an id that is not a plain name"
    if not edit.subject.strip() or not edit.target_new.strip():
        return "has no subject or no target_new"
    return "" if edit.relation.count(SLOT) == 1 else f"has a relation without one {SLOT}"


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _are_settings(params: Mapping[str, Any]) -> bool:
    """Whether they are those of a run, a trained file being named by its content alone."""
    try:
        made = Settings.from_params(params)
    except (InvalidInput, KeyError, TypeError, ValueError, AttributeError):
        return False
    return not made.artifact or _DIGITS.fullmatch(made.artifact) is not None


_UNREADABLE = (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError, SafetensorError)
"""What becomes of reading a file that may hold anything."""


def _load(name: str, folder: Path) -> Delta:
    """A factor file of a bundle, whatever it holds."""
    try:
        return delta_files.load(name, folder)
    except StoreError as error:
        raise StoreError(error.message, _EXPORT_AGAIN) from error
    except _UNREADABLE as error:
        path = folder / f"{name}.safetensors"
        raise StoreError(f"{path} is no factor file: {_reason(error)}", _EXPORT_AGAIN) from error


def _load_trained(path: Path) -> tuple[dict[str, Tensor], Any]:
    """A trained file of a bundle, whatever it holds, and what it says of itself."""
    try:
        if digest_of(path) != path.stem:
            raise StoreError(f"the trained file {path} is not what was written", _EXPORT_AGAIN)
        tensors, about = delta_files.read_tensors(path)
        return tensors, about[KEY]
    except _UNREADABLE as error:
        raise StoreError(f"{path} is no trained file: {_reason(error)}", _EXPORT_AGAIN) from error


def _fault_of_trained(tensors: Mapping[str, Tensor], about: Any, methods: set[str], base: str) -> str:
    """What cannot be in a trained file that batches of these methods need; empty when there is nothing."""
    if not methods:
        return "no batch needs it"
    if not isinstance(about, dict) or [about.get("method")] != list(methods) or about.get("base") != base:
        return "it was not trained for this model and the method of the batches that need it"
    name, at, layers = about.get("name"), about.get("created_at"), about.get("layers", [])
    if not isinstance(name, str) or len(name) > LIMITS["note"] or not isinstance(at, str) or not _is_date(at):
        return "it does not say what it is called and when it was made"
    if not isinstance(layers, list) or not all(type(layer) is int and layer >= 0 for layer in layers):
        return "the blocks that it was trained for are not numbers of blocks"
    return "" if all(t.dtype == torch.float32 for t in tensors.values()) else "its tensors are not in fp32"


def _fault_of_delta(delta: Delta, columns: Sequence[int]) -> str:
    """What cannot be in a batch that holds edits at these columns; empty when there is nothing."""
    prompts = [prompt for column in delta.together for prompt in column]
    held = (delta.params, delta.found)
    if not all(isinstance(text, str) for text in (*delta.edits, *delta.places, *prompts)):
        return "an edit, place or prompt in it is not a text"
    if not all(isinstance(values, dict) for values in held) or not _are_settings(delta.params):
        return "the settings in it are not those of a method"
    if not all(_in_numbers(value, 3) for value in delta.found.values()):
        return "what it found out is not in numbers"
    if len(delta.columns) != len(delta.edits) or not all(type(column) is int for column in delta.columns):
        return "its edits do not have a column each"
    over = delta.overlay
    if not (delta.modules or over) or not set(columns) <= set(delta.columns):
        return "it does not hold all edits that are said to lie there"
    if (METHODS[str(delta.params["method"])].changes == "overlay") != (over is not None) or (delta.modules and over):
        return "it holds something else than its method writes"
    if over is not None and (fault := _fault_of_overlay(over, delta)):
        return f"its overlay {fault}"
    for module, factors in delta.modules.items():
        if fault := _fault_of_factors(factors):
            return f"{visible(module, 200)} {fault}"
        width = factors.keys.shape[1]
        if not all(0 <= column < width for column in delta.columns):
            return f"{visible(module, 200)} does not have all columns of its edits"
        if any(len(named) not in (0, width) for named in (delta.places, delta.together)):
            return f"{visible(module, 200)} does not have a column for each place"
    if columns != list(delta.columns):
        return "it holds edits that are not said to lie there"
    return ""


def _in_numbers(value: Any, deep: int) -> bool:
    """Whether it is a finite number, or a list or dict of what is, nested at most so deep."""
    if isinstance(value, int | float):
        return abs(value) <= sys.float_info.max
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and deep > 0 and all(_in_numbers(one, deep - 1) for one in inner)


def _fault_of_overlay(over: Overlay, delta: Delta) -> str:
    """What keeps an overlay from being that of a batch; empty when nothing does."""
    n = len(delta.edits)
    if over.kind not in OVERLAYS:
        return "is of a kind that this editctl does not know"
    if not isinstance(over.artifact, str) or not all(isinstance(v, dict) for v in (*over.entries, over.settings)):
        return "has entries or settings that are not keys and values"
    if [entry.get("id") for entry in over.entries] != list(delta.edits) or delta.columns != tuple(range(n)):
        return "does not have an entry for each edit"
    if len(delta.places) != n or len(delta.together) != n:
        return "does not have an entry for each place"
    try:
        longest = max(len(json.dumps(values, allow_nan=False)) for values in (*over.entries, over.settings))
    except (ValueError, RecursionError):
        return "has numbers in its entries that are not finite, or values that nest too deeply"
    if longest > LONGEST:
        return f"keeps more than {LONGEST} characters of an edit"
    if any(t.dtype != torch.float32 or not t.dim() or len(t) != n for t in over.tensors.values()):
        return "has tensors that are not in fp32 with a row for each entry"
    return "" if all(bool(t.isfinite().all()) for t in over.tensors.values()) else "has tensors that are not finite"


def _fault_beside(over: Overlay | None, laid: dict[str, dict[str, tuple[int, ...]]]) -> str:
    """What keeps an overlay from being read together with those before it; empty when nothing does.

    Args:
        laid: for each reader the shapes of one entry's tensors, which grows.
    """
    if over is None:
        return ""
    reader = json.dumps([over.kind, over.artifact, over.settings], sort_keys=True)
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in over.tensors.items()}
    return "" if laid.setdefault(reader, shapes) == shapes else "its overlay does not fit those before it"


def _fault_of_factors(f: Factors) -> str:
    """What keeps factors from being an update; empty when nothing does."""
    parts = f.tensors()
    flat = {name: tensor for name, tensor in parts.items() if name != "mask"}
    if any(t.dtype != torch.float32 or t.dim() != 2 for t in flat.values()):
        return "has factors that are not matrices in fp32"
    (d_in, n), d_out = f.keys.shape, f.residuals.shape[0]
    m = 0 if f.left is None else f.left.shape[1]
    shapes = {
        "keys": (d_in, n),
        "residuals": (d_out, n),
        "dense": (d_out, d_in),
        "left": (d_out, m),
        "right": (m, d_in),
    }
    # Without rows where the update is not R·A.
    shapes["factor"] = (f.factor.shape[0] if f.kind == "dense" or (not len(f.factor) and m) else n, d_in)
    if (f.left is None) != (f.right is None) or any(tuple(flat[name].shape) != shapes[name] for name in flat):
        return "has factors whose shapes do not fit"
    if f.mask is not None and (f.mask.dtype != torch.uint8 or tuple(f.mask.shape) != (-(-d_out * d_in // 8),)):
        return "has a mask of another size"
    if not all(bool(tensor.isfinite().all()) for tensor in flat.values()):
        return "has factors that are not finite"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# The model card

HERE = "path/to/this/folder"
_LIBRARY = {MERGED: "transformers", PEFT: "peft", DELTA: "editctl"}
_WHAT = {
    MERGED: "An ordinary Hugging Face folder with the edits in its weights.",
    PEFT: "A LoRA adapter made of the edits' own factors; the base model's weights are not in it.",
    DELTA: "The factors of the edits and all that is recorded of them, for editctl; the base model is not in it.",
}
_OVER = (
    "Edits that lie in an overlay are not in the weights: the command line has them act where the version is asked, "
    "and so does what editctl.load gives in Python."
)


def card(
    record: Record | None,
    *,
    model: str,
    format: str,
    base: tuple[str, str] = ("", ""),
    notes: Sequence[str] = (),
    over: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The model card of an export, Markdown: what it is, how to load it, its edits and its metrics.

    Texts of specs and models stand in it as code, so that none of it is read as Markdown, HTML or a link.

    Args:
        record: of the version; None for the unedited model.
        model: the base model as the user named it.
        base: what other programs load it by, and the revision, "" for none; an adapter needs it.
        notes: sentences to say beside.
        over: by factor file, the kind of those that are overlays.
    """
    tags = ["editctl", "knowledge-editing", *(["lora"] if format == PEFT else [])]
    front = {"library_name": _LIBRARY[format], "base_model": visible(model, 500), "tags": tags}
    # JSON is YAML.
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", ""]
    edits = () if record is None else record.edits
    told = "unedited" if record is None else f"with {len(edits)} edit{'' if len(edits) == 1 else 's'}"
    notes = [*notes, _OVER] if over else notes
    lines += [f"# {_code(model)} {told}", "", _WHAT[format], *(f"\n{_escaped(note)}" for note in notes), ""]
    if record is not None:
        lines += _facts(record.version)
    lines += ["## Loading", "", *_loading(format, *base), ""]
    if record is not None and edits:
        lines += ["## Edits", "", *_edit_table(record, over), ""]
    if record is not None and record.metrics:
        lines += ["## Metrics", "", *_metric_table(record.metrics), ""]
    return "\n".join(lines)


def _facts(version: Version) -> list[str]:
    values = {"version": version.id, "base model": version.model, "content of the base model": version.base}
    values |= {"method": version.method, "dtype": _plain(version.dtype)}
    values |= {"weights": version.weights_hash, "made": version.created_at, "by": version.who}
    rows = ([name, _code(value)] for name, value in {**values, "editctl": __version__}.items())
    return [*_table(["", ""], rows), ""]


def _loading(format: str, base: str, revision: str) -> list[str]:
    if format == DELTA:
        return ["```sh", f"editctl import delta {HERE}", "```"]
    here = place = f'"{HERE}"'
    if format == PEFT:
        place = repr(visible(base, 500)) + (f", revision={visible(revision, 100)!r}" if revision else "")
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained({place}, dtype="auto")']
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({place})"]
    if format == PEFT:
        lines = ["from peft import PeftModel", *lines, f"model = PeftModel.from_pretrained(model, {here})"]
    return ["```python", *lines, "```"]


def _edit_table(record: Record, over: Mapping[str, str]) -> list[str]:
    own = {answer.edit: answer for answer in record.answers if answer.kind == REWRITE}
    rows = []
    for placed in record.edits:
        edit = placed.edit
        row, answer = [_code(edit.id), _code(edit.prompt), _code(edit.target_new)], own.get(edit.id)
        said = ["", "", ""] if answer is None else [_code(answer.before), _code(answer.after), _yes(answer.ok)]
        where = [f"overlay ({over[placed.delta]})" if placed.delta in over else "weights"] if over else []
        rows.append([*row, *said, *where])
    heads = ["edit", "prompt", "should say", "said before", "says now", "right", *(["lies in"] if over else [])]
    return _table(heads, rows)


def _metric_table(metrics: Sequence[Metric]) -> list[str]:
    rows = (
        [_code(m.name), _code(m.protocol), f"{m.value:.4g}", str(m.n), "higher" if m.higher_is_better else "lower"]
        for m in metrics
    )
    return _table(["metric", "protocol", "value", "prompts", "better"], rows)


def _yes(ok: bool) -> str:
    return "yes" if ok else "no"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _code(text: str) -> str:
    """A text as Markdown code, which may stand in a table.

    Nothing in code is Markdown, HTML or a link. A bar, which would end a cell of a table, stands between two codes.
    """
    return "&#124;".join(map(_span, visible(text, 500).split("|"))) or "–"


def _span(text: str) -> str:
    if not text:
        return ""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    # One space on either side is taken off again, unless there is nothing else.
    pad = " " if text.strip(" ") and (text[0] in " `" or text[-1] in " `") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _escaped(text: str) -> str:
    """A sentence in which nothing is Markdown or HTML."""
    return re.sub(r"[\\`*_{}\[\]<>#|&~$!@:]", lambda found: f"&#{ord(found[0])};", visible(text, 1000))


def _write_card(folder: Path, text: str) -> None:
    (folder / CARD).write_text(text, "utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Folders

_REMEDY = "free some space, or name a folder that you may write"


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A new folder beside the wanted one that takes its place at the end; whatever goes wrong leaves nothing.

    Raises:
        InvalidInput: the wanted folder holds something, or is a file.
        EditctlError: it cannot be written.
    """
    target = folder.expanduser().absolute()
    part = target.parent / f".{target.name}.part-{os.getpid()}"
    missing: list[Path] = []
    try:
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise InvalidInput(f"{folder} is there already", "name a folder that is not there, or an empty one")
        missing += [parent for parent in target.parents if not parent.exists()]
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        raise EditctlError(f"{folder} cannot be written: {_reason(error)}", _REMEDY) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # it holds what was written
                parent.rmdir()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return visible(next(iter(str(error).splitlines()), type(error).__name__), 200)


def _wrong(what: str) -> StoreError:
    return StoreError(
        f"what was written is not what was meant: {what}", "nothing was kept; check the disk and try again"
    )
