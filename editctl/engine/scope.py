"""SERAC (Mitchell et al. 2022, Memory-Based Model Editing at Scale): edits in a memory beside the model, whose weights
stay as they are.

A trained scope classifier finds the edit that a prompt is about, a counterfactual model answers it, and the model
itself answers everything else, bit for bit. Knows: both networks, what they are trained on, the memory. Refuses: to
lead a text around the model; `overlay` does.

Where it leaves the paper. Both networks read the model's own token embeddings through a frozen linear map, where the
paper loads two pretrained models (a BERT and a T5): they so read any language the model reads, and a subject or target
that training never showed is told from others all the same. The classifier is the paper's variant with cached
embeddings, the likeness a cosine, so ten thousand edits are one matrix product. The counterfactual model is a pointer
network (Vinyals et al. 2015, eq. 3): it says the edit's target by copying it from the edit in front of the prompt, and
hands back to the model at the end of that sentence.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from editctl import artifacts
from editctl.delta import Overlay
from editctl.engine.lessons import Lesson
from editctl.engine.methods import Scope
from editctl.engine.model import PROBE, Model
from editctl.engine.overlay import Detour, Detours
from editctl.engine.prompts import join
from editctl.engine.statistics import pad_right
from editctl.engine.writing import Job, Written
from editctl.errors import StoreError
from editctl.events import StageStarted

KIND = "serac"
DEFAULTS = {"steps": 700, "rate": 0.002}
"""Of the schedule. On atlas 200 steps find 99 % of the paraphrases of edits that were held out, these all."""
BATCH = 24
"""Lessons of a step."""
DRAWN = 2
"""Of each lesson, the prompts that its edit must reach and those that it must not, in one step."""
MADE_UP = 0.5
"""Share of answers of random tokens in training, so that what is learned is to copy and not a list of targets."""
SURROUNDED = 0.25
"""Share of prompts behind another sentence, and of answers before one."""
LENGTH = 128
"""Tokens of a text that the classifier reads, the last ones."""
CHUNK = 1 << 13
"""Embeddings of the model that are converted at once."""
ROWS = 256
"""Texts that it reads at once."""
TIE = 1e-5
"""Difference of two cosines that is rounding: equal texts padded to different lengths differ by up to 1e-6."""
FLOOR = 1e-4
"""Probability that the counterfactual model leaves to all tokens of the vocabulary, in equal shares."""
MARK = " |"
"""What stands around the answer in front of a prompt."""
ANCHOR = "a"
"""A word, behind which a text's first word has the tokens that it has within a sentence."""


# ---------------------------------------------------------------------------------------------------------------------
# The networks


@dataclass(frozen=True)
class Shape:
    """Sizes of the networks."""

    lens: int = 128
    """Most dimensions of a token; wider embeddings are projected."""
    inner: int = 96
    heads: int = 4
    blocks: int = 2
    """Of the counterfactual model; the classifier has one."""
    pools: int = 8
    """Places of a text that the classifier takes its embedding from."""
    row: int = 96
    """Dimensions of that embedding."""


class Lens(nn.Module):
    """Token embeddings of the model as both networks see them: centred, projected, and with no direction before others.

    Nothing of it is trained. Whitened, the embeddings of two tokens are nearly orthogonal, however alike the tokens are
    to the model: a name is to be told from every other name.
    """

    mean: Tensor
    map: Tensor

    def __init__(self, wide: int, width: int) -> None:
        """
        Args:
            wide: of the model's embeddings.
            width: of what comes out.
        """
        super().__init__()
        self.register_buffer("mean", torch.zeros(wide))
        self.register_buffer("map", torch.zeros(wide, width))

    def forward(self, table: Tensor, ids: Tensor) -> Tensor:
        """B × T × width.

        Args:
            table: the model's embeddings, vocabulary × wide.
            ids: B × T.
        """
        seen: Tensor = (table[ids].float() - self.mean) @ self.map
        return seen

    @torch.no_grad()
    def measure(self, table: Tensor, seed: int) -> None:
        """Fit it to the model's embeddings, vocabulary × wide."""
        wide, width = self.map.shape
        # On the CPU: not every device has fp64.
        parts = [slice(start, start + CHUNK) for start in range(0, len(table), CHUNK)]
        mean = torch.stack([table[part].cpu().double().sum(0) for part in parts]).sum(0) / len(table)
        turn = torch.eye(wide)
        if wide > width:
            turn = torch.linalg.qr(torch.randn(wide, width, generator=torch.Generator().manual_seed(seed))).Q
        moment = torch.zeros(width, width, dtype=torch.float64)
        for part in parts:
            seen = ((table[part].cpu().float() - mean.float()) @ turn).double()
            moment += seen.T @ seen / len(table)
        values, vectors = torch.linalg.eigh(moment)
        # Directions that the model hardly uses stay small: there is only noise in them.
        scales = values.clamp_min(1e-3 * float(values.mean())).rsqrt()
        self.mean.copy_(mean)
        self.map.copy_(turn.double() @ (vectors * scales @ vectors.T))


class Block(nn.Module):
    """A transformer block without positions: normalised input, attention, two linear maps."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heeded, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """B × T × width; every position sees all where the mask (B × T, bool) is set, or what is not behind it."""
        query, key, value = self.heeded(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        allowed = None if mask is None else mask[:, None, None]
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, is_causal=causal)
        x = x + self.mixed(seen.transpose(1, 2).flatten(2))
        grown: Tensor = self.down(functional.gelu(self.up(self.second(x))))
        return x + grown


def _neighbour(x: Tensor, back: int) -> Tensor:
    """At every position of x (B × T × d) what stands so many positions before it, or behind it if negative."""
    length = x.shape[1]
    padded = functional.pad(x, (0, 0, max(back, 0), max(-back, 0)))
    return padded[:, max(-back, 0) :][:, :length]


class Encoder(nn.Module):
    """The scope classifier: a text's embedding, taken from several places of it (Lin et al. 2017, A Structured
    Self-Attentive Sentence Embedding, eq. 6), and how likely two embeddings are of one fact."""

    def __init__(self, lens: int, shape: Shape) -> None:
        super().__init__()
        self.pools = shape.pools
        self.enter = nn.Linear(3 * lens, shape.inner)
        self.block = Block(shape.inner, shape.heads)
        self.last = nn.LayerNorm(shape.inner)
        self.look = nn.Linear(shape.inner, shape.pools)
        # Names pass from the lens to the embedding through one linear map, which treats those it never saw alike.
        self.value = nn.Linear(2 * lens + shape.inner, shape.row, bias=False)
        self.sharpness, self.middle = nn.Parameter(torch.tensor(2.5)), nn.Parameter(torch.tensor(0.7))

    def forward(self, seen: Tensor, mask: Tensor | None) -> Tensor:
        """Embeddings of norm 1, B × row.

        Args:
            seen: tokens through the lens, B × T × lens.
            mask: where tokens are, B × T, bool; None for everywhere.
        """
        if mask is not None:
            seen = seen * mask[..., None]
        before = _neighbour(seen, 1)
        x = self.enter(torch.cat([seen, before, _neighbour(seen, -1)], -1))
        x = self.last(self.block(x, mask))
        looks = self.look(x)
        if mask is not None:
            looks = looks.masked_fill(~mask[..., None], -torch.inf)
        value = self.value(torch.cat([seen, before, x], -1)).unflatten(-1, (self.pools, -1))
        return functional.normalize((looks.softmax(1)[..., None] * value).sum(1).flatten(1), dim=-1)

    def logit(self, cosine: Tensor) -> Tensor:
        """The logit of the probability that two texts of this likeness are of one fact."""
        return self.sharpness.exp() * (cosine - self.middle)


class Pointer(nn.Module):
    """The counterfactual model: which earlier token comes next. It knows no positions but which two tokens stand before
    one, so an edit can stand in front of a text of any length."""

    def __init__(self, lens: int, shape: Shape) -> None:
        super().__init__()
        self.enter = nn.Linear(3 * lens, shape.inner)
        self.blocks = nn.ModuleList(Block(shape.inner, shape.heads) for _ in range(shape.blocks))
        self.last = nn.LayerNorm(shape.inner)
        self.query, self.key = nn.Linear(shape.inner, shape.inner), nn.Linear(shape.inner, shape.inner)
        self.over = nn.Linear(shape.inner, 1)

    def forward(self, seen: Tensor, places: Tensor) -> Tensor:
        """Log-probabilities, B × K × (T + 1): that each position's token comes next; last, that the answer is over.

        Args:
            seen: tokens through the lens, B × T × lens.
            places: the positions behind which is asked, B × K.
        """
        x = self.enter(torch.cat([seen, _neighbour(seen, 1), _neighbour(seen, 2)], -1))
        for block in self.blocks:
            x = block(x, causal=True)
        x = self.last(x)
        here = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
        scores = self.query(here) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        later = torch.arange(x.shape[1], device=x.device) > places[..., None]
        return torch.cat([scores.masked_fill(later, -torch.inf), self.over(here)], -1).log_softmax(-1)


class Net(nn.Module):
    """Both networks and the lens they look through."""

    def __init__(self, wide: int, shape: Shape) -> None:
        super().__init__()
        lens = min(wide, shape.lens)
        self.lens = Lens(wide, lens)
        self.encoder = Encoder(lens, shape)
        self.pointer = Pointer(lens, shape)


# ---------------------------------------------------------------------------------------------------------------------
# What they read


class Reading:
    """The networks beside the model whose tokens they read."""

    def __init__(self, model: Model, net: Net) -> None:
        self.model, self.net = model, net.to(model.device)
        self.table: Tensor = model.net.get_input_embeddings().weight
        self._anchor = list(model.tokenizer(ANCHOR, add_special_tokens=False)["input_ids"])
        self._anywhere = self.spoken([PROBE]) == [_bare(model, model.encode(PROBE))]
        """Whether a text's first word has no tokens of its own."""

    def spoken(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts as they stand within a sentence, the last `LENGTH`; no text is without a token."""
        anchored = [f"{ANCHOR} {text.strip()}" for text in texts]
        whole = self.model.tokenizer(anchored, add_special_tokens=False)["input_ids"]
        begin = len(self._anchor)
        alone = [list(ids[begin:] if list(ids[:begin]) == self._anchor else ids) for ids in whole]
        return [ids[-LENGTH:] or [0] for ids in alone]

    def respoken(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        """As `spoken`, of texts as the model reads them, start token included."""
        if self._anywhere:
            return [_bare(self.model, text)[-LENGTH:] or [0] for text in texts]
        decode = self.model.tokenizer.decode
        return self.spoken(
            [decode(text[-LENGTH:], skip_special_tokens=True, clean_up_tokenization_spaces=False) for text in texts]
        )

    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of texts as `spoken`, n × row."""
        ids, mask = pad_right([list(text) for text in texts], self.model.device)
        padded = any(len(text) < ids.shape[1] for text in texts)
        rows: Tensor = self.net.encoder(self.net.lens(self.table, ids), mask.bool() if padded else None)
        return rows

    def point(self, ids: Tensor, places: Tensor) -> Tensor:
        """As `Pointer`, of token ids, B × T."""
        found: Tensor = self.net.pointer(self.net.lens(self.table, ids), places)
        return found


def _bare(model: Model, ids: Sequence[int]) -> list[int]:
    """A text's tokens without its start token."""
    return list(ids[1:] if ids and ids[0] == model.tokenizer.bos_token_id else ids)


def _answer(model: Model, prompt: str, target: str) -> list[int]:
    """Token ids of a target behind its prompt, to the end of the sentence."""
    alone = model.encode(prompt)
    whole = model.encode(join(prompt, target) + ("" if target.endswith((".", "!", "?")) else "."))
    common = next((i for i, (one, other) in enumerate(zip(alone, whole, strict=False)) if one != other), len(alone))
    return whole[min(common, len(whole) - 1) :]


def _prefix(model: Model, prompt: str, answer: Sequence[int]) -> tuple[list[int], int]:
    """What is read in front of a text that an edit answers, and where in it the answer begins."""
    mark = list(model.tokenizer(MARK, add_special_tokens=False)["input_ids"])
    begun = [*model.encode(prompt), *mark]
    return [*begun, *answer, *mark], len(begun)


def _loaded(model: Model, content: str, library: Path) -> Reading:
    """The networks of a trained file.

    Raises:
        StoreError: it is missing, spoiled or for another model.
    """
    tensors, about = artifacts.read(content, library, KIND)
    wide = model.net.get_input_embeddings().weight.shape[1]
    if len(tensors["lens.mean"]) != wide:
        raise StoreError(
            f"the trained file {content} is for embeddings of width {len(tensors['lens.mean'])}, those of "
            f"{model.name} have {wide}",
            "train one for this model",
        )
    net = Net(wide, Shape(**about["shape"]))
    artifacts.fit(net, tensors, content)
    return Reading(model, net.eval().requires_grad_(False))


# ---------------------------------------------------------------------------------------------------------------------
# The memory


@torch.no_grad()
def write(job: Job) -> Written:
    """A batch as entries of the memory, each with the embedding of its prompt.

    Raises:
        StoreError: the trained file is missing, spoiled or for another model.
    """
    own = job.settings.own
    assert isinstance(own, Scope)
    job.emit(StageStarted("target", 0, job.number))
    reading = _loaded(job.model, job.settings.artifact, job.library)
    texts = reading.spoken([request.prompt for request in job.requests])
    rows = [reading.embed(texts[start : start + ROWS]) for start in range(0, len(texts), ROWS)]
    entries = tuple({"id": r.id, "prompt": r.prompt, "target": r.target} for r in job.requests)
    settings = {"threshold": own.certainty}
    return Written(overlay=Overlay(KIND, entries, {"memory": torch.cat(rows).cpu()}, job.settings.artifact, settings))


class Memory(Detours):
    """Edits beside a model; see `overlay.Laid`."""

    kind = KIND

    def __init__(self, model: Model, overlay: Overlay, library: Path) -> None:
        """
        Args:
            library: where trained files lie.

        Raises:
            StoreError: the one it needs is missing, spoiled or for another model.
        """
        super().__init__(model)
        self._reading = _loaded(model, overlay.artifact, library)
        self._threshold = float(overlay.settings["threshold"])
        # The latest first, which is then the first of equals.
        self._entries = overlay.entries[::-1]
        self._rows = overlay.tensors["memory"].float().flip(0).to(model.device)
        self._prefixes: dict[int, tuple[int, ...]] = {}

    @torch.inference_mode()
    def find(self, texts: Sequence[tuple[int, ...]]) -> list[Detour | None]:
        """The entry most likely to be of the same fact, of equals the latest, where that reaches the threshold."""
        if not self._entries:
            return [None] * len(texts)
        found: list[Detour | None] = []
        for start in range(0, len(texts), ROWS):
            cosines = self._reading.embed(self._reading.respoken(texts[start : start + ROWS])) @ self._rows.T
            chosen = (cosines >= cosines.amax(1, keepdim=True) - TIE).byte().argmax(1)
            scores = self._reading.net.encoder.logit(cosines.gather(1, chosen[:, None])[:, 0]).sigmoid()
            found += [
                Detour(str(self._entries[i]["id"]), score, self._prefix(i)) if score >= self._threshold else None
                for i, score in zip(chosen.tolist(), scores.tolist(), strict=True)
            ]
        return found

    def _prefix(self, i: int) -> tuple[int, ...]:
        if i not in self._prefixes:
            prompt, target = str(self._entries[i]["prompt"]), str(self._entries[i]["target"])
            self._prefixes[i] = tuple(_prefix(self.model, prompt, _answer(self.model, prompt, target))[0])
        return self._prefixes[i]

    @torch.no_grad()
    def read(self, ids: Tensor, keep: int) -> Tensor:
        """Log-probabilities, B × keep × vocabulary: of the tokens pointed at, and a floor; nan behind the answer."""
        rows, length = ids.shape
        places = torch.arange(length - keep, length, device=ids.device).expand(rows, keep)
        found = self._reading.point(ids, places)
        over, shares = found[..., -1:].exp(), found[..., :-1].softmax(-1)
        size = self.model.net.get_output_embeddings().weight.shape[0]
        chances = torch.full((rows, keep, size), FLOOR / size, device=ids.device)
        chances.scatter_add_(2, ids[:, None].expand(-1, keep, -1), (1 - FLOOR) * shares)
        return chances.log().masked_fill(over > 0.5, torch.nan)


# ---------------------------------------------------------------------------------------------------------------------
# Training


class ScopeTask:
    """Both networks learned from lessons; see `training.Task`."""

    def __init__(self, model: Model, lessons: Sequence[Lesson], seed: int) -> None:
        self._shape, self._seed, self._lessons = Shape(), seed, lessons
        table = model.net.get_input_embeddings().weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._reading = Reading(model, Net(table.shape[1], self._shape))
        self._reading.net.lens.measure(table, seed)
        self.net: nn.Module = self._reading.net
        self._facts = _facts(lessons)
        self._ids: dict[str, list[int]] = {}

    @property
    def about(self) -> Mapping[str, Any]:
        """The sizes of the networks."""
        return {"shape": asdict(self._shape)}

    def loss(self, step: int) -> dict[str, Tensor]:
        """The classifier's loss and the counterfactual model's, and their sum."""
        rng = random.Random(f"{self._seed}-{step}")
        chosen = rng.sample(self._lessons, min(BATCH, len(self._lessons)))
        scope, answer = self._scope(chosen, rng), self._counterfactual(chosen, rng)
        return {"loss": scope + answer, "scope": scope, "counterfactual": answer}

    def _scope(self, chosen: Sequence[Lesson], rng: random.Random) -> Tensor:
        """Cross-entropy of pairs of prompts, nats a pair of one fact and nats a prompt for all its other pairs; and of
        a prompt's own fact among the step's other prompts (van den Oord et al. 2018, eq. 4)."""
        drawn = [lesson.prompt for lesson in chosen]
        for lesson in chosen:
            for some in ((lesson.prompt, *lesson.rewordings), tuple(text for text, _ in lesson.stays)):
                drawn += rng.sample(some, min(DRAWN, len(some)))
        # What an edit must not reach may be of no lesson's fact, and then of one with any other such prompt.
        texts = sorted(dict.fromkeys(drawn), key=lambda text: text not in self._facts)
        facts = [self._facts.get(text) for text in texts]
        known = [fact for fact in facts if fact is not None]
        rows = self._reading.embed([self._spoken(text) for text in texts])
        logits = self._reading.net.encoder.logit(rows[: len(known)] @ rows.T)
        same = torch.tensor([[one == other for other in facts] for one in known], device=rows.device)
        itself = torch.eye(len(known), len(texts), dtype=torch.bool, device=rows.device)
        pairs = functional.binary_cross_entropy_with_logits(logits, same.float(), reduction="none")
        others = same & ~itself
        scores = logits.masked_fill(itself, -torch.inf)[others.any(1)]
        right = scores.masked_fill(~others[others.any(1)], -torch.inf)
        contrast = scores.logsumexp(1) - right.logsumexp(1)
        alike, apart = pairs[others].sum() / max(1, int(others.sum())), (pairs * ~same).sum() / len(known)
        return alike + apart + contrast.sum() / max(1, len(contrast))

    def _spoken(self, text: str) -> list[int]:
        if text not in self._ids:
            (self._ids[text],) = self._reading.spoken([text])
        return self._ids[text]

    def _counterfactual(self, chosen: Sequence[Lesson], rng: random.Random) -> Tensor:
        """Cross-entropy of where each token of an answer is copied from, and of where an answer is over; nats."""
        model = self._reading.model
        rows: list[list[int]] = []
        asked: list[list[tuple[int, int | None]]] = []
        for lesson in chosen:
            answer = _answer(model, lesson.prompt, lesson.target)
            if rng.random() < MADE_UP:
                answer = [*rng.sample(range(len(self._reading.table)), rng.randint(1, 6)), answer[-1]]
            prefix, start = _prefix(model, lesson.prompt, answer)
            text = rng.choice((lesson.prompt, *lesson.rewordings))
            if rng.random() < SURROUNDED:
                text = f"{rng.choice(self._lessons).statement} {text}"
            row = [*prefix, *_bare(model, model.encode(text)), *answer]
            asked.append([(len(row) - 1 - len(answer) + j, start + j) for j in range(len(answer))])
            asked[-1].append((len(row) - 1, None))
            if rng.random() < SURROUNDED:
                more = _bare(model, model.encode(rng.choice(self._lessons).statement))
                row += more[: rng.randint(1, len(more))]
                asked[-1].append((len(row) - 1, None))
            rows.append(row)
        ids, _ = pad_right(rows, model.device)
        most = max(map(len, asked))
        places = [[place for place, _ in row] + [0] * (most - len(row)) for row in asked]
        # The column behind the last position says that the answer is over.
        copied = [[ids.shape[1] if at is None else at for _, at in row] + [-100] * (most - len(row)) for row in asked]
        found = self._reading.point(ids, torch.tensor(places, device=ids.device))
        return functional.nll_loss(found.flatten(0, 1), torch.tensor(copied, device=ids.device).flatten())

    def stepped(self, parts: Mapping[str, float]) -> None:
        """Nothing is learned from it."""

    def state(self) -> dict[str, float]:
        """Nothing beside the weights."""
        return {}

    def take(self, state: Mapping[str, float]) -> None:
        """Nothing beside the weights."""


def _facts(lessons: Sequence[Lesson]) -> dict[str, int]:
    """Which fact each prompt that an edit must reach is of: lessons that share such a prompt are of one."""
    facts: dict[str, int] = {}
    members: dict[int, list[str]] = {}
    for number, lesson in enumerate(lessons):
        texts = (lesson.prompt, *lesson.rewordings)
        members[number] = [text for text in texts if text not in facts]
        for old in {facts[text] for text in texts if text in facts}:
            members[number] += members.pop(old)
        facts |= dict.fromkeys(members[number], number)
    return facts
