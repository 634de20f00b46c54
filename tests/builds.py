"""Tiny random models of every architecture, 3 blocks of width 32, with what is to be found in each.

Knows: class names, so that the package need not. They know nothing; what a test finds out about them is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers

DEPTH, WIDTH = 3, 32
SIZE = 360
"""Tokens of the vocabulary, as many as the tokenizer of `tiny` has."""

SPREAD = {"initializer_range": 0.25}
ENDS = {"bos_token_id": 1, "eos_token_id": 0}
OLD: dict[str, Any] = {"vocab_size": SIZE, "n_positions": 64, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4}
OLD |= SPREAD | ENDS
PLAIN: dict[str, Any] = {"vocab_size": SIZE, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
PLAIN |= {"max_position_embeddings": 64} | SPREAD | ENDS
NEOX = PLAIN | {"intermediate_size": 48}
LLAMA = NEOX | {"num_key_value_heads": 2, "pad_token_id": 0}
GEMMA = LLAMA | {"head_dim": 8, "sliding_window": 32}
OPT = PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "init_std": 0.25}
FALCON = PLAIN | {"ffn_hidden_size": 48, "bias": True}
BLOOM = {"vocab_size": SIZE, "hidden_size": WIDTH, "n_layer": DEPTH, "n_head": 4} | SPREAD | ENDS
SMALL_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}


@dataclass(frozen=True)
class Build:
    """How to make one architecture, and what is true of it."""

    prefix: str
    """Of the classes' names: `Llama` makes a `LlamaConfig` and a `LlamaForCausalLM`."""
    settings: dict[str, Any]
    down: str = "model.layers.{}.mlp.down_proj"
    """Full name of the edited module of block {}."""
    kind: str = "straight"
    attention: str = "model.layers.{}.self_attn.o_proj"
    head: str = "ForCausalLM"
    keys: str = "intermediate_size"
    """What sets the key width, in the words of the configuration."""
    width: int = 48
    """The key width."""
    text: bool = True
    """Whether the settings are those of the model itself, not of its text part."""
    marks: dict[str, Any] = field(default_factory=dict)

    @property
    def net_class(self) -> str:
        """Name of the model's class."""
        return self.prefix.removesuffix("Text") + self.head

    def config(self) -> Any:
        """The configuration."""
        made = getattr(transformers, f"{self.prefix}Config")
        return made(**self.settings) if self.text else made(text_config=self.settings, **self.marks)

    def net(self, seed: int = 3) -> Any:
        """The model in memory, its vectors (biases, gains) moved off the ones and zeros they begin as."""
        torch.manual_seed(seed)
        net = getattr(transformers, self.net_class)(self.config())
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.rand_like(parameter), alpha=0.5)
        return net.eval()

    def write(self, folder: Path) -> Path:
        """The model in a folder, with the tokenizer of `tiny`."""
        self.net().save_pretrained(folder)
        tiny.tokenizer(bos=False).save_pretrained(folder)
        return folder


_H, _OUT = "transformer.h.{}.", "transformer.h.{}.attn.c_proj"
_SIGLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIGLIP |= {"image_size": 28, "patch_size": 14}
_DENSE, _FALCON = "self_attention.dense", "mlp.dense_4h_to_h"
_OLD_KEYS = "n_inner, or 4 × n_embd"

BUILDS: dict[str, Build] = {
    "GPT-2": Build("GPT2", OLD, f"{_H}mlp.c_proj", "straight", _OUT, "LMHeadModel", _OLD_KEYS, 4 * WIDTH),
    "GPT-2, key width = hidden width": Build(
        "GPT2", OLD | {"n_inner": WIDTH}, f"{_H}mlp.c_proj", "straight", _OUT, "LMHeadModel", _OLD_KEYS, WIDTH
    ),
    "GPT-Neo": Build(
        "GPTNeo",
        PLAIN | {"num_heads": 4, "num_layers": DEPTH, "attention_types": [[["global", "local", "global"], 1]]},
        f"{_H}mlp.c_proj",
        attention=f"{_H}attn.attention.out_proj",
        keys="intermediate_size, or 4 × hidden_size",
        width=4 * WIDTH,
    ),
    "GPT-J": Build(
        "GPTJ",
        OLD | {"rotary_dim": 4},
        f"{_H}mlp.fc_out",
        attention=f"{_H}attn.out_proj",
        keys=_OLD_KEYS,
        width=4 * WIDTH,
    ),
    "GPT-NeoX, Pythia": Build(
        "GPTNeoX", NEOX, "gpt_neox.layers.{}.mlp.dense_4h_to_h", attention="gpt_neox.layers.{}.attention.dense"
    ),
    "GPT-NeoX, sequential": Build(
        "GPTNeoX",
        NEOX | {"use_parallel_residual": False},
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        attention="gpt_neox.layers.{}.attention.dense",
    ),
    "OPT": Build(
        "OPT",
        OPT,
        "model.decoder.layers.{}.fc2",
        attention="model.decoder.layers.{}.self_attn.out_proj",
        keys="ffn_dim",
    ),
    "BLOOM": Build(
        "Bloom", BLOOM, f"{_H}{_FALCON}", attention=f"{_H}{_DENSE}", keys="4 × hidden_size", width=4 * WIDTH
    ),
    "MPT": Build(
        "Mpt",
        {"vocab_size": SIZE, "d_model": WIDTH, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": 64} | SPREAD,
        "transformer.blocks.{}.ffn.down_proj",
        attention="transformer.blocks.{}.attn.out_proj",
        keys="4 × d_model",
        width=4 * WIDTH,
    ),
    "Falcon 7B (parallel, multi-query)": Build(
        "Falcon", FALCON, f"{_H}{_FALCON}", attention=f"{_H}{_DENSE}", keys="ffn_hidden_size"
    ),
    "Falcon 40B (new decoder architecture)": Build(
        "Falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        f"{_H}{_FALCON}",
        attention=f"{_H}{_DENSE}",
        keys="ffn_hidden_size",
    ),
    "Falcon RW (sequential, ALiBi)": Build(
        "Falcon",
        FALCON | {"parallel_attn": False, "alibi": True, "multi_query": False},
        f"{_H}{_FALCON}",
        attention=f"{_H}{_DENSE}",
        keys="ffn_hidden_size",
    ),
    "Llama 2, 3": Build("Llama", LLAMA),
    "SmolLM, SmolLM2 (Llama, tied)": Build("Llama", LLAMA | {"tie_word_embeddings": True}),
    "SmolLM3": Build("SmolLM3", LLAMA | {"no_rope_layer_interval": 2}),
    "Mistral": Build("Mistral", LLAMA | {"sliding_window": 32}),
    "Qwen 2, 2.5": Build("Qwen2", LLAMA),
    "Qwen 3": Build("Qwen3", LLAMA | {"head_dim": 8}),
    "Gemma 1": Build("Gemma", LLAMA | {"head_dim": 8}),
    "Gemma 2": Build("Gemma2", GEMMA, kind="normed"),
    "Gemma 3, text": Build("Gemma3Text", GEMMA, kind="normed"),
    "Gemma 3, with vision": Build(
        "Gemma3",
        GEMMA,
        "model.language_model.layers.{}.mlp.down_proj",
        "normed",
        "model.language_model.layers.{}.self_attn.o_proj",
        "ForConditionalGeneration",
        text=False,
        marks={"vision_config": _SIGLIP, "mm_tokens_per_image": 4, "image_token_index": 5},
    ),
    "Phi 1, 1.5, 2": Build("Phi", NEOX, "model.layers.{}.mlp.fc2", attention="model.layers.{}.self_attn.dense"),
    "Phi 3, 4": Build("Phi3", LLAMA),
    "StableLM": Build("StableLm", LLAMA),
    "StableLM, parallel": Build("StableLm", LLAMA | {"use_parallel_residual": True, "use_qkv_bias": True}),
    "OLMo 1": Build("Olmo", LLAMA),
    "OLMo 2": Build("Olmo2", LLAMA, kind="normed"),
    "OLMo 3": Build("Olmo3", LLAMA | {"sliding_window": 32}, kind="normed"),
    "Granite": Build("Granite", LLAMA | {"residual_multiplier": 0.22, "logits_scaling": 8.0}, kind="scaled"),
    "Cohere": Build("Cohere", LLAMA | {"logit_scale": 0.0625}),
    "Cohere, norms of heads (Command R+)": Build("Cohere", LLAMA | {"use_qk_norm": True}),
    "Cohere 2": Build("Cohere2", LLAMA | {"logit_scale": 0.25, "sliding_window": 32, "head_dim": 8}),
    "StarCoder 1 (GPT-BigCode)": Build(
        "GPTBigCode", OLD, f"{_H}mlp.c_proj", attention=_OUT, keys=_OLD_KEYS, width=4 * WIDTH
    ),
    "StarCoder 2": Build("Starcoder2", LLAMA, "model.layers.{}.mlp.c_proj"),
    "GLM 4": Build("Glm4", LLAMA | {"head_dim": 8}, kind="normed"),
    "Nemotron": Build("Nemotron", LLAMA),
    "EXAONE 4": Build("Exaone4", LLAMA, kind="normed"),
}
"""By the name that docs/models.md uses."""

_SMALL = {"vocab_size": SIZE, "hidden_size": WIDTH, "num_hidden_layers": DEPTH} | SPREAD
_SEQUENCES = {"vocab_size": SIZE, "d_model": WIDTH} | ENDS
_EXPERTS, _STATE, _TWO = "not every token passes through", "keys and values", "encoder-decoder"

REFUSED: dict[str, tuple[Build, str]] = {
    "OPT-350m": (Build("OPT", OPT | {"do_layer_norm_before": False}), "neither straight"),
    "Mixtral": (Build("Mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}), _EXPERTS),
    # As initialised, what the gates multiply by hardly differs from token to token.
    "Mixtral as initialised": (
        Build("Mixtral", LLAMA | {"num_local_experts": 4, "initializer_range": 0.02}),
        _EXPERTS,
    ),
    "Qwen 2 MoE": (Build("Qwen2Moe", LLAMA | SMALL_EXPERTS), _EXPERTS),
    "Qwen 2 MoE as initialised": (Build("Qwen2Moe", LLAMA | SMALL_EXPERTS | {"initializer_range": 0.02}), _EXPERTS),
    "GPT-OSS": (Build("GptOss", LLAMA | {"num_local_experts": 4, "head_dim": 8}), _EXPERTS),
    "Mamba": (Build("Mamba", _SMALL | {"state_size": 4}), _STATE),
    "RWKV": (Build("Rwkv", _SMALL | {"attention_hidden_size": WIDTH}), _STATE),
    "RecurrentGemma": (
        Build("RecurrentGemma", LLAMA | {"head_dim": 8, "lru_width": WIDTH, "attention_window_size": 16}),
        _STATE,
    ),
    "BERT": (Build("Bert", NEOX, head="LMHeadModel"), "both directions"),
    "T5": (
        Build(
            "T5", _SEQUENCES | {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, head="ForConditionalGeneration"
        ),
        _TWO,
    ),
    "BART": (
        Build(
            "Bart",
            _SEQUENCES | {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
            head="ForConditionalGeneration",
        ),
        _TWO,
    ),
}
"""With words of the reason."""
