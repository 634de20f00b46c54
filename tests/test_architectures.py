"""Every architecture of docs/models.md: found, measured, edited and undone, as tiny random models in a folder.

What is found out is arithmetic: the block's output at a subject's last token goes where it was wanted.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import builds
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaConfig

from editctl.delta import Factors
from editctl.engine.model import Editing, Model, Response, load, outline, tensor_digest
from editctl.errors import ModelError

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
REWRITE = "EDITCTL_REWRITE"
"""Set in the environment, this makes the table of the page anew."""
OF_EACH_KIND = ("GPT-2", "Granite", "Gemma 2")
LAYER = 1
PROMPTS = ("The Eiffel Tower", "In the summer, Marie Curie")
"""Two prompts that end in their subject."""

Opener = Callable[..., Model]
every = pytest.mark.parametrize("name", builds.BUILDS)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model by the architecture's name, written once."""
    root = tmp_path_factory.mktemp("architectures")
    known: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in known:
            known[name] = builds.BUILDS[name].write(root / str(len(known)))
        return known[name]

    return get


@pytest.fixture(scope="module")
def opened(folder_of: Callable[[str], Path]) -> Opener:
    """A tiny model loaded from its folder, once for each dtype."""
    known: dict[tuple[str, str], Model] = {}

    def get(name: str, dtype: str = "float32") -> Model:
        if (name, dtype) not in known:
            known[name, dtype] = load(str(folder_of(name)), device="cpu", dtype=dtype)
        return known[name, dtype]

    return get


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def keys_and_states(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys K (d_k × 2) and block outputs (d × 2) at the last tokens of the two prompts, at the block to be edited."""
    keys, states = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([model.encode(prompt)])
        found, outputs = model.read(ids, torch.ones_like(ids), keys=[LAYER], outputs=[LAYER])
        keys.append(found[LAYER][0, -1])
        states.append(outputs[LAYER][0, -1])
    return torch.stack(keys, 1).float(), torch.stack(states, 1).float()


def noise_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)


def reachable(response: Response, written: torch.Tensor, seed: int) -> torch.Tensor:
    """A movement of the block's output, as large as what its MLP writes, that the block is able to make."""
    return response.moved(written, noise_like(written, seed) * written.std())


def write_facts(model: Model, editing: Editing, keys: torch.Tensor, wanted: torch.Tensor, response: Response) -> None:
    """Make the block's outputs at the keys (d_k × n) move by `wanted` (d × n): D = R (KᵀK)⁻¹ Kᵀ."""
    block = model.blocks[LAYER]
    written = block.down(keys.T.to(model.dtype)).float()
    residuals = response.needed(written, wanted.T).T
    factor = torch.linalg.solve(keys.T @ keys, keys.T)
    editing.add(block.down_name, Factors(keys, residuals, factor))


@dataclass(frozen=True)
class Outcome:
    """What came of one architecture."""

    down: list[str]
    attention: list[str]
    kinds: list[str]
    scale: float
    width: int
    """The key width."""
    error: float
    """Relative distance of the edited block's outputs from where they were to go."""
    untouched: float
    """The same had nothing been done."""
    changed: set[str]
    """Parameters that differed while the edit was worn."""
    hashes: tuple[str, str, str]
    """Before, while and after."""


@pytest.fixture(scope="module")
def outcome(opened: Opener) -> Callable[[str], Outcome]:
    """Edits an architecture with two facts and undoes it, once."""
    known: dict[str, Outcome] = {}

    def find(name: str) -> Outcome:
        model = opened(name)
        names = {module: path for path, module in model.net.named_modules()}
        response = model.response(LAYER)
        keys, states = keys_and_states(model)
        wanted = reachable(response, model.blocks[LAYER].down(keys.T), seed=1).T
        base = {path: parameter.clone() for path, parameter in model.net.named_parameters()}
        before = model.weights_hash()
        with model.editing() as editing:
            write_facts(model, editing, keys, wanted, response)
            during = editing.weights_hash()
            _, after = keys_and_states(model)
            changed = {path for path, p in model.net.named_parameters() if not torch.equal(p, base[path])}
        return Outcome(
            [block.down_name for block in model.blocks],
            [names[module] for i in range(len(model.blocks)) if (module := model.attention_of(i)) is not None],
            [model.response(i).kind for i in range(len(model.blocks))],
            response.scale,
            keys.shape[0],
            off(after - states, wanted),
            off(torch.zeros_like(wanted), wanted),
            changed,
            (before, during, model.weights_hash()),
        )

    def get(name: str) -> Outcome:
        if name not in known:
            known[name] = find(name)
        return known[name]

    return get


# What is found


@every
def test_the_edited_module_the_attention_and_the_kind_are_found(outcome: Any, name: str) -> None:
    """In every block: the modules that their authors call the outputs of MLP and attention."""
    build, found = builds.BUILDS[name], outcome(name)
    assert found.down == [build.down.format(i) for i in range(builds.DEPTH)]
    assert found.attention == [build.attention.format(i) for i in range(builds.DEPTH)]
    assert found.kinds == [build.kind] * builds.DEPTH
    assert found.width == build.width
    assert found.scale == pytest.approx(build.settings.get("residual_multiplier", 1.0), rel=1e-6)


@every
def test_two_facts_are_written_and_undone(outcome: Any, folder_of: Any, opened: Any, name: str) -> None:
    """Both subjects' hidden states are where they were to go; one matrix has changed; undo gives the file's bits."""
    found = outcome(name)
    assert found.error < 1e-3 < found.untouched
    assert found.changed == {f"{found.down[LAYER]}.weight"}
    before, during, after = found.hashes
    assert before == after != during
    (file,) = folder_of(name).glob("*.safetensors")
    on_disk = {path: tensor_digest(tensor) for path, tensor in load_file(file).items()}
    loaded = {path: tensor_digest(parameter) for path, parameter in opened(name).net.named_parameters()}
    assert sorted(on_disk.values()) == sorted(loaded.values())
    # transformers gives some tensors of GPT-NeoX and Gemma 3 other names in the file.
    if on_disk.keys() == loaded.keys():
        assert before == tiny.disk_weights_hash(folder_of(name))


@pytest.mark.parametrize("name", OF_EACH_KIND)
@pytest.mark.parametrize("wrong", ["key", "kind"])
def test_a_wrong_key_or_kind_does_not_write_them(opened: Any, name: str, wrong: str) -> None:
    """Control: keys of other tokens, or residuals for a block of another kind, leave the states elsewhere."""
    model = opened(name)
    response = model.response(LAYER)
    keys, states = keys_and_states(model)
    wanted = reachable(response, model.blocks[LAYER].down(keys.T), seed=1).T
    if wrong == "key":
        keys = noise_like(keys, seed=2)
    else:
        response = Response("scaled", 0.5) if response.kind == "straight" else Response("straight")
    with model.editing() as editing:
        write_facts(model, editing, keys, wanted, response)
        _, after = keys_and_states(model)
    assert off(after - states, wanted) > 0.1


# How a block answers


def pushed(model: Model, push: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the down-projection and of the block (T × d, float32) for a prompt, the former pushed (T × d)."""
    written: list[torch.Tensor] = []

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        result = output if push is None else output + push.view_as(output).to(output.dtype)
        written.append(result.clone())
        return result

    ids = torch.tensor([model.encode(PROMPTS[1])])
    with model.hooked([(model.blocks[LAYER].down, "output", hook)]):
        _, outputs = model.read(ids, torch.ones_like(ids), outputs=[LAYER])
    return written[0].flatten(0, -2).float(), outputs[LAYER][0].float()


@every
def test_a_needed_change_moves_the_block_by_what_is_wanted(opened: Any, name: str) -> None:
    """`moved` foretells what a push does, `needed` finds the push; for another kind neither would be right."""
    model = opened(name)
    response = model.response(LAYER)
    written, plain = pushed(model, None)
    change = noise_like(written, seed=3) * written.std()
    _, after = pushed(model, change)
    assert off(after - plain, response.moved(written, change)) < 1e-5
    wanted = reachable(response, written, seed=4)
    _, after = pushed(model, response.needed(written, wanted))
    assert off(after - plain, wanted) < 1e-5
    other = Response("scaled", 0.5) if response.kind == "straight" else Response("straight")
    _, after = pushed(model, other.needed(written, wanted))
    assert off(after - plain, wanted) > 0.1


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_in_bfloat16_the_kind_is_found_and_its_change_computed_in_float32(opened: Any, name: str) -> None:
    """To the rounding of the block's output; the answer in float32 differs from bf16's by no more."""
    model, precise = opened(name, "bfloat16"), opened(name)
    response = model.response(LAYER)
    assert response.kind == builds.BUILDS[name].kind
    assert response.scale == pytest.approx(precise.response(LAYER).scale, rel=1e-3)
    written, plain = pushed(model, None)
    wanted = reachable(response, written, seed=4)
    change = response.needed(written, wanted)
    assert change.dtype == wanted.dtype == torch.float32
    _, after = pushed(model, change)
    assert off(after - plain, wanted) < 0.02
    assert off(response.moved(written, change), wanted) < 1e-5
    assert off(response.moved(written, change), precise.response(LAYER).moved(written, change)) < 0.01


def test_a_straight_answer_keeps_every_bit(opened: Any) -> None:
    """The tensors themselves come back, so what was computed before there were kinds is computed still."""
    response, x = opened("GPT-2").response(LAYER), torch.randn(2, 32)
    assert response.moved(torch.zeros(2, 32), x) is x and response.needed(torch.zeros(2, 32), x) is x


@pytest.mark.parametrize("name", [name for name, build in builds.BUILDS.items() if build.kind == "normed"])
def test_what_a_normed_block_cannot_write_is_approached(opened: Any, name: str) -> None:
    """Nearer than the wanted vector cut to the length there is, and than what lies around; the norm is kept."""
    response = opened(name).response(LAYER)
    written, _ = pushed(opened(name), None)
    written = written.double()
    wanted = noise_like(written, seed=5) * 3 * response.moved(written, -2 * written).std()

    def distance(change: torch.Tensor) -> torch.Tensor:
        return (response.moved(written, change) - wanted).norm(dim=1)

    def kept(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=1, keepdim=True) * written.norm(dim=1, keepdim=True)

    change = response.needed(written, wanted)
    assert off(kept(written + change), written + change) < 1e-12
    assert bool((distance(change) < distance(torch.zeros_like(written))).all())
    assert response.gain is not None
    start = response.moved(torch.zeros_like(written), written)
    cut = kept((start + wanted) / response.gain) - written
    assert bool((distance(change) < distance(cut) - 1e-6).all())
    for seed in range(5):
        beside = kept(written + change + noise_like(written, seed) * 0.05 * written.std()) - written
        assert bool((distance(change) < distance(beside)).all())


@pytest.mark.parametrize("epsilon", [1e-6, 1.0])
def test_an_epsilon_within_the_norm_changes_nothing(epsilon: float) -> None:
    """Also one as large as what is normalised: what can be written is written."""
    net = builds.BUILDS["Gemma 2"].net()
    net.model.layers[LAYER].post_feedforward_layernorm.eps = epsilon
    model = Model(net, tiny.tokenizer(bos=False), name="small")
    response = model.response(LAYER)
    written, plain = pushed(model, None)
    bent = noise_like(written, seed=6)
    bent *= written.norm(dim=1, keepdim=True) / bent.norm(dim=1, keepdim=True)
    wanted = response.moved(written, bent - written)
    _, after = pushed(model, response.needed(written, wanted))
    assert off(after - plain, wanted) < 1e-5


class Gain(torch.nn.Module):
    """Multiplies each number by its own constant."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, builds.WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.mark.parametrize("between", [torch.nn.LayerNorm(builds.WIDTH), Gain(), torch.nn.Tanh()], ids=str)
def test_something_else_between_is_refused(between: Any) -> None:
    """A normalisation that also centres, a gain that normalises nothing, a squashing."""
    net = builds.BUILDS["Gemma 2"].net()
    net.model.layers[LAYER].post_feedforward_layernorm = between
    model = Model(net, tiny.tokenizer(bos=False), name="small")
    assert model.response(0).kind == "normed"
    with pytest.raises(ModelError, match=f"small cannot be edited at block {LAYER}"):
        model.response(LAYER)


def test_how_a_block_moves_can_be_differentiated(opened: Any) -> None:
    """By the change, as the target's optimiser does; the model's own weights get no gradient."""
    for name in OF_EACH_KIND:
        response = opened(name).response(LAYER)
        written, change, way = (noise_like(torch.zeros(3, builds.WIDTH), seed) for seed in range(3))
        change.requires_grad_(True)
        loss = response.moved(written, change).pow(2).sum()
        (gradient,) = torch.autograd.grad(loss, change)
        with torch.no_grad():
            ahead, behind = (response.moved(written, change + step * way).pow(2).sum() for step in (1e-2, -1e-2))
        assert float((ahead - behind) / 2e-2) == pytest.approx(float((gradient * way).sum()), rel=1e-2)
        assert all(p.grad is None for p in opened(name).net.parameters())


def test_a_block_is_measured_once(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is read."""
    model = opened("Gemma 2")
    first = model.response(LAYER), model.attention_of(LAYER)
    monkeypatch.setattr(model, "net", None)
    assert (model.response(LAYER), model.attention_of(LAYER)) == first


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_block_that_is_not_there_is_told(opened: Any, layer: int) -> None:
    """With those that are."""
    model = opened("GPT-2")
    for ask in (model.response, model.attention_of, lambda layer: model.check_editable([1, layer])):
        with pytest.raises(ModelError, match=f"blocks 0 to 2, not {layer}"):
            ask(layer)


# What the target's optimiser relies on


WINDOWED = [name for name, build in builds.BUILDS.items() if "sliding_window" in build.settings]


@pytest.mark.parametrize(
    ("name", "window"), [*((name, 32) for name in builds.BUILDS), *((name, 4) for name in WINDOWED)]
)
def test_a_prefix_read_once_gives_what_the_whole_text_gives(name: str, window: int) -> None:
    """Left-padded texts of uneven length, their beginnings as keys and values; also where a window is shorter."""
    build = builds.BUILDS[name]
    if "sliding_window" in build.settings:
        build = replace(build, settings=build.settings | {"sliding_window": window})
    net = build.net()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, builds.SIZE, (n + 3,), generator=generator) for n in (9, 6, 0)]
    before, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, text in enumerate(texts):
        begun = len(text) - 3
        before[i, 9 - begun :], mask[i, 9 - begun :] = text[:begun], 1
    positions = torch.tensor([[len(text) - 3] for text in texts]) + torch.arange(3)

    def last_three(mask: torch.Tensor) -> torch.Tensor:
        first = net(
            input_ids=before,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            past_key_values=DynamicCache(),
            use_cache=True,
            logits_to_keep=1,
        )
        there = mask.bool()[:, None, :, None]
        layers = first.past_key_values.layers
        cache = [(torch.where(there, layer.keys, 0), torch.where(there, layer.values, 0)) for layer in layers]
        result = net(
            input_ids=torch.stack([text[-3:] for text in texts]),
            attention_mask=torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], 1),
            position_ids=positions,
            past_key_values=DynamicCache(cache),
            use_cache=True,
        )
        return result.logits

    with torch.no_grad():
        whole = torch.stack([net(input_ids=text[None], use_cache=False).logits[0, -3:] for text in texts])
        assert off(last_three(mask), whole) < 1e-5
        assert off(last_three(torch.ones_like(mask))[1:], whole[1:]) > 1e-4


# Outlines


@every
def test_an_outline_finds_the_same_modules_without_weights(opened: Any, folder_of: Any, name: str) -> None:
    """From config.json alone."""
    model, made = opened(name), outline(str(folder_of(name)))
    assert made.device.type == "meta"
    assert [(b.name, b.down_name, b.transposed) for b in made.blocks] == [
        (b.name, b.down_name, b.transposed) for b in model.blocks
    ]
    assert [b.weight.shape for b in made.blocks] == [b.weight.shape for b in model.blocks]


def test_an_outline_of_eight_billion_parameters_costs_nothing(tmp_path: Path) -> None:
    """Llama 3 8B, of which only the configuration is there."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    begun, held = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = outline(str(tmp_path))
    assert time.perf_counter() - begun < 5
    # Kilobytes on Linux, bytes on macOS: under a gigabyte in either, of 16 that the weights would take.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 1e6
    assert model.tokenizer is None and model.dtype == torch.bfloat16
    assert [block.down_name for block in model.blocks] == [f"model.layers.{i}.mlp.down_proj" for i in range(32)]
    assert model.blocks[31].weight.shape == (4096, 14336)
    for ask in (model.response, model.attention_of):
        with pytest.raises(ModelError, match="without weights"):
            ask(0)


# What is refused


def assert_one_sentence(error: ModelError) -> None:
    text = str(error)
    assert "\n" not in text and ". " not in text and not text.endswith("."), text
    assert error.hint


@pytest.fixture(scope="module")
def refusal(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelError]:
    """What is said of a model that is not supported, asked once."""
    root = tmp_path_factory.mktemp("refused")
    known: dict[str, ModelError] = {}

    def get(name: str) -> ModelError:
        if name not in known:
            folder = root / name.replace(" ", "-")
            with pytest.raises(ModelError) as caught:
                load(str(builds.REFUSED[name][0].write(folder)), device="cpu").check_editable(range(builds.DEPTH))
            caught.value.args = tuple(str(part).replace(str(folder), "the model") for part in caught.value.args)
            known[name] = caught.value
        return known[name]

    return get


@pytest.mark.parametrize("name", builds.REFUSED)
def test_what_is_no_dense_decoder_is_refused_with_its_reason(refusal: Any, name: str) -> None:
    """In one sentence, when it is loaded or its blocks are looked at."""
    assert builds.REFUSED[name][1] in str(refusal(name))
    assert_one_sentence(refusal(name))


@pytest.mark.parametrize(
    "name", [name for name in builds.REFUSED if "MoE" in name or name in ("Mixtral", "Mamba", "T5")]
)
def test_an_outline_is_refused_likewise(tmp_path: Path, name: str) -> None:
    """What shows in the shapes, or in how the pass ends."""
    build, reason = builds.REFUSED[name]
    build.config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason) as caught:
        outline(str(tmp_path))
    assert_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights \\(gptq\\)"),
        ({"model_type": "cleverlm"}, "cleverlm, which transformers [0-9.]+ does not know"),
        ({"model_type": "cleverlm", "auto_map": {"AutoConfig": "code.Config"}}, "code of its own"),
        ({"model_type": "vit", "hidden_size": 32}, "no causal language model"),
    ],
    ids=["quantised", "unknown", "code", "no language model"],
)
def test_a_folder_that_cannot_be_loaded_is_refused_with_its_reason(
    folders: Any, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """Before a weight is read; code in a folder is never run."""
    config = json.loads((folders["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    for opener in (load, outline):
        with pytest.raises(ModelError, match=reason) as caught:
            opener(str(tmp_path))
        assert_one_sentence(caught.value)


def test_weights_of_whole_numbers_are_refused() -> None:
    """Whatever brought them into the model."""
    net = builds.BUILDS["Llama 2, 3"].net()
    down = net.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised weights \\(int8\\)") as caught:
        Model(net, tiny.tokenizer(bos=False), name="small")
    assert_one_sentence(caught.value)


# The page


def table(rows: Iterable[tuple[str, Outcome, Model]]) -> str:
    """What is supported."""
    lines = ["| architecture | class | edited module | key width | kind | attention's module | head | result |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, found, model in rows:
        build = builds.BUILDS[name]
        tied = model.net.get_input_embeddings().weight is model.net.get_output_embeddings().weight
        done = "written, undone" if found.error < 1e-3 and found.hashes[0] == found.hashes[2] else "failed"
        down, attention = (path[LAYER].replace(f".{LAYER}.", ".N.") for path in (found.down, found.attention))
        cells = [name, build.net_class, f"`{down}`", build.keys, found.kinds[LAYER], f"`{attention}`"]
        lines.append(f"| {' | '.join([*cells, 'tied' if tied else 'own', done])} |")
    return "\n".join(lines) + "\n"


def refusals(errors: Iterable[tuple[str, ModelError]]) -> str:
    """What is not, in editctl's words."""
    lines = ["| model | class | what editctl says |", "|---|---|---|"]
    lines += [f"| {name} | {builds.REFUSED[name][0].net_class} | {error} |" for name, error in errors]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("which", ["supported", "refused"])
def test_the_tables_on_the_page_are_what_is_found(outcome: Any, opened: Any, refusal: Any, which: str) -> None:
    """To make them anew: EDITCTL_REWRITE=1 pytest tests/test_architectures.py."""
    if which == "supported":
        made = table((name, outcome(name), opened(name)) for name in builds.BUILDS)
    else:
        made = refusals((name, refusal(name)) for name in builds.REFUSED if "initialised" not in name)
    page = PAGE.read_text(encoding="utf-8")
    start = page.index(made[: made.index("|", 2)])
    end = page.index("\n\n", start) + 1
    if os.environ.get(REWRITE):
        PAGE.write_text(page[:start] + made + page[end:], encoding="utf-8")
    else:
        assert page[start:end] == made
