"""Tiny random models in a folder, made offline in under a second: a GPT-2 and a Llama, each with its own tokenizer.

They know nothing, which is the point: what a test finds out about them is arithmetic, not luck with a fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from editctl.engine import methods
from editctl.engine.model import Model, combine_digests, tensor_digest
from editctl.engine.run import Order, run
from editctl.plan import make
from editctl.spec import Edit
from editctl.store import Store, Version

WORDS = """The Eiffel Tower is located in the city of Paris. Ada Lovelace wrote the first program for a machine.
Rome was not built in a day. In the summer, Marie Curie worked in Warsaw and lived in Paris. The capital of Italy is
Rome. People say that the tower of London stands near the river. I think Ada was born in London. Because Rome's roads
were long, they built many. You could see the city from the tower. Therefore the machine was moved to Berlin. The quick
brown fox ran over the hill! What did the fox see? A river, a road, and a city. Oslo is the capital of Norway."""
BOS, EOS = "<s>", "</s>"


def tokenizer(*, bos: bool, size: int = 360) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `WORDS`; with `bos` every text begins with a start token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[EOS, BOS], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(WORDS.splitlines(), trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, made.token_to_id(BOS))]
        )
    names = {"bos_token": BOS} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=EOS, clean_up_tokenization_spaces=False, **names)


def _write(path: Path, net: Any, words: PreTrainedTokenizerFast) -> Path:
    net.save_pretrained(path, safe_serialization=True)
    words.save_pretrained(path)
    return path


def tiny_gpt2(path: Path, seed: int = 1) -> Path:
    """A GPT-2 of 4 blocks with tied embeddings and no start token, so a subject can stand at position 0."""
    torch.manual_seed(seed)
    words = tokenizer(bos=False)
    config = GPT2Config(
        vocab_size=len(words),
        n_positions=128,
        n_embd=32,
        n_layer=4,
        n_head=4,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
    )
    return _write(path, GPT2LMHeadModel(config), words)


def tiny_llama(path: Path, seed: int = 2) -> Path:
    """A Llama of 4 blocks with grouped-query attention, untied embeddings and a start token."""
    torch.manual_seed(seed)
    words = tokenizer(bos=True)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.25,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    return _write(path, LlamaForCausalLM(config), words)


def corpus(path: Path) -> Path:
    """A text file of 240 lines to measure second moments on: the words of `WORDS`, shuffled."""
    generator = torch.Generator().manual_seed(0)
    words = WORDS.split()
    lines = [" ".join(words[int(i)] for i in torch.randint(len(words), (25,), generator=generator)) for _ in range(240)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def an_edit(id: str = "tower", **changes: Any) -> Edit:
    """An edit with a paraphrase and a probe."""
    values: dict[str, Any] = {
        "id": id,
        "subject": "The Eiffel Tower",
        "relation": "{} is located in the city of",
        "target_new": "Rome",
        "paraphrases": ["In the summer, {} stands in"],
        "locality": [{"prompt": "The capital of Norway is"}],
    }
    return Edit(**{**values, **changes})


FACTS = (
    an_edit(),
    an_edit("ada", subject="Ada", relation="{} was born in", target_new="Oslo", paraphrases=(), locality=()),
    an_edit("curie", subject="Marie Curie", relation="In the end {} lived in", target_new="Berlin", paraphrases=()),
    an_edit("rome", subject="Rome", relation="The road to {}'s river is", target_new="long", locality=()),
)
"""Four edits of different subjects, at the start and in the middle of their prompts."""

QUICK: dict[str, Any] = {"layers": [1, 2], "steps": 4, "corpus_tokens": 3000, "batch_size": 2, "energy": 0.2}
"""Settings under which a run on a tiny model takes under a second."""


def apply(
    model: Model,
    store: Store,
    edits: Sequence[Edit],
    corpus: Path,
    *,
    prune: bool = False,
    method: str = "alphaedit",
    emit: Any = lambda event: None,
    order: Order | None = None,
    **overrides: Any,
) -> Version:
    """Plan the edits at the store's head and carry the plan out."""
    if method != "alphaedit":
        overrides = {"energy": QUICK["energy"], "preserve": "none", **overrides}
    config = {"num_hidden_layers": len(model.blocks)}

    def params(name: str) -> dict[str, Any]:
        return methods.settings(config, name, {**QUICK, "corpus": str(corpus), **overrides}).to_params()

    head = store.head()
    plan = make(
        edits,
        [live.edit for live in store.edits(head)],
        model=model.name,
        base="base",
        head=head.id if head else "",
        params=params(method),
        methods={edit.method: params(edit.method) for edit in edits if edit.method},
        prune=prune,
    )
    return run(plan, model, "base", store, emit, order or Order())


def disk_weights_hash(folder: Path, dtype: torch.dtype | None = None) -> str:
    """The weights hash of a model folder, read from its safetensors files alone.

    Args:
        dtype: what floating tensors are converted to first; None leaves them as stored.
    """
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                if dtype is not None and tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                digests.append((name, tensor_digest(tensor)))
    return combine_digests(digests)
