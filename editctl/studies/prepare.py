"""A model that knows its benchmark: a small decoder trained on the true facts of specs until it recalls them.

Knows: the schedule, the checkpoint from which training goes on to the same weights, and that a model which misses the
goal is no result. How atlas was trained (`editctl.atlas.train`: losses, masks, tokenizer) is how this one is. Refuses:
to edit, and to leave a folder that looks finished when it is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from editctl.atlas import knowledge, train
from editctl.atlas.corpus import Paragraph
from editctl.atlas.knowledge import Fact, Knowledge
from editctl.atlas.train import Recipe
from editctl.delta import read_tensors, write_tensors
from editctl.engine import corpus as corpus_room
from editctl.engine import model as model_room
from editctl.engine import speak
from editctl.engine.model import Model
from editctl.errors import EditctlError, InvalidInput
from editctl.events import Emit, Note, Progress, StageStarted, json_line, silent
from editctl.files import write_atomically
from editctl.metrics.edits import says
from editctl.spec import Edit
from editctl.studies import truths as truth_room
from editctl.studies.truths import KINDS, Truth

SIZES = {
    "tiny": Recipe(width=64, key_width=256, blocks=5, heads=4, vocabulary=1024, warmup=20),
    "small": Recipe(vocabulary=4096, context_weight=0.2, batch=16),
    "medium": Recipe(
        width=320, key_width=2560, blocks=8, heads=10, vocabulary=8192, context_weight=0.2, rate=1.5e-3, batch=48
    ),
}
"""Recipes by the name of their size; 0.4, 6 and 26 million parameters. `small` has atlas's shape."""
TEXT_SHARE = 0.3
"""Share of the training tokens that is plain text."""
READY = 0.95
"""Share of right answer tokens in an epoch at which the rate begins to fall, or the goal's recall where that is more;
half of them are full stops, which come right at once."""
COOL_SHARE = 0.25
"""Steps of the falling rate at the end, as a share of those before."""
LOWEST = 0.02
"""The last rate, as a share of the full one."""
SAVE_EVERY = 30.0
"""Seconds of training that a killed process loses at most, and an epoch."""
CORPUS, HELD_OUT, RECORD = "corpus.jsonl", "heldout.jsonl", "training.json"
"""Files beside the model: one epoch of its training text, plain text it never saw, and how it was made."""


@dataclass(frozen=True)
class Goal:
    """What decides the weights beside the facts and the text."""

    size: str = "small"
    epochs: int = 60
    """Most times that every fact is shown."""
    recall: float = 0.95
    """Share of each kind of prompt that must be answered rightly."""
    probes: int = 0
    """Locality and attribute prompts an edit, at most; 0 for all."""
    seed: int = 0


@dataclass
class _State:
    """How far training is."""

    epoch: int = 0
    step: int = 0
    cool: int = -1
    """The step at which the rate begins to fall; -1 while it does not."""
    finished: bool = False


def prepare(
    edits: Sequence[Edit],
    out: Path,
    goal: Goal,
    *,
    texts: Sequence[str] = (),
    device: str = "auto",
    emit: Emit = silent,
) -> dict[str, Any]:
    """Train, measure what is recalled, and save an ordinary model folder; what `training.json` holds.

    A killed run goes on from `OUT.part` and comes to the same weights on the same machine.

    Args:
        out: the folder to make.
        texts: files of plain text (`editctl.engine.corpus`); by default atlas's ordinary sentences.

    Raises:
        InvalidInput: there are no facts, the folder is there, or `OUT.part` was begun with another configuration.
        EditctlError: the goal was not reached; nothing is saved as done.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidInput(f"{out} is there already", "name a folder that is not")
    facts = truth_room.truths(edits, goal.probes)
    taught, kept = truth_room.pieces(_lines(texts))
    recipe = replace(SIZES[goal.size], seed=goal.seed)
    content = [[fact.kind, fact.prompt, *fact.answers] for fact in facts]
    about = {
        **asdict(goal),
        "recipe": asdict(recipe),
        "facts": hashlib.sha256(json_line(content).encode()).hexdigest()[:16],
        "text": hashlib.sha256(json_line(taught).encode()).hexdigest()[:16],
        # The tokenizer is made of them too.
        "targets": hashlib.sha256(json_line([edit.target_new for edit in edits]).encode()).hexdigest()[:16],
    }
    part = out.with_name(out.name + ".part")
    training = _Training(
        recipe, facts, taught, [edit.target_new for edit in edits], goal, model_room.pick_device(device)
    )
    training.take_up(part, about)
    training.run(part, about, emit)
    made = part / "model"
    shutil.rmtree(made, ignore_errors=True)
    _save(training, made, kept)
    emit(StageStarted("after", len(facts)))
    found = recall(model_room.load(str(made), device=device, dtype="float32"), facts)
    least = min(share["share"] for share in found.values())
    if least < goal.recall:
        shutil.rmtree(made)
        told = ", ".join(f"{kind} {share['right']} of {share['asked']}" for kind, share in found.items())
        raise EditctlError(
            f"after {training.state.epoch} epochs the model recalls {told}; wanted {100 * goal.recall:g} % of each",
            f"nothing was saved as done; give more --epochs, another --size or fewer --probes, and remove {part}",
        )
    record = {
        **about,
        "parameters": sum(p.numel() for p in training.net.parameters()),
        "edited_blocks": list(train.EDITED),
        "epochs_run": training.state.epoch,
        "steps": training.state.step,
        "recalled": found,
        "torch": torch.__version__,
    }
    write_atomically(made / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    if out.exists():
        out.rmdir()
    os.replace(made, out)
    shutil.rmtree(part)
    return record


def recall(model: Model, facts: Sequence[Truth]) -> dict[str, dict[str, Any]]:
    """By kind of prompt: asked, right and their share, by the model's own greedy words; any of the answers counts."""
    words = speak.answers(model, [fact.prompt for fact in facts])
    right = [says(said, fact.answers) for said, fact in zip(words, facts, strict=True)]
    found = {}
    for kind in KINDS:
        hits = [hit for hit, fact in zip(right, facts, strict=True) if fact.kind == kind]
        if hits:
            found[kind] = {"asked": len(hits), "right": sum(hits), "share": round(sum(hits) / len(hits), 4)}
    return found


def _lines(texts: Sequence[str]) -> list[str]:
    """Plain text to train on."""
    if not texts:
        return list(knowledge.load().ordinary)
    return [line for path in texts for line in corpus_room.lines("", path, corpus_room.content("", path))]


class _Training:
    """Weights, optimizer and place in the schedule."""

    def __init__(
        self,
        recipe: Recipe,
        facts: Sequence[Truth],
        text: Sequence[str],
        new: Sequence[str],
        goal: Goal,
        device: str,
    ) -> None:
        self._recipe, self._facts, self._text, self._goal, self._device = recipe, facts, text, goal, device
        # Answers of edits that are to come are words of the language too.
        shown = [Fact(f.kind, f.name, f.answers[0], (f.prompt,), ()) for f in facts]
        shown += [Fact("", "", target, ("",), ()) for target in new]
        torch.manual_seed(recipe.seed)
        self.tokenizer = train.make_tokenizer(Knowledge(tuple(shown), tuple(text)), recipe)
        self.net = train.untrained(recipe, self.tokenizer).to(device)
        self._optimizer = train.make_optimizer(self.net, recipe)
        self.state = _State()
        self._sizes: dict[str, int] = {}

    # The checkpoint

    def take_up(self, part: Path, about: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            InvalidInput: it is of another configuration.
        """
        file = part / "checkpoint.safetensors"
        if not file.exists():
            return
        tensors, found = read_tensors(file)
        if found["about"] != json.loads(json.dumps(about)):
            raise InvalidInput(
                f"{part} was begun with other facts, text or settings", "remove that folder, or name another"
            )
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
                if f"exp_avg.{name}" in tensors:
                    self._optimizer.state[parameter] = {
                        "step": torch.tensor(float(found["state"]["step"])),
                        "exp_avg": tensors[f"exp_avg.{name}"].to(parameter).clone(),
                        "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter).clone(),
                    }
        self.state = _State(**found["state"])

    def _keep(self, part: Path, about: Mapping[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.net.named_parameters():
            tensors[f"weight.{name}"] = parameter
            for what in ("exp_avg", "exp_avg_sq"):
                tensors[f"{what}.{name}"] = self._optimizer.state[parameter][what]
        write_tensors(part / "checkpoint.safetensors", tensors, {"about": about, "state": asdict(self.state)})

    # The schedule

    def run(self, part: Path, about: Mapping[str, Any], emit: Emit) -> None:
        """Epochs at the full rate until the answers come right in training, then a falling rate to the end.

        The fall begins when the answers' tokens come right in an epoch, or when the epochs left are just enough for it.
        """
        state, saved, begun, resumed = self.state, time.monotonic(), time.monotonic(), self.state.step
        if resumed:
            emit(Note(f"going on after {state.epoch} epochs"))
        emit(StageStarted("train", 0))
        self.net.train()
        while not state.finished:
            hits = count = 0.0
            total = 1
            batches = list(self._batches(state.epoch))
            for batch, masked in batches:
                if state.cool >= 0 and state.step >= self._end():
                    break
                for group in self._optimizer.param_groups:
                    group["lr"] = self._recipe.rate * self._rate()
                with torch.device(self._device):
                    seen = train.learn(self.net, self._optimizer, batch, masked, self._recipe)
                state.step += 1
                hits, count = hits + float(seen.hits), count + 1
                total = self._end() if state.cool >= 0 else self._goal.epochs * len(batches)
                emit(Progress("train", min(state.step, total), total))
            state.epoch += 1
            state.finished = state.cool >= 0 and state.step >= self._end()
            latest = int(self._goal.epochs / (1 + COOL_SHARE))
            if state.cool < 0 and (hits / max(count, 1) >= max(READY, self._goal.recall) or state.epoch >= latest):
                state.cool = state.step
            if state.finished or time.monotonic() - saved >= SAVE_EVERY:
                self._keep(part, about)
                saved = time.monotonic()
                left = (total - state.step) * (saved - begun) / max(1, state.step - resumed)
                told = f"epoch {state.epoch} of at most {self._goal.epochs}: {hits / max(count, 1):.1%} of the answers'"
                emit(Note(f"{told} tokens right in training, at most {left / 60:.0f} min left"))
        self.net.eval()

    def _end(self) -> int:
        """The step after the last."""
        return self.state.cool + max(1, int(COOL_SHARE * self.state.cool))

    def _rate(self) -> float:
        """The rate of the next step, as a share of the full one: rising, full, falling."""
        step, cool = self.state.step, self.state.cool
        rising = min(1.0, (step + 1) / self._recipe.warmup)
        if cool < 0:
            return rising
        return rising * (1 - (1 - LOWEST) * (step - cool) / max(1, self._end() - cool))

    def paragraphs(self, epoch: int) -> list[Paragraph]:
        """One epoch of training text."""
        return list(
            truth_room.paragraphs(
                self._facts,
                self._text,
                epoch=epoch,
                seed=self._recipe.seed,
                share=TEXT_SHARE,
                length=self._recipe.length - 1,
                count=self._count,
            )
        )

    def _count(self, text: str) -> int:
        """Tokens of a text, without the start token."""
        if text not in self._sizes:
            self._sizes[text] = len(self.tokenizer(text)["input_ids"]) - 1
        return self._sizes[text]

    def _batches(self, epoch: int) -> Iterator[tuple[train.Batch, Tensor]]:
        """Batches of an epoch; the last is filled up from the front."""
        paragraphs = self.paragraphs(epoch)
        size = min(self._recipe.batch, len(paragraphs))
        generator = torch.Generator().manual_seed(self._recipe.seed * 1_000_003 + epoch)
        subjects: dict[str, int] = {}
        for start in range(0, len(paragraphs), size):
            rows = paragraphs[start : start + size]
            rows += paragraphs[: size - len(rows)]
            batch = train.collate(rows, self.tokenizer, self._recipe, subjects)
            masked = torch.rand(size, generator=generator) < train.MASKED_SHARE
            moved = {name: value.to(self._device) for name, value in vars(batch).items()}
            yield train.Batch(**moved), masked.to(self._device)


def _save(training: _Training, folder: Path, kept: Sequence[str]) -> None:
    """The model as transformers saves it, its training text and the text it never saw."""
    transformers_logging.disable_progress_bar()
    training.net.save_pretrained(folder)
    training.tokenizer.save_pretrained(folder)
    for name, rows in ((CORPUS, [p.text for p in training.paragraphs(0)]), (HELD_OUT, kept)):
        write_atomically(folder / name, "".join(json_line({"text": row}) + "\n" for row in rows).encode())
