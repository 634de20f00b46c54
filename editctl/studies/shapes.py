"""Models of real shapes with random weights: what speed and memory are measured on where no checkpoint is at hand.

Knows: two shapes and a tokenizer trained on the texts of the study. Refuses: knowledge; these models have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from editctl.engine.model import Model

SHAPES = ("gpt2-124m", "llama-8b")
VOCABULARY = {"gpt2-124m": 50257, "llama-8b": 128256}
START = "<|endoftext|>"


def tokenizer(texts: Sequence[str], size: int) -> Any:
    """A byte-level BPE of at most `size` pieces trained on the texts, so that a word is about a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[START], initial_alphabet=alphabet, min_frequency=1, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=START, clean_up_tokenization_spaces=False)


def random_model(shape: str, texts: Sequence[str], *, device: str, dtype: torch.dtype, seed: int = 0) -> Model:
    """A model of one of `SHAPES` with random weights, reading with a tokenizer trained on the texts."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    words = tokenizer(texts, VOCABULARY[shape])
    shared: dict[str, Any] = {"vocab_size": VOCABULARY[shape], "bos_token_id": None, "eos_token_id": 0}
    if shape == "gpt2-124m":
        config: Any = GPT2Config(**shared)
    else:
        config = LlamaConfig(
            **shared,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rope_theta=500000.0,
        )
    torch.manual_seed(seed)
    with torch.device(device):
        net = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Model(net.to(device), words, name=f"random {shape}")
