"""One loaded Hugging Face causal LM: its blocks, its down-projections, and ways to read and change them inside `with`.

Knows: which modules can be edited and how what they write reaches the residual stream (found by shape and behaviour,
never by name), hashes, and that weights change only between `with model.editing()` and its end. Refuses: facts,
methods, stores; models that are not dense decoders, each with its reason.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call

from editctl.delta import Factors, Overlay, compose
from editctl.engine.source import code, configuration, locate
from editctl.errors import InvalidInput, ModelError

if TYPE_CHECKING:
    from editctl.engine.overlay import Laid


def pick_device(wanted: str) -> str:
    """`auto` becomes cuda, mps or cpu, the first there is.

    Raises:
        InvalidInput: the wanted device is not there.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, there in present.items() if there)
    name, _, number = wanted.partition(":")
    if not present.get(name, False) or (number and not number.isdigit()):
        have = ", ".join(name for name, there in present.items() if there)
        raise InvalidInput(f"device {wanted} is not available", f"this machine has: {have}")
    return wanted


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
PROBE = "The quick brown fox"
"""The text that a model is looked at with."""
DENSE_ONLY = "only dense decoder-only models are supported"


# ---------------------------------------------------------------------------------------------------------------------
# Hashes of weights


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    content = tensor.detach().cpu().contiguous()
    total = hashlib.sha256(f"{content.dtype}{tuple(content.shape)}".encode())
    total.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.digest()


def combine_digests(digests: Iterable[tuple[str, bytes]]) -> str:
    """One hash (32 hexadecimal digits) of named tensor digests, whatever their order."""
    total = hashlib.sha256()
    for name, value in sorted(digests):
        total.update(name.encode() + b"\0" + value)
    return total.hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------------------
# The model


class _Stop(Exception):
    """Ends a forward pass early; never leaves `Model.read`."""


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    name: str
    module: nn.Module
    down_name: str
    """Full module name of the down-projection, the linear map whose output the block adds to the residual stream."""
    down: nn.Module
    transposed: bool
    """True when the module stores its weight as in × out (GPT-2's Conv1D)."""

    @property
    def weight(self) -> Tensor:
        """The down-projection's weight as out × in, a view."""
        weight: Tensor = self.down.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight


@dataclass(frozen=True)
class Response:
    """How the output of a block moves when the output m of its down-projection does.

    Three kinds: `straight`, by the same amount; `scaled`, by a constant multiple; `normed`, by what is left of the
    change after φ(m) = gain · m / rms(m), times a constant.
    """

    kind: str
    scale: float = 1.0
    norm: nn.Module | None = None
    """φ, of a normed block."""
    gain: Tensor | None = None
    """What φ multiplies a vector of rms 1 by, d."""

    def moved(self, output: Tensor, change: Tensor) -> Tensor:
        """How far the block's output moves (… × d) when the down-projection's output (… × d) grows by `change` (… × d).

        Differentiable in `change`. A normed block answers in float32 at least.
        """
        if self.kind == "straight":
            return change
        if self.norm is None:
            return self.scale * change
        dtype = _wide_enough(output, change)
        start = output.to(dtype)
        return self.scale * (_apply(self.norm, start + change.to(dtype)) - _apply(self.norm, start))

    def needed(self, output: Tensor, wanted: Tensor) -> Tensor:
        """The change of the down-projection's output that moves the block's output by `wanted` (… × d).

        What a normed block writes always has the length that its gain gives it, so there it is the change that comes
        nearest, and the down-projection's output keeps its norm. The answer is in float32 at least.

        Args:
            output: the down-projection's output before the change, … × d.
        """
        if self.kind == "straight":
            return wanted
        if self.norm is None or self.gain is None:
            return wanted / self.scale
        dtype = _wide_enough(output, wanted)
        start, gain = output.to(dtype), self.gain.to(dtype)
        size = _rms(start)
        written = _apply(self.norm, start)
        goal = written + wanted.to(dtype) / self.scale
        # A small ε inside φ makes it a little shorter than the formula says.
        length = (written.norm(dim=-1, keepdim=True) * size / (gain * start).norm(dim=-1, keepdim=True)).nan_to_num()
        return _nearest(gain, goal, length) * size - start


def _wide_enough(*tensors: Tensor) -> torch.dtype:
    """float64 when one of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_enough(tensor))


def _rms(tensor: Tensor) -> Tensor:
    """… × 1, never zero."""
    return tensor.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-30)


def _apply(norm: nn.Module, x: Tensor) -> Tensor:
    """A normalisation in the precision of its input, whatever its weights are stored in."""
    result: Tensor = functional_call(norm, {name: p.to(x.dtype) for name, p in norm.named_parameters()}, (x,))
    return result


def _nearest(gain: Tensor, goal: Tensor, length: Tensor) -> Tensor:
    """The u (… × d) with rms 1 for which gain · u · length comes nearest to `goal` (… × d); length is … × 1.

    With a multiplier μ ≥ 0 for the length, u ∝ gain · goal / (gain² + μ). Newton's method on 1 / rms(u) rises to μ
    monotonically. Where the goal is shorter than what can be written, μ stays 0 and the direction is kept.
    """
    still = gain == 0
    square = torch.where(still, torch.ones_like(gain), gain**2)
    product = gain * goal
    multiplier = torch.zeros_like(length)
    # Measured: 8 steps reach the last digit of float64 with gains spread over four decades.
    for _ in range(10):
        u = product / (square + multiplier)
        power = u.pow(2).mean(-1, keepdim=True).clamp_min(1e-30)
        slope = (u.pow(2) / (square + multiplier)).mean(-1, keepdim=True).clamp_min(1e-30)
        step = power / slope * (power.sqrt() / length.clamp_min(1e-30) - 1)
        multiplier = (multiplier + step).clamp_min(0)
    u = product / (square + multiplier)
    return u / _rms(u)


class Editing:
    """Weights on loan: edited matrices grow by updates and go back to the base at the end of `with`."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._base: dict[str, Tensor] = {}
        self._masters: dict[str, Tensor] = {}
        self.overlays: list[Overlay] = []
        """What was laid over the weights, in order; `overlay.laid` has it act."""

    def lay(self, overlay: Overlay) -> None:
        """Add an overlay to those of the weights; it acts when the model is asked, not while weights are written."""
        self.overlays.append(overlay)

    def add(self, module: str, factors: Factors) -> None:
        """Add one update to a module's weight.

        The fp32 master is extended term by term, so adding updates one at a time gives the bits that composing them
        all from the base gives.

        Raises:
            ModelError: the model has no such matrix.
        """
        weight = self._model.block_of(module).weight
        if factors.shape != weight.shape:
            (rows, columns), name = factors.shape, self._model.name
            raise ModelError(
                f"an update is {rows} × {columns}, {module} of {name} is {weight.shape[0]} × {weight.shape[1]}",
                "the version was made for another model",
            )
        if module not in self._base:
            self._base[module] = weight.detach().clone()
        self._masters[module] = compose(self._masters.get(module, self._base[module]), [factors])
        with torch.no_grad():
            weight.copy_(self._masters[module])

    def reset(self) -> None:
        """Put the base weights back, bit for bit."""
        self._put(self._base)
        self._masters.clear()
        self.overlays.clear()

    def rebuild(self, module: str, updates: Sequence[Factors]) -> None:
        """A module's weight as its base with these updates, whatever it carried before."""
        base = self._base[module]
        self._masters[module] = compose(base, updates)
        self._put({module: self._masters[module]})

    def base(self, module: str) -> Tensor:
        """A module's weight without updates, d_out × d_in."""
        return self._base.get(module, self._model.block_of(module).weight)

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The base weights for the time of `with`, then the updates again, bit for bit."""
        self._put(self._base)
        try:
            yield
        finally:
            self._put(self._masters)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for module, weight in weights.items():
            self._model.block_of(module).weight.copy_(weight)

    def norms(self) -> dict[str, tuple[float, float]]:
        """By edited module, Frobenius norms of its whole update and of the weight that carries it."""
        return {
            module: (float((weight - self._base[module].float()).norm()), float(weight.norm()))
            for module, weight in sorted(self._masters.items())
        }

    def weights_hash(self) -> str:
        """Hash of all the model's weights as they are now, and of what is laid over them."""
        weights = self._model.weights_hash(changed=set(self._base))
        if not self.overlays:
            return weights
        laid = [(f"overlay {i}", overlay.digest()) for i, overlay in enumerate(self.overlays)]
        return combine_digests([("weights", weights.encode()), *laid])


class Model:
    """A causal LM in evaluation mode, its parameters frozen, with its editable modules found."""

    def __init__(self, net: Any, tokenizer: Any, *, name: str, folder: Path | None = None) -> None:
        self.net = net.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.folder = folder
        self.blocks: tuple[Block, ...] = _find_blocks(self)
        self._digests: dict[str, bytes] = {}
        self._responses: dict[int, Response] = {}
        self._attention: dict[int, nn.Module | None] = {}
        self.laid: tuple[Laid, ...] = ()
        """What acts over the weights now, in the order in which it was laid."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.net.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        dtype: torch.dtype = next(self.net.parameters()).dtype
        return dtype

    @property
    def context_length(self) -> int:
        """Tokens the model can read at once."""
        config = self.net.config.get_text_config()
        named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        return int(next(filter(None, named), 1024))

    def block_of(self, down_name: str) -> Block:
        """The block with this down-projection.

        Raises:
            ModelError: there is none, so factors made for another architecture are being applied.
        """
        for block in self.blocks:
            if block.down_name == down_name:
                return block
        raise ModelError(f"{self.name} has no module {down_name}", "the version was made for another model")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as the model expects to read it, its start token included.

        A token that the tokenizer sets behind every text is left out: what goes on from a text does not begin there.
        """
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[: len(ids) - self._ending] if self._ending else ids

    @cached_property
    def _ending(self) -> int:
        """Tokens that the tokenizer sets behind every text."""
        whole, bare = (self.tokenizer("a b", **more)["input_ids"] for more in ({}, {"add_special_tokens": False}))
        starts = (s for s in range(len(whole) - len(bare) + 1) if list(whole[s : s + len(bare)]) == list(bare))
        return len(whole) - len(bare) - next(starts, len(whole) - len(bare))

    def subject_last(self, prompt: str, start: int, end: int) -> int:
        """Position, in `encode(prompt)`, of the last token of the characters start..end."""
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
            if inside:
                return inside[-1]
        return len(self.encode(prompt[:end])) - 1

    def weights_hash(self, changed: set[str] | None = None) -> str:
        """Hash of all parameters; shared (tied) ones count once, under their first name.

        Args:
            changed: names of the down-projections that are being edited; the digests of all other parameters are kept
                from call to call. None reads everything.
        """
        digests = []
        for name, parameter in self.net.named_parameters():
            if changed is None or name.removesuffix(".weight") in changed:
                digests.append((name, tensor_digest(parameter)))
            else:
                if name not in self._digests:
                    self._digests[name] = tensor_digest(parameter)
                digests.append((name, self._digests[name]))
        return combine_digests(digests)

    @contextmanager
    def editing(self) -> Iterator[Editing]:
        """Weights may change inside; leaving restores the base bit for bit."""
        session = Editing(self)
        try:
            yield session
        finally:
            session.reset()

    @contextmanager
    def hooked(self, hooks: Sequence[tuple[nn.Module, str, Callable[..., Any]]]) -> Iterator[None]:
        """Hooks on modules for the time of `with`; kind is `input` or `output`."""
        handles = [
            module.register_forward_pre_hook(hook) if kind == "input" else module.register_forward_hook(hook)
            for module, kind, hook in hooks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def read(
        self, ids: Tensor, mask: Tensor, *, keys: Sequence[int] = (), outputs: Sequence[int] = ()
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Keys (inputs of down-projections, B × T × d_k) and block outputs (B × T × d) of the blocks asked for.

        The pass ends as soon as the last one is known.
        """
        found_keys: dict[int, Tensor] = {}
        found_outputs: dict[int, Tensor] = {}
        wanted = len(set(keys)) + len(set(outputs))

        def stop_when_done() -> None:
            if len(found_keys) + len(found_outputs) == wanted:
                raise _Stop

        def key_hook(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                # OPT flattens its positions before the MLP.
                found_keys[i] = args[0].detach().reshape(*ids.shape, -1)
                stop_when_done()

            return hook

        def output_hook(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: object, output: Any) -> None:
                found_outputs[i] = first_tensor(output).detach()
                stop_when_done()

            return hook

        hooks: list[tuple[nn.Module, str, Callable[..., Any]]] = []
        hooks += [(self.blocks[i].down, "input", key_hook(i)) for i in set(keys)]
        hooks += [(self.blocks[i].module, "output", output_hook(i)) for i in set(outputs)]
        with self.hooked(hooks), suppress(_Stop):
            self.net(input_ids=ids, attention_mask=mask, use_cache=False)
        return found_keys, found_outputs

    def check_editable(self, layers: Sequence[int]) -> None:
        """Make sure that it is known how a change of each layer's down-projection output moves the block's output.

        Raises:
            ModelError: a layer is not there, or its block answers in another way than `Response` knows.
        """
        for layer in layers:
            self._block(layer)
        for layer in layers:
            self.response(layer)

    def _block(self, layer: int) -> Block:
        if not 0 <= layer < len(self.blocks):
            raise ModelError(f"{self.name} has blocks 0 to {len(self.blocks) - 1}, not {layer}", "set other layers")
        return self.blocks[layer]

    def response(self, layer: int) -> Response:
        """How block `layer` passes on what its down-projection writes; measured once, on the model's own activations.

        Raises:
            ModelError: it does so in a way in which the residual equations cannot be solved (it normalises the sum,
                or by more than its length), or there is no such block, or there are no weights to measure.
        """
        if layer not in self._responses:
            self._responses[layer] = _measure(self, layer)
        return self._responses[layer]

    def attention_of(self, layer: int) -> nn.Module | None:
        """The linear map that writes attention into the residual stream in block `layer`; None when there is none.

        It is the last map to the residual width before the down-projection whose output still moves the block's when
        the down-projection's is held fast; a square first map of an MLP does not.

        Raises:
            ModelError: there is no such block, or there are no weights to measure.
        """
        if layer not in self._attention:
            self._attention[layer] = _find_attention(self, layer)
        return self._attention[layer]


def first_tensor(output: Any) -> Tensor:
    """The hidden states among what a block returns: the thing itself, or the first of a tuple."""
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def with_first(output: Any, hidden: Tensor) -> Any:
    """`output` with its hidden states replaced."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _is_stack(parameter: Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) > 2


def _find_blocks(model: Model) -> tuple[Block, ...]:
    """Find the decoder's blocks and in each its down-projection, by shape and by what a forward pass does.

    Blocks: of the module lists that a text passes through, the one with the most parameters. Down-projection: the last
    linear map called in a block that maps every position to the residual width.

    Raises:
        ModelError: this is no dense decoder, or its weights are quantised.
    """
    if getattr(model.net.config, "is_encoder_decoder", False):
        raise _no_decoder(model.name)
    for parameter in model.net.parameters():
        if parameter.dtype not in DTYPES.values():
            raise _quantised(model.name, str(parameter.dtype).removeprefix("torch."))
    lists = {name: m for name, m in model.net.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    names = {module: name for name, module in model.net.named_modules()}
    tokens = model.encode(PROBE) if model.device.type != "meta" else list(range(4))
    # Two texts that differ in their last token alone: what comes before it must be the same in both.
    ids = torch.tensor([tokens, [*tokens[:-1], tokens[0]]], device=model.device)
    maps: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}
    states: dict[nn.Module, Tensor] = {}

    def note_map(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            maps.pop(module, None)
            maps[module] = (args[0].shape, output.shape)

    def note_state(module: nn.Module, args: object, output: Any) -> None:
        hidden = first_tensor(output)
        if isinstance(hidden, Tensor) and hidden.shape[:-1] == ids.shape:
            states[module] = hidden

    matrices = {m for item in lists.values() for m in item.modules() if _is_matrix(m)}
    members = {m for item in lists.values() for m in item}
    hooks: list[tuple[nn.Module, str, Callable[..., Any]]] = [(m, "output", note_map) for m in matrices]
    hooks += [(m, "output", note_state) for m in members]
    try:
        with torch.no_grad(), model.hooked(hooks):
            result = model.net(input_ids=ids, use_cache=True)
    except Exception as error:  # what other libraries' code may raise is not known
        # Grouped products of experts are not there on every device and in every dtype.
        if any(_is_stack(p) for item in lists.values() for p in item.parameters()):
            raise _a_mixture(model.name) from error
        raise ModelError(f"{model.name} cannot read a text: {_first_line(error)}", DENSE_ONLY) from error
    passed = {name: item for name, item in lists.items() if all(m in states for m in item)}
    if not passed:
        raise ModelError(f"{model.name} has no list of decoder blocks that a text passes through", DENSE_ONLY)
    list_name, blocks = max(passed.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    _check_memory(model, ids, blocks, states[blocks[-1]], result)
    width = states[blocks[-1]].shape[-1]
    found = []
    for i, block in enumerate(blocks):
        inside = set(block.modules())
        shapes = {m: (given, made) for m, (given, made) in maps.items() if m in inside}
        fits = [m for m, (_, made) in shapes.items() if made[-1] == width and made[:-1].numel() == ids.numel()]
        if not fits or any(_is_stack(p) for p in block.parameters()) or _some_wait(block, shapes, ids.numel()):
            raise _a_mixture(f"block {i} of {model.name}")
        down = fits[-1]
        weight: Tensor = down.weight  # type: ignore[assignment]
        transposed = weight.shape == (shapes[down][0][-1], width) and not isinstance(down, nn.Linear)
        found.append(Block(f"{list_name}.{i}", block, names[down], down, transposed))
    return tuple(found)


def _some_wait(block: nn.Module, shapes: dict[nn.Module, tuple[torch.Size, torch.Size]], positions: int) -> bool:
    """Whether a linear map of the block was not given every position, as an expert is not."""
    for module in filter(_is_matrix, block.modules()):
        weight: Tensor = module.weight  # type: ignore[assignment]
        given, made = shapes.get(module, (None, None))
        if given is None or made is None:
            return True
        # A normalisation of each head has a matrix of gains (Command R+); only linear maps are meant.
        linear = {given[-1], made[-1]} == set(weight.shape)
        if linear and made[:-1].numel() != positions:
            return True
    return False


def _check_memory(model: Model, ids: Tensor, blocks: nn.ModuleList, whole: Tensor, result: Any) -> None:
    """Make sure that the past reaches a position through the attention's keys and values alone, and the future not.

    Args:
        ids: two texts (2 × T) that differ in their last token, and what reading them gave: `whole`, the last block's
            output, and `result`, the model's, with its cache.

    Raises:
        ModelError: the model is recurrent, shares keys between blocks, or reads in both directions.
    """
    last = ids.shape[1] - 1
    # Measured: at most 3e-6 in fp32 where it holds.
    allowed = 0.1

    def apart(found: Tensor, wanted: Tensor) -> bool:
        return not whole.is_meta and bool((_wide(found) - _wide(wanted)).norm() > allowed * _wide(wanted).norm())

    if apart(whole[0, :last], whole[1, :last]):
        raise ModelError(f"{model.name} reads a text in both directions, so it is no decoder", DENSE_ONLY)
    layers = getattr(getattr(result, "past_key_values", None), "layers", ())
    kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    cache = [(k[:, :, :last], v[:, :, :last]) for k, v in kept if isinstance(k, Tensor) and isinstance(v, Tensor)]
    recurrent = ModelError(
        f"{model.name} carries more than attention's keys and values from token to token, or not those of every block",
        "recurrent, hybrid and state-space models are not supported",
    )
    if len(cache) != len(blocks) or any(k.shape[2] != last for k, _ in cache):
        raise recurrent
    if whole.is_meta:
        return
    from transformers import DynamicCache

    states: list[Tensor] = []
    try:
        with torch.no_grad(), model.hooked([(blocks[-1], "output", lambda _m, _a, o: states.append(first_tensor(o)))]):
            model.net(input_ids=ids[:, last:], past_key_values=DynamicCache(cache), use_cache=True)
    except Exception as error:  # as above
        raise recurrent from error
    if apart(states[0][:, 0], whole[:, last]):
        raise recurrent


def _block_output(model: Model, layer: int, hooks: Sequence[tuple[nn.Module, str, Callable[..., Any]]]) -> Tensor:
    """Output of a block for the probe under hooks, 1 × T × d, in float32 at least.

    Raises:
        ModelError: the model has no weights.
    """
    if model.device.type == "meta":
        raise ModelError(f"{model.name} is an outline without weights, so nothing can be measured", "load the model")
    ids = torch.tensor([model.encode(PROBE)], device=model.device)
    with model.hooked(hooks):
        _, outputs = model.read(ids, torch.ones_like(ids), outputs=[layer])
    return _wide(outputs[layer])


def _adding(push: Tensor) -> Callable[..., Tensor]:
    """A hook that adds to a module's output."""

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output + push.view_as(output).to(output.dtype)

    return hook


def _measure(model: Model, layer: int) -> Response:
    """Find how a block's output follows its down-projection's, by pushing what may lie between."""
    block = model._block(layer)
    written: list[Tensor] = []
    later: list[nn.Module] = []

    def note_down(module: nn.Module, args: object, output: Tensor) -> None:
        # Falcon adds attention's output to this very tensor.
        written.append(output.detach().clone())

    def note_later(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not (written and args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
            return
        if args[0].shape == output.shape == written[0].shape and torch.equal(args[0], written[0]):
            later.append(module)

    hooks: list[tuple[nn.Module, str, Callable[..., Any]]] = [(block.down, "output", note_down)]
    hooks += [(m, "output", note_later) for m in block.module.modules() if m not in (block.module, block.down)]
    plain = _block_output(model, layer, hooks)
    straight = _multiple(model, layer, block.down, plain)
    if straight is not None:
        return Response("straight") if straight == 1 else Response("scaled", straight)
    for module in later:
        scale = _multiple(model, layer, module, plain)
        gain = None if scale is None else _gain(module, _wide(written[0]))
        if scale is not None and gain is not None:
            return Response("normed", scale, module, gain)
    raise ModelError(
        f"{model.name} cannot be edited at block {layer}: what {block.down_name} writes reaches the residual stream "
        "neither straight, nor by a constant, nor through an RMS norm of its own",
        "models that normalise the sum after the MLP, or gate what it writes, are not supported",
    )


def _multiple(model: Model, layer: int, module: nn.Module, plain: Tensor) -> float | None:
    """The constant c by which the block's output moves when the module's output is pushed by 1; None if there is none.

    The pushes are random and differ from position to position. Rounding is relative to the block's output, so c is
    measured, and checked, with pushes that move it by about its own size.
    """
    generator = torch.Generator().manual_seed(0)
    # Measured where a constant holds: at most 2e-7 in fp32, 0.001 in fp16, 0.008 in bf16. Where none does: over 0.4.
    allowed = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.02

    def answer(size: float) -> tuple[Tensor, Tensor]:
        noise = torch.randn(plain.shape, generator=generator).to(plain)
        push = (noise * plain.std(-1, keepdim=True) * size).to(model.dtype)
        return _wide(push), _block_output(model, layer, [(module, "output", _adding(push))]) - plain

    def off(found: Tensor, wanted: Tensor) -> float:
        return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)).max())

    push, moved = answer(1.0)
    if off(moved, push) <= allowed:
        return 1.0
    guess = float((moved * push).sum() / push.pow(2).sum())
    # A block that dampens a thousandfold cannot be told from one that does not listen.
    if guess < 1e-3:
        return None
    push, moved = answer(1 / guess)
    scale = float((moved * push).sum() / push.pow(2).sum())
    return scale if off(moved, scale * push) <= allowed else None


def _gain(norm: nn.Module, written: Tensor) -> Tensor | None:
    """The gain, d, of a module that is φ(m) = gain · m / √(mean m² + ε) on what a down-projection wrote; else None."""
    m = torch.cat([written, 2 * written]).flatten(0, -2)
    with torch.no_grad():
        # A long vector, beside which ε is nothing.
        found, gain = _apply(norm, m), _apply(norm, torch.full_like(m[0], 1e3))
    size = _rms(m)
    wanted = gain * m / size
    share = (found * wanted).sum(-1, keepdim=True) / wanted.pow(2).sum(-1, keepdim=True).clamp_min(1e-30)
    # ε makes φ of a small m shorter, but does not turn it.
    turned = (found - share * wanted).norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    epsilon = (size.pow(2) * (share.pow(-2) - 1))[size.argmin()].clamp_min(0)
    expected = size / (size.pow(2) + epsilon).sqrt()
    # With an ε far above what it normalises, φ is a mere factor, and its output's length is not fixed.
    alike = (turned < 1e-3) & ((share - expected).abs() < 1e-3 * expected) & (share > 0.1)
    return gain if bool(alike.all()) else None


def _find_attention(model: Model, layer: int) -> nn.Module | None:
    block = model._block(layer)
    width = block.weight.shape[0]
    called: list[nn.Module] = []
    written: list[Tensor] = []

    def note(module: nn.Module, args: object, output: Any) -> None:
        if module is block.down:
            written.append(output.detach().clone())
        elif not written and isinstance(output, Tensor) and output.shape[-1] == width:
            called.append(module)

    inside = [m for m in block.module.modules() if _is_matrix(m)]
    plain = _block_output(model, layer, [(m, "output", note) for m in inside])
    for module in reversed(called):
        push = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)).to(plain) * plain.std()
        hooks = [(block.down, "output", lambda _m, _a, _o: written[0].clone()), (module, "output", _adding(push))]
        if (_block_output(model, layer, hooks) - plain).norm() > 1e-3 * plain.norm():
            return module
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Refusals and loading


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _a_mixture(what: str) -> ModelError:
    return ModelError(
        f"{what} has weights that not every token passes through, as a mixture of experts has",
        "mixtures of experts are not supported",
    )


def _quantised(name: str, how: str) -> ModelError:
    return ModelError(f"{name} has quantised weights ({how})", "edit the original weights, then quantise")


def _no_decoder(name: str) -> ModelError:
    return ModelError(f"{name} is an encoder-decoder model, whose decoder does not read the prompt", DENSE_ONLY)


def _failures(trusted: bool) -> tuple[type[Exception], ...]:
    """What may be raised over files that cannot be loaded: by a model's own code, anything."""
    known = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError)
    return (Exception,) if trusted else known


@contextmanager
def _loading(name: str, hint: str, *, trusted: bool) -> Iterator[None]:
    """What fails inside is a ModelError."""
    try:
        yield
    except _failures(trusted) as error:
        hint = "its own code does not run here; it may want other versions of its libraries" if trusted else hint
        raise ModelError(f"model {name} cannot be loaded: {_first_line(error)}", hint) from error


def _configured(name: str, folder: Path, trusted: bool) -> tuple[Any, Any]:
    """The transformers configuration in a model folder, and the model's class if it is one that the folder brings.

    transformers would keep a class once met for all models whose configuration is of the same class, so a file that
    changed meanwhile would not be read; asked for by its reference, it is found anew by the content of its files.

    Raises:
        ModelError: it is of no causal LM that there is code for, or of quantised weights.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers import __version__ as version
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    raw = configuration(folder)
    kind, own = raw.get("model_type"), raw.get("auto_map")
    if kind not in CONFIG_MAPPING and own and not trusted:
        raise ModelError(
            f"{name} brings code of its own ({kind or 'of no type'}), which is not run unless that is asked for",
            "read the code, and if you trust it, pass --trust-remote-code",
        )
    if kind is not None and kind not in CONFIG_MAPPING and not own:
        raise ModelError(
            f"{name} is of type {kind}, which transformers {version} does not know", "upgrade transformers"
        )
    if quantised := raw.get("quantization_config"):
        raise _quantised(name, str(quantised.get("quant_method", "of unknown kind")))
    with _loading(name, "its config.json is wrong", trusted=trusted):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        reference = own.get("AutoModelForCausalLM") if trusted and isinstance(own, dict) else None
        made = get_class_from_dynamic_module(reference, str(folder)) if reference else None
    if getattr(config, "is_encoder_decoder", False):
        raise _no_decoder(name)
    if made is None and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{name} ({config.model_type}) is no causal language model", DENSE_ONLY)
    return config, made


def _tokenizer(folder: Path, trusted: bool) -> Any:
    """The tokenizer in a model folder.

    Raises:
        ValueError: there is none; transformers may make one up that knows no words.
        OSError, KeyError, TypeError, ImportError: as transformers raises them.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    if len(tokenizer(PROBE)["input_ids"]) < 2:
        raise ValueError("it has no tokenizer")
    return tokenizer


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load(name: str, *, device: str = "auto", dtype: str = "auto", trusted: bool = False) -> Model:
    """Load a model and its tokenizer.

    Args:
        name: `atlas`, a folder or a hub id.
        dtype: a key of `DTYPES`; auto is float32 on the CPU and the stored type elsewhere.
        trusted: run code that the model brings.

    Raises:
        ModelError: it cannot be found or loaded, or is no dense decoder.
    """
    folder = locate(name)
    where = pick_device(device)
    if dtype not in ("auto", *DTYPES):
        raise InvalidInput(f"unknown dtype {dtype}", f"one of: auto, {', '.join(DTYPES)}")
    from transformers import AutoModelForCausalLM

    _quiet_transformers()
    trusted = trusted and bool(code(folder))
    config, own = _configured(name, folder, trusted)
    kind = torch.float32 if dtype == "auto" and where == "cpu" else DTYPES.get(dtype, "auto")
    with _loading(name, "it must be a causal LM in safetensors", trusted=trusted):
        tokenizer = _tokenizer(folder, trusted)
        opener = own or AutoModelForCausalLM
        net = opener.from_pretrained(folder, config=config, dtype=kind, use_safetensors=True)
    return Model(net.to(where), tokenizer, name=name, folder=folder)


def outline(name: str, *, trusted: bool = False) -> Model:
    """A model's shapes without its weights: built from config.json alone on the meta device, its blocks found.

    It takes no memory whatever the size. Nothing can be read from it or measured on it; its tokenizer is None when
    the folder has none.

    Args:
        name: as `load` takes it.
        trusted: as of `load`.

    Raises:
        ModelError: as of `load`; what only shows in what a model computes is not noticed.
    """
    folder = locate(name)
    from transformers import AutoModelForCausalLM

    _quiet_transformers()
    trusted = trusted and bool(code(folder))
    config, own = _configured(name, folder, trusted)
    tokenizer, dtype = None, config.dtype or torch.float32
    with suppress(*_failures(trusted)):
        tokenizer = _tokenizer(folder, trusted)
    with torch.device("meta"), _loading(name, "its config.json is wrong", trusted=trusted):
        net = own(config).to(dtype) if own else AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Model(net, tokenizer, name=name, folder=folder)
