"""Networks that make an update of one gradient: KnowledgeEditor and MEND.

KnowledgeEditor (De Cao et al. 2021, Editing Factual Knowledge in Language Models, eq. 5 and 6): an LSTM reads prompt,
old and new answer; from its state come, for every matrix, a gate of rank one and a shift of rank one for the gradient.
It is trained to reach rewordings under two constraints, on the KL divergence at what must stay and on the size of the
update, whose Lagrange multipliers rise while they are broken and whose margins shrink as edits succeed.

MEND (Mitchell et al. 2022, Fast Model Editing at Scale, eq. 3 and 4): both factors of the gradient, token by token and
normalised, pass through one small network for all matrices of a shape, with a scale, a shift and a rate of each
matrix's own.

Both leave an update whose rank is at most the number of its tokens (one more an edit for KnowledgeEditor). Knows: the
networks, what they are trained on, how a batch is written. Refuses: the schedule of training, which `training` knows.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from editctl import artifacts
from editctl.engine.lessons import Lesson
from editctl.engine.methods import Learned
from editctl.engine.model import Model
from editctl.engine.passes import resuming
from editctl.engine.prompts import Request, split_answer
from editctl.engine.slopes import Slope, slopes
from editctl.engine.statistics import pad_right
from editctl.engine.writing import Job, Update, Written
from editctl.events import StageStarted

Terms = dict[int, tuple[Tensor, Tensor]]
"""By block the factors of an update: left d_out × m and right m × d_in."""


class Network(nn.Module, ABC):
    """A network that makes an update of the slopes of some edits."""

    @abstractmethod
    def forward(self, found: Sequence[Slope]) -> Terms:
        """The update of all edits together; the part of each depends on its own slope alone."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Its sizes, as JSON values: what `build` needs beside the model."""


# ---------------------------------------------------------------------------------------------------------------------
# MEND


HASTE = 10.0
"""How much faster than the rest MEND learns the logarithms of its rates (a hundred times in its code)."""


class Mend(Network):
    """One two-layer network with a residual path for all edited matrices, which have one shape.

    What it adds is added to the factors as they are, not as they are normalised, so that an untrained network takes
    one plain gradient step.

    Args:
        width: of the bottleneck of each layer.
        rate: that every matrix begins with (the paper's `edit_lr`).
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, model: Model, layers: Sequence[int], *, width: int = 384, rate: float = 0.05) -> None:
        super().__init__()
        d_out, d_in = model.blocks[layers[0]].weight.shape
        size = d_out + d_in
        self.layers, self.width, self.d_in, self.rate = list(layers), width, d_in, rate
        self.down = nn.ParameterList(nn.Parameter(torch.randn(width, size) / math.sqrt(size)) for _ in range(2))
        # Zero at first: an untrained network passes the normalised factors through.
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(size, width)) for _ in range(2))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(size)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(len(layers), 2, size))
        self.shift = nn.Parameter(torch.zeros(len(layers), 2, size))
        self.rates = nn.Parameter(torch.full((len(layers),), math.log(rate) / HASTE))
        self.register_buffer("mean", torch.zeros(len(layers), size))
        self.register_buffer("spread", torch.ones(len(layers), size))

    def fit(self, found: Sequence[Slope]) -> None:
        """Take mean and standard deviation of the factors from some slopes."""
        for i, layer in enumerate(self.layers):
            x = torch.cat([torch.cat(slope.parts[layer], 1) for slope in found])
            self.mean[i], self.spread[i] = x.mean(0), x.std(0) + 1e-7 + 1e-3 * x.std()

    def about(self) -> dict[str, Any]:
        return {"width": self.width, "rate": self.rate}

    def forward(self, found: Sequence[Slope]) -> Terms:
        made = {}
        for i, layer in enumerate(self.layers):
            x = torch.cat([torch.cat(slope.parts[layer], 1) for slope in found])
            x = (x - self.mean[i]) / self.spread[i]
            for j in range(2):
                inner = x @ self.down[j].T @ self.up[j].T + self.bias[j]
                inner = self.scale[i, j] * inner + self.shift[i, j]
                x = x + (functional.relu(inner) if j == 0 else inner)
            x = x * self.spread[i] + self.mean[i]
            u, g = x[:, : self.d_in], x[:, self.d_in :]
            made[layer] = (-(HASTE * self.rates[i]).exp() * g.T, u)
        return made


# ---------------------------------------------------------------------------------------------------------------------
# KnowledgeEditor


class KnowledgeEditor(Network):
    """An LSTM over prompt, old and new answer, and for every matrix a head for gate and shift.

    Args:
        width: of the LSTM's state in each direction.
        rate: what the gradient is multiplied by at first.
    """

    def __init__(self, model: Model, layers: Sequence[int], *, width: int = 128, rate: float = 0.1) -> None:
        super().__init__()
        d_out, d_in = model.blocks[layers[0]].weight.shape
        self.layers, self.width, self.rate, self.sizes = list(layers), width, rate, (d_out, d_in)
        table = model.net.get_input_embeddings().weight.detach()
        # The model's own, which the trained file need not hold.
        self._table, self._size = table, float(table.float().pow(2).mean().sqrt())
        self.separator = nn.Parameter(torch.randn(2, table.shape[1]))
        self.lstm = nn.LSTM(table.shape[1], width, bidirectional=True, batch_first=True)
        heads = [
            nn.Sequential(nn.Linear(2 * width, 2 * width), nn.Tanh(), nn.Linear(2 * width, 2 * sum(self.sizes) + 1))
            for _ in layers
        ]
        for head in heads:
            last = head[2]
            assert isinstance(last, nn.Linear)
            nn.init.normal_(last.weight, std=0.01)
            nn.init.zeros_(last.bias)
            with torch.no_grad():
                # γ: the gradient passes the gate as it is.
                last.bias[d_out : d_out + d_in] = 1.0
        self.heads = nn.ModuleList(heads)

    def about(self) -> dict[str, Any]:
        return {"width": self.width, "rate": self.rate}

    def _text(self, slope: Slope) -> Tensor:
        """Prompt, old and new answer, tokens × width of the embeddings."""
        parts = [self._table[list(ids)].float() / self._size for ids in (slope.prompt, slope.said, slope.target)]
        return torch.cat([parts[0], self.separator[:1], parts[1], self.separator[1:], parts[2]])

    def forward(self, found: Sequence[Slope]) -> Terms:
        d_out, d_in = self.sizes
        packed = nn.utils.rnn.pack_sequence([self._text(slope) for slope in found], enforce_sorted=False)
        _, (state, _) = self.lstm(packed)
        read = torch.cat([state[0], state[1]], dim=1)
        made = {}
        for layer, head in zip(self.layers, self.heads, strict=True):
            alpha, gamma, beta, delta, eta = head(read).split([d_out, d_in, d_out, d_in, 1], dim=1)
            # Softmax sums to 1 over d_out entries; times d_out an even gate is 1.
            gate, shift = alpha.softmax(1) * d_out, beta.softmax(1)
            size = -2 * self.rate * eta.sigmoid()
            left, right = [], []
            for i, slope in enumerate(found):
                u, g = slope.parts[layer]
                left += [size[i] * g * gate[i], size[i] * shift[i : i + 1]]
                right += [u * gamma[i], delta[i : i + 1]]
            made[layer] = (torch.cat(left).T, torch.cat(right))
        return made


NETWORKS: dict[str, Callable[..., Network]] = {"ke": KnowledgeEditor, "mend": Mend}

# ---------------------------------------------------------------------------------------------------------------------
# Writing


_BUILT: WeakKeyDictionary[Model, dict[tuple[str, Path], Network]] = WeakKeyDictionary()
"""Networks that were built for a model, by content and folder; reading one takes longer than using it."""


def build(method: str, model: Model, content: str, library: Path) -> Network:
    """The network of a trained file.

    Raises:
        StoreError: the file is missing or spoiled.
    """
    known = _BUILT.setdefault(model, {})
    if content == artifacts.DRAFT or (content, library) not in known:
        known[content, library] = _built(method, model, content, library)
    return known[content, library]


def _built(method: str, model: Model, content: str, library: Path) -> Network:
    tensors, about = artifacts.read(content, library, method)
    net = NETWORKS[method](model, about["layers"], **about["network"])
    artifacts.fit(net, tensors, content)
    return net.to(model.device).eval()


@torch.no_grad()
def write(job: Job) -> Written:
    """A batch by one forward, one backward and one pass of the network."""
    own = job.settings.own
    assert isinstance(own, Learned)
    net = build(job.settings.method, job.model, job.settings.artifact, job.library)
    job.emit(StageStarted("target", 1, job.number))
    found = slopes(job.model, job.settings.layers, job.requests, job.emit)
    made = net(found)
    updates: dict[int, Update] = {}
    for layer, (left, right) in made.items():
        projector = job.projector(layer)
        right = right if projector is None else projector(right)
        updates[layer] = ((own.strength * left).cpu().contiguous(), right.cpu().contiguous())
    keys = {layer: torch.stack([slope.keys[layer] for slope in found], dim=1).cpu() for layer in updates}
    return Written(updates, keys)


# ---------------------------------------------------------------------------------------------------------------------
# What is learned

SIZES = (1, 4, 8, 16, 32, 64, 100)
"""Edits of a step, one of these at random: what is written together must not disturb itself."""
ASKED = 12
"""Edits of a step whose rewordings, and probes that must stay, are asked."""
OWN = 0.6
"""Share of the probes that are an edit's own; the others are prompts of other lessons."""
KNOWN = 20_000
"""Texts whose lower blocks are kept in memory; the oldest go first."""


class HyperTask(ABC):
    """Learning a network on one model: lessons are drawn, their update is put on, and what is said then is scored."""

    net: Network

    def __init__(self, model: Model, layers: Sequence[int], lessons: Sequence[Lesson], seed: int) -> None:
        self._model, self._layers, self._seed = model, tuple(layers), seed
        self._lessons = list(lessons)
        self._slopes: dict[str, Slope] = {}
        self._texts: dict[tuple[str, str], _Text] = {}
        self._tuples = False

    @property
    def about(self) -> Mapping[str, Any]:
        """See `training.Task`."""
        return {"network": self.net.about(), "drawn": {"sizes": SIZES, "asked": ASKED, "own": OWN}}

    @abstractmethod
    def _weighed(self, edited: Tensor, drift: Tensor, made: Terms, edits: int) -> dict[str, Tensor]:
        """The loss and its parts, of the edits' loss, what moved that must stay, and the update of so many edits."""

    def stepped(self, parts: Mapping[str, float]) -> None:
        """See `training.Task`; nothing but the weights has moved."""
        del parts

    def state(self) -> dict[str, float]:
        """See `training.Task`."""
        return {}

    def take(self, state: Mapping[str, float]) -> None:
        """See `training.Task`; there is nothing to take."""
        del state

    def loss(self, step: int) -> dict[str, Tensor]:
        """See `training.Task`."""
        rng = random.Random(f"{self._seed}-{step}")
        drawn = self._drawn(rng)
        made = self.net([self._slope(lesson) for lesson in drawn])
        asked = rng.sample(drawn, min(ASKED, len(drawn)))
        reach = [(rng.choice((lesson.prompt, *lesson.rewordings)), lesson.target) for lesson in asked]
        subjects = {lesson.subject for lesson in drawn}
        stay = [self._staying(lesson, subjects, rng) for lesson in asked]
        texts = [self._text(*pair) for pair in (*reach, *stay)]
        with self._put_on(made):
            logits = self._read(texts)
        edited = torch.stack(
            [
                functional.cross_entropy(said, text.answer)
                for said, text in zip(logits[: len(reach)], texts[: len(reach)], strict=True)
            ]
        ).mean()
        moved = [
            (text.before.exp() * (text.before - said.log_softmax(-1))).sum(-1).mean()
            for said, text in zip(logits[len(reach) :], texts[len(reach) :], strict=True)
        ]
        return self._weighed(edited, torch.stack(moved).mean(), made, len(drawn))

    def _drawn(self, rng: random.Random) -> list[Lesson]:
        """Lessons of different subjects, since two of one subject may contradict each other."""
        wanted = rng.choice(SIZES)
        found: dict[str, Lesson] = {}
        for lesson in rng.sample(self._lessons, min(len(self._lessons), 4 * wanted)):
            if len(found) < wanted:
                found.setdefault(lesson.subject, lesson)
        return list(found.values())

    def _staying(self, lesson: Lesson, subjects: set[str], rng: random.Random) -> tuple[str, str]:
        """A prompt that must stay, with what the unedited model says."""
        if lesson.stays and rng.random() < OWN:
            return rng.choice(lesson.stays)
        for other in rng.sample(self._lessons, min(8, len(self._lessons))):
            if other.subject not in subjects and other.old:
                return other.prompt, other.old
        return rng.choice(lesson.stays) if lesson.stays else (lesson.prompt, lesson.old)

    def _slope(self, lesson: Lesson) -> Slope:
        """A lesson's slope on the unedited model; alone in its pass, so that its bits do not depend on others."""
        if lesson.id not in self._slopes:
            request = Request(lesson.id, lesson.template, lesson.subject, lesson.target)
            self._slopes[lesson.id] = slopes(self._model, self._layers, [request], rows=1)[0]
            _bounded(self._slopes)
        return self._slopes[lesson.id]

    @torch.no_grad()
    def _text(self, prompt: str, answer: str) -> _Text:
        """A text read by the unedited model, alone in its pass, up to the lowest edited block and to its end."""
        key = (prompt, answer)
        if key not in self._texts:
            model, entered = self._model, {}
            whole, start = split_answer(model, prompt, answer)

            def note(_module: object, args: tuple[Tensor, ...], kwargs: Any) -> None:
                entered["hidden"] = (args[0] if args else kwargs["hidden_states"])[0].detach().clone()

            def look(_module: object, _args: object, output: Any) -> None:
                self._tuples = isinstance(output, tuple)

            block = model.blocks[self._layers[0]].module
            handles = [block.register_forward_pre_hook(note, with_kwargs=True), block.register_forward_hook(look)]
            try:
                ids = torch.tensor([whole[:-1]], device=model.device)
                logits = model.net(input_ids=ids, use_cache=False).logits[0, start - 1 :].float()
            finally:
                for handle in handles:
                    handle.remove()
            answer_ids = torch.tensor(whole[start:], device=model.device)
            self._texts[key] = _Text(tuple(whole[:-1]), start, answer_ids, entered["hidden"], logits.log_softmax(-1))
            _bounded(self._texts)
        return self._texts[key]

    def _put_on(self, made: Terms) -> Any:
        """The update acts for the time of `with`; gradients flow into its factors."""

        def hook(left: Tensor, right: Tensor) -> Callable[..., Tensor]:
            def add(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return output + ((args[0].float() @ right.T) @ left.T).view_as(output).to(output.dtype)

            return add

        blocks = self._model.blocks
        return self._model.hooked([(blocks[layer].down, "output", hook(*made[layer])) for layer in made])

    def _read(self, texts: Sequence[_Text]) -> list[Tensor]:
        """Logits at the answers' places (tokens × vocabulary each), from the lowest edited block on."""
        model = self._model
        ids, mask = pad_right([list(text.ids) for text in texts], model.device)
        hidden = torch.zeros(*ids.shape, texts[0].hidden.shape[-1], dtype=model.dtype, device=model.device)
        for i, text in enumerate(texts):
            hidden[i, : len(text.ids)] = text.hidden
        with resuming(model, self._layers[0], hidden, tuples=self._tuples):
            logits = model.net(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return [logits[i, text.start - 1 : len(text.ids)].float() for i, text in enumerate(texts)]


class _Text:
    """A text with what the unedited model makes of it."""

    def __init__(self, ids: tuple[int, ...], start: int, answer: Tensor, hidden: Tensor, before: Tensor) -> None:
        self.ids, self.start = ids, start
        """All but the last token, and where the answer begins."""
        self.answer = answer
        """Token ids."""
        self.hidden = hidden
        """What enters the lowest edited block, T × d."""
        self.before = before
        """Log-probabilities at the answer's places, tokens × vocabulary."""


def _bounded(known: dict[Any, Any]) -> None:
    while len(known) > KNOWN:
        del known[next(iter(known))]


class MendTask(HyperTask):
    """MEND's loss: the edits' beside the divergence at what must stay (Mitchell et al. 2022, eq. 5, where the weight is
    on the other term)."""

    DEFAULTS: Mapping[str, float] = {"steps": 3000, "rate": 5e-4}
    DRIFT_WEIGHT = 1.0

    def __init__(self, model: Model, layers: Sequence[int], lessons: Sequence[Lesson], seed: int) -> None:
        super().__init__(model, layers, lessons, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net: Mend = Mend(model, layers)
        self.net.fit([self._slope(lesson) for lesson in self._lessons[:200]])
        self.net.to(model.device)

    @property
    def about(self) -> Mapping[str, Any]:
        """See `training.Task`."""
        return {**super().about, "drift_weight": self.DRIFT_WEIGHT}

    def _weighed(self, edited: Tensor, drift: Tensor, made: Terms, edits: int) -> dict[str, Tensor]:
        return {"loss": edited + self.DRIFT_WEIGHT * drift, "edit": edited, "drift": drift}


class KeTask(HyperTask):
    """KnowledgeEditor's constrained loss (De Cao et al. 2021, eq. 3 and 4).

    L = edit + λ_kl (KL − m_kl) + λ_p (‖Δ‖_p − m_p), the multipliers by gradient ascent, never below zero. Where edits
    succeed, both margins shrink to 4/5 of what they were, down to a least one.
    """

    DEFAULTS: Mapping[str, float] = {"steps": 5000, "rate": 1.5e-3}
    ASCENT = 0.005
    """Step of the multipliers."""
    MARGINS: ClassVar = {"kl": (0.25, 0.1), "norm": (0.2, 0.1)}
    """First and least margin: nats; p-norm of an edit's update of a matrix as a share of the weight's, p = 2."""
    GOOD = 0.25
    """Mean loss of the edits, nats a token, at which the margins shrink."""
    WINDOW = 100
    """Steps over which it is taken."""

    def __init__(self, model: Model, layers: Sequence[int], lessons: Sequence[Lesson], seed: int) -> None:
        super().__init__(model, layers, lessons, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net: KnowledgeEditor = KnowledgeEditor(model, layers).to(model.device)
        self._sizes = {layer: float(model.blocks[layer].weight.float().norm()) for layer in layers}
        self._state = {"kl": 1.0, "norm": 0.0, "margin kl": self.MARGINS["kl"][0]}
        self._state |= {"margin norm": self.MARGINS["norm"][0], "sum": 0.0, "count": 0.0}

    def _weighed(self, edited: Tensor, drift: Tensor, made: Terms, edits: int) -> dict[str, Tensor]:
        norms = [_norm(*made[layer]) / self._sizes[layer] for layer in made]
        # The updates of several edits add up like random ones.
        norm = torch.stack(norms).mean() / edits**0.5
        broken = {"kl": drift - self._state["margin kl"], "norm": norm - self._state["margin norm"]}
        loss = edited + sum(self._state[name] * by for name, by in broken.items())
        return {"loss": loss, "edit": edited, "drift": drift, "norm": norm}

    @property
    def about(self) -> Mapping[str, Any]:
        """See `training.Task`."""
        held = {"ascent": self.ASCENT, "margins": self.MARGINS, "good": self.GOOD, "window": self.WINDOW}
        return {**super().about, "constraints": held}

    def stepped(self, parts: Mapping[str, float]) -> None:
        """See `training.Task`."""
        state = self._state
        for name, value in (("kl", parts["drift"]), ("norm", parts["norm"])):
            state[name] = max(0.0, state[name] + self.ASCENT * (value - state[f"margin {name}"]))
        state["sum"], state["count"] = state["sum"] + parts["edit"], state["count"] + 1
        if state["count"] >= self.WINDOW:
            if state["sum"] / state["count"] < self.GOOD:
                for name, (_, least) in self.MARGINS.items():
                    state[f"margin {name}"] = max(least, 0.8 * state[f"margin {name}"])
            state["sum"] = state["count"] = 0.0

    def state(self) -> dict[str, float]:
        """See `training.Task`."""
        return dict(self._state)

    def take(self, state: Mapping[str, float]) -> None:
        """See `training.Task`."""
        self._state = dict(state)


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """Frobenius norm of left · right, by Gram matrices no larger than the smaller side."""
    thin = left.shape[1] < left.shape[0]
    square = ((left.T @ left) * (right @ right.T)).sum() if thin else (left @ right).square().sum()
    return square.clamp_min(1e-12).sqrt()
