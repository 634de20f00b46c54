"""A version's factors on disk: one safetensors file a batch of edits, named by its content.

Knows: the file format, its hash and the one arithmetic by which factors become weights. Refuses: models, specs, SQL.

For every edited module a batch keeps K (d_in × n, the keys), R (d_out × n, the residuals) and A (n × d_in, the
factor), one column or row a place a fact is looked up at; edits of one subject may share one. The update of the weight,
always in the Linear orientation (d_out × d_in), is R·A. Three kinds of method do more to a matrix, and pay for it in
bytes:

- `left`·`right` (d_out × m, m × d_in), added to R·A, or in its place where A has no rows: singular values that PRUNE
  takes back, a gradient's terms, a low-rank adapter. Thin.
- `mask`, one bit an entry of the matrix, 1/32 of its fp32 size: entries that RECT leaves alone.
- `dense` (d_out × d_in), in place of all of the above: fine-tuning, and whatever is projected after its solve.

All numbers are fp32. A batch of a method that leaves the weights alone has an overlay instead: one entry an edit, of
texts, numbers and rows of tensors, and the name of the trained file that reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from editctl.errors import StoreError
from editctl.files import digest_of, write_atomically

FORMAT, OVERLAID = 1, 2
"""Formats of a file without and with an overlay; who knows only the first must not take the second for nothing."""
_OVERLAY = "overlay/"
"""What the names of an overlay's tensors begin with; no module's does."""
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
    left: Tensor | None = None
    """d_out × m."""
    right: Tensor | None = None
    """m × d_in."""
    mask: Tensor | None = None
    """Bits of d_out × d_in entries, row by row, eight to a byte (uint8): 1 where the update is written."""
    dense: Tensor | None = None
    """The whole update, d_out × d_in, in place of the other parts."""

    @property
    def shape(self) -> tuple[int, int]:
        """d_out × d_in."""
        return self.residuals.shape[0], self.keys.shape[0]

    @property
    def terms(self) -> list[tuple[Tensor, Tensor]]:
        """Products, d_out × r and r × d_in each, that add up to the update, before any mask; none when it is dense."""
        if self.dense is not None:
            return []
        found = [(self.residuals, self.factor)] if len(self.factor) else []
        return found if self.left is None or self.right is None else [*found, (self.left, self.right)]

    @property
    def kind(self) -> str:
        """`thin`, `sparse` or `dense`."""
        return "dense" if self.dense is not None else "sparse" if self.mask is not None else "thin"

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}

    def update(self) -> Tensor:
        """The whole update, d_out × d_in, fp32, on the CPU."""
        return compose(torch.zeros(self.shape), [self])

    def times(self, tall: Tensor) -> Tensor:
        """The update times a matrix (d_in × m), d_out × m."""
        if self.kind != "thin":
            return self.update().to(tall) @ tall
        product = tall.new_zeros(self.shape[0], tall.shape[1])
        for left, right in self.terms:
            product = product + left @ (right @ tall)
        return product

    def norm(self) -> float:
        """Frobenius norm of the update."""
        if self.kind != "thin" or self.left is not None:
            return float(self.update().norm())
        # ‖R A‖² = tr(RᵀR · A Aᵀ), n × n; columns that are nearly opposite cancel, hence fp64.
        tall, wide = self.residuals.double(), self.factor.double()
        square = ((tall.T @ tall) * (wide @ wide.T)).sum()
        return float(square.clamp_min(0).sqrt())


_SHIFTS = torch.arange(7, -1, -1, dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """A mask (d_out × d_in, bool) as bits."""
    bits = torch.nn.functional.pad(mask.cpu().flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << _SHIFTS).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bits as a mask (d_out × d_in, bool)."""
    flat = (bits.cpu()[:, None] >> _SHIFTS) & 1
    return flat.flatten()[: shape[0] * shape[1]].view(shape).bool()


def beside(parts: Sequence[Factors]) -> Factors:
    """Updates of one module, written one after another at different columns, as one."""
    if len(parts) == 1:
        return parts[0]
    keys, residuals = (torch.cat([getattr(p, name) for p in parts], dim=1) for name in ("keys", "residuals"))
    if any(part.kind != "thin" or part.left is not None for part in parts):
        return _whole(keys, residuals, parts)
    return Factors(keys, residuals, torch.cat([part.factor for part in parts]))


def after(parts: Sequence[Factors]) -> Factors:
    """Updates of one module, written one after another at the same columns, as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.kind != "thin" for part in parts):
        return _whole(first.keys, first.residuals, parts)
    left = [first.left, *(t for part in parts[1:] for t in (part.residuals, part.left))]
    right = [first.right, *(t for part in parts[1:] for t in (part.factor, part.right))]
    return replace(
        first,
        left=torch.cat([t for t in left if t is not None], dim=1),
        right=torch.cat([t for t in right if t is not None]),
    )


def _whole(keys: Tensor, residuals: Tensor, parts: Sequence[Factors]) -> Factors:
    """Updates as one matrix."""
    total = compose(torch.zeros(parts[0].shape), parts)
    return Factors(keys, residuals, torch.zeros(0, keys.shape[0]), dense=total)


@dataclass(frozen=True)
class Overlay:
    """What a batch lays over the weights instead of changing them."""

    kind: str
    """Which of `engine.overlay.KINDS` reads it."""
    entries: tuple[Mapping[str, Any], ...]
    """What is kept of each edit, as JSON values; `id` is the edit's."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Row i of each belongs to entry i."""
    artifact: str = ""
    """Content name of the trained file that is needed beside, "" for none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it is read, as JSON values."""

    def only(self, chosen: Sequence[int]) -> Overlay:
        """The overlay with these entries alone."""
        rows = {name: tensor[list(chosen)] for name, tensor in self.tensors.items()}
        return replace(self, entries=tuple(self.entries[i] for i in chosen), tensors=rows)

    def joined(self, other: Overlay) -> Overlay:
        """The overlay with the entries of another of the same kind behind its own."""
        rows = {name: torch.cat([tensor, other.tensors[name]]) for name, tensor in self.tensors.items()}
        return replace(self, entries=(*self.entries, *other.entries), tensors=rows)

    def about(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        entries = [dict(entry) for entry in self.entries]
        return {"kind": self.kind, "entries": entries, "artifact": self.artifact, "settings": dict(self.settings)}

    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        total = hashlib.sha256(json.dumps(self.about(), sort_keys=True, ensure_ascii=False).encode())
        for name, tensor in sorted(self.tensors.items()):
            content = _stored(tensor)
            total.update(f"{name}{content.dtype}{tuple(content.shape)}".encode())
            total.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
        return total.digest()


@dataclass(frozen=True)
class Delta:
    """One batch of edits: factors for every edited module, or an overlay."""

    edits: tuple[str, ...]
    """Ids of the edits, in the order they were given."""
    modules: Mapping[str, Factors]
    """By the full name of the module in the model."""
    params: Mapping[str, object]
    """Method parameters the batch was solved with, so that it can be solved again without gradients."""
    columns: tuple[int, ...] = ()
    """The column of each edit; by default edit i has column i."""
    places: tuple[str, ...] = ()
    """What each column is the key of: the text of its prompts up to the end of the subject."""
    together: tuple[tuple[str, ...], ...] = ()
    """For each column, the prompts whose answers its target vector was made for."""
    found: Mapping[str, object] = field(default_factory=dict)
    """What the batch found out and later ones go on with."""
    overlay: Overlay | None = None

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", tuple(range(len(self.edits))))

    def to_bytes(self) -> bytes:
        """The file's content; the same delta gives the same bytes."""
        tensors = {
            f"{name}.{part}": _stored(tensor)
            for name, factors in sorted(self.modules.items())
            for part, tensor in sorted(factors.tensors().items())
        }
        over = self.overlay
        tensors |= {f"{_OVERLAY}{name}": _stored(t) for name, t in sorted(over.tensors.items())} if over else {}
        about = {
            "format": OVERLAID if over else FORMAT,
            **({"overlay": over.about()} if over else {}),
            "edits": list(self.edits),
            "params": dict(self.params),
            "columns": list(self.columns),
            "places": list(self.places),
            "together": [list(prompts) for prompts in self.together],
            "found": dict(self.found),
        }
        # One metadata key: safetensors writes several in random order, and then the name would not follow the content.
        content: bytes = save_tensors(tensors, {METADATA: json.dumps(about, sort_keys=True, ensure_ascii=False)})
        return content


def _stored(tensor: Tensor) -> Tensor:
    """As it is written: bits as they are, numbers as fp32."""
    kind = torch.uint8 if tensor.dtype == torch.uint8 else torch.float32
    return tensor.detach().to("cpu", kind).contiguous()


def digest(data: bytes) -> str:
    """Content name of a factor file: the first 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def save(delta: Delta, folder: Path) -> str:
    """Write the delta under its content's name by an atomic rename and return the name.

    Raises:
        StoreError: it cannot be written.
    """
    data = delta.to_bytes()
    name = digest(data)
    target = folder / f"{name}.safetensors"
    try:
        # A file of that name that was spoiled since is made good.
        if not target.exists() or digest_of(target) != name:
            write_atomically(target, data)
    except OSError as error:
        raise StoreError(
            f"the factor file {target} cannot be written: {error.strerror}",
            "free some space, or check the permissions of the folder; the head is where it was",
        ) from None
    return name


def load(name: str, folder: Path) -> Delta:
    """Read a delta and check that its content has its name.

    Raises:
        StoreError: the file is missing, or its content changed since it was written.
    """
    path = folder / f"{name}.safetensors"
    try:
        found = digest_of(path)
    except FileNotFoundError:
        raise StoreError(f"the factor file {path} is missing", "restore it from a backup of the store") from None
    except OSError as error:
        raise StoreError(
            f"the factor file {path} cannot be read: {error.strerror}", "check its permissions and the disk"
        ) from None
    if found != name:
        raise StoreError(
            f"the factor file {path} is not what was written: its content has hash {found}",
            "restore it from a backup of the store",
        )
    try:
        tensors, about = read_tensors(path)
    except KeyError:
        about = {}
    if about.get("format") not in (FORMAT, OVERLAID):
        raise StoreError(f"the factor file {path} has a format this editctl does not know", "upgrade editctl")
    parts: dict[str, dict[str, Tensor]] = {}
    rows: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        if key.startswith(_OVERLAY):
            rows[key.removeprefix(_OVERLAY)] = tensor
        else:
            parts.setdefault(module, {})[part] = tensor
    over = about.get("overlay")
    overlay = Overlay(over["kind"], tuple(over["entries"]), rows, over["artifact"], over["settings"]) if over else None
    return Delta(
        edits=tuple(about["edits"]),
        modules={module: Factors(**tensors) for module, tensors in sorted(parts.items())},
        params=about["params"],
        columns=tuple(about["columns"]),
        places=tuple(about["places"]),
        together=tuple(tuple(prompts) for prompts in about["together"]),
        found=about["found"],
        overlay=overlay,
    )


def compose(base: Tensor, updates: Sequence[Factors]) -> Tensor:
    """Base weight (d_out × d_in, any dtype) plus all updates, in fp32.

    One rank-one term after another, in order, each product rounded before it is added: elementwise IEEE arithmetic, so
    the result has the same bits on every machine and device, which a matrix product does not promise. Rows are taken
    in slices that stay in cache; slicing rows does not change the arithmetic of any entry.
    """
    weight = base.detach().to(torch.float32, copy=True)
    for update in updates:
        _add(weight, update)
    return weight


def _add(weight: Tensor, update: Factors) -> None:
    device = weight.device
    if update.dense is not None:
        weight.add_(update.dense.to(device))
        return
    terms = [(left.to(device), right.to(device)) for left, right in update.terms]
    mask = None if update.mask is None else unpack(update.mask, update.shape).to(device)
    rows = max(1, (1 << 18) // weight.shape[1]) if device.type == "cpu" else weight.shape[0]
    for start in range(0, weight.shape[0], rows):
        block = weight[start : start + rows]
        term = torch.empty_like(block)
        for left, right in terms:
            piece = left[start : start + rows]
            for i in range(right.shape[0]):
                torch.mul(piece[:, i, None], right[i], out=term)
                if mask is not None:
                    term.mul_(mask[start : start + rows])
                block.add_(term)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Write named tensors, and JSON values about them, to a safetensors file by an atomic rename.

    Raises:
        StoreError: it cannot be written.
    """
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        write_atomically(path, save_tensors(content, {METADATA: json.dumps(dict(about), sort_keys=True)}))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror}", "free some space, or check the permissions of the folder"
        ) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file, mapped into memory and so read only where they are used, and the JSON values about them.

    Raises:
        SafetensorError: it is no safetensors file.
        KeyError: it is one that editctl did not write.
    """
    with safe_open(path, "pt") as file:
        about: dict[str, Any] = json.loads((file.metadata() or {})[METADATA])
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a dict)
