"""A version's factors on disk: one safetensors file a batch of edits, named by its content.

Knows: the file format, its hash and the one arithmetic by which factors become weights. Refuses: models, specs, SQL.

For every edited module a batch of n edits keeps K (d_in × n, the keys), R (d_out × n, the residuals) and A (n × d_in,
the factor); the update of the weight, always in the Linear orientation (d_out × d_in), is R·A. Column i of K and R and
row i of A belong to edit i. All fp32.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from editctl.errors import StoreError

FORMAT = 1
METADATA = "editctl"
"""The one key of a file's metadata."""


@dataclass(frozen=True)
class Factors:
    """The update of one module by one batch."""

    keys: Tensor
    """K, d_in × n."""
    residuals: Tensor
    """R, d_out × n."""
    factor: Tensor
    """A, n × d_in."""


@dataclass(frozen=True)
class Delta:
    """One batch of edits: factors for every edited module."""

    edits: tuple[str, ...]
    """Ids of the edits, in column order."""
    modules: Mapping[str, Factors]
    """By the full name of the module in the model."""
    params: Mapping[str, object]
    """Method parameters the batch was solved with, so that it can be solved again without gradients."""

    def to_bytes(self) -> bytes:
        """The file's content; the same delta gives the same bytes."""
        tensors = {
            f"{name}.{part}": getattr(factors, part).detach().to("cpu", torch.float32).contiguous()
            for name, factors in sorted(self.modules.items())
            for part in ("factor", "keys", "residuals")
        }
        about = {"format": FORMAT, "edits": list(self.edits), "params": dict(self.params)}
        # One metadata key: safetensors writes several in random order, and then the name would not follow the content.
        content: bytes = save_tensors(tensors, {METADATA: json.dumps(about, sort_keys=True, ensure_ascii=False)})
        return content


def digest(data: bytes) -> str:
    """Content name of a factor file: the first 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def save(delta: Delta, folder: Path) -> str:
    """Write the delta under its content's name by an atomic rename and return the name.

    A file that is there already under that name has that content and is left alone.
    """
    data = delta.to_bytes()
    name = digest(data)
    target = folder / f"{name}.safetensors"
    if not target.exists():
        write_atomically(target, data)
    return name


def load(name: str, folder: Path) -> Delta:
    """Read a delta and check that its content has its name.

    Raises:
        StoreError: the file is missing, or its content changed since it was written.
    """
    path = folder / f"{name}.safetensors"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StoreError(f"the factor file {path} is missing", "restore it from a backup of the store") from None
    if digest(data) != name:
        raise StoreError(
            f"the factor file {path} is not what was written: its content has hash {digest(data)}",
            "restore it from a backup of the store",
        )
    try:
        tensors, about = read_tensors(data)
    except KeyError:
        about = {}
    if about.get("format") != FORMAT:
        raise StoreError(f"the factor file {path} has a format this editctl does not know", "upgrade editctl")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        parts.setdefault(module, {})[part] = tensor
    return Delta(
        edits=tuple(about["edits"]),
        modules={module: Factors(**fields) for module, fields in sorted(parts.items())},
        params=about["params"],
    )


def compose(base: Tensor, updates: Sequence[Factors]) -> Tensor:
    """Base weight (d_out × d_in, any dtype) plus all updates, in fp32.

    One rank-one term after another, in order, each product rounded before it is added: elementwise IEEE arithmetic, so
    the result has the same bits on every machine and device, which a matrix product does not promise. Rows are taken
    in slices that stay in cache; slicing rows does not change the arithmetic of any entry.
    """
    weight = base.detach().to(torch.float32, copy=True)
    rows = max(1, (1 << 18) // weight.shape[1]) if weight.device.type == "cpu" else weight.shape[0]
    moved = [(u.residuals.to(weight.device), u.factor.to(weight.device)) for u in updates]
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows]
        term = torch.empty_like(block)
        for residuals, factor in moved:
            piece = residuals[start : start + rows]
            for i in range(factor.shape[0]):
                torch.mul(piece[:, i, None], factor[i], out=term)
                block.add_(term)
    return weight


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Write named tensors, and JSON values about them, to a safetensors file by an atomic rename."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save_tensors(content, {METADATA: json.dumps(dict(about), sort_keys=True)}))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file's content, and the JSON values about them.

    Raises:
        SafetensorError: it is no safetensors file.
        KeyError: it is one that editctl did not write.
    """
    tensors: dict[str, Tensor] = load_tensors(data)
    header_size = int.from_bytes(data[:8], "little")
    about: dict[str, Any] = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"][METADATA])
    return tensors, about
