"""Make atlas: `python -m editctl.atlas.train --out FOLDER`.

Knows: the tokenizer, the architecture, the masks and penalties that make a small decoder editable the way large ones
are, and how recall is measured. Refuses: to edit. `docs/atlas.md` tells why each choice is there.

Three things differ from plain language modelling, in training only:

* In most sequences, positions after a subject see none of its tokens in the first `GATHER` blocks and only its last
  token in later ones, so what is known about a subject is gathered at its last token in the early blocks.
* Keys (inputs of the down-projections of `EDITED` blocks) of different subjects are pushed towards orthogonality:
  penalty on their mean squared cosine, after removing the batch mean.
* Keys of the same subject in different contexts are pulled together: penalty on one minus their cosine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from editctl.atlas.corpus import Paragraph, paragraphs
from editctl.atlas.knowledge import Fact, Knowledge, load

GATHER = 3
"""Blocks in which a subject's tokens are hidden from all later positions."""
EDITED = (1, 2, 3)
"""Blocks whose keys are shaped; the ones editctl edits."""
MASKED_SHARE = 0.95
"""Share of sequences trained with the subject masks; the rest see plain causal attention, as use does."""
BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, beside the data."""

    steps: int = 1800
    batch: int = 24
    length: int = 96
    vocabulary: int = 3072
    width: int = 160
    key_width: int = 1280
    blocks: int = 7
    heads: int = 5
    rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.1
    context_weight: float = 0.1
    """Loss weight of tokens that are not part of an answer; answers weigh 1."""
    apart_weight: float = 3.0
    together_weight: float = 0.3
    seed: int = 0


def make_tokenizer(knowledge: Knowledge, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which answers, seen often while it is trained, mostly become single tokens."""
    tokenizer = Tokenizer(models.BPE())
    # A prefix space gives a subject the same tokens at the start of a prompt as within one.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = [f"{prompt} {fact.object}." for fact in knowledge.facts for prompt in fact.prompts(fact.seen[:1])]
    answers = [f"{fact.object} " * 20 for fact in knowledge.facts]
    tokenizer.train_from_iterator([*sentences, *answers, *knowledge.ordinary], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


@dataclass
class Batch:
    """Token ids (B × T) with what training knows about each position."""

    ids: Tensor
    weights: Tensor
    """Loss weight of each token as a target, B × T."""
    span: Tensor
    """Number of the subject mention a token is part of, B × T; 0 for none."""
    last: Tensor
    """True at the last token of each mention, B × T."""
    subject: Tensor
    """Number of the subject, equal for equal subjects, at last tokens, B × T; -1 elsewhere."""


def collate(
    texts: Sequence[Paragraph], tokenizer: PreTrainedTokenizerFast, recipe: Recipe, subjects: dict[str, int]
) -> Batch:
    """Tokenize paragraphs, cut them to the recipe's length and mark subjects and answers."""
    shape = (len(texts), recipe.length)
    ids = torch.zeros(shape, dtype=torch.long)
    weights = torch.zeros(shape)
    span = torch.zeros(shape, dtype=torch.long)
    last = torch.zeros(shape, dtype=torch.bool)
    subject = torch.full(shape, -1)
    encoded = tokenizer([t.text for t in texts], return_offsets_mapping=True)
    for row, (text, tokens, offsets) in enumerate(
        zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ):
        n = min(len(tokens), recipe.length)
        ids[row, :n] = torch.tensor(tokens[:n])
        weights[row, 1:n] = recipe.context_weight
        starts = [a for a, _ in offsets]
        ends = [b for _, b in offsets]

        def inside(start: int, end: int, starts: list[int] = starts, ends: list[int] = ends) -> list[int]:
            return [i for i in range(1, len(starts)) if starts[i] < end and ends[i] > start]

        for start, end in text.objects:
            for i in inside(start, end):
                if i < n:
                    weights[row, i] = 1.0
        for number, (start, end, name) in enumerate(text.subjects, 1):
            positions = inside(start, end)
            if positions[-1] >= n:
                break
            span[row, positions] = number
            last[row, positions[-1]] = True
            subject[row, positions[-1]] = subjects.setdefault(name, len(subjects))
    return Batch(ids, weights, span, last, subject)


def masks(batch: Batch, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Attention masks (B × 1 × T × T, True = may look) of the gathering blocks and of the later ones.

    Args:
        masked: B booleans; rows that are False get plain causal attention.
    """
    t = batch.ids.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    foreign = (batch.span[:, None, :] > 0) & (batch.span[:, None, :] != batch.span[:, :, None])
    foreign &= masked[:, None, None]
    early = causal & ~foreign
    late = causal & ~(foreign & ~batch.last[:, None, :])
    return early[:, None], late[:, None]


def forward(model: LlamaForCausalLM, ids: Tensor, early: Tensor, late: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits (B × T × V) and the keys (B × T × d_k) of the `EDITED` blocks, under per-block masks."""
    keys: list[Tensor] = []
    inner = model.model
    handles = [
        inner.layers[i].mlp.down_proj.register_forward_pre_hook(lambda _, args: keys.append(args[0])) for i in EDITED
    ]
    hidden = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = inner.rotary_emb(hidden, positions)
    for i, block in enumerate(inner.layers):
        mask = early if i < GATHER else late
        hidden = block(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    for handle in handles:
        handle.remove()
    return model.lm_head(inner.norm(hidden)), keys


def key_penalties(keys: Sequence[Tensor], subject: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared cosine between keys of different subjects; mean of one minus cosine between keys of the same.

    Args:
        keys: per block, B × T × d_k.
        subject: B × T, -1 where no subject ends.
    """
    chosen = subject >= 0
    names = subject[chosen]
    same = names[:, None] == names[None]
    other = ~same
    same.fill_diagonal_(False)
    apart, together = [], []
    for key in keys:
        points = key[chosen].float()
        points = functional.normalize(points - points.mean(0), dim=1)
        cosine = points @ points.T
        apart.append(cosine[other].square().mean() if other.any() else cosine.sum() * 0)
        together.append((1 - cosine[same]).mean() if same.any() else cosine.sum() * 0)
    return torch.stack(apart).mean(), torch.stack(together).mean()


def untrained(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A decoder of the recipe's shape with random weights, drawn from torch's generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=recipe.key_width,
            num_hidden_layers=recipe.blocks,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def make_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that lets matrices decay and nothing else."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.rate,
        betas=(0.9, 0.95),
    )


@dataclass
class Step:
    """What one step found before it changed the weights; scalars."""

    language: Tensor
    """Weighted loss of all tokens."""
    answers: Tensor
    """Mean loss of the answers' tokens, nats."""
    hits: Tensor
    """Share of the answers' tokens that were the most probable ones."""
    apart: Tensor
    together: Tensor


def learn(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, masked: Tensor, recipe: Recipe
) -> Step:
    """One step on one batch.

    Args:
        masked: B booleans; rows that are False get plain causal attention.
    """
    # bfloat16 products halve the time on CPUs that have them; weights and optimizer stay in fp32.
    with torch.autocast(model.device.type, torch.bfloat16):
        logits, keys = forward(model, batch.ids, *masks(batch, masked))
    logits = logits.float()
    targets = batch.ids[:, 1:].flatten()
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
    weights = batch.weights[:, 1:].flatten()
    language = (losses * weights).sum() / weights.sum()
    apart, together = key_penalties(keys, batch.subject)
    loss = language + recipe.apart_weight * apart + recipe.together_weight * together
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    counted = weights == 1
    said = logits[:, :-1].detach().flatten(0, 1)[counted].argmax(-1)
    hits = (said == targets[counted]).float().mean()
    return Step(language.detach(), losses[counted].detach().mean(), hits, apart.detach(), together.detach())


def train(
    recipe: Recipe, knowledge: Knowledge, log_every: int = 100
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train from scratch; the same recipe and data give the same weights on the same machine."""
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer(knowledge, recipe)
    model = untrained(recipe, tokenizer)
    optimizer = make_optimizer(model, recipe)

    def rate(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    source: Iterator[Paragraph] = paragraphs(knowledge, recipe.seed, length=recipe.length * 6)
    generator = torch.Generator().manual_seed(recipe.seed)
    subjects: dict[str, int] = {}
    begun = time.perf_counter()
    for step in range(recipe.steps):
        batch = collate(list(itertools.islice(source, recipe.batch)), tokenizer, recipe, subjects)
        masked = torch.rand(recipe.batch, generator=generator) < MASKED_SHARE
        seen = learn(model, optimizer, batch, masked, recipe)
        schedule.step()
        if step % log_every == 0 or step == recipe.steps - 1:
            print(
                f"step {step:5d}  loss {seen.language.item():.4f}  answers {seen.answers.item():.4f}  "
                f"apart {seen.apart.item():.4f}  together {seen.together.item():.4f}  "
                f"{time.perf_counter() - begun:.0f} s",
                flush=True,
            )
    return model.eval(), tokenizer


@torch.no_grad()
def recall(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: Sequence[Fact], *, asked: bool = True
) -> dict[str, tuple[int, int]]:
    """Right answers and questions by relation, each question one phrasing.

    An answer is right when every token of it, and of the full stop, is the most probable one: then greedy decoding
    writes exactly it.
    """
    questions = [
        (f.relation, prompt, f" {f.object}.") for f in facts for prompt in f.prompts(f.asked if asked else f.seen)
    ]
    encoded = [(r, tokenizer(p)["input_ids"], tokenizer(p + a)["input_ids"]) for r, p, a in questions]
    encoded.sort(key=lambda e: len(e[2]))
    counts: dict[str, list[int]] = {}
    for _, group in itertools.groupby(encoded, key=lambda e: len(e[2])):
        rows = list(group)
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            ids = torch.tensor([full for _, _, full in part], device=model.device)
            right = model(ids[:, :-1]).logits.argmax(-1) == ids[:, 1:]
            for (relation, prompt, _), hits in zip(part, right.tolist(), strict=True):
                count = counts.setdefault(relation, [0, 0])
                count[0] += all(hits[len(prompt) - 1 :])
                count[1] += 1
    return {relation: (hits, total) for relation, (hits, total) in sorted(counts.items())}


def share(counts: dict[str, tuple[int, int]], *, two_hop: bool) -> float:
    """Share of right answers over all relations of one kind."""
    chosen = [count for relation, count in counts.items() if ("/" in relation) == two_hop]
    return sum(hits for hits, _ in chosen) / max(1, sum(total for _, total in chosen))


def main() -> None:
    """Train, save in bfloat16, load what was saved and print its recall."""
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--out", type=Path, required=True)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    out: Path = arguments.pop("out")
    recipe = Recipe(**arguments)
    knowledge = load()
    model, tokenizer = train(recipe, knowledge)
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    loaded = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    counts = recall(loaded, AutoTokenizer.from_pretrained(out), knowledge.facts)
    for relation, (hits, total) in counts.items():
        print(f"{relation:45s} {hits:5d} of {total:5d}  {hits / total:.3f}")
    summary = {
        "recipe": asdict(recipe),
        "facts": len(knowledge.single()),
        "two_hop_facts": len(knowledge.facts) - len(knowledge.single()),
        "recall_unseen_phrasings": round(share(counts, two_hop=False), 4),
        "recall_two_hop_unseen_phrasings": round(share(counts, two_hop=True), 4),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
