"""The table of methods, and the settings a run is made with. Loads no torch.

Knows: what tells one method from another, and the published settings of known models. Adding a closed-form method is
one row. Refuses: computing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from editctl.errors import InvalidInput

# ---------------------------------------------------------------------------------------------------------------------
# What decides an update


@dataclass(frozen=True)
class Ridge:
    """The numbers of the ridge problem in `solve`, by which closed-form methods differ."""

    lambda_: float
    """λ, weight of the second moment of preserved keys: as many preserved tokens against one edit."""
    l2: float
    """ρ as a share of the mean squared key norm tr(C), so that one value serves all models."""
    history: bool
    """Whether the outputs at the keys of earlier edits are kept."""
    hard: bool = False
    """Whether the values are met exactly, one edit at a time (ROME), instead of in the least squares sense."""


@dataclass(frozen=True)
class NullSpace:
    """Which eigenvectors of the second moment an update may use: those that preserved keys hardly use."""

    rule: str
    """`energy`: as many of the smallest as together hold at most `value` of the trace. `quantile`: that share of all
    directions, smallest first. `threshold`: eigenvalues below it, in the keys' own units (AlphaEdit's τ)."""
    value: float


@dataclass(frozen=True)
class Write:
    """How target vectors become updates."""

    spread: str = "even"
    """Share of what is missing that each block writes: `even` is 1/(blocks left), `root` its square root (PMET),
    `full` everything, every block towards a target of its own (BLUE)."""
    keys: str = "mixed"
    """`mixed`: half the plain prompt's key, half the mean over contexts (MEMIT). `mean`: the mean over all (r-ROME).
    `rome`: the mean for the direction, the plain prompt's for the size."""
    site: str = "block"
    """What the target is a value of: the `block`'s output, or the `mlp`'s, with attention free to help (PMET)."""
    post: tuple[str, ...] = ()
    """What is done to each solved update, in order: of `POST`."""
    rect: float = 0.4
    """Share of entries RECT keeps, those that change their weight most in relation to it."""
    sphere_energy: float = 0.5
    """Share of the weight's directions, by energy, that SPHERE counts as principal."""
    sphere: float = 0.5
    """How much of an update in them SPHERE takes away, 0 to 1."""
    neurons: float = 1.0
    """Share of the keys' absolute sum whose neurons may change, strongest first (NSE); 1 is all."""
    rounds: int = 1
    """Times a batch is written, each towards what is still missing."""
    near: float = 0.0
    """From the second round on: edits nearer to their target than this share of ‖h₀‖ are done (NSE)."""
    refresh: int = 0
    """Edits after which the null space is taken anew from preserved and edited keys (BetaEdit); 0 is never."""


POST = ("rect", "prune", "sphere")
SPREADS, KEYS, SITES = ("even", "root", "full"), ("mixed", "mean", "rome"), ("block", "mlp")


def solvable(write: Write, *, hard: bool) -> bool:
    """Whether a batch that was solved for can be solved again from what is stored of it, without gradients."""
    if write.rounds > 1 or write.neurons < 1:
        return False
    # The keys at which ROME measures values are not stored; met exactly, no column depends on another.
    return not write.post if hard else write.keys != "rome"


@dataclass(frozen=True)
class TargetSettings:
    """How target vectors are optimised; sizes are relative to the hidden state unless `published`."""

    steps: int = 25
    """Most gradient steps."""
    rate: float = 0.2
    """Adam's step as a share of the hidden state's root mean square."""
    clamp: float = 0.75
    """Largest change as a share of the hidden state's norm."""
    decay: float = 0.02
    """Weight of the squared relative size of the change."""
    kl: float = 0.0625
    """Weight of the KL divergence at the bare subject."""
    stop: float = 0.05
    """NLL of the target, nats a token, at which a request is done."""
    confirm: int = 0
    """Checks in which every context has the target as most probable words, after which a request is done (most
    probable early stopping, ENCORE); 0 is off."""
    anchor: bool = False
    """Whether values are scaled to the mean norm they had on the unedited model (NAS)."""
    joint: bool = True
    """Whether edits of one subject share one target vector."""
    on_base: bool = False
    """Whether targets are sought on the unedited model (NSE)."""
    published: bool = False
    """Whether `rate` is absolute and the decay is decay · ‖δ‖ / ‖h₀‖², as the papers' code has them."""


@dataclass(frozen=True)
class Tune:
    """Fine-tuning of down-projections (Zhu et al. 2020; Meng et al. 2022, code)."""

    epochs: int = 25
    """Most passes over a batch."""
    tune_rate: float = 0.05
    """Adam's step as a share of the weight's root mean square."""
    tune_stop: float = 0.01
    """Mean loss, nats a token, at which a batch is done."""
    objective: str = "target"
    """`target`: cross-entropy of every target token after those before it. `last`: all target tokens from the
    prompt's last position."""
    box: float = 0.0
    """Largest change of an entry as a share of the weight's root mean square (L∞); 0 is unbounded."""
    minibatch: int = 0
    """Edits of one step, drawn anew in every pass over the batch (LocFT-BF); 0 takes the whole batch."""
    ending: bool = False
    """Whether the text shall end behind the target (LocFT-BF)."""
    rank: int = 0
    """Rank of the update that is trained in place of the matrix (LoRA); 0 trains the matrix."""


@dataclass(frozen=True)
class Learned:
    """Updates made by a trained network from one gradient (De Cao et al. 2021, Mitchell et al. 2022)."""

    strength: float = 1.0
    """What the network's updates are multiplied by."""


@dataclass(frozen=True)
class Normalised:
    """Updates solved from one gradient under running normalisation (UltraEdit)."""

    ultra_rate: float = 0.1
    """η, the size of the values that are solved for, as a share of the root mean square of what the block puts out."""
    ultra_ridge: float = 0.3
    """What every change is weighed by, as a share of the mean squared norm of the inputs."""


@dataclass(frozen=True)
class Codebook:
    """Values that a block puts out where its key is near that of an edit (GRACE, Hartvigsen et al. 2023)."""

    radius: float = 0.2
    """ε of a new key, as a share of its norm: the farthest another key may be to be taken for it."""
    value_steps: int = 50
    """Most gradient steps for a value."""
    value_rate: float = 0.2
    """Adam's step as a share of the root mean square of what the block puts out."""
    value_stop: float = 0.05
    """NLL of the target, nats a token, at which a value is done."""


@dataclass(frozen=True)
class Scope:
    """A memory beside the model, asked when a trained classifier finds a prompt to be about an edit (SERAC)."""

    certainty: float = 0.5
    """Least probability at which a prompt counts as being about an edit."""


@dataclass(frozen=True)
class Context:
    """The edit and demonstrations in front of a prompt (IKE, Zheng et al. 2023)."""

    demonstrations: int = 16
    """Most demonstrations in front of a prompt; fewer where the model cannot read so much."""
    nearness: float = 0.3
    """Least likeness, 0 to 1, of a prompt to that of an edit at which the edit is put in front; at 0 the nearest is."""


Own = Learned | Normalised | Codebook | Scope | Context
"""Settings of the families that neither solve nor fine-tune."""

OBJECTIVES = ("target", "last")

# ---------------------------------------------------------------------------------------------------------------------
# The table

PRESERVE = ("null-space", "none")
"""What the setting `preserve` may be: write only into the directions preserved keys hardly use, or anywhere."""
NULL_SPACE = NullSpace("energy", 0.1)
"""The rank rule where none is named."""
RULES = ("energy", "quantile", "threshold")


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    family: str
    equation: str
    paper: str
    summary: str
    weight: float = 0.0
    """λ as a multiple of the model's own (`Profile.lambda_`)."""
    l2: float = 0.0
    history: bool = False
    hard: bool = False
    null_space: NullSpace | None = None
    layers: str = "all"
    """Which of the model's blocks: `all` edited ones, the `single` one of one-block methods, the `ends` (first and
    last), the `deep` one that is fine-tuned, the `upper` three, or `none`."""
    write: Write = Write()
    target: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the model's own target settings."""
    tune: Tune | None = None
    own: Own | None = None
    trained: bool = False
    """Whether it reads a file that `editctl train` makes."""
    batch: int = 100

    @property
    def needs(self) -> str:
        """What must be there before the first edit."""
        if self.trained:
            return f"what `editctl train {self.name}` makes"
        if self.null_space or self.weight or self.l2:
            return "second moments of the edited blocks' keys"
        return "nothing"

    @property
    def changes(self) -> str:
        """What an edit changes: the model's `weights`, or what is laid over them, an `overlay`."""
        return "overlay" if isinstance(self.own, Codebook | Scope | Context) else "weights"

    @property
    def preservation(self) -> str:
        """How `preserve = "null-space"` acts on it; "" where there are no weights to preserve."""
        if self.changes == "overlay":
            return ""
        if self.tune and not self.tune.rank:
            return "every step is projected"
        projects = set(self.write.post) & {"rect", "sphere"} or self.write.neurons < 1 or self.tune or self.own
        return "the finished update is projected" if projects else "in the solve"

    @property
    def update(self) -> str:
        """What a batch keeps on disk: a `thin`, `sparse` or `dense` update, or the `entries` of an overlay."""
        if self.changes == "overlay":
            return "entries"
        if self.tune:
            return "thin" if self.tune.rank else "dense"
        return "sparse" if "rect" in self.write.post else "thin"

    @property
    def drop(self) -> str:
        """How one edit is taken out of a batch; `undo` is exact for all."""
        if self.changes == "overlay":
            return "its entry goes"
        solved = not (self.tune or self.own) and solvable(self.write, hard=self.hard)
        return "the rest is solved again" if solved else "the rest is sought anew"

    @property
    def exports(self) -> tuple[str, ...]:
        """The formats that can hold it."""
        if self.changes == "overlay":
            return ("delta",)
        return ("merged", "peft", "delta") if self.update == "thin" else ("merged", "delta")

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        said = ("needs", "changes", "preservation", "update", "drop", "exports")
        return {**asdict(self), **{name: getattr(self, name) for name in said}, "undo": "exact"}


LOCATE, TUNE, META = "locate-then-edit", "fine-tuning", "meta-learning"
MEMORY, CONTEXT, FREE = "memory-based", "in-context", "training-free"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "alphaedit",
            LOCATE,
            "D = R KᵀP (K_p K_pᵀ P + K Kᵀ P + ρ I)⁻¹",
            "Fang et al. 2025, AlphaEdit, eq. 11",
            "writes only into the null space of preserved keys; keeps earlier edits",
            l2=0.005,
            history=True,
            null_space=NULL_SPACE,
        ),
        Method(
            "memit",
            LOCATE,
            "D = R Kᵀ (λ C + K Kᵀ)⁻¹",
            "Meng et al. 2023, MEMIT, eq. 14",
            "weighs preserved keys against the edits; forgets earlier batches, as published",
            weight=1.0,
        ),
        Method(
            "memit-history",
            LOCATE,
            "D = R Kᵀ (λ C + K_p K_pᵀ + K Kᵀ)⁻¹",
            "Meng et al. 2023, MEMIT, eq. 14, with the keys of earlier batches in C",
            "MEMIT that keeps earlier edits",
            weight=1.0,
            history=True,
        ),
        Method(
            "rome",
            LOCATE,
            "D = r uᵀ / (kᵀ u), u = C⁻¹ k̄",
            "Meng et al. 2022, ROME, eq. 2",
            "one block, one edit after another, its value met exactly; mean key for the direction, plain for the size",
            weight=1.0,
            hard=True,
            layers="single",
            write=Write(keys="rome"),
        ),
        Method(
            "r-rome",
            LOCATE,
            "D = r uᵀ / (k̄ᵀ u), u = C⁻¹ k̄",
            "Gupta et al. 2024, Rebuilding ROME, eq. 3",
            "ROME with one key throughout",
            weight=1.0,
            hard=True,
            layers="single",
            write=Write(keys="mean"),
        ),
        Method(
            "emmet",
            LOCATE,
            "D = R (Kᵀ C⁻¹ K + λ I)⁻¹ Kᵀ C⁻¹",
            "Gupta et al. 2024, A Unified Framework for Model Editing, eq. 11",
            "ROME for batches: one block, values met up to a small ridge",
            weight=2 / 3,
            layers="single",
        ),
        Method(
            "pmet",
            LOCATE,
            "D = R Kᵀ (λ C + K Kᵀ)⁻¹, R = (z_mlp − m) / √(blocks left)",
            "Li et al. 2024, PMET, eq. 11 and 14",
            "MEMIT towards values of the MLP alone, found with attention free to help",
            weight=1.0,
            write=Write(spread="root", site="mlp"),
        ),
        Method(
            "encore",
            LOCATE,
            "D = R Kᵀ (λ C + K_p K_pᵀ + K Kᵀ + ρ I)⁻¹",
            "Gupta et al. 2025, ENCORE, eq. 9",
            "MEMIT with history, a norm bound, and an early stop once the target is the most probable",
            weight=1.0,
            l2=0.005,
            history=True,
            target={"confirm": 2},
        ),
        Method(
            "betaedit",
            LOCATE,
            "D = R KᵀP (λ C P + K_p K_pᵀ P + K Kᵀ P + ρ I)⁻¹",
            "BetaEdit 2026, arXiv 2605.09285",
            "AlphaEdit that also weighs what leaks through the null space and takes that anew every 1000 edits",
            weight=0.2,
            l2=0.005,
            history=True,
            null_space=NULL_SPACE,
            write=Write(refresh=1000),
        ),
        Method(
            "blue",
            LOCATE,
            "AlphaEdit at the first and the last block, each with a target of its own",
            "BLUE 2025, arXiv 2502.03748",
            "edits two blocks instead of spreading what is missing over all",
            l2=0.005,
            history=True,
            null_space=NULL_SPACE,
            layers="ends",
            write=Write(spread="full"),
        ),
        Method(
            "nse",
            LOCATE,
            "D = R K_sᵀ (λ C_ss + K_p K_pᵀ_ss + K_s K_sᵀ)⁻¹, s the strongest neurons",
            "Jiang et al. 2025, Neuron-Level Sequential Editing, eq. 8",
            "changes only the neurons that fire most, in rounds, towards values of the unedited model",
            weight=1.0,
            history=True,
            write=Write(neurons=0.8, rounds=2, near=0.1),
            target={"on_base": True},
        ),
        Method(
            "rect",
            LOCATE,
            "MEMIT's D where |D / W| is among the largest, else 0",
            "Gu et al. 2024, RECT, eq. 5",
            "MEMIT that changes only the weights it changes most",
            weight=1.0,
            write=Write(post=("rect",)),
        ),
        Method(
            "prune",
            LOCATE,
            "MEMIT's ΣD with singular values s > σ = σ_max(W) made ln s − ln σ + σ",
            "Ma et al. 2025, PRUNE, eq. 10",
            "MEMIT whose sum of updates never outgrows the weight",
            weight=1.0,
            write=Write(post=("prune",)),
        ),
        Method(
            "nas",
            LOCATE,
            "AlphaEdit towards v · mean‖v‖ / ‖v‖",
            "NAS 2026, arXiv 2602.02543",
            "AlphaEdit whose values keep the norm they had on the unedited model",
            l2=0.005,
            history=True,
            null_space=NULL_SPACE,
            target={"anchor": True},
        ),
        Method(
            "sphere",
            LOCATE,
            "AlphaEdit's D (I − α U Uᵀ), U the principal directions of W's rows",
            "SPHERE 2026, arXiv 2510.01172",
            "AlphaEdit that spares the weight's principal directions",
            l2=0.005,
            history=True,
            null_space=NULL_SPACE,
            write=Write(post=("sphere",)),
        ),
        Method(
            "ft",
            TUNE,
            "W ← W − η Adam(∂/∂W −Σ log p(target | prompt)), all tokens from the prompt's last position",
            "Zhu et al. 2020, Modifying Memories, eq. 1; Meng et al. 2022, code",
            "fine-tunes one down-projection, unbounded",
            layers="deep",
            tune=Tune(objective="last"),
        ),
        Method(
            "ft-l",
            TUNE,
            "FT with ‖D‖_∞ ≤ ε",
            "Zhu et al. 2020, Modifying Memories, eq. 2; Meng et al. 2022, code",
            "FT with every entry's change bounded",
            layers="deep",
            tune=Tune(objective="last", box=0.5),
        ),
        Method(
            "ft-m",
            TUNE,
            "W ← W − η Adam(∂/∂W cross-entropy of the target's tokens)",
            "Zhang et al. 2024, KnowEdit, code",
            "fine-tunes one down-projection on the target as it is spoken",
            layers="deep",
            tune=Tune(objective="target"),
        ),
        Method(
            "locft-bf",
            TUNE,
            "FT-M over shuffled minibatches, the targets followed by the end of the text",
            "LocFT-BF 2026, arXiv 2509.22072",
            "fine-tunes one down-projection in many small steps that see every edit again and again",
            layers="deep",
            tune=Tune(minibatch=10, ending=True, tune_rate=0.02),
        ),
        Method(
            "lora",
            TUNE,
            "W ← W + B A, B and A by Adam on the cross-entropy of the target's tokens",
            "Hu et al. 2022, LoRA, eq. 3",
            "trains low-rank adapters of the last three down-projections through peft",
            layers="upper",
            tune=Tune(rank=8, minibatch=5, tune_rate=0.01),
        ),
        Method(
            "ke",
            META,
            "W ← W + σ(η) (softmax(α) γᵀ ⊙ ∇W + softmax(β) δᵀ), α … η from an LSTM over prompt, old and new answer",
            "De Cao et al. 2021, Editing Factual Knowledge in Language Models, eq. 5 and 6",
            "a trained network gates the gradient of each edit: one forward and backward, no optimisation",
            layers="upper",
            own=Learned(),
            trained=True,
        ),
        Method(
            "mend",
            META,
            "W ← W − α Σ_t δ̃_t ũ_tᵀ, (ũ, δ̃) = g(u, δ), u and δ the factors of the gradient",
            "Mitchell et al. 2022, Fast Model Editing at Scale, eq. 3 and 4",
            "a trained network changes the two factors of each edit's gradient: one forward and backward",
            layers="upper",
            own=Learned(),
            trained=True,
        ),
        Method(
            "ultraedit",
            FREE,
            "Dᵀ = (HᵀH + ρ I)⁻¹ HᵀV, v = −η ‖ĥ‖² ĝ",
            "UltraEdit 2026, arXiv 2505.14679, eq. 6 to 8",
            "solves for gradients normalised by what all edits so far had; no subject, no training, no statistics",
            layers="upper",
            own=Normalised(),
        ),
        Method(
            "serac",
            MEMORY,
            "p(y | x) = p_ψ(y | x, edit) where the scope of an edit holds x, else the model's own",
            "Mitchell et al. 2022, Memory-Based Model Editing at Scale, eq. 1",
            "keeps edits in a memory; a trained classifier finds the one a prompt is about, a small model answers it",
            layers="none",
            own=Scope(),
            trained=True,
        ),
        Method(
            "grace",
            MEMORY,
            "h ← v_i where ‖k − k_i‖ < ε_i for the nearest key k_i, else what the block puts out",
            "Hartvigsen et al. 2023, Aging with GRACE, eq. 1",
            "keeps a codebook of keys and values at one block; nothing else changes",
            layers="deep",
            own=Codebook(),
        ),
        Method(
            "ike",
            CONTEXT,
            "p(y | demonstrations, edit, x)",
            "Zheng et al. 2023, Can We Edit Factual Knowledge by In-Context Learning?, eq. 2",
            "puts the edit and demonstrations in front of prompts that are like it; needs a model that reads them",
            layers="none",
            own=Context(),
            trained=True,
        ),
    )
}


@dataclass(frozen=True)
class Profile:
    """Settings known for a family of models."""

    layers: tuple[int, ...]
    why: str = "published for this model"
    lambda_: float = 15000.0
    """λ of MEMIT."""
    single: int | None = None
    """The block of methods that edit one; the last of `layers` if unknown."""
    target: TargetSettings = TargetSettings()
    published: TargetSettings | None = None
    """The target settings of the papers' code, absolute."""


_PAPERS = TargetSettings(steps=25, rate=0.5, clamp=0.75, decay=0.5, published=True)
_SLOW = replace(_PAPERS, rate=0.1)
_WIDE = replace(_PAPERS, clamp=4.0, decay=1e-3)
_BLOCKS = (4, 5, 6, 7, 8)

# By model type, number of blocks and hidden width. Layers, λ and target settings as in the code of Meng et al. 2022
# and 2023, Fang et al. 2025 and EasyEdit.
PROFILES: dict[tuple[str, int, int], Profile] = {
    **{
        shape: Profile((1, 2, 3), "the blocks whose keys atlas's training shapes", 100.0)
        for shape in (("llama", 7, 160), ("llama", 5, 64), ("llama", 8, 320))
    },
    ("gpt2", 24, 1024): Profile((6, 7, 8), "up to ROME's block", single=8, published=replace(_PAPERS, clamp=3.0)),
    ("gpt2", 36, 1280): Profile((10, 11, 12), "up to ROME's block", single=12, published=replace(_PAPERS, clamp=4.0)),
    ("gpt2", 48, 1600): Profile((13, 14, 15, 16, 17), lambda_=20000.0, published=replace(_PAPERS, steps=20)),
    ("gptj", 28, 4096): Profile((3, 4, 5, 6, 7, 8), single=5, published=_PAPERS),
    ("gpt_neox", 44, 6144): Profile((6, 7, 8, 9, 10), single=15, published=replace(_PAPERS, clamp=4.0)),
    ("llama", 32, 4096): Profile(_BLOCKS, single=5, published=_SLOW),
    ("llama", 28, 3072): Profile(_BLOCKS, single=5, published=_WIDE),
    ("mistral", 32, 4096): Profile(_BLOCKS, single=5, published=_WIDE),
    ("qwen2", 28, 3584): Profile(_BLOCKS, single=5, published=_SLOW),
}


def profile_of(config: Mapping[str, Any]) -> Profile:
    """The profile of a model by its config.json; unknown models get blocks at the usual relative depth."""
    blocks, flat = block_count(config), _decoder(config)
    width = int(flat.get("hidden_size") or flat.get("n_embd") or 0)
    known = PROFILES.get((str(flat.get("model_type", "")), blocks, width))
    if known is not None:
        return known
    first = max(0, min(round(blocks * 0.125), blocks - 2))
    last = max(first, min(round(blocks * 0.25), blocks - 2))
    return Profile(tuple(range(first, last + 1)), "an eighth to a quarter of the depth, as in published models")


def _decoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the text decoder: config.json itself, or its part for text in a model that also sees."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else config


def block_count(config: Mapping[str, Any]) -> int:
    """Number of decoder blocks by config.json, 0 if it does not say."""
    flat = _decoder(config)
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return int(next((flat[name] for name in names if flat.get(name)), 0))


def _layers(rule: str, profile: Profile, blocks: int) -> tuple[int, ...]:
    """The blocks a method edits by its rule."""
    if rule == "single":
        return (profile.layers[-1] if profile.single is None else profile.single,)
    if rule == "ends":
        return tuple(dict.fromkeys((profile.layers[0], profile.layers[-1])))
    if rule == "deep":
        # Block 21 of 32, in EasyEdit's and AlphaEdit's code.
        return (min(round(blocks * 21 / 32), max(blocks - 2, 0)),)
    if rule == "upper":
        # The last three, in MEND's code.
        return tuple(range(max(blocks - 3, 0), max(blocks, 1)))
    return () if rule == "none" else profile.layers


# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Settings:
    """Everything that decides the weights a plan leads to, beside model, history and edits."""

    method: str
    layers: tuple[int, ...]
    ridge: Ridge
    null_space: NullSpace | None = None
    write: Write = field(default_factory=Write)
    target: TargetSettings = field(default_factory=TargetSettings)
    tune: Tune | None = None
    own: Own | None = None
    artifact: str = ""
    """Content name of the trained file that the method reads; what users give is a name of it, or nothing."""
    batch_size: int = 100
    corpus: str = ""
    """Text of the second moments (`editctl.engine.corpus`); empty is the model's own."""
    corpus_content: str = ""
    """Name of that text's content when the plan was made."""
    corpus_tokens: int = 100_000
    seed: int = 0
    dtype: str = "auto"
    """What the weights are loaded as."""

    def to_params(self) -> dict[str, Any]:
        """As JSON values, for plans and versions."""
        values = {**asdict(self), "layers": list(self.layers)}
        return {**values, "write": {**values["write"], "post": list(self.write.post)}}

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Settings:
        """Back from `to_params`.

        Raises:
            InvalidInput: they are not what it makes.
        """
        values = dict(params)
        try:
            values["layers"] = tuple(values["layers"])
            values["ridge"] = Ridge(**values["ridge"])
            values["null_space"] = NullSpace(**values["null_space"]) if values["null_space"] else None
            values["write"] = Write(**{**values["write"], "post": tuple(values["write"]["post"])})
            values["target"] = TargetSettings(**values["target"])
            values["tune"] = Tune(**values["tune"]) if values["tune"] else None
            if values.get("own"):
                values["own"] = replace(find(values["method"]).own or Learned(), **values["own"])
            made = cls(**values)
            _check(made)
        except (KeyError, TypeError, InvalidInput) as error:
            raise InvalidInput(f"these are not the settings of a run: {error}", "run plan again") from None
        return made

    def named(self) -> dict[str, Any]:
        """The settings that can be overridden, by the names they are overridden with."""
        return {name: getattr(holder, attribute) for name, (holder, attribute) in _places(self).items()}

    @property
    def solves(self) -> bool:
        """Whether it seeks target vectors and solves for them."""
        return self.tune is None and self.own is None

    @property
    def solvable(self) -> bool:
        """Whether a batch can be solved again without gradients, from what is stored."""
        return self.solves and solvable(self.write, hard=self.ridge.hard)

    @property
    def passes(self) -> int:
        """Most passes forward and backward that an edit takes."""
        if self.tune is not None:
            return self.tune.epochs
        if isinstance(self.own, Codebook):
            return self.own.value_steps
        return self.target.steps if self.own is None else int(isinstance(self.own, Learned | Normalised))

    @property
    def needs_moments(self) -> bool:
        """Whether the second moments of the layers have to be known."""
        return self.solves or self.null_space is not None


_SAMPLES = {"float": 0.0, "int": 0, "bool": False, "str": ""}
"""A value of each kind that a setting may have, by its annotation."""


def _check(made: Settings) -> None:
    """Hold every setting against its kind and bounds, whoever wrote it.

    Raises:
        InvalidInput: one is not valid.
    """
    find(made.method)
    for holder in (made.ridge, made.write, made.target, made.tune, made.own, made):
        for f in fields(holder) if holder is not None else ():
            if f.name == "layers" and not made.layers and find(made.method).layers == "none":
                continue
            if f.type in _SAMPLES or f.name in ("layers", "post"):
                _fit(f.name, getattr(holder, f.name), _SAMPLES.get(str(f.type), ()), 0)
    if made.null_space is not None:
        if made.null_space.rule not in RULES:
            raise InvalidInput(f"rule = {made.null_space.rule!r} is not valid", f"one of: {', '.join(RULES)}")
        _fit(made.null_space.rule, made.null_space.value, 0.0, 0)


PARTS = ("ridge", "write", "target", "tune")
"""Fields of `Settings` that hold settings of their own, beside `own`."""
FIXED = ("method", "corpus_content", "dtype")
"""Fields of `Settings` that no override names."""


def _places(settings: Settings) -> dict[str, tuple[Any, str]]:
    """Where each setting is kept, by the name users give it."""
    holders = [getattr(settings, name) for name in (*PARTS, "own")] + [settings]
    holders = [holder for holder in holders if holder is not None]
    parts = {*PARTS, "own", "null_space", "published", *FIXED}
    return {f.name.rstrip("_"): (holder, f.name) for holder in holders for f in fields(holder) if f.name not in parts}


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        InvalidInput: there is none.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        raise InvalidInput(
            f"unknown method {name}", f"did you mean {near[0]}?" if near else f"one of: {', '.join(METHODS)}"
        )
    return METHODS[name]


def settings(config: Mapping[str, Any], method: str, overrides: Mapping[str, Any]) -> Settings:
    """Settings of a method on a model: preset, then the model's profile, then overrides by field name.

    Beside the fields, `energy`, `quantile` and `threshold` set the rank rule of the null space, `preserve` switches it,
    and `published = true` takes the target settings of the papers' code where they are known for the model.

    Raises:
        InvalidInput: an override names no setting, or has the wrong kind of value.
    """
    profile, blocks, row = profile_of(config), block_count(config), find(method)
    todo = dict(overrides)
    target = replace(_target(profile, todo.pop("published", False)), **row.target)
    ridge = Ridge(row.weight * profile.lambda_, row.l2, row.history, row.hard)
    layers = _layers(row.layers, profile, blocks)
    result = Settings(method, layers, ridge, row.null_space, row.write, target, row.tune, row.own, batch_size=row.batch)
    space = _null_space(result.null_space, todo)
    # A switch for all methods of a workspace says nothing of those that change no weights.
    result = replace(result, null_space=space if row.preservation else None)
    for key, value in todo.items():
        places = _places(result)
        if key not in places:
            known = sorted([*places, *RULES, "preserve", "published"])
            near = difflib.get_close_matches(key, known, 1)
            raise InvalidInput(
                f"unknown setting {key}", f"did you mean {near[0]}?" if near else f"one of: {', '.join(known)}"
            )
        holder, attribute = places[key]
        changed = replace(holder, **{attribute: _fit(key, value, getattr(holder, attribute), blocks)})
        part = next((n for n in (*PARTS, "own") if getattr(result, n) is holder), None)
        result = changed if part is None else replace(result, **{part: changed})
    if result.tune is not None and not result.tune.rank and len(result.layers) != 1:
        raise InvalidInput(f"{method} fine-tunes one block, not {len(result.layers)}", "for example layers = [5]")
    return result


def _target(profile: Profile, published: Any) -> TargetSettings:
    """The profile's target settings, scale-free or those of the papers' code.

    Raises:
        InvalidInput: the latter are wanted and not known.
    """
    if published is False:
        return profile.target
    if published is not True:
        raise InvalidInput(f"published = {published!r} is not valid", "true or false")
    if profile.published is None:
        raise InvalidInput("no published target settings are known for this model", "leave out published = true")
    return profile.published


def _null_space(preset: NullSpace | None, overrides: dict[str, Any]) -> NullSpace | None:
    """The null space by the switch and the rank rules among the overrides, which are taken out of them.

    Raises:
        InvalidInput: one is not valid, or two rules are named.
    """
    named = [rule for rule in RULES if rule in overrides]
    values = {rule: _fit(rule, overrides.pop(rule), 0.0, 0) for rule in named}
    if len(named) > 1:
        raise InvalidInput(f"{' and '.join(named)} both set the rank of the null space", "set one of them")
    switch = overrides.pop("preserve", None)
    if switch is not None and switch not in PRESERVE:
        raise InvalidInput(f"preserve = {switch!r} is not valid", f"one of: {', '.join(PRESERVE)}")
    if switch == "none":
        return None
    if named:
        return NullSpace(named[0], values[named[0]])
    return (preset or NULL_SPACE) if switch else preset


SHARES = ("rect", "sphere_energy", "sphere", "neurons", "certainty", "nearness")
"""Settings that are at most 1."""
CHOICES = {"spread": SPREADS, "keys": KEYS, "site": SITES, "objective": OBJECTIVES}


def _fit(key: str, value: Any, present: Any, blocks: int) -> Any:
    """The value in the kind the setting has.

    Raises:
        InvalidInput: it has another kind, or names blocks the model lacks.
    """
    if key == "layers":
        if not isinstance(value, list | tuple) or not value or any(type(v) is not int for v in value):
            raise InvalidInput("layers must be a list of block numbers", "for example layers = [1, 2, 3]")
        if blocks and not all(0 <= v < blocks for v in value):
            raise InvalidInput(f"layers {list(value)} are not all among the model's blocks 0 to {blocks - 1}")
        return tuple(sorted(set(value)))
    if key == "post":
        good = isinstance(value, list | tuple) and all(v in POST for v in value)
        if not good or len(set(value)) < len(value):
            raise InvalidInput(f"post must be a list of: {', '.join(POST)}, each once", 'for example post = ["rect"]')
        return tuple(value)
    if key in CHOICES and value not in CHOICES[key]:
        raise InvalidInput(f"{key} = {value!r} is not valid", f"one of: {', '.join(CHOICES[key])}")
    good = isinstance(value, str) if isinstance(present, str) else isinstance(value, int | float)
    if isinstance(present, bool):
        good = isinstance(value, bool)
    elif isinstance(present, int):
        good = type(value) is int
    elif isinstance(present, float):
        good = type(value) in (int, float)
    number = not isinstance(value, str | bool)
    least = 1 if key in ("batch_size", "corpus_tokens", "rounds", "epochs") else 0
    most = 1 if key in SHARES else 2**63 - 1
    if not good or (number and not least <= value <= most):
        raise InvalidInput(f"{key} = {value!r} is not valid", f"its present value is {present!r}")
    return float(value) if isinstance(present, float) else value
