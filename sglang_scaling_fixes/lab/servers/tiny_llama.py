"""Writes the lab's random checkpoint; runs in a release's own Python (numpy, safetensors).

Dummy weights hardly attend, so that corrupted KV would not show.  Here embeddings
have unit variance and q/k a large gain: each position attends sharply to a few
others anywhere in the prompt, and the output depends on all of it.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

LAYERS = 4
HEADS = 8
HEAD_DIM = 128
HIDDEN = 512
INTERMEDIATE = 512
VOCAB = 4096
CONTEXT = 4096
QK_GAIN = 2.0


def config() -> dict[str, object]:
    """The model's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": CONTEXT,
        "mlp_bias": False,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB,
    }


def write(folder: Path, seed: int) -> None:
    """Write config.json and model.safetensors (float32, about 60 MB) into `folder`."""
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> object:
        values = random.standard_normal((rows, columns), dtype=np.float32)
        return values * np.float32(gain / math.sqrt(columns))

    width = HEADS * HEAD_DIM
    ones: object = np.ones(HIDDEN, dtype=np.float32)
    tensors = {
        "model.embed_tokens.weight": random.standard_normal((VOCAB, HIDDEN), dtype=np.float32),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors[at + "self_attn.q_proj.weight"] = matrix(width, HIDDEN, QK_GAIN)
        tensors[at + "self_attn.k_proj.weight"] = matrix(width, HIDDEN, QK_GAIN)
        tensors[at + "self_attn.v_proj.weight"] = matrix(width, HIDDEN)
        tensors[at + "self_attn.o_proj.weight"] = matrix(HIDDEN, width, 2.0)
        tensors[at + "mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[at + "mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        tensors[at + "mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
        tensors[at + "input_layernorm.weight"] = ones
        tensors[at + "post_attention_layernorm.weight"] = ones
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(), indent=2))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
